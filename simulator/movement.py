"""What has to move for KV, weights, parking and cold starts: pure arithmetic.

Equations are in docs/model.md, section "Movement". Who shares which link with whom is the network's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from simrl.policies.contract import Role
from simrl.simulator.memory import Memory
from simrl.simulator.network import Load
from simrl.traces.parameters import Parameters

if TYPE_CHECKING:
    from simrl.simulator.costs import NodeType

SyncWay = Literal["in place", "nccl", "object-store"]
Pull = Literal["image", "weights"]
PULLS: dict[str, Pull] = {"image": "image", "download": "weights"}
"""Phases of a cold start that fetch something onto a node's disk, and what."""


class Movement:
    """Bytes that move for one job on one kind of node, and what passes before they do.

    Args:
        memory: What is where.
        node: The machines' type.
        parameters: Where constants come from.
        eager: Engines launch kernel by kernel: nothing to compile or capture.

    Attributes:
        wakes_side_by_side: Engines that wake on one node are slower the more there are.
    """

    wakes_side_by_side = False

    def __init__(self, memory: Memory, node: NodeType, parameters: Parameters, *, eager: bool) -> None:
        self.memory, self.node, self._number, self._eager = memory, node, parameters.number, eager

    # --- KV ---

    def kv_load(self, kv_tokens: int) -> Load:
        """The KV of *kv_tokens* tokens."""
        return Load(self._number("network.latency_s"), kv_tokens * self.memory.kv_token_bytes)

    # --- parking, waking, changing role: over the host links of a function's GPUs ---

    def park_load(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> Load:
        """GPU to host. Engine weights have a host copy already (vLLM's sleep mode), the learner's state moves."""
        return Load(self._number("switch.engine_sleep_s"), gpus * self.memory.idle_state_bytes(learner_world))

    def wake_load(self, gpus: int, roles: Sequence[Role], learner_world: int | None, awake: int | None = None) -> Load:
        """Host to GPU: engine weights and the learner's state. Whether others are *awake* only matters on CPUs."""
        weights = self.memory.resident_bytes(gpus, roles, None)
        # The measured wake-up of small models includes their weights.
        fixed_s = max(self._number("switch.engine_wake_s") - weights / self.node.host_bytes_per_s, 0.0)
        return Load(fixed_s, gpus * (weights + self.memory.idle_state_bytes(learner_world)))

    def switch_load(
        self, old: Role | None, new: Role, gpus: int, learner_world: int | None, awake: int | None = None
    ) -> Load:
        """Changing the awake role. Prefill and decode share an engine, prepare and learn a trainer.

        After a start or a wake (*old* is None) both are ready. Offloaded state goes to the host when an engine wakes.
        """
        engine_before, engine_after = (role in ("prefill", "decode") for role in (old, new))
        offloaded = 0.0
        if self.memory.job.learner_offload and learner_world is not None:
            offloaded = gpus * self.memory.learner_bytes(learner_world)
        if old is None:
            return Load(0.0, 0.0 if engine_after else offloaded)
        if engine_before == engine_after:
            return Load(0.0)
        return Load(self._number("switch.engine_wake_s" if engine_after else "switch.engine_sleep_s"), offloaded)

    # --- weights ---

    def sync_load(self, way: SyncWay, ranks: int, *, rebuilt: bool, crossing: float) -> Load:
        """One copy of the newest weights, that goes through links to all who take it.

        Args:
            way: Resharded in place, broadcast, or written to the store and read from there.
            ranks: GPUs that take part.
            rebuilt: Their communicator has to be built first.
            crossing: The largest share of the copy that passes a NIC.
        """
        weights = self.memory.synced_bytes
        if way == "object-store":
            return Load(self._number("network.latency_s"), weights, self._number("network.store_node_bytes_per_s"))
        fixed_s = self._number("switch.sync_setup_s" if way == "in place" else "switch.broadcast_setup_s")
        if rebuilt:
            fixed_s += self._number("switch.communicator_s") + ranks * self._number("switch.communicator_rank_s")
        limit = self._number("switch.sync_bytes_per_s") / crossing if crossing else math.inf
        return Load(fixed_s, weights, limit)

    # --- cold starts ---

    def pull_load(self, what: Pull) -> Load:
        """The container's image or the weights, from the store onto a node's disk."""
        if what == "image":
            return Load(0.0, self._number("start.image_bytes"), self._number("start.image_bytes_per_s"))
        return Load(0.0, self.memory.weight_bytes, self._number("start.download_bytes_per_s"))

    def start_phases(self, gpus: int, roles: Sequence[Role], *, cached: bool) -> dict[str, float]:
        """Expected seconds of each phase of a cold start; *cached*: the node has the weights on its disk."""
        phases = {"runtime": self._number("start.runtime_s")}
        phases["download"] = 0.0 if cached else self.pull_load("weights").alone_s(math.inf)
        phases["weights"] = self.memory.weight_bytes / gpus / self._number("start.load_bytes_per_s")
        phases["init"] = self._number("start.init_s")
        if {"prefill", "decode"} & set(roles):
            if not self._eager:
                phases["compile"] = self._number("start.compile_s")
                phases["capture"] = self._number("start.capture_s")
            phases["warm_up"] = self._number("start.warm_up_s")
        return phases

    def start_spread(self, phase: str = "") -> float:
        """Standard deviation of ln of a phase's seconds."""
        return self._number("start.pull_spread" if phase in PULLS else "start.spread")
