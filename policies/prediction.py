"""Predicted response lengths: an EWMA over epochs, and how wide the truth lies around it.

Source: RLHFless (arXiv 2602.22718) predicts a prompt's length by an EWMA over earlier epochs. Our reconstruction: the
distribution around the prediction, without which the expected maximum of many responses cannot be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from simrl.policies.contract import FinishedStep, Prompt

FloatArray = NDArray[np.float64]
GRID_POINTS = 32  # intervals of length at which a forecast looks at who is still unfinished
FIRST_SPREAD = 0.6  # sd of ln length before anything was observed; public chat and maths sets lie between 0.2 and 1
INTERVAL = (0.05, 0.95)  # quantiles between which a stated interval lies
CERTAIN = 1 - 1e-12  # probabilities are kept below, so that their logarithms are finite


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted lengths of a step's prompts.

    Attributes:
        sort_key: Tokens by which prompts are ranked, [prompts].
        mean: Predicted mean tokens of a response, [prompts].
        prompt_tokens: Tokens of the prompt itself, [prompts].
        lengths: From 0 to the cap, in tokens, [lengths].
        alive: Expected unfinished responses at each length, [prompts, lengths].
        log_done: Ln of the probability that none is unfinished, [prompts, lengths].
    """

    sort_key: FloatArray
    mean: FloatArray
    prompt_tokens: FloatArray
    lengths: FloatArray
    alive: FloatArray
    log_done: FloatArray

    def reordered(self, order: NDArray[np.intp]) -> Forecast:
        """The same prompts in another order."""
        rows = (self.sort_key[order], self.mean[order], self.prompt_tokens[order])
        return Forecast(*rows, self.lengths, self.alive[order], self.log_done[order])

    def longest(self) -> tuple[float, float]:
        """Tokens between which the longest response of all lies with the probability of INTERVAL."""
        done = np.exp(self.log_done.sum(axis=0))
        low, high = np.interp(INTERVAL, done, self.lengths)
        return float(low), float(high)


def length_grid(cap: int) -> FloatArray:
    """Lengths from 0 to the cap, denser where most responses end; the last interval holds those that are cut."""
    grid = cap * np.linspace(0.0, 1.0, GRID_POINTS + 1) ** 2
    return np.unique(np.append(grid, max(cap - 1.0, 0.0)))


def exact_forecast(prompts: Sequence[Prompt], tokens: FloatArray, cap: int) -> Forecast:
    """Of lengths that are known, [prompts, samples]."""
    lengths = length_grid(cap)
    alive = (tokens[:, :, None] > lengths).sum(axis=1).astype(float)
    log_done = np.where(alive > 0, math.log1p(-CERTAIN), 0.0)
    own = np.array([prompt.tokens for prompt in prompts], dtype=float)
    return Forecast(tokens.max(axis=1), tokens.mean(axis=1), own, lengths, alive, log_done)


@dataclass(slots=True)
class Regression:
    """ln observed on ln predicted length, by least squares, over responses that were not cut at the cap.

    A prompt whose last responses were the longest was also lucky to be: its next ones are nearer to the mean.
    """

    count: int = 0
    sums: FloatArray = field(default_factory=lambda: np.zeros(5))  # of x, y, x x, x y, y y

    def add(self, predicted: FloatArray, observed: FloatArray) -> None:
        """Book responses, in tokens."""
        x, y = np.log(predicted), np.log(observed)
        self.count += x.size
        self.sums = self.sums + np.array([x.sum(), y.sum(), x @ x, x @ y, y @ y])

    def normal(self, predicted: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of ln length where so many tokens are predicted."""
        x = np.log(predicted)
        if self.count < 2:
            return x, np.full_like(x, FIRST_SPREAD)
        mean_x, mean_y, xx, xy, yy = self.sums / self.count
        variance = xx - mean_x**2
        slope = (xy - mean_x * mean_y) / variance if variance > 1e-6 else 1.0
        mean = mean_y + slope * (x - mean_x)
        residual = yy - mean_y**2 - slope**2 * variance if variance > 1e-6 else yy - mean_y**2
        return mean, np.full_like(x, max(math.sqrt(max(residual, 0.0)), 0.01))


@dataclass(slots=True)
class Predictor:
    """Predicted response lengths by prompt: an EWMA over epochs, and how far it was off.

    Attributes:
        alpha: Weight of the newest observation.
        default: Predicted tokens of an unseen prompt; None: the mean so far.
    """

    alpha: float
    default: int | None
    predicted: dict[int | str, float] = field(default_factory=dict)
    _steps_seen: int = 0
    _tokens: float = 0.0
    _responses: int = 0
    _at_cap: int = 0
    with_history: Regression = field(default_factory=Regression)
    without_history: Regression = field(default_factory=Regression)

    def observe(self, history: Sequence[FinishedStep], cap: int) -> None:
        """Learn from steps not seen before."""
        for step in history[self._steps_seen :]:
            self._observe_step(step, cap)
        self._steps_seen = len(history)

    def _observe_step(self, step: FinishedStep, cap: int) -> None:
        tokens = np.array(step.response_tokens, dtype=float)
        old, known = self.predictions(step.prompt_ids, cap)
        uncut, told = tokens < cap, np.broadcast_to(old[:, None], tokens.shape)
        for regression, rows in ((self.with_history, known), (self.without_history, ~known)):
            chosen = uncut & rows[:, None]
            regression.add(told[chosen], tokens[chosen])
        mean = tokens.mean(axis=1)
        new = np.where(known, self.alpha * mean + (1 - self.alpha) * old, mean)
        self.predicted.update(zip(step.prompt_ids, new.tolist(), strict=True))
        self._tokens += float(tokens.sum())
        self._responses += tokens.size
        self._at_cap += int(tokens.size - uncut.sum())

    def predictions(self, prompt_ids: Sequence[int | str], cap: int) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Predicted mean tokens of each prompt, and whether it has a history."""
        unseen = self.unseen(cap)
        found = [self.predicted.get(prompt_id) for prompt_id in prompt_ids]
        return np.array([unseen if mean is None else mean for mean in found]), np.array([m is not None for m in found])

    def unseen(self, cap: int) -> float:
        """Predicted tokens of a prompt without history."""
        if self.default is not None:
            return float(self.default)
        return self._tokens / self._responses if self._responses else cap / 4

    def forecast(self, prompts: Sequence[Prompt], cap: int) -> Forecast:
        """Lognormal lengths around the prediction, with the observed share that runs to the cap."""
        mean, known = self.predictions([prompt.prompt_id for prompt in prompts], cap)
        seen = self.with_history if self.with_history.count else self.without_history
        centre, spread = (
            np.where(known, a, b)[:, None]
            for a, b in zip(seen.normal(mean), self.without_history.normal(mean), strict=True)
        )
        at_cap = self._at_cap / self._responses if self._responses else 0.0
        lengths = length_grid(cap)
        z = (np.log(np.maximum(lengths, 1e-9))[None, :] - centre) / spread
        unfinished = at_cap + (1 - at_cap) * ndtr(-z)
        unfinished[:, -1] = 0.0
        group = np.array([len(prompt.responses) for prompt in prompts])[:, None]
        own = np.array([prompt.tokens for prompt in prompts], dtype=float)
        log_done = group * np.log1p(-np.minimum(unfinished, CERTAIN))
        return Forecast(mean, mean, own, lengths, group * unfinished, log_done)
