"""What a trace says, in numbers and in one picture; docs/traces.md defines each figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simrl.traces.trace import LEARNING, PREPARATION, Provenance, Trace, read_trace, whole_file

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from rich.console import RenderableType

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
NEAR_TOKENS = 50
"""The RLHFless paper counts lengths that move by fewer tokens than this between epochs (arXiv 2602.22718)."""
STAGES = {
    "generation": ("generation_s",),
    "preparation": PREPARATION,
    "learning": LEARNING,
    "weight_sync": ("weight_sync_s",),
}
RESPONSE_COLUMNS = ("step", "epoch", "prompt_id", "prompt_tokens", "response_tokens", "truncated")
"""What `info` and `draw` need of responses."""


def overview(path: Path, provenance: Provenance) -> dict[str, Any]:
    """What an import has written, as one row."""
    found = read_trace(path, ["step"])
    return {
        "name": str(path),
        "format": provenance.importer,
        "files": len(provenance.files),
        "steps": len(found.steps),
        "responses": len(found.responses),
        "skipped": provenance.skipped,
    }


def provenance_warnings(provenance: Provenance) -> tuple[str, ...]:
    """What an import must not keep to itself: guesses, bad lines, remarks."""
    guesses = [f"{name} is estimated: {how}" for name, how in provenance.estimated.items()]
    bad = f"{provenance.skipped} bad lines left out, first {'; '.join(provenance.skipped_examples)}"
    return (*guesses, *([bad] if provenance.skipped else []), *provenance.notes)


def info(trace: Trace) -> dict[str, Any]:
    """The figures of a trace; null for what it does not tell."""
    provenance, responses = trace.provenance, trace.responses
    steps = trace.steps[trace.steps["step"].notna()]
    every_step = np.union1d(steps["step"].to_numpy(float), responses["step"].dropna().to_numpy(float))
    return {
        "importer": provenance.importer,
        "files": provenance.files,
        "imported": provenance.imported,
        "skipped": provenance.skipped,
        "derived": provenance.derived,
        "estimated": provenance.estimated,
        "notes": provenance.notes,
        "steps": len(every_step),
        "first_step": int(every_step[0]) if len(every_step) else None,
        "last_step": int(every_step[-1]) if len(every_step) else None,
        "repeated_steps": int((steps["attempt"].fillna(0) > 0).sum()),
        "responses": len(responses),
        "responses_by_steps": int(steps["responses"].sum()) if steps["responses"].notna().any() else None,
        "prompts": int(responses["prompt_id"].nunique()) or None,
        "gpus": sorted({int(n) for n in steps["gpus"].dropna()}),
        "response_tokens": _distribution(responses["response_tokens"]),
        "prompt_tokens": _distribution(responses["prompt_tokens"]),
        "truncated_share": _mean(responses["truncated"]),
        "step_statistics": _step_statistics(steps),
        "spread": spread(responses),
        "stability": stability(responses),
        "stages": stages(steps),
        "rollout_bubble": bubble(steps),
    }


def _mean(column: pd.Series[Any]) -> float | None:
    values = column.dropna().to_numpy(dtype=float)
    return float(values.mean()) if values.size else None


def _distribution(column: pd.Series[Any]) -> dict[str, float] | None:
    values = column.dropna().to_numpy(dtype=float)
    if not values.size:
        return None
    quantiles = zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
    shown = {f"p{round(100 * q)}": float(value) for q, value in quantiles}
    return {"mean": float(values.mean()), "min": float(values.min()), **shown, "max": float(values.max())}


def _step_statistics(steps: pd.DataFrame) -> dict[str, float | None] | None:
    """Means over steps of what the log says of their lengths; the longest and shortest of all."""
    if not steps["response_tokens_mean"].notna().any():
        return None
    found = {name: _mean(steps[name]) for name in ("prompt_tokens_mean", "response_tokens_mean", "truncated_share")}
    for name, best in (("response_tokens_min", "min"), ("response_tokens_max", "max")):
        found[name] = float(getattr(steps[name], best)()) if steps[name].notna().any() else None
    return found


# --- spread and stability of lengths ---


def with_epochs(responses: pd.DataFrame) -> pd.DataFrame:
    """Responses of known prompts with `epoch` filled: the log's, else how many steps had the prompt before."""
    known = responses[responses["prompt_id"].notna() & responses["response_tokens"].notna()].copy()
    if known["epoch"].isna().any():
        known["epoch"] = known.groupby("prompt_id")["step"].rank("dense") - 1
        known["epoch"] = known["epoch"].fillna(0)
    return known


