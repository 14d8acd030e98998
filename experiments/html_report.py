"""`simrl report`: finished runs as one HTML file that opens without a network; docs/report.md says what is in it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError

from simrl.experiments import html_figures
from simrl.experiments.compare import check_same_work, interval95, row, with_tests
from simrl.experiments.config import ConfigError, load_config
from simrl.experiments.explain import ALL, Explanation, explanation, variants_of
from simrl.experiments.plots import actors_of, tail_s_of
from simrl.experiments.pool import key_of, summaries_of
from simrl.experiments.run import RunDirectoryError
from simrl.experiments.statistics import NOT_SHOWN
from simrl.experiments.timeline import read_frames
from simrl.traces.summary import HOLDING, NO_STAGE, STAGES, Price, flat, summarise
from simrl.traces.trace import check_output, whole_file

if TYPE_CHECKING:
    from simrl.traces.records import Frames

Summary = dict[str, Any]
TEMPLATE = Path(__file__).parent / "data" / "report_template.html"
COST = ("cost_usd", "cost_usd_per_step", "cost_usd_per_million_response_tokens")
NEEDED = (
    "seed", "nodes", "gpus", "steps", "responses", "response_tokens", "prompt_tokens", "step_s.mean", "step_s.p50",
    "step_s.p95", *(f"{stage}_s" for stage in STAGES), "gpu_s", "gpu_s_per_step", "gpu_s_paper", "cost_usd_per_step",
    *(f"gpu_s_by.state.{state}" for state in HOLDING), *(f"gpu_s_by.stage.{stage}" for stage in (*STAGES, NO_STAGE)),
    "busy_fraction", "cold_starts", "migrations",
)  # fmt: skip
"""Numbers that a summary must have."""
LONGEST = 10
"""Rows of the table of the responses that steps waited for longest."""


class Term(BaseModel, strict=True):
    """A bar of a waterfall, a step; by state GPU-seconds only."""

    gpu_s_per_step: FiniteFloat
    step_s: FiniteFloat | None = None


class Explained(BaseModel, strict=True):
    """What the page shows of an element of `compare --explain`."""

    policy: str
    baseline: str
    by_mechanism: dict[str, Term]
    by_stage: dict[str, Term]
    by_state: dict[str, Term]


@dataclass(frozen=True, slots=True)
class ReportedRun:
    """What a finished run left.

    Attributes:
        directory: Where.
        summary: Content of summary.json; of a real run, which has none, made from the frames, without seed and cost.
        frames: None where only the summary was kept, as by `compare`.
        config: config.toml; empty where there is none.
        parameters: Rows of parameters.csv.
    """

    directory: Path
    summary: Summary
    frames: Frames | None
    config: str
    parameters: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their seed only, under the name that the page shows."""

    label: str
    runs: tuple[ReportedRun, ...]

    @property
    def summaries(self) -> list[Summary]:
        """By seed."""
        return [run.summary for run in self.runs]


@dataclass(frozen=True, slots=True)
class Report:
    """What a page shows.

    Attributes:
        groups: In the order in which they were given.
        baseline: Label of the group that others are compared with.
        rows: As of `compare`; None where runs cannot be compared.
        unpaired: Why they cannot.
        explained: As of `compare --explain`, one a group but the baseline.
        directories: That were given.
    """

    groups: tuple[Group, ...]
    baseline: str
    rows: tuple[dict[str, Any], ...] | None
    unpaired: str
    explained: tuple[Explained, ...]
    directories: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Texts; the first row is the head."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page; figures by title, texts by title."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    full_width: bool = False


