"""The work of a step, and how it is shared out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from simrl.policies.contract import Prompt, Stage, Trigger
from simrl.simulator.function import Rollout

Card = TypeVar("Card")


@dataclass(frozen=True, slots=True)
class StepWork:
    """What nature has in store for a step: the prompts, and lengths that only the backend knows.

    Attributes:
        epoch: Pass over the data set.
        prompt_ids: One a prompt.
        prompt_tokens: One a prompt.
        response_tokens: A row a prompt, a column a sample.
        truncated: The same shape: the response ran into the cap.
    """

    epoch: int
    prompt_ids: Sequence[int | str]
    prompt_tokens: Sequence[int]
    response_tokens: Sequence[Sequence[int]]
    truncated: Sequence[Sequence[bool]]


@dataclass(slots=True, eq=False)
class StepState:
    """An open step."""

    step: int
    epoch: int
    prompts: tuple[Prompt, ...]
    rollouts: list[Rollout]
    started_s: float
    unfinished: int
    unprepared: int
    prepared: bool = False
    learning: bool = False
    spans: dict[Stage, tuple[float, float]] = field(default_factory=dict)
    fired: set[Trigger] = field(default_factory=set)


def total_tokens(rollout: Rollout) -> int:
    """Prompt and response tokens of a finished response."""
    return rollout.request.prompt_tokens + rollout.request.generated


def balanced_shares(rollouts: Sequence[Rollout], weights: Sequence[int]) -> list[list[Rollout]]:
    """Responses dealt out so that token loads are near-proportional to *weights*: longest first, to and fro.

    verl balances with Karmarkar-Karp; over the hundreds of responses of a step both come within a few tokens.
    """
    order = sorted(rollouts, key=total_tokens, reverse=True)
    hands = deal_to_and_fro(order, sum(weights))
    ends = list(itertools.accumulate(weights))
    return [list(itertools.chain(*hands[end - weight : end])) for end, weight in zip(ends, weights, strict=True)]


def deal_to_and_fro(cards: Sequence[Card], hands: int) -> list[list[Card]]:
    """Deal *cards* to hands 0, 1, ... n, n, ... 1, 0, 0, 1, ...: what the first gets more once, it gets less next."""
    there, back = 2 * hands, range(2 * hands - 1, hands - 1, -1)
    return [[*cards[hand::there], *cards[turn::there]] for hand, turn in zip(range(hands), back, strict=True)]
