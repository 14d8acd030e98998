"""Pictures of runs and sweeps: functions that draw a frame onto matplotlib axes, for notebooks and papers.

Each takes `axes`, by default pyplot's current ones, and returns them. Save as PDF or SVG for vectors. Colours are Okabe
and Ito's, which colour-blind readers tell apart; greys are half transparent and so fit light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from simrl.traces.summary import HOLDING, STAGES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from simrl.traces.records import Frames

COLOURS = {
    "generation": "#0072B2", "preparation": "#E69F00", "learning": "#009E73", "weight_sync": "#CC79A7",
    "cold": "#7F7F7FC0", "idle": "#7F7F7F40",
}  # fmt: skip
"""Of busy GPUs by stage, and of the other states that hold GPUs; Okabe and Ito's palette."""
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#7F7F7F", "#F0E442")
DARK_CYCLE = ("#56B4E9", *CYCLE[1:])
"""For runs and policies; on dark pages with sky blue for blue."""
LABELS = {"weight_sync": "weight sync"}
PACKED_ROWS = 40
"""Rows of a timeline from which on they have no gaps, which would be thinner than a pixel."""
NUMBERED_CELLS = 150
"""Cells of a heat map up to which each has its number."""
VECTOR_SPANS = 20_000
"""A timeline of more spans than this is a picture inside a vector file, which would be too large otherwise."""


@contextmanager
def theme(dark: bool = False) -> Iterator[None]:
    """Matplotlib's settings of our figures while the block runs."""
    import matplotlib as mpl
    from matplotlib.rcsetup import cycler

    ink, paper, faint = ("#E6E6E6", "#14171A", "#E6E6E630") if dark else ("#222222", "white", "#22222220")
    settings: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        "axes.prop_cycle": cycler(color=list(DARK_CYCLE if dark else CYCLE)),
        "axes.grid": True, "axes.axisbelow": True, "grid.color": faint,
        "axes.titlelocation": "left", "axes.titlesize": "medium", "font.size": 9, "svg.hashsalt": "simrl",
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield
        interactive = mpl.is_interactive()
    mpl.interactive(interactive)  # a notebook's backend, which the first figure loads, turns it on to show figures


def legend_above(axes: Axes) -> None:
    """A legend in one line above *axes*, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(COLOURS), borderaxespad=0.2, fontsize="small")


def gantt(
    workers: pd.DataFrame,
    axes: Axes | None = None,
    *,
    by: Literal["gpu", "function"] = "gpu",
    start_s: float = 0.0,
    end_s: float | None = None,
) -> Axes:
    """What each GPU or function did: busy by stage, idle, cold; white where nothing was held.

    Args:
        workers: Frame of a run.
        axes: To draw on.
        by: What a row is; a function's row is as high for any number of GPUs.
        start_s: First moment to show, which becomes 0.
        end_s: Last one; None: of the run.
    """
    from matplotlib.collections import PolyCollection

    axes = _axes(axes)
    end_s = float(workers["end_s"].max()) if end_s is None else end_s
    shown = (workers["start_s"] < end_s) & (workers["end_s"] > start_s) & workers["state"].isin(HOLDING)
    rows = _by_gpu(workers[shown]) if by == "gpu" else workers[shown].assign(row=workers["function"])
    names = sorted(rows["row"].unique().tolist())
    place = rows["row"].map({name: index for index, name in enumerate(names)}).to_numpy(dtype=float)
    left = np.maximum(rows["start_s"].to_numpy(dtype=float), start_s) - start_s
    right = np.minimum(rows["end_s"].to_numpy(dtype=float), end_s) - start_s
    half = 0.5 if len(names) >= PACKED_ROWS else 0.45
    edges = ((left, -half), (left, half), (right, half), (right, -half))
    corners = np.stack([np.stack([x, place + y], axis=1) for x, y in edges], axis=1)
    kind = _use(rows).to_numpy()
    for name, colour in COLOURS.items():
        if (kind == name).any():
            spans = PolyCollection(
                list(corners[kind == name]), facecolors=colour, linewidths=0, label=_label(name),
                rasterized=len(rows) > VECTOR_SPANS,
            )  # fmt: skip
            axes.add_collection(spans)
    axes.set(xlim=(0, end_s - start_s), ylim=(len(names) - 0.4, -0.6), xlabel="s")
    _row_labels(axes, names)
    axes.grid(visible=False)
    return axes


def _by_gpu(held: pd.DataFrame) -> pd.DataFrame:
    """A row each GPU of each interval; rows sort by node, then GPU."""
    import pandas as pd

    each = held.assign(gpu=held["gpu_ids"].str.split(",")).explode("gpu")
    rows = list(zip(each["node"].astype(int).tolist(), each["gpu"].astype(int).tolist(), strict=True))
    return each.assign(row=pd.Series(rows, index=each.index, dtype=object))


def _row_labels(axes: Axes, names: Sequence[Any]) -> None:
    """Names of functions; of GPUs the node's, at its first GPU."""
    if names and isinstance(names[0], tuple):
        first = {node: index for index, (node, _) in reversed(list(enumerate(names)))}
        axes.set_yticks([first[node] for node in sorted(first)], [f"node {node}" for node in sorted(first)])
    else:
        axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelsize="x-small", length=0)


