"""Fit a length model to measured lengths, by maximum likelihood: what `simrl trace fit` does.

ln L = mu + drift_per_epoch * epoch + between_sd * z + sample effect, z standard normal by prompt; with probability
cap_mass a response never stops. The likelihood is that of whole tokens, as the model draws them: a length of l is a
sample effect between ln(l - 1/2) and ln(l + 1/2) less the rest, and a truncated response one above ln(l + 1/2). z is
integrated out by adaptive Gauss-Hermite quadrature. Assumptions and the choice among forms: docs/workloads.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from simrl.traces import families
from simrl.traces.lengths import MIXTURE
from simrl.traces.trace import TraceError

Floats = NDArray[np.float64]
NODES = 15
MIXTURE_NODES = 31  # what responses say of a location can have two peaks
CONFIDENCE = 0.95
FOLDS = 5
# Answers that repeat word for word would let a component of a mixture shrink to a point, which no scheduler can use.
_FLOORS = {"within_sd": 0.05, "second_sd": 0.05}
_FLOOR = -1e5  # ln likelihood of a prompt that the parameters of a line search make impossible


class FitError(TraceError):
    """Lengths that cannot be read or fitted, with what is allowed."""


@dataclass(frozen=True)
class Lengths:
    """Measured responses, in any order.

    Attributes:
        prompt: Number of the prompt, 0 <= prompt < prompts, [responses].
        tokens: Response tokens, >= 1.
        truncated: Whether the cap ended the response.
        epoch: Epoch in which it was drawn, from 0; None where the source does not say.
    """

    prompt: NDArray[np.int64]
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    epoch: Floats | None = None

    @property
    def prompts(self) -> int:
        """How many different prompts there are."""
        return np.unique(self.prompt).size

    @property
    def repeated(self) -> bool:
        """Whether any prompt has two responses: else spread between and within cannot be told apart."""
        return self.prompts < self.prompt.size

    def of(self, kept: NDArray[np.bool_]) -> Lengths:
        """The responses that are *kept*, [responses]."""
        epoch = None if self.epoch is None else self.epoch[kept]
        return Lengths(self.prompt[kept], self.tokens[kept], self.truncated[kept], epoch)


@dataclass(frozen=True, slots=True)
class Form:
    """Which parameters a model has.

    Attributes:
        family: Of the sample effect.
        cap_mass: Whether some responses never stop.
        drift: Whether mu changes by epoch.
        between_share: Share of the variance of ln length that lies between prompts, where it is stated and not fitted.
    """

    family: str
    cap_mass: bool = False
    drift: bool = False
    between_share: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters to fit."""
        between = () if self.between_share is not None else ("between_sd",)
        second = ("second_share", "second_offset", "second_sd") if self.family == MIXTURE else ()
        cap = ("cap_mass",) if self.cap_mass else ()
        drift = ("drift_per_epoch",) if self.drift else ()
        return ("mu", *between, "within_sd", *second, *cap, *drift)

    def values(self, free: Sequence[float] | Floats) -> dict[str, float]:
        """All parameters of the likelihood from the *free* ones, which may be any real numbers."""
        values = {name: _from_real(name, float(x)) for name, x in zip(self.names, free, strict=True)}
        if self.between_share is not None:
            share = self.between_share
            values["between_sd"] = math.sqrt(share / (1 - share) * within_variance(values))
        return {"cap_mass": 0.0, "drift_per_epoch": 0.0, **values}

    def free(self, values: Mapping[str, float]) -> Floats:
        """The reverse of `values`."""
        return np.array([_to_real(name, values[name]) for name in self.names])


def within_variance(values: Mapping[str, float]) -> float:
    """Variance of the sample effect, (ln token)^2."""
    share = values.get("second_share", 0.0)
    second, offset = values.get("second_sd", 0.0), values.get("second_offset", 0.0)
    return (1 - share) * values["within_sd"] ** 2 + share * second**2 + share * (1 - share) * offset**2


