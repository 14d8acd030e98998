"""What a policy sees of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from simrl.policies.contract import Estimates, Event, FinishedStep, Function, Node, Prompt, Response, State
from simrl.traces.job import Engine, Job

if TYPE_CHECKING:
    from simrl.policies.runtime.backend import ClusterBackend
    from simrl.policies.runtime.function import ClusterFunction


class View:
    """The `Observation` of a cluster: looks things up when asked, and expires with the next `advance`.

    The cluster's books are up to date when it is made.
    """

    __slots__ = ("_backend", "_events", "_valid")

    def __init__(self, backend: ClusterBackend, events: tuple[Event, ...]) -> None:
        self._backend, self._events, self._valid = backend, events, True

    def expire(self) -> None:
        """The cluster moves on."""
        self._valid = False

    def _now(self) -> ClusterBackend:
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
        return self._now().engine

    @property
    def functions(self) -> Mapping[str, Function]:
        """Every function that is not gone."""
        return Functions(self)

    @property
    def nodes(self) -> Sequence[Node]:
        """The cluster's machines."""
        backend = self._now()
        nodes, gpus = backend.pool.nodes, backend.gpus_per_node
        return tuple(Node(node.index, gpus, len(node.free), node.condition) for node in nodes)

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
        return self._now().unprepared.in_order()

    @property
    def history(self) -> Sequence[FinishedStep]:
        """Every finished step, oldest first."""
        return tuple(self._now().history)

    @property
    def estimates(self) -> Estimates:
        """What profiling knows in advance."""
        return self._now().estimates()

    def unfinished(self, function: str) -> tuple[int, ...]:
        """Responses that *function* still has to finish."""
        return tuple(self._now().functions[function].unfinished)

    def response(self, response_id: int) -> Response:
        """What has been seen of a response of an open step."""
        backend = self._now()
        rollout = backend.rollouts[response_id]
        row, sample = divmod(response_id % backend.job.responses_per_step, backend.job.responses_per_prompt)
        generated = rollout.generated
        if rollout.serving is not None:
            generated = backend.holder(rollout).generated(rollout)
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
        if not self.is_there(name):
            raise KeyError(name)
        return _describe(backend, backend.functions[name])

    def is_there(self, name: object) -> bool:
        """Whether there is a function of that name that is not gone."""
        function = self._now().functions.get(name)  # type: ignore[call-overload]
        return function is not None and function.state is not State.GONE

    def names(self) -> list[str]:
        """Functions that are not gone, in the order of their starts."""
        return [name for name, f in self._now().functions.items() if f.state is not State.GONE]


class Functions(Mapping[str, Function]):
    """Functions by name, described when they are looked up, as there may be a thousand of them."""

    def __init__(self, view: View) -> None:
        self._view = view

    def __getitem__(self, name: str) -> Function:
        return self._view.function(name)

    def __contains__(self, name: object) -> bool:
        return self._view.is_there(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._view.names())

    def __len__(self) -> int:
        return len(self._view.names())


def _describe(backend: ClusterBackend, function: ClusterFunction) -> Function:
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
        kv_used=function.kv_used(),
    )
