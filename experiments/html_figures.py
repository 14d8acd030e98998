"""Figures of `simrl report`, drawn with Bokeh: each function takes frames or numbers and returns a figure.

Bokeh is imported where it is used: it comes with the extra `report`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simrl.experiments.plots import COLOURS, CYCLE, LABELS, gpu_seconds_of
from simrl.experiments.run import RunDirectoryError
from simrl.traces.summary import HOLDING, STAGES

if TYPE_CHECKING:
    import pandas as pd

    from simrl.traces.records import Frames

ROW_PIXELS, LEAST_PIXELS, MOST_PIXELS = 14, 150, 680
"""Height of a GPU in a timeline, where the whole timeline is no higher than the last."""
NODE_LABELS = 24
"""At most so many rows of a timeline have a label."""
DASHES = ("solid", "dashed", "dotdash", "dotted", "dashdot")
"""Lines differ by these too, not by colour alone."""
NAMED = 4
"""Functions that a decision's tooltip names; the others are counted."""
CRITICAL = {
    "weight_sync": ("weight sync", COLOURS["weight_sync"]),
    "unassigned": ("unassigned", "#7F7F7F40"),
    "generation": ("generation", COLOURS["generation"]),
    "preparation": ("preparation", COLOURS["preparation"]),
    "unlearned": ("waiting to learn", "#7F7F7FC0"),
    "learning": ("learning", COLOURS["learning"]),
}
"""Parts of a critical path in the order of time: name and colour."""
Runs = Mapping[str, "Frames"]


# --- what is drawn ---


def spans_of(workers: pd.DataFrame) -> pd.DataFrame:
    """Rectangles of time and GPUs that do one thing; rows are GPUs by node, then number.

    Intervals of a function that go on in the same state are one, and so are those of neighbouring GPUs from the same
    moment to the same moment: half as many to draw.

    Returns:
        Columns `kind` (a key of `COLOURS`), `who`, `where`, `left` and `right` (s), `bottom` and `top` (rows). Their
        area is the GPU-seconds held.

    Raises:
        RunDirectoryError: an interval does not name as many GPUs as it holds.
    """
    import pandas as pd

    held = workers[workers["state"].isin(HOLDING)]
    kinds = held["stage"].where(held["state"] == "busy", held["state"])
    gpus, row_of = _placed(held)
    blocks = {each: _blocks([row_of[gpu] for gpu in each]) for each in set(gpus)}
    values = (kinds, *(held[name] for name in ("function", "node", "gpu_ids", "start_s", "end_s")))
    rows = [(*row, bottom, top) for each, *row in zip(gpus, *values, strict=True) for bottom, top in blocks[each]]
    spans = pd.DataFrame(rows, columns=["kind", "function", "node", "gpu_ids", "left", "right", "bottom", "top"])
    spans = spans.astype({"left": float, "right": float, "node": int})
    own = _chains(spans, ["kind", "function", "bottom", "top"], "left", "right")
    like = _chains(own.first().assign(right=own["right"].last()), ["kind", "left", "right"], "bottom", "top")
    first, last = like.first(), like.last()
    names = zip(first["function"], last["function"], like["function"].nunique(), strict=True)
    nodes = zip(first["node"], last["node"], first["gpu_ids"], last["top"] - first["bottom"], like.size(), strict=True)
    found: pd.DataFrame = first.assign(
        top=last["top"],
        who=[a if count == 1 else f"{count} functions, {a} to {b}" for a, b, count in names],
        where=[
            f"node {a}, GPU {ids}" if blocks == 1 else f"node{f' {a}' if a == b else f's {a} to {b}'}, {gpus} GPUs"
            for a, b, ids, gpus, blocks in nodes
        ],
    )
    return found


def _chains(spans: pd.DataFrame, same: list[str], start: str, end: str) -> Any:
    """Spans of the same values of which each starts where the one before ends, grouped."""
    spans = spans.sort_values([*same, start], kind="stable")
    begins = (spans[same] != spans[same].shift()).any(axis=1) | (spans[start] != spans[end].shift())
    return spans.groupby(begins.cumsum().to_numpy(), sort=False)


def _placed(held: pd.DataFrame) -> tuple[list[tuple[tuple[int, int], ...]], dict[tuple[int, int], int]]:
    """(node, GPU) of each GPU of each interval, and the rows of all of them."""
    gpus = [_gpus(*place) for place in zip(held["node"], held["gpu_ids"], held["gpus"], held["function"], strict=True)]
    return gpus, {gpu: row for row, gpu in enumerate(sorted({gpu for each in gpus for gpu in each}))}


