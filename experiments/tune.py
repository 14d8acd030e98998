"""Tuning: optuna searches a policy's parameters, and what it finds is held against the defaults on work it never saw.

docs/experiments.md says what is searched, and what is written.
"""

from __future__ import annotations

import json
import math
import os
import time
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from simrl.experiments import plots, toml_text
from simrl.experiments.config import Config, ConfigError, config_toml
from simrl.experiments.kept import KeptRuns, open_directory
from simrl.experiments.pool import spawned_pool
from simrl.experiments.statistics import compare_paired
from simrl.experiments.sweep import Axis, design_sweep, key_of
from simrl.experiments.sweep_engines import Outcome, code_version, run_cell
from simrl.experiments.tune_report import MIN_FOR_IMPORTANCE, UNITS, write_outputs
from simrl.policies.registry import load_policy_class, params_class
from simrl.traces.lengths import workload_names
from simrl.traces.parameters import check_known
from simrl.traces.streams import stream

if TYPE_CHECKING:
    import optuna
    import pandas as pd

OBJECTIVES = {"time": ("step_s",), "cost": ("gpu_s_per_step",), "pareto": ("step_s", "gpu_s_per_step")}
"""Figures that are made small: seconds and GPU-seconds a step."""
TRIALS = 60
MAX_TRIALS = 100_000
BATCH = 8  # trials that are asked for at once, whatever the number of cores, so that this does not decide results
RANDOM_TRIALS = 10  # before the sampler learns from any
FRESH_OFFSET = 1_000_000
"""Fresh seeds begin so far above the root seed: a search uses none of them."""
FRESH_SEEDS = 5
OTHER_WORKLOADS = ("gsm8k-reasoning", "livecodebench", "chat", "gsm8k")
"""By default the first three of these that were not tuned on: long and truncated, alike within a prompt, and chat."""
ORACLE = "oracle"  # a value that no policy can have in reality
MIN_FOR_PRUNING = 5  # complete trials
TOP_SHARE = 0.25  # of the trials that importance tells from all
INWARD = 1e-3  # of a range: how far from an end that does not belong to it the search begins


# --- the space ---


@dataclass(frozen=True, slots=True)
class Dimension:
    """A searched parameter, where its values or ends come from, and whether it may be left out, as it is by default."""

    axis: Axis
    source: str
    optional: bool = False

    def suggest(self, trial: optuna.Trial) -> Any:
        """A value; None leaves the parameter out."""
        path, choices = self.axis.path, self._choices()
        if self.optional and not trial.suggest_categorical(f"{path} given", (False, True)):
            return None
        if self.axis.ends is not None:
            suggest: Any = trial.suggest_int if self._whole() else trial.suggest_float
            return suggest(path, *self.axis.ends)
        if 0 in choices:
            return choices[trial.suggest_int(path, 0, len(choices) - 1)]
        return choices[trial.suggest_categorical(path, list(choices))]

    def enqueued(self, value: Any) -> dict[str, Any] | None:
        """What makes optuna suggest *value*; None if it is not in the space."""
        path, ends = self.axis.path, self.axis.ends
        given = {f"{path} given": value is not None} if self.optional else {}
        if value is None:
            return given or None
        if ends is None:
            return next(({**given, path: key} for key, choice in self._choices().items() if choice == value), None)
        inside = isinstance(value, (int, float)) and ends[0] <= value <= ends[1]
        return {**given, path: value} if inside and (not self._whole() or value == int(value)) else None

    def _whole(self) -> bool:
        return self.axis.ends is not None and all(isinstance(end, int) for end in self.axis.ends)

    def _choices(self) -> dict[Any, Any]:
        """Values by what optuna sees: the place of numbers, so that their order is known; else their JSON text."""
        numbers = all(type(value) in (int, float) for value in self.axis.values)
        return dict(enumerate(self.axis.values)) if numbers else {_shown(value): value for value in self.axis.values}

    def __str__(self) -> str:
        ends = self.axis.ends
        text = ", ".join(map(_shown, self.axis.values)) if ends is None else f"{ends[0]:g} to {ends[1]:g}"
        return text + ", whole numbers" * self._whole() + ", or left out" * self.optional