def spread(responses: pd.DataFrame) -> dict[str, float] | None:
    """Between- and within-prompt standard deviation of ln response tokens, and the share of the former (ICC).

    One-way random effects by analysis of variance: a group is a prompt in an epoch, levels are taken out by epoch.
    None unless some group has two responses and there are two groups.
    """
    known = with_epochs(responses)
    known = known.assign(ln=np.log(np.maximum(known["response_tokens"].to_numpy(dtype=float), 1.0)))
    known["ln"] -= known.groupby("epoch")["ln"].transform("mean")
    groups = known.groupby(["epoch", "prompt_id"])["ln"].agg(["mean", "size", "var"])
    sizes = groups["size"].to_numpy(dtype=float)
    total, count = sizes.sum(), len(groups)
    if count < 2 or total <= count:
        return None
    within = float((groups["var"].fillna(0.0).to_numpy(dtype=float) * (sizes - 1)).sum() / (total - count))
    means = groups["mean"].to_numpy(dtype=float)
    middle = (sizes * means).sum() / total
    between_square = float((sizes * (means - middle) ** 2).sum() / (count - 1))
    size = (total - (sizes**2).sum() / total) / (count - 1)
    between = max(0.0, (between_square - within) / size)
    share = between / (between + within) if between + within > 0 else 0.0
    return {
        "between_sd": math.sqrt(between),
        "within_sd": math.sqrt(within),
        "icc": float(share),
        "groups": count,
        "responses": int(total),
    }


def epoch_pairs(responses: pd.DataFrame) -> pd.DataFrame:
    """Mean response tokens of each prompt in an epoch (`before`) and in the next one (`after`)."""
    import pandas as pd

    means = with_epochs(responses).groupby(["epoch", "prompt_id"])["response_tokens"].mean().astype(float)
    if means.empty:
        return pd.DataFrame({"before": [], "after": []}, dtype=float)
    table = means.unstack("prompt_id")
    pairs = [
        pd.DataFrame({"epoch": earlier, "before": table.loc[earlier], "after": table.loc[later]}).dropna()
        for earlier, later in zip(table.index[:-1], table.index[1:], strict=True)
        if later - earlier == 1
    ]
    return pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame({"before": [], "after": []}, dtype=float)


def stability(responses: pd.DataFrame) -> dict[str, Any] | None:
    """How well one epoch's lengths tell the next one's; None when no prompt is in two epochs in a row."""
    pairs = epoch_pairs(responses)
    if pairs.empty:
        return None
    moved = (pairs["after"] - pairs["before"]).abs().to_numpy(dtype=float)
    ranks = [_spearman(pair) for _, pair in pairs.groupby("epoch")]
    known = [rank for rank in ranks if rank is not None]
    return {
        "pairs": len(pairs),
        "rank_correlation": float(np.mean(known)) if known else None,
        "share_moved_below_50_tokens": float((moved < NEAR_TOKENS).mean()),
    }


def _spearman(pair: pd.DataFrame) -> float | None:
    ranks = pair[["before", "after"]].rank().to_numpy(dtype=float)
    if len(ranks) < 3 or (ranks.std(axis=0) == 0).any():
        return None
    return float(np.corrcoef(ranks[:, 0], ranks[:, 1])[0, 1])


# --- stages ---


