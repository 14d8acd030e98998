"""What a learner is given and what it tells: plain data, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from simrl.real_backend.losses import Aggregation


class LearnerLost(RuntimeError):
    """A rank died, stalled or never came. The learner is of no further use on any rank.

    A process whose ranks did not meet cannot try again (torch counts its attempts): start a new one.
    """


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """How one rank trains. Equal on all ranks, apart from `rank` and `device`.

    Attributes:
        model_folder: Local Hugging Face folder of a causal language model; each rank reads all of it.
        rank: This rank, from 0.
        world: Number of ranks.
        rendezvous: URL at which the ranks meet. `file:///<private folder>/<new file>` opens no port that others can
            reach, but all ranks must see the folder; `tcp://host:port` needs neither, but listens on all interfaces.
        interface: Network interface between the ranks; None: the libraries choose.
        device: "cpu" (gloo) or "cuda", "cuda:<index>" (nccl).
        dtype: Of computation and of exported weights; the trained weights themselves are float32.
        algorithm: GRPO compares the responses of a prompt, PPO trains a critic.
        learning_rate: Of the actor.
        critic_learning_rate: Of PPO's critic.
        weight_decay: AdamW's.
        clip_low: The probability ratio is clipped at 1 - clip_low ...
        clip_high: ... and 1 + clip_high.
        value_clip: How far a value may move from its old one and still earn.
        kl_coefficient: Weight of the KL divergence from the initial model: in GRPO's loss (k3), in PPO's rewards (k1).
            0 means that there is no reference model.
        entropy_coefficient: Weight of the entropy bonus.
        discount: PPO's gamma.
        gae_lambda: PPO's lambda.
        loss_aggregation: See `losses.aggregate`.
        temperature: At which responses are sampled; log-probs are of the distribution at this temperature.
        micro_batch_tokens: Limit of one forward and backward pass, padding included. Its float32 logits, a number per
            token and entry of the vocabulary, are held several times over.
        mini_batch_prompts: Prompts of one optimizer step.
        gradient_clip: Largest gradient norm.
        seed: Of dropout, where a model has it.
        threads: Of torch on the CPU.
        activation_checkpointing: Recompute activations in the backward pass instead of keeping them.
        timeout_s: How long a rank waits for the others in one collective.

    Raises:
        ValueError: If a number or the algorithm is out of range.
    """

    model_folder: str
    rank: int
    world: int
    rendezvous: str
    interface: str | None = "lo"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    algorithm: Literal["grpo", "ppo"] = "grpo"
    learning_rate: float = 1e-6
    critic_learning_rate: float = 1e-5
    weight_decay: float = 0.01
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.5
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    discount: float = 1.0
    gae_lambda: float = 1.0
    loss_aggregation: Aggregation = "token-mean"
    temperature: float = 1.0
    micro_batch_tokens: int = 4096
    mini_batch_prompts: int = 256
    gradient_clip: float = 1.0
    seed: int = 0
    threads: int = 1
    activation_checkpointing: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank} must be in 0 <= rank < world={self.world}")
        if self.algorithm not in ("grpo", "ppo"):
            raise ValueError(f"algorithm={self.algorithm!r} must be 'grpo' or 'ppo'")
        for name in ("weight_decay", "kl_coefficient"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        for name in ("learning_rate", "critic_learning_rate", "temperature", "gradient_clip", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        for name in ("micro_batch_tokens", "mini_batch_prompts", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")


@dataclass(frozen=True, slots=True)
class LearnStats:
    """One update, over all ranks; times are this rank's.

    Attributes:
        step: As given to `update`.
        weights_version: Updates learned so far, this one included.
        mini_batches: Optimizer steps.
        micro_batches: Forward and backward passes of the actor on this rank, empty ones included.
        tokens: Prompt and response tokens of the batch.
        response_tokens: Those that the loss is about.
        padded_tokens: What this rank computed, padding included.
        reward: Mean over responses.
        loss: Actor's loss, mean over mini-batches.
        value_loss: Critic's loss, mean over mini-batches; None without a critic.
        kl: Estimate (k3) of KL(actor || reference), mean over response tokens; None without a reference.
        policy_kl: Estimate (k3) of KL(actor || actor before the update), mean over response tokens.
        clip_fraction: Share of response tokens whose gradient the clip removed.
        entropy: Of the next-token distribution, mean over response tokens.
        gradient_norm: Actor's, before clipping, mean over mini-batches.
        critic_gradient_norm: Critic's; None without a critic.
        forward_s: In forward passes and losses.
        backward_s: In backward passes.
        optimizer_s: In gradient clipping and optimizer steps.
        communication_s: The part of `forward_s` and `backward_s` spent in all-gather and reduce-scatter, waiting for
            the slowest rank included. None on GPUs, where it overlaps with computation.
        seconds: The whole update.
    """

    step: int
    weights_version: int
    mini_batches: int
    micro_batches: int
    tokens: int
    response_tokens: int
    padded_tokens: int
    reward: float
    loss: float
    value_loss: float | None
    kl: float | None
    policy_kl: float
    clip_fraction: float
    entropy: float
    gradient_norm: float
    critic_gradient_norm: float | None
    forward_s: float
    backward_s: float
    optimizer_s: float
    communication_s: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class BytesMoved:
    """Bytes written or moved by this rank, and the wall time of it."""

    bytes: int
    seconds: float
