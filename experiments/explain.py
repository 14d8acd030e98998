"""Why one policy is faster or cheaper than another: a waterfall by mechanism, from switching techniques, and by stage.

Order matters when techniques are switched one after the other, so no order is chosen. A technique's term is the mean of
what it changes when it is the first to be on (all others off) and when it is the last (all others on), and what the
terms leave of the difference is reported as their interaction. Terms, the remainder included, add up to the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simrl.experiments.compare import Floats, interval95
from simrl.experiments.config import Config, ConfigError
from simrl.experiments.pool import key_of, summaries_of
from simrl.experiments.run import planned
from simrl.policies.registry import load_policy_class
from simrl.policies.rlhfless import RLHFless
from simrl.policies.rlhfuse import RLHFuse
from simrl.traces.summary import HOLDING, NO_STAGE, STAGES

if TYPE_CHECKING:
    from rich.console import RenderableType

Summaries = Sequence[Mapping[str, Any]]
"""One a seed."""

SWITCHES: Mapping[type[Any], Mapping[str, tuple[str, Any]]] = {
    RLHFless: {
        "deduplicated prefill": ("dedup_prefill", False),
        "assignment by length": ("group_by_length", False),
        "actor scaling": ("scale_actors", False),
        "cut and migrate": ("cut_and_migrate", False),
        "locality": ("locality", False),
        "prewarming": ("prewarm", False),
    },
    # So small a share is a tail of one response, below which nothing is left to migrate.
    RLHFuse: {"inter-stage fusion": ("tail_ratio", 1e-9)},
}
"""Techniques that a policy can do without: the parameter, and its value when off."""
BASE = "the policy without its techniques"
REMAINDER = "interaction"
METRICS = ("step_s", "gpu_s_per_step")
ALL, NONE = "all", "none"


@dataclass(frozen=True, slots=True)
class Explanation:
    """A policy against a baseline; each term maps a metric to its values by seed, this policy less the baseline.

    Attributes:
        policy: That is explained.
        baseline: That it is compared with.
        difference: Of `step_s` (seconds) and `gpu_s_per_step` (GPU-seconds).
        by_mechanism: Terms that add up to the difference; empty for a policy without switches.
        by_stage: The same, by stage; `overlap` is what stages that overlap or leave gaps add to the sum of theirs.
        by_state: GPU-seconds only.
    """

    policy: str
    baseline: str
    difference: Mapping[str, Floats]
    by_mechanism: Mapping[str, Mapping[str, Floats]]
    by_stage: Mapping[str, Mapping[str, Floats]]
    by_state: Mapping[str, Mapping[str, Floats]]

    def to_dict(self) -> dict[str, Any]:
        """Means over seeds with 95 % intervals, an element of `explain` of `compare --explain --json`."""
        parts = {name: getattr(self, name) for name in ("by_mechanism", "by_stage", "by_state")}
        return {
            "policy": self.policy,
            "baseline": self.baseline,
            "difference": _shown(self.difference),
            **{name: {term: _shown(values) for term, values in part.items()} for name, part in parts.items()},
        }


def _shown(values: Mapping[str, Floats]) -> dict[str, Any]:
    means = {metric: float(column.mean()) for metric, column in values.items()}
    return {**means, **{f"{metric}_ci95": interval95(column) for metric, column in values.items()}}


def explain(
    config: Config,
    policies: Sequence[str],
    baseline: str,
    seeds: int = 1,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Explanation]:
    """Explain each policy but the baseline, on the same draws as `compare`.

    Args:
        config: Shared by all, as for `compare`.
        policies: Names or import strings.
        baseline: One of them or another.
        seeds: `config.seed`, `config.seed + 1` and so on.
        workers: Processes; by default one a core.
        progress: Called with the percentage of runs done.

    Raises:
        ConfigError: there is nothing to explain; and as `run` does.
    """
    others = [name for name in policies if name != baseline]
    if not others:
        raise ConfigError(f"policies: there is nothing to explain but the baseline {baseline!r} (--explain)")
    plans = {name: variants_of(planned(config.with_policy(name), shared=config)[0]) for name in others}
    reference = planned(config.with_policy(baseline), shared=config)[0]
    every = [reference, *(variant for variants in plans.values() for variant in variants.values())]
    drawn = [variant.with_seed(config.seed + i) for variant in every for i in range(seeds)]
    found = summaries_of(drawn, workers=workers, progress=progress)

    def of(variant: Config) -> Summaries:
        return [found[key_of(variant.with_seed(config.seed + i))] for i in range(seeds)]

    return [
        explanation(name, baseline, {label: of(variant) for label, variant in variants.items()}, of(reference))
        for name, variants in plans.items()
    ]


def variants_of(config: Config) -> dict[str, Config]:
    """The policy, `ALL`; without its techniques, `NONE`; without each that is on, "-name"; with it alone, "+name"."""
    switches = {
        name: (key, off)
        for name, (key, off) in SWITCHES.get(load_policy_class(config.policy), {}).items()
        if config.policy_params.get(key) != off
    }
    variants = {ALL: config}
    if switches:
        variants[NONE] = _without(config, switches.values())
    for name in switches:
        variants[f"-{name}"] = _without(config, [switches[name]])
        variants[f"+{name}"] = _without(config, [switch for other, switch in switches.items() if other != name])
    return variants


def _without(config: Config, switches: Any) -> Config:
    return config.model_copy(update={"policy_params": {**config.policy_params, **dict(switches)}})


def explanation(policy: str, baseline: str, variants: Mapping[str, Summaries], reference: Summaries) -> Explanation:
    """The waterfall from summaries of `variants_of` and of the baseline."""
    values = {label: _metrics(summaries) for label, summaries in variants.items()}
    base, whole = _metrics(reference), values[ALL]
    stages, states = _stages(variants[ALL]), _states(variants[ALL])
    return Explanation(
        policy,
        baseline,
        _minus(whole, base),
        _mechanisms(values, base),
        {name: _minus(part, _stages(reference)[name]) for name, part in stages.items()},
        {name: _minus(part, _states(reference)[name]) for name, part in states.items()},
    )


def _mechanisms(
    values: Mapping[str, Mapping[str, Floats]], base: Mapping[str, Floats]
) -> dict[str, Mapping[str, Floats]]:
    if NONE not in values:
        return {}
    whole, none = values[ALL], values[NONE]
    terms: dict[str, Mapping[str, Floats]] = {BASE: _minus(none, base)}
    for name in (label[1:] for label in values if label.startswith("+")):
        first, last = _minus(values[f"+{name}"], none), _minus(whole, values[f"-{name}"])
        terms[name] = {metric: (first[metric] + last[metric]) / 2 for metric in METRICS}
    explained = {metric: sum(term[metric] for term in terms.values()) for metric in METRICS}
    return {**terms, REMAINDER: _minus(_minus(whole, base), explained)}


def _minus(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Floats]:
    return {metric: values[metric] - others[metric] for metric in values}


def _metrics(summaries: Summaries) -> dict[str, Floats]:
    step_s = np.array([summary["step_s"]["mean"] for summary in summaries])
    return {"step_s": step_s, "gpu_s_per_step": np.array([summary["gpu_s_per_step"] for summary in summaries])}


def _stages(summaries: Summaries) -> dict[str, dict[str, Floats]]:
    seconds = {stage: np.array([summary[f"{stage}_s"] for summary in summaries]) for stage in STAGES}
    overlap = {"overlap": _metrics(summaries)["step_s"] - sum(seconds.values()), NO_STAGE: np.zeros(len(summaries))}
    gpu_s = {stage: _by(summaries, "stage", stage) for stage in (*STAGES, NO_STAGE)} | {
        "overlap": np.zeros(len(summaries))
    }
    return {name: {"step_s": s, "gpu_s_per_step": gpu_s[name]} for name, s in (seconds | overlap).items()}


def _states(summaries: Summaries) -> dict[str, dict[str, Floats]]:
    return {state: {"gpu_s_per_step": _by(summaries, "state", state)} for state in HOLDING}


def _by(summaries: Summaries, kind: str, name: str) -> Floats:
    return np.array([summary["gpu_s_by"][kind][name] / summary["steps"] for summary in summaries])


def of_explanations(explanations: Sequence[Explanation]) -> RenderableType:
    """A table a policy: each term in seconds and GPU-seconds a step, and the sum."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    tables: list[RenderableType] = []
    for found in explanations:
        table = Table(box=None, pad_edge=False)
        for column in (f"{found.policy} less {found.baseline}", "s/step", "GPU-s/step"):
            table.add_column(Text(column), justify="left" if column.startswith(found.policy) else "right")
        for title, part in (("mechanism", found.by_mechanism), ("stage", found.by_stage), ("state", found.by_state)):
            if part:
                table.add_row(Text(f"by {title}", style="italic"))
                for name, term in part.items():
                    table.add_row(Text(f"  {name}"), *map(_cell, (term.get(metric) for metric in METRICS)))
        table.add_row(Text("difference"), *(_cell(found.difference[metric]) for metric in METRICS), style="bold")
        tables += [Text(), table]
    note = (
        "a technique's term: mean of what it changes as the only one on and as the last one on; interaction: what"
        " these leave; each part adds up to the difference"
    )
    return Group(*tables, Text(note))


def _cell(values: Floats | None) -> str:
    return "" if values is None else f"{values.mean():+,.2f}"
