"""A real learner: one rank of an FSDP2 trainer of a Hugging Face causal language model, by GRPO or PPO.

All ranks call the same methods with the same arguments, in the same order. Every rank gets the whole batch and takes
its own share of it (see `simrl.real_backend.batch`), so that the number of ranks and the size of micro-batches change
the time and the memory, not the result. Nothing here knows Ray: a rank is an object in a process of its own.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh

from simrl.real_backend.batch import Column, PaddedBatch, TokenScores, TrainingBatch, pad
from simrl.real_backend.learner_settings import BytesMoved, LearnerLost, LearnerSettings, LearnStats
from simrl.real_backend.sharded_model import (
    TimedCollective,
    Trained,
    connect,
    load_models,
    log_probs_and_entropy,
    nbytes,
    now_s,
    shard,
    values_of,
)
from simrl.real_backend.update import Update
from simrl.traces.batches import rank_micro_batches

Tensor: TypeAlias = torch.Tensor
Method = TypeVar("Method", bound=Callable[..., Any])

MARKER = "learner.json"  # written last: a checkpoint without it is not complete


def _collective(method: Method) -> Method:
    """Turn what torch raises when a rank is missing into `LearnerLost`."""

    @wraps(method)
    def wrapped(self: LearnerRank, *args: Any, **kwargs: Any) -> Any:
        with _lost_ranks(self.settings, method.__name__):
            return method(self, *args, **kwargs)

    return cast(Method, wrapped)


@contextmanager
def _lost_ranks(settings: LearnerSettings, what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors; all of them name its source files.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LearnerLost(
            f"rank {settings.rank} of {settings.world}: {what} failed because another rank died, or stalled for more "
            f"than timeout_s={settings.timeout_s}: {error}"
        ) from error


class LearnerRank:
    """One rank of the learner; making it meets the other ranks and loads the model, `close` ends it.

    Attributes:
        settings: As given.
        weights_version: Updates learned so far; survives in checkpoints.
        start_phases_s: Wall time of meeting the other ranks, loading the models, sharding them.
    """

    def __init__(self, settings: LearnerSettings) -> None:
        self.settings = settings
        self.weights_version = 0
        torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed + settings.rank)
        self._timed = []
        if self._device_type == "cpu":
            self._timed = [TimedCollective(dist.all_gather_single), TimedCollective(dist.reduce_scatter_single)]
        started_s = time.perf_counter()
        connect(settings)
        met_s = time.perf_counter()
        self._actor_config, modules = load_models(settings)
        loaded_s = time.perf_counter()
        mesh = init_device_mesh(self._device_type, (settings.world,))
        for module in modules.values():
            shard(module, mesh, getattr(torch, settings.dtype), self._timed)
        self._reference = modules.pop("reference", None)
        rates = {"actor": settings.learning_rate, "critic": settings.critic_learning_rate}
        self._trained = {name: Trained(module, rates[name], settings) for name, module in modules.items()}
        self.start_phases_s: Mapping[str, float] = {
            "rendezvous": met_s - started_s,
            "load": loaded_s - met_s,
            "shard": time.perf_counter() - loaded_s,
        }

    def __enter__(self) -> LearnerRank:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @_collective
    def log_probs(self, batch: TrainingBatch) -> TokenScores:
        """Log-probs of this rank's share under the actor and, with a KL coefficient, under the reference model."""
        modules = [self._trained["actor"].module] + ([self._reference] if self._reference is not None else [])
        return self._score(batch, modules, ("old_log_probs", "ref_log_probs"), self._log_probs_of)

    @_collective
    def values(self, batch: TrainingBatch) -> TokenScores:
        """Values of this rank's share, by the critic.

        Raises:
            ValueError: If the algorithm has none.
        """
        if "critic" not in self._trained:
            raise ValueError(f"algorithm={self.settings.algorithm!r} has no critic; values belong to 'ppo'")
        return self._score(batch, [self._trained["critic"].module], ("values",), values_of)

    @_collective
    def update(self, batch: TrainingBatch, step: int) -> LearnStats:
        """Learn a prepared batch: one optimizer step per mini-batch.

        Args:
            batch: Of all ranks, with the columns that the algorithm wants (see `TrainingBatch`).
            step: Only named in the statistics.

        Raises:
            ValueError: If a column is missing.
            FloatingPointError: If a gradient is not finite. Earlier mini-batches are learned then.
            LearnerLost: If another rank died or stalled.
        """
        stats = Update(self.settings, self._trained, self._timed, batch).run(step, self.weights_version + 1)
        self.weights_version = stats.weights_version
        return stats

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The actor's weights, one whole tensor at a time, named as in Hugging Face's files; tied ones once.

        A collective: all ranks must iterate to the end. Tensors are on the learner's device, in `settings.dtype`. Such
        a stream is what vLLM's weight-transfer engines (`vllm.distributed.weight_transfer`, NCCL broadcast into the
        engines' workers) take from a trainer; `export_weights` is the way through files, which works on every device.
        """
        dtype = getattr(torch, self.settings.dtype)
        with _lost_ranks(self.settings, "full_parameters"):
            for name, parameter in self._trained["actor"].module.named_parameters():
                yield name, parameter.detach().full_tensor().to(dtype)

    @_collective
    def export_weights(self, folder: str | Path) -> BytesMoved:
        """Gather the actor's weights and let rank 0 write them, as safetensors with a config, into a new *folder*.

        The folder appears complete or not at all, readable by this user only. The caller removes it.

        Raises:
            OSError: On all ranks, if rank 0 could not write, or the folder exists.
        """
        started_s = time.perf_counter()
        weights = {}
        for name, tensor in self.full_parameters():
            if self.settings.rank == 0:
                weights[name] = tensor.cpu()
        self._on_rank_0(lambda: _write_weights(Path(folder), weights, self._actor_config, self.settings.dtype))
        return BytesMoved(nbytes(weights.values()), time.perf_counter() - started_s)

    @_collective
    def save_checkpoint(self, folder: str | Path) -> BytesMoved:
        """Write weights, optimizer state, version and random state of all ranks into a new *folder* that all can see.

        The folder appears complete or not at all.

        Raises:
            OSError: On all ranks, if a rank could not write, or the folder exists.
        """
        started_s = time.perf_counter()
        folder = Path(folder)
        partial = folder.with_name(f"{folder.name}.partial")
        self._on_rank_0(lambda: _make_new(folder, partial))
        tensors = self._checkpoint_tensors()
        try:
            dcp.save(tensors, checkpoint_id=str(partial))
        except dcp.CheckpointException as error:
            raise OSError(f"checkpoint {folder} was not written: {_first_failure(error)}") from error
        marker = {
            "weights_version": self.weights_version,
            "world": self.settings.world,
            "algorithm": self.settings.algorithm,
        }
        self._on_rank_0(lambda: _complete(partial, folder, marker))
        return BytesMoved(nbytes(tensors.values()), time.perf_counter() - started_s)

    @_collective
    def load_checkpoint(self, folder: str | Path) -> int:
        """Continue from a checkpoint; returns its weights version.

        With as many ranks as wrote it, what is learned from here on is the same to the bit as without the interruption
        (float32). Other numbers of ranks load it too, with their own random state.

        Raises:
            ValueError: If *folder* holds no complete checkpoint, or one of another algorithm.
        """
        marker = _read_marker(Path(folder))
        if marker["algorithm"] != self.settings.algorithm:
            raise ValueError(f"{folder} is of {marker['algorithm']!r}, this learner of {self.settings.algorithm!r}")
        tensors = self._checkpoint_tensors()
        if marker["world"] != self.settings.world:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}
        try:
            dcp.load(tensors, checkpoint_id=str(folder))
        except dcp.CheckpointException as error:
            raise ValueError(f"checkpoint {folder} cannot be loaded: {_first_failure(error)}") from error
        self._set_random_state(tensors)
        self.weights_version = int(marker["weights_version"])
        return self.weights_version

    def offload(self) -> BytesMoved:
        """Move weights and optimizer state of this rank to host memory, until `onload`; on the CPU, 0 bytes."""
        return self._move("cpu")

    def onload(self) -> BytesMoved:
        """Move them back to the device. On the CPU 0 bytes."""
        return self._move(self.settings.device)

    def close(self) -> None:
        """Leave the group of ranks and let the models go. Does not wait for the others; a second call does nothing."""
        self._trained = {}
        self._reference = None
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def _device_type(self) -> str:
        return self.settings.device.partition(":")[0]

    def _score(
        self,
        batch: TrainingBatch,
        modules: Sequence[Any],
        names: Sequence[str],
        score: Callable[[Any, PaddedBatch], Tensor],
    ) -> TokenScores:
        """One column of scores per module, over this rank's share."""
        started_s = now_s(self.settings.device)
        tokens = batch.sequence_tokens()
        settings = self.settings
        mine, rounds = rank_micro_batches(
            tokens, range(len(batch)), settings.rank, settings.world, settings.micro_batch_tokens
        )
        columns: list[list[Column]] = [[] for _ in modules]
        with torch.no_grad():
            for number in range(rounds):
                padded = pad(batch, mine[number] if number < len(mine) else [])
                for column, module in zip(columns, modules, strict=True):
                    scores = score(module, padded).cpu().numpy()
                    column.extend(padded.rows(scores) if number < len(mine) else [])
        for module in modules:
            module.reshard()  # after a forward pass alone, the outermost unit would stay gathered
        indices = tuple(index for part in mine for index in part)
        found: dict[str, Any] = {"old_log_probs": None, "ref_log_probs": None, "values": None}
        found.update((name, tuple(column)) for name, column in zip(names, columns, strict=False))
        return TokenScores(
            indices,
            **found,
            tokens=sum(tokens[index] for index in indices),
            seconds=now_s(self.settings.device) - started_s,
        )

    def _log_probs_of(self, module: Any, padded: PaddedBatch) -> Tensor:
        return log_probs_and_entropy(module, padded, self.settings.temperature)[0]

    def _checkpoint_tensors(self) -> dict[str, Tensor]:
        found = {f"random.{self.settings.rank}.cpu": torch.get_rng_state()}
        if self._device_type == "cuda":
            found[f"random.{self.settings.rank}.cuda"] = torch.cuda.get_rng_state()
        for name, trained in self._trained.items():
            found.update((f"{name}.{key}", tensor) for key, tensor in trained.tensors().items())
        return found

    def _set_random_state(self, tensors: Mapping[str, Tensor]) -> None:
        for device, setter in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
            name = f"random.{self.settings.rank}.{device}"
            if name in tensors:
                setter(tensors[name])

    def _move(self, device: str) -> BytesMoved:
        if self._device_type == "cpu":
            return BytesMoved(0, 0.0)
        started_s = now_s(self.settings.device)
        moved = sum(trained.move(device) for trained in self._trained.values())
        if self._reference is not None:
            moved += nbytes(self._reference.parameters())
            self._reference.to(device)
        torch.cuda.empty_cache()
        return BytesMoved(moved, now_s(self.settings.device) - started_s)

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Do *action* on rank 0; the others wait for it, and all of them fail if it fails."""
        outcome: list[str | None] = [None]
        if self.settings.rank == 0:
            try:
                action()
            except Exception as error:  # whatever it is, the others wait to hear of it
                outcome = [f"rank 0: {type(error).__name__}: {error}"]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            raise OSError(outcome[0])


def _first_failure(error: Any) -> str:
    """In one line: torch's own text is the traceback of every rank."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _make_new(folder: Path, partial: Path) -> None:
    """An empty private *partial*, which is to become *folder*; what an interrupted write left there goes."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)


def _complete(partial: Path, folder: Path, marker: Mapping[str, object]) -> None:
    with (partial / MARKER).open("w", encoding="utf-8") as file:
        json.dump(marker, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder)


def _read_marker(folder: Path) -> dict[str, Any]:
    try:
        marker: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no complete checkpoint: {error}") from error
    return marker


def _write_weights(folder: Path, weights: Mapping[str, Tensor], config: Any, dtype: str) -> None:
    from safetensors.torch import save_file

    partial = folder.with_name(f"{folder.name}.partial")
    _make_new(folder, partial)
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.save_pretrained(partial)
    save_file(dict(weights), str(partial / "model.safetensors"), metadata={"format": "pt"})
    partial.rename(folder)
