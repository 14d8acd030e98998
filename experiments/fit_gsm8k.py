"""Fit the GSM8K length model to the shipped counts: `python -m simrl.experiments.fit_gsm8k`.

Writes traces/data/workload_gsm8k.toml and prints the fit beside facts that it has not used.

- *within_sd* comes from groups of four samples of one question, Qwen2.5-1.5B-Instruct at temperature 1, taken during
  GRPO. The groups show four distinct questions only, each at another stage of four training runs (a fifth run in the
  source repeats one of the four word for word and is left out). So they say next to nothing about how questions
  differ: what lies between the groups is three degrees of freedom of questions, mixed with training.
- *mu* and the total spread come from 486 questions, one response each. The model is the base Qwen2.5-32B, decoded in a
  way that the source does not state: the only Qwen2.5 table of many questions without few-shot prompts or a low cap.
  *between_sd* is what the total variance holds beyond the within-prompt variance; the share that the groups alone
  would give is printed beside it.
- *cap_mass* pools the two Qwen2.5 records whose cap is far above every ordinary response.
"""

from __future__ import annotations

import csv
import gzip
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from simrl.traces.lengths import LengthModel, parse_workload
from simrl.traces.parameters import Parameter

COUNTS = "data/gsm8k_lengths.csv.gz"
WORKLOAD = "data/workload_gsm8k.toml"
TAIL = 0.025  # on each side of a 95 % interval

# verl's logs (eric-haibin-lin/verl-data, gsm8k): GRPO on Qwen2.5-7B-Instruct, 64 prompts x 5, cap 1024, five
# consecutive steps out of 116.
VERL_STEP_MEANS = (231, 247, 235, 253, 260)
VERL_STEP_MAXIMA = (464, 475, 512, 536, 1024)
VERL_PROMPTS, VERL_GROUP, VERL_CAP = 64, 5, 1024
VERL_AT_CAP = 1  # at least: one step's maximum reached the cap
# Mean prompt length, template included, over 435 steps of verl PPO on Qwen2.5-0.5B-Instruct (same source).
VERL_PROMPT_MEAN = 103.64
# The same run's mean response length by epoch changes by -0.084 to +0.024 in ln from one epoch to the next.
DRIFT_LOW, DRIFT_HIGH = -0.08, 0.03
# grpo-profiling-harness, 100 steps each of 4 prompts x G, cap 512: G, mean, sd of step means, mean of step maxima.
PROFILE_STEPS = (
    (4, 252.6, 39.3, 416),
    (8, 282.0, 39.3, 482),
    (16, 232.5, 34.7, 414),
    (32, 224.6, 38.0, 438),
)
PROFILE_PROMPTS, PROFILE_CAP = 4, 512


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Components:
    """Variance components of groups of equal size, with the within-group degrees of freedom."""

    mean: float
    between_variance: float
    within_variance: float
    within_df: int
    icc: Estimate


@dataclass(frozen=True, slots=True)
class Counts:
    """Measured token counts.

    Attributes:
        questions: Length of every GSM8K test question.
        groups: Response lengths of one prompt and policy, [groups, samples].
        singles: One response per question that stopped by itself.
        at_cap: Responses of the single-sample table that the cap ended.
    """

    questions: tuple[int, ...]
    groups: NDArray[np.float64]
    singles: NDArray[np.float64]
    at_cap: int


@dataclass(frozen=True, slots=True)
class Fit:
    """The fitted numbers."""

    mu: Estimate
    between_sd: Estimate
    within_sd: Estimate
    icc: Estimate
    cap_mass: Estimate
    template_tokens: int
    questions: tuple[int, ...]


def read_counts() -> Counts:
    """The shipped table."""
    packed = resources.files("simrl.traces").joinpath(COUNTS).read_bytes()
    rows = list(csv.DictReader(gzip.decompress(packed).decode().splitlines()))
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["table"] == "qwen2.5-1.5b-grpo":
            groups[row["prompt_id"]].append(float(row["response_tokens"]))
    singles = [row for row in rows if row["table"] == "qwen2.5-32b"]
    return Counts(
        questions=tuple(int(row["prompt_tokens"]) for row in rows if row["table"] == "questions"),
        groups=np.array([groups[prompt] for prompt in sorted(groups)]),
        singles=np.array([float(row["response_tokens"]) for row in singles if row["truncated"] == "0"]),
        at_cap=sum(row["truncated"] == "1" for row in singles),
    )


