"""Losses against arithmetic done by hand and against plain loops; rewards and the cutting of batches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.real_backend import losses
from simrl.real_backend.batch import TokenScores, TrainingBatch, pad
from simrl.real_backend.rewards import Gsm8kTask, ResidueTask, final_number
from simrl.traces.batches import micro_batches, mini_batches, shares

quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def tensor(*rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def close(found: torch.Tensor, wanted: object) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-6)


def ragged(seed: int) -> tuple[np.random.Generator, np.ndarray, list[int]]:
    """A generator, a mask of right-padded rows, and their lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, rng.integers(1, 6))
    return rng, np.arange(lengths.max())[None] < lengths[:, None], lengths.tolist()


def test_the_clip_binds_only_where_it_makes_the_loss_larger() -> None:
    log_ratio = tensor(math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5), math.log(1.1))
    loss, clipped = losses.policy_loss(log_ratio, torch.zeros(5), tensor(2.0, -2.0, 2.0, -2.0, 1.0), 0.2, 0.3)
    # -min(1.5 * 2, 1.3 * 2); -min(-3, -2.6); -min(1, 1.6); -min(-1, -1.6); within the clip
    close(loss, [-2.6, 3.0, -1.0, 1.6, -1.1])
    assert clipped.tolist() == [True, False, False, True, False]


def test_clipped_tokens_have_no_gradient() -> None:
    log_probs = tensor(math.log(1.5), math.log(1.1)).requires_grad_()
    loss, _ = losses.policy_loss(log_probs, torch.zeros(2), tensor(1.0, 1.0), 0.2, 0.2)
    loss.sum().backward()
    close(log_probs.grad, [0.0, -1.1])  # d/dx of -exp(x) at log 1.1


def test_log_ratios_beyond_measure_stay_finite() -> None:
    loss, _ = losses.policy_loss(tensor(900.0), tensor(0.0), tensor(-1.0), 0.2, 0.2)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(losses.kl_estimate(tensor(-900.0), tensor(0.0))).all()


def test_kl_estimators_by_hand() -> None:
    log_probs, reference = tensor(math.log(0.5), math.log(0.25)), tensor(math.log(0.25), math.log(0.25))
    close(losses.kl_estimate(log_probs, reference, "k1"), [math.log(2), 0.0])
    close(losses.kl_estimate(log_probs, reference, "k3"), [0.5 + math.log(2) - 1, 0.0])


@quick
@given(seeds)
def test_both_kl_estimators_average_to_the_divergence(seed: int) -> None:
    p, q = np.random.default_rng(seed).dirichlet(np.ones(8), 2)
    p, q = (p + 0.01) / 1.08, (q + 0.01) / 1.08
    exact = float((p * np.log(p / q)).sum())
    for estimator in ("k1", "k3"):
        each = losses.kl_estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), estimator)
        assert float((torch.tensor(p) * each).sum()) == pytest.approx(exact, abs=1e-9)


def test_grpo_advantages_by_hand() -> None:
    rewards, groups = tensor(1.0, 7.0, 0.0, 3.0, 7.0, 5.0), torch.tensor([4, 9, 4, 4, 9, 2])
    # Group 4: mean 4/3, deviations -1/3, -4/3, 5/3, variance (1 + 16 + 25) / 9 / 2 = 7/3.
    deviation = math.sqrt(7 / 3)
    wanted = [-1 / 3 / deviation, 0.0, -4 / 3 / deviation, 5 / 3 / deviation, 0.0, 0.0]
    close(losses.grpo_advantages(rewards, groups), wanted)


@quick
@given(seeds)
def test_grpo_advantages_against_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 4, 12)
    rewards = rng.normal(size=12)
    wanted = np.zeros(12)
    for i in range(12):
        group = [rewards[j] for j in range(12) if groups[j] == groups[i]]
        if len(group) > 1:
            wanted[i] = (rewards[i] - np.mean(group)) / (np.std(group, ddof=1) + 1e-6)
    close(losses.grpo_advantages(torch.tensor(rewards), torch.tensor(groups)), wanted)