def _from_real(name: str, x: float) -> float:
    """Spreads as logarithms, shares as logits; a mixture's second component is the smaller one."""
    if name.endswith("_sd"):
        return math.hypot(_FLOORS.get(name, 0.0), math.exp(min(max(x, -12.0), 5.0)))
    if name in ("cap_mass", "second_share"):
        return float(special.expit(np.clip(x, -30, 30))) * (0.5 if name == "second_share" else 1.0)
    return x


def _to_real(name: str, value: float) -> float:
    if name.endswith("_sd"):
        floor = _FLOORS.get(name, 0.0)
        return math.log(max(math.sqrt(max(value**2 - floor**2, 0.0)), 0.1 * floor))
    if name in ("cap_mass", "second_share"):
        return float(special.logit(value / (0.5 if name == "second_share" else 1.0)))
    return value


class Likelihood:
    """Ln likelihood of measured lengths, the prompt effect integrated out.

    The nodes of each prompt lie around what its responses say of its location: *centre*, ln tokens, with *precision*.
    Both start from moments and follow the parameters by `adapt`; between calls of it the likelihood is a smooth
    function of the parameters.
    """

    def __init__(self, lengths: Lengths, form: Form) -> None:
        order = np.argsort(lengths.prompt, kind="stable")
        tokens, self._truncated = lengths.tokens[order].astype(float), lengths.truncated[order]
        _, self._starts, self._row = np.unique(lengths.prompt[order], return_index=True, return_inverse=True)
        self._epoch = np.zeros(tokens.size) if lengths.epoch is None else lengths.epoch[order]
        with np.errstate(divide="ignore"):
            below = np.where(tokens > 1, np.log(tokens - 0.5), -np.inf)  # what rounds to 0 is drawn as 1
        above = np.log(tokens + 0.5)
        self._low, self._high = np.where(self._truncated, above, below), np.where(self._truncated, np.inf, above)
        self.form, self.responses = form, tokens.size
        nodes, weights = np.polynomial.hermite.hermgauss(MIXTURE_NODES if form.family == MIXTURE else NODES)
        self._nodes, self._ln_weights = nodes * math.sqrt(2), np.log(weights) + nodes**2 + math.log(2) / 2
        self.start = _moments(np.log(tokens), self._row, self._truncated)
        counts = np.diff(np.append(self._starts, tokens.size))
        self._centre = np.array([np.median(part) for part in np.split(np.log(tokens), self._starts[1:])])
        self._precision = counts / self.start["within_sd"] ** 2

    def __call__(self, values: Mapping[str, float]) -> float:
        """Ln likelihood of all responses."""
        return float(self.by_prompt(values).sum())

    def by_prompt(self, values: Mapping[str, float]) -> Floats:
        """Ln likelihood of each prompt's responses, [prompts]."""
        terms, _ = self._terms(values)
        total: Floats = special.logsumexp(terms, axis=1)
        return np.maximum(total, _FLOOR)

    def adapt(self, values: Mapping[str, float], rounds: int = 30) -> None:
        """Move the nodes to the prompts' locations as these parameters see them, until they stay."""
        between, before = values["between_sd"], -math.inf
        for _ in range(rounds):
            terms, z = self._terms(values)
            ln = special.logsumexp(terms, axis=1, keepdims=True)
            if abs(ln.sum() - before) < 1e-6 * self.responses:
                return
            before, weights = ln.sum(), np.exp(terms - ln)
            mean = (weights * z).sum(axis=1)
            variance = (weights * (z - mean[:, None]) ** 2).sum(axis=1)
            # One node that outweighs the others shows no spread: shrink slowly, or the nodes close in on a wrong place.
            middle = self._nodes.size // 2
            variance = np.maximum(variance, ((z[:, middle + 1] - z[:, middle]) / 2) ** 2)
            # What the responses say is the posterior less the prior, N(0, 1) in z.
            said = np.maximum(1 / variance - 1, 1e-3)
            self._precision = said / between**2
            self._centre = values["mu"] + between * mean / variance / said

    def _terms(self, values: Mapping[str, float]) -> tuple[Floats, Floats]:
        """Ln of weight times likelihood, and z, at each node of each prompt, [prompts, nodes]."""
        between, mass = values["between_sd"], values["cap_mass"]
        precision = 1 + between**2 * self._precision
        centre, sd = between * self._precision * (self._centre - values["mu"]) / precision, precision**-0.5
        z = centre[:, None] + sd[:, None] * self._nodes
        location = (values["mu"] + between * z)[self._row] + values["drift_per_epoch"] * self._epoch[:, None]
        ln = families.ln_probability(
            self.form.family, self._low[:, None] - location, self._high[:, None] - location, values
        )
        if mass > 0:
            ln = ln + math.log1p(-mass)
            ln[self._truncated] = np.logaddexp(ln[self._truncated], math.log(mass))
        terms = np.add.reduceat(ln, self._starts, axis=0)
        ln_prior = -z * z / 2 - math.log(2 * math.pi) / 2
        return np.maximum(terms, 2 * _FLOOR) + self._ln_weights + np.log(sd)[:, None] + ln_prior, z


