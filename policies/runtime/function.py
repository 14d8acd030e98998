"""A function's life as a SimPy process: lease GPUs, start, then one task after the other until it is released."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import simpy

from simrl.policies.contract import Role, Stage, State
from simrl.policies.runtime.rollout import Rollout

if TYPE_CHECKING:
    from simrl.policies.runtime.backend import ClusterBackend

Process = Generator[simpy.Event, Any, Any]


class HostDied(RuntimeError):
    """The process that a function ran in is no more."""


@dataclass(slots=True, eq=False)
class Serving:
    """A task: generate what arrives until nothing is left and nothing is under way."""

    function: ClusterFunction
    inbox: deque[Rollout] = field(default_factory=deque)
    expected: int = 0

    def deliver(self, rollouts: Sequence[Rollout]) -> None:
        """Hand over responses that were expected here; those redirected meanwhile go on without their KV."""
        here = [rollout for rollout in rollouts if rollout.serving is self]
        self.expected -= len(here)
        self.inbox.extend(here)
        if len(here) < len(rollouts):
            for rollout in rollouts:
                assert rollout.serving is not None, "a response under way has a destination"
                if rollout.serving is not self:
                    rollout.kv_tokens = 0
                    rollout.serving.deliver([rollout])
        self.function.poke()


@dataclass(slots=True, eq=False)
class Trip:
    """Responses under way from *source*, or whose prompts it computes; what is lost meanwhile is no longer on it."""

    source: ClusterFunction

    def begin(self, rollouts: Iterable[Rollout]) -> None:
        """They set out."""
        for rollout in rollouts:
            rollout.trip = self

    def still(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        """Those that are on it."""
        return [rollout for rollout in rollouts if rollout.trip is self]

    def end(self, rollouts: Iterable[Rollout], target: Serving) -> None:
        """Those that are on it arrive."""
        arriving = self.still(rollouts)
        for rollout in arriving:
            rollout.trip = None
        if arriving:
            target.deliver(arriving)


@dataclass(slots=True, eq=False)
class Gang:
    """Functions that do something together: it begins when all are there, and when *after* has fired.

    Attributes:
        members: All that take part; those that are lost leave.
        go: Fires when all are there.
        begin: Begins the work; the event fires when it is done.
        after: What it has to wait for.
        behind: Of a sync, those that take the weights.
        learns: Whether it learns.
        aborted: It will not begin, or not be finished.
    """

    members: list[ClusterFunction]
    go: simpy.Event
    begin: Callable[[], simpy.Event]
    after: simpy.Event | None = None
    behind: Sequence[ClusterFunction] = ()
    learns: bool = False
    aborted: bool = False
    arrived: list[ClusterFunction] = field(default_factory=list)
    done: int = 0
    _work: simpy.Event | None = None

    def go_if_complete(self) -> None:
        """Begin, or wait for *after*, once all are there."""
        if len(self.arrived) < len(self.members) or self.go.triggered:
            return
        if self.after is None or self.after.processed:
            self.go.succeed()
        else:
            self.go.env.process(self._wait(self.after))

    def _wait(self, after: simpy.Event) -> Process:
        yield after
        if not self.go.triggered:
            self.go.succeed()

    def leave(self, function: ClusterFunction) -> None:
        """Go on without a member that is lost."""
        self.members.remove(function)
        if function in self.arrived:
            self.arrived.remove(function)
        if self.members:
            self.go_if_complete()

    def work(self) -> simpy.Event:
        """What its members do, begun by the first who asks."""
        if self._work is None:
            self._work = self.begin()
        return self._work


class ClusterFunction(ABC):
    """A function. Decisions append to its task queue; `life` works it off.

    A backend's own kind says how it starts, changes role, generates, prepares, parks and wakes.

    Attributes:
        bound_to: GPUs that a parked function has to come back to; None: any of its node.
    """

    bound_to: tuple[int, ...] | None = None

    def __init__(
        self, cluster: ClusterBackend, name: str, gpus: int, roles: tuple[Role, ...], node: int | None
    ) -> None:
        self.cluster, self.name, self.gpus, self.roles = cluster, name, gpus, roles
        self.wanted_node = node
        self.node: int | None = None
        self.gpu_ids: tuple[int, ...] = ()
        self.state = State.STARTING
        self.role: Role | None = None
        self.unfinished: dict[int, Rollout] = {}
        self.assigned_by_step: dict[int, int] = {}
        self.unfinished_by_step: dict[int, int] = {}
        self.ready = cluster.env.event()
        self.removals: list[tuple[dict[int, Rollout], Serving, bool]] = []
        self.preparing: dict[int, Rollout] = {}  # asked to prepare, and not done
        self.gangs: list[Gang] = []  # that it is to take part in, or does
        self._tasks: deque[Process | Serving] = deque()
        self._serving: Serving | None = None
        self._sending = 0
        self._wake_up = cluster.env.event()
        self._interruptible = False
        self._learning: Gang | None = None  # that it is with
        self._lease: simpy.Event | None = None  # asked for
        self._stage: Stage | None = None
        self._interval: tuple[str, Stage | None, float] | None = None
        self._after = "started"
        self.process = cluster.env.process(self.life())

    # --- what a backend's own kind does; an event fires when it is done, None is done at once ---

    @abstractmethod
    def start_up(self) -> Process:
        """Get ready on the leased GPUs."""

    @abstractmethod
    def switch(self, role: Role) -> simpy.Event | None:
        """Wake *role* in place of the one that is awake."""

    @abstractmethod
    def take_in(self, task: Serving) -> Process:
        """Give the engine what has arrived in the inbox, take out what is to leave (`removals`)."""

    @abstractmethod
    def iterate(self) -> Process:
        """Let the engine work for a while; returns whether there was anything to do."""

    @abstractmethod
    def engine_ids(self) -> set[int]:
        """Responses that are in the engine, waiting or running."""

    @abstractmethod
    def prefill(self, groups: Sequence[Sequence[Rollout]]) -> simpy.Event:
        """Compute the prompts of *groups*."""

    @abstractmethod
    def send_prefix(self, groups: Sequence[Sequence[Rollout]], target: ClusterFunction) -> Process:
        """Send the KV of prompts."""

    @abstractmethod
    def prefix_sent(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Note with the responses what their target need not compute."""

    @abstractmethod
    def prepare_work(self, rollouts: Sequence[Rollout], *, loaded: bool) -> simpy.Event:
        """Compute log-probs, values and rewards; *loaded*: it prepared just before."""

    @abstractmethod
    def forget_prefixes(self) -> None:
        """The engine's cached KV is worthless from now on."""

    @abstractmethod
    def park_work(self) -> simpy.Event | None:
        """Leave the GPUs."""

    @abstractmethod
    def wake_work(self) -> simpy.Event | None:
        """Come back onto GPUs."""

    def end(self) -> None:  # noqa: B027
        """It is released: nothing of it is needed any more."""

    @abstractmethod
    def break_down(self) -> set[int]:
        """It is lost: book the iterations that are over; returns the responses that were in the engine."""

    @abstractmethod
    def drop(self, rollouts: Sequence[Rollout]) -> None:
        """Keep nothing more of responses that were under way from here."""

    @abstractmethod
    def slots(self) -> int:
        """Responses that it can take with decode latency still flat and KV fitting even if all grow to the cap."""

    @abstractmethod
    def kv_used(self) -> float:
        """Used share of its KV blocks."""

    @abstractmethod
    def generated(self, rollout: Rollout) -> int:
        """Tokens of a response that is here, as of now."""

    def catch_up(self) -> None:  # noqa: B027
        """Book what is over but not booked yet; kinds that book at once have nothing to do."""

    # --- decisions ---

    def place(self) -> int | None:
        """The node that it is on, was just granted GPUs of, or has asked for; None while any will do."""
        if self.node is None and self._lease is not None and self._lease.triggered:
            granted: Any = self._lease.value
            return int(granted[0])
        return self.wanted_node if self.node is None else self.node

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
        engine_ids = self.engine_ids()
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

    def keep(self, rollout: Rollout) -> None:
        """Let a response stay in the engine that was to leave it."""
        assert self._serving is not None, "responses are in an engine while it serves"
        rollout.serving = self._serving
        for leaving, _, _ in self.removals:
            leaving.pop(rollout.response_id, None)

    def poke(self) -> None:
        """Look at the queues again: at the end of the current iteration, or at once when waiting."""
        if self.state is State.GONE:
            return
        if self._interruptible:
            self._interruptible = False
            self.process.interrupt()
        elif not self._wake_up.triggered:
            self._wake_up.succeed()

    # --- life ---

    def life(self) -> Process:
        """Live until released or lost."""
        try:
            yield from self._live()
        except simpy.Interrupt:
            assert self.state is State.GONE, "only those that are lost are interrupted anywhere"
        except HostDied:
            if self.state is not State.GONE:
                self.cluster.lose(self.name)

    def _live(self) -> Process:
        """Lease, start, then work off tasks until released."""
        if self.state is not State.GONE:  # else it was lost before it began
            yield from self._start()
        while self.state is not State.GONE:
            if not self._tasks:
                if self.state is not State.PARKED:
                    self._rest()
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

    def _rest(self) -> None:
        self._enter("idle", self._stage)
        self.state = State.IDLE

    def _begin(self, stage: Stage) -> None:
        self._enter("busy", stage)
        self.state, self._stage = State.BUSY, stage

    def close(self) -> None:
        """End the open interval, as the run is over."""
        self._enter(None)

    def _work(self, stage: Stage, work: simpy.Event, steps: Iterable[int]) -> Process:
        self._begin(stage)
        start_s = self.cluster.env.now
        yield work
        for step in steps:
            self.cluster.stage_active(stage, step, start_s)

    def cold(self, work: simpy.Event | None) -> Process:
        """Hold GPUs without being of use until *work* is done."""
        if work is not None:
            self._enter("cold")
            yield work

    def _take_gpus(self, node: int | None, same: tuple[int, ...] | None = None) -> Process:
        """Wait for GPUs; returns their node and indices."""
        self._lease = self.cluster.pool.lease(self.gpus, node, same)
        granted = yield self._lease
        self._lease = None
        return granted

    def _start(self) -> Process:
        self.node, self.gpu_ids = yield from self._take_gpus(self.wanted_node)
        self._enter("cold")
        yield from self.start_up()
        self.ready.succeed()

    def _switch(self, role: Role) -> Process:
        if role in ("prepare", "learn"):
            yield from self._sent()  # a sleeping engine has no KV
            self.forget_prefixes()
        self.state = State.BUSY
        yield from self.cold(self.switch(role))
        if role != self.role:
            self._enter(None)  # intervals name the role they began with
        self.role = role

    # --- generation ---

    def _serve(self, task: Serving) -> Process:
        self._serving = task
        yield from self._switch("decode")
        while True:
            if task.inbox or self.removals:
                yield from self.take_in(task)
            if not (yield from self.iterate()):
                if not (task.expected or task.inbox or self.removals or self.engine_ids()):
                    break
                self._rest()
                yield from self._wait_once()
        self._serving = None
        self._after = "drained"

    def generate(self) -> None:
        """Its engine begins to work, or goes on."""
        self._begin("generation")

    def _wait_once(self) -> Process:
        self._wake_up = self.cluster.env.event()
        yield self._wake_up

    def sending(self, transfer: Process) -> None:
        """Let KV leave while the function goes on; it is not put to sleep before."""
        self._sending += 1
        self.cluster.env.process(self._send(transfer))

    def _send(self, transfer: Process) -> Process:
        yield from transfer
        self._sending -= 1
        self.poke()

    def _sent(self) -> Process:
        """Wait, idle, until outgoing KV has left."""
        if self._sending:
            self._rest()
        yield from self._wait(lambda: not self._sending)

    def prefill_for(self, groups: Sequence[Sequence[Rollout]], target: Serving) -> Process:
        """A task: prefill each group's prompt once, piece by piece, and send the KV to *target*."""
        trip = Trip(self)
        for group in groups:
            trip.begin(group)
        return self._prefill_for(groups, target, trip)

    def _prefill_for(self, groups: Sequence[Sequence[Rollout]], target: Serving, trip: Trip) -> Process:
        yield from self._switch("prefill")
        for planned in _pieces(groups, self.cluster.max_batched_tokens):
            piece = _still(planned, trip)
            if piece:
                steps = {group[0].step for group in piece}
                self.cluster.generating(steps)
                yield from self._work("generation", self.prefill(piece), steps)
                self.sending(self._send_prefix(piece, target, trip))
        self._after = "drained"

    def _send_prefix(self, groups: Sequence[Sequence[Rollout]], target: Serving, trip: Trip) -> Process:
        if (yield from self.reaches(target.function)):
            yield from self.send_prefix(groups, target.function)
            self.prefix_sent(_still(groups, trip))
        for group in groups:
            trip.end(group, target)

    def reaches(self, target: ClusterFunction) -> Process:
        """Wait until *target* can take KV; returns whether it is still there."""
        if not target.ready.processed:
            yield target.ready
        return target.state is not State.GONE

    # --- the other stages ---

    def prepare(self, rollouts: Sequence[Rollout]) -> Process:
        """A task: log-probs, values and rewards."""
        loaded = self.role == "prepare"
        yield from self._switch("prepare")
        work = self.prepare_work(rollouts, loaded=loaded)
        yield from self._work("preparation", work, {rollout.step for rollout in rollouts})
        self._after = "prepared"
        self.cluster.prepared(self, rollouts)

    def learn(self, gang: Gang, step: int) -> Process:
        """A task: learn together with the rest of *gang*, unless one of them is lost."""
        if not gang.aborted:
            yield from self._switch("learn")
        if gang.aborted:
            return
        self._learning = gang
        try:
            yield from self._gather(gang)
            yield from self._work("learning", gang.work(), {step})
        except simpy.Interrupt:
            if self.state is State.GONE:
                raise
            return
        finally:
            self._learning = None
        self._after = "learned"
        self.gangs.remove(gang)
        gang.done += 1
        if gang.done == len(gang.members):
            self.cluster.learned()

    def abort(self, gang: Gang) -> None:
        """Go on without learning: another member is lost."""
        self.gangs.remove(gang)
        gang.aborted = True
        if self._learning is gang and self.state is not State.GONE:
            self.process.interrupt()

    def sync(self, gang: Gang, step: int) -> Process:
        """A task: take the learner's newest weights into the engine."""
        yield from self._switch("decode" if "decode" in self.roles else "prefill")
        yield from self.send_weights(gang, step)
        self.forget_prefixes()
        gang.done += 1
        if gang.done == 1:  # it is over for all at this moment
            self.cluster.triggers.stage_finished("weight_sync", step)

    def send_weights(self, gang: Gang, step: int) -> Process:
        """A task: give the learner's shards to a sync that this function's own engine has no need of."""
        yield from self._gather(gang)
        yield from self._work("weight_sync", gang.work(), {step})
        self.gangs.remove(gang)
        self._after = "synced"

    def _gather(self, gang: Gang) -> Process:
        """Wait for the rest of the gang, idle."""
        gang.arrived.append(self)
        gang.go_if_complete()
        if not gang.go.triggered:
            self._rest()
        if not gang.go.processed:
            yield gang.go

    def park(self) -> Process:
        """A task: give the GPUs back, keep the process in host memory."""
        self.state = State.BUSY
        yield from self._sent()
        self.forget_prefixes()
        yield from self.cold(self.park_work())
        self._let_go()
        self.state, self.role, self._stage = State.PARKED, None, None
        self._enter("parked")

    def wake(self) -> Process:
        """A task: come back onto GPUs of the same node."""
        self.state = State.STARTING
        node, gpu_ids = yield from self._take_gpus(self.node, self.bound_to)
        self._enter(None)  # parked until here, without GPUs
        self.node, self.gpu_ids = node, gpu_ids
        yield from self.cold(self.wake_work())
        self._after = "woken"

    def release(self) -> Process:
        """A task: end, once outgoing KV has left."""
        yield from self._sent()
        self.end()
        if self.state is not State.PARKED:
            self._let_go()
        self._enter(None)
        self.state = State.GONE

    def die(self) -> None:
        """End at this moment, whatever it is at; its GPUs are free again."""
        self._enter(None)
        self.state = State.GONE
        if self._lease is not None:
            self.cluster.pool.withdraw(self._lease)
            self._lease = None
        elif self.gpu_ids:
            self._let_go()
        self._tasks.clear()
        self.removals.clear()
        if not self.ready.triggered:
            self.ready.succeed()  # nobody need wait for it any more
        if self.process is not self.cluster.env.active_process:
            target = self.process.target
            if target is not None:
                target.defused = True  # what it was at may still fail
            self.process.interrupt()

    def _let_go(self) -> None:
        self._enter(None)
        assert self.node is not None
        self.cluster.pool.give_back(self.node, self.gpu_ids)
        self.gpu_ids = ()


def _still(groups: Sequence[Sequence[Rollout]], trip: Trip) -> list[list[Rollout]]:
    """What of *groups* is still on its way."""
    return [rest for group in groups if (rest := trip.still(group))]


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