def _gpus(node: Any, gpu_ids: Any, gpus: Any, function: Any) -> tuple[tuple[int, int], ...]:
    """(node, GPU) of each GPU of an interval, sorted."""
    try:
        found = tuple(sorted((int(node), int(gpu)) for gpu in str(gpu_ids).split(",")))
    except ValueError:
        found = ()
    if len(found) != gpus:
        raise RunDirectoryError(f"workers.parquet: {function!r} holds {gpus} GPUs of node {node}, gpu_ids={gpu_ids!r}")
    return found


def _blocks(rows: Sequence[int]) -> list[tuple[int, int]]:
    """First row, and the one after the last, of each run of adjoining rows; *rows* are sorted."""
    cuts = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
    return [(rows[a], rows[b - 1] + 1) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]


def critical_path(frames: Frames) -> pd.DataFrame:
    """What each step waited for, through the response that finished last: from there on only later stages are left.

    Weight sync until the first function generates; until the response was assigned; until it had finished; until all
    were prepared; until learning began; to the step's end. The parts add up to the step. Where preparation lags behind
    generation, an earlier end of that response might not have ended the step earlier. Steps without learning are left
    out.

    Returns:
        A row a step: the keys of `CRITICAL` (s), and the response's `prompt_id`, `function`, `response_tokens`.
    """
    import pandas as pd

    samples, phases = frames.samples, frames.phases.drop_duplicates(["step", "stage"])
    times = phases.pivot(index="step", columns="stage", values=["start_s", "end_s"])
    starts, ends = (pd.DataFrame(times[name], columns=["step", *STAGES]) for name in ("start_s", "end_s"))
    known = samples.dropna(subset=["assigned_s", "finished_s"])
    last = known.loc[known.groupby("step")["finished_s"].idxmax()].set_index("step")
    steps = starts.index[starts["step"].notna() & starts["learning"].notna() & starts.index.isin(last.index)]
    starts, ends, last = starts.loc[steps], ends.loc[steps], last.loc[steps]
    prepared_s = samples.groupby("step")["prepared_s"].max().loc[steps]
    bounds_s = (starts["step"], last["assigned_s"], last["finished_s"], prepared_s, starts["learning"], ends["step"])
    moments_s = np.fmax.accumulate(np.column_stack(bounds_s), axis=1)
    moments_s = np.clip(moments_s, moments_s[:, :1], ends[["step"]].to_numpy())
    synced_s = np.fmin(ends[["weight_sync"]].to_numpy(), starts[["generation"]].to_numpy())
    sync_s = np.minimum(moments_s[:, 1:3], synced_s) - np.maximum(moments_s[:, :2], starts[["weight_sync"]].to_numpy())
    sync_s = np.nan_to_num(np.maximum(sync_s, 0.0))  # NaN: a step without sync
    parts_s = np.diff(moments_s, axis=1)
    parts_s[:, :2] -= sync_s
    path = pd.DataFrame(np.column_stack([sync_s.sum(axis=1), parts_s]), columns=list(CRITICAL))
    path.insert(0, "step", steps)
    about = last[["prompt_id", "function", "response_tokens"]].astype({"prompt_id": str, "function": str})
    return path.assign(**{name: about[name].to_numpy() for name in map(str, about)})


def calls_of(decisions: pd.DataFrame) -> pd.DataFrame:
    """A row for each kind of decision at each moment: how many, for which functions and responses, first detail."""
    groups = decisions.fillna({"function": "", "detail": ""}).groupby(["time_s", "decision"], sort=True)
    named = groups["function"].agg(_listed)
    return (
        groups.agg(count=("function", "size"), responses=("responses", "sum"), detail=("detail", "first"))
        .assign(function=named)
        .reset_index()
    )


def _listed(names: Iterable[str]) -> str:
    known = list(dict.fromkeys(name for name in names if name))
    more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
    return ", ".join(known[:NAMED]) + more


# --- figures ---


