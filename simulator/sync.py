"""How the learner's newest weights reach the engines: in place, by broadcast, or through an object store."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import simpy

from simrl.policies.runtime.function import Process
from simrl.simulator.function import SimFunction
from simrl.simulator.movement import Movement, SyncWay
from simrl.simulator.network import Link, Load, Network

if TYPE_CHECKING:
    from simrl.simulator.profiled import ProfiledCosts

Edge = tuple[int, int, float]
"""From one node to another, and how much of a copy of the weights."""


class WeightSync:
    """Weight syncs of a cluster.

    Engines that share their GPUs with the learner take the weights in place, whatever *way* is. Others get them by a
    broadcast of all who take part, whose communicator is built anew when these are not the same as last time, or read
    them from the store, one copy a node, after the learner has written one.

    Args:
        network: Its links.
        movement: What there is to move.
        way: How they get to engines that do not learn.
    """

    def __init__(
        self, network: Network, movement: Movement | ProfiledCosts, way: Literal["nccl", "object-store"]
    ) -> None:
        self._network, self._movement, self._way = network, movement, way
        self._communicator: frozenset[SimFunction] = frozenset()

    def begin(self, behind: Sequence[SimFunction], learners: Sequence[SimFunction]) -> simpy.Event:
        """Send the weights of *learners* to *behind*; the event fires when all have them."""
        moves = []
        inside = [function for function in behind if "learn" in function.roles]
        apart = [function for function in behind if "learn" not in function.roles]
        if inside:
            moves.append(self._collective("in place", inside, learners))
        if apart and self._way == "nccl":
            moves.append(self._collective("nccl", apart, learners))
        elif apart:
            moves.append(self._network.env.process(self._through_store(apart, learners)))
        return self._network.env.all_of(moves)

    def _collective(self, way: SyncWay, takers: Sequence[SimFunction], learners: Sequence[SimFunction]) -> simpy.Event:
        """One pipelined flow over the links of all."""
        members = frozenset([*takers, *learners])
        rebuilt = way == "nccl" and members != self._communicator
        if way == "nccl":
            self._communicator = members
        edges = ring(held_by_node(learners), {_node(function) for function in takers})
        crossing = max((share for _, _, share in edges), default=0.0)
        ranks = sum(function.gpus for function in members)
        load = self._movement.sync_load(way, ranks, rebuilt=rebuilt, crossing=crossing)
        links = dict.fromkeys((function.links.arrive for function in takers), 1.0)
        links |= {function.links.leave: share for function, share in _shares(learners).items()}
        for sender, receiver, share in edges:
            links |= {self._network.nodes[sender].sends: share, self._network.nodes[receiver].receives: share}
        return self._network.move(load, links)

    def _through_store(self, takers: Sequence[SimFunction], learners: Sequence[SimFunction]) -> Process:
        load = self._movement.sync_load("object-store", 0, rebuilt=False, crossing=1.0)
        held, nodes = held_by_node(learners), self._network.nodes
        links: dict[Link, float] = {self._network.store_writes: 1.0}
        links |= {nodes[node].sends: share for node, share in held.items()}
        links |= {function.links.to_host: share for function, share in _shares(learners).items()}
        # Each node of the learner writes its own part.
        limit = load.limit_bytes_per_s / max(held.values(), default=1.0)
        yield self._network.move(replace(load, limit_bytes_per_s=limit), links)
        if load.size_bytes:
            yield self._network.env.all_of([self._read(load, node, takers) for node in sorted(set(map(_node, takers)))])

    def _read(self, load: Load, node: int, takers: Sequence[SimFunction]) -> simpy.Event:
        """One copy onto a node, and from there to the GPUs of each of its engines."""
        links: dict[Link, float] = {self._network.store_reads: 1.0, self._network.nodes[node].receives: 1.0}
        links |= {function.links.from_host: 1.0 for function in takers if function.node == node}
        return self._network.move(load, links)


def _node(function: SimFunction) -> int:
    assert function.node is not None, "a function that takes part in a sync has its GPUs"
    return function.node


def _shares(learners: Sequence[SimFunction]) -> dict[SimFunction, float]:
    """The share of the weights that each learner holds."""
    world = sum(function.gpus for function in learners)
    return {function: function.gpus / world for function in learners}


def held_by_node(learners: Sequence[SimFunction]) -> dict[int, float]:
    """The share of the weights that the learners of each node hold."""
    held: dict[int, float] = {}
    for function, share in _shares(learners).items():
        held[_node(function)] = held.get(_node(function), 0.0) + share
    return held


def ring(held: Mapping[int, float], takers: Iterable[int]) -> list[Edge]:
    """What each node sends on to the next, in a ring in which *takers* come to hold all.

    A taker gets what its own learners do not hold; nodes that only send come first and pass on what they have so far.

    >>> ring({0: 1.0}, [1, 2])
    [(0, 1, 1.0), (1, 2, 1.0)]
    >>> ring({0: 0.5, 1: 0.5}, [0, 1])
    [(0, 1, 0.5), (1, 0, 0.5)]
    """
    taking = sorted(takers)
    only_sending = sorted(held.keys() - set(taking))
    order, edges, so_far = [*only_sending, *taking], [], 0.0
    for sender, receiver in itertools.pairwise(order):
        so_far += held.get(sender, 0.0)
        edges.append((sender, receiver, 1 - held.get(receiver, 0.0) if receiver in taking else so_far))
    if not only_sending and len(order) > 1:
        edges.append((order[-1], order[0], 1 - held.get(order[0], 0.0)))
    return [edge for edge in edges if edge[2] > 0]
