"""Tiny clusters for tests: small model, short responses, lengths given outright."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simrl.policies.contract import Role
from simrl.policies.runtime.steps import StepWork
from simrl.simulator.backend import SimulatedBackend
from simrl.simulator.costs import Costs, NodeType
from simrl.simulator.estimates import ProfiledEstimates
from simrl.traces.job import Engine, Job
from simrl.traces.parameters import Parameters
from simrl.traces.records import Recorder

Lengths = Sequence[Sequence[int]]  # a row a prompt, a column a sample

# Round numbers, so that re-sourcing a constant does not touch these tests.
ROUND: dict[str, Any] = {
    "gpu": {
        "l40s": {
            "memory_bytes": 48e9, "peak_flops": 400e12, "learn_mfu": 0.25, "forward_mfu": 0.5,
            "memory_bytes_per_s": 800e9, "link_bytes_per_s": 20e9,
        },
    },
    "node": {"g6e.48xlarge": {"nic_bytes_per_s": 50e9, "host_bytes_per_s": 10e9, "host_memory_bytes": 1.5e12}},
    "network": {"efficiency": 0.8, "latency_s": 0.01},
    "serving": {"activation_bytes_per_gpu": 3e9, "flat_tolerance": 0.25},
    "start": {
        "download_bytes_per_s": 250e6, "load_bytes_per_s": 500e6, "init_s": 90, "compile_s": 50, "capture_s": 40,
        "spread": 0.1,
    },
    "switch": {"engine_sleep_s": 1.5, "engine_wake_s": 0.5, "sync_setup_s": 1.0, "sync_bytes_per_s": 25e9},
    "learner": {
        "bytes_per_parameter": 12, "gradient_bytes_per_parameter": 4, "frozen_bytes_per_parameter": 4,
        "reduce_bytes_per_parameter": 4, "logit_bytes_per_value": 8, "layer_overhead_s": 0.002,
        "overlap_efficiency": 0.5, "rule_reward_s": 0.001, "reward_workers": 50,
    },
}  # fmt: skip

EXACT_STARTS = {"start": {"spread": 0.0, "pull_spread": 0.0}}


def make_costs(
    job: Job,
    *,
    nodes: int = 1,
    engine: Engine | None = None,
    node_type: str = "g6e.48xlarge",
    parameters: Mapping[str, Any] | None = None,
) -> Costs:
    table = Parameters(parameters)
    return Costs(job, engine or Engine(tensor_parallel=1), NodeType.load(node_type, table), nodes, table)


def estimates(costs: Costs, learner_world: int | None = None) -> ProfiledEstimates:
    """What things take alone."""
    return ProfiledEstimates(costs, learner_world, 0.0)


def switch_s(costs: Costs, old: Role | None, new: Role, learner_world: int | None) -> float:
    """A change of role, alone; the same for any number of GPUs, as each has its link."""
    return costs.movement.switch_load(old, new, 1, learner_world).alone_s(costs.node.host_bytes_per_s)


def make_job(steps: Sequence[Lengths], **options: Any) -> Job:
    """A job of qwen2.5-0.5b whose steps have the shape of *steps*."""
    prompts, samples = len(steps[0]), len(steps[0][0])
    sizes = {"prompts_per_step": prompts, "responses_per_prompt": samples, "steps": len(steps)}
    caps = {"max_prompt_tokens": 64, "max_response_tokens": 64}
    return Job(**{"model": "qwen2.5-0.5b", **sizes, **caps, **options})


def make_backend(
    costs: Costs, steps: Sequence[Lengths], prompt_tokens: int | Sequence[int] = 20, seed: int = 0
) -> tuple[SimulatedBackend, Recorder]:
    """A backend whose responses have just these lengths, and what it records to."""

    def work(step: int) -> StepWork:
        lengths = steps[step]
        prompts = [prompt_tokens] * len(lengths) if isinstance(prompt_tokens, int) else list(prompt_tokens)
        return StepWork(0, list(range(len(lengths))), prompts, lengths, [[n == 64 for n in row] for row in lengths])

    recorder = Recorder()
    return SimulatedBackend(costs, work, recorder, seed), recorder