def _figure(height: int, x: str = "", y: str = "", **options: Any) -> Any:
    """An empty figure as wide as its place; drag or Ctrl and wheel zoom, the toolbar can pan."""
    from bokeh.models import BoxZoomTool, PanTool, ResetTool, SaveTool, WheelZoomTool
    from bokeh.plotting import figure

    wide = options.pop("zoom", "both")
    drag = BoxZoomTool(dimensions=wide)
    tools = [drag, PanTool(dimensions=wide), WheelZoomTool(dimensions=wide, modifiers="ctrl"), ResetTool(), SaveTool()]
    plot = figure(
        height=height, sizing_mode="stretch_width", tools=tools, active_drag=drag, x_axis_label=x, y_axis_label=y,
        background_fill_color=None, border_fill_color=None, min_border_right=20, lod_threshold=None, **options,
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.xaxis.axis_label_text_font_style = plot.yaxis.axis_label_text_font_style = "normal"
    return plot


def _hover(plot: Any, renderers: Sequence[Any], lines: Mapping[str, str]) -> None:
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=list(renderers), tooltips=list(lines.items())))


def _legend_above(plot: Any) -> None:
    if not plot.legend:
        return
    legend = plot.legend[0]
    legend.orientation, legend.click_policy, legend.ncols = "horizontal", "hide", "auto"
    legend.background_fill_color = legend.border_line_color = None
    legend.padding, legend.margin, legend.label_text_font_size = 2, 0, "12px"
    plot.add_layout(legend, "above")


def _label(kind: str) -> str:
    return LABELS.get(kind, kind)


def timelines(runs: Runs) -> dict[str, Any]:
    """What each GPU did, and below it what the policy decided; all on one time axis. By title."""
    from bokeh.models import Range1d

    end_s = max(float(frames.workers["end_s"].max()) for frames in runs.values())
    x_range = Range1d(0.0, end_s, bounds=(0.0, end_s))
    drawn: dict[str, Any] = {}
    for label, frames in runs.items():
        spans = spans_of(frames.workers)
        drawn[f"{label}: {spans['top'].max()} GPUs, {len(spans):,} spans"] = _timeline(label, frames, spans, x_range)
        if len(frames.decisions):
            drawn[f"{label}: decisions"] = _decisions(label, frames.decisions, x_range)
    return drawn


