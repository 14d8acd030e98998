"""How far the simulator is off: the same policy objects, the same work, on real engines and on the simulated cluster.

The simulator's hardware is a profile of this machine (`simrl profile`), whose workloads are others than the ones here.
Real runs are repeated, with a fixed probe before and after each, so that drift of the machine can be told from error.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from simrl.experiments.config import Config, ConfigError, load_config
from simrl.experiments.run import policy_of, work_of
from simrl.policies.contract import drive
from simrl.real_backend.profiler import TINY, write_tiny
from simrl.simulator.backend import SimulatedBackend
from simrl.simulator.estimates import ProfiledEstimates
from simrl.simulator.profiled import ProfiledCosts
from simrl.traces.lengths import LengthModel, load_workload
from simrl.traces.oracle import Oracle
from simrl.traces.parameters import Parameters
from simrl.traces.profile import Profile, load_profile
from simrl.traces.records import Frames, Recorder
from simrl.traces.streams import stream

ClockName = Literal["virtual", "wall"]
STAGES: Mapping[str, str] = {
    "generation": "generation", "preparation": "log_probs", "learning": "update", "weight_sync": "weight_sync",
    "step": "step",
}  # fmt: skip
"""Stages of a run, and what the rows call them."""

VOCABULARY = 256  # token ids of prompts are below it: any model has so many
SHORTER = 4  # responses of the validation are so many times shorter than the workload's
PRESET: Sequence[str] = (
    "job.prompts_per_step=16", "job.responses_per_prompt=4", "job.dataset_prompts=16", "job.mini_batch_prompts=8",
    "job.steps=4", "job.max_prompt_tokens=96", "job.max_response_tokens=256", "engine.tensor_parallel=1",
    "engine.max_num_seqs=32", "engine.max_num_batched_tokens=2048", "cluster.nodes=1",
)  # fmt: skip
"""A job that a tiny model does on a CPU within seconds; every step is an epoch, so that policies see history soon."""


@dataclass(frozen=True, slots=True)
class Run:
    """A policy's run: its frames, and for a real one how slow the machine was, 1 = as when it was profiled."""

    policy: str
    kind: Literal["real", "simulated"]
    frames: Frames
    slowness: float = 1.0
    repeat: int = 0


@dataclass(frozen=True)
class Validation:
    """What `simrl validate` finds.

    Attributes:
        rows: policy, step, stage, real_s (median over repeats), simulated_s, relative_error and
            relative_error_normalised (simulated against real / slowness).
        repeat_spread: By policy and stage, (largest - smallest) / median of the repeats, median over steps.
        runs: All of them.
    """

    rows: pd.DataFrame
    repeat_spread: pd.DataFrame
    runs: tuple[Run, ...]

    def median_abs_error(self, *by: str, normalised: bool = False) -> pd.Series[float]:
        """Median absolute relative error by stage, and by what else is asked."""
        column = "relative_error_normalised" if normalised else "relative_error"
        return self.rows.assign(error=self.rows[column].abs()).groupby([*by, "stage"])["error"].median()

    def ranking(self) -> dict[str, dict[str, list[str]]]:
        """Policies from fastest (cheapest) to slowest, as measured and as simulated, by stage."""
        totals = self.rows.groupby(["stage", "policy"])[["real_s", "simulated_s"]].sum()
        return {
            stage: {kind: list(totals.loc[stage][f"{kind}_s"].sort_values().index) for kind in ("real", "simulated")}
            for stage in ("step", "gpu_s")
        }

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        normalised = self.median_abs_error(normalised=True)
        by_policy = self.median_abs_error("policy")
        return {
            "rows": self.rows.to_dict("records"),
            "median_abs_error": self.median_abs_error().to_dict(),
            "median_abs_error_normalised": normalised.to_dict(),
            "median_abs_error_by_policy": {p: by_policy[p].to_dict() for p in self.rows["policy"].unique()},
            "repeat_spread": self.repeat_spread.to_dict("records"),
            "ranking": self.ranking(),
        }


