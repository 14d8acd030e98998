"""Sweeps: parameters of the configuration or of the policy, over a design of cells and the same seeds in each.

docs/experiments.md says what is in a sweep's directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simrl.experiments import toml_text
from simrl.experiments.config import Config, ConfigError, Given, Layer, config_toml, resolve
from simrl.experiments.kept import KeptRuns, open_directory, replace_file, write_json
from simrl.experiments.statistics import compare_paired, interval95, split_variance
from simrl.experiments.sweep_engines import Outcome, code_version, on_processes, on_ray
from simrl.policies.registry import load_policy_class
from simrl.traces.streams import stream
from simrl.traces.summary import flat

if TYPE_CHECKING:
    import pandas as pd

DESIGNS = ("grid", "list", "random", "sobol")
ENGINES = ("local", "ray")
RESULTS = "results.parquet"
WRITE_EVERY_S = 2.0  # a table of thousands of rows takes long to write, and single runs are kept anyway
MAX_RUNS = 1_000_000
HOST_TIMES = ("wall_s", "policy_wall_s")  # the only figures that the configuration does not determine
TABLES = {
    "all steps": {"step_s": "step_s.mean", "gpu_s_per_step": "gpu_s_per_step"},
    "first epoch": {"step_s": "first_epoch.step_s", "gpu_s_per_step": "first_epoch.gpu_s_per_step"},
    "later epochs": {"step_s": "later_epochs.step_s", "gpu_s_per_step": "later_epochs.gpu_s_per_step"},
}
"""Metrics of each table of statistics, and their columns. The first epoch has the cold starts, and no history."""

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER}):({_NUMBER})(?::({_NUMBER}))?")


# --- designs ---


@dataclass(frozen=True, slots=True)
class Axis:
    """A parameter that is varied.

    Attributes:
        path: As in `policy.lambda`.
        values: Those that it takes; empty where it is drawn between two ends.
        ends: The ends; whole numbers are drawn where both are whole.
        origin: For errors.
    """

    path: str
    values: tuple[Any, ...]
    ends: tuple[float, float] | None
    origin: str

    @classmethod
    def parse(cls, path: str, given: str | Sequence[Any]) -> Axis:
        """From `lo:hi:step` with both ends, `lo:hi`, `a,b,c`, or the values themselves.

        Raises:
            ConfigError: *given* has none of these forms, no value, or one twice.
        """
        origin = f"--param {path}={given if isinstance(given, str) else list(given)}"
        values: Sequence[Any] = given
        if isinstance(given, str):
            found = _RANGE.fullmatch(given.strip())
            if found and found[3] is None:
                low, high = (_plain(Decimal(found[i]), found[i]) for i in (1, 2))
                if not low < high:
                    raise ConfigError(f"{origin}: {low} must be below {high}")
                return cls(path, (), (low, high), origin)
            values = _stepped(*found.groups(), origin=origin) if found else _listed(given)
        texts = [json.dumps(value, default=str) for value in values]
        if not texts:
            raise ConfigError(f"{origin}: has no value")
        twice = next((text for text in texts if texts.count(text) > 1), None)
        if twice is not None:
            raise ConfigError(f"{origin}: {twice} is there twice")
        return cls(path, tuple(values), None, origin)

    def at(self, share: float) -> Any:
        """The value at 0 <= *share* < 1 of the range or list."""
        if self.ends is None:
            return self.values[int(share * len(self.values))]
        low, high = self.ends
        return low + int(share * (high - low + 1)) if isinstance(low + high, int) else low + share * (high - low)


def _plain(number: Decimal, *texts: str) -> float | int:
    """Whole if all texts are written as whole numbers."""
    return int(number) if all(re.fullmatch(r"[+-]?\d+", text) for text in texts) else float(number)


def _stepped(low: str, high: str, step: str, *, origin: str) -> list[float | int]:
    """Both ends and all between, in decimal arithmetic: 0.1 * 3 is 0.3."""
    first, last, width = Decimal(low), Decimal(high), Decimal(step)
    if width == 0 or (last - first) / width < 0:
        raise ConfigError(f"{origin}: steps of {step} do not lead from {low} to {high}")
    count, rest = divmod(last - first, width)
    if rest:
        raise ConfigError(f"{origin}: steps of {step} from {low} do not meet {high}; both ends belong to a range")
    if count >= MAX_RUNS:
        raise ConfigError(f"{origin}: has {count + 1} values, more than {MAX_RUNS}")
    return [_plain(first + i * width, low, high, step) for i in range(int(count) + 1)]


def _listed(text: str) -> list[Any]:
    """Values in TOML, or bare words, between commas."""
    values = toml_text.parse_value(f"[{text}]")
    if isinstance(values, list):
        return values
    return [toml_text.parse_value(word.strip()) for word in text.split(",") if word.strip()]


@dataclass(frozen=True, slots=True)
class Cell:
    """A point of the design: the values of the parameters by path, and the configuration with them."""

    values: Mapping[str, Any]
    config: Config


@dataclass(frozen=True, slots=True)
class Design:
    """What a sweep runs: every cell with the same seeds, so that all cells face the same draws.

    Attributes:
        base: The configuration without the parameters' values; its seed is the first.
        cells: Different from each other.
        seeds: How many.
    """

    base: Config
    cells: tuple[Cell, ...]
    seeds: int

    @property
    def runs(self) -> int:
        """How many there are."""
        return len(self.cells) * self.seeds

    @property
    def reference(self) -> int:
        """The cell that others are compared with: the base configuration if it is one, else the first.

        It is not chosen by its results: the best of many looks better than it is.
        """
        same = (i for i, cell in enumerate(self.cells) if config_toml(cell.config) == config_toml(self.base))
        return next(same, 0)

    def identity(self) -> dict[str, Any]:
        """What tells this sweep from others, as JSON has it."""
        document = {
            "config": config_toml(self.base),
            "seeds": self.seeds,
            "cells": [dict(c.values) for c in self.cells],
        }
        found: dict[str, Any] = json.loads(json.dumps(document, default=str))
        return found


def design_sweep(
    config: Config,
    params: Mapping[str, str | Sequence[Any]],
    *,
    seeds: int = 1,
    design: str = "grid",
    cells: int | None = None,
) -> Design:
    """The cells of a sweep, each resolved and checked.

    Args:
        config: What all cells share; seeds are `config.seed`, `config.seed + 1` and so on.
        params: By path the values, or a text: `lo:hi:step` with both ends, `lo:hi`, or `a,b,c`.
        seeds: Of every cell.
        design: `grid`: all combinations; `list`: the first values of all parameters, then the second ones, and so on;
            `random`: drawn uniformly; `sobol`: scrambled Sobol points, powers of two of them cover the space best.
        cells: How many to draw; equal ones are left out.

    Raises:
        ConfigError: a parameter is unknown, a value not allowed or the design impossible.
    """
    if seeds < 1:
        raise ConfigError(f"seeds={seeds} must be at least 1 (--seeds)")
    if design not in DESIGNS:
        raise ConfigError(f"design={design!r} must be one of {', '.join(DESIGNS)} (--design)")
    if not params:
        raise ConfigError("the sweep has no parameter to vary: name one (--param)")
    if "seed" in params:
        raise ConfigError("seed cannot be varied as a parameter: seeds have an option of their own (--seeds)")
    axes = [Axis.parse(path, given) for path, given in params.items()]
    points = _drawn(axes, design, cells, config.seed) if design in ("random", "sobol") else _given(axes, design, cells)
    if len(points) * seeds > MAX_RUNS:
        raise ConfigError(f"{len(points)} cells x {seeds} seeds are more than {MAX_RUNS} runs")
    base = Layer.from_toml(config_toml(config), "the configuration")
    resolved = [Cell(dict(zip(params, point, strict=True)), _config_at(base, axes, point)) for point in points]
    return Design(config, tuple(resolved), seeds)


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """Paths and their values from `--param path=values`.

    Raises:
        ConfigError: one has no such form, or a path is there twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        path, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not path:
            raise ConfigError(f"--param {text}: must have the form section.key=values")
        if path in found:
            raise ConfigError(f"--param {text}: {path} is there twice")
        found[path] = values
    return found


