"""Functions of the real cluster: what they do, a host's engine and the learner's ranks really do."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import simpy

from simrl.policies.contract import Role, Start, State
from simrl.policies.runtime.function import ClusterFunction, HostDied, Process, Serving, Trip
from simrl.policies.runtime.rollout import Rollout
from simrl.real_backend.actors import Place, WarmHost
from simrl.real_backend.engine import StepReport

if TYPE_CHECKING:
    from simrl.real_backend.backend import RealBackend

ITERATIONS_PER_CALL = 16  # an engine looks at its queue between calls


class RealFunction(ClusterFunction):
    """A function that a host process works for."""

    cluster: RealBackend

    def __init__(self, cluster: RealBackend, decision: Start) -> None:
        self.host: WarmHost | None = None
        self._engine_awake = False
        self._arrivals: dict[int, Rollout] = {}  # not on the engine yet
        self._on_engine: dict[int, Rollout] = {}
        self._reports: deque[tuple[float, StepReport]] = deque()  # with their times, not booked yet
        super().__init__(cluster, decision.function, decision.gpus, decision.roles, decision.node)

    def _call(
        self, method: str, *arguments: Any, seconds: Callable[[Any], float] = lambda seconds: seconds
    ) -> simpy.Event:
        """Something that the host does."""
        assert self.host is not None, "a function that has started has a host"
        actor = self.host.actor
        return self.cluster.clock.call(lambda: getattr(actor, method).remote(*arguments), seconds)

    def places(self) -> list[Place]:
        """Its GPUs, one by one."""
        assert self.node is not None, "a function that has started has a node"
        return [Place(self.node, (gpu,)) for gpu in self.gpu_ids]

    # --- life ---

    def start_up(self) -> Process:
        """Get a host; one that is warm already counts with the time that its own start took."""
        if set(self.roles) == {"learn"}:
            return
        assert self.node is not None, "a function that starts up has its GPUs"
        hosts = self.cluster.hosts
        self.host = host = hosts.take(Place(self.node, self.gpu_ids))
        self._engine_awake = True
        self.bound_to = self.gpu_ids if hosts.placed else None
        with hosts.starting(host):
            yield self._call("ready", seconds=lambda _: host.ready())

    def switch(self, role: Role) -> simpy.Event | None:
        """An engine gives its memory up while its function prepares or learns."""
        return self._make_engine(awake=role in ("prefill", "decode"))

    def park_work(self) -> simpy.Event | None:
        """Free the engine's memory, unless it is free already."""
        return self._make_engine(awake=False)

    def wake_work(self) -> simpy.Event | None:
        """Take it again."""
        return self._make_engine(awake=True)

    def _make_engine(self, *, awake: bool) -> simpy.Event | None:
        if self.host is None or awake == self._engine_awake:
            return None
        self._engine_awake = awake
        return self._call("wake" if awake else "park")

    def end(self) -> None:
        """The host waits for the next function."""
        if self.host is not None:
            self.cluster.hosts.give_back(self.host)
            self.host = None

    def break_down(self) -> set[int]:
        """Its host is dead, or ended: tokens are known up to its last report."""
        self._reports.clear()
        there = self.engine_ids()
        self._arrivals.clear()
        self._on_engine.clear()
        if self.host is not None:
            self.cluster.hosts.discard(self.host)
            self.host = None
        return there

    def drop(self, rollouts: Sequence[Rollout]) -> None:
        """Nothing to do: KV that is sent lies in files."""

    def load_weights(self, folder: str, version: int, export_s: float) -> Process:
        """Take in weights whose export took so long; a host that dies of it is lost."""
        try:
            yield self._call("load_weights", folder, version, seconds=lambda seconds: export_s + seconds)
        except HostDied:
            self.died()

    def died(self) -> None:
        """Somebody else than its own process has found its host dead."""
        if self.state is not State.GONE:
            self.cluster.lose(self.name)

    def forget_prefixes(self) -> None:
        """Nothing to do: engines forget when they are parked and when they get new weights."""

    # --- generation ---

    def engine_ids(self) -> set[int]:
        """Responses that are in the engine, or handed to it with its next iteration."""
        return {*self._arrivals, *self._on_engine}

    def take_in(self, task: Serving) -> Process:
        """Take arrivals, let responses leave the engine."""
        if task.inbox:
            self.cluster.generating({rollout.step for rollout in task.inbox})
            self._arrivals.update((rollout.response_id, rollout) for rollout in task.inbox)
            task.inbox.clear()
        removals, self.removals = self.removals, []
        for rollouts, target, with_kv in removals:
            leaving = [rollout for response_id, rollout in rollouts.items() if response_id in self.engine_ids()]
            running = [rollout for rollout in leaving if rollout.response_id in self._on_engine]
            trip = Trip(self)
            trip.begin(leaving)
            for rollout in leaving:
                self._arrivals.pop(rollout.response_id, None)
                self._on_engine.pop(rollout.response_id, None)
            if running:
                self.generate()
                ids = [rollout.response_id for rollout in running]
                moved = yield self._call("take_out", ids, with_kv, seconds=lambda moved: moved.seconds)
                self.cluster.kv_bytes_saved += moved.bytes
                for rollout, (cached, computed) in zip(running, moved.prefills, strict=True):
                    rollout.cached_tokens += cached
                    rollout.computed_tokens += computed
            if leaving:
                self.sending(self._move(leaving, target, trip))

    def _move(self, rollouts: Sequence[Rollout], target: Serving, trip: Trip) -> Process:
        """What moves are token ids; KV lies in files, which the target's engine reads."""
        yield from self.reaches(target.function)
        trip.end(rollouts, target)

    def iterate(self) -> Process:
        """A few iterations of the engine, up to a completion that somebody may have to hear of."""
        if not (self._arrivals or self._on_engine):
            return False
        self.generate()
        arrivals = [self.cluster.work_for(rollout) for rollout in self._arrivals.values()]
        self._on_engine.update(self._arrivals)
        self._arrivals.clear()
        begin_s, clock = self.cluster.env.now, self.cluster.clock
        # The engine is in its next iteration when the policy hears of what has just happened.
        iterations = 1 if clock.in_turn and self.cluster.triggers.events else ITERATIONS_PER_CALL
        limits = iterations, self.cluster.completions_ahead(self), clock.in_turn
        call = self._call("step", arrivals, *limits, seconds=lambda reports: sum(r.seconds for r in reports))
        if clock.in_turn:  # it is done already: whoever looks meanwhile sees what is over by then
            self._report(call.value or (), begin_s, 1.0)
            self.cluster.ahead[self.name] = self
        reports = yield call
        self.cluster.ahead.pop(self.name, None)
        if not clock.in_turn:
            took_s = sum(report.seconds for report in reports)
            # Between iterations a call spends time of its own: it is spread over them.
            self._report(reports, begin_s, (self.cluster.env.now - begin_s) / took_s if took_s else 0.0)
        self._book(math.inf)
        return True

    def _report(self, reports: Sequence[StepReport], begin_s: float, stretch: float) -> None:
        ends_s = itertools.accumulate((stretch * report.seconds for report in reports), initial=begin_s)
        self._reports.extend(zip(itertools.islice(ends_s, 1, None), reports, strict=True))

    def catch_up(self) -> None:
        """Book the iterations of a call that are over."""
        self._book(self.cluster.env.now)

    def _book(self, until_s: float) -> None:
        texts, rollouts, ends = self.cluster.texts, [], []
        while self._reports and self._reports[0][0] <= until_s:
            end_s, report = self._reports.popleft()
            for response_id, token_ids in report.new_tokens.items():
                texts[response_id].extend(token_ids)
                self._on_engine[response_id].generated += len(token_ids)
            for finished in report.finished:
                rollout = self._on_engine.pop(finished.response_id)
                rollout.cached_tokens += finished.cached_tokens
                rollout.computed_tokens += finished.computed_tokens
                self.cluster.completed(rollout, finished)
                rollouts.append(rollout)
                ends.append(end_s)
            self.cluster.num_preemptions += report.num_preempted
        if rollouts:
            self.cluster.rollouts_finished(self, rollouts, ends)

    def prefill(self, groups: Sequence[Sequence[Rollout]]) -> simpy.Event:
        """Compute the prompts and leave their KV in files."""
        prompts = [self.cluster.prompt_ids(group[0]) for group in groups]
        return self._call("prefill", prompts, seconds=lambda done: done.seconds)

    def send_prefix(self, groups: Sequence[Sequence[Rollout]], target: ClusterFunction) -> Process:
        """The KV lies in files already; the target's engine reads it when the response arrives."""
        yield from ()

    def prefix_sent(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """The target's engine says itself what it found."""
        for group in groups:
            group[0].computed_tokens += group[0].prompt_tokens

    def prepare_work(self, rollouts: Sequence[Rollout], *, loaded: bool) -> simpy.Event:
        """Rewards, and log-probs under the learner's newest weights."""
        return self.cluster.clock.env.process(self._score(rollouts))

    def _score(self, rollouts: Sequence[Rollout]) -> Process:
        version, folder = self.cluster.newest_weights()
        yield self._call("load_scorer", folder, version)
        batch = self.cluster.batch_of(rollouts)
        scores = yield self._call("score", batch, seconds=lambda scores: scores.seconds)
        self.cluster.scored(rollouts, scores)

    # --- what it reports ---

    def slots(self) -> int:
        """Up to the batch at which decode latency stays flat, and that KV holds if all grow to the cap."""
        if "decode" not in self.roles or self.host is None:
            return 0
        settings, job = self.cluster.hosts.engine, self.cluster.job
        assert settings.num_kv_blocks is not None, "the backend gives engines a number of blocks"
        longest = job.max_prompt_tokens + job.max_response_tokens
        held = settings.num_kv_blocks * settings.block_tokens // longest
        return min(self.cluster.estimates().flat_batch(self.gpus), settings.max_num_seqs, held)

    def kv_used(self) -> float:
        """Used share of its KV blocks, by the known tokens of its responses."""
        settings = self.cluster.hosts.engine
        assert settings.num_kv_blocks is not None, "the backend gives engines a number of blocks"
        blocks = sum(-(-(r.prompt_tokens + r.generated) // settings.block_tokens) for r in self._on_engine.values())
        return min(blocks / settings.num_kv_blocks, 1.0)

    def generated(self, rollout: Rollout) -> int:
        """As of the last report."""
        return rollout.generated
