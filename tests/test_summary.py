"""Summaries against arithmetic by hand on a tiny run: two functions, two steps, two epochs."""

import dataclasses
import json
import re
import sys

import pandas as pd
import pytest
from clusters import EXACT_STARTS, make_backend, make_costs, make_job

from simrl.policies.contract import Assign, At, Learn, Park, Prepare, Release, StageFinished, Start, Subscribe, Wake
from simrl.traces.parameters import Parameters, section_names, shipped_parameters
from simrl.traces.records import SAMPLE_COLUMNS, Frames, Recorder
from simrl.traces.summary import Price, flat, summarise

PER_GPU = Price(usd_per_hour=3600.0, per="gpu", minimum_s=12)  # a dollar a second
PER_NODE = Price(usd_per_hour=3600.0, per="node", minimum_s=20)


def interval(function, state, stage, start_s, end_s):
    node, gpus = {"a": (0, 2), "b": (1, 4)}[function]
    return (function, node, gpus, "0,1", state, None, stage, float(start_s), float(end_s))


def sample(response_id, step, prompt_tokens, response_tokens, migrations, prefill_tokens):
    row = (response_id, step, step, 0, 0, prompt_tokens, response_tokens, False, "a", 0, 0.0, 1.0, 2.0)
    return (*row, migrations, prefill_tokens, 0)


def tiny():
    recorder = Recorder()
    rows = [sample(0, 0, 10, 5, 0, 10), sample(1, 0, 10, 6, 1, 0), sample(2, 1, 20, 7, 2, 35)]
    recorder.samples.append(dict(zip(SAMPLE_COLUMNS, zip(*rows, strict=True), strict=True)))
    recorder.phases += [
        (0, 0, "generation", 12.0, 20.0),
        (0, 0, "learning", 22.0, 25.0),
        (0, 0, "step", 0.0, 26.0),
        (1, 1, "generation", 33.0, 40.0),
        (1, 1, "step", 26.0, 40.0),
    ]
    recorder.workers += [
        interval("a", "cold", None, 0, 10),  # 20 GPU-seconds
        interval("a", "idle", None, 10, 12),  # 4
        interval("a", "busy", "generation", 12, 20),  # 16
        interval("b", "cold", None, 2, 6),  # 16
        interval("b", "busy", "preparation", 6, 16),  # 40
        interval("a", "idle", "generation", 20, 22),  # 4
        interval("a", "busy", "learning", 22, 25),  # 6
        interval("a", "parked", None, 25, 30),
        interval("a", "cold", None, 30, 31),  # 2
        interval("a", "idle", None, 31, 33),  # 4
        interval("a", "busy", "generation", 33, 40),  # 14
    ]
    recorder.decisions += [(0.0, 0, kind, "a", 0, "") for kind in ("Start", "Assign", "Start")]
    return recorder.frames()


def summary_of(frames, price=PER_GPU):
    return summarise(
        frames, policy="p", seed=3, nodes=2, gpus=16, price=price, policy_wall_s=0.25, wall_s=1.5
    )  # fmt: skip


def test_facts_and_totals():
    summary = summary_of(tiny())
    assert {key: summary[key] for key in ("policy", "seed", "nodes", "gpus", "policy_wall_s", "wall_s")} == {
        "policy": "p", "seed": 3, "nodes": 2, "gpus": 16, "policy_wall_s": 0.25, "wall_s": 1.5,
    }  # fmt: skip
    assert (summary["steps"], summary["responses"], summary["response_tokens"]) == (2, 3, 18)
    assert (summary["prompt_tokens"], summary["migrations"], summary["cold_starts"]) == (40, 3, 2)


def test_step_seconds():
    summary = summary_of(tiny())
    assert summary["simulated_s"] == 40.0
    assert summary["step_s"] == {"mean": 20.0, "p50": 20.0, "p95": pytest.approx(14 + 0.95 * 12)}


def test_a_step_without_a_stage_counts_as_zero():
    summary = summary_of(tiny())
    stages = [summary[f"{stage}_s"] for stage in ("generation", "preparation", "learning", "weight_sync")]
    assert stages == [7.5, 0.0, 1.5, 0.0]


def test_parked_functions_hold_no_gpu():
    summary = summary_of(tiny())
    assert (summary["gpu_s"], summary["gpu_s_per_step"]) == (126.0, 63.0)


