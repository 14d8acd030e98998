"""Does a ranking of policies hold over all that is assumed? Assumed parameters are sampled over their ranges."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simrl.experiments.config import Config, ConfigError
from simrl.experiments.run import Work, run
from simrl.policies.contract import InvalidDecision, PolicyStalled
from simrl.simulator.costs import DoesNotFit
from simrl.traces.parameters import Parameter, shipped_parameters
from simrl.traces.streams import stream

METRICS: Mapping[str, tuple[str, ...]] = {"gpu_s_per_step": ("gpu_s_per_step",), "step_s": ("step_s", "mean")}
"""What policies are ranked by, and where a summary has it; less is better."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Study:
    """Runs of all policies at points of the space of assumed parameters.

    Attributes:
        policies: Names.
        baseline: One of them.
        varied: The parameters, one a column of *points*.
        skipped: Assumed ones that are not varied, and why.
        points: Values, [points, parameters]: those at which every policy ran.
        impossible: Of each point besides, why a policy could not run: it did not fit, or stalled.
        nominal: For each metric, the value of each policy where no parameter is changed.
        values: For each metric, [points, policies].
    """

    policies: tuple[str, ...]
    baseline: str
    varied: tuple[Parameter, ...]
    skipped: Mapping[str, str]
    points: Floats
    impossible: tuple[str, ...]
    nominal: Mapping[str, Floats]
    values: Mapping[str, Floats]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object `robustness` of `compare --robustness`."""
        return {
            "points": len(self.points),
            "impossible_points": len(self.impossible),
            "impossible_because": dict(Counter(self.impossible).most_common(3)),
            "parameters": [
                {"name": p.key, "value": p.value, "low": p.low, "high": p.high, "unit": p.unit} for p in self.varied
            ],
            "skipped": dict(self.skipped),
            "by": {metric: self._of_metric(metric) for metric in METRICS},
        }

    def _of_metric(self, metric: str) -> dict[str, Any]:
        nominal, values = self.nominal[metric], self.values[metric]
        order = np.argsort(nominal, kind="stable")
        ranked = values[:, order]
        holds: NDArray[np.bool_] = np.all(np.diff(ranked, axis=1) >= 0, axis=1)
        speedups = values[:, [self.policies.index(self.baseline)]] / values
        return {
            "ranking": [self.policies[i] for i in order],
            "share_holds": _share(holds),
            "pairs": [self._pair(metric, first, second) for first, second in itertools.combinations(order, 2)],
            "baseline_over_policy": {p: _ends(column) for p, column in zip(self.policies, speedups.T, strict=True)},
        }

    def _pair(self, metric: str, first: int, second: int) -> dict[str, Any]:
        """Two policies, the better one first; ratios above 1 keep the order."""
        nominal, values = self.nominal[metric], self.values[metric]
        ratios = values[:, second] / values[:, first]
        return {
            "better": self.policies[first],
            "worse": self.policies[second],
            "ratio": float(nominal[second] / nominal[first]),
            "ratio_range": _ends(ratios),
            "share_holds": _share(ratios >= 1),
            "most_related": flipping_parameter(self.points, ratios, [p.key for p in self.varied]),
        }


def _share(holds: NDArray[np.bool_]) -> float | None:
    return float(holds.mean()) if len(holds) else None


def _ends(values: Floats) -> list[float] | None:
    return [float(values.min()), float(values.max())] if len(values) else None


def study_robustness(
    config: Config,
    policies: Sequence[str],
    baseline: str,
    parameters: Iterable[Parameter],
    nominal: Sequence[Mapping[str, Any]],
    points: int,
    progress: Callable[[int], None] | None = None,
    work: Work | None = None,
) -> Study:
    """Run every policy at *points* points of the space of what is assumed, all with the configuration's seed.

    Args:
        config: Shared by all.
        policies: Names.
        baseline: One of them.
        parameters: That the policies' runs read.
        nominal: A summary of each policy at that seed, with no parameter changed.
        points: How many; powers of two cover the space best.
        progress: Called with the number of runs done.
        work: Of all runs, in place of what is drawn; `load_replay(...).work` is a trace's.

    Raises:
        ConfigError: no points, or no assumed parameter has a range.
    """
    check_points(points)
    varied, skipped = choose(parameters)
    if not varied:
        raise ConfigError("robustness: no assumed parameter of these runs has a range to vary (--robustness)")
    sampled, kept, rows, impossible = sobol_points(varied, points, config.seed), [], [], list[str]()
    for index, point in enumerate(sampled):
        try:
            moved = _at(config, varied, point)
            rows.append([run(moved.with_policy(policy), work=work).summary for policy in policies])
            kept.append(index)
        except (ConfigError, DoesNotFit, InvalidDecision, PolicyStalled) as error:
            impossible.append(_without_figures(str(error)))
        if progress is not None:
            progress((index + 1) * len(policies))
    return Study(
        policies=tuple(policies),
        baseline=baseline,
        varied=tuple(varied),
        skipped=skipped,
        points=sampled[kept],
        impossible=tuple(impossible),
        nominal={metric: _values([nominal], metric, len(policies))[0] for metric in METRICS},
        values={metric: _values(rows, metric, len(policies)) for metric in METRICS},
    )


def check_points(points: int) -> None:
    """Raise ConfigError unless there is a point at least."""
    if points < 1:
        raise ConfigError(f"robustness={points} must be at least 1 (--robustness)")


def choose(parameters: Iterable[Parameter]) -> tuple[list[Parameter], dict[str, str]]:
    """Assumed parameters that can be varied, by key, and the others with the reason."""
    shipped, varied, skipped = shipped_parameters(), list[Parameter](), dict[str, str]()
    for parameter in sorted(parameters, key=lambda parameter: parameter.key):
        if parameter.status != "assumed":
            continue
        if isinstance(parameter.value, bool | str):
            skipped[parameter.key] = "a name or a flag"
        elif parameter.low is None or parameter.high is None or parameter.low == parameter.high:
            skipped[parameter.key] = "set by the user" if "set by the user" in parameter.source else "it has no range"
        elif parameter.key not in shipped:
            skipped[parameter.key] = "derived from other parameters, or part of the workload"
        elif parameter.key.startswith("price."):
            skipped[parameter.key] = "a price changes neither seconds nor GPU-seconds"
        else:
            varied.append(parameter)
    return varied, skipped


def sobol_points(varied: Sequence[Parameter], points: int, seed: int) -> Floats:
    """Scrambled Sobol points, uniform between the ends of each range, [points, parameters]."""
    from scipy.stats import qmc  # takes a second to import

    sampler = qmc.Sobol(len(varied), rng=stream(seed, "robustness"))
    unit = sampler.random_base2(max(points - 1, 0).bit_length())[:points]
    lows, highs = ([getattr(parameter, end) for parameter in varied] for end in ("low", "high"))
    scaled: Floats = np.asarray(lows) + unit * (np.asarray(highs, dtype=float) - np.asarray(lows))
    return scaled


def _at(config: Config, varied: Sequence[Parameter], point: Floats) -> Config:
    """The configuration with other values of the varied parameters."""
    values = {parameter.key: float(value) for parameter, value in zip(varied, point, strict=True)}
    cluster = config.cluster.model_copy(update={"parameters": {**config.cluster.parameters, **values}})
    return config.model_copy(update={"cluster": cluster})


def _without_figures(message: str) -> str:
    """The beginning of a message, the same whatever the point."""
    return message.partition(":")[0]


def _values(rows: Sequence[Sequence[Mapping[str, Any]]], metric: str, columns: int) -> Floats:
    table = np.empty((len(rows), columns))
    for i, summaries in enumerate(rows):
        for j, summary in enumerate(summaries):
            value: Any = summary
            for key in METRICS[metric]:
                value = value[key]
            table[i, j] = value
    return table


def flipping_parameter(points: Floats, ratios: Floats, names: Sequence[str]) -> dict[str, Any] | None:
    """The parameter whose value goes most with a ratio, and the value at which the order flips, if it does.

    Args:
        points: [points, parameters].
        ratios: Of the worse policy to the better one, [points]; below 1 the order is flipped.
        names: Of the parameters.

    Returns:
        `parameter`; its Spearman `rank_correlation` with the ratio; `chance`, at most how probable it is that one of so
        many unrelated parameters correlates as much; `flips`: None when the order holds everywhere or
        nowhere, else the `value` that parts most points rightly, the `side` of it on which the order is flipped, and
        `share_right`, those points' share. None when no ratio differs from another.
    """
    from scipy.stats import rankdata

    if len(ratios) < 3 or np.ptp(ratios) == 0:
        return None
    ranks = rankdata(points, axis=0)
    correlations = np.corrcoef(np.column_stack([ranks, rankdata(ratios)]), rowvar=False)[-1, :-1]
    best = int(np.nanargmax(np.abs(correlations)))
    return {
        "parameter": names[best],
        "rank_correlation": float(correlations[best]),
        "chance": _chance(float(correlations[best]), *points.shape),
        "flips": _flip_at(points[:, best], ratios < 1, above=bool(correlations[best] < 0)),
    }


def _chance(correlation: float, points: int, parameters: int) -> float:
    """Student's t of a rank correlation, two-sided, times the number of parameters (Bonferroni)."""
    from scipy.special import stdtr

    if abs(correlation) < 1:
        t = abs(correlation) * math.sqrt((points - 2) / (1 - correlation**2))
        single = 2 * float(stdtr(points - 2, -t))
    else:
        single = 0.0
    # One order of the points in n! is the same, and one the reverse: few points never tell much.
    return min(parameters * max(single, 2 / math.factorial(min(points, 20))), 1.0)


def _flip_at(values: Floats, flipped: NDArray[np.bool_], *, above: bool) -> dict[str, Any] | None:
    """The threshold on one parameter beyond which the order is flipped at most points, and before which at fewest."""
    if flipped.all() or not flipped.any():
        return None
    order = np.argsort(values)
    ordered = flipped[order] if above else flipped[order][::-1]
    # Cut after i points: right are those before it that are not flipped, and those after it that are.
    right = np.concatenate([[0], np.cumsum(~ordered)]) + ordered.sum() - np.concatenate([[0], np.cumsum(ordered)])
    cut = int(np.argmax(right[1:-1])) + 1
    low, high = values[order][[cut - 1, cut] if above else [len(values) - cut - 1, len(values) - cut]]
    side = "above" if above else "below"
    return {"value": float(low + high) / 2, "side": side, "share_right": float(right[cut] / len(values))}
