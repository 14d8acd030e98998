"""The processes of the real backend: hosts of engines, ranks of the learner, and the pool that keeps them warm.

Each is a Ray actor. Starting one takes seconds to minutes, so a pool outlives runs: a function that ends gives its host
back, and the next one to start gets it, together with the time that its start really took.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simrl.policies.runtime.function import HostDied
from simrl.real_backend.batch import TokenScores, TrainingBatch
from simrl.real_backend.engine import EngineSettings, StepReport, VllmEngine, Work
from simrl.real_backend.learner_settings import LearnerLost, LearnerSettings
from simrl.real_backend.ray_cluster import death, last_line, no_space, node_affinity, open_ray, starting, uninterrupted

START_TIMEOUT_S = 900.0  # a large model from a slow disk
CALL_TIMEOUT_S = 900.0  # an update of a large model
DEATH_TIMEOUT_S = 10.0  # Ray tells of a death within a second or two


@dataclass(frozen=True, slots=True)
class KVMoved:
    """KV that went to files: tokens, bytes, and the seconds of all that it took.

    Of responses that left, one by one, also what their prefill here found cached and computed.
    """

    tokens: int
    bytes: int
    seconds: float
    prefills: tuple[tuple[int, int], ...] = ()


class EngineHost:
    """A process with an engine, and with the models that preparation needs.

    Methods return what they did and the seconds that it took, on this process's own clock.
    """

    def __init__(self, settings: EngineSettings, scoring: LearnerSettings) -> None:
        self._engine = VllmEngine(settings)
        self._engine.warm_up()
        self._scoring = scoring
        self._scorer: Any = None

    def ready(self) -> Mapping[str, float]:
        """Seconds of each phase of the start."""
        return self._engine.cold_start_phases

    def step(self, arrivals: Sequence[Work], iterations: int, completions: int, in_turn: bool) -> list[StepReport]:
        """Queue *arrivals*, then run so many iterations, or fewer if so many responses are complete or none is left.

        With others *in_turn* on its core, the engine's caches are warmed before.
        """
        for work in arrivals:
            self._engine.add(work)
        if in_turn:
            self._engine.warm_caches()
        reports: list[StepReport] = []
        while self._engine.unfinished() and len(reports) < iterations and completions > 0:
            reports.append(self._engine.step())
            completions -= len(reports[-1].finished)
        return reports

    def take_out(self, response_ids: Sequence[int], with_kv: bool) -> KVMoved:
        """Remove unfinished responses; their KV goes to files if asked for."""
        started_s = time.perf_counter()
        moved = self._engine.take_out(response_ids, with_kv)
        kv_bytes = sum(one.kv_saved.num_bytes for one in moved if one.kv_saved is not None)
        prefills = tuple((one.cached_tokens, one.computed_tokens) for one in moved)
        return KVMoved(sum(one.kv_tokens for one in moved), kv_bytes, time.perf_counter() - started_s, prefills)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> KVMoved:
        """Compute prompts and leave their KV in files."""
        done = self._engine.prefill(prompts)
        return KVMoved(done.computed_tokens, done.kv_saved.num_bytes, done.seconds)

    def kv_used(self) -> float:
        """Share of the KV blocks in use."""
        return self._engine.kv_used()

    def load_weights(self, folder: str, version: int) -> float:
        """New weights for the engine."""
        return self._engine.load_weights(folder, version)

    def log_probs(self, token_ids: Sequence[int], prompt_tokens: int) -> list[float]:
        """The engine's log-probs of a text, to compare with the learner's."""
        return self._engine.log_probs(token_ids, prompt_tokens)

    def forget_kv(self, version: int) -> None:
        """Delete KV files of that version and older ones."""
        self._engine.forget_kv(version)

    def park(self) -> float:
        """Free the engine's memory."""
        return self._engine.park()

    def wake(self) -> float:
        """Take it again."""
        return self._engine.wake()

    def load_scorer(self, folder: str, version: int) -> float:
        """The weights to score with; the first time, the models too."""
        from simrl.real_backend.scorer import Scorer

        started_s = time.perf_counter()
        if self._scorer is None:
            self._scorer = Scorer(self._scoring)
        if self._scorer.weights_version != version:
            self._scorer.load_weights(folder, version)
        return time.perf_counter() - started_s

    def score(self, batch: TrainingBatch) -> TokenScores:
        """Log-probs of responses."""
        scores: TokenScores = self._scorer.score(batch)
        return scores

    def reset(self, folder: str) -> None:
        """Awake, with the first weights and nothing on the engine."""
        if self._engine.parked:
            self._engine.wake()
        for response_id in self._engine.unfinished():
            self._engine.take_out([response_id], with_kv=False)
        self._engine.load_weights(folder, 0)

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