def _config_at(base: Layer, axes: Sequence[Axis], point: Sequence[Any]) -> Config:
    values = {}
    for axis, value in zip(axes, point, strict=True):
        try:
            values[toml_text.parse_key(axis.path)] = Given(value, axis.origin)
        except ValueError as error:
            raise ConfigError(f"{axis.origin}: {error}") from None
    return resolve([base, Layer(values)])


def _given(axes: Sequence[Axis], design: str, cells: int | None) -> list[tuple[Any, ...]]:
    """All combinations, or one after the other."""
    if cells is not None:
        raise ConfigError(f"cells={cells} goes with --design random or sobol; a {design} has as many as its values say")
    for axis in axes:
        if axis.ends is not None:
            raise ConfigError(f"{axis.origin}: a {design} needs a step, as in lo:hi:step")
    lists = [axis.values for axis in axes]
    if design == "grid":
        if np.prod([float(len(values)) for values in lists]) > MAX_RUNS:
            raise ConfigError(f"the grid has more than {MAX_RUNS} cells (--param)")
        return list(itertools.product(*lists))
    if len({len(values) for values in lists}) > 1:
        counts = ", ".join(f"{axis.path} has {len(axis.values)}" for axis in axes)
        raise ConfigError(f"a list needs equally many values of every parameter: {counts} (--param)")
    return list(zip(*lists, strict=True))


