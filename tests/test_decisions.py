"""What a policy may not do, and what happens when it does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from clusters import EXACT_STARTS, make_backend, make_costs, make_job

from simrl.policies.contract import (
    Assign,
    At,
    CompletionRatio,
    Completions,
    Decision,
    FunctionIdle,
    InvalidDecision,
    Learn,
    Migrate,
    Observation,
    Park,
    Policy,
    PolicyStalled,
    Prepare,
    Release,
    Role,
    StageFinished,
    Start,
    Subscribe,
    Sync,
    UnfinishedBelow,
    Wake,
    drive,
)
from simrl.policies.runtime.backend import CALLS_BEFORE_STALL
from simrl.simulator.backend import SimulatedBackend
from simrl.traces.job import Engine

COLOCATED: tuple[Role, ...] = ("decode", "prepare", "learn")
STARTS: list[Decision] = [Start("a", 1, COLOCATED), Start("b", 1, COLOCATED), Start("d", 1, ("decode",))]


def cluster(steps: int = 2, nodes: int = 1, **options: Any) -> SimulatedBackend:
    """Two prompts of two responses; 0 to 3 are those of step 0."""
    work = [[[3, 4], [5, 6]]] * steps
    costs = make_costs(make_job(work, **options), nodes=nodes, parameters=EXACT_STARTS)
    backend, _ = make_backend(costs, work)
    backend.reset()
    return backend


def prepared(backend: SimulatedBackend) -> SimulatedBackend:
    """Go on to where step 0 can be learned."""
    listen = [Subscribe(StageFinished("generation")), Subscribe(StageFinished("preparation"))]
    backend.advance([*listen, *STARTS, Assign("a", (0, 1, 2, 3))])
    backend.advance([Prepare(("a",), (0, 1, 2, 3))])
    return backend


def learned(backend: SimulatedBackend) -> SimulatedBackend:
    """Go on to step 1."""
    prepared(backend).advance([Learn(("a", "b"))])
    return backend


ILLEGAL_AT_ONCE: list[tuple[str, list[Any], str, str]] = [
    ("an unknown function", [Assign("z", (0,))], "no function 'z'", "a, b, d"),
    ("a released function", [Release("d"), Assign("d", (0,))], "no function 'd'", "a, b"),
    ("a response twice", [Assign("a", (0, 0))], "names a response twice", "each response once"),
    ("a response that is assigned", [Assign("a", (0,)), Assign("b", (0,))], "responses 0 are assigned", "3 responses"),
    ("an unknown response", [Assign("a", (99,))], "responses 99 are unknown", "4 responses"),
    ("nine GPUs", [Start("x", 9, ("decode",))], "9 GPUs", "1 to 8 GPUs"),
    ("no GPU", [Start("x", 0, ("decode",))], "0 GPUs", "1 to 8 GPUs"),
    ("an unknown node", [Start("x", 1, ("decode",), 1)], "no node 1", "0 to 0"),
    ("a negative node", [Start("x", 1, ("decode",), -1)], "no node -1", "0 to 0"),
    ("no role", [Start("x", 1, ())], "roles ()", "prefill, decode, prepare, learn"),
    ("an unknown role", [Start("x", 1, ("cook",))], "cook", "prefill, decode, prepare, learn"),  # type: ignore[arg-type]
    ("a name that is taken", [Start("a", 1, ("decode",))], "'a' exists already", "another name"),
    ("preparing without the role", [Prepare(("d",), ())], "'d' has no prepare role, it has decode", "a, b"),
    ("learning without the role", [Learn(("d",))], "'d' has no learn role", "a, b"),
    ("prefilling without the role", [Assign("a", (0,), "d")], "'d' has no prefill role", "Start one"),
    ("assigning to a parked function", [Park("a"), Assign("a", (0,))], "'a' is parked", "Wake it first"),
    ("migrating to a parked one", [Assign("b", (0,)), Park("a"), Migrate((0,), "a")], "'a' is parked", "Wake it first"),
    ("parking twice", [Park("a"), Park("a")], "'a' is parked already", "a function that is awake"),
    ("waking one that is awake", [Wake("a")], "'a' is awake", "a parked function"),
    ("learning before all is prepared", [Learn(("a", "b"))], "4 responses of step 0 are not prepared", "all prepared"),
    ("preparing what is not finished", [Prepare(("a",), (0,))], "responses 0 are unfinished", "0 responses"),
    ("preparing on no function", [Prepare((), ())], "functions are missing", "one or more"),
    ("preparing on one function twice", [Prepare(("a", "a"), ())], "named twice", "each once"),
    ("migrating to where it is", [Assign("a", (0,)), Migrate((0,), "a")], "on 'a' already", "another target"),
    ("migrating what is not assigned", [Migrate((0,), "a")], "responses 0 are unassigned", "0 responses"),
    ("a ratio of nothing", [Subscribe(CompletionRatio(0.0))], "ratio 0.0", "0 < ratio <= 1"),
    ("a ratio above one", [Subscribe(CompletionRatio(1.1))], "ratio 1.1", "0 < ratio <= 1"),
    ("no completions", [Subscribe(Completions(0))], "every 0", "every >= 1"),
    ("below nothing", [Subscribe(UnfinishedBelow(0))], "fewer than 0", "count >= 1"),
    ("an unknown stage", [Subscribe(StageFinished("lunch"))], "lunch", "generation"),  # type: ignore[arg-type]
    ("a stage of one step", [Subscribe(StageFinished("generation", 1))], "step 1", "step=None"),
    ("a time that is none", [Subscribe(At(float("nan")))], "nan", "finite"),
    ("a time that never comes", [Subscribe(At(float("inf")))], "inf", "finite"),
    ("what is no trigger", [Subscribe("soon")], "'soon' is not a trigger", "FunctionIdle"),  # type: ignore[arg-type]
    ("what is no decision", ["start"], "it is not a decision", "Start, Park"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("decisions", "reason", "allowed"),
    [pytest.param(*row[1:], id=row[0]) for row in ILLEGAL_AT_ONCE],
)
def test_an_illegal_decision_is_refused_with_what_is_allowed(
    decisions: Sequence[Any], reason: str, allowed: str
) -> None:
    with pytest.raises(InvalidDecision) as raised:
        cluster().advance([*STARTS, *decisions])
    refuse(raised.value, decisions[-1], reason, allowed)


def refuse(error: InvalidDecision, decision: object, reason: str, allowed: str) -> None:
    assert error.decision == decision
    assert reason in error.reason
    assert allowed in error.allowed
    assert error.reason in str(error)
    assert error.allowed in str(error)


def test_stale_weights_are_refused_until_synced() -> None:
    with pytest.raises(InvalidDecision) as raised:
        learned(cluster()).advance([Assign("a", (4,))])
    refuse(raised.value, Assign("a", (4,)), "stale weights of version 0, and step 1", "Sync it first")
    learned(cluster()).advance([Sync(("a",)), Assign("a", (4, 5, 6, 7))])


def test_moving_responses_to_stale_weights_is_refused() -> None:
    with pytest.raises(InvalidDecision) as raised:
        learned(cluster()).advance([Sync(("a",)), Assign("a", (4,)), Migrate((4,), "d")])
    refuse(raised.value, Migrate((4,), "d"), "stale weights", "Sync it first")


def test_weights_may_be_as_stale_as_the_job_allows() -> None:
    backend = learned(cluster(steps=3, max_staleness=1))
    backend.advance([Assign("a", (4, 5, 6, 7))])
    with pytest.raises(InvalidDecision, match="version 0, and step 2"):
        backend.advance([Assign("a", (8,))])


def test_a_function_that_starts_later_has_the_first_weights_until_synced() -> None:
    late = Start("late", 1, ("decode",))
    with pytest.raises(InvalidDecision) as raised:
        learned(cluster()).advance([late, Assign("late", (4,))])
    refuse(raised.value, Assign("late", (4,)), "'late' holds stale weights of version 0, and step 1", "Sync it first")
    backend = learned(cluster())
    observation = backend.advance([late, Sync(("late",)), Assign("late", (4, 5, 6, 7)), Subscribe(At(0.0))])
    assert observation is not None
    assert observation.functions["late"].weights_version == 1
    assert observation.functions["a"].weights_version == 0  # it sends, and takes nothing in


def test_a_function_that_starts_before_anything_is_learned_needs_no_sync() -> None:
    backend = cluster()
    backend.advance([*STARTS, Start("late", 1, ("decode",)), Subscribe(At(1e4)), Sync(("late",))])
    observation = backend.advance([Assign("late", (0, 1, 2, 3)), Subscribe(Completions(4))])
    assert observation is not None
    assert observation.functions["late"].weights_version == 0


def test_a_sync_needs_all_learners_awake() -> None:
    decision = Sync(("a", "d"))
    with pytest.raises(InvalidDecision) as raised:
        learned(cluster()).advance([Park("b"), decision])
    refuse(raised.value, decision, "learners b are parked", "Wake them")
    learned(cluster()).advance([Park("b"), Wake("b"), decision, Assign("d", (4, 5, 6, 7))])
    learned(cluster()).advance([decision, Park("b"), Assign("d", (4, 5, 6, 7))])


def test_a_sync_of_what_is_new_asks_for_no_learner() -> None:
    learned(cluster()).advance([Sync(("d",)), Park("b"), Sync(("d",)), Assign("d", (4, 5, 6, 7))])


def test_learning_takes_all_learners() -> None:
    with pytest.raises(InvalidDecision) as raised:
        prepared(cluster()).advance([Learn(("a",))])
    refuse(raised.value, Learn(("a",)), "sharded over 2 functions and 1 are named", "all of a, b")


def test_a_parked_learner_cannot_learn() -> None:
    with pytest.raises(InvalidDecision, match="'b' is parked"):
        prepared(cluster()).advance([Park("b"), Learn(("a", "b"))])


def test_a_step_is_learned_once() -> None:
    with pytest.raises(InvalidDecision, match="no step is open"):
        prepared(cluster()).advance([Learn(("a", "b")), Learn(("a", "b"))])


@pytest.mark.parametrize("decision", [Release("a"), Start("late", 1, COLOCATED)])
def test_learners_neither_come_nor_go_after_the_first_learning(decision: Decision) -> None:
    with pytest.raises(InvalidDecision, match="shards"):
        learned(cluster()).advance([decision])


def test_a_response_is_prepared_once() -> None:
    with pytest.raises(InvalidDecision, match="responses 0 are unfinished or being prepared already"):
        prepared(cluster()).advance([Prepare(("a",), (0,))])


def test_a_name_is_free_again_only_when_its_function_is_gone() -> None:
    backend = cluster()
    backend.advance([*STARTS, Subscribe(At(1.0)), Subscribe(At(1e4)), Assign("d", (0,)), Release("d")])
    with pytest.raises(InvalidDecision, match="'d'"):
        backend.advance([Start("d", 1, ("decode",))])
    backend = cluster()
    backend.advance([*STARTS, Subscribe(At(1e4)), Release("d")])
    backend.advance([Start("d", 1, ("decode",)), Assign("d", (0,)), Subscribe(Completions(1))])


def test_what_does_not_fit_is_refused() -> None:
    work = [[[3]]]
    costs = make_costs(make_job(work, model="qwen2.5-14b"))
    backend, _ = make_backend(costs, work)
    backend.reset()
    with pytest.raises(InvalidDecision, match="does not fit"):
        backend.advance([Start("a", 1, COLOCATED)])


def test_learners_that_only_fit_together_are_not_released_one_by_one() -> None:
    work = [[[3]]]
    backend, _ = make_backend(make_costs(make_job(work, model="qwen2.5-7b")), work)
    backend.reset()
    starts = [Start(name, 1, ("learn",)) for name in "abcd"]
    backend.advance([*starts, Subscribe(At(1e4)), Subscribe(At(2e4))])
    backend.advance([Release("d")])  # 7.6 billion parameters x 16 bytes / 3 = 41 GB a GPU
    with pytest.raises(InvalidDecision, match="does not fit"):
        backend.advance([Release("c")])


def test_learners_are_not_released_when_an_engine_has_taken_the_room_for_kv() -> None:
    work = [[[3]]]
    backend, _ = make_backend(make_costs(make_job(work), engine=Engine(gpu_memory_utilization=0.95)), work)
    backend.reset()
    starts = [Start("a", 1, COLOCATED), Start("b", 1, ("learn",)), Start("c", 1, ("learn",))]
    backend.advance([*starts, Subscribe(At(1e4))])
    with pytest.raises(InvalidDecision, match="KV"):
        backend.advance([Release("b"), Release("c")])


def test_a_response_that_goes_there_and_back_is_no_longer_waited_for() -> None:
    backend = cluster(steps=1)
    backend.advance([*STARTS, Assign("a", (0, 1, 2, 3)), Subscribe(Completions(1)), Subscribe(FunctionIdle("a"))])
    # 1 has one token left: it is complete at the end of the very iteration after which it was to leave.
    observation = backend.advance([Migrate((1, 2, 3), "b"), Migrate((1, 2, 3), "a")])
    while observation is not None and not any(isinstance(event, FunctionIdle) for event in observation.events):
        observation = backend.advance([])
    assert observation is not None
    assert sorted(observation.unprepared) == [0, 1, 2, 3]


def test_a_run_that_is_over_takes_no_decisions() -> None:
    backend = prepared(cluster(steps=1))
    assert backend.advance([Learn(("a", "b"))]) is None
    with pytest.raises(RuntimeError, match="the job is over"):
        backend.advance([])


# --- host memory ---


def parkable(host_functions: float, nodes: int) -> SimulatedBackend:
    """A cluster whose nodes have host memory for so many parked functions of 2 GPUs that decode."""
    work = [[[3]]]
    size = 2 * make_costs(make_job(work)).memory.weight_bytes / 2
    memory = {"node": {"g6e.48xlarge": {"host_memory_bytes": host_functions * size}}}
    backend, _ = make_backend(make_costs(make_job(work), nodes=nodes, parameters=memory), work)
    backend.reset()
    return backend


def park_all(count: int, place: Any) -> list[Decision]:
    starts = [Start(f"f{i}", 2, ("decode",), place(i)) for i in range(count)]
    return [*starts, Subscribe(At(1e4)), *(Park(start.function) for start in starts)]


def test_functions_parked_on_one_node_share_its_host_memory() -> None:
    parkable(2.5, 3).advance(park_all(2, lambda i: 1))
    with pytest.raises(InvalidDecision, match="parked on one node would take"):
        parkable(2.5, 3).advance(park_all(3, lambda i: 1))


def test_functions_parked_on_other_nodes_take_none_of_it() -> None:
    parkable(2.5, 3).advance(park_all(6, lambda i: i % 3))


def test_functions_without_a_node_are_not_summed() -> None:
    parkable(2.5, 3).advance(park_all(6, lambda i: None))
    with pytest.raises(InvalidDecision, match="parked on one node would take"):
        parkable(0.5, 3).advance(park_all(1, lambda i: None))  # no node has room for it


def test_a_woken_function_gives_its_host_memory_back() -> None:
    decisions = park_all(2, lambda i: 0)
    parkable(2.5, 1).advance([*decisions, Start("x", 2, ("decode",), 0), Wake("f0"), Park("x")])


# --- a policy that starves the cluster ---


class Idle:
    def decide(self, observation: Observation) -> Sequence[Decision]:
        return []


class Waits:
    """Asks to be woken a second later, for ever, and does what it is told now and then."""

    def __init__(self, *first: Decision, always: Sequence[Decision] = ()) -> None:
        self.first, self.always, self.calls = list(first), always, 0

    def decide(self, observation: Observation) -> Sequence[Decision]:
        self.calls += 1
        assert self.calls < 5000, "nobody stops it"
        decisions, self.first = self.first, []
        return [*decisions, *self.always, Subscribe(At(observation.time_s + 1))]


class NeverPrepares:
    def decide(self, observation: Observation) -> Sequence[Decision]:
        return [*STARTS, Assign("a", (0, 1, 2, 3))] if not observation.functions else []


class Frozen:
    """Starts functions, and answers with what brings it the same question again; never lets time go on."""

    def __init__(self, times: int = 10**9) -> None:
        self.times, self.calls = times, 0

    def decide(self, observation: Observation) -> Sequence[Decision]:
        if not observation.functions:
            return [*STARTS, Subscribe(FunctionIdle("a"))]
        self.calls += 1
        assert self.calls < CALLS_BEFORE_STALL + 5, "nobody stops it"
        if self.calls < self.times:
            return [Assign("a", ())]
        return [Assign("a", (0, 1, 2, 3))] if observation.unassigned else []


FULL = Start("all", 8, COLOCATED)
STALLED: dict[str, tuple[Policy, str]] = {
    "does nothing": (Idle(), "4 responses unassigned"),
    "never prepares": (NeverPrepares(), "0 unfinished, 4 unprepared"),
    "waits for ever": (Waits(), "4 responses unassigned"),
    "waits for ever with a function": (Waits(*STARTS), "3 idle"),
    "waits for ever for GPUs that it holds": (Waits(FULL, Start("more", 1, ("decode",))), "1 waiting for GPUs"),
    "syncs for ever what is new": (Waits(*STARTS, always=[Sync(("a",))]), "3 idle"),
    "answers idleness with no work": (Frozen(), "4 responses unassigned"),
    "parks and forgets": (Waits(*STARTS, Park("a"), Park("b")), "2 parked"),
}


@pytest.mark.parametrize("name", STALLED)
def test_a_policy_that_starves_the_cluster_is_stopped(name: str) -> None:
    policy, words = STALLED[name]
    with pytest.raises(PolicyStalled, match=words):
        drive(cluster(), policy)


def test_a_policy_may_be_asked_many_times_at_one_moment() -> None:
    policy = Frozen(CALLS_BEFORE_STALL - 5)
    with pytest.raises(PolicyStalled, match="0 unfinished, 4 unprepared"):  # it has generated
        drive(cluster(), policy)


def test_a_policy_may_wait_while_something_runs() -> None:
    backend = cluster()
    policy = Waits(*STARTS, Assign("a", (0, 1, 2, 3)))
    observation = backend.advance(policy.decide(backend.reset()))
    while observation is not None and len(observation.unprepared) < 4:
        observation = backend.advance(policy.decide(observation))
    assert observation is not None


# --- triggers ---


def events_of(kind: type, backend: SimulatedBackend, decisions: Sequence[Decision]) -> list[tuple[object, int]]:
    """Events of one kind until all four responses are prepared, with the number of finished ones."""
    seen: list[tuple[object, int]] = []
    observation = backend.advance([*decisions, Subscribe(StageFinished("generation"))])
    while observation is not None:
        seen += [(event, len(observation.unprepared)) for event in observation.events if isinstance(event, kind)]
        if len(observation.unprepared) == 4:
            return seen
        observation = backend.advance([])
    raise AssertionError("the job is over")


def test_a_completion_ratio_fires_once_when_it_is_reached() -> None:
    ratio = CompletionRatio(0.5)
    decisions = [*STARTS, Subscribe(ratio), Subscribe(ratio), Assign("a", (0, 1, 2, 3))]
    assert events_of(CompletionRatio, cluster(), decisions) == [(ratio, 2)]


def test_a_completion_ratio_is_reached_by_the_very_response() -> None:
    work = [[[n] for n in range(1, 11)]]
    backend, _ = make_backend(make_costs(make_job(work)), work)
    backend.reset()
    ratios = [CompletionRatio(k / 10) for k in range(1, 11)]
    decisions = [*STARTS, *map(Subscribe, ratios), Assign("a", tuple(range(10)))]
    observation = backend.advance(decisions)
    for ratio in ratios:
        assert observation is not None
        assert observation.events == (ratio,)
        assert len(observation.unprepared) == round(ratio.ratio * 10)
        if ratio.ratio < 1:
            observation = backend.advance([])


def test_a_completion_ratio_of_a_function_counts_its_own_responses() -> None:
    ratio = CompletionRatio(0.5, "b")
    decisions = [*STARTS, Subscribe(ratio), Assign("a", (0, 1)), Assign("b", (2, 3))]
    # In step: 3 tokens, 4 tokens, 5 tokens (b's first), 6 tokens.
    assert events_of(CompletionRatio, cluster(), decisions) == [(ratio, 3)]


def test_unfinished_below_fires_once_a_step() -> None:
    below = UnfinishedBelow(3)
    decisions = [*STARTS, Subscribe(below), Assign("a", (0, 1, 2, 3))]
    backend = cluster()
    assert events_of(UnfinishedBelow, backend, decisions) == [(below, 2)]
    listen = Subscribe(StageFinished("preparation"))
    backend.advance([listen, Prepare(("a",), (0, 1, 2, 3))])
    backend.advance([Learn(("a", "b"))])
    assert events_of(UnfinishedBelow, backend, [Sync(("a",)), Assign("a", (4, 5, 6, 7))]) == [(below, 2)]


def test_completions_fire_every_so_many() -> None:
    every = Completions(3)
    decisions = [*STARTS, Subscribe(every), Assign("a", (0, 1, 2, 3))]
    assert events_of(Completions, cluster(), decisions) == [(every, 3)]
    assert events_of(Completions, cluster(), [*decisions[:3], Subscribe(Completions(1)), decisions[4]]) == [
        (Completions(1), n) for n in (1, 2, 3, 4)
    ]


def test_a_time_fires_once_and_a_past_one_at_once() -> None:
    backend = cluster()
    observation = backend.advance([Subscribe(At(5.0)), Subscribe(At(7.0)), Subscribe(At(5.0))])
    assert observation is not None
    assert (observation.time_s, observation.events) == (5.0, (At(5.0),))
    observation = backend.advance([Subscribe(At(1.0))])
    assert observation is not None
    assert (observation.time_s, observation.events) == (5.0, (At(1.0),))
    observation = backend.advance([])
    assert observation is not None
    assert (observation.time_s, observation.events) == (7.0, (At(7.0),))


def idle_events(trigger: FunctionIdle) -> list[tuple[str | None, str | None]]:
    """What is told of function "a" and "d" on a whole step's way."""
    backend = cluster()
    seen: list[tuple[str | None, str | None]] = []
    stages = [Subscribe(StageFinished(stage)) for stage in ("generation", "preparation", "learning")]
    at = [Subscribe(At(t)) for t in (1000.0, 2000.0, 2500.0)]
    observation = backend.advance([Subscribe(trigger), *stages, *at, *STARTS])
    while observation is not None:
        seen += [(event.function, event.after) for event in observation.events if isinstance(event, FunctionIdle)]
        decisions: list[Decision] = []
        for event in observation.events:
            match event:
                case At(time_s=1000.0):
                    decisions.append(Assign("a", (0, 1, 2, 3)))
                case StageFinished(stage="generation"):
                    decisions.append(Prepare(("a",), (0, 1, 2, 3)))
                case StageFinished(stage="preparation"):
                    decisions.append(Learn(("a", "b")))
                case At(time_s=2000.0):
                    decisions += [Sync(("a", "b", "d")), Park("a")]
                case At(time_s=2500.0):
                    decisions += [Wake("a"), Subscribe(At(3000.0))]
                case At(time_s=3000.0):
                    return seen
        observation = backend.advance(decisions)
    raise AssertionError("the job is over")


