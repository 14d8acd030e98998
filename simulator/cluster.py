"""Nodes, GPUs and the network between them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import simpy

from simrl.simulator.costs import Costs, NodeType

Gpus = tuple[int, ...]  # indices of GPUs on one node


@dataclass(slots=True)
class NodeState:
    """One machine of the cluster."""

    index: int
    free: list[int]
    sends_until_s: float = 0.0
    receives_until_s: float = 0.0
    weights_cached: simpy.Event | None = None  # on its disk, once this has happened


@dataclass(slots=True)
class _Waiting:
    gpus: int
    node: int | None
    granted: simpy.Event


class GpuPool:
    """Leases of whole GPUs, all GPUs of a lease on one node, first come first served.

    A request that waits holds up later ones for the nodes that it could be served by, and no others.
    """

    def __init__(self, env: simpy.Environment, nodes: int, node_type: NodeType) -> None:
        self.env = env
        self.nodes = [NodeState(index, list(range(node_type.gpus))) for index in range(nodes)]
        self._queue: deque[_Waiting] = deque()

    def lease(self, gpus: int, node: int | None) -> simpy.Event:
        """An event that fires with (node, GPU indices) when *gpus* GPUs of *node*, or of any node, are granted."""
        waiting = _Waiting(gpus, node, self.env.event())
        self._queue.append(waiting)
        self._grant()
        return waiting.granted

    def give_back(self, node: int, gpu_ids: Gpus) -> None:
        """End a lease."""
        state = self.nodes[node]
        assert not set(gpu_ids) & set(state.free), "a GPU was given back twice"
        state.free = sorted([*state.free, *gpu_ids])
        self._grant()

    def _grant(self) -> None:
        still: deque[_Waiting] = deque()
        taken: set[int] = set()  # nodes that an earlier request waits for
        while self._queue:
            waiting = self._queue.popleft()
            wanted = [n for n in self.nodes if waiting.node in (None, n.index) and n.index not in taken]
            state = next((n for n in wanted if len(n.free) >= waiting.gpus), None)
            if state is None:
                still.append(waiting)
                taken.update(node.index for node in wanted)
                continue
            gpu_ids, state.free = tuple(state.free[: waiting.gpus]), state.free[waiting.gpus :]
            waiting.granted.succeed((state.index, gpu_ids))
        self._queue = still


class Network:
    """KV transfers between nodes. A NIC serves them one after the other, so its bytes are shared, never doubled."""

    def __init__(self, env: simpy.Environment, nodes: list[NodeState], costs: Costs) -> None:
        self.env, self.nodes, self.costs = env, nodes, costs

    def send(self, source: int, target: int, kv_tokens: int, gpus: int) -> simpy.Event:
        """A transfer that begins now, or when both NICs have finished what they were given before.

        *gpus* is the size of the smaller of the two functions.
        """
        if source == target:
            return self.env.timeout(self.costs.transfer_s(kv_tokens, gpus, same_node=True))
        sender, receiver = self.nodes[source], self.nodes[target]
        start_s = max(self.env.now, sender.sends_until_s, receiver.receives_until_s)
        end_s = start_s + self.costs.transfer_s(kv_tokens, gpus, same_node=False)
        sender.sends_until_s = receiver.receives_until_s = end_s - self.costs.latency_s
        return self.env.timeout(end_s - self.env.now)
