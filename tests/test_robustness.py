"""Whether rankings hold over what is assumed: sampling, shares and flips by hand; and where runs' numbers come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import simrl
from simrl.cli import main
from simrl.experiments.compare import Comparison, compare
from simrl.experiments.config import Config, ConfigError, load_config, preset_names
from simrl.experiments.robustness import METRICS, Study, choose, flipping_parameter, sobol_points, study_robustness
from simrl.experiments.run import run
from simrl.traces.parameters import STATUSES, Parameter, shipped_parameters

POLICIES = ("verl", "rlhfuse", "rlhfless")
SMALL = (
    "job.model=qwen2.5-0.5b", "job.prompts_per_step=16", "job.dataset_prompts=32", "job.max_response_tokens=256",
)  # fmt: skip


def small(**values: Any) -> Config:
    config = load_config(nodes=1, steps=2, seed=11, sets=SMALL, policies=POLICIES)
    return config.with_values(values) if values else config


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return compare(small(), ["verl", "rlhfless"], robustness=6)


def assumed(key: str, low: float, high: float, **fields: Any) -> Parameter:
    given = {"value": (low + high) / 2, "unit": "1", "status": "assumed", "source": "nobody knows", **fields}
    return Parameter(key, low=low, high=high, **given)


# --- which parameters ---


def test_assumed_numbers_with_a_range_are_varied_and_others_said_so() -> None:
    shipped = shipped_parameters()
    latency = shipped["network.latency_s"]
    user = Parameter("network.efficiency", 0.5, "1", "assumed", "set by the user; shipped: 0.8", 0.5, 0.5)
    flag = Parameter("engine.vllm-current.enforce_eager", True, "flag", "assumed", "set by the user; shipped: False")
    spot = shipped["price.aws-p5.48xlarge-spot.usd_per_hour"]
    varied, skipped = choose([spot, user, flag, latency, assumed("workload.x", 0, 1), shipped["gpu.l40s.peak_flops"]])
    assert varied == [latency]
    assert skipped == {
        "network.efficiency": "set by the user",
        "engine.vllm-current.enforce_eager": "a name or a flag",
        "workload.x": "derived from other parameters, or part of the workload",
        "price.aws-p5.48xlarge-spot.usd_per_hour": "a price changes neither seconds nor GPU-seconds",
    }


def test_points_fill_the_ranges_evenly_and_come_from_the_seed() -> None:
    varied = [assumed("a", 2.0, 4.0), assumed("b", -1.0, 0.0)]
    points = sobol_points(varied, 64, seed=5)
    for column, (low, high) in zip(points.T, ((2.0, 4.0), (-1.0, 0.0)), strict=True):
        counts, _ = np.histogram(column, bins=8, range=(low, high))
        assert counts.tolist() == [8] * 8, "a Sobol sequence has as many points in each eighth"
    assert np.array_equal(points, sobol_points(varied, 64, seed=5))
    assert np.array_equal(points[:37], sobol_points(varied, 37, seed=5)), "more points go on where fewer end"
    assert not np.array_equal(points, sobol_points(varied, 64, seed=6))
    assert sobol_points(varied, 1, seed=5).shape == (1, 2)


def test_each_run_has_the_values_of_its_point(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Mapping[str, Any], int]] = []

    class Result:
        summary: Mapping[str, Any] = {"gpu_s_per_step": 1.0, "step_s": {"mean": 2.0}}

    def note(config: Config, *, work: object) -> Result:
        assert work is given_work
        seen.append((config.policy, config.cluster.parameters, config.seed))
        return Result()

    monkeypatch.setattr("simrl.experiments.robustness.run", note)
    nominal = [Result.summary] * 2
    latency = shipped_parameters()["network.latency_s"]
    config = small(**{"cluster.parameters.network.efficiency": 0.7})
    given_work: Any = object()
    study = study_robustness(config, ("verl", "rlhfuse"), "verl", [latency], nominal, 2, work=given_work)
    (first,), (second,) = sobol_points([latency], 2, seed=11).tolist()
    expected = {"network": {"efficiency": 0.7}}
    assert seen == [
        (policy, {**expected, "network.latency_s": value}, 11) for value in (first, second) for policy in study.policies
    ]


def test_a_varied_parameter_changes_the_run() -> None:
    config = small()
    quick, slow = (
        run(config.model_copy(update={"cluster": config.cluster.model_copy(update={"parameters": {key: value}})}))
        for key, value in (("switch.sync_setup_s", 0.02), ("switch.sync_setup_s", 4.0))
    )
    entries = {p.key: p for p in slow.parameters}
    assert entries["switch.sync_setup_s"].value == 4.0
    assert slow.summary["step_s"]["mean"] > quick.summary["step_s"]["mean"]


# --- shares and flips, by hand ---


def study_of(values: list[list[float]], nominal: list[float], points: list[float]) -> dict[str, Any]:
    table, column = np.array(values, dtype=float), np.array(points, dtype=float)[:, None]
    study = Study(
        policies=("x", "y", "z"), baseline="x", varied=(assumed("a", 0, 10),), skipped={}, points=column,
        impossible=("it does not fit",) * 2, nominal=dict.fromkeys(METRICS, np.array(nominal)),
        values=dict.fromkeys(METRICS, table),
    )  # fmt: skip
    document = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert document["by"]["gpu_s_per_step"] == document["by"]["step_s"]
    assert (document["points"], document["impossible_points"]) == (len(points), 2)
    assert document["impossible_because"] == {"it does not fit": 2}
    found: dict[str, Any] = document["by"]["step_s"]
    return found


def test_shares_of_the_ranking_and_of_each_pair() -> None:
    # Nominal: y < x < z. Point by point: the same; x and y change places; z comes first; the same.
    values = [[20.0, 10.0, 30.0], [10.0, 20.0, 30.0], [20.0, 15.0, 10.0], [24.0, 12.0, 30.0]]
    found = study_of(values, [20.0, 10.0, 25.0], [1.0, 4.0, 5.0, 2.0])
    assert found["ranking"] == ["y", "x", "z"]
    assert found["share_holds"] == 0.5
    pairs = {(pair["better"], pair["worse"]): pair for pair in found["pairs"]}
    assert {names: pair["share_holds"] for names, pair in pairs.items()} == {
        ("y", "x"): 0.75, ("y", "z"): 0.75, ("x", "z"): 0.75,
    }  # fmt: skip
    assert pairs["y", "x"]["ratio"] == 2.0
    assert pairs["y", "x"]["ratio_range"] == [0.5, 2.0]
    assert found["baseline_over_policy"] == {"x": [1.0, 1.0], "y": [0.5, 2.0], "z": [10 / 30, 20 / 10]}


def test_nothing_is_said_where_nothing_could_run() -> None:
    study = Study(
        policies=("x", "y"), baseline="x", varied=(assumed("a", 0, 1),), skipped={}, points=np.empty((0, 1)),
        impossible=("no",), nominal=dict.fromkeys(METRICS, np.array([1.0, 2.0])),
        values=dict.fromkeys(METRICS, np.empty((0, 2))),
    )  # fmt: skip
    found = json.loads(json.dumps(study.to_dict(), allow_nan=False))["by"]["step_s"]
    assert (found["share_holds"], found["pairs"][0]["share_holds"], found["pairs"][0]["ratio_range"]) == (None,) * 3


@pytest.mark.parametrize("rising", [True, False])
def test_the_parameter_that_flips_an_order_is_found_with_its_value(rising: bool) -> None:
    rng = np.random.Generator(np.random.Philox(3))
    points = rng.uniform(0.0, 10.0, (200, 3))
    # The second decides: the ratio passes 1 where it is 4; the others disturb it a little.
    slope = 0.1 if rising else -0.1
    ratios = 1.0 + slope * (points[:, 1] - 4.0) + 0.002 * (points[:, 0] - 5.0)
    found = flipping_parameter(points, ratios, ["a", "b", "c"])
    assert found is not None
    assert found["parameter"] == "b"
    assert found["rank_correlation"] == pytest.approx(1.0 if rising else -1.0, abs=0.01)
    flips = found["flips"]
    assert flips["side"] == ("below" if rising else "above")
    assert flips["value"] == pytest.approx(4.0, abs=0.15)
    assert flips["share_right"] > 0.98


def test_the_value_at_which_an_order_flips_parts_the_points_best() -> None:
    points = np.arange(1.0, 9.0)[:, None]
    found = flipping_parameter(points, np.array([0.5, 0.6, 0.7, 1.1, 1.2, 0.9, 1.3, 1.4]), ["a"])
    assert found is not None
    assert found["flips"] == {"value": 3.5, "side": "below", "share_right": 7 / 8}
    found = flipping_parameter(points, np.array([1.4, 1.3, 1.2, 1.1, 1.05, 1.01, 0.9, 0.8]), ["a"])
    assert found is not None
    assert found["flips"] == {"value": 6.5, "side": "above", "share_right": 1.0}


def test_an_order_that_never_flips_has_no_value() -> None:
    points = np.array([[1.0], [2.0], [3.0]])
    never = flipping_parameter(points, np.array([1.1, 1.3, 1.2]), ["a"])
    # r = 0.5 of 3 points: t = 0.5 / sqrt(0.75) with one degree of freedom, two-sided: 1 - 2 / pi * atan(t) = 2 / 3.
    assert never == {
        "parameter": "a", "rank_correlation": pytest.approx(0.5), "chance": pytest.approx(2 / 3), "flips": None,
    }  # fmt: skip
    assert flipping_parameter(points, np.array([1.0, 1.0, 1.0]), ["a"]) is None


def test_few_points_may_show_a_relation_by_chance() -> None:
    rng = np.random.Generator(np.random.Philox(4))
    few, many = rng.uniform(size=(4, 20)), rng.uniform(size=(64, 20))
    found = [flipping_parameter(p, 1 + p[:, 3], [str(i) for i in range(20)]) for p in (few, many)]
    # 2 of the 4! orders of 4 points correlate by 1 in size, and there are 20 parameters.
    assert [entry and entry["chance"] for entry in found] == [1.0, pytest.approx(0.0, abs=1e-9)]
    assert found[1] is not None
    assert found[1]["parameter"] == "3"


# --- whole comparisons ---


def test_a_comparison_tells_how_robust_it_is(compared: Comparison) -> None:
    document = json.loads(json.dumps(compared.to_dict(), allow_nan=False))
    assert list(document) == ["baseline", "rows", "robustness"]
    found = document["robustness"]
    assert found["points"] + found["impossible_points"] == 6
    shipped = shipped_parameters()
    for parameter in found["parameters"]:
        entry = shipped[parameter["name"]]
        assert (entry.status, entry.low, entry.high) == ("assumed", parameter["low"], parameter["high"])
    names = {parameter["name"] for parameter in found["parameters"]}
    assert {"gpu.l40s.forward_mfu", "start.spread"} <= names, "what both policies read"
    assert "gpu.h100.forward_mfu" not in names, "and nothing else"
    for metric in METRICS:
        rows = sorted(document["rows"], key=lambda row: row[metric])
        assert found["by"][metric]["ranking"] == [row["policy"] for row in rows]


def test_the_same_seed_gives_the_same_study(compared: Comparison) -> None:
    again = simrl.compare(small(), ["verl", "rlhfless"], robustness=6)
    assert again.to_dict() == compared.to_dict()


def test_points_at_which_a_policy_does_not_fit_are_counted_apart() -> None:
    # 1 to 6 GB of activations, half a GB of weights; an engine may use a tenth of 48 GB.
    config = small(**{"engine.gpu_memory_utilization": 0.1})
    found = compare(config, ["verl", "rlhfuse"], robustness=8).to_dict()["robustness"]
    assert found["impossible_points"] > 0 < found["points"]
    assert found["points"] + found["impossible_points"] == 8
    assert sum(found["impossible_because"].values()) == found["impossible_points"]


@pytest.mark.parametrize("points", [0, -3])
def test_a_study_has_points(points: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=f"robustness={points} must be at least 1"):
        compare(small(), ["verl"], robustness=points)
    assert main(["compare", "--policies", "verl", "--robustness", str(points)]) == 2
    assert capsys.readouterr().err == f"simrl: robustness={points} must be at least 1 (--robustness)\n"


def test_the_command_prints_it_and_says_at_how_many_points_a_policy_cannot_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sets = [text for value in SMALL for text in ("--set", value)]
    base = ["compare", "--policies", "verl,rlhfuse", "--nodes", "1", "--steps", "2", "--robustness", "4", *sets]
    assert main([*base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["robustness"]
    # 16,384 tokens' logits in a vocabulary of 151,936, beside 3.2 GB of weights and layers on 48.3 GB.
    varied = [shipped_parameters()[parameter["name"]] for parameter in found["parameters"]]
    logits = [parameter.key for parameter in varied].index("learner.logit_bytes_per_value")
    too_large = int((sobol_points(varied, 4, seed=0)[:, logits] * 16_384 * 151_936 > 48.3e9 - 3.2e9).sum())
    assert too_large, "or the text for it is not looked at"
    assert (found["points"], found["impossible_points"]) == (4 - too_large, too_large)
    reason = "learning with qwen2.5-0.5b on 8 GPUs does not fit"
    assert found["impossible_because"] == {reason: too_large}
    assert main(base) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"varied over their ranges at {4 - too_large} points, and {too_large} at which a policy cannot run" in out
    assert "by gpu_s_per_step:" in out
    assert f"cannot run at {too_large} points: {reason}" in out


# --- where the numbers of runs come from ---


def problems(parameter: Parameter) -> list[str]:
    """What a parameter of a run lacks."""
    found = [name for name in ("unit", "source") if not str(getattr(parameter, name)).strip()]
    if parameter.value is None:
        return [*found, "value"]
    if parameter.status not in STATUSES:
        found.append("status")
    number = not isinstance(parameter.value, bool | str)
    if number and parameter.status == "assumed":
        low, high = parameter.low, parameter.high
        if low is None or high is None or not low <= parameter.value <= high:
            found.append(f"range: {low} <= {parameter.value} <= {high}")
    return found


RUNS: Mapping[str, Mapping[str, Any]] = {
    **{f"{preset}, {policy}": {"preset": preset, "policy": policy} for preset in preset_names() for policy in POLICIES},
    "overrides": {
        "policy": "verl",
        "sets": [
            "engine.calibration=1.3", "engine.overhead_s=0.001", "engine.enforce_eager=true",
            "cluster.parameters.gpu.l40s.learn_mfu=0.2", "engine.kv_cache_dtype=fp8", "job.algorithm=ppo",
            "job.learner_offload=true", "billing.price=aws-g6e.48xlarge-spot", "faults.worker_mtbf_s=1e6",
            "faults.spot_mtbf_s=1e6", "faults.slow_node_fraction=0.5", "faults.repair_s=100",
        ],
    },
    "no table": {"policy": "verl", "sets": ["job.model=qwen2.5-1.5b", "engine.tensor_parallel=8"]},
}  # fmt: skip


def test_a_run_without_a_table_is_among_them() -> None:
    config = load_config(steps=1, **RUNS["no table"]).with_values({"job.prompts_per_step": 64})
    assert any("a roofline stands in" in warning for warning in run(config).warnings)


@pytest.mark.parametrize("name", RUNS)
def test_every_parameter_of_a_run_has_value_unit_source_status_and_range(name: str) -> None:
    config = load_config(steps=1, **RUNS[name])
    small_job = {"job.prompts_per_step": 64, "job.dataset_prompts": 64}
    result = run(config.with_values(small_job))
    assert len(result.parameters) > 20
    assert {parameter.key: problems(parameter) for parameter in result.parameters if problems(parameter)} == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"source": " "}, {"unit": ""}, {"status": "guessed"}, {"low": None}, {"low": 3.0}, {"high": 1.0},
        {"value": None},
    ],
)  # fmt: skip
def test_a_parameter_that_lacks_something_is_found(fields: Mapping[str, Any]) -> None:
    good: dict[str, Any] = {
        "key": "a.b", "value": 2.0, "unit": "s", "status": "assumed", "source": "a guess", "low": 1.0, "high": 3.0,
    }  # fmt: skip
    assert problems(Parameter(**good)) == []
    assert problems(Parameter(**{**good, **fields})) != []
