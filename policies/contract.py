"""The contract between a scheduling policy and the backend that carries out its decisions.

A backend is a cluster, simulated or real. It runs until something happens that the policy asked to hear of, shows
the policy an `Observation`, and carries out the `Decision`s that it gets back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from simrl.traces.job import Engine, Job

Role = Literal["prefill", "decode", "prepare", "learn"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "prepare", "learn")
Stage = Literal["generation", "preparation", "learning", "weight_sync"]
NodeCondition = Literal["up", "reclaimed", "lost"]
STAGES: tuple[Stage, ...] = ("generation", "preparation", "learning", "weight_sync")


class State(StrEnum):
    """What a function is doing. Every state but PARKED and GONE holds GPUs (STARTING: once the node has free ones)."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    PARKED = "parked"
    GONE = "gone"


# --- Triggers: what a policy can be woken by. In `Observation.events` the same object comes back, blanks filled in. ---


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a step and the ids of the responses that are to be generated for it (its group)."""

    prompt_id: int | str
    tokens: int
    responses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepStarted:
    """The prompts of a step are there to be assigned. Always delivered."""

    step: int
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class FunctionLost:
    """A function died; *responses* were unfinished on it and are unassigned again. Always delivered.

    Its GPUs are free and its name may be used again. Tokens that the responses had are known: the engine that goes on
    with them recomputes their KV. A response that was to move to it and had not left its engine stays there. What was
    under way from it, and prompts that it was to prefill for others, arrive without KV.

    What it was to prepare is unprepared again: if generation of that step is over, `StageFinished("generation")` is
    told again. A `Learn` or `Sync` that it took part in: the sync goes on without it, the learning ends, and
    `StageFinished("preparation")` is told again. A function with the role `learn` may be started in its place; the
    next `Learn` goes on from the newest weights, and a `Sync` that waited for newer ones sends those.
    """

    function: str
    responses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NodeReclaimed:
    """A node's owner takes it back at *at_s*; until then it works on. Always delivered.

    Then all of its functions are lost, those too that wait for its GPUs, as when a node is lost without notice.
    """

    node: int
    at_s: float


@dataclass(frozen=True, slots=True)
class NodeReturned:
    """A machine stands in a lost node's place, with all its GPUs free and nothing on its disk. Always delivered."""

    node: int


@dataclass(frozen=True, slots=True)
class FunctionIdle:
    """A function has nothing left to do; `after` is started, woken, drained, prepared, learned or synced."""

    function: str | None = None
    after: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionRatio:
    """The finished share of a step's responses reached *ratio*, over all or over those assigned to one function."""

    ratio: float
    function: str | None = None


@dataclass(frozen=True, slots=True)
class UnfinishedBelow:
    """Fewer than *count* responses of the oldest open step are unfinished. Fires once a step."""

    count: int


@dataclass(frozen=True, slots=True)
class Completions:
    """Another *every* responses have finished."""

    every: int


@dataclass(frozen=True, slots=True)
class StageFinished:
    """All responses of *step* passed *stage*; told again where a loss undid what followed (see `FunctionLost`).

    Subscribe with `step=None`; the event names the step. A weight sync is told each time that one is over, with the
    newest open step.
    """

    stage: Stage
    step: int | None = None


@dataclass(frozen=True, slots=True)
class At:
    """The clock reached *time_s*. Fires once."""

    time_s: float


Trigger: TypeAlias = FunctionIdle | CompletionRatio | UnfinishedBelow | Completions | StageFinished | At
Event: TypeAlias = StepStarted | FunctionLost | NodeReclaimed | NodeReturned | Trigger


# --- Decisions: what a policy can ask for. ---


@dataclass(frozen=True, slots=True)
class Start:
    """Lease *gpus* GPUs of one node as a function called *function*; it waits while that many are not free.

    In the prefill and decode roles the function is one engine, tensor-parallel over its GPUs. `node=None` lets the
    backend choose among those that are up; on a lost node it waits for the node to return. Deciding it before the work
    is there is prewarming.
    """

    function: str
    gpus: int
    roles: tuple[Role, ...]
    node: int | None = None


