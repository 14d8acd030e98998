"""One run: a policy on a simulated cluster, its frames and summary, and the directory that holds them."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from simrl.experiments.config import Config, ConfigError, check_context, check_tensor_parallel, config_toml
from simrl.experiments.hardware_file import load_parameters
from simrl.experiments.static_search import with_static_plan
from simrl.policies.contract import InvalidDecision, Policy, PolicyStalled, drive
from simrl.policies.registry import build_policy, load_policy_class
from simrl.policies.runtime.steps import StepWork
from simrl.simulator.backend import SimulatedBackend
from simrl.simulator.costs import CostModel, Costs, NodeType
from simrl.simulator.faults import FaultPlan
from simrl.simulator.profiled import ProfiledCosts
from simrl.traces.job import Faults
from simrl.traces.lengths import LengthModel, load_workload, prompts_of_step
from simrl.traces.oracle import Oracle
from simrl.traces.parameters import Parameter, Parameters
from simrl.traces.profile import load_profile
from simrl.traces.records import Frames, Recorder
from simrl.traces.summary import Price, summarise

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int], None]
"""Called with the number of learned steps."""


class RunDirectoryError(ValueError):
    """A run directory that cannot be written: which, and why."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a run leaves.

    Attributes:
        config: What was run.
        summary: The content of summary.json.
        frames: samples, phases, workers, decisions.
        parameters: Every sourced number that the run read, by key.
        warnings: One line each; what a reader of the numbers has to know.
    """

    config: Config
    summary: dict[str, Any]
    frames: Frames
    parameters: list[Parameter]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Simulation:
    """A backend that is ready to be driven, and what belongs to it."""

    backend: SimulatedBackend
    costs: CostModel
    recorder: Recorder
    parameters: Parameters
    oracle: object


@dataclass(frozen=True, slots=True)
class Work:
    """What a run works on, whatever its policy decides.

    Attributes:
        of_step: The work of a step, by its number.
        oracle: The true lengths, for a policy that asks for them.
        parameters: Where the lengths come from.
    """

    of_step: Callable[[int], StepWork]
    oracle: object
    parameters: tuple[Parameter, ...]


def run(
    config: Config, *, policy: Policy | None = None, progress: Progress | None = None, work: Work | None = None
) -> Result:
    """Simulate *config*.

    Args:
        config: Resolved.
        policy: An object to use in place of the policy that *config* names; a copy of it is driven.
        progress: Told after every learned step.
        work: In place of what is drawn from the configuration's seed.

    Raises:
        ConfigError: the configuration is impossible.
        DoesNotFit: the model does not fit on the GPUs; the message has the arithmetic.
        InvalidDecision: the policy decided what cannot be done; a note names the policy.
        PolicyStalled: the policy left the cluster without work; a note names the policy.
    """
    import pandas  # noqa: F401  loaded here, so that wall_s holds no imports

    if policy is None:
        config, notes = planned(config)
    else:
        notes = ()
    begin_wall_s = time.perf_counter()
    simulation = simulate(config, progress, work=work)
    costs = simulation.costs
    check_tensor_parallel(config.engine, costs.node.name, costs.node.gpus)
    gpus = costs.node.gpus * costs.nodes
    costs.memory.check_fit(config.engine.tensor_parallel, ("decode", "prepare", "learn"), gpus)
    price = Price.load(price_name(config, simulation.parameters), simulation.parameters)
    _drive(simulation, policy or policy_of(config, simulation.oracle), policy_name(config, policy))
    frames = simulation.recorder.frames()
    wall_s = time.perf_counter() - begin_wall_s
    summary = summarise(
        frames,
        policy=policy_name(config, policy),
        seed=config.seed,
        nodes=costs.nodes,
        gpus=gpus,
        price=price,
        policy_wall_s=simulation.backend.policy_wall_s,
        wall_s=wall_s,
    )
    warnings = (*notes, *_table_warnings(simulation, frames.workers))
    return Result(config, summary, frames, simulation.parameters.used(), warnings)


def simulate(
    config: Config, progress: Progress | None = None, steps: Sequence[int] | None = None, work: Work | None = None
) -> Simulation:
    """The simulated cluster of *config*, with *work*, or with what is drawn from the configuration's seed.

    Args:
        config: Resolved.
        progress: Told after every learned step.
        steps: Numbers of the job's steps whose work is done as steps 0, 1 and so on; None: those themselves.
        work: In place of what is drawn.

    Raises:
        ConfigError: a name is unknown, or the longest response exceeds the model's context.
    """
    try:
        parameters = load_parameters(config.cluster)
        node_type = NodeType.load(config.cluster.node_type, parameters)
        check_context(config.job, parameters)
        costs = costs_of(config, node_type, parameters)
        given = work or drawn_work(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for parameter in given.parameters:
        parameters.note(parameter)
    some = given.of_step if steps is None else lambda step: given.of_step(steps[step])
    recorder = Recorder()
    plan = FaultPlan.load(config.faults, config.cluster.nodes, parameters) if config.faults != Faults() else None
    backend = SimulatedBackend(costs, some, recorder, config.seed, progress, plan, config.cluster)
    return Simulation(backend, costs, recorder, parameters, given.oracle)


def drawn_work(config: Config) -> Work:
    """Lengths drawn from the workload that *config* names.

    Raises:
        ValueError: there is no such workload.
    """
    lengths, job = load_workload(config.job.workload), config.job
    oracle = Oracle(
        lengths, config.seed, job.dataset_prompts, job.responses_per_prompt, max_tokens=job.max_response_tokens
    )
    return Work(work_of(config, oracle), oracle, _workload_parameters(lengths))


def costs_of(config: Config, node_type: NodeType, parameters: Parameters) -> CostModel:
    """What things take: by the profile that the configuration names, else by the tables and models of its hardware.

    A profile stands for the machine: of the node type only the number of GPUs and the price are used. Times are on the
    clock that was profiled.
    """
    job, engine, nodes = config.job, config.engine, config.cluster.nodes
    if engine.profile is None:
        return Costs(job, engine, node_type, nodes, parameters)
    profile = load_profile(engine.profile)
    return ProfiledCosts(
        job, engine, profile, nodes=nodes, gpus_per_node=node_type.gpus, parameters=parameters, path=engine.profile,
        clock=profile.clock,
    )  # fmt: skip


def work_of(config: Config, oracle: Oracle) -> Callable[[int], StepWork]:
    """The work of each step: the same for every policy at one seed."""
    job, seed = config.job, config.seed
    prompt_tokens = oracle.model.prompt_lengths(seed, job.dataset_prompts).clip(max=job.max_prompt_tokens)

    def work(step: int) -> StepWork:
        epoch, ids = prompts_of_step(seed, step, job.prompts_per_step, job.dataset_prompts)
        responses = oracle.responses(epoch)
        return StepWork(
            epoch=epoch,
            prompt_ids=ids.tolist(),
            prompt_tokens=prompt_tokens[ids].tolist(),
            response_tokens=responses.tokens[ids].tolist(),
            truncated=responses.truncated[ids].tolist(),
        )

    return work


def planned(config: Config, shared: Config | None = None) -> tuple[Config, tuple[str, ...]]:
    """*config* with its static plan, and what to say of it (`with_static_plan`).

    Raises:
        ConfigError: there is no plan, or no such policy, or a parameter is unknown or out of range.
    """
    with _told_as_config_error(config):
        return with_static_plan(config, _simulate_steps, shared)


def _simulate_steps(config: Config, steps: Sequence[int]) -> Simulation:
    return simulate(config, steps=steps)


def policy_of(config: Config, oracle: object) -> Policy:
    """The policy that *config* names, with its parameters.

    Raises:
        ConfigError: there is no such policy, or a parameter is unknown or out of range.
    """
    config, _ = planned(config)
    with _told_as_config_error(config):
        return build_policy(load_policy_class(config.policy), config.policy_params, oracle)


@contextmanager
def _told_as_config_error(config: Config) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("policy", *first["loc"])))
        raise ConfigError(f"{where}={first['input']!r}: {first['msg']} (policy {config.policy!r})") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def policy_name(config: Config, policy: Policy | None) -> str:
    """The name that results carry: an object's is its class's import string."""
    return config.policy if policy is None else f"{type(policy).__module__}:{type(policy).__qualname__}"


def price_name(config: Config, parameters: Parameters) -> str:
    """The price row of a run: the configuration's, else that of the node type."""
    return config.billing.price or parameters.name(f"node.{config.cluster.node_type}.price")


