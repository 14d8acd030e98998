"""`simrl report`: the page's figures and tables against the frames and summaries they come from, and its safety."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.cli import main
from simrl.experiments import html_figures
from simrl.experiments.config import load_config
from simrl.experiments.html_report import html_of, read_report
from simrl.experiments.plots import COLOURS, gpu_seconds_of
from simrl.experiments.run import Result, run, write_run
from simrl.experiments.statistics import interval95
from simrl.experiments.timeline import read_frames
from simrl.traces.records import PHASE_COLUMNS, WORKER_COLUMNS, Frames

REAL = Path(__file__).parent / "data" / "real_run"
SMALL = (
    "job.model=qwen2.5-0.5b", "job.prompts_per_step=16", "job.dataset_prompts=16", "job.max_response_tokens=128",
    "engine.tensor_parallel=2",
)  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert('&lt;b&gt;')</script>"
POLICIES = ("verl", "rlhfuse", "rlhfless")
EXPLAINED = '[{"policy": "a", "baseline": "b", "by_mechanism": {}, "by_stage": %s, "by_state": {}}]'
WORKERS = (
    ("a", 0, 2, "0,1", "cold", None, None, 0.0, 1.0),
    ("a", 0, 2, "0,1", "busy", "decode", "generation", 1.0, 3.0),
    ("a", 0, 2, "0,1", "busy", "decode", "generation", 3.0, 4.0),
    ("a", 0, 2, "0,1", "idle", "decode", "generation", 4.0, 5.0),
    ("b", 1, 1, "7", "busy", "decode", "generation", 4.0, 13.5),
    ("a", 0, 2, "", "parked", None, None, 5.0, 24.0),
    ("c", 1, 2, "4,6", "busy", "learn", "learning", 15.0, 18.0),
    ("b", 1, 1, "7", "busy", "learn", "learning", 15.0, 18.0),
    ("d", 1, 1, "5", "cold", None, None, 20.0, 21.0),
    ("a", 0, 2, "0,1", "busy", "learn", "learning", 15.0, 18.5),
)  # fmt: skip


class Page(HTMLParser):
    """Elements, texts, tables and figures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.figures: dict[str, Any] = {}
        self.inside = ""
        self.rows: list[list[str]] = []
        self.folded = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = "figures" if ("id", "figures") in attrs else tag
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.rows = []
            if self.folded:
                self.tables[self.folded], self.folded = self.rows, ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "figures":
            self.figures = json.loads(data)
        elif self.inside not in ("script", "style"):
            self.texts.append(data)
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.inside == "caption":
            self.tables[data] = self.rows
        elif self.inside == "summary":
            self.folded = data

    def figure(self, name: str) -> dict[str, dict[str, Any]]:
        """Columns of each renderer of the figure of that name."""
        (found,) = (r["attributes"] for r in self.figures["document"]["roots"] if r["attributes"].get("name") == name)
        drawn = {}
        for renderer in found["renderers"]:
            entries = renderer["attributes"]["data_source"]["attributes"]["data"]["entries"]
            drawn[renderer["attributes"].get("name", "")] = {key: decoded(value) for key, value in entries}
        return drawn


def decoded(column: Any) -> Any:
    if isinstance(column, dict) and column["type"] == "ndarray":
        return np.frombuffer(gzip.decompress(base64.b64decode(column["array"]["data"])), dtype=column["dtype"])
    return column


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, int], Result]:
    return {
        (policy, seed): run(load_config(policy=policy, nodes=2, steps=2, seed=seed, sets=SMALL))
        for policy in POLICIES
        for seed in (3, 4)
    }


