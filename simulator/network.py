"""The network between nodes, and what a node keeps on its disk."""

from __future__ import annotations

from dataclasses import dataclass

import simpy

from simrl.simulator.costs import CostModel


@dataclass(slots=True)
class NodeLinks:
    """A machine's NIC and disk."""

    sends_until_s: float = 0.0
    receives_until_s: float = 0.0
    weights_cached: simpy.Event | None = None  # on its disk, once this has happened


class Network:
    """KV transfers between nodes. A NIC serves them one after the other, so its bytes are shared, never doubled."""

    def __init__(self, env: simpy.Environment, nodes: list[NodeLinks], costs: CostModel) -> None:
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
