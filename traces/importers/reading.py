"""Lines and records of logs: bounded memory, every bad line named or counted."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

from simrl.traces.trace import TraceError

Record = dict[str, Any]
Numbered = tuple[int, Record]
"""Line (from 1) and what it says."""

MAX_LINE_BYTES = 16 * 2**20
MAX_DOCUMENT_BYTES = 256 * 2**20
_EXAMPLES = 5
_TELL_BYTES = 2**20


@dataclass(slots=True)
class Reading:
    """What an import has met so far.

    Attributes:
        skip_bad: Leave bad lines out, and count them, instead of stopping.
        progress: Told how many bytes are read.
        skipped: Bad lines left out.
        examples: The first few of them.
        notes: What a reader of the trace has to know.
        estimated: Columns that are guesses, and how.
        config: The configuration of a simrl run, as TOML.
    """

    skip_bad: bool = False
    progress: Callable[[int], None] | None = None
    skipped: int = 0
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    estimated: dict[str, str] = field(default_factory=dict)
    config: str = ""
    _finished_bytes: int = 0
    _told_bytes: int = 0

    def bad(self, path: Path, line: int, reason: str) -> None:
        """A line that cannot be used.

        Raises:
            TraceError: Unless bad lines are skipped.
        """
        if not self.skip_bad:
            raise TraceError(f"{path}:{line}: {reason} (--skip-bad leaves such lines out, and counts them)")
        self.skipped += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{path.name}:{line}: {reason}")

    def note(self, text: str) -> None:
        """Keep a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def at(self, position: int) -> None:
        """Tell how far the present file is read."""
        done = self._finished_bytes + position
        if self.progress is not None and done - self._told_bytes >= _TELL_BYTES:
            self._told_bytes = done
            self.progress(done)

    def finished(self, path: Path) -> None:
        """A file is read to its end."""
        self._finished_bytes += path.stat().st_size


class Counter:
    """How often keys came before; on disk once it gets large, so that memory stays bounded."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("")  # a private file that SQLite removes
        self._rows.execute("PRAGMA journal_mode=OFF")
        self._rows.execute("PRAGMA cache_size=-65536")
        self._rows.execute("CREATE TABLE seen (key INTEGER PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID")

    def before(self, *key: object) -> int:
        """How often *key* was asked for before this call."""
        digest = int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little", signed=True)
        insert = "INSERT INTO seen VALUES (?, 0) ON CONFLICT (key) DO UPDATE SET count = count + 1 RETURNING count"
        return int(self._rows.execute(insert, (digest,)).fetchone()[0])

    def close(self) -> None:
        """Remove the file."""
        self._rows.close()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file's bytes, decompressed when it is gzip, and the file itself, whose position tells the progress.

    Raises:
        TraceError: It cannot be read, or is broken gzip.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if packed:
                with gzip.open(raw) as unpacked:
                    yield cast(BinaryIO, unpacked), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TraceError(f"{path}: cannot be read: {reason}") from None


def lines(path: Path, reading: Reading, *, strict: bool) -> Iterator[tuple[int, str, bool]]:
    """Every line of a text file: its number from 1, its text, and whether a line end follows.

    Args:
        path: Text or gzipped text.
        reading: Hears of lines that are no text or too long.
        strict: Whether bytes that are not UTF-8 make a line bad; otherwise they become U+FFFD.

    Raises:
        TraceError: The file cannot be read.
    """
    with _opened(path) as (file, raw):
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            reading.at(raw.tell())
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                reading.bad(path, number, f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")
            elif b"\0" in line:
                reading.bad(path, number, "the line holds NUL bytes: not UTF-8 text")
            else:
                text = _decoded(line, strict)
                if text is None:
                    reading.bad(path, number, "the line is not UTF-8 text")
                else:
                    text = text.removeprefix("\ufeff") if number == 1 else text
                    yield number, text.rstrip("\r\n"), line.endswith(b"\n")
    reading.finished(path)


def _decoded(line: bytes, strict: bool) -> str | None:
    try:
        return line.decode("utf-8", "strict" if strict else "replace")
    except UnicodeDecodeError:
        return None


# --- values ---

_WRAPPED = re.compile(r"[\w.]*(?:float|int|bool|tensor|array)\w*\(\s*([^()\[\],]+?)\s*(?:,[^()]*)?\)", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")
_FLOAT = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None, "": None}


def value_of(text: str) -> int | float | bool | str | None:
    """A printed value: a number, also inside np.float64(...) or tensor(...), a truth value, None, or the text itself.

    >>> value_of("np.float64(0.25)"), value_of("12"), value_of("True"), value_of("auto")
    (0.25, 12, True, 'auto')
    """
    text = text.strip()
    wrapped = _WRAPPED.fullmatch(text) if text.endswith(")") else None
    inner = wrapped[1] if wrapped else text
    if inner in _WORDS:
        return _WORDS[inner]
    if _INTEGER.fullmatch(inner):
        return int(inner)
    return float(inner) if _FLOAT.fullmatch(inner) else text


# --- records ---


def flat(record: Mapping[str, Any]) -> Record:
    """Nested tables as one, their keys joined by "/"; verl's file logger wraps its metrics in `data`.

    >>> flat({"step": 1, "timing": {"gen": 2.0}})
    {'step': 1, 'timing/gen': 2.0}
    """
    if set(record) == {"step", "data"} and isinstance(record["data"], Mapping):
        record = {"step": record["step"], **record["data"]}
    found: Record = {}
    todo = [("", record)]
    while todo:
        prefix, table = todo.pop()
        for key, value in table.items():
            if isinstance(value, Mapping):
                todo.append((f"{prefix}{key}/", value))
            else:
                found[f"{prefix}{key}"] = value
    return found


def json_lines(path: Path, reading: Reading) -> Iterator[Numbered]:
    """The objects of a JSON Lines file; blank lines are passed over."""
    for number, text, _ in lines(path, reading, strict=True):
        if not text.strip():
            continue
        record = parsed_json(text)
        if isinstance(record, dict):
            yield number, record
        else:
            reading.bad(path, number, "not a JSON object" if record is not _BROKEN else _broken_json(text))


_BROKEN = object()


def parsed_json(text: str) -> Any:
    """The JSON value of *text*, or a value that equals nothing."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also a number of too many digits
        return _BROKEN