def test_gpu_seconds_by_state_and_by_stage_add_up():
    summary = summary_of(tiny())
    assert summary["gpu_s_by"]["state"] == {"busy": 76.0, "idle": 12.0, "cold": 38.0}
    assert summary["gpu_s_by"]["stage"] == {
        "generation": 34.0, "preparation": 40.0, "learning": 6.0, "weight_sync": 0.0, "none": 46.0,
    }  # fmt: skip
    assert summary["busy_fraction"] == 76 / 126


def test_the_papers_measure_has_no_warm_residency():
    assert summary_of(tiny())["gpu_s_paper"] == 126.0 - 38.0 - 8.0


def test_saved_prefill_is_negative_when_recomputation_outweighs_it():
    summary = summary_of(tiny())
    assert (summary["prefill_tokens_computed"], summary["prefill_tokens_saved"]) == (45, -5)


def test_epochs_count_the_gpu_seconds_inside_their_steps():
    summary = summary_of(tiny())
    assert summary["first_epoch"] == {"steps": 1, "step_s": 26.0, "gpu_s_per_step": 106.0}
    assert summary["later_epochs"] == {"steps": 1, "step_s": 14.0, "gpu_s_per_step": 20.0}


def test_no_later_epoch_is_null():
    frames = tiny()
    only_first = frames.phases.assign(epoch=0)
    summary = summary_of(Frames(frames.samples, only_first, frames.workers, frames.decisions))
    assert summary["first_epoch"]["steps"] == 2
    assert summary["later_epochs"] is None


def test_leases_cost_by_the_gpu_at_least_the_minimum():
    # a: 25 s x 2, then after parking 10 s, billed as 12, x 2; b: 14 s x 4.
    assert summary_of(tiny(), PER_GPU)["cost_usd"] == pytest.approx(50 + 24 + 56)


def test_nodes_cost_from_first_to_last_interval_parked_ones_too():
    # Node 0: 0 to 40 s; node 1: 14 s, billed as 20.
    assert summary_of(tiny(), PER_NODE)["cost_usd"] == pytest.approx(40 + 20)


def test_dollars_by_the_step_and_by_a_million_response_tokens():
    summary = summary_of(tiny(), PER_NODE)  # 60 dollars, 2 steps, 18 tokens
    assert summary["cost_usd_per_step"] == pytest.approx(30)
    assert summary["cost_usd_per_million_response_tokens"] == pytest.approx(60 / 18 * 1e6)


def test_every_price_has_a_date():
    names = section_names(shipped_parameters(), "price")
    assert {"aws-g6e.48xlarge-spot", "aws-p5.48xlarge-spot"} <= set(names)
    for name in names:
        assert re.fullmatch(r"20\d\d-\d\d(-\d\d)?", Price.load(name, Parameters()).date), name


def lost(function, node, start_s, end_s):
    return (function, node, 2, "", "lost", None, None, float(start_s), float(end_s))


def with_rows(frames, *rows):
    workers = pd.concat([frames.workers, pd.DataFrame(rows, columns=frames.workers.columns)], ignore_index=True)
    return Frames(frames.samples, frames.phases, workers, frames.decisions)


def test_a_lost_node_is_paid_until_it_is_lost_and_its_successor_from_its_first_use():
    # Node 0: 0 to 25 s, and another machine from 30 to 40 s, billed as 20; node 1: 14 s, billed as 20.
    frames = tiny()
    busy = frames.workers[~((frames.workers.state == "parked") & (frames.workers.function == "a"))]
    frames = Frames(frames.samples, frames.phases, busy, frames.decisions)
    assert summary_of(frames, PER_NODE)["cost_usd"] == pytest.approx(40 + 20)
    broken = with_rows(frames, lost("a", 0, 25, 25), lost("", 0, 25, 30), lost("c", 1, 9, 9))
    summary = summary_of(broken, PER_NODE)
    assert summary["cost_usd"] == pytest.approx(25 + 20 + 20)
    assert (summary["lost_functions"], summary["lost_nodes"]) == (2, 1)
    assert summary["gpu_s"] == summary_of(frames)["gpu_s"]


