"""How long one iteration of a rollout engine takes.

The shipped table, `data/iteration_times.csv.gz`, comes from aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0): its
project measured the GEMM, attention and all-reduce kernels of vLLM on the GPUs themselves, and its estimator adds them
up to an iteration. `simrl.experiments.derive_iteration_times` asked that estimator for the grid on 2026-11-22 and
rounded the answers to five digits; with ``--check`` it prints how far lookups here are from the estimator.

What the numbers are not: the estimator interpolates to the dimensions of most models, and knows nothing of CPU time,
scheduling and kernel launches, so that they must come from elsewhere (`Execution`). Its all-reduce on L40S is very slow
from four GPUs on: a prefill takes longer at TP 4 than at TP 1. On A100 the kernels are those of an older vLLM.
"""

from __future__ import annotations

import gzip
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import ceil, inf, isfinite, sqrt
from typing import Literal

from simrl.traces.models import Model, load_model, model_names

VLLM_VERSIONS = {"l40s": "0.24.0", "h100": "0.24.0", "h200": "0.24.0", "a100": "0.14.0"}
"""Whose kernels were measured, by GPU."""

# Knots of the shipped and of the roofline tables. GEMM kernels change their tiling above 256, 512 and 1024 tokens, and
# the time jumps by up to a quarter there: a second knot just behind keeps the jump from leaning over the whole segment.
# It is 260, not 257, because a prime number of tokens does not split into requests of equal length.
BATCH_KNOTS = (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
CONTEXT_KNOTS = (1, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKEN_KNOTS = (1, 16, 32, 64, 128, 256, 260, 384, 512, 513, 768, 1024, 1025, 2048, 3072, 4096, 8192, 16384)
ATTENDED_KNOTS = (16, 512, 2048, 8192, 32768)

Status = Literal["measured", "derived", "assumed"]


@dataclass(frozen=True)
class Table:
    """Seconds of an iteration over a full grid: ``seconds[i][j]`` at ``tokens[i]`` and ``contexts[j]``.

    Decode: tokens is the number of decoding requests, context their mean number of tokens. Prefill: tokens is the
    number of prompt tokens computed, context the mean number of tokens that each of them attends to.

    Raises:
        ValueError: Knots do not ascend, a cell is missing, or a time is negative or not finite.
    """

    tokens: tuple[int, ...]
    contexts: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _check_knots("tokens", self.tokens)
        _check_knots("contexts", self.contexts)
        if len(self.seconds) != len(self.tokens):
            raise ValueError(f"expected one row for each of tokens={self.tokens}, got {len(self.seconds)} rows")
        for tokens, row in zip(self.tokens, self.seconds, strict=True):
            self._check_row(tokens, row)

    def _check_row(self, tokens: int, row: Sequence[float]) -> None:
        if len(row) != len(self.contexts):
            raise ValueError(f"row tokens={tokens}: expected one time for each of contexts={self.contexts}, got {row}")
        for context, seconds in zip(self.contexts, row, strict=True):
            if not 0 <= seconds < inf:
                raise ValueError(f"row tokens={tokens}, context={context}: seconds={seconds} must be finite and >= 0")

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[int, float, float]]) -> Table:
        """Build the grid from rows of (tokens, context, seconds), in any order.

        Raises:
            ValueError: A cell is missing or occurs twice, or see `Table`.
        """
        cells: dict[tuple[int, float], float] = {}
        for tokens, context, seconds in rows:
            if (tokens, context) in cells:
                raise ValueError(f"row tokens={tokens}, context={context} occurs twice")
            cells[tokens, context] = seconds
        all_tokens = tuple(sorted({tokens for tokens, _ in cells}))
        contexts = tuple(sorted({context for _, context in cells}))
        missing = next(((t, c) for t in all_tokens for c in contexts if (t, c) not in cells), None)
        if missing:
            raise ValueError(f"row tokens={missing[0]}, context={missing[1]} is missing: the grid must be full")
        return cls(all_tokens, contexts, tuple(tuple(cells[t, c] for c in contexts) for t in all_tokens))


