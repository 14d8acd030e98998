"""Tuning: optuna searches a policy's parameters, and what it finds is held against the defaults on work it never saw.

docs/experiments.md says what is searched, and what is written.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import numpy as np

from simrl.experiments import toml_text
from simrl.experiments.config import Config, ConfigError, Given, Layer, config_toml, resolve
from simrl.experiments.pool import start_worker
from simrl.experiments.run import RunDirectoryError, check_directory, write_directory
from simrl.experiments.statistics import compare_paired
from simrl.experiments.sweep import Axis, key_of
from simrl.experiments.sweep_engines import Outcome, code_version, run_cell
from simrl.experiments.tune_report import MIN_FOR_IMPORTANCE, UNITS, write_outputs, write_text
from simrl.policies.registry import load_policy_class, params_class
from simrl.traces.lengths import workload_names
from simrl.traces.parameters import check_known
from simrl.traces.streams import stream

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from pydantic.fields import FieldInfo

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
    """A searched parameter.

    Attributes:
        axis: Its path, and its values or ends.
        source: Where these come from.
        optional: Whether it may be left out as well, which is its default.
    """

    axis: Axis
    source: str
    optional: bool = False

    def suggest(self, trial: optuna.Trial) -> Any:
        """A value; None leaves the parameter out."""
        path, ends = self.axis.path, self.axis.ends
        if self.optional and not trial.suggest_categorical(f"{path} given", (False, True)):
            return None
        if ends is not None:
            low, high = ends
            if isinstance(low, int) and isinstance(high, int):
                return trial.suggest_int(path, low, high)
            return trial.suggest_float(path, low, high)
        choices = self._choices()
        if 0 in choices:
            return choices[trial.suggest_int(path, 0, len(choices) - 1)]
        return choices[trial.suggest_categorical(path, list(choices))]

    def enqueued(self, value: Any) -> dict[str, Any] | None:
        """What makes optuna suggest *value*; None if it is not in the space."""
        path = self.axis.path
        if value is None:
            return {f"{path} given": False} if self.optional else None
        given: dict[str, Any] = {f"{path} given": True} if self.optional else {}
        if self.axis.ends is None:
            key = next((key for key, choice in self._choices().items() if choice == value), None)
            return None if key is None else {**given, path: key}
        low, high = self.axis.ends
        inside = isinstance(value, (int, float)) and low <= value <= high
        whole = isinstance(low, int) and isinstance(high, int)
        return {**given, path: value} if inside and (not whole or value == int(value)) else None

    def _choices(self) -> dict[Any, Any]:
        """Values by what optuna sees: the place of numbers, so that their order is known; else their JSON text."""
        if all(type(value) in (int, float) for value in self.axis.values):
            return dict(enumerate(self.axis.values))
        return {json.dumps(value, default=str): value for value in self.axis.values}

    def __str__(self) -> str:
        if self.axis.ends is None:
            text = ", ".join(json.dumps(value, default=str) for value in self.axis.values)
        else:
            low, high = self.axis.ends
            text = f"{low:g} to {high:g}" + (", whole numbers" if isinstance(low + high, int) else "")
        return text + (", or left out" if self.optional else "")


def space_of(config: Config, params: Mapping[str, str | Sequence[Any]]) -> tuple[list[Dimension], dict[str, str]]:
    """What is searched, and why the policy's other parameters are not.

    Args:
        config: Its policy's parameters are searched between their own bounds, but for those that it sets.
        params: Ranges or values by path, as of a sweep; these go before.

    Raises:
        ConfigError: a path or value is not allowed, or nothing is left to search.
    """
    for path in ("seed", "job.steps", "policy.name"):
        if path in params:
            raise ConfigError(f"--param {path}: {path} cannot be tuned")
    given = [Dimension(Axis.parse(path, values), "--param") for path, values in params.items()]
    model = params_class(load_policy_class(config.policy))
    found, skipped = list[Dimension](), dict[str, str]()
    for name, info in (model.model_fields if model else {}).items():
        alias = info.alias or name
        path = f"policy.{alias}"
        if path in params:
            continue
        if alias in config.policy_params:
            skipped[path] = f"set to {config.policy_params[alias]}; --param {path}= searches it"
            continue
        dimension = _of_field(path, info)
        if isinstance(dimension, Dimension):
            found.append(dimension)
        else:
            skipped[path] = dimension
    dimensions = [*found, *given]
    if not any(dimension.axis.ends or dimension.optional or len(dimension.axis.values) > 1 for dimension in dimensions):
        why = "; ".join(f"{path}: {reason}" for path, reason in skipped.items()) or "it has none"
        raise ConfigError(f"policy {config.policy!r} has no parameter to search ({why}): name one (--param)")
    for dimension in given:
        for value in dimension.axis.ends or dimension.axis.values:
            config_at(config, {dimension.axis.path: value}, dimension.axis.origin)
    return dimensions, skipped


def _of_field(path: str, info: FieldInfo) -> Dimension | str:
    """The range of a parameter by its type and bounds, or why it has none."""
    annotation: Any = info.annotation
    union = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = [kind for kind in union if kind is not NoneType]
    optional = len(kinds) < len(union) and info.default is None
    make = partial(Axis, path, origin="the policy's bounds")
    if len(kinds) == 1 and (kinds[0] is bool or get_origin(kinds[0]) is Literal):
        every = (False, True) if kinds[0] is bool else get_args(kinds[0])
        values = tuple(value for value in every if value != ORACLE)
        if len(values) == 1 and not optional:
            return f"only {values[0]!r} is left without {ORACLE!r}, which no policy can have in reality"
        return Dimension(make(values=values, ends=None), "the policy's values", optional)
    low, high = _bound(info, "ge", "gt"), _bound(info, "le", "lt")
    if len(kinds) != 1 or kinds[0] not in (int, float) or low is None or high is None:
        return f"no list of values and no bounds on both sides; --param {path}= gives them"
    inward = 1 if kinds[0] is int else INWARD * (high[0] - low[0])
    ends = (low[0] + inward * low[1], high[0] - inward * high[1])
    return Dimension(make(values=(), ends=(kinds[0](ends[0]), kinds[0](ends[1]))), "the policy's bounds", optional)


def _bound(info: FieldInfo, closed: str, open_: str) -> tuple[float, bool] | None:
    """A finite bound, and whether it is outside."""
    for item in info.metadata:
        for name in (closed, open_):
            value = getattr(item, name, None)
            if value is not None and math.isfinite(value):
                return value, name == open_
    return None


def config_at(config: Config, values: Mapping[str, Any], origin: str = "the search") -> Config:
    """*config* with values at paths; None leaves one out.

    Raises:
        ConfigError: a path is unknown or a value not allowed.
    """
    try:
        layer = {toml_text.parse_key(path): Given(v, origin) for path, v in values.items() if v is not None}
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None
    # Without numbers of lines: finding them takes longer than all else.
    below = {path: Given(value, "the configuration") for path, value in values_of(config).items()}
    return resolve([Layer(below), Layer(layer)])


def values_of(config: Config) -> dict[toml_text.Path, Any]:
    """All values of *config*, the policy's defaults included."""
    return dict(toml_text.leaves_of(tomllib.loads(config_toml(config))))


