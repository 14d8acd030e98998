"""Functions that die: what they had is done again elsewhere, once, and a job still ends."""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pytest
from clusters import EXACT_STARTS, make_backend, make_costs, make_job
from conformance import check_leases, check_stages
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from random_policy import RandomPolicy

from simrl.policies.contract import (
    Assign,
    At,
    Completions,
    Decision,
    FunctionIdle,
    FunctionLost,
    InvalidDecision,
    Learn,
    Migrate,
    Observation,
    Park,
    Policy,
    Prepare,
    Role,
    StageFinished,
    Start,
    State,
    Subscribe,
    Sync,
    Wake,
)
from simrl.policies.rlhfless import RLHFless
from simrl.policies.rlhfuse import RLHFuse
from simrl.policies.runtime.function import ClusterFunction, Process
from simrl.policies.verl import Verl
from simrl.simulator.backend import SimulatedBackend
from simrl.traces.job import Engine
from simrl.traces.records import Frames, Recorder

EVERYTHING: tuple[Role, ...] = ("prefill", "decode", "prepare", "learn")
STAGES = [Subscribe(StageFinished(stage)) for stage in ("generation", "preparation", "learning")]
PAST = itertools.count()  # a time that is over fires at once, and each time fires once
STARTS: list[Decision] = [Start(name, 1, EVERYTHING) for name in "ab"]


# --- hand cases ---


def cluster(
    steps: int = 2, lengths: Sequence[Sequence[int]] = ((30, 40), (50, 60)), **options: Any
) -> SimulatedBackend:
    """Two prompts of two responses; 0 to 3 are those of step 0."""
    work = [lengths] * steps
    backend, _ = make_backend(make_costs(make_job(work, **options), parameters=EXACT_STARTS), work)
    backend.reset()
    return backend


def advance(backend: SimulatedBackend, *decisions: Decision) -> Observation:
    observation = backend.advance(decisions)
    assert observation is not None, "the job is over"
    return observation


def until(backend: SimulatedBackend, wanted: Callable[[object], bool], *decisions: Decision) -> Observation:
    """Let time pass until an event of that kind."""
    observation = advance(backend, *decisions)
    while not any(map(wanted, observation.events)):
        observation = advance(backend)
    return observation


def generation_is_over(event: object) -> bool:
    return event == StageFinished("generation", 0)


def is_idle(name: str) -> Callable[[object], bool]:
    return lambda event: isinstance(event, FunctionIdle) and event.function == name


def generating(backend: SimulatedBackend, *decisions: Decision) -> Observation:
    """Go on to where response 0 is finished; two iterations later 1 has 32 tokens."""
    return advance(backend, *STARTS, *STAGES, *(decisions or [Assign("a", (0, 1, 2, 3))]), Subscribe(Completions(1)))


def prepared(backend: SimulatedBackend) -> Observation:
    advance(backend, *STARTS, *STAGES, Assign("a", (0, 1, 2, 3)))
    return advance(backend, Prepare(("a",), (0, 1, 2, 3)))


def lose(backend: SimulatedBackend, name: str, *decisions: Decision) -> Observation:
    """Carry out decisions and lose a function at that moment."""
    advance(backend, *decisions, at_once())
    backend.lose(name)
    return advance(backend)


def at_once() -> Decision:
    return Subscribe(At(-float(next(PAST))))


def told(observation: Observation, kind: type) -> list[object]:
    return [event for event in observation.events if isinstance(event, kind)]


def test_unfinished_responses_are_unassigned_again_and_keep_their_tokens() -> None:
    backend = cluster()
    generating(backend)
    observation = advance(backend, Subscribe(At(backend.env.now + 0.02)))  # before the next completion
    known = [observation.response(i).context_tokens for i in range(4)]
    assert 20 + 32 <= known[1] < 20 + 40
    observation = lose(backend, "a")
    assert told(observation, FunctionLost) == [FunctionLost("a", (1, 2, 3))]
    assert observation.unassigned == (1, 2, 3)
    assert "a" not in observation.functions
    assert observation.nodes[0].free_gpus == 7
    assert [observation.response(i).context_tokens for i in range(4)] == known
    assert [observation.response(i).function for i in range(4)] == ["a", None, None, None]
    observation = advance(backend, Assign("b", (1, 2, 3)), at_once())
    assert observation.unfinished("b") == (1, 2, 3)
    until(backend, generation_is_over)
    assert [backend.rollouts[i].generated for i in range(4)] == [30, 40, 50, 60]
    assert backend.rollouts[1].computed_tokens + backend.rollouts[1].cached_tokens == 20 + known[1], "KV is recomputed"


