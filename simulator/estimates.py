"""What a policy may know in advance: the cost model that the simulator itself uses."""

from __future__ import annotations

from simrl.policies.contract import Role
from simrl.simulator.costs import CostModel


class ProfiledEstimates:
    """`Estimates` from the cost model that the simulator itself uses: profiling without error.

    Args:
        costs: The cost model.
        learner_world: GPUs that share the learner's state, as far as started.
        context: Mean tokens of a response in mid-generation.
    """

    def __init__(self, costs: CostModel, learner_world: int | None, context: float) -> None:
        self._costs, self._world, self._context = costs, learner_world, context

    def _learners(self, roles: tuple[Role, ...]) -> int | None:
        return self._world if "learn" in roles else None

    def decode_s(self, batch: int, context: float, gpus: int) -> float:
        """One iteration of *batch* decoding responses."""
        return self._costs.times(gpus).decode_s(batch, context)

    def prefill_s(self, tokens: int, gpus: int) -> float:
        """Prefill of *tokens* tokens of short prompts, iteration by iteration."""
        if not tokens:
            return 0.0
        full, rest = divmod(tokens, self._costs.max_batched_tokens)
        times = self._costs.times(gpus)
        attended = self._costs.job.max_prompt_tokens / 4
        last_s = times.prefill_s(rest, attended) if rest else 0.0
        return full * times.prefill_s(self._costs.max_batched_tokens, attended) + last_s

    def flat_batch(self, gpus: int) -> int:
        """Largest batch at which decode latency is still flat."""
        return self._costs.flat_batch(gpus, self._context)

    def kv_tokens(self, gpus: int, roles: tuple[Role, ...]) -> int:
        """Tokens whose KV fits in a function's engine."""
        return self._costs.memory.kv_blocks(gpus, self._learners(roles)) * self._costs.block_tokens

    def transfer_s(self, tokens: int, gpus: int, *, same_node: bool) -> float:
        """Sending KV between functions of *gpus* GPUs, alone: by each GPU's link, or by host links and NIC."""
        node = self._costs.node
        between = min(gpus * node.host_bytes_per_s, node.nic_bytes_per_s)
        return self._costs.movement.kv_load(tokens).alone_s(gpus * node.link_bytes_per_s if same_node else between)

    def start_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        """Expected cold start on a node that has the weights on disk."""
        return sum(self._costs.movement.start_phases(gpus, roles, cached=True).values())

    def park_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        """Moving a function to host memory."""
        load = self._costs.movement.park_load(gpus, roles, self._learners(roles))
        return load.alone_s(gpus * self._costs.node.host_bytes_per_s)

    def wake_s(self, gpus: int, roles: tuple[Role, ...]) -> float:
        """Bringing a parked function back."""
        load = self._costs.movement.wake_load(gpus, roles, self._learners(roles))
        return load.alone_s(gpus * self._costs.node.host_bytes_per_s)

    def prepare_s(self, tokens: int, gpus: int) -> float:
        """Preparation of responses with *tokens* tokens on *gpus* GPUs in all."""
        return self._costs.learning.prepare_s(self._responses(tokens, 1), gpus)

    def learn_s(self, tokens: int, gpus: int) -> float:
        """Learning on *tokens* tokens, evenly spread over *gpus* GPUs in all."""
        nodes = -(-gpus // self._costs.node.gpus)
        return self._costs.learning.learn_s(self._responses(tokens, gpus), gpus, nodes)

    def _responses(self, tokens: int, ranks: int) -> list[int]:
        """*tokens* as equal responses, about a quarter as long as allowed, as many for each of *ranks*."""
        typical = (self._costs.job.max_prompt_tokens + self._costs.job.max_response_tokens) / 4
        count = ranks * max(1, round(tokens / typical / ranks))
        return [-(-tokens // count)] * count

    def sync_s(self, gpus: int) -> float:
        """New weights into colocated engines of *gpus* GPUs each, on all nodes, alone.

        Every GPU takes in its share of the weights, every node's NIC what its learners do not hold.
        """
        node, crossing = self._costs.node, 1 - 1 / self._costs.nodes
        load = self._costs.movement.sync_load("in place", gpus, rebuilt=False, crossing=crossing)
        rate = gpus * node.link_bytes_per_s
        return load.alone_s(min(rate, node.nic_bytes_per_s / crossing) if crossing else rate)