# --- the plan ---


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done.

    Attributes:
        base: The configuration with the defaults; its seed is the first of the search.
        objective: Of `OBJECTIVES`.
        dimensions: What is searched.
        skipped: Why other parameters are not.
        trials: How many, at most.
        seconds: That the search may take, checked between batches.
        seeds: Of every trial, the same in all.
        trial_steps: Of the job's steps, from the first on, in every run of the search.
        workloads: On which what was found is compared with the defaults, beside the job's own.
    """

    base: Config
    objective: str
    dimensions: tuple[Dimension, ...]
    skipped: Mapping[str, str]
    trials: int
    seconds: float
    seeds: int
    trial_steps: int
    workloads: tuple[str, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """That are made small."""
        return OBJECTIVES[self.objective]

    @property
    def fresh_seeds(self) -> tuple[int, ...]:
        """Of the comparison."""
        return tuple(self.base.seed + FRESH_OFFSET + i for i in range(FRESH_SEEDS))

    def start(self) -> dict[str, Any] | None:
        """The defaults as optuna's first trial; None if they lie outside the ranges."""
        found: dict[str, Any] = {}
        values = values_of(self.base)
        for dimension in self.dimensions:
            one = dimension.enqueued(values.get(toml_text.parse_key(dimension.axis.path)))
            if one is None:
                return None
            found |= one
        return found

    def trial_configs(self, values: Mapping[str, Any]) -> list[Config]:
        """The runs of a trial, by seed."""
        config = config_at(self.base, {**values, "job.steps": self.trial_steps})
        return [config.with_seed(self.base.seed + i) for i in range(self.seeds)]

    def identity(self) -> dict[str, Any]:
        """What tells this search from others, but for its budget; more trials continue it."""
        return {
            "code_version": code_version(),
            "optuna": version("optuna"),
            "config": config_toml(self.base),
            "objective": self.objective,
            "seeds": self.seeds,
            "trial_steps": self.trial_steps,
            "searched": {dimension.axis.path: str(dimension) for dimension in self.dimensions},
        }


