"""The work of a step, and how it is shared out."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from simrl.policies.contract import Prompt, Stage, Trigger
from simrl.policies.runtime.rollout import Rollout

Card = TypeVar("Card")
FEW = 16  # ids that are put in order one by one


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
    work: StepWork
    prompts: tuple[Prompt, ...]
    rollouts: list[Rollout]
    started_s: float
    unfinished: int
    unprepared: int
    prepared: bool = False
    learning: bool = False
    spans: dict[Stage, tuple[float, float]] = field(default_factory=dict)
    fired: set[Trigger] = field(default_factory=set)


class Ids:
    """Ids that are looked at in ascending order again and again, with few changes between."""

    def __init__(self) -> None:
        self._there: set[int] = set()
        self._in_order: list[int] = []  # without the newest
        self._newest: list[int] = []

    def __contains__(self, number: int) -> bool:
        return number in self._there

    def add(self, numbers: Collection[int]) -> None:
        """Put some in that are not there."""
        self._there.update(numbers)
        self._newest += numbers

    def remove(self, numbers: Collection[int]) -> None:
        """Take some out that are there."""
        in_order = self._sorted()
        self._there.difference_update(numbers)
        if len(numbers) <= FEW:
            for number in numbers:
                del in_order[bisect_left(in_order, number)]
        else:
            self._in_order = list(filter(self._there.__contains__, in_order))

    def in_order(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(self._sorted())

    def _sorted(self) -> list[int]:
        if len(self._newest) <= FEW:
            for number in self._newest:
                insort(self._in_order, number)
        else:
            self._in_order = sorted(self._there)
        self._newest.clear()
        return self._in_order


def columns_of(state: StepState, responses_per_prompt: int) -> dict[str, Any]:
    """A finished step's part of the frame `samples`."""
    rollouts = state.rollouts
    prompt_ids = [prompt.prompt_id for prompt in state.prompts]
    ids = np.array(prompt_ids, dtype=None if all(type(prompt_id) is int for prompt_id in prompt_ids) else object)
    return {
        "response_id": [rollout.response_id for rollout in rollouts],
        "step": np.full(len(rollouts), state.step),
        "epoch": np.full(len(rollouts), state.work.epoch),
        "prompt_id": np.repeat(ids, responses_per_prompt),
        "sample": np.tile(np.arange(responses_per_prompt), len(prompt_ids)),
        "prompt_tokens": np.repeat([prompt.tokens for prompt in state.prompts], responses_per_prompt),
        "response_tokens": [rollout.generated for rollout in rollouts],
        "truncated": np.concatenate(state.work.truncated),
        "function": np.array([rollout.function for rollout in rollouts], dtype=object),
        "weights_version": [rollout.weights_version for rollout in rollouts],
        "assigned_s": [rollout.assigned_s for rollout in rollouts],
        "finished_s": [rollout.finished_s for rollout in rollouts],
        "prepared_s": [rollout.prepared_s for rollout in rollouts],
        "migrations": [rollout.migrations for rollout in rollouts],
        "prefill_tokens": [rollout.computed_tokens for rollout in rollouts],
        "cached_tokens": [rollout.cached_tokens for rollout in rollouts],
    }


def total_tokens(rollout: Rollout) -> int:
    """Prompt and response tokens of a finished response."""
    return rollout.prompt_tokens + rollout.generated


def balanced_shares(rollouts: Sequence[Rollout], weights: Sequence[int]) -> list[list[Rollout]]:
    """Responses dealt out so that token loads are near-proportional to *weights*: longest first, to and fro.

    verl balances with Karmarkar-Karp; over the hundreds of responses of a step both come within a few tokens.
    """
    tokens = np.array([rollout.prompt_tokens + rollout.generated for rollout in rollouts], dtype=np.int64)
    order = [rollouts[i] for i in np.argsort(-tokens, kind="stable").tolist()]
    hands = deal_to_and_fro(order, sum(weights))
    ends = list(itertools.accumulate(weights))
    return [list(itertools.chain(*hands[end - weight : end])) for end, weight in zip(ends, weights, strict=True)]


def deal_to_and_fro(cards: Sequence[Card], hands: int) -> list[list[Card]]:
    """Deal *cards* to hands 0, 1, ... n, n, ... 1, 0, 0, 1, ...: what the first gets more once, it gets less next."""
    there, back = 2 * hands, range(2 * hands - 1, hands - 1, -1)
    return [[*cards[hand::there], *cards[turn::there]] for hand, turn in zip(range(hands), back, strict=True)]