def test_a_function_says_after_what_it_is_idle() -> None:
    of_a = ["started", "drained", "prepared", "learned", "woken"]
    assert idle_events(FunctionIdle("a")) == [("a", after) for after in of_a]
    assert idle_events(FunctionIdle("d")) == [("d", "started"), ("d", "synced")]


def test_idleness_can_be_asked_for_by_what_was_done() -> None:
    assert sorted(idle_events(FunctionIdle(after="synced"))) == [("b", "synced"), ("d", "synced")]
    assert idle_events(FunctionIdle("a", "woken")) == [("a", "woken")]


def test_every_stage_is_told_once_a_step() -> None:
    backend = learned(cluster())
    stages = [Subscribe(StageFinished("learning")), Subscribe(StageFinished("weight_sync"))]
    observation = backend.advance([*stages, Sync(("a",)), Assign("a", (4, 5, 6, 7))])
    told: list[object] = []
    decided: list[list[Decision]] = [[], [Prepare(("a",), (4, 5, 6, 7))], [Learn(("a", "b"))]]
    for decisions in decided:
        assert observation is not None
        told += [event for event in observation.events if isinstance(event, StageFinished)]
        observation = backend.advance(decisions)
    assert observation is None
    assert StageFinished("weight_sync", 1) in told
    assert StageFinished("generation", 1) in told
    assert StageFinished("preparation", 1) in told


def test_an_unfinished_count_fires_for_a_step_that_was_done_before_it_became_the_oldest() -> None:
    backend = cluster(max_staleness=1)
    listen = [Subscribe(UnfinishedBelow(1)), Subscribe(StageFinished("preparation"))]
    observation = backend.advance([*listen, *STARTS, Assign("a", tuple(range(8)))])
    seen = 0
    decided: list[Decision] = []
    while observation is not None and seen != 2:
        seen += UnfinishedBelow(1) in observation.events
        decided = []
        if len(observation.unprepared) == 8:
            decided = [Prepare(("a",), tuple(range(8)))]
        if StageFinished("preparation", 0) in observation.events:
            decided = [Learn(("a", "b"))]
        observation = backend.advance(decided) if seen < 2 else observation
    assert seen == 2


def test_an_observation_expires_with_the_next_advance() -> None:
    backend = cluster()
    old = backend.reset()
    assert old.time_s == 0
    backend.advance([*STARTS, Subscribe(At(1.0))])
    for look in (lambda: old.time_s, lambda: old.functions["a"], lambda: old.unassigned, lambda: old.response(0)):
        with pytest.raises(RuntimeError, match="valid until the next advance"):
            look()
