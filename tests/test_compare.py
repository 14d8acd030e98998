"""Comparisons: the paired arithmetic by hand, and the same work for every policy."""

import math
import statistics

import pytest

from simrl.experiments.compare import check_same_work, compare, interval95, row
from simrl.experiments.config import ConfigError, load_config

SMALL = (
    "job.model=qwen2.5-0.5b",
    "job.prompts_per_step=16",
    "job.dataset_prompts=32",
    "job.max_response_tokens=256",
)
T_975_2 = 4.302652729911275  # Student's t, two degrees of freedom, from a table


def summary(policy, step_s, gpu_s, response_tokens=50, later=None):
    return {
        "later_epochs": later and dict(zip(("step_s", "gpu_s_per_step"), later, strict=True)),
        "policy": policy, "seed": 0, "step_s": {"mean": step_s}, "gpu_s_per_step": gpu_s, "responses": 5,
        "response_tokens": response_tokens, "prompt_tokens": 7,
    }  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return load_config(nodes=1, steps=2, seed=11, sets=SMALL, policies=["verl", "rlhfuse", "rlhfless"])


@pytest.fixture(scope="module")
def compared(small):
    return compare(small, ["rlhfuse", "verl"], seeds=3, baseline="verl")


def test_the_interval_is_students():
    import numpy as np

    low, high = interval95(np.array([1.0, 2.0, 3.0]))
    half = T_975_2 * 1.0 / math.sqrt(3)
    assert (low, high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_one_seed_has_no_interval(small):
    rows = compare(small, ["verl", "rlhfuse"]).rows
    assert [line[key] for line in rows for key in ("speedup_ci95", "gpu_s_reduction_ci95")] == [None] * 4


def test_ratios_are_taken_seed_by_seed():
    runs = [summary("x", 5.0, 90.0), summary("x", 10.0, 60.0)]
    baseline = [summary("v", 10.0, 100.0), summary("v", 30.0, 120.0)]
    line = row(runs, baseline)
    assert line["step_s"] == 7.5
    assert line["gpu_s_per_step"] == 75.0
    assert line["speedup"] == pytest.approx((10 / 5 + 30 / 10) / 2)  # not (10 + 30) / (5 + 10)
    assert line["gpu_s_reduction"] == pytest.approx((0.1 + 0.5) / 2)
    assert line["responses"] == [5, 5]
    assert line["later_epochs"] is None


def test_later_epochs_are_compared_by_themselves():
    line = row([summary("x", 50.0, 900.0, later=(4.0, 30.0))], [summary("v", 60.0, 900.0, later=(6.0, 40.0))])
    assert line["speedup"] == pytest.approx(60 / 50)
    assert line["later_epochs"]["speedup"] == pytest.approx(6 / 4)
    assert line["later_epochs"]["gpu_s_reduction"] == pytest.approx(1 - 30 / 40)


def test_the_baseline_has_its_row(compared):
    assert compared.baseline == "verl"
    line = next(line for line in compared.rows if line["policy"] == "verl")
    assert (line["speedup"], line["speedup_ci95"]) == (1.0, [1.0, 1.0])
    assert (line["gpu_s_reduction"], line["gpu_s_reduction_ci95"]) == (0.0, [0.0, 0.0])


def test_rows_agree_with_the_runs(compared):
    runs = {p: [s for s in compared.summaries if s["policy"] == p] for p in ("verl", "rlhfuse")}
    ratios = [v["step_s"]["mean"] / f["step_s"]["mean"] for v, f in zip(runs["verl"], runs["rlhfuse"], strict=True)]
    line = next(line for line in compared.rows if line["policy"] == "rlhfuse")
    half = T_975_2 * statistics.stdev(ratios) / math.sqrt(3)
    assert line["speedup"] == pytest.approx(statistics.fmean(ratios))
    assert line["speedup_ci95"] == [pytest.approx(statistics.fmean(ratios) + sign * half) for sign in (-1, 1)]


def test_every_policy_faces_the_same_work(compared):
    one, other = compared.rows
    for total in ("responses", "response_tokens", "prompt_tokens"):
        assert one[total] == other[total]
    assert len(set(one["response_tokens"])) == 3  # and every seed other work
    assert [s["seed"] for s in compared.summaries] == [11, 12, 13] * 2


def test_different_totals_are_a_bug():
    check_same_work([summary("x", 1.0, 1.0), summary("y", 2.0, 2.0)])
    with pytest.raises(AssertionError, match="response_tokens differ"):
        check_same_work([summary("x", 1.0, 1.0), summary("y", 1.0, 1.0, response_tokens=51)])


def test_the_json_object_has_the_documented_keys(compared):
    document = compared.to_dict()
    assert list(document) == ["baseline", "rows"]
    assert list(document["rows"][0]) == [
        "policy", "step_s", "gpu_s_per_step", "speedup", "speedup_ci95", "gpu_s_reduction", "gpu_s_reduction_ci95",
        "responses", "response_tokens", "prompt_tokens", "later_epochs", "paired",
    ]  # fmt: skip


def test_a_missing_baseline_is_added_in_front(small):
    compared = compare(small, ["rlhfuse"], baseline="verl")
    assert [line["policy"] for line in compared.rows] == ["verl", "rlhfuse"]


def test_policies_take_the_parameters_that_they_know(small):
    config = small.with_values({"policy.dispatch": "least_loaded"})
    assert config.with_policy("verl").policy_params == {"dispatch": "least_loaded"}
    assert config.with_policy("rlhfless").policy_params == {}


@pytest.mark.parametrize(
    ("policies", "seeds", "message"),
    [([], 1, "at least one policy"), (["verl", "verl"], 1, "'verl' is named twice"), (["verl"], 0, "seeds=0")],
)
def test_impossible_comparisons_are_refused(small, policies, seeds, message):
    with pytest.raises(ConfigError, match=message):
        compare(small, policies, seeds)


def test_a_run_is_a_row_of_the_frame(compared):
    frame = compared.frame()
    assert len(frame) == 6
    assert {"policy", "seed", "step_s.mean", "gpu_s_by.state.busy"} <= set(frame.columns)
