"""Functions of the simulated cluster: what things take comes from the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import simpy

from simrl.policies.contract import Role, State
from simrl.policies.runtime.function import ClusterFunction, Process, Serving, Trip
from simrl.policies.runtime.rollout import Rollout
from simrl.simulator.engine import Engine, Request, Span
from simrl.simulator.faults import SlowTimes
from simrl.simulator.keep_alive import Kept
from simrl.simulator.movement import PULLS
from simrl.simulator.network import GpuLinks, Link, Load
from simrl.traces.iteration import IterationTimes
from simrl.traces.streams import stream

if TYPE_CHECKING:
    from simrl.simulator.backend import SimulatedBackend


class SimFunction(ClusterFunction):
    """A simulated function."""

    cluster: SimulatedBackend

    def __init__(
        self, cluster: SimulatedBackend, name: str, gpus: int, roles: tuple[Role, ...], node: int | None
    ) -> None:
        self.engine: Engine[Request] | None = None
        self.engine_awake = False
        self._span: Span | None = None  # what the engine is at
        self._span_start_s = 0.0
        machine = cluster.costs.node
        self.links = GpuLinks.of(gpus, machine.link_bytes_per_s, machine.host_bytes_per_s)
        super().__init__(cluster, name, gpus, roles, node)

    def learner_world(self) -> int | None:
        """GPUs that share the learner's state with this function; None when it has no part in it."""
        return self.cluster.learner_world() if "learn" in self.roles else None

    def _move(self, load: Load, link: Link) -> simpy.Event | None:
        """Between its GPUs and host memory; None if it takes no time."""
        return self.cluster.network.move(load, {link: 1.0}) if load.fixed_s or load.size_bytes else None

    # --- life ---

    def _take_gpus(self, node: int | None, same: tuple[int, ...] | None = None) -> Process:
        """Wait for GPUs: where a kept process of this kind waits, if there is room."""
        if node is None:
            kept = self.cluster.keep_alive.nodes(self.gpus, self.roles)
            node = next((n for n in self.cluster.pool.nodes_with_room(self.gpus) if n in kept), None) if kept else None
        return (yield from super()._take_gpus(node, same))

    def start_up(self) -> Process:
        """Go on with a kept process, or start one."""
        assert self.node is not None
        if self.cluster.keep_alive.take(self.name, self.node, self.gpus, self.roles):
            wake = self.wake_work()
            if wake is not None:
                yield wake
        else:
            yield from self._cold_start(self.node)
        if {"prefill", "decode"} & set(self.roles):
            self.engine, self.engine_awake = self._new_engine(), True

    def _cold_start(self, node: int) -> Process:
        """Each phase is drawn for itself; image and weights are pulled once a node."""
        if not self.cluster.options.images_cached:
            rng = stream(self.cluster.seed, "start", self.name, "image")
            yield self._pull("image", node, self._drawn("image", rng))
        rng = stream(self.cluster.seed, "start", self.name)
        for phase, seconds in self.cluster.costs.movement.start_phases(self.gpus, self.roles, cached=False).items():
            factor = self._drawn(phase, rng)
            yield self._pull(phase, node, factor) if phase in PULLS else self.cluster.env.timeout(seconds * factor)

    def _pull(self, phase: str, node: int, factor: float) -> simpy.Event:
        load = self.cluster.costs.movement.pull_load(PULLS[phase])
        return self.cluster.network.pull(phase, node, load.times(factor))

    def _drawn(self, phase: str, rng: np.random.Generator) -> float:
        """A phase's time as a multiple of what is expected: lognormal, with a mean of 1."""
        spread = self.cluster.costs.movement.start_spread(phase)
        return float(rng.lognormal(-(spread**2) / 2, spread))

    def _times(self) -> IterationTimes:
        """Of its engine, on its node."""
        times, factor = self.cluster.costs.times(self.gpus), self.cluster.slowness(self.node)
        if len(self.cluster.at_work) == 1:
            factor *= self.cluster.costs.alone_factor
        return times if factor == 1 else SlowTimes(times, factor)

    def _new_engine(self) -> Engine[Request]:
        costs = self.cluster.costs
        return Engine(
            times=self._times(),
            kv_blocks=costs.memory.kv_blocks(self.gpus, self.learner_world()),
            max_num_seqs=costs.max_num_seqs,
            max_batched_tokens=costs.max_batched_tokens,
            prefix_caching=costs.prefix_caching,
            block_tokens=costs.block_tokens,
        )

    def switch(self, role: Role) -> simpy.Event | None:
        """Sleep or wake the engine, move the learner's state if it is kept in host memory."""
        self.engine_awake = role in ("prefill", "decode")
        load = self.cluster.costs.movement.switch_load(
            self.role, role, self.gpus, self.learner_world(), self._engines_awake()
        )
        return self._move(load, self.links.to_host if role in ("prefill", "decode") else self.links.from_host)

    def park_work(self) -> simpy.Event | None:
        """GPU to host memory, where kept processes make room."""
        self.engine_awake = False
        self.cluster.make_host_room(self)
        load = self.cluster.costs.movement.park_load(self.gpus, self.roles, self.learner_world())
        return self._move(load, self.links.to_host)

    def wake_work(self) -> simpy.Event | None:
        """Host memory to GPU."""
        self.engine_awake = True
        awake = self._engines_awake()
        load = self.cluster.costs.movement.wake_load(self.gpus, self.roles, self.learner_world(), awake)
        return self._move(load, self.links.from_host)

    def _engines_awake(self) -> int | None:
        """On its node, its own included; None where that makes no difference."""
        if not self.cluster.costs.movement.wakes_side_by_side:
            return None
        there = (f for f in self.cluster.functions.values() if isinstance(f, SimFunction) and f.node == self.node)
        return sum(function.engine_awake and function.state is not State.GONE for function in there)

    def release(self) -> Process:
        """A task: end, once outgoing KV has left; with a keep-alive the process waits in host memory for a while."""
        keep = self.cluster.keep_alive.keep_s > 0 and self.engine is not None and "learn" not in self.roles
        if keep and self.state is not State.PARKED:
            self.state = State.BUSY
            yield from self._sent()
            yield from self.cold(self.park_work())
        yield from super().release()
        if keep:
            assert self.node is not None
            host_bytes = self.gpus * self.cluster.costs.memory.resident_bytes(self.gpus, self.roles, None)
            kept = Kept(self.name, self.node, self.gpus, frozenset(self.roles), host_bytes, self.cluster.env.now)
            self.cluster.keep_alive.keep(kept, self.cluster.host_room(self.node))

    def break_down(self) -> set[int]:
        """Responses leave the engine with the tokens of the iterations that are over."""
        if self.engine is None:
            return set()
        self._takes_turns(False)
        self.catch_up()
        completed, self._span, now = self._completed(), None, self.cluster.env.now
        if completed:
            self._advance(Span(completed, now - self._span_start_s), self._span_start_s)
        there = self.engine_ids()
        self.engine.abort(there)
        return there

    def drop(self, rollouts: Sequence[Rollout]) -> None:
        """Free the blocks that were kept for sending their KV."""
        if self.engine is not None:
            self.engine.give_back([rollout for rollout in rollouts if isinstance(rollout, Request)])

    def forget_prefixes(self) -> None:
        """Empty the engine's prefix cache."""
        if self.engine is not None:
            self.engine.forget_prefixes()

    # --- generation ---

    def engine_ids(self) -> set[int]:
        """Responses that are in the engine, waiting or running."""
        if self.engine is None or not len(self.engine):
            return set()
        return {*self.engine.running, *(request.response_id for request in self.engine.waiting)}

    def take_in(self, task: Serving) -> Process:
        """Hand arrivals to the engine, let responses leave it."""
        assert self.engine is not None, "only functions with an engine are assigned responses"
        if task.inbox:
            self.cluster.generating({rollout.step for rollout in task.inbox})
            for rollout in task.inbox:
                assert isinstance(rollout, Request)
                self.engine.add(rollout)
            task.inbox.clear()
        removals, self.removals = self.removals, []
        for rollouts, target, with_kv in removals:
            leaving = self.engine.remove(rollouts.keys())
            if leaving:
                trip = Trip(self)
                trip.begin(leaving)
                self.sending(self._migrate(leaving, target, with_kv, trip))
        yield from ()  # nothing of this takes time

    def _migrate(self, requests: Sequence[Request], target: Serving, with_kv: bool, trip: Trip) -> Process:
        """Move responses out of the engine to *target*; their blocks are free once the KV has left."""
        assert self.engine is not None
        if with_kv:
            yield from self._transfer(sum(request.kv_tokens for request in requests), target.function)
        rest = trip.still(requests)
        self.drop(rest)
        if not with_kv:
            for rollout in rest:
                rollout.kv_tokens = 0
        trip.end(rest, target)

    def iterate(self) -> Process:
        """A span of the engine's, cut short at the end of an iteration if there is something to see to."""
        env, engine = self.cluster.env, self.engine
        assert engine is not None, "only functions with an engine are assigned responses"
        if self.cluster.costs.alone_factor != 1:
            self._takes_turns(len(engine) > 0)
            engine.times = self._times()
        span = engine.plan(self.cluster.completions_ahead(self))
        if span is None:
            self._takes_turns(False)
            return False
        self.generate()
        self._span, self._span_start_s = span, env.now
        if span.finish_s:
            self.cluster.ahead[self.name] = self
        try:
            self._interruptible = True
            yield env.timeout(span.seconds)
        except simpy.Interrupt:
            if self.state is State.GONE:
                raise
            yield env.timeout(self._boundary_s())
        self._interruptible = False
        self.cluster.ahead.pop(self.name, None)
        span, self._span = self._span, None
        self._advance(span, self._span_start_s)
        return True

    def _takes_turns(self, working: bool) -> None:
        """Whether it is at work; engines that share a core are slower than one alone (`alone_factor`)."""
        at_work = self.cluster.at_work
        if self.cluster.costs.alone_factor == 1 or working == (self.name in at_work):
            return
        was_alone = len(at_work) == 1
        if working:
            at_work[self.name] = self
        else:
            del at_work[self.name]
        for function in at_work.values():
            if function is not self and was_alone != (len(at_work) == 1):
                function.poke()

    def _boundary_s(self) -> float:
        """Let the span end with the current iteration; seconds until then."""
        self.catch_up()
        assert self.engine is not None
        assert self._span is not None
        elapsed_s = self.cluster.env.now - self._span_start_s
        self._span = self.engine.boundary(self._span, elapsed_s)
        return max(self._span.seconds - elapsed_s, 0.0)

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

    def _transfer(self, kv_tokens: int, target: ClusterFunction) -> Process:
        if not (yield from self.reaches(target)):
            return
        assert isinstance(target, SimFunction)
        assert self.node is not None
        assert target.node is not None
        load = self.cluster.costs.movement.kv_load(kv_tokens)
        yield self.cluster.network.send(load, (self.node, self.links), (target.node, target.links))

    def prefill(self, groups: Sequence[Sequence[Rollout]]) -> simpy.Event:
        """One iteration over the prompts of *groups*."""
        lengths = [group[0].prompt_tokens for group in groups]
        tokens = sum(lengths)
        attended = sum(length * length / 2 for length in lengths) / tokens
        return self.cluster.env.timeout(self._times().prefill_s(tokens, attended))

    def send_prefix(self, groups: Sequence[Sequence[Rollout]], target: ClusterFunction) -> Process:
        """Whole blocks travel; the last prompt token is computed where its logits are needed."""
        yield from self._transfer(sum(group[0].prompt_tokens for group in groups), target)

    def prefix_sent(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """What their target finds there."""
        block = self.cluster.costs.block_tokens
        for group in groups:
            group[0].computed_tokens += group[0].prompt_tokens
            for rollout in group:
                rollout.kv_tokens = (rollout.prompt_tokens - 1) // block * block

    def prepare_work(self, rollouts: Sequence[Rollout], *, loaded: bool) -> simpy.Event:
        """Log-probs, values and rewards."""
        tokens = [rollout.prompt_tokens + rollout.generated for rollout in rollouts]
        seconds = self.cluster.costs.learning.prepare_s(tokens, self.gpus, loaded=loaded)
        return self.cluster.env.timeout(seconds * self.cluster.slowness(self.node))

    # --- what it reports ---

    def slots(self) -> int:
        """Up to the batch at which decode latency stays flat, and that KV holds if all grow to the cap."""
        if "decode" not in self.roles or self.engine is None:
            return 0
        costs = self.cluster.costs
        longest = costs.job.max_prompt_tokens + costs.job.max_response_tokens
        flat = costs.flat_batch(self.gpus, self.cluster.typical_context())
        return min(flat, self.engine.kv_blocks * self.engine.block_tokens // longest)

    def _completed(self) -> int:
        """Decode iterations that the engine has finished since its batch last changed."""
        if self.engine is None or self._span is None:
            return 0
        return self.engine.completed(self._span, self.cluster.env.now - self._span_start_s)

    def kv_used(self) -> float:
        """Used share of its KV blocks."""
        return self.engine.kv_used(self._completed()) if self.engine is not None else 0.0

    def generated(self, rollout: Rollout) -> int:
        """Tokens of a response that is here, in the engine or not."""
        if self.engine is None:
            return rollout.generated
        assert isinstance(rollout, Request)
        return self.engine.generated(rollout, self._completed())