def _use(workers: pd.DataFrame) -> pd.Series[Any]:
    """What an interval that holds GPUs is: the stage if busy, else its state; a key of COLOURS."""
    return workers["stage"].where(workers["state"] == "busy", workers["state"])


def stages(runs: Mapping[str, Frames], axes: Axes | None = None) -> Axes:
    """When the stages of a typical step begin and end: medians over steps, from the step's start; they may overlap."""
    axes = _axes(axes)
    for index, frames in enumerate(runs.values()):
        phases = frames.phases
        starts = phases[phases["stage"] == "step"].set_index("step")["start_s"]
        begin = phases["start_s"] - phases["step"].map(starts)
        length = phases["end_s"] - phases["start_s"]
        for lane, stage in enumerate(("weight_sync", *STAGES[:-1])):  # in the order of time
            own = phases["stage"] == stage
            if own.any():
                left, width = float(begin[own].median()), float(length[own].median())
                label = _label(stage) if index == 0 else None
                y = index + (lane - 1.5) * 0.2
                axes.barh(y, width, 0.2, left, color=COLOURS[stage], label=label)
                axes.text(left + width, y, f" {width:.3g}", va="center", size="x-small")
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set(xlabel="s after the step's prompts came, medians", ylim=(len(runs) - 0.5, -0.5))
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    legend_above(axes)
    return axes


def lengths(samples: pd.DataFrame, axes: Axes | None = None, *, label: str | None = None) -> Axes:
    """How many tokens responses have, with the median, the 95th percentile and the share that was truncated."""
    axes = _axes(axes)
    tokens = samples["response_tokens"].to_numpy(dtype=float)
    axes.hist(tokens, bins=min(80, max(10, int(np.sqrt(len(tokens))))), alpha=0.7, label=label)
    ink = axes.yaxis.label.get_color()
    for share, style in ((50, "--"), (95, ":")):
        value = float(np.percentile(tokens, share))
        axes.axvline(value, color=ink, linewidth=1, linestyle=style, label=f"p{share}: {value:,.0f}")
    axes.set(xlabel="response tokens", ylabel="responses")
    axes.legend(title=f"{samples['truncated'].mean():.1%} truncated")
    return axes


def actors(frames: Frames, axes: Axes | None = None, *, label: str | None = None) -> Axes:
    """Functions that generated in each step: those busy with generation between its first and last activity."""
    axes = _axes(axes)
    axes.plot(actors_of(frames), marker=".", label=label)
    axes.set(xlabel="step", ylabel="functions that generate", ylim=(0, None))
    return axes


def actors_of(frames: Frames) -> pd.Series[int]:
    """Functions busy with generation between its first and last activity, by step."""
    import pandas as pd

    phases = frames.phases[frames.phases["stage"] == "generation"]
    busy = frames.workers[(frames.workers["state"] == "busy") & (frames.workers["stage"] == "generation")]
    counts = [
        busy.loc[(busy["start_s"] < end_s) & (busy["end_s"] > start_s), "function"].nunique()
        for start_s, end_s in zip(phases["start_s"], phases["end_s"], strict=True)
    ]
    return pd.Series(counts, index=phases["step"].to_numpy(), dtype=int)


def tail(samples: pd.DataFrame, axes: Axes | None = None, *, share: float = 0.9, label: str | None = None) -> Axes:
    """Seconds of each step's generation between a share of its responses and the last one."""
    axes = _axes(axes)
    axes.plot(tail_s_of(samples, share), marker=".", label=label)
    axes.set(xlabel="step", ylabel=f"s from {share:.0%} finished to all", ylim=(0, None))
    return axes