def plan_tuning(
    config: Config,
    params: Mapping[str, str | Sequence[Any]] | None = None,
    *,
    objective: str = "cost",
    trials: int | None = None,
    seconds: float | None = None,
    seeds: int = 3,
    trial_steps: int | None = None,
    check_workloads: str | None = None,
) -> Plan:
    """A plan that is checked.

    Args:
        config: The job with the defaults.
        params: Ranges or values by path, as of a sweep, in place of the policy's own bounds.
        objective: `cost` (GPU-seconds a step), `time` (seconds a step) or `pareto` (both).
        trials: By default 60, or without a limit where *seconds* is given.
        seconds: That the search may take.
        seeds: Of every trial: `config.seed`, `config.seed + 1` and so on.
        trial_steps: Of the job's steps in every run of the search; by default two epochs.
        check_workloads: Names, separated by commas, or `none`; by default three that were not tuned on.

    Raises:
        ConfigError: something is not allowed, or optuna is not installed.
    """
    _need_optuna()
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective={objective!r} must be one of {', '.join(OBJECTIVES)} (--objective)")
    if trials is not None and not 1 <= trials <= MAX_TRIALS:
        raise ConfigError(f"trials={trials} must be from 1 to {MAX_TRIALS} (--trials)")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"seconds={seconds:g} must be above 0 (--seconds)")
    if not 1 <= seeds <= FRESH_OFFSET:
        raise ConfigError(f"seeds={seeds} must be from 1 to {FRESH_OFFSET} (--seeds)")
    if config.seed >= 2**128 - FRESH_OFFSET - FRESH_SEEDS:
        raise ConfigError(f"seed={config.seed} leaves no fresh seeds above it (--seed)")
    job = config.job
    two_epochs = 2 * (job.dataset_prompts // job.prompts_per_step)
    # Steps that overlap share GPU-seconds: epochs cannot be weighed apart.
    steps = trial_steps or (job.steps if job.max_staleness else min(two_epochs, job.steps))
    if trial_steps is not None and not 1 <= trial_steps <= job.steps:
        raise ConfigError(f"trial_steps={trial_steps} must be from 1 to job.steps={job.steps} (--trial-steps)")
    if job.max_staleness and steps < job.steps:
        raise ConfigError(f"trial_steps={steps} must be job.steps={job.steps} with job.max_staleness (--trial-steps)")
    dimensions, skipped = space_of(config, params or {})
    budget = trials or (TRIALS if seconds is None else MAX_TRIALS)
    workloads = _workloads(check_workloads, job.workload)
    limit_s = math.inf if seconds is None else seconds
    return Plan(config, objective, tuple(dimensions), skipped, budget, limit_s, seeds, steps, workloads)


def _need_optuna() -> None:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError("simrl tune needs optuna: pip install 'simrl[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _workloads(names: str | None, own: str) -> tuple[str, ...]:
    if names is None:
        return tuple(name for name in OTHER_WORKLOADS if name != own)[:3]
    if names.strip() == "none":
        return ()
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    for name in found:
        try:
            check_known("check_workloads", name, workload_names())
        except ValueError as error:
            raise ConfigError(f"{error} (--check-workloads)") from None
    return tuple(name for name in found if name != own)


# --- runs ---


class Runs:
    """Outcomes of runs, each done once, on all cores; those that succeed are kept in *folder*, if there is one."""

    def __init__(self, folder: Path | None, pool: ProcessPoolExecutor | None, tick: Callable[[int], None]) -> None:
        self.folder = folder
        self.pool = pool
        self.tick = tick
        self.known: dict[str, Outcome] = {}
        self.computed = 0

    def of(self, configs: Sequence[Config]) -> list[Outcome]:
        """In the order of *configs*."""
        keys = [key_of(config) for config in configs]
        for key in keys:
            if key not in self.known and (kept := self._kept(key)) is not None:
                self.known[key] = kept
        jobs = {k: c.model_dump_json() for k, c in zip(keys, configs, strict=True) if k not in self.known}
        done = map(run_cell, jobs.values()) if self.pool is None else self.pool.map(run_cell, jobs.values())
        self.tick(len(keys) - len(jobs))
        for key, outcome in zip(jobs, done, strict=True):
            self.known[key] = outcome
            self.computed += 1
            if self.folder is not None and "error" not in outcome:
                write_text(self.folder / f"{key}.json", json.dumps(outcome, indent=2) + "\n")
            self.tick(1)
        return [self.known[key] for key in keys]

    def warnings(self) -> tuple[str, ...]:
        """Of all runs, each once."""
        return tuple(sorted({note for outcome in self.known.values() for note in outcome.get("warnings", ())}))

    def _kept(self, key: str) -> Outcome | None:
        if self.folder is None:
            return None
        try:
            found: Outcome = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # ValueError: a machine that lost its power leaves empty files
            return None
        return found


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Spawned processes that live as long as the block; None for one job, which runs in this process."""
    if jobs == 1:
        yield None
        return
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()  # after an error or Ctrl-C it would finish its run first


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
    """A setting that was tried.

    Attributes:
        number: From 0.
        values: By path; None: left out.
        state: complete, pruned or failed.
        figures: By metric, one a seed that was run.
        error: Of a run that failed.
    """

    number: int
    values: dict[str, Any]
    state: str = "complete"
    figures: dict[str, list[float]] = field(default_factory=lambda: {metric: [] for metric in UNITS})
    error: str | None = None

    def mean(self, metric: str) -> float:
        """Over the seeds that were run; not a number where none was."""
        return float(np.mean(self.figures[metric])) if self.figures[metric] else math.nan

    def add(self, outcome: Outcome, job_steps: int) -> None:
        """Note a run."""
        if "error" in outcome:
            self.state, self.error = "failed", outcome["error"]
            return
        for metric, value in figures_of(outcome["summary"], job_steps).items():
            self.figures[metric].append(value)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"trial": self.number, "values": self.values, **{metric: self.mean(metric) for metric in UNITS}}


def search(plan: Plan, runs: Runs) -> tuple[optuna.Study, list[Trial]]:
    """Ask optuna for batches of trials, run them, and tell it what came of them, in order.

    A sampler's random state is in no storage of optuna's. So every batch has a sampler with a seed of its own, and a
    search that goes on asks for all trials again, whose runs are kept: it ends as one that was never interrupted.
    """
    import optuna

    study = optuna.create_study(study_name="simrl", directions=["minimize"] * len(plan.metrics))
    start = plan.start()
    if start is not None:
        study.enqueue_trial(start)
    trials: list[Trial] = []
    end_s = time.monotonic() + plan.seconds
    while not trials or (len(trials) < plan.trials and time.monotonic() < end_s):
        study.sampler = sampler_of(int(stream(plan.base.seed, "tune", len(trials)).integers(2**32)))
        asked, batch = list[optuna.Trial](), list[Trial]()
        for _ in range(min(BATCH, plan.trials - len(trials))):
            asked.append(study.ask())
            values = {dimension.axis.path: dimension.suggest(asked[-1]) for dimension in plan.dimensions}
            asked[-1].set_user_attr("values", json.dumps(values, default=str))  # optuna has places of some
            batch.append(Trial(asked[-1].number, values))
        _run_batch(plan, runs, batch, [trial for trial in trials if trial.state == "complete"])
        for one, trial in zip(asked, batch, strict=True):
            _tell(study, one, trial, plan)
        trials += batch
    return study, trials


def sampler_of(seed: int) -> optuna.samplers.BaseSampler:
    """For one batch; docs/experiments.md has the measurement that chose it."""
    import optuna

    return optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, multivariate=True, seed=seed)


def _run_batch(plan: Plan, runs: Runs, batch: Sequence[Trial], complete: Sequence[Trial]) -> None:
    """All seeds of a batch; of a single objective one after the other, and no more of trials that are pruned.

    Pruned is what is worse than the median of the trials that were complete before, over the seeds run so far. optuna's
    median pruner would take the best of a trial's means so far, which depends on the order of the seeds.
    """
    prunes = len(plan.metrics) == 1
    configs: dict[int, list[Config]] = {}
    for trial in batch:
        try:
            configs[trial.number] = plan.trial_configs(trial.values)
        except ConfigError as error:  # values that do not go together
            trial.state, trial.error = "failed", str(error)
    for seeds in [[seed] for seed in range(plan.seeds)] if prunes else [list(range(plan.seeds))]:
        tasks = [(t, configs[t.number][seed]) for t in batch if t.state == "complete" for seed in seeds]
        for (trial, _), outcome in zip(tasks, runs.of([config for _, config in tasks]), strict=True):
            trial.add(outcome, plan.base.job.steps)
        done = seeds[-1] + 1
        if prunes and done < plan.seeds and len(complete) >= MIN_FOR_PRUNING:
            figures = [np.mean(other.figures[plan.metrics[0]][:done]) for other in complete]
            for trial in batch:
                if trial.state == "complete" and trial.mean(plan.metrics[0]) > np.median(figures):
                    trial.state = "pruned"
                    runs.tick(plan.seeds - done)


def _tell(study: optuna.Study, asked: optuna.Trial, trial: Trial, plan: Plan) -> None:
    from optuna.trial import TrialState

    if trial.state == "pruned":
        asked.report(trial.mean(plan.metrics[0]), len(trial.figures["step_s"]))  # of which the sampler makes use
    if trial.state == "complete":
        study.tell(asked, [trial.mean(metric) for metric in plan.metrics])
    else:
        study.tell(asked, state=TrialState.PRUNED if trial.state == "pruned" else TrialState.FAIL)


def front_of(trials: Sequence[Trial], metrics: Sequence[str]) -> list[Trial]:
    """Complete trials that no other beats in one figure without being worse in another; of equal ones the first.

    Of a single figure that is the best one.
    """
    front: list[Trial] = []
    for trial in sorted((t for t in trials if t.state == "complete"), key=lambda t: [t.mean(m) for m in metrics]):
        if not front or (len(metrics) > 1 and trial.mean(metrics[-1]) < front[-1].mean(metrics[-1])):
            front.append(trial)
    return front


def importance_of(study: optuna.Study, metrics: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """PED-ANOVA's share of each parameter, by metric; None for too few trials.

    How much a parameter tells the best quarter of all complete trials from the others (Watanabe et al. 2023,
    arXiv:2304.10255, as optuna has it). It is not how much a result changes with the parameter.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    if len(study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])) < MIN_FOR_IMPORTANCE:
        return None
    found = {}
    for index, metric in enumerate(metrics):
        evaluator = PedAnovaImportanceEvaluator(target_quantile=TOP_SHARE)
        target = partial(_told, index)
        found[metric] = dict(get_param_importances(study, evaluator=evaluator, target=target))
    return found


