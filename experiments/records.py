"""Predicting published steps: `simrl validate --records FILE.csv`, and the constants fitted to the shipped ones.

    python -m simrl.experiments.records --fit      # the [class.*] sections of traces/data/parameters.toml

Every log is predicted by constants and null models fitted to the other shipped logs. Method: docs/records.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from simrl.experiments.record_file import SETTINGS, STAGES, SWITCHES, Record, by_log, read_records, shipped_records
from simrl.experiments.record_model import (
    MEAN_RANGE,
    CannotPredict,
    Constants,
    Fit,
    Nulls,
    Setting,
    fit,
    fit_nulls,
    predict_s,
    setting_of,
    shipped_fit,
    try_setting,
    with_inferred_mean,
    with_mean,
)

FITTED_ROWS = 3  # of one log, those with the shortest longest responses, to predict its others


@dataclass(frozen=True, slots=True)
class Row:
    """A stage of a record, measured and predicted.

    Attributes:
        record: Its name.
        log: Its log.
        step: Its number, None for the mean of several.
        stage: generation, log_probs, update or values.
        real_s: Measured.
        simulated_s: Predicted.
        null_tokens_s: By the model that is proportional to tokens.
        null_longest_s: By the straight line in the longest response.
        gpu_type_known: yes or inferred.
        held_out: Whether nothing of its log was fitted: always, but between the rows of one log.
        assumed: Columns and facts that the record does not have.
        null_share_s: By the model that is proportional to the longest response; between the rows of one log only.
        range_s: Predictions at both ends of an assumed mean length; None where the mean is known.
    """

    record: str
    log: str
    step: int | None
    stage: str
    real_s: float
    simulated_s: float
    null_tokens_s: float | None
    null_longest_s: float | None
    gpu_type_known: str
    held_out: bool
    assumed: tuple[str, ...]
    null_share_s: float | None = None
    range_s: tuple[float, float] | None = None

    def error(self, of: str = "simulated") -> float | None:
        """Relative error of a prediction: simulated, null_tokens, null_longest or null_share."""
        predicted: float | None = getattr(self, f"{of}_s")
        return None if predicted is None else predicted / self.real_s - 1

    def to_json(self) -> dict[str, Any]:
        """All of it, with the relative error."""
        return {
            "record": self.record, "log": self.log, "step": self.step, "stage": self.stage, "real_s": self.real_s,
            "simulated_s": self.simulated_s, "relative_error": self.error(), "null_tokens_s": self.null_tokens_s,
            "null_longest_s": self.null_longest_s, "gpu_type_known": self.gpu_type_known, "held_out": self.held_out,
            "assumed": list(self.assumed), "simulated_range_s": list(self.range_s) if self.range_s else None,
        }  # fmt: skip


PREDICTIONS: Mapping[str, str] = {
    "simulated": "simrl", "null_tokens": "null: tokens", "null_longest": "null: longest",
}  # fmt: skip


@dataclass(frozen=True)
class RecordValidation:
    """What `simrl validate --records` finds.

    Attributes:
        rows: Each log predicted from the others.
        within: Rows of one log predicted from others of the same log, whose responses were shorter.
        skipped: Records without a prediction, and why.
    """

    rows: tuple[Row, ...]
    within: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]

    def median_abs_error(self, of: str = "simulated", keep: Callable[[Row], bool] = lambda _: True) -> dict[str, float]:
        """By stage, over logs, of the median within each log of |relative error|: one vote a log."""
        errors = [(row.stage, row.log, abs(e)) for row in self.rows if keep(row) and (e := row.error(of)) is not None]
        by_log = pd.DataFrame(errors, columns=["stage", "log", "error"]).groupby(["stage", "log"]).error.median()
        medians = by_log.groupby("stage").median()
        return {stage: float(medians[stage]) for stage in STAGES if stage in medians}

    def logs(self, keep: Callable[[Row], bool] = lambda _: True) -> dict[str, int]:
        """Number of logs by stage."""
        logs = {stage: {row.log for row in self.rows if row.stage == stage and keep(row)} for stage in STAGES}
        return {stage: len(names) for stage, names in logs.items() if names}

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        kinds = {kind: _of_kind(kind) for kind in ("yes", "inferred")}
        return {
            "rows": [row.to_json() for row in self.rows],
            "median_abs_error": self.median_abs_error(),
            "median_abs_error_by_null": {
                name.removeprefix("null_"): self.median_abs_error(name) for name in ("null_tokens", "null_longest")
            },
            "n": self.logs(),
            "median_abs_error_by_gpu_type_known": {k: self.median_abs_error(keep=keep) for k, keep in kinds.items()},
            "n_by_gpu_type_known": {kind: self.logs(keep) for kind, keep in kinds.items()},
            "within_log": [
                row.to_json() | {"null_share_s": row.null_share_s} for row in self.within
            ],
            "skipped": [{"record": name, "reason": reason} for name, reason in self.skipped],
        }  # fmt: skip


def _of_kind(kind: str) -> Callable[[Row], bool]:
    return lambda row: row.gpu_type_known == kind


def validate_records(path: Path) -> RecordValidation:
    """Predict a file's records, each log by constants fitted to the other shipped logs.

    Raises:
        ConfigError: The file cannot be read, or a field is not what its column allows.
    """
    return validate(read_records(path), shipped_records())


def validate(records: Sequence[Record], shipped: Sequence[Record], *, by_source: bool = False) -> RecordValidation:
    """As `validate_records`. Steps that are shipped of a log in *records* are predicted with it.

    With *by_source* all logs of the same repository are left out together.
    """
    copies = _copies(records, shipped)
    whole = fit(shipped) if any(copies.values()) else Fit()
    skipped = []
    rows: list[Row] = []
    for log, members in by_log(records).items():
        same = copies[log]
        copied = set(same)
        if by_source:
            same |= {record.log for record in shipped if record.log.split()[0] == log.split()[0]}
        others = [record for record in shipped if record.log not in same]
        fitted = whole.without(same) if same else shipped_fit()
        nulls = fit_nulls(others)
        steps = [
            r for r in shipped if r.log in copied and r.step is not None and r.name not in {m.name for m in members}
        ]
        for record in (*(_completed(member, shipped, copied) for member in members), *steps):
            try:
                rows += _rows(record, log, fitted, nulls)
            except CannotPredict as reason:
                skipped.append((record.name, str(reason)))
    return RecordValidation(tuple(rows), tuple(_within_logs(records)), tuple(skipped))


def _completed(record: Record, shipped: Sequence[Record], same: set[str]) -> Record:
    """What a record of a shipped log does not say of its settings is as in the log's others."""
    numbers, texts = dict(record.numbers), dict(record.texts)
    for other in (r for r in shipped if r.log in same):
        known = (*SETTINGS, "prompts_per_step", "responses_per_prompt")
        numbers = {column: other.numbers[column] for column in known if column in other.numbers} | numbers
        texts |= {column: other.texts[column] for column in ("date", *SWITCHES) if not texts[column]}
        if other.texts["engine"].startswith(texts["engine"]):
            texts["engine"] = other.texts["engine"]
    return replace(record, texts=texts, numbers=numbers)


