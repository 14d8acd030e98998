"""Sweeps: designs by hand, runs against single ones, and what is left when something dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from simrl.cli import main
from simrl.experiments import sweep_engines
from simrl.experiments.compare import compare
from simrl.experiments.config import load_config
from simrl.experiments.run import RunDirectoryError, run
from simrl.experiments.sweep import Axis, design_sweep, key_of, run_sweep, sweep
from simrl.traces.summary import flat

SMALL = (
    "job.model=qwen2.5-0.5b",
    "job.prompts_per_step=16",
    "job.dataset_prompts=32",
    "job.max_response_tokens=256",
)
GRID = {"policy.dispatch": "chunks,least_loaded", "job.responses_per_prompt": "1:3:2"}
FRAGILE = """
import os, signal, time
from pathlib import Path
from typing import Literal
from simrl.policies.verl import Verl

class Fragile(Verl):
    class Params(Verl.Params):
        mode: Literal["works", "raises", "dies", "dies once", "waits"] = "works"
        marker: str = ""

    def decide(self, observation):
        marker = Path(self.params.marker)
        if self.params.mode == "raises":
            raise KeyError("a bug of its own")
        if self.params.mode == "dies" or (self.params.mode == "dies once" and not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while self.params.mode == "waits" and not marker.exists():
            time.sleep(0.01)
        return super().decide(observation)
"""


@pytest.fixture(scope="module")
def small():
    return load_config(nodes=1, steps=2, seed=11, sets=SMALL, policy="verl")


@pytest.fixture(scope="module")
def swept(small, tmp_path_factory):
    return sweep(small, GRID, seeds=2, output=tmp_path_factory.mktemp("sweep") / "out", jobs=2)


@pytest.fixture
def fragile(tmp_path, monkeypatch):
    (tmp_path / "fragile_policy.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "fragile_policy:Fragile"
    sys.modules.pop("fragile_policy", None)


def content(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


# --- designs ---


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:1:0.1", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        ("2:8:2", (2, 4, 6, 8)),
        ("1:0:-0.5", (1.0, 0.5, 0.0)),
        ("count,work", ("count", "work")),
        ("1, 2.5", (1, 2.5)),
        ("true,false", (True, False)),
        ("[1,2],[3]", ([1, 2], [3])),
        ("a.b:C", ("a.b:C",)),
    ],
)
def test_values_of_a_parameter(text, values):
    found = Axis.parse("x", text).values
    assert found == values
    assert list(map(type, found)) == list(map(type, values))


def test_a_grid_has_all_combinations_and_a_list_one_after_the_other(small):
    grid = design_sweep(small, GRID).cells
    assert [tuple(c.values.values()) for c in grid] == [
        ("chunks", 1), ("chunks", 3), ("least_loaded", 1), ("least_loaded", 3),
    ]  # fmt: skip
    assert (grid[3].config.policy_params["dispatch"], grid[3].config.job.responses_per_prompt) == ("least_loaded", 3)
    both = design_sweep(small, GRID, design="list").cells
    assert [tuple(c.values.values()) for c in both] == [("chunks", 1), ("least_loaded", 3)]


@pytest.mark.parametrize("design", ["random", "sobol"])
def test_drawn_cells_fill_their_ranges(small, design):
    params = {"cluster.parameters.gpu.l40s.learn_mfu": "0.1:0.3", "job.responses_per_prompt": "1:4"}
    cells = [list(c.values.values()) for c in design_sweep(small, params, design=design, cells=16).cells]
    mfu, responses = zip(*cells, strict=True)
    assert set(responses) == {1, 2, 3, 4}, "whole numbers, both ends among them"
    assert all(0.1 <= value < 0.3 for value in mfu)
    if design == "sobol":  # 16 points: one in each 16th of every axis
        assert sorted(int((value - 0.1) / 0.2 * 16) for value in mfu) == list(range(16))
    again = design_sweep(small, params, design=design, cells=16)
    assert [list(c.values.values()) for c in again.cells] == cells
    other = design_sweep(small.with_seed(12), params, design=design, cells=16)
    assert [list(c.values.values()) for c in other.cells] != cells


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no parameter to vary"),
        (["--param", "policy.dispach=chunks"], "policy.dispach is unknown; did you mean 'policy.dispatch'? (--param"),
        (
            ["--param", "policy.dispatch=chunks,round"],
            "must be one of 'chunks', 'least_loaded' (--param policy.dispatch",
        ),
        (["--param", "policy.dispatch="], "has no value"),
        (["--param", "policy.dispatch"], "must have the form section.key=values"),
        (["--param", "job.steps=1,2,1"], "1 is there twice"),
        (["--param", "job.steps=1,2", "--param", "job.steps=3"], "job.steps is there twice"),
        (["--param", "job.steps=1:4:2"], "steps of 2 from 1 do not meet 4"),
        (["--param", "job.steps=4:1:1"], "do not lead from 4 to 1"),
        (["--param", "job.steps=1:4"], "a grid needs a step"),
        (["--param", "job.steps=0:4:2"], "job.steps=0 must be a whole number of at least 1"),
        (["--param", "job.steps=1:4", "--design", "sobol"], "cells=None must be from 1"),
        (["--param", "job.steps=4:1", "--design", "random", "--cells", "2"], "4 must be below 1"),
        (["--param", "job.steps=1,2", "--cells", "2"], "goes with --design random or sobol"),
        (["--param", "job.steps=1,2", "--param", "cluster.nodes=1", "--design", "list"], "equally many values"),
        (["--param", "job.steps=1,2", "--design", "cube"], "must be one of grid, list, random, sobol"),
        (["--param", "seed=1,2"], "seeds have an option of their own"),
        (["--param", "job.steps=1,2", "--seeds", "0"], "seeds=0 must be at least 1"),
        (["--param", "job.steps=1:9999999:1"], "more than 1000000"),
        (["--param", "job.steps=1,2", "--engine", "slurm"], "must be one of local, ray"),
        (["--param", "job.steps=1,2", "--ray-address", "x:1"], "goes with --engine ray"),
        (["--param", "job.steps=1,2", "--jobs", "0"], "jobs=0 must be at least 1"),
    ],
)
def test_impossible_sweeps_are_refused_in_one_line(capsys, tmp_path, arguments, message):
    assert main(["sweep", "--output", str(tmp_path / "out"), *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, printed.err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])


# --- runs ---


def test_every_row_is_the_run_of_its_cell(small, swept):
    frame = pd.read_parquet(swept.directory / "results.parquet")
    assert [p.name for p in swept.directory.rglob("*.parquet")] == ["results.parquet"]
    assert list(frame.columns[:4]) == ["policy.dispatch", "job.responses_per_prompt", "seed", "policy"]
    order = [(d, n, s) for d in ("chunks", "least_loaded") for n in (1, 3) for s in (11, 12)]
    assert list(frame.iloc[:, :3].itertuples(index=False, name=None)) == order
    for (dispatch, responses, seed), (_, row) in zip(order, frame.iterrows(), strict=True):
        config = small.with_values({"policy.dispatch": dispatch, "job.responses_per_prompt": responses})
        expected = {k: v for k, v in flat(run(config.with_seed(seed)).summary).items() if v is not None}
        assert {**row[3:].dropna(), "seed": seed} == {k: expected[k] for k in expected if "wall_s" not in k}


def test_cells_are_paired_with_the_base_configuration_by_seed(swept):
    found, frame = swept.statistics, swept.frame
    assert found["reference"] == {"policy.dispatch": "chunks", "job.responses_per_prompt": 1}  # 4 is not in the grid
    table = found["tables"]["all steps"]["cells"]
    assert table[0]["paired"] is None
    own, base = (frame[frame["policy.dispatch"] == d]["gpu_s_per_step"].to_numpy() for d in ("least_loaded", "chunks"))
    assert table[2]["paired"]["gpu_s_per_step"]["difference"] == pytest.approx(np.mean(own[:2] - base[:2]))
    assert table[2]["gpu_s_per_step"]["mean"] == pytest.approx(np.mean(own[:2]))
    assert json.loads((swept.directory / "statistics.json").read_text())["tables"] == found["tables"]


def test_a_cell_that_is_the_base_configuration_is_the_reference(small):
    design = design_sweep(small, {"policy.dispatch": "least_loaded,chunks"})
    assert design.reference == 1


def test_a_comparison_has_the_same_paired_differences(small):
    rows = {row["policy"]: row for row in compare(small, ["verl", "rlhfuse"], seeds=3).rows}
    runs = {p: [run(small.with_policy(p).with_seed(11 + i)).summary for i in range(3)] for p in rows}
    differences = [b["gpu_s_per_step"] - a["gpu_s_per_step"] for a, b in zip(*runs.values(), strict=True)]
    assert rows["verl"]["paired"] is None
    assert rows["rlhfuse"]["paired"]["gpu_s_per_step"]["difference"] == pytest.approx(np.mean(differences))


def test_one_process_gives_the_same_table(small, swept, tmp_path):
    again = sweep(small, GRID, seeds=2, output=tmp_path / "out", jobs=1)
    assert (tmp_path / "out/results.parquet").read_bytes() == (swept.directory / "results.parquet").read_bytes()
    assert again.computed == 8


# --- what is kept ---


def test_nothing_is_run_again(small, swept):
    before = content(swept.directory / "runs")
    again = sweep(small, GRID, seeds=2, output=swept.directory, resume=True)
    assert (again.computed, content(swept.directory / "runs")) == (0, before)
    assert again.frame.equals(swept.frame)


def test_other_sweeps_take_what_they_share(small, swept, tmp_path):
    more = sweep(small, GRID, seeds=3, output=tmp_path / "more", cache=swept.directory / "runs")
    assert more.computed == 4
    assert more.frame[more.frame["seed"] < 13].reset_index(drop=True).equals(swept.frame)


def test_what_decides_a_run_is_in_its_key(small, tmp_path, monkeypatch):
    profile = tmp_path / "nodes.toml"
    profile.write_text("")
    named = small.model_copy(update={"cluster": small.cluster.model_copy(update={"hardware": str(profile)})})
    keys = {key_of(small), key_of(small.with_seed(12)), key_of(small.with_values({"job.steps": 3})), key_of(named)}
    monkeypatch.setattr("simrl.experiments.sweep.code_version", lambda: "another")
    assert len(keys | {key_of(small)}) == 5


def test_the_version_changes_with_any_source(tmp_path, monkeypatch):
    for folder in sweep_engines.SOURCES:
        (tmp_path / folder).mkdir()
    (tmp_path / "traces/data.csv").write_text("1")
    monkeypatch.setattr("simrl.__path__", [str(tmp_path)])
    version = sweep_engines.code_version.__wrapped__
    before = version()
    assert version() == before
    (tmp_path / "traces/data.csv").write_text("2")
    assert version() != before


@pytest.mark.parametrize("there", ["another sweep", "no sweep"])
def test_directories_of_others_are_left_alone(small, swept, tmp_path, capsys, there):
    directory = swept.directory if there == "another sweep" else tmp_path
    (tmp_path / "mine.txt").write_text("mine")
    before = content(directory)
    params = ["--param", "job.responses_per_prompt=1,2", "--output", str(directory)]
    assert main(["sweep", "--resume", *params]) == 2
    assert ("is of another sweep" if there == "another sweep" else "is not the directory of a sweep") in (
        capsys.readouterr().err
    )
    assert main(["sweep", *params]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert content(directory) == before


def test_a_full_disk_leaves_what_was_complete(small, tmp_path, monkeypatch):
    def full(frame, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    directory = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(pd.DataFrame, "to_parquet", full)
        with pytest.raises(RunDirectoryError, match=r"results\.parquet' cannot be written: No space left"):
            sweep(small, {"policy.dispatch": "chunks"}, output=directory, jobs=1)
    assert not [p for p in directory.iterdir() if p.name.startswith((".", "results"))]
    again = sweep(small, {"policy.dispatch": "chunks"}, output=directory, resume=True, jobs=1)
    assert (again.computed, len(again.frame)) == (0, 1)


def children_of(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_a_killed_sweep_goes_on_where_it_was(fragile, tmp_path):
    sets = [f"--set={one}" for one in (*SMALL, f"policy.marker={tmp_path}/go")]
    command = ["sweep", "--policy", fragile, "--nodes=1", "--steps=2", "--seeds=2", "--jobs=2", *sets, "--json"]
    command += ["--param=policy.mode=works,waits", "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen(
        [sys.executable, "-m", "simrl", *command, str(killed)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        wait_until(lambda: len(list(killed.glob("runs/*.json"))) == 2)  # both that work; both others wait
        workers = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    (killed / ".results.parquet.1.tmp").write_bytes(b"half")
    done = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*.json")}
    (tmp_path / "go").touch()
    assert main([*command, str(killed), "--resume"]) == 0
    assert len(list(killed.glob("runs/*.json"))) == 4
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished runs are not done again"
    assert main([*command, str(whole)]) == 0
    both = [{name: text for name, text in content(d).items() if "runs/" not in name} for d in (killed, whole)]
    assert both[0] == both[1]


# --- failures ---


def test_a_failing_cell_is_reported_and_the_others_finish(fragile, capsys):
    options = ["--policy", fragile, "--nodes", "1", "--steps", "2", *[f"--set={one}" for one in SMALL]]
    code = main(["sweep", *options, "--param", "policy.mode=raises,works,dies", "--output", "out", "--jobs", "2"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert code == 1
    assert lines == [
        "simrl: policy.mode=raises with seed 0 failed: KeyError: 'a bug of its own'",
        "simrl: policy.mode=dies with seed 0 failed: its process died 3 times",
    ]
    assert pd.read_parquet("out/results.parquet")["policy.mode"].tolist() == ["works"]
    failures = json.loads(Path("out/failures.json").read_text())
    assert [failure["values"]["policy.mode"] for failure in failures] == ["raises", "dies"]
    assert "fragile_policy.py" in failures[0]["traceback"]


def test_a_process_that_dies_costs_only_time(fragile, small, tmp_path):
    config = load_config(nodes=1, steps=2, sets=[*SMALL, f"policy.marker={tmp_path}/died"], policy=fragile)
    design = design_sweep(config, {"policy.mode": ["works", "dies once"]}, seeds=2)
    frame = run_sweep(design, jobs=2).frame
    assert (tmp_path / "died").exists()
    assert frame.drop(columns="policy.mode")[:2].equals(frame.drop(columns="policy.mode")[2:].reset_index(drop=True))
