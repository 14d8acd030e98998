"""Nodes, and leases of their GPUs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import simpy

from simrl.policies.contract import NodeCondition

Gpus = tuple[int, ...]  # indices of GPUs on one node


@dataclass(slots=True)
class NodeState:
    """One machine of the cluster."""

    index: int
    free: list[int]
    condition: NodeCondition = "up"


@dataclass(slots=True)
class _Waiting:
    gpus: int
    node: int | None
    same: Gpus | None
    granted: simpy.Event

    def may_be_on(self, node: NodeState) -> bool:
        """Whether GPUs of *node* would do."""
        return node.condition == "up" if self.node is None else node.index == self.node

    def chosen(self, free: Sequence[int]) -> Gpus | None:
        """GPUs to grant, of those that are free; None when they do not suffice."""
        if self.same is not None:
            return self.same if set(self.same) <= set(free) else None
        return tuple(free[: self.gpus]) if len(free) >= self.gpus else None


class GpuPool:
    """Leases of whole GPUs, all GPUs of a lease on one node, first come first served.

    Nodes are packed: of those that have room the first is taken, and of its free GPUs the first. A request that waits
    holds up later ones, smaller ones too, for the nodes that it could be served by, and no others.
    """

    def __init__(self, env: simpy.Environment, nodes: int, gpus_per_node: int) -> None:
        self.env = env
        self.nodes = [NodeState(index, list(range(gpus_per_node))) for index in range(nodes)]
        self._queue: deque[_Waiting] = deque()

    def lease(self, gpus: int, node: int | None, same: Gpus | None = None) -> simpy.Event:
        """An event that fires with (node, GPU indices) when *gpus* GPUs of *node*, or of any node, are granted.

        With *same* it has to be those of *node*.
        """
        waiting = _Waiting(gpus, node, same, self.env.event())
        self._queue.append(waiting)
        self._grant()
        return waiting.granted

    def nodes_with_room(self, gpus: int) -> list[int]:
        """Nodes that would grant a lease of *gpus* GPUs at once: enough are free, and nobody waits for them."""
        return [
            node.index
            for node in self.nodes
            if node.condition == "up"
            and len(node.free) >= gpus
            and not any(waiting.may_be_on(node) for waiting in self._queue)
        ]

    def withdraw(self, lease: simpy.Event) -> None:
        """Forget a request, or end the lease if it is granted already."""
        if lease.triggered:
            node, gpu_ids = lease.value  # type: ignore[misc]
            self.give_back(node, gpu_ids)
            return
        self._queue = deque(waiting for waiting in self._queue if waiting.granted is not lease)
        self._grant()  # those that it held up

    def give_back(self, node: int, gpu_ids: Gpus) -> None:
        """End a lease."""
        state = self.nodes[node]
        if state.condition == "lost":
            return
        assert not set(gpu_ids) & set(state.free), "a GPU was given back twice"
        state.free = sorted([*state.free, *gpu_ids])
        self._grant()

    def reclaim(self, node: int) -> None:
        """A node will be lost: it is not chosen any more where any would do."""
        self.nodes[node].condition = "reclaimed"

    def lose(self, node: int) -> None:
        """A node is no longer there: nothing of it is granted before `restore`, and what is given back is not free."""
        state = self.nodes[node]
        state.condition, state.free = "lost", []

    def restore(self, node: int, gpus: int) -> None:
        """A lost node is there again, all of its GPUs free."""
        state = self.nodes[node]
        assert state.condition == "lost", "only a lost node is restored"
        state.condition, state.free = "up", list(range(gpus))
        self._grant()

    def _grant(self) -> None:
        still: deque[_Waiting] = deque()
        taken: set[int] = set()  # nodes that an earlier request waits for
        while self._queue:
            waiting = self._queue.popleft()
            wanted = [n for n in self.nodes if waiting.may_be_on(n) and n.index not in taken]
            found = ((state, gpu_ids) for state in wanted if (gpu_ids := waiting.chosen(state.free)) is not None)
            state, gpu_ids = next(found, (None, ()))
            if state is None:
                still.append(waiting)
                taken.update(node.index for node in wanted)
                continue
            state.free = [gpu for gpu in state.free if gpu not in gpu_ids]
            waiting.granted.succeed((state.index, gpu_ids))
        self._queue = still
