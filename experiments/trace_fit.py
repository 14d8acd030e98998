"""`simrl trace fit`: from a file of lengths to a workload file, and the fit for people to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simrl.traces.fit import FitError
from simrl.traces.length_tables import lengths_of
from simrl.traces.lengths import parse_workload
from simrl.traces.trace import check_output, whole_file
from simrl.traces.workloads import ANY_TASK, choose, parse_share, plot, summary, workload_toml

if TYPE_CHECKING:
    from rich.console import RenderableType


def fit_workload(
    source: Path,
    output: Path,
    *,
    groups: Sequence[str] = (),
    cap: int | None = None,
    between_share: str | None = None,
    template_tokens: int = 0,
    steps_per_epoch: int | None = None,
    picture: Path | None = None,
    attribution: str = "",
    on_fit: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Fit, write the workload file and the plot, and return the figures.

    Raises:
        TraceError: If the lengths cannot be read or fitted, or a file cannot be written.
    """
    if template_tokens < 0:
        raise FitError(f"template_tokens={template_tokens} must be >= 0 (--template-tokens)")
    share = ANY_TASK if between_share is None else parse_share(between_share)
    for path in (output, picture):
        if path is not None:
            check_output(path)
    table = lengths_of(source, groups, cap, steps_per_epoch)
    if not table.prompt_tokens:
        raise FitError(f"{source}: no prompt_tokens: a workload needs the lengths of prompts")
    choice = choose(table, share, on_fit)
    text = workload_toml(choice, template_tokens, attribution)
    model = parse_workload(text, str(output))
    with whole_file(output) as file:
        file.write_text(text, encoding="utf-8")
    if picture is not None:
        plot(choice, model, picture)
    return summary(choice, model)


def of_fit(figures: Mapping[str, Any]) -> RenderableType:
    """The fit as tables."""
    from rich.console import Group
    from rich.table import Table

    told = f"{figures['origin']}: {figures['responses']} responses of {figures['prompts']} prompts, "
    told += f"{figures['truncated']} truncated" + (f" at {figures['cap']} tokens" if figures["truncated"] else "")
    parameters = Table("parameter", "value", "low", "high", "unit", "status", title=f"chosen: {figures['form']}")
    for name, row in figures["parameters"].items():
        parameters.add_row(name, *(_number(row[k]) for k in ("value", "low", "high")), row["unit"], row["status"])
    forms = Table("form", "parameters", "ln L", "BIC", "held-out ln L", title="forms, by BIC")
    for row in figures["candidates"]:
        held_out = row.get("held_out_ln_likelihood")
        forms.add_row(
            row["form"], str(row["parameters"]), f"{row['ln_likelihood']:.1f}", f"{row['bic']:.1f}",
            "" if held_out is None else f"{held_out:.1f}",
        )  # fmt: skip
    checks = Table("", "measured", "drawn", "95 % of data sets drawn", title="measured beside drawn")
    for row in figures["measured_beside_drawn"]:
        checks.add_row(
            row["what"], _number(row["measured"]), _number(row["drawn"]), f"{row['low']:.4g} to {row['high']:.4g}"
        )
    return Group(told, *(f"note: {note}" for note in figures["notes"]), parameters, forms, checks)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