def _drawn(axes: Sequence[Axis], design: str, cells: int | None, seed: int) -> list[tuple[Any, ...]]:
    if cells is None or not 1 <= cells <= MAX_RUNS:
        raise ConfigError(f"cells={cells} must be from 1 to {MAX_RUNS} for --design {design} (--cells)")
    generator = stream(seed, "sweep", design)
    if design == "random":
        shares = generator.random((cells, len(axes)))
    else:
        from scipy.stats import qmc  # takes a second to import

        shares = qmc.Sobol(len(axes), rng=generator).random_base2(max(cells - 1, 0).bit_length())[:cells]
    points = [tuple(axis.at(float(share)) for axis, share in zip(axes, row, strict=True)) for row in shares]
    return list({json.dumps(point, default=str): point for point in points}.values())


# --- runs ---


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep leaves.

    Attributes:
        design: What was run.
        frame: results.parquet: a row a run that succeeded, by cell, then seed.
        statistics: See `statistics_of`.
        failures: `values`, `seed`, `error` and `traceback` of every other run.
        warnings: Of all runs, each once.
        computed: Runs that were done now, not found among those kept.
        directory: Where all this is written, if it is.
    """

    design: Design
    frame: pd.DataFrame
    statistics: dict[str, Any]
    failures: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    computed: int
    directory: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `sweep --json`, which is statistics.json too."""
        failed = [{key: value for key, value in failure.items() if key != "traceback"} for failure in self.failures]
        return {"runs": len(self.frame), "failures": failed, **self.statistics}


def failed_run(failure: Mapping[str, Any]) -> str:
    """A line on a run that failed."""
    values = ", ".join(f"{path}={value}" for path, value in failure["values"].items())
    return f"{values} with seed {failure['seed']} failed: {failure['error']}"


def sweep(
    config: Config,
    params: Mapping[str, str | Sequence[Any]],
    *,
    seeds: int = 1,
    design: str = "grid",
    cells: int | None = None,
    output: Path | str | None = None,
    **options: Any,
) -> SweepResult:
    """Run a policy over a design of parameters, every cell on the same draws: `design_sweep`, then `run_sweep`.

    Processes are spawned: a script that calls this needs `if __name__ == "__main__":`.

    Args:
        config: Without the varied values; its seed is the first.
        params: Values by path, as texts (`lo:hi:step` with both ends, `lo:hi`, `a,b,c`) or as they are.
        seeds: How many, the same ones for every cell.
        design: grid, list, random or sobol.
        cells: How many to draw, for random and sobol.
        output: Directory to write; None: nothing is written.
        options: Of `run_sweep`.

    Raises:
        ConfigError: a path is unknown, or a value or an option is not allowed.
        RunDirectoryError: the directory cannot be written, or is of another sweep.
    """
    planned = design_sweep(config, params, seeds=seeds, design=design, cells=cells)
    return run_sweep(planned, None if output is None else Path(output), **options)