def _timeline(label: str, frames: Frames, spans: pd.DataFrame, x_range: Any) -> Any:
    rows = int(spans["top"].max())
    strip = max(1.0, 0.05 * rows)
    height = int(np.clip(rows * ROW_PIXELS + 110, LEAST_PIXELS, MOST_PIXELS))
    y_range = (rows, -1.2 * strip)
    plot = _figure(
        height, "s", x_range=x_range, y_range=y_range, zoom="width", min_border_left=90, name=f"timeline {label}"
    )
    times = {"from": "@left{0,0.000} s", "for": "@seconds{0,0.000} s"}
    drawn = []
    for kind, colour in COLOURS.items():
        own = spans.loc[spans["kind"] == kind, ["left", "right", "bottom", "top", "who", "where"]]
        if len(own):
            data = {**_columns(own), "seconds": (own["right"] - own["left"]).to_numpy()}
            drawn.append(_quads(plot, data, colour, _label(kind), name=kind))
    _hover(plot, drawn, {"": "$name", "function": "@who", "at": "@where", **times})
    steps = frames.phases[frames.phases["stage"] == "step"].rename(columns={"start_s": "left", "end_s": "right"})
    steps = steps.assign(bottom=-1.1 * strip, top=-0.2 * strip, seconds=steps["right"] - steps["left"])
    marks = _quads(plot, _columns(steps.drop(columns="stage")), "#7F7F7F80", None, name="step", outlined=True)
    _hover(plot, [marks], {"step": "@step", "epoch": "@epoch", **times})
    _, row_of = _placed(frames.workers[frames.workers["state"].isin(HOLDING)])
    first = {node: row for (node, _), row in reversed(row_of.items())}
    shown = sorted(first.items())[:: -(-len(first) // NODE_LABELS)]
    plot.yaxis.ticker = [row for _, row in shown]
    plot.yaxis.major_label_overrides = {row: f"node {node}" for node, row in shown}
    plot.grid.visible = False
    _legend_above(plot)
    return plot


def _columns(frame: pd.DataFrame) -> dict[str, Any]:
    """Columns as Bokeh takes them: numbers as arrays, texts as lists."""
    numbers = frame.select_dtypes("number").columns
    return {name: frame[name].to_numpy() if name in numbers else frame[name].tolist() for name in map(str, frame)}


def _quads(
    plot: Any, data: Mapping[str, Any], colour: str, legend: str | None, *, name: str, outlined: bool = False
) -> Any:
    from bokeh.models import ColumnDataSource

    named = {} if legend is None else {"legend_label": legend}
    return plot.quad(
        left="left", right="right", bottom="bottom", top="top", source=ColumnDataSource(dict(data)), name=name,
        fill_color=colour, line_color="#7F7F7F" if outlined else None, **named,
    )  # fmt: skip


def _decisions(label: str, decisions: pd.DataFrame, x_range: Any) -> Any:
    from bokeh.models import ColumnDataSource

    calls = calls_of(decisions)
    kinds = sorted(calls["decision"].unique().tolist(), reverse=True)
    plot = _figure(60 + 20 * len(kinds), "s", x_range=x_range, y_range=kinds, zoom="width", min_border_left=90)
    plot.name = f"decisions {label}"
    source = ColumnDataSource(_columns(calls))
    marks = plot.scatter(
        "time_s", "decision", source=source, marker="dash", angle=np.pi / 2, size=12, line_color=CYCLE[1], line_width=1
    )
    lines = {"decisions": "@count x @decision", "at": "@time_s{0,0.000} s", "functions": "@function"}
    _hover(plot, [marks], {**lines, "responses": "@responses{0,0}", "detail": "@detail"})
    return plot


def stages(runs: Runs) -> Any:
    """When the stages of a typical step begin and end: medians over steps, from the step's start; they may overlap."""
    order = ("weight_sync", *STAGES[:-1])  # in the order of time
    bars: dict[str, list[tuple[Any, ...]]] = {stage: [] for stage in order}
    for index, (label, frames) in enumerate(runs.items()):
        phases = frames.phases
        begin_s = phases["start_s"] - phases["step"].map(phases[phases["stage"] == "step"].set_index("step")["start_s"])
        for lane, stage in enumerate(order):
            own = phases["stage"] == stage
            if own.any():
                left, width = float(begin_s[own].median()), float((phases["end_s"] - phases["start_s"])[own].median())
                bottom = index + 0.1 + 0.2 * lane
                bars[stage].append((label, left, left + width, bottom, bottom + 0.2))
    return _bars(
        list(runs), {_label(stage): (COLOURS[stage], each) for stage, each in bars.items()}, "s after the step began"
    )


def stacks(parts: Mapping[str, Mapping[str, float]], names: Mapping[str, tuple[str, str]], x: str) -> Any:
    """A bar a policy, stacked of *parts* in the order of *names* (label, colour)."""
    bars: dict[str, tuple[str, list[tuple[Any, ...]]]] = {label: (colour, []) for label, colour in names.values()}
    for index, (policy, values) in enumerate(parts.items()):
        left = 0.0
        for key, (label, _) in names.items():
            bars[label][1].append((policy, left, left + values[key], index + 0.15, index + 0.85))
            left += values[key]
    return _bars(list(parts), bars, x)


def _bars(labels: Sequence[str], bars: Mapping[str, tuple[str, Sequence[tuple[Any, ...]]]], x: str) -> Any:
    """Horizontal bars (label, left, right, bottom, top) by name and colour; a row a label, the first above."""
    plot = _figure(110 + 60 * len(labels), x, y_range=(len(labels), 0), x_range=_from_zero())
    renderers = []
    for name, (colour, rows) in bars.items():
        if any(row[2] > row[1] for row in rows):
            label, left, right, bottom, top = zip(*rows, strict=True)
            data = {"label": label, "left": left, "right": right, "bottom": bottom, "top": top}
            data["seconds"] = tuple(np.subtract(right, left).tolist())
            renderers.append(_quads(plot, data, colour, name, name=name))
    _hover(plot, renderers, {"": "@label", "$name": "@seconds{0,0.00}", "from": "@left{0,0.00}"})
    plot.yaxis.ticker = [index + 0.5 for index in range(len(labels))]
    plot.yaxis.major_label_overrides = {index + 0.5: label for index, label in enumerate(labels)}
    plot.ygrid.visible = False
    _legend_above(plot)
    return plot


def _from_zero() -> Any:
    from bokeh.models import DataRange1d

    return DataRange1d(start=0, range_padding=0.02)


def gpu_seconds(runs: Runs) -> Any:
    """GPU-seconds a step: busy by stage, cold, idle."""
    parts = {label: gpu_seconds_of(frames) for label, frames in runs.items()}
    return stacks(parts, {kind: (_label(kind), colour) for kind, colour in COLOURS.items()}, "GPU s/step")


def critical_means(paths: Mapping[str, pd.DataFrame]) -> Any:
    """Critical paths, means over steps."""
    parts = {label: {key: float(path[key].mean()) for key in CRITICAL} for label, path in paths.items() if len(path)}
    return stacks(parts, CRITICAL, "s/step")


def critical_steps(label: str, path: pd.DataFrame) -> Any:
    """A policy's critical path, a bar a step; tooltips name the response that the step waited for."""
    plot = _figure(300, "step", "s", y_range=_from_zero(), name=f"critical {label}")
    about = {name: path[name].tolist() for name in ("step", "prompt_id", "function", "response_tokens")}
    edges = {"left": path["step"] - 0.4, "right": path["step"] + 0.4}
    base, renderers = np.zeros(len(path)), []
    for key, (part, colour) in CRITICAL.items():
        seconds = path[key].to_numpy(dtype=float)
        if not seconds.any():
            continue
        data = {**about, **edges, "bottom": base, "top": base + seconds, "seconds": seconds}
        renderers.append(_quads(plot, data, colour, part, name=part))
        base = base + seconds
    last = {"its prompt": "@prompt_id", "its function": "@function", "its tokens": "@response_tokens{0,0}"}
    _hover(plot, renderers, {"step": "@step", "$name": "@seconds{0,0.00} s", **last})
    _legend_above(plot)
    return plot


def lines(series: Mapping[str, pd.Series[Any]], x: str, y: str) -> Any:
    """A line a policy over steps."""
    plot = _figure(300, x, y, y_range=_from_zero())
    renderers = []
    for index, (label, values) in enumerate(series.items()):
        style = {"line_color": CYCLE[index % len(CYCLE)], "line_dash": DASHES[index % len(DASHES)], "line_width": 2}
        data = {"x": values.index.to_numpy(), "y": values.to_numpy(dtype=float)}
        renderers.append(plot.line(**data, legend_label=label, name=label, **style))
    _hover(plot, renderers, {"": "$name", x: "@x", y: "@y{0,0.00}"})
    _legend_above(plot)
    return plot


def lengths(tokens: Mapping[str, Any], bins: int = 60) -> Any:
    """Histograms of response lengths over the same bins, as outlines."""
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(each) for each in tokens.values()]), bins)
    plot = _figure(300, "response tokens", "responses", y_range=_from_zero())
    renderers = []
    for index, (label, each) in enumerate(tokens.items()):
        counts, _ = np.histogram(each, edges)
        colour = CYCLE[index % len(CYCLE)]
        data = {"left": edges[:-1], "right": edges[1:], "bottom": np.zeros(bins), "top": counts}
        quads = _quads(plot, data, f"{colour}60", label, name=label)
        quads.glyph.line_color = colour
        renderers.append(quads)
    _hover(plot, renderers, {"": "$name", "tokens": "@left{0,0} to @right{0,0}", "responses": "@top{0,0}"})
    _legend_above(plot)
    return plot