def one_way(groups: NDArray[np.float64]) -> Components:
    """Maximum-likelihood variance components of a balanced one-way random-effects model.

    Closed form of Searle, Casella and McCulloch, Variance Components (1992), chapter 3; the interval of the
    intraclass correlation is the exact one from the F distribution.

    Args:
        groups: Observations, [groups, samples], at least two of each.
    """
    count, samples = groups.shape
    within_df = count * (samples - 1)
    between_ss = samples * float(np.sum((groups.mean(axis=1) - groups.mean()) ** 2))
    within_ss = float(np.sum((groups - groups.mean(axis=1, keepdims=True)) ** 2))
    within = within_ss / within_df
    between = (between_ss / count - within) / samples
    if between < 0:  # the likelihood's maximum lies on the border, where all spread is within
        between, within = 0.0, (between_ss + within_ss) / groups.size
    ratio = between_ss / (count - 1) / (within_ss / within_df)
    low, high = (ratio / stats.f.ppf(p, count - 1, within_df) for p in (1 - TAIL, TAIL))
    icc = Estimate(between / (between + within), (low - 1) / (low + samples - 1), (high - 1) / (high + samples - 1))
    return Components(float(groups.mean()), between, within, within_df, icc)


def variance_interval(variance: float, df: int) -> Estimate:
    """Chi-square interval of a sample variance."""
    low, high = (df * variance / stats.chi2.ppf(p, df) for p in (1 - TAIL, TAIL))
    return Estimate(variance, float(low), float(high))


def difference(total: Estimate, part: Estimate) -> Estimate:
    """Interval of total - part, two independent variances, from theirs (MOVER; Zou and Donner 2008).

    Raises:
        ValueError: If the part exceeds the total, which leaves no variance between prompts.
    """
    value = total.value - part.value
    if value <= 0:
        raise ValueError(f"within-prompt variance {part.value:.4f} must be below the total {total.value:.4f}")
    low = value - math.hypot(total.value - total.low, part.high - part.value)
    high = value + math.hypot(total.high - total.value, part.value - part.low)
    return Estimate(value, max(low, 0.0), high)


def proportion(hits: int, trials: int) -> Estimate:
    """Clopper-Pearson interval of a probability; needs 0 < hits < trials."""
    low = stats.beta.ppf(TAIL, hits, trials - hits + 1)
    high = stats.beta.ppf(1 - TAIL, hits + 1, trials - hits)
    return Estimate(hits / trials, float(low), float(high))


def fit(counts: Counts) -> Fit:
    """All parameters from the counts, and from verl's logs where the counts do not hold them."""
    groups = one_way(np.log(counts.groups))
    within = variance_interval(groups.within_variance, groups.within_df)
    ln_singles = np.log(counts.singles)
    df = ln_singles.size - 1
    mu, total = float(ln_singles.mean()), variance_interval(float(ln_singles.var(ddof=1)), df)
    half = float(stats.t.ppf(1 - TAIL, df)) * math.sqrt(total.value / ln_singles.size)
    # Exact: the ratio of two independent variances follows F.
    ratios = [within.value / total.value / float(stats.f.ppf(p, groups.within_df, df)) for p in (TAIL, 1 - TAIL)]
    verl_responses = len(VERL_STEP_MEANS) * VERL_PROMPTS * VERL_GROUP
    return Fit(
        mu=Estimate(mu, mu - half, mu + half),
        between_sd=_root(difference(total, within)),
        within_sd=_root(within),
        icc=Estimate(1 - within.value / total.value, max(0.0, 1 - ratios[0]), 1 - ratios[1]),
        cap_mass=proportion(counts.at_cap + VERL_AT_CAP, ln_singles.size + counts.at_cap + verl_responses),
        template_tokens=round(VERL_PROMPT_MEAN - float(np.mean(counts.questions))),
        questions=counts.questions,
    )


