"""Losses and advantages of GRPO and PPO, as functions of tensors.

`[batch, tokens]` tensors hold one number per response token and are right-padded; `mask` is true at real tokens.

Papers: PPO arXiv 1707.06347, GAE arXiv 1506.02438, GRPO arXiv 2402.03300; for the variants DAPO arXiv 2503.14476 and
Dr. GRPO arXiv 2503.20783.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor
Aggregation: TypeAlias = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
KlEstimator: TypeAlias = Literal["k1", "k3"]

MAX_LOG_RATIO = 20.0  # exp(20) is far beyond every clip, and exp of more would overflow half precision and float32
STD_EPSILON = 1e-6  # as in verl: keeps a group of equal rewards at advantage 0


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate loss of each token (arXiv 1707.06347, eq. 7), and where the clip is what counts.

    loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(log_probs - old_log_probs). The paper has
    clip_low = clip_high; DAPO raises the upper one. GRPO (arXiv 2402.03300, eq. 3) uses the same term. Not here: the
    second clip for negative advantages (dual clip), which verl switches on by default.

    Returns:
        The loss of each token, and a boolean tensor: true where the clipped term is the larger loss, so that the token
        has no gradient.
    """
    ratio = (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(free, clipped), clipped > free


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: KlEstimator = "k3") -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token.

    With d = ref_log_probs - log_probs: k1 = -d is unbiased and can be negative; k3 = exp(d) - d - 1 is unbiased, never
    negative, and what GRPO adds to its loss (arXiv 2402.03300, eq. 4).
    """
    difference = (ref_log_probs - log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return -difference if estimator == "k1" else torch.expm1(difference) - difference


def grpo_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """Advantage of each response: its reward's distance from its group's mean, in the group's standard deviations.

    Outcome supervision of arXiv 2402.03300, section 4.1.2. The standard deviation divides by n - 1, as in verl. A group
    of one has nothing to be compared with: its advantage is 0. Dr. GRPO leaves the division out.

    Args:
        rewards: `[responses]`.
        groups: `[responses]`, integers; equal numbers are one group.
    """
    _, member_of = torch.unique(groups, return_inverse=True)
    size = torch.bincount(member_of).to(rewards.dtype)
    mean = torch.zeros_like(size).index_add_(0, member_of, rewards) / size
    distance = rewards - mean[member_of]
    variance = torch.zeros_like(size).index_add_(0, member_of, distance**2) / (size - 1).clamp(min=1)
    return distance / (variance.sqrt()[member_of] + STD_EPSILON)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that a critic is to learn (arXiv 1506.02438, eq. 16).

    A_t = sum over l of (discount * gae_lambda)^l * delta_(t+l), delta_t = r_t + discount * V_(t+1) - V_t; after the
    last token the value is 0. Returns are A + V.

    Args:
        rewards: `[batch, tokens]`, of each token; the response's score belongs to its last one.
        values: `[batch, tokens]`, before each token.
        mask: `[batch, tokens]`; both results are 0 where it is false.
        discount: gamma.
        gae_lambda: lambda.
    """
    real = mask.to(values.dtype)
    values = values * real
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        next_advantage = (delta + discount * gae_lambda * next_advantage) * real[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages with mean 0 and standard deviation 1 over all real tokens, 0 elsewhere."""
    chosen = advantages[mask]
    spread = chosen.std(correction=0) + STD_EPSILON
    return (advantages - chosen.mean()) / spread * mask


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Squared error of each value, halved; moving away from the old value by more than *clip* earns nothing.

    loss = max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2: the critic's counterpart of PPO's clip, from
    the implementation of arXiv 1707.06347 rather than its text.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def aggregate(per_token: Tensor, mask: Tensor, aggregation: Aggregation, num_tokens: int, num_sequences: int) -> Tensor:
    """One part's contribution to the loss of a whole mini-batch: over all parts, however it is cut, they sum to it.

    - "token-mean": sum over tokens / tokens of the mini-batch: each token counts the same (DAPO; verl's default).
    - "seq-mean-token-mean": mean over responses of each one's mean (arXiv 2402.03300, eq. 3): tokens of long responses
      count less.
    - "seq-mean-token-sum": mean over responses of each one's sum (Dr. GRPO up to a constant).

    Args:
        per_token: `[batch, tokens]` of this part.
        mask: `[batch, tokens]`.
        aggregation: See above.
        num_tokens: Response tokens of the whole mini-batch, on all ranks.
        num_sequences: Responses of the whole mini-batch, on all ranks.
    """
    sums = torch.where(mask, per_token, 0.0).sum(dim=-1)
    if aggregation == "token-mean":
        return sums.sum() / num_tokens
    if aggregation == "seq-mean-token-mean":
        sums = sums / mask.sum(dim=-1).clamp(min=1)
    return sums.sum() / num_sequences