def test_responses_that_wait_behind_a_start_are_unassigned_again() -> None:
    backend = cluster()
    observation = lose(backend, "a", *STARTS, Assign("a", (0, 1)))
    assert observation.unassigned == (2, 3, 0, 1)
    assert observation.nodes[0].free_gpus == 7


def test_a_request_for_gpus_goes_with_its_function() -> None:
    backend = cluster()
    many = [Start(f"x{i}", 4, ("decode",)) for i in range(4)]
    observation = lose(backend, "x2", *many)
    assert [function.node for function in observation.functions.values()] == [0, 0, None]
    backend.lose("x0")
    observation = advance(backend, Subscribe(At(1.0)))
    assert [(f.name, f.node) for f in observation.functions.values()] == [("x1", 0), ("x3", 0)]
    assert sorted(backend.functions["x1"].gpu_ids + backend.functions["x3"].gpu_ids) == list(range(8))


def test_a_request_that_is_withdrawn_holds_up_nobody() -> None:
    backend = cluster()
    sizes = {"x0": 4, "x1": 3, "x2": 8, "x3": 1}
    observation = lose(backend, "x2", *[Start(name, gpus, ("decode",)) for name, gpus in sizes.items()])
    assert [(f.name, f.node) for f in observation.functions.values()] == [("x0", 0), ("x1", 0), ("x3", 0)]


def test_a_function_may_be_lost_before_it_has_asked_for_gpus() -> None:
    backend = cluster()
    backend._carry_out(Start("a", 8, ("decode",)))
    backend.lose("a")
    observation = advance(backend, Start("b", 8, ("decode",)), at_once())
    observation = advance(backend, at_once())
    assert observation.functions["b"].node == 0


def test_gpus_that_were_granted_at_this_very_moment_are_given_back() -> None:
    backend = cluster()
    advance(backend, *[Start(f"x{i}", 8, ("decode",)) for i in range(3)], Subscribe(At(1.0)))
    backend.lose("x0")  # x1 is granted its GPUs, and does not know yet
    backend.lose("x1")
    observation = advance(backend, Subscribe(At(2.0)))
    assert observation.functions["x2"].node == 0
    assert backend.functions["x2"].gpu_ids == tuple(range(8))


def test_a_response_that_has_not_left_for_its_lost_target_stays() -> None:
    backend = cluster()
    generating(backend)
    advance(backend, Subscribe(At(backend.env.now + 1e-6)))
    observation = lose(backend, "b", Migrate((1, 2), "b"))
    assert told(observation, FunctionLost) == [FunctionLost("b", ())]
    assert set(observation.unfinished("a")) == {1, 2, 3}
    until(backend, generation_is_over)
    assert [backend.rollouts[i].migrations for i in range(4)] == [0, 0, 0, 0]


def test_what_was_to_leave_a_lost_function_no_longer_does() -> None:
    backend = cluster()
    generating(backend)
    observation = lose(backend, "a", Migrate((1, 2), "b"))
    assert told(observation, FunctionLost) == [FunctionLost("a", (1, 2, 3))]
    assert observation.unfinished("b") == ()
    observation = lose(backend, "late", Start("late", 1, ("decode",)), Assign("late", (1, 2, 3)))
    assert told(observation, FunctionLost) == [FunctionLost("late", (1, 2, 3))]


def test_a_response_under_way_to_a_lost_function_is_unassigned_and_its_source_has_its_blocks_back() -> None:
    backend = cluster()
    generating(backend)
    engine = backend.functions["a"].engine  # type: ignore[attr-defined]
    advance(backend, Migrate((1, 2), "b"), Subscribe(FunctionIdle()), at_once())
    while not any(rollout.trip for rollout in backend.rollouts.values()):
        backend.env.step()
    backend.lose("b")
    observation = advance(backend)
    assert told(observation, FunctionLost) == [FunctionLost("b", (1, 2))]
    until(backend, is_idle("a"), Assign("a", (1, 2)))  # to where its KV was being sent from
    assert [backend.rollouts[i].generated for i in range(4)] == [30, 40, 50, 60]
    assert engine.free_blocks == engine.kv_blocks