_ABOUT_A_KEY = re.compile(r"(policy|engine|job|cluster|faults)\.\w+=")


def _drive(simulation: Simulation, policy: Policy, name: str) -> None:
    try:
        drive(simulation.backend, policy)
    except (InvalidDecision, PolicyStalled) as error:
        error.add_note(f"policy {name!r}")
        raise
    except SystemExit as error:
        raise RuntimeError(f"policy {name!r} called sys.exit({error.code!r})") from error
    except ValueError as error:
        # What only a policy can judge, once it sees the cluster, it says so: "policy.learner_gpus=3 must be ...".
        if _ABOUT_A_KEY.match(str(error)):
            raise ConfigError(f"{error} (policy {name!r})") from error
        raise


def _workload_parameters(lengths: LengthModel) -> tuple[Parameter, ...]:
    measured = lengths.prompt_tokens
    mean = sum(measured) / len(measured)
    source = f"mean of {len(measured)} lengths that are resampled; {lengths.source}"
    prompts = Parameter("workload.prompt_tokens", round(mean, 2), "token", lengths.status, source)
    return (*lengths.parameters, prompts)


def _table_warnings(simulation: Simulation, workers: pd.DataFrame) -> tuple[str, ...]:
    """Warn of iteration times without a table, and of look-ups beyond a table's ends; list how many of these.

    The warnings hold no counts, so that those of several runs are the same.
    """
    costs, warnings = simulation.costs, []
    model, table = costs.job.model, "table"
    if isinstance(costs, ProfiledCosts):
        model, table = costs.profile.model.name, "profile"
    for gpus in sorted({int(n) for n in workers.loc[workers["role"].isin(["decode", "prefill"]), "gpus"].unique()}):
        times = costs.times(gpus)
        if times.status == "assumed":
            warnings.append(
                f"no measured iteration times of {model} on {gpus} x {costs.node.gpu}: a roofline stands in"
            )
        count = times.extrapolated
        if count:
            key = f"iteration_times.{model}.{costs.node.gpu}.tp{gpus}.extrapolated"
            source = "look-ups beyond the table's last knots, where its last segment goes on"
            simulation.parameters.note(Parameter(key, count, "look-up", "derived", source))
            warnings.append(
                f"iteration times of {model} on {gpus} x {costs.node.gpu} are extrapolated: the {table} ends at"
                f" {times.reach}; parameters.csv has how many"
            )
    return tuple(warnings)


