"""How long things take and how much memory they need: pure arithmetic over sourced parameters.

Time-keeping is elsewhere; nothing here knows the clock. Equations are in docs/model.md.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from simrl.simulator.engine import BLOCK_TOKENS
from simrl.simulator.learning import Learning
from simrl.simulator.memory import DoesNotFit as DoesNotFit  # for those who import it from here
from simrl.simulator.memory import Memory
from simrl.simulator.movement import Movement
from simrl.traces.iteration import Execution, IterationTimes, graph_batches, load_iteration_times
from simrl.traces.job import Engine as EngineSpec
from simrl.traces.job import Job
from simrl.traces.parameters import Parameter, Parameters, check_known, set_by_user
from simrl.traces.roofline import load_roofline

if TYPE_CHECKING:
    from simrl.simulator.profiled import ProfiledCosts

CostModel: TypeAlias = "Costs | ProfiledCosts"
"""What the simulated cluster asks for seconds and bytes, of one job on one kind of node."""


@dataclass(frozen=True, slots=True)
class NodeType:
    """A machine: what it has and how fast its links are, in bytes and bytes a second."""

    name: str
    gpu: str
    gpus: int
    host_memory_bytes: float
    host_bytes_per_s: float
    nic_bytes_per_s: float
    link_bytes_per_s: float
    gpu_memory_bytes: float

    @classmethod
    def load(cls, name: str, parameters: Parameters) -> NodeType:
        """The node type *name* out of the parameter table."""
        check_known("cluster.node_type", name, parameters.names_in("node"))
        number, node, gpu = parameters.number, f"node.{name}", parameters.name(f"node.{name}.gpu")
        return cls(
            name=name,
            gpu=gpu,
            gpus=int(number(f"{node}.gpus")),
            host_memory_bytes=number(f"{node}.host_memory_bytes"),
            host_bytes_per_s=number(f"{node}.host_bytes_per_s"),
            nic_bytes_per_s=number(f"{node}.nic_bytes_per_s") * number("network.efficiency"),
            link_bytes_per_s=number(f"gpu.{gpu}.link_bytes_per_s"),
            gpu_memory_bytes=number(f"gpu.{gpu}.memory_bytes"),
        )


class Costs:
    """Seconds and bytes for one job on one kind of node.

    Args:
        job: What is trained.
        engine: The rollout engine's options.
        node: The machines' type.
        nodes: How many of them.
        parameters: Where constants come from; what is read is noted there.

    Attributes:
        memory: What has room where.
        learning: What preparation and learning take.
        movement: What moves between GPUs, hosts and nodes, and the phases of a start.
        times: Iteration times of an engine, by its GPUs.
    """

    def __init__(self, job: Job, engine: EngineSpec, node: NodeType, nodes: int, parameters: Parameters) -> None:
        check_known("engine.preset", engine.preset, parameters.names_in("engine"))
        self.job, self.engine, self.node, self.nodes = job, engine, node, nodes
        self.model, self._parameters = parameters.model(job.model), parameters
        self.max_num_seqs = int(self._option("max_num_seqs"))
        self.max_batched_tokens = int(self._option("max_num_batched_tokens"))
        utilization = self._option("gpu_memory_utilization")
        self._eager = bool(self._option("enforce_eager"))
        self.block_tokens, self.prefix_caching = BLOCK_TOKENS, engine.prefix_caching
        self.memory = Memory(job, self.model, engine, utilization, node, parameters)
        self.learning = Learning(job, self.model, node, parameters)
        self.store_bytes_per_s = parameters.number("network.store_bytes_per_s")
        self.alone_factor = 1.0  # of iteration times where a node has one engine at work: GPUs do not share caches
        self.movement = Movement(self.memory, node, parameters, eager=self._eager)
        self.times = functools.cache(self._times)
        self._flat_batch = functools.cache(self._compute_flat_batch)

    def _option(self, name: str) -> float:
        """An engine option: the user's, else the preset's."""
        key = f"engine.{self.engine.preset}.{name}"
        given: float | bool | None = getattr(self.engine, name)
        if given is None:
            return self._parameters.number(key)
        shipped = self._parameters.entry(key)
        self._parameters.note(set_by_user(shipped, given if isinstance(given, bool) else float(given)))
        return given

    # --- engine iterations ---

    def _times(self, gpus: int) -> IterationTimes:
        """Iteration times of an engine that is tensor-parallel over *gpus* GPUs."""
        run = self._execution()
        gpu = self.node.gpu
        times = load_iteration_times(self.model, gpu, gpus, run)
        times = times or load_roofline(self.model, gpu, gpus, self._parameters, run)
        key = f"iteration_times.{self.model.name}.{gpu}.tp{gpus}"
        seconds = times.decode_s(1, 512)
        # At its worst the roofline is half or one and a half times the tables where there are any.
        ends = (0.5 * seconds, 2 * seconds) if times.status == "assumed" else (None, None)
        self._parameters.note(
            Parameter(key, seconds, "s, one response at 512 tokens", times.status, times.source, *ends)
        )
        return times

    def _overhead_s(self) -> float:
        given = self.engine.overhead_s
        if given is not None:
            key = f"engine.{self.engine.preset}.overhead_s"
            self._parameters.note(Parameter(key, given, "s", "assumed", "set by the user", given, given))
            return given
        return self._parameters.number(f"engine.{self.engine.preset}.overhead_s_per_layer") * self.model.layers

    def _execution(self) -> Execution:
        """What the engine preset and the user's options make of the kernel times."""
        number, preset = self._parameters.number, f"engine.{self.engine.preset}"
        launch_s, batches = 0.0, tuple[int, ...]()
        if self._eager:
            launch_s = number(f"{preset}.launch_s_per_layer") * self.model.layers
        else:
            largest = min(int(number(f"{preset}.graph_max_batch")), self.max_batched_tokens)
            batches = graph_batches(largest, 256, int(number(f"{preset}.graph_wide_step")))
        factor = number("serving.fp8_kv_read_factor") if self.engine.kv_cache_dtype == "fp8" else 1.0
        return Execution(self._option("calibration"), self._overhead_s(), launch_s, batches, factor)

    def flat_batch(self, gpus: int, context: float) -> int:
        """Largest batch at which decode latency counts as flat, on *gpus* GPUs at a mean context, in steps of 64."""
        return self._flat_batch(gpus, 64 * math.ceil(context / 64))

    def _compute_flat_batch(self, gpus: int, context: int) -> int:
        tolerance = self._parameters.number("serving.flat_tolerance")
        return min(self.times(gpus).flat_batch(context, tolerance), self.max_num_seqs)
