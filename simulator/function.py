"""A function's life as a SimPy process: lease GPUs, start, then one task after the other until it is released."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import simpy

from simrl.policies.contract import Role, Stage, State
from simrl.simulator.engine import BLOCK_TOKENS, Engine, Request, Span
from simrl.traces.streams import stream

if TYPE_CHECKING:
    from simrl.simulator.backend import SimulatedBackend

Process = Generator[simpy.Event, Any, None]


@dataclass(slots=True, eq=False)
class Rollout(Request):
    """A response on its way through a step."""

    step: int = 0
    function: str | None = None
    serving: Serving | None = None  # where it is, or is under way to
    weights_version: int = 0
    assigned_s: float = 0.0
    finished_s: float | None = None
    prepared_s: float | None = None
    migrations: int = 0


@dataclass(slots=True, eq=False)
class Serving:
    """A task: generate what arrives until nothing is left and nothing is under way."""

    function: SimFunction
    inbox: deque[Rollout] = field(default_factory=deque)
    expected: int = 0

    def deliver(self, rollouts: Iterable[Rollout]) -> None:
        """Hand over responses that were expected here; those redirected meanwhile go on without their KV."""
        for rollout in rollouts:
            assert rollout.serving is not None, "a response under way has a destination"
            if rollout.serving is self:
                self.expected -= 1
                self.inbox.append(rollout)
            else:
                rollout.kv_tokens = 0
                rollout.serving.deliver([rollout])
        self.function.poke()


@dataclass(slots=True, eq=False)
class Gang:
    """Functions that do something together: it begins when all are there, and when *after* has fired."""

    members: int
    go: simpy.Event
    seconds: float
    after: simpy.Event | None = None
    arrived: int = 0
    done: int = 0

    def wait_for_weights(self) -> Process:
        """Let the gang go once *after* has fired."""
        assert self.after is not None
        yield self.after
        self.go.succeed()


class SimFunction:
    """A simulated function. Decisions append to its task queue; `life` works it off."""

    def __init__(
        self, cluster: SimulatedBackend, name: str, gpus: int, roles: tuple[Role, ...], node: int | None
    ) -> None:
        self.cluster, self.name, self.gpus, self.roles = cluster, name, gpus, roles
        self.wanted_node = node
        self.node: int | None = None
        self.gpu_ids: tuple[int, ...] = ()
        self.state = State.STARTING
        self.role: Role | None = None
        self.engine: Engine[Rollout] | None = None
        self.unfinished: dict[int, Rollout] = {}
        self.assigned_by_step: dict[int, int] = {}
        self.unfinished_by_step: dict[int, int] = {}
        self.ready = cluster.env.event()
        self._tasks: deque[Process | Serving] = deque()
        self._serving: Serving | None = None
        self.removals: list[tuple[dict[int, Rollout], Serving, bool]] = []
        self._sending = 0
        self._wake_up = cluster.env.event()
        self._interruptible = False
        self._span: Span | None = None  # what the engine is at
        self._span_start_s = 0.0
        self._stage: Stage | None = None
        self._interval: tuple[str, Stage | None, float] | None = None
        self._after = "started"
        self.process = cluster.env.process(self.life())

    def completed(self) -> int:
        """Decode iterations that the engine has finished since its batch last changed."""
        if self.engine is None or self._span is None:
            return 0
        return self.engine.completed(self._span, self.cluster.env.now - self._span_start_s)

    def catch_up(self) -> None:
        """Book the completions so far of a span over several, which nobody asked to hear of at once."""
        if self.engine is None or self._span is None or not self._span.finish_s:
            return
        start_s = self._span_start_s
        parts = self.engine.cut(self._span, self.cluster.env.now - start_s)
        if parts is not None:
            over, self._span = parts
            self._span_start_s = start_s + over.seconds
            self._advance(over, start_s)

    def _advance(self, span: Span, start_s: float) -> None:
        assert self.engine is not None
        finished = self.engine.advance(span.iterations)
        if finished:
            ends = [start_s + finish_s for finish_s in span.finish_s] or [start_s + span.seconds] * len(finished)
            self.cluster.rollouts_finished(self, finished, ends)

    def slots(self) -> int:
        """Responses that it can take with decode latency still flat and KV fitting even if all grow to the cap."""
        if "decode" not in self.roles or self.engine is None:
            return 0
        costs = self.cluster.costs
        longest = costs.job.max_prompt_tokens + costs.job.max_response_tokens
        return min(
            costs.flat_batch(self.gpus, self.cluster.typical_context()), self.engine.kv_blocks * BLOCK_TOKENS // longest
        )

    # --- decisions ---

    def serving(self) -> Serving:
        """The task that takes new responses: the one running or queued last, else a new one."""
        last = self._tasks[-1] if self._tasks else self._serving
        if isinstance(last, Serving):
            return last
        task = Serving(self)
        self.add_task(task)
        return task

    def add_task(self, task: Process | Serving) -> None:
        """Queue a task."""
        self._tasks.append(task)
        self.poke()

    def remove(self, rollouts: Sequence[Rollout], target: Serving, with_kv: bool) -> None:
        """Send unfinished responses on to *target*: those in the engine at the end of its iteration."""
        engine_ids = self._engine_ids()
        in_engine = {rollout.response_id: rollout for rollout in rollouts if rollout.response_id in engine_ids}
        for rollout in rollouts:
            old = rollout.serving
            assert old is not None, "an assigned response has a place"
            rollout.serving = target
            target.expected += 1
            if rollout in old.inbox:
                old.inbox.remove(rollout)
                target.deliver([rollout])
            elif rollout.response_id not in in_engine:
                old.expected -= 1  # under way; `old` will send it on
        if in_engine:
            self.removals.append((in_engine, target, with_kv))
        self.poke()

    def leaving(self) -> set[int]:
        """Responses in the engine that are to leave at the end of the iteration."""
        return {response_id for rollouts, _, _ in self.removals for response_id in rollouts}

    def _engine_ids(self) -> set[int]:
        if self.engine is None:
            return set()
        return {*self.engine.running, *(request.response_id for request in self.engine.waiting)}

    def poke(self) -> None:
        """Look at the queues again: at the end of the current iteration, or at once when waiting."""
        if self._interruptible:
            self._interruptible = False
            self.process.interrupt()
        elif not self._wake_up.triggered:
            self._wake_up.succeed()

    # --- life ---

    def life(self) -> Process:
        """Lease, start, then work off tasks until released."""
        yield from self._start()
        while self.state is not State.GONE:
            if not self._tasks:
                if self.state is not State.PARKED:
                    self._enter("idle", self._stage)
                    self.state = State.IDLE
                    self.cluster.idle(self, self._after)
                yield from self._wait(lambda: bool(self._tasks))
            task = self._tasks.popleft()
            if isinstance(task, Serving):
                yield from self._serve(task)
            else:
                yield from task

    def _wait(self, condition: Callable[[], bool]) -> Process:
        while not condition():
            yield from self._wait_once()

    def _enter(self, state: str | None, stage: Stage | None = None) -> None:
        """Close the current interval and open one in *state*; None opens none."""
        now = self.cluster.env.now
        if self._interval is not None:
            old_state, old_stage, start_s = self._interval
            if (state, stage) == (old_state, old_stage):
                return
            if now > start_s:
                gpu_ids = ",".join(map(str, self.gpu_ids))
                row = (self.name, self.node, self.gpus, gpu_ids, old_state, self.role, old_stage, start_s, now)
                self.cluster.recorder.workers.append(row)
        self._interval = None if state is None else (state, stage, now)

    def close(self) -> None:
        """End the open interval, as the run is over."""
        self._enter(None)

    def _work(self, stage: Stage, seconds: float, steps: Iterable[int]) -> Process:
        self._enter("busy", stage)
        self.state, self._stage = State.BUSY, stage
        start_s = self.cluster.env.now
        yield self.cluster.env.timeout(seconds)
        for step in steps:
            self.cluster.stage_active(stage, step, start_s)

    def _cold(self, seconds: float) -> Process:
        if seconds > 0:
            self._enter("cold")
            yield self.cluster.env.timeout(seconds)

    def _start(self) -> Process:
        cluster = self.cluster
        self.node, self.gpu_ids = yield cluster.pool.lease(self.gpus, self.wanted_node)
        assert self.node is not None, "a lease names its node"
        node = cluster.pool.nodes[self.node]
        rng = stream(cluster.seed, "start", self.name)
        spread = cluster.costs.start_spread()
        phases = cluster.costs.start_phases(self.gpus, self.roles, cached=False)
        drawn = {name: s * float(rng.lognormal(-(spread**2) / 2, spread)) for name, s in phases.items()}
        self._enter("cold")
        download_s = drawn.pop("download")
        if node.weights_cached is None:
            node.weights_cached = cluster.env.timeout(download_s)
        if not node.weights_cached.processed:
            yield node.weights_cached
        yield cluster.env.timeout(sum(drawn.values()))
        if {"prefill", "decode"} & set(self.roles):
            self.engine = self._new_engine()
        self.ready.succeed()

    def learner_world(self) -> int | None:
        """GPUs that share the learner's state with this function; None when it has no part in it."""
        return self.cluster.learner_world() if "learn" in self.roles else None

    def _new_engine(self) -> Engine[Rollout]:
        costs = self.cluster.costs
        return Engine(
            times=costs.times(self.gpus),
            kv_blocks=costs.kv_blocks(self.gpus, self.learner_world()),
            max_num_seqs=costs.max_num_seqs,
            max_batched_tokens=costs.max_batched_tokens,
            prefix_caching=costs.prefix_caching,
        )

    def _switch(self, role: Role) -> Process:
        if role in ("prepare", "learn"):
            yield from self._sent()  # a sleeping engine has no KV
            if self.engine is not None:
                self.engine.forget_prefixes()
        seconds = self.cluster.costs.switch_s(self.role, role, self.learner_world())
        self.state = State.BUSY
        yield from self._cold(seconds)
        if role != self.role:
            self._enter(None)  # intervals name the role they began with
        self.role = role

    # --- generation ---

    def _serve(self, task: Serving) -> Process:
        assert self.engine is not None, "only functions with an engine are assigned responses"
        self._serving = task
        yield from self._switch("decode")
        env, engine = self.cluster.env, self.engine
        while True:
            if task.inbox or self.removals:
                self._take_in(task)
            span = engine.plan(self.cluster.completions_ahead(self))
            if span is None:
                if not (task.expected or task.inbox or self.removals or len(engine)):
                    break
                self._enter("idle", self._stage)
                self.state = State.IDLE
                yield from self._wait_once()
                continue
            self._enter("busy", "generation")
            self.state, self._stage = State.BUSY, "generation"
            self._span, self._span_start_s = span, env.now
            if span.finish_s:
                self.cluster.ahead[self.name] = self
            try:
                self._interruptible = True
                yield env.timeout(span.seconds)
            except simpy.Interrupt:
                yield env.timeout(self._boundary_s())
            self._interruptible = False
            self.cluster.ahead.pop(self.name, None)
            span, self._span = self._span, None
            self._advance(span, self._span_start_s)
        self._serving = None
        self._after = "drained"

    def _boundary_s(self) -> float:
        """Let the span end with the current iteration; seconds until then."""
        self.catch_up()
        assert self.engine is not None
        assert self._span is not None
        elapsed_s = self.cluster.env.now - self._span_start_s
        self._span = self.engine.boundary(self._span, elapsed_s)
        return max(self._span.seconds - elapsed_s, 0.0)

    def _wait_once(self) -> Process:
        self._wake_up = self.cluster.env.event()
        yield self._wake_up

    def _take_in(self, task: Serving) -> None:
        assert self.engine is not None
        if task.inbox:
            self.cluster.generating({rollout.step for rollout in task.inbox})
            for rollout in task.inbox:
                self.engine.add(rollout)
            task.inbox.clear()
        removals, self.removals = self.removals, []
        for rollouts, target, with_kv in removals:
            leaving = self.engine.remove(rollouts.keys())
            if leaving:
                self._sending += 1
                self.cluster.env.process(self._send(leaving, target, with_kv))

    def _send(self, rollouts: Sequence[Rollout], target: Serving, with_kv: bool) -> Process:
        """Move responses out of the engine to *target*; their blocks are free once the KV has left."""
        assert self.engine is not None
        if with_kv:
            yield from self._transfer(sum(rollout.kv_tokens for rollout in rollouts), target.function)
        self.engine.give_back(rollouts)
        if not with_kv:
            for rollout in rollouts:
                rollout.kv_tokens = 0
        self._sending -= 1
        self.poke()
        target.deliver(rollouts)

    def _sent(self) -> Process:
        """Wait, idle, until outgoing KV has left."""
        if self._sending:
            self._enter("idle", self._stage)
            self.state = State.IDLE
        yield from self._wait(lambda: not self._sending)

    def _transfer(self, kv_tokens: int, target: SimFunction) -> Process:
        if not target.ready.processed:
            yield target.ready
        assert self.node is not None
        assert target.node is not None
        yield self.cluster.network.send(self.node, target.node, kv_tokens, min(self.gpus, target.gpus))

    def prefill_for(self, groups: Sequence[Sequence[Rollout]], target: Serving) -> Process:
        """A task: prefill each group's prompt once, piece by piece, and send the KV to *target*."""
        yield from self._switch("prefill")
        costs = self.cluster.costs
        for piece in _pieces(groups, costs.max_batched_tokens):
            lengths = [group[0].prompt_tokens for group in piece]
            tokens = sum(lengths)
            attended = sum(length * length / 2 for length in lengths) / tokens
            steps = {group[0].step for group in piece}
            self.cluster.generating(steps)
            yield from self._work("generation", costs.times(self.gpus).prefill_s(tokens, attended), steps)
            self._sending += 1
            self.cluster.env.process(self._send_prefix(piece, tokens, target))
        self._after = "drained"

    def _send_prefix(self, groups: Sequence[Sequence[Rollout]], tokens: int, target: Serving) -> Process:
        yield from self._transfer(tokens, target.function)
        self._sending -= 1
        self.poke()
        for group in groups:
            group[0].computed_tokens += group[0].prompt_tokens
            for rollout in group:
                # Whole blocks travel, and the last prompt token is computed where its logits are needed.
                rollout.kv_tokens = (rollout.prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            target.deliver(group)

    # --- the other stages ---

    def prepare(self, rollouts: Sequence[Rollout], tokens: int) -> Process:
        """A task: log-probs, values and rewards."""
        loaded = self.role == "prepare"
        yield from self._switch("prepare")
        seconds = self.cluster.costs.prepare_s(tokens, len(rollouts), self.gpus, loaded=loaded)
        yield from self._work("preparation", seconds, {rollout.step for rollout in rollouts})
        self._after = "prepared"
        self.cluster.prepared(rollouts)

    def learn(self, gang: Gang, step: int) -> Process:
        """A task: learn together with the rest of *gang*."""
        yield from self._switch("learn")
        yield from self._gather(gang)
        yield from self._work("learning", gang.seconds, {step})
        self._after = "learned"
        gang.done += 1
        if gang.done == gang.members:
            self.cluster.learned()

    def sync(self, gang: Gang, step: int) -> Process:
        """A task: take the learner's newest weights into the engine."""
        yield from self._switch("decode" if "decode" in self.roles else "prefill")
        yield from self._gather(gang)
        yield from self._work("weight_sync", gang.seconds, {step})
        assert self.engine is not None
        self.engine.forget_prefixes()
        self._after = "synced"

    def send_weights(self, gang: Gang, step: int) -> Process:
        """A task: give the learner's shards to a sync that this function's own engine has no need of."""
        yield from self._gather(gang)
        yield from self._work("weight_sync", gang.seconds, {step})
        self._after = "synced"

    def _gather(self, gang: Gang) -> Process:
        """Wait for the rest of the gang, idle."""
        gang.arrived += 1
        if gang.arrived == gang.members:
            if gang.after is None or gang.after.processed:
                gang.go.succeed()
            else:
                self.cluster.env.process(gang.wait_for_weights())
        if not gang.go.triggered:
            self._enter("idle", self._stage)
            self.state = State.IDLE
        if not gang.go.processed:
            yield gang.go

    def park(self) -> Process:
        """A task: give the GPUs back, keep the process in host memory."""
        self.state = State.BUSY
        yield from self._sent()
        if self.engine is not None:
            self.engine.forget_prefixes()
        yield from self._cold(self.cluster.costs.park_s(self.gpus, self.roles, self.learner_world()))
        self._let_go()
        self.state, self.role, self._stage = State.PARKED, None, None
        self._enter("parked")

    def wake(self) -> Process:
        """A task: come back onto GPUs of the same node."""
        self.state = State.STARTING
        node, gpu_ids = yield self.cluster.pool.lease(self.gpus, self.node)
        self._enter(None)  # parked until here, without GPUs
        self.node, self.gpu_ids = node, gpu_ids
        yield from self._cold(self.cluster.costs.wake_s(self.gpus, self.roles, self.learner_world()))
        self._after = "woken"

    def release(self) -> Process:
        """A task: end, once outgoing KV has left."""
        yield from self._sent()
        if self.state is not State.PARKED:
            self._let_go()
        self._enter(None)
        self.state = State.GONE

    def _let_go(self) -> None:
        self._enter(None)
        assert self.node is not None
        self.cluster.pool.give_back(self.node, self.gpu_ids)
        self.gpu_ids = ()


def _pieces(groups: Sequence[Sequence[Rollout]], max_tokens: int) -> list[list[Sequence[Rollout]]]:
    """Groups in order, cut so that the prompts of a piece fit one iteration's token budget."""
    pieces: list[list[Sequence[Rollout]]] = []
    room = 0
    for group in groups:
        tokens = group[0].prompt_tokens
        if not pieces or tokens > room:
            pieces.append([])
            room = max_tokens
        pieces[-1].append(group)
        room -= tokens
    return pieces
