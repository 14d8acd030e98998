"""From measured lengths to a workload file: choose a form, judge it, write it.

Forms are chosen by BIC over all responses. Beside it stands the log-likelihood of prompts that a fit has not seen, and
what the fitted model draws, beside what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from simrl.traces.fit import FOLDS, FitError, Fitted, Form, Lengths, Likelihood, fit, within_variance
from simrl.traces.length_tables import LengthTable
from simrl.traces.lengths import FAMILIES, MIXTURE, MIXTURE_UNITS, UNITS, LengthModel
from simrl.traces.parameters import Parameter
from simrl.traces.streams import stream
from simrl.traces.trace import whole_file

Floats = NDArray[np.float64]
FAR = 10**9  # a cap that nothing reaches
REPLICATES = 200
# verl's logs (eric-haibin-lin/verl-data), Qwen2.5-0.5B PPO on GSM8K: the mean moves both ways from epoch to epoch.
DRIFT_LOW, DRIFT_HIGH = -0.08, 0.03
DRIFT_SOURCE = (
    "no epochs in the data; range: eric-haibin-lin/verl-data, Qwen2.5-0.5B PPO, where the mean moves both ways"
)
# Masses at the cap of the shipped tables whose cap is far above ordinary responses: 0 to 0.03.
UNKNOWN_MASS_HIGH = 0.03


@dataclass(frozen=True, slots=True)
class Share:
    """Share of the variance of ln length that lies between prompts, as stated for data that cannot show it."""

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.value <= self.high < 1:
            raise FitError(
                f"between share: low={self.low}, value={self.value}, high={self.high} must be in this order, "
                "above 0 and below 1 (--between-share VALUE,LOW,HIGH)"
            )


# The fits of the shipped tables with several responses a prompt: 0.45 (GSM8K in GRPO) to 0.90 (LiveCodeBench).
ANY_TASK = Share(0.7, 0.45, 0.9)


@dataclass(frozen=True)
class Choice:
    """The chosen model and those beside it.

    Attributes:
        table: What was fitted.
        best: By BIC, with intervals.
        candidates: All forms, best first.
        held_out: Ln likelihood of unseen prompts by family, each in its best form.
        share: What was stated of the variance between prompts, where the data cannot show it.
        ends: The chosen form at both ends of that statement.
        drift_interval: Of the drift where epochs are known and BIC does without it.
    """

    table: LengthTable
    best: Fitted
    candidates: tuple[Fitted, ...]
    held_out: Mapping[str, float]
    share: Share | None
    ends: tuple[Fitted, ...]
    drift_interval: tuple[float, float] | None


def choose(table: LengthTable, share: Share = ANY_TASK, on_fit: Callable[[int], None] | None = None) -> Choice:
    """Fit every form that the data can show, and choose.

    Args:
        table: Measured lengths.
        share: Taken where no prompt has two responses.
        on_fit: Told how many forms are fitted.

    Raises:
        FitError: If the data determine no form.
    """
    lengths = table.lengths
    stated = None if lengths.repeated else share
    between = None if stated is None else stated.value
    caps = (True, False) if lengths.truncated.any() else (False,)
    drifts = (True, False) if lengths.epoch is not None else (False,)
    candidates: list[Fitted] = []
    for family in FAMILIES:
        start = None
        for cap, drift in product(caps, drifts):  # the fullest form first: the others start from it
            found = fit(lengths, Form(family, cap, drift, between), start, intervals=False)
            start = start or found.values
            candidates.append(found)
            if on_fit is not None:
                on_fit(len(candidates))
    candidates.sort(key=lambda found: found.bic)
    best = _with_intervals(lengths, candidates)
    by_family = {family: next(f for f in candidates if f.form.family == family) for family in FAMILIES}
    held_out = {family: held_out_ln_likelihood(lengths, found) for family, found in by_family.items()}
    ends: tuple[Fitted, ...] = ()
    if stated is not None:
        forms = [replace(best.form, between_share=end) for end in (stated.low, stated.high)]
        ends = tuple(fit(lengths, form, best.values, intervals=False) for form in forms)
    drift_interval = None
    if len(drifts) == 2 and not best.form.drift:
        wider = fit(lengths, replace(best.form, drift=True), best.values)
        assert wider.intervals is not None
        drift_interval = wider.intervals["drift_per_epoch"]
    return Choice(table, best, tuple(candidates), held_out, stated, ends, drift_interval)


def _with_intervals(lengths: Lengths, candidates: Sequence[Fitted]) -> Fitted:
    """The first candidate whose parameters the data determine."""
    reasons = []
    for candidate in candidates:
        try:
            return fit(lengths, candidate.form, candidate.values)
        except FitError as error:
            reasons.append(str(error))
    raise FitError(reasons[0])


def held_out_ln_likelihood(lengths: Lengths, found: Fitted, folds: int = FOLDS) -> float:
    """Ln likelihood of all responses, each under a fit to the prompts of the other folds.

    Where those folds hold no truncated response, half of one is taken for the mass at the cap, in every family alike.
    """
    numbers, row = np.unique(lengths.prompt, return_inverse=True)
    fold = (stream(0, "held-out prompts").permutation(numbers.size) % min(folds, numbers.size))[row]
    total = 0.0
    for out in np.unique(fold):
        seen = lengths.of(fold != out)
        form = found.form
        if form.cap_mass and not seen.truncated.any():
            form = replace(form, cap_mass=False)
        values = dict(fit(seen, form, found.values, intervals=False).values)
        if form != found.form:
            values["cap_mass"] = 0.5 / seen.tokens.size
        likelihood = Likelihood(lengths.of(fold == out), form)
        likelihood.adapt(values)
        total += likelihood(values)
    return total


def parameters_of(choice: Choice, template_tokens: int = 0) -> list[Parameter]:
    """The rows of the workload file."""
    best, lengths = choice.best, choice.table.lengths
    source = f"maximum likelihood, {lengths.tokens.size} responses of {lengths.prompts} prompts: {choice.table.origin}"
    units = {**UNITS, **(MIXTURE_UNITS if best.form.family == MIXTURE else {})}
    rows = []
    for name, unit in units.items():
        if name == "template_tokens":
            rows.append(_template(template_tokens))
        elif name in best.form.names or name == "between_sd":
            rows.append(_fitted(choice, name, unit, source))
        else:
            rows.append(_held_at_zero(choice, name, unit, source))
    return rows


def _fitted(choice: Choice, name: str, unit: str, source: str) -> Parameter:
    best, share = choice.best, choice.share
    if share is None or not name.endswith("_sd"):
        assert best.intervals is not None
        return _parameter(name, best.values[name], unit, "derived", source, *best.intervals[name])
    values = [fitted.values[name] for fitted in (best, *choice.ends)]
    source = (
        f"total spread: {source}; one response a prompt, so the split is assumed: {share.value:g} of the variance "
        f"between prompts, range {share.low:g} to {share.high:g}"
    )
    return _parameter(name, best.values[name], unit, "assumed", source, min(values), max(values))


def _parameter(name: str, value: float, unit: str, status: str, source: str, low: float, high: float) -> Parameter:
    rounded, low, high = (round(float(number), 5) for number in (value, low, high))
    return Parameter(f"workload.{name}", rounded, unit, status, source, low, high)


def _held_at_zero(choice: Choice, name: str, unit: str, source: str) -> Parameter:
    """A mass at the cap or a drift that the chosen form does without."""
    lengths = choice.table.lengths
    if name == "drift_per_epoch":
        if choice.drift_interval is None:
            return _parameter(name, 0.0, unit, "assumed", DRIFT_SOURCE, DRIFT_LOW, DRIFT_HIGH)
        low, high = choice.drift_interval
        why = f"BIC does without; interval of the form with it; {source}"
        return _parameter(name, 0.0, unit, "derived", why, min(low, 0.0), max(high, 0.0))
    if not choice.table.truncation_known:
        why = "nothing says which responses ran to the cap; range: masses of other tables"
        return _parameter(name, 0.0, unit, "assumed", why, 0.0, UNKNOWN_MASS_HIGH)
    hits, trials = int(lengths.truncated.sum()), lengths.tokens.size
    high = float(stats.beta.ppf(0.975, hits + 1, trials - hits))
    why = f"{hits} of {trials} truncated, which BIC takes for long ones; high: all of them endless; {source}"
    return _parameter(name, 0.0, unit, "derived", why, 0.0, high)


def _template(tokens: int) -> Parameter:
    if tokens == 0:
        why = "prompt lengths are taken as they are"
        return Parameter("workload.template_tokens", 0, UNITS["template_tokens"], "derived", why)
    why = "stated with the fit; range: none to twice as long"
    return Parameter("workload.template_tokens", tokens, UNITS["template_tokens"], "assumed", why, 0, 2 * tokens)


def measured_beside_drawn(choice: Choice, model: LengthModel) -> list[dict[str, Any]]:
    """Statistics of the data beside the mean and the 95 % range of data sets of the same shape drawn from the model."""
    lengths = choice.table.lengths
    counts = np.unique(lengths.prompt, return_counts=True)[1]
    prompt = np.repeat(np.arange(counts.size), counts)
    in_order = lengths.tokens[np.argsort(lengths.prompt, kind="stable")]
    drawn = [_statistics(tokens, prompt) for tokens in _drawn_sets(choice, model)]
    found = []
    for name, value in _statistics(np.minimum(in_order, choice.table.cap or FAR), prompt).items():
        values = [one[name] for one in drawn]
        low, high = map(float, np.quantile(values, [0.025, 0.975]))
        found.append({"what": name, "measured": value, "drawn": float(np.mean(values)), "low": low, "high": high})
    return found


def _drawn_sets(choice: Choice, model: LengthModel) -> list[Floats]:
    """Response tokens of data sets with as many responses of each prompt, prompt by prompt."""
    counts = np.unique(choice.table.lengths.prompt, return_counts=True)[1]
    kept = np.arange(counts.max()) < counts[:, None]
    size, cap = (counts.size, int(counts.max())), choice.table.cap or FAR
    return [model.response_lengths(seed, 0, *size, cap).tokens[kept].astype(float) for seed in range(REPLICATES)]


def _statistics(tokens: NDArray[Any], prompt: NDArray[np.int64]) -> dict[str, float]:
    found = {"mean, tokens": float(tokens.mean())}
    found |= {f"p{q}, tokens": float(np.quantile(tokens, q / 100)) for q in (10, 50, 90, 99)}
    if np.unique(prompt).size < tokens.size:
        starts = np.flatnonzero(np.diff(prompt, prepend=-1))
        longest, mean = np.maximum.reduceat(tokens, starts), np.add.reduceat(tokens, starts) / np.bincount(prompt)
        found["longest / mean of a prompt"] = float((longest / mean).mean())
    return found


HEADER = """\
# Response lengths, written by `simrl trace fit`: change the fit, not this file. docs/workloads.md explains it.
# ln L = mu + drift_per_epoch * epoch + prompt effect + sample effect, or the cap with probability cap_mass.
# low and high: 95 % interval of a derived number, held range of an assumed one.
"""


def workload_toml(choice: Choice, template_tokens: int = 0, source: str = "") -> str:
    """The workload file's text.

    Args:
        choice: What was fitted to a table with prompt lengths.
        template_tokens: Of chat template and instruction, where the prompts' lengths do not hold them.
        source: Where the table comes from, with its licence.
    """
    rows = parameters_of(choice, template_tokens)
    lengths = choice.table.lengths
    told = f"{choice.table.origin}: {source}" if source else choice.table.origin
    lines = [
        HEADER,
        f"source = {_text(told)}",
        'status = "derived"',
        f"family = {_text(choice.best.form.family)}",
        "",
        "[parameters]",
        *(_row(row) for row in rows),
        "",
        "[fit]",
        f"responses = {lengths.tokens.size}",
        f"prompts = {lengths.prompts}",
        f"truncated = {int(lengths.truncated.sum())}",
        *([] if choice.table.cap is None else [f"cap = {choice.table.cap}"]),
        f"notes = [{', '.join(_text(note) for note in notes_of(choice))}]",
        "candidates = [  # by BIC; held-out: 5 folds of whole prompts, of each family's best form",
        *(f"    {_inline(row)}," for row in candidate_rows(choice)),
        "]",
        "",
        "[prompt_tokens]",
        'unit = "token"',
        'status = "measured"',
        f"source = {_text(told)}",
        "values = [",
        *_wrapped(choice.table.prompt_tokens),
        "]",
    ]
    return "\n".join(lines) + "\n"


def notes_of(choice: Choice) -> list[str]:
    """What a reader of the fit has to know."""
    notes = list(choice.table.notes)
    if choice.share is not None:
        s = choice.share
        notes.append(
            "one response a prompt: between and within cannot be told apart; assumed share between prompts "
            f"{s.value:g} ({s.low:g} to {s.high:g})"
        )
    if choice.table.lengths.epoch is None:
        notes.append("no epochs in the data: no drift fitted")
    if choice.best.form != choice.candidates[0].form:
        notes.append(f"best by BIC was {described_form(choice.candidates[0].form)}, which the data do not determine")
    return notes


def described_form(form: Form) -> str:
    """A form in words."""
    return form.family + (" + cap mass" if form.cap_mass else "") + (" + drift" if form.drift else "")


def candidate_rows(choice: Choice) -> list[dict[str, Any]]:
    """The table of forms, best first."""
    rows, held_out = [], dict(choice.held_out)
    for found in choice.candidates:
        row = {
            "form": described_form(found.form),
            "parameters": len(found.form.names),
            "ln_likelihood": round(found.ln_likelihood, 2),
            "bic": round(found.bic, 2),
        }
        if found.form.family in held_out:  # of a family's best form
            row["held_out_ln_likelihood"] = round(held_out.pop(found.form.family), 2)
        rows.append(row)
    return rows


def _row(p: Parameter) -> str:
    held = "" if p.low is None else f"low = {p.low}, high = {p.high}, "
    return (
        f'{p.key.removeprefix("workload."):15} = {{ value = {p.value}, unit = "{p.unit}", status = "{p.status}", '
        f"{held}source = {_text(p.source)} }}"
    )


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes hold JSON's


def _inline(row: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{k} = {_text(v) if isinstance(v, str) else v}" for k, v in row.items()) + " }"


def _wrapped(numbers: Sequence[int], per_line: int = 25) -> list[str]:
    texts = [str(n) for n in numbers]
    return ["    " + ", ".join(texts[i : i + per_line]) + "," for i in range(0, len(texts), per_line)]


def plot(choice: Choice, model: LengthModel, path: Path) -> None:
    """A QQ plot of the lengths against the fitted model, with the 95 % band of data sets of the same shape.

    Raises:
        TraceError: If the place cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tokens = np.minimum(choice.table.lengths.tokens, choice.table.cap or FAR)
    order = np.arange(1, tokens.size) / tokens.size
    quantiles = np.array([np.quantile(drawn, order) for drawn in _drawn_sets(choice, model)])
    middle = quantiles.mean(axis=0)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(5.5, 5), layout="constrained")
        axes = figure.add_subplot()
        low, high = np.quantile(quantiles, [0.025, 0.975], axis=0)
        axes.fill_between(middle, low, high, color="0.85", label="95 % of drawn data sets")
        axes.plot(middle, middle, color="0.5", lw=0.8)
        axes.plot(middle, np.quantile(tokens, order), ".", ms=3, label="measured")
        axes.set(xscale="log", yscale="log")
        axes.set(xlabel="quantile of the fitted model, tokens", ylabel="measured quantile, tokens")
        axes.set_title(f"{choice.table.origin}\n{described_form(choice.best.form)}", fontsize=9)
        axes.legend(frameon=False, loc="upper left")
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=150)


def parse_share(text: str) -> Share:
    """A share between prompts as "value,low,high".

    Raises:
        FitError: If it is none.
    """
    try:
        value, low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise FitError(f"between share {text!r} must be three numbers: --between-share VALUE,LOW,HIGH") from None
    return Share(value, low, high)


def summary(choice: Choice, model: LengthModel) -> dict[str, Any]:
    """What `simrl trace fit --json` prints."""
    lengths, between = choice.table.lengths, choice.best.values["between_sd"] ** 2
    assert all(math.isfinite(value) for value in choice.held_out.values())
    return {
        "origin": choice.table.origin,
        "responses": int(lengths.tokens.size),
        "prompts": lengths.prompts,
        "truncated": int(lengths.truncated.sum()),
        "cap": choice.table.cap,
        "form": described_form(choice.best.form),
        "between_share": round(between / (between + within_variance(choice.best.values)), 4),
        "parameters": {
            p.key.removeprefix("workload."): {
                "value": p.value, "low": p.low, "high": p.high, "unit": p.unit, "status": p.status
            }
            for p in model.parameters
        },
        "candidates": candidate_rows(choice),
        "measured_beside_drawn": measured_beside_drawn(choice, model),
        "notes": notes_of(choice),
    }  # fmt: skip