def short_responses(name: str) -> LengthModel:
    """The workload of that name with responses, prompts and template shortened, so that a tiny model can replay it."""
    lengths = load_workload(name)
    return dataclasses.replace(
        lengths,
        mu=lengths.mu - math.log(SHORTER),
        template_tokens=lengths.template_tokens // SHORTER,
        prompt_tokens=tuple(max(tokens // 2, 1) for tokens in lengths.prompt_tokens),
        source=f"{lengths.source}; responses {SHORTER} times shorter, for a tiny model",
    )


def validate(
    config: Config,
    policies: Sequence[str],
    profile: Profile,
    profile_path: str | Path,
    model_folder: str | Path,
    *,
    gpus: int = 8,
    clock: ClockName = "virtual",
    repeats: int = 2,
    address: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Validation:
    """Run each policy for real, *repeats* times in turns, and simulated.

    Args:
        config: Job, engine and seed; on CPUs based on `PRESET`.
        policies: Names or import strings.
        profile: The machine's.
        profile_path: Where it is from.
        model_folder: What is run; the profiled model.
        gpus: Of each node; on the virtual clock as many logical ones as are asked for.
        clock: See `simrl.real_backend.clock`.
        repeats: Of each policy's real run.
        address: Of a Ray cluster.
        progress: Told what is done.
    """
    from simrl.real_backend.actors import HostPool

    job = config.job
    lengths = short_responses(job.workload) if profile.model.name == TINY else load_workload(job.workload)
    oracle = Oracle(lengths, config.seed, job.dataset_prompts, job.responses_per_prompt, job.max_response_tokens)
    costs = ProfiledCosts(
        job, config.engine, profile, nodes=config.cluster.nodes, gpus_per_node=gpus, parameters=Parameters({}),
        path=profile_path, clock=clock,
    )  # fmt: skip
    runs = [_simulated(config.with_policy(name), oracle, costs) for name in policies]
    engine, learner = _settings(profile, config, str(model_folder))
    with HostPool(engine, learner, cpus_per_host=0 if clock == "virtual" else 1, address=address) as hosts:
        for repeat in range(repeats):
            for name in policies:
                progress(f"{name}, real run {repeat + 1} of {repeats}")
                runs.append(_real(config.with_policy(name), oracle, costs, hosts, clock, gpus, profile, repeat))
    return compare_runs(runs)


def run_validation(
    policies: Sequence[str],
    *,
    device: str,
    clock: str | None,
    profile: Path | None,
    model: str,
    gpus: int,
    repeats: int,
    address: str | None,
    config_file: str | None,
    sets: Sequence[str],
    steps: int | None,
    seed: int | None,
    progress: Callable[[str], None],
) -> Validation:
    """As `validate`, from what a user gives: profiles the machine if there is no profile, makes the tiny model.

    Raises:
        ConfigError: an option is not one of those allowed, or the configuration is impossible.
        ProfileError: the profile cannot be read, or there is no such model.
    """
    for name, value, allowed in (("device", device, ("cpu", "cuda")), ("clock", clock, (None, "virtual", "wall"))):
        if value not in allowed:
            raise ConfigError(f"--{name} {value}: allowed are {', '.join(filter(None, allowed))}")
    for name, number in (("gpus", gpus), ("repeats", repeats)):
        if number < 1:
            raise ConfigError(f"--{name} {number}: at least 1")
    chosen: Any = clock or ("virtual" if device == "cpu" else "wall")
    cores = len(os.sched_getaffinity(0))
    if device == "cpu" and chosen == "wall" and gpus > cores:
        raise ConfigError(
            f"--gpus {gpus} on the wall clock: this machine has {cores} cores, and a function needs one; give fewer, or"
            " --clock virtual"
        )
    preset = PRESET if device == "cpu" else ()
    config = load_config(config=config_file, sets=[*preset, *sets], steps=steps, seed=seed, policies=list(policies))
    with tempfile.TemporaryDirectory(prefix="simrl-") as folder:
        measured, path = _profile(profile, device, model, Path(folder), progress)
        place = model
        if model == TINY:
            place = str(Path(folder) / "model")
            write_tiny(place)
        return validate(
            config, policies, measured, path, place, gpus=gpus, clock=chosen, repeats=repeats, address=address,
            progress=progress,
        )  # fmt: skip


def _profile(
    path: Path | None, device: Any, model: str, folder: Path, progress: Callable[[str], None]
) -> tuple[Profile, Path]:
    if path is not None:
        return load_profile(path), path
    from simrl.real_backend.profiler import profile_model

    progress("profiling this machine")
    return profile_model(device, model), folder / "measured now"


def _simulated(config: Config, oracle: Oracle, costs: ProfiledCosts) -> Run:
    recorder = Recorder()
    backend = SimulatedBackend(costs, work_of(config, oracle), recorder, config.seed)
    drive(backend, policy_of(config, oracle))
    return Run(config.policy, "simulated", recorder.frames())


def _real(
    config: Config, oracle: Oracle, costs: ProfiledCosts, hosts: Any, clock: ClockName, gpus: int, profile: Profile,
    repeat: int,
) -> Run:  # fmt: skip
    from simrl.real_backend.backend import RealBackend, Replay

    recorder = Recorder()
    backend = RealBackend(
        config.job, config.engine, config.cluster.nodes, gpus, work_of(config, oracle), recorder, hosts,
        Replay(config.seed, VOCABULARY),
        lambda real: ProfiledEstimates(costs, real.learner_world() or None, real.typical_context()), clock,
    )  # fmt: skip
    before_s = probe(hosts)
    drive(backend, policy_of(config, oracle))
    slow = statistics.median([*before_s, *probe(hosts)]) / statistics.median(p.seconds for p in profile.probe_s)
    return Run(config.policy, "real", recorder.frames(), slow, repeat)


def probe(hosts: Any, repetitions: int = 3) -> list[float]:
    """Seconds of the profile's fixed replay, on an idle engine of the pool."""
    from simrl.real_backend.profiler import FIRST_TOKEN, play, probe_workload

    host = hosts.take()
    tokens = stream(0, "probe")

    def step(works: Sequence[Any], iterations: int) -> Any:
        return hosts.get(host.actor.step.remote(works, iterations))

    def prompt(count: int) -> list[int]:
        ids: list[int] = tokens.integers(FIRST_TOKEN, VOCABULARY, count).tolist()
        return ids

    ids, block_tokens = itertools.count(), hosts.engine.block_tokens
    took = [play(step, probe_workload(), prompt, ids, block_tokens).seconds for _ in range(repetitions)]
    hosts.give_back(host)
    return took


def _settings(profile: Profile, config: Config, folder: str) -> tuple[Any, Any]:
    """The profiled engine, and a learner of the same model."""
    from simrl.real_backend.engine import EngineSettings
    from simrl.real_backend.learner_settings import LearnerSettings

    measured, wanted = profile.engine, config.engine
    dtype: Any = profile.model.dtype
    engine = EngineSettings(
        model=folder, device=profile.device, dtype=dtype, max_num_seqs=wanted.max_num_seqs or measured.max_num_seqs,
        max_num_batched_tokens=wanted.max_num_batched_tokens or measured.max_num_batched_tokens,
        max_model_len=measured.max_model_len, num_kv_blocks=measured.kv_blocks + 1, block_tokens=measured.block_tokens,
        enforce_eager=measured.enforce_eager, prefix_caching=config.engine.prefix_caching,
        tensor_parallel=measured.tensor_parallel, threads=measured.threads,
    )  # fmt: skip
    learner = LearnerSettings(
        folder, 0, 1, "", device=profile.device, dtype=dtype, micro_batch_tokens=profile.micro_batch_tokens,
        mini_batch_prompts=config.job.mini_batch_prompts,
    )  # fmt: skip
    return engine, learner


# --- comparing ---


def stage_seconds(frames: Frames) -> pd.DataFrame:
    """Seconds of each step's stages, and its GPU-seconds: columns step, stage, seconds."""
    phases = frames.phases.assign(seconds=frames.phases["end_s"] - frames.phases["start_s"])
    rows = phases.assign(stage=phases["stage"].map(STAGES))[["step", "stage", "seconds"]]
    workers = frames.workers[frames.workers["state"] != "parked"]
    steps = phases[phases["stage"] == "step"]
    leased = [
        {"step": step, "stage": "gpu_s", "seconds": _gpu_seconds(workers, start_s, end_s)}
        for step, start_s, end_s in zip(steps["step"], steps["start_s"], steps["end_s"], strict=True)
    ]
    return pd.concat([rows, pd.DataFrame(leased)], ignore_index=True)


def _gpu_seconds(workers: pd.DataFrame, start_s: float, end_s: float) -> float:
    """GPU-seconds of leases between two moments."""
    inside = workers["end_s"].clip(upper=end_s) - workers["start_s"].clip(lower=start_s)
    return float((inside.clip(lower=0) * workers["gpus"]).sum())


def compare_runs(runs: Sequence[Run]) -> Validation:
    """Real against simulated, step by step and stage by stage."""
    frames = [
        stage_seconds(run.frames).assign(policy=run.policy, kind=run.kind, slowness=run.slowness, repeat=run.repeat)
        for run in runs
    ]
    table = pd.concat(frames, ignore_index=True)
    key = ["policy", "step", "stage"]
    real = table[table["kind"] == "real"].assign(normalised=lambda t: t["seconds"] / t["slowness"])
    simulated = table[table["kind"] == "simulated"].set_index(key)["seconds"].rename("simulated_s")
    grouped = real.groupby(key, sort=False)
    medians = grouped[["seconds", "normalised"]].median().rename(columns={"seconds": "real_s"})
    rows = medians.join(simulated, how="inner").reset_index()
    rows["relative_error"] = rows["simulated_s"] / rows["real_s"] - 1
    rows["relative_error_normalised"] = rows["simulated_s"] / rows["normalised"] - 1
    spread = ((grouped["seconds"].max() - grouped["seconds"].min()) / grouped["seconds"].median()).rename("spread")
    by_stage = spread.reset_index().groupby(["policy", "stage"], sort=False)["spread"].median().reset_index()
    columns = [*key, "real_s", "simulated_s", "relative_error", "relative_error_normalised"]
    return Validation(rows[columns], by_stage, tuple(runs))


# --- files ---


def write_validation(validation: Validation, directory: Path) -> None:
    """Frames of all runs, the rows, and a picture of the timelines."""
    from simrl.experiments.run import write_directory

    def write(place: Path) -> None:
        import json

        (place / "validation.json").write_text(json.dumps(validation.to_json(), indent=2) + "\n", encoding="utf-8")
        validation.rows.to_csv(place / "rows.csv", index=False)
        for run in validation.runs:
            folder = place / f"{run.policy.replace(':', '.')}-{run.kind}-{run.repeat}"
            folder.mkdir()
            for name, frame in run.frames.by_name().items():
                frame.to_parquet(folder / f"{name}.parquet", index=False)
        draw_timelines(validation, place / "timelines.png")

    write_directory(directory, write)


COLOURS = {
    "generation": "#0072B2", "preparation": "#E69F00", "learning": "#009E73", "weight_sync": "#CC79A7",
    "cold": "#999999", "idle": "#DDDDDD",
}  # fmt: skip
"""Okabe and Ito's palette, told apart by colour-blind readers."""


def draw_timelines(validation: Validation, path: Path) -> None:
    """One panel a policy: the first real run above the simulated one, functions as rows, starts left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    policies = list(dict.fromkeys(run.policy for run in validation.runs))
    figure, axes = plt.subplots(2 * len(policies), 1, figsize=(11, 2.1 * 2 * len(policies)), squeeze=False)
    for row, policy in enumerate(policies):
        for offset, kind in enumerate(("real", "simulated")):
            run = next(run for run in validation.runs if run.policy == policy and run.kind == kind)
            _draw_run(axes[2 * row + offset][0], run)
        left = max(axes[2 * row + i][0].get_xlim()[1] for i in (0, 1))
        for offset in (0, 1):
            axes[2 * row + offset][0].set_xlim(0, left)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, ncols=len(handles), loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / len(policies) / 2))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_run(axis: Any, run: Run) -> None:
    workers = run.frames.workers
    begin_s = float(workers[workers["stage"] == "generation"]["start_s"].min())
    functions = sorted(workers["function"].unique())
    for place, function in enumerate(functions):
        rows = workers[(workers["function"] == function) & (workers["end_s"] > begin_s)]
        for state, stage, start_s, end_s in zip(
            rows["state"], rows["stage"], rows["start_s"], rows["end_s"], strict=True
        ):
            colour = COLOURS.get(stage if state == "busy" else state)
            if colour is not None:
                start_s = max(start_s, begin_s)
                axis.broken_barh([(start_s - begin_s, end_s - start_s)], (place - 0.4, 0.8), color=colour)
    axis.set_yticks(range(len(functions)), functions, fontsize=6)
    axis.set_xlabel("s after the first generation began", fontsize=7)
    axis.set_title(f"{run.policy}, {run.kind}", fontsize=9, loc="left")
    axis.tick_params(labelsize=7)