def _copies(records: Sequence[Record], shipped: Sequence[Record]) -> dict[str, set[str]]:
    """By log, the shipped logs that it is or has a record of, by name or by its measured times."""
    by_name = {record.name: record.log for record in shipped}
    by_times = {record.measured: record.log for record in shipped}
    names = {record.log for record in shipped}
    return {
        log: ({log} & names)
        | {by_name[r.name] for r in members if r.name in by_name}
        | {by_times[r.measured] for r in members if r.measured in by_times}
        for log, members in by_log(records).items()
    }


def _rows(record: Record, log: str, fitted: Fit, nulls: Nulls) -> Iterable[Row]:
    setting = setting_of(record)
    constants = fitted.constants(setting)
    known = "inferred" if record.texts["gpu_type_known"].lower().startswith("inferred") else "yes"
    for stage in STAGES:
        real_s = record.seconds(stage)
        if real_s is not None:
            likely = with_inferred_mean(setting, stage, constants)
            tokens_s, longest_s = nulls.seconds(likely, stage)
            yield Row(
                record.name, log, record.step, stage, real_s, predict_s(likely, stage, constants), tokens_s,
                longest_s, known, held_out=True, assumed=setting.assumed, range_s=_range_s(likely, stage, constants),
            )  # fmt: skip


def _range_s(setting: Setting, stage: str, constants: Constants) -> tuple[float, float] | None:
    if "response_mean_tokens" not in setting.assumed:
        return None
    low_s, high_s = (predict_s(with_mean(setting, factor), stage, constants) for factor in MEAN_RANGE)
    return low_s, high_s


