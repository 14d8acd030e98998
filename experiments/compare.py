"""Several policies on the same work: paired comparisons over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simrl.experiments.config import Config, ConfigError, config_toml
from simrl.experiments.robustness import Study, check_points, study_robustness
from simrl.experiments.run import planned, run, write_directory
from simrl.experiments.statistics import Floats as Floats
from simrl.experiments.statistics import compare_paired
from simrl.experiments.statistics import interval95 as interval95
from simrl.traces.summary import flat

if TYPE_CHECKING:
    import pandas as pd

    from simrl.traces.parameters import Parameter

TOTALS = ("responses", "response_tokens", "prompt_tokens")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Policies side by side.

    Attributes:
        baseline: The policy that the others are compared with.
        rows: One a policy, as `compare --json` prints them.
        summaries: One a run, by policy, then seed.
        warnings: Of all runs, each once.
        study: The same policies over the ranges of what is assumed, if that was asked for.
    """

    baseline: str
    rows: tuple[dict[str, Any], ...]
    summaries: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...] = ()
    study: Study | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `compare --json`."""
        robust = {} if self.study is None else {"robustness": self.study.to_dict()}
        return {"baseline": self.baseline, "rows": list(self.rows), **robust}

    def frame(self) -> pd.DataFrame:
        """A row a run: the flattened summaries."""
        import pandas as pd

        return pd.DataFrame([flat(summary) for summary in self.summaries])


def compare(
    config: Config,
    policies: Sequence[str],
    seeds: int = 1,
    baseline: str | None = None,
    *,
    robustness: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Run every policy on the same draws: seeds `config.seed`, `config.seed + 1` and so on.

    Args:
        config: Shared by all; of its policy parameters each policy takes those that it knows.
        policies: Names or import strings. The baseline is put first when it is not among them.
        seeds: How many. With one there are no intervals.
        baseline: By default `verl` when it is among the policies, else the first.
        robustness: At how many points of the space of assumed parameters to run all policies again, with the first
            seed.
        progress: Called with the number of runs done.

    Raises:
        ConfigError: no policy, one named twice, or fewer than one seed; and as `run` does.
    """
    _check(policies, seeds)
    if robustness is not None:
        check_points(robustness)
    baseline = baseline or ("verl" if "verl" in policies else policies[0])
    names = list(policies) if baseline in policies else [baseline, *policies]
    plans = {name: planned(config.with_policy(name), shared=config) for name in names}
    configs = {name: plan for name, (plan, _) in plans.items()}
    summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    warnings = dict.fromkeys(note for _, notes in plans.values() for note in notes)
    parameters: dict[str, Parameter] = {}
    for i in range(seeds):
        for name in names:
            result = run(configs[name].with_seed(config.seed + i))
            summaries[name].append(result.summary)
            warnings |= dict.fromkeys(result.warnings)
            parameters |= {parameter.key: parameter for parameter in result.parameters}
            if progress is not None:
                progress(sum(map(len, summaries.values())))
        check_same_work([summaries[name][i] for name in names])
    rows = with_tests([row(summaries[name], summaries[baseline]) for name in names], summaries, baseline)
    study = None
    if robustness is not None:
        nominal = [summaries[name][0] for name in names]
        done = seeds * len(names)
        further = None if progress is None else lambda runs: progress(done + runs)
        study = study_robustness(config, names, baseline, parameters.values(), nominal, robustness, further)
    every = tuple(summary for name in names for summary in summaries[name])
    return Comparison(baseline, rows, every, tuple(warnings), study)


def _check(policies: Sequence[str], seeds: int) -> None:
    if not policies:
        raise ConfigError("policies=[] must name at least one policy (--policies)")
    twice = sorted({name for name in policies if policies.count(name) > 1})
    if twice:
        raise ConfigError(f"policies: {twice[0]!r} is named twice (--policies)")
    if seeds < 1:
        raise ConfigError(f"seeds={seeds} must be at least 1 (--seeds)")