@dataclass(frozen=True, slots=True)
class Timed:
    """What a rank of the learner did: its CPU seconds do not hold the waiting for others."""

    result: Any
    cpu_s: float
    wall_s: float


class LearnerHost:
    """A process with one rank of the learner."""

    def __init__(self) -> None:
        started_s = time.perf_counter()
        import transformers  # noqa: F401

        from simrl.real_backend import learner

        self._make = learner.LearnerRank
        self._rank: Any = None
        self._import_s = time.perf_counter() - started_s

    def ready(self) -> float:
        """Seconds of importing what learning needs."""
        return self._import_s

    def connect(self, settings: LearnerSettings) -> Timed:
        """Meet the other ranks and load the model."""
        self.close()
        return self._timed(lambda: setattr(self, "_rank", self._make(settings)))

    def update(self, batch: TrainingBatch, step: int) -> Timed:
        """Learn a batch; the result is its `LearnStats`."""
        return self._timed(lambda: self._rank.update(batch, step))

    def values(self, batch: TrainingBatch) -> Timed:
        """The critic's values of this rank's share."""
        return self._timed(lambda: self._rank.values(batch))

    def export_weights(self, folder: str) -> Timed:
        """The actor's weights into a new folder."""
        return self._timed(lambda: self._rank.export_weights(folder))

    def log_probs(self, batch: TrainingBatch) -> Timed:
        """Log-probs of this rank's share."""
        return self._timed(lambda: self._rank.log_probs(batch))

    def save_checkpoint(self, folder: str) -> Timed:
        """Everything that training needs to go on."""
        return self._timed(lambda: self._rank.save_checkpoint(folder))

    def load_checkpoint(self, folder: str) -> Timed:
        """Go on from a checkpoint; the result is its version."""
        return self._timed(lambda: self._rank.load_checkpoint(folder))

    def close(self) -> None:
        """Leave the other ranks."""
        if self._rank is not None:
            self._rank.close()
            self._rank = None

    def _timed(self, action: Any) -> Timed:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        result = action()
        return Timed(result, time.process_time() - cpu_s, time.perf_counter() - wall_s)


@dataclass(frozen=True, slots=True)
class Place:
    """GPUs of one node, by index."""

    node: int
    gpus: tuple[int, ...]


ANYWHERE = Place(0, ())


@dataclass(slots=True, eq=False)
class WarmHost:
    """A host of the pool.

    Attributes:
        actor: Its process.
        place: Its GPUs.
        begun_s: When its process began, on this process's clock.
        start_s: Seconds of its start, until its engine was ready; None while it starts.
    """

    actor: Any
    place: Place
    begun_s: float
    start_s: float | None = None

    def ready(self) -> float:
        """It is: seconds of its start."""
        if self.start_s is None:
            self.start_s = time.perf_counter() - self.begun_s
        return self.start_s