@pytest.fixture(scope="module")
def folder(results: dict[tuple[str, int], Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for (policy, seed), result in results.items():
        write_run(result, folder / f"{policy}-{seed}")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(html_of(read_report(sorted(folder.iterdir()))))


def by_hand() -> pd.DataFrame:
    return pd.DataFrame(WORKERS, columns=list(WORKER_COLUMNS))


# --- what is drawn ---


def test_spans_by_hand() -> None:
    """Rows: GPUs 0 and 1 of node 0, then 4 to 7 of node 1. Learning ends at once on 4, 6 and 7, later on 0 and 1."""
    spans = html_figures.spans_of(by_hand())
    columns = ["kind", "who", "where", "left", "right", "bottom", "top"]
    assert sorted(spans[columns].itertuples(index=False, name=None)) == [
        ("cold", "a", "node 0, GPU 0,1", 0.0, 1.0, 0, 2),
        ("cold", "d", "node 1, GPU 5", 20.0, 21.0, 3, 4),
        ("generation", "a", "node 0, GPU 0,1", 1.0, 4.0, 0, 2),
        ("generation", "b", "node 1, GPU 7", 4.0, 13.5, 5, 6),
        ("idle", "a", "node 0, GPU 0,1", 4.0, 5.0, 0, 2),
        ("learning", "2 functions, c to b", "node 1, 2 GPUs", 15.0, 18.0, 4, 6),
        ("learning", "a", "node 0, GPU 0,1", 15.0, 18.5, 0, 2),
        ("learning", "c", "node 1, GPU 4,6", 15.0, 18.0, 2, 3),
    ]


INTERVALS = st.lists(st.tuples(st.sampled_from(["busy", "idle", "cold"]), st.integers(0, 3)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(INTERVALS, min_size=1, max_size=6), st.integers(1, 3))
def test_spans_paint_what_the_intervals_do(lanes: list[list[tuple[str, int]]], gpus: int) -> None:
    """Each lane is a function's life on its own GPUs; painted second by second from frames and from spans."""
    rows, wanted = [], {}
    for lane, states in enumerate(lanes):
        ids = [str(lane % 2 + 2 * i) for i in range(gpus)]  # two functions of a node take every second GPU
        now = 0
        for state, seconds in states:
            stage = "learning" if state == "busy" else None
            if seconds:
                rows.append(
                    (f"f{lane}", lane // 2, gpus, ",".join(ids), state, None, stage, float(now), float(now + seconds))
                )
            for gpu in ids:
                wanted |= {(lane // 2, int(gpu), now + i): "learning" if stage else state for i in range(seconds)}
            now += seconds
    workers = pd.DataFrame(rows, columns=list(WORKER_COLUMNS))
    painted = {}
    row_to_gpu = sorted({(node, gpu) for node, gpu, _ in wanted})
    for span in html_figures.spans_of(workers).itertuples() if rows else ():
        for row in range(span.bottom, span.top):
            for second in range(int(span.left), int(span.right)):
                assert (*row_to_gpu[row], second) not in painted
                painted[(*row_to_gpu[row], second)] = span.kind
    assert painted == wanted


def test_a_critical_path_by_hand() -> None:
    """Step 0: sync until 2, assigned at 1, generation to 8, all prepared at 9, learning from 10 to 12.

    Step 1, which overlaps nothing: assigned 2 s after its start, without sync; ties go to the first response.
    """
    phases = [
        (0, 0, "step", 0.0, 12.0), (0, 0, "weight_sync", 0.5, 2.5), (0, 0, "generation", 2.0, 8.0),
        (0, 0, "preparation", 5.0, 9.0), (0, 0, "learning", 10.0, 12.0),
        (1, 0, "step", 12.0, 20.0), (1, 0, "generation", 14.0, 17.0), (1, 0, "learning", 17.0, 20.0),
        (2, 0, "step", 20.0, 21.0), (2, 0, "generation", 20.0, 21.0),
    ]  # fmt: skip
    samples = pd.DataFrame(
        [(0, "p", "a", 5, 1.0, 8.0, 8.5), (0, "q", "b", 6, 1.0, 7.0, 9.0),
         (1, "r", "a", 7, 14.0, 17.0, 17.0), (1, "s", "b", 8, 14.0, 17.0, 17.0)],
        columns=["step", "prompt_id", "function", "response_tokens", "assigned_s", "finished_s", "prepared_s"],
    )  # fmt: skip
    frames = Frames(samples, pd.DataFrame(phases, columns=list(PHASE_COLUMNS)), by_hand(), pd.DataFrame())
    assert html_figures.critical_path(frames).to_numpy().tolist() == [
        [0, 1.5, 0.5, 6.0, 1.0, 1.0, 2.0, "p", "a", 5],
        [1, 0.0, 2.0, 3.0, 0.0, 0.0, 3.0, "r", "a", 7],
    ]


@pytest.mark.parametrize("source", [*POLICIES, "real"])
def test_critical_paths_add_up_to_the_steps(source: str, results: dict[tuple[str, int], Result]) -> None:
    frames = read_frames(REAL) if source == "real" else results[source, 3].frames
    steps = frames.phases[frames.phases["stage"] == "step"].set_index("step")
    path = html_figures.critical_path(frames).set_index("step")
    assert len(path) == len(steps)
    parts = path[list(html_figures.CRITICAL)]
    assert (parts >= 0).all(axis=None)
    assert parts.sum(axis=1).tolist() == pytest.approx((steps["end_s"] - steps["start_s"]).tolist())


def test_a_waterfall_by_hand() -> None:
    assert html_figures.steps_of(10.0, {"a": -4.0, "b": 0.0, "c": 1.5, "d": 1e-12}) == [
        ("a", 10.0, 6.0), ("c", 6.0, 7.5),
    ]  # fmt: skip


def test_decisions_of_a_moment_are_one_mark() -> None:
    rows = [(1.0, 0, "Assign", f"f{i}", 2, "x") for i in range(6)] + [(1.0, 0, "Sync", "f0", 0, None)]
    columns = ["time_s", "step", "decision", "function", "responses", "detail"]
    calls = html_figures.calls_of(pd.DataFrame(rows, columns=columns))
    assert calls[["decision", "count", "responses", "function"]].to_numpy().tolist() == [
        ["Assign", 6, 12, "f0, f1, f2, f3 and 2 more"], ["Sync", 1, 0, "f0"],
    ]  # fmt: skip


# --- the page ---


@pytest.mark.parametrize("policy", POLICIES)
def test_the_timelines_of_the_page_hold_the_runs_gpu_seconds(
    policy: str, page: Page, results: dict[tuple[str, int], Result]
) -> None:
    """By kind; and as many spans as there are in the title, of the first seed."""
    frames = results[policy, 3].frames
    drawn = page.figure(f"timeline {policy}")
    steps = drawn.pop("step")
    assert len(steps["left"]) == 2
    seconds = {kind: float(((c["right"] - c["left"]) * (c["top"] - c["bottom"])).sum()) for kind, c in drawn.items()}
    wanted = {kind: 2 * gpu_s for kind, gpu_s in gpu_seconds_of(frames).items() if gpu_s}
    assert seconds == pytest.approx(wanted)
    count = sum(len(columns["left"]) for columns in drawn.values())
    assert count == len(html_figures.spans_of(frames.workers))
    assert f"{policy}: 16 GPUs, {count:,} spans" in page.texts
    calls = page.figure(f"decisions {policy}").popitem()[1]
    assert calls["count"].sum() == len(frames.decisions)


def test_timelines_share_one_time_axis(page: Page, results: dict[tuple[str, int], Result]) -> None:
    axes = [
        r["attributes"]["x_range"]
        for r in page.figures["document"]["roots"]
        if "line" in str(r["attributes"].get("name"))
    ]
    whole = next(axis for axis in axes if "attributes" in axis)
    assert len(axes) == 3
    assert {axis["id"] for axis in axes} == {whole["id"]}
    ends = [float(results[policy, 3].frames.workers["end_s"].max()) for policy in POLICIES]
    assert whole["attributes"]["end"] == max(ends)


def test_the_summary_has_means_and_intervals_over_seeds(page: Page, results: dict[tuple[str, int], Result]) -> None:
    head, *rows = page.tables["All steps"]
    assert head == ["policy", "seeds", "s/step", "GPU-s/step", "speedup", "GPU-s saved", "difference shown"]
    step_s = {p: np.array([results[p, seed].summary["step_s"]["mean"] for seed in (3, 4)]) for p in POLICIES}
    by_policy = {row[0]: row for row in rows}
    assert list(by_policy) == sorted(POLICIES)
    for policy, values in step_s.items():
        low, high = interval95(values) or (0.0, 0.0)
        assert by_policy[policy][1:3] == ["2", f"{values.mean():,.2f}\n[{low:,.2f}, {high:,.2f}]"]
    ratios = step_s["verl"] / step_s["rlhfless"]
    low, high = interval95(ratios) or (0.0, 0.0)
    assert by_policy["rlhfless"][4] == f"{ratios.mean():.3f}\n[{low:.3f}, {high:.3f}]"
    assert by_policy["verl"][4:] == ["baseline", "", ""]


def test_waterfalls_end_at_the_policy(page: Page, results: dict[tuple[str, int], Result]) -> None:
    ends = {}
    for root in page.figures["document"]["roots"]:
        for renderer in root["attributes"]["renderers"]:
            source = renderer["attributes"].get("data_source", {}).get("attributes", {}).get("data", {"entries": []})
            columns = dict(source["entries"])
            if "shown" in columns:
                ends.setdefault(columns["name"][-1], set()).add(round(columns["top"][-1], 6))
    for policy in ("rlhfuse", "rlhfless"):
        summaries = [results[policy, seed].summary for seed in (3, 4)]
        assert ends[policy] == {
            round(float(np.mean([s["gpu_s_per_step"] for s in summaries])), 6),
            round(float(np.mean([s["step_s"]["mean"] for s in summaries])), 6),
        }


def test_the_page_asks_for_nothing(page: Page) -> None:
    policies = [a["content"] or "" for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert [policy.split(";")[0] for policy in policies] == ["default-src 'none'"]
    assert not re.search(r"http|\*|'self'|unsafe-eval", policies[0])
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all((link or "").startswith("#section-") for link in links)
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "embed", "img", "base")]


def test_the_page_names_parameters_with_sources_and_commands(
    page: Page, results: dict[tuple[str, int], Result]
) -> None:
    (rows,) = (rows for caption, rows in page.tables.items() if caption.endswith(" parameters"))
    wanted = {p.key: p for result in results.values() for p in result.parameters}
    shown = {row[0]: row for row in rows[1:]}
    assert set(shown) == set(wanted)
    for key, row in shown.items():
        number, unit = wanted[key].value, wanted[key].unit
        text = str(number) if isinstance(number, bool | str) else f"{number:,.6g}"
        assert row[1] == (text if unit == "1" else f"{text} {unit}")
        assert (row[2], row[4]) == (wanted[key].status, wanted[key].source)
        assert bool(row[3]) == (wanted[key].low is not None)
    whole = "".join(page.texts)
    assert "simrl run --config rlhfless.toml --seed 4 --output" in whole


def test_commands_of_the_page_give_the_same_run(
    page: Page, results: dict[tuple[str, int], Result], tmp_path: Path
) -> None:
    whole = "".join(page.texts)
    begin = whole.index("rlhfless.toml", whole.index("rlhfless.toml --seed 4") + 20) + len("rlhfless.toml")
    (tmp_path / "rlhfless.toml").write_text(whole[begin : whole.index("[faults]", begin)] + "\n", encoding="utf-8")
    again = run(load_config(config=tmp_path / "rlhfless.toml", seed=4)).summary
    wanted = results["rlhfless", 4].summary
    assert again["gpu_s"] == wanted["gpu_s"]
    assert again["step_s"] == wanted["step_s"]


def test_text_from_a_run_stays_text(results: dict[tuple[str, int], Result], tmp_path: Path) -> None:
    """Names with markup in them are in the page, and make no element of it."""
    result = results["rlhfless", 3]
    frames = result.frames
    samples = frames.samples.assign(prompt_id=HOSTILE, function=HOSTILE)
    workers = frames.workers.assign(function=HOSTILE + frames.workers["function"])
    decisions = frames.decisions.assign(detail=HOSTILE, function=HOSTILE)
    hostile = replace(frames, samples=samples, workers=workers, decisions=decisions)
    parameters = [replace(result.parameters[0], source=HOSTILE), *result.parameters[1:]]
    summary = {**result.summary, "policy": HOSTILE}
    directory = tmp_path / "<b>run</b>"
    write_run(replace(result, frames=hostile, parameters=parameters, summary=summary), directory)
    plain = tmp_path / "plain"
    write_run(result, plain)
    raw = html_of(read_report([directory]))
    page, other = Page(raw), Page(html_of(read_report([plain])))
    kinds = [[tag for tag, _ in each.elements] for each in (page, other)]
    assert kinds[0] == kinds[1]
    whole = "".join(page.texts)
    assert whole.count(HOSTILE) >= 3  # title, source, prompt
    assert "<b>run</b>" in whole
    assert HOSTILE in page.tables["The 2 longest waits for a last response"][1]
    assert all(
        HOSTILE in name for columns in page.figure(f"timeline {HOSTILE}").values() for name in columns.get("who", ())
    )
    assert HOSTILE not in raw
    assert "<img" not in raw.split("<script>")[0]


# --- which runs ---


def test_a_comparisons_directory_gives_its_own_figures(folder: Path, tmp_path: Path) -> None:
    """Alone: no timeline. With runs of the same: theirs, and no run twice."""
    sets = [word for each in SMALL for word in ("--set", each)]
    output = tmp_path / "both"
    wanted = ["compare", "--policies", "verl,rlhfuse", "--nodes", "2", "--steps", "2", "--seed", "3", "--seeds", "2"]
    assert main([*wanted, *sets, "--output", str(output)]) == 0
    rows = json.loads((output / "comparison.json").read_text())["rows"]
    alone, joined = read_report([output]), read_report([output, folder / "verl-3", folder / "rlhfuse-3"])
    for report in (alone, joined):
        assert [group.label for group in report.groups] == ["verl", "rlhfuse"]
        assert [len(group.runs) for group in report.groups] == [2, 2]
        assert json.loads(json.dumps(report.rows)) == rows
    page = Page(html_of(alone))
    assert "Timeline" not in page.texts
    command = f"simrl compare --config verl.toml --policies verl,rlhfuse --seed 3 --seeds 2 --output {output}"
    assert f"{command}\nsimrl report {output} --output report.html" in page.texts
    assert main(["report", str(output), "-o", str(tmp_path / "page.html"), "--explain"]) == 2
    page = Page(html_of(joined))
    assert "Timeline" in page.texts
    assert page.figure("timeline rlhfuse")["generation"]


def test_other_seeds_or_other_work_are_not_compared(folder: Path, tmp_path: Path) -> None:
    seeds = read_report([folder / "verl-3", folder / "rlhfuse-4"])
    assert (seeds.rows, seeds.explained) == (None, ())
    assert seeds.unpaired == "Not compared: the runs are not of the same seeds"
    longer = (*SMALL, "job.max_response_tokens=64")
    write_run(run(load_config(policy="rlhfuse", nodes=2, steps=2, seed=3, sets=longer)), tmp_path / "longer")
    other = read_report([folder / "verl-3", tmp_path / "longer"])
    assert other.rows is None
    assert other.unpaired.startswith("Not compared: the runs did not do the same work")
    page = Page(html_of(other))
    assert page.tables["All steps"][0] == ["policy", "seeds", "s/step", "GPU-s/step"]


def test_two_configurations_of_a_policy_stand_apart(folder: Path, tmp_path: Path) -> None:
    sets = (*SMALL, "policy.tail_ratio=0.5")
    write_run(run(load_config(policy="rlhfuse", nodes=2, steps=2, seed=3, sets=sets)), tmp_path / "half")
    report = read_report([folder / "rlhfuse-3", tmp_path / "half"])
    assert [group.label for group in report.groups] == ["rlhfuse (rlhfuse-3)", "rlhfuse (half)"]
    assert report.rows is not None


def test_a_real_run_has_no_price() -> None:
    page = Page(html_of(read_report([REAL])))
    assert ["USD/step", "not known"] in page.tables["More figures"]
    drawn = page.figure("timeline real_run")
    gpu_s = sum(
        ((c["right"] - c["left"]) * (c["top"] - c["bottom"])).sum() for kind, c in drawn.items() if kind in COLOURS
    )
    frames = read_frames(REAL)
    steps = (frames.phases["stage"] == "step").sum()
    assert gpu_s == pytest.approx(sum(gpu_seconds_of(frames).values()) * steps)


def test_runs_of_a_validation_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    """They have one configuration, no summary and no seed."""
    for name in ("verl-real-0", "verl-simulated-0"):
        shutil.copytree(REAL, tmp_path / name)
        shutil.copy(folder / "verl-3" / "config.toml", tmp_path / name)
    report = read_report([tmp_path / "verl-real-0", tmp_path / "verl-simulated-0"])
    assert [group.label for group in report.groups] == ["verl-real-0", "verl-simulated-0"]
    assert report.rows is not None
    assert report.rows[1]["speedup"] == 1.0
    assert "simrl run" not in "".join(Page(html_of(report)).texts)


def test_explain_adds_techniques_that_add_up(
    folder: Path, results: dict[tuple[str, int], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "simrl.experiments.pool.os.cpu_count", lambda: 1
    )  # starting processes takes longer than the runs
    path = tmp_path / "report.html"
    assert main(["report", str(folder / "verl-3"), str(folder / "rlhfuse-3"), "-o", str(path), "--explain"]) == 0
    page = Page(path.read_text(encoding="utf-8"))
    assert "rlhfuse against verl, GPU-s/step by technique" in page.texts
    bars = [
        dict(renderer["attributes"]["data_source"]["attributes"]["data"]["entries"])
        for root in page.figures["document"]["roots"]
        for renderer in root["attributes"]["renderers"]
        if "data_source" in renderer["attributes"] and "attributes" in renderer["attributes"]["data_source"]
    ]
    (found,) = (each for each in bars if "inter-stage fusion" in each.get("name", ()) and each["top"][0] > 1000)
    assert found["top"][-1] == pytest.approx(results["rlhfuse", 3].summary["gpu_s_per_step"])


# --- mistakes ---


def spoilt(kind: str, good: Path, place: Path) -> None:
    if kind != "no such":
        shutil.copytree(good, place)
    summary = place / "summary.json"
    match kind:
        case "empty":
            shutil.rmtree(place)
            place.mkdir()
        case "foreign":
            for path in place.glob("*.parquet"):
                path.unlink()
        case "broken parquet":
            (place / "workers.parquet").write_bytes(b"PAR1 no more")
        case "other columns":
            pd.DataFrame({"x": [1]}).to_parquet(place / "phases.parquet")
        case "no steps":
            frame = pd.read_parquet(place / "phases.parquet")
            frame[frame["stage"] != "step"].to_parquet(place / "phases.parquet")
        case "bad GPUs":
            pd.read_parquet(place / "workers.parquet").assign(gpu_ids="x").to_parquet(place / "workers.parquet")
        case "broken summary":
            summary.write_text("{", encoding="utf-8")
        case "summary of a list":
            summary.write_text("[]", encoding="utf-8")
        case "summary without numbers":
            summary.write_text(json.dumps({**json.loads(summary.read_text()), "gpu_s": "many"}), encoding="utf-8")
        case "price of words" | "NaN":
            bad = {"cost_usd_per_step": "much"} if kind == "price of words" else {"step_s": {"mean": math.nan}}
            summary.write_text(json.dumps({**json.loads(summary.read_text()), **bad}), encoding="utf-8")
        case "deep summary":
            summary.write_text("[" * 100_000, encoding="utf-8")
        case "long row":
            with (place / "parameters.csv").open("a", encoding="utf-8") as file:
                file.write(",".join("abcdefghijkl") + "\n")
        case "two columns":
            (place / "comparison.json").write_text("{}", encoding="utf-8")
            (place / "runs.csv").write_text("policy,step_s,step_s.mean\nverl,1,2\n", encoding="utf-8")
        case "other summary":
            whole = json.loads(summary.read_text())
            summary.write_text(json.dumps({**whole, "gpu_s": whole["gpu_s"] * 1.01}), encoding="utf-8")
        case "binary config":
            (place / "config.toml").write_bytes(b"\xff\xfe\x00")
        case "broken comparison":
            (place / "comparison.json").write_text("{}", encoding="utf-8")
            (place / "runs.csv").write_text("policy,seed\nverl,0\n", encoding="utf-8")
        case str() if kind.startswith("["):
            (place / "comparison.json").write_text("{}", encoding="utf-8")
            row = pd.json_normalize(json.loads(summary.read_text()))
            row.to_csv(place / "runs.csv", index=False)
            (place / "explain.json").write_text(kind, encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("no such", "has no samples.parquet: name a directory that simrl run"),
        ("empty", "has no samples.parquet"),
        ("foreign", "has no samples.parquet"),
        ("broken parquet", "workers.parquet' cannot be read"),
        ("other columns", "lacks the columns"),
        ("no steps", "phases.parquet holds no finished step"),
        ("bad GPUs", "gpu_ids='x'"),
        ("broken summary", "summary.json' cannot be read"),
        ("summary of a list", "summary.json' is not of a run: it names no policy"),
        ("summary without numbers", "gpu_s='many' must be a number"),
        ("price of words", "cost_usd_per_step='much' must be a number"),
        ("NaN", "step_s.mean=nan must be a number"),
        ("deep summary", "summary.json' cannot be read"),
        ("long row", "parameters.csv' cannot be read"),
        ("two columns", "runs.csv' has both step_s.mean and step_s"),
        ("other summary", "not the same run"),
        ("binary config", "config.toml' cannot be read"),
        ("broken comparison", "runs.csv' is not of a run: nodes=None must be a number"),
        ("[{", "explain.json' is not of simrl compare --explain: all of it: Invalid JSON"),
        ("[" * 5000, "all of it: Invalid JSON: recursion limit"),
        ('[{"baseline": "a"}]', "0.'policy': Field required"),
        (EXPLAINED % "[1]", "0.'by_stage': Input should be"),
        (
            EXPLAINED % '{"learning": {"gpu_s_per_step": "much"}}',
            "0.'by_stage'.'learning'.'gpu_s_per_step': Input should",
        ),
        (EXPLAINED % '{"learning": {"gpu_s_per_step": NaN}}', "0.'by_stage'.'learning'.'gpu_s_per_step': Input should"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(
    kind: str, told: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt(kind, folder / "verl-3", tmp_path / "spoilt")
    assert main(["report", str(tmp_path / "spoilt"), "-o", str(tmp_path / "report.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["verl-3", "verl-3"], "are the same run: name one"),
        (["verl-3", "rlhfuse-3", "--baseline", "rlhf"], "baseline='rlhf' must be one of verl, rlhfuse (--baseline)"),
        (["verl-3", "--explain"], "One policy: nothing to compare (--explain)"),
        (["verl-3", str(REAL), "--explain"], "(--explain)"),
    ],
)
def test_impossible_requests_are_refused_in_a_line(
    arguments: list[str], told: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert main(["report", *arguments, "-o", str(tmp_path / "report.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_and_a_missing_extra(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_directory = str(folder / "verl-3")
    assert main(["report", run_directory, "-o", str(tmp_path / "no" / "report.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert main(["report", run_directory, "-o", str(tmp_path / "report.html")]) == 2
    assert capsys.readouterr().err == "simrl: bokeh is not installed: pip install 'simrl[report]'\n"
    assert not list(tmp_path.iterdir())