def _told(index: int, trial: optuna.trial.FrozenTrial) -> float:
    return float(trial.values[index])


# --- the comparison ---


def compare_fresh(plan: Plan, runs: Runs, settings: Mapping[str, Trial]) -> tuple[list[dict[str, Any]], list[str]]:
    """Settings against the defaults over the whole job, by workload and metric, on seeds that no search has used.

    On other workloads only the first of them. All rows are one family of comparisons. Runs that fail are told instead.
    """
    everyone: dict[str, Mapping[str, Any]] = {"defaults": {}, **{name: t.values for name, t in settings.items()}}
    elsewhere = list(everyone)[:2]
    configs: dict[tuple[str, str], list[Config]] = {}
    for workload in (plan.base.job.workload, *plan.workloads):
        for name in everyone if workload == plan.base.job.workload else elsewhere:
            config = config_at(plan.base, {**everyone[name], "job.workload": workload})
            configs[workload, name] = [config.with_seed(seed) for seed in plan.fresh_seeds]
    outcomes = iter(runs.of([config for each in configs.values() for config in each]))
    figures, failed = {}, []
    for key, each in configs.items():
        trial = Trial(-1, {})
        for _ in each:
            trial.add(next(outcomes), plan.base.job.steps)
        if trial.error is None:
            figures[key] = trial.figures
        else:
            failed.append(f"{key[1]} on {key[0]} failed: {trial.error}")
    keys = [
        (w, name, metric) for w, name in figures if name in settings and (w, "defaults") in figures for metric in UNITS
    ]
    pairs = [(figures[w, name][metric], figures[w, "defaults"][metric]) for w, name, metric in keys]
    rows = []
    for (workload, name, metric), (tuned, before), paired in zip(keys, pairs, compare_paired(pairs), strict=True):
        mean = float(np.mean(before))
        low, high = paired.ci95 or (math.nan, math.nan)
        rows.append({
            "workload": workload, "setting": name, "metric": metric, "defaults": mean, "tuned": float(np.mean(tuned)),
            "gain": -paired.difference / mean, "gain_ci95": [-high / mean, -low / mean], "paired": paired.to_dict(),
        })  # fmt: skip
    return rows, failed


