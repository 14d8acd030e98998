"""How far the simulator is off: the same policy objects, the same work, on real engines and on the simulated cluster.

The simulator's hardware is a profile of this machine (`simrl profile`), whose workloads are others than the ones here.
Real runs are repeated, with a fixed probe before and after each, so that drift of the machine can be told from error.
"""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from simrl.experiments.config import Config, ConfigError, config_toml, load_config
from simrl.experiments.plots import COLOURS, gantt
from simrl.experiments.run import policy_of, work_of
from simrl.policies.contract import drive
from simrl.real_backend.actors import HostPool
from simrl.real_backend.backend import ClockName, RealBackend, Replay
from simrl.real_backend.engine import EngineSettings
from simrl.real_backend.learner_settings import LearnerSettings
from simrl.real_backend.profiler import TINY, check_real, default_clock, default_settings, local_model, measure
from simrl.real_backend.replays import Player, mean_s
from simrl.simulator.backend import SimulatedBackend
from simrl.simulator.estimates import ProfiledEstimates
from simrl.simulator.profiled import ProfiledCosts
from simrl.traces.job import Faults
from simrl.traces.lengths import load_workload
from simrl.traces.oracle import Oracle
from simrl.traces.parameters import Parameters
from simrl.traces.profile import Profile, load_profile
from simrl.traces.records import Frames, Recorder
from simrl.traces.summary import gpu_s_between

STAGES: Mapping[str, str] = {
    "generation": "generation", "preparation": "log_probs", "learning": "update", "weight_sync": "weight_sync",
    "step": "step",
}  # fmt: skip
"""Stages of a run, and what the rows call them."""

RANKED = ("step", "gpu_s")  # what policies are ranked by

