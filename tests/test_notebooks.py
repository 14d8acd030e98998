"""The notebooks run, in a small size, say what they are there to say, and are committed with their outputs."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
REAL = "real_engine"  # in test_real_notebook.py, as engines share the cores
EXECUTE: Callable[..., Any] = runpy.run_path(str(FOLDER / "execute.py"))["execute"]
TRACES = (r"/(work|home|root|tmp|Users)/", r"\d\d:\d\d:\d\d")  # of the machine, and of when it was
LARGEST_BYTES = 400_000

CHECKS = {
    "quick_start": """
for policy, result in results.items():
    bar_s = sum(c.patches[list(results).index(policy)].get_width() for c in bars.containers)
    assert abs(bar_s / result.summary["gpu_s_per_step"] - 1) < 1e-9, policy
assert summaries.loc["responses"].nunique() == 1, "not the same work"
assert summaries.loc["gpu_s_per_step", "rlhfless"] < summaries.loc["gpu_s_per_step", "verl"]
assert not axes[0].patches and all(ax.collections for ax in axes)
""",
    "lambda_tau_sweep": """
assert len(swept.frame) == 3 * 2 * SEEDS and not swept.failures
for map_axes, value in zip(heat_maps, (STEP, COST)):
    shown = map_axes.images[0].get_array()
    assert shown.shape == (3, 2), shown.shape
    one = swept.frame[(swept.frame["policy.lambda"] == 1) & (swept.frame["policy.cut_threshold"] == 0.5)]
    assert abs(shown[2, 0] - one[value].mean()) < 1e-9
means = swept.frame.groupby(list(PARAMS))[[STEP, COST]].mean()
for _, best in front.iterrows():
    assert not ((means[STEP] < best[STEP]) & (means[COST] < best[COST])).any()
assert len(tested) == 3 * 2 - 1
""",
    "write_a_policy": """
verl, own = (next(row for row in compared.rows if row["policy"] == name) for name in policies[:2])
assert own["gpu_s_per_step"] < verl["gpu_s_per_step"] and own["gpu_s_reduction_ci95"][0] > 0
assert own["step_s"] < verl["step_s"]
assert own["response_tokens"] == verl["response_tokens"]
import inspect
body = inspect.getsource(PrepareEarly.decide).splitlines()[2:]
assert len(body) <= 22, len(body)
""",
    "replay_a_verl_log": """
assert figures["steps"] == 211 and figures["gpus"] == [8]
assert abs(stages["share"].sum() - 1) < 1e-9
tokens = [int(result.frames.samples["response_tokens"].sum()) for result in replayed.results]
means = logged.steps["response_tokens_mean"].dropna().iloc[:STEPS]
assert tokens[0] == tokens[1] == sum(round(5120 * mean) for mean in means)
assert len(saved["other draws of the lengths"]) == SEEDS and len(saved["assumed machine"]) == POINTS
assert len(set(saved["assumed machine"])) == POINTS, "nothing was varied"
assert saving(replayed) == saved["other draws of the lengths"][0], "seed 0 once more"
from simrl.experiments.robustness import _at
again = simrl.run(_at(loaded.configs[0], study.varied, study.points[0]), work=loaded.work).summary
assert again["gpu_s_per_step"] == study.values["gpu_s_per_step"][0, 0], "points are not of the trace's work"
assert not check["advice"] and any("generation" in reason for reason in check["reasons"])
""",
}


def outputs_of(notebook: Any) -> Iterator[tuple[str, Any]]:
    """Source and each output of all cells with code."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield from ((cell.source, output) for output in cell.outputs)


def said_on_stderr(notebook: Any) -> list[str]:
    return [output.text for _, output in outputs_of(notebook) if output.get("name") == "stderr"]


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for _, output in outputs_of(notebook))


def cells_that_draw(notebook: Any) -> int:
    return sum("plots.theme()" in cell.source for cell in notebook.cells)


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS if path.stem != REAL])
def test_it_runs_in_the_small_size(name: str) -> None:
    executed = EXECUTE(FOLDER / f"{name}.ipynb", small=True, checks=CHECKS[name])
    assert said_on_stderr(executed) == []
    assert pictures(executed) == cells_that_draw(executed)
    bars = re.findall(r"\[=* *\] (\d+)/(\d+)", str([output for _, output in outputs_of(executed)]))
    assert bars
    assert all(done == total for done, total in bars), bars


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_executed_in_full(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert 'SMALL = os.environ.get("SIMRL_NOTEBOOK_SIZE") == "ci"' in code[0].source
    texts = [str(output) for _, output in outputs_of(notebook)]
    assert [text for text in texts if any(re.search(trace, text) for trace in TRACES)] == []
    assert said_on_stderr(notebook) == []
    assert pictures(notebook) == cells_that_draw(notebook) >= 1
    assert path.stat().st_size < LARGEST_BYTES


def test_their_code_is_formatted_and_annotated() -> None:
    for command in (["format", "--check"], ["check", "--extend-select=ANN"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, FOLDER], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
