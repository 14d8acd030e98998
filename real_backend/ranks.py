"""The learner of a run: its ranks learn together, and when one dies, others go on from the last checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import simpy

from simrl.policies.runtime.function import HostDied, Process
from simrl.real_backend.actors import HostPool, Place, Timed
from simrl.real_backend.batch import TrainingBatch
from simrl.real_backend.clock import Clock
from simrl.real_backend.learner_settings import LearnerLost, LearnerSettings, LearnStats

ATTEMPTS = 3
PROBE = tuple(3 + (7 * i) % 200 for i in range(24))  # a text whose log-probs tell weights apart
PROBE_PROMPT_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Learned:
    """What an update left.

    Attributes:
        stats: Of the update.
        folder: The actor's weights, for engines.
        export_s: Seconds of gathering and writing them.
        probe_log_probs: Of `PROBE` under them.
    """

    stats: LearnStats
    folder: str
    export_s: float
    probe_log_probs: Sequence[float]


class Learner:
    """The learner's ranks. Each version of the weights is learned once, whatever ranks die meanwhile.

    Args:
        hosts: Have the ranks' processes.
        clock: Of the run.
        folder: Where weights go.
        checkpoints: Where the newest checkpoint is; None writes none: then the death of a rank ends the run.
    """

    def __init__(self, hosts: HostPool, clock: Clock, folder: Path, checkpoints: Path | None) -> None:
        self._hosts, self._clock, self._folder, self._checkpoints = hosts, clock, folder, checkpoints
        self._ranks: list[Any] = []
        self._connections = 0
        self._held = 0  # version of the weights in the ranks
        self._saved = 0  # of the newest complete checkpoint; what is on disk at the beginning is version 0
        self._saving: tuple[int, list[Any]] | None = None
        self._batches: dict[int, tuple[TrainingBatch, int]] = {}  # those that made the versions after it
        self._stats: dict[int, LearnStats] = {}

    def learn(self, places: Sequence[Place], version: int, batch: TrainingBatch, step: int, *, wait: bool) -> Process:
        """Make *version* of the weights by learning *batch*, the one of *step*; returns `Learned`.

        Args:
            places: Of the ranks.
            version: One more than the last.
            batch: With all scores but a critic's.
            step: For the statistics.
            wait: Whether its checkpoint has to be complete; else it is when the next version is learned.

        Raises:
            RuntimeError: ranks died or stalled in each of several attempts, or there is no checkpoint.
        """
        self._batches[version] = batch, step
        for attempt in range(ATTEMPTS):
            try:
                return (yield from self._learn(places, version, wait=wait))
            except (HostDied, LearnerLost, OSError) as error:  # TimeoutError is an OSError
                if not self._is_loss(error):
                    raise
                self.end()
                if attempt == ATTEMPTS - 1:
                    raise RuntimeError(
                        f"learning step {step} failed {ATTEMPTS} times in a row, as ranks of the learner died or"
                        f" stalled: {error}"
                    ) from error
        raise AssertionError("it returns or raises")

    def end(self) -> None:
        """Its processes end; the next to learn go on from the last checkpoint."""
        if self._ranks:
            self._hosts.end_learners()
        self._ranks, self._saving = [], None

    def _is_loss(self, error: Exception) -> bool:
        """A rank may die while another sees no more of it than that a checkpoint cannot be written."""
        return isinstance(error, HostDied | LearnerLost | TimeoutError) or self._hosts.some_died(self._ranks)

    def _learn(self, places: Sequence[Place], version: int, *, wait: bool) -> Process:
        yield from self._complete_checkpoint()
        if len(self._ranks) != len(places):
            yield from self._connect(places)
        while self._held < version:
            yield from self._update(self._held + 1)
        learned = self._export(version)
        self._save(version)
        if wait:
            yield from self._complete_checkpoint()
        return learned

    def _connect(self, places: Sequence[Place]) -> Process:
        if self._ranks:
            self.end()
        started_s = time.perf_counter()
        self._ranks = self._hosts.learners(places)
        if self._connections:  # the first ranks start with the run
            yield self._clock.took(time.perf_counter() - started_s)
        self._connections += 1
        ranks, rendezvous = self._ranks, self._folder / f"rendezvous-{self._connections}"
        yield self._clock.call(lambda: begin_to_meet(ranks, self._hosts.learner, rendezvous), busiest_s)
        if self._saved:
            yield self._all_ranks("load_checkpoint", str(self._checkpoint(self._saved)))
        self._held = self._saved

    def _update(self, version: int) -> Process:
        if version not in self._batches:
            raise RuntimeError("ranks of the learner died, and there is no checkpoint to go on from")
        batch, step = self._batches[version]
        if self._hosts.learner.algorithm == "ppo":
            values = yield self._all_ranks("values", batch)
            batch = batch.with_scores([timed.result for timed in values])
        updates = yield self._all_ranks("update", batch, step)
        self._held, self._stats[version] = version, updates[0].result

    def _export(self, version: int) -> Learned:
        """Takes no time here: gathering and writing belong to the weight sync, which waits for it."""
        folder = self._folder / f"weights-{version}"
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was not finished
        exports = self._hosts.result([rank.export_weights.remote(str(folder)) for rank in self._ranks])
        prompt, response = PROBE[:PROBE_PROMPT_TOKENS], PROBE[PROBE_PROMPT_TOKENS:]
        probe = TrainingBatch((prompt,), (response,), (0.0,), (0,))
        scores = self._hosts.result([rank.log_probs.remote(probe) for rank in self._ranks])
        expected = next(timed.result.old_log_probs[0] for timed in scores if timed.result.indices)
        return Learned(self._stats[version], str(folder), busiest_s(exports), expected)

    # --- checkpoints ---

    def _checkpoint(self, version: int) -> Path:
        assert self._checkpoints is not None, "only written ones are asked for"
        return self._checkpoints / f"checkpoint-{version}"

    def _save(self, version: int) -> None:
        """Begin to write a checkpoint; what the ranks are asked next waits for it."""
        if self._checkpoints is None:
            del self._batches[version]
        elif self._saved < version:
            folder = self._checkpoint(version)
            shutil.rmtree(folder, ignore_errors=True)
            self._saving = version, [rank.save_checkpoint.remote(str(folder)) for rank in self._ranks]

    def _complete_checkpoint(self) -> Process:
        """Wait for the checkpoint that is being written, and delete the one before."""
        if self._saving is None:
            return
        version, calls = self._saving
        yield self._clock.call(lambda: calls, lambda _: 0.0)
        if self._saved:
            shutil.rmtree(self._checkpoint(self._saved), ignore_errors=True)
        self._saved, self._saving = version, None
        self._batches = {later: learned for later, learned in self._batches.items() if later > version}

    def _all_ranks(self, method: str, *arguments: Any) -> simpy.Event:
        ranks = self._ranks
        begin: Callable[[], Any] = lambda: [getattr(rank, method).remote(*arguments) for rank in ranks]  # noqa: E731
        return self._clock.call(begin, busiest_s)


def begin_to_meet(actors: Sequence[Any], settings: LearnerSettings, rendezvous: Path) -> list[Any]:
    """Calls in which all ranks of a learner connect, by a file that is not there yet."""
    common = replace(settings, world=len(actors), rendezvous=f"file://{rendezvous}")
    return [actor.connect.remote(replace(common, rank=rank)) for rank, actor in enumerate(actors)]


def busiest(ranks: Sequence[Timed]) -> Timed:
    """Ranks share this machine's cores, so that their wall time is not a cluster's; CPU time holds no waiting."""
    return max(ranks, key=lambda timed: timed.cpu_s)


def busiest_s(ranks: Sequence[Timed]) -> float:
    """CPU seconds of the busiest."""
    return busiest(ranks).cpu_s
