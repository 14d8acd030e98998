"""Tasks whose rewards a rule can check: prompts as token ids, and the score of a response.

`ResidueTask` is small enough for a model of a few million random weights to learn on a CPU within minutes.
`Gsm8kTask` is the real thing: grade-school questions whose answer must be exact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from simrl.traces.streams import stream

FIRST_MARKER = 3  # after padding, begin and end of sequence
MARKER_REPEATS = 4  # seen once, at the end, it takes a fresh model far longer to attend to

_ANSWER = re.compile(r"####\s*(\S+)")
_NUMBER = re.compile(r"-?(\d+(,\d{3})*|(?=\.\d))(\.\d*)?")


class Task(Protocol):
    """What a policy is trained on."""

    def prompts(self, step: int, seed: int) -> list[list[int]]:
        """Token ids of the prompts of a step: the same for the same step and seed, in any process."""

    def reward(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """Score of a response, 0 to 1.

        Raises:
            ValueError: If the prompt is not one of this task's.
        """


@dataclass(frozen=True, slots=True)
class ResidueTask:
    """Answer with tokens whose id has the residue, modulo the number of classes, that the end of the prompt marks.

    A prompt is random tokens, then one marker four times. The reward is the fraction of the response's tokens with the
    wanted residue: 1 / classes for a model that knows nothing. With two classes, fresh Qwen2 models (hidden 128,
    2 layers, `initializer_range` 0.05; hidden 256, 4 layers, 0.02; vocabulary 256, learning rate 2e-3) reach 0.9 within
    twelve steps of 16 prompts x 8 responses x 20 tokens and 4 optimizer steps each.

    Attributes:
        prompts_per_step: Prompts of a step; the classes take turns.
        prompt_tokens: Length of each prompt, markers included.
        vocabulary: Token ids below this are used; 0 to 2 are left to special tokens.
        classes: The modulus. Token 3 + c marks residue c.

    Raises:
        ValueError: If the markers do not fit into the prompt or the vocabulary.
    """

    prompts_per_step: int = 16
    prompt_tokens: int = 8
    vocabulary: int = 256
    classes: int = 2

    def __post_init__(self) -> None:
        if self.prompt_tokens < MARKER_REPEATS:
            raise ValueError(f"prompt_tokens={self.prompt_tokens} must be >= {MARKER_REPEATS}, the length of the mark")
        if self.vocabulary <= FIRST_MARKER + self.classes:
            raise ValueError(f"vocabulary={self.vocabulary} must be > {FIRST_MARKER + self.classes}, past the markers")

    def prompts(self, step: int, seed: int) -> list[list[int]]:
        """Random tokens and a mark; see `Task`."""
        shape = (self.prompts_per_step, self.prompt_tokens - MARKER_REPEATS)
        drawn = stream(seed, "prompts", step).integers(FIRST_MARKER + self.classes, self.vocabulary, shape).tolist()
        marks = [[FIRST_MARKER + place % self.classes] * MARKER_REPEATS for place in range(self.prompts_per_step)]
        return [start + mark for start, mark in zip(drawn, marks, strict=True)]

    def reward(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """Fraction of the response's tokens with the wanted residue; an empty response has 0."""
        marks = set(prompt[-MARKER_REPEATS:])
        wanted = marks.pop() - FIRST_MARKER if len(marks) == 1 else -1
        if not 0 <= wanted < self.classes:
            raise ValueError(f"a prompt of {len(prompt)} tokens ends in no marker of this task")
        return sum(token % self.classes == wanted for token in response) / max(len(response), 1)


class Gsm8kTask:
    """Questions with one exact number as answer, in the format of GSM8K's files.

    Args:
        path: JSON lines with "question" and "answer"; the answer ends in "#### number".
        tokenizer: A Hugging Face tokenizer; its chat template is used where it has one.
        prompts_per_step: Questions of a step. Each epoch asks all questions once, in an order of its own.

    Raises:
        ValueError: If a line has no such answer, or there are fewer questions than a step needs.
    """

    INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'

    def __init__(self, path: str | Path, tokenizer: Any, prompts_per_step: int) -> None:
        self.tokenizer = tokenizer
        self.prompts_per_step = prompts_per_step
        self._prompts: list[list[int]] = []
        self._answers: dict[tuple[int, ...], Decimal] = {}
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                self._add(json.loads(line), f"{path}:{number}")
        if len(self._prompts) < prompts_per_step:
            raise ValueError(f"{path} has {len(self._prompts)} questions, {prompts_per_step=} must not be more")

    def prompts(self, step: int, seed: int) -> list[list[int]]:
        """The step's questions; see `Task`. What is left over at the end of an epoch is not asked."""
        steps_per_epoch = len(self._prompts) // self.prompts_per_step
        epoch, place = divmod(step, steps_per_epoch)
        order = stream(seed, "questions", epoch).permutation(len(self._prompts))
        start = place * self.prompts_per_step
        return [self._prompts[index] for index in order[start : start + self.prompts_per_step]]

    def reward(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """1 if the response's last "####" is followed by the right number, else 0."""
        wanted = self._answers.get(tuple(prompt))
        if wanted is None:
            raise ValueError(f"a prompt of {len(prompt)} tokens is none of this task's questions")
        return float(final_number(self.tokenizer.decode(response, skip_special_tokens=True)) == wanted)

    def _add(self, row: Mapping[str, str], where: str) -> None:
        answer = final_number(row["answer"])
        if answer is None:
            raise ValueError(f'{where}: the answer must end in "#### number"')
        question = f"{row['question']} {self.INSTRUCTION}"
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            prompt = self.tokenizer.encode(question)
        self._prompts.append(list(prompt))
        self._answers[tuple(prompt)] = answer


def final_number(text: str) -> Decimal | None:
    """The number after the last "####" of *text*; None if there is none.

    Thousands commas, a dollar sign before and a full stop or percent sign after the number are allowed: "#### $1,200."
    is 1200.
    """
    found = _ANSWER.findall(text)
    if not found:
        return None
    word = found[-1].replace("$", "").rstrip(".%")
    return Decimal(word.replace(",", "")) if _NUMBER.fullmatch(word) else None
