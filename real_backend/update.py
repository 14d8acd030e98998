"""One update of the learner's models on a prepared batch: advantages, mini-batches, gradients summed over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from simrl.real_backend import losses
from simrl.real_backend.batch import Column, PaddedBatch, TrainingBatch, pad
from simrl.real_backend.learner_settings import LearnerSettings, LearnStats
from simrl.real_backend.sharded_model import TimedCollective, Trained, log_probs_and_entropy, now_s, values_of
from simrl.traces.batches import mini_batches, rank_micro_batches

Tensor: TypeAlias = torch.Tensor


class Update:
    """One call of `LearnerRank.update`: the batch, its advantages, and sums for the statistics."""

    def __init__(
        self,
        settings: LearnerSettings,
        models: Mapping[str, Trained],
        collectives: Sequence[TimedCollective],
        batch: TrainingBatch,
    ) -> None:
        self.settings = settings
        self.models = models
        self.collectives = collectives
        self.batch = batch
        self.old_log_probs = _wanted(batch.old_log_probs, "old_log_probs", "log_probs")
        self.ref_log_probs: tuple[Column, ...] | None = None
        if self.settings.kl_coefficient > 0:
            self.ref_log_probs = _wanted(batch.ref_log_probs, "ref_log_probs", "log_probs")
        self.old_values: tuple[Column, ...] | None = None
        if self.settings.algorithm == "ppo":
            self.old_values = _wanted(batch.values, "values", "values")
        self.advantages, self.returns = self._advantages()
        self.sums = dict.fromkeys(("loss", "value_loss", "kl", "policy_kl", "clipped", "entropy"), 0.0)
        self.norms: dict[str, list[float]] = {name: [] for name in models}
        self.seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        self.micro_batches = 0
        self.padded_tokens = 0

    def run(self, step: int, weights_version: int) -> LearnStats:
        """Learn the batch; *step* and the *weights_version* that it makes are for the statistics."""
        started_s, communicated_s = self._now_s(), self._communicated_s()
        parts = mini_batches(self.batch.groups, self.settings.mini_batch_prompts)
        for indices in parts:
            self._optimizer_step(indices)
        self._sum_over_ranks()
        communication_s = self._communicated_s() - communicated_s if self.collectives else None
        return self._stats(step, weights_version, len(parts), self._now_s() - started_s, communication_s)

    def _now_s(self) -> float:
        return now_s(self.settings.device)

    def _communicated_s(self) -> float:
        return sum(collective.seconds for collective in self.collectives)

    def _advantages(self) -> tuple[list[Column], list[Column]]:
        """Advantage and return of each response token; the returns are only PPO's."""
        rewards = torch.tensor(self.batch.rewards)
        lengths = [len(response) for response in self.batch.response_token_ids]
        if self.settings.algorithm == "grpo":
            numbers = {group: number for number, group in enumerate(dict.fromkeys(self.batch.groups))}
            groups = torch.tensor([numbers[group] for group in self.batch.groups])
            each = losses.grpo_advantages(rewards, groups).tolist()
            return [np.full(n, advantage, np.float32) for n, advantage in zip(lengths, each, strict=True)], []
        assert self.old_values is not None
        values, mask = _right_padded(self.old_values)
        token_rewards = torch.zeros_like(values)
        if self.ref_log_probs is not None:
            old, ref = _right_padded(self.old_log_probs)[0], _right_padded(self.ref_log_probs)[0]
            token_rewards -= self.settings.kl_coefficient * losses.kl_estimate(old, ref, "k1")
        token_rewards[torch.arange(len(lengths)), torch.tensor(lengths) - 1] += rewards
        advantages, returns = losses.gae(token_rewards, values, mask, self.settings.discount, self.settings.gae_lambda)
        advantages = losses.whiten(advantages, mask)
        return _unpadded(advantages, lengths), _unpadded(returns, lengths)

    def _optimizer_step(self, indices: Sequence[int]) -> None:
        """Accumulate the gradients of a mini-batch and apply them, to the critic first where there is one."""
        tokens = self.batch.sequence_tokens()
        settings = self.settings
        mine, rounds = rank_micro_batches(tokens, indices, settings.rank, settings.world, settings.micro_batch_tokens)
        num_tokens = sum(len(self.batch.response_token_ids[index]) for index in indices)
        passes = {"critic": self._value_loss, "actor": self._policy_loss}
        for name in [name for name in passes if name in self.models]:
            trained = self.models[name]
            for number in range(rounds):
                part = mine[number] if number < len(mine) else []
                self._accumulate(trained.module, passes[name], part, num_tokens, len(indices))
                if name == "actor":
                    self.micro_batches += 1
            started_s = self._now_s()
            self.norms[name].append(trained.step())
            self.seconds["optimizer"] += self._now_s() - started_s

    def _accumulate(
        self, module: Any, loss_of: Callable[..., Tensor], part: Sequence[int], num_tokens: int, num_sequences: int
    ) -> None:
        padded = pad(self.batch, part)
        self.padded_tokens += padded.input_ids.size if part else 0
        started_s = self._now_s()
        loss = loss_of(module, padded, part, num_tokens, num_sequences)
        forward_s = self._now_s()
        # FSDP averages gradients over the ranks; parts of one loss are to be added.
        (loss * self.settings.world).backward()
        self.seconds["forward"] += forward_s - started_s
        self.seconds["backward"] += self._now_s() - forward_s

    def _tensor(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.settings.device)

    def _column(self, padded: PaddedBatch, column: Sequence[Column], part: Sequence[int]) -> Tensor:
        entries = [column[index] for index in part] or [np.zeros(0, np.float32)]
        return self._tensor(padded.column(entries))

    def _policy_loss(
        self, module: Any, padded: PaddedBatch, part: Sequence[int], num_tokens: int, num_sequences: int
    ) -> Tensor:
        settings = self.settings
        mask = self._tensor(padded.mask)
        log_probs, entropy = log_probs_and_entropy(
            module, padded, settings.temperature, entropy_gradient=settings.entropy_coefficient != 0
        )
        old_log_probs = self._column(padded, self.old_log_probs, part)
        advantages = self._column(padded, self.advantages, part)
        per_token, clipped = losses.policy_loss(
            log_probs, old_log_probs, advantages, settings.clip_low, settings.clip_high
        )
        if settings.entropy_coefficient != 0:
            per_token = per_token - settings.entropy_coefficient * entropy
        if self.ref_log_probs is not None:
            kl = losses.kl_estimate(log_probs, self._column(padded, self.ref_log_probs, part))
            self._add("kl", kl, mask)
            if settings.algorithm == "grpo":
                per_token = per_token + settings.kl_coefficient * kl
        loss = losses.aggregate(per_token, mask, settings.loss_aggregation, num_tokens, num_sequences)
        self._add("policy_kl", losses.kl_estimate(old_log_probs, log_probs), mask)
        self._add("clipped", clipped, mask)
        self._add("entropy", entropy, mask)
        self.sums["loss"] += float(loss.detach())
        return loss

    def _value_loss(
        self, module: Any, padded: PaddedBatch, part: Sequence[int], num_tokens: int, num_sequences: int
    ) -> Tensor:
        assert self.old_values is not None
        values = values_of(module, padded)
        old_values = self._column(padded, self.old_values, part)
        returns = self._column(padded, self.returns, part)
        per_token = losses.value_loss(values, old_values, returns, self.settings.value_clip)
        mask = self._tensor(padded.mask)
        loss = losses.aggregate(per_token, mask, self.settings.loss_aggregation, num_tokens, num_sequences)
        self.sums["value_loss"] += float(loss.detach())
        return loss

    def _add(self, name: str, per_token: Tensor, mask: Tensor) -> None:
        self.sums[name] += float(per_token.detach()[mask].sum())

    def _sum_over_ranks(self) -> None:
        total = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=self.settings.device)
        dist.all_reduce(total)
        self.sums = dict(zip(self.sums, total.tolist(), strict=True))

    def _stats(
        self, step: int, weights_version: int, num_mini_batches: int, seconds: float, communication_s: float | None
    ) -> LearnStats:
        response_tokens = self.batch.response_tokens
        has_critic = "critic" in self.norms
        return LearnStats(
            step=step,
            weights_version=weights_version,
            mini_batches=num_mini_batches,
            micro_batches=self.micro_batches,
            tokens=sum(self.batch.sequence_tokens()),
            response_tokens=response_tokens,
            padded_tokens=self.padded_tokens,
            reward=float(np.mean(self.batch.rewards)),
            loss=self.sums["loss"] / num_mini_batches,
            value_loss=self.sums["value_loss"] / num_mini_batches if has_critic else None,
            kl=None if self.ref_log_probs is None else self.sums["kl"] / response_tokens,
            policy_kl=self.sums["policy_kl"] / response_tokens,
            clip_fraction=self.sums["clipped"] / response_tokens,
            entropy=self.sums["entropy"] / response_tokens,
            gradient_norm=float(np.mean(self.norms["actor"])),
            critic_gradient_norm=float(np.mean(self.norms["critic"])) if has_critic else None,
            forward_s=self.seconds["forward"],
            backward_s=self.seconds["backward"],
            optimizer_s=self.seconds["optimizer"],
            communication_s=communication_s,
            seconds=seconds,
        )


def _wanted(column: tuple[Column, ...] | None, name: str, method: str) -> tuple[Column, ...]:
    if column is None:
        raise ValueError(f"the batch has no {name}; merge what {method}() returns on each rank with with_scores()")
    return column


def _right_padded(columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
    """`[responses, longest]` with 0 after the end, and where it is not."""
    lengths = torch.tensor([len(column) for column in columns])
    padded = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(column) for column in columns], batch_first=True)
    return padded, torch.arange(padded.shape[1])[None] < lengths[:, None]


def _unpadded(tensor: Tensor, lengths: Sequence[int]) -> list[Column]:
    return [row[:length] for row, length in zip(tensor.numpy(), lengths, strict=True)]
