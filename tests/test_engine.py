from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_engine import Block, Hash, Item, ReferenceEngine

from simrl.simulator.engine import BLOCK_TOKENS, Engine, Request, Span
from simrl.traces.iteration import IterationTimes, Table

# Decode: 1 ms + 0.1 ms a response + 1 us a token of mean context.
# Prefill: 2 ms + 10 us a token + 1 us a token attended.
LINEAR = IterationTimes(
    Table((1, 11), (0, 1000), ((1.1e-3, 2.1e-3), (2.1e-3, 3.1e-3))),
    Table((1, 101), (0, 1000), ((2.01e-3, 3.01e-3), (3.01e-3, 4.01e-3))),
    source="test",
    status="assumed",
)
# Knots inside the contexts and batches that occur, so that spans run over them.
KINKED = IterationTimes(
    Table(
        (1, 2, 4), (8, 20, 33, 70), ((1e-3, 1.5e-3, 4e-3, 4.1e-3), (2e-3, 2e-3, 5e-3, 9e-3), (3e-3, 7e-3, 8e-3, 9e-3))
    ),
    Table((1, 16, 40), (10, 50), ((1e-3, 2e-3), (3e-3, 5e-3), (4e-3, 8e-3))),
    source="test",
    status="assumed",
)


def decode_s(batch: int, mean_context: float) -> float:
    return 1e-3 + 0.1e-3 * batch + 1e-6 * mean_context


def prefill_s(tokens: int, attended: float) -> float:
    return 2e-3 + 10e-6 * tokens + 1e-6 * attended


def mixed_s(tokens: int, attended: float, batch: int, mean_context: float) -> float:
    """As `IterationTimes.iteration_s` defines it; the decode table's shortest context is 0."""
    return prefill_s(tokens + batch, tokens * attended / (tokens + batch)) + 1e-6 * mean_context


def run(engine: Engine[Request]) -> dict[int, float]:
    """Finish times of all requests that are queued now."""
    now_s, finish_s = 0.0, {}
    while (span := engine.plan()) is not None:
        now_s += span.seconds
        finish_s.update({request.response_id: now_s for request in engine.advance(span.iterations)})
    assert len(engine) == 0
    assert engine.free_blocks == engine.kv_blocks
    return finish_s


def small_engine(kv_blocks: int = 100, max_num_seqs: int = 8, max_batched_tokens: int = 100) -> Engine[Request]:
    return Engine(LINEAR, kv_blocks, max_num_seqs, max_batched_tokens)


# --- by hand ---


def test_one_request_alone_takes_its_prefill_and_one_iteration_for_each_further_token() -> None:
    engine = small_engine()
    engine.add(Request(0, 0, prompt_tokens=10, target_tokens=4))
    # The prefill of 10 tokens yields the first; the next three see 11, 12 and 13 tokens.
    expected_s = prefill_s(10, 5) + decode_s(1, 11) + decode_s(1, 12) + decode_s(1, 13)
    assert run(engine)[0] == pytest.approx(expected_s, rel=1e-12)


def test_a_response_of_one_token_is_complete_after_its_prefill() -> None:
    engine = small_engine()
    engine.add(Request(0, 0, 10, 1))
    assert run(engine)[0] == pytest.approx(prefill_s(10, 5), rel=1e-12)


def test_of_two_lengths_the_longer_goes_on_in_a_smaller_batch() -> None:
    engine = small_engine()
    engine.add(Request(0, 0, 10, 2))
    engine.add(Request(1, 1, 20, 4))
    both_s = prefill_s(30, (10 * 5 + 20 * 10) / 30) + decode_s(2, (11 + 21) / 2)
    finish_s = run(engine)
    assert finish_s[0] == pytest.approx(both_s, rel=1e-12)
    assert finish_s[1] == pytest.approx(both_s + decode_s(1, 22) + decode_s(1, 23), rel=1e-12)