VOCABULARY = 256  # token ids of prompts are below it: any model has so many
PRESET: Sequence[str] = (
    "job.prompts_per_step=8", "job.responses_per_prompt=2", "job.dataset_prompts=8", "job.mini_batch_prompts=4",
    "job.steps=4", "job.workload=livecodebench-llama", "job.max_prompt_tokens=256", "job.max_response_tokens=768",
    "engine.tensor_parallel=1", "engine.max_num_seqs=32", "engine.max_num_batched_tokens=2048", "cluster.nodes=1",
)  # fmt: skip
"""A job that a tiny model does on a CPU within seconds; every step is an epoch, so that policies see history soon."""
SIMULATED_ONLY: Mapping[str, Sequence[str]] = {
    "job": (
        "learner_offload", "learner_strategy", "learner_tensor_parallel", "micro_batch_tokens", "packing",
        "activation_checkpointing", "lora_rank", "reward", "reward_model",
    ),
    "cluster": ("weight_sync", "keep_alive_s", "images_cached"),
    "faults": tuple(Faults.model_fields),
}  # fmt: skip
"""Options that real engines and the learner beside them do not carry out."""


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
        profile: Of the machine.
        config: Of the runs, with as many GPUs a node as they had.
    """

    rows: pd.DataFrame
    repeat_spread: pd.DataFrame
    runs: tuple[Run, ...]
    profile: Profile | None = None
    config: Config | None = None

    def median_abs_error(self, *by: str, normalised: bool = False) -> pd.Series[float]:
        """Median absolute relative error by stage, and by what else is asked."""
        column = "relative_error_normalised" if normalised else "relative_error"
        return self.rows.assign(error=self.rows[column].abs()).groupby([*by, "stage"])["error"].median()

    def pairs(self) -> list[dict[str, Any]]:
        """Each two policies by step time and GPU-seconds, after the first step, which is mostly cold starts.

        `more` has the larger total in reality; the ratios are its totals over the other's, measured and simulated.
        """
        later = self.rows[self.rows["step"] > 0]
        rows = later if len(later) else self.rows
        found = []
        for stage in RANKED:
            totals = rows[rows["stage"] == stage].groupby("policy", sort=False)[["real_s", "simulated_s"]].sum()
            for (less, small), (more, large) in itertools.combinations(totals.sort_values("real_s").iterrows(), 2):
                real, simulated = large["real_s"] / small["real_s"], large["simulated_s"] / small["simulated_s"]
                found.append({
                    "stage": stage, "less": less, "more": more, "real_ratio": real, "simulated_ratio": simulated,
                    "agree": bool(simulated > 1),
                })  # fmt: skip
        return found

    def to_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        normalised = self.median_abs_error(normalised=True)
        by_policy = self.median_abs_error("policy")
        by_policy_normalised = self.median_abs_error("policy", normalised=True)
        names, real = self.rows["policy"].unique(), [run for run in self.runs if run.kind == "real"]
        return {
            "rows": self.rows.to_dict("records"),
            "median_abs_error": self.median_abs_error().to_dict(),
            "median_abs_error_normalised": normalised.to_dict(),
            "median_abs_error_by_policy": {p: by_policy[p].to_dict() for p in names},
            "median_abs_error_by_policy_normalised": {p: by_policy_normalised[p].to_dict() for p in names},
            "repeat_spread": self.repeat_spread.to_dict("records"),
            "pairs": self.pairs(),
            "slowness": [{"policy": r.policy, "repeat": r.repeat, "slowness": r.slowness} for r in real],
        }


@dataclass(frozen=True, slots=True)
class Site:
    """What the policies run on, simulated and for real.

    Attributes:
        hosts: Processes with engines and learners of the profiled model.
        profile: Of this machine.
        profile_path: Where it is from.
        gpus: Of each node; on the virtual clock as many logical ones as are asked for.
        clock: See `simrl.real_backend.clock`.
    """

    hosts: HostPool
    profile: Profile
    profile_path: Path
    gpus: int
    clock: ClockName


def validate(
    config: Config,
    policies: Sequence[str],
    site: Site,
    *,
    repeats: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> Validation:
    """Run each policy for real, *repeats* times in turns, and simulated.

    Args:
        config: Job, engine and seed; on CPUs based on `PRESET`.
        policies: Names or import strings.
        site: Where.
        repeats: Of each policy's real run.
        progress: Told what is done.
    """
    job = config.job
    oracle = Oracle(
        load_workload(job.workload), config.seed, job.dataset_prompts, job.responses_per_prompt, job.max_response_tokens
    )
    costs = ProfiledCosts(
        job, config.engine, site.profile, nodes=config.cluster.nodes, gpus_per_node=site.gpus,
        parameters=Parameters({}), path=site.profile_path, clock=site.clock,
    )  # fmt: skip
    runs = [_simulated(config.with_policy(name), oracle, costs) for name in policies]
    probed_s = probe(site)
    for repeat, name in itertools.product(range(repeats), policies):
        progress(f"{name}, real run {repeat + 1} of {repeats}")
        frames = _real(config.with_policy(name), oracle, costs, site)
        before_s, probed_s = probed_s, probe(site)
        slowness = statistics.fmean([before_s, probed_s]) / site.profile.probe_on(site.clock)
        runs.append(Run(name, "real", frames, slowness, repeat))
    return replace(compare_runs(runs), profile=site.profile, config=_with_gpus(config, site.gpus))


def _with_gpus(config: Config, gpus: int) -> Config:
    """*config* with nodes of so many GPUs."""
    given, node_type = config.cluster.parameters, config.cluster.node_type
    nodes = given.get("node", {})
    nodes = {**nodes, node_type: {**nodes.get(node_type, {}), "gpus": gpus}}
    cluster = config.cluster.model_copy(update={"parameters": {**given, "node": nodes}})
    return config.model_copy(update={"cluster": cluster})


def run_validation(
    policies: Sequence[str],
    *,
    device: str = "cpu",
    clock: str | None = None,
    profile: Path | None = None,
    quick: bool = False,
    model: str = TINY,
    gpus: int = 8,
    repeats: int = 2,
    address: str | None = None,
    folder: Path | None = None,
    interface: str | None = None,
    config_file: str | None = None,
    sets: Sequence[str] = (),
    steps: int | None = None,
    seed: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Validation:
    """As `validate`, from what a user gives: profiles the machine if there is no profile, makes the tiny model.

    Options are those of `simrl validate`; *quick* profiles with few repetitions, as in `simrl profile --quick`.

    Raises:
        ConfigError: an option is not one of those allowed, or the configuration is impossible.
        ProfileError: the profile cannot be read, or there is no such model.
    """
    check_real(device, model)
    if clock not in (None, "virtual", "wall"):
        raise ConfigError(f"--clock {clock}: allowed are virtual, wall")
    for name, number in (("gpus", gpus), ("repeats", repeats)):
        if number < 1:
            raise ConfigError(f"--{name} {number}: at least 1")
    chosen: Any = clock or default_clock(device)
    cores = len(os.sched_getaffinity(0))
    if device == "cpu" and chosen == "wall" and gpus > cores:
        raise ConfigError(
            f"--gpus {gpus} on the wall clock: this machine has {cores} cores, and a function needs one; give fewer, or"
            " --clock virtual"
        )
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--folder {folder}: must be a folder that exists")
    preset = PRESET if device == "cpu" else ()
    config = load_config(config=config_file, sets=[*preset, *sets], steps=steps, seed=seed, policies=list(policies))
    _check_carried_out(config)
    if config.cluster.nodes > 1 and (address is None or folder is None):
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes}: several nodes are a Ray cluster (--address) with a folder that"
            " all of them see (--folder)"
        )
    measured = load_profile(profile) if profile is not None else None
    with local_model(model, folder) as (name, place):
        engine, learner = _settings(device, place, measured, config)
        learner = replace(learner, interface="lo" if address is None else interface)
        with HostPool(engine, learner, address=address, folder=folder) as hosts:
            if measured is None:
                progress("profiling this machine")
                measured = measure(hosts, name, chosen, gpus, quick=quick)
            site = Site(hosts, measured, profile or Path("measured now"), gpus, chosen)
            return validate(config, policies, site, repeats=repeats, progress=progress)


def _check_carried_out(config: Config) -> None:
    """Refuse what would only be simulated.

    Raises:
        ConfigError: an option of `SIMULATED_ONLY` is not at its default.
    """
    for section, names in SIMULATED_ONLY.items():
        given = getattr(config, section)
        for name in names:
            value, default = getattr(given, name), type(given).model_fields[name].default
            if value != default:
                raise ConfigError(f"{section}.{name}={value}: real engines do not do that; allowed: {default}")


def _simulated(config: Config, oracle: Oracle, costs: ProfiledCosts) -> Run:
    recorder = Recorder()
    backend = SimulatedBackend(costs, work_of(config, oracle), recorder, config.seed)
    drive(backend, policy_of(config, oracle))
    return Run(config.policy, "simulated", recorder.frames())


def _real(config: Config, oracle: Oracle, costs: ProfiledCosts, site: Site) -> Frames:
    recorder, nodes = Recorder(), config.cluster.nodes
    backend = RealBackend(
        config.job, config.engine, nodes, site.gpus, work_of(config, oracle), recorder, site.hosts,
        Replay(config.seed, VOCABULARY),
        lambda real: ProfiledEstimates(costs, real.learner_world() or None, real.typical_context()), site.clock,
        checkpoints=False,
    )  # fmt: skip
    drive(backend, policy_of(config, oracle))
    return recorder.frames()


def probe(site: Site) -> float:
    """Seconds of the profile's fixed replay, now, on as many engines in turn."""
    site.hosts.new_run()  # all hosts are idle
    hosts = site.hosts.take_side_by_side(min(site.profile.engines, site.gpus))
    seconds = mean_s(Player(site.hosts, 0).probe([host.actor for host in hosts], site.clock))
    site.hosts.new_run()
    return seconds