@dataclass(frozen=True, slots=True)
class Park:
    """Once it has drained, move the function to host memory and give its GPUs back."""

    function: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Bring a parked function back onto GPUs of its node; it waits while none are free."""

    function: str


@dataclass(frozen=True, slots=True)
class Release:
    """Once it has drained and sent outgoing KV, end the function; its billing stops then."""

    function: str


@dataclass(frozen=True, slots=True)
class Assign:
    """Generate *responses* on a function with the decode role; they queue until it is ready.

    With `prefix_from`, each unique prompt is prefilled once on that function, which needs the prefill role, and its
    KV is sent over.
    """

    function: str
    responses: tuple[int, ...]
    prefix_from: str | None = None


@dataclass(frozen=True, slots=True)
class Migrate:
    """Move unfinished responses to *target*, sending their KV or else recomputing it there."""

    responses: tuple[int, ...]
    target: str
    with_kv: bool = True


@dataclass(frozen=True, slots=True)
class Prepare:
    """Compute log-probs, values and rewards of finished *responses*, data-parallel over *functions*."""

    functions: tuple[str, ...]
    responses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Learn:
    """Update the models on the oldest step that is prepared and not learned, sharded over *functions* (FSDP).

    These are all that have the role `learn`: none may be released from then on, and none added but in place of one that
    was lost, at once or later. The state is then sharded anew.
    """

    functions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sync:
    """Send the learner's newest weights to *functions*; one that already holds them is left alone."""

    functions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Ask to be woken by *trigger* until the run ends. Asking twice changes nothing."""

    trigger: Trigger


Decision: TypeAlias = Start | Park | Wake | Release | Assign | Migrate | Prepare | Learn | Sync | Subscribe


# --- What a policy sees. ---


@dataclass(frozen=True, slots=True)
class Function:
    """A function as the cluster reports it.

    Attributes:
        name: As the policy named it.
        node: Index of its node; None while it waits for GPUs.
        gpus: GPUs that it leases when not parked.
        roles: What it was started for.
        role: The one that is awake, if any.
        state: See `State`.
        weights_version: Learning steps in the weights that its engine holds or will hold once queued syncs are done.
        num_assigned: Responses of open steps assigned or migrated to it, and not migrated away.
        num_unfinished: Those of them that are still being generated or wait for it.
        free_slots: Further responses that it can take with decode latency still flat and KV fitting.
        kv_used: Used share of its KV blocks, 0 to 1.
    """

    name: str
    node: int | None
    gpus: int
    roles: tuple[Role, ...]
    role: Role | None
    state: State
    weights_version: int
    num_assigned: int
    num_unfinished: int
    free_slots: int
    kv_used: float


@dataclass(frozen=True, slots=True)
class Node:
    """A machine: its GPUs, those that no function leases, and whether it is there (see `NodeReclaimed`)."""

    index: int
    gpus: int
    free_gpus: int
    condition: NodeCondition = "up"


@dataclass(frozen=True, slots=True)
class Response:
    """A response as far as its tokens have been seen; a true length is not known before it is finished.

    `context_tokens` counts the prompt and what was generated so far, as of the engine's last report.
    """

    response_id: int
    step: int
    prompt_id: int | str
    sample: int
    prompt_tokens: int
    context_tokens: int
    finished: bool
    function: str | None


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that has been learned: who was asked, how long the answers were, how long it took.

    Attributes:
        step: Its number, from 0.
        epoch: Pass over the data set, from 0.
        prompt_ids: One an entry, in the order of the step.
        response_tokens: For each prompt, the tokens of its responses.
        started_s: When its prompts came.
        stage_s: Seconds from first to last activity of each stage.
        ended_s: When its learning ended.
    """

    step: int
    epoch: int
    prompt_ids: tuple[int | str, ...]
    response_tokens: tuple[tuple[int, ...], ...]
    started_s: float
    stage_s: Mapping[Stage, float]
    ended_s: float


