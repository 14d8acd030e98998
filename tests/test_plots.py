"""What pictures show, read back from their axes, against hand arithmetic and the run's summary."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from simrl.experiments import plots
from simrl.experiments.config import load_config
from simrl.experiments.run import run
from simrl.experiments.timeline import read_frames
from simrl.traces.records import PHASE_COLUMNS, WORKER_COLUMNS, Frames
from simrl.traces.summary import STAGES

OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}
REAL = read_frames(Path(__file__).parent / "data" / "real_run")
PHASES = (
    (0, 0, "step", 0.0, 10.0), (0, 0, "generation", 1.0, 4.0), (0, 0, "learning", 5.0, 9.0),
    (1, 0, "step", 10.0, 18.0), (1, 0, "generation", 13.0, 15.0), (1, 0, "learning", 15.0, 18.0),
    (2, 0, "step", 18.0, 24.0), (2, 0, "generation", 20.0, 23.0), (2, 0, "learning", 22.5, 24.0),
)  # fmt: skip
WORKERS = (
    ("a", 0, 2, "0,1", "cold", None, None, 0.0, 1.0),
    ("a", 0, 2, "0,1", "busy", "decode", "generation", 1.0, 4.0),
    ("a", 0, 2, "0,1", "idle", "decode", "generation", 4.0, 5.0),
    ("b", 1, 1, "7", "busy", "decode", "generation", 4.0, 13.5),
    ("a", 0, 2, "", "parked", None, None, 5.0, 24.0),
    ("c", 1, 1, "6", "busy", "learn", "learning", 15.0, 18.0),
)  # fmt: skip


def axes() -> Any:
    return Figure().subplots()


def by_hand() -> Frames:
    samples = pd.DataFrame({"step": [0] * 10 + [1] * 10, "finished_s": [*range(10), *[3.0] * 10]})
    return Frames(
        samples=samples,
        phases=pd.DataFrame(PHASES, columns=list(PHASE_COLUMNS)),
        workers=pd.DataFrame(WORKERS, columns=list(WORKER_COLUMNS)),
        decisions=pd.DataFrame(),
    )


def boxes(drawn: Any) -> dict[str, list[tuple[float, ...]]]:
    """Left, right and middle of each span of a timeline, by what it shows."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for spans in drawn.collections:
        corners = [path.vertices for path in spans.get_paths()]
        found[spans.get_label()] = sorted((c[:, 0].min(), c[:, 0].max(), c[:4, 1].mean()) for c in corners)
    return found


def test_a_timeline_by_hand() -> None:
    drawn = plots.gantt(by_hand().workers, axes())
    # Rows: GPUs 0 and 1 of node 0, then 6 and 7 of node 1. Parked functions hold none.
    assert boxes(drawn) == {
        "cold": [(0.0, 1.0, 0.0), (0.0, 1.0, 1.0)],
        "generation": [(1.0, 4.0, 0.0), (1.0, 4.0, 1.0), (4.0, 13.5, 3.0)],
        "idle": [(4.0, 5.0, 0.0), (4.0, 5.0, 1.0)],
        "learning": [(15.0, 18.0, 2.0)],
    }
    ticks = zip(drawn.get_yticks(), (text.get_text() for text in drawn.get_yticklabels()), strict=True)
    assert list(ticks) == [(0, "node 0"), (2, "node 1")]
    assert {spans.get_label(): to_hex(spans.get_facecolor()[0], keep_alpha=True) for spans in drawn.collections} == {
        name: to_hex(plots.COLOURS[name], keep_alpha=True) for name in ("cold", "generation", "idle", "learning")
    }


def test_a_part_of_a_timeline_by_function() -> None:
    drawn = plots.gantt(by_hand().workers, axes(), by="function", start_s=3.0, end_s=13.0)
    assert boxes(drawn) == {"generation": [(0.0, 1.0, 0.0), (1.0, 10.0, 1.0)], "idle": [(1.0, 2.0, 0.0)]}
    assert [text.get_text() for text in drawn.get_yticklabels()] == ["a", "b"]
    assert drawn.get_xlim() == (0, 10)


def test_a_real_runs_timeline_adds_up_to_its_gpu_seconds() -> None:
    seconds: dict[str, float] = defaultdict(float)
    for name, spans in boxes(plots.gantt(REAL.workers, axes())).items():
        seconds[name.replace(" ", "_")] = sum(right - left for left, right, _ in spans)
    steps = (REAL.phases["stage"] == "step").sum()
    assert seconds == pytest.approx({k: v * steps for k, v in plots.gpu_seconds_of(REAL).items()})


def test_timelines_are_vectors_unless_they_are_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_pictures() -> bool:
        file = io.StringIO()
        plots.gantt(REAL.workers, (figure := Figure()).subplots())
        figure.savefig(file, format="svg")
        return "<image" in file.getvalue()

    assert not has_pictures()
    monkeypatch.setattr(plots, "VECTOR_SPANS", 200)
    assert has_pictures()


def test_stages_are_medians_over_steps() -> None:
    """Generation begins 1, 3 and 2 s into a step and lasts 3, 2 and 3 s; learning 5, 5 and 4.5, and 4, 3 and 1.5 s."""
    drawn = plots.stages({"x": by_hand()}, axes())
    bars = {c.get_label(): (c.patches[0].get_x(), c.patches[0].get_width()) for c in drawn.containers}
    assert bars == {"generation": (2.0, 3.0), "learning": (5.0, 3.0)}