def test_a_third_request_waits_for_a_slot() -> None:
    engine = small_engine(max_num_seqs=2)
    for response_id, target in enumerate((2, 4, 2)):
        engine.add(Request(response_id, response_id, 10, target))
    first_s = prefill_s(20, 5) + decode_s(2, 11)  # 0 is complete and leaves its slot to 2
    second_s = first_s + mixed_s(10, 5, 1, 12)  # 2's prefill beside 1's third token
    third_s = second_s + decode_s(2, (13 + 11) / 2)  # the last token of both
    assert run(engine) == pytest.approx({0: first_s, 1: third_s, 2: third_s}, rel=1e-12)


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    engine = small_engine(max_batched_tokens=16)
    engine.add(Request(0, 0, 10, 4))
    engine.add(Request(1, 1, 30, 1))
    # Budget 16: 10 + 6, then 1 decode + 15, then 1 decode + the last 9.
    first_s = prefill_s(16, (10 * 5 + 6 * 3) / 16)
    second_s = mixed_s(15, 6 + 7.5, 1, 11)
    third_s = mixed_s(9, 21 + 4.5, 1, 12)
    chunked_s = first_s + second_s + third_s
    assert run(engine) == pytest.approx({1: chunked_s, 0: chunked_s + decode_s(1, 13)}, rel=1e-12)


def test_the_newest_is_preempted_when_blocks_run_out_and_computed_again() -> None:
    engine = small_engine(kv_blocks=3)
    old, new = Request(0, 0, 15, 4), Request(1, 1, 15, 3)
    engine.add(old)
    engine.add(new)
    # Block 1 each for 15 prompt tokens and the first generated one. In the second decode iteration both need another
    # and one is left: 1 is preempted with 2 tokens generated, and 0 goes on alone with 17 known tokens.
    before_s = prefill_s(30, 7.5) + decode_s(2, 16) + decode_s(1, 17)
    # 0 holds two blocks; 1 needs two for its 17 known tokens and waits until 0 is complete.
    old_s = before_s + decode_s(1, 18)
    # 1 left 16 tokens with KV in one full block. 0 took its other block for the 17th token (1's held nothing but the
    # 17th to come, so it had none): the full one is still cached, and one token is computed, which yields the last.
    new_s = old_s + decode_s(1, 17)
    assert run(engine) == pytest.approx({0: old_s, 1: new_s}, rel=1e-12)
    assert engine.preemptions == 1
    assert (old.computed_tokens, new.computed_tokens) == (15, 15)
    assert (old.cached_tokens, new.cached_tokens) == (0, 16)


def test_without_prefix_caching_the_preempted_are_computed_again() -> None:
    engine = Engine(LINEAR, 3, 8, 100, prefix_caching=False)
    old, new = Request(0, 0, 15, 4), Request(1, 1, 15, 3)
    engine.add(old)
    engine.add(new)
    old_s = prefill_s(30, 7.5) + decode_s(2, 16) + decode_s(1, 17) + decode_s(1, 18)
    # All 17 known tokens of 1, of which the last computed yields the third and last.
    assert run(engine) == pytest.approx({0: old_s, 1: old_s + prefill_s(17, 8.5)}, rel=1e-12)
    assert (new.computed_tokens, new.cached_tokens) == (15 + 17, 0)


def test_a_group_shares_the_full_blocks_of_its_prompt() -> None:
    engine = small_engine(max_batched_tokens=200)
    group = [Request(i, 7, 40, 2) for i in range(3)]
    for request in group:
        engine.add(request)
    span = engine.plan()
    assert span is not None
    # (40 - 1) // 16 = 2 blocks are shared, the last 8 tokens are each one's own. Only the first computes the blocks.
    assert engine.kv_blocks - engine.free_blocks == 2 + 3
    assert span.seconds == pytest.approx(prefill_s(40 + 8 + 8, (40 * 20 + 2 * 8 * (32 + 4)) / 56), rel=1e-12)
    engine.advance(span.iterations)
    assert [request.computed_tokens for request in group] == [40, 8, 8]
    assert [request.cached_tokens for request in group] == [0, 32, 32]
    run(engine)


