"""`ClusterBackend`: the books of a cluster, which decisions are legal, and who hears of what.

What decisions take, and how they are done, is left to the simulator and to the real backend.
"""

from __future__ import annotations

import itertools
import operator
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import simpy

from simrl.policies.contract import (
    ROLES,
    STAGES,
    Assign,
    CompletionRatio,
    Completions,
    Decision,
    Estimates,
    FinishedStep,
    FunctionLost,
    InvalidDecision,
    Learn,
    Migrate,
    NodeReclaimed,
    NodeReturned,
    Park,
    PolicyStalled,
    Prepare,
    Prompt,
    Release,
    Role,
    Stage,
    Start,
    State,
    StepStarted,
    Subscribe,
    Sync,
    UnfinishedBelow,
    Wake,
)
from simrl.policies.runtime.function import ClusterFunction, Gang
from simrl.policies.runtime.leases import GpuPool
from simrl.policies.runtime.rollout import Rollout
from simrl.policies.runtime.steps import Ids, StepState, StepWork, balanced_shares, columns_of
from simrl.policies.runtime.triggers import Triggers, trigger_problem
from simrl.policies.runtime.view import View
from simrl.traces.job import Engine, Job
from simrl.traces.records import Recorder

CALLS_BEFORE_STALL = 1000
"""Times a policy may be asked in a row with nothing running, or at one and the same moment, before it is stalled."""

STEP = operator.attrgetter("step")


