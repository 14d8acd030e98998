"""How many generation actors: the time T(N) and the cost C(N) of N of them, and the best N.

Source: RLHFless (arXiv 2602.22718): predicted work and profiled decode times give T(N) and C(N), a normalised weighted
sum of which is least at N, as long as moving weights and KV to other nodes hides behind the heavy actor beside the
learner. Our reconstruction: T(N) is the expected maximum over all responses and actors, with an interval; both include
the prefill, once with and once without prefill functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simrl.policies.contract import Observation, Role
from simrl.policies.prediction import INTERVAL, FloatArray, Forecast

ALL_COUNTS_UP_TO = 16
TIMES = 96  # points at which the distribution of T(N) is looked at


@dataclass(frozen=True, slots=True)
class Plan:
    """Actors for a step.

    Attributes:
        bounds: Where their chunks of prompts end, [actors + 1].
        helpers: Prefill functions; 0: each actor prefills its own prompts.
        seconds: T(N), expected seconds until the last response of all.
        interval_s: Seconds between which that lies with the probability of INTERVAL, if decode times are right.
        actor_s: C(N), expected seconds of all actors and prefill functions together.
        hidden: Whether actors on other nodes, their weights and KV moved, are expected to end before the local ones.
    """

    bounds: tuple[int, ...]
    helpers: int
    seconds: float
    interval_s: tuple[float, float]
    actor_s: float
    hidden: bool


class ActorScaling:
    """T(N) and C(N) for a step's prompts.

    Args:
        observation: For profiled times.
        forecast: Of the prompts, in the order in which they are cut into chunks.
        roles: Of the functions; the KV of an actor is what they leave.
        balance: Chunks of equally many prompts, or of equal predicted tokens.
    """

    def __init__(
        self,
        observation: Observation,
        forecast: Forecast,
        roles: tuple[Role, ...],
        balance: Literal["count", "work"],
    ) -> None:
        self.forecast, self.balance = forecast, balance
        self.estimates, self.gpus = observation.estimates, observation.engine.tensor_parallel
        lengths = forecast.lengths
        self.iterations, middles = np.diff(lengths), (lengths[1:] + lengths[:-1]) / 2
        total_tokens = float(forecast.prompt_tokens.sum())
        mean_prompt = total_tokens / len(forecast.mean)
        fits = max(1, int(self.estimates.kv_tokens(self.gpus, roles) / (mean_prompt + forecast.mean.mean())))
        batches = np.unique(np.minimum(2.0 ** np.arange(0, 10), fits))
        seconds = np.array([
            [self.estimates.decode_s(int(batch), float(mean_prompt + length), self.gpus) for batch in batches]
            for length in middles
        ])  # fmt: skip
        # Beyond what fits in KV responses take turns: time grows with their number.
        self.batches = np.append(batches, 1e3 * batches[-1])
        self.seconds_by_batch = np.column_stack([seconds, 1e3 * seconds[:, -1]])
        self.prefill_s_per_token = self.estimates.prefill_s(round(total_tokens), self.gpus) / total_tokens
        self.copies = 1 if observation.engine.prefix_caching else observation.job.responses_per_prompt
        self._alive, self._log_done = _cumulated(forecast.alive), _cumulated(forecast.log_done)
        self._prompt_tokens = _cumulated(forecast.prompt_tokens)

    def bounds(self, actors: int) -> NDArray[np.intp]:
        """Ends of contiguous chunks, [actors + 1]."""
        mean = self.forecast.mean
        if self.balance == "count":
            return np.round(np.linspace(0, len(mean), actors + 1)).astype(np.intp)
        work = _cumulated(mean)
        return np.searchsorted(work, np.linspace(0.0, work[-1], actors + 1)).astype(np.intp)

    def plan(self, move_s: FloatArray, local: NDArray[np.bool_], helpers: int = 0) -> Plan:
        """Time and cost of as many actors as *move_s* has entries.

        Args:
            move_s: Seconds until each actor has its weights, beyond what the learner's own functions take, [actors].
            local: Whether each is on a node of the learner, [actors].
            helpers: Prefill functions.
        """
        bounds = self.bounds(len(move_s))
        ready_s = move_s + self._prefill_s(np.diff(self._prompt_tokens[bounds]), local, helpers)
        alive, log_done = np.diff(self._alive[bounds], axis=0), np.diff(self._log_done[bounds], axis=0)
        iteration_s = self._iteration_s((alive[:, 1:] + alive[:, :-1]) / 2)
        span_s = iteration_s * self.iterations
        at_s = ready_s[:, None] + np.column_stack([np.zeros(len(ready_s)), np.cumsum(span_s, axis=1)])
        unfinished = -np.expm1((log_done[:, 1:] + log_done[:, :-1]) / 2)
        busy_s = np.where(np.diff(bounds) > 0, ready_s, 0.0) + (span_s * unfinished).sum(axis=1)
        times_s, cdf = _all_done(at_s, log_done)
        low_s, high_s = np.interp(INTERVAL, cdf, times_s)
        helpers_s = self._prompt_tokens[-1] * self.prefill_s_per_token if helpers else 0.0
        return Plan(
            bounds=tuple(bounds.tolist()),
            helpers=helpers,
            seconds=float(np.trapezoid(1 - cdf, times_s)),
            interval_s=(float(low_s), float(high_s)),
            actor_s=float(busy_s.sum() + helpers_s),
            hidden=bool(local.all() or busy_s[~local].max() <= busy_s[local].max(initial=0.0)),
        )

    def _prefill_s(self, tokens: FloatArray, local: NDArray[np.bool_], helpers: int) -> FloatArray:
        """Seconds until each actor has the KV of its *tokens* prompt tokens."""
        if not helpers:
            return tokens * self.copies * self.prefill_s_per_token
        mean = round(float(tokens.mean()))
        near_s, far_s = (self.estimates.transfer_s(mean, self.gpus, same_node=near) for near in (True, False))
        ready_s: FloatArray = np.cumsum(tokens) / helpers * self.prefill_s_per_token + np.where(local, near_s, far_s)
        return ready_s

    def _iteration_s(self, batch: FloatArray) -> FloatArray:
        """Seconds of an iteration, by actor and length, interpolated in the batch."""
        batch = np.maximum(batch, 1.0)
        last = np.minimum(np.searchsorted(self.batches, batch, side="right"), len(self.batches) - 1)
        share = (batch - self.batches[last - 1]) / (self.batches[last] - self.batches[last - 1])
        rows = np.arange(batch.shape[1])
        below, above = self.seconds_by_batch[rows, last - 1], self.seconds_by_batch[rows, last]
        return np.asarray(below + share * (above - below))


def best_plan(plans: Sequence[Plan], reference: Plan, time_weight: float) -> Plan:
    """The plan with the least weighted sum of T(N) and C(N), both relative to those of *reference*.

    Args:
        plans: Candidates.
        reference: All actors, without prefill functions.
        time_weight: 1 the fastest, 0 the cheapest.
    """

    def score(plan: Plan) -> float:
        time, cost = plan.seconds / reference.seconds, plan.actor_s / reference.actor_s
        return time_weight * time + (1 - time_weight) * cost

    return min(plans, key=score)


def candidate_counts(most: int) -> list[int]:
    """Numbers of actors to look at: all up to ALL_COUNTS_UP_TO, then some 15 % apart."""
    counts, count = [], 1
    while count < most:
        counts.append(count)
        count = count + 1 if count < ALL_COUNTS_UP_TO else math.ceil(count * 1.15)
    return [*counts, most]


def _all_done(at_s: FloatArray, log_done: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Times, and the probability that all actors are done by then.

    Args:
        at_s: When each actor has come to each length, [actors, lengths].
        log_done: Ln of the probability that it has no longer response, [actors, lengths].
    """
    times_s = np.linspace(0.0, at_s.max(), TIMES)
    # One interpolation for all: each actor has a stretch of its own on the axis.
    starts = np.arange(len(at_s))[:, None] * (2.0 * times_s[-1])
    ends = np.full(len(at_s), 1.5 * times_s[-1])
    knots = np.column_stack([np.zeros(len(at_s)), at_s, ends]) + starts
    values = np.column_stack([log_done[:, 0], log_done, log_done[:, -1]])
    log_cdf = np.interp(times_s + starts, knots.ravel(), values.ravel())
    return times_s, np.exp(log_cdf.sum(axis=0))


def _cumulated(rows: FloatArray) -> FloatArray:
    """Sums over the first 0, 1, ... rows."""
    return np.concatenate([np.zeros((1, *rows.shape[1:])), np.cumsum(rows, axis=0)])