def test_without_prefix_caching_nothing_is_shared() -> None:
    engine = Engine(LINEAR, 100, 8, 200, prefix_caching=False)
    group = [Request(i, 7, 40, 2) for i in range(2)]
    for request in group:
        engine.add(request)
    engine.plan()
    assert engine.kv_blocks - engine.free_blocks == 2 * 3
    run(engine)
    assert [request.computed_tokens for request in group] == [40, 40]


def test_blocks_may_have_another_size() -> None:
    engine = Engine(LINEAR, 10, 8, 200, block_tokens=32)
    group = [Request(i, 7, 70, 30) for i in range(2)]
    for request in group:
        engine.add(request)
    engine.plan()
    assert engine.kv_blocks - engine.free_blocks == 2 + 1 + 1  # two of 32 tokens shared, and 6 tokens for each
    run(engine)  # 99 tokens have KV in the end: 4 blocks
    assert [request.cached_tokens for request in group] == [0, 64]


def test_the_last_prompt_token_is_computed_even_if_the_prompt_fills_its_blocks() -> None:
    engine = small_engine()
    group = [Request(i, 7, 32, 1) for i in range(2)]
    for request in group:
        engine.add(request)
    run(engine)
    assert [request.computed_tokens for request in group] == [32, 16]


def test_forgotten_prefixes_are_computed_again() -> None:
    engine = small_engine()
    requests = [Request(i, 7, 40, 1) for i in range(3)]
    engine.add(requests[0])
    run(engine)
    engine.add(requests[1])
    run(engine)
    engine.forget_prefixes()
    engine.add(requests[2])
    run(engine)
    assert [request.computed_tokens for request in requests] == [40, 8, 40]


def test_a_request_that_comes_with_all_its_kv_decodes_at_once() -> None:
    engine = small_engine()
    request = Request(0, 0, 10, 5, generated=3, kv_tokens=12)
    engine.add(request)
    assert run(engine)[0] == pytest.approx(decode_s(1, 13) + decode_s(1, 14), rel=1e-12)
    assert (request.computed_tokens, request.cached_tokens) == (0, 12)


def test_a_prompt_that_came_with_its_kv_is_cached_for_the_group() -> None:
    engine = small_engine()
    engine.add(Request(0, 7, 40, 3, generated=1, kv_tokens=40))
    follower = Request(1, 7, 40, 2)
    engine.add(follower)
    run(engine)
    assert follower.cached_tokens == 32


def test_the_boundary_is_the_end_of_the_iteration_that_runs() -> None:
    engine = small_engine()
    engine.add(Request(0, 0, 10, 50))
    first = engine.plan()
    assert first is not None
    engine.advance(first.iterations)
    span = engine.plan()
    assert span is not None
    two_s = decode_s(1, 11) + decode_s(1, 12)
    assert engine.boundary(span, 1e-9).iterations == 1
    assert engine.boundary(span, two_s + 1e-6).iterations == 3
    cut = engine.boundary(span, two_s - 1e-6)
    assert cut.iterations == 2
    assert cut.seconds == pytest.approx(two_s, rel=1e-12)
    assert engine.boundary(span, span.seconds) == span


def test_a_span_that_is_interrupted_just_when_it_is_over_has_nothing_left() -> None:
    engine = small_engine()
    for response_id, target in enumerate((3, 6)):
        engine.add(Request(response_id, response_id, 10, target))
    assert engine.plan() is not None
    engine.advance(1)
    span = engine.plan(1000)
    assert span is not None
    parts = engine.cut(span, span.seconds)
    assert parts is not None
    assert [request.response_id for request in engine.advance(parts[0].iterations)] == [0, 1]
    rest = engine.boundary(parts[1], 0.0)
    assert (rest.iterations, engine.advance(rest.iterations)) == (0, [])