def test_the_bill_of_a_simulated_life_with_cold_start_parking_and_minimum():
    # a starts at 0, is parked at 500 s and woken at 600 s for the step; b on the other node is let go at 500 s.
    work = [[[5, 6]]]
    costs = make_costs(make_job(work), nodes=2, parameters=EXACT_STARTS)
    backend, recorder = make_backend(costs, work)
    observation = backend.reset()
    told = [Subscribe(StageFinished(stage)) for stage in ("generation", "preparation")]
    starts = [Start("a", 1, ("decode", "prepare", "learn"), 0), Start("b", 1, ("decode",), 1)]
    plan = {500.0: [Release("b"), Park("a")], 600.0: [Wake("a"), Assign("a", (0, 1))]}
    observation = backend.advance([*starts, *told, *(Subscribe(At(time_s)) for time_s in plan)])
    while observation is not None:
        decisions = [d for event in observation.events if isinstance(event, At) for d in plan[event.time_s]]
        done = {event.stage for event in observation.events if isinstance(event, StageFinished)}
        decisions += [Prepare(("a",), observation.unprepared)] if "generation" in done else []
        decisions += [Learn(("a",))] if "preparation" in done else []
        observation = backend.advance(decisions)
    frames, end_s = recorder.frames(), backend.env.now
    of_a = frames.workers[frames.workers.function == "a"]
    cold, parked = (of_a[of_a.state == state] for state in ("cold", "parked"))
    assert (cold.start_s.iloc[0], cold.end_s.iloc[0] > 100) == (0.0, True), "the cold start is on the bill"
    parked_s = float(parked.start_s.iloc[0])
    assert 500 < parked_s < 510
    assert 600 < end_s < 800
    # By the GPU and second: a until it is parked and from its wake to the end, b for 500 s.
    exact = summary_of(frames, Price(3600.0, "gpu", 0))
    assert exact["cost_usd"] == pytest.approx(parked_s + (end_s - 600) + 500)
    assert exact["gpu_s"] == pytest.approx(exact["cost_usd"])
    # Leases of at least 450 s: that after the wake is shorter.
    assert summary_of(frames, Price(3600.0, "gpu", 450))["cost_usd"] == pytest.approx(parked_s + 450 + 500)
    # By the node: the parked function keeps node 0 to the end; node 1 is billed for its minimum.
    assert summary_of(frames, Price(3600.0, "node", 550))["cost_usd"] == pytest.approx(end_s + 550)


def test_a_node_is_paid_as_long_as_a_function_is_parked_on_it():
    frames = tiny()
    parked_last = frames.workers[(frames.workers.function == "a") & (frames.workers.end_s <= 30)]
    assert parked_last.state.iloc[-1] == "parked"
    summary = summary_of(Frames(frames.samples, frames.phases, parked_last, frames.decisions), PER_NODE)
    assert summary["cost_usd"] == pytest.approx(30)


def test_two_functions_of_a_node_share_its_price():
    frames = tiny()
    together = frames.workers.assign(node=0)
    summary = summary_of(Frames(frames.samples, frames.phases, together, frames.decisions), PER_NODE)
    assert summary["cost_usd"] == pytest.approx(40)


def test_prices_come_from_the_table():
    assert Price.load("aws-g6e.48xlarge", Parameters()) == Price(30.131, "node", 60, "2026-11-22")
    with pytest.raises(ValueError, match="must be 'node' or 'gpu'"):
        Price(1.0, "rack", 0)


def test_the_summary_is_json_without_nan():
    text = json.dumps(summary_of(tiny()), allow_nan=False)
    assert json.loads(text) == summary_of(tiny())


def test_a_run_that_held_no_gpu_has_a_summary():
    frames = tiny()
    summary = summary_of(Frames(frames.samples, frames.phases, frames.workers.iloc[:0], frames.decisions))
    assert (summary["gpu_s"], summary["busy_fraction"], summary["cost_usd"]) == (0.0, 0.0, 0.0)


def test_a_run_without_a_finished_step_has_none():
    with pytest.raises(ValueError, match="no step is finished"):
        summary_of(Recorder().frames())


def test_flat_joins_nested_keys():
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}


def calls_of(frames, price):
    """Calls of Python and C functions that a summary takes."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        summary_of(frames, price)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("price", [PER_GPU, PER_NODE], ids=["per gpu", "per node"])
@pytest.mark.parametrize("name", ["samples", "workers"])
def test_a_summary_visits_no_row_in_python(name, price):
    few, many = (
        dataclasses.replace(tiny(), **{name: pd.concat([getattr(tiny(), name)] * times, ignore_index=True)})
        for times in (10, 1000)
    )
    summary_of(few, price)  # what pandas does the first time
    added = len(getattr(many, name)) - len(getattr(few, name))
    assert calls_of(many, price) - calls_of(few, price) < added