def test_a_response_whose_kv_is_being_sent_arrives_without_it_when_the_source_is_lost() -> None:
    backend = cluster()
    generating(backend)
    advance(backend, Migrate((1, 2), "b"), at_once())
    while not any(rollout.trip for rollout in backend.rollouts.values()):
        backend.env.step()
    before = backend.rollouts[1].computed_tokens
    backend.lose("a")
    observation = advance(backend)
    assert told(observation, FunctionLost) == [FunctionLost("a", (3,))]
    assert observation.unfinished("b") == (1, 2)
    until(backend, generation_is_over, Assign("b", (3,)))
    assert backend.rollouts[1].computed_tokens > before + 20, "its KV is recomputed"


def test_responses_arrive_without_a_prefix_when_the_function_that_was_to_prefill_them_is_lost() -> None:
    backend = cluster()
    observation = lose(backend, "b", *STARTS, *STAGES, Assign("a", (0, 1, 2, 3), prefix_from="b"))
    assert told(observation, FunctionLost) == [FunctionLost("b", ())]
    assert observation.unfinished("a") == (0, 1, 2, 3)
    until(backend, generation_is_over)
    assert backend.rollouts[0].computed_tokens == 20


def test_a_prefill_for_a_lost_function_is_not_done() -> None:
    backend = cluster()
    observation = lose(backend, "a", *STARTS, *STAGES, Assign("a", (0, 1, 2, 3), prefix_from="b"))
    assert observation.unassigned == (0, 1, 2, 3)
    until(backend, generation_is_over, Assign("b", (0, 1, 2, 3)))
    assert sum(backend.rollouts[i].computed_tokens for i in range(4)) <= 4 * 20
    assert all(backend.rollouts[i].function == "b" for i in range(4))


def test_responses_that_a_lost_function_was_to_prepare_are_unprepared_and_generation_is_told_again() -> None:
    backend = cluster()
    advance(backend, *STARTS, *STAGES, Assign("a", (0, 1, 2, 3)))
    observation = lose(backend, "b", Prepare(("a", "b"), (0, 1, 2, 3)))
    assert told(observation, StageFinished) == [StageFinished("generation", 0)]
    assert len(observation.unprepared) == 2
    until_prepared = advance(backend, Prepare(("a",), observation.unprepared))
    assert told(until_prepared, StageFinished) == [StageFinished("preparation", 0)]


def test_generation_is_not_told_before_it_is_over() -> None:
    backend = cluster()
    generating(backend)
    observation = lose(backend, "b", Prepare(("b",), (0,)))
    assert observation.unprepared == (0,)
    assert not told(observation, StageFinished)


def test_a_sync_goes_on_without_the_lost() -> None:
    for name, rest in (("a", "b"), ("b", "a")):
        backend = cluster()
        prepared(backend)
        advance(backend, Learn(("a", "b")))
        late = Start("late", 1, ("decode",))
        lose(backend, name, late, Sync(("late",)), Assign("late", (4, 5, 6, 7)), Subscribe(FunctionIdle("late")))
        observation = until(backend, is_idle("late"))
        assert observation.unprepared == (4, 5, 6, 7)
        assert rest in observation.functions


def test_a_sync_goes_when_the_last_that_it_waited_for_is_lost() -> None:
    backend = cluster()
    prepared(backend)
    advance(backend, Learn(("a", "b")))
    late = Start("late", 1, ("decode",))
    advance(backend, late, Sync(("a", "late")), Assign("a", (4, 5, 6, 7)), Subscribe(At(backend.env.now + 1.0)))
    assert not backend.rollouts[4].generated
    backend.lose("late")
    until(backend, lambda event: event == StageFinished("generation", 1))


def test_learning_is_aborted_and_done_again() -> None:
    backend = cluster()
    prepared(backend)
    advance(backend, Learn(("a", "b")), Subscribe(At(backend.env.now + 1e-3)), Subscribe(FunctionIdle("a")))
    assert backend.functions["a"].state is State.BUSY
    observation = lose(backend, "b")
    assert told(observation, StageFinished) == [StageFinished("preparation", 0)]
    assert observation.functions["a"].state is State.IDLE
    assert observation.weights_version == 0
    observation = advance(backend, Start("b", 1, EVERYTHING), Learn(("a", "b")))
    assert StageFinished("learning", 0) in observation.events
    assert observation.weights_version == 1
    assert observation.step == 1


