"""Replays: simulated runs come back exactly, statistics of steps are met exactly, what cannot be is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simrl.cli import main
from simrl.experiments.config import Config, ConfigError, config_toml, load_config
from simrl.experiments.replay import Replayed, _fitted, _scaled, load_replay, replay
from simrl.experiments.run import Result, run, write_run
from simrl.traces.importers import import_trace
from simrl.traces.trace import TraceError

SMALL = (
    "job.model=qwen2.5-0.5b", "job.prompts_per_step=8", "job.responses_per_prompt=2", "job.dataset_prompts=20",
    "job.mini_batch_prompts=4", "job.max_response_tokens=256",
)  # fmt: skip
POLICIES = ("verl", "rlhfuse", "rlhfless")


def small(*sets: str, **options: Any) -> Config:
    return load_config(**{"nodes": 1, "steps": 4, "seed": 5, **options, "sets": [*SMALL, *sets]})


def trace_of(result: Result, folder: Path) -> Path:
    write_run(result, folder / "run")
    import_trace([folder / "run"], folder / "t.parquet", imported="2026-01-02")
    return folder / "t.parquet"


def same(before: Result, after: Result) -> None:
    """Every time and every response, to 1e-9."""
    for name in ("phases", "samples"):
        one, other = before.frames.by_name()[name], after.frames.by_name()[name]
        pd.testing.assert_frame_equal(one, other, rtol=0, atol=1e-9)


def log_of(folder: Path, *lines: str) -> Path:
    (folder / "run.log").write_text("".join(f"{line}\n" for line in lines))
    import_trace([folder / "run.log"], folder / "t.parquet", imported="2026-01-02")
    return folder / "t.parquet"


def step_line(step: int, mean: float, longest: float, *, shortest: float = 5, clip: float = 0.0, **more: float) -> str:
    figures = {
        "response_length/mean": mean, "response_length/max": longest, "response_length/min": shortest,
        "response_length/clip_ratio": clip, "prompt_length/mean": 100.0, "prompt_length/max": 150,
        "prompt_length/min": 50, **more,
    }  # fmt: skip
    return f"step:{step} - " + " - ".join(f"{key}:{value}" for key, value in figures.items())


SHAPE = ("job.prompts_per_step=8", "job.responses_per_prompt=4", "job.model=qwen2.5-0.5b")


# --- the round trip ---


@pytest.mark.parametrize(
    ("policy", "preset", "sets"),
    [
        (policy, preset, (f"job.algorithm={algorithm}", f"engine.prefix_caching={caching}"))
        for policy, (preset, algorithm, caching) in product(
            POLICIES,
            [("g6e", "grpo", "true"), ("paper-physical", "ppo", "false"), ("g6e", "ppo", "true"),
             ("paper-physical", "grpo", "false")],
        )
    ],
)  # fmt: skip
def test_a_simulated_run_comes_back_exactly(policy: str, preset: str, sets: tuple[str, ...], tmp_path: Path) -> None:
    before = run(small(*sets, policy=policy, preset=preset))
    found = replay(trace_of(before, tmp_path))  # policy, seed and configuration travel with the trace
    (after,) = found.results
    same(before, after)
    assert config_toml(after.config) == config_toml(before.config)
    logged = found.logged
    assert logged is not None
    for stage in ("generation_s", "preparation_s", "learning_s", "weight_sync_s"):
        assert logged[stage] == pytest.approx(before.summary[stage], abs=1e-9)
    assert logged["step_s"] == pytest.approx(before.summary["step_s"]["mean"], abs=1e-9)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_runs_come_back_exactly(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    policy = data.draw(st.sampled_from([*POLICIES, "oracle"]))
    prompts = data.draw(st.integers(1, 9))
    sets = [
        f"job.prompts_per_step={prompts}", f"job.responses_per_prompt={data.draw(st.integers(1, 3))}",
        f"job.dataset_prompts={data.draw(st.integers(prompts, 3 * prompts))}",
        f"job.max_response_tokens={data.draw(st.integers(16, 300))}",
        f"job.algorithm={data.draw(st.sampled_from(['grpo', 'ppo']))}",
        f"engine.tensor_parallel={data.draw(st.sampled_from([1, 2, 4]))}",
        f"engine.prefix_caching={data.draw(st.sampled_from(['true', 'false']))}",
        f"job.learner_offload={data.draw(st.sampled_from(['true', 'false']))}",
    ]  # fmt: skip
    if policy == "oracle":
        policy, sets = "rlhfless", [*sets, "policy.lengths=oracle"]
    config = small(*sets, policy=policy, steps=data.draw(st.integers(1, 4)), seed=data.draw(st.integers(0, 2**40)))
    before = run(config)
    same(before, replay(trace_of(before, tmp_path_factory.mktemp("t"))).results[0])


def test_without_its_configuration_the_work_is_still_exact(tmp_path: Path) -> None:
    """Prompts, their order, samples, lengths, epochs and caps come from the responses themselves."""
    before = run(small(steps=5))
    write_run(before, tmp_path / "run")
    (tmp_path / "run" / "config.toml").unlink()
    import_trace([tmp_path / "run"], tmp_path / "t.parquet", imported="2026-01-02")
    found = replay(tmp_path / "t.parquet", "rlhfuse", nodes=1, sets=["job.model=qwen2.5-0.5b"]).results[0]
    work = ["step", "epoch", "prompt_id", "sample", "prompt_tokens", "response_tokens", "truncated"]
    pd.testing.assert_frame_equal(before.frames.samples[work], found.frames.samples[work])
    assert found.frames.samples["epoch"].max() == 2  # two steps an epoch
    assert found.config.job.responses_per_prompt == 2
    assert found.config.job.dataset_prompts == before.frames.samples["prompt_id"].nunique()
    assert found.config.job.max_response_tokens == 256  # some were truncated there
    assert before.frames.samples["truncated"].any()


def test_another_policy_leaves_the_runs_own_behind(tmp_path: Path) -> None:
    trace = trace_of(run(small("policy.lambda=0.9", policy="rlhfless")), tmp_path)
    assert load_replay(trace).configs[0].policy_params["lambda"] == 0.9
    assert load_replay(trace, ["verl"]).configs[0].policy == "verl"
    several = load_replay(trace, ["verl", "rlhfless"]).configs
    assert [config.policy_params.get("lambda") for config in several] == [None, 0.9]
    neither = load_replay(trace, ["rlhfuse", "verl"]).configs
    assert [config.policy_params for config in neither] == [{}, {}]


def test_users_override_the_cluster_and_not_the_work(tmp_path: Path) -> None:
    trace = trace_of(run(small()), tmp_path)
    found = load_replay(trace, ["verl"], preset="paper-physical", nodes=3, sets=["engine.tensor_parallel=4"], steps=2)
    (config,) = found.configs
    assert (config.job.model, config.engine.preset, config.engine.tensor_parallel) == (
        "qwen2.5-3b",
        "vllm-0.8-eager",
        4,
    )
    assert (config.cluster.nodes, config.seed, config.preset) == (3, 5, "paper-physical")
    assert (config.job.prompts_per_step, config.job.responses_per_prompt, config.job.max_response_tokens) == (8, 2, 256)
    assert config.job.steps == 2


def test_policies_are_paired_over_steps(tmp_path: Path) -> None:
    found = replay(trace_of(run(small()), tmp_path), "verl", "rlhfless")
    verl, rlhfless = (
        (p["end_s"] - p["start_s"]).to_numpy()
        for p in (result.frames.phases[lambda t: t["stage"] == "step"] for result in found.results)
    )
    rows = found.comparison().rows
    assert [line["policy"] for line in rows] == ["verl", "rlhfless"]
    assert rows[1]["speedup"] == pytest.approx((verl / rlhfless).mean())
    assert rows[1]["later_epochs"]["speedup"] == pytest.approx((verl[2:] / rlhfless[2:]).mean())  # two steps an epoch
    assert len(rows[1]["responses"]) == 4
    for line, result in zip(rows, found.results, strict=True):  # steps follow each other, so no GPU-second is lost
        assert line["gpu_s_per_step"] == pytest.approx(result.summary["gpu_s_per_step"])
    assert found.to_dict()["logged"]["steps"] == 4


# --- statistics of steps ---


def test_statistics_of_every_step_are_met(tmp_path: Path) -> None:
    lines = [step_line(1, 101.3, 400, shortest=7), step_line(2, 203.281, 512, clip=0.094)]
    found = replay(log_of(tmp_path, "step:0 - val/acc:0.1", *lines), "verl", nodes=1, sets=SHAPE)
    assert found.results[0].config.job.max_response_tokens == 512  # where responses were truncated
    assert any("'gsm8k'" in warning for warning in found.warnings)
    samples = found.results[0].frames.samples
    for step, total, longest, shortest, at_cap in ((0, 3242, 400, 7, 0), (1, 6505, 512, 5, 3)):
        # 32 responses: 101.3 x 32 = 3241.6, 203.281 x 32 = 6504.99, 0.094 x 32 = 3.008
        rows = samples[samples["step"] == step]
        assert rows["response_tokens"].sum() == total
        assert (rows["response_tokens"].max(), rows["response_tokens"].min()) == (longest, shortest)
        assert (rows["response_tokens"] == 512).sum() == rows["truncated"].sum() == at_cap
        prompts = rows.groupby("prompt_id")["prompt_tokens"].first()
        assert (len(prompts), prompts.sum(), prompts.max(), prompts.min()) == (8, 800, 150, 50)


def test_the_seed_decides_what_the_log_does_not(tmp_path: Path) -> None:
    trace = log_of(tmp_path, step_line(1, 100.0, 400))

    def lengths(seed: int) -> list[int]:
        found = replay(trace, seed=seed, nodes=1, sets=SHAPE)
        return found.results[0].frames.samples["response_tokens"].tolist()

    assert lengths(1) == lengths(1) != lengths(2)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_fitted_lengths_meet_what_real_lengths_had(data: st.DataObject) -> None:
    """Statistics of any lengths at all can be met, and the order of the shape is kept."""
    cap = data.draw(st.integers(1, 60))
    real = np.array(data.draw(st.lists(st.integers(1, cap), min_size=1, max_size=30)))
    shape = np.array(data.draw(st.lists(st.integers(1, 100), min_size=len(real), max_size=len(real))))
    line = {
        "file": "f", "line": 1, "step": 1, "response_tokens_mean": real.mean(), "response_tokens_max": real.max(),
        "response_tokens_min": data.draw(st.sampled_from([real.min(), math.nan])),
        "truncated_share": data.draw(st.sampled_from([(real == cap).mean(), math.nan])),
    }  # fmt: skip
    found = _fitted(shape, line, "response", cap)
    assert found.sum() == real.sum()
    assert found.max() == real.max()
    assert math.isnan(line["response_tokens_min"]) or found.min() == real.min()
    assert math.isnan(line["truncated_share"]) or (found == cap).sum() == (real == cap).sum()
    assert all(found[i] <= found[j] + 1 for i in range(len(shape)) for j in range(len(shape)) if shape[i] < shape[j])


@pytest.mark.parametrize("high", range(1, 60))
def test_all_lengths_may_be_the_longest(high: int) -> None:
    """Products such as (7 / 83) * 83 need not come out whole."""
    for least in range(1, 101):
        assert _scaled(np.array([least, 100.0]), 2 * high, 1, high).tolist() == [high, high]


def test_lengths_keep_the_workloads_spread() -> None:
    """Where nothing is cut, the fitted lengths are the shape times one factor."""
    shape = np.array([100, 200, 300, 400, 1000])
    line = {
        "file": "f", "line": 1, "step": 1, "response_tokens_mean": 1000.0, "response_tokens_max": 2500,
        "response_tokens_min": math.nan, "truncated_share": 0.0,
    }  # fmt: skip
    assert _fitted(shape, line, "response", 4096).tolist() == [250, 500, 750, 1000, 2500]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (step_line(3, 600, 1000, clip=0.5), r"max 1000 exceeds job.max_response_tokens=512"),
        (step_line(3, 600, 512), r"mean 600 is not between 5 and 512"),
        (step_line(3, 300, 400, clip=0.25), r"8 were truncated, and max 400 is below job.max_response_tokens=512"),
        (step_line(3, 100, 512, clip=0.5), r"mean 100 with 16 of 512 and min 5 must be between 25\d\.\d* and"),
        (step_line(3, 100, 400.5), r"max 400.5 must be a whole number"),
        (step_line(3, 100, 50, shortest=70), r"mean 100 is not between 70 and 50"),
        (step_line(3, 100, 300, **{"prompt_length/mean": 200}), r"prompt lengths cannot be: mean 200 is not between"),
    ],
)
def test_impossible_statistics_are_refused(
    line: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = log_of(tmp_path, step_line(2, 100, 300), line)
    sets = [part for assignment in (*SHAPE, "job.max_response_tokens=512") for part in ("--set", assignment)]
    assert main(["replay", str(trace), *sets, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    with pytest.raises(TraceError, match=reason):
        load_replay(trace, sets=[*SHAPE, "job.max_response_tokens=512"])
    assert "run.log:2, step 3: " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    load_replay(trace, sets=[*SHAPE, "job.max_response_tokens=512"], steps=1)  # the first step is sound


def test_what_a_log_does_not_say_must_be_given(tmp_path: Path) -> None:
    trace = log_of(tmp_path, step_line(1, 100, 300))
    with pytest.raises(ConfigError, match=r"--set job\.prompts_per_step=N --set job\.responses_per_prompt=N"):
        load_replay(trace)
    with pytest.raises(ConfigError, match=r"has: --set job\.responses_per_prompt=N$"):
        load_replay(trace, sets=["job.prompts_per_step=8"])
    # 20 responses of 200 tokens each: verl's throughput tells their number.
    counted = step_line(1, 100, 300, **{"perf/total_num_tokens": 4000})
    trace = log_of(tmp_path, counted)
    with pytest.raises(ConfigError, match=r"has 20 responses a step, and does not say of how many prompts"):
        load_replay(trace)
    with pytest.raises(ConfigError, match=r"job\.responses_per_prompt=3 must divide 20, .* \(--set"):
        load_replay(trace, sets=["job.responses_per_prompt=3"])
    with pytest.raises(ConfigError, match=r"job\.prompts_per_step=7 contradicts .*, where it is 5 \(--set"):
        load_replay(trace, sets=["job.prompts_per_step=7", "job.responses_per_prompt=4"])
    assert load_replay(trace, sets=["job.responses_per_prompt=4"]).configs[0].job.prompts_per_step == 5


def test_steps_without_statistics_are_named(tmp_path: Path) -> None:
    trace = log_of(tmp_path, step_line(1, 100, 300), "step:2 - timing_s/gen:3.0", step_line(3, 100, 300))
    with pytest.raises(TraceError, match=r"run\.log:2, step 2: the log says no response_tokens_mean"):
        load_replay(trace, sets=SHAPE)
    assert load_replay(trace, sets=SHAPE, steps=1).configs[0].job.steps == 1
    with pytest.raises(ConfigError, match=r"steps=4 must be at most 3, the steps of .* \(--steps\)"):
        load_replay(trace, sets=SHAPE, steps=4)


def test_the_last_attempt_of_a_step_counts(tmp_path: Path) -> None:
    first, again = (step_line(2, mean, 300, **{"timing_s/gen": gen}) for mean, gen in ((100, 3.0), (50, 7.0)))
    found = replay(log_of(tmp_path, step_line(1, 100, 300), first, again), nodes=1, sets=SHAPE)
    samples = found.results[0].frames.samples
    assert samples.groupby("step")["response_tokens"].sum().tolist() == [3200, 1600]
    assert found.logged == {
        "steps": 1, "basis": "sum of stages", "gpus": None, "step_s": 7.0, "generation_s": 7.0,
        "preparation_s": None, "learning_s": None, "weight_sync_s": None,
    }  # fmt: skip


# --- single responses ---


def responses_of(folder: Path, *rows: tuple[int, str, int, int | None]) -> Path:
    """A log of a row a response: step, prompt, response tokens, prompt tokens."""
    (folder / "m.toml").write_text(
        'framework = "mine"\nrows = "response"\n[fields]\nstep = "step"\nprompt_id = "prompt"\n'
        'response_tokens = "n"\nprompt_tokens = "p"\n'
    )
    keys = ("step", "prompt", "n", "p")
    lines = [json.dumps({k: v for k, v in zip(keys, row, strict=True) if v is not None}) for row in rows]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    import_trace([folder / "log.jsonl"], folder / "t.parquet", log_format=str(folder / "m.toml"), imported="2026-01-02")
    return folder / "t.parquet"


def test_responses_of_any_log_are_replayed_in_their_order(tmp_path: Path) -> None:
    trace = responses_of(
        tmp_path, (7, "b", 11, 40), (7, "a", 12, 50), (7, "b", 13, 40), (7, "a", 14, 50),
        (9, "a", 21, 50), (9, "a", 22, 50), (9, "c", 23, 60), (9, "c", 24, 60),
    )  # fmt: skip
    found = load_replay(trace, nodes=1, sets=["job.model=qwen2.5-0.5b"])
    first, second = found.work.of_step(0), found.work.of_step(1)
    assert (first.epoch, first.prompt_ids, first.prompt_tokens) == (0, ["b", "a"], [40, 50])
    assert first.response_tokens == [[11, 13], [12, 14]]
    assert (second.epoch, second.prompt_ids) == (1, ["a", "c"])  # the second time for prompt a
    assert second.response_tokens == [[21, 22], [23, 24]]
    assert found.work.oracle.lengths(0, "a") == (21, 22)  # type: ignore[attr-defined]
    assert found.configs[0].job.dataset_prompts == 3
    with pytest.raises(TraceError, match=r"log\.jsonl:8, step 9: a response of 24 tokens exceeds .*_tokens=23$"):
        load_replay(trace, sets=["job.max_response_tokens=23"])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(1, "a", 5, 9), (1, "a", 5, 9), (1, "b", 5, 9)], r"step 1, prompt b has 1 responses of a prompt, others"),
        ([(1, "a", 5, 9), (1, "b", 5, 9), (2, "a", 5, 9)], r"step 2 has 1 prompts, others have 2: steps of unequal"),
        ([(1, "a", 5, 9), (1, "a", 5, 8)], r"step 1, prompt a: its responses disagree on prompt_tokens"),
        ([(1, "a", 5, 9), (1, "a", 5, None)], r"log\.jsonl:2, step 1: the response has no prompt_tokens"),
        ([(1, "a", 0, 9)], r"log\.jsonl:1, step 1: response_tokens=0 must be at least 1"),
    ],
)  # fmt: skip
def test_responses_that_cannot_be_replayed(rows: list[Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=reason):
        load_replay(responses_of(tmp_path, *rows))


def test_missing_prompt_lengths_are_the_workloads(tmp_path: Path) -> None:
    found = load_replay(
        responses_of(tmp_path, (1, "a", 5, None), (1, "a", 6, None), (2, "a", 7, None), (2, "a", 8, None))
    )
    (one,), (other,) = (found.work.of_step(step).prompt_tokens for step in (0, 1))
    assert one == other > 20
    assert any("no prompt lengths" in note for note in found.notes)


# --- real runs, and what is printed ---


def test_a_run_of_a_validation_comes_back_exactly(tmp_path: Path) -> None:
    """`simrl validate` writes what real engines did, with the configuration and profile that they had."""
    from test_profile import PROFILE

    from simrl.experiments.validate import Run, _with_gpus, compare_runs, write_validation

    PROFILE.write(tmp_path / "p.json")
    sets = (
        "engine.tensor_parallel=1", "job.max_prompt_tokens=64", "job.max_response_tokens=64", "job.prompts_per_step=4",
        "job.responses_per_prompt=2", "job.dataset_prompts=8",
    )  # fmt: skip
    config = _with_gpus(load_config(nodes=1, steps=2, sets=[*sets, f"engine.profile={tmp_path / 'p.json'}"]), 2)
    before = run(config)
    runs = [Run("verl", kind, before.frames) for kind in ("real", "simulated")]  # type: ignore[arg-type]
    write_validation(replace(compare_runs(runs), profile=PROFILE, config=config), tmp_path / "v")
    (tmp_path / "p.json").unlink()  # the validation has its own
    import_trace([tmp_path / "v" / "verl-real-0"], tmp_path / "t.parquet", imported="2026-01-02")
    after = replay(tmp_path / "t.parquet").results[0]
    same(before, after)
    assert after.summary["gpus"] == 2


def test_the_command_prints_logged_beside_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(log_of(tmp_path, step_line(1, 100, 300, **{"timing_s/gen": 41.25, "timing_s/step": 60.5})))
    sets = [part for assignment in SHAPE for part in ("--set", assignment)]
    assert main(["replay", trace, "--policy", "verl", "--nodes", "1", *sets, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "41.25" in printed.out
    assert "60.50" in printed.out
    assert "the configured cluster, 1 x g6e.48xlarge, not the trace's" in " ".join(printed.out.split())
    assert "as in workload 'gsm8k'" in printed.err
    assert (tmp_path / "out" / "config.toml").read_text().startswith("# replayed: lengths are those of t.parquet")
    load_config(config=tmp_path / "out" / "config.toml")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["logged"]["generation_s"] == 41.25
    two = ["--policy", "verl", "--policy", "rlhfuse", "--nodes", "1", *sets, "--json"]
    assert main(["replay", trace, *two]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["baseline"], len(found["rows"]), found["logged"]["step_s"]) == ("verl", 2, 60.5)


def test_python_has_it_too() -> None:
    import simrl

    assert simrl.replay is replay
    assert Replayed.__doc__
