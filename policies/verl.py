"""VERL-style static scheduling: every GPU is held for the whole job and takes each stage in turn.

Source: HybridFlow (arXiv 2409.19256) and verl's colocated trainer: engines and trainer share all GPUs, prompts go to
the engines in contiguous data-parallel chunks of whole groups, and a barrier separates the stages. What is done about
lost functions is our reconstruction (`simrl.policies.recovery`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from simrl.policies.contract import (
    Assign,
    Decision,
    Learn,
    Observation,
    Prepare,
    Prompt,
    Role,
    StageFinished,
    Start,
    StepStarted,
    Subscribe,
    Sync,
)
from simrl.policies.recovery import Replacements

T = TypeVar("T")
COLOCATED: tuple[Role, ...] = ("decode", "prepare", "learn")


class Verl:
    """Colocated, static, with a barrier between the stages."""

    class Params(BaseModel):
        """Parameters of `verl`.

        Attributes:
            dispatch: `chunks`: contiguous chunks of equally many prompts, verl's default; `least_loaded`: each group
                to the engine with the fewest prompt tokens so far.
        """

        model_config = ConfigDict(frozen=True, extra="forbid")
        dispatch: Literal["chunks", "least_loaded"] = "chunks"

    def __init__(self, params: Params | None = None) -> None:
        self.params = params or self.Params()
        self.functions: tuple[str, ...] = ()
        self.replacements = Replacements()

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """Each stage on all functions as soon as the one before is finished."""
        decisions = self.replacements.restart(observation)
        if not self.functions:
            starts = self.starts(observation)
            self.replacements = Replacements(starts)
            decisions += [*starts, Subscribe(StageFinished("generation")), Subscribe(StageFinished("preparation"))]
        self.functions = self.replacements.present
        for event in observation.events:
            match event:
                case StepStarted(prompts=prompts):
                    decisions += [Sync(self.functions), *self.assign(prompts)]
                case StageFinished(stage="generation") if not any(isinstance(d, Prepare) for d in decisions):
                    able = self.replacements.at_work(observation, self.functions)
                    decisions.append(Prepare(able, observation.unprepared))  # of two steps at once, too
                case StageFinished(stage="preparation"):
                    decisions.append(Learn(self.functions))
        return [*decisions, *self.replacements.reassign(observation, self.functions)]

    def starts(self, observation: Observation) -> list[Start]:
        """The functions that are held for the whole job."""
        return start_everywhere(observation)

    def assign(self, prompts: Sequence[Prompt]) -> list[Decision]:
        """Whole groups to engines."""
        if self.params.dispatch == "chunks":
            shares = chunks(prompts, len(self.functions))
        else:
            shares = [tuple(share) for share in least_loaded(prompts, len(self.functions))]
        return assign_shares(self.functions, shares)


def start_everywhere(
    observation: Observation, roles: tuple[Role, ...] = COLOCATED, nodes: int | None = None, gpus: int | None = None
) -> list[Start]:
    """One engine after the other until every GPU is leased.

    Args:
        observation: Of the cluster.
        roles: Of each function.
        nodes: How many nodes to use, the first ones; None: all.
        gpus: GPUs an engine; None: as the configuration says.

    Raises:
        ValueError: the engines' size does not divide a node.
    """
    key = "engine" if gpus is None else "policy"
    gpus = gpus or observation.engine.tensor_parallel
    starts = []
    for node in observation.nodes[:nodes]:
        if node.gpus % gpus:
            raise ValueError(f"{key}.tensor_parallel={gpus} must divide the {node.gpus} GPUs of a node")
        starts += [Start(f"worker-{node.index}-{i}", gpus, roles, node.index) for i in range(node.gpus // gpus)]
    return starts


def chunks(prompts: Sequence[T], parts: int) -> list[tuple[T, ...]]:
    """Contiguous parts whose sizes differ by at most one."""
    size, longer = divmod(len(prompts), parts)
    bounds = [i * size + min(i, longer) for i in range(parts + 1)]
    return [tuple(prompts[start:end]) for start, end in itertools.pairwise(bounds)]


def least_loaded(prompts: Sequence[Prompt], parts: int) -> list[list[Prompt]]:
    """Each prompt to the part with the fewest prompt tokens; the first of equals."""
    shares: list[list[Prompt]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for prompt in prompts:
        lightest = loads.index(min(loads))
        shares[lightest].append(prompt)
        loads[lightest] += prompt.tokens
    return shares


def assign_shares(functions: Sequence[str], shares: Sequence[Sequence[Prompt]]) -> list[Decision]:
    """Each function its share of the prompts; those with none are left alone."""
    pairs = zip(functions, shares, strict=True)
    return [Assign(function, responses_of(share)) for function, share in pairs if share]


def responses_of(prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """All response ids of *prompts*, group by group."""
    return tuple(response for prompt in prompts for response in prompt.responses)