def write_report(
    directories: Sequence[Path],
    path: Path,
    *,
    baseline: str | None = None,
    explain: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the page.

    Args:
        directories: Of `run` and of `compare`, and runs' folders of `validate`.
        path: Of the HTML file.
        baseline: Label of a group; by default `verl` if it is among them, else the first.
        explain: Simulate the policies again with their techniques switched.
        progress: Of these runs, in percent.

    Raises:
        RunDirectoryError: a directory is no run or is broken, two hold the same run, or the extra `report` is missing.
        ConfigError: there is no such baseline; or nothing to explain.
        TraceError: *path* cannot be written.
    """
    try:
        import bokeh  # noqa: F401
    except ImportError:
        raise RunDirectoryError("bokeh is not installed: pip install 'simrl[report]'") from None
    check_output(path)
    report = read_report(directories, baseline)
    if explain:
        report = replace(report, explained=tuple(_by_technique(report, progress)))
    page = html_of(report)
    with whole_file(path) as file:
        file.write_text(page, encoding="utf-8")


# --- reading ---


def read_report(directories: Sequence[Path], baseline: str | None = None) -> Report:
    """What *directories* hold, compared.

    Raises:
        RunDirectoryError: see `write_report`.
        ConfigError: see `write_report`.
    """
    if not directories:
        raise RunDirectoryError("no run is named: name directories that simrl run --output wrote")
    runs = [run for directory in directories for run in _read(directory)]
    groups = _grouped(_with_frames(runs))
    labels = [group.label for group in groups]
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"baseline={baseline!r} must be one of {', '.join(labels)} (--baseline)")
    reference = baseline or ("verl" if "verl" in labels else labels[0])
    unpaired = _why_unpaired(groups)
    given = [found for directory in directories for found in _explained_in(directory)]
    same = {(one.policy, one.baseline): one for one in given}
    base = next(group for group in groups if group.label == reference)
    others = [] if unpaired else [group for group in groups if group is not base]
    explained = [
        same.get((group.label, reference))
        or _explained(explanation(group.label, reference, {ALL: group.summaries}, base.summaries))
        for group in others
    ]
    return Report(
        groups, reference, None if unpaired else _rows(groups, base), unpaired, tuple(explained), tuple(directories)
    )


def _read(directory: Path) -> list[ReportedRun]:
    if (directory / "comparison.json").is_file():
        return _read_comparison(directory)
    frames, path = read_frames(directory), directory / "summary.json"
    _check_frames(frames, directory)
    summary = _load(path, json.loads) if path.is_file() else _summary_of(frames, directory)
    _check_summary(summary, path)
    held = frames.workers[frames.workers["state"].isin(HOLDING)]
    gpu_s = float((held["gpus"] * (held["end_s"] - held["start_s"])).sum())
    if abs(gpu_s - summary["gpu_s"]) > 1e-6 * gpu_s:
        raise RunDirectoryError(
            f"{str(path)!r} has gpu_s={summary['gpu_s']}, workers.parquet {gpu_s}: not the same run"
        )
    summary = {"later_epochs": None, **dict.fromkeys(COST), **summary}  # which may be null, and so were not checked
    return [ReportedRun(directory, summary, frames, _text(directory / "config.toml"), _parameters(directory))]


def _check_frames(frames: Frames, directory: Path) -> None:
    there = {
        "samples.parquet holds no response": len(frames.samples),
        "phases.parquet holds no finished step": (frames.phases["stage"] == "step").sum(),
        "workers.parquet holds no interval with GPUs": frames.workers["state"].isin(HOLDING).sum(),
    }
    for lack, count in there.items():
        if not count:
            raise RunDirectoryError(f"run {str(directory)!r}: {lack}: there is nothing to report")


def _read_comparison(directory: Path) -> list[ReportedRun]:
    path, config = directory / "runs.csv", _text(directory / "config.toml")
    found = []
    for values in _csv(path):
        summary = _nested(values, path)
        _check_summary(summary, path)
        found.append(ReportedRun(directory, summary, None, config))
    if not found:
        raise RunDirectoryError(f"{str(path)!r} holds no run")
    return found


def _nested(values: Mapping[str, str], path: Path) -> Summary:
    """A row of runs.csv as the summary that `flat` made it of."""
    summary: Summary = {"first_epoch": None, "later_epochs": None, **dict.fromkeys(COST)}
    for key, text in values.items():
        if text:
            *outer, last = key.split(".")
            inner = summary
            for name in outer:
                inner[name] = inner.get(name) or {}
                inner = inner[name]
                if not isinstance(inner, dict):
                    raise RunDirectoryError(f"{str(path)!r} has both {key} and {key.removesuffix('.' + last)}")
            inner[last] = text if key == "policy" else _number(text)
    return summary


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _summary_of(frames: Frames, directory: Path) -> Summary:
    """The summary of a real run, which has none: without seed and price."""
    held = frames.workers[frames.workers["state"].isin(HOLDING)]
    gpus = {(node, gpu) for node, ids in zip(held["node"], held["gpu_ids"], strict=True) for gpu in str(ids).split(",")}
    try:
        made = summarise(
            frames, policy=directory.name, seed=0, nodes=held["node"].nunique(), gpus=len(gpus),
            price=Price(0.0, "gpu", 0.0), policy_wall_s=0.0, wall_s=0.0,
        )  # fmt: skip
    except ValueError as error:
        raise RunDirectoryError(f"run {str(directory)!r}: {error}") from error
    return {**made, **dict.fromkeys(COST), "seed": None, "policy_wall_s": None, "wall_s": None}


def _check_summary(summary: Any, path: Path) -> None:
    if not isinstance(summary, dict) or not isinstance(summary.get("policy"), str):
        raise RunDirectoryError(f"{str(path)!r} is not of a run: it names no policy")
    numbers = flat(summary)
    unknown = ("seed", *COST) if path.name == "summary.json" and not path.is_file() else ()
    for key in dict.fromkeys((*NEEDED, *COST, *numbers)):
        value = numbers.get(key)
        needed = key in NEEDED and key not in unknown
        if key != "policy" and not (_is_number(value) or (value is None and not needed)):
            raise RunDirectoryError(f"{str(path)!r} is not of a run: {key}={value!r} must be a number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


Content = TypeVar("Content")


def _load(path: Path, parse: Callable[[str], Content]) -> Content:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise RunDirectoryError(f"{str(path)!r} cannot be read: {error}") from error


def _csv(path: Path) -> list[dict[str, str]]:
    return _load(path, _rows_of)


def _rows_of(text: str) -> list[dict[str, str]]:
    head, *rows = list(csv.reader(io.StringIO(text), strict=True)) or [[]]
    return [dict(zip(head, row, strict=True)) for row in rows]


def _text(path: Path) -> str:
    return _load(path, str) if path.is_file() else ""


def _parameters(directory: Path) -> tuple[Mapping[str, str], ...]:
    path = directory / "parameters.csv"
    return tuple(_csv(path)) if path.is_file() else ()


def _explained_in(directory: Path) -> list[Explained]:
    path = directory / "explain.json"
    if not (directory / "comparison.json").is_file() or not path.is_file():
        return []
    try:
        return TypeAdapter(list[Explained]).validate_json(_text(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(repr, first["loc"])) or "all of it"
        raise RunDirectoryError(f"{str(path)!r} is not of simrl compare --explain: {where}: {first['msg']}") from None


def _explained(found: Explanation) -> Explained:
    return Explained.model_validate(found.to_dict())


def _figures(summary: Summary) -> Summary:
    """A summary without what differs between identical runs."""
    known = {str(key): value for key, value in flat(summary).items()}
    return {key: value for key, value in known.items() if "wall" not in key and value is not None}


def _with_frames(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """Runs of which a comparison has the summary and a run directory the frames too become one.

    Raises:
        RunDirectoryError: two run directories hold the same run.
    """
    whole = [run for run in runs if run.frames is not None]
    for i, run in enumerate(whole):
        for other in whole[:i]:
            if run.directory.resolve() == other.directory.resolve() or (
                run.config == other.config != "" and run.summary["seed"] == other.summary["seed"] is not None
            ):
                raise RunDirectoryError(
                    f"{str(other.directory)!r} and {str(run.directory)!r} are the same run: name one"
                )
    taken: list[ReportedRun] = []
    found = []
    for run in runs:
        if run.frames is None:
            twin = next((other for other in whole if _figures(other.summary) == _figures(run.summary)), None)
            if twin is not None:
                taken.append(twin)
                run = replace(run, frames=twin.frames, parameters=twin.parameters)
        found.append(run)
    return [run for run in found if not any(run is twin for twin in taken)]


def _grouped(runs: Sequence[ReportedRun]) -> tuple[Group, ...]:
    """Runs of one policy and configuration, by seed; policies that stand for several get their directory's name too."""
    by_key: dict[tuple[str, ...], list[ReportedRun]] = {}
    for run in runs:
        config = re.sub(r"^seed = .*$", "", run.config, count=1, flags=re.MULTILINE) if run.config else ""
        alone = str(run.directory) if run.summary["seed"] is None or not run.config else ""
        by_key.setdefault((run.summary["policy"], config, alone), []).append(run)
    policies = [key[0] for key in by_key]
    labels: list[str] = []
    for policy, members in zip(policies, by_key.values(), strict=True):
        label = policy if policies.count(policy) == 1 else f"{policy} ({members[0].directory.name})"
        labels.append(label if label not in labels else f"{label} {len(labels) + 1}")
    return tuple(
        Group(label, tuple(sorted(members, key=lambda run: run.summary["seed"] or 0)))
        for label, members in zip(labels, by_key.values(), strict=True)
    )


def _why_unpaired(groups: Sequence[Group]) -> str:
    """Why groups cannot be compared seed by seed; empty if they can."""
    if len(groups) == 1:
        return "One policy: nothing to compare"
    seeds = [[summary["seed"] for summary in group.summaries] for group in groups]
    if any(each != seeds[0] for each in seeds):
        return "Not compared: the runs are not of the same seeds"
    try:
        for summaries in zip(*(group.summaries for group in groups), strict=True):
            named = zip(groups, summaries, strict=True)
            check_same_work([{**summary, "policy": group.label} for group, summary in named])
    except AssertionError:
        return "Not compared: the runs did not do the same work (other prompts or lengths)"
    return ""


def _rows(groups: Sequence[Group], base: Group) -> tuple[dict[str, Any], ...]:
    named = {group.label: [{**summary, "policy": group.label} for summary in group.summaries] for group in groups}
    return with_tests([row(named[group.label], named[base.label]) for group in groups], named, base.label)


def _by_technique(report: Report, progress: Callable[[int], None] | None) -> list[Explained]:
    """Waterfalls by technique, from simulating the runs' configurations with techniques switched."""
    if report.unpaired:
        raise ConfigError(f"{report.unpaired} (--explain)")
    base = next(group for group in report.groups if group.label == report.baseline)
    plans = {}
    for group in report.groups:
        first = group.runs[0]
        if not _can_run_again(first):
            raise ConfigError(f"{str(first.directory)!r} was not made by simrl run: it cannot be run again (--explain)")
        config = load_config(config=first.directory / "config.toml")
        plans[group.label] = {ALL: config} if group is base else variants_of(config)
    seeds = [summary["seed"] for summary in base.summaries]
    drawn = [one.with_seed(seed) for plan in plans.values() for one in plan.values() for seed in seeds]
    found = summaries_of(drawn, progress=progress)
    values = {
        label: {name: [found[key_of(one.with_seed(seed))] for seed in seeds] for name, one in plan.items()}
        for label, plan in plans.items()
    }
    return [
        _explained(explanation(group.label, base.label, values[group.label], values[base.label][ALL]))
        for group in report.groups
        if group is not base
    ]


def _can_run_again(run: ReportedRun) -> bool:
    """Whether `simrl run` made it: not a real run, a replay (which says so in its first line), or of a comparison."""
    return bool(run.parameters) and bool(run.config) and not run.config.startswith("#") and not _is_comparison(run)


def _is_comparison(run: ReportedRun) -> bool:
    return (run.directory / "comparison.json").is_file()


# --- the page ---


def html_of(report: Report) -> str:
    """The page."""
    from jinja2 import Environment

    sections = sections_of(report)
    figures = [figure for section in sections for figure in section.figures.values()]
    names = ", ".join(_labels(report))
    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=f"simrl: {names}", head=_head(report), sections=sections, figures=_embedded(figures), scripts=_scripts()
    )