def test_a_sync_of_weights_that_will_come_later_sends_those_that_there_are() -> None:
    backend = cluster(steps=3, max_staleness=1)
    prepared(backend)
    observation = advance(backend, Learn(("a", "b")))
    assert observation.weights_version == 1
    advance(backend, Assign("a", (4, 5, 6, 7)))
    advance(backend, Prepare(("a",), (4, 5, 6, 7)))
    # Step 2 needs version 1 at least; the sync would wait for 2.
    observation = lose(backend, "b", Learn(("a", "b")), Sync(("a",)), Assign("a", (8, 9, 10, 11)))
    assert observation.functions["a"].weights_version == 1
    observation = until(backend, lambda event: event == StageFinished("generation", 2))
    assert [backend.rollouts[i].weights_version for i in range(8, 12)] == [1, 1, 1, 1]
    observation = advance(backend, Start("b", 1, EVERYTHING), Learn(("a", "b")))
    assert observation.weights_version == 2


def test_a_learner_may_be_replaced_and_only_then() -> None:
    with pytest.raises(InvalidDecision, match="shards are placed"):
        learned().advance([Start("c", 1, EVERYTHING)])
    backend = learned()
    lose(backend, "b")
    advance(backend, Start("b", 1, EVERYTHING), Sync(("a",)), Assign("a", (4, 5, 6, 7)))
    observation = advance(backend, Prepare(("a",), (4, 5, 6, 7)))
    assert observation.weights_version == 1
    assert backend.advance([Learn(("a", "b"))]) is None


def test_a_replacement_is_part_of_the_learner() -> None:
    backend = learned()
    lose(backend, "b")
    advance(backend, Start("b", 1, EVERYTHING), Sync(("a",)), Assign("a", (4, 5, 6, 7)))
    advance(backend, Prepare(("a",), (4, 5, 6, 7)))
    with pytest.raises(InvalidDecision, match="sharded over 2 functions and 1 are named"):
        backend.advance([Learn(("a",))])


def test_learners_that_are_left_may_not_suffice() -> None:
    work = [[[3]]]
    backend, _ = make_backend(make_costs(make_job(work, model="qwen2.5-7b")), work)
    backend.reset()
    starts = [Start(name, 1, ("learn",)) for name in "abc"]  # 7.6 billion parameters x 16 bytes / 3 = 41 GB a GPU
    engine = Start("d", 2, ("decode", "prepare"))
    advance(backend, *starts, engine, *STAGES, Assign("d", (0,)))
    lose(backend, "b", Prepare(("d",), (0,)))
    until_prepared = advance(backend)
    assert told(until_prepared, StageFinished) == [StageFinished("preparation", 0)]
    with pytest.raises(InvalidDecision, match="does not fit"):
        backend.advance([Learn(("a", "c"))])


def learned() -> SimulatedBackend:
    backend = cluster()
    prepared(backend)
    advance(backend, Learn(("a", "b")))
    return backend


def test_a_parked_function_may_be_lost() -> None:
    backend = cluster()
    advance(backend, *STARTS, Park("a"), Subscribe(FunctionIdle("b")), Subscribe(At(1e4)))
    until(backend, lambda event: event == At(1e4))
    assert backend.functions["a"].state is State.PARKED
    observation = lose(backend, "a")
    assert observation.nodes[0].free_gpus == 7
    advance(backend, Start("a", 1, EVERYTHING), Park("a"), Wake("a"), Subscribe(At(1.0)))


def test_what_is_not_there_cannot_be_lost() -> None:
    backend = cluster()
    with pytest.raises(ValueError, match="no function 'a'"):
        backend.lose("a")
    lose(backend, "a", *STARTS)
    with pytest.raises(ValueError, match="no function 'a'"):
        backend.lose("a")


# --- whole jobs ---