def _within_logs(records: Sequence[Record]) -> Iterable[Row]:
    """Generation of each log's rows with the longest responses, from its `FITTED_ROWS` with the shortest."""
    for log, members in by_log(records).items():
        rows = [r for r in members if r.knows_lengths and r.seconds("generation") and r.step is None]
        rows.sort(key=lambda record: record.numbers["response_max_tokens"])
        longest = [record.numbers["response_max_tokens"] for record in rows]
        if len(rows) <= FITTED_ROWS or longest[-1] == longest[FITTED_ROWS - 1] or try_setting(rows[0]) is None:
            continue
        few, rest = rows[:FITTED_ROWS], rows[FITTED_ROWS:]
        fitted, nulls = fit(few), fit_nulls(few)
        ratio = statistics.median(r.numbers["gen_s"] / r.numbers["response_max_tokens"] for r in few)
        for record in rest:
            setting: Setting = setting_of(record)
            tokens_s, longest_s = nulls.seconds(setting, "generation")
            yield Row(
                record.name, log, record.step, "generation", record.numbers["gen_s"],
                predict_s(setting, "generation", fitted.constants(setting)), tokens_s, longest_s,
                record.texts["gpu_type_known"], held_out=False, assumed=setting.assumed,
                null_share_s=ratio * record.numbers["response_max_tokens"],
            )  # fmt: skip


# --- printing ---


def of_records(found: RecordValidation) -> RenderableType:
    """Tables of rows, medians and the predictions within logs, and what was skipped."""
    parts: list[RenderableType] = [_rows_table(found), Text(""), _medians_table(found)]
    if found.within:
        parts += [Text(""), _within_table(found)]
    parts += [Text(f"skipped {name}: {reason}", overflow="fold") for name, reason in found.skipped]
    notes = [
        f"each log is predicted by constants and null models fitted to the other shipped logs; * = {ASSUMED}",
        f"range: predictions at {MEAN_RANGE[0]} and {MEAN_RANGE[1]} times the assumed mean length",
        "medians: of |predicted / measured - 1|, within each log, then over logs",
    ]
    if any(row.step is not None for row in found.rows):
        notes.append("steps of one log share a line: medians over them")
    return Group(*parts, *(Text(note, overflow="fold") for note in notes))


ASSUMED = "mean or longest response is not known and assumed"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("record", "stage", "GPUs") else "right", overflow="fold")
    return table


def _rows_table(found: RecordValidation) -> Table:
    table = _table("record", "stage", "measured s", "predicted s", "error", "tokens", "longest", "range s")
    table.title, table.title_justify = "errors of the prediction and of two null models", "left"
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in found.rows:
        groups.setdefault((row.record if row.step is None else row.log, row.stage), []).append(row)
    for (name, stage), rows in groups.items():
        steps = "" if rows[0].step is None else f": {len(rows)} steps"
        mark = "*" if any("response_" in what for what in rows[0].assumed) else ""
        seconds = [statistics.median(getattr(row, f"{of}_s") for row in rows) for of in ("real", "simulated")]
        errors = [_share(_median(row.error(of) for row in rows)) for of in PREDICTIONS]
        low_s, high_s = rows[0].range_s or (None, None)
        span = "" if low_s is None else f"{low_s:.0f} - {high_s:.0f}"
        table.add_row(Text(name + steps + mark), stage, *(f"{s:.1f}" for s in seconds), *errors, span)
    return table


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:+.0%}"


def _medians_table(found: RecordValidation) -> Table:
    table = _table("stage", "GPUs", "logs", *PREDICTIONS.values())
    table.title, table.title_justify = "median absolute relative error, one vote a log", "left"
    kinds: dict[str, Callable[[Row], bool]] = {
        "all": lambda _: True, "type known": _of_kind("yes"), "type inferred": _of_kind("inferred"),
    }  # fmt: skip
    for stage in STAGES:
        for kind, keep in kinds.items():
            logs = found.logs(keep).get(stage)
            if logs:
                medians = (found.median_abs_error(of, keep).get(stage) for of in PREDICTIONS)
                table.add_row(stage, kind, str(logs), *("" if m is None else f"{m:.1%}" for m in medians))
    return table


def _within_table(found: RecordValidation) -> Table:
    table = _table("record", "measured s", "predicted s", "error", "tokens", "longest", "share of longest")
    table.title = f"generation, from the {FITTED_ROWS} rows of the same log with the shortest longest responses"
    table.title_justify = "left"
    for row in found.within:
        errors = (_share(row.error(of)) for of in (*PREDICTIONS, "null_share"))
        table.add_row(Text(row.record), f"{row.real_s:.1f}", f"{row.simulated_s:.1f}", *errors)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the shipped records' validation, or with --fit the sections of the parameter table that they give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--by-source", action="store_true", help="leave out all logs of a repository together")
    given, shipped = parser.parse_args(arguments), shipped_records()
    if given.fit:
        print(fit(shipped).to_toml())
    else:
        Console().print(of_records(validate(shipped, shipped, by_source=given.by_source)))


if __name__ == "__main__":
    main()