def _broken_json(text: str) -> str:
    shown = text if len(text) <= 40 else text[:20] + " ... " + text[-20:]
    return f"not valid JSON, perhaps cut off: {shown!r}"


def json_document(path: Path, records_key: str | None, reading: Reading) -> Iterator[Numbered]:
    """The objects of a JSON file: a list, one object, or the list under *records_key*.

    Raises:
        TraceError: It is not JSON, or too large to hold in memory.
    """
    document = load_document(path)
    if isinstance(document, dict) and records_key in document:
        document = document[records_key]
    for index, record in enumerate(document if isinstance(document, list) else [document], 1):
        if isinstance(record, dict):
            yield index, record
        else:
            reading.bad(path, index, "the list's entry of this number is not a JSON object")
    reading.finished(path)


def load_document(path: Path) -> Any:
    """A whole JSON file.

    Raises:
        TraceError: It is not JSON, or too large to hold in memory.
    """
    with _opened(path) as (file, _):
        content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        limit = MAX_DOCUMENT_BYTES // 2**20
        raise TraceError(f"{path}: a JSON document of more than {limit} MiB; convert it to JSON Lines")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise TraceError(f"{path}{line}: not valid JSON: {str(error).splitlines()[0]}") from None


def csv_records(path: Path, reading: Reading) -> Iterator[Numbered]:
    """The rows of a CSV file with a header; empty cells are left out.

    Raises:
        TraceError: The header is empty or names a column twice.
    """
    numbers = [0]

    def texts() -> Iterator[str]:
        for number, text, _ in lines(path, reading, strict=True):
            numbers[0] = number
            yield text + "\n"

    rows = csv.reader(texts())
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise TraceError(f"{path}:{numbers[0]}: not CSV: {error}") from None
    twice = next((name for name in header if header.count(name) > 1), None)
    if not header or twice is not None:
        raise TraceError(f"{path}:1: " + ("no header" if not header else f"column {twice!r} occurs twice"))
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # a field of more than csv.field_size_limit()
            reading.bad(path, numbers[0], f"not CSV: {error}")
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            reading.bad(path, numbers[0], f"{len(cells)} cells, the header has {len(header)}")
            continue
        yield numbers[0], {name: value_of(cell) for name, cell in zip(header, cells, strict=True) if cell != ""}


