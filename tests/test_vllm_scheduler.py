"""The reference engine against vLLM's own scheduler: the same blocks, in the same order, after every iteration."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
from reference_engine import BLOCK_TOKENS, Block, BlockPool, Item, ReferenceEngine

from simrl.traces.iteration import IterationTimes, Table

TIMES = IterationTimes(
    Table((1, 2), (0, 1), ((1.0, 1.0), (1.0, 1.0))),
    Table((1, 2), (0, 1), ((1.0, 1.0), (1.0, 1.0))),
    source="test",
    status="assumed",
)
MODEL = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64,
    "max_position_embeddings": 1024,
}  # fmt: skip
MAX_MODEL_LEN = 1024  # more than any case has
CASES = 800
SECOND_WAVE = 200  # iteration


# --- cases ---


@dataclass(frozen=True)
class Arrival:
    """A response arrives, perhaps with generated tokens and with KV of its first tokens."""

    iteration: int
    response_id: int
    group: int
    prompt_tokens: int
    target_tokens: int
    generated: int
    kv_tokens: int


@dataclass(frozen=True)
class Cut:
    """Responses are taken out, and are back *after* iterations later."""

    iteration: int
    chosen: frozenset[int]
    after: int
    with_kv: bool


@dataclass(frozen=True)
class Abort:
    iteration: int
    chosen: frozenset[int]


@dataclass(frozen=True)
class Reset:
    iteration: int


Event = Arrival | Cut | Abort | Reset


@dataclass(frozen=True)
class Case:
    kv_blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    prefix_caching: bool
    events: tuple[Event, ...]


def random_case(rng: random.Random) -> Case:
    """Two waves of responses: the second comes when the first is mostly done, so that a reset finds the engine idle."""
    kv_blocks = rng.randint(3, 24)
    room_tokens = kv_blocks * BLOCK_TOKENS
    lengths = (rng.choice((16, 32, 48, 64, rng.randint(1, 100), rng.randint(1, 100))) for _ in range(4))
    prompts = [min(tokens, room_tokens - 1) for tokens in lengths]
    ids = range(rng.randint(2, 14))
    events: list[Event] = [random_arrival(rng, i, prompts, room_tokens) for i in ids]
    for _ in range(rng.randint(0, 2)):
        chosen = frozenset(i for i in ids if rng.random() < 0.4)
        events.append(Cut(random_iteration(rng), chosen, rng.randint(1, 20), rng.random() < 0.5))
    aborted = rng.sample(ids, min(rng.randint(0, 3), len(ids)))
    events += [Abort(random_iteration(rng), frozenset({i})) for i in aborted]
    events += [Reset(rng.randint(1, SECOND_WAVE + 20)) for _ in range(rng.randint(0, 2))]
    max_num_seqs = rng.randint(1, 8)
    return Case(
        kv_blocks=kv_blocks,
        max_num_seqs=max_num_seqs,
        max_batched_tokens=max_num_seqs + rng.randint(0, rng.choice((20, 100, 400))),
        prefix_caching=rng.random() < 0.9,
        events=tuple(sorted(events, key=lambda event: event.iteration)),
    )


def random_iteration(rng: random.Random) -> int:
    return rng.randint(1, 70) + rng.choice((0, SECOND_WAVE))


def random_arrival(rng: random.Random, response_id: int, prompts: Sequence[int], room_tokens: int) -> Arrival:
    group = rng.randrange(len(prompts))
    prompt = prompts[group]
    target = rng.randint(1, min(90, room_tokens - prompt))
    generated = rng.randrange(target) if rng.random() < 0.3 else 0
    known = prompt + generated
    sent = rng.choice((known - 1, known // 2, prompt // BLOCK_TOKENS * BLOCK_TOKENS)) if rng.random() < 0.3 else 0
    iteration = rng.choice((0, rng.randint(0, 60), SECOND_WAVE, SECOND_WAVE + rng.randint(0, 20)))
    return Arrival(iteration, response_id, group, prompt, target, generated, min(sent, known - 1))


# --- what is compared ---


@dataclass(frozen=True)
class Snapshot:
    """An iteration as scheduled, and the state that it leaves behind. Blocks are numbers from 1, as in vLLM."""

    scheduled: tuple[tuple[int, int, int], ...]  # response, tokens that had KV before, tokens to compute
    tables: tuple[tuple[int, ...], ...]  # blocks of the scheduled responses
    cached: tuple[int, ...]  # tokens that they had KV of when they were admitted, over all admissions
    preempted: frozenset[int]
    running: tuple[int, ...]
    waiting: tuple[int, ...]
    finished: tuple[int, ...]
    free: tuple[int, ...]  # free blocks in the order in which they will be taken
    hashed: frozenset[int]  # blocks that can be hit


class Side(Protocol):
    """One of the two schedulers."""

    def arrive(self, event: Arrival) -> None: ...

    def cut(self, event: Cut) -> None: ...

    def bring_back(self, event: Cut) -> None: ...

    def abort(self, event: Abort) -> None: ...

    def reset(self) -> bool: ...

    def step(self) -> Snapshot: ...


# --- the reference ---


class WatchedPool(BlockPool):
    """Counts evictions."""

    def __init__(self, blocks: int, seen: Counter[str]) -> None:
        super().__init__(blocks)
        self.seen = seen

    def take(self) -> Block:
        if self.free[0].hash is not None:
            self.seen[f"evictions of {self.free[0].hash[0]} blocks"] += 1
        return super().take()

    def touch(self, blocks: Sequence[Block]) -> None:
        self.seen["hits of blocks in use"] += sum(block.users > 0 for block in blocks)
        self.seen["hits of free blocks"] += sum(block.users == 0 for block in blocks)
        self.seen["hits of one of several"] += sum(
            block.hash is not None and len(self.cached[block.hash]) > 1 for block in blocks
        )
        super().touch(blocks)


@dataclass
class WatchedEngine(ReferenceEngine):
    """Keeps what it scheduled."""

    planned: list[tuple[Item, int, int, list[Block]]] = field(default_factory=list)
    preempted: set[int] = field(default_factory=set)

    def preempt(self, item: Item) -> None:
        super().preempt(item)
        self.preempted.add(item.response_id)

    def compute(self, planned: dict[Item, int]) -> list[Item]:
        self.planned = [(item, item.kv_tokens, tokens, [*item.blocks]) for item, tokens in planned.items()]
        return super().compute(planned)


class ReferenceSide:
    def __init__(self, case: Case, seen: Counter[str]) -> None:
        self.engine = WatchedEngine(
            TIMES, case.kv_blocks, case.max_num_seqs, case.max_batched_tokens, case.prefix_caching
        )
        self.seen = seen
        self.engine.pool = WatchedPool(case.kv_blocks, seen)
        self.numbers = {block: index + 1 for index, block in enumerate(self.engine.pool.free)}
        self.away: dict[Cut, tuple[list[Item], list[list[Block]]]] = {}
        self.ran_before: set[int] = set()
        self.ever_preempted: set[int] = set()

    def arrive(self, event: Arrival) -> None:
        item = Item(
            event.response_id, event.group, event.prompt_tokens, event.target_tokens, event.generated, event.kv_tokens
        )
        self.engine.waiting.append(item)
        self.seen["prompts of whole blocks"] += event.prompt_tokens % BLOCK_TOKENS == 0
        self.seen["arrivals with all KV"] += bool(event.generated) and event.kv_tokens == item.known_tokens - 1
        self.seen["arrivals with part of the KV"] += 0 < event.kv_tokens < item.known_tokens - 1

    def cut(self, event: Cut) -> None:
        removed, held = self.engine.remove(event.chosen)
        self.away[event] = removed, held
        self.seen["removals of running responses"] += len(held)
        if not event.with_kv:
            for item in removed:
                item.kv_tokens = 0

    def bring_back(self, event: Cut) -> None:
        removed, held = self.away.pop(event)
        self.engine.give_back(held)
        self.engine.waiting.extend(removed)

    def abort(self, event: Abort) -> None:
        self.seen["aborts of running responses"] += sum(
            item.response_id in event.chosen for item in self.engine.running
        )
        self.engine.abort(event.chosen)

    def reset(self) -> bool:
        done = self.engine.forget_prefixes()
        self.seen["resets" if done else "refused resets"] += 1
        return done

    def step(self) -> Snapshot:
        engine = self.engine
        engine.planned, engine.preempted = [], set()
        turn = engine.iterate()
        self.count()
        return Snapshot(
            scheduled=tuple((item.response_id, kv_tokens, tokens) for item, kv_tokens, tokens, _ in engine.planned),
            tables=tuple(tuple(self.numbers[block] for block in blocks) for *_, blocks in engine.planned),
            cached=tuple(item.cached_tokens for item, *_ in engine.planned),
            preempted=frozenset(engine.preempted),
            running=tuple(item.response_id for item in engine.running),
            waiting=tuple(item.response_id for item in engine.waiting),
            finished=tuple(item.response_id for item in turn[1]) if turn else (),
            free=tuple(self.numbers[block] for block in engine.pool.free),
            hashed=frozenset(self.numbers[block] for blocks in engine.pool.cached.values() for block in blocks),
        )

    def count(self) -> None:
        engine, seen = self.engine, self.seen
        slots = len(engine.running) == engine.max_num_seqs
        seen["waits for a slot"] += bool(engine.waiting) and slots
        seen["waits for blocks"] += bool(engine.waiting) and bool(engine.running) and not slots
        seen["preemptions"] += len(engine.preempted)
        self.ever_preempted |= engine.preempted
        for item, kv_tokens, tokens, _ in engine.planned:
            again = item.response_id in self.ever_preempted and item.response_id not in self.ran_before
            seen["hits of own blocks after preemption"] += again and kv_tokens > item.prompt_tokens
            seen["nothing lost by preemption"] += again and kv_tokens > 0 and tokens == 1
        self.ran_before = {item.response_id for item in engine.running}


# --- vLLM ---


@dataclass
class Arrived:
    """What vLLM's scheduler asks of a KV connector: here, KV that came with a request or is being sent from one."""

    kv_tokens: dict[str, int] = field(default_factory=dict)
    sending: set[str] = field(default_factory=set)
    supports_divergent_local_hybrid_hits: bool = False

    def on_new_request(self, request: Any) -> None:
        pass

    def get_num_new_matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int, bool]:
        return max(self.kv_tokens.get(request.request_id, 0) - computed_tokens, 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, external_tokens: int) -> None:
        self.kv_tokens.pop(request.request_id, None)

    def build_connector_meta(self, scheduler_output: Any) -> None:
        pass

    def has_pending_block_frees(self) -> bool:
        return False

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, None]:
        return request.request_id in self.sending, None

    def update_connector_output(self, output: Any) -> None:
        pass

    def get_kv_connector_stats(self) -> None:
        pass

    def take_events(self) -> list[Any]:
        return []