def _embedded(figures: Sequence[Any]) -> str:
    """The figures as JSON that cannot end the script element which holds it."""
    from bokeh.document import Document

    document = Document()
    with document.models.freeze():  # else each root makes it look through all that came before
        for figure in figures:
            document.add_root(figure)
    found = {"document": document.to_json(deferred=False), "roots": [figure.id for figure in figures]}
    return json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")


def _scripts() -> list[str]:
    from bokeh.resources import Resources

    return list(Resources(mode="inline", components=["bokeh"]).js_raw)


def _head(report: Report) -> str:
    from importlib.metadata import version

    summaries = [summary for group in report.groups for summary in group.summaries]
    clusters = {f"{s['gpus']} GPUs, {s['nodes']} nodes, {s['steps']} steps" for s in summaries}
    return f"{'; '.join(sorted(clusters))}. Made by simrl {version('simrl')}; docs/metrics.md defines every figure."


def sections_of(report: Report) -> list[Section]:
    """All parts of the page, in their order."""
    runs = {group.label: _frames(group) for group in report.groups}
    framed = {label: frames for label, frames in runs.items() if frames is not None}
    paths = {label: html_figures.critical_path(frames) for label, frames in framed.items()}
    without = [label for label in runs if label not in framed]
    sections = [_summary_section(report), *([_why_section(report)] if len(report.groups) > 1 else [])]
    if framed:
        sections += [
            _timeline_section(framed, without), _path_section(framed, paths), _gpu_section(report, framed),
            _length_section(framed), _steps_section(framed), _decision_section(framed),
        ]  # fmt: skip
    else:
        missing = "A comparison's directory holds no frames: name directories of simrl run --output for the timelines."
        sections.append(replace(_gpu_section(report, {}), notes=[missing]))
    return [*sections, _parameter_section(report), _again_section(report)]


