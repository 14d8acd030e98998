"""The conformance suite of policies on small simulated clusters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from simrl.experiments.config import Config, load_config
from simrl.experiments.run import policy_of, simulate
from simrl.policies.check import check_policy as check_on
from simrl.policies.contract import Backend, Policy

# Together they cover one node and several, one engine a node and several, an answer to a prompt and a group, the ends
# of a batch that no number of engines divides, a second epoch with its history, and a model with a critic.
CLUSTERS: Mapping[str, Mapping[str, Any]] = {
    "one node": {"cluster.nodes": 1, "job.prompts_per_step": 16},
    "two nodes, PPO": {"cluster.nodes": 2, "job.algorithm": "ppo", "job.responses_per_prompt": 1},
    "three nodes, more engines than prompts": {"cluster.nodes": 3, "job.prompts_per_step": 5},
    "H100, TP 4": {"cluster.node_type": "p5.48xlarge", "engine.tensor_parallel": 4},
}
SMALL: Mapping[str, Any] = {
    "job.model": "qwen2.5-0.5b", "job.steps": 3, "job.prompts_per_step": 24, "job.dataset_prompts": 48,
    "job.max_response_tokens": 512,
}  # fmt: skip


def check_policy(policy: str | Policy, config: Config | None = None) -> list[str]:
    """Hold a policy to the contract on small simulated clusters.

    Args:
        policy: An object, or a name or import string.
        config: Where a named policy's parameters and the seed come from.

    Returns:
        A line for each cluster that it passed.

    Raises:
        PolicyCheckFailed: at the first broken rule; the message says on which cluster, which rule, and how.
        ConfigError: there is no such policy, or its parameters are wrong.
    """
    return list(check_each(policy, config))


def check_each(policy: str | Policy, config: Config | None = None) -> Iterator[str]:
    """As `check_policy`, telling each passed cluster at once."""
    base = config or load_config()
    if isinstance(policy, str):
        base = base.with_policy(policy)
    for name, values in CLUSTERS.items():
        small = base.with_values({**SMALL, **values})
        candidate = policy_of(small, simulate(small).oracle) if isinstance(policy, str) else policy
        yield from check_on(candidate, {name: partial(_backend, small)})


def _backend(config: Config) -> Backend:
    return simulate(config).backend
