"""A plain rollout engine: one iteration at a time, every number counted anew from the requests themselves."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from simrl.traces.iteration import IterationTimes

BLOCK_TOKENS = 16


@dataclass(eq=False)
class Item:
    """A response: what `simrl.simulator.engine.Request` is to the fast engine."""

    response_id: int
    group: int
    prompt_tokens: int
    target_tokens: int
    generated: int = 0
    kv_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    decoding: bool = False

    @property
    def known_tokens(self) -> int:
        return self.prompt_tokens + self.generated


@dataclass
class ReferenceEngine:
    """The rules of vLLM V1, written down without any shortcut.

    An iteration: (1) each decoding response computes one token, the prefill under way goes on with what is left of the
    token budget; while blocks do not suffice, the newest running response is preempted and starts over; (2) unless
    somebody was preempted, waiting responses are admitted in order, until the first that lacks a slot, budget or
    blocks; (3) a response whose tokens are all computed has one token more.
    """

    times: IterationTimes
    kv_blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    prefix_caching: bool = True
    waiting: list[Item] = field(default_factory=list)
    running: list[Item] = field(default_factory=list)
    cached_groups: set[int] = field(default_factory=set)
    held_blocks: int = 0
    preemptions: int = 0
    chunks: int = 0  # times that a prompt was not computed in one piece

    def free_blocks(self) -> int:
        return self.kv_blocks - self.held_blocks - self.blocks({})

    def blocks(self, planned: dict[Item, int]) -> int:
        """Blocks of all running responses once each has computed what is planned for it."""
        shared: dict[int, int] = {}
        own = 0
        for item in self.running:
            blocks = -(-(item.kv_tokens + planned.get(item, 0)) // BLOCK_TOKENS)
            common = min(blocks, self.shareable_blocks(item))
            shared[item.group] = max(shared.get(item.group, 0), common)
            own += blocks - common
        return own + sum(shared.values())

    def shareable_blocks(self, item: Item) -> int:
        return (item.prompt_tokens - 1) // BLOCK_TOKENS if self.prefix_caching else 0

    def fits(self, planned: dict[Item, int]) -> bool:
        return self.blocks(planned) <= self.kv_blocks - self.held_blocks

    def iterate(self) -> tuple[float, list[Item]] | None:
        """Do one iteration: its seconds, and what is complete after it. None when nothing can be done."""
        planned = self.plan_running()
        preempted = False
        while not self.fits(planned):
            self.preempt(self.running[-1])
            preempted = True
            planned = self.plan_running()
        for item, tokens in planned.items():
            self.register(item, tokens)
        if not preempted:
            self.admit(planned)
        if not planned:
            return self.iterate() if preempted else None
        seconds = self.seconds(planned)
        return seconds, self.compute(planned)

    def plan_running(self) -> dict[Item, int]:
        planned = {item: 1 for item in self.running if item.decoding}
        for item in self.running:
            if not item.decoding:
                budget = self.max_batched_tokens - sum(planned.values())
                planned[item] = min(item.known_tokens - item.kv_tokens, budget)
        return planned

    def preempt(self, item: Item) -> None:
        self.running.remove(item)
        self.waiting.insert(0, item)
        item.kv_tokens, item.decoding = 0, False
        self.preemptions += 1

    def admit(self, planned: dict[Item, int]) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            item = self.waiting[0]
            budget = self.max_batched_tokens - sum(planned.values())
            cached, was = self.cached(item), item.kv_tokens
            tokens = min(item.known_tokens - cached, budget)
            item.kv_tokens = cached
            self.running.append(item)
            if tokens <= 0 or not self.fits({**planned, item: tokens}):
                self.running.pop()
                item.kv_tokens = was
                return
            self.waiting.pop(0)
            planned[item] = tokens
            item.cached_tokens += cached
            item.decoding = item.generated > 0 and was == item.known_tokens - 1
            self.register(item, tokens)

    def register(self, item: Item, tokens: int) -> None:
        """Whole prompts can be hit from the moment that the rest of them is scheduled."""
        if self.prefix_caching and item.kv_tokens + tokens >= item.prompt_tokens:
            self.cached_groups.add(item.group)

    def cached(self, item: Item) -> int:
        prefix = self.shareable_blocks(item) * BLOCK_TOKENS if item.group in self.cached_groups else 0
        return max(prefix, item.kv_tokens)

    def seconds(self, planned: dict[Item, int]) -> float:
        prefills = {item: tokens for item, tokens in planned.items() if not item.decoding}
        decodes = [item for item in planned if item.decoding]
        tokens = sum(prefills.values())
        attended = sum(count * (item.kv_tokens + count / 2) for item, count in prefills.items()) / max(tokens, 1)
        context = sum(item.known_tokens for item in decodes) / max(len(decodes), 1)
        return self.times.iteration_s(tokens, attended, len(decodes), context)

    def compute(self, planned: dict[Item, int]) -> list[Item]:
        for item, tokens in planned.items():
            item.kv_tokens += tokens
            if not item.decoding:
                item.computed_tokens += tokens
            if item.kv_tokens == item.known_tokens:
                item.generated += 1
                item.decoding = True
            else:
                self.chunks += 1
        finished = [item for item in self.running if item.generated == item.target_tokens]
        self.running = [item for item in self.running if item not in finished]
        return finished

    def remove(self, response_ids: Set[int]) -> tuple[list[Item], int]:
        """Take responses out; the blocks that only they used stay taken until `give_back`."""
        before = self.blocks({})
        removed = [item for item in [*self.waiting, *self.running] if item.response_id in response_ids]
        self.waiting = [item for item in self.waiting if item not in removed]
        self.running = [item for item in self.running if item not in removed]
        for item in removed:
            item.decoding = False
        held = before - self.blocks({})
        self.held_blocks += held
        return removed, held

    def give_back(self, blocks: int) -> None:
        self.held_blocks -= blocks
