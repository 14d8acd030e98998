"""`SimulatedBackend`: carries out a policy's decisions on a simulated cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import simpy

from simrl.policies.contract import Prompt, Start
from simrl.policies.runtime.backend import ClusterBackend
from simrl.policies.runtime.function import ClusterFunction
from simrl.policies.runtime.rollout import Rollout
from simrl.policies.runtime.steps import StepState, StepWork, total_tokens
from simrl.policies.runtime.view import View
from simrl.simulator.costs import CostModel, DoesNotFit
from simrl.simulator.engine import Request
from simrl.simulator.estimates import ProfiledEstimates
from simrl.simulator.function import SimFunction
from simrl.simulator.network import Network, NodeLinks
from simrl.traces.records import Recorder


class SimulatedBackend(ClusterBackend):
    """A simulated cluster that trains for `job.steps` steps.

    Args:
        costs: What things take on this cluster; knows the job.
        work: The work of a step, by its number.
        recorder: Gets every fact of the run.
        seed: Root of the random streams (cold-start times).
        on_step: Called with the number of learned steps, for progress.
    """

    def __init__(
        self,
        costs: CostModel,
        work: Callable[[int], StepWork],
        recorder: Recorder,
        seed: int,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(costs.job, costs.engine, costs.nodes, costs.node.gpus, work, recorder, on_step)
        self.costs, self.seed = costs, seed
        self.max_batched_tokens = costs.max_batched_tokens

    def reset(self) -> View:
        """Begin the job at time 0 with an empty cluster and an empty record."""
        view = super().reset()
        self.nodes = [NodeLinks() for _ in range(self.num_nodes)]
        self.network = Network(self.env, self.nodes, self.costs)
        return view

    def new_environment(self) -> simpy.Environment:
        """Simulated time."""
        return simpy.Environment()

    def new_function(self, decision: Start) -> SimFunction:
        """A simulated function."""
        return SimFunction(self, decision.function, decision.gpus, decision.roles, decision.node)

    def new_rollouts(self, step: int, prompt: Prompt, lengths: Sequence[int]) -> Sequence[Rollout]:
        """Requests of a known length."""
        group, tokens = prompt.responses[0], prompt.tokens
        return [
            Request(response_id, group, tokens, length, 0, 0, 0, 0, step)
            for response_id, length in zip(prompt.responses, lengths, strict=True)
        ]

    def estimates(self) -> ProfiledEstimates:
        """The cost model's."""
        return ProfiledEstimates(self.costs, self.learner_world() or None, self.typical_context())

    def misfit(self, function: ClusterFunction) -> tuple[str, str] | None:
        """Memory that the function's roles need, and KV that an engine has already, against its GPUs."""
        assert isinstance(function, SimFunction)
        world, engine = function.learner_world(), function.engine
        try:
            self.costs.check_fit(function.gpus, function.roles, world)
        except DoesNotFit as error:
            return str(error), "what fits on its GPUs"
        if engine is not None and engine.kv_blocks > self.costs.kv_blocks(function.gpus, world):
            reason = f"{function.name!r} has KV where its larger share of the learner's state would be"
            return reason, "releasing learners before the engines of others have started"
        return None

    def parked_bytes(self, function: ClusterFunction) -> tuple[float, float]:
        """What stays of a parked function in host memory, and the host memory of a node."""
        assert isinstance(function, SimFunction)
        here = self.costs.resident_bytes(function.gpus, function.roles, function.learner_world())
        return function.gpus * here, self.costs.node.host_memory_bytes

    def learn_work(self, functions: Sequence[ClusterFunction], state: StepState) -> Callable[[], simpy.Event]:
        """Learning on all responses of a step."""
        gpus = sum(function.gpus for function in functions)
        tokens = [total_tokens(rollout) for rollout in state.rollouts]
        nodes = len({function.node for function in functions})
        seconds = self.costs.learn_s(tokens, gpus, nodes)
        return lambda: self.env.timeout(seconds)

    def sync_work(self, behind: Sequence[ClusterFunction], version: int) -> Callable[[], simpy.Event]:
        """One collective over the whole cluster."""
        seconds = self.costs.sync_s(min(function.gpus for function in behind), self.costs.nodes)
        return lambda: self.env.timeout(seconds)
