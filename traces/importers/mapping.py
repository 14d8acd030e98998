"""Mappings: which key of a framework's log is which column of a trace; one TOML file a framework."""

from __future__ import annotations

import tomllib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

from simrl.traces.importers.reading import CONSOLE, Numbered, Reading, Record, flat, records, same
from simrl.traces.parameters import did_you_mean
from simrl.traces.trace import COLUMNS, Row, TraceError, checked

_KEYS = ("framework", "seen", "source", "rows", "console", "records", "number_records", "fields")
_OWN = ("kind", "file", "line", "attempt", "metrics")
_WINDOW_STEPS = 64


@dataclass(frozen=True, slots=True)
class Field:
    """Where a column comes from.

    Attributes:
        keys: Names that a log may have for it; the first that is there counts.
        factor: What its number is multiplied with, for another unit.
    """

    keys: tuple[str, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class KeyMapping:
    """How a framework's log becomes a trace.

    Attributes:
        framework: Its name.
        seen: Whether the mapping was tried on a real log.
        source: Where the keys are from.
        rows: `step` or `response`.
        console: Form of its console lines, a key of `reading.CONSOLE`.
        records: Where its JSON documents have the list of records.
        number_records: Number records by their order when they name no step.
        fields: Where each column comes from.
    """

    framework: str
    seen: str
    source: str
    rows: str
    console: str
    records: str | None
    number_records: bool
    fields: dict[str, Field]

    @cached_property
    def keys(self) -> frozenset[str]:
        """All keys of logs that it knows."""
        return frozenset(key for field in self.fields.values() for key in field.keys)

    def row(self, record: Record) -> Row:
        """The columns that *record* gives, and the record itself as `metrics`.

        Raises:
            ValueError: Two names of one column disagree, or a number is none.
        """
        found: Row = {"metrics": record}
        for column, field in self.fields.items():
            value = _value(record, column, field)
            if value is not None:
                found[column] = value
        return found


def _value(record: Record, column: str, field: Field) -> Any:
    present = [key for key in field.keys if record.get(key) is not None]
    if not present:
        return None
    value = record[present[0]]
    for other in present[1:]:
        if not same(record[other], value):
            raise ValueError(
                f"{present[0]}={value} and {other}={record[other]} disagree: both mean {column}, and a record has one"
            )
    if field.factor == 1.0:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{present[0]}={value!r} must be a number")
    try:
        return value * field.factor
    except OverflowError:
        raise ValueError(f"{present[0]} is too large") from None


def shipped_mappings() -> list[str]:
    """Names of the mappings that come with simrl."""
    folder = resources.files("simrl.traces").joinpath("data/mappings")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_mapping(name_or_path: str) -> KeyMapping:
    """The shipped mapping of that name, or the one in a TOML file.

    Raises:
        TraceError: There is none, or it is malformed; it names the file and the key.
    """
    if name_or_path in shipped_mappings():
        shipped = resources.files("simrl.traces").joinpath(f"data/mappings/{name_or_path}.toml")
        return parse_mapping(shipped.read_text(encoding="utf-8"), f"mapping {name_or_path!r}")
    try:
        return parse_mapping(Path(name_or_path).read_text(encoding="utf-8"), name_or_path)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"mapping {name_or_path!r} cannot be read: {error}") from None


