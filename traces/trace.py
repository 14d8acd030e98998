"""A captured trace: what a real or simulated run's logs say, as one parquet file.

One table holds two kinds of rows: `step` (stage times and length statistics of a training step) and `response` (one
generated response). A log has one or the other or both; columns that a kind does not have are null and take no space.
One file with a `kind` column, because any parquet reader shows all of it: a second table in the file's metadata would
be invisible to pandas, and two files get separated. Where a trace comes from (`Provenance`) is JSON in the metadata.

Every row also carries `metrics`, the record as the source had it, every key and number, understood or not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

SCHEMA_VERSION = 1
Row = dict[str, Any]

RESPONSE_COLUMNS = {
    "prompt_id": "text",
    "sample": "count",
    "prompt_tokens": "count",
    "response_tokens": "count",
    "truncated": "flag",
    "first_token_s": "number",
    "function": "text",
}
PREPARATION = ("preparation_s", "old_log_prob_s", "ref_log_prob_s", "values_s", "reward_s", "advantage_s")
LEARNING = ("learning_s", "update_critic_s", "update_actor_s")
STEP_COLUMNS = {
    "attempt": "count",
    "responses": "count",
    "gpus": "count",
    "total_tokens": "number",
    "tokens_per_gpu_s": "number",
    "throughput_time_s": "number",
    **{f"{what}_tokens_{how}": "number" for what in ("prompt", "response") for how in ("mean", "min", "max")},
    "truncated_share": "number",
    "step_s": "number",
    "testing_s": "number",
    "checkpoint_s": "number",
    "generation_s": "number",
    "rollout_mean_s": "number",
    "reshard_s": "number",
    **dict.fromkeys((*PREPARATION, *LEARNING), "number"),
    "weight_sync_s": "number",
}
COLUMNS = {
    "kind": "text",
    "file": "text",
    "line": "count",
    "step": "count",
    "epoch": "count",
    "start_s": "number",
    "end_s": "number",
    **RESPONSE_COLUMNS,
    **STEP_COLUMNS,
    "metrics": "text",
}
"""Columns of the table, in its order, and what they hold; docs/traces.md says what each means."""

_META = b"simrl.trace"
_FLUSH_ROWS = 20_000
_FLUSH_CHARS = 16 * 2**20
_MAX_COUNT = 2**63 - 1
_JSON = json.JSONEncoder(allow_nan=False)


class TraceError(ValueError):
    """A log or a trace that cannot be read or written: which file and line, and why."""


@dataclass(slots=True)
class Provenance:
    """Where a trace comes from.

    Attributes:
        importer: The format that was read.
        files: Names of the files read, without folders.
        imported: Date, YYYY-MM-DD.
        simrl_version: Of the importer.
        derived: Columns that are computed from others of the same row, and how.
        estimated: Columns that are guesses, and how.
        notes: What a reader of the numbers has to know.
        skipped: Bad lines left out (`--skip-bad`).
        skipped_examples: The first few of them.
        schema_version: Of the table.
        config: The configuration of a simrl run, as TOML; empty where there is none.
    """

    importer: str
    files: list[str]
    imported: str
    simrl_version: str
    derived: dict[str, str] = field(default_factory=dict)
    estimated: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: int = 0
    skipped_examples: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION
    config: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace in memory.

    Attributes:
        steps: Rows of kind `step`, with the columns that a step can have.
        responses: Rows of kind `response`, likewise, in the order of the source.
        provenance: Where they come from.
    """

    steps: pd.DataFrame
    responses: pd.DataFrame
    provenance: Provenance


def checked(row: Mapping[str, Any]) -> Row:
    """*row* with every value in its column's type; empty values are left out.

    Raises:
        ValueError: A value is of the wrong type, negative or not finite, a response has no length, or it ends before
            it begins. It names the column.
    """
    clean: Row = {name: _typed(name, value) for name, value in row.items() if value is not None and name != "metrics"}
    if clean["kind"] == "response" and "response_tokens" not in clean:
        raise ValueError("no response_tokens")
    if clean.get("end_s", math.inf) < clean.get("start_s", 0.0):
        raise ValueError(f"end_s={clean['end_s']} is before start_s={clean['start_s']}")
    if row.get("metrics"):
        clean["metrics"] = to_json(row["metrics"])
    return clean