def _frames(group: Group) -> Frames | None:
    """Of the first seed that has any."""
    return next((run.frames for run in group.runs if run.frames is not None), None)


def _summary_section(report: Report) -> Section:
    """Figures with intervals, against the baseline where work and seeds are the same."""
    seeds = max(len(group.runs) for group in report.groups)
    notes = [
        f"Against {report.baseline}, seed by seed." if report.rows else f"{report.unpaired}.",
        "In brackets: 95 % intervals over seeds (Student's t): sampling noise, not what is unknown of the machines."
        if seeds > 1
        else "One seed: no intervals. Runs of more seeds give them.",
    ]  # fmt: skip
    tables = [Table("All steps", _columns(report), _standings(report, report.rows))]
    if report.rows and report.rows[0]["later_epochs"]:
        later = [{**one["later_epochs"], "policy": one["policy"]} for one in report.rows]
        tables.append(Table("After the first epoch", _columns(report), _standings(report, later, "later_epochs")))
    return Section("Summary", notes, [*tables, _more_figures(report)])


def _columns(report: Report) -> list[str]:
    compared = ["speedup", "GPU-s saved", *(["difference shown"] if _tested(report) else [])] if report.rows else []
    return ["policy", "seeds", "s/step", "GPU-s/step", *compared]


