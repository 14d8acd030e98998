"""Tables for people: what the command line prints without --json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from simrl.experiments.compare import Comparison
from simrl.experiments.run import Result
from simrl.experiments.statistics import NOT_SHOWN
from simrl.traces.summary import STAGES

if TYPE_CHECKING:
    from simrl.experiments.sweep import SweepResult
    from simrl.experiments.validate import Validation

POSSIBLY_CHANCE = 0.05
"""Probability of a correlation without a relation, above which readers are told."""


def of_run(result: Result, directory: Path | None) -> RenderableType:
    """A run: what was run, where its time and GPU-seconds went, what it cost, where it is written."""
    summary, config = result.summary, result.config
    head = (
        f"{summary['policy']}: {config.job.model} on {summary['nodes']} x {config.cluster.node_type},"
        f" {summary['steps']} steps, {summary['responses']:,} responses, seed {summary['seed']}"
    )
    assumed = sum(parameter.status == "assumed" for parameter in result.parameters)
    notes = [f"{assumed} of {len(result.parameters)} parameters are assumed; see parameters.csv"]
    if directory is not None:
        notes.append(f"written to {directory}")
    tables = [_stages(summary), _states(summary), _others(summary)]
    # Text, not markup: names may hold brackets. No wrapping in the middle of a path.
    return Group(Text(head, style="bold"), *tables, *(Text(note, overflow="fold") for note in notes))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _stages(summary: Mapping[str, Any]) -> Table:
    table = _table("stage", "s/step", "GPU-s", "share")
    for stage in (*STAGES, "none"):
        seconds = "" if stage == "none" else f"{summary[f'{stage}_s']:.2f}"
        table.add_row("no stage" if stage == "none" else stage, seconds, *_gpu_seconds(summary, "stage", stage))
    table.add_row("step", f"{summary['step_s']['mean']:.2f}", f"{summary['gpu_s']:,.0f}", "", style="bold")
    return table


def _states(summary: Mapping[str, Any]) -> Table:
    table = _table("state", "GPU-s", "share")
    for state in summary["gpu_s_by"]["state"]:
        table.add_row(state, *_gpu_seconds(summary, "state", state))
    return table


def _gpu_seconds(summary: Mapping[str, Any], by: str, name: str) -> tuple[str, str]:
    gpu_s, total = summary["gpu_s_by"][by][name], summary["gpu_s"]
    return f"{gpu_s:,.0f}", f"{gpu_s / total:.1%}" if total else ""


def _others(summary: Mapping[str, Any]) -> Table:
    table = _table("", "")
    table.show_header = False
    step_s = summary["step_s"]
    table.add_row("step p50 / p95", f"{step_s['p50']:.2f} / {step_s['p95']:.2f} s")
    for key, name in (("first_epoch", "first epoch"), ("later_epochs", "later epochs")):
        if summary[key]:
            steps, seconds, gpu_s = (summary[key][k] for k in ("steps", "step_s", "gpu_s_per_step"))
            table.add_row(f"{name}, {steps} steps", f"{seconds:.2f} s, {gpu_s:,.0f} GPU-s a step")
    table.add_row("GPU-s, paper's measure", f"{summary['gpu_s_paper']:,.0f}")
    table.add_row("prefill tokens computed", f"{summary['prefill_tokens_computed']:,}")
    table.add_row("prefill tokens saved", f"{summary['prefill_tokens_saved']:,}")
    table.add_row("cold starts / migrations", f"{summary['cold_starts']:,} / {summary['migrations']:,}")
    per_million = summary["cost_usd_per_million_response_tokens"]
    table.add_row("cost", f"{summary['cost_usd']:,.2f} USD, {summary['cost_usd_per_step']:,.3f} a step")
    if per_million is not None:
        table.add_row("cost of 10^6 response tokens", f"{per_million:,.2f} USD")
    if summary["lost_functions"] or summary["lost_nodes"]:
        table.add_row("lost functions / nodes", f"{summary['lost_functions']:,} / {summary['lost_nodes']:,}")
    table.add_row("simulated / wall time", f"{summary['simulated_s']:,.0f} / {summary['wall_s']:.1f} s")
    return table


def of_comparison(comparison: Comparison, directory: Path | None, over: str = "seed") -> RenderableType:
    """A comparison paired *over* seeds or steps: a line a policy, over all steps and without the first epoch."""
    tables: list[RenderableType] = [_standings("all steps", {row["policy"]: row for row in comparison.rows})]
    if comparison.rows[0]["later_epochs"]:
        later = {row["policy"]: row["later_epochs"] for row in comparison.rows}
        tables.append(_standings("after the first epoch", later))
    pairs = len(comparison.rows[0]["responses"])
    interval = f"; 95 % intervals, paired over {over}s" if pairs > 1 else ""
    note = f"against {comparison.baseline}, {pairs} {over}{'s' if pairs > 1 else ''}{interval}"
    where = [Text(f"written to {directory}", overflow="fold")] if directory is not None else []
    robust = [] if comparison.study is None else _robustness(comparison.study.to_dict())
    return Group(*tables, Text(note), *robust, *where)


def _robustness(study: Mapping[str, Any]) -> list[RenderableType]:
    """How far a comparison depends on what is assumed."""
    names = [parameter["name"] for parameter in study["parameters"]]
    head = f"\n{len(names)} assumed parameters varied over their ranges at {study['points']} points"
    if study["impossible_points"]:
        head += f", and {study['impossible_points']} at which a policy cannot run"
    tables: list[RenderableType] = [Text(head)]
    for metric, found in study["by"].items():
        ranking, share = " < ".join(found["ranking"]), _percent(found["share_holds"])
        tables.append(Text(f"\nby {metric}: {ranking} at {share} of the points"))
        table = _table("better < worse", "holds", "ratio", "from", "to")
        for pair in found["pairs"]:
            table.add_row(Text(f"{pair['better']} < {pair['worse']}"), _percent(pair["share_holds"]), *_ratios(pair))
        tables += [table, *(Text(_flip(pair)) for pair in found["pairs"] if pair["most_related"])]
    skipped = [f"not varied: {name}: {why}" for name, why in study["skipped"].items()]
    reasons = [f"cannot run at {count} points: {why}" for why, count in study["impossible_because"].items()]
    return [*tables, *(Text(line) for line in (*reasons, *skipped))]


def _ratios(pair: Mapping[str, Any]) -> list[str]:
    return [f"{number:.3f}" for number in (pair["ratio"], *(pair["ratio_range"] or ()))]


def _flip(pair: Mapping[str, Any]) -> str:
    """What a pair's ratio depends on most, and where it flips the order."""
    related, flips = pair["most_related"], pair["most_related"]["flips"]
    goes = f"{pair['better']} < {pair['worse']} goes with {related['parameter']} ({related['rank_correlation']:+.2f})"
    if related["chance"] > POSSIBLY_CHANCE:
        goes += ", which may be chance: more points would tell"
    if not flips:
        return f"{goes}, which never flips it" if pair["share_holds"] else f"{goes}, and holds nowhere"
    return f"{goes}, flips {flips['side']} {flips['value']:.4g}, which is right at {flips['share_right']:.0%}"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def _standings(title: str, figures: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table(title, "s/step", "GPU-s/step", "speedup", "GPU-s saved")
    for policy, row in figures.items():
        speedup = _with_interval(row["speedup"], row["speedup_ci95"], "{:.3f}x") + _not_shown(row, "step_s")
        saved = _with_interval(row["gpu_s_reduction"], row["gpu_s_reduction_ci95"], "{:.1%}")
        saved += _not_shown(row, "gpu_s_per_step")
        table.add_row(Text(policy), f"{row['step_s']:.2f}", f"{row['gpu_s_per_step']:,.0f}", Text(speedup), Text(saved))
    return table


def _not_shown(row: Mapping[str, Any], metric: str) -> str:
    """A line under figures over seeds that show no difference from the baseline."""
    paired = row.get("paired")
    missing = paired and paired[metric]["p"] is not None and paired[metric]["verdict"] == NOT_SHOWN
    return f"\n{NOT_SHOWN}" if missing else ""


def _with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    shown = form.format(value)
    return shown if interval is None else f"{shown}\n[{form.format(interval[0])}, {form.format(interval[1])}]"


def of_sweep(result: SweepResult, directory: Path | None) -> RenderableType:
    """A sweep: a line a cell, over all steps and after the first epoch, and how cells and seeds spread."""
    found, cells = result.to_dict(), len(result.design.cells)
    tables: list[RenderableType] = []
    for title, table in found["tables"].items():
        if title != "first epoch":
            tables += [_cells(title, table["cells"]), *map(Text, _spread(table["standard_deviations"])), Text()]
    notes = [f"{cells} cells, the same {result.design.seeds} seeds in each; {result.computed} runs done now"]
    if result.design.seeds > 1:
        notes.append(
            "intervals: 95 %, over seeds: sampling noise alone; differences from the cell"
            f" {_point(found['reference'])}: paired by seed, corrected for all of their table (Holm)"
        )
    if directory is not None:
        notes.append(f"written to {directory}")
    return Group(*tables, *(Text(note, overflow="fold") for note in notes))


def _point(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={_cell(value)}" for path, value in values.items())


def _cells(title: str, cells: Sequence[Mapping[str, Any]]) -> Table:
    table = _table(title, "s/step", "difference", "GPU-s/step", "difference", "seeds for 1 %")
    table.columns[0].overflow = "fold"
    for cell in cells:
        row, seeds = [], []
        for metric, form in (("step_s", "{:.2f}"), ("gpu_s_per_step", "{:,.0f}")):
            paired = cell["paired"] and cell["paired"].get(metric)
            row += [_with_interval(cell[metric]["mean"], cell[metric]["ci95"], form), _difference(paired, form)]
            seeds.append(paired["seeds_for_1_percent"] if paired else None)
        needed = " / ".join(map(_cell, seeds)) if any(seeds) else ""
        table.add_row(Text(_point(cell["values"])), *map(Text, row), needed)
    return table


def _difference(paired: Mapping[str, Any] | None, form: str) -> str:
    if paired is None:
        return ""
    shown = _with_interval(paired["difference"], paired["ci95"], form.replace(":", ":+"))
    return f"{shown}\n{NOT_SHOWN}" if paired["p"] is not None and paired["verdict"] == NOT_SHOWN else shown


def _spread(deviations: Mapping[str, Mapping[str, float] | None]) -> list[str]:
    return [
        f"{metric}: standard deviation over seeds {sd['over_seeds']:.4g}; over cells, noise taken off,"
        f" {sd['over_cells']:.4g}"
        for metric, sd in deviations.items()
        if sd
    ]


def of_validation(validation: Validation, directory: Path | None) -> RenderableType:
    """Real against simulated by policy and stage: means over steps, and medians of the errors of single steps."""
    table = _table("policy", "stage", "real s", "simulated s", "error", "normalised", "repeats differ")
    spread = validation.repeat_spread.set_index(["policy", "stage"])["spread"]
    raw = validation.median_abs_error("policy")
    normalised = validation.median_abs_error("policy", normalised=True)
    means = validation.rows.groupby(["policy", "stage"], sort=False)[["real_s", "simulated_s"]].mean()
    for key, real_s, simulated_s in zip(means.index, means["real_s"], means["simulated_s"], strict=True):
        policy, stage = key
        cells = [f"{share:.1%}" for share in (raw[key], normalised[key], spread[key])]
        table.add_row(Text(policy), stage, f"{real_s:.3f}", f"{simulated_s:.3f}", *cells)
    notes = [
        "real and simulated: means over steps, of the median of the repeats; error: median over steps of"
        " |simulated / real - 1|; normalised: by a probe that tells how slow the machine was; gpu_s: GPU-seconds"
    ]
    for pair in validation.pairs():
        verdict = "the same order" if pair["agree"] else "the other order"
        notes.append(
            f"{pair['stage']} after the first step: {pair['more']} takes {pair['real_ratio']:.2f} times {pair['less']}"
            f" for real, {pair['simulated_ratio']:.2f} times simulated: {verdict}"
        )
    if directory is not None:
        notes.append(f"written to {directory}")
    return Group(table, *(Text(note, overflow="fold") for note in notes))


def of_list(title: str, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A list of the catalogue, in the layout that suits it: many rows of numbers, few rows of many, or prose."""
    if any(key in rows[0] for key in ("what", "source")):
        return Group(Text(title, style="italic"), *(_block(row) for row in rows))
    return _transposed(title, rows) if len(rows[0]) > len(rows) else _plain(title, rows)


def _plain(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for key in rows[0]:
        numbers = all(isinstance(row[key], int | float) for row in rows)
        table.add_column(key, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    return table


def _transposed(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("name")
    for row in rows:
        table.add_column(row["name"], justify="right")
    for key in list(rows[0])[1:]:
        table.add_row(key, *(Text(_cell(row.get(key))) for row in rows))
    return table


def _block(row: Mapping[str, Any]) -> RenderableType:
    """A name with its short facts on a line, and prose below it."""
    line = Text(row["name"], style="bold", overflow="fold")
    if "value" in row:
        ends = "" if row["low"] is None else f", {_cell(row['low'])} to {_cell(row['high'])}"
        line.append(f" = {_cell(row['value'])} {row['unit']} ({row['status']}{ends})", style="not bold")
    if "where" in row:
        line.append(f"  {row['where']}", style="not bold")
    prose = [row.get("what", ""), _first_sentence(row.get("source", ""))]
    return Group(line, *(Padding(Text(text), (0, 0, 0, 4)) for text in prose if text))


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z])", text, maxsplit=1)[0]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
