"""A profile: what `simrl profile` measured on a machine, as JSON, and how it is read back.

Seconds are wall time. A "GPU" of a profile is one accelerator, or one core where the device is a CPU.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from simrl.traces.iteration import Execution, IterationTimes, Table
from simrl.traces.job import Section

SCHEMA_VERSION = 1
FIT_ROUNDS = 12
SMALL_ERROR = 0.03  # relative; among smaller errors squares decide, and the fit settles
SHORTEST_S = 1e-6  # of a fitted value, where it is divided by
POINT_CONTEXT_TOKENS = 64  # width of the bins of `IterationPoint`

Floats = npt.NDArray[np.float64]
Place = TypeVar("Place", int, tuple[int, int, int])


class ProfileError(ValueError):
    """A profile that cannot be read or written: which, what is wrong, what is allowed."""


class Quartiles(Section):
    """Repeated measurements of one thing: first quartile, median, third quartile, and how many there were."""

    q1: float
    median: float
    q3: float
    count: int = Field(ge=1)

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Quartiles of at least one value, linear between order statistics."""
        q1, median, q3 = (float(value) for value in np.percentile(values, [25, 50, 75]))
        return cls(q1=q1, median=median, q3=q3, count=len(values))


class Machine(Section):
    """Where it was measured. `gpus` names the accelerators and is empty on a CPU; cores are those of this process."""

    processor: str
    cores: int = Field(ge=1)
    memory_bytes: int = Field(gt=0)
    gpus: tuple[str, ...] = ()


class ProfiledModel(Section):
    """The model that was run; bytes are those of its weights in the engine."""

    name: str
    parameters: int = Field(gt=0)
    weight_bytes: int = Field(gt=0)
    dtype: str


class ProfiledEngine(Section):
    """Options of the engine that was measured. `kv_blocks` are those that responses can have."""

    block_tokens: int = Field(ge=1)
    kv_blocks: int = Field(ge=1)
    max_num_seqs: int = Field(ge=1)
    max_num_batched_tokens: int = Field(ge=1)
    max_model_len: int = Field(ge=1)
    tensor_parallel: int = Field(ge=1)
    threads: int = Field(ge=1)
    enforce_eager: bool
    prefix_caching: bool


class IterationPoint(Section):
    """Iterations near one place of a table: mean tokens (decode: batch), mean context, what they took as measured."""

    tokens: float
    context: float
    seconds: Quartiles


class IterationTable(Section):
    """The fitted times; see `simrl.traces.iteration.Table`. `points` are the medians that they can be held against."""

    tokens: tuple[int, ...]
    contexts: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]
    points: tuple[IterationPoint, ...] = ()

    def table(self) -> Table:
        """For `IterationTimes`.

        Raises:
            ValueError: It is not a full grid of ascending knots and finite times.
        """
        return Table(self.tokens, self.contexts, self.seconds)


class Replay(Section):
    """A workload that was not fitted: what it took, and what the tables make of its iterations.

    `host_factor` is the time of the probes before and after it, over the median of all probes.
    """

    responses: int = Field(ge=1)
    tokens: int = Field(ge=1)
    iterations: int = Field(ge=1)
    measured_s: float = Field(gt=0)
    predicted_s: float = Field(gt=0)
    host_factor: float = Field(gt=0)


class FitError(Section):
    """Relative errors (predicted / measured - 1) over held-out replays; medians, raw and with the host's drift out.

    Without drift, the prediction is multiplied with the host's factor.
    """

    median_abs: float = Field(ge=0)
    median_signed: float
    normalised_median_abs: float = Field(ge=0)
    normalised_median_signed: float
    replays: tuple[Replay, ...] = Field(min_length=1)

    @classmethod
    def of(cls, replays: Sequence[Replay]) -> FitError:
        """Over at least one replay."""
        raw = [replay.predicted_s / replay.measured_s - 1 for replay in replays]
        normalised = [replay.predicted_s * replay.host_factor / replay.measured_s - 1 for replay in replays]
        return cls(
            median_abs=statistics.median(map(abs, raw)),
            median_signed=statistics.median(raw),
            normalised_median_abs=statistics.median(map(abs, normalised)),
            normalised_median_signed=statistics.median(normalised),
            replays=tuple(replays),
        )