def _moments(ln: Floats, row: NDArray[np.int64], truncated: NDArray[np.bool_]) -> dict[str, float]:
    """Where to start: moments of ln length, half of the truncated responses taken as endless."""
    whole = ~truncated if (~truncated).any() else np.ones_like(truncated)
    counts = np.bincount(row[whole], minlength=row.max() + 1)
    means = np.bincount(row[whole], ln[whole], row.max() + 1) / np.maximum(counts, 1)
    rest, spare = ln[whole] - means[row[whole]], whole.sum() - (counts > 0).sum()
    total = max(float(np.var(ln)), 1e-4)
    within = float((rest**2).sum() / spare) if spare > 0 else total / 2
    within = min(max(within, 1e-4), 0.95 * total)
    return {
        "mu": float(np.median(ln)),
        "between_sd": math.sqrt(total - within),
        "within_sd": math.sqrt(within),
        "cap_mass": min(max(float(truncated.mean()) / 2, 1e-4), 0.9),
        "drift_per_epoch": 0.0,
    }


@dataclass(frozen=True)
class Fitted:
    """A model at its maximum.

    Attributes:
        form: Its parameters.
        values: Their values, and those of the parameters that are held at 0.
        intervals: 95 % intervals of the fitted ones; None where not asked for.
        ln_likelihood: At the maximum.
        bic: Of *responses* responses; less is better.
    """

    form: Form
    values: Mapping[str, float]
    ln_likelihood: float
    bic: float
    intervals: Mapping[str, tuple[float, float]] | None = None


def fit(lengths: Lengths, form: Form, start: Mapping[str, float] | None = None, intervals: bool = True) -> Fitted:
    """The maximum of the likelihood.

    Args:
        lengths: At least one response that is not truncated.
        form: What to fit. Where no prompt has two responses it must state the share between prompts.
        start: Where to start, instead of from moments; a mixture starts from several places otherwise.
        intervals: Whether to find them too.

    Raises:
        FitError: If the data cannot determine the form.
    """
    _check_determined(lengths, form)
    likelihood, starts = Likelihood(lengths, form), _starts(lengths, form, start)
    if len(starts) > 1:
        starts = [max((_climb(likelihood, s, rounds=1, steps=12) for s in starts), key=lambda found: found[1])[0]]
    values, ln_likelihood = _climb(likelihood, starts[0])
    bic = len(form.names) * math.log(likelihood.responses) - 2 * ln_likelihood
    held = _intervals(likelihood, values) if intervals else None
    return Fitted(form, values, ln_likelihood, bic, held)


def _check_determined(lengths: Lengths, form: Form) -> None:
    if lengths.truncated.all():
        raise FitError("all responses are truncated: at least one must have ended by itself")
    if not lengths.repeated and form.between_share is None:
        raise FitError("no prompt has two responses: the share of variance between prompts must be stated")
    if form.cap_mass and not lengths.truncated.any():
        raise FitError("no response is truncated: a mass at the cap cannot be fitted")
    if form.drift and (lengths.epoch is None or np.unique(lengths.epoch).size < 2):
        raise FitError("all responses are of one epoch: a drift cannot be fitted")