def _tested(report: Report) -> bool:
    """Whether there are pairs enough for tests."""
    return any(one["paired"] and one["paired"]["step_s"]["p"] is not None for one in report.rows or ())


def _standings(report: Report, rows: Sequence[Mapping[str, Any]] | None, part: str = "") -> list[list[str]]:
    found = []
    for index, group in enumerate(report.groups):
        figures = [summary[part] if part else summary for summary in group.summaries]
        step_s = [one["step_s"] if part else one["step_s"]["mean"] for one in figures]
        cells = [_mean(step_s, ",.2f"), _mean([one["gpu_s_per_step"] for one in figures])]
        if rows:
            compared = _against(rows[index]) if group.label != report.baseline else ["baseline", "", ""]
            cells += compared if _tested(report) else compared[:2]
        found.append([group.label, str(len(group.runs)), *cells])
    return found


def _against(compared: Mapping[str, Any]) -> list[str]:
    speedup = _interval(compared["speedup"], compared["speedup_ci95"], ".3f")
    saved = _interval(compared["gpu_s_reduction"], compared["gpu_s_reduction_ci95"], ".1%")
    tests = compared["paired"] or {}
    verdicts = [
        f"{name}: {test['verdict'].replace(NOT_SHOWN, 'none')}"
        for name, test in (("time", tests["step_s"]), ("GPU-s", tests["gpu_s_per_step"]))
    ]
    return [speedup, saved, "\n".join(verdicts)]