class Iterations(Section):
    """Times of engine iterations, fitted to replays of mixed-length responses.

    An engine is in a process of its own, and calls to it run several iterations. On the virtual clock several engines
    share a core and take turns, which leaves each with cold caches.

    Attributes:
        decode: Over batch and mean context.
        prefill: Over computed tokens and the tokens that each attends to on average.
        other_clock: Seconds of the iterations of the same work on the clock that was not profiled, over those on the
            one that was.
        step_overhead_s: Time between two iterations on the wall clock, the share of a call included.
        fitted_iterations: How many there were.
        fit_error: On other workloads.
    """

    decode: IterationTable
    prefill: IterationTable
    other_clock: Quartiles
    step_overhead_s: Quartiles
    fitted_iterations: int = Field(ge=1)
    fit_error: FitError


class PrefixHit(Section):
    """Prompts of `tokens` tokens in sum, computed in one iteration, and again with all whole blocks cached."""

    tokens: int = Field(ge=1)
    cold_s: Quartiles
    hit_s: Quartiles


class LinePoint(Section):
    """What a line was fitted to."""

    tokens: int = Field(ge=1)
    seconds: Quartiles


class Line(Section):
    """Seconds = fixed_s + token_s * tokens. `residual` is measured / fitted - 1 over all measurements."""

    fixed_s: float = Field(ge=0)
    token_s: float = Field(ge=0)
    residual: Quartiles
    points: tuple[LinePoint, ...] = Field(min_length=1)

    @classmethod
    def fit(cls, measured: Sequence[tuple[int, float]]) -> Line:
        """To pairs of tokens and seconds, by least absolute relative errors."""
        unknowns, residual = _relative_fit([(1, tokens) for tokens, _ in measured], [s for _, s in measured])
        points = [LinePoint(tokens=n, seconds=Quartiles.of(each)) for n, each in _grouped(measured)]
        return cls(fixed_s=unknowns[0], token_s=unknowns[1], residual=residual, points=tuple(points))

    def seconds(self, tokens: float) -> float:
        """At so many tokens."""
        return self.fixed_s + self.token_s * tokens


class KVMoves(Section):
    """KV of one response out of an engine into files, and back into an engine."""

    block_bytes: int = Field(gt=0)
    save: Line
    load: Line


class UpdatePoint(Section):
    """An update that was measured; tokens (padded) and micro-batches are the busiest rank's."""

    tokens: int = Field(ge=1)
    micro_batches: int = Field(ge=1)
    optimizer_steps: int = Field(ge=1)
    seconds: Quartiles


class UpdateTimes(Section):
    """Seconds of one update: each optimizer step, each micro-batch (forward and backward), each token of a rank.

    Tokens are padded ones.
    """

    optimizer_step_s: float = Field(ge=0)
    micro_batch_s: float = Field(ge=0)
    token_s: float = Field(ge=0)
    residual: Quartiles
    points: tuple[UpdatePoint, ...] = Field(min_length=1)

    @classmethod
    def fit(cls, measured: Sequence[tuple[tuple[int, int, int], float]]) -> UpdateTimes:
        """To (optimizer steps, micro-batches, tokens) and seconds, by least absolute relative errors."""
        unknowns, residual = _relative_fit([place for place, _ in measured], [s for _, s in measured])
        return cls(
            optimizer_step_s=unknowns[0],
            micro_batch_s=unknowns[1],
            token_s=unknowns[2],
            residual=residual,
            points=tuple(
                UpdatePoint(optimizer_steps=steps, micro_batches=micro, tokens=tokens, seconds=Quartiles.of(each))
                for (steps, micro, tokens), each in _grouped(measured)
            ),
        )

    def seconds(self, optimizer_steps: int, micro_batches: int, tokens: float) -> float:
        """Of one update."""
        return self.optimizer_step_s * optimizer_steps + self.micro_batch_s * micro_batches + self.token_s * tokens


