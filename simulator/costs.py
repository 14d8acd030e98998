"""How long things take and how much memory they need: pure arithmetic over sourced parameters.

Time-keeping is elsewhere; nothing here knows the clock. Equations are in docs/model.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from simrl.policies.contract import Role
from simrl.simulator.engine import BLOCK_TOKENS
from simrl.simulator.learning import Learning
from simrl.simulator.memory import DoesNotFit as DoesNotFit  # for those who import it from here
from simrl.simulator.memory import Memory
from simrl.simulator.movement import Movement, Pull, SyncWay
from simrl.simulator.network import Load
from simrl.traces.iteration import (
    Execution,
    IterationTimes,
    graph_batches,
    load_iteration_times,
)
from simrl.traces.job import Engine as EngineSpec
from simrl.traces.job import Job
from simrl.traces.models import Model
from simrl.traces.parameters import Parameter, Parameters, check_known, set_by_user
from simrl.traces.roofline import load_roofline


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
        gpu = parameters.name(f"node.{name}.gpu")
        return cls(
            name=name,
            gpu=gpu,
            gpus=int(parameters.number(f"node.{name}.gpus")),
            host_memory_bytes=parameters.number(f"node.{name}.host_memory_bytes"),
            host_bytes_per_s=parameters.number(f"node.{name}.host_bytes_per_s"),
            nic_bytes_per_s=parameters.number(f"node.{name}.nic_bytes_per_s") * parameters.number("network.efficiency"),
            link_bytes_per_s=parameters.number(f"gpu.{gpu}.link_bytes_per_s"),
            gpu_memory_bytes=parameters.number(f"gpu.{gpu}.memory_bytes"),
        )


class CostModel(Protocol):
    """What the simulated cluster asks: seconds and bytes for one job on one kind of node. See `Costs`."""

    job: Job
    engine: EngineSpec
    node: NodeType
    nodes: int
    block_tokens: int
    max_num_seqs: int
    max_batched_tokens: int
    prefix_caching: bool
    store_bytes_per_s: float

    @property
    def times(self) -> Callable[[int], IterationTimes]:
        """Iteration times of an engine, by its GPUs."""

    def flat_batch(self, gpus: int, context: float) -> int:
        """Largest batch at which decode latency counts as flat."""

    def kv_blocks(self, gpus: int, learner_world: int | None) -> int:
        """KV blocks of an engine."""

    def check_fit(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> None:
        """Raise `DoesNotFit` unless each role of a function has room on its GPUs."""

    def prepare_s(self, tokens: Sequence[int], gpus: int, *, loaded: bool = False) -> float:
        """Preparation of responses of so many tokens each, prompts included, on one function."""

    def learn_s(self, tokens: Sequence[int], gpus: int, nodes: int) -> float:
        """An update with a step's responses of so many tokens each, prompts included, in the order of their ids."""

    def kv_load(self, kv_tokens: int) -> Load:
        """The KV of so many tokens."""

    def transfer_s(self, kv_tokens: int, gpus: int, *, same_node: bool) -> float:
        """KV from one function to another, over idle links."""

    def resident_bytes(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """What a parked function keeps in host memory, of each GPU."""

    def park_load(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> Load:
        """GPU to host."""

    def park_s(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """GPU to host, over idle links."""

    def wake_load(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> Load:
        """Host to GPU."""

    def wake_s(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """Host to GPU, over idle links."""

    def switch_load(self, old: Role | None, new: Role, gpus: int, learner_world: int | None) -> Load:
        """Changing the awake role."""

    def sync_load(self, way: SyncWay, ranks: int, *, rebuilt: bool, crossing: float) -> Load:
        """New weights into engines; see `Movement.sync_load`."""

    def sync_s(self, gpus: int, nodes: int) -> float:
        """New weights into engines, over idle links."""

    def pull_load(self, what: Pull) -> Load:
        """Image or weights onto a node's disk."""

    def start_phases(self, gpus: int, roles: Sequence[Role], *, cached: bool) -> dict[str, float]:
        """Expected seconds of each phase of a cold start, "download" among them."""

    def start_spread(self, phase: str = "") -> float:
        """Standard deviation of ln of a phase's seconds."""


class Costs:
    """Seconds and bytes for one job on one kind of node.

    Args:
        job: What is trained.
        engine: The rollout engine's options.
        node: The machines' type.
        nodes: How many of them.
        parameters: Where constants come from; what is read is noted there.
    """

    def __init__(self, job: Job, engine: EngineSpec, node: NodeType, nodes: int, parameters: Parameters) -> None:
        check_known("engine.preset", engine.preset, parameters.names_in("engine"))
        self.job, self.node, self.nodes = job, node, nodes
        self.model: Model = parameters.model(job.model)
        self.engine = engine
        self._parameters = parameters
        self.max_num_seqs = int(self._option("max_num_seqs"))
        self.max_batched_tokens = int(self._option("max_num_batched_tokens"))
        utilization = self._option("gpu_memory_utilization")
        self._eager = bool(self._option("enforce_eager"))
        self.block_tokens = BLOCK_TOKENS
        self.prefix_caching = engine.prefix_caching
        self.memory = Memory(job, self.model, engine, utilization, node, parameters)
        self.learning = Learning(job, self.model, node, parameters)
        self.store_bytes_per_s = parameters.number("network.store_bytes_per_s")
        self.movement = Movement(self.memory, node, parameters, eager=self._eager)
        self.weight_bytes, self.kv_token_bytes = self.memory.weight_bytes, self.memory.kv_token_bytes
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
        key = f"iteration_times.{self.model.name}.{self.node.gpu}.tp{gpus}"
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

    # --- memory, preparation and learning: see `Memory` and `Learning` ---

    def kv_blocks(self, gpus: int, learner_world: int | None) -> int:
        """KV blocks of an engine."""
        return self.memory.kv_blocks(gpus, learner_world)

    def check_fit(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> None:
        """Raise `DoesNotFit` unless each role of a function has room on its GPUs."""
        self.memory.check_fit(gpus, roles, learner_world)

    def resident_bytes(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """What a function keeps on each GPU between its tasks, and takes along when it is parked."""
        return self.memory.resident_bytes(gpus, roles, learner_world)

    def prepare_s(self, tokens: Sequence[int], gpus: int, *, loaded: bool = False) -> float:
        """Preparation of responses of so many tokens each, prompts included, on one function."""
        return self.learning.prepare_s(tokens, gpus, loaded=loaded)

    def learn_s(self, tokens: Sequence[int], gpus: int, nodes: int) -> float:
        """An update with a step's responses of so many tokens each, prompts included, in the order of their ids."""
        return self.learning.learn_s(tokens, gpus, nodes)

    # --- movement and starts: see `Movement` ---

    def kv_load(self, kv_tokens: int) -> Load:
        """The KV of so many tokens."""
        return self.movement.kv_load(kv_tokens)

    def transfer_s(self, kv_tokens: int, gpus: int, *, same_node: bool) -> float:
        """KV between functions of *gpus* GPUs, alone."""
        return self.movement.transfer_s(kv_tokens, gpus, same_node=same_node)

    def park_load(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> Load:
        """GPU to host."""
        return self.movement.park_load(gpus, learner_world)

    def park_s(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """Parking, alone."""
        return self.movement.park_s(gpus, learner_world)

    def wake_load(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> Load:
        """Host to GPU."""
        return self.movement.wake_load(gpus, roles, learner_world)

    def wake_s(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """Waking, alone."""
        return self.movement.wake_s(gpus, roles, learner_world)

    def switch_load(self, old: Role | None, new: Role, gpus: int, learner_world: int | None) -> Load:
        """Changing the awake role."""
        return self.movement.switch_load(old, new, gpus, learner_world)

    def switch_s(self, old: Role | None, new: Role, learner_world: int | None) -> float:
        """Changing the awake role, alone."""
        return self.movement.switch_s(old, new, learner_world)

    def sync_load(self, way: SyncWay, ranks: int, *, rebuilt: bool, crossing: float) -> Load:
        """New weights into engines."""
        return self.movement.sync_load(way, ranks, rebuilt=rebuilt, crossing=crossing)

    def sync_s(self, gpus: int, nodes: int) -> float:
        """New weights into colocated engines, alone."""
        return self.movement.sync_s(gpus, nodes)

    def pull_load(self, what: Pull) -> Load:
        """Image or weights onto a node's disk."""
        return self.movement.pull_load(what)

    def start_phases(self, gpus: int, roles: Sequence[Role], *, cached: bool) -> dict[str, float]:
        """Expected seconds of each phase of a cold start; *cached*: the node has the weights on its disk."""
        return self.movement.start_phases(gpus, roles, cached=cached)

    def start_spread(self, phase: str = "") -> float:
        """Standard deviation of ln of a phase's seconds."""
        return self.movement.start_spread(phase)
