"""Statistics of runs that are paired by their seeds: intervals, tests, and how many seeds a precision takes.

Intervals over seeds tell the *sampling noise* alone: what other draws of lengths would change. What is not known of the
machines (parameters that are assumed) is no noise, more seeds do not shrink it: `split_variance` keeps the two apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simrl.traces.streams import stream

Floats = NDArray[np.float64]
LEVEL = 0.95
"""Of all intervals; tests are held against 1 - LEVEL."""
PRECISION = 0.01
"""Half width of a difference's interval, as a share of the reference, for which seeds are counted."""
RESAMPLES = 2000
MIN_BOOTSTRAP = 5  # fewer values have so few different resamples that their interval is far too narrow
NOT_SHOWN = "no difference shown"


@dataclass(frozen=True, slots=True)
class Paired:
    """What the difference of two runs is, over pairs with the same seed.

    Attributes:
        pairs: How many.
        difference: Mean of value - reference, in the metric's unit.
        ci95: Student's t-interval of it; None for one pair.
        bootstrap_ci95: The bias-corrected and accelerated bootstrap's; None below 5 pairs.
        p: Of a two-sided paired t-test; None for one pair.
        p_holm: *p*, corrected for all comparisons of the same table (Holm).
        verdict: `less`, `more` or `no difference shown`, at 5 % by *p_holm*.
        seeds_for_1_percent: Pairs for which the t-interval reaches 1 % of the reference to either side; None for one.
    """

    pairs: int
    difference: float
    ci95: list[float] | None
    bootstrap_ci95: list[float] | None
    p: float | None
    p_holm: float | None
    verdict: str
    seeds_for_1_percent: int | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare_paired(pairs: Sequence[tuple[ArrayLike, ArrayLike]]) -> list[Paired]:
    """Each (values, references), aligned by seed, as one of *all* comparisons of a table."""
    arrays = [(np.asarray(values, dtype=float), np.asarray(reference, dtype=float)) for values, reference in pairs]
    ps = [paired_p(values - reference) for values, reference in arrays]
    known = [i for i, p in enumerate(ps) if p is not None]
    corrected = dict(zip(known, holm([ps[i] or 0.0 for i in known]), strict=True))
    return [_paired(*arrays[i], ps[i], corrected.get(i)) for i in range(len(arrays))]


def _paired(values: Floats, reference: Floats, p: float | None, p_holm: float | None) -> Paired:
    differences = values - reference
    mean = float(differences.mean())
    shown = p_holm is not None and p_holm <= 1 - LEVEL and mean != 0
    precision = PRECISION * abs(float(reference.mean()))
    return Paired(
        pairs=len(differences),
        difference=mean,
        ci95=interval95(differences),
        bootstrap_ci95=bootstrap_interval95(differences),
        p=p,
        p_holm=p_holm,
        verdict=("less" if mean < 0 else "more") if shown else NOT_SHOWN,
        seeds_for_1_percent=seeds_needed(differences, precision) if len(differences) > 1 and precision > 0 else None,
    )


def _constant(values: Floats) -> bool:
    """Whether values differ by rounding only."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def interval95(values: Floats) -> list[float] | None:
    """Student's t-interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    half, mean = half_width(float(values.std(ddof=1)), len(values)), float(values.mean())
    return [mean - half, mean + half]


def half_width(sd: float, count: int) -> float:
    """Of the t-interval of a mean of *count* >= 2 values."""
    from scipy.special import stdtrit  # scipy.stats has the same, and takes a second to import

    return float(stdtrit(count - 1, (1 + LEVEL) / 2)) * sd / math.sqrt(count)


def bootstrap_interval95(values: Floats) -> list[float] | None:
    """Bias-corrected and accelerated bootstrap interval of the mean, always by the same resamples; None for few."""
    if len(values) < MIN_BOOTSTRAP:
        return None
    if _constant(values):
        return [float(values.min()), float(values.max())]
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="BCa", rng=stream(0, "bootstrap")
    ).confidence_interval
    return [float(found.low), float(found.high)]


def paired_p(differences: Floats) -> float | None:
    """Of the two-sided t-test that the mean difference is 0; None for a single one."""
    if len(differences) < 2:
        return None
    if _constant(differences):  # of draws that change nothing: the test would divide by 0
        return 0.0 if differences[0] else 1.0
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def seeds_needed(values: Floats, half_width_wanted: float) -> int:
    """Values for which the t-interval of their mean is that narrow, if they spread as these do; at least 2.

    Raises:
        ValueError: fewer than two values, or a half width that is not above 0.
    """
    if len(values) < 2 or not half_width_wanted > 0:
        raise ValueError(f"{len(values)} values and half_width_wanted={half_width_wanted}: need 2, and above 0")
    sd = float(values.std(ddof=1))
    count = max(2, math.floor((1.9599 * sd / half_width_wanted) ** 2))  # the normal's quantile is below every t's
    while half_width(sd, count) > half_width_wanted:
        count += 1
    return count


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, Scand. J. Statist. 6:65); scipy has no such function."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)) if len(p) else p
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in corrected]


def split_variance(values: Floats) -> dict[str, float]:
    """Standard deviations of what changes from seed to seed, and of what changes from cell to cell.

    Two-way analysis of variance without replication: all cells share their seeds, so that of the spread of the cells'
    means only the interaction of cell and seed is noise, and is taken off.

    Args:
        values: [cells, seeds], 2 or more of each.

    Returns:
        `over_seeds`: pooled over cells; `over_cells`: of the cells' means, less noise; 0 where that is all.
    """
    cells, seeds = values.shape
    means = values.mean(axis=1)
    residuals = values - means[:, None] - values.mean(axis=0)[None, :] + values.mean()
    noise = float((residuals**2).sum()) / ((cells - 1) * (seeds - 1))
    over_cells = max(float(means.var(ddof=1)) - noise / seeds, 0.0)
    return {
        "over_seeds": math.sqrt(float(values.var(axis=1, ddof=1).mean())),
        "over_cells": math.sqrt(over_cells),
    }
