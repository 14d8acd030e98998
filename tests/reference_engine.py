"""A plain rollout engine: one iteration at a time, and every KV block an object of its own.

The rules are those of vLLM 0.32.0, read in `vllm/v1/core` and held against its scheduler by `test_vllm_scheduler.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

from simrl.traces.iteration import IterationTimes

BLOCK_TOKENS = 16

Hash = tuple[str, int, int]  # whose tokens fill the block ("prompt", group) or ("response", id), and which block it is


@dataclass(eq=False)
class Block:
    """A KV block: how many responses use it, and the hash under which others find it."""

    users: int = 0
    hash: Hash | None = None


class BlockPool:
    """The KV blocks of an engine.

    `free` is in the order in which blocks are taken. A free block keeps its hash, and can be hit, until it is taken.
    The blocks of one response are freed from the last to the first: those without a hash go to the front of `free`,
    those with one to its end, so that the least recently used prefix goes first and its tail before its head. Blocks of
    the same hash are not merged; the one that has had it for longest is hit.
    """

    def __init__(self, blocks: int) -> None:
        self.free = [Block() for _ in range(blocks)]
        self.cached: dict[Hash, list[Block]] = {}

    def hits(self, hashes: Sequence[Hash]) -> list[Block]:
        """Blocks of the longest cached prefix."""
        blocks = []
        for hash_ in hashes:
            if hash_ not in self.cached:
                break
            blocks.append(self.cached[hash_][0])
        return blocks

    def touch(self, blocks: Sequence[Block]) -> None:
        """Use blocks that were hit."""
        for block in blocks:
            if block.users == 0:
                self.free.remove(block)
            block.users += 1

    def take(self) -> Block:
        """Use the first free block for new tokens."""
        block = self.free.pop(0)
        if block.hash is not None:
            self.forget(block)
        block.users = 1
        return block

    def register(self, block: Block, hash_: Hash) -> None:
        """Let others hit *block* from now on."""
        block.hash = hash_
        self.cached.setdefault(hash_, []).append(block)

    def forget(self, block: Block) -> None:
        """Take *block*'s hash away."""
        assert block.hash is not None
        self.cached[block.hash].remove(block)
        if not self.cached[block.hash]:
            del self.cached[block.hash]
        block.hash = None

    def forget_all(self) -> None:
        """Take all hashes away; the order of the free blocks stays."""
        for block in [block for blocks in self.cached.values() for block in blocks]:
            self.forget(block)

    def release(self, blocks: Sequence[Block]) -> None:
        """Give up one response's *blocks*, which are in the order of its tokens."""
        for block in blocks:
            block.users -= 1
        freed = [block for block in reversed(blocks) if block.users == 0]
        plain = [block for block in freed if block.hash is None]
        hashed = [block for block in freed if block.hash is not None]
        self.free = plain + self.free + hashed