def _settings(
    device: Any, folder: str, profile: Profile | None, config: Config
) -> tuple[EngineSettings, LearnerSettings]:
    """The profiled engine, or the one that will be, within the limits asked for; and a learner of the same model."""
    engine, learner = default_settings(device, folder)
    if profile is not None:
        measured = profile.engine
        engine = replace(
            engine, dtype=profile.model.dtype, max_num_seqs=measured.max_num_seqs,
            max_num_batched_tokens=measured.max_num_batched_tokens, max_model_len=measured.max_model_len,
            num_kv_blocks=measured.kv_blocks + 1, block_tokens=measured.block_tokens,
            enforce_eager=measured.enforce_eager, tensor_parallel=measured.tensor_parallel, threads=measured.threads,
        )  # fmt: skip
        learner = replace(learner, micro_batch_tokens=profile.micro_batch_tokens)
    wanted = config.engine
    engine = replace(
        engine, max_num_seqs=wanted.max_num_seqs or engine.max_num_seqs, prefix_caching=wanted.prefix_caching,
        max_num_batched_tokens=wanted.max_num_batched_tokens or engine.max_num_batched_tokens,
    )  # fmt: skip
    dtype: Any = engine.dtype
    return engine, replace(learner, dtype=dtype, mini_batch_prompts=config.job.mini_batch_prompts)


# --- comparing ---


def stage_seconds(frames: Frames) -> pd.DataFrame:
    """Seconds of each step's stages, and its GPU-seconds: columns step, stage, seconds."""
    phases = frames.phases.assign(seconds=frames.phases["end_s"] - frames.phases["start_s"])
    rows = phases.assign(stage=phases["stage"].map(STAGES))[["step", "stage", "seconds"]]
    workers = frames.workers[frames.workers["state"] != "parked"]
    steps = phases[phases["stage"] == "step"]
    leased = [
        {"step": step, "stage": "gpu_s", "seconds": gpu_s_between(workers, start_s, end_s)}
        for step, start_s, end_s in zip(steps["step"], steps["start_s"], steps["end_s"], strict=True)
    ]
    return pd.concat([rows, pd.DataFrame(leased)], ignore_index=True)


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
    """Frames of all runs, the rows, the profile, and a picture of the timelines."""
    from simrl.experiments.run import write_directory

    def write(place: Path) -> None:
        import json

        if validation.profile is not None:
            validation.profile.write(place / "profile.json")
        (place / "validation.json").write_text(json.dumps(validation.to_json(), indent=2) + "\n", encoding="utf-8")
        validation.rows.to_csv(place / "rows.csv", index=False)
        for run in validation.runs:
            folder = place / f"{run.policy.replace(':', '.')}-{run.kind}-{run.repeat}"
            folder.mkdir()
            for name, frame in run.frames.by_name().items():
                frame.to_parquet(folder / f"{name}.parquet", index=False)
            if validation.config is not None:  # so that a trace of the run can be replayed
                own = validation.config.with_policy(run.policy)
                engine = own.engine.model_copy(update={"profile": str((directory / "profile.json").absolute())})
                text = config_toml(own.model_copy(update={"engine": engine}))
                (folder / "config.toml").write_text(text, encoding="utf-8")
        draw_timelines(validation, place / "timelines.png")

    write_directory(directory, write)


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
    gantt(workers, axis, by="function", start_s=begin_s)
    axis.set_xlabel("s after the first generation began", fontsize=7)
    axis.set_title(f"{run.policy}, {run.kind}", fontsize=9, loc="left")
    axis.tick_params(labelsize=7)