def test_gae_by_hand() -> None:
    rewards, values = tensor([0.0, 0.0, 1.0], [2.0, 9.0, 9.0]), tensor([0.5, 0.25, 0.5], [1.0, 9.0, 9.0])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages, returns = losses.gae(rewards, values, mask, discount=0.5, gae_lambda=0.5)
    # Deltas of the first row: 0.5 * 0.25 - 0.5 = -0.375; 0.5 * 0.5 - 0.25 = 0; 1 - 0.5 = 0.5; then factors of 0.25.
    close(advantages, [[-0.375 + 0.0625 * 0.5, 0.125, 0.5], [1.0, 0.0, 0.0]])
    close(returns, [[0.15625, 0.375, 1.0], [2.0, 0.0, 0.0]])


@quick
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_gae_against_its_definition(seed: int, discount: float, gae_lambda: float) -> None:
    rng, mask, lengths = ragged(seed)
    rewards, values = rng.normal(size=mask.shape) * mask, rng.normal(size=mask.shape)
    wanted = np.zeros(mask.shape)
    for row, length in enumerate(lengths):
        after = [*values[row, 1:length], 0.0]
        delta = [rewards[row, t] + discount * after[t] - values[row, t] for t in range(length)]
        for t in range(length):
            wanted[row, t] = sum((discount * gae_lambda) ** (k - t) * delta[k] for k in range(t, length))
    found, returns = losses.gae(*map(torch.tensor, (rewards, values, mask)), discount, gae_lambda)
    close(found, wanted)
    close(returns, (wanted + values) * mask)


def test_whitening_by_hand() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    # Of 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3.
    close(losses.whiten(tensor([1.0, 2.0], [6.0, 99.0]), mask), np.array([[-2, -1], [3, 0]]) / math.sqrt(14 / 3))


def test_value_loss_by_hand() -> None:
    # Moved 0.2 beyond the clip towards the return, away from it, and not beyond it.
    values, old_values, returns = tensor(0.7, 0.7, 0.1), tensor(0.0, 0.0, 0.0), tensor(1.0, 0.0, 1.0)
    close(losses.value_loss(values, old_values, returns, 0.5), [0.5 * 0.25, 0.5 * 0.49, 0.5 * 0.81])


def test_aggregation_by_hand() -> None:
    per_token, mask = (
        tensor([1.0, 2.0, 3.0], [8.0, math.nan, math.nan]),
        torch.tensor([[True] * 3, [True, False, False]]),
    )
    wanted = {"token-mean": 14 / 4, "seq-mean-token-mean": (2 + 8) / 2, "seq-mean-token-sum": 14 / 2}
    for aggregation, loss in wanted.items():
        assert float(losses.aggregate(per_token, mask, aggregation, 4, 2)) == pytest.approx(loss)


