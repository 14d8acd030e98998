"""Stories on a tiny cluster: when things happen, against arithmetic over the cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from clusters import EXACT_STARTS, Lengths, estimates, make_backend, make_costs, make_job, switch_s

from simrl.policies.contract import (
    STAGES,
    Assign,
    At,
    Completions,
    Decision,
    Event,
    FunctionIdle,
    Learn,
    Migrate,
    Observation,
    Park,
    Prepare,
    Release,
    Role,
    StageFinished,
    Start,
    StepStarted,
    Subscribe,
    Sync,
    Wake,
)
from simrl.simulator.costs import Costs
from simrl.traces.job import Engine
from simrl.traces.records import Recorder

COLOCATED: tuple[Role, ...] = ("decode", "prepare", "learn")
LISTEN: list[Decision] = [Subscribe(FunctionIdle()), *(Subscribe(StageFinished(stage)) for stage in STAGES)]

Happened = list[tuple[str, float]]
Script = Mapping[str, Sequence[Decision]]  # what to decide when something happens


def tell(costs: Costs, steps: Sequence[Lengths], script: Script, prompt_tokens: int = 20) -> tuple[Happened, Recorder]:
    """Run a script from "step 0" on: what happened when, and the records."""
    backend, recorder = make_backend(costs, steps, prompt_tokens)
    lines = dict(script)  # each is read once
    observation: Observation | None = backend.reset()
    happened: Happened = []
    while observation is not None:
        names = [_name(event) for event in observation.events]
        happened += [(name, observation.time_s) for name in names]
        decisions = [decision for name in names for decision in lines.pop(name, ())]
        observation = backend.advance([*LISTEN, *decisions])
    return [*happened, ("over", backend.env.now)], recorder


def _name(event: Event) -> str:
    match event:
        case FunctionIdle(function=function, after=after):
            return f"{function} {after}"
        case StageFinished(stage=stage, step=step):
            return f"{stage} {step}"
        case StepStarted(step=step):
            return f"step {step}"
        case At(time_s=time_s):
            return f"at {time_s:g}"
        case _:
            return type(event).__name__


def make(steps: Sequence[Lengths], nodes: int = 1, **options: object) -> Costs:
    return make_costs(make_job(steps, **options), nodes=nodes, parameters=EXACT_STARTS)


def broadcast_s(costs: Costs, ranks: int) -> float:
    """The first broadcast inside a node, to engines of one GPU: its communicator has to be built."""
    return 1.4 + 0.084 * ranks + 0.005 + costs.memory.weight_bytes / 25e9


def start_s(costs: Costs, gpus: int = 1, *, cached: bool = False) -> float:
    return sum(costs.movement.start_phases(gpus, COLOCATED, cached=cached).values())


def test_a_function_takes_each_stage_in_turn() -> None:
    steps = [[[3]], [[2]]]
    costs = make(steps)
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED)],
        "a started": [Assign("a", (0,))],
        "generation 0": [Prepare(("a",), (0,))],
        "preparation 0": [Learn(("a",))],
        "step 1": [Sync(("a",)), Assign("a", (1,))],
        "generation 1": [Prepare(("a",), (1,))],
        "preparation 1": [Learn(("a",))],
    }
    times = costs.times(1)
    started_s = start_s(costs)
    awake_s = started_s + switch_s(costs, None, "decode", 1)
    generated_s = awake_s + times.prefill_s(20, 10) + times.decode_s(1, 21) + times.decode_s(1, 22)
    prepared_s = generated_s + switch_s(costs, "decode", "prepare", 1) + costs.learning.prepare_s([23], 1)
    learned_s = prepared_s + costs.learning.learn_s([23], 1, 1)
    synced_s = learned_s + switch_s(costs, "learn", "decode", 1) + estimates(costs).sync_s(1)
    generated_1_s = synced_s + times.prefill_s(20, 10) + times.decode_s(1, 21)
    prepared_1_s = generated_1_s + switch_s(costs, "decode", "prepare", 1) + costs.learning.prepare_s([22], 1)
    learned_1_s = prepared_1_s + costs.learning.learn_s([22], 1, 1)
    happened, recorder = tell(costs, steps, script)
    expected = [
        ("step 0", 0), ("a started", started_s),
        ("generation 0", generated_s), ("a drained", generated_s),
        ("preparation 0", prepared_s), ("a prepared", prepared_s),
        ("learning 0", learned_s), ("step 1", learned_s), ("a learned", learned_s),
        ("weight_sync 1", synced_s), ("generation 1", generated_1_s), ("a drained", generated_1_s),
        ("preparation 1", prepared_1_s), ("a prepared", prepared_1_s),
        ("over", learned_1_s),
    ]  # fmt: skip
    assert [name for name, _ in happened] == [name for name, _ in expected]
    assert [time_s for _, time_s in happened] == pytest.approx([time_s for _, time_s in expected], rel=1e-12)
    phases = recorder.frames().phases.set_index(["step", "stage"])
    assert phases.loc[(0, "generation"), "start_s"] == pytest.approx(awake_s)
    assert phases.loc[(0, "learning"), "start_s"] == pytest.approx(prepared_s)
    assert phases.loc[(1, "weight_sync"), "end_s"] == pytest.approx(synced_s)


def test_a_second_function_of_a_node_finds_the_weights_on_its_disk() -> None:
    steps = [[[1]]]
    costs = make(steps, nodes=2)
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED, 0), Start("b", 2, ("decode",), 0)],
        "a started": [Start("c", 1, ("decode",), 0), Start("d", 1, ("decode",), 1)],
        "d started": [Assign("a", (0,))],
        "generation 0": [Prepare(("a",), (0,))],
        "preparation 0": [Learn(("a",))],
    }
    first_s = start_s(costs)
    download_s = costs.movement.start_phases(1, COLOCATED, cached=False)["download"]
    # b waits for the download that a began, then loads half the weights to each of its GPUs.
    expected = {"a started": first_s, "b started": download_s + start_s(costs, 2, cached=True)}
    expected["c started"] = first_s + start_s(costs, cached=True)
    expected["d started"] = first_s + start_s(costs, cached=False)
    happened, _ = tell(costs, steps, script)
    assert {name: dict(happened)[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_a_parked_function_gives_its_gpus_to_another_and_waits_for_them() -> None:
    steps = [[[1]]]
    costs = make(steps)
    script: Script = {
        "step 0": [Start("a", 8, COLOCATED), Start("b", 8, ("decode",))],
        "a started": [Park("a"), Wake("a")],
        "b started": [Release("b")],
        "a woken": [Assign("a", (0,))],
        "generation 0": [Prepare(("a",), (0,))],
        "preparation 0": [Learn(("a",))],
    }
    parked_s = start_s(costs, 8) + estimates(costs, 8).park_s(8, COLOCATED)
    b_s = parked_s + start_s(costs, 8, cached=True)
    woken_s = b_s + estimates(costs, 8).wake_s(8, COLOCATED)
    happened, recorder = tell(costs, steps, script)
    assert dict(happened)["b started"] == pytest.approx(b_s, rel=1e-12)
    assert dict(happened)["a woken"] == pytest.approx(woken_s, rel=1e-12)
    rows = recorder.frames().workers
    parked = rows[rows.state == "parked"].iloc[0]
    assert (parked.function, parked.gpu_ids) == ("a", "")
    assert (parked.start_s, parked.end_s) == pytest.approx((parked_s, b_s))


def test_the_learners_state_is_moved_to_the_host_and_back() -> None:
    costs = make([[[1]]])
    state_bytes = 12 * 494_032_768
    assert estimates(costs, 1).park_s(1, COLOCATED) == pytest.approx(1.5 + state_bytes / 25e9, rel=1e-3)
    assert estimates(costs, 1).wake_s(1, COLOCATED) == pytest.approx(
        0.4 + state_bytes / 25e9, rel=1e-3
    )  # weights: .04 s
    assert estimates(costs).park_s(1, ("decode",)) == 1.5


def test_a_response_leaves_at_the_end_of_its_iteration_and_goes_on_where_its_kv_is() -> None:
    steps = [[[10]]]
    costs = make(steps)
    times = costs.times(1)
    ready_s = start_s(costs)
    first_s = ready_s + switch_s(costs, None, "decode", 1) + times.prefill_s(20, 10)
    third_s = first_s + times.decode_s(1, 21) + times.decode_s(1, 22)
    cut_s = third_s - 1e-4
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Start("b", 1, ("decode",)), Assign("a", (0,)), Subscribe(At(cut_s))],
        f"at {cut_s:g}": [Migrate((0,), "b"), Release("b")],
        "generation 0": [Prepare(("a",), (0,))],
        "preparation 0": [Learn(("a",))],
    }
    arrived_s = third_s + estimates(costs).transfer_s(
        22, 1, same_node=True
    )  # 20 + 3 tokens known, the newest has no KV
    switched_s = cut_s + switch_s(costs, None, "decode", None)
    generated_s = max(arrived_s, switched_s) + sum(times.decode_s(1, 20 + n) for n in range(3, 10))
    happened, recorder = tell(costs, steps, script)
    assert dict(happened)["generation 0"] == pytest.approx(generated_s, rel=1e-12)
    sample = recorder.frames().samples.iloc[0]
    assert (sample.function, sample.migrations, sample.prefill_tokens, sample.cached_tokens) == ("b", 1, 20, 22)


def test_without_its_kv_a_response_is_computed_again() -> None:
    steps = [[[10]]]
    costs = make(steps)
    times = costs.times(1)
    first_s = start_s(costs) + switch_s(costs, None, "decode", 1) + times.prefill_s(20, 10)
    cut_s = first_s + 1e-4  # in the iteration of the second token
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Start("b", 1, ("decode",)), Assign("a", (0,)), Subscribe(At(cut_s))],
        f"at {cut_s:g}": [Migrate((0,), "b", with_kv=False)],
        "generation 0": [Prepare(("a",), (0,))],
        "preparation 0": [Learn(("a",))],
    }
    begins_s = max(first_s + times.decode_s(1, 21), cut_s + switch_s(costs, None, "decode", None))
    generated_s = begins_s + times.prefill_s(22, 11) + sum(times.decode_s(1, 20 + n) for n in range(3, 10))
    happened, recorder = tell(costs, steps, script)
    assert dict(happened)["generation 0"] == pytest.approx(generated_s, rel=1e-12)
    assert recorder.frames().samples.iloc[0].prefill_tokens == 20 + 22


def test_a_released_function_is_billed_until_its_kv_has_left() -> None:
    steps = [[[10]]]
    costs = make_costs(make_job(steps), parameters={**EXACT_STARTS, "network": {"latency_s": 7.0}})
    times = costs.times(1)
    first_s = start_s(costs) + switch_s(costs, None, "decode", None) + times.prefill_s(20, 10)
    cut_s = first_s + 1e-4
    script: Script = {
        "step 0": [Start("a", 1, ("decode",)), Start("b", 1, COLOCATED), Assign("a", (0,)), Subscribe(At(cut_s))],
        f"at {cut_s:g}": [Migrate((0,), "b"), Release("a")],
        "generation 0": [Prepare(("b",), (0,))],
        "preparation 0": [Learn(("b",))],
    }
    happened, recorder = tell(costs, steps, script)
    workers = recorder.frames().workers
    last = workers[workers.function == "a"].iloc[-1]
    assert last.state == "idle"
    left_s = first_s + times.decode_s(1, 21)
    assert (last.start_s, last.end_s) == pytest.approx(
        (left_s, left_s + estimates(costs).transfer_s(21, 1, same_node=True))
    )
    assert last.end_s < dict(happened)["generation 0"]


def test_prompts_are_prefilled_once_elsewhere_and_sent() -> None:
    steps = [[[2, 3]]]
    costs = make(steps)
    times = costs.times(1)
    script: Script = {
        "step 0": [Start("p", 1, ("prefill",)), Start("d", 1, COLOCATED)],
        "d started": [Assign("d", (0, 1), prefix_from="p")],
        "generation 0": [Prepare(("d",), (0, 1))],
        "preparation 0": [Learn(("d",))],
    }
    prefilled_s = start_s(costs) + switch_s(costs, None, "prefill", None) + times.prefill_s(50, 25)
    arrived_s = prefilled_s + estimates(costs).transfer_s(50, 1, same_node=True)
    # 48 of 50 tokens are in full blocks; each response computes the last 2, after 48 others.
    generated_s = arrived_s + times.prefill_s(4, 48 + 1) + times.decode_s(2, 51) + times.decode_s(1, 52)
    happened, recorder = tell(costs, steps, script, prompt_tokens=50)
    assert dict(happened)["generation 0"] == pytest.approx(generated_s, rel=1e-12)
    samples = recorder.frames().samples
    assert samples.prefill_tokens.sum() == 50 + 2 + 2
    assert samples.cached_tokens.tolist() == [48, 48]


def test_responses_are_prepared_while_others_are_generated() -> None:
    steps = [[[1, 60]]]
    costs = make(steps)
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Start("b", 1, ("prepare",)), Subscribe(Completions(1))],
        "a started": [Assign("a", (0, 1))],
        "Completions": [Prepare(("b",), (0,))],
        "generation 0": [Prepare(("a",), (1,))],
        "preparation 0": [Learn(("a",))],
    }
    happened, recorder = tell(costs, steps, script)
    samples = recorder.frames().samples.set_index("response_id")
    awake_s = switch_s(costs, None, "prepare", None)
    assert samples.prepared_s[0] == pytest.approx(
        samples.finished_s[0] + awake_s + costs.learning.prepare_s([21], 1), rel=1e-12
    )
    last_s = samples.finished_s[1] + switch_s(costs, "decode", "prepare", 1) + costs.learning.prepare_s([80], 1)
    assert dict(happened)["preparation 0"] == pytest.approx(last_s, rel=1e-12)


def test_a_sync_waits_for_the_weights_that_are_being_learned() -> None:
    steps = [[[1], [1]], [[1], [1]]]
    costs = make(steps)
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Start("b", 1, ("decode",))],
        "b started": [Assign("a", (0,)), Assign("b", (1,))],
        "generation 0": [Prepare(("a",), (0, 1))],
        "preparation 0": [Learn(("a",)), Sync(("b",))],
        "b synced": [Assign("b", (2, 3))],
        "generation 1": [Prepare(("a",), (2, 3))],
        "preparation 1": [Learn(("a",))],
    }
    happened, recorder = tell(costs, steps, script)
    at = dict(happened)
    assert at["b synced"] == pytest.approx(at["learning 0"] + broadcast_s(costs, 2), rel=1e-12)
    workers = recorder.frames().workers
    waiting = workers[(workers.function == "b") & ((workers.end_s - at["learning 0"]).abs() < 1e-9)]
    assert waiting.state.tolist() == ["idle"]


def test_data_parallel_preparation_is_as_slow_as_its_largest_share() -> None:
    steps = [[[1, 5, 9, 30]]]
    costs = make(steps)
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Start("b", 1, COLOCATED)],
        "a started": [Assign("a", (0, 1, 2, 3))],
        "generation 0": [Prepare(("a", "b"), (0, 1, 2, 3))],
        "preparation 0": [Learn(("a", "b"))],
    }
    happened, _ = tell(costs, steps, script)
    at = dict(happened)
    # To and fro, longest first: 50 and 21 tokens to one, 29 and 25 to the other.
    prepared_s = at["generation 0"] + switch_s(costs, "decode", "prepare", 2) + costs.learning.prepare_s([50, 21], 1)
    assert at["preparation 0"] == pytest.approx(prepared_s, rel=1e-12)
    learned_s = at["preparation 0"] + costs.learning.learn_s([21, 25, 29, 50], 2, 1)
    assert at["over"] == pytest.approx(learned_s, rel=1e-12)


def test_learning_begins_when_the_last_learner_is_there() -> None:
    steps = [[[1]]]
    costs = make(steps)
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Start("b", 1, COLOCATED)],
        "b started": [Assign("a", (0,))],
        "generation 0": [Prepare(("a",), (0,))],
        "preparation 0": [Park("b"), Wake("b"), Learn(("a", "b"))],
    }
    happened, recorder = tell(costs, steps, script)
    at = dict(happened)
    away_s = (
        estimates(costs, 2).park_s(1, COLOCATED)
        + estimates(costs, 2).wake_s(1, COLOCATED)
        + switch_s(costs, None, "learn", 2)
    )
    assert at["over"] == pytest.approx(at["preparation 0"] + away_s + costs.learning.learn_s([21], 2, 1), rel=1e-12)
    workers = recorder.frames().workers
    waiting = workers[(workers.function == "a") & (workers.start_s == at["preparation 0"])].iloc[0]
    assert (waiting.state, waiting.role) == ("idle", "learn")
    assert waiting.end_s - waiting.start_s == pytest.approx(away_s)


def test_intervals_tell_state_role_and_stage() -> None:
    steps = [[[2]]]
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED)],
        "a started": [Assign("a", (0,)), Subscribe(At(1e4))],
        "at 10000": [Prepare(("a",), (0,))],
        "preparation 0": [Learn(("a",))],
    }
    workers = tell(make(steps), steps, script)[1].frames().workers
    rows = workers[["state", "role", "stage"]].astype(object).where(workers[["state", "role", "stage"]].notna(), None)
    assert list(rows.itertuples(index=False, name=None)) == [
        ("cold", None, None),  # the start leaves the engine awake
        ("busy", "decode", "generation"), ("idle", "decode", "generation"),
        ("cold", "decode", None),  # the engine goes to sleep
        ("busy", "prepare", "preparation"), ("busy", "learn", "learning"),
    ]  # fmt: skip


# --- syncs ---


def test_all_learners_take_part_in_a_sync_as_senders() -> None:
    steps = [[[1], [1]], [[1], [1]]]
    costs = make(steps)
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Start("b", 1, ("learn",)), Start("d", 1, ("decode",))],
        "d started": [Assign("d", (0, 1))],
        "generation 0": [Prepare(("a",), (0, 1))],
        "preparation 0": [Learn(("a", "b"))],
        "step 1": [Start("late", 1, ("decode",)), Sync(("late",)), Assign("late", (2, 3))],
        "generation 1": [Prepare(("a",), (2, 3))],
        "preparation 1": [Learn(("a", "b"))],
    }
    happened, recorder = tell(costs, steps, script)
    at = dict(happened)
    started_s = at["step 1"] + start_s(costs, cached=True)  # it holds up the learners, which wait idle
    synced_s = started_s + broadcast_s(costs, 3)
    assert at["generation 1"] == pytest.approx(synced_s + costs.times(1).prefill_s(40, 10), rel=1e-12)
    workers = recorder.frames().workers
    sync = workers[workers.stage == "weight_sync"]
    sync = sync[sync.state == "busy"]
    assert sorted(sync.function) == ["a", "b", "late"]  # d has no part in it
    for _, row in sync.iterrows():
        assert (row.start_s, row.end_s) == pytest.approx((started_s, synced_s), rel=1e-12)
    waiting = workers[(workers.start_s == at["step 1"]) & workers.function.isin(["a", "b"])]
    assert waiting.state.tolist() == ["idle", "idle"]
    assert waiting.end_s.tolist() == pytest.approx([started_s, started_s], rel=1e-12)
    samples = recorder.frames().samples
    assert samples[samples.step == 1].weights_version.tolist() == [1, 1]


# --- preparation ---


def test_models_for_preparation_are_loaded_once_in_a_row() -> None:
    steps = [[[3], [4], [5]]]
    costs = make(steps)
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED)],
        "a started": [Assign("a", (0, 1, 2))],
        "generation 0": [Prepare(("a",), (0,)), Prepare(("a",), (1,)), Park("a"), Wake("a"), Prepare(("a",), (2,))],
        "preparation 0": [Learn(("a",))],
    }
    happened, recorder = tell(costs, steps, script)
    at, prepared_s = dict(happened), recorder.frames().samples.set_index("response_id").prepared_s
    first_s = at["generation 0"] + switch_s(costs, "decode", "prepare", 1) + costs.learning.prepare_s([23], 1)
    second_s = first_s + costs.learning.prepare_s([24], 1, loaded=True)
    third_s = second_s + estimates(costs, 1).park_s(1, COLOCATED) + estimates(costs, 1).wake_s(1, COLOCATED)
    third_s += switch_s(costs, None, "prepare", 1) + costs.learning.prepare_s([25], 1)
    assert prepared_s.tolist() == pytest.approx([first_s, second_s, third_s], rel=1e-12)
    assert costs.learning.prepare_s([24], 1) - costs.learning.prepare_s([24], 1, loaded=True) > 1e-3


def test_steps_are_prepared_in_their_order() -> None:
    steps = [[[3]], [[3]]]
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Assign("a", (0, 1))],
        "a drained": [Prepare(("a",), (1,)), Prepare(("a",), (0,))],
        "preparation 0": [Learn(("a",))],
        "preparation 1": [Learn(("a",))],
    }
    happened, recorder = tell(make(steps, max_staleness=1), steps, script)
    told = [(name, time_s) for name, time_s in happened if name.startswith("preparation")]
    prepared_s = recorder.frames().samples.set_index("response_id").prepared_s
    assert prepared_s[1] < prepared_s[0]
    assert told == [("preparation 0", prepared_s[0]), ("preparation 1", prepared_s[0])]


# --- prefix caches ---

BETWEEN: dict[str, tuple[list[Decision], int]] = {
    "nothing": ([], 48),
    "a preparation": ([Prepare(("a",), (0,))], 0),
    "being parked": ([Park("a"), Wake("a")], 0),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_a_cached_prompt_is_forgotten_when_the_engine_gives_way(what: str) -> None:
    between, cached = BETWEEN[what]
    steps = [[[3, 5]]]
    prepares = [0, 1] if what != "a preparation" else [1]
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Assign("a", (0,))],
        "a drained": [*between, Assign("a", (1,))],
        "generation 0": [Prepare(("a",), tuple(prepares))],
        "preparation 0": [Learn(("a",))],
    }
    samples = tell(make(steps), steps, script, prompt_tokens=50)[1].frames().samples.set_index("response_id")
    assert samples.cached_tokens.tolist() == [0, cached]
    assert samples.prefill_tokens.tolist() == [50, 50 - cached]


# --- what is observed between changes of the batch ---


def test_observed_tokens_advance_with_the_iterations() -> None:
    work = [[[60, 30]]]
    costs = make_costs(make_job(work), parameters=EXACT_STARTS, engine=Engine(tensor_parallel=1, overhead_s=0.04))
    backend, _ = make_backend(costs, work, 20)
    backend.reset()
    times, ready_s = costs.times(1), start_s(costs)
    ends_s = [ready_s + times.prefill_s(24, (20 * 10 + 4 * 18) / 24)]  # the second finds a full block of 16 tokens
    for n in range(1, 60):
        ends_s.append(ends_s[-1] + times.decode_s(2 if n < 30 else 1, 20 + n))
    decisions: list[Decision] = [Start("a", 1, COLOCATED), Assign("a", (0, 1))]
    seen = []
    for poll in range(-1, 25):
        observation = backend.advance([*decisions, Subscribe(At(ready_s + 0.1 * poll + 0.01))])
        decisions = []
        assert observation is not None
        done = sum(end_s <= observation.time_s for end_s in ends_s)
        assert observation.response(0).context_tokens == 20 + done
        assert observation.response(1).context_tokens == 20 + min(done, 30)
        blocks = 0
        if 0 < done < 60:  # the newest token has no KV; the first block is shared
            own = [max(-(-(20 + done - 1) // 16) - 1, 0)] * (2 if done < 30 else 1)
            blocks = 1 + sum(own)
        if done or poll < 0:
            engine_blocks = costs.memory.kv_blocks(1, 1)
            assert observation.functions["a"].kv_used == pytest.approx(blocks / engine_blocks, abs=1e-12)
        seen.append(done)
    assert seen[-1] > 40
    assert len(set(seen)) > 20


def test_free_slots_are_reckoned_at_the_observed_context() -> None:
    work = [[[10], [30]], [[10], [30]]]
    costs = make_costs(
        make_job(work, max_prompt_tokens=1024, max_response_tokens=4096), parameters=EXACT_STARTS, nodes=1
    )
    backend, _ = make_backend(costs, work, [900, 1000])
    backend.reset()
    listen = [Subscribe(StageFinished("generation")), Subscribe(StageFinished("preparation"))]
    observation = backend.advance([*listen, Start("a", 1, COLOCATED), Assign("a", (0, 1))])
    assert observation is not None
    before = costs.flat_batch(1, (900 + 1000) / 2 + 4096 / 8)
    assert observation.functions["a"].free_slots == observation.estimates.flat_batch(1) == before
    backend.advance([Prepare(("a",), (0, 1))])
    observation = backend.advance([Learn(("a",))])
    assert observation is not None
    after = costs.flat_batch(1, (900 + 1000) / 2 + (10 + 30) / 2 / 2)
    assert observation.functions["a"].free_slots == observation.estimates.flat_batch(1) == after
    assert after > before


def test_kv_is_sent_as_fast_as_the_smaller_function_can() -> None:
    steps = [[[10]]]
    costs = make_costs(make_job(steps), parameters={**EXACT_STARTS, "gpu": {"l40s": {"link_bytes_per_s": 1e6}}})
    times = costs.times(2)
    first_s = start_s(costs, 2) + times.prefill_s(20, 10)
    cut_s = first_s + 1e-4
    script: Script = {
        "step 0": [Start("a", 2, ("decode",)), Start("b", 1, COLOCATED), Assign("a", (0,)), Subscribe(At(cut_s))],
        f"at {cut_s:g}": [Migrate((0,), "b"), Release("a")],
        "generation 0": [Prepare(("b",), (0,))],
        "preparation 0": [Learn(("b",))],
    }
    workers = tell(costs, steps, script)[1].frames().workers
    last = workers[workers.function == "a"].iloc[-1]
    left_s = first_s + times.decode_s(1, 21)
    ready_s = max(left_s, start_s(costs))  # one GPU takes longer to load the weights
    assert last.end_s == pytest.approx(ready_s + 0.005 + 21 * costs.memory.kv_token_bytes / 1e6, rel=1e-12)


def test_a_prepared_step_is_told_once_while_it_waits_for_the_next() -> None:
    steps = [[[3]], [[3]]]
    script: Script = {
        "step 0": [Start("a", 1, COLOCATED), Assign("a", (0, 1))],
        "a drained": [Prepare(("a",), (0,)), Prepare(("a",), (1,))],
        "preparation 1": [Learn(("a",)), Learn(("a",))],
    }
    happened, _ = tell(make(steps, max_staleness=1), steps, script)
    told = [name for name, _ in happened if name.startswith("preparation")]
    assert told == ["preparation 0", "preparation 1"]