class VllmSide:
    """vLLM's scheduler; the model is replaced by tokens that no other response has."""

    def __init__(self, case: Case, config: Any) -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        config.scheduler_config.max_num_seqs = case.max_num_seqs
        config.scheduler_config.max_num_batched_tokens = case.max_batched_tokens
        config.scheduler_config.max_num_scheduled_tokens = None
        config.cache_config.enable_prefix_caching = case.prefix_caching
        blocks = case.kv_blocks + 1  # one is the null block
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
        self.scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
        )
        self.connector = Arrived()
        self.scheduler.connector = self.connector
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self.arrivals: dict[int, Arrival] = {}
        self.visits: Counter[int] = Counter()
        self.cached: Counter[int] = Counter()
        self.away: dict[Cut, list[tuple[int, int, int]]] = {}
        self.sent: dict[Cut, list[str]] = {}

    def arrive(self, event: Arrival) -> None:
        self.arrivals[event.response_id] = event
        self.add(event.response_id, event.generated, event.kv_tokens)

    def add(self, response_id: int, generated: int, kv_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        event = self.arrivals[response_id]
        self.visits[response_id] += 1
        request_id = f"{response_id}:{self.visits[response_id]}"
        prompt = [event.group * MAX_MODEL_LEN + i for i in range(event.prompt_tokens)]
        request = Request(
            request_id,
            prompt + [self.token(response_id, i) for i in range(generated)],
            SamplingParams(max_tokens=event.target_tokens - generated, ignore_eos=True),
            None,
            block_hasher=self.hasher,
        )
        if kv_tokens:
            self.connector.kv_tokens[request_id] = kv_tokens
        self.scheduler.add_request(request)

    def token(self, response_id: int, index: int) -> int:
        return (1000 + response_id) * MAX_MODEL_LEN + index

    def chosen(self, response_ids: frozenset[int]) -> list[Any]:
        """Requests of the responses, waiting ones first."""
        requests = [*self.scheduler.waiting, *self.scheduler.running]
        return [request for request in requests if response(request.request_id) in response_ids]

    def generated(self, request: Any) -> int:
        return int(request.num_tokens) - self.arrivals[response(request.request_id)].prompt_tokens

    def cut(self, event: Cut) -> None:
        self.away[event] = []
        self.sent[event] = []
        for request in self.chosen(event.chosen):
            kv_tokens = request.num_computed_tokens
            if kv_tokens:
                self.connector.sending.add(request.request_id)
                self.sent[event].append(request.request_id)
            else:
                kv_tokens = self.connector.kv_tokens.pop(request.request_id, 0)
            generated = self.generated(request)
            self.away[event].append((response(request.request_id), generated, kv_tokens * event.with_kv))
            self.finish(request)

    def bring_back(self, event: Cut) -> None:
        from vllm.v1.outputs import KVConnectorOutput

        for request_id in self.sent.pop(event):
            self.scheduler._update_from_kv_xfer_finished(KVConnectorOutput(finished_sending={request_id}))
        for response_id, generated, kv_tokens in self.away.pop(event):
            self.add(response_id, generated, kv_tokens)

    def abort(self, event: Abort) -> None:
        for request in self.chosen(event.chosen):
            self.finish(request)

    def finish(self, request: Any) -> None:
        # One by one: of several ids, vLLM makes a set, so that the order in which it frees them is anybody's guess.
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def reset(self) -> bool:
        return bool(self.scheduler.reset_prefix_cache())

    def step(self) -> Snapshot:
        preempted: set[int] = set()
        ran_before = {request.request_id for request in self.scheduler.running}
        while True:
            output = self.scheduler.schedule()
            preempted |= {response(request_id) for request_id in output.preempted_req_ids}
            if output.num_scheduled_tokens or not output.preempted_req_ids:
                break
        scheduled: list[tuple[int, int, int]] = []
        tables: list[tuple[int, ...]] = []
        manager = self.scheduler.kv_cache_manager
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            kv_tokens = request.num_computed_tokens - tokens
            admitted = request_id not in ran_before or response(request_id) in preempted
            self.cached[response(request_id)] += kv_tokens * admitted
            scheduled.append((response(request_id), kv_tokens, tokens))
            tables.append(tuple(manager.get_block_ids(request_id)[0]))
        before = [response(request.request_id) for request in self.scheduler.running]
        self.compute(output)
        after = tuple(response(request.request_id) for request in self.scheduler.running)
        pool = manager.block_pool
        return Snapshot(
            scheduled=tuple(scheduled),
            tables=tuple(tables),
            cached=tuple(self.cached[response_id] for response_id, *_ in scheduled),
            preempted=frozenset(preempted),
            running=after,
            waiting=tuple(response(request.request_id) for request in self.scheduler.waiting),
            finished=tuple(i for i in before if i not in after),
            free=tuple(block.block_id for block in pool.free_block_queue.get_all_free_blocks()),
            hashed=frozenset(block.block_id for block in pool.blocks if block.block_hash is not None),
        )

    def compute(self, output: Any) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        sampled = []
        for request_id in output.num_scheduled_tokens:
            request = self.scheduler.requests[request_id]
            done = request.num_computed_tokens == request.num_tokens
            sampled.append([self.token(response(request_id), self.generated(request))] if done else [])
        ids = list(output.num_scheduled_tokens)
        self.scheduler.update_from_output(
            output, ModelRunnerOutput(ids, {request_id: i for i, request_id in enumerate(ids)}, sampled)
        )


def response(request_id: str) -> int:
    return int(request_id.split(":")[0])


# --- both ---


class Agenda:
    """Applies a case's events to both sides."""

    def __init__(self, case: Case, sides: Sequence[Side]) -> None:
        self.sides = sides
        self.due = list(case.events)
        self.backs: list[tuple[int, Cut]] = []

    def over(self) -> bool:
        return not self.due and not self.backs

    def apply(self, iteration: int) -> None:
        while self.due and self.due[0].iteration <= iteration:
            self.do(self.due.pop(0), iteration)
        for when, cut in [back for back in self.backs if back[0] <= iteration]:
            self.backs.remove((when, cut))
            for side in self.sides:
                side.bring_back(cut)

    def do(self, event: Event, iteration: int) -> None:
        if isinstance(event, Reset):
            if not self.backs:  # vLLM refuses while KV is being sent; the reference does not
                ours, theirs = [side.reset() for side in self.sides]
                assert ours == theirs
            return
        for side in self.sides:
            if isinstance(event, Arrival):
                side.arrive(event)
            elif isinstance(event, Cut):
                side.cut(event)
            else:
                side.abort(event)
        if isinstance(event, Cut):
            self.backs.append((iteration + event.after, event))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A vLLM configuration for a model folder without weights."""
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    folder = tmp_path_factory.mktemp("model")
    Path(folder, "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        from vllm import EngineArgs

        yield EngineArgs(
            model=str(folder),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=MAX_MODEL_LEN,
            block_size=BLOCK_TOKENS,
            async_scheduling=False,
        ).create_engine_config()


def test_the_reference_does_what_vllms_scheduler_does(config: Any) -> None:
    seen: Counter[str] = Counter()
    for seed in range(CASES):
        case = random_case(random.Random(seed))
        ours, theirs = ReferenceSide(case, seen), VllmSide(case, config)
        agenda = Agenda(case, (ours, theirs))
        iteration = 0
        while not agenda.over() or ours.engine.running or ours.engine.waiting:
            agenda.apply(iteration)
            assert ours.step() == theirs.step(), f"{seed=}, {iteration=}, {case}"
            iteration += 1
            assert iteration < 5000, f"stalled: {seed=}, {case}"
        assert ours.engine.free_blocks() == case.kv_blocks
        seen["chunked prefills"] += ours.engine.chunks
    rare = {what: seen[what] for what in WANTED if seen[what] < 100}
    assert not rare, f"the sample hardly holds {rare}"


def test_blocks_that_are_being_sent_lose_their_hashes_in_a_reset() -> None:
    engine = ReferenceEngine(TIMES, kv_blocks=8, max_num_seqs=2, max_batched_tokens=100)
    engine.waiting.append(Item(0, 0, prompt_tokens=40, target_tokens=5))
    engine.iterate()
    _, held = engine.remove({0})
    assert engine.forget_prefixes()
    engine.give_back(held)
    engine.waiting.append(again := Item(1, 0, prompt_tokens=40, target_tokens=5))
    engine.iterate()
    assert (again.cached_tokens, again.computed_tokens) == (0, 40)
    assert engine.free_blocks() == 8 - 3


WANTED = (
    "waits for a slot", "waits for blocks", "preemptions", "chunked prefills", "hits of blocks in use",
    "hits of free blocks", "hits of one of several", "hits of own blocks after preemption",
    "nothing lost by preemption", "evictions of prompt blocks", "evictions of response blocks",
    "prompts of whole blocks", "arrivals with all KV", "arrivals with part of the KV",
    "removals of running responses", "aborts of running responses", "resets", "refused resets",
)  # fmt: skip