def _typed(name: str, value: object) -> object:
    what = COLUMNS[name]
    if what == "text":
        # Parquet takes no lone surrogates, which JSON may hold.
        return str(value).encode("utf-8", "backslashreplace").decode()
    if what == "flag":
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        raise ValueError(f"{name}={_shown(value)} must be true or false")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={_shown(value)} must be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    if not 0 <= value <= _MAX_COUNT:
        raise ValueError(f"{name}={_shown(value)} must be >= 0 and below 2**63")
    if what == "number":
        return float(value)
    if value != int(value):
        raise ValueError(f"{name}={value} must be a whole number")
    return int(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_json(record: Mapping[str, Any]) -> str:
    """A record as strict JSON: what is not finite becomes the text NaN, Infinity or -Infinity."""
    try:
        return _JSON.encode(record)
    except ValueError:
        return _JSON.encode(_finite(record))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value


class TraceWriter:
    """Writes rows as they come, in row groups; the file appears under its name when it is complete.

    Raises:
        TraceError: The place cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._hidden = _hidden(path)
        self._waiting: list[Row] = []
        self._chars = 0

    def __enter__(self) -> Self:
        """Open the hidden file."""
        import pyarrow.parquet as pq

        self._schema = _schema()
        try:
            # Opened here: a writer that opens its file by itself removes it on errors, whatever it was.
            self._file = self._hidden.open("xb")
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self._writer: pq.ParquetWriter | None = pq.ParquetWriter(self._file, self._schema, compression="zstd")
        return self

    def add(self, row: Row) -> None:
        """Take a row that `checked` has passed."""
        self._waiting.append(row)
        self._chars += len(row.get("metrics", ""))
        self.rows += 1
        if len(self._waiting) >= _FLUSH_ROWS or self._chars >= _FLUSH_CHARS:
            self._flush()

    def finish(self, provenance: Provenance) -> None:
        """Write what is left, and give the file its name."""
        try:
            self._flush()
            assert self._writer is not None
            self._writer.add_key_value_metadata({_META.decode(): json.dumps(asdict(provenance))})
            self._close()
            self._hidden.replace(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._waiting:
            return
        present = {name for row in self._waiting for name in row}
        columns = [
            pa.array([row.get(name) for row in self._waiting], entry.type)
            if name in present
            else pa.nulls(len(self._waiting), entry.type)
            for name, entry in zip(COLUMNS, self._schema, strict=True)
        ]
        assert self._writer is not None
        try:
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._waiting.clear()
        self._chars = 0

    def _close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            self._file.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hidden file unless it was finished."""
        try:
            self._close()
        except OSError:
            if error is None:
                raise
        finally:
            self._hidden.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden file to write, which is *path* when it is complete, and gone if it is not.

    Raises:
        TraceError: The place cannot be written.
    """
    hidden = _hidden(path)
    try:
        yield hidden
        hidden.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        hidden.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}.tmp"


def check_output(path: Path) -> None:
    """Raise unless *path* can be written: before an import, so that none is lost for want of a place.

    Raises:
        TraceError: It is a folder, or its folder does not exist or cannot be written.
    """
    if path.is_dir():
        raise TraceError(f"output {str(path)!r} is a folder: name a file (--output)")
    probe = path.parent / f".{path.name}.{os.getpid()}.probe"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> TraceError:
    return TraceError(f"output {str(path)!r} cannot be written: {error.strerror or error} (--output)")


def _schema() -> pa.Schema:
    import pyarrow as pa

    types = {"text": pa.string(), "count": pa.int64(), "number": pa.float64(), "flag": pa.bool_()}
    return pa.schema([(name, types[what]) for name, what in COLUMNS.items()])


def read_trace(path: str | Path, response_columns: Sequence[str] | None = None) -> Trace:
    """A trace file.

    Args:
        path: Of `simrl trace import`.
        response_columns: Only these of the responses, to save memory; None takes all.

    Raises:
        TraceError: There is no such file, it is no trace, or a newer simrl wrote it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(str(path), memory_map=False)
        provenance = _provenance(path, file.metadata.metadata)
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise TraceError(f"{path}: column {missing[0]} is missing: not a trace of schema version {SCHEMA_VERSION}")
        kind = pc.field("kind")
        common = [name for name in COLUMNS if name not in RESPONSE_COLUMNS and name not in STEP_COLUMNS]
        of_responses = list(response_columns or [*common, *RESPONSE_COLUMNS])
        needed = ["kind", *(name for name in of_responses if name != "kind")]
        steps = pq.read_table(str(path), columns=[*common, *STEP_COLUMNS], filters=kind == "step")
        responses = pq.read_table(str(path), columns=needed, filters=kind == "response").select(of_responses)
    except FileNotFoundError:
        raise TraceError(f"trace {str(path)!r} does not exist") from None
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"{path}: not a trace: {str(error).splitlines()[0]}") from None
    return Trace(steps.to_pandas(), responses.to_pandas(), provenance)


def _provenance(path: str | Path, metadata: dict[bytes, bytes] | None) -> Provenance:
    text = (metadata or {}).get(_META)
    if text is None:
        raise TraceError(f"{path}: a parquet file, but not a trace of `simrl trace import`")
    try:
        found = json.loads(text)
        version = found["schema_version"]
        if version != SCHEMA_VERSION:
            raise TraceError(f"{path}: schema version {version}; this simrl reads version {SCHEMA_VERSION}")
        return Provenance(**found)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}: not a trace: its provenance is damaged") from None
