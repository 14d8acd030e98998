"""`rlhfless-adaptive` beside `rlhfless` with its defaults and at its best, on every shipped workload, as a page.

    python -m simrl.experiments.adaptive_table -o docs/adaptive.md

The best is one of a grid, chosen on that very workload by seeds that are not those of the comparison. Nobody knows it
beforehand: it is an optimistic rival.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simrl.experiments.bench import commit, table
from simrl.experiments.config import Config, load_config
from simrl.experiments.pool import key_of, summaries_of
from simrl.experiments.statistics import NOT_SHOWN, Floats, Paired, compare_paired
from simrl.traces.lengths import workload_names

ADAPTIVE, FIXED = "rlhfless-adaptive", "rlhfless"
DESIGNED_ON = "gsm8k"
JOB = ("job.prompts_per_step=256", "job.dataset_prompts=768")  # three steps an epoch
STEPS = 15
LONG: Mapping[str, int] = {"gsm8k-reasoning": 4096, "math500-reasoning": 8192, "gpqa": 16384}
"""`job.max_response_tokens` where the preset's 2048 would cut more than one in ten responses: the next power of two
above the model's 90th percentile, but no more than `job.micro_batch_tokens`, beyond which logits do not fit an L40S."""
GRID: Mapping[str, Sequence[float]] = {
    "lambda": (0.25, 0.5, 0.75), "cut_threshold": (0.7, 0.9, 0.95), "ewma_alpha": (0.3, 1.0),
}  # fmt: skip
SEEDS = tuple(range(10))
CHOICE_SEEDS = (1000, 1001)
METRICS = {"step_s": "step s", "gpu_s_per_step": "GPU s", "both": "both"}

Summaries = Mapping[str, Mapping[str, Any]]
Tested = Mapping[tuple[str, str, str], Paired]
"""By workload, rival and metric."""


class Row(NamedTuple):
    """A workload: the rival's parameters, and values by policy and metric, a value a seed."""

    workload: str
    best: Mapping[str, float]
    values: Mapping[str, Mapping[str, Floats]]


def config_of(workload: str, policy: str, params: Mapping[str, float] | None = None) -> Config:
    """The job of the table, on the default preset."""
    longest = (f"job.max_response_tokens={LONG[workload]}",) if workload in LONG else ()
    values = (f"policy.{name}={value}" for name, value in (params or {}).items())
    return load_config(policy=policy, steps=STEPS, sets=[*JOB, f"job.workload={workload}", *longest, *values])


def grid() -> list[dict[str, float]]:
    """All combinations of GRID."""
    return [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]


def values_of(config: Config, seeds: Sequence[int], summaries: Summaries) -> dict[str, Floats]:
    """Each metric without the first epoch, a value a seed."""
    later = [summaries[key_of(config.with_seed(seed))]["later_epochs"] for seed in seeds]
    step_s, gpu_s = (np.array([one[name] for one in later]) for name in ("step_s", "gpu_s_per_step"))
    return {"step_s": step_s, "gpu_s_per_step": gpu_s, "both": np.sqrt(step_s * gpu_s)}


def best_of(configs: Sequence[Config], summaries: Summaries) -> Config:
    """The one with the least mean logarithm of the geometric mean, by CHOICE_SEEDS."""
    return min(configs, key=lambda c: float(np.log(values_of(c, CHOICE_SEEDS, summaries)["both"]).mean()))


def measure(workloads: Sequence[str]) -> list[Row]:
    """Choose each workload's best parameters, then run all three on other seeds."""
    grids = {workload: [config_of(workload, FIXED, params) for params in grid()] for workload in workloads}
    chosen = summaries_of(c.with_seed(seed) for configs in grids.values() for c in configs for seed in CHOICE_SEEDS)
    compared = {
        workload: {
            "adaptive": config_of(workload, ADAPTIVE),
            "default": config_of(workload, FIXED),
            "best": best_of(configs, chosen),
        }
        for workload, configs in grids.items()
    }
    runs = summaries_of(c.with_seed(seed) for three in compared.values() for c in three.values() for seed in SEEDS)
    return [
        Row(workload, three["best"].policy_params, {name: values_of(c, SEEDS, runs) for name, c in three.items()})
        for workload, three in compared.items()
    ]


