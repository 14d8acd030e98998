"""The plan of `verl-tuned`: as few GPU-seconds as a static cluster can do with, found by simulating `verl`.

Candidates are numbers of nodes times sizes of an engine. Each simulates the same steps, the first of the job and a few
of its later epochs, drawn from seeds of the search's own and without faults. Of those whose mean step, the first apart,
is within the limit, the one with the fewest GPU-seconds a step wins. The first step holds the cold starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from simrl.experiments.config import Config, ConfigError
from simrl.policies.contract import InvalidDecision, drive
from simrl.policies.registry import build_policy, load_policy_class
from simrl.policies.verl import Verl
from simrl.policies.verl_tuned import VerlTuned
from simrl.traces.job import Faults, Job
from simrl.traces.streams import stream

if TYPE_CHECKING:
    from simrl.experiments.run import Simulation
    from simrl.simulator.costs import CostModel

SEEDS = 2
LATER_STEPS = 2  # of each seed; all candidates see the same draws, so that few tell them apart
NODE_COUNTS = 16  # at most, spaced evenly in ratio: all of a small cluster, some 20 % apart on 20 nodes
SIZES = (1, 2, 4, 8)

Simulate = Callable[[Config, Sequence[int]], "Simulation"]
"""A simulated cluster that is given some of the job's steps, by number."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A static cluster, and what it took in the search.

    Attributes:
        nodes: Of the cluster's nodes.
        tensor_parallel: GPUs an engine.
        gpus: All of them.
        step_s: Mean seconds of a step, the first apart.
    """

    nodes: int
    tensor_parallel: int
    gpus: int
    step_s: float

    @property
    def gpu_s(self) -> float:
        """GPU-seconds a step: all GPUs are held throughout."""
        return self.gpus * self.step_s

    def __str__(self) -> str:
        return f"nodes={self.nodes} with tensor_parallel={self.tensor_parallel} takes {self.step_s:.2f} s a step"


def with_static_plan(
    config: Config, simulate: Simulate, shared: Config | None = None
) -> tuple[Config, tuple[str, ...]]:
    """*config* with what `verl-tuned` lacks of its plan, and a line on what was found; other policies as they are.

    Args:
        config: Of a run.
        simulate: Makes a cluster of a configuration.
        shared: A configuration that has the parameters of the policy that sets the limit, by default *config*.

    Raises:
        ConfigError: no candidate fits the GPUs, or none is within the limit.
    """
    if load_policy_class(config.policy) is not VerlTuned:
        return config, ()
    params = VerlTuned.Params.model_validate(config.policy_params)
    if params.nodes is not None and params.tensor_parallel is not None:
        return config, ()
    fair = {"seed": 0, "faults": Faults()}
    limit_config = (shared or config).with_policy(params.step_limit_of)
    texts = [one.model_copy(update=fair).model_dump_json() for one in (config, limit_config)]
    plan, limit_s = _search(texts[0], texts[1], search_seeds(config.seed), simulate)
    found = {"nodes": plan.nodes, "tensor_parallel": plan.tensor_parallel}
    note = f"verl-tuned: of {config.cluster.nodes} nodes, {plan}, and {limit_s:.2f} s are allowed (in the search)"
    return config.model_copy(update={"policy_params": {**config.policy_params, **found}}), (note,)


def search_seeds(seed: int) -> tuple[int, ...]:
    """Seeds of the search, the same for all runs but for one that has one of them as its own *seed*."""
    draws = stream(0, "static search").integers(2**62, size=SEEDS + 1).tolist()
    return tuple([draw for draw in draws if draw != seed][:SEEDS])


@lru_cache(maxsize=64)
def _search(config_json: str, limit_json: str, seeds: tuple[int, ...], simulate: Simulate) -> tuple[Plan, float]:
    """The plan, and the seconds that a step may take."""
    config = Config.model_validate_json(config_json)
    params = VerlTuned.Params.model_validate(config.policy_params)
    plans = list(candidates(config, params, seeds, simulate))
    if not plans:
        raise ConfigError("policy 'verl-tuned': no number of nodes and size of an engine fits the GPUs")
    limit_s = params.step_limit_s
    if limit_s is None:
        limit_s = params.step_slack * _limit_s(Config.model_validate_json(limit_json), seeds, simulate)
    within = [plan for plan in plans if plan.step_s <= limit_s]
    if not within:
        fastest = min(plans, key=lambda plan: plan.step_s)
        raise ConfigError(
            f"policy 'verl-tuned': no static plan is within {limit_s:.2f} s a step (policy.step_limit_s, or"
            f" policy.step_slack times the mean of policy.step_limit_of={params.step_limit_of!r});"
            f" the fastest that was tried, {fastest}"
        )
    return min(within, key=lambda plan: (plan.gpu_s, plan.gpus)), limit_s


def candidates(config: Config, params: VerlTuned.Params, seeds: Sequence[int], simulate: Simulate) -> Iterator[Plan]:
    """All plans that fit, each simulated on the same work."""
    costs = simulate(config, ()).costs
    counts = np.unique(np.geomspace(1, config.cluster.nodes, NODE_COUNTS).round().astype(int)).tolist()
    for size in [params.tensor_parallel] if params.tensor_parallel else engine_sizes(config, costs):
        for nodes in [params.nodes] if params.nodes else counts:
            plan = {**config.policy_params, "nodes": nodes, "tensor_parallel": size}
            planned = config.model_copy(update={"policy_params": plan})
            try:
                step_s = _mean_step_s(planned, static_steps(config.job), seeds, simulate)
            except InvalidDecision:  # it does not fit
                continue
            yield Plan(nodes, size, nodes * costs.node.gpus, step_s)


def engine_sizes(config: Config, costs: CostModel) -> list[int]:
    """GPUs an engine.

    Sizes whose iteration times are assumed stand back, unless the configuration's own are: else the search would choose
    by how far the roofline is off.
    """
    known = {}
    for size in SIZES:
        if costs.node.gpus % size == 0:
            try:
                known[size] = costs.times(size).status != "assumed"
            except ValueError:  # not in the profile
                continue
    asked = known.get(config.engine.tensor_parallel, False)
    return [size for size, is_known in known.items() if is_known or not asked]


def static_steps(job: Job) -> tuple[int, ...]:
    """Steps that tell how long `verl` takes: the first, and some of the later epochs, or of the only one."""
    first = _steps_per_epoch(job) if job.steps > _steps_per_epoch(job) else 1
    later = np.linspace(first, job.steps - 1, LATER_STEPS).round().astype(int).tolist() if job.steps > 1 else []
    return tuple(dict.fromkeys([0, *later]))


def _steps_per_epoch(job: Job) -> int:
    return job.dataset_prompts // job.prompts_per_step


def _limit_s(config: Config, seeds: Sequence[int], simulate: Simulate) -> float:
    """What the policy of *config* takes: a static one like the candidates, others over two epochs, for the history."""
    if load_policy_class(config.policy) is Verl:
        return _mean_step_s(config, static_steps(config.job), seeds, simulate)
    if load_policy_class(config.policy) is VerlTuned:
        raise ConfigError("policy.step_limit_of='verl-tuned' must be another policy")
    return _mean_step_s(config, range(min(config.job.steps, 2 * _steps_per_epoch(config.job))), seeds, simulate)


def _mean_step_s(config: Config, steps: Sequence[int], seeds: Sequence[int], simulate: Simulate) -> float:
    """Mean seconds of those of *steps* that are of later epochs, or else of all but the first."""
    config = config.model_copy(update={"job": config.job.model_copy(update={"steps": len(steps)})})
    means = []
    for seed in seeds:
        simulation = simulate(config.with_seed(seed), steps)
        drive(
            simulation.backend, build_policy(load_policy_class(config.policy), config.policy_params, simulation.oracle)
        )
        rows = simulation.recorder.frames().phases.query("stage == 'step'")
        later = rows[rows["epoch"] > 0]
        chosen = later if len(later) else rows[rows["step"] > 0] if len(rows) > 1 else rows
        means.append(float((chosen["end_s"] - chosen["start_s"]).mean()))
    return sum(means) / len(means)