# --- all of it ---


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a search leaves.

    Attributes:
        plan: What was done.
        trials: All, by number.
        defaults: The defaults on the search's seeds.
        front: Trials that none beats, the fastest first; of a single objective the best one.
        settings: Those of the front that were compared with the defaults, by name.
        importance: See `importance_of`.
        comparison: Rows of `compare_fresh`.
        notes: What a reader has to know.
        computed: Runs that were done now, not found among those kept.
    """

    plan: Plan
    trials: tuple[Trial, ...]
    defaults: Trial
    front: tuple[Trial, ...]
    settings: Mapping[str, Trial]
    importance: Mapping[str, Mapping[str, float]] | None
    comparison: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    computed: int

    @property
    def best(self) -> Trial:
        """Of a front the knee: the least product of its figures."""
        return min(self.front, key=lambda trial: math.prod(trial.mean(metric) for metric in self.plan.metrics))

    def config(self, trial: Trial) -> Config:
        """The whole job with a trial's values."""
        return config_at(self.plan.base, trial.values)

    def saved_runs(self) -> int:
        """That pruning left out."""
        return sum(self.plan.seeds - len(t.figures["step_s"]) for t in self.trials if t.state == "pruned")

    def gain(self, trial: Trial, metric: str) -> float:
        """By which share a figure is below the defaults', on those of the search's seeds that the trial has run."""
        figures = trial.figures[metric]
        return 1 - float(np.mean(figures) / np.mean(self.defaults.figures[metric][: len(figures)]))

    def standing(self) -> str:
        """Where the defaults are."""
        on_front = next((t for t in self.front if self.is_default(t)), None)
        if on_front is not None:
            return "the defaults are on the front" if len(self.plan.metrics) > 1 else "nothing better was found"
        better = next((t for t in self.front if all(self.gain(t, m) >= 0 for m in self.plan.metrics)), None)
        if better is None:
            return "the defaults lie outside the searched ranges, and nothing in them is better in all that was asked"
        return f"the defaults are dominated by trial {better.number}"

    def is_default(self, trial: Trial) -> bool:
        """Whether a trial's setting is the defaults."""
        return not self.changes(trial)

    def changes(self, trial: Trial) -> dict[str, Any]:
        """What a setting changes of the defaults."""
        before = values_of(self.plan.base)
        return {path: v for path, v in trial.values.items() if v != before.get(toml_text.parse_key(path))}

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `tune --json`, which is summary.json too."""
        plan = self.plan
        states = [trial.state for trial in self.trials]
        return {
            "policy": plan.base.policy,
            "objective": plan.objective,
            "trials": {state: states.count(state) for state in ("complete", "pruned", "failed")},
            "runs_saved_by_pruning": self.saved_runs(),
            "seeds": {"search": [plan.base.seed + i for i in range(plan.seeds)], "fresh": list(plan.fresh_seeds)},
            "steps": {"search": plan.trial_steps, "comparison": plan.base.job.steps},
            "searched": [{"parameter": d.axis.path, "values": str(d), "source": d.source} for d in plan.dimensions],
            "not_searched": dict(plan.skipped),
            "defaults": {metric: self.defaults.mean(metric) for metric in UNITS},
            "standing": self.standing(),
            "best": self.best.to_dict(),
            "front": [trial.to_dict() for trial in self.front],
            "settings": {name: trial.number for name, trial in self.settings.items()},
            "importance": self.importance,
            "gain_in_search": {n: {m: self.gain(t, m) for m in UNITS} for n, t in self.settings.items()},
            "comparison": list(self.comparison),
            "notes": list(self.notes),
        }  # fmt: skip

    def frame(self) -> pd.DataFrame:
        """trials.parquet: a row a trial."""
        import pandas as pd

        columns: dict[str, Any] = {"trial": [t.number for t in self.trials], "state": [t.state for t in self.trials]}
        for dimension in self.plan.dimensions:
            path = dimension.axis.path
            columns[path] = _column([trial.values[path] for trial in self.trials])
        columns |= {metric: [trial.mean(metric) for trial in self.trials] for metric in UNITS}
        columns["seeds"] = [len(trial.figures["step_s"]) for trial in self.trials]
        return pd.DataFrame(columns)


def _column(values: Sequence[Any]) -> Sequence[Any]:
    """Values of one type, and None, as they are; else JSON."""
    kinds = {type(value) for value in values} - {NoneType}
    if kinds in ({bool}, {str}) or kinds <= {int, float}:
        return values
    return [json.dumps(value, default=str) for value in values]


def tune(
    plan: Plan,
    directory: Path | None = None,
    *,
    resume: bool = False,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tuning:
    """Search, then compare with the defaults on fresh seeds and other workloads.

    Processes are spawned where there is more than one job: a script that calls this needs
    `if __name__ == "__main__":`.

    Args:
        plan: Of `plan_tuning`.
        directory: To write; see docs/experiments.md.
        resume: Go on in *directory*, if it is there.
        jobs: Processes; by default the cores that this process may use. They do not change the results.
        progress: Called with the percentage that is done.

    Raises:
        ConfigError: the defaults cannot run, no trial could, or *jobs* is not allowed.
        RunDirectoryError: the directory cannot be written, or is of another search.
        concurrent.futures.process.BrokenProcessPool: a process died; what was done is kept.
    """
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs={jobs} must be at least 1 (--jobs)")
    if directory is not None:
        _open(directory, plan, resume)
    tick = _ticker(plan, progress)
    with _pool(jobs or len(os.sched_getaffinity(0))) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna")  # of what is new in optuna, and of importances of one target
        runs = Runs(None if directory is None else directory / "runs", pool, tick)
        found, study = _tune(plan, runs)
        if directory is not None:
            write_outputs(found, study, directory)
    return found


def _tune(plan: Plan, runs: Runs) -> tuple[Tuning, optuna.Study]:
    defaults = Trial(-1, {})
    for outcome in runs.of(plan.trial_configs({})):
        defaults.add(outcome, plan.base.job.steps)
    if defaults.error is not None:
        raise ConfigError(f"the defaults cannot run: {defaults.error}")
    study, trials = search(plan, runs)
    front = front_of(trials, plan.metrics)
    failed = [f"trial {t.number} failed: {t.error}" for t in trials if t.error is not None]
    if not front:
        raise ConfigError(f"no trial could run: {failed[0]}")
    parts = (plan, tuple(trials), defaults, tuple(front))
    bare = Tuning(*parts, {}, importance_of(study, plan.metrics), (), (), 0)
    settings = _settings(bare)
    rows, failures = compare_fresh(plan, runs, settings) if settings else ([], [])
    notes = (*failed, *failures, *runs.warnings())
    return Tuning(*parts, settings, bare.importance, tuple(rows), notes, runs.computed), study


def _settings(found: Tuning) -> dict[str, Trial]:
    """Those to compare: the best one, or a front's knee and ends; without the defaults."""
    if len(found.plan.metrics) == 1:
        named = {"tuned": found.best}
    else:
        named = {"knee": found.best, "fastest": found.front[0], "cheapest": found.front[-1]}
    names: dict[int, list[str]] = {}
    for name, trial in named.items():
        if not found.is_default(trial):
            names.setdefault(trial.number, []).append(name)
    return {", ".join(each): found.trials[number] for number, each in names.items()}