class Case:
    """A random small job and the losses in it."""

    def __init__(self, seed: int, max_staleness: int = 0) -> None:
        self.random = random.Random(seed)
        samples = self.random.randint(1, 4)
        prompts = self.random.randint(2, 12)
        longest = self.random.choice((6, 64))
        self.steps = [
            [[self.random.randint(1, longest) for _ in range(samples)] for _ in range(prompts)]
            for _ in range(self.random.randint(1, 3))
        ]
        self.seed, self.max_staleness = seed, max_staleness
        self.nodes = self.random.randint(1, 2)
        self.tensor_parallel = self.random.choice((2, 4, 8))
        self.quick = self.random.random() < 0.8  # starts that take no longer than steps: replacements are lost, too

    def backend(self) -> tuple[SimulatedBackend, Recorder]:
        job = make_job(self.steps, dataset_prompts=len(self.steps[0]), max_staleness=self.max_staleness)
        engine = Engine(tensor_parallel=self.tensor_parallel)
        starts = {"init_s": 0.02, "compile_s": 0.01, "capture_s": 0.01, "load_bytes_per_s": 1e11}
        parameters = {"start": starts} if self.quick else {}
        costs = make_costs(job, nodes=self.nodes, engine=engine, parameters=parameters)
        return make_backend(costs, self.steps, seed=self.seed)


Moment = tuple[float, str]  # when which function may be lost


class Losses:
    """Loses functions, and notes what they were at."""

    def __init__(self, backend: SimulatedBackend, random: random.Random, moments: Sequence[Moment]) -> None:
        self.backend, self.random = backend, random
        self.states: Counter[str] = Counter()
        for time_s, name in moments:
            backend.env.process(self.lose_some(time_s, name))

    def lose_some(self, at_s: float, name: str) -> Process:
        yield self.backend.env.timeout(at_s)
        for _ in range(self.random.choice((1, 1, 1, 2))):  # some at the same moment
            there = {n: f for n, f in self.backend.functions.items() if f.state is not State.GONE}
            if there:
                named = name in there and self.random.random() < 0.7
                self.lose(there[name] if named else self.random.choice(list(there.values())))

    def follow(self, decisions: Sequence[Decision]) -> None:
        """Some that are to exchange responses are lost just then."""
        for decision in decisions:
            if isinstance(decision, Migrate) and self.random.random() < 0.1:
                name = self.random.choice((decision.target, ""))
                self.backend.env.process(self.lose_some(self.random.choice((0.0, 1e-6, 1e-4, 1e-3)), name))

    def lose(self, function: ClusterFunction) -> None:
        busy = function.state is State.BUSY
        self.states[f"busy {function._stage}" if busy else str(function.state)] += 1
        self.states["under way"] += any(rollout.trip for rollout in self.backend.rollouts.values())
        self.states["to leave"] += any(other.removals for other in self.backend.functions.values())
        self.states["before a sync"] += any(not gang.go.triggered for gang in function.gangs if not gang.learns)
        self.backend.lose(function.name)


def check_books(backend: SimulatedBackend) -> None:
    leased = Counter(
        (f.node, gpu) for f in backend.functions.values() if f.state is not State.GONE for gpu in f.gpu_ids
    )
    free = Counter((node.index, gpu) for node in backend.pool.nodes for gpu in node.free)
    granted = Counter(
        (f._lease.value[0], gpu)
        for f in backend.functions.values()
        if f._lease is not None and f._lease.triggered
        for gpu in f._lease.value[1]
    )
    every = Counter((node.index, gpu) for node in backend.pool.nodes for gpu in range(backend.gpus_per_node))
    assert leased + free + granted == every, "each GPU is leased once, or free"
    for function in backend.functions.values():
        by_step = Counter(rollout.step for rollout in function.unfinished.values())
        assert +Counter(function.unfinished_by_step) == by_step
        assert all(rollout.function == function.name for rollout in function.unfinished.values())
        assert not (function.state is State.GONE and function.unfinished)
    for rollout in backend.rollouts.values():
        if rollout.finished_s is None:
            owner = backend.functions[rollout.function].unfinished if rollout.function else backend.unassigned
            assert rollout.response_id in owner
            assert (rollout.response_id in backend.unassigned) == (rollout.function is None)


def some_moments(random: random.Random, frames: Frames) -> list[Moment]:
    """Moments of all kinds: in mid-interval, whatever a function is at, and at and after decisions."""
    moments = []
    for _ in range(random.randint(1, 5)):
        if random.random() < 0.6:
            row = random_row(random, frames.workers, ["state", "stage"])
            moments.append((random.uniform(row.start_s, row.end_s), row.function))
        else:
            row = random_row(random, frames.decisions, ["decision"])
            moments.append((row.time_s + random.choice((0.0, 1e-6, 1e-5, 1e-4, 0.01)), row.function.split(",")[0]))
    return moments