class ColdStart(Section):
    """A fresh process until it is of use: medians by phase, and each start's seconds in all."""

    phases_s: dict[str, float]
    total_s: tuple[float, ...] = Field(min_length=1)


class Preparation(Section):
    """Log-probs of finished responses under whole weights, in the process of an engine.

    Attributes:
        score: One model's forward passes, over padded tokens.
        load_s: Taking in the newest weights.
        first_load_s: Making the model, once in a process.
    """

    score: Line
    load_s: Quartiles
    first_load_s: float = Field(ge=0)


class Learner(Section):
    """A learner of `world` ranks; ranks wait for each other on the wall, but not in CPU seconds.

    Attributes:
        world: Ranks, one GPU each.
        algorithm: What `update` did.
        start: Cold start of its ranks.
        update: One model's.
        update_cpu: The same in CPU seconds of the busiest rank.
        export_s: Gathering the actor's weights and writing them for the engines.
        export_cpu_s: The same in CPU seconds of the busiest rank.
    """

    world: int = Field(ge=1)
    algorithm: Literal["grpo", "ppo"]
    start: ColdStart
    update: UpdateTimes
    update_cpu: UpdateTimes
    export_s: Quartiles
    export_cpu_s: Quartiles


class ProbePoint(Section):
    """The same small replay, again and again: `at_s` after the profile began."""

    at_s: float
    seconds: float = Field(gt=0)