class ClusterBackend(ABC):
    """A cluster that trains for `job.steps` steps.

    Args:
        job: What is trained.
        engine: Options of the rollout engines.
        nodes: Machines.
        gpus_per_node: Of each.
        work: The work of a step, by its number.
        recorder: Gets every fact of the run.
        on_step: Called with the number of learned steps, for progress.
    """

    max_batched_tokens: int  # of an engine's iteration

    def __init__(
        self,
        job: Job,
        engine: Engine,
        nodes: int,
        gpus_per_node: int,
        work: Callable[[int], StepWork],
        recorder: Recorder,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.job, self.engine, self.num_nodes, self.gpus_per_node = job, engine, nodes, gpus_per_node
        self._work, self.recorder, self._on_step = work, recorder, on_step
        self.policy_wall_s = 0.0

    # --- what a kind of cluster does ---

    @abstractmethod
    def new_environment(self) -> simpy.Environment:
        """The clock."""

    @abstractmethod
    def new_function(self, decision: Start) -> ClusterFunction:
        """A function that asks for its GPUs."""

    @abstractmethod
    def new_rollouts(self, step: int, prompt: Prompt, lengths: Sequence[int]) -> Sequence[Rollout]:
        """The responses of a prompt; the id of the first is their group."""

    @abstractmethod
    def estimates(self) -> Estimates:
        """What profiling knows in advance."""

    @abstractmethod
    def misfit(self, function: ClusterFunction) -> tuple[str, str] | None:
        """Why a function has no room on its GPUs, and what would; None if it has."""

    @abstractmethod
    def parked_bytes(self, function: ClusterFunction) -> tuple[float, float]:
        """Host memory that a function takes when it is parked, and that its node has."""

    @abstractmethod
    def learn_work(self, functions: Sequence[ClusterFunction], state: StepState) -> Callable[[], simpy.Event]:
        """What begins the learning of a step on *functions*."""

    @abstractmethod
    def sync_work(self, behind: Sequence[ClusterFunction], version: int) -> Callable[[], simpy.Event]:
        """What begins sending weights of *version* to the engines of *behind*."""

    def learner_lost(self) -> None:  # noqa: B027
        """A function of the learner is lost, and with it what the learner has in memory."""

    # --- the Backend protocol ---

    def reset(self) -> View:
        """Begin the job at time 0 with an empty cluster and an empty record."""
        self.recorder.clear()
        self.env = self.new_environment()
        self.pool = GpuPool(self.env, self.num_nodes, self.gpus_per_node)
        self.functions: dict[str, ClusterFunction] = {}
        self.steps: dict[int, StepState] = {}
        self.rollouts: dict[int, Rollout] = {}
        self.history: list[FinishedStep] = []
        self.version = 0
        self.unassigned: dict[int, None] = {}
        self.unprepared = Ids()
        self.triggers = Triggers(self.env)
        self._planned: dict[str, str] = {}  # awake | parked | gone, once queued tasks are done
        self._parked_bytes: dict[str, float] = {}  # in host memory
        self._learner_gpus = 0
        self.planned_version: dict[str, int] = {}
        self._learned: dict[int, simpy.Event] = {}
        self._shards_placed = False
        self._lost_learners = 0  # functions, not replaced
        self._next_step = 0
        self._idle_calls = self._frozen_calls = 0
        self._asked_at_s = -1.0
        self._finished_context, self._finished_responses = 0.0, 0
        self.ahead: dict[str, ClusterFunction] = {}  # those whose engines are in a span over several completions
        self._over = False
        self._open_steps()
        return self._observe()

    def advance(self, decisions: Sequence[Decision]) -> View | None:
        """Carry out *decisions*, then run until a trigger fires."""
        self.policy_wall_s += time.perf_counter() - self._asked_wall_s
        self._view.expire()
        if self._over:
            raise RuntimeError("the job is over: reset() begins a new one")
        if not isinstance(decisions, Sequence):
            raise InvalidDecision(decisions, "decide returned no sequence", "a list or tuple of decisions")
        for decision in decisions:
            self._carry_out(decision)
        if decisions:
            self._check_memory(decisions)
        self._check_progress(decisions)
        try:
            while not self.triggers.events and not self._over:
                self.env.step()
        except simpy.core.EmptySchedule:
            raise PolicyStalled(self._stall_report("nothing runs and no trigger is due")) from None
        while not self._over and self.env.peek() == self.env.now:
            self.env.step()  # all that happens at this moment is told at once
        if self._over:
            for function in self.functions.values():
                function.close()
            return None
        return self._observe()

    def _observe(self) -> View:
        self._view = View(self, self.triggers.take_events())
        self.catch_up()
        self._asked_wall_s = time.perf_counter()
        return self._view

    def _check_memory(self, decisions: Iterable[Decision]) -> None:
        """Refuse functions that cannot fit; after all decisions of a moment, since learners share their state."""
        for decision in decisions:
            if isinstance(decision, Start):
                self._check_fit(decision, self.functions[decision.function])
            elif isinstance(decision, Release) and "learn" in self.functions[decision.function].roles:
                for name, function in self.functions.items():
                    if "learn" in function.roles and self._planned[name] != "gone":
                        self._check_fit(decision, function)

    def _check_fit(self, decision: Decision, function: ClusterFunction) -> None:
        problem = self.misfit(function)
        if problem is not None:
            raise InvalidDecision(decision, *problem)

    def _check_progress(self, decisions: Sequence[Decision]) -> None:
        acted = any(not isinstance(decision, Subscribe | Sync) for decision in decisions)  # a Sync may change nothing
        self._idle_calls = 0 if acted or self._runs() else self._idle_calls + 1
        self._frozen_calls = self._frozen_calls + 1 if self.env.now == self._asked_at_s else 0
        self._asked_at_s = self.env.now
        if self._frozen_calls > CALLS_BEFORE_STALL:
            raise PolicyStalled(self._stall_report(f"it was asked {self._frozen_calls} times at one moment"))
        if self._idle_calls > CALLS_BEFORE_STALL:
            raise PolicyStalled(self._stall_report(f"nothing ran in {self._idle_calls} calls"))

    def _runs(self) -> bool:
        """Whether a function is at work; those that start without GPUs wait for them."""
        for function in self.functions.values():
            if function.gpu_ids and function.state in (State.BUSY, State.STARTING):
                return True
        return False

    def _stall_report(self, why: str) -> str:
        self.catch_up()
        there = [function for function in self.functions.values() if function.state is not State.GONE]
        waiting = [function.state is State.STARTING and not function.gpu_ids for function in there]
        states = Counter("waiting for GPUs" if w else str(f.state) for f, w in zip(there, waiting, strict=True))
        unfinished = sum(step.unfinished for step in self.steps.values())
        unprepared = sum(step.unprepared for step in self.steps.values())
        shown = ", ".join(f"{count} {state}" for state, count in states.items()) or "none"
        lost = [node.index for node in self.pool.nodes if node.condition == "lost"]
        shown += f"; lost nodes: {_some(lost)}" if lost else ""
        return (
            f"policy stalled at {self.env.now:.1f} s in step {max(self.steps)}: {why};"
            f" {len(self.unassigned)} responses unassigned, {unfinished} unfinished, {unprepared} unprepared;"
            f" functions: {shown}"
        )

    # --- steps ---

    def _open_steps(self) -> None:
        """Offer the prompts of every step that the job's staleness allows."""
        while self._next_step < self.job.steps and self._next_step <= self.version + self.job.max_staleness:
            self._open_step(self._next_step)
            self._next_step += 1

    def _open_step(self, step: int) -> None:
        work = self._work(step)
        samples = self.job.responses_per_prompt
        first_id = step * self.job.responses_per_step
        groups = range(first_id, first_id + self.job.responses_per_step, samples)
        prompts: list[Prompt] = []
        rollouts: list[Rollout] = []
        for group, prompt_id, tokens, lengths in zip(
            groups, work.prompt_ids, work.prompt_tokens, work.response_tokens, strict=True
        ):
            prompts.append(Prompt(prompt_id, tokens, tuple(range(group, group + samples))))
            rollouts += self.new_rollouts(step, prompts[-1], lengths)
        total = len(rollouts)
        state = StepState(step, work, tuple(prompts), rollouts, self.env.now, total, total)
        if not self.steps and not self._finished_responses:
            self._first_context = sum(work.prompt_tokens) / len(prompts) + self.job.max_response_tokens / 8
        self.steps[step] = state
        self.rollouts.update(zip(range(first_id, first_id + total), rollouts, strict=True))
        self.unassigned.update(dict.fromkeys(range(first_id, first_id + total)))
        self.triggers.events.append(StepStarted(step, state.prompts))

    def _close_step(self, state: StepState) -> None:
        record = self.recorder
        record.samples.append(columns_of(state, self.job.responses_per_prompt))
        for rollout in state.rollouts:
            del self.rollouts[rollout.response_id]
        for stage in STAGES:
            if stage in state.spans:
                record.phases.append((state.step, state.work.epoch, stage, *state.spans[stage]))
        record.phases.append((state.step, state.work.epoch, "step", state.started_s, self.env.now))
        samples = self.job.responses_per_prompt
        lengths = [rollout.generated for rollout in state.rollouts]
        finished = FinishedStep(
            step=state.step,
            epoch=state.work.epoch,
            prompt_ids=tuple(prompt.prompt_id for prompt in state.prompts),
            response_tokens=tuple(tuple(lengths[i : i + samples]) for i in range(0, len(lengths), samples)),
            started_s=state.started_s,
            stage_s=MappingProxyType({stage: end - start for stage, (start, end) in state.spans.items()}),
            ended_s=self.env.now,
        )
        self.history.append(finished)
        self._finished_context += sum(r.prompt_tokens + r.generated / 2 for r in state.rollouts)
        self._finished_responses += len(lengths)
        del self.steps[state.step]
        for function in self.functions.values():
            function.assigned_by_step.pop(state.step, None)
            function.unfinished_by_step.pop(state.step, None)

    # --- what functions report ---

    def idle(self, function: ClusterFunction, after: str) -> None:
        """Tell those who asked."""
        self.triggers.idle(function.name, after)

    def generating(self, steps: set[int]) -> None:
        """Generation of these steps has begun."""
        for step in steps:
            self.steps[step].spans.setdefault("generation", (self.env.now, self.env.now))

    def completions_ahead(self, function: ClusterFunction) -> int:
        """Completions on *function* that can be booked together, as nobody has to be told before the last of them."""
        return self.triggers.completions_ahead(self.steps, function)

    def catch_up(self) -> None:
        """Book all completions up to now."""
        for function in self.ahead.values():
            function.catch_up()

    def stage_active(self, stage: Stage, step: int, start_s: float) -> None:
        """Widen the stage's span."""
        if step in self.steps:
            spans = self.steps[step].spans
            first_s = min(start_s, spans[stage][0]) if stage in spans else start_s
            spans[stage] = (first_s, self.env.now)

    def rollouts_finished(
        self, function: ClusterFunction, rollouts: Sequence[Rollout], finished_s: Sequence[float]
    ) -> None:
        """Book responses that *function*'s engine has finished, and fire triggers."""
        leaving = function.leaving() if function.removals else ()
        counts: dict[int, int] = {}
        for rollout, time_s in zip(rollouts, finished_s, strict=True):
            if rollout.response_id in leaving:
                self._stays(rollout, function)
            assert rollout.finished_s is None, "a response finished twice"
            rollout.finished_s = time_s
            del function.unfinished[rollout.response_id]
            counts[rollout.step] = counts.get(rollout.step, 0) + 1
        self.unprepared.add([rollout.response_id for rollout in rollouts])
        touched = []
        for step, count in counts.items():
            function.unfinished_by_step[step] -= count
            state = self.steps[step]
            state.unfinished -= count
            touched.append(state)
            if not state.unfinished:
                self.stage_active("generation", step, self.env.now)
                self.triggers.stage_finished("generation", step)
        self.triggers.completed(len(rollouts), self.steps, touched, function)

    def _stays(self, rollout: Rollout, function: ClusterFunction) -> None:
        """A response finished in the very iteration after which it was to leave *function*."""
        assert rollout.function is not None
        assert rollout.serving is not None
        owner = self.functions[rollout.function]
        rollout.serving.expected -= 1
        rollout.function, rollout.migrations = function.name, rollout.migrations - 1
        self._count(owner, rollout.step, -1)
        self._count(function, rollout.step, +1)
        function.unfinished[rollout.response_id] = owner.unfinished.pop(rollout.response_id)
        owner.poke()

    def prepared(self, function: ClusterFunction, rollouts: Sequence[Rollout]) -> None:
        """Book responses that *function* has prepared."""
        now = self.env.now
        for rollout in rollouts:
            rollout.prepared_s = now
            del function.preparing[rollout.response_id]
        for step, count in Counter(map(STEP, rollouts)).items():
            self.steps[step].unprepared -= count
        # In the order of the steps, as `Learn` takes the oldest.
        for state in itertools.takewhile(lambda state: not state.unprepared, self.steps.values()):
            if not state.prepared:
                state.prepared = True
                self.triggers.stage_finished("preparation", state.step)

    def learned(self) -> None:
        """The oldest learning step is done: its weights are the newest, and further steps may open."""
        state = next(state for state in self.steps.values() if state.learning)
        self.triggers.stage_finished("learning", state.step)
        self.version += 1
        self._close_step(state)
        if self._on_step is not None:
            self._on_step(self.version)
        self._learned[self.version].succeed()
        self._over = self.version == self.job.steps
        if not self._over:
            # The step that is now the oldest may have been below before.
            self.triggers.fire_unfinished_below(self.steps)
            self._open_steps()

    # --- losses ---

    def lose(self, name: str) -> None:
        """A function is dead, at this moment: undo what it had not finished, and tell the policy.

        Raises:
            ValueError: There is no such function.
        """
        function = self.functions.get(name)
        if function is None or function.state is State.GONE:
            raise ValueError(f"there is no function {name!r} to lose")
        self.catch_up()
        responses = self._lose_responses(function)
        self._lose_preparation(function)
        learner = "learn" in function.roles and self._planned[name] != "gone"
        self._planned[name] = "gone"
        self._parked_bytes.pop(name, None)
        self.ahead.pop(name, None)
        function.die()
        self.triggers.events.append(FunctionLost(name, responses))
        if learner:
            self._learner_gpus -= function.gpus
            self._lost_learners += 1
            self._lose_learner()
        for gang in function.gangs:
            gang.leave(function)

    def reclaim_node(self, node: int, at_s: float) -> None:
        """A node will be lost at *at_s*: tell the policy."""
        self.pool.reclaim(node)
        self.triggers.events.append(NodeReclaimed(node, at_s))

    def lose_node(self, node: int) -> list[str]:
        """A node is lost at this moment; returns its functions, which are lost with it, those that wait for it too."""
        self.pool.lose(node)
        names = [name for name, f in self.functions.items() if f.state is not State.GONE and f.place() == node]
        for name in names:
            self.lose(name)
        return names

    def return_node(self, node: int) -> None:
        """A machine stands in a lost node's place: tell the policy."""
        self.pool.restore(node, self.gpus_per_node)
        self.triggers.events.append(NodeReturned(node))

    def _lose_responses(self, function: ClusterFunction) -> tuple[int, ...]:
        """Take all responses off *function*; returns those that are unassigned again."""
        there = function.break_down()
        staying = self._not_left_yet(function)
        lost, arriving = [], []
        for rollout in self.rollouts.values():
            response_id = rollout.response_id
            if response_id in there or (response_id in function.unfinished and response_id not in staying):
                lost.append(rollout)
            elif rollout.trip is not None and rollout.trip.source is function:
                arriving.append(rollout)
        for response_id, source in staying.items():
            self._never_leaves(self.rollouts[response_id], source)
        for rollout in arriving:
            self._arrives_without_kv(rollout)
        for rollout in lost:
            self._unassign(rollout, function)
        return tuple(rollout.response_id for rollout in lost)

    def _not_left_yet(self, function: ClusterFunction) -> dict[int, ClusterFunction]:
        """Responses that were to move to *function* and are still in the engines of others."""
        return {
            response_id: source
            for source in self.functions.values()
            if source is not function
            for response_id in source.leaving()
            if response_id in function.unfinished
        }

    def _never_leaves(self, rollout: Rollout, source: ClusterFunction) -> None:
        """Its target is lost: it stays where it is."""
        self._stays(rollout, source)
        source.keep(rollout)

    def _arrives_without_kv(self, rollout: Rollout) -> None:
        """The source of its KV is lost."""
        assert rollout.trip is not None
        assert rollout.serving is not None
        rollout.trip.source.drop([rollout])
        rollout.kv_tokens = 0
        rollout.trip.end([rollout], rollout.serving)

    def _unassign(self, rollout: Rollout, lost: ClusterFunction) -> None:
        """Its tokens so far are known, its KV is lost."""
        assert rollout.function is not None
        assert rollout.serving is not None
        if rollout.trip is not None:
            rollout.trip.source.drop([rollout])
        owner = self.functions[rollout.function]
        del owner.unfinished[rollout.response_id]
        self._count(owner, rollout.step, -1)
        if owner is not lost:  # it was to move there
            rollout.serving.expected -= 1
            owner.poke()
        rollout.function = rollout.serving = rollout.trip = None
        rollout.kv_tokens = 0
        self.unassigned[rollout.response_id] = None

    def _lose_preparation(self, function: ClusterFunction) -> None:
        """What it was to prepare is unprepared again."""
        self.unprepared.add(function.preparing)
        for step in sorted({rollout.step for rollout in function.preparing.values()}):
            if not self.steps[step].unfinished:
                self.triggers.stage_finished_again("generation", step)
        function.preparing.clear()

    def _lose_learner(self) -> None:
        """Nothing is learned now; the next `Learn` goes on from the newest version, wherever it is sharded then."""
        self._shards_placed = False
        for state in self.steps.values():
            if state.learning:
                state.learning = False
                self.triggers.stage_finished_again("preparation", state.step)
        gangs = dict.fromkeys(gang for function in self.functions.values() for gang in function.gangs)
        for function in self.functions.values():
            for gang in [gang for gang in function.gangs if gang.learns]:
                function.abort(gang)
        for gang in gangs:
            if gang.after is not None and not gang.after.triggered:
                self._sync_what_there_is(gang)
        self.learner_lost()

    def _sync_what_there_is(self, gang: Gang) -> None:
        """The weights that a sync was to wait for will come later than it: it takes the newest that there are."""
        gang.after, gang.begin = None, self.sync_work(gang.behind, self.version)
        for function in gang.behind:
            self.planned_version[function.name] = self.version
            for rollout in function.unfinished.values():
                rollout.weights_version = min(rollout.weights_version, self.version)
        gang.go_if_complete()

    # --- decisions ---

    def _carry_out(self, decision: Decision) -> None:
        handler = self._HANDLERS.get(type(decision))
        if handler is None:
            names = ", ".join(kind.__name__ for kind in self._HANDLERS)
            raise InvalidDecision(decision, "it is not a decision", names)
        handler(self, decision)
        if not isinstance(decision, Subscribe):
            self.recorder.decisions.append(self._decision_row(decision))

    def _decision_row(self, decision: Decision) -> tuple[object, ...]:
        functions = getattr(decision, "functions", None) or (getattr(decision, "function", None) or decision.target,)  # type: ignore[union-attr]
        detail = {
            Start: lambda d: f"gpus={d.gpus} roles={'+'.join(d.roles)}",
            Assign: lambda d: f"prefix_from={d.prefix_from}" if d.prefix_from else "",
            Migrate: lambda d: f"with_kv={d.with_kv}",
        }.get(type(decision), lambda d: "")(decision)
        responses = len(getattr(decision, "responses", ()))
        return (self.env.now, self._next_step - 1, type(decision).__name__, ",".join(functions), responses, detail)

    def typical_context(self) -> float:
        """Mean tokens of a response in mid-generation: as observed, and from the cap before the first step is over."""
        if self._finished_responses:
            return self._finished_context / self._finished_responses
        return self._first_context

    def holder(self, rollout: Rollout) -> ClusterFunction:
        """Whose engine an assigned response is in or under way to: until it has left, not the one it is to move to."""
        assert rollout.serving is not None, "an assigned response has a place"
        if rollout.serving.expected:  # it is perhaps among them
            for function in self.functions.values():
                if function.removals and rollout.response_id in function.leaving():
                    return function
        return rollout.serving.function

    def learner_world(self) -> int:
        """GPUs over which the learner's state is sharded."""
        return self._learner_gpus

    def _function(self, decision: Decision, name: str, role: Role | tuple[Role, ...] | None = None) -> ClusterFunction:
        """The function called *name*, awake or starting, with *role* or one of several."""
        planned = self._planned.get(name)
        if planned is None or planned == "gone":
            known = [n for n, state in self._planned.items() if state != "gone"]
            raise InvalidDecision(decision, f"there is no function {name!r}", _some(known) or "Start it first")
        function = self.functions[name]
        wanted = (role,) if isinstance(role, str) else role
        if wanted and not set(wanted) & set(function.roles):
            having = [n for n, f in self.functions.items() if set(wanted) & set(f.roles) and self._planned[n] != "gone"]
            reason = f"{name!r} has no {' or '.join(wanted)} role, it has {', '.join(function.roles)}"
            raise InvalidDecision(decision, reason, _some(having) or f"Start one with the role {wanted[0]}")
        if role is not None and planned == "parked":
            raise InvalidDecision(decision, f"{name!r} is parked", "Wake it first")
        return function

    def _start(self, decision: Start) -> None:
        per_node = self.gpus_per_node
        if self._planned.get(decision.function, "gone") != "gone":
            raise InvalidDecision(decision, f"{decision.function!r} exists already", "another name")
        old = self.functions.get(decision.function)
        if old is not None and old.state is not State.GONE:
            raise InvalidDecision(decision, f"{decision.function!r} is being released", "another name until it is gone")
        if not 1 <= decision.gpus <= per_node:
            raise InvalidDecision(
                decision, f"{decision.gpus} GPUs on one node, which has {per_node}", f"1 to {per_node} GPUs a function"
            )
        if not decision.roles or not set(decision.roles) <= set(ROLES):
            raise InvalidDecision(decision, f"roles {decision.roles!r}", f"one or more of {', '.join(ROLES)}")
        if decision.node is not None and not 0 <= decision.node < self.num_nodes:
            raise InvalidDecision(decision, f"there is no node {decision.node}", f"0 to {self.num_nodes - 1}")
        if "learn" in decision.roles and self._shards_placed and not self._lost_learners:
            raise InvalidDecision(
                decision, "the learner's shards are placed", "roles without learn after the first Learn"
            )
        if "learn" in decision.roles and self._lost_learners:
            self._lost_learners -= 1
        self.functions[decision.function] = self.new_function(decision)
        self._learner_gpus += decision.gpus if "learn" in decision.roles else 0
        self._planned[decision.function] = "awake"
        self.planned_version[decision.function] = 0  # a start loads what is on disk

    def _park(self, decision: Park) -> None:
        function = self._function(decision, decision.function)
        if self._planned[decision.function] == "parked":
            raise InvalidDecision(decision, f"{decision.function!r} is parked already", "a function that is awake")
        node = function.place()
        host = self.parked_on(node) if node is not None else 0.0
        here, has = self.parked_bytes(function)
        if host + here > has:
            reason = f"functions parked on one node would take {(host + here) / 1e9:.0f} GB of host memory"
            raise InvalidDecision(decision, reason, f"{has / 1e9:.0f} GB a node")
        self._parked_bytes[decision.function] = here
        self._planned[decision.function] = "parked"
        function.add_task(function.park())

    def parked_on(self, node: int) -> float:
        """Host memory that parked functions take on *node*."""
        return sum(size for name, size in self._parked_bytes.items() if self.functions[name].place() == node)

    def _wake(self, decision: Wake) -> None:
        function = self._function(decision, decision.function)
        if self._planned[decision.function] != "parked":
            raise InvalidDecision(decision, f"{decision.function!r} is awake", "a parked function")
        self._planned[decision.function] = "awake"
        del self._parked_bytes[decision.function]
        function.add_task(function.wake())

    def _release(self, decision: Release) -> None:
        function = self._function(decision, decision.function)
        if "learn" in function.roles and self._shards_placed:
            reason = f"{decision.function!r} holds shards of the learner's state"
            raise InvalidDecision(decision, reason, "Park it, or release functions without the learn role")
        self._planned[decision.function] = "gone"
        self._parked_bytes.pop(decision.function, None)
        self._learner_gpus -= function.gpus if "learn" in function.roles else 0
        function.add_task(function.release())

    def _assign(self, decision: Assign) -> None:
        function = self._function(decision, decision.function, "decode")
        unassigned = self.unassigned.__contains__
        rollouts = self._responses(decision, decision.responses, unassigned, "assigned or finished already")
        self._check_fresh(decision, decision.function, rollouts)
        prefill = None
        if decision.prefix_from is not None and decision.prefix_from != decision.function:
            prefill = self._function(decision, decision.prefix_from, "prefill")
            self._check_fresh(decision, decision.prefix_from, rollouts)
        serving = function.serving()
        serving.expected += len(rollouts)
        now, version = self.env.now, self.planned_version[function.name]
        for rollout in rollouts:
            del self.unassigned[rollout.response_id]
            rollout.function, rollout.serving = function.name, serving
            rollout.assigned_s, rollout.weights_version = now, version
            function.unfinished[rollout.response_id] = rollout
        for step, count in Counter(map(STEP, rollouts)).items():
            self._count(function, step, count)
        if prefill is None:
            serving.deliver(rollouts)
        else:
            groups: dict[int, list[Rollout]] = {}
            for rollout in rollouts:
                groups.setdefault(rollout.group, []).append(rollout)
            prefill.add_task(prefill.prefill_for(list(groups.values()), serving))

    def _responses(
        self, decision: Decision, response_ids: Sequence[int], allowed: Callable[[int], bool], reason: str
    ) -> list[Rollout]:
        """The responses of a decision, each once and each *allowed*."""
        if len(set(response_ids)) != len(response_ids):
            raise InvalidDecision(decision, "it names a response twice", "each response once")
        wrong = list(itertools.filterfalse(allowed, response_ids))
        if wrong:
            others = list(filter(allowed, self.rollouts))
            unknown = [response_id for response_id in wrong if response_id not in self.rollouts]
            why = f"responses {_some(unknown)} are unknown" if unknown else f"responses {_some(wrong)} are {reason}"
            raise InvalidDecision(decision, why, f"{len(others)} responses, for example {_some(others[:3])}")
        return list(map(self.rollouts.__getitem__, response_ids))

    def _is_under_way(self, response_id: int) -> bool:
        """Whether a response is on a function and not finished."""
        rollout = self.rollouts.get(response_id)
        return rollout is not None and rollout.function is not None and rollout.finished_s is None

    def _check_fresh(self, decision: Decision, name: str, rollouts: Sequence[Rollout]) -> None:
        holds = self.planned_version[name]
        newest = max((rollout.step for rollout in rollouts), default=0)
        if holds < newest - self.job.max_staleness:
            reason = f"{name!r} holds stale weights of version {holds}, and step {newest} is generated"
            allowed = f"version {newest - self.job.max_staleness} or newer: Sync it first"
            raise InvalidDecision(decision, reason, allowed)

    def _count(self, function: ClusterFunction, step: int, change: int) -> None:
        """Book responses assigned or migrated to a function, or away from it."""
        function.assigned_by_step[step] = function.assigned_by_step.get(step, 0) + change
        function.unfinished_by_step[step] = function.unfinished_by_step.get(step, 0) + change

    def _migrate(self, decision: Migrate) -> None:
        target = self._function(decision, decision.target, "decode")
        self.catch_up()
        rollouts = self._responses(decision, decision.responses, self._is_under_way, "unassigned or finished")
        self._check_fresh(decision, decision.target, rollouts)
        if any(rollout.function == decision.target for rollout in rollouts):
            raise InvalidDecision(decision, f"some responses are on {decision.target!r} already", "another target")
        by_source: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            assert rollout.function is not None
            by_source.setdefault(rollout.function, []).append(rollout)
        serving = target.serving()
        for name, moving in by_source.items():
            source = self.functions[name]
            for rollout in moving:
                rollout.function = target.name
                rollout.migrations += 1
                target.unfinished[rollout.response_id] = source.unfinished.pop(rollout.response_id)
                self._count(source, rollout.step, -1)
                self._count(target, rollout.step, +1)
            source.remove(moving, serving, decision.with_kv)

    def _prepare(self, decision: Prepare) -> None:
        functions = self._distinct(decision, decision.functions, "prepare")
        self.catch_up()
        unprepared = self.unprepared.__contains__
        rollouts = self._responses(decision, decision.responses, unprepared, "unfinished or being prepared already")
        self.unprepared.remove(decision.responses)
        for function, share in zip(functions, balanced_shares(rollouts, [f.gpus for f in functions]), strict=True):
            if share:
                function.preparing.update((rollout.response_id, rollout) for rollout in share)
                function.add_task(function.prepare(share))

    def _distinct(
        self, decision: Decision, names: Sequence[str], role: Role | tuple[Role, ...]
    ) -> list[ClusterFunction]:
        if not names or len(set(names)) != len(names):
            raise InvalidDecision(decision, "functions are missing or named twice", "one or more functions, each once")
        return [self._function(decision, name, role) for name in names]

    def _learn(self, decision: Learn) -> None:
        functions = self._distinct(decision, decision.functions, "learn")
        state = next((state for state in self.steps.values() if not state.learning), None)
        if state is None or state.unprepared:
            left = f"{state.unprepared} responses of step {state.step} are not prepared" if state else "no step is open"
            raise InvalidDecision(decision, left, "a step whose responses are all prepared")
        everyone = {name for name, f in self.functions.items() if "learn" in f.roles and self._planned[name] != "gone"}
        if set(decision.functions) != everyone:
            reason = f"the learner's state is sharded over {len(everyone)} functions and {len(functions)} are named"
            raise InvalidDecision(decision, reason, f"all of {_some(sorted(everyone))}")
        if not self._shards_placed:  # some may be lost and not replaced
            for function in functions:
                self._check_fit(decision, function)
        state.learning = self._shards_placed = True
        gang = Gang(functions, self.env.event(), self.learn_work(functions, state), learns=True)
        self._learned.setdefault(self.version + sum(s.learning for s in self.steps.values()), self.env.event())
        for function in functions:
            function.gangs.append(gang)
            function.add_task(function.learn(gang, state.step))

    def _sync(self, decision: Sync) -> None:
        functions = self._distinct(decision, decision.functions, ("decode", "prefill"))
        newest = self.version + sum(state.learning for state in self.steps.values())
        behind = [function for function in functions if self.planned_version[function.name] < newest]
        if not behind:
            return
        others = [f for name, f in self.functions.items() if "learn" in f.roles and self._planned[name] != "gone"]
        senders = [function for function in others if function not in behind]
        parked = [function.name for function in senders if self._planned[function.name] == "parked"]
        if parked:
            raise InvalidDecision(decision, f"learners {_some(parked)} are parked", "Wake them: they hold the weights")
        members, work = [*behind, *senders], self.sync_work(behind, newest)
        gang = Gang(members, self.env.event(), work, self._learned.get(newest), behind)
        for function in members:
            function.gangs.append(gang)
        for function in behind:
            self.planned_version[function.name] = newest
            function.add_task(function.sync(gang, self._next_step - 1))
        for function in senders:
            function.add_task(function.send_weights(gang, self._next_step - 1))

    def _subscribe(self, decision: Subscribe) -> None:
        problem = trigger_problem(decision.trigger)
        if problem:
            raise InvalidDecision(decision, *problem)
        if isinstance(decision.trigger, Completions | CompletionRatio | UnfinishedBelow):
            self.catch_up()  # what was before does not count
            for function in tuple(self.ahead.values()):
                function.poke()  # to plan anew
        self.triggers.subscribe(decision.trigger)

    _HANDLERS: Mapping[type, Callable[..., None]] = MappingProxyType({
        Start: _start, Park: _park, Wake: _wake, Release: _release, Assign: _assign, Migrate: _migrate,
        Prepare: _prepare, Learn: _learn, Sync: _sync, Subscribe: _subscribe,
    })  # fmt: skip


def _some(names: Sequence[object]) -> str:
    shown = ", ".join(map(str, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
