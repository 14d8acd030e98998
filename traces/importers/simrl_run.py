"""simrl's own run directories: exact lengths and times of every response, and the stages of every step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simrl.traces.importers.reading import Reading
from simrl.traces.records import PHASE_COLUMNS, SAMPLE_COLUMNS
from simrl.traces.summary import STAGES
from simrl.traces.trace import Row, TraceError

_OWN = {"assigned_s": "start_s", "finished_s": "end_s"}
_SAME = (
    "step", "epoch", "prompt_id", "sample", "prompt_tokens", "response_tokens", "truncated", "function",
)  # fmt: skip


def is_run(path: Path) -> bool:
    """Whether *path* is a run directory."""
    return (path / "samples.parquet").is_file() and (path / "phases.parquet").is_file()


def run_rows(path: Path, reading: Reading) -> Iterator[tuple[Path, int, Row]]:
    """The steps of a run, then its responses in the order in which the policy was offered them.

    Raises:
        TraceError: A file is missing or damaged.
    """
    gpus, config = _gpus(path / "summary.json"), path / "config.toml"
    try:
        reading.config = config.read_text(encoding="utf-8") if config.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{config}: cannot be read: {error}") from None
    for index, row in enumerate(_steps(path / "phases.parquet"), 1):
        yield path / "phases.parquet", index, {**row, "gpus": gpus}
    samples = path / "samples.parquet"
    for index, record in enumerate(_records(samples, SAMPLE_COLUMNS), 1):
        yield samples, index, _response(record)
    reading.finished(samples)


def _response(record: dict[str, Any]) -> Row:
    row: Row = {name: record[name] for name in _SAME}
    row.update({ours: record[theirs] for theirs, ours in _OWN.items()})
    return {**row, "kind": "response", "metrics": {k: v for k, v in record.items() if k not in (*_SAME, *_OWN)}}


def _steps(path: Path) -> Iterator[Row]:
    steps: dict[int, Row] = {}
    for record in _records(path, PHASE_COLUMNS):
        stage, start_s, end_s = record["stage"], record["start_s"], record["end_s"]
        row = steps.setdefault(record["step"], {"kind": "step", "step": record["step"], "epoch": record["epoch"]})
        row.setdefault("metrics", {}).update({f"{stage}/start_s": start_s, f"{stage}/end_s": end_s})
        if stage == "step":
            row.update(start_s=start_s, end_s=end_s, step_s=end_s - start_s)
        elif stage in STAGES:
            row[f"{stage}_s"] = end_s - start_s
    yield from steps.values()


def _records(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise TraceError(f"{path}: column {missing[0]} is missing: not of a simrl run")
            for batch in file.iter_batches(20_000, columns=list(columns)):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _gpus(path: Path) -> int | None:
    try:
        gpus = json.loads(path.read_text(encoding="utf-8")).get("gpus")
    except (OSError, ValueError, AttributeError):
        return None
    return gpus if isinstance(gpus, int) else None
