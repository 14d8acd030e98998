"""`SimulatedBackend`: carries out a policy's decisions on a simulated cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import simpy

from simrl.policies.contract import Decision, Prompt, Start, State
from simrl.policies.runtime.backend import ClusterBackend
from simrl.policies.runtime.function import ClusterFunction
from simrl.policies.runtime.rollout import Rollout
from simrl.policies.runtime.steps import StepState, StepWork, total_tokens
from simrl.policies.runtime.view import View
from simrl.simulator.costs import CostModel, DoesNotFit
from simrl.simulator.engine import Request
from simrl.simulator.estimates import ProfiledEstimates
from simrl.simulator.faults import FaultInjector, FaultPlan
from simrl.simulator.function import SimFunction
from simrl.simulator.keep_alive import KeepAlive
from simrl.simulator.network import Network
from simrl.simulator.sync import WeightSync
from simrl.traces.job import Cluster
from simrl.traces.records import Recorder


class SimulatedBackend(ClusterBackend):
    """A simulated cluster that trains for `job.steps` steps.

    Args:
        costs: What things take on this cluster; knows the job.
        work: The work of a step, by its number.
        recorder: Gets every fact of the run.
        seed: Root of the random streams (cold-start times).
        on_step: Called with the number of learned steps, for progress.
        faults: What breaks; nothing by default.
        options: How weights travel, what is kept; *costs* knows the machines.
    """

    def __init__(
        self,
        costs: CostModel,
        work: Callable[[int], StepWork],
        recorder: Recorder,
        seed: int,
        on_step: Callable[[int], None] | None = None,
        faults: FaultPlan | None = None,
        options: Cluster | None = None,
    ) -> None:
        super().__init__(costs.job, costs.engine, costs.nodes, costs.node.gpus, work, recorder, on_step)
        self.costs, self.seed, self.options = costs, seed, options or Cluster()
        self.max_batched_tokens = costs.max_batched_tokens
        self.faults = FaultInjector(faults, seed, costs.nodes, costs.node.gpus) if faults is not None else None

    def reset(self) -> View:
        """Begin the job at time 0 with an empty cluster and an empty record."""
        view = super().reset()
        self.at_work: dict[str, SimFunction] = {}  # whose engines run, if it matters whether there are others
        self.network = Network(self.env, self.num_nodes, self.costs.node.nic_bytes_per_s, self.costs.store_bytes_per_s)
        self.weight_sync = WeightSync(self.network, self.costs.movement, self.options.weight_sync)
        self.keep_alive = KeepAlive(self.env, self.options.keep_alive_s, self.recorder)
        if self.faults is not None:
            self.faults.begin(self)
        return view

    def advance(self, decisions: Sequence[Decision]) -> View | None:
        """Carry out *decisions*, then run until a trigger fires."""
        view = super().advance(decisions)
        if view is None:
            self.keep_alive.close()
        if view is None and self.faults is not None:
            self.faults.close()
        return view

    def slowness(self, node: int | None) -> float:
        """Times on *node* as a multiple of those on others."""
        return self.faults.slowness(node) if self.faults is not None else 1.0

    def forget_disk(self, node: int) -> None:
        """Another machine takes the place of *node*."""
        self.network.nodes[node].pulled.clear()
        self.keep_alive.make_room(node, 0.0)

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
            self.costs.memory.check_fit(function.gpus, function.roles, world)
        except DoesNotFit as error:
            return str(error), "what fits on its GPUs"
        if engine is not None and engine.kv_blocks > self.costs.memory.kv_blocks(function.gpus, world):
            reason = f"{function.name!r} has KV where its larger share of the learner's state would be"
            return reason, "releasing learners before the engines of others have started"
        return None

    def parked_bytes(self, function: ClusterFunction) -> tuple[float, float]:
        """What stays of a parked function in host memory, and the host memory of a node."""
        assert isinstance(function, SimFunction)
        here = self.costs.memory.resident_bytes(function.gpus, function.roles, function.learner_world())
        return function.gpus * here, self.costs.node.host_memory_bytes

    def learn_work(self, functions: Sequence[ClusterFunction], state: StepState) -> Callable[[], simpy.Event]:
        """Learning on all responses of a step, at the pace of the slowest node."""
        gpus = sum(function.gpus for function in functions)
        tokens = [total_tokens(rollout) for rollout in state.rollouts]

        def begin() -> simpy.Event:  # all are there, so that their nodes are known
            nodes = {function.node for function in functions}
            seconds = self.costs.learning.learn_s(tokens, gpus, len(nodes))
            return self.env.timeout(seconds * max(map(self.slowness, nodes)))

        return begin

    def sync_work(self, behind: Sequence[ClusterFunction], version: int) -> Callable[[], simpy.Event]:
        """From all learners to those of *behind* that are still there."""

        def begin() -> simpy.Event:
            present = [function for function in self.functions.values() if function.state is not State.GONE]
            learners = [function for function in present if "learn" in function.roles and function.node is not None]
            return self.weight_sync.begin(_simulated([f for f in behind if f in present]), _simulated(learners))

        return begin

    # --- host memory ---

    def host_room(self, node: int) -> float:
        """Host memory that parked functions leave for kept processes on *node*."""
        return self.costs.node.host_memory_bytes - self.parked_on(node)

    def make_host_room(self, function: SimFunction) -> None:
        """End kept processes on the node of a function that is being parked, as far as it needs their memory."""
        assert function.node is not None
        if self.keep_alive.keep_s:
            self.keep_alive.make_room(function.node, self.host_room(function.node))


def _simulated(functions: Sequence[ClusterFunction]) -> list[SimFunction]:
    return [function for function in functions if isinstance(function, SimFunction)]
