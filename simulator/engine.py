"""A rollout engine: continuous batching as vLLM V1 does it, advanced from one change of the batch to the next.

While the batch stays the same, each iteration adds one token to every response, so the time of many iterations has a
closed form (`IterationTimes.decode_span_s`) and the engine jumps to the next completion or shortage of KV blocks.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from simrl.traces.iteration import IterationTimes

BLOCK_TOKENS = 16  # vLLM's default block size on CUDA


@dataclass(slots=True, eq=False)
class Request:
    """A response as an engine handles it.

    Attributes:
        response_id: Id in the run.
        group: Requests of one group have the same prompt and share its full KV blocks.
        prompt_tokens: Length of the prompt.
        target_tokens: Length at which generation ends; known to the engine as it is to nature.
        generated: Tokens generated so far; while it decodes, as of the last change of the batch it took part in.
        kv_tokens: Tokens whose KV is on this engine's GPUs, or was sent along when it arrived.
        computed_tokens: Prompt (or recomputed) tokens that prefill really computed for it, over its life.
        cached_tokens: Tokens that prefill could skip, because they were cached or had been sent.
    """

    response_id: int
    group: int
    prompt_tokens: int
    target_tokens: int
    generated: int = 0
    kv_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    _blocks: int = 0  # its own, without those shared in its group
    _finish_tick: int = 0
    _decoding: bool = False

    @property
    def known_tokens(self) -> int:
        """Prompt and generated tokens: what prefill has to have computed before decoding goes on."""
        return self.prompt_tokens + self.generated


class Span(NamedTuple):
    """What the engine does next: *iterations* of the same kind, *seconds* in all."""

    iterations: int
    seconds: float


@dataclass(slots=True)
class _Group:
    blocks: int = 0  # shared full blocks that are resident
    members: int = 0  # running requests that use them


@dataclass(slots=True)
class Engine:
    """One vLLM-like engine.

    Use: `add` requests, then repeat `span = plan()`; let `span.seconds` pass; `finished = advance(span.iterations)`.
    Between `plan` and `advance`, `boundary` says where the engine can be interrupted. FCFS admission, at most
    `max_num_seqs` running, at most `max_batched_tokens` tokens an iteration, chunked prefill beside decodes, paged KV
    with preemption of the newest by recompute. Cached prompts stay until `forget_prefixes`: they are not evicted when
    blocks run short, which flatters prefix caching when KV is scarce.
    """

    times: IterationTimes
    kv_blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    prefix_caching: bool = True
    waiting: deque[Request] = field(default_factory=deque)
    running: dict[int, Request] = field(default_factory=dict)  # in order of admission
    preemptions: int = 0
    free_blocks: int = field(init=False)
    _tick: int = 0  # decode iterations so far
    _batch: int = 0  # decoding requests
    _context: int = 0  # sum of their tokens
    _phases: list[int] = field(default_factory=lambda: [0] * BLOCK_TOKENS)
    _finishes: list[tuple[int, int, Request]] = field(default_factory=list)
    _stale: int = 0  # entries of requests that left before they were complete
    _order: Iterator[int] = field(default_factory=itertools.count)  # breaks ties in the heap
    _prefilling: dict[int, Request] = field(default_factory=dict)
    _chunks: list[tuple[Request, int]] = field(default_factory=list)  # planned prefill: request, tokens
    _groups: dict[int, _Group] = field(default_factory=dict)
    _cached_prompts: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.free_blocks = self.kv_blocks

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def kv_used(self, iterations: int = 0) -> float:
        """Used share of the KV blocks, after so many more decode iterations."""
        return 1.0 - (self.free_blocks - self._growth(iterations)) / self.kv_blocks

    def add(self, request: Request) -> None:
        """Queue a request. KV that came with it (`kv_tokens`) need not be computed."""
        self.waiting.append(request)

    def generated(self, request: Request, iterations: int = 0) -> int:
        """Tokens of *request* after so many more decode iterations."""
        if request._decoding:
            return request.target_tokens - (request._finish_tick - self._tick) + iterations
        return request.generated

    def forget_prefixes(self) -> None:
        """Drop cached prompts, as new weights make them worthless."""
        self._cached_prompts.clear()

    # --- one turn: plan, let time pass, advance ---

    def plan(self) -> Span | None:
        """Schedule the next iterations; None when there is nothing to do, or nothing before `give_back`."""
        preempted = self._make_room()
        if not preempted and (self.waiting or self._prefilling):
            self._chunks = self._schedule_prefill()
        if self._chunks:
            return Span(1, self._mixed_seconds())
        if not self._batch:
            return self.plan() if preempted else None
        # After a preemption nothing is admitted in the same iteration, but may be in the next.
        iterations = 1 if preempted else self._next_finish() - self._tick
        if iterations > BLOCK_TOKENS * (self.free_blocks // self._batch):  # so many fit without a closer look
            iterations = min(iterations, self._iterations_that_fit())
        return Span(iterations, self.times.decode_span_s(self._batch, self._context / self._batch, iterations))

    def boundary(self, span: Span, elapsed_s: float) -> Span:
        """The part of *span* up to the end of the iteration that runs *elapsed_s* after its start."""
        if self._chunks or span.iterations == 1:
            return span
        context = self._context / self._batch
        iterations = min(max(self.times.iterations_until(self._batch, context, elapsed_s), 1), span.iterations)
        return Span(iterations, self.times.decode_span_s(self._batch, context, iterations))

    def completed(self, span: Span, elapsed_s: float) -> int:
        """Whole decode iterations of *span* that are over *elapsed_s* after its start."""
        if self._chunks or not self._batch:
            return 0
        context = self._context / self._batch
        iterations = min(self.times.iterations_until(self._batch, context, elapsed_s), span.iterations)
        over = self.times.decode_span_s(self._batch, context, iterations) <= elapsed_s * (1 + 1e-12)
        return iterations if over else iterations - 1

    def advance(self, iterations: int) -> list[Request]:
        """Carry out planned iterations; returns the requests that are complete now."""
        self._decode(iterations)
        for request, tokens in self._chunks:
            self._prefilled(request, tokens)
        self._chunks = []
        finished = []
        while self._batch and self._next_finish() <= self._tick:
            request = heapq.heappop(self._finishes)[2]
            self._leave(request)
            self.free_blocks += self._drop(request)
            finished.append(request)
        return finished

    def remove(self, response_ids: Set[int]) -> tuple[list[Request], int]:
        """Take requests out between iterations.

        Returns:
            The requests, with `generated` and `kv_tokens` up to date, and the number of blocks that stay taken until
            `give_back`, so that KV can be sent from them.
        """
        removed = [request for request in self.waiting if request.response_id in response_ids]
        if removed:
            self.waiting = deque(request for request in self.waiting if request.response_id not in response_ids)
        held = 0
        for response_id in [i for i in self.running if i in response_ids]:
            request = self.running[response_id]
            self._leave(request)
            held += self._drop(request)
            removed.append(request)
        return removed, held

    def give_back(self, blocks: int) -> None:
        """Free blocks that `remove` had kept."""
        self.free_blocks += blocks

    # --- prefill ---

    def _schedule_prefill(self) -> list[tuple[Request, int]]:
        budget = self.max_batched_tokens - self._batch
        chunks: list[tuple[Request, int]] = []
        reserved = self._growth(1)  # running decodes come first
        self.free_blocks -= reserved
        for request in self._prefilling.values():
            budget -= self._take_chunk(request, budget, chunks)
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            tokens = self._admit(request, budget)
            if not tokens:
                break
            self.waiting.popleft()
            budget -= tokens
            if request.generated and request.kv_tokens == request.known_tokens - 1:  # arrived with all its KV
                block = int(request.kv_tokens % BLOCK_TOKENS == 0)  # to be taken when it decodes
                request._blocks -= block
                reserved += block
                self._start_decoding(request)
            else:
                self._prefilling[request.response_id] = request
                chunks.append((request, tokens))
        self.free_blocks += reserved
        return chunks

    def _admit(self, request: Request, budget: int) -> int:
        """Let *request* run if its next tokens have room; returns how many are computed, 0 if it has to wait."""
        cached = self._cached(request)
        tokens = min(request.known_tokens - cached, budget)
        group = self._groups.get(request.group) or _Group()
        if not self._take_blocks(request, group, cached + tokens):
            return 0
        self._groups[request.group] = group
        group.members += 1
        self.running[request.response_id] = request
        request.cached_tokens += cached
        request.kv_tokens = cached
        self._note_prompt(request, cached + tokens)
        return tokens

    def _cached(self, request: Request) -> int:
        """Tokens at the head of *request* that need no computing: sent along, or the prompt's cached full blocks."""
        cached = 0
        if self.prefix_caching and request.group in self._cached_prompts:
            cached = self._shareable_blocks(request) * BLOCK_TOKENS
        return max(cached, request.kv_tokens)

    def _shareable_blocks(self, request: Request) -> int:
        # The last prompt token is always computed, to have logits to sample from.
        return (request.prompt_tokens - 1) // BLOCK_TOKENS if self.prefix_caching else 0

    def _take_blocks(self, request: Request, group: _Group, tokens: int) -> bool:
        """Take what *request* still lacks to hold *tokens* tokens; nothing is taken if that is not free."""
        blocks = -(-tokens // BLOCK_TOKENS)
        shared = min(self._shareable_blocks(request), blocks)
        own = max(blocks - shared, request._blocks)
        missing = own - request._blocks + max(shared - group.blocks, 0)
        if missing > self.free_blocks:
            return False
        self.free_blocks -= missing
        request._blocks = own
        group.blocks = max(group.blocks, shared)
        return True

    def _take_chunk(self, request: Request, budget: int, chunks: list[tuple[Request, int]]) -> int:
        """Go on with a prefill under way."""
        tokens = min(request.known_tokens - request.kv_tokens, budget)
        group = self._groups[request.group]
        if tokens <= 0 or not self._take_blocks(request, group, request.kv_tokens + tokens):
            return 0
        chunks.append((request, tokens))
        self._note_prompt(request, request.kv_tokens + tokens)
        return tokens

    def _note_prompt(self, request: Request, tokens: int) -> None:
        # vLLM V1 registers full blocks when it schedules them: the rest of the group hits in the same iteration.
        if self.prefix_caching and tokens >= request.prompt_tokens:
            self._cached_prompts.add(request.group)

    def _prefill_growth(self) -> int:
        """Blocks that the next chunk of a prefill under way takes; there is one at most, as it takes all the budget."""
        if not self._prefilling:
            return 0
        budget = self.max_batched_tokens - self._batch
        ends = ((r, min(r.known_tokens, r.kv_tokens + budget)) for r in self._prefilling.values())
        return sum(self._blocks_missing(request, end) for request, end in ends)

    def _blocks_missing(self, request: Request, tokens: int) -> int:
        """Blocks still to take so that *request* can hold *tokens*."""
        blocks = -(-tokens // BLOCK_TOKENS)
        shared = min(self._shareable_blocks(request), blocks)
        return max(blocks - shared - request._blocks, 0) + max(shared - self._groups[request.group].blocks, 0)

    def _mixed_seconds(self) -> float:
        tokens = sum(chunk for _, chunk in self._chunks)
        attended = sum(chunk * (request.kv_tokens + chunk / 2) for request, chunk in self._chunks) / tokens
        context = self._context / self._batch if self._batch else 0.0
        return self.times.iteration_s(tokens, attended, self._batch, context)

    def _prefilled(self, request: Request, tokens: int) -> None:
        request.kv_tokens += tokens
        request.computed_tokens += tokens
        if request.kv_tokens == request.known_tokens:
            del self._prefilling[request.response_id]
            request.generated += 1  # prefill yields the next token
            self._start_decoding(request)

    # --- decode ---

    def _start_decoding(self, request: Request) -> None:
        request._decoding = True
        request._finish_tick = self._tick + request.target_tokens - request.generated
        self._batch += 1
        self._context += request.known_tokens
        self._phases[(request.known_tokens - self._tick) % BLOCK_TOKENS] += 1
        heapq.heappush(self._finishes, (request._finish_tick, next(self._order), request))

    def _decode(self, iterations: int) -> None:
        if self._batch:
            self.free_blocks -= self._growth(iterations)
            assert self.free_blocks >= 0, "block accounting broken"
            self._context += self._batch * iterations
            self._tick += iterations

    def _growth(self, iterations: int) -> int:
        """Blocks that the decoding requests take in the next *iterations*."""
        cycles, rest = divmod(iterations, BLOCK_TOKENS)
        first = (1 - self._tick) % BLOCK_TOKENS
        # Phases count down as ticks count up; the list is read from behind, around its start if need be.
        blocks = sum(self._phases[max(first - rest + 1, 0) : first + 1])
        if rest > first + 1:
            blocks += sum(self._phases[first - rest + 1 :])
        return cycles * self._batch + blocks

    def _iterations_that_fit(self) -> int:
        """Iterations until the free blocks are used up."""
        cycles, free = divmod(self.free_blocks, self._batch)
        for i in range(BLOCK_TOKENS):
            free -= self._phases[(1 - self._tick - i) % BLOCK_TOKENS]
            if free < 0:
                return cycles * BLOCK_TOKENS + i
        return (cycles + 1) * BLOCK_TOKENS

    def _next_finish(self) -> int:
        """Tick at which the next decoding request is complete; forgets entries of requests that left before."""
        while self._stale:
            tick, _, request = self._finishes[0]
            if self.running.get(request.response_id) is request and request._decoding and request._finish_tick == tick:
                break
            heapq.heappop(self._finishes)
            self._stale -= 1
        return self._finishes[0][0]

    def _make_room(self) -> bool:
        """Preempt the newest requests until the next iteration has its blocks."""
        preempted = False
        while self._phases[(1 - self._tick) % BLOCK_TOKENS] + self._prefill_growth() > self.free_blocks:
            newest = next(reversed(self.running.values()))
            self._leave(newest)
            self.free_blocks += self._drop(newest)
            newest.kv_tokens = 0
            self.waiting.appendleft(newest)
            self.preemptions += 1
            preempted = True
        return preempted

    def _leave(self, request: Request) -> None:
        """Take *request* out of the batch; its blocks stay."""
        del self.running[request.response_id]
        self._prefilling.pop(request.response_id, None)
        if not request._decoding:
            return
        request.generated = self.generated(request)
        request._decoding = False
        self._stale += request.generated < request.target_tokens
        known = request.prompt_tokens + request.generated
        request.kv_tokens = known - 1
        self._batch -= 1
        self._context -= known
        self._phases[(known - self._tick) % BLOCK_TOKENS] -= 1
        # As many as `_take_blocks` and growth took: a decoding request holds its whole prompt's shared blocks.
        request._blocks = (known + BLOCK_TOKENS - 2) // BLOCK_TOKENS - self._shareable_blocks(request)

    def _drop(self, request: Request) -> int:
        """Let go of *request*'s blocks; returns how many."""
        group = self._groups[request.group]
        group.members -= 1
        blocks = request._blocks
        request._blocks = 0
        if not group.members:
            blocks += group.blocks
            del self._groups[request.group]
        return blocks