def _mean(values: Iterable[float | None], form: str | None = None) -> str:
    """With its interval, where the values differ; without *form* to three digits at least."""
    known = np.array([value for value in values if value is not None], dtype=float)
    if not known.size:
        return "not known"
    mean = float(known.mean())
    return _interval(mean, interval95(known) if np.ptp(known) else None, form or _digits(mean))


def _digits(value: float) -> str:
    return ",.0f" if abs(value) >= 100 else ",.2f"


def _interval(value: float, ends: Sequence[float] | None, form: str) -> str:
    return f"{value:{form}}" if ends is None else f"{value:{form}}\n[{ends[0]:{form}}, {ends[1]:{form}}]"


def _more_figures(report: Report) -> Table:
    """Means over seeds of a key of summary.json; `a/b` is a ratio of two."""
    kinds = (
        ("step p50, s", "step_s.p50", ",.2f"),
        ("step p95, s", "step_s.p95", ",.2f"),
        ("busy share of GPU-s", "busy_fraction", ".1%"),
        ("USD/step", "cost_usd_per_step", ",.3f"),
        ("USD per 10^6 response tokens", "cost_usd_per_million_response_tokens", ",.2f"),
        ("GPU-s/step, paper's measure", "gpu_s_paper/steps", None),
        *(
            (key.replace("_", " "), key, ",.0f")
            for key in ("cold_starts", "migrations", "responses", "response_tokens")
        ),
    )
    return Table("More figures", ["", *_labels(report)], [_means(report, *kind) for kind in kinds])


def _means(report: Report, name: str, key: str, form: str | None = None) -> list[str]:
    """A row: the mean of a key of each group's summaries."""
    key, _, per = key.partition("/")
    rows = [[flat(summary) for summary in group.summaries] for group in report.groups]
    return [name, *(_mean([one[key] / one[per] if per else one[key] for one in each], form) for each in rows)]


def _labels(report: Report) -> list[str]:
    return [group.label for group in report.groups]


def _why_section(report: Report) -> Section:
    """Waterfalls from the baseline to each other policy."""
    base = next(group for group in report.groups if group.label == report.baseline)
    figures: dict[str, Any] = {}
    for found in report.explained:
        for part, title in (("by_mechanism", "by technique"), ("by_stage", "by stage"), ("by_state", "by state")):
            for metric, unit in (("gpu_s_per_step", "GPU-s/step"), ("step_s", "s/step")):
                values = {name: getattr(term, metric) for name, term in getattr(found, part).items()}
                terms = {name: value for name, value in values.items() if value is not None}
                if terms:
                    means = [s["step_s"]["mean"] if metric == "step_s" else s[metric] for s in base.summaries]
                    names = (report.baseline, found.policy)
                    drawn = html_figures.waterfall(*names, float(np.mean(means)), terms, unit)
                    figures[f"{found.policy} against {report.baseline}, {unit} {title}"] = drawn
    notes = [
        "From the baseline's mean to the policy's: falling bars are what it saves there. By stage, 'overlap' is"
        " what stages that overlap or leave gaps add to the sum of theirs; 'none' serves no stage (starts, waits)."
    ]
    if any(found.by_mechanism for found in report.explained):
        notes.append(
            "A technique's bar: the mean of what it changes as the only one on and as the last one on;"
            " 'interaction' is what these leave."
        )
    return Section("Why one is cheaper", notes if figures else [f"{report.unpaired}."], figures=figures)


def _timeline_section(framed: html_figures.Runs, without: Sequence[str]) -> Section:
    notes = [
        "One row a GPU, empty where nothing is held; the grey strip above has the steps. The first seed of each policy."
        " Drag over a span of time, or Ctrl and wheel, to zoom in; the toolbar on the right moves and resets. All"
        " panels go together."
        " A click on an entry of a legend hides it."
    ]
    if without:
        notes.append(f"No frames of {', '.join(without)}: a comparison's directory has summaries only.")
    return Section("Timeline", notes, figures=html_figures.timelines(framed), full_width=True)