def _shown(value: object) -> str:
    return json.dumps(value, default=str)


def space_of(config: Config, params: Mapping[str, str | Sequence[Any]]) -> tuple[list[Dimension], dict[str, str]]:
    """What is searched, *params* before the policy's own bounds, and why its other parameters are not."""
    for path in ("seed", "job.steps", "policy.name"):
        if path in params:
            raise ConfigError(f"--param {path}: {path} cannot be tuned")
    given = [Dimension(Axis.parse(path, values), "--param") for path, values in params.items()]
    model = params_class(load_policy_class(config.policy))
    found, skipped = list[Dimension](), dict[str, str]()
    for name, schema in (model.model_json_schema()["properties"] if model else {}).items():
        path = f"policy.{name}"
        if path in params:
            continue
        dimension = _of_schema(path, schema)
        if name in config.policy_params:
            skipped[path] = f"set to {config.policy_params[name]}; --param {path}= searches it"
        elif isinstance(dimension, str):
            skipped[path] = dimension
        else:
            found.append(dimension)
    for one in given:  # whether all values are allowed
        design_sweep(config, {one.axis.path: one.axis.ends or one.axis.values}, design="list")
    if not any(one.axis.ends or one.optional or len(one.axis.values) > 1 for one in (*found, *given)):
        why = "; ".join(f"{path}: {reason}" for path, reason in skipped.items()) or "it has none"
        raise ConfigError(f"policy {config.policy!r} has no parameter to search ({why}): name one (--param)")
    return [*found, *given], skipped


def _of_schema(path: str, schema: Mapping[str, Any]) -> Dimension | str:
    """The range of a parameter by its JSON schema, or why it has none."""
    union = schema.get("anyOf", [schema])
    kinds = [kind for kind in union if kind.get("type") != "null"]
    kind = kinds[0] if len(kinds) == 1 else {}
    optional = len(kinds) < len(union) and schema.get("default", ...) is None
    every = (False, True) if kind.get("type") == "boolean" else kind.get("enum", [kind.get("const", ORACLE)])
    values = tuple(value for value in every if value != ORACLE)
    if len(values) > 1 or (values and optional):
        return Dimension(Axis(path, values, None, "the policy's values"), "the policy's values", optional)
    if values:
        return f"only {values[0]!r} is left without {ORACLE!r}, which no policy can have in reality"
    low, high = (kind.get(end, kind.get(f"exclusive{end.capitalize()}", math.inf)) for end in ("minimum", "maximum"))
    if kind.get("type") not in ("integer", "number") or not math.isfinite(high - low):
        return f"no list of values and no bounds on both sides; --param {path}= gives them"
    number, inward = (int, 1) if kind["type"] == "integer" else (float, INWARD * (high - low))
    ends = (number(low + inward * ("minimum" not in kind)), number(high - inward * ("maximum" not in kind)))
    return Dimension(Axis(path, (), ends, "the policy's bounds"), "the policy's bounds", optional)


def values_of(config: Config) -> dict[toml_text.Path, Any]:
    """All values of *config*, the policy's defaults included."""
    return dict(toml_text.leaves_of(tomllib.loads(config_toml(config))))


# --- the plan ---