@quick
@given(seeds, st.sampled_from(["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]))
def test_parts_of_a_mini_batch_sum_to_its_loss(seed: int, aggregation: losses.Aggregation) -> None:
    rng, mask, lengths = ragged(seed)
    per_token = rng.normal(size=mask.shape)
    cut = rng.integers(0, len(lengths) + 1)
    parts = [slice(0, cut), slice(cut, None)]
    found = sum(
        float(
            losses.aggregate(
                torch.tensor(per_token[part]), torch.tensor(mask[part]), aggregation, sum(lengths), len(lengths)
            )
        )
        for part in parts
    )
    rows = [per_token[row, :length] for row, length in enumerate(lengths)]
    wanted = {
        "token-mean": np.concatenate(rows).mean(),
        "seq-mean-token-mean": np.mean([row.mean() for row in rows]),
        "seq-mean-token-sum": np.mean([row.sum() for row in rows]),
    }
    assert found == pytest.approx(wanted[aggregation])


# --- Batches ---


def batch_of(*lengths: tuple[int, int], groups: tuple[int, ...] | None = None) -> TrainingBatch:
    """Responses of (prompt, response) tokens, all token ids different."""
    tokens = iter(range(3, 10_000))
    pairs = [([next(tokens) for _ in range(p)], [next(tokens) for _ in range(r)]) for p, r in lengths]
    prompts, responses = zip(*pairs, strict=True)
    return TrainingBatch(prompts, responses, (0.5,) * len(pairs), groups or tuple(range(len(pairs))))


def test_mini_batches_hold_whole_groups_in_order() -> None:
    assert mini_batches(["b", "a", "b", "c", "a"], 2) == [[0, 2, 1, 4], [3]]


def test_shares_by_hand() -> None:
    assert shares([5, 3, 9, 4, 2], [0, 1, 2, 3], 2) == [[2, 1], [0, 3]]
    assert shares([5], [0], 3) == [[0], [], []]


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 120))
def test_every_response_is_in_one_share_and_one_micro_batch(tokens: list[int], ranks: int, limit: int) -> None:
    parts = shares(tokens, range(len(tokens)), ranks)
    load = [sum(tokens[index] for index in part) for part in parts]
    assert max(load) - min(load) <= max(tokens)
    cut = [micro for part in parts for micro in micro_batches(tokens, part, limit)]
    assert sorted(index for micro in cut for index in micro) == list(range(len(tokens)))
    assert all(len(micro) == 1 or len(micro) * max(tokens[i] for i in micro) <= limit for micro in cut)


def test_padding_by_hand() -> None:
    batch = batch_of((2, 2), (3, 1), (4, 3))
    padded = pad(batch, [1, 0])
    assert padded.input_ids.tolist() == [[7, 8, 9, 10], [3, 4, 5, 6]]
    assert padded.first == 1
    assert padded.mask.tolist() == [[False, True], [True, True]]
    column = padded.column([np.array([0.5]), np.array([1.5, 2.5])])
    assert column.tolist() == [[0.0, 0.5], [1.5, 2.5]]
    assert [row.tolist() for row in padded.rows(column)] == [[0.5], [1.5, 2.5]]


@quick
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_the_mask_points_at_the_response_tokens(lengths: list[tuple[int, int]]) -> None:
    batch = batch_of(*lengths)
    padded = pad(batch, range(len(batch)))
    targets = padded.input_ids[:, padded.first + 1 :]
    for row, response in enumerate(batch.response_token_ids):
        assert targets[row][padded.mask[row]].tolist() == response
        assert padded.attention_mask[row].sum() == sum(lengths[row])


def test_nothing_to_do_is_a_batch_without_a_counted_token() -> None:
    padded = pad(batch_of((2, 2)), [])
    assert not padded.mask.any()
    assert padded.input_ids.shape[1] - 1 - padded.first == padded.mask.shape[1]


def scores(indices: tuple[int, ...], *columns: list[float]) -> TokenScores:
    return TokenScores(indices, tuple(np.array(column) for column in columns), None, None, 0, 0.0)


def test_scores_of_ranks_come_back_in_the_order_of_the_batch() -> None:
    batch = batch_of((1, 2), (1, 1), (1, 1))
    merged = batch.with_scores([scores((2, 0), [3.0], [1.0, 1.5]), scores((1,), [2.0])])
    assert merged.old_log_probs is not None
    assert [column.tolist() for column in merged.old_log_probs] == [[1.0, 1.5], [2.0], [3.0]]
    assert merged.values is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda batch: batch.with_scores([scores((0,), [1.0])]), r"score responses \[0\]"),
        (lambda batch: batch.with_scores([scores((0, 1), [1.0], [1.0, 2.0])]), r"old_log_probs\[1\] has shape \(2,\)"),
        (lambda batch: batch.with_scores([scores((0, 1), [1.0], [math.nan])]), r"old_log_probs\[1\] holds"),
        (lambda _: TrainingBatch(((1,),), ((),), (0.0,), (0,)), "response 0 has 1 prompt and 0"),
        (lambda _: TrainingBatch(((1,),), ((1,),), (math.inf,), (0,)), r"rewards\[0\]=inf"),
        (lambda _: TrainingBatch(((1,),), ((1,),), (0.0, 1.0), (0,)), "rewards has 2 entries"),
        (lambda _: TrainingBatch((), (), (), ()), "at least one response"),
    ],
)
def test_batches_that_do_not_fit_are_refused(make: Callable[[TrainingBatch], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(batch_of((1, 1), (1, 1)))


# --- Rewards ---


def test_residue_task_by_hand() -> None:
    task = ResidueTask(prompts_per_step=5, prompt_tokens=6, vocabulary=64, classes=4)
    assert task.reward([6, 9, 5, 5, 5, 5], [2, 10, 3, 5]) == 0.5  # 5 = 3 + 2 marks residue 2
    assert task.reward([6, 9, 3, 3, 3, 3], [2, 10, 3, 5]) == 0.0
    assert task.reward([6, 9, 3, 3, 3, 3], []) == 0.0
    for prompt in ([6, 9, 5, 5, 5, 7], []):
        with pytest.raises(ValueError, match="no marker"):
            task.reward(prompt, [2])
    prompts = task.prompts(3, 0)
    assert [len(prompt) for prompt in prompts] == [6] * 5
    assert [prompt[2:] for prompt in prompts] == [[3 + place % 4] * 4 for place in range(5)]
    assert all(7 <= token < 64 for prompt in prompts for token in prompt[:2])
    assert prompts == task.prompts(3, 0)
    assert prompts not in (task.prompts(4, 0), task.prompts(3, 1))


def test_residue_task_refuses_prompts_without_room_for_the_markers() -> None:
    with pytest.raises(ValueError, match="prompt_tokens=3"):
        ResidueTask(prompt_tokens=3)
    with pytest.raises(ValueError, match="vocabulary=5"):
        ResidueTask(vocabulary=5)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### $1,200.", "1200"),
        ("####-5", "-5"),
        ("#### 12.50 dollars", "12.5"),
        ("#### 3 and then #### 4", "4"),
        ("#### .5", "0.5"),
        ("#### 40%", "40"),
        ("the answer is 7", None),
        ("#### seven", None),
        ("#### 7x", None),
        ("#### 1,23", None),
        ("#### -", None),
        ("####", None),
        ("### 7", None),
    ],
)
def test_the_number_after_the_last_marks(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


class CharacterTokenizer:
    """One token per character."""

    chat_template = None

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, tokens))


