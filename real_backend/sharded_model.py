"""Models as the learner trains them: loaded from a folder, sharded over the ranks, run on padded sequences."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from simrl.real_backend.batch import PaddedBatch
from simrl.real_backend.learner_settings import LearnerLost, LearnerSettings

Tensor: TypeAlias = torch.Tensor


class TimedCollective:
    """A collective of FSDP on gloo, where it blocks.

    Attributes:
        collective: What is called.
        seconds: Time inside it so far.
    """

    def __init__(self, collective: Callable[..., Any]) -> None:
        self.collective = collective
        self.seconds = 0.0

    def allocate(self, size: Sequence[int], *, dtype: Any, device: Any) -> Tensor:
        """A buffer for it, as FSDP asks."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> Any:
        """Do it; see torch."""
        started_s = time.perf_counter()
        work = self.collective(output_tensor, input_tensor, **options)
        self.seconds += time.perf_counter() - started_s
        return work


class ValueModel(torch.nn.Module):  # type: ignore[misc]
    """PPO's critic: a language model's body and a linear head, which starts at 0, so that the first values are 0."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.head = torch.nn.Linear(body.config.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, **inputs: Any) -> Tensor:
        """Values `[batch, tokens, 1]`: of the state after each token."""
        values: Tensor = self.head(self.body(**inputs).last_hidden_state)
        return values


class Trained:
    """A sharded module with its AdamW; the optimizer's state exists from the start.

    Attributes:
        module: The sharded module.
        gradient_clip: Largest gradient norm that is applied.
        optimizer: Of all its parameters.
    """

    def __init__(self, module: Any, learning_rate: float, settings: LearnerSettings) -> None:
        self.module = module
        self.gradient_clip = settings.gradient_clip
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        for parameter in module.parameters():
            # As AdamW's first step would make it: a checkpoint has the same tensors before and after it.
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self) -> float:
        """Apply the accumulated gradients; returns their norm before clipping, over all ranks.

        Raises:
            FloatingPointError: If it is not finite.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.gradient_clip)
        value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not np.isfinite(value):
            raise FloatingPointError(f"gradient norm is {value}; the weights are unchanged")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the module and its optimizer, by name; writing into them changes the learner."""
        found = {}
        for name, parameter in self.module.named_parameters():
            found[f"weights.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{key}.{name}"] = value
        return found

    def move(self, device: str) -> int:
        """Move weights and optimizer state; returns the bytes of this rank's part."""
        moved = nbytes(self.tensors().values())
        self.module.to(device)
        for state in self.optimizer.state.values():
            state.update({key: value.to(device) for key, value in state.items()})
        return moved


def connect(settings: LearnerSettings) -> None:
    """Meet the other ranks.

    Raises:
        LearnerLost: If they do not all come in time.
    """
    on_gpu = settings.device.startswith("cuda")
    # Both libraries read these once, when they connect.
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
        if settings.interface is not None:
            os.environ[name] = settings.interface
    if on_gpu:
        torch.cuda.set_device(torch.device(settings.device))
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=settings.rendezvous,
            rank=settings.rank,
            world_size=settings.world,
            timeout=timedelta(seconds=settings.timeout_s),
        )
    except RuntimeError as error:
        raise LearnerLost(
            f"rank {settings.rank} of {settings.world} did not meet the others at {settings.rendezvous} within "
            f"timeout_s={settings.timeout_s}: {error}"
        ) from error


def load_models(settings: LearnerSettings) -> tuple[Any, dict[str, Any]]:
    """The actor's configuration; actor, reference and critic, as far as the algorithm has them, in float32."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # those of several ranks would write over each other

    def load(kind: Any) -> Any:
        return kind.from_pretrained(
            settings.model_folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )

    modules = {"actor": load(AutoModelForCausalLM)}
    if settings.kl_coefficient > 0:
        modules["reference"] = load(AutoModelForCausalLM).requires_grad_(False)
    if settings.algorithm == "ppo":
        modules["critic"] = ValueModel(load(AutoModel))
    for name, module in modules.items():
        if settings.activation_checkpointing and name != "reference":
            body = getattr(module, "body", module)
            body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            module.train()  # transformers checkpoints in training mode only
        else:
            module.eval()  # no dropout: the ratio to the old log-probs starts at 1
        module.to(settings.device)
    return modules["actor"].config, modules


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's parts."""
    return sum(int((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes) for tensor in tensors)


def shard(module: Any, mesh: Any, dtype: Any, collectives: Sequence[TimedCollective]) -> None:
    """Shard in place: one FSDP unit per decoder layer, one for the rest.

    Args:
        module: On its device.
        mesh: Of one dimension, all ranks.
        dtype: Of computation; gradients are summed in float32.
        collectives: All-gather and reduce-scatter that replace FSDP's own, or nothing.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    body = getattr(module, "body", module)
    layers = [part for part in body.modules() if type(part).__name__ in set(body._no_split_modules or ())]
    for part in (*layers, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        if collectives:
            all_gather, reduce_scatter = collectives
            part.set_custom_all_gather(all_gather)
            part.set_custom_reduce_scatter(reduce_scatter)


def log_probs_and_entropy(
    module: Any, padded: PaddedBatch, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Of the predicted tokens and of their distributions, in nats; both laid out as `padded.mask` is."""
    inputs = _inputs(module, padded)
    kept = padded.input_ids.shape[1] - padded.first
    logits = module(**inputs, logits_to_keep=kept).logits[:, :-1].float() / temperature
    log_total = logits.logsumexp(dim=-1)
    targets = inputs["input_ids"][:, padded.first + 1 :]
    log_probs = logits.gather(-1, targets[..., None]).squeeze(-1) - log_total
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = log_total - (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)
    return log_probs, entropy


def values_of(module: Any, padded: PaddedBatch) -> Tensor:
    """Value of the state in which each response token is chosen; laid out as `padded.mask` is."""
    values: Tensor = module(**_inputs(module, padded))[:, padded.first : -1, 0].float()
    return values


def now_s(device: str) -> float:
    """The clock, once the device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def _inputs(module: Any, padded: PaddedBatch) -> dict[str, Any]:
    device = next(module.parameters()).device
    return {
        "input_ids": torch.from_numpy(padded.input_ids).to(device),
        "attention_mask": torch.from_numpy(padded.attention_mask).to(device),
        "position_ids": torch.arange(padded.input_ids.shape[1], device=device)[None],
        "use_cache": False,
    }