def stage_seconds(steps: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each stage of the steps that have any; `work` is the step without testing and checkpoints.

    Where the log has no step time, `work` is the sum of the stages.
    """
    import pandas as pd

    columns = {stage: steps[list(names)].sum(axis=1, min_count=1) for stage, names in STAGES.items()}
    table = pd.DataFrame(columns)
    extra = steps[["testing_s", "checkpoint_s"]].fillna(0.0).sum(axis=1)
    table["work"] = (steps["step_s"] - extra).fillna(table.sum(axis=1))
    table["testing"], table["checkpoint"] = steps["testing_s"], steps["checkpoint_s"]
    table["step"] = steps["step"]
    return table[table[list(STAGES)].notna().any(axis=1)]


def stages(steps: pd.DataFrame) -> dict[str, Any] | None:
    """Mean seconds and share of each stage; None when no step has a stage time."""
    table = stage_seconds(steps)
    work_s = float(table["work"].sum())
    if table.empty or work_s <= 0:
        return None
    by_stage = {
        stage: {"mean_s": float(table[stage].mean()), "share": float(table[stage].sum() / work_s)}
        for stage in STAGES
        if table[stage].notna().any()
    }
    timed = bool(steps.loc[table.index, "step_s"].notna().all())
    other_s = work_s - sum(float(table[stage].sum()) for stage in STAGES)
    return {
        "steps": len(table),
        "basis": "step time" if timed else "sum of stages",
        "work_mean_s": float(table["work"].mean()),
        **by_stage,
        **({"other": {"mean_s": other_s / len(table), "share": other_s / work_s}} if timed else {}),
        "testing_total_s": float(table["testing"].sum()),
        "checkpoint_total_s": float(table["checkpoint"].sum()),
    }


def bubble(steps: pd.DataFrame) -> dict[str, float] | None:
    """Generation that the ranks' mean does not explain: wall time - mean over ranks - reshard; None where unknown."""
    known = steps[steps["generation_s"].notna() & steps["rollout_mean_s"].notna()]
    generation_s = float(known["generation_s"].sum())
    if known.empty or generation_s <= 0:
        return None
    waiting = known["generation_s"] - known["rollout_mean_s"] - known["reshard_s"].fillna(0.0)
    return {
        "steps": len(known),
        "mean_s": float(waiting.mean()),
        "share_of_generation": float(waiting.sum() / generation_s),
    }


# --- for people ---


def of_info(figures: Mapping[str, Any]) -> RenderableType:
    """The figures as tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in figures.items():
        if value is None or value in ([], {}):
            continue
        inner = value.items() if isinstance(value, dict) else [("", value)]
        for key, item in inner:
            if item is not None:
                table.add_row(Text(f"{name}.{key}" if key else name), Text(_shown(item)))
    return Group(Text(f"{figures['importer']}: {', '.join(figures['files'][:3])}", style="bold"), table)


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_shown(item) for item in value)
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def draw(trace: Trace, path: Path) -> None:
    """One picture: lengths, lengths over steps, stages over steps, and one epoch's lengths against the next one's.

    Raises:
        TraceError: It cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    _draw_lengths(axes[0, 0], trace)
    _draw_length_over_steps(axes[0, 1], trace)
    _draw_stages(axes[1, 0], trace)
    _draw_epochs(axes[1, 1], trace)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _draw_lengths(axes: Axes, trace: Trace) -> None:
    axes.set(title="Response lengths", xlabel="tokens", ylabel="responses")
    values = trace.responses["response_tokens"].dropna().to_numpy(dtype=float)
    if values.size:
        axes.hist(values, bins=60)
    else:
        _says(axes, "no single responses in this trace")


def _draw_length_over_steps(axes: Axes, trace: Trace) -> None:
    axes.set(title="Response length over steps", xlabel="step", ylabel="tokens")
    steps = trace.steps.dropna(subset=["step", "response_tokens_mean"]).sort_values("step")
    responses = trace.responses.dropna(subset=["step"])
    if not steps.empty:
        axes.plot(steps["step"], steps["response_tokens_mean"], label="mean")
        axes.plot(steps["step"], steps["response_tokens_max"], label="longest")
    elif not responses.empty:
        by_step = responses.groupby("step")["response_tokens"]
        axes.plot(by_step.mean(), label="mean")
        axes.plot(by_step.max(), label="longest")
    else:
        _says(axes, "no lengths by step")
        return
    axes.legend()


def _draw_stages(axes: Axes, trace: Trace) -> None:
    axes.set(title="Stages, without testing and checkpoints", xlabel="step", ylabel="s")
    table = stage_seconds(trace.steps).dropna(subset=["step"]).sort_values("step")
    if table.empty:
        _says(axes, "no stage times in this trace")
        return
    shown = [stage for stage in STAGES if table[stage].notna().any()]
    axes.stackplot(table["step"], *(table[stage].fillna(0.0) for stage in shown), labels=shown)
    axes.plot(table["step"], table["work"], color="black", linewidth=0.8, label="step")
    axes.legend()


def _draw_epochs(axes: Axes, trace: Trace) -> None:
    axes.set(title="A prompt's mean length, one epoch against the next", xlabel="tokens", ylabel="tokens, next epoch")
    pairs = epoch_pairs(trace.responses)
    if pairs.empty:
        _says(axes, "no prompt is in two epochs in a row")
    else:
        axes.plot(pairs["before"], pairs["after"], ".", markersize=2, alpha=0.5)
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8)


def _says(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