def _starts(lengths: Lengths, form: Form, start: Mapping[str, float] | None) -> list[dict[str, float]]:
    if start is not None and set(form.names) <= set(start):
        return [dict(start)]
    base = {**Likelihood(lengths, form).start, **(start or {})}
    base["cap_mass"] = max(base["cap_mass"], 1e-4)
    if form.family != MIXTURE:
        return [base]
    within = base["within_sd"]
    names = ("second_share", "second_offset", "within_sd", "second_sd")
    kinds = ((0.2, 0.0, 0.6, 2.0), (0.1, 2.0, 0.8, 1.0), (0.1, -2.0, 0.8, 1.0))
    units = (1.0, within, within, within)
    return [{**base, **dict(zip(names, np.multiply(kind, units).tolist(), strict=True))} for kind in kinds]


def _climb(
    likelihood: Likelihood, start: Mapping[str, float], rounds: int = 6, steps: int = 200
) -> tuple[dict[str, float], float]:
    """From *start* to the maximum next to it, or *steps* towards it, with the nodes moved along."""
    form = likelihood.form
    free, now, before = form.free(start), -math.inf, -math.inf
    likelihood.adapt(form.values(free))

    def per_response(x: Floats) -> float:
        return -likelihood(form.values(x)) / likelihood.responses

    for _ in range(rounds):
        free = optimize.minimize(per_response, free, method="BFGS", options={"gtol": 1e-5, "maxiter": steps}).x
        likelihood.adapt(form.values(free))
        before, now = now, likelihood(form.values(free))
        if abs(now - before) < 1e-3:
            break
    return form.values(free), now


def _intervals(likelihood: Likelihood, values: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Wald intervals of the free parameters by the observed information, carried over to the parameters' own scales.

    A spread at its floor is held there for the others' intervals; its own reaches to where the likelihood has fallen
    as far as at the end of a 95 % interval.
    """
    form = likelihood.form
    free = form.free(values)
    top = likelihood(values)
    at_floor = [name for name in form.names if name in _FLOORS and values[name] < 1.02 * _FLOORS[name]]
    moving = np.array([name not in at_floor for name in form.names])

    def of_moving(x: Floats) -> float:
        whole = free.copy()
        whole[moving] = x
        return likelihood(form.values(whole))

    information = -_hessian(of_moving, free[moving])
    try:
        np.linalg.cholesky(information)
        sd = np.sqrt(np.diag(np.linalg.inv(information)))
    except np.linalg.LinAlgError:
        raise FitError(f"the data do not determine {', '.join(form.names)} together") from None
    half = np.zeros(free.size)
    half[moving] = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * sd
    low, high = free - half, free + half
    found = {name: (_from_real(name, low[i]), _from_real(name, high[i])) for i, name in enumerate(form.names)}
    fall = float(stats.chi2.ppf(CONFIDENCE, 1)) / 2
    for name in at_floor:
        value = values[name]
        end = optimize.brentq(lambda x, n=name: likelihood({**values, n: x}) - top + fall, value, 20 * value, rtol=1e-4)
        found[name] = (_FLOORS[name], float(end))
    return found


def _hessian(function: Callable[[Floats], float], at: Floats, step: float = 2e-3) -> Floats:
    """Second derivatives by central differences."""
    size = at.size
    steps = np.eye(size) * step
    middle = function(at)
    found = np.empty((size, size))
    for i in range(size):
        found[i, i] = (function(at + steps[i]) - 2 * middle + function(at - steps[i])) / step**2
        for j in range(i):
            corners = [a * b * function(at + a * steps[i] + b * steps[j]) for a in (1, -1) for b in (1, -1)]
            found[i, j] = found[j, i] = sum(corners) / (4 * step**2)
    return found