@dataclass
class Plan:
    """What is to be done, checked when it is made.

    Raises:
        ConfigError: something is not allowed, or optuna is not installed.
    """

    base: Config  # the job with the defaults; its seed is the first of the search
    params: Mapping[str, str | Sequence[Any]] = field(default_factory=dict)  # in place of the policy's own bounds
    _: KW_ONLY
    objective: str = "cost"  # GPU-seconds a step; or time: seconds a step, or pareto: both
    trials: int | None = None  # by default 60, or without a limit where seconds are given
    seconds: float | None = None  # that the search may take, looked at between batches
    seeds: int = 3  # of every trial: base.seed, base.seed + 1, ...
    trial_steps: int | None = None  # of the job, from the first on, in every run of the search; by default two epochs
    check_workloads: str | None = None  # names, separated by commas, or none; by default three others

    def __post_init__(self) -> None:
        try:
            import optuna
        except ModuleNotFoundError:
            raise ConfigError("simrl tune needs optuna: pip install 'simrl[tune]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        job = self.base.job
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective={self.objective!r} must be one of {', '.join(OBJECTIVES)} (--objective)")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds={self.seconds:g} must be above 0 (--seconds)")
        counts = (("trials", MAX_TRIALS, ""), ("seeds", FRESH_OFFSET, ""), ("trial_steps", job.steps, "job.steps="))
        for name, most, shown in counts:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name}={value} must be from 1 to {shown}{most} (--{name.replace('_', '-')})")
        if self.base.seed >= 2**128 - FRESH_OFFSET - FRESH_SEEDS:
            raise ConfigError(f"seed={self.base.seed} leaves no fresh seeds above it (--seed)")
        two_epochs = 2 * (job.dataset_prompts // job.prompts_per_step)
        # Steps that overlap share GPU-seconds: epochs cannot be weighed apart.
        self.steps = self.trial_steps or (job.steps if job.max_staleness else min(two_epochs, job.steps))
        if job.max_staleness and self.steps < job.steps:
            raise ConfigError(
                f"trial_steps={self.steps} must be job.steps={job.steps} with job.max_staleness (--trial-steps)"
            )
        self.metrics = OBJECTIVES[self.objective]
        self.dimensions, self.skipped = space_of(self.base, self.params)
        self.most_trials = self.trials or (TRIALS if self.seconds is None else MAX_TRIALS)
        self.fresh_seeds = [self.base.seed + FRESH_OFFSET + i for i in range(FRESH_SEEDS)]
        self.workloads = _workloads(self.check_workloads, job.workload)

    def trial_configs(self, values: Mapping[str, Any]) -> list[Config]:
        """The runs of a trial, by seed."""
        config = self.config({**values, "job.steps": self.steps})
        return [config.with_seed(self.base.seed + i) for i in range(self.seeds)]

    def config(self, values: Mapping[str, Any]) -> Config:
        """The whole job with values at paths; None leaves one out."""
        return self.base.with_values({path: value for path, value in values.items() if value is not None})


def _workloads(names: str | None, own: str) -> list[str]:
    if names is None:
        return [name for name in OTHER_WORKLOADS if name != own][:3]
    found = [name.strip() for name in names.split(",") if name.strip()] if names.strip() != "none" else []
    try:
        for name in found:
            check_known("check_workloads", name, workload_names())
    except ValueError as error:
        raise ConfigError(f"{error} (--check-workloads)") from None
    return [name for name in dict.fromkeys(found) if name != own]


# --- runs ---


class Runs:
    """Outcomes of runs, each done once."""

    def __init__(self, kept: KeptRuns, each: Callable[..., Any], tick: Callable[[int], None]) -> None:
        self.kept, self.each, self.tick = kept, each, tick
        self.known: dict[str, Outcome] = {}
        self.computed = 0

    def of(self, configs: Sequence[Config]) -> list[Outcome]:
        """In the order of *configs*."""
        keys = [key_of(config) for config in configs]
        for key in keys:
            if key not in self.known and (outcome := self.kept.get(key)) is not None:
                self.known[key] = outcome
        jobs = {k: c.model_dump_json() for k, c in zip(keys, configs, strict=True) if k not in self.known}
        self.tick(len(keys) - len(jobs))
        for key, outcome in zip(jobs, self.each(run_cell, jobs.values()), strict=True):
            self.known[key] = outcome
            self.computed += 1
            self.kept.put(key, outcome)
            self.tick(1)
        return [self.known[key] for key in keys]

    def warnings(self) -> set[str]:
        """Of all runs."""
        return {note for outcome in self.known.values() for note in outcome.get("warnings", ())}


def figures_of(summary: Mapping[str, Any], job_steps: int) -> dict[str, float]:
    """Seconds and GPU-seconds a step of a job of *job_steps*, from the summary of its first ones.

    A short run has too much of the first epoch, in which are the cold starts and no policy has a history: it weighs as
    much as in the whole job.
    """
    if summary["steps"] >= job_steps:
        return {"step_s": summary["step_s"]["mean"], "gpu_s_per_step": summary["gpu_s_per_step"]}
    first, later = summary["first_epoch"], summary["later_epochs"] or summary["first_epoch"]
    share = first["steps"] / job_steps
    return {metric: share * first[metric] + (1 - share) * later[metric] for metric in UNITS}


# --- the search ---


@dataclass(slots=True)
class Trial:
    """A setting that was tried: values by path (None: left out), and figures by metric, one a seed that was run."""

    number: int
    values: Mapping[str, Any]
    state: str = "complete"  # or pruned, or failed
    figures: dict[str, list[float]] = field(default_factory=lambda: {metric: [] for metric in UNITS})
    error: str | None = None

    def mean(self, metric: str) -> float:
        """Over the seeds that were run; not a number where none was."""
        return float(np.mean(self.figures[metric])) if self.figures[metric] else math.nan

    def means(self) -> dict[str, float]:
        """By metric."""
        return {metric: self.mean(metric) for metric in UNITS}


def _measure(plan: Plan, runs: Runs, tasks: Sequence[tuple[Trial, Config]]) -> None:
    """Run each configuration, and note the figures in its trial."""
    for (trial, _), outcome in zip(tasks, runs.of([config for _, config in tasks]), strict=True):
        if "error" in outcome:
            trial.state, trial.error = "failed", outcome["error"]
            continue
        for metric, value in figures_of(outcome["summary"], plan.base.job.steps).items():
            trial.figures[metric].append(value)


def search(plan: Plan, runs: Runs) -> tuple[optuna.Study, list[Trial]]:
    """Ask optuna for batches of trials, run them, and tell it what came of them, in order.

    A sampler's random state is in no storage of optuna's. So every batch has a sampler with a seed of its own, and a
    search that goes on asks for all trials again, whose runs are kept: it ends as one that was never interrupted.
    """
    import optuna
    from optuna.trial import TrialState

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    study = optuna.create_study(study_name="simrl", directions=["minimize"] * len(plan.metrics))
    defaults = values_of(plan.base)
    start = [d.enqueued(defaults.get(toml_text.parse_key(d.axis.path))) for d in plan.dimensions]
    if None not in start:
        study.enqueue_trial({name: value for one in start for name, value in (one or {}).items()})
    trials: list[Trial] = []
    end_s = time.monotonic() + (plan.seconds or math.inf)
    while not trials or (len(trials) < plan.most_trials and time.monotonic() < end_s):
        seed = int(stream(plan.base.seed, "tune", len(trials)).integers(2**32))
        # docs/experiments.md has the measurement that chose it.
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, multivariate=True, seed=seed)
        asked, batch = list[optuna.Trial](), list[Trial]()
        for _ in range(min(BATCH, plan.most_trials - len(trials))):
            asked.append(study.ask())
            batch.append(Trial(asked[-1].number, {d.axis.path: d.suggest(asked[-1]) for d in plan.dimensions}))
            asked[-1].set_user_attr("values", _shown(batch[-1].values))  # optuna has places of some
        _run_batch(plan, runs, batch, [trial for trial in trials if trial.state == "complete"])
        for one, trial in zip(asked, batch, strict=True):
            if trial.state == "pruned":
                one.report(trial.mean(plan.metrics[0]), len(trial.figures["step_s"]))  # of which the sampler makes use
            figures = [trial.mean(metric) for metric in plan.metrics]
            study.tell(one, figures if trial.state == "complete" else None, states[trial.state])
        trials += batch
    return study, trials