# --- run directories ---


def check_directory(directory: Path) -> None:
    """Raise unless *directory* can be written: before a run, so that no run is lost for want of a place.

    Raises:
        RunDirectoryError: it exists and is not empty, is no directory, or cannot be made.
    """
    if directory.is_dir():
        if directory.samefile("."):  # it would vanish from under the user's shell
            raise RunDirectoryError(f"output {str(directory)!r} is the working directory: name another one (--output)")
        if os.path.ismount(directory):  # nothing can be renamed onto it
            raise RunDirectoryError(f"output {str(directory)!r} is a mount point: name a directory in it (--output)")
        if any(directory.iterdir()):
            raise RunDirectoryError(f"output {str(directory)!r} exists and is not empty (--output)")
    elif os.path.lexists(directory):
        raise RunDirectoryError(f"output {str(directory)!r} exists and is not a directory (--output)")
    above = directory.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    probe = above / f".simrl-{os.getpid()}.tmp"
    try:
        probe.mkdir()  # only trying tells: permission bits bind no root, and file systems may be read-only
        probe.rmdir()
    except OSError as error:
        raise RunDirectoryError(f"output {str(directory)!r} cannot be written: {error.strerror} (--output)") from None


def write_run(result: Result, directory: Path, comment: str = "") -> None:
    """Write a run directory; it appears under its name when it is complete, and not before.

    Args:
        result: Of the run.
        directory: See `check_directory`.
        comment: A line for the head of config.toml.

    Raises:
        RunDirectoryError: see `check_directory`.
    """

    def write(place: Path) -> None:
        import json

        head = f"# {comment}\n" if comment else ""
        (place / "config.toml").write_text(head + config_toml(result.config), encoding="utf-8")
        (place / "summary.json").write_text(json.dumps(result.summary, indent=2) + "\n", encoding="utf-8")
        write_parameters(result.parameters, place / "parameters.csv")
        for name, frame in result.frames.by_name().items():
            frame.to_parquet(place / f"{name}.parquet", index=False)

    write_directory(directory, write)


def write_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Let *write* fill a hidden sibling of *directory*, which takes its name at the end; an error removes it.

    Raises:
        RunDirectoryError: see `check_directory`.
    """
    check_directory(directory)
    directory = Path(os.path.abspath(directory))  # "." has no name to put a dot before
    hidden = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    try:
        hidden.mkdir(parents=True)
        write(hidden)
        hidden.rename(directory)
    except BaseException as error:  # Ctrl-C too
        shutil.rmtree(hidden, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise RunDirectoryError(f"output {str(directory)!r} cannot be written: {reason} (--output)") from error
        raise


def write_parameters(parameters: list[Parameter], path: Path) -> None:
    """The sourced numbers of a run as CSV, one a row."""
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("name", "value", "unit", "source", "status", "low", "high"))
        for p in parameters:
            rows.writerow((p.key, p.value, p.unit, p.source, p.status, p.low, p.high))