def run_sweep(
    design: Design,
    directory: Path | None = None,
    *,
    resume: bool = False,
    cache: Path | None = None,
    engine: str = "local",
    jobs: int | None = None,
    ray_address: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SweepResult:
    """Do all runs that are not kept yet, and write what they give.

    Args:
        design: Of `design_sweep`.
        directory: To write; see docs/experiments.md.
        resume: Go on in *directory*, if it is there.
        cache: Where finished runs are kept, for other sweeps too; by default in *directory*.
        engine: `local`: processes of this machine, `ray`: Ray's.
        jobs: Runs at once; by default the cores that this process may use, or all CPUs of Ray.
        ray_address: Of a Ray cluster; by default one of its own on this machine.
        progress: Called with the number of runs done, kept ones included.

    Raises:
        ConfigError: an option is not allowed.
        RunDirectoryError: the directory cannot be written, or is of another sweep.
        ClusterError: Ray does not start, or does not answer.
    """
    _check_options(engine, jobs, ray_address)
    notes = [] if directory is None else _open(directory, design, resume)
    kept = KeptRuns(cache or (directory / "runs" if directory else None))
    # All cells of a seed together: they share their draws.
    tasks = [(cell, seed) for seed in range(design.seeds) for cell in range(len(design.cells))]
    configs = {task: design.cells[task[0]].config.with_seed(design.base.seed + task[1]) for task in tasks}
    keys = {task: key_of(config) for task, config in configs.items()}
    found = {task: outcome for task in tasks if (outcome := kept.get(keys[task])) is not None}
    missing = {keys[task]: configs[task].model_dump_json() for task in tasks if task not in found}
    by_key: dict[str, list[tuple[int, int]]] = {}
    for task in tasks:
        by_key.setdefault(keys[task], []).append(task)
    written_s = time.monotonic()
    with contextlib.closing(_outcomes(missing, engine, jobs, ray_address)) as outcomes:
        for key, outcome in outcomes:
            kept.put(key, outcome)
            found |= dict.fromkeys(by_key[key], outcome)
            if directory is not None and time.monotonic() - written_s >= WRITE_EVERY_S:
                _write_frame(directory, frame_of(design, found))
                written_s = time.monotonic()
            if progress is not None:
                progress(len(found))
    return _finish(design, found, notes, len(missing), directory)


def _check_options(engine: str, jobs: int | None, ray_address: str | None) -> None:
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r} must be one of {', '.join(ENGINES)} (--engine)")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs={jobs} must be at least 1 (--jobs)")
    if ray_address is not None and engine != "ray":
        raise ConfigError(f"ray_address={ray_address!r} goes with --engine ray (--ray-address)")


def _outcomes(
    texts: Mapping[str, str], engine: str, jobs: int | None, ray_address: str | None
) -> Generator[tuple[str, Outcome], None, None]:
    if not texts:
        return
    if engine == "local":
        yield from on_processes(texts, jobs or len(os.sched_getaffinity(0)))
    else:
        yield from on_ray(texts, ray_address, jobs)


def _finish(
    design: Design,
    found: Mapping[tuple[int, int], Outcome],
    notes: Sequence[str],
    computed: int,
    directory: Path | None,
) -> SweepResult:
    frame = frame_of(design, found)
    failures = [
        {"values": dict(design.cells[cell].values), "seed": design.base.seed + seed, **outcome}
        for (cell, seed), outcome in sorted(found.items())
        if "error" in outcome
    ]
    warnings = dict.fromkeys([*notes, *(note for _, o in sorted(found.items()) for note in o.get("warnings", ()))])
    statistics = statistics_of(design, found)
    result = SweepResult(design, frame, statistics, tuple(failures), tuple(warnings), computed, directory)
    if directory is not None:
        _write_frame(directory, frame)
        write_json(directory / "failures.json", failures)
        write_json(directory / "statistics.json", result.to_dict())
    return result


# --- what is kept ---


