"""Families of the sample effect, e in ln L = location + e: how to draw it, and how probable a range of it is.

In each family `within_sd` is the standard deviation of e, and e has mean 0, so that `mu` and `within_sd` mean the same
whatever the family (of the mixture: mean and standard deviation of its first component). With G ~ Gamma(k) and
E ~ Exponential(1):

- lognormal: e = within_sd * normal
- gamma: e = ln G - digamma(k), trigamma(k) = within_sd^2
- weibull: e = (ln E + Euler's gamma) / k, k = pi / (within_sd * sqrt 6)
- lognormal-mixture: e = within_sd * normal, or with probability second_share second_offset + second_sd * normal
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
SINGLE = ("lognormal", "gamma", "weibull")
_TINY = 1e-280  # differences of probabilities below it are taken from the density


def gamma_shape(sd: float) -> float:
    """The k of trigamma(k) = sd^2: ln of a Gamma(k) variable then has this standard deviation (Newton's method)."""
    target = sd * sd
    shape = 0.5 + 1 / target  # above the root, which the iteration then nears from one side
    for _ in range(60):
        value = float(special.polygamma(1, shape))
        step = value * (1 - value / target) / float(special.polygamma(2, shape))
        shape += step
        if abs(step) < 1e-12 * shape:
            break
    return shape


def gamma_effect(normal: Floats, sd: float) -> Floats:
    """Gamma sample effects from standard normals, by the inverse of the distribution function."""
    shape = gamma_shape(sd)
    below = special.gammaincinv(shape, special.ndtr(np.minimum(normal, 0)))
    above = special.gammainccinv(shape, special.ndtr(-np.maximum(normal, 0)))
    with np.errstate(divide="ignore"):  # a wide effect can underflow: a response of one token
        drawn: Floats = np.log(np.where(normal < 0, below, above)) - float(special.digamma(shape))
    return drawn


def weibull_effect(normal: Floats, sd: float) -> Floats:
    """Weibull sample effects from standard normals, by the inverse of the distribution function."""
    drawn: Floats = (np.log(-special.log_ndtr(-normal)) + np.euler_gamma) * sd * math.sqrt(6) / math.pi
    return drawn


def ln_probability(family: str, low: Floats, high: Floats, shape: Mapping[str, float]) -> Floats:
    """Ln of the probability that low < e <= high, elementwise; low may be -inf, high may be inf.

    Args:
        family: See the module.
        low: Lower ends, ln tokens.
        high: Upper ends, above the lower ones.
        shape: within_sd, and for the mixture second_share, second_offset and second_sd.
    """
    sd = shape["within_sd"]
    match family:
        case "lognormal":
            return _normal(low / sd, high / sd)
        case "gamma":
            return _gamma(low, high, gamma_shape(sd))
        case "weibull":
            return _weibull(low, high, math.pi / (sd * math.sqrt(6)))
        case "lognormal-mixture":
            share, offset, second = shape["second_share"], shape["second_offset"], shape["second_sd"]
            first = math.log1p(-share) + _normal(low / sd, high / sd)
            mixed: Floats = np.logaddexp(
                first, math.log(share) + _normal((low - offset) / second, (high - offset) / second)
            )
            return mixed
    raise ValueError(f"{family=} must be one of {', '.join(SINGLE)}, lognormal-mixture")


def _normal(low: Floats, high: Floats) -> Floats:
    upper = low > 0  # mirrored, so that small probabilities are subtracted, not ones near 1
    near, far = np.where(upper, -low, high), np.where(upper, -high, low)
    mass: Floats = special.ndtr(near) - special.ndtr(far)
    rare = ~(mass > _TINY)
    ln = np.log(mass, out=np.full_like(mass, -np.inf), where=~rare)
    if rare.any():
        start, end = near[rare], far[rare]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            density = -(((start + end) / 2) ** 2) / 2 - math.log(2 * math.pi) / 2 + np.log(start - end)
            ln[rare] = np.where(np.isinf(end), special.log_ndtr(start), density)
    return ln


def _weibull(low: Floats, high: Floats, k: float) -> Floats:
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        hazard_low = np.exp(np.minimum(k * low - np.euler_gamma, 600.0))
        hazard_high = np.exp(np.minimum(k * high - np.euler_gamma, 700.0))
        ln: Floats = -hazard_low + np.log(-np.expm1(hazard_low - hazard_high))
    return ln


def _gamma(low: Floats, high: Floats, k: float) -> Floats:
    centre = float(special.digamma(k))
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        start, end = np.exp(np.minimum(low + centre, 600.0)), np.exp(np.minimum(high + centre, 600.0))
        above = low > 0
        mass = np.where(
            above,
            special.gammaincc(k, start) - special.gammaincc(k, end),
            special.gammainc(k, end) - special.gammainc(k, start),
        )
        width = np.where(np.isinf(high), 1.0 / np.maximum(start, k), high - low)
        middle = np.where(np.isinf(high), low, (low + high) / 2) + centre
        density = k * middle - np.exp(np.minimum(middle, 600.0)) - float(special.gammaln(k)) + np.log(width)
        ln: Floats = np.where(mass > _TINY, np.log(np.maximum(mass, _TINY)), density)
    return np.where(np.isnan(ln), -np.inf, ln)