class Profile(Section):
    """All that was measured, and where, when, with what.

    Attributes:
        schema_version: Of this format.
        date: When it was made, ISO 8601, UTC.
        quick: Few repetitions.
        seed: Of the workloads and of the order of measurements.
        duration_s: Of the whole profile.
        repetitions: Of each kind of measurement.
        device: What the engines and the learner ran on.
        clock: In which regime iterations were measured; see `Iterations`.
        engines: How many were measured, in turn.
        machine: Without its name.
        software: Versions.
        model: What was run.
        engine: How.
        iterations: Times of engine iterations.
        prefix_hits: What cached prompts save.
        kv: Moving KV.
        load_weights_s: New weights from a file into all engines, until the slowest has them.
        park_s: All engines of a round have given their memory back, side by side: the slowest of them.
        wake_s: An engine has it again, with one, two and more engines awake then: memory that is free comes first.
        engine_start: Cold start of an engine.
        preparation: Log-probs.
        micro_batch_tokens: Limit of a micro-batch in preparation and, unless varied, in learning; padding included.
        learners: One a number of ranks, ascending.
        call_overhead_s: Round trip of a call to an engine's process that does nothing.
        probe_s: Drift of the host.
    """

    schema_version: Literal[1] = 1
    date: str
    quick: bool
    seed: int
    duration_s: float = Field(gt=0)
    repetitions: dict[str, int]
    device: Literal["cpu", "cuda"]
    clock: Literal["wall", "virtual"]
    engines: int = Field(ge=1)
    machine: Machine
    software: dict[str, str]
    model: ProfiledModel
    engine: ProfiledEngine
    iterations: Iterations
    prefix_hits: tuple[PrefixHit, ...]
    kv: KVMoves
    load_weights_s: Quartiles
    park_s: Quartiles
    wake_s: tuple[Quartiles, ...] = Field(min_length=1)
    engine_start: ColdStart
    preparation: Preparation
    micro_batch_tokens: int = Field(ge=1)
    learners: tuple[Learner, ...] = Field(min_length=1)
    call_overhead_s: float = Field(ge=0)
    probe_s: tuple[ProbePoint, ...] = Field(min_length=1)

    def iteration_times(self, source: str, clock: Literal["wall", "virtual"]) -> IterationTimes:
        """What one iteration of the measured engine takes.

        Args:
            source: Names the profile.
            clock: Of the run. On the "wall" the time between iterations counts, too.
        """
        factor = 1.0 if clock == self.clock else self.iterations.other_clock.median
        execution = Execution(factor, self.iterations.step_overhead_s.median if clock == "wall" else 0.0)
        return IterationTimes(
            self.iterations.decode.table(),
            self.iterations.prefill.table(),
            execution=execution,
            source=source,
            status="measured",
        )

    def probe_on(self, clock: Literal["wall", "virtual"]) -> float:
        """Seconds of the probe's iterations on that clock, the median."""
        factor = 1.0 if clock == self.clock else self.iterations.other_clock.median
        return factor * statistics.median(probe.seconds for probe in self.probe_s)

    def overview(self) -> list[dict[str, str]]:
        """What stands out, a row each: `measured` and `value`."""
        error, probes = self.iterations.fit_error, [probe.seconds for probe in self.probe_s]
        times = self.iteration_times("this profile", self.clock)
        batches = [batch for batch in (1, 8, 32) if batch <= self.engine.max_num_seqs]
        rows = {
            f"decode, batch {batch}, context 256": f"{1e3 * times.decode_s(batch, 256):.2f} ms" for batch in batches
        }
        rows |= {
            "prefill, 256 tokens": f"{1e3 * times.prefill_s(256, 128):.2f} ms",
            "log-probs, 1000 padded tokens": f"{self.preparation.score.seconds(1000):.3f} s",
            **{
                f"update, 1000 padded tokens, {learner.world} ranks": f"{learner.update.seconds(1, 1, 1000):.3f} s"
                for learner in self.learners
            },
            "weights into an engine": f"{1e3 * self.load_weights_s.median:.1f} ms",
            "cold start of an engine": f"{statistics.median(self.engine_start.total_s):.1f} s",
            "held-out replays": f"{len(error.replays)}",
            "error, median absolute": f"{error.median_abs:.1%}",
            "error, median signed": f"{error.median_signed:+.1%}",
            "error without drift, median absolute": f"{error.normalised_median_abs:.1%}",
            "error without drift, median signed": f"{error.normalised_median_signed:+.1%}",
            "probe, fastest to slowest": f"{min(probes):.3f} to {max(probes):.3f} s",
            "duration": f"{self.duration_s:.0f} s",
        }
        return [{"measured": name, "value": value} for name, value in rows.items()]

    def learner(self, world: int) -> Learner:
        """The learner whose number of ranks is nearest to *world* by their ratio; of two as near, the larger."""
        return min(self.learners, key=lambda learner: (abs(math.log(learner.world / world)), -learner.world))

    def write(self, path: str | Path) -> None:
        """Write it; the file appears complete or not at all.

        Raises:
            ProfileError: it cannot be written.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ProfileError(f"profile {str(path)!r} cannot be written: {error.strerror}") from error


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        ProfileError: there is no such file, it is no JSON, of another schema version, or a value is not allowed.
    """
    name = f"profile {str(path)!r}"
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ProfileError(f"{name} is not JSON: {error}; allowed: a file that `simrl profile` wrote") from None
    if not isinstance(tree, dict) or "schema_version" not in tree:
        raise ProfileError(f"{name} has no schema_version; allowed: a file that `simrl profile` wrote")
    if tree["schema_version"] != SCHEMA_VERSION:
        raise ProfileError(f"{name}: schema_version={tree['schema_version']!r} is unknown; allowed: {SCHEMA_VERSION}")
    try:
        profile = Profile.model_validate(tree)
        profile.iterations.decode.table()
        profile.iterations.prefill.table()
    except ValidationError as error:
        raise ProfileError(f"{name}: {_explain(error)}") from None
    except ValueError as error:
        raise ProfileError(f"{name}: {error} (in iterations)") from None
    return profile


def _explain(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}={first['input']!r:.80}: {first['msg']}"


