"""The true lengths of a run, for the backend, and for a policy that openly asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from simrl.traces.lengths import LengthModel, Responses

_EPOCHS_KEPT = 2  # steps of two epochs can be open at once where the job allows staleness


@dataclass(frozen=True)
class Oracle:
    """Every response's length before it is generated. No real cluster can know it.

    Attributes:
        model: Where lengths are drawn from.
        seed: The run's seed.
        dataset_prompts: Prompts of an epoch.
        responses_per_prompt: Size of a group.
        max_tokens: Cap of a response.
    """

    model: LengthModel
    seed: int
    dataset_prompts: int
    responses_per_prompt: int
    max_tokens: int
    _epochs: dict[int, Responses] = field(default_factory=dict, init=False, repr=False, compare=False)

    def responses(self, epoch: int) -> Responses:
        """Lengths of all responses of an epoch, drawn once."""
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self.model.response_lengths(
                self.seed, epoch, self.dataset_prompts, self.responses_per_prompt, self.max_tokens
            )
        return self._epochs[epoch]

    def lengths(self, epoch: int, prompt_id: int | str) -> tuple[int, ...]:
        """True response tokens of a prompt, by sample.

        Raises:
            ValueError: the data set has no such prompt.
        """
        if not (isinstance(prompt_id, int) and 0 <= prompt_id < self.dataset_prompts):
            raise ValueError(f"{prompt_id=} must be in 0 <= prompt_id < {self.dataset_prompts}")
        return tuple(self.responses(epoch).tokens[prompt_id].tolist())

    def __deepcopy__(self, memo: dict[int, Any]) -> Oracle:
        return self  # immutable, as far as anyone can see: `drive` copies policies


@dataclass(frozen=True)
class StepOracle:
    """The same where lengths are given step by step: `open` tells it those of a step, before the policy hears of it."""

    _lengths: dict[int | str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def open(self, prompt_ids: Sequence[int | str], response_tokens: Sequence[Sequence[int]]) -> None:
        """Know the lengths of a step, a row a prompt."""
        self._lengths.update(zip(prompt_ids, map(tuple, response_tokens), strict=True))

    def lengths(self, epoch: int, prompt_id: int | str) -> tuple[int, ...]:
        """True response tokens of a prompt, by sample, in the newest step that has it, whatever the epoch.

        Raises:
            ValueError: no step so far has it.
        """
        del epoch  # a trace may begin in the middle of one
        if prompt_id not in self._lengths:
            raise ValueError(f"{prompt_id=} is in no step so far")
        return self._lengths[prompt_id]

    def __deepcopy__(self, memo: dict[int, Any]) -> StepOracle:
        return self  # `drive` copies policies; it is the backend that tells it of steps