def test_gpu_seconds_by_hand() -> None:
    """2 x 1 cold, 2 x 3 + 9.5 generation, 2 x 1 idle and 3 of learning, over three steps."""
    parts = {name: s for name, s in plots.gpu_seconds_of(by_hand()).items() if s}
    assert parts == pytest.approx({"cold": 2 / 3, "generation": 15.5 / 3, "idle": 2 / 3, "learning": 1.0})


@pytest.mark.parametrize("policy", ["verl", "rlhfless"])
def test_bars_add_up_to_the_summary(policy: str) -> None:
    small = ("job.model=qwen2.5-0.5b", "job.prompts_per_step=8", "job.dataset_prompts=8", "job.max_response_tokens=64")
    result = run(load_config(policy=policy, nodes=1, steps=2, sets=small))
    cost_usd = result.summary["cost_usd_per_step"]
    drawn = plots.gpu_seconds({policy: result.frames}, axes(), cost_usd={policy: cost_usd})
    widths = {c.get_label().replace(" ", "_"): c.patches[0].get_width() for c in drawn.containers}
    assert sum(widths.values()) == pytest.approx(result.summary["gpu_s_per_step"])
    assert sum(widths[stage] for stage in STAGES) == pytest.approx(result.summary["gpu_s_by"]["state"]["busy"] / 2)
    (text,) = drawn.texts
    assert text.get_text().split() == [f"{result.summary['gpu_s_per_step']:,.0f}", f"{cost_usd:,.3g}", "USD"]


def test_actors_and_tail_by_hand() -> None:
    """Step 0: a alone, as b begins when a's generation ends; step 1: b, until 13.5; step 2: nobody."""
    (line,) = plots.actors(by_hand(), axes()).lines
    assert line.get_xydata().tolist() == [[0, 1], [1, 1], [2, 0]]
    # Three quarters of 0 .. 9 have finished at 6.75, the last at 9; in step 1 all at once.
    (line,) = plots.tail(by_hand().samples, axes(), share=0.75).lines
    assert line.get_xydata().tolist() == [[0, 2.25], [1, 0]]


def test_lengths_count_every_response() -> None:
    drawn = plots.lengths(REAL.samples, axes())
    assert sum(bar.get_height() for bar in drawn.patches) == len(REAL.samples)
    tokens = REAL.samples["response_tokens"]
    assert [line.get_xdata()[0] for line in drawn.lines] == [tokens.quantile(0.5), tokens.quantile(0.95)]
    assert drawn.get_legend().get_title().get_text() == f"{REAL.samples['truncated'].mean():.1%} truncated"


def test_a_heat_map_has_the_means_over_seeds_where_they_belong() -> None:
    rows = [(0.0, "count", 1.0), (0.0, "count", 3.0), (0.0, "work", 4.0), (0.5, "count", 6.0)]
    drawn = plots.heat_map(pd.DataFrame(rows, columns=["a", "b", "c"]), "a", "b", "c", axes())
    np.testing.assert_array_equal(drawn.images[0].get_array().filled(np.nan), [[2.0, 6.0], [4.0, np.nan]])
    assert [text.get_text() for text in drawn.get_xticklabels()] == ["0", "0.5"]
    assert [text.get_text() for text in drawn.get_yticklabels()] == ["count", "work"]
    assert {text.get_position(): text.get_text() for text in drawn.texts} == {(0, 0): "2", (1, 0): "6", (0, 1): "4"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points: Sequence[tuple[int, int]]) -> None:
    front = plots.pareto_front(pd.DataFrame(points, columns=["x", "y"]), "x", "y")
    unbeaten = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert list(front.itertuples(index=False, name=None)) == sorted(unbeaten)


def test_a_front_is_of_means_over_seeds() -> None:
    rows = [("a", 1, 1.0, 9.0), ("a", 2, 3.0, 5.0), ("b", 1, 4.0, 4.0), ("c", 1, 3.0, 8.0)]
    results = pd.DataFrame(rows, columns=["p", "seed", "step_s.mean", "gpu_s_per_step"])
    front, cells = plots.pareto(results, ["p"], axes()).lines
    assert front.get_xydata().tolist() == [[2.0, 7.0], [4.0, 4.0]]
    assert cells.get_xydata().tolist() == [[2.0, 7.0], [4.0, 4.0], [3.0, 8.0]]


def test_colours_are_okabe_and_itos_and_differ() -> None:
    colours = [plots.COLOURS[stage].lower() for stage in STAGES]
    assert len(set(colours)) == len(STAGES)
    assert {*colours, *(c.lower() for c in (*plots.CYCLE, *plots.DARK_CYCLE))} <= {*OKABE_ITO, "#7f7f7f"}


@pytest.mark.parametrize(("dark", "low", "high"), [(False, 250, 256), (True, 0, 40)])
def test_themes_are_light_and_dark_and_do_not_stay(dark: bool, low: int, high: int) -> None:
    before = dict(mpl.rcParams)
    file = io.BytesIO()
    with plots.theme(dark):
        assert plots.actors(REAL, axes()).lines[0].get_color() == ("#56B4E9" if dark else "#0072B2")
        plots.gantt(REAL.workers, (figure := Figure()).subplots())
        figure.savefig(file, format="png", dpi=30)
    corner = np.asarray(Image.open(file).convert("RGB"))[0, 0]
    assert ((low <= corner) & (corner < high)).all()
    assert dict(mpl.rcParams) == before
