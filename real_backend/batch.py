"""What a learner trains on: token ids, rewards and scores of a batch, and the rectangles that a model gets of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = Sequence[int]
Column: TypeAlias = npt.NDArray[np.float32]  # one number per response token


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What one rank computed for its share of a batch: one array per response, one number per response token.

    Attributes:
        indices: Positions in the batch of the responses scored here; the columns below follow this order.
        old_log_probs: Log-probs of the response tokens under the actor.
        ref_log_probs: The same under the reference model.
        values: Expected return before each response token, by the critic.
        tokens: Prompt and response tokens of the share, without padding.
        seconds: Wall time of the computation.
    """

    indices: tuple[int, ...]
    old_log_probs: tuple[Column, ...] | None
    ref_log_probs: tuple[Column, ...] | None
    values: tuple[Column, ...] | None
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """The finished responses of a step. All columns have one entry per response.

    Attributes:
        prompt_token_ids: The prompt that each response answers, at least one token.
        response_token_ids: At least one token; the stop token, if any, is part of it.
        rewards: Score of the whole response.
        groups: Prompt id; responses of one prompt are compared with each other.
        old_log_probs: Per response token, under the weights from before the update. Wanted by `update`.
        ref_log_probs: Per response token, under the reference model. Wanted with a KL coefficient.
        values: Per response token, by the critic. Wanted by PPO.

    Raises:
        ValueError: If a column's length or an entry's length does not fit, a prompt or response is empty, or a number
            is not finite.
    """

    prompt_token_ids: tuple[Tokens, ...]
    response_token_ids: tuple[Tokens, ...]
    rewards: tuple[float, ...]
    groups: tuple[int | str, ...]
    old_log_probs: tuple[Column, ...] | None = None
    ref_log_probs: tuple[Column, ...] | None = None
    values: tuple[Column, ...] | None = None

    def __post_init__(self) -> None:
        if not self.response_token_ids:
            raise ValueError("a training batch needs at least one response")
        for name in ("prompt_token_ids", "rewards", "groups"):
            self._check_length(name, len(getattr(self, name)))
        for index, (prompt, response) in enumerate(zip(self.prompt_token_ids, self.response_token_ids, strict=True)):
            if not len(prompt) or not len(response):
                raise ValueError(f"response {index} has {len(prompt)} prompt and {len(response)} response tokens; >= 1")
        for index, reward in enumerate(self.rewards):
            if not math.isfinite(reward):
                raise ValueError(f"rewards[{index}]={reward} must be finite")
        for name in ("old_log_probs", "ref_log_probs", "values"):
            self._check_column(name)

    def __len__(self) -> int:
        return len(self.response_token_ids)

    @property
    def response_tokens(self) -> int:
        """Response tokens of the whole batch."""
        return sum(len(response) for response in self.response_token_ids)

    def sequence_tokens(self) -> list[int]:
        """Prompt and response tokens of each response."""
        pairs = zip(self.prompt_token_ids, self.response_token_ids, strict=True)
        return [len(prompt) + len(response) for prompt, response in pairs]

    def with_scores(self, parts: Sequence[TokenScores]) -> TrainingBatch:
        """The batch with what the ranks computed, one part per rank; columns that no part has stay as they are.

        Raises:
            ValueError: If a response was scored by no rank or by two.
        """
        scored = sorted(index for part in parts for index in part.indices)
        if scored != list(range(len(self))):
            raise ValueError(f"the parts score responses {scored}; each of 0 to {len(self) - 1} is wanted once")
        return replace(
            self,
            old_log_probs=_merged(parts, [part.old_log_probs for part in parts]) or self.old_log_probs,
            ref_log_probs=_merged(parts, [part.ref_log_probs for part in parts]) or self.ref_log_probs,
            values=_merged(parts, [part.values for part in parts]) or self.values,
        )

    def _check_length(self, name: str, length: int) -> None:
        if length != len(self):
            raise ValueError(f"{name} has {length} entries, response_token_ids has {len(self)}")

    def _check_column(self, name: str) -> None:
        column: tuple[Column, ...] | None = getattr(self, name)
        if column is None:
            return
        self._check_length(name, len(column))
        for index, (entry, response) in enumerate(zip(column, self.response_token_ids, strict=True)):
            if np.shape(entry) != (len(response),):
                raise ValueError(f"{name}[{index}] has shape {np.shape(entry)}, its response {len(response)} tokens")
            if not np.isfinite(entry).all():
                raise ValueError(f"{name}[{index}] holds a number that is not finite")


def _merged(parts: Sequence[TokenScores], columns: Sequence[tuple[Column, ...] | None]) -> tuple[Column, ...] | None:
    by_index: dict[int, Column] = {}
    for part, column in zip(parts, columns, strict=True):
        if column is None:
            return None
        by_index.update(zip(part.indices, column, strict=True))
    return tuple(by_index[index] for index in sorted(by_index))


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Sequences padded on the right to a rectangle, and where their response tokens are predicted.

    A model's output at position t is its prediction of token t + 1. `mask` and all columns have one entry per
    prediction from position `first` on: `[sequences, padded length - 1 - first]`.

    Attributes:
        input_ids: `[sequences, padded length]`, 0 where padded.
        attention_mask: Same shape, 1 at real tokens.
        first: Earliest position that predicts a response token.
        mask: True where a response token is predicted.
        starts: For each sequence, the entry of `mask` that predicts its first response token.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]
    first: int
    mask: npt.NDArray[np.bool_]
    starts: tuple[int, ...]

    def column(self, entries: Sequence[Column]) -> Column:
        """Per-token numbers of each sequence, laid out as `mask` is; 0 elsewhere."""
        laid_out = np.zeros(self.mask.shape, dtype=np.float32)
        for row, (start, entry) in enumerate(zip(self.starts, entries, strict=True)):
            laid_out[row, start : start + len(entry)] = entry
        return laid_out

    def rows(self, laid_out: Column) -> list[Column]:
        """The numbers of each sequence's response tokens, out of what is laid out as `mask` is."""
        return [laid_out[row][self.mask[row]] for row in range(len(self.starts))]


def pad(batch: TrainingBatch, indices: Sequence[int]) -> PaddedBatch:
    """The sequences at *indices* as one rectangle.

    No indices make a sequence of two tokens of which none counts: a rank that has nothing left to do takes part in the
    collectives of the others with it.
    """
    if not indices:
        zeros = np.zeros((1, 2), dtype=np.int64)
        return PaddedBatch(zeros, zeros + 1, 0, np.zeros((1, 1), dtype=bool), (0,))
    pairs = [(list(batch.prompt_token_ids[i]), list(batch.response_token_ids[i])) for i in indices]
    length = max(len(prompt) + len(response) for prompt, response in pairs)
    first = min(len(prompt) for prompt, _ in pairs) - 1
    input_ids = np.zeros((len(pairs), length), dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    mask = np.zeros((len(pairs), length - 1 - first), dtype=bool)
    for row, (prompt, response) in enumerate(pairs):
        total = len(prompt) + len(response)
        input_ids[row, :total] = prompt + response
        attention_mask[row, :total] = 1
        mask[row, len(prompt) - 1 - first : total - 1 - first] = True
    starts = tuple(len(prompt) - 1 - first for prompt, _ in pairs)
    return PaddedBatch(input_ids, attention_mask, first, mask, starts)