def check_same_work(summaries: Sequence[dict[str, Any]]) -> None:
    """Common random numbers: every policy must have generated the same."""
    for total in TOTALS:
        by_policy = {summary["policy"]: summary[total] for summary in summaries}
        if len(set(by_policy.values())) > 1:
            raise AssertionError(f"{total} differ between policies at seed {summaries[0]['seed']}: {by_policy}")


def row(runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A policy's line of the comparison, from its summaries and the baseline's, seed by seed.

    `later_epochs` has the same figures without the first epoch, whose first step holds the cold starts and in which no
    policy has a history of lengths; None where the job is over within it.
    """
    both = (runs, baseline)
    step_s, gpu_s = [_column(s, "step_s", "mean") for s in both], [_column(s, "gpu_s_per_step") for s in both]
    later = None
    if all(summary["later_epochs"] for summary in runs):
        later_step_s = [_column(s, "later_epochs", "step_s") for s in both]
        later = _paired(later_step_s, [_column(s, "later_epochs", "gpu_s_per_step") for s in both])
    return {
        "policy": runs[0]["policy"],
        **_paired(step_s, gpu_s),
        **{total: [summary[total] for summary in runs] for total in TOTALS},
        "later_epochs": later,
    }


def _paired(step_s: Sequence[Floats], gpu_s: Sequence[Floats]) -> dict[str, Any]:
    """Means of this policy, and its standing against the baseline; each argument holds (this, baseline) by seed."""
    speedup, reduction = step_s[1] / step_s[0], 1 - gpu_s[0] / gpu_s[1]
    return {
        "step_s": float(step_s[0].mean()),
        "gpu_s_per_step": float(gpu_s[0].mean()),
        "speedup": float(speedup.mean()),
        "speedup_ci95": interval95(speedup),
        "gpu_s_reduction": float(reduction.mean()),
        "gpu_s_reduction_ci95": interval95(reduction),
    }


def with_tests(
    rows: Sequence[dict[str, Any]], summaries: Mapping[str, Sequence[dict[str, Any]]], baseline: str
) -> tuple[dict[str, Any], ...]:
    """*rows* of `row`, each with `paired`: differences from the baseline over seeds, by metric; the baseline's is None.

    All policies and both metrics of a table are one family of comparisons; after the first epoch is another.
    """
    whole = _tests(summaries, baseline, {"step_s": ("step_s", "mean"), "gpu_s_per_step": ("gpu_s_per_step",)})
    later = None
    if all(row["later_epochs"] for row in rows):
        later = _tests(summaries, baseline, {m: ("later_epochs", m) for m in ("step_s", "gpu_s_per_step")})
    found = []
    for one in rows:
        inner = later and {"later_epochs": {**one["later_epochs"], "paired": later[one["policy"]]}}
        found.append({**one, **(inner or {}), "paired": whole[one["policy"]]})
    return tuple(found)


def _tests(
    summaries: Mapping[str, Sequence[dict[str, Any]]], baseline: str, metrics: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, Any] | None]:
    others = [name for name in summaries if name != baseline]
    keys = [(name, metric) for name in others for metric in metrics]
    columns = [[_column(summaries[n], *metrics[metric]) for n in (name, baseline)] for name, metric in keys]
    tested = dict(zip(keys, compare_paired([(own, base) for own, base in columns]), strict=True))
    return {baseline: None, **{name: {m: tested[name, m].to_dict() for m in metrics} for name in others}}


def _column(summaries: Sequence[dict[str, Any]], *path: str) -> Floats:
    values: list[Any] = list(summaries)
    for key in path:
        values = [value[key] for value in values]
    return np.asarray(values, dtype=float)


def write_comparison(comparison: Comparison, config: Config, directory: Path, comment: str = "") -> None:
    """Write config.toml (with a *comment* as its head), comparison.json and runs.csv (a row a run), or none of them.

    Raises:
        RunDirectoryError: *directory* cannot be written, or is not empty.
    """

    def write(place: Path) -> None:
        head = f"# {comment}\n" if comment else ""
        (place / "config.toml").write_text(head + config_toml(config), encoding="utf-8")
        (place / "comparison.json").write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
        comparison.frame().to_csv(place / "runs.csv", index=False)

    write_directory(directory, write)