# --- consoles ---

# Colours; some tools save them without the escape character.
_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\[[0-9]{1,3}(?:;[0-9]{1,3})*m")
_REPEATED = re.compile(r"\s*\[repeated [0-9]+x across cluster\].*$")
STEP_LINE = re.compile(r"(?:^|[\s)\]|\ufeff])step:(-?[0-9]+)(?= -|\s*$)")
_ENDS_IN_NUMBER = re.compile(r":\s*\S*[0-9)]\s*$")
_DICT_ITEM = re.compile(
    r"""\s*(['"])([^'"]*)\1\s*:\s*('[^']*'|"[^"]*"|[^\s,{}()\[\]'"]+(?:\([^()]*\))?|\[[^\[\]]*\])\s*(?:,|$)"""
)
_GLOBAL_STEP = re.compile(r"[Gg]lobal[ _][Ss]tep:?\s+([0-9]+)")
_KEY_VALUE = re.compile(r"([A-Za-z_][\w./@%()-]{0,200})\s{0,3}[=:]\s{0,3}([^\s,;|{}\[\]]+)")


def plain(text: str) -> str:
    """A console line without colours and without Ray's mark of repeated lines."""
    if "\x1b" in text or "m" in text:
        text = _ANSI.sub("", text)
    return _REPEATED.sub("", text) if "[repeated " in text else text


def step_line(text: str, _: frozenset[str] = frozenset()) -> Record | None:
    """The record of verl's `step:N - key:value - ...`; None for any other line.

    Raises:
        ValueError: A part of the line is no key:value.
    """
    if "step:" not in text:
        return None
    text = plain(text)
    begin = STEP_LINE.search(text)
    if begin is None:
        return None
    record: Record = {"step": int(begin[1])}
    parts = text[begin.end() :].split(" - ")[1:]
    if parts and " " in parts[0].strip().removesuffix(" -") and not _ENDS_IN_NUMBER.search(parts[0]):
        return None  # a sentence: logs also print what the model says
    for part in parts:
        key, value = _key_and_value(part)
        if key in record and not same(record[key], value):
            raise ValueError(f"{key} occurs twice, as {record[key]} and {value}")
        record[key] = value
    return record


def same(one: object, other: object) -> bool:
    """Whether two values are equal; NaN equals NaN."""
    return one == other or (one != one and other != other)


def _key_and_value(part: str) -> tuple[str, Any]:
    key, colon, text = part.rpartition(":")
    value = value_of(text)
    if colon and isinstance(value, str):
        key, colon, text = part.partition(":")  # a text may hold colons
        value = value_of(text)
    if not colon or not key.strip() or not text.strip():
        shown = part if len(part) <= 60 else part[:57] + "..."
        raise ValueError(f"{shown!r} is no key:value; the line may be cut off")
    return key.strip(), value


def dict_line(text: str, keys: frozenset[str]) -> Record | None:
    """The record of a printed flat dictionary with one of *keys*, or after `Global step N: `; None for any other line.

    Raises:
        ValueError: A part of such a dictionary cannot be read.
    """
    if "{'" not in text and '{"' not in text:
        return None
    text = plain(text)
    start = min(place for place in (text.find("{'"), text.find('{"')) if place >= 0)
    named = _GLOBAL_STEP.search(text[:start])
    end = text.rfind("}")
    inside = text[start + 1 : end if end > start else len(text)]
    record, position = _dict_items(inside)
    if named is None and not keys & set(record):
        return None
    if end <= start or inside[position:].strip():
        raise ValueError(f"{inside[position : position + 40]!r} is no 'key': value; the line may be cut off")
    return {"Global step": int(named[1]), **record} if named else record


def _dict_items(inside: str) -> tuple[Record, int]:
    """The items at the beginning of a dictionary's text, and where they end."""
    record: Record = {}
    position = 0
    while item := _DICT_ITEM.match(inside, position):
        value = item[3]
        record[item[2]] = value[1:-1] if value[0] in "'\"" else value_of(value)
        position = item.end()
    return record, position


def pairs_line(text: str, keys: frozenset[str]) -> Record | None:
    """All `key=value` and `key: value` of a line that has one of *keys*; None for any other line."""
    record = {key: value_of(value) for key, value in _KEY_VALUE.findall(plain(text))}
    return record if keys & set(record) else None


CONSOLE: dict[str, Callable[[str, frozenset[str]], Record | None]] = {
    "step": step_line,
    "dict": dict_line,
    "pairs": pairs_line,
}
"""Forms of console lines, by the names that a mapping gives them."""


def console_records(path: Path, form: str, keys: frozenset[str], reading: Reading) -> Iterator[Numbered]:
    """The records of a console log; other lines are passed over."""
    parse = CONSOLE[form]
    last: Record | None = None
    last_text = ""
    for number, text, ended in lines(path, reading, strict=False):
        try:
            record = parse(text, keys)
        except ValueError as error:
            reading.bad(path, number, str(error))
            continue
        if record is None or (ended and set(record) == {"step"}):
            continue
        if not ended and form == "step" and (cut := _cut_off(record, text, last, last_text)):
            reading.bad(path, number, cut)
            continue
        yield number, record
        last, last_text = record, text


def _cut_off(record: Record, text: str, last: Record | None, last_text: str) -> str | None:
    """Why a last line without a line end seems to lack its end; None when it does not.

    Such a line can break off inside a number, which then reads as a smaller one.
    """
    if len(record) < 2:
        return "the last line has no line end and no key: it may be cut off"
    if last is None:
        return None
    missing = [key for key in last if key not in record]
    if missing and len(record) < len(last):
        return f"the last line has no line end and lacks {missing[0]}: it may be cut off"
    key = next(reversed(record))
    if key in last and len(_decimals(text, key)) < len(_decimals(last_text, key)):
        return f"the last line has no line end and ends in {key}:{record[key]}: it may be cut off"
    return None


def _decimals(text: str, key: str) -> str:
    """The digits after the point of the value that a line gives to *key*."""
    found = re.search(re.escape(key) + r":[^\s]*?\.([0-9]*)", plain(text))
    return found[1] if found else ""


# --- which form a file has ---


def head(path: Path) -> str:
    """The first 64 KiB of a file as text.

    Raises:
        TraceError: It cannot be read, is empty, or is no text.
    """
    with _opened(path) as (file, _):
        start = file.read(2**16)
    if not start.strip():
        raise TraceError(f"{path}: the file is empty")
    if start.count(b"\0") > len(start) // 100:
        raise TraceError(f"{path}: a binary file, not text")
    return start.decode("utf-8", "replace").removeprefix("\ufeff")


def form_of(path: Path) -> str:
    """`json lines`, `json` (one document) or `text`, by a file's name and beginning.

    Raises:
        TraceError: See `head`.
    """
    first = head(path).lstrip().partition("\n")[0].strip()
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "json lines"
    if name.endswith(".json"):
        return "json"
    if first == "[" or first.startswith("[{"):  # other brackets begin time stamps and colours
        return "json"
    if not first.startswith("{") or first.startswith("{'"):
        return "text"
    return "json" if first == "{" else "json lines"


def records(
    path: Path, console: str, records_key: str | None, keys: frozenset[str], reading: Reading
) -> Iterator[Numbered]:
    """The records of a file of any form: JSON Lines, JSON, CSV, or a console log.

    Args:
        path: The file.
        console: A key of `CONSOLE`: how console lines look.
        records_key: Where a JSON document has its list.
        keys: One of which a CSV header or a console line must have, to count as such.
        reading: Hears of bad lines.

    Raises:
        TraceError: The file cannot be read or is empty.
    """
    form = form_of(path)
    if form == "json" and not _holds_lines(path):
        return json_document(path, records_key, reading)
    if form != "text":
        return json_lines(path, reading)
    if keys & set(csv_header(path)):
        return csv_records(path, reading)
    return console_records(path, console, keys, reading)


def csv_header(path: Path) -> list[str]:
    """The cells of a file's first line, in case that it is CSV."""
    first = head(path).partition("\n")[0].strip()
    try:
        return next(csv.reader([first]), []) if len(first) < 2**15 else []
    except csv.Error:
        return []


def _holds_lines(path: Path) -> bool:
    """Whether a file named .json has an object on each of several lines."""
    first, _, rest = head(path).strip().partition("\n")
    return bool(rest) and first.rstrip().endswith("}") and isinstance(parsed_json(first), dict)
