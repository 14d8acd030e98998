"""`simrl validate --trace`: known constants are found again, drift is refused, nothing later is looked at."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from simrl.cli import main
from simrl.experiments.config import load_config
from simrl.experiments.trace_check import _drawn, check_trace, fit
from simrl.simulator.costs import Costs, NodeType
from simrl.simulator.learning import Scorer
from simrl.traces.job import Engine, Job
from simrl.traces.parameters import Parameters
from simrl.traces.trace import Provenance, Row, TraceError, TraceWriter, checked

RESPONSES, PROMPT, STEPS = 128, 60, 40
SETS = [
    "job.model=qwen2.5-0.5b", f"job.prompts_per_step={RESPONSES}", "job.responses_per_prompt=1",
    f"job.mini_batch_prompts={RESPONSES}", "cluster.nodes=1", "engine.tensor_parallel=8",
]  # fmt: skip
FLAGS = [word for assignment in SETS for word in ("--set", assignment)]
LENGTHS = [int(tokens) for tokens in np.random.default_rng(3).integers(300, 2000, STEPS)]


def costs() -> Costs:
    """Of one engine of eight L40S, without host time and calibration."""
    job = Job(
        model="qwen2.5-0.5b",
        prompts_per_step=RESPONSES,
        responses_per_prompt=1,
        mini_batch_prompts=RESPONSES,
    )
    parameters = Parameters()
    node = NodeType.load("g6e.48xlarge", parameters)
    return Costs(job, Engine(tensor_parallel=8, calibration=1.0), node, 1, parameters)


def rows(lengths: Sequence[int] = LENGTHS) -> list[Row]:
    return copy.deepcopy(made_rows(tuple(lengths)))


@functools.cache
def made_rows(lengths: Sequence[int]) -> list[Row]:
    """Steps of equally long responses, made of the simulator's formulas and constants of our own.

    The engine: 1.5 times the kernels, 4 ms of host time an iteration. Log-probs: 3 times a pass. Update: twice as long
    as simulated, and 7 s. Rewards and the like: 2 s. Every fifth step tests for 50 s.
    """
    model = costs()
    times, actor = model.times(8), Scorer(model.model, True, True)
    found = []
    for number, length in enumerate(lengths):
        contexts = range(PROMPT, PROMPT + length - 1)  # the prefill, of all prompts at once, gives the first token
        prefill_s = times.prefill_s(RESPONSES * PROMPT, PROMPT / 2)
        kernels_s = prefill_s + sum(times.decode_s(RESPONSES, context + 1) for context in contexts)
        tokens = np.full(RESPONSES, float(PROMPT + length))
        stages = {
            "generation_s": 1.5 * kernels_s + 0.004 * length,
            "old_log_prob_s": 1.0 * model.learning.score_s(actor, tokens, 8),
            "ref_log_prob_s": 2.0 * model.learning.score_s(actor, tokens, 8),
            "update_actor_s": 2.0 * model.learning.learn_s([PROMPT + length] * RESPONSES, 8, 1) + 7.0,
        }
        testing_s = 50.0 if number % 5 == 0 else 0.0
        found.append({
            "kind": "step", "step": number, "responses": RESPONSES, "gpus": 8, "prompt_tokens_mean": float(PROMPT),
            "response_tokens_mean": float(length), "response_tokens_max": float(length),
            "step_s": sum(stages.values()) + 2.0 + testing_s, "testing_s": testing_s, **stages,
        })  # fmt: skip
    return found


def write(path: Path, found: Sequence[Row]) -> Path:
    with TraceWriter(path) as writer:
        for row in found:
            writer.add(checked(row))
        writer.finish(Provenance("test", ["run.log"], "2026-01-02", "0"))
    return path


def check(tmp_path: Path, found: Sequence[Row]) -> dict[str, Any]:
    return check_trace(write(tmp_path / "t.parquet", found), load_config(sets=SETS))


def constants(figures: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["stage"], row["name"]): row["value"] for row in figures["constants"]}


def test_known_constants_are_recovered(tmp_path: Path) -> None:
    figures = check(tmp_path, rows())
    assert constants(figures) == pytest.approx({
        ("generation", "calibration"): 1.5, ("generation", "host_s"): 0.004, ("log_probs", "scale"): 3.0,
        ("update", "scale"): 2.0, ("update", "overhead_s"): 7.0, ("step", "rest_s"): 2.0,
    }, rel=1e-5)  # fmt: skip
    assert {row["steps"] for row in figures["constants"]} == {4}
    assert figures["notes"] == ["log_probs: scale 3 is far from 1: the run differs from the setting"]
    assert (figures["steps"], figures["fitted_steps"], figures["advice"]) == (40, 4, True)
    for found in figures["stages"].values():
        assert found["steps"] == 36
        assert found["simrl"]["median_abs_error"] < 1e-5 < found["null"]["median_abs_error"]
        assert found["simrl"]["rank_correlation"] == pytest.approx(1.0, abs=1e-3)


def test_nothing_later_than_the_fit_is_looked_at(tmp_path: Path) -> None:
    """Other times later, or other lengths, change neither the constants nor what is said of the steps between."""
    before = check(tmp_path, rows())
    changed = rows([*LENGTHS[:20], *reversed(LENGTHS[20:])])
    for row in changed[4:]:
        row.update(generation_s=9 * row["generation_s"], update_actor_s=row["update_actor_s"] / 5, old_log_prob_s=1.0)
    after = check(tmp_path, changed)
    assert constants(after) == constants(before)
    for name in ("simrl_s", "null_s"):
        said = [
            {(row["step"], row["stage"]): row[name] for row in figures["rows"] if row["step"] < 20}
            for figures in (before, after)
        ]
        assert len(said[0]) == 16 * 4
        assert said[0] == said[1]


def test_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    """Recomputed from the trace alone: both null models, medians, ranks, thirds."""
    noise = np.random.default_rng(5).lognormal(0, 0.3, STEPS)
    made = [{**row, "generation_s": row["generation_s"] * factor} for row, factor in zip(rows(), noise, strict=True)]
    figures = check(tmp_path, made)
    table = pd.DataFrame(row for row in figures["rows"] if row["stage"] == "generation").set_index("step")
    tokens, real = RESPONSES * (np.array(LENGTHS) + PROMPT), np.array([row["generation_s"] for row in made])
    assert table["real_s"].to_numpy() == pytest.approx(real[4:])
    assert table["null_s"].to_numpy() == pytest.approx(real[3] / tokens[3] * tokens[4:])
    assert table["null_previous_s"].to_numpy() == pytest.approx(real[3:-1] / tokens[3:-1] * tokens[4:])
    found = figures["stages"]["generation"]
    for name in ("simrl", "null", "null_previous"):
        error = (table[f"{name}_s"] / table["real_s"] - 1).abs()
        ranks = table["real_s"].rank().corr(table[f"{name}_s"].rank())
        assert found[name] == pytest.approx({"median_abs_error": error.median(), "rank_correlation": ranks})
    errors = table["simrl_s"] / table["real_s"] - 1
    parts = [errors.loc[4:15], errors.loc[16:27], errors.loc[28:]]
    assert [third["median_error"] for third in found["thirds"]] == pytest.approx([part.median() for part in parts])


def test_lengths_are_drawn_to_the_logged_statistics() -> None:
    """Whole groups of four, mean and longest as logged, in an order that tells nothing."""
    row = {"responses": 96, "prompt_tokens_mean": 60.4, "response_tokens_mean": 250.0, "response_tokens_max": 900.0}
    work = _drawn(7, row, load_config(sets=["job.responses_per_prompt=4"]))
    assert list(work.groups) == [number // 4 for number in range(96)]
    assert set(work.prompt_tokens) == {60}
    assert max(work.response_tokens) == 900
    assert np.mean(work.response_tokens) == pytest.approx(250.0, abs=0.5)  # each is rounded to a whole token
    assert abs(spearmanr(range(96), work.response_tokens).statistic) < 0.3


def test_drift_is_refused(tmp_path: Path) -> None:
    """From the middle of the run on generation takes twice as long: half of what it takes is not said, 50 %."""
    made = rows()
    for row in made[16:]:
        row.update(generation_s=2 * row["generation_s"], step_s=row["step_s"] + row["generation_s"])
    figures = check(tmp_path, made)
    found = figures["stages"]["generation"]
    assert not figures["advice"]
    assert figures["reasons"][0] == "generation: median error 50.0% is above 20%"
    assert [third["median_error"] for third in found["thirds"]] == pytest.approx([0, -0.5, -0.5], abs=1e-4)
    assert figures["stages"]["update"]["refusals"] == []


def test_worse_than_the_null_is_refused(tmp_path: Path) -> None:
    """A generation of just so many seconds a token: the null is exact, simrl is not."""
    made = [{**row, "generation_s": 0.02 * (PROMPT + row["response_tokens_mean"])} for row in rows()]
    refusals = check(tmp_path, made)["stages"]["generation"]["refusals"]
    assert len(refusals) == 1
    assert refusals[0].endswith("is above the null's 0.0%")


def test_no_rank_correlation_is_refused(tmp_path: Path) -> None:
    """A third of the responses' tokens: the longer a response, the quicker its update."""
    made = [{**row, "update_actor_s": 9.0 - row["response_tokens_mean"] / 3000} for row in rows()]
    refusals = check(tmp_path, made)["stages"]["update"]["refusals"]
    assert refusals
    assert refusals[-1].endswith("is not positive")


