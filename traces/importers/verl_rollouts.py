"""verl's dumps of rollouts (`trainer.rollout_data_dir`): {step}.jsonl, a response a line, as texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from simrl.traces.importers.reading import Reading, Record, json_lines
from simrl.traces.trace import Row, TraceError

BYTES_PER_TOKEN = 4
"""Assumed of UTF-8 text where no tokenizer is given; English text and code have 3 to 5."""
ESTIMATED = f"UTF-8 bytes / {BYTES_PER_TOKEN}, rounded up (assumed; 3 to 5 are usual): no tokenizer was given"
_TEXTS = ("input", "output", "gts")

Count = Callable[[str], int]


def is_rollout(record: Record) -> bool:
    """Whether a JSON record is one of these dumps'."""
    return "input" in record and "output" in record


def rollout_rows(paths: Iterable[Path], reading: Reading, count: Count) -> Iterator[tuple[Path, int, Row]]:
    """A row a response, with file and line. Texts are not kept: a prompt becomes a hash of its text.

    Args:
        paths: JSON Lines files; numbers in their names stand in for a missing `step`.
        reading: Hears of bad lines.
        count: Tokens of a text.

    Raises:
        TraceError: A file cannot be read, or a line is bad and bad lines are not skipped.
    """
    for path in sorted(paths, key=lambda path: (_number(path) is None, _number(path) or 0)):
        for line, record in json_lines(path, reading):
            prompt, output, step = (record.get(name) for name in ("input", "output", "step"))
            if not isinstance(prompt, str) or not isinstance(output, str):
                reading.bad(path, line, "input and output must be texts")
                continue
            yield (
                path,
                line,
                {
                    "kind": "response",
                    "step": _number(path) if step is None else step,
                    "prompt_id": text_id(prompt),
                    "prompt_tokens": count(prompt),
                    "response_tokens": count(output),
                    "metrics": {key: value for key, value in record.items() if key not in _TEXTS},
                },
            )


def _number(path: Path) -> int | None:
    found = re.fullmatch(r"[0-9]{1,15}", path.name.partition(".")[0])
    return int(found[0]) if found else None


def text_id(text: str) -> str:
    """A short name of a prompt, the same wherever its text is the same."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def estimated_tokens(text: str) -> int:
    """Tokens of a text, roughly: see `ESTIMATED`."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)


def tokenizer(folder: Path) -> Count:
    """Counts tokens as the tokenizer in *folder* (or in a tokenizer.json) does, without special tokens.

    Raises:
        TraceError: The package tokenizers is missing, or the folder has no usable tokenizer.json.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TraceError("--tokenizer needs the package tokenizers: pip install tokenizers") from None
    file = folder / "tokenizer.json" if folder.is_dir() else folder
    if not file.is_file():
        raise TraceError(f"tokenizer {str(folder)!r}: no {file.name} (--tokenizer)")
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise TraceError(f"tokenizer {str(file)!r} cannot be read: {error} (--tokenizer)") from None

    def count(text: str) -> int:
        return len(loaded.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids)

    return count