def parse_mapping(text: str, origin: str) -> KeyMapping:
    """A mapping from TOML text; *origin* names it in errors.

    Raises:
        TraceError: It is not TOML, or a key is missing, unknown or of the wrong kind.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TraceError(f"{origin}: not TOML: {error}") from None
    _known(table, _KEYS, "", origin)
    fields = table.get("fields")
    if not isinstance(fields, dict) or not fields:
        raise TraceError(f"{origin}: [fields] must name at least one column")
    columns = [name for name in COLUMNS if name not in _OWN]
    _known(fields, columns, "fields.", origin)
    rows, console = table.get("rows", "step"), table.get("console", "pairs")
    for key, value, allowed in (("rows", rows, ("step", "response")), ("console", console, tuple(CONSOLE))):
        if value not in allowed:
            raise TraceError(f"{origin}: {key}={value!r} must be one of {', '.join(allowed)}")
    needed = "step" if rows == "step" else "response_tokens"
    if needed not in fields:
        raise TraceError(f"{origin}: fields.{needed} is missing: a {rows} needs it")
    return KeyMapping(
        framework=_text(table, "framework", Path(origin).stem, origin),
        seen=_text(table, "seen", "", origin),
        source=_text(table, "source", "", origin),
        rows=rows,
        console=console,
        records=_text(table, "records", "", origin) or None,
        number_records=table.get("number_records") is True,
        fields={name: _field(name, entry, origin) for name, entry in fields.items()},
    )


def _known(table: dict[str, Any], allowed: list[str] | tuple[str, ...], where: str, origin: str) -> None:
    for key in table:
        if key not in allowed:
            hint = did_you_mean(key, allowed)
            raise TraceError(f"{origin}: unknown key {where}{key}{hint}; known: {', '.join(allowed)}")


def _text(table: dict[str, Any], key: str, default: str, origin: str) -> str:
    value = table.get(key, default)
    if not isinstance(value, str):
        raise TraceError(f"{origin}: {key}={value!r} must be a text")
    return value


def _field(name: str, entry: object, origin: str) -> Field:
    """A field from "key", ["key", "older key"] or {keys = ..., factor = 0.001}."""
    keys: object = entry
    factor: object = 1.0
    if isinstance(entry, dict):
        _known(entry, ("keys", "factor"), f"fields.{name}.", origin)
        keys, factor = entry.get("keys"), entry.get("factor", 1.0)
    keys = [keys] if isinstance(keys, str) else keys
    if not isinstance(keys, list) or not keys or not all(isinstance(key, str) and key for key in keys):
        raise TraceError(f"{origin}: fields.{name} must be a key or a list of keys of the log")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise TraceError(f"{origin}: fields.{name}.factor={factor!r} must be a number > 0")
    return Field(tuple(keys), float(factor))


def mapped_rows(mapping: KeyMapping, paths: Iterable[Path], reading: Reading) -> Iterator[tuple[Path, int, Row]]:
    """Rows of logs that *mapping* describes, with file and line; numbers are not checked yet.

    Raises:
        TraceError: A file cannot be read, or a line is bad and bad lines are not skipped.
    """
    ordinals, steps = count(1), _Steps(mapping, reading)
    for path in paths:
        lines = records(path, mapping.console, mapping.records, mapping.keys, reading)
        if mapping.rows == "response":
            yield from ((path, line, row) for line, row in _rows(mapping, path, lines, reading))
            continue
        for line, row in _rows(mapping, path, lines, reading):
            if mapping.number_records and "step" not in row and len(row) > 2:
                row["step"] = next(ordinals)
                reading.note("records that name no step are numbered in their order")
            yield from steps.add(path, line, row)
        yield from steps.rest()


def _rows(mapping: KeyMapping, path: Path, lines: Iterator[Numbered], reading: Reading) -> Iterator[tuple[int, Row]]:
    for line, record in lines:
        try:
            row = {**mapping.row(flat(record)), "kind": mapping.rows}
            if mapping.rows == "step":
                checked(row)  # each line by itself, before those of a step are put together
                if "step" not in row and not mapping.number_records:
                    raise ValueError(f"no step: there is no {' or '.join(mapping.fields['step'].keys)}")
        except ValueError as error:
            reading.bad(path, line, str(error))
            continue
        yield line, row


class _Steps:
    """Puts the lines of a step together.

    Lines of one step add to each other. When a line gives a key another value, the step was done again, after a
    restart from a checkpoint: it is kept as another attempt.
    """

    def __init__(self, mapping: KeyMapping, reading: Reading) -> None:
        self._mapping = mapping
        self._reading = reading
        self._open: OrderedDict[int, tuple[Path, int, Row]] = OrderedDict()
        self._attempts: dict[int, int] = {}

    def add(self, path: Path, line: int, row: Row) -> Iterator[tuple[Path, int, Row]]:
        """Take a line's row; yields rows that are complete."""
        if "step" not in row:
            yield path, line, row
            return
        step = int(row["step"])
        if step in self._open:
            merged = _merged(self._open[step][2]["metrics"], row["metrics"])
            if merged is not None:
                self._extend(step, merged, path, line)
                return
            yield self._closed(step)
        if step in self._attempts:
            self._reading.note(f"{path.name}:{line}: step {step} comes again, and is kept as another attempt")
        self._open[step] = (path, line, row)
        if len(self._open) > _WINDOW_STEPS:
            yield self._closed(next(iter(self._open)))

    def _extend(self, step: int, metrics: Record, path: Path, line: int) -> None:
        first_path, first_line, row = self._open[step]
        try:
            self._open[step] = (first_path, first_line, {**row, **self._mapping.row(metrics)})
        except ValueError as error:  # older and newer names on two lines of a step
            self._reading.bad(path, line, str(error))

    def _closed(self, step: int) -> tuple[Path, int, Row]:
        path, line, row = self._open.pop(step)
        row["attempt"] = self._attempts.get(step, 0)
        self._attempts[step] = row["attempt"] + 1
        derive(row)
        return path, line, row

    def rest(self) -> Iterator[tuple[Path, int, Row]]:
        """What is still open at the end of a file."""
        for step in list(self._open):
            yield self._closed(step)


def _merged(one: Record, other: Record) -> Record | None:
    """Both records as one; None when they disagree."""
    if all(same(one[key], value) for key, value in other.items() if key in one):
        return {**one, **other}
    return None


DERIVED = {
    "gpus": "total_tokens / (throughput_time_s * tokens_per_gpu_s), when within 2 % of a whole number",
    "responses": "total_tokens / (prompt_tokens_mean + response_tokens_mean), when whole within the means' rounding to "
    "three decimals",
}


def derive(row: Row) -> None:
    """Add what follows from other columns, as `DERIVED` says, where the log does not say it itself."""
    tokens, rate, time_s = (row.get(name) or 0 for name in ("total_tokens", "tokens_per_gpu_s", "throughput_time_s"))
    if "gpus" not in row and rate * time_s > 0:
        _add_whole(row, "gpus", tokens / (rate * time_s), relative=0.02)
    prompt, response = (row.get(f"{what}_tokens_mean") or 0 for what in ("prompt", "response"))
    if "responses" not in row and prompt > 0 and response > 0:
        _add_whole(row, "responses", tokens / (prompt + response), relative=0.001 / (prompt + response))


def _add_whole(row: Row, name: str, ratio: float, relative: float) -> None:
    if 0.5 < ratio < 1e15 and abs(ratio - round(ratio)) <= relative * ratio:
        row[name] = round(ratio)