def _root(variance: Estimate) -> Estimate:
    return Estimate(math.sqrt(variance.value), math.sqrt(variance.low), math.sqrt(variance.high))


SINGLES = "Qwen2.5-32B, 486 questions x 1, cap 2000 (thaotnguyen/thinking-llms-interp)"
GROUPS = "Qwen2.5-1.5B-Instruct in GRPO, 16 x 4 samples, temperature 1 (LeoPhilly/grpo-profiling-harness)"
HEADER = """\
# Response lengths of a Qwen2.5-class instruct model on GSM8K.
# Written by `python -m simrl.experiments.fit_gsm8k` from gsm8k_lengths.csv.gz; change the fit, not this file.
# ln L = mu + drift_per_epoch * epoch + prompt effect + sample effect, or the cap with probability cap_mass.
# low and high: 95 % interval of a measured or derived number, held range of an assumed one.

"""
SUMMARY = """\
source = "token counts of Qwen2.5 models on GSM8K, fitted by simrl.experiments.fit_gsm8k"
status = "derived"
"""
QUESTIONS = """
[prompt_tokens]
unit = "token"
status = "measured"
source = "the 1319 GSM8K test questions in Qwen2.5's BPE, without chat template (openai/grade-school-math, MIT)"\
"""


def workload_parameters(found: Fit) -> list[Parameter]:
    """The rows of the workload file."""
    verl = "eric-haibin-lin/verl-data"
    drift = Estimate(0.0, DRIFT_LOW, DRIFT_HIGH)
    return [
        _row("mu", found.mu, "ln token", "measured", f"mean of ln length, {SINGLES}; responses at the cap left out"),
        _row(
            "between_sd", found.between_sd, "ln token", "derived", f"variance of ln length less within_sd^2, {SINGLES}"
        ),
        _row("within_sd", found.within_sd, "ln token", "measured", f"one-way random effects, {GROUPS}"),
        _row(
            "cap_mass", found.cap_mass, "1", "derived", f"3 of 2086: 2 in {SINGLES}; 1 of 5 x 320 at cap 1024 ({verl})"
        ),
        _row("drift_per_epoch", drift, "ln token", "assumed", f"{verl}, Qwen2.5-0.5B PPO: the mean moves both ways"),
        Parameter(
            key="template_tokens",
            value=found.template_tokens,
            unit="token",
            status="derived",
            source=f"{verl}, Qwen2.5-0.5B PPO: mean prompt of {VERL_PROMPT_MEAN} tokens less the mean question",
        ),
    ]


def _row(key: str, found: Estimate, unit: str, status: str, source: str) -> Parameter:
    value, low, high = (round(x, 5) for x in (found.value, found.low, found.high))
    return Parameter(key, value, unit, status, source, low, high)


def workload_toml(found: Fit) -> str:
    """The workload file's text."""
    lines = [HEADER + SUMMARY, "[parameters]", *(_toml_row(p) for p in workload_parameters(found))]
    lines += [QUESTIONS, "values = [", *_wrapped(found.questions), "]"]
    return "\n".join(lines) + "\n"


def _toml_row(p: Parameter) -> str:
    held = "" if p.low is None else f"low = {p.low}, high = {p.high}, "
    return (
        f'{p.key:15} = {{ value = {p.value}, unit = "{p.unit}", status = "{p.status}", {held}source = "{p.source}" }}'
    )


def _wrapped(numbers: Iterable[int], per_line: int = 25) -> list[str]:
    texts = [str(n) for n in numbers]
    return ["    " + ", ".join(texts[i : i + per_line]) + "," for i in range(0, len(texts), per_line)]


def steps(model: LengthModel, prompts: int, group: int, cap: int, count: int = 2000) -> NDArray[np.int64]:
    """Lengths of *count* independent steps, [count, prompts * group]."""
    drawn = model.response_lengths(
        seed=0, epoch=0, dataset_prompts=count * prompts, responses_per_prompt=group, max_tokens=cap
    )
    return drawn.tokens.reshape(count, prompts * group)