def test_missing_stages_are_left_out(tmp_path: Path) -> None:
    """A part that is missing takes its stage out of a step, and nothing else: steps have times of their own."""
    made = rows()
    del made[1]["ref_log_prob_s"], made[20]["ref_log_prob_s"], made[30]["generation_s"], made[31]["step_s"]
    for row in made[:10]:
        row["values_s"] = 1.0 if row["step"] in (0, 2) else None
    figures = check(tmp_path, made)
    stages = figures["stages"]
    assert {name: found["steps"] for name, found in stages.items()} == {
        "generation": 35, "log_probs": 35, "update": 36, "step": 35,
    }  # fmt: skip
    assert figures["notes"][0] == "values: times in too few steps to fit and check"
    assert [row["steps"] for row in figures["constants"] if row["stage"] == "log_probs"] == [3]
    assert max(found["simrl"]["median_abs_error"] for found in stages.values()) < 1e-5


def test_short_runs_and_unlogged_lengths_are_told(tmp_path: Path) -> None:
    made = rows()[:8]
    for row in made:
        del row["prompt_tokens_mean"], row["gpus"]
    made[7]["response_tokens_max"] = None
    figures = check(tmp_path, made)
    assert (figures["steps"], figures["fitted_steps"], figures["setting"]["gpus"]) == (8, 3, 8)
    assert figures["notes"][:3] == [
        "prompt_tokens_mean is not logged in 8 steps, taken to be 100 tokens",
        "response_tokens_max is not logged in 1 steps, taken to be 2048 tokens, job.max_response_tokens",
        "constants come from 3 steps, more than a tenth of 8",
    ]