class Estimates(Protocol):
    """What a profiled cluster can tell in advance. All times in seconds; *gpus* is the size of a function."""

    def decode_s(self, batch: int, context: float, gpus: int) -> float:
        """One iteration of *batch* decoding responses with *context* tokens on average."""

    def prefill_s(self, tokens: int, gpus: int) -> float:
        """Prefill of *tokens* prompt tokens."""

    def flat_batch(self, gpus: int) -> int:
        """Largest batch at which decode latency is still flat, at the mean context of the responses so far."""

    def kv_tokens(self, gpus: int, roles: tuple[Role, ...]) -> int:
        """Tokens whose KV fits in a function's engine."""

    def transfer_s(self, tokens: int, gpus: int, *, same_node: bool) -> float:
        """Sending the KV of *tokens* tokens between functions of *gpus* GPUs over an unloaded link."""

    def start_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        """Expected cold start once GPUs are free."""

    def park_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        """Moving a function to host memory."""

    def wake_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        """Bringing a parked function back."""

    def prepare_s(self, tokens: int, gpus: int) -> float:
        """Preparation of responses with *tokens* prompt and response tokens, on *gpus* GPUs in all."""

    def learn_s(self, tokens: int, gpus: int) -> float:
        """Learning on *tokens* prompt and response tokens, on *gpus* GPUs in all."""

    def sync_s(self, gpus: int) -> float:
        """Sending new weights to functions of *gpus* GPUs."""


class Observation(Protocol):
    """What a policy may know: read-only, and valid until the next `advance`."""

    @property
    def time_s(self) -> float:
        """Seconds since the job began."""

    @property
    def step(self) -> int:
        """The newest open step."""

    @property
    def events(self) -> tuple[Event, ...]:
        """All that happened since the last call; what happened at one moment stands in no particular order."""

    @property
    def job(self) -> Job:
        """What is being trained, and how."""

    @property
    def engine(self) -> Engine:
        """Options of the rollout engines."""

    @property
    def functions(self) -> Mapping[str, Function]:
        """Every function that is not gone, in the order of their starts."""

    @property
    def nodes(self) -> Sequence[Node]:
        """The cluster's machines."""

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts of all open steps."""

    @property
    def weights_version(self) -> int:
        """How many steps have been learned."""

    @property
    def unassigned(self) -> tuple[int, ...]:
        """Responses that no function has been asked to generate, or whose function was lost."""

    @property
    def unprepared(self) -> tuple[int, ...]:
        """Finished responses that nobody has been asked to prepare, by id."""

    @property
    def history(self) -> Sequence[FinishedStep]:
        """Every finished step, oldest first."""

    @property
    def estimates(self) -> Estimates:
        """What profiling knows in advance."""

    def unfinished(self, function: str) -> tuple[int, ...]:
        """Responses that *function* still has to finish, in the order of their arrival there."""

    def response(self, response_id: int) -> Response:
        """What has been seen of a response."""


@runtime_checkable
class Policy(Protocol):
    """A scheduling policy."""

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """What to do about the observed events: those that are always delivered, and subscribed triggers."""


class Backend(Protocol):
    """A cluster that carries out decisions."""

    def reset(self) -> Observation:
        """Begin the job: nothing runs, the first step's prompts are there."""

    def advance(self, decisions: Sequence[Decision]) -> Observation | None:
        """Carry out *decisions* and run until the policy is to be asked again; None when the last step is learned.

        Raises:
            InvalidDecision: a decision is illegal. The cluster is then of no further use.
            PolicyStalled: nothing runs, nothing is queued, and the job is not done.
        """


class InvalidDecision(ValueError):
    """A decision that cannot be carried out."""

    def __init__(self, decision: object, reason: str, allowed: str) -> None:
        super().__init__(decision, reason, allowed)
        self.decision = decision
        self.reason = reason
        self.allowed = allowed

    def __str__(self) -> str:
        text = repr(self.decision)
        shown = text if len(text) <= 160 else text[:157] + "..."
        return f"invalid decision {shown}: {self.reason}; allowed: {self.allowed}"


class PolicyStalled(RuntimeError):
    """The policy left the cluster without work although the job is not done."""


def drive(backend: Backend, policy: Policy) -> None:
    """Run a job to its end.

    Args:
        backend: Simulated or real.
        policy: Asked at each trigger; a copy of it is driven, so that runs share no state.

    Raises:
        InvalidDecision: the policy decided what cannot be done.
        PolicyStalled: the policy left the cluster without work.
    """
    policy = copy.deepcopy(policy)
    observation: Observation | None = backend.reset()
    while observation is not None:
        observation = backend.advance(policy.decide(observation))
