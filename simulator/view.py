"""What a policy sees of the simulated cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from simrl.policies.contract import Event, FinishedStep, Function, Node, Prompt, Response, Role, State
from simrl.simulator.costs import Costs
from simrl.simulator.engine import BLOCK_TOKENS
from simrl.traces.job import Engine, Job

if TYPE_CHECKING:
    from simrl.simulator.backend import SimulatedBackend
    from simrl.simulator.function import SimFunction


class View:
    """The `Observation` of a simulated cluster: looks things up when asked, and expires with the next `advance`."""

    __slots__ = ("_backend", "_events", "_valid")

    def __init__(self, backend: SimulatedBackend, events: tuple[Event, ...]) -> None:
        self._backend, self._events, self._valid = backend, events, True

    def expire(self) -> None:
        """The cluster moves on."""
        self._valid = False

    def _now(self) -> SimulatedBackend:
        if not self._valid:
            raise RuntimeError("an observation is valid until the next advance: keep values of it, not the observation")
        return self._backend

    @property
    def time_s(self) -> float:
        """Seconds since the job began."""
        return float(self._now().env.now)

    @property
    def step(self) -> int:
        """The newest open step."""
        return max(self._now().steps)

    @property
    def events(self) -> tuple[Event, ...]:
        """All that happened since the last call."""
        return self._events

    @property
    def job(self) -> Job:
        """What is being trained, and how."""
        return self._now().job

    @property
    def engine(self) -> Engine:
        """Options of the rollout engines."""
        return self._now().costs.engine

    @property
    def functions(self) -> Mapping[str, Function]:
        """Every function that is not gone."""
        return Functions(self)

    @property
    def nodes(self) -> Sequence[Node]:
        """The cluster's machines."""
        backend = self._now()
        return tuple(Node(node.index, backend.costs.node.gpus, len(node.free)) for node in backend.pool.nodes)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of all open steps."""
        return tuple(prompt for state in self._now().steps.values() for prompt in state.prompts)

    @property
    def weights_version(self) -> int:
        """How many steps have been learned."""
        return self._now().version

    @property
    def unassigned(self) -> tuple[int, ...]:
        """Responses that no function has been asked to generate."""
        return tuple(self._now().unassigned)

    @property
    def unprepared(self) -> tuple[int, ...]:
        """Finished responses that nobody has been asked to prepare, by id."""
        backend = self._now()
        backend.catch_up()
        return tuple(sorted(backend.unprepared))

    @property
    def history(self) -> Sequence[FinishedStep]:
        """Every finished step, oldest first."""
        return tuple(self._now().history)

    @property
    def estimates(self) -> ProfiledEstimates:
        """What profiling knows in advance."""
        backend = self._now()
        return ProfiledEstimates(backend.costs, backend.learner_world() or None, backend.typical_context())

    def unfinished(self, function: str) -> tuple[int, ...]:
        """Responses that *function* still has to finish."""
        there = self._now().functions[function]
        there.catch_up()
        return tuple(there.unfinished)

    def response(self, response_id: int) -> Response:
        """What has been seen of a response of an open step."""
        backend = self._now()
        rollout = backend.rollouts[response_id]
        row, sample = divmod(response_id % backend.job.responses_per_step, backend.job.responses_per_prompt)
        serving = rollout.serving.function if rollout.serving else None
        generated = rollout.generated
        if serving and serving.engine:
            serving.catch_up()
            generated = serving.engine.generated(rollout, serving.completed())
        return Response(
            response_id=response_id,
            step=rollout.step,
            prompt_id=backend.steps[rollout.step].prompts[row].prompt_id,
            sample=sample,
            prompt_tokens=rollout.prompt_tokens,
            context_tokens=rollout.prompt_tokens + generated,
            finished=rollout.finished_s is not None,
            function=rollout.function,
        )

    def function(self, name: str) -> Function:
        """Describe one function."""
        backend = self._now()
        function = backend.functions[name]
        if function.state is State.GONE:
            raise KeyError(name)
        return _describe(backend, function)

    def names(self) -> list[str]:
        """Functions that are not gone, in the order of their starts."""
        return [name for name, f in self._now().functions.items() if f.state is not State.GONE]


class Functions(Mapping[str, Function]):
    """Functions by name, described when they are looked up, as there may be a thousand of them."""

    def __init__(self, view: View) -> None:
        self._view = view

    def __getitem__(self, name: str) -> Function:
        return self._view.function(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._view.names())

    def __len__(self) -> int:
        return len(self._view.names())


def _describe(backend: SimulatedBackend, function: SimFunction) -> Function:
    function.catch_up()
    unfinished = len(function.unfinished)
    return Function(
        name=function.name,
        node=function.node,
        gpus=function.gpus,
        roles=function.roles,
        role=function.role,
        state=function.state,
        weights_version=backend.planned_version[function.name],
        num_assigned=sum(function.assigned_by_step.get(step, 0) for step in backend.steps),
        num_unfinished=unfinished,
        free_slots=max(function.slots() - unfinished, 0),
        kv_used=function.engine.kv_used(function.completed()) if function.engine else 0.0,
    )


class ProfiledEstimates:
    """`Estimates` from the cost model that the simulator itself uses: profiling without error.

    Args:
        costs: The cost model.
        learner_world: GPUs that share the learner's state, as far as started.
        context: Mean tokens of a response in mid-generation.
    """

    def __init__(self, costs: Costs, learner_world: int | None, context: float) -> None:
        self._costs, self._world, self._context = costs, learner_world, context

    def _learners(self, roles: tuple[Role, ...]) -> int | None:
        return self._world if "learn" in roles else None

    def decode_s(self, batch: int, context: float, gpus: int) -> float:
        """One iteration of *batch* decoding responses."""
        return self._costs.times(gpus).decode_s(batch, context)

    def prefill_s(self, tokens: int, gpus: int) -> float:
        """Prefill of *tokens* tokens of short prompts, iteration by iteration."""
        if not tokens:
            return 0.0
        full, rest = divmod(tokens, self._costs.max_batched_tokens)
        times = self._costs.times(gpus)
        attended = self._costs.job.max_prompt_tokens / 4
        last_s = times.prefill_s(rest, attended) if rest else 0.0
        return full * times.prefill_s(self._costs.max_batched_tokens, attended) + last_s

    def flat_batch(self, gpus: int) -> int:
        """Largest batch at which decode latency is still flat."""
        return self._costs.flat_batch(gpus, self._context)

    def kv_tokens(self, gpus: int, roles: tuple[Role, ...]) -> int:
        """Tokens whose KV fits in a function's engine."""
        return self._costs.kv_blocks(gpus, self._learners(roles)) * BLOCK_TOKENS

    def transfer_s(self, tokens: int, gpus: int, *, same_node: bool) -> float:
        """Sending the KV of *tokens* tokens between functions of *gpus* GPUs over an unloaded link."""
        return self._costs.transfer_s(tokens, gpus, same_node=same_node)

    def start_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        """Expected cold start on a node that has the weights on disk."""
        return sum(self._costs.start_phases(gpus, roles, cached=True).values())

    def park_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        """Moving a function to host memory."""
        return self._costs.park_s(gpus, roles, self._learners(roles))

    def wake_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        """Bringing a parked function back."""
        return self._costs.wake_s(gpus, roles, self._learners(roles))

    def prepare_s(self, tokens: int, gpus: int) -> float:
        """Preparation of responses with *tokens* tokens on *gpus* GPUs in all."""
        mean_tokens = (self._costs.job.max_prompt_tokens + self._costs.job.max_response_tokens) / 4
        return self._costs.prepare_s(tokens, max(1, round(tokens / mean_tokens)), gpus)

    def learn_s(self, tokens: int, gpus: int) -> float:
        """Learning on *tokens* tokens, evenly spread over *gpus* GPUs in all."""
        mean_tokens = (self._costs.job.max_prompt_tokens + self._costs.job.max_response_tokens) / 4
        nodes = -(-gpus // self._costs.node.gpus)
        return self._costs.learn_s(-(-tokens // gpus), mean_tokens, gpus, nodes)

    def sync_s(self, gpus: int) -> float:
        """Sending new weights to functions of *gpus* GPUs."""
        return self._costs.sync_s(gpus, self._costs.nodes)
