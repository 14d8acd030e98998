"""`ProfiledCosts`: what things take on the machine that `simrl profile` measured, for the same simulator."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from simrl.policies.contract import Role
from simrl.simulator.costs import DoesNotFit, NodeType
from simrl.simulator.movement import Pull, SyncWay
from simrl.simulator.network import Load
from simrl.traces.batches import micro_batches, mini_batches, padded_tokens, shares
from simrl.traces.iteration import IterationTimes
from simrl.traces.job import Engine as EngineSpec
from simrl.traces.job import Job
from simrl.traces.parameters import Parameter, Parameters
from simrl.traces.profile import Learner, Profile, Quartiles

TRAINED_BYTES = 12  # a parameter: float32 weights and Adam's two moments, as the learner keeps them


class ProfiledCosts:
    """A `CostModel` that reads a profile. A GPU is one of the profile's: on CPUs, one core.

    What the profile does not hold is refused, not guessed: tensor parallelism other than the measured, PPO, longer
    texts than the engine takes. A learner of a size that was not measured is taken for the one nearest in size.

    Args:
        job: What is trained; the profile says which model really ran.
        engine: Options; limits of the engine that are not given are the profile's.
        profile: What was measured.
        nodes: Number of machines.
        gpus_per_node: GPUs of each.
        parameters: Gets every number that is read from the profile.
        path: Where the profile is from, to name it as the source.
        clock: Of the real run that this is to be like. On the "virtual" one only what processes compute takes time:
            nothing between iterations, CPU seconds of the busiest learner rank.

    Raises:
        ValueError: the job is PPO, or a limit is larger than that of the profiled engine.
    """

    wakes_side_by_side = True  # as `Movement`'s

    def __init__(
        self,
        job: Job,
        engine: EngineSpec,
        profile: Profile,
        *,
        nodes: int,
        gpus_per_node: int,
        parameters: Parameters,
        path: str | Path,
        clock: Literal["wall", "virtual"] = "wall",
    ) -> None:
        self._source = f"profile {Path(path).name} ({profile.date})"
        if job.algorithm != profile.learners[0].algorithm:
            raise ValueError(
                f"job.algorithm={job.algorithm!r} is not in the {self._source}; measured: "
                f"{profile.learners[0].algorithm!r}"
            )
        self.job, self.engine, self.profile = job, engine, profile
        self.nodes, self._gpus = nodes, nodes * gpus_per_node
        self._parameters, self._clock = parameters, clock
        self.prefix_caching, self.store_bytes_per_s = engine.prefix_caching, math.inf
        self.block_tokens = profile.engine.block_tokens
        self.max_num_seqs = self._limit("max_num_seqs", engine.max_num_seqs, profile.engine.max_num_seqs)
        self.max_batched_tokens = self._limit(
            "max_num_batched_tokens", engine.max_num_batched_tokens, profile.engine.max_num_batched_tokens
        )
        self.weight_bytes = self._read("model.weight_bytes", profile.model.weight_bytes, "B")
        self.kv_token_bytes = self._read("kv.block_bytes", profile.kv.block_bytes, "B") / self.block_tokens
        kv = profile.kv
        self._kv_fixed_s = self._read("kv.fixed_s", kv.save.fixed_s + kv.load.fixed_s, "s, save and load")
        self._kv_token_s = self._read("kv.token_s", kv.save.token_s + kv.load.token_s, "s a token, save and load")
        self.node = self._node(gpus_per_node)
        self.memory = self.learning = self.movement = self  # parts of `Costs`; here all of them read the profile
        self.times = functools.cache(self._times)
        self.alone_factor = 1.0
        if clock == profile.clock == "virtual":
            other_clock = profile.iterations.other_clock
            self.alone_factor = self._read("iterations.alone", other_clock.median, "1, where no other uses the core")
        self._flat_batch = functools.cache(self._compute_flat_batch)

    def _limit(self, name: str, given: int | None, measured: int) -> int:
        if given is None or given == measured:
            return int(self._read(f"engine.{name}", measured, "1"))
        if given > measured:
            raise ValueError(f"engine.{name}={given} is beyond the {self._source}; allowed: at most {measured}")
        self._parameters.note(Parameter(f"profile.engine.{name}", given, "1", "assumed", "set by the user"))
        return given

    def _read(self, key: str, value: float, unit: str) -> float:
        """A number of the profile, noted with the run."""
        self._parameters.note(Parameter(f"profile.{key}", value, unit, "measured", self._source))
        return value

    def _median(self, key: str, measured: Quartiles) -> float:
        unit = f"s, median of {measured.count}; quartiles {measured.q1:.4g} to {measured.q3:.4g}"
        return self._read(key, measured.median, unit)

    def _node(self, gpus: int) -> NodeType:
        machine = self.profile.machine
        rate = self.kv_token_bytes / self._kv_token_s if self._kv_token_s else math.inf
        return NodeType(
            name=f"{gpus} x {self._gpu_name()}",
            gpu=self._gpu_name(),
            gpus=gpus,
            host_memory_bytes=self._read("machine.memory_bytes", machine.memory_bytes, "B"),
            host_bytes_per_s=rate,
            nic_bytes_per_s=rate,
            link_bytes_per_s=rate,
            gpu_memory_bytes=machine.memory_bytes / gpus,
        )

    def _gpu_name(self) -> str:
        machine = self.profile.machine
        return machine.gpus[0] if machine.gpus else f"core of {machine.processor}"

    # --- engine ---

    def _times(self, gpus: int) -> IterationTimes:
        """Iteration times of the measured engine.

        Raises:
            ValueError: it had another number of GPUs.
        """
        measured = self.profile.engine.tensor_parallel
        if gpus != measured:
            raise ValueError(f"an engine of {gpus} GPUs is not in the {self._source}; measured: {measured}")
        times = self.profile.iteration_times(self._source, self._clock)
        self._read("iterations.decode", times.decode_s(1, 512), "s, one response at 512 tokens")
        self._read("iterations.prefill", times.prefill_s(256, 128), "s, one prompt of 256 tokens")
        if self._clock == "wall":
            self._median("iterations.step_overhead_s", self.profile.iterations.step_overhead_s)
        if self._clock != self.profile.clock:
            self._read("iterations.other_clock", self.profile.iterations.other_clock.median, "1")
        return times

    def flat_batch(self, gpus: int, context: float) -> int:
        """Largest batch at which decode latency counts as flat, in steps of 64 tokens of mean context."""
        return self._flat_batch(gpus, 64 * math.ceil(context / 64))

    def _compute_flat_batch(self, gpus: int, context: int) -> int:
        tolerance = self._parameters.number("serving.flat_tolerance")
        return min(self.times(gpus).flat_batch(context, tolerance), self.max_num_seqs)

    def kv_blocks(self, gpus: int, learner_world: int | None) -> int:
        """KV blocks of the measured engine; the learner's state does not share memory with them."""
        return int(self._read("engine.kv_blocks", self.profile.engine.kv_blocks, f"blocks of {self.block_tokens}"))

    def check_fit(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> None:
        """Raise `DoesNotFit` unless the measured engine can have this size and takes the longest text."""
        if not {"prefill", "decode"} & set(roles):
            return
        measured = self.profile.engine
        if gpus != measured.tensor_parallel:
            raise DoesNotFit(
                f"an engine of {gpus} GPUs is not in the {self._source}, whose engine has {measured.tensor_parallel}"
                " (engine.tensor_parallel)"
            )
        longest = self.job.max_prompt_tokens + self.job.max_response_tokens
        room = min(measured.max_model_len, measured.kv_blocks * measured.block_tokens)
        if longest > room:
            raise DoesNotFit(
                f"texts of {longest} tokens (job.max_prompt_tokens + job.max_response_tokens) do not fit: the engine"
                f" of the {self._source} takes {room}"
            )

    # --- preparation and learning ---

    def prepare_s(self, tokens: Sequence[int], gpus: int, *, loaded: bool = False) -> float:
        """Log-probs under the actor, whose newest weights are taken in first unless they are *loaded*.

        The reference model of a KL coefficient was not measured, nor is there one by default.
        """
        if not tokens:
            return 0.0
        preparation = self.profile.preparation
        fixed_s = self._read("preparation.fixed_s", preparation.score.fixed_s, "s")
        token_s = self._read("preparation.token_s", preparation.score.token_s, "s a padded token")
        load_s = 0.0 if loaded else self._median("preparation.load_s", preparation.load_s)
        cut = micro_batches(tokens, range(len(tokens)), self._micro_batch_tokens())
        return load_s + fixed_s + token_s * padded_tokens(tokens, cut)

    def _micro_batch_tokens(self) -> int:
        return int(self._read("micro_batch_tokens", self.profile.micro_batch_tokens, "padded tokens at most"))

    def learn_s(self, tokens: Sequence[int], gpus: int, nodes: int) -> float:
        """An update on *gpus* ranks: optimizer steps, micro-batches and padded tokens, cut as the learner cuts them.

        All ranks do as many micro-batches as the one with the most; the one with the most tokens sets the pace.
        """
        learner = self._learner(gpus)
        wall = self._clock == "wall"
        update, kind = (learner.update, "update") if wall else (learner.update_cpu, "update_cpu")
        key = f"learner.{learner.world}.{kind}"
        optimizer_step_s = self._read(f"{key}.optimizer_step_s", update.optimizer_step_s, "s")
        micro_batch_s = self._read(f"{key}.micro_batch_s", update.micro_batch_s, "s")
        token_s = self._read(f"{key}.token_s", update.token_s, "s a padded token of a rank")
        limit, groups = self._micro_batch_tokens(), [i // self.job.responses_per_prompt for i in range(len(tokens))]
        steps = mini_batches(groups, self.job.mini_batch_prompts)
        rank_tokens, count = [0] * gpus, 0
        for step in steps:
            cuts = [micro_batches(tokens, share, limit) for share in shares(tokens, step, gpus)]
            count += max(map(len, cuts))
            rank_tokens = [done + padded_tokens(tokens, cut) for done, cut in zip(rank_tokens, cuts, strict=True)]
        return optimizer_step_s * len(steps) + micro_batch_s * count + token_s * max(rank_tokens)

    def _learner(self, world: int) -> Learner:
        learner = self.profile.learner(world)
        self._read(f"learner.for_{world}_ranks", learner.world, "ranks of the learner that stands for it")
        return learner

    # --- movement: through files and processes of one machine: what is measured passes, and no link is shared ---

    def sync_load(self, way: SyncWay, ranks: int, *, rebuilt: bool, crossing: float) -> Load:
        """The learner writes its weights, then every engine takes them in."""
        learner = self._learner(self._gpus)
        key = f"learner.{learner.world}.export"
        if self._clock == "virtual":
            export_s = self._median(f"{key}_cpu_s", learner.export_cpu_s)
        else:
            export_s = self._median(f"{key}_s", learner.export_s)
        return Load(export_s + self._median("load_weights_s", self.profile.load_weights_s))

    def kv_load(self, kv_tokens: int) -> Load:
        """KV into files by one engine and out of them by another, whole blocks of one response; nodes share files."""
        whole = kv_tokens // self.block_tokens * self.block_tokens
        return Load(self._kv_fixed_s + self._kv_token_s * whole)

    def pull_load(self, what: Pull) -> Load:
        """Model and programs are on the machine."""
        return Load(0.0)

    def resident_bytes(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """What a function keeps of each GPU in host memory: engine weights and its share of the learner's state."""
        engine = self.weight_bytes / gpus if set(roles) - {"learn"} else 0.0
        learner = TRAINED_BYTES * self.profile.model.parameters / learner_world if learner_world is not None else 0.0
        return engine + learner

    def park_load(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> Load:
        """The engine gives its memory back; a learner's state stays where it is."""
        return Load(self._median("park_s", self.profile.park_s) if set(roles) - {"learn"} else 0.0)

    def wake_load(self, gpus: int, roles: Sequence[Role], learner_world: int | None, awake: int | None = None) -> Load:
        """The engine gets it again; with *awake* engines in all it takes as long as it was measured for so many."""
        if not set(roles) - {"learn"}:
            return Load(0.0)
        most = len(self.profile.wake_s)
        number = most if awake is None else min(awake, most)
        return Load(self._median(f"wake_s.{number}", self.profile.wake_s[number - 1]))

    def switch_load(
        self, old: Role | None, new: Role, gpus: int, learner_world: int | None, awake: int | None = None
    ) -> Load:
        """The engine sleeps while its function prepares or learns."""
        if old is None:  # after a start or a wake
            return self.park_load(gpus, (new,), learner_world) if new == "prepare" else Load(0.0)
        engine_before, engine_after = (role in ("prefill", "decode") for role in (old, new))
        if engine_before == engine_after:
            return Load(0.0)
        return self.wake_load(gpus, (new,), None, awake) if engine_after else self.park_load(gpus, (old,), None)

    # --- starts ---

    def start_phases(self, gpus: int, roles: Sequence[Role], *, cached: bool) -> dict[str, float]:
        """Expected seconds of each phase of an engine's cold start; nothing is downloaded.

        Functions that only learn start at once: the learner's ranks wait in processes of their own.
        """
        phases = {"download": 0.0}
        if set(roles) - {"learn"}:
            measured = self.profile.engine_start.phases_s
            phases |= {name: self._read(f"engine_start.{name}", seconds, "s") for name, seconds in measured.items()}
        return phases

    def start_spread(self, phase: str = "") -> float:
        """Standard deviation of ln of a start's seconds; 0 where one start was measured."""
        totals = self.profile.engine_start.total_s
        spread = statistics.stdev(map(math.log, totals)) if len(totals) > 1 else 0.0
        return self._read("engine_start.spread", spread, f"1, over {len(totals)} starts")