def _run_batch(plan: Plan, runs: Runs, batch: Sequence[Trial], complete: Sequence[Trial]) -> None:
    """All seeds of a batch; of a single objective one after the other, and no more of trials that are pruned.

    Pruned is what is worse than the median of the trials that were complete before, over the seeds run so far. optuna's
    median pruner would take the best of a trial's means so far, which depends on the order of the seeds.
    """
    configs: dict[int, list[Config]] = {}
    for trial in batch:
        try:
            configs[trial.number] = plan.trial_configs(trial.values)
        except ConfigError as error:  # values that do not go together
            trial.state, trial.error = "failed", str(error)
    every, metric = range(plan.seeds), plan.metrics[0]
    for seeds in [every] if len(plan.metrics) > 1 else [every[i : i + 1] for i in every]:
        tasks = [(t, configs[t.number][seed]) for t in batch if t.state == "complete" for seed in seeds]
        _measure(plan, runs, tasks)
        done = seeds[-1] + 1
        if done == plan.seeds or len(complete) < MIN_FOR_PRUNING:
            continue
        limit = np.median([np.mean(other.figures[metric][:done]) for other in complete])
        for trial in batch:
            if trial.state == "complete" and trial.mean(metric) > limit:
                trial.state = "pruned"
                runs.tick(plan.seeds - done)


