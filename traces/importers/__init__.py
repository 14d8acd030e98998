"""Reads logs of runs into traces; docs/traces.md says what each format gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import simrl
from simrl.traces.importers import verl_rollouts, vllm
from simrl.traces.importers.mapping import DERIVED, load_mapping, mapped_rows, shipped_mappings
from simrl.traces.importers.reading import (
    Counter,
    Reading,
    console_records,
    csv_header,
    flat,
    form_of,
    json_lines,
    lines,
    load_document,
    step_line,
)
from simrl.traces.importers.simrl_run import is_run, run_rows
from simrl.traces.parameters import did_you_mean
from simrl.traces.trace import Provenance, Row, TraceError, TraceWriter, check_output, checked

_BY_PROGRAM = ("verl-log", "verl-rollouts", "vllm", "simrl")
_DETECT_LINES = 200_000
_ALWAYS = {"kind", "file", "line", "metrics"}
Rows = Iterator[tuple[Path, int, Row]]


def formats() -> list[str]:
    """Names that `--format` takes, beside a path to a mapping."""
    return ["auto", *_BY_PROGRAM, *(name for name in shipped_mappings() if name != "verl")]


def import_trace(
    files: Sequence[Path],
    output: Path,
    *,
    log_format: str = "auto",
    imported: str,
    tokenizer: Path | None = None,
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Provenance:
    """Read logs into one trace file, which appears when it is complete. Memory stays bounded, whatever their size.

    Args:
        files: Of one format; a folder stands for its JSON Lines files, or is a simrl run.
        output: Parquet file to write.
        log_format: One of `formats`, or a path to a mapping (TOML).
        imported: Today's date.
        tokenizer: Folder with a tokenizer.json, where a log has texts in place of token counts.
        skip_bad: Leave bad lines out, and count them, instead of stopping.
        progress: Told how many bytes are read.

    Raises:
        TraceError: What cannot be read or written: file, line and reason.
    """
    paths = [inner for path in files for inner in _expanded(path)]
    if not paths:
        raise TraceError("no file to import")
    check_output(output)
    if any(output.resolve() == path.resolve() for path in paths):
        raise TraceError(f"output {str(output)!r} is also a file to import (--output)")
    name = detect(paths[0]) if log_format == "auto" else log_format
    reading = Reading(skip_bad, progress)
    rows = _rows_of(name, paths, reading, tokenizer)
    with TraceWriter(output) as writer, closing(Counter()) as seen:
        derived, understood = _write(rows, writer, reading, seen)
        if not understood:
            skipped = f"; {reading.skipped} bad lines left out, first {reading.examples[0]}" if reading.skipped else ""
            raise TraceError(f"{paths[0]}: nothing of format {name!r} found{skipped}")
        provenance = Provenance(
            importer=name if name in formats() else Path(name).name,
            files=[path.name for path in paths],
            imported=imported,
            simrl_version=simrl.__version__,
            derived=derived,
            estimated=reading.estimated,
            notes=reading.notes,
            skipped=reading.skipped,
            skipped_examples=reading.examples,
            config=reading.config,
        )
        writer.finish(provenance)
    return provenance


def _expanded(path: Path) -> list[Path]:
    if not path.exists():
        raise TraceError(f"{path}: does not exist")
    if not path.is_dir() or is_run(path):
        return [path]
    found = [inner for inner in sorted(path.iterdir()) if inner.name.endswith((".jsonl", ".jsonl.gz"))]
    if not found:
        raise TraceError(f"{path}: a folder that is no simrl run and holds no .jsonl files")
    return found


def _rows_of(name: str, paths: list[Path], reading: Reading, tokenizer: Path | None) -> Rows:
    if name == "simrl":
        if len(paths) > 1 or not is_run(paths[0]):
            raise TraceError(f"{paths[0]}: format 'simrl' takes one run directory")
        return run_rows(paths[0], reading)
    folder = next((path for path in paths if path.is_dir()), None)
    if folder is not None:
        raise TraceError(f"{folder}: a simrl run, not of format {name!r}")
    if name in ("verl-rollouts", "vllm"):
        count = verl_rollouts.tokenizer(tokenizer) if tokenizer else verl_rollouts.estimated_tokens
        if name == "vllm":
            return vllm.request_rows(paths, reading, count)
        if tokenizer is None:
            reading.estimated.update(dict.fromkeys(("prompt_tokens", "response_tokens"), verl_rollouts.ESTIMATED))
        else:
            reading.note("tokens are counted in texts without their special tokens: an end token is missing")
        return verl_rollouts.rollout_rows(paths, reading, count)
    if name == "verl-log":
        return mapped_rows(load_mapping("verl"), paths, reading)
    if name not in formats() and Path(name).suffix != ".toml":
        known = ", ".join(formats())
        raise TraceError(f"unknown format {name!r}{did_you_mean(name, formats())}; known: {known}, or a mapping's path")
    return mapped_rows(load_mapping(name), paths, reading)


def _write(rows: Rows, writer: TraceWriter, reading: Reading, seen: Counter) -> tuple[dict[str, str], bool]:
    """Write all good rows; returns which columns are derived, and how, and whether any record was understood."""
    derived: dict[str, str] = {}
    understood = False
    for path, line, row in rows:
        try:
            metrics = row.get("metrics", {})
            clean = checked({**row, "file": path.name, "line": line})
            if clean["kind"] == "response":
                _number_sample(clean, metrics, seen)
        except ValueError as error:
            reading.bad(path, line, str(error))
            continue
        if clean["kind"] == "step" and "total_tokens" in clean:
            derived.update({name: how for name, how in DERIVED.items() if name in clean})
        understood = understood or not clean.keys() <= _ALWAYS
        writer.add(clean)
    return derived, understood


def _number_sample(row: Row, metrics: Row, seen: Counter) -> None:
    """Number a prompt's responses of a step where the log does not, and refuse to take one twice.

    Raises:
        ValueError: The same request, or the same sample of a prompt in a step, came before.
    """
    request = metrics.get("request_id")
    if request is not None and seen.before("request", row.get("step"), request):
        raise ValueError(f"request_id={request!r} occurs twice")
    if "prompt_id" not in row:
        return
    place = (row.get("step"), row.get("epoch"), row["prompt_id"])
    if "sample" not in row:
        row["sample"] = seen.before("prompt", *place)
    elif seen.before("sample", *place, row["sample"]):
        where = f"step {place[0]}, prompt_id {place[2]}"
        raise ValueError(f"{where}: sample {row['sample']} occurs twice")


# --- recognising a format ---


def detect(path: Path) -> str:
    """The format of a log, by its content.

    Raises:
        TraceError: It cannot be read, or is of none.
    """
    if path.is_dir():
        return "simrl"
    form = form_of(path)
    found = _of_text(path) if form == "text" else _of_json(path, form)
    if found is None:
        known = ", ".join(formats()[1:])
        raise TraceError(f"{path}: of no known format; name it with --format: {known}, or a mapping's path")
    return found


def _of_json(path: Path, form: str) -> str | None:
    if form == "json":
        document = load_document(path)
        if isinstance(document, dict) and all(key in document for key in vllm.BENCHMARK_KEYS):
            return "vllm"
        tables = document.get("log_history", [document]) if isinstance(document, dict) else document
        tables = [table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []
        return _of_keys({key for table in tables[:1000] for key in flat(table)})
    keys: set[str] = set()
    for (_, record), _ in zip(json_lines(path, Reading(skip_bad=True)), range(100), strict=False):
        keys |= set(flat(record))
    return _of_keys(keys)


def _of_keys(keys: set[str]) -> str | None:
    return "verl-rollouts" if verl_rollouts.is_rollout(dict.fromkeys(keys)) else _best_mapping(keys)


def _of_text(path: Path) -> str | None:
    header = _best_mapping(set(csv_header(path)))
    if header is not None:
        return header
    requests = False
    for number, text, _ in lines(path, Reading(skip_bad=True), strict=False):
        try:
            if step_line(text) is not None:
                return "verl-log"
        except ValueError:
            return "verl-log"
        requests = requests or vllm.REQUEST_LINE.search(text) is not None
        if number >= _DETECT_LINES:
            break
    return "vllm" if requests else _of_dictionaries(path)  # verl's log may hold its engines' requests


def _of_dictionaries(path: Path) -> str | None:
    """The mapping whose keys the first printed dictionaries have."""
    every = frozenset().union(*(load_mapping(name).keys for name in shipped_mappings()))
    found = console_records(path, "dict", every, Reading(skip_bad=True))
    return _best_mapping({key for (_, record), _ in zip(found, range(100), strict=False) for key in record})


def _best_mapping(keys: set[str]) -> str | None:
    """The shipped mapping that knows most of *keys*, at least two beside the step's."""
    mappings = {name: load_mapping(name) for name in shipped_mappings()}
    scores = {name: len(keys & (known.keys - set(known.fields["step"].keys))) for name, known in mappings.items()}
    best = max(scores, key=lambda name: scores[name])
    return None if scores[best] < 2 else "verl-log" if best == "verl" else best