def random_row(random: random.Random, frame: pd.DataFrame, kind: list[str]) -> Any:
    """A row of a kind, all kinds being equally likely."""
    rows = random.choice([rows for _, rows in frame.groupby(kind, dropna=False)])
    return rows.iloc[random.randrange(len(rows))]


def run(case: Case, policy: Policy, moments: Sequence[Moment] = ()) -> tuple[Frames, Losses]:
    backend, recorder = case.backend()
    policy = copy.deepcopy(policy)
    observation: Observation | None = backend.reset()
    losses = Losses(backend, random.Random(case.seed + 1), moments)
    step = backend.env.step

    def step_and_check() -> None:
        step()
        check_books(backend)

    backend.env.step = step_and_check  # type: ignore[method-assign]
    while observation is not None:
        decisions = policy.decide(observation)
        if moments:
            losses.follow(decisions)
        observation = backend.advance(decisions)
    return recorder.frames(), losses


def check_frames(case: Case, frames: Frames) -> None:
    samples = frames.samples.sort_values("response_id")
    wanted = [length for step in case.steps for row in step for length in row]
    assert samples.response_id.tolist() == list(range(len(wanted))), "each exactly once"
    assert samples.response_tokens.tolist() == wanted
    assert frames.phases[frames.phases.stage == "step"].step.tolist() == list(range(len(case.steps)))
    check_stages(frames)
    check_leases(frames)


class CarelessRandomPolicy(RandomPolicy):
    """Random decisions; of what is lost, only learners are replaced."""

    def __init__(self, seed: int, *, watchful: bool) -> None:
        super().__init__(seed, watchful=watchful)
        self.nodes: dict[str, int | None] = {}

    def decide(self, observation: Observation) -> Sequence[Decision]:
        self.nodes.update((name, function.node) for name, function in observation.functions.items())
        lost = [event.function for event in observation.events if isinstance(event, FunctionLost)]
        starts = [start for name in lost if (start := self.forget(name, observation))]
        return [*starts, *super().decide(observation)]

    def forget(self, name: str, observation: Observation) -> Start | None:
        roles = self.roles.pop(name, ())
        self.parked.discard(name)
        if "learn" not in roles:
            return None
        self.learning = observation.weights_version
        for other, function in observation.functions.items():
            self.versions[other] = function.weights_version
        self.roles[name], self.versions[name] = roles, 0
        return Start(name, 1, roles, self.nodes.get(name))


POLICIES: dict[str, Callable[[random.Random], Policy]] = {
    "random": lambda random: CarelessRandomPolicy(random.randrange(2**31), watchful=random.random() < 0.5),
    "verl": lambda _: Verl(),
    "rlhfuse": lambda random: RLHFuse(RLHFuse.Params(tail_ratio=random.choice((0.2, 0.6)))),
    "rlhfless": lambda random: RLHFless(RLHFless.Params(**{"lambda": random.choice((0.0, 0.3, 1.0))})),
    "rlhfless with decoders": lambda random: RLHFless(
        RLHFless.Params(learner_gpus=8, **{"lambda": random.choice((0.3, 1.0))})
    ),
}  # fmt: skip


ALWAYS = (
    "starting",
    "idle",
    "busy generation",
    "busy preparation",
    "busy learning",
    "busy weight_sync",
    "before a sync",
)
WANTED = {
    "random": (*ALWAYS, "to leave", "under way", "parked"),
    "verl": ALWAYS,
    "rlhfuse": (*ALWAYS, "to leave"),
    "rlhfless": (*ALWAYS, "to leave", "under way", "parked"),
    "rlhfless with decoders": (*ALWAYS, "to leave", "under way", "parked"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_job_ends_whatever_is_lost(name: str) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True,
        phases=[Phase.generate],
    )  # fmt: skip
    @given(st.integers(0, 2**31))
    def check(seed: int) -> None:
        stale = 0 if name.startswith("rlhfless") else seed % 2
        case = Case(seed, stale)
        policy = POLICIES[name](random.Random(seed))
        undisturbed, _ = run(case, policy)
        check_frames(case, undisturbed)
        frames, losses = run(case, policy, some_moments(case.random, undisturbed))
        check_frames(case, frames)
        seen.update(losses.states)

    check()
    rare = {what: seen[what] for what in WANTED[name] if not seen[what]}
    assert not rare, f"the sample does not hold {list(rare)}"
