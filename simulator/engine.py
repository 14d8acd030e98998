"""A rollout engine: continuous batching as vLLM V1 does it, advanced from one change of the batch to the next.

While the batch stays the same, each iteration adds one token to every response, so the time of many iterations has a
closed form (`IterationTimes.decode_span_s`) and the engine jumps to the next completion or shortage of KV blocks. Where
nothing waits and all KV fits, it plans over many completions at once.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from simrl.policies.runtime.rollout import Rollout
from simrl.traces.iteration import IterationTimes

BLOCK_TOKENS = 16  # vLLM's default block size on CUDA


@dataclass(slots=True, eq=False)
class Request(Rollout):
    """A response as an engine handles it.

    Its `group` shares the full KV blocks of its prompt. While it decodes, `generated` is as of the last change of the
    batch that it took part in.
    """

    _final_blocks: int = 0  # those that it has when it is complete
    _own_blocks: int = 0  # while it decodes, as of its start
    _prompt: _Chain | None = None  # while it has blocks
    _order: int = 0  # of admission
    _finish_tick: int = 0
    _decoding: bool = False

    @property
    def known_tokens(self) -> int:
        """Prompt and generated tokens: what prefill has to have computed before decoding goes on."""
        return self.prompt_tokens + self.generated


class Span(NamedTuple):
    """What the engine does next.

    Attributes:
        iterations: How many, all of the same kind.
        seconds: What they take in all.
        finish_s: Seconds from the start at which completions happen, one each, ascending; empty if none happens before
            the end.
    """

    iterations: int
    seconds: float
    finish_s: Sequence[float] = ()


@dataclass(slots=True, eq=False)
class _Chain:
    """Consecutive full blocks: those of a prompt that its group shares, or those that a response has left behind.

    Without users they are free, and can be hit until they are taken for something else, the last one first.
    """

    blocks: int
    users: int = 0
    hashed: bool = True  # False: nobody can hit them


R = TypeVar("R", bound=Request)


@dataclass(slots=True)
class Engine(Generic[R]):
    """One vLLM-like engine.

    Use: `add` requests, then repeat `span = plan()`; let `span.seconds` pass; `finished = advance(span.iterations)`.
    Between `plan` and `advance`, `boundary` says where the engine can be interrupted. FCFS admission, at most
    `max_num_seqs` running, at most `max_batched_tokens` tokens an iteration, chunked prefill beside decodes, paged KV
    with preemption of the newest, prefix caching with eviction of the least recently used blocks. The rules are those
    of vLLM 0.32.0's scheduler; docs/model.md lists them.

    Raises:
        ValueError: There is no slot, no block, or a token budget below the number of slots.
    """

    times: IterationTimes
    kv_blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    prefix_caching: bool = True
    block_tokens: int = BLOCK_TOKENS
    waiting: deque[R] = field(default_factory=deque)
    running: dict[int, R] = field(default_factory=dict)  # in order of admission
    preemptions: int = 0
    free_blocks: int = field(init=False)
    _unhashed: int = field(init=False)  # free blocks that nobody can hit; they are taken first
    _free: deque[_Chain] = field(default_factory=deque)  # the others, least recently used first
    _unreachable: _Chain = field(default_factory=lambda: _Chain(0))  # those of complete responses, if last in `_free`
    _prompts: dict[int, _Chain] = field(default_factory=dict)  # by group
    _left: dict[int, _Chain] = field(default_factory=dict)  # own blocks of requests that do not run, by id
    _tick: int = 0  # decode iterations so far
    _context: int = 0  # tokens of all decoding requests
    _phases: list[int] = field(init=False)  # which of them take a block when
    _to_grow: int = 0  # blocks that they will still take until all are complete
    _finishes: list[tuple[int, int, R]] = field(default_factory=list)  # tick, order of admission; sorted
    _orders: Iterator[int] = field(default_factory=itertools.count)
    _prefilling: dict[int, R] = field(default_factory=dict)
    _chunks: list[tuple[R, int]] = field(default_factory=list)  # planned prefill: request, tokens

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs={self.max_num_seqs} must be >= 1")
        if self.kv_blocks < 1:
            raise ValueError(f"kv_blocks={self.kv_blocks} must be >= 1")
        if self.max_batched_tokens < self.max_num_seqs:  # vLLM refuses it, too
            raise ValueError(f"max_batched_tokens={self.max_batched_tokens} < max_num_seqs={self.max_num_seqs}")
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens={self.block_tokens} must be >= 1")
        self.free_blocks = self._unhashed = self.kv_blocks
        self._phases = [0] * self.block_tokens

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def kv_used(self, iterations: int = 0) -> float:
        """Used share of the KV blocks, after so many more decode iterations."""
        return 1.0 - (self.free_blocks - self._growth(iterations)) / self.kv_blocks

    def add(self, request: R) -> None:
        """Queue a request. KV that came with it (`kv_tokens`) need not be computed.

        Raises:
            ValueError: It would never be complete, even if it had all KV blocks to itself.
        """
        request._final_blocks = -(-(request.prompt_tokens + request.target_tokens - 1) // self.block_tokens)
        if request._final_blocks > self.kv_blocks:
            raise ValueError(
                f"response {request.response_id} needs {request._final_blocks} KV blocks for {request.prompt_tokens}"
                f" prompt and {request.target_tokens} response tokens, and the engine has {self.kv_blocks}"
            )
        self.waiting.append(request)

    def generated(self, request: Request, iterations: int = 0) -> int:
        """Tokens of *request* after so many more decode iterations."""
        if request._decoding:
            return request.target_tokens - (request._finish_tick - self._tick) + iterations
        return request.generated

    def forget_prefixes(self) -> bool:
        """Let nothing be hit that was computed so far, as new weights make it worthless.

        Returns:
            False, and nothing is forgotten, if a request runs: vLLM does not do it then.
        """
        if self.running:
            return False
        for prompt in self._prompts.values():  # KV under way may still use them
            prompt.hashed = False
        self._prompts.clear()
        self._left.clear()
        self._free.clear()
        self._unhashed = self.free_blocks
        return True

    # --- one turn: plan, let time pass, advance ---

    def plan(self, completions: int = 1) -> Span | None:
        """Schedule the next iterations, over at most so many completions, and others at the moment of the last.

        Returns:
            None when there is nothing to do, or nothing before `give_back`.
        """
        preempted = self._make_room()
        if not preempted and (self.waiting or self._prefilling):
            self._chunks = self._schedule_prefill()
        if self._chunks:
            return Span(1, self._mixed_seconds())
        batch = len(self._finishes)
        if not batch:
            return self.plan(completions) if preempted else None
        if completions > 1 and not (preempted or self.waiting) and self._to_grow <= self._unhashed:
            return self._plan_completions(completions)
        # After a preemption nothing is admitted in the same iteration, but may be in the next.
        iterations = 1 if preempted else self._finishes[0][0] - self._tick
        if iterations > self.block_tokens * (self.free_blocks // batch):  # so many fit without a closer look
            iterations = min(iterations, self._iterations_that_fit())
        return Span(iterations, self.times.decode_span_s(batch, self._context / batch, iterations))

    def _plan_completions(self, count: int) -> Span:
        """A span over several completions, when no block can run short and nobody waits for one."""
        batch, context, tick, seconds = len(self._finishes), self._context, self._tick, 0.0
        finish_s: list[float] = []
        for finish_tick, _, request in self._finishes:
            iterations = finish_tick - tick
            if iterations:
                if len(finish_s) >= count:
                    break
                seconds += self.times.decode_span_s(batch, context / batch, iterations)
                context += batch * iterations
                tick = finish_tick
            finish_s.append(seconds)
            batch -= 1
            context -= request.prompt_tokens + request.target_tokens
        return Span(tick - self._tick, seconds, finish_s)

    def boundary(self, span: Span, elapsed_s: float) -> Span:
        """The part of *span* up to the end of the iteration that runs *elapsed_s* after its start.

        No completion may lie in between: see `cut`.
        """
        if self._chunks or span.iterations <= 1:
            return Span(span.iterations, span.seconds)
        batch = len(self._finishes)
        context = self._context / batch
        iterations = min(max(self.times.iterations_until(batch, context, elapsed_s), 1), span.iterations)
        return Span(iterations, self.times.decode_span_s(batch, context, iterations))

    def completed(self, span: Span, elapsed_s: float) -> int:
        """Whole decode iterations of *span* that are over *elapsed_s* after its start, without a completion between."""
        batch = len(self._finishes)
        if self._chunks or not batch:
            return 0
        context = self._context / batch
        iterations = min(self.times.iterations_until(batch, context, elapsed_s), span.iterations)
        over = self.times.decode_span_s(batch, context, iterations) <= elapsed_s * (1 + 1e-12)
        return iterations if over else iterations - 1

    def cut(self, span: Span, elapsed_s: float) -> tuple[Span, Span] | None:
        """*span* up to its last completion *elapsed_s* after its start, and the rest; None before the first."""
        count = bisect_right(span.finish_s, elapsed_s)
        if not count:
            return None
        seconds = span.finish_s[count - 1]
        iterations = self._finishes[count - 1][0] - self._tick
        rest_s = [finish_s - seconds for finish_s in span.finish_s[count:]]
        rest = Span(span.iterations - iterations, span.seconds - seconds, rest_s)
        return Span(iterations, seconds, span.finish_s[:count]), rest

    def advance(self, iterations: int) -> list[R]:
        """Carry out planned iterations; returns the requests that are complete now, first finished first."""
        if not self._chunks:
            return self._decode(iterations)
        growth = self._growth(1)
        self._take(growth)
        self._to_grow -= growth
        self._context += len(self._finishes)
        self._tick += 1
        for request, tokens in self._chunks:
            request.kv_tokens += tokens
            request.computed_tokens += tokens
            if request.kv_tokens == request.prompt_tokens + request.generated:
                if self._prefilling:
                    self._prefilling.pop(request.response_id, None)
                request.generated += 1  # prefill yields the next token
                self._start_decoding(request)
        self._finishes.sort()
        self._chunks = []
        return self._decode(0)

    # --- between turns ---

    def remove(self, response_ids: Set[int]) -> list[R]:
        """Take requests out, waiting ones first.

        Returns:
            The requests, with `generated` and `kv_tokens` up to date. Blocks of those that decoded stay taken until
            `give_back`, so that KV can be sent from them; what others have computed stays behind.
        """
        removed = [request for request in self.waiting if request.response_id in response_ids]
        if removed:
            self.waiting = deque(request for request in self.waiting if request.response_id not in response_ids)
        for response_id in [i for i in self.running if i in response_ids]:
            request = self.running[response_id]
            decoding = request._decoding
            self._leave(request)
            if not decoding:
                self._let_go(request, may_return=True)
                request.kv_tokens = 0
            removed.append(request)
        return removed

    def give_back(self, requests: Iterable[R]) -> None:
        """Free the blocks that `remove` kept of *requests*, before they go anywhere else."""
        for request in requests:
            if request._prompt is not None:
                self._let_go(request, may_return=True)

    def abort(self, response_ids: Set[int]) -> list[R]:
        """Take requests out and free their blocks at once."""
        aborted = self.remove(response_ids)
        self.give_back(aborted)
        return aborted

    # --- prefill ---

    def _schedule_prefill(self) -> list[tuple[R, int]]:
        budget = self.max_batched_tokens - len(self._finishes)
        chunks: list[tuple[R, int]] = []
        taken = self._growth(1)  # running decodes come first
        self._take(taken)
        for request in self._prefilling.values():
            tokens = min(request.known_tokens - request.kv_tokens, budget)
            self._compute(request, tokens)
            chunks.append((request, tokens))
            budget -= tokens
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            tokens = self._admit(request, budget)
            if not tokens:
                break
            self.waiting.popleft()
            budget -= tokens
            if request.generated and request.kv_tokens == request.known_tokens - 1:  # it goes on decoding
                self._start_decoding(request)
                self._finishes.sort()
                taken += int(request.kv_tokens % self.block_tokens == 0)
            else:
                chunks.append((request, tokens))
                if not budget and request.kv_tokens + tokens < request.known_tokens:
                    self._prefilling[request.response_id] = request
        # Decoding takes its blocks again when the iteration is over; until then nobody else can.
        self.free_blocks += taken
        self._unhashed += taken
        return chunks

    def _admit(self, request: R, budget: int) -> int:
        """Let *request* run if all its known tokens have room, counting what is cached.

        Returns:
            Tokens to compute now; 0 if it has to wait.
        """
        prompt = self._prompts.get(request.group)
        left = self._left.get(request.response_id) if self._left else None
        hits = prompt.blocks if prompt is not None else 0
        in_use = hits if prompt is not None and prompt.users else 0
        known = request.prompt_tokens + request.generated
        if -(-known // self.block_tokens) - in_use > self.free_blocks:
            return 0
        if prompt is None or not prompt.users:
            prompt = self._touch(prompt)
            if self.prefix_caching:
                self._prompts[request.group] = prompt
        if left is not None:
            del self._left[request.response_id]
            if hits == self._hittable_blocks(request):
                request._own_blocks = self._touch(left).blocks
        prompt.users += 1
        request._prompt, request._order = prompt, next(self._orders)
        cached = (hits + request._own_blocks) * self.block_tokens
        if cached > request.kv_tokens:
            request.kv_tokens = cached
        request.cached_tokens += request.kv_tokens
        self.running[request.response_id] = request
        tokens = known - request.kv_tokens
        if tokens > budget:
            tokens = budget
        self._compute(request, tokens)
        return tokens

    def _touch(self, chain: _Chain | None) -> _Chain:
        """Take the blocks of a free chain out of the free ones, where its entry stays without blocks."""
        if chain is None:
            return _Chain(0, hashed=self.prefix_caching)
        touched = _Chain(chain.blocks)
        self.free_blocks -= chain.blocks
        chain.blocks = 0
        return touched

    def _hittable_blocks(self, request: Request) -> int:
        """Blocks of its prompt that others can hit; the last token is always computed, to have logits to sample."""
        return (request.prompt_tokens - 1) // self.block_tokens if self.prefix_caching else 0

    def _compute(self, request: R, tokens: int) -> None:
        """Take the blocks for the next *tokens* tokens; blocks of the prompt that get full can be hit from now on."""
        prompt, end = request._prompt, request.kv_tokens + tokens
        assert prompt is not None, "a running request has blocks"
        had = prompt.blocks + request._own_blocks
        if prompt.hashed and (prompt.blocks + 1) * self.block_tokens < request.prompt_tokens:  # some are still missing
            prompt.blocks = max(prompt.blocks, min(self._hittable_blocks(request), end // self.block_tokens))
        blocks = -(-end // self.block_tokens)
        request._own_blocks = blocks - prompt.blocks
        self.free_blocks -= blocks - had
        self._unhashed -= blocks - had
        if self._unhashed < 0:
            self._evict()

    def _prefill_growth(self) -> int:
        """Blocks that the next chunk of a prefill under way takes; there is one at most, as it takes all the budget."""
        blocks, budget = 0, self.max_batched_tokens - len(self._finishes)
        for request in self._prefilling.values():
            assert request._prompt is not None, "a running request has blocks"
            end = min(request.known_tokens, request.kv_tokens + budget)
            blocks += self._blocks(end) - request._prompt.blocks - request._own_blocks
        return blocks

    def _mixed_seconds(self) -> float:
        tokens, attended = 0, 0.0
        for request, chunk in self._chunks:
            tokens += chunk
            attended += chunk * (request.kv_tokens + chunk / 2)
        batch = len(self._finishes)
        return self.times.iteration_s(tokens, attended / tokens, batch, self._context / batch if batch else 0.0)

    # --- decode ---

    def _start_decoding(self, request: R) -> None:
        known = request.prompt_tokens + request.generated
        request._decoding = True
        request._finish_tick = self._tick + request.target_tokens - request.generated
        self._context += known
        self._phases[(known - self._tick) % self.block_tokens] += 1
        self._to_grow += request._final_blocks + (1 - known) // self.block_tokens
        self._finishes.append((request._finish_tick, request._order, request))  # the caller sorts

    def _decode(self, iterations: int) -> list[R]:
        """Let the batch decode; returns who is complete at the end or was in between."""
        start, end, growth = self._tick, self._tick + iterations, 0
        finished: list[R] = []
        for finish_tick, _, request in self._finishes:
            if finish_tick > end:
                break
            known = request.prompt_tokens + request.target_tokens - (finish_tick - start)
            self._context -= known
            self._phases[(known - start) % self.block_tokens] -= 1
            growth += request._final_blocks + (1 - known) // self.block_tokens
            finished.append(request)
        del self._finishes[: len(finished)]
        if self._finishes:
            growth += self._growth(iterations)
            self._context += len(self._finishes) * iterations
        self._take(growth)
        self._to_grow -= growth
        self._tick = end
        for request in finished:
            assert request._prompt is not None, "a running request has blocks"
            request._decoding = False
            request.generated = request.target_tokens
            request.kv_tokens = request.prompt_tokens + request.target_tokens - 1
            request._own_blocks = request._final_blocks - request._prompt.blocks
            del self.running[request.response_id]
            self._let_go(request)
        return finished

    def _growth(self, iterations: int) -> int:
        """Blocks that the decoding requests take in the next *iterations*."""
        cycles, rest = divmod(iterations, self.block_tokens)
        first = (1 - self._tick) % self.block_tokens
        # Phases count down as ticks count up; the list is read from behind, around its start if need be.
        blocks = sum(self._phases[max(first - rest + 1, 0) : first + 1])
        if rest > first + 1:
            blocks += sum(self._phases[first - rest + 1 :])
        return cycles * len(self._finishes) + blocks

    def _iterations_that_fit(self) -> int:
        """Iterations until the free blocks are used up."""
        cycles, free = divmod(self.free_blocks, len(self._finishes))
        for i in range(self.block_tokens):
            free -= self._phases[(1 - self._tick - i) % self.block_tokens]
            if free < 0:
                return cycles * self.block_tokens + i
        return (cycles + 1) * self.block_tokens

    # --- blocks ---

    def _make_room(self) -> bool:
        """Preempt the newest requests until the next iteration has its blocks."""
        preempted = False
        while self._phases[(1 - self._tick) % self.block_tokens] + self._prefill_growth() > self.free_blocks:
            newest = next(reversed(self.running.values()))
            self._leave(newest)
            self._let_go(newest, may_return=True)
            newest.kv_tokens = 0
            self.waiting.appendleft(newest)
            self.preemptions += 1
            preempted = True
        return preempted

    def _leave(self, request: R) -> None:
        """Take *request* out of the batch; its blocks stay."""
        del self.running[request.response_id]
        self._prefilling.pop(request.response_id, None)
        if not request._decoding:
            return
        assert request._prompt is not None, "a running request has blocks"
        request.generated = self.generated(request)
        request._decoding = False
        del self._finishes[bisect_left(self._finishes, (request._finish_tick, request._order))]
        known = request.known_tokens
        request.kv_tokens = known - 1
        request._own_blocks = self._blocks(known - 1) - request._prompt.blocks
        self._context -= known
        self._phases[(known - self._tick) % self.block_tokens] -= 1
        self._to_grow -= request._final_blocks - self._blocks(known - 1)

    def _take(self, blocks: int) -> None:
        """Use free blocks, those first that nobody can hit."""
        self.free_blocks -= blocks
        self._unhashed -= blocks
        if self._unhashed < 0:
            self._evict()

    def _evict(self) -> None:
        """Make good for taking more blocks than nobody could hit."""
        while self._unhashed < 0:
            oldest = self._free[0]
            evicted = min(oldest.blocks, -self._unhashed)
            oldest.blocks -= evicted
            self._unhashed += evicted
            if not oldest.blocks:
                self._free.popleft()

    def _let_go(self, request: R, *, may_return: bool = False) -> None:
        """Free *request*'s blocks; full ones stay cached until they are taken, its own of use only if it returns."""
        prompt = request._prompt
        assert prompt is not None, "only requests with blocks let go of them"
        full = request.kv_tokens // self.block_tokens - prompt.blocks if prompt.hashed else 0
        self.free_blocks += request._own_blocks
        self._unhashed += request._own_blocks - full
        request._prompt, request._own_blocks = None, 0
        if full and may_return:
            self._left[request.response_id] = chain = _Chain(full)
            self._free.append(chain)
        elif full and self._free and self._free[-1] is self._unreachable:
            self._unreachable.blocks += full
        elif full:
            self._unreachable = _Chain(full)
            self._free.append(self._unreachable)
        prompt.users -= 1
        if not prompt.users and prompt.blocks:
            self.free_blocks += prompt.blocks
            if prompt.hashed:
                self._free.append(prompt)
            else:
                self._unhashed += prompt.blocks

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)