def tail_s_of(samples: pd.DataFrame, share: float = 0.9) -> pd.Series[float]:
    """Seconds between *share* of a step's responses and its last one, by step."""
    finished = samples.groupby("step")["finished_s"]
    return finished.max() - finished.quantile(share)


def gpu_seconds(
    runs: Mapping[str, Frames], axes: Axes | None = None, *, cost_usd: Mapping[str, float] | None = None
) -> Axes:
    """GPU-seconds a step: busy by stage, idle, cold; they add up to `gpu_s_per_step`.

    Args:
        runs: Frames by name.
        axes: To draw on.
        cost_usd: `cost_usd_per_step` by name, written beside the bars.
    """
    axes = _axes(axes)
    left = np.zeros(len(runs))
    parts = [gpu_seconds_of(frames) for frames in runs.values()]
    for name, colour in COLOURS.items():
        width = np.array([part[name] for part in parts])
        axes.barh(list(runs), width, 0.6, left, color=colour, label=_label(name))
        left += width
    for index, run in enumerate(runs):
        cost = f"  {cost_usd[run]:,.3g} USD" if cost_usd else ""
        axes.text(left[index], index, f" {left[index]:,.0f}{cost}", va="center", size="small")
    axes.set(xlabel="GPU s/step", xlim=(0, left.max() * (1.3 if cost_usd else 1.15)))
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    legend_above(axes)
    return axes


def gpu_seconds_of(frames: Frames) -> dict[str, float]:
    """GPU-seconds a finished step, by the keys of `COLOURS`."""
    held = frames.workers[frames.workers["state"].isin(HOLDING)]
    gpu_s = held["gpus"] * (held["end_s"] - held["start_s"])
    sums = gpu_s.groupby(_use(held)).sum() / (frames.phases["stage"] == "step").sum()
    return {name: float(sums.get(name, 0.0)) for name in COLOURS}


def heat_map(results: pd.DataFrame, x: str, y: str, value: str, axes: Axes | None = None) -> Axes:
    """The mean of *value* over all rows with the same *x* and *y*, as a colour and a number.

    Args:
        results: A row a run, as of a sweep.
        x: Column of a parameter.
        y: Likewise.
        value: Column of a figure, as `gpu_s_per_step`.
        axes: To draw on.
    """
    axes = _axes(axes)
    table = results.pivot_table(index=y, columns=x, values=value, aggfunc="mean")
    means = table.to_numpy(dtype=float)
    image = axes.imshow(means, origin="lower", aspect="auto", cmap="cividis")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    size = "small" if means.size <= 40 else "xx-small"
    for (row, column), mean in np.ndenumerate(means):
        if means.size <= NUMBERED_CELLS and np.isfinite(mean):
            ink = "white" if mean < middle else "black"
            axes.text(column, row, f"{mean:.4g}", ha="center", va="center", color=ink, size=size)
    columns, rows = (
        [f"{at:.4g}" if isinstance(at, float) else str(at) for at in axis] for axis in (table, table.index)
    )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label=value)
    return axes


def pareto(
    results: pd.DataFrame,
    by: Sequence[str],
    axes: Axes | None = None,
    *,
    x: str = "step_s.mean",
    y: str = "gpu_s_per_step",
    label: str | None = None,
) -> Axes:
    """Settings by two figures of which less is better, means over seeds, and the front of those that none beats."""
    axes = _axes(axes)
    cells = results.groupby(list(by))[[x, y]].mean().reset_index()
    front = pareto_front(cells, x, y)
    (line,) = axes.step(front[x], front[y], where="post", marker="o", markersize=5, label=label or "front")
    axes.plot(cells[x], cells[y], ".", color=line.get_color(), alpha=0.45, zorder=1)
    axes.set(xlabel=x, ylabel=y)
    axes.legend()
    return axes


def pareto_front(cells: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Rows that no other row beats in one of two figures without being worse in the other, by *x*; less is better.

    Of equal rows the first stands for all.
    """
    ordered = cells.sort_values([x, y], kind="stable")
    best_before = ordered[y].astype(float).cummin().shift(fill_value=np.inf)
    return ordered[ordered[y] < best_before]


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    from matplotlib import pyplot as plt  # keeps every figure until it is closed: only where none is given

    return plt.gca()


def _label(name: str) -> str:
    return LABELS.get(name, name)
