"""Run directories: complete or not there, and good for running the same again."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from simrl.experiments import run as run_module
from simrl.experiments.config import load_config
from simrl.experiments.run import RunDirectoryError, check_directory, run, write_directory, write_run

SMALL = (
    "job.model=qwen2.5-0.5b",
    "job.prompts_per_step=8",
    "job.dataset_prompts=16",
    "job.max_response_tokens=128",
)
FILES = {
    "config.toml", "parameters.csv", "summary.json", "samples.parquet", "phases.parquet", "workers.parquet",
    "decisions.parquet",
}  # fmt: skip

# Tells in a file that it was asked, then goes on for ever.
ENDLESS = """
from pathlib import Path
from simrl import At, Subscribe

class Endless:
    def __init__(self):
        self.time_s = 0.0

    def decide(self, observation):
        Path("asked").touch()
        self.time_s += 1.0
        return [Subscribe(At(self.time_s))] if self.time_s % 2 else [Subscribe(At(self.time_s)), *self.nothing()]

    def nothing(self):
        from simrl import Start
        return [Start(f"f{self.time_s}", 1, ("prepare",), 0)]
"""


@pytest.fixture(scope="module")
def result():
    return run(load_config(nodes=1, steps=3, seed=5, sets=SMALL))


def start(arguments, directory):
    command = [sys.executable, "-m", "simrl", *arguments]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def without_wall(summary):
    return {key: value for key, value in summary.items() if "wall" not in key}


def test_a_run_directory_has_all_files(result, tmp_path):
    write_run(result, tmp_path / "deep" / "run")
    assert {path.name for path in (tmp_path / "deep" / "run").iterdir()} == FILES
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run"]


def test_frames_and_summary_come_back(result, tmp_path):
    write_run(result, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result.summary
    for name, frame in result.frames.by_name().items():
        back = pd.read_parquet(tmp_path / "run" / f"{name}.parquet")
        assert list(back.columns) == list(frame.columns)
        assert len(back) == len(frame)


def test_parameters_come_with_unit_source_and_status(result, tmp_path):
    write_run(result, tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run" / "parameters.csv").read_text(encoding="utf-8").splitlines()))
    assert list(rows[0]) == ["name", "value", "unit", "source", "status", "low", "high"]
    names = {row["name"] for row in rows}
    assert {"workload.mu", "workload.cap_mass", "workload.prompt_tokens", "gpu.l40s.learn_mfu"} <= names
    assert any(name.startswith("iteration_times.qwen2.5-0.5b.l40s.tp2") for name in names)
    assert any(name.startswith("price.aws-g6e") for name in names)
    for row in rows:
        assert row["unit"], row
        assert row["source"], row
        assert row["status"] in ("measured", "derived", "assumed")
        assert (row["status"] != "assumed") or (row["low"] and row["high"]), row


def test_config_toml_gives_the_same_run(result, tmp_path):
    write_run(result, tmp_path / "run")
    again = run(load_config(config=tmp_path / "run" / "config.toml"))
    assert without_wall(again.summary) == without_wall(result.summary)


def test_an_empty_directory_is_filled(result, tmp_path):
    (tmp_path / "run").mkdir()
    write_run(result, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_the_working_directory_is_not_replaced_under_its_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunDirectoryError, match="is the working directory"):
        check_directory(Path())


def test_mount_points_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(RunDirectoryError, match="is a mount point: name a directory in it"):
        check_directory(tmp_path)


def test_nothing_is_overwritten(result, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    with pytest.raises(RunDirectoryError, match="exists and is not empty"):
        write_run(result, tmp_path / "run")
    assert (tmp_path / "run" / "mine").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="exists and is not a directory"):
        check_directory(tmp_path / "file")


def test_unwritable_places_are_refused_before_the_run(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "run", Path("/proc/simrl-run"), tmp_path / "file" / "a" / "b"):
        with pytest.raises(RunDirectoryError, match=r"cannot be written: .* \(--output\)"):
            check_directory(place)


def test_checking_leaves_no_trace(tmp_path):
    check_directory(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(result, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(run_module, "write_parameters", fail)
    with pytest.raises((KeyboardInterrupt, RuntimeError, RunDirectoryError)):
        write_run(result, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_only_a_hidden_directory(tmp_path):
    code = (
        "import os, pathlib; from simrl.experiments.run import write_directory\n"
        "def write(place):\n"
        "    (place / 'summary.json').write_text('{}'); os.kill(os.getpid(), 9)\n"
        "write_directory(pathlib.Path('run'), write)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == -signal.SIGKILL
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]


def test_the_directory_appears_when_it_is_complete(tmp_path):
    seen = []

    def write(place):
        (place / "a").write_text("x")
        seen.extend(path.name for path in tmp_path.iterdir())

    write_directory(tmp_path / "run", write)
    assert len(seen) == 1
    assert seen[0].startswith(".run.")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_ctrl_c_leaves_nothing(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    arguments = ["run", "--policy", "endless:Endless", "--nodes", "1", "--output", "out"]
    process = start(arguments, tmp_path)
    until = time.monotonic() + 30
    while not (tmp_path / "asked").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert stderr.strip() == "simrl: interrupted"
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"endless.py", "asked"}