def front_of(trials: Sequence[Trial], metrics: Sequence[str]) -> list[Trial]:
    """Complete trials that no other beats in one figure without being worse in another; of equal ones the first.

    Of a single figure that is the best one.
    """
    import pandas as pd

    complete = [trial for trial in trials if trial.state == "complete"]
    frame = pd.DataFrame([trial.means() for trial in complete], columns=list(UNITS))
    return [complete[place] for place in plots.pareto_front(frame, metrics[0], metrics[-1]).index]


def importance_of(study: optuna.Study, metrics: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """PED-ANOVA's share of each parameter, by metric; None for too few trials.

    How much a parameter tells the best quarter of all complete trials from the others (Watanabe et al. 2023,
    arXiv:2304.10255, as optuna has it). It is not how much a result changes with the parameter.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    if len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) < MIN_FOR_IMPORTANCE:
        return None
    evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE)

    def told(index: int) -> Callable[[optuna.trial.FrozenTrial], float]:
        return lambda trial: float(trial.values[index])

    return {m: get_param_importances(study, evaluator=evaluator, target=told(i)) for i, m in enumerate(metrics)}


# --- the comparison ---


def compare_fresh(plan: Plan, runs: Runs, settings: Mapping[str, Trial]) -> tuple[list[dict[str, Any]], list[str]]:
    """Settings against the defaults over the whole job, by workload and metric, on seeds that no search has used.

    On other workloads only the first of them. All rows are one family of comparisons. Runs that fail are told instead.
    """
    values = {"defaults": {}, **{name: trial.values for name, trial in settings.items()}}
    own = plan.base.job.workload
    keys = [(w, name) for w in (own, *plan.workloads) for name in (values if w == own else list(values)[:2])]
    fresh = {key: Trial(-1, {**values[key[1]], "job.workload": key[0]}) for key in keys if settings}
    configs = [(trial, plan.config(trial.values)) for trial in fresh.values()]
    _measure(plan, runs, [(trial, config.with_seed(seed)) for trial, config in configs for seed in plan.fresh_seeds])
    failed = [f"{name} on {w} failed: {trial.error}" for (w, name), trial in fresh.items() if trial.error is not None]
    compared = {
        (w, name, metric): (trial.figures[metric], fresh[w, "defaults"].figures[metric])
        for (w, name), trial in fresh.items()
        if name in settings and trial.error is None and fresh[w, "defaults"].error is None
        for metric in UNITS
    }
    rows = []
    for (workload, name, metric), paired in zip(compared, compare_paired(list(compared.values())), strict=True):
        tuned, before = (float(np.mean(figures)) for figures in compared[workload, name, metric])
        low, high = paired.ci95 or (math.nan, math.nan)
        rows.append({
            "workload": workload, "setting": name, "metric": metric, "defaults": before, "tuned": tuned,
            "gain": -paired.difference / before, "gain_ci95": [-high / before, -low / before],
            "paired": paired.to_dict(),
        })  # fmt: skip
    return rows, failed


# --- all of it ---


@dataclass
class Tuning:
    """What a search leaves: the defaults on its seeds, and a comparison as of `compare_fresh`, too."""

    plan: Plan
    study: optuna.Study
    trials: list[Trial]
    defaults: Trial
    importance: Mapping[str, Mapping[str, float]] | None  # see `importance_of`
    comparison: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    computed: int = 0  # runs that were done now, not found among those kept

    @cached_property
    def front(self) -> list[Trial]:
        """Trials that none beats, the fastest first; of a single objective the best one."""
        return front_of(self.trials, self.plan.metrics)

    @property
    def best(self) -> Trial:
        """Of a front the knee: the least product of its figures."""
        return min(self.front, key=lambda trial: math.prod(trial.mean(metric) for metric in self.plan.metrics))

    @property
    def settings(self) -> dict[str, Trial]:
        """Those to compare, by name: the best one, or a front's knee and ends; without the defaults."""
        named = {"knee": self.best, "fastest": self.front[0], "cheapest": self.front[-1]}
        names: dict[int, list[str]] = {}
        for name, trial in (named if len(self.plan.metrics) > 1 else {"tuned": self.best}).items():
            if self.changes(trial):
                names.setdefault(trial.number, []).append(name)
        return {", ".join(each): self.trials[number] for number, each in names.items()}

    def gain(self, trial: Trial, metric: str) -> float:
        """By which share a figure is below the defaults', on those of the search's seeds that the trial has run."""
        figures = trial.figures[metric]
        return 1 - float(np.mean(figures) / np.mean(self.defaults.figures[metric][: len(figures)]))

    def changes(self, trial: Trial) -> dict[str, Any]:
        """What a setting changes of the defaults."""
        before = values_of(self.plan.base)
        return {path: v for path, v in trial.values.items() if v != before.get(toml_text.parse_key(path))}

    def standing(self) -> str:
        """Where the defaults are."""
        if not all(map(self.changes, self.front)):
            return "the defaults are on the front" if len(self.plan.metrics) > 1 else "nothing better was found"
        better = next((t for t in self.front if all(self.gain(t, m) >= 0 for m in self.plan.metrics)), None)
        if better is None:
            return "the defaults lie outside the searched ranges, and nothing in them is better in all that was asked"
        return f"the defaults are dominated by trial {better.number}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `tune --json`, which is summary.json too."""
        plan, states = self.plan, [trial.state for trial in self.trials]
        front = [{"trial": trial.number, "values": trial.values, **trial.means()} for trial in self.front]
        return {
            "policy": plan.base.policy,
            "objective": plan.objective,
            "trials": {state: states.count(state) for state in ("complete", "pruned", "failed")},
            "runs_saved_by_pruning": sum(
                plan.seeds - len(trial.figures["step_s"]) for trial in self.trials if trial.state == "pruned"
            ),
            "seeds": {"search": [plan.base.seed + i for i in range(plan.seeds)], "fresh": plan.fresh_seeds},
            "steps": {"search": plan.steps, "comparison": plan.base.job.steps},
            "searched": [{"parameter": d.axis.path, "values": str(d), "source": d.source} for d in plan.dimensions],
            "not_searched": plan.skipped,
            "defaults": self.defaults.means(),
            "standing": self.standing(),
            "best": front[self.front.index(self.best)],
            "front": front,
            "settings": {name: trial.number for name, trial in self.settings.items()},
            "importance": self.importance,
            "gain_in_search": {n: {m: self.gain(t, m) for m in UNITS} for n, t in self.settings.items()},
            "comparison": self.comparison,
            "notes": self.notes,
        }

    def frame(self) -> pd.DataFrame:
        """trials.parquet: a row a trial; parameters of several types, or of none that a column can have, as JSON."""
        import pandas as pd

        columns: dict[str, Any] = {"trial": [t.number for t in self.trials], "state": [t.state for t in self.trials]}
        for path in self.trials[0].values:
            values = [trial.values[path] for trial in self.trials]
            kinds = {type(value) for value in values} - {NoneType}
            plain = kinds in ({bool}, {str}) or kinds <= {int, float}
            columns[path] = values if plain else list(map(_shown, values))
        columns |= {metric: [trial.mean(metric) for trial in self.trials] for metric in UNITS}
        return pd.DataFrame({**columns, "seeds": [len(trial.figures["step_s"]) for trial in self.trials]})


def tune(
    config: Config,
    params: Mapping[str, str | Sequence[Any]] | None = None,
    *,
    output: Path | str | None = None,
    resume: bool = False,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Tuning:
    """Search a policy's parameters, and compare what is found with the defaults on fresh seeds and other workloads.

    Processes are spawned where there is more than one job: a script that calls this needs
    `if __name__ == "__main__":`.

    Args:
        config: The job with the defaults.
        params: Ranges or values by path (`lo:hi`, `lo:hi:step`, `a,b,c`), in place of the policy's own bounds.
        output: Directory to write; None: nothing is written.
        resume: Go on in *output*, if it is there.
        jobs: Processes; by default the cores that this process may use. They do not change the results.
        progress: Called with the percentage that is done.
        options: objective (cost, time or pareto), trials, seconds, seeds, trial_steps, check_workloads, as those of
            the command.

    Raises:
        ConfigError: an option is not allowed, the defaults cannot run, or no trial could.
        RunDirectoryError: the directory cannot be written, or is of another search.
        concurrent.futures.process.BrokenProcessPool: a process died; what was done is kept.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs={jobs} must be at least 1 (--jobs)")
    plan = Plan(config, params or {}, **options)
    directory = None if output is None else Path(output)
    if directory is not None:
        _open(directory, plan, resume)
    jobs = jobs or len(os.sched_getaffinity(0))
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna")  # of what is new in optuna, and of importances of one target
        each: Callable[..., Any] = map
        if jobs > 1:
            each = stack.enter_context(spawned_pool(jobs)).map
        runs = Runs(KeptRuns(directory / "runs" if directory else None), each, _ticker(plan, progress))
        found = _searched(plan, runs)
        if directory is not None:
            write_outputs(found, directory)
    return found


def _searched(plan: Plan, runs: Runs) -> Tuning:
    defaults = Trial(-1, {})
    _measure(plan, runs, [(defaults, config) for config in plan.trial_configs({})])
    if defaults.error is not None:
        raise ConfigError(f"the defaults cannot run: {defaults.error}")
    study, trials = search(plan, runs)
    failed = [f"trial {t.number} failed: {t.error}" for t in trials if t.error is not None]
    found = Tuning(plan, study, trials, defaults, importance_of(study, plan.metrics))
    if not found.front:
        raise ConfigError(f"no trial could run: {failed[0]}")
    found.comparison, failures = compare_fresh(plan, runs, found.settings)
    found.notes, found.computed = (*failed, *failures, *sorted(runs.warnings())), runs.computed
    return found


def _ticker(plan: Plan, progress: Callable[[int], None] | None) -> Callable[[int], None]:
    """Counts runs, those that pruning leaves out too, or seconds where their budget is nearer to its end."""
    ends = 0 if len(plan.metrics) == 1 else 2
    total = (1 + plan.most_trials) * plan.seeds + (ends + 2 * (1 + len(plan.workloads))) * FRESH_SEEDS
    done, begin_s = 0, time.monotonic()

    def tick(runs: int) -> None:
        nonlocal done
        done += runs
        if progress is not None:
            progress(min(99, int(100 * max(done / total, (time.monotonic() - begin_s) / (plan.seconds or math.inf)))))

    return tick


def _open(directory: Path, plan: Plan, resume: bool) -> None:
    """Make the directory of a search, or check that it is this one's."""
    about = {
        "code_version": code_version(),
        "optuna": version("optuna"),
        "config": config_toml(plan.base),
        "objective": plan.objective,
        "seeds": plan.seeds,
        "trial_steps": plan.steps,
        "searched": {dimension.axis.path: str(dimension) for dimension in plan.dimensions},
    }  # but not the budget: more trials continue a search
    open_directory(directory, "search", "tune.json", plan.base, about, resume=resume)