# --- Fits. ---


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration of a replay.

    Attributes:
        batch: Responses that decoded a token.
        context: Their known tokens, in sum.
        prefill: Tokens computed for others.
        attended: Tokens that these attend to, in sum.
        seconds: What it took.
    """

    batch: int
    context: int
    prefill: int
    attended: float
    seconds: float


def fit_tables(
    replays: Sequence[Sequence[Iteration]], *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
) -> tuple[IterationTable, IterationTable]:
    """Decode and prefill tables from the iterations of several replays, up to an engine's limits.

    An iteration is taken apart as `IterationTimes.iteration_s` puts it together. Steps between knots, reading of
    context in decoding and in prefill are the unknowns, none below 0, fitted by least absolute relative errors. Each
    replay has a factor of its own, so that a host that slows down for seconds does not pass for a property of the
    batches that ran then. In the end all times are scaled so that the median replay's total is right: a median
    iteration knows nothing of the host's pauses.
    """
    batches, budget = decode_knots(max_num_seqs), prefill_knots(max_num_batched_tokens)
    rows = np.array([_features(i, batches, budget) for replay in replays for i in replay])
    seconds = np.array([i.seconds for replay in replays for i in replay])
    of_replay = np.repeat(np.eye(len(replays)), [len(replay) for replay in replays], axis=0)
    factors, guess = np.ones(len(replays)), np.full(len(seconds), np.median(seconds))
    for _ in range(FIT_ROUNDS):
        scaled = seconds / (of_replay @ factors)
        # Times and factors at once, or they would settle slowly; a factor may also fall, hence the second sign.
        wide = np.hstack([rows, of_replay * guess[:, None], -of_replay * guess[:, None]])
        found = _robust_step(wide, scaled, guess)
        unknowns, up, down = np.split(found, [rows.shape[1], rows.shape[1] + len(replays)])
        factors *= np.clip(1 + up - down, 0.5, 2.0)
        factors /= np.median(factors)
        guess = np.maximum(rows @ unknowns, SHORTEST_S)
    unknowns *= np.median((of_replay.T @ seconds) / (of_replay.T @ guess))
    one_token_s, steps, chunk_steps = unknowns[0], unknowns[1 : len(batches)], unknowns[len(batches) : -2]
    reading_s, attending_s = unknowns[-2:]
    contexts = (1.0, float(max_model_len))
    decode_s, prefill_s = (one_token_s + np.cumsum([0.0, *each]) for each in (steps, chunk_steps))
    decode = _table(batches, decode_s, reading_s, contexts, _decode_points(replays, batches))
    prefill = _table(budget, prefill_s, attending_s, contexts, _prefill_points(replays, budget))
    return decode, prefill


def decode_knots(largest: int) -> tuple[int, ...]:
    """Batches of the decode table: powers of two, and from 8 on what lies halfway between them."""
    powers = [2**n for n in range(largest.bit_length())]
    return tuple(sorted({*powers, *(p + p // 2 for p in powers if p >= 8 and p + p // 2 <= largest), largest}))


def prefill_knots(largest: int) -> tuple[int, ...]:
    """Tokens of the prefill table: powers of two."""
    return tuple(sorted({*(2**n for n in range(largest.bit_length())), largest}))


def _features(iteration: Iteration, batches: Sequence[int], budget: Sequence[int]) -> Floats:
    """What the unknowns are multiplied with in the time of one iteration; the tables begin at a context of 1.

    They are: an iteration of one token, the steps to longer batches, those to longer chunks, a decoding token's reading
    of a token of context, a prefill token's.
    """
    i = iteration
    if not i.prefill:
        return np.array([1.0, *_ramps(i.batch, batches), *np.zeros(len(budget) - 1), i.context, 0.0])
    chunk = _ramps(i.prefill + i.batch, budget)
    return np.array([1.0, *np.zeros(len(batches) - 1), *chunk, i.context - i.batch, i.attended + i.batch])


def _ramps(value: int, knots: Sequence[int]) -> list[float]:
    """The shares of the steps from knot to knot that *value* has climbed."""
    return [min(max((value - a) / (b - a), 0.0), 1.0) for a, b in itertools.pairwise(knots)]


def _non_negative(rows: Floats, seconds: Floats) -> Floats:
    """Unknowns >= 0 of least squares."""
    from scipy.optimize import nnls

    # Columns of one size: context and tokens are thousands of times larger than steps.
    sizes = np.maximum(np.abs(rows).max(axis=0), 1e-12)
    unknowns: Floats = nnls(rows / sizes, seconds)[0] / sizes
    return unknowns


def _table(
    knots: Sequence[int],
    shortest_s: Floats,
    token_s: float,
    contexts: tuple[float, ...],
    points: tuple[IterationPoint, ...],
) -> IterationTable:
    """Times without context at the knots, and seconds for each token and token of context."""
    rows = tuple(
        tuple(float(f"{base + token_s * tokens * context:.6g}") for context in contexts)
        for tokens, base in zip(knots, shortest_s, strict=True)
    )
    return IterationTable(tokens=tuple(knots), contexts=contexts, seconds=rows, points=points)


def _decode_points(replays: Sequence[Sequence[Iteration]], knots: Sequence[int]) -> tuple[IterationPoint, ...]:
    decodes = [i for replay in replays for i in replay if not i.prefill]
    return _points([(i.batch, i.context / i.batch, i.seconds) for i in decodes], knots)


def _prefill_points(replays: Sequence[Sequence[Iteration]], knots: Sequence[int]) -> tuple[IterationPoint, ...]:
    prefills = [i for replay in replays for i in replay if i.prefill and not i.batch]
    return _points([(i.prefill, i.attended / i.prefill, i.seconds) for i in prefills], knots)


def _points(places: Sequence[tuple[int, float, float]], knots: Sequence[int]) -> tuple[IterationPoint, ...]:
    """Measured (tokens, context, seconds) in bins: tokens by the nearest knot, context by `POINT_CONTEXT_TOKENS`."""
    bins: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
    for place in places:
        nearest = min(knots, key=lambda knot: abs(knot - place[0]))
        bins.setdefault((nearest, int(place[1] // POINT_CONTEXT_TOKENS)), []).append(place)
    return tuple(
        IterationPoint(
            tokens=statistics.fmean(tokens for tokens, _, _ in inside),
            context=statistics.fmean(context for _, context, _ in inside),
            seconds=Quartiles.of([seconds for _, _, seconds in inside]),
        )
        for _, inside in sorted(bins.items())
    )


def predicted_s(times: IterationTimes, iterations: Sequence[Iteration]) -> float:
    """What *times* make of iterations, in sum."""
    total_s = 0.0
    for i in iterations:
        attended = i.attended / i.prefill if i.prefill else 0.0
        total_s += times.iteration_s(i.prefill, attended, i.batch, i.context / i.batch if i.batch else 0.0)
    return total_s


def probe_at(probes: Sequence[ProbePoint], at_s: float) -> float:
    """Seconds of a probe at that time: the mean of the last one before and the first one after."""
    before = [probe.seconds for probe in probes if probe.at_s <= at_s][-1:]
    after = [probe.seconds for probe in probes if probe.at_s > at_s][:1]
    return statistics.fmean([*before, *after])


def _relative_fit(places: Sequence[Sequence[int]], measured_s: Sequence[float]) -> tuple[Floats, Quartiles]:
    """Unknowns >= 0 of least absolute relative errors, and measured / fitted - 1."""
    rows, seconds = np.array(places, dtype=float), np.array(measured_s)
    guess = seconds
    for _ in range(FIT_ROUNDS):
        unknowns = _robust_step(rows, seconds, guess)
        guess = np.maximum(rows @ unknowns, SHORTEST_S)
    return unknowns, Quartiles.of((seconds / (rows @ unknowns) - 1).tolist())


def _robust_step(rows: Floats, seconds: Floats, guess: Floats) -> Floats:
    """One step of reweighted least squares towards least absolute errors, relative to *guess*."""
    weights = 1 / np.sqrt(np.maximum(np.abs(seconds / guess - 1), SMALL_ERROR)) / guess
    return _non_negative(rows * weights[:, None], seconds * weights)


def _grouped(measured: Iterable[tuple[Place, float]]) -> list[tuple[Place, list[float]]]:
    """What was measured at each place."""
    found: dict[Place, list[float]] = {}
    for place, seconds in measured:
        found.setdefault(place, []).append(seconds)
    return sorted(found.items())
