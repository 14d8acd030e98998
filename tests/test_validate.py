"""Comparing real with simulated runs, on frames written by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from simrl.cli import main
from simrl.experiments.report import of_validation
from simrl.experiments.validate import Run, compare_runs, stage_seconds, write_validation
from simrl.traces.records import Frames, Recorder


def frames(generation_s: float, learning_s: float, *, gpus: int = 2) -> Frames:
    """Two steps one after the other on one function; a second of waiting between the stages."""
    recorder, now_s = Recorder(), 0.0
    for step in range(2):
        begin_s, middle_s = now_s, now_s + generation_s
        end_s = middle_s + 1 + learning_s
        recorder.phases += [
            (step, 0, "generation", begin_s, middle_s), (step, 0, "learning", middle_s + 1, end_s),
            (step, 0, "step", begin_s, end_s),
        ]  # fmt: skip
        recorder.workers += [
            ("a", 0, gpus, "0,1", "busy", "decode", "generation", begin_s, middle_s),
            ("a", 0, gpus, "0,1", "idle", "decode", "generation", middle_s, middle_s + 1),
            ("b", 0, 1, "", "parked", None, None, begin_s, middle_s),
            ("a", 0, gpus, "0,1", "busy", "learn", "learning", middle_s + 1, end_s),
        ]
        now_s = end_s
    return recorder.frames()


def test_stages_are_timed_by_step_and_leases_clipped_to_it() -> None:
    table = stage_seconds(frames(10, 4)).set_index(["step", "stage"])["seconds"]
    for step in (0, 1):
        assert table[step, "generation"] == 10
        assert table[step, "update"] == 4
        assert table[step, "step"] == 15
        assert table[step, "gpu_s"] == 2 * 15, "two GPUs for all of the step; a parked function holds none"


def test_errors_are_relative_to_the_median_of_the_repeats_and_to_a_slow_machine() -> None:
    runs = [
        Run("p", "simulated", frames(9, 4)),
        Run("p", "real", frames(10, 5), slowness=1.25, repeat=0),
        Run("p", "real", frames(14, 5), slowness=1.25, repeat=1),
    ]
    found = compare_runs(runs)
    row = found.rows[(found.rows["stage"] == "generation") & (found.rows["step"] == 1)].iloc[0]
    assert (row["real_s"], row["simulated_s"]) == (12, 9)
    assert row["relative_error"] == pytest.approx(9 / 12 - 1)
    assert row["relative_error_normalised"] == pytest.approx(9 / (12 / 1.25) - 1)
    assert found.median_abs_error()["generation"] == pytest.approx(0.25)
    assert found.median_abs_error("policy", normalised=True)["p", "generation"] == pytest.approx(1 - 9 / 9.6)
    spread = found.repeat_spread.set_index(["policy", "stage"])["spread"]
    assert spread["p", "generation"] == pytest.approx(4 / 12)
    assert spread["p", "update"] == 0


def test_pairs_are_ranked_by_what_they_take_after_the_first_step() -> None:
    runs = [
        Run("slow", "simulated", frames(10, 1)), Run("slow", "real", frames(20, 1, gpus=1)),
        Run("fast", "simulated", frames(11, 1)), Run("fast", "real", frames(15, 1)),
    ]  # fmt: skip
    step, gpu_s = compare_runs(runs).pairs()
    assert step == {
        "stage": "step", "less": "fast", "more": "slow", "real_ratio": pytest.approx(22 / 17),
        "simulated_ratio": pytest.approx(12 / 13), "agree": False,
    }  # fmt: skip
    assert gpu_s == {
        "stage": "gpu_s", "less": "slow", "more": "fast", "real_ratio": pytest.approx(34 / 22),
        "simulated_ratio": pytest.approx(26 / 24), "agree": True,
    }  # fmt: skip


def test_the_first_step_does_not_rank() -> None:
    def run(kind: Literal["real", "simulated"], policy: str, first_s: float) -> Run:
        recorder = frames(10, 4)
        phases = recorder.phases
        starts = (phases["step"] == 0) & (phases["stage"] == "step")
        return Run(policy, kind, replace(recorder, phases=phases.assign(end_s=phases["end_s"] + first_s * starts)))

    runs = [run(kind, policy, s) for policy, s in (("a", 0), ("b", 50)) for kind in ("real", "simulated")]
    assert [pair["real_ratio"] for pair in compare_runs(runs).pairs()] == pytest.approx([1, 1])


def test_a_validation_is_printed_and_written(tmp_path: Path) -> None:
    runs = [Run("p", "simulated", frames(9, 4)), Run("p", "real", frames(10, 5))]
    found = compare_runs(runs)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(of_validation(found, None))
    text = console.export_text()
    assert "generation" in text
    assert "10.0%" in text  # 9 for 10 seconds
    write_validation(found, tmp_path / "v")
    names = {path.relative_to(tmp_path / "v").as_posix() for path in (tmp_path / "v").rglob("*") if path.is_file()}
    assert {"rows.csv", "validation.json", "timelines.png", "p-real-0/samples.parquet"} <= names
    assert (tmp_path / "v" / "timelines.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "tpu"], "device 'tpu' is unknown; allowed: cpu, cuda (--device)"),
        (["--clock", "slow"], "--clock slow: allowed are virtual, wall"),
        (["--gpus", "0"], "--gpus 0: at least 1"),
        (["--repeats", "0"], "--repeats 0: at least 1"),
        (["--clock", "wall", "--gpus", "5000"], "give fewer, or --clock virtual"),
        (["--model", "no-such"], "model 'no-such' has no config.json"),
        (["--profile", "no-such.json"], "profile 'no-such.json' cannot be read"),
        (["--policy", "no-such"], "no-such"),
        (["--set", "job.stepz=1"], "job.stepz"),
        (["--set", "job.lora_rank=8"], "job.lora_rank=8: real engines do not do that; allowed: 0"),
        (["--set", "faults.worker_mtbf_s=60"], "faults.worker_mtbf_s=60.0: real engines do not do that; allowed: None"),
    ],
)
def test_what_the_user_can_mend_is_told_in_a_line(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", *options]) == 2
    told = capsys.readouterr().err.strip()
    assert words in told
    assert "\n" not in told