PAGE = """# `rlhfless-adaptive` beside `rlhfless`

Written by `python -m simrl.experiments.adaptive_table -o docs/adaptive.md` on {date}, at commit
{commit}.

What the policy does is in [policies.md](policies.md). Its rules and constants were written down and tried out on the
workload `{designed_on}` alone, with other seeds than those here. Then they were frozen and this page was made: the
policy had run on no other workload before, and nothing was changed after that.

Job: preset `g6e` with {job}, {steps} steps; responses are
cut at so many tokens as the table says. Figures leave out the first epoch, in which nobody has a history. Means over
seeds {seeds}.

- **default**: `rlhfless` with its defaults (lambda 0.5, tau 0.7, alpha 1).
- **best**: `rlhfless` with the best of {cells} fixed settings
  ({grid}),
  chosen on that very workload for the least mean of ln step s + ln GPU s, by seeds {choice_seeds}. Nobody knows it
  before the job: it is an optimistic rival.
- **adaptive**: `rlhfless-adaptive` with its defaults (lambda 0.5).

{absolute}

## Differences

Of adaptive, in percent of the other's mean, less is better; paired over seeds, with 95 % intervals (Student's t), each
for itself. `*`: shown at 5 % after Holm's correction for all {comparisons} comparisons of this page. "Both" is the
geometric mean of step time and GPU-seconds, which adaptive's lambda of 0.5 asks for.

{differences}

{counts}
"""


def page(rows: Sequence[Row]) -> str:
    """All that was found."""
    settings = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in GRID.items())
    pairs = [(row, rival, metric) for row in rows for rival in ("default", "best") for metric in METRICS]
    tests = compare_paired(
        [(row.values["adaptive"][metric], row.values[rival][metric]) for row, rival, metric in pairs]
    )
    tested = {(row.workload, rival, metric): t for (row, rival, metric), t in zip(pairs, tests, strict=True)}
    return PAGE.format(
        date=date.today(),
        commit=commit(),
        designed_on=DESIGNED_ON,
        job=" and ".join(f"`{value}`" for value in JOB),
        steps=STEPS,
        seeds=f"{SEEDS[0]} to {SEEDS[-1]}",
        choice_seeds=" and ".join(map(str, CHOICE_SEEDS)),
        cells=len(grid()),
        grid=settings,
        absolute=_absolute(rows),
        comparisons=len(tests),
        differences="\n\n".join(_differences(rows, rival, tested) for rival in ("default", "best")),
        counts="\n".join(_counts(rows, rival, tested) for rival in ("default", "best")),
    )


def _absolute(rows: Sequence[Row]) -> str:
    names = ("default", "best", "adaptive")
    header = "workload|cut at|lambda, tau, alpha of best|" + "|".join(
        f"{name}: {unit}" for unit in ("step s", "GPU s a step") for name in names
    )
    cells = [
        [
            f"`{row.workload}`",
            str(LONG.get(row.workload, 2048)),
            ", ".join(str(row.best[name]) for name in GRID),
            *(f"{row.values[name]['step_s'].mean():.1f}" for name in names),
            *(f"{row.values[name]['gpu_s_per_step'].mean():.0f}" for name in names),
        ]
        for row in rows
    ]
    return table(header, cells)


def _differences(rows: Sequence[Row], rival: str, tested: Tested) -> str:
    def cell(row: Row, metric: str) -> str:
        found, mean = tested[row.workload, rival, metric], float(row.values[rival][metric].mean())
        low, high = (100 * end / mean for end in found.ci95 or ())
        shown = "" if found.verdict == NOT_SHOWN else " *"
        return f"{100 * found.difference / mean:+.1f} % ({low:+.1f} to {high:+.1f}){shown}"

    header = f"adaptive - {rival}|" + "|".join(METRICS.values())
    return table(header, [[f"`{row.workload}`", *(cell(row, metric) for metric in METRICS)] for row in rows])


def _counts(rows: Sequence[Row], rival: str, tested: Tested) -> str:
    def count(metric: str) -> str:
        verdicts = [tested[row.workload, rival, metric].verdict for row in rows]
        return f"{METRICS[metric]} less {verdicts.count('less')}, more {verdicts.count('more')}"

    return f"- Against {rival}, shown in so many of {len(rows)} workloads: {'; '.join(map(count, METRICS))}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(prog="python -m simrl.experiments.adaptive_table", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="for example docs/adaptive.md; by default it is printed")
    output: Path | None = parser.parse_args(arguments).output
    if output is not None and not output.parent.is_dir():
        parser.error(f"output {str(output)!r}: there is no folder {str(output.parent)!r} (-o)")
    text = page(measure(workload_names()))
    if output is None:
        print(text, end="")
    else:
        hidden = output.with_name(f".{output.name}.tmp")
        hidden.write_text(text, encoding="utf-8")
        hidden.replace(output)


if __name__ == "__main__":
    main()