class ChatTokenizer(CharacterTokenizer):
    chat_template = "given"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<user>{messages[0]['content']}<assistant>"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens, "the template has them"
        return super().encode(text)


def write_questions(folder: Path, answers: list[str]) -> Path:
    rows = [json.dumps({"question": f"What is {i}?", "answer": answer}) for i, answer in enumerate(answers)]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("tokenizer", "begins"), [(CharacterTokenizer(), "What is"), (ChatTokenizer(), "<user>What")])
def test_exact_answers_of_gsm8k(tmp_path: Path, tokenizer: CharacterTokenizer, begins: str) -> None:
    task = Gsm8kTask(write_questions(tmp_path, [f"it is\n#### {i}" for i in range(5)]), tokenizer, prompts_per_step=2)
    epoch = task.prompts(0, 7) + task.prompts(1, 7)
    assert len({tuple(prompt) for prompt in epoch}) == 4
    assert task.prompts(0, 7) == task.prompts(0, 7) != task.prompts(2, 7)
    text = "".join(map(chr, epoch[0]))
    assert text.startswith(begins)
    right = text.split("What is ")[1][0]
    assert task.reward(epoch[0], [ord(c) for c in f"so it is #### {right}.00"]) == 1.0
    assert task.reward(epoch[0], [ord(c) for c in f"so it is #### 1{right}"]) == 0.0
    assert task.reward(epoch[0], [ord(c) for c in f"so it is {right}"]) == 0.0
    with pytest.raises(ValueError, match="none of this task's"):
        task.reward([1, 2], [3])


@pytest.mark.parametrize(
    ("answers", "message"), [(["#### 1", "no number"], "questions.jsonl:2"), (["#### 1"], "has 1 questions")]
)
def test_files_without_answers_are_refused(tmp_path: Path, answers: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gsm8kTask(write_questions(tmp_path, answers), CharacterTokenizer(), prompts_per_step=2)