def _check_knots(axis: str, knots: Sequence[float]) -> None:
    if not knots:
        raise ValueError(f"{axis} needs at least one knot")
    if not (isfinite(knots[0]) and knots[0] >= 0):
        raise ValueError(f"{axis}[0]={knots[0]} must be finite and >= 0")
    for i in range(1, len(knots)):
        if not knots[i - 1] < knots[i] < inf:
            raise ValueError(f"{axis}[{i}]={knots[i]} must be finite and above {axis}[{i - 1}]={knots[i - 1]}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < inf:
        raise ValueError(f"{name}={value} must be finite and > 0")


@dataclass(frozen=True, slots=True)
class Execution:
    """How an engine runs the kernels whose times a table holds.

    An iteration takes ``max(table * calibration, launch_s) + overhead_s``: launches run ahead of the GPU, and whichever
    of the two is slower sets the pace.

    Attributes:
        calibration: What the engine's kernels take, as a multiple of the table.
        overhead_s: Host time that the GPU has to wait for.
        launch_s: Launching an iteration's kernels one by one (eager mode); 0 with CUDA graphs.
        graph_batches: Batches that CUDA graphs were captured for, ascending. An iteration of fewer tokens is padded to
            the next one, one of more tokens is not padded.
        kv_read_factor: Time to read the context of decoding responses, as a multiple of the table's bf16.
    """

    calibration: float = 1.0
    overhead_s: float = 0.0
    launch_s: float = 0.0
    graph_batches: tuple[int, ...] = ()
    kv_read_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("calibration", "kv_read_factor"):
            _check_positive(name, getattr(self, name))
        for name in ("overhead_s", "launch_s"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and >= 0")
        if self.graph_batches:
            _check_knots("graph_batches", self.graph_batches)

    def padded(self, tokens: int) -> int:
        """Tokens that an iteration of *tokens* tokens really computes."""
        i = bisect_left(self.graph_batches, tokens)
        return self.graph_batches[i] if i < len(self.graph_batches) else tokens


def graph_batches(max_batch: int, wide_from: int, wide_step: int) -> tuple[int, ...]:
    """Batches that vLLM captures: 1, 2, 4, multiples of 8, and from *wide_from* on multiples of *wide_step*."""
    narrow = [*(b for b in (1, 2, 4) if b <= max_batch), *range(8, min(wide_from, max_batch + 1), 8)]
    return (*narrow, *range(wide_from, max_batch + 1, wide_step))


@dataclass(frozen=True, slots=True)
class _Row:
    """Seconds against context at one number of tokens: ``intercepts[i] + slopes[i] * context`` in segment i.

    Segment i ends at context knot i; the last one has no end.
    """

    intercepts: list[float]
    slopes: list[float]
    outside: bool


class _Lookup:
    """A table's rows for any number of tokens, interpolated once and kept."""

    def __init__(self, table: Table, execution: Execution, read_factor: float = 1.0) -> None:
        self.table = table
        self.knots = [float(context) for context in table.contexts]
        self.ends = [*self.knots, inf]
        self.last_context = self.knots[-1]
        self.rows: dict[int, _Row] = {}
        self._execution = execution
        self._read_factor = read_factor

    def make_row(self, tokens: int) -> _Row:
        """Interpolate the row of *tokens* and keep it in `rows`."""
        if tokens < 1:
            raise ValueError(f"an iteration needs at least 1 token, got {tokens}")
        times = self._times(tokens)
        knots = self.knots
        slopes = [0.0]  # below the first knot its time holds
        slopes += [(times[i + 1] - times[i]) / (knots[i + 1] - knots[i]) for i in range(len(knots) - 1)]
        # A table that falls at its end does so by noise; going on falling would end below zero.
        slopes.append(max(0.0, slopes[-1]))
        starts = [0, *range(len(knots))]
        intercepts = [times[start] - slope * knots[start] for start, slope in zip(starts, slopes, strict=True)]
        row = self.rows[tokens] = _Row(intercepts, slopes, outside=tokens > self.table.tokens[-1])
        return row

    def _times(self, tokens: int) -> list[float]:
        """What the engine makes of the table's times, at each context knot."""
        run, seconds = self._execution, self._seconds(tokens)
        shortest_s, padded = seconds[0], run.padded(tokens)
        # Padding goes through the linear layers; only real tokens have a context to read.
        padding_s = max(self._seconds(padded)[0] - shortest_s, 0.0) if padded > tokens else 0.0
        kernels = (shortest_s + padding_s + (s - shortest_s) * self._read_factor for s in seconds)
        return [max(kernel_s * run.calibration, run.launch_s) + run.overhead_s for kernel_s in kernels]

    def _seconds(self, tokens: int) -> list[float]:
        knots, rows = self.table.tokens, self.table.seconds
        i = bisect_right(knots, tokens)
        if i == 0 or len(knots) == 1:
            return list(rows[0])
        beyond = i == len(knots)
        low, high = (i - 2, i - 1) if beyond else (i - 1, i)
        share = (tokens - knots[low]) / (knots[high] - knots[low])
        steps = [b - a for a, b in zip(rows[low], rows[high], strict=True)]
        if beyond:
            return [b + (share - 1) * max(0.0, step) for b, step in zip(rows[high], steps, strict=True)]
        return [a + share * step for a, step in zip(rows[low], steps, strict=True)]


class IterationTimes:
    """Seconds of one engine iteration, from a decode and a prefill table.

    Times at the knots are the table's as `Execution` changes them, and linear between. Below the first knot its time
    holds. Beyond the last knot the last segment goes on, level if it falls, and `extrapolated` counts such lookups.

    Attributes:
        source: Where the tables come from.
        status: How sure they are.
        extrapolated: Number of lookups beyond a table's last knots; a span counts once.
    """

    def __init__(
        self,
        decode: Table,
        prefill: Table,
        *,
        execution: Execution = Execution(),
        source: str,
        status: Status,
    ) -> None:
        self.source = source
        self.status: Status = status
        self.extrapolated = 0
        self._decode = _Lookup(decode, execution, execution.kv_read_factor)
        self._prefill = _Lookup(prefill, execution)

    @property
    def reach(self) -> str:
        """What the tables hold, in words; beyond it, times are extrapolated."""
        decode, prefill = self._decode.table, self._prefill.table
        return (
            f"batches of {decode.tokens[-1]}, contexts of {decode.contexts[-1]:.0f} tokens and prefills of "
            f"{prefill.tokens[-1]} tokens that attend to {prefill.contexts[-1]:.0f}"
        )

    def decode_s(self, batch: int, context: float) -> float:
        """Seconds of an iteration in which *batch* requests of mean *context* tokens decode one token each."""
        return self._at(self._decode, batch, context)

    def prefill_s(self, tokens: int, attended: float) -> float:
        """Seconds of an iteration that computes *tokens* prompt tokens, each attending to *attended* tokens on average.

        A fresh prompt of s tokens has s / 2, after p cached ones p + s / 2.
        """
        return self._at(self._prefill, tokens, attended)

    def iteration_s(self, prefill_tokens: int, attended: float, batch: int, context: float) -> float:
        """Seconds of an iteration that prefills and decodes at once; without one part, the other's own time.

        All tokens pass the linear layers together, as in a prefill of both; reading the decoding requests' context
        costs what the decode table adds above its shortest context. Against aiconfigurator's own mixed iterations the
        median error is 0.4 % to 3 % for Qwen2.5-7B and the worst 12 %, mostly too fast; the plain sum of both parts
        would be some 20 % too slow.
        """
        if not prefill_tokens:
            return self.decode_s(batch, context)
        if not batch:
            return self.prefill_s(prefill_tokens, attended)
        tokens = prefill_tokens + batch
        shortest = self._decode.knots[0]
        mean_attended = (prefill_tokens * attended + batch * shortest) / tokens
        reading_s = self.decode_s(batch, context) - self.decode_s(batch, shortest)
        return self.prefill_s(tokens, mean_attended) + max(0.0, reading_s)

    def decode_span_s(self, batch: int, context: float, iterations: int) -> float:
        """Seconds of *iterations* decode iterations at a fixed batch, where each adds a token to every request.

        Equals the sum of ``decode_s(batch, context + j)`` over j < *iterations*: arithmetic series, cut at the knots.
        """
        if iterations < 0:
            raise ValueError(f"iterations={iterations} must be >= 0")
        lookup = self._decode
        row = lookup.rows.get(batch) or lookup.make_row(batch)
        last = context + iterations - 1
        if last > lookup.last_context or row.outside:
            self.extrapolated += 1
        i = bisect_right(lookup.knots, context)
        if last <= lookup.ends[i]:
            return iterations * (row.intercepts[i] + row.slopes[i] * (context + (iterations - 1) / 2))
        return self._span_over_knots(row, context, iterations)

    def _span_over_knots(self, row: _Row, context: float, iterations: int) -> float:
        lookup = self._decode
        seconds = 0.0
        done = 0
        while done < iterations:
            start = context + done
            i = bisect_right(lookup.knots, start)
            rest = iterations - done
            count = min(rest, ceil(lookup.ends[i] - start)) if i < len(lookup.knots) else rest
            seconds += count * (row.intercepts[i] + row.slopes[i] * (start + (count - 1) / 2))
            done += count
        return seconds

    def iterations_until(self, batch: int, context: float, seconds: float) -> int:
        """Smallest number of decode iterations that takes at least *seconds*; the inverse of `decode_span_s`.

        A shortfall of 1e-12 of *seconds* passes for rounding.

        Raises:
            ValueError: *seconds* are not finite, or iterations take no time, so that no number is enough.
        """
        if not seconds < inf:
            raise ValueError(f"seconds={seconds} must be finite")
        rest_s = seconds * (1 - 1e-12)
        if rest_s <= 0:
            return 0
        lookup = self._decode
        row = lookup.rows.get(batch) or lookup.make_row(batch)
        done = 0
        while True:
            start = context + done
            i = bisect_right(lookup.knots, start)
            slope = row.slopes[i]
            first_s = row.intercepts[i] + slope * start
            if i < len(lookup.knots):
                count = ceil(lookup.ends[i] - start)
                segment_s = count * (first_s + slope * (count - 1) / 2)
                if segment_s < rest_s:
                    rest_s -= segment_s
                    done += count
                    continue
            terms = _terms_until(first_s, slope, rest_s)
            if row.outside or context + done + terms - 1 > lookup.last_context:
                self.extrapolated += 1
            return done + terms

    def flat_batch(self, context: float, tolerance: float) -> int:
        """Largest batch, up to the table's last, that decodes at most *tolerance* slower than a batch of 1.

        *tolerance* is a fraction of that batch's iteration time.
        """
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance} must be >= 0")
        knots = self._decode.table.tokens
        limit_s = (1 + tolerance) * self.decode_s(1, context)
        # From above: noise makes some tables dip, and the largest batch is wanted, not the first that is too slow.
        high = len(knots) - 1
        while high > 0 and self.decode_s(knots[high], context) > limit_s:
            low = high - 1
            if self.decode_s(knots[low], context) <= limit_s:
                return self._last_within(limit_s, context, knots[low], knots[high])
            high = low
        return max(1, knots[high])

    def _last_within(self, limit_s: float, context: float, low: int, high: int) -> int:
        """Largest batch in [low, high) that takes at most *limit_s*, where low does and high does not."""
        while high - low > 1:
            middle = (low + high) // 2
            if self.decode_s(middle, context) <= limit_s:
                low = middle
            else:
                high = middle
        return low

    def _at(self, lookup: _Lookup, tokens: int, context: float) -> float:
        row = lookup.rows.get(tokens) or lookup.make_row(tokens)
        if context > lookup.last_context or row.outside:
            self.extrapolated += 1
        i = bisect_right(lookup.knots, context)
        return row.intercepts[i] + row.slopes[i] * context


def _terms_until(first: float, slope: float, total: float) -> int:
    """Smallest number of terms of first, first + slope, first + 2 slope ... that add up to *total*."""
    # The root of n * first + slope * n (n - 1) / 2 = total, in the form that survives a slope of zero.
    half = first - slope / 2
    divisor = half + sqrt(max(0.0, half * half + 2 * slope * total))
    if divisor <= 0:
        raise ValueError("decode iterations take no time here, so no number of them is enough")
    return max(1, ceil(2 * total / divisor))


def load_iteration_times(
    model: Model, gpu: str, tensor_parallel: int, execution: Execution = Execution()
) -> IterationTimes | None:
    """Times from the shipped table, or None when it does not hold a model of this shape, GPU and degree."""
    same = (name for name in model_names() if load_model(name).shape == model.shape)
    keys = (f"{name},{gpu.lower()},{tensor_parallel}" for name in same)
    key = next((key for key in keys if _shipped_rows(key)), None)
    if key is None:
        return None
    decode, prefill = _shipped_tables(key)
    return IterationTimes(decode, prefill, execution=execution, source=_source(key), status="derived")


def _source(key: str) -> str:
    name, gpu, _ = key.split(",")
    return (
        f"aiconfigurator-core 0.12.0 (Apache-2.0): its kernel measurements for vLLM {VLLM_VERSIONS[gpu]}, bf16, "
        f"interpolated to the dimensions of {name}; derived 2026-11-22 by simrl.experiments.derive_iteration_times"
    )


@cache
def _shipped_tables(key: str) -> tuple[Table, Table]:
    """(decode, prefill) of one "model,GPU,degree" in the shipped file."""
    kinds: dict[str, list[tuple[int, float, float]]] = {"decode": [], "prefill": []}
    for row in _shipped_rows(key):
        kind, tokens, context, milliseconds = row.removeprefix(f"{key},").split(",")
        kinds[kind].append((int(tokens), float(context), float(milliseconds) / 1e3))
    return Table.from_rows(kinds["decode"]), Table.from_rows(kinds["prefill"])


def _shipped_rows(key: str) -> list[str]:
    """The lines of one "model,GPU,degree", which stand together in the shipped file; parsing all would take a while."""
    text = _shipped_text()
    first, last = text.find(f"\n{key},"), text.rfind(f"\n{key},")
    return [] if first < 0 else text[first + 1 : text.index("\n", last + 1)].split("\n")


@cache
def _shipped_text() -> str:
    return gzip.decompress(files("simrl.traces").joinpath("data/iteration_times.csv.gz").read_bytes()).decode()