def test_removed_requests_keep_their_tokens_and_their_blocks_until_given_back() -> None:
    engine = small_engine()
    request = Request(0, 0, 20, 50)
    engine.add(request)
    for _ in range(2):
        span = engine.plan()
        assert span is not None
        engine.advance(engine.boundary(span, 1e-9).iterations)
    removed = engine.remove({0})
    # One token from prefill, one decoded; the newest has no KV yet: 21 tokens in 2 blocks.
    assert (removed, request.generated, request.kv_tokens) == ([request], 2, 21)
    assert engine.free_blocks == engine.kv_blocks - 2
    engine.give_back(removed)
    assert engine.free_blocks == engine.kv_blocks


def test_kv_on_its_way_while_prefixes_are_forgotten_is_not_hit_later() -> None:
    engine = small_engine()
    request = Request(0, 0, 10, 60)
    engine.add(request)
    for iterations in (1, 40):
        assert engine.plan() is not None
        engine.advance(iterations)
    removed = engine.remove({0})
    assert engine.forget_prefixes()
    engine.give_back(removed)
    request.kv_tokens = 0
    engine.add(request)
    run(engine)
    assert request.cached_tokens == 0


def test_prefixes_are_not_forgotten_while_a_request_runs() -> None:
    engine = small_engine()
    engine.add(Request(0, 7, 40, 5))
    assert engine.plan() is not None
    engine.advance(1)
    assert not engine.forget_prefixes()
    follower = Request(1, 7, 40, 1)
    engine.add(follower)
    run(engine)
    assert follower.cached_tokens == 32


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((LINEAR, 100, 0, 10), "max_num_seqs=0 must be >= 1"),
        ((LINEAR, 0, 8, 10), "kv_blocks=0 must be >= 1"),
        ((LINEAR, 100, 8, 7), "max_batched_tokens=7 < max_num_seqs=8"),
    ],
)
def test_an_engine_that_could_never_run_is_refused(options: tuple[IterationTimes, int, int, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Engine(*options)


def test_a_request_longer_than_all_kv_is_refused_and_one_that_just_fits_is_not() -> None:
    engine = small_engine(kv_blocks=3)
    with pytest.raises(ValueError, match=r"response 5 needs 4 KV blocks for 40 prompt and 10 response tokens.*has 3"):
        engine.add(Request(5, 0, 40, 10))  # 49 tokens have KV before the last one
    engine.add(Request(6, 0, 40, 9))
    assert set(run(engine)) == {6}


def test_a_prefill_that_lacks_blocks_is_not_overtaken() -> None:
    # 33 tokens an iteration: 0's prompt and 17 tokens of 1's; from then on 32 of 1's beside 0's decode. 81 tokens of 1
    # take 6 of the 9 blocks and 0 takes 2, so that the last 32 tokens, in 2 blocks, do not fit. 1 is the newest and
    # starts over; 2 would fit, and stays behind it.
    engine = small_engine(kv_blocks=9, max_batched_tokens=33)
    for response_id, prompt, target in ((0, 16, 40), (1, 113, 1), (2, 5, 1)):
        engine.add(Request(response_id, response_id, prompt, target))
    finish_s = run(engine)
    assert finish_s[1] <= finish_s[2]
    assert engine.preemptions > 0


# --- against the reference ---


@dataclass(frozen=True)
class Arrival:
    time_s: float
    response_id: int
    group: int
    prompt_tokens: int
    target_tokens: int
    kv_tokens: int


@dataclass(frozen=True)
class Cut:
    """Take requests out at *time_s*, bring them back *back_s* later; never, if they are aborted."""

    time_s: float
    chosen: int  # bits: which of the ids
    back_s: float
    with_kv: bool
    aborted: bool


@dataclass(frozen=True)
class Back:
    time_s: float
    cut: int


@dataclass(frozen=True)
class Forget:
    """New weights: nothing cached may be hit any more."""

    time_s: float


@dataclass(frozen=True)
class Scenario:
    times: IterationTimes
    kv_blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    prefix_caching: bool
    completions: int  # how many the fast engine may plan at once
    events: tuple[Arrival | Cut | Forget, ...]


@dataclass
class Outcome:
    """What both engines have to agree on: `exact` to the integer, `finish_s` to rounding."""

    finish_s: dict[int, float] = field(default_factory=dict)
    exact: list[object] = field(default_factory=list)


TICK_S = 1.2345678e-3 * 2**0.5  # no sum of iterations ends on a multiple of it


def _arrival(draw: st.DrawFn, response_id: int, prompts: Sequence[int], room: int) -> Arrival:
    group = draw(st.integers(0, len(prompts) - 1))
    prompt = prompts[group]
    time_s = draw(st.one_of(st.just(0), st.integers(0, 60))) * TICK_S
    target = draw(st.integers(1, max(1, min(70, room - prompt))))
    sent = draw(st.integers(0, 9)) == 0
    return Arrival(time_s, response_id, group, prompt, target, (prompt - 1) // BLOCK_TOKENS * BLOCK_TOKENS * sent)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    kv_blocks = draw(st.one_of(st.integers(4, 20), st.integers(40, 80)))  # scarce, or enough for all
    max_num_seqs = draw(st.integers(1, 8))
    prompts = draw(st.lists(st.integers(1, min(100, kv_blocks * BLOCK_TOKENS - 1)), min_size=1, max_size=5))
    count = draw(st.integers(1, 12))
    events: list[Arrival | Cut | Forget] = [_arrival(draw, i, prompts, kv_blocks * BLOCK_TOKENS) for i in range(count)]
    for _ in range(draw(st.integers(0, 4))):
        back_s = draw(st.integers(1, 30)) * TICK_S
        time_s, chosen = draw(st.integers(1, 90)) * TICK_S, draw(st.integers(1, 2**count - 1))
        events.append(Cut(time_s, chosen, back_s, draw(st.booleans()), draw(st.integers(0, 4)) == 0))
    events += [Forget(draw(st.integers(1, 200)) * TICK_S) for _ in range(draw(st.integers(0, 2)))]
    return Scenario(
        times=draw(st.sampled_from((LINEAR, KINKED))),
        kv_blocks=kv_blocks,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_num_seqs + draw(st.integers(0, 60)),
        prefix_caching=draw(st.integers(0, 3)) > 0,
        completions=draw(st.sampled_from((1, 2, 1000, 1000))),
        events=tuple(events),
    )


class PlainItem(Item):
    """The fast engine's one simplification: the block of the last prompt token is never shared, even if it is full.

    vLLM lets a response that comes back hit a full one of any member of its group.
    """

    def hashes(self, tokens: int) -> list[Hash]:
        own = (self.prompt_tokens - 1) // BLOCK_TOKENS
        return [
            hash_ if hash_[2] < own else ("response", self.response_id, hash_[2]) for hash_ in super().hashes(tokens)
        ]


class PlainEngine(ReferenceEngine):
    """The reference, for clusters: KV of prompts that are not computed yet is not sent with a response."""

    def remove(self, response_ids: Set[int]) -> tuple[list[Item], list[list[Block]]]:
        unready = [item for item in self.running if item.response_id in response_ids and not item.decoding]
        removed, held = [], []
        for item in [*self.waiting, *self.running]:
            if item.response_id in response_ids:
                gone, tables = super().remove({item.response_id})
                removed += gone
                if item in unready:
                    self.give_back(tables)
                    item.kv_tokens = 0
                else:
                    held += tables
        return removed, held


class Agenda:
    """Applies a scenario's events to one of the engines, and notes what it looks like then."""

    def __init__(self, scenario: Scenario, engine: Engine[Request] | ReferenceEngine, outcome: Outcome) -> None:
        self.engine, self.outcome = engine, outcome
        self.due: list[tuple[float, int, Arrival | Cut | Back | Forget]] = []
        for number, event in enumerate(scenario.events):
            self.due.append((event.time_s, number, event))
            if isinstance(event, Cut):
                back_s = event.time_s + event.back_s
                self.due.append((back_s, len(scenario.events) + number, Back(back_s, number)))
        self.due.sort(key=lambda due: due[:2])
        self.away: dict[int, tuple[list[Request] | list[Item], list[list[Block]]]] = {}
        self.aborted: set[int] = set()

    def next_s(self) -> float:
        return self.due[0][0] if self.due else float("inf")

    def apply(self, now_s: float) -> None:
        while self.next_s() <= now_s:
            _, number, event = self.due.pop(0)
            match event:
                case Arrival():
                    self.arrive(event)
                case Cut():
                    self.cut(number, event)
                case Back():
                    self.bring_back(event.cut)
                case Forget():
                    self.outcome.exact.append(("forgotten", self.engine.forget_prefixes()))

    def arrive(self, event: Arrival) -> None:
        kind = Request if isinstance(self.engine, Engine) else PlainItem
        request = kind(
            event.response_id, event.group, event.prompt_tokens, event.target_tokens, kv_tokens=event.kv_tokens
        )
        self.add(request)

    def add(self, request: Request | Item) -> None:
        if isinstance(self.engine, Engine):
            assert isinstance(request, Request)
            self.engine.add(request)
        else:
            assert isinstance(request, Item)
            self.engine.waiting.append(request)

    def cut(self, number: int, event: Cut) -> None:
        chosen = {i for i in range(12) if event.chosen >> i & 1}
        removed: list[Request] | list[Item]
        held: list[list[Block]] = []
        if event.aborted:
            removed = self.engine.abort(chosen)
            self.aborted |= {request.response_id for request in removed}
        elif isinstance(self.engine, Engine):
            removed = self.engine.remove(chosen)
        else:
            removed, held = self.engine.remove(chosen)
        facts = sorted((r.response_id, r.generated, r.kv_tokens, r.computed_tokens, r.cached_tokens) for r in removed)
        self.outcome.exact.append((facts, self.free_blocks()))
        if not event.aborted:
            self.away[number] = removed, held
            if not event.with_kv:
                self.give_back(number)
                for request in removed:
                    request.kv_tokens = 0

    def give_back(self, number: int) -> None:
        removed, held = self.away[number]
        if isinstance(self.engine, Engine):
            self.engine.give_back(removed)  # type: ignore[arg-type]
        else:
            self.engine.give_back(held)
            held.clear()

    def bring_back(self, number: int) -> None:
        if number in self.away:
            self.give_back(number)
            requests: list[Request | Item] = [*self.away.pop(number)[0]]
            for request in sorted(requests, key=lambda request: request.response_id):
                self.add(request)

    def free_blocks(self) -> int:
        free = self.engine.free_blocks
        return free if isinstance(free, int) else free()


def run_fast(scenario: Scenario, seen: Counter[str]) -> Outcome:
    outcome, now_s = Outcome(), 0.0
    engine: Engine[Request] = Engine(*_options(scenario))
    agenda = Agenda(scenario, engine, outcome)

    def advance(span: Span) -> None:
        finished = engine.advance(span.iterations)
        seen["completions planned together"] += len(set(span.finish_s)) > 1
        for request, finish_s in zip(finished, span.finish_s or [span.seconds] * len(finished), strict=True):
            outcome.finish_s[request.response_id] = now_s + finish_s
            outcome.exact.append(_final(request))

    while True:
        agenda.apply(now_s)
        span = engine.plan(scenario.completions)
        assert 0 <= engine.free_blocks <= engine.kv_blocks
        if span is None:
            if not agenda.due:
                break
            now_s = max(now_s, agenda.next_s())
            continue
        if agenda.next_s() < now_s + span.seconds:
            if (parts := engine.cut(span, agenda.next_s() - now_s)) is not None:
                advance(parts[0])
                now_s, span = now_s + parts[0].seconds, parts[1]
                seen["spans cut between completions"] += 1
            span = engine.boundary(span, agenda.next_s() - now_s)
        advance(span)
        now_s += span.seconds
    outcome.exact.append((engine.preemptions, engine.free_blocks, len(engine)))
    assert engine._to_grow == 0, "spans over several completions would become rare"
    return outcome


def run_reference(scenario: Scenario, seen: Counter[str]) -> Outcome:
    outcome, now_s = Outcome(), 0.0
    engine = PlainEngine(*_options(scenario))
    agenda = Agenda(scenario, engine, outcome)
    while True:
        agenda.apply(now_s)
        cached = _hashes(engine)
        turn = engine.iterate()
        if turn is None:
            if not agenda.due:
                break
            now_s = max(now_s, agenda.next_s())
            continue
        now_s += turn[0]
        seen["waits for a slot"] += bool(engine.waiting) and len(engine.running) == engine.max_num_seqs
        seen["waits for blocks"] += bool(engine.waiting) and 0 < len(engine.running) < engine.max_num_seqs
        seen["evictions"] += not cached <= _hashes(engine)
        for item in turn[1]:
            outcome.finish_s[item.response_id] = now_s
            outcome.exact.append(_final(item))
    outcome.exact.append((engine.preemptions, engine.free_blocks(), len(engine.waiting) + len(engine.running)))
    seen["preemptions"] += engine.preemptions
    seen["chunked prefills"] += engine.chunks
    seen["aborts"] += len(agenda.aborted)
    return outcome


def _hashes(engine: ReferenceEngine) -> set[Hash]:
    return set(engine.pool.cached)


def _options(scenario: Scenario) -> tuple[IterationTimes, int, int, int, bool]:
    return (
        scenario.times, scenario.kv_blocks, scenario.max_num_seqs, scenario.max_batched_tokens, scenario.prefix_caching
    )  # fmt: skip


def _final(request: Request | Item) -> tuple[int, ...]:
    return (request.response_id, request.generated, request.computed_tokens, request.cached_tokens)


def test_the_engine_that_jumps_equals_the_one_that_goes_step_by_step() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
    @given(scenarios())
    def check(scenario: Scenario) -> None:
        expected = run_reference(scenario, seen)
        got = run_fast(scenario, seen)
        assert got.finish_s == pytest.approx(expected.finish_s, rel=1e-9, abs=0)
        assert list(got.finish_s) == list(expected.finish_s)
        assert got.exact == expected.exact
        seen["examples"] += 1
        cuts = [fact for fact in got.exact if isinstance(fact, tuple) and isinstance(fact[0], list)]
        ends = [fact for fact in got.exact if isinstance(fact, tuple) and len(fact) == 4]
        seen["removals"] += sum(bool(facts) for facts, _ in cuts)
        seen["removals in mid-generation"] += sum(any(fact[1] for fact in facts) for facts, _ in cuts)
        seen["prefix hits"] += sum(fact[3] > 0 for fact in ends)
        prompts = {e.response_id: e.prompt_tokens for e in scenario.events if isinstance(e, Arrival)}
        seen["hits after preemption or return"] += sum(fact[3] >= prompts[fact[0]] for fact in ends)
        seen["caches forgotten"] += sum(fact == ("forgotten", True) for fact in got.exact)

    check()
    rare = {what: seen[what] for what in WANTED if seen[what] < 200}
    assert seen["examples"] >= 1000
    assert not rare, f"the sample hardly holds {rare}"


WANTED = (
    "waits for a slot", "waits for blocks", "preemptions", "chunked prefills", "prefix hits", "evictions", "removals",
    "removals in mid-generation", "hits after preemption or return", "aborts", "caches forgotten",
    "completions planned together", "spans cut between completions",
)  # fmt: skip