def _path_section(framed: html_figures.Runs, paths: Mapping[str, Any]) -> Section:
    figures = {"Stages of a typical step (medians)": html_figures.stages(framed)}
    known = {label: path for label, path in paths.items() if len(path)}
    if known:
        figures["Critical path, mean over steps"] = html_figures.critical_means(known)
        figures |= {
            f"{label}: critical path of each step": html_figures.critical_steps(label, p) for label, p in known.items()
        }
    notes = [
        "Critical path: what each step waited for, through the response that finished last (queueing and migration"
        " included), then what preparation was left, and learning. Its parts add up to the step. Where preparation lags"
        " behind generation, an earlier last response might not have ended the step earlier."
    ]
    return Section("Stages and critical path", notes, [_last_responses(known)], figures)


def _last_responses(paths: Mapping[str, Any]) -> Table:
    rows = [
        (seconds, [label, str(step), prompt, function, f"{tokens:,}", f"{seconds:,.2f}"])
        for label, path in paths.items()
        for seconds, step, prompt, function, tokens in zip(
            path["generation"], path["step"], path["prompt_id"], path["function"], path["response_tokens"], strict=True
        )
    ]
    longest = [cells for _, cells in sorted(rows, key=lambda one: -one[0])[:LONGEST]]
    head = ["policy", "step", "prompt", "function", "tokens", "generation, s"]
    return Table(f"The {len(longest)} longest waits for a last response", head, longest, prose=True, folded=True)


def _gpu_section(report: Report, framed: html_figures.Runs) -> Section:
    """GPU-seconds by state and stage, idle ones by the stage last worked for, and dollars."""
    parts = [f"state.{state}" for state in HOLDING] + [f"stage.{stage}" for stage in (*STAGES, NO_STAGE)]
    rows = [_means(report, part.replace(".", " "), f"gpu_s_by.{part}/steps") for part in parts]
    rows += [_means(report, "all", "gpu_s_per_step"), _means(report, "USD/step", "cost_usd_per_step", ",.3f")]
    tables = [Table("GPU-seconds a step", ["", *_labels(report)], rows)]
    if framed:
        idle = {label: idle_after(frames) for label, frames in framed.items()}
        head = ["idle after", *idle]
        tables.append(Table("Idle GPU-seconds a step", head, [
            [stage, *(_mean([each[stage]]) for each in idle.values())] for stage in (*STAGES, NO_STAGE)
        ]))  # fmt: skip
    figures = {"GPU-seconds a step": html_figures.gpu_seconds(framed)} if framed else {}
    return Section(
        "Cost and idle GPUs", ["Idle by the stage last worked for; none: not used since the start."], tables, figures
    )


def idle_after(frames: Frames) -> dict[str, float]:
    """Idle GPU-seconds a finished step, by the stage that the GPUs last worked for."""
    idle = frames.workers[frames.workers["state"] == "idle"]
    stage = idle["stage"].where(idle["stage"].isin(STAGES), NO_STAGE)
    sums = (idle["gpus"] * (idle["end_s"] - idle["start_s"])).groupby(stage).sum()
    steps = int((frames.phases["stage"] == "step").sum())
    return {name: float(sums.get(name, 0.0)) / steps for name in (*STAGES, NO_STAGE)}


def _length_section(framed: html_figures.Runs) -> Section:
    tokens = {label: frames.samples["response_tokens"].to_numpy() for label, frames in framed.items()}
    rows = []
    for label, frames in framed.items():
        p50, p95, most = np.percentile(tokens[label], (50, 95, 100))
        truncated = f"{frames.samples['truncated'].astype(float).mean():.1%}"
        rows.append([label, f"{len(tokens[label]):,}", f"{tokens[label].mean():,.1f}", f"{p50:,.0f}", f"{p95:,.0f}",
                     f"{most:,.0f}", truncated])  # fmt: skip
    first = next(iter(tokens.values()))
    notes = []
    if len(tokens) > 1 and all(np.array_equal(np.sort(each), np.sort(first)) for each in tokens.values()):
        notes, tokens = ["All policies generated the same lengths."], {"all policies": first}
    head = ["policy", "responses", "mean", "p50", "p95", "longest", "truncated"]
    figures = {"Response lengths": html_figures.lengths(tokens)}
    return Section("Response lengths", notes, [Table("Tokens of responses", head, rows)], figures)


