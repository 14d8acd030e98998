"""Tiny clusters for tests: small model, short responses, lengths given outright."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simrl.policies.runtime.steps import StepWork
from simrl.simulator.backend import SimulatedBackend
from simrl.simulator.costs import Costs, NodeType
from simrl.traces.job import Engine, Job
from simrl.traces.parameters import Parameters
from simrl.traces.records import Recorder

Lengths = Sequence[Sequence[int]]  # a row a prompt, a column a sample

EXACT_STARTS = {"start": {"spread": 0.0}}


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