def test_an_overhead_needs_to_predict() -> None:
    """Seconds twice a part: one wild step changes nothing, and no overhead is made up for it."""
    part = pd.Series([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    parts = pd.DataFrame({"scale": part, "overhead_s": 1.0})
    real_s = 2 * part
    real_s[3] = 40.0
    assert fit(parts, real_s) == pytest.approx({"scale": 2.0})
    assert fit(parts, 2 * part + 3) == pytest.approx({"scale": 2.0, "overhead_s": 3.0})
    # Here an overhead comes nearer to these five steps (10.4 % against 12.6 %), but not to each of them from the others
    # (17.3 % against 14.7 %): errors by hand with a table of all lines through two points.
    parts = pd.DataFrame({"scale": [1.8, 2.4, 1.6, 1.2, 2.9], "overhead_s": 1.0})
    assert list(fit(parts, pd.Series([4.1, 4.5, 3.5, 3.1, 8.9]))) == ["scale"]


def test_a_simulated_run_gives_its_own_constants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: run, import, validate. Lengths come response by response; engines are 1.4 times the table."""
    sets = [
        "job.model=qwen2.5-0.5b", "job.prompts_per_step=32", "job.dataset_prompts=64", "job.mini_batch_prompts=8",
        "cluster.nodes=1",
    ]  # fmt: skip
    flags = [word for assignment in sets for word in ("--set", assignment)]
    run, trace = tmp_path / "run", tmp_path / "t.parquet"
    assert main(["run", "--steps", "12", *flags, "--set", "engine.calibration=1.4", "--output", str(run)]) == 0
    assert main(["trace", "import", str(run), "-o", str(trace)]) == 0
    capsys.readouterr()
    assert main(["validate", "--trace", str(trace), *flags[:2], *flags[6:], "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    found = constants(figures)
    assert found["generation", "calibration"] == pytest.approx(1.4, rel=1e-6)
    assert found["update", "scale"] == pytest.approx(1.0, rel=1e-6)
    assert max(figures["stages"][stage]["simrl"]["median_abs_error"] for stage in ("generation", "update")) < 1e-6
    assert figures["advice"]
    assert main(["validate", "--trace", str(trace), *flags[:2], *flags[6:]]) == 0
    assert "advice: the constants predict this run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "flags", "said"),
    [
        (5, [], "5 steps have both stage times and response lengths, at least 6 must"),
        (8, ["--set", "engine.tensor_parallel=4", "--records", "r.csv"], "--records and --trace exclude each other"),
        (8, ["--preset", "nothing"], "preset='nothing'"),
        (8, ["--set", "cluster.nodes=0"], "cluster.nodes=0"),
        (8, ["--set", "job.model=llama-2-70b", "--set", "engine.gpu_memory_utilization=0.1"], "llama-2-70b"),
        (None, [], "does not exist"),
    ],
)
def test_mistakes_are_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int | None, flags: list[str], said: str
) -> None:
    path = tmp_path / "t.parquet"
    if steps is not None:
        write(path, rows(LENGTHS[:steps]))
    assert main(["validate", "--trace", str(path), *FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_response_that_no_engine_holds_is_told(tmp_path: Path) -> None:
    made = [{**row, "response_tokens_max": 1e9} for row in rows()[:8]]
    with pytest.raises(TraceError, match=r"too small: response .* needs .* KV blocks"):
        check(tmp_path, made)


def test_engines_that_do_not_divide_the_logged_gpus_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "t.parquet", [{**row, "gpus": 12} for row in rows()[:8]])
    assert main(["validate", "--trace", str(path), *FLAGS]) == 2
    assert "engine.tensor_parallel=8 must divide the 12 GPUs of the trace" in capsys.readouterr().err


def test_a_preset_is_for_traces_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--preset", "g6e"]) == 2
    assert "--trace" in capsys.readouterr().err