def steps_of(start: float, terms: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Name, from and to of each bar of a waterfall from *start* over *terms*, but those that are 0 or its rounding."""
    bars, level = [], start
    for name, term in terms.items():
        if abs(term) > 1e-9 * start:
            bars.append((name, level, level + term))
        level += term
    return bars


def waterfall(baseline: str, policy: str, start: float, terms: Mapping[str, float], y: str) -> Any:
    """From the baseline's figure to the policy's: falling bars are what it saves."""
    from bokeh.models import ColumnDataSource

    changes = steps_of(start, terms)
    end = start + sum(terms.values())
    bars = [(baseline, 0.0, start), *((_label(name), a, b) for name, a, b in changes), (policy, 0.0, end)]
    colours = [CYCLE[-2], *(CYCLE[2] if b < a else CYCLE[1] for _, a, b in changes), CYCLE[0]]
    places = [f"{name}{' ' * index}" for index, (name, _, _) in enumerate(bars)]  # names may repeat, factors may not
    data: dict[str, Any] = {
        "place": places, "name": [bar[0] for bar in bars], "colour": colours,
        "bottom": [min(a, b) for _, a, b in bars], "top": [max(a, b) for _, a, b in bars],
        "shown": [f"{b - a:{'+' if 0 < i < len(bars) - 1 else ''},.4g}" for i, (_, a, b) in enumerate(bars)],
    }  # fmt: skip
    highest = max(max(a, b) for _, a, b in bars)
    plot = _figure(340, "", y, x_range=places, y_range=(0.0, 1.12 * highest))
    source = ColumnDataSource(data)
    quads = plot.vbar("place", 0.8, "top", "bottom", source=source, fill_color="colour", line_color=None)
    plot.text("place", "top", "shown", source=source, text_align="center", text_font_size="12px", y_offset=-3)
    _hover(plot, [quads], {"": "@name", y: "@shown"})
    plot.xaxis.major_label_orientation = 0.5
    plot.xgrid.visible = False
    return plot