def _ticker(plan: Plan, progress: Callable[[int], None] | None) -> Callable[[int], None]:
    """Counts runs, those that pruning leaves out too, or seconds where their budget is nearer to its end."""
    ends = 0 if len(plan.metrics) == 1 else 2
    total = (1 + plan.trials) * plan.seeds + (ends + 2 * (1 + len(plan.workloads))) * FRESH_SEEDS
    done, begin_s = 0, time.monotonic()

    def tick(runs: int) -> None:
        nonlocal done
        done += runs
        if progress is not None:
            progress(min(99, int(100 * max(done / total, (time.monotonic() - begin_s) / plan.seconds))))

    return tick


def _open(directory: Path, plan: Plan, resume: bool) -> None:
    """Make the directory of a search, or check that it is this one's."""
    about = plan.identity()
    if not (resume and directory.is_dir() and any(directory.iterdir())):
        check_directory(directory)

        def write(place: Path) -> None:
            (place / "config.toml").write_text(config_toml(plan.base), encoding="utf-8")
            (place / "tune.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

        write_directory(directory, write)
        return
    try:
        before = json.loads((directory / "tune.json").read_text(encoding="utf-8"))
        different = [name for name in about if before.get(name) != about[name]]
    except (OSError, ValueError, AttributeError):
        raise RunDirectoryError(f"output {str(directory)!r} is not the directory of a search (--resume)") from None
    if different:
        raise RunDirectoryError(
            f"output {str(directory)!r} is of another search: its {' and '.join(different)} differ (--resume)"
        )
    for left in directory.rglob(".*.tmp"):  # of a search that was killed while it wrote
        left.unlink()