def _steps_section(framed: html_figures.Runs) -> Section:
    actors = {label: actors_of(frames) for label, frames in framed.items()}
    tails = {label: tail_s_of(frames.samples) for label, frames in framed.items()}
    durations = {}
    for label, frames in framed.items():
        steps = frames.phases[frames.phases["stage"] == "step"].set_index("step")
        durations[label] = steps["end_s"] - steps["start_s"]
    figures = {
        "Functions that generate": html_figures.lines(actors, "step", "functions"),
        "Tail: from 90 % of the responses finished to all": html_figures.lines(tails, "step", "s"),
        "Step time": html_figures.lines(durations, "step", "s"),
    }
    return Section("Over steps", figures=figures)


def _decision_section(framed: html_figures.Runs) -> Section:
    counts = {label: frames.decisions["decision"].value_counts() for label, frames in framed.items()}
    kinds = sorted({str(kind) for each in counts.values() for kind in each.index})
    rows = [[kind, *(f"{each.get(kind, 0):,}" for each in counts.values())] for kind in kinds]
    note = "Of the whole run; the timeline has their moments."
    return Section("Decisions", [note], [Table("How many", ["decision", *counts], rows)])


def _parameter_section(report: Report) -> Section:
    users: dict[tuple[str, ...], list[str]] = {}
    for group in report.groups:
        for parameter in {tuple(p.values()): p for run in group.runs for p in run.parameters}.values():
            users.setdefault(tuple(str(parameter.get(key, "")) for key in PARAMETER), []).append(group.label)
    rows = []
    for (name, value, unit, status, low, high, source), labels in sorted(users.items()):
        shown = _short(value) if unit == "1" else f"{_short(value)} {unit}"
        ends = f"{_short(low)} to {_short(high)}" if low or high else ""
        only = ", ".join(labels) if len(labels) < len(report.groups) else "all"
        rows.append([name, shown, status, ends, source, only])
    if not rows:
        return Section("Parameters", ["These directories hold no parameters.csv."])
    assumed = sum(cells[2] == "assumed" for cells in rows)
    note = f"Every sourced number that the runs read; {assumed} of {len(rows)} are assumed, with their ranges."
    head = ["name", "value", "status", "range", "source", "read by"]
    if len(report.groups) == 1:
        head, rows = head[:-1], [cells[:-1] for cells in rows]
    return Section("Parameters", [note], [Table(f"{len(rows)} parameters", head, rows, prose=True, folded=True)])


def _short(text: str) -> str:
    """A number to six digits; parameters.csv has all."""
    number = _number(text)
    return text if isinstance(number, str) else f"{number:,.6g}"


PARAMETER = ("name", "value", "unit", "status", "low", "high", "source")


def _again_section(report: Report) -> Section:
    names = " ".join(shlex.quote(str(directory)) for directory in report.directories)
    commands, texts = [], {}
    for group in report.groups:
        config = f"{group.label}.toml"
        for run in filter(_can_run_again, group.runs):
            seed = f" --seed {run.summary['seed']}"
            place = shlex.quote(str(run.directory))
            commands.append(f"simrl run --config {shlex.quote(config)}{seed} --output {place}")
        if group.runs[0].config:
            texts[config] = group.runs[0].config
    commands += _comparisons(report)
    commands.append(f"simrl report {names} --output report.html")
    notes = [
        "Save the configurations below under their names. A configuration whose first line is a comment was replayed"
        " from a trace, as it says. A real run's times do not come again to the digit."
    ]
    shown = {"Commands": "\n".join(dict.fromkeys(commands)), **texts}
    return Section("Run it again", notes, texts=shown)


def _comparisons(report: Report) -> list[str]:
    """The command of each comparison's directory."""
    members: dict[Path, list[tuple[str, Summary]]] = {}
    for group in report.groups:
        for run in filter(_is_comparison, group.runs):
            members.setdefault(run.directory, []).append((group.label, run.summary))
    commands = []
    for directory, runs in members.items():
        seeds = sorted({summary["seed"] for _, summary in runs})
        policies = ",".join(dict.fromkeys(summary["policy"] for _, summary in runs))
        words = [f"{runs[0][0]}.toml", "--policies", policies, "--seed", str(seeds[0]), "--seeds", str(len(seeds))]
        commands.append(shlex.join(["simrl", "compare", "--config", *words, "--output", str(directory)]))
    return commands
