"""Log-probs of finished responses under whole, unsharded weights: what preparation computes on one function."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from simrl.real_backend.batch import TokenScores, TrainingBatch, pad
from simrl.real_backend.learner_settings import LearnerSettings
from simrl.real_backend.sharded_model import load_models, log_probs_and_entropy, now_s
from simrl.traces.batches import rank_micro_batches


class Scorer:
    """The models of a learner in one process, in evaluation mode.

    A learner's own ranks score together or not at all; a function that prepares responses while others still generate
    works alone, on a copy of the newest weights. A critic's values are left to the learner's ranks, who hold it.

    Args:
        settings: The learner's; rank, world and algorithm do not matter.
    """

    def __init__(self, settings: LearnerSettings) -> None:
        self.settings = replace(settings, rank=0, world=1, algorithm="grpo")
        self.weights_version = 0
        _, self._modules = load_models(self.settings)

    def load_weights(self, folder: str | Path, version: int) -> float:
        """Take the actor's weights of *version*; returns seconds. The reference keeps the first ones.

        Raises:
            RuntimeError: the folder's weights are not this model's.
        """
        from safetensors.torch import load_file

        started_s = time.perf_counter()
        actor = self._modules["actor"]
        found = load_file(str(Path(folder) / "model.safetensors"))
        missing, unexpected = actor.load_state_dict(found, strict=False)
        tied = set(actor._tied_weights_keys or ())
        if unexpected or set(missing) - tied:
            raise RuntimeError(f"{folder} does not hold this model: {sorted({*unexpected, *missing} - tied)}")
        self.weights_version = version
        return time.perf_counter() - started_s

    def score(self, batch: TrainingBatch) -> TokenScores:
        """Score all of *batch*."""
        started_s = now_s(self.settings.device)
        tokens = batch.sequence_tokens()
        mine, _ = rank_micro_batches(tokens, range(len(batch)), 0, 1, self.settings.micro_batch_tokens)
        columns: dict[str, list[Any]] = {"old_log_probs": []}
        if "reference" in self._modules:
            columns["ref_log_probs"] = []
        with torch.no_grad():
            for micro_batch in mine:
                padded = pad(batch, micro_batch)
                for name, column in columns.items():
                    column.extend(padded.rows(self._scores(name, padded)))
        return TokenScores(
            tuple(index for part in mine for index in part),
            old_log_probs=tuple(columns["old_log_probs"]),
            ref_log_probs=tuple(columns["ref_log_probs"]) if "ref_log_probs" in columns else None,
            values=None,
            tokens=sum(tokens),
            seconds=now_s(self.settings.device) - started_s,
        )

    def _scores(self, name: str, padded: Any) -> Any:
        module = self._modules["actor" if name == "old_log_probs" else "reference"]
        return log_probs_and_entropy(module, padded, self.settings.temperature)[0].cpu().numpy()
