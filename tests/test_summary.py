"""Summaries against arithmetic by hand on a tiny run: two functions, two steps, two epochs."""

import json
import time

import pandas as pd
import pytest

from simrl.traces.parameters import Parameters
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


def test_two_functions_of_a_node_share_its_price():
    frames = tiny()
    together = frames.workers.assign(node=0)
    summary = summary_of(Frames(frames.samples, frames.phases, together, frames.decisions), PER_NODE)
    assert summary["cost_usd"] == pytest.approx(40)


def test_prices_come_from_the_table():
    assert Price.load("aws-g6e.48xlarge", Parameters()) == Price(30.131, "node", 60)
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


def test_the_main_job_is_summarised_in_half_a_second():
    frames = tiny()
    many = Frames(
        pd.concat([frames.samples] * 61_440, ignore_index=True),
        pd.concat([frames.phases] * 23, ignore_index=True),
        pd.concat([frames.workers] * 4_600, ignore_index=True),
        frames.decisions,
    )
    seconds = []
    for price in (PER_GPU, PER_NODE):
        begin = time.perf_counter()
        summary_of(many, price)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.5