@dataclass(eq=False)
class Item:
    """A response: what `simrl.simulator.engine.Request` is to the fast engine.

    All responses of a group have the same prompt; what they generate is taken to differ.
    """

    response_id: int
    group: int
    prompt_tokens: int
    target_tokens: int
    generated: int = 0
    kv_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    decoding: bool = False
    blocks: list[Block] = field(default_factory=list)
    hashed_blocks: int = 0

    @property
    def known_tokens(self) -> int:
        return self.prompt_tokens + self.generated

    def hashes(self, tokens: int) -> list[Hash]:
        """Hashes of the full blocks among its first *tokens* tokens."""
        return [
            ("prompt", self.group, index)
            if (index + 1) * BLOCK_TOKENS <= self.prompt_tokens
            else ("response", self.response_id, index)
            for index in range(tokens // BLOCK_TOKENS)
        ]


@dataclass
class ReferenceEngine:
    """The scheduler of vLLM 0.32.0, written down without any shortcut.

    As vLLM is by default: FCFS, chunked prefill, `scheduler_reserve_full_isl`, no watermark, one full-attention model.
    Asynchronous scheduling is off.

    1. Running responses in order of admission: each gets blocks for the tokens that it knows but has no KV of (one, if
       it decodes), or as many of them as are left of the token budget. While its blocks are not free, the newest
       running response is preempted, which may be itself: its blocks are freed, it goes to the front of the waiting
       queue, and none of its KV counts as computed any more.
    2. Unless somebody was preempted, waiting responses are admitted in order, until one lacks a slot, budget or blocks.
       It hits the longest cached prefix of whole blocks, the last known token excepted, and it may have come with KV
       (`kv_tokens`): the longer counts as cached. Its blocks must be free for *all* its known tokens, blocks that it
       hits in the free queue included, but only those for the cached tokens and its first chunk are taken.
    3. Full blocks get their hash as soon as their last token is scheduled (in steps 1 and 2), whether prompt or
       generated, computed or sent along. So a response admitted later in the same iteration hits them already.
    4. Then each whose known tokens have all been computed has one token more. Those that are complete now leave, and
       their blocks are freed, in order of admission. The newest token of a response never has KV.
    5. A response with generated tokens of which only the newest lacks KV at admission goes on decoding: nothing of it
       is computed again. Any other admitted response counts the tokens that it computes until it decodes as prefill.
    """

    times: IterationTimes
    kv_blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    prefix_caching: bool = True
    waiting: list[Item] = field(default_factory=list)
    running: list[Item] = field(default_factory=list)
    preemptions: int = 0
    chunks: int = 0  # times that a prompt was not computed in one piece
    pool: BlockPool = field(init=False)

    def __post_init__(self) -> None:
        assert self.max_batched_tokens >= self.max_num_seqs, "vLLM refuses this"
        self.pool = BlockPool(self.kv_blocks)

    def free_blocks(self) -> int:
        return len(self.pool.free)

    def iterate(self) -> tuple[float, list[Item]] | None:
        """Do one iteration: its seconds, and what is complete after it. None when nothing can be done."""
        planned: dict[Item, int] = {}
        preempted = self.schedule_running(planned)
        if not preempted:
            self.admit(planned)
        if not planned:
            return self.iterate() if preempted else None
        seconds = self.seconds(planned)
        return seconds, self.compute(planned)

    # --- scheduling; *planned* is what has been scheduled so far: tokens of each response ---

    def schedule_running(self, planned: dict[Item, int]) -> bool:
        """Schedule the running responses; returns whether one was preempted."""
        preempted = False
        for item in self.still_running():
            tokens = min(item.known_tokens - item.kv_tokens, self.budget(planned))
            while item in self.running and self.blocks_missing(item, tokens) > self.free_blocks():
                self.preempt(self.running[-1])
                preempted = True
            if item in self.running:
                self.schedule(item, tokens, planned)
        return preempted

    def still_running(self) -> Iterator[Item]:
        """The running responses in order; those that are preempted meanwhile are left out."""
        index = 0
        while index < len(self.running):
            yield self.running[index]
            index += 1

    def budget(self, planned: dict[Item, int]) -> int:
        return self.max_batched_tokens - sum(planned.values())

    def blocks_missing(self, item: Item, tokens: int) -> int:
        return -(-(item.kv_tokens + tokens) // BLOCK_TOKENS) - len(item.blocks)

    def schedule(self, item: Item, tokens: int, planned: dict[Item, int]) -> None:
        for _ in range(self.blocks_missing(item, tokens)):
            item.blocks.append(self.pool.take())
        if self.prefix_caching:
            hashes = item.hashes(item.kv_tokens + tokens)
            for index in range(item.hashed_blocks, len(hashes)):
                self.pool.register(item.blocks[index], hashes[index])
            item.hashed_blocks = len(hashes)
        planned[item] = tokens

    def preempt(self, item: Item) -> None:
        self.running.remove(item)
        self.waiting.insert(0, item)
        self.pool.release(self.leave(item))
        item.kv_tokens = 0
        self.preemptions += 1

    def leave(self, item: Item) -> list[Block]:
        """Part *item* from its blocks, which are returned."""
        blocks, item.blocks, item.hashed_blocks, item.decoding = item.blocks, [], 0, False
        return blocks

    def admit(self, planned: dict[Item, int]) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs and self.budget(planned) > 0:
            item = self.waiting[0]
            hits = self.pool.hits(item.hashes(item.known_tokens - 1))
            wanted = -(-item.known_tokens // BLOCK_TOKENS) - sum(block.users > 0 for block in hits)
            if wanted > self.free_blocks():
                return
            self.running.append(self.waiting.pop(0))
            self.pool.touch(hits)
            item.blocks, item.hashed_blocks = hits, len(hits)
            item.kv_tokens = max(len(hits) * BLOCK_TOKENS, item.kv_tokens)
            item.cached_tokens += item.kv_tokens
            item.decoding = item.generated > 0 and item.kv_tokens == item.known_tokens - 1
            self.schedule(item, min(item.known_tokens - item.kv_tokens, self.budget(planned)), planned)

    # --- computing ---

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
        for item in finished:
            self.running.remove(item)
            self.pool.release(self.leave(item))
        return finished

    # --- between iterations ---

    def remove(self, response_ids: Set[int]) -> tuple[list[Item], list[list[Block]]]:
        """Take responses out; their blocks stay taken until `give_back`, so that KV can be sent from them.

        Returns:
            The responses, waiting ones first, and the block tables of those that ran, in the same order.
        """
        removed = [item for item in [*self.waiting, *self.running] if item.response_id in response_ids]
        self.waiting = [item for item in self.waiting if item not in removed]
        self.running = [item for item in self.running if item not in removed]
        tables = [self.leave(item) for item in removed]
        return removed, [table for table in tables if table]

    def give_back(self, held: Sequence[Sequence[Block]]) -> None:
        """Free what `remove` had kept, one response after the other, as vLLM does for KV that has been sent."""
        for blocks in held:
            self.pool.release(blocks)

    def abort(self, response_ids: Set[int]) -> list[Item]:
        """Take responses out and free their blocks at once, in the order of `remove`."""
        aborted, held = self.remove(response_ids)
        self.give_back(held)
        return aborted

    def forget_prefixes(self) -> bool:
        """Forget all hashes, as new weights make the KV worthless; False, and nothing happens, if a response runs.

        Blocks that `remove` holds lose theirs too, whereas vLLM refuses as long as any block is taken.
        """
        if self.running:
            return False
        self.pool.forget_all()
        return True