def key_of(config: Config) -> str:
    """Of a run among those that are kept: its resolved configuration, files that it names, and the code's version."""
    files = [path for path in (config.job.workload, config.cluster.hardware, config.engine.profile) if path]
    policy = inspect.getsourcefile(load_policy_class(config.policy))  # may be the user's own
    parts = [code_version(), config_toml(config), *(_digest(path) for path in (*files, policy) if path)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(path: str) -> str:
    """Of a file's content; empty for what is a name and no file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


def _open(directory: Path, design: Design, resume: bool) -> list[str]:
    """Make the directory of a sweep, or check that it is this one's; what to say of it."""
    about = {"code_version": code_version(), **design.identity()}
    renewed = open_directory(
        directory, "sweep", "sweep.json", design.base, about, resume=resume, renewable=["code_version"]
    )
    return [f"the code has changed since {str(directory)!r} was begun: runs of before are done again"] * renewed


def _write_frame(directory: Path, frame: pd.DataFrame) -> None:
    if len(frame):
        replace_file(directory / RESULTS, lambda hidden: frame.to_parquet(hidden, index=False))


# --- tables ---


def frame_of(design: Design, found: Mapping[tuple[int, int], Outcome]) -> pd.DataFrame:
    """A row a run that succeeded, by cell, then seed: the parameters by path, `seed`, and the flattened summary.

    Times of the host are left out: so the table is the same whoever ran it. What is None is missing.
    """
    import pandas as pd

    paths = design.cells[0].values
    columns = {path: _column([cell.values[path] for cell in design.cells]) for path in paths}
    rows = []
    for (cell, seed), outcome in sorted(found.items()):
        if "summary" in outcome:
            values = {path: column[cell] for path, column in columns.items()}
            figures = {str(k): v for k, v in flat(outcome["summary"]).items() if v is not None and k not in HOST_TIMES}
            rows.append(values | {"seed": design.base.seed + seed} | figures)
    return pd.DataFrame(rows)


def _column(values: Sequence[Any]) -> Sequence[Any]:
    """Numbers, flags or texts as they are; what has no column type of its own, or several, as JSON."""
    for kinds in ((bool,), (int,), (int, float), (str,)):
        if all(type(value) in kinds for value in values):
            return [float(value) for value in values] if kinds == (int, float) else values
    return [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]


def statistics_of(design: Design, found: Mapping[tuple[int, int], Outcome]) -> dict[str, Any]:
    """Of each table and metric, by cell: the mean and its t-interval over seeds, and how it differs from the reference.

    Each table is a family of comparisons. `standard_deviations` keeps the noise of sampling, which more seeds
    shrink, apart from what the parameters change, which they do not.
    """
    flats = {task: flat(outcome["summary"]) for task, outcome in sorted(found.items()) if "summary" in outcome}
    tables = {name: _statistics(design, flats, metrics) for name, metrics in TABLES.items()}
    return {
        "reference": dict(design.cells[design.reference].values),
        "seeds": design.seeds,
        "tables": {name: table for name, table in tables.items() if table["cells"]},
    }


def _statistics(
    design: Design, flats: Mapping[tuple[int, int], Mapping[Any, Any]], metrics: Mapping[str, str]
) -> dict[str, Any]:
    by_metric: dict[str, dict[int, dict[int, float]]] = {metric: {} for metric in metrics}
    for (cell, seed), row in flats.items():
        for metric, column in metrics.items():
            if row.get(column) is not None:
                by_metric[metric].setdefault(cell, {})[seed] = float(row[column])
    tests = _tests(by_metric, design.reference)
    cells = sorted(set().union(*by_metric.values()))
    return {
        "cells": [
            {
                "values": dict(design.cells[cell].values),
                **{metric: _summary(values[cell]) for metric, values in by_metric.items() if cell in values},
                "paired": {metric: tests[metric, cell] for metric in metrics if (metric, cell) in tests} or None,
            }
            for cell in cells
        ],
        "standard_deviations": {metric: _deviations(values, design.seeds) for metric, values in by_metric.items()},
    }


def _summary(by_seed: Mapping[int, float]) -> dict[str, Any]:
    values = np.array(list(by_seed.values()))
    return {"mean": float(values.mean()), "ci95": interval95(values)}


def _tests(by_metric: Mapping[str, Mapping[int, Mapping[int, float]]], reference: int) -> dict[tuple[str, int], Any]:
    """Differences from the reference over the seeds that both have."""
    pairs = {}
    for metric, values in by_metric.items():
        base = values.get(reference, {})
        for cell, own in values.items():
            both = sorted(own.keys() & base.keys())
            if cell != reference and both:
                pairs[metric, cell] = ([own[seed] for seed in both], [base[seed] for seed in both])
    return {key: paired.to_dict() for key, paired in zip(pairs, compare_paired(list(pairs.values())), strict=True)}


def _deviations(values: Mapping[int, Mapping[int, float]], seeds: int) -> dict[str, float] | None:
    """Of the cells that have all seeds."""
    whole = [[own[seed] for seed in range(seeds)] for own in values.values() if len(own) == seeds]
    return split_variance(np.array(whole)) if seeds > 1 and len(whole) > 1 else None
