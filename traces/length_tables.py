"""Read measured lengths: from a table of responses (CSV, also gzipped), or from a trace of `simrl trace import`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from simrl.traces.fit import FitError, Lengths
from simrl.traces.trace import read_trace

WANTED = ("prompt_id", "response_tokens")
KNOWN = (*WANTED, "prompt_tokens", "sample", "truncated", "epoch", "step")
GROUPING = ("dataset", "split", "model", "temperature", "stage")  # a fit over several of these would mix populations


@dataclass(frozen=True)
class LengthTable:
    """Measured lengths and what the source says of them.

    Attributes:
        lengths: Of the responses.
        prompt_tokens: Of each different prompt, where known.
        truncation_known: Whether the source, or a stated cap, says which responses the cap ended.
        cap: Tokens at which responses were cut (the median where counts differ); None without truncated ones.
        origin: File name and selection.
        notes: What was counted otherwise than it stands in the file.
    """

    lengths: Lengths
    prompt_tokens: tuple[int, ...]
    truncation_known: bool
    cap: int | None
    origin: str
    notes: tuple[str, ...]


def lengths_of(
    path: Path, groups: Sequence[str] = (), cap: int | None = None, steps_per_epoch: int | None = None
) -> LengthTable:
    """The responses of a file.

    Args:
        path: A trace (.parquet), or a CSV with prompt_id and response_tokens and, where known, prompt_tokens,
            truncated (0 or 1), epoch or step.
        groups: "column=value": rows to keep.
        cap: Responses of so many tokens count as truncated.
        steps_per_epoch: Makes epochs of steps where prompts do not come back to show them.

    Raises:
        FitError: If the file cannot be read, rows do not make sense, or several populations are left.
    """
    if cap is not None and cap < 1:
        raise FitError(f"cap={cap} must be >= 1 (--cap)")
    if steps_per_epoch is not None and steps_per_epoch < 1:
        raise FitError(f"steps_per_epoch={steps_per_epoch} must be >= 1 (--steps-per-epoch)")
    rows = _select(_rows(path), groups, path)
    notes: list[str] = []
    tokens = _counts(rows, "response_tokens", path)
    if (tokens == 0).any():
        notes.append(f"{int((tokens == 0).sum())} responses of 0 tokens count as 1")
    prompt = pd.factorize(rows["prompt_id"], sort=True)[0].astype(np.int64)
    if (prompt < 0).any():
        raise FitError(f"{path}: {int((prompt < 0).sum())} rows have no prompt_id")
    truncated, known = _truncated(rows, tokens, cap, path)
    if not known:
        notes.append("nothing says which responses were truncated: all count as ended by themselves (--cap says more)")
    epoch = _epochs(rows, prompt, steps_per_epoch, path)
    lengths = Lengths(prompt, np.maximum(tokens, 1), truncated, epoch)
    at = int(np.median(tokens[truncated])) if truncated.any() else cap
    origin = ", ".join([path.name, *(group.partition("=")[2] for group in groups)])
    return LengthTable(lengths, _prompt_tokens(rows, prompt, path), known, at, origin, tuple(notes))


def _rows(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        rows = read_trace(path).responses
    else:
        try:
            rows = pd.read_csv(path, dtype={"prompt_id": "string"})
        except FileNotFoundError:
            raise FitError(f"{path}: no such file") from None
        except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise FitError(f"{path}: not a CSV table: {str(error).splitlines()[0]}") from None
    missing = [name for name in WANTED if name not in rows]
    if missing:
        raise FitError(
            f"{path}: column {missing[0]} is missing; wanted: {', '.join(WANTED)}; known: {', '.join(KNOWN)}"
        )
    if path.suffix == ".parquet" and rows["prompt_id"].isna().all():
        rows["prompt_id"] = [str(i) for i in range(len(rows))]  # every response a prompt of its own
    return rows


def _select(rows: pd.DataFrame, groups: Sequence[str], path: Path) -> pd.DataFrame:
    for group in groups:
        column, found, value = group.partition("=")
        if not found or column not in rows:
            raise FitError(f"--group {group!r} must be column=value with a column of {path}: {', '.join(rows.columns)}")
        texts = rows[column].astype(str)
        if not (texts == value).any():
            near = difflib.get_close_matches(value, texts.unique(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FitError(f"--group {group!r}: {path} has no such row{hint}; it has {_some(texts)}")
        rows = rows[texts == value]
    if rows.empty:
        raise FitError(f"{path}: no responses")
    for column in GROUPING:
        if column in rows and rows[column].nunique() > 1:
            raise FitError(
                f"{path}: several {column}s: choose one by --group {column}=VALUE; it has {_some(rows[column])}"
            )
    return rows


def _some(values: pd.Series) -> str:
    names = sorted(values.astype(str).unique())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _counts(rows: pd.DataFrame, name: str, path: Path) -> NDArray[np.int64]:
    numbers = pd.to_numeric(rows[name], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    wrong = ~((numbers >= 0) & (numbers < 2**53) & (numbers == np.round(numbers)))
    if wrong.any():
        value = rows[name].iloc[int(wrong.argmax())]
        raise FitError(
            f"{path}: {name}={value} in row {int(rows.index[wrong.argmax()]) + 1} must be a whole number >= 0"
        )
    return numbers.astype(np.int64)


def _truncated(
    rows: pd.DataFrame, tokens: NDArray[np.int64], cap: int | None, path: Path
) -> tuple[NDArray[np.bool_], bool]:
    at_cap = np.zeros(tokens.size, dtype=bool) if cap is None else tokens >= cap
    if "truncated" not in rows or rows["truncated"].isna().all():
        return at_cap, cap is not None
    flags = pd.to_numeric(rows["truncated"], errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    wrong = ~np.isin(flags, (0, 1))
    if wrong.any():
        value, row = rows["truncated"].iloc[int(wrong.argmax())], int(rows.index[int(wrong.argmax())]) + 1
        raise FitError(f"{path}: truncated={value} in row {row} must be 0 or 1 (or unknown in all rows)")
    return at_cap | (flags == 1), True


def _epochs(
    rows: pd.DataFrame, prompt: NDArray[np.int64], steps_per_epoch: int | None, path: Path
) -> NDArray[np.float64] | None:
    """Epoch of each response; without a column of it, how often its prompt had been visited before."""
    if "epoch" in rows and not rows["epoch"].isna().any():
        epoch = _counts(rows, "epoch", path)
    elif "step" in rows and not rows["step"].isna().any():
        step = _counts(rows, "step", path)
        visit = pd.Series(step).groupby(prompt).rank(method="dense").to_numpy().astype(np.int64) - 1
        epoch = visit if steps_per_epoch is None else step // steps_per_epoch
    else:
        return None
    return (epoch - epoch.min()).astype(float) if np.unique(epoch).size > 1 else None


def _prompt_tokens(rows: pd.DataFrame, prompt: NDArray[np.int64], path: Path) -> tuple[int, ...]:
    if "prompt_tokens" not in rows or rows["prompt_tokens"].isna().all():
        return ()
    known = rows[rows["prompt_tokens"].notna()]
    counts = _counts(known, "prompt_tokens", path)
    first = pd.Series(counts).groupby(prompt[rows["prompt_tokens"].notna().to_numpy()]).first()
    return tuple(max(int(n), 1) for n in first)