class HostPool:
    """Hosts of engines and learner ranks that outlive runs; ends everything that it started.

    Ray reserves nothing for them, as an engine and a rank may share a GPU (or a core), and parked ones have none: who
    has which is the lease's business. On GPUs a process sees only those of its place; on the CPUs of one machine all
    processes are alike.

    Args:
        engine: What each engine is made of; `kv_folder` is set here.
        learner: How the learner trains; rank, world and rendezvous are set here.
        address: Of a Ray cluster; None starts one on this machine, for this process alone; see `open_ray`.
        folder: Where KV, weights and checkpoints go, in a folder of their own; all nodes must see it. None: memory.
    """

    def __init__(
        self,
        engine: EngineSettings,
        learner: LearnerSettings,
        *,
        address: str | None = None,
        folder: Path | None = None,
    ) -> None:
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.folder = Path(tempfile.mkdtemp(prefix="simrl-", dir=folder or memory))
        kv_folder = self.folder / "kv"
        kv_folder.mkdir(mode=0o700)
        self.engine = replace(engine, kv_folder=str(kv_folder))
        self.learner = learner
        self._idle: list[WarmHost] = []
        self._taken: list[WarmHost] = []
        self._learners: list[tuple[Place, Any]] = []
        self._all: list[Any] = []
        self._run_folder: Path | None = None
        self.weight_tolerance = 1e-3 if engine.dtype == "float32" else 0.2  # nats a token; bfloat16 rounds to 3 digits
        try:
            self._cluster = open_ray(address)
        except BaseException:  # also Ctrl-C
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        self._ray = self._cluster.ray
        self.placed = engine.device == "cuda" or address is not None

    def __enter__(self) -> HostPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def take(self, place: Place = ANYWHERE) -> WarmHost:
        """An idle host of that place with the first weights, or a new one, which need not be ready yet.

        Raises:
            ClusterError: there is no such node.
        """
        for host in [host for host in self._idle if not self.placed or host.place == place]:
            self._idle.remove(host)
            with suppress(self._ray.exceptions.RayActorError):  # it died while nobody needed it
                self.get(host.actor.reset.remote(self.engine.model))
                self._taken.append(host)
                return host
        begun_s = time.perf_counter()
        actor = self._start(EngineHost, place, self.engine, self.learner)
        self._taken.append(WarmHost(actor, place, begun_s))
        return self._taken[-1]

    def take_ready(self, place: Place = ANYWHERE) -> WarmHost:
        """As `take`, and wait until it is ready.

        Raises:
            ClusterError: it could not start, or was not ready in time.
        """
        return self._wait_until_ready(self.take(place))

    def _wait_until_ready(self, host: WarmHost) -> WarmHost:
        with self.starting(host):
            self.get(host.actor.ready.remote(), START_TIMEOUT_S)
        host.ready()
        return host

    def take_side_by_side(self, count: int) -> list[WarmHost]:
        """As `take_ready`, so many on the first node, each on the GPUs after those of the one before.

        As many start at once as there are cores.
        """
        gpus, at_once = self.engine.tensor_parallel, len(os.sched_getaffinity(0))
        places = [Place(0, tuple(range(i * gpus, (i + 1) * gpus))) for i in range(count)]
        hosts: list[WarmHost] = []
        for first in range(0, count, at_once):
            starting = [self.take(place) for place in places[first : first + at_once]]
            hosts += [self._wait_until_ready(host) for host in starting]
        return hosts

    def starting(self, host: WarmHost) -> AbstractContextManager[None]:
        """The block waits for a host; raises `ClusterError` if it cannot start."""
        return starting(f"engine {1 + self._taken.index(host)}", _memory_asked_for(self.engine))

    def _start(self, kind: type, place: Place, *arguments: Any) -> Any:
        """A process for what is of *kind*, at its place."""
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
        if self.placed:
            options["scheduling_strategy"] = node_affinity(self._ray, place.node)
        if self.engine.device == "cuda":
            # Ray would hide all GPUs from a process that reserves none.
            variables = {
                "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, place.gpus)),
            }
            options["runtime_env"] = {"env_vars": variables}
        actor = self._ray.remote(kind).options(**options).remote(*arguments)
        self._all.append(actor)
        return actor

    def new_run(self) -> Path:
        """A folder for a run's files.

        The run before is over: its hosts are idle, its files go, and so does all KV, whose versions would be mistaken.
        """
        self._idle, self._taken = [*self._taken, *self._idle], []
        if self._run_folder is not None:
            shutil.rmtree(self._run_folder, ignore_errors=True)
        kv_folder = Path(str(self.engine.kv_folder))
        for version in kv_folder.iterdir():
            shutil.rmtree(version, ignore_errors=True)
        self._run_folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        return self._run_folder

    def wait(self, calls: list[Any], timeout_s: float | None) -> list[Any]:
        """Those of some calls that are done, after waiting for at least one, at most so long."""
        done, _ = self._ray.wait(calls, num_returns=1, timeout=CALL_TIMEOUT_S if timeout_s is None else timeout_s)
        if not done and timeout_s is None:
            raise TimeoutError(f"no call to another process was over in {CALL_TIMEOUT_S:g} s")
        return list(done)

    def give_back(self, host: WarmHost) -> None:
        """The function that had it is gone."""
        self._taken.remove(host)
        self._idle.append(host)

    def discard(self, host: WarmHost) -> None:
        """Never hand it out again: its process is dead, or is ended."""
        self._taken.remove(host)
        self._ray.kill(host.actor)

    def learners(self, places: Sequence[Place]) -> list[Any]:
        """Hosts of ranks, one a place of one GPU."""
        idle = [(place, actor) for place, actor in self._learners if not self.some_died([actor])]
        self._learners = list(idle)
        chosen = []
        for wanted in places:
            there = next((pair for pair in idle if not self.placed or pair[0] == wanted), None)
            if there is not None:
                idle.remove(there)
            else:
                there = wanted, self._start(LearnerHost, wanted)
                self._learners.append(there)
            chosen.append(there[1])
        with starting(
            f"one of {len(places)} ranks of the learner", "the model's weights, gradients and Adam's moments"
        ):
            self.get([actor.ready.remote() for actor in chosen], START_TIMEOUT_S)
        return chosen

    def end_learners(self) -> None:
        """End the processes of all ranks: those whose group has broken cannot meet again."""
        for _, actor in self._learners:
            self._ray.kill(actor)
        self._learners = []

    def some_died(self, actors: Sequence[Any]) -> bool:
        """Whether one of some actors is known to be dead; one that is at work is not."""
        calls = [actor.ready.remote() for actor in actors]
        done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=DEATH_TIMEOUT_S)
        for call in done:
            try:
                self.get(call)
            except self._ray.exceptions.RayActorError:
                return True
        return False

    def result(self, refs: Any) -> Any:
        """What the calls of a run returned; of several that work together, the first failure is raised at once.

        Raises:
            HostDied: a process died.
            LearnerLost: a rank of the learner missed another.
            TimeoutError: they took too long.
        """
        try:
            if isinstance(refs, list):
                self._wait_for_all(refs)
            return self.get(refs)
        except self._ray.exceptions.RayActorError as error:
            raise HostDied(death(error) or str(error)) from error
        except LearnerLost as error:
            raise LearnerLost(last_line(error)) from error

    def _wait_for_all(self, calls: list[Any]) -> None:
        """Wait until all are done or one has failed: the others may wait for that one."""
        ends_s = time.monotonic() + CALL_TIMEOUT_S
        while calls:
            done, calls = self._ray.wait(calls, num_returns=1, timeout=max(ends_s - time.monotonic(), 0.0))
            if not done:
                raise TimeoutError(f"a call to another process took more than {CALL_TIMEOUT_S:g} s")
            self.get(done)

    def get(self, refs: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """What calls returned.

        Raises:
            TimeoutError: they took too long.
            RayActorError: the process died.
            ClusterError: it had no space to write to.
        """
        try:
            return self._ray.get(refs, timeout=timeout_s)
        except self._ray.exceptions.GetTimeoutError as error:
            raise TimeoutError(f"a call to another process took more than {timeout_s:g} s") from error
        except Exception as error:  # of any kind: libraries have their own for files
            full = no_space(error, self.folder)
            if full is None:
                raise
            raise full from error

    def close(self) -> None:
        """End all processes, delete all files."""
        with uninterrupted(), ExitStack() as ending:
            ending.callback(shutil.rmtree, self.folder, ignore_errors=True)
            ending.callback(self._cluster.close)
            if self._ray.is_initialized():
                for actor in self._all:
                    self._ray.kill(actor)


def _memory_asked_for(engine: EngineSettings) -> str:
    kv = f"{engine.kv_bytes} bytes" if engine.num_kv_blocks is None else f"num_kv_blocks={engine.num_kv_blocks}"
    return f"the weights in {engine.model} and KV of {kv}, block_tokens={engine.block_tokens}"