def checks(model: LengthModel) -> list[tuple[str, str, str]]:
    """Rows (what, measured, simulated) against facts that the fit has not used, but for the one response at the cap."""
    verl = steps(model, VERL_PROMPTS, VERL_GROUP, VERL_CAP)
    runs = verl.reshape(-1, len(VERL_STEP_MEANS), VERL_PROMPTS * VERL_GROUP)
    means, maxima = runs.mean(axis=(1, 2)), runs.max(axis=2)
    at_cap = int(sum(maximum == VERL_CAP for maximum in VERL_STEP_MAXIMA))
    rows = [
        ("verl Qwen2.5-7B 64x5: mean of 5 steps", f"{np.mean(VERL_STEP_MEANS):.0f}", _spread(means)),
        ("  sd of step means", f"{np.std(VERL_STEP_MEANS, ddof=1):.1f}", f"{verl.mean(axis=1).std():.1f}"),
        ("  mean of 5 step maxima", f"{np.mean(VERL_STEP_MAXIMA):.0f}", _spread(maxima.mean(axis=1))),
        ("  median of 5 step maxima", f"{np.median(VERL_STEP_MAXIMA):.0f}", _spread(np.median(maxima, axis=1))),
        ("  steps of 5 that reach 1024 (used)", str(at_cap), f"{5 * (verl.max(axis=1) == VERL_CAP).mean():.1f}"),
    ]
    big = steps(model, 1024, 5, 1024, count=100)
    rows += [
        ("verl Qwen2-7B 1024x5: mean", "195", f"{big.mean():.0f}"),
        ("  steps that reach 1024", "all", f"{(big.max(axis=1) == 1024).mean():.0%}"),
    ]
    for group, mean, sd, maximum in PROFILE_STEPS:
        drawn = steps(model, PROFILE_PROMPTS, group, PROFILE_CAP)
        simulated = f"{drawn.mean():.0f}, {drawn.mean(axis=1).std():.0f}, {drawn.max(axis=1).mean():.0f}"
        rows.append((f"Qwen2.5-1.5B 4x{group}: mean, sd of means, max", f"{mean:.0f}, {sd:.0f}, {maximum}", simulated))
    return [*rows, *_between_epochs(model)]


def _between_epochs(model: LengthModel) -> list[tuple[str, str, str]]:
    first, second = (model.response_lengths(0, epoch, 7473, 4, 2048).tokens for epoch in (0, 1))
    group = np.abs(second.mean(axis=1) - first.mean(axis=1)) < 50
    single = np.abs(second[:, 0] - first[:, 0]) < 50
    return [
        ("prompts whose mean of 4 moves < 50 tokens", "70 % (*)", f"{group.mean():.0%}"),
        ("responses that move < 50 tokens", "70 % (*)", f"{single.mean():.0%}"),
    ]


def _spread(values: NDArray[np.float64]) -> str:
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    return f"{values.mean():.0f} [{low:.0f}, {high:.0f}]"


def report(counts: Counts, found: Fit, model: LengthModel) -> str:
    """The fit and its checks, for people."""
    estimates = [
        ("mu", found.mu),
        ("between_sd", found.between_sd),
        ("within_sd", found.within_sd),
        ("between share (ICC)", found.icc),
        ("  of the 16 groups alone (**)", one_way(np.log(counts.groups)).icc),
        ("cap_mass", found.cap_mass),
    ]
    lines = [f"{name:32} {e.value:8.4f}  [{e.low:.4f}, {e.high:.4f}]" for name, e in estimates]
    lines += [f"{'template_tokens':32} {found.template_tokens:8d}", "", f"{'check':48} {'measured':16} simulated"]
    lines += [f"{what:48} {measured:16} {simulated}" for what, measured, simulated in checks(model)]
    lines += ["", "[low, high]: 95 % interval.  (*) RLHFless paper, model and averaging not stated; not fitted to."]
    return "\n".join([*lines, "(**) not used: 4 questions, and what lies between them is mixed with training."])


def main() -> None:
    """Fit, write the workload file, print the checks."""
    counts = read_counts()
    found = fit(counts)
    text = workload_toml(found)
    Path(str(resources.files("simrl.traces").joinpath(WORKLOAD))).write_text(text, encoding="utf-8")
    print(report(counts, found, parse_workload(text, WORKLOAD)))


if __name__ == "__main__":
    main()
