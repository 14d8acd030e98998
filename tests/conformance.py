"""What every backend has to do, checked through the contract and the frames of its runs alone.

A check takes a maker of backends and raises `AssertionError` where one does not keep the contract. None of them knows
how long anything takes, so that they hold on simulated clusters and on real ones, on any clock.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import pandas as pd
import pytest
from clusters import Lengths, make_job

from simrl.policies.contract import (
    Assign,
    At,
    Backend,
    CompletionRatio,
    Completions,
    Decision,
    Event,
    Function,
    FunctionIdle,
    FunctionLost,
    InvalidDecision,
    Learn,
    Migrate,
    Observation,
    Park,
    Policy,
    PolicyStalled,
    Prepare,
    Release,
    Role,
    Stage,
    StageFinished,
    Start,
    State,
    StepStarted,
    Subscribe,
    Sync,
    Trigger,
    UnfinishedBelow,
    Wake,
)
from simrl.policies.runtime.steps import StepWork
from simrl.traces.job import Job
from simrl.traces.records import Frames, Recorder

EVERYTHING: tuple[Role, ...] = ("prefill", "decode", "prepare", "learn")
BOTH = ("a", "b")
CAP = 64  # of prompts and responses


class Losing(Backend, Protocol):
    """A backend whose functions can be lost."""

    def lose(self, name: str) -> None:
        """A function is dead, at this moment."""


@dataclass(frozen=True)
class Case:
    """A small job and its trace.

    Attributes:
        steps: Of each step the tokens of its responses, a row a prompt, a column a sample.
        prompt_tokens: One a prompt, the same in every step.
        options: Further ones of the job.
    """

    steps: Sequence[Lengths]
    prompt_tokens: Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def job(self) -> Job:
        """What is trained."""
        return make_job(self.steps, **self.options)

    def work(self, step: int) -> StepWork:
        """The trace of a step; each step is an epoch."""
        lengths = self.steps[step]
        cut = [[tokens == CAP for tokens in row] for row in lengths]
        return StepWork(step, list(range(len(lengths))), list(self.prompt_tokens), lengths, cut)


Make = Callable[[Case], tuple[Losing, Recorder]]

PLAIN = [[64, 3, 9], [12, 30, 5], [7, 21, 40], [17, 26, 35]]
CASE = Case([PLAIN, PLAIN[::-1], PLAIN], [64, 40, 33, 50])
SMALL = Case([[[3, 4], [5, 6]]] * 2, [20, 20])
STALE = Case([[[3, 4], [5, 6]]] * 2, [20, 20], {"max_staleness": 1})


# --- what a run is like, whoever decides ---


@dataclass(frozen=True)
class Call:
    """What a policy saw when it was asked.

    Attributes:
        time_s: When.
        step: The newest open one.
        events: What it was told.
        finished: Responses so far, over all steps.
        unfinished: Of the newest open step.
        functions: By name.
    """

    time_s: float
    step: int
    events: tuple[Event, ...]
    finished: int
    unfinished: int
    functions: Mapping[str, Function]


class Watch:
    """Looks at everything whenever a policy is asked, and holds that it is consistent and only ever grows."""

    def __init__(self, case: Case) -> None:
        self.job, self.calls = case.job(), list[Call]()
        self.lengths = [tokens for step in case.steps for row in step for tokens in row]
        self.seen_growing: set[int] = set()
        self._generated: dict[int, int] = defaultdict(int)

    def look(self, seen: Observation) -> None:
        """At one observation."""
        finished = {response.response_id for response in self.check_responses(seen)}
        assert seen.unprepared == tuple(sorted(set(seen.unprepared) & finished)), "only what is finished is unprepared"
        self.check_functions(seen)
        assert not self.calls or seen.time_s >= self.calls[-1].time_s, "time goes back"
        per_step = self.job.responses_per_step
        newest = len([i for i in finished if i // per_step == seen.step])
        before = per_step * seen.weights_version
        functions = dict(seen.functions)
        self.calls.append(
            Call(seen.time_s, seen.step, seen.events, before + len(finished), per_step - newest, functions)
        )

    def check_responses(self, seen: Observation) -> list[Any]:
        """Those that are finished, after a look at all of the open steps."""
        finished = []
        for prompt in seen.prompts:
            for response_id in prompt.responses:
                response = seen.response(response_id)
                generated, target = response.context_tokens - prompt.tokens, self.lengths[response_id]
                assert self._generated[response_id] <= generated <= target, (
                    f"response {response_id} of {target} tokens has {generated} after {self._generated[response_id]}"
                )
                assert response.finished == (generated == target)
                assert (response.function is None) == (response_id in seen.unassigned)
                if 0 < generated < target:
                    self.seen_growing.add(response_id)
                self._generated[response_id] = generated
                if response.finished:
                    finished.append(response)
                elif response.function is not None:
                    assert response_id in seen.unfinished(response.function)
        return finished

    def check_functions(self, seen: Observation) -> None:
        """What each says of itself, and whose the GPUs are."""
        leased: dict[int, int] = defaultdict(int)
        for name, function in seen.functions.items():
            assert function.name == name
            assert 0 <= function.num_unfinished == len(seen.unfinished(name)) <= function.num_assigned
            assert 0 <= function.kv_used <= 1
            assert function.free_slots >= 0
            if function.state is State.PARKED:
                assert function.role is None
            elif function.node is not None and not (function.state is State.STARTING and function.role is None):
                leased[function.node] += function.gpus
        for node in seen.nodes:
            assert leased[node.index] <= node.gpus - node.free_gpus, "a GPU is leased and free"


def run(make: Make, case: Case, policy: Policy) -> tuple[Watch, Frames]:
    """Drive a copy of *policy* to the end under a watch; the frames are checked, too."""
    backend, recorder = make(case)
    policy = copy.deepcopy(policy)
    watch = Watch(case)
    observation: Observation | None = backend.reset()
    while observation is not None:
        watch.look(observation)
        observation = backend.advance(policy.decide(observation))
    frames = recorder.frames()
    check_frames(frames, watch.job, case.work)
    return watch, frames


def check_frames(frames: Frames, job: Job, work: Callable[[int], StepWork]) -> None:
    """Each response once and as the trace has it, stages in order, no function and no GPU in two places."""
    check_samples(frames, job, work)
    check_stages(frames)
    check_order(frames, job)
    check_leases(frames)


def check_samples(frames: Frames, job: Job, work: Callable[[int], StepWork]) -> None:
    """The frame of responses against the trace."""
    works = [work(step) for step in range(job.steps)]
    samples = frames.samples.sort_values("response_id")
    assert samples.response_id.tolist() == list(range(job.steps * job.responses_per_step)), "each exactly once"
    assert samples.step.tolist() == [step for step in range(job.steps) for _ in range(job.responses_per_step)]
    assert samples.response_tokens.tolist() == [n for step in works for row in step.response_tokens for n in row]
    assert samples.truncated.tolist() == [cut for step in works for row in step.truncated for cut in row]
    each = range(job.responses_per_prompt)
    assert samples.prompt_tokens.tolist() == [n for step in works for n in step.prompt_tokens for _ in each]
    assert samples.prompt_id.tolist() == [name for step in works for name in step.prompt_ids for _ in each]
    assert (samples.weights_version <= samples.step).all()
    assert (samples.weights_version >= samples.step - job.max_staleness).all()
    assert (samples.assigned_s < samples.finished_s).all()
    assert (samples.finished_s < samples.prepared_s).all()


def check_stages(frames: Frames) -> None:
    """Stages against the samples: they end with their last response, and learning waits for all."""
    phases = frames.phases
    for step, samples in frames.samples.groupby("step"):
        stages = phases[phases.step == step].set_index("stage")
        assert stages.start_s["learning"] >= samples.prepared_s.max() - 1e-9
        assert stages.end_s["generation"] == pytest.approx(samples.finished_s.max(), rel=1e-12)
        assert stages.end_s["preparation"] == pytest.approx(samples.prepared_s.max(), rel=1e-12)
    assert (phases.end_s >= phases.start_s).all()


def check_order(frames: Frames, job: Job) -> None:
    """Of stages and steps: learning follows the rest, and a step the learning of the one that its weights are of."""
    assert set(frames.phases.step) == set(range(job.steps)), "every step is learned"
    phases = {step: frames.phases[frames.phases.step == step].set_index("stage") for step in range(job.steps)}
    for step, rows in phases.items():
        assert rows.index.is_unique
        assert {"generation", "preparation", "learning", "step"} <= set(rows.index)
        assert (rows.start_s >= rows.start_s["step"]).all()
        assert (rows.end_s <= rows.end_s["step"]).all()
        assert rows.end_s["step"] == rows.end_s["learning"]
        assert rows.start_s["generation"] <= rows.start_s["preparation"] < rows.end_s["preparation"]
        if step > job.max_staleness:
            assert rows.start_s["step"] == phases[step - 1 - job.max_staleness].end_s["step"]
        if "weight_sync" in rows.index and not job.max_staleness:
            assert rows.start_s["weight_sync"] <= rows.start_s["generation"]


def check_leases(frames: Frames) -> None:
    """Intervals of a function do not overlap, nor those of a GPU."""
    workers = frames.workers
    assert (workers.end_s > workers.start_s).all()
    assert set(workers.state) <= {"busy", "idle", "cold", "parked"}
    parked = workers.state == "parked"
    assert (workers.gpu_ids[parked] == "").all(), "a parked function holds no GPU"
    assert (workers.gpu_ids[~parked].str.split(",").map(len) == workers.gpus[~parked]).all()
    for name, rows in workers.groupby("function"):
        check_apart(rows, f"intervals of {name}")
    holding = workers[~parked].assign(gpu=workers.gpu_ids.str.split(",")).explode("gpu")
    for gpu, rows in holding.groupby(["node", "gpu"]):
        check_apart(rows, f"uses of GPU {gpu}")


def check_apart(rows: pd.DataFrame, what: str) -> None:
    """No two of these intervals overlap."""
    times = sorted(zip(rows.start_s, rows.end_s, strict=True))
    for (_, end_s), (start_s, _) in pairwise(times):
        assert start_s >= end_s - 1e-9, f"{what} overlap"


# --- driving by hand ---


class Driver:
    """A backend that has begun its job, and decisions one call after the other."""

    def __init__(self, make: Make, case: Case) -> None:
        self.backend, self.recorder = make(case)
        self.watch = Watch(case)
        self.seen: Observation = self.backend.reset()
        self.watch.look(self.seen)

    def advance(self, *decisions: Decision) -> Observation:
        """Decide, and see what comes next."""
        observation = self.backend.advance(decisions)
        assert observation is not None, "the job is over"
        self.watch.look(observation)
        self.seen = observation
        return observation

    def until(self, event: Event, *decisions: Decision) -> Observation:
        """Decide, then let time pass until *event* is told."""
        self.advance(*decisions)
        while event not in self.seen.events:
            self.advance()
        return self.seen

    def wait(self, condition: Callable[[Observation], bool], *decisions: Decision) -> Observation:
        """Decide, then let time pass until something can be seen that nobody tells."""
        pause_s = 0.01
        self.advance(*decisions, Subscribe(At(self.seen.time_s + pause_s)))
        while not condition(self.seen):
            pause_s *= 1.5
            assert pause_s < 1e6, "it never comes to that"
            self.advance(Subscribe(At(self.seen.time_s + pause_s)))
        return self.seen

    def learn(self, functions: Sequence[str], *decisions: Decision) -> Observation:
        """Generate what is unassigned on the first function and learn it, up to the next step."""
        stages: tuple[Stage, ...] = ("generation", "preparation")
        listen = [Subscribe(StageFinished(stage)) for stage in stages]
        step, work = self.seen.weights_version, self.seen.unassigned
        self.until(StageFinished("generation", step), *listen, *decisions, Assign(functions[0], work))
        self.until(StageFinished("preparation", step), Prepare(tuple(functions), self.seen.unprepared))
        return self.advance(Learn(tuple(functions)))

    def refuses(self, reason: str, allowed: str, *decisions: Any) -> None:
        """The last of *decisions* is illegal. The cluster is then of no further use."""
        with pytest.raises(InvalidDecision) as raised:
            self.backend.advance(decisions)
        assert raised.value.decision == decisions[-1]
        assert reason in raised.value.reason
        assert allowed in raised.value.allowed
        assert raised.value.reason in str(raised.value)


def check_reset(make: Make) -> None:
    """A job begins with the prompts of step 0 and nothing else, again and again."""
    backend, recorder = make(CASE)
    for _ in range(2):
        seen = backend.reset()
        (begin,) = seen.events
        assert isinstance(begin, StepStarted)
        assert (begin.step, seen.step, seen.time_s, seen.weights_version) == (0, 0, 0.0, 0)
        assert begin.prompts == seen.prompts
        assert [prompt.tokens for prompt in seen.prompts] == CASE.prompt_tokens
        assert [i for prompt in seen.prompts for i in prompt.responses] == list(range(12))
        assert seen.unassigned == tuple(range(12))
        assert not any(map(len, (seen.functions, seen.unprepared, seen.history)))
        assert all(node.free_gpus == node.gpus for node in seen.nodes)
        Watch(CASE).look(seen)
        assert not any(map(len, recorder.frames().by_name().values()))
        backend.advance([Start("a", 1, ("learn",)), Subscribe(At(1e-3))])  # something to forget


def check_expiry(make: Make) -> None:
    """An observation is of no use after the next `advance`."""
    backend, _ = make(SMALL)
    old = backend.reset()
    backend.advance([Subscribe(At(0.0))])
    for look in (
        lambda: old.time_s, lambda: len(old.functions), lambda: old.prompts, lambda: old.unassigned,
        lambda: old.unfinished("a"), lambda: old.response(0), lambda: old.nodes, lambda: old.estimates,
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="valid until the next advance"):
            look()


def check_life(make: Make) -> None:
    """Functions wait for GPUs, start, park, wake and end; only what was asked for is told."""
    driver = Driver(make, SMALL)
    gpus = driver.seen.nodes[0].gpus
    asked: list[Decision] = [Subscribe(FunctionIdle("a")), Subscribe(FunctionIdle("b", "started")), Subscribe(At(0.0))]
    full = Start("full", gpus - 1, ("learn",))
    starts = [full, *(Start(name, 1, ("decode", "prefill")) for name in BOTH)]
    driver.until(FunctionIdle("a", "started"), *asked, *starts)
    assert_function(driver.seen, "a", State.IDLE, 0)
    assert_function(driver.seen, "b", State.STARTING, None)
    assert driver.seen.nodes[0].free_gpus == 0
    driver.until(FunctionIdle("b", "started"), Release("full"))
    assert list(driver.seen.functions) == ["a", "b"]
    assert driver.seen.nodes[0].free_gpus == gpus - 2

    driver.wait(lambda seen: seen.functions["a"].state is State.PARKED, Park("a"))
    assert driver.seen.nodes[0].free_gpus == gpus - 1
    driver.wait(lambda seen: seen.functions["full"].state is State.IDLE, full, Wake("a"))
    assert driver.seen.functions["a"].state is State.STARTING, "it waits for a GPU"
    driver.until(FunctionIdle("a", "woken"), Release("full"))
    assert_function(driver.seen, "a", State.IDLE, 0)

    driver.wait(lambda seen: "a" not in seen.functions, Release("a"))
    assert driver.seen.nodes[0].free_gpus == gpus - 1
    again: list[Decision] = [Start("a", 1, ("decode",)), Assign("a", (0, 1)), Assign("b", (2, 3)), Release("b")]
    driver.until(FunctionIdle("a", "drained"), *again)
    driver.wait(lambda seen: "b" not in seen.functions)
    assert driver.seen.unprepared == (0, 1, 2, 3), "who is released finishes what it has"
    told = [event for call in driver.watch.calls for event in call.events if isinstance(event, FunctionIdle)]
    lives = [("a", "started"), ("b", "started"), ("a", "woken"), ("a", "drained")]
    assert [(event.function, event.after) for event in told] == lives


def assert_function(seen: Observation, name: str, state: State, node: int | None) -> None:
    """State and place."""
    function = seen.functions[name]
    assert (function.state, function.node) == (state, node)


# --- a job that takes every kind of decision ---

WATCHED: tuple[Trigger, ...] = (
    Completions(1), Completions(5), CompletionRatio(0.5), CompletionRatio(1.0), CompletionRatio(0.5, "a"),
    UnfinishedBelow(4), FunctionIdle(), At(0.0), StageFinished("generation"), StageFinished("preparation"),
    StageFinished("learning"), StageFinished("weight_sync"),
)  # fmt: skip


class Script:
    """Three steps on two functions; between them they do all that can be done with a learner."""

    def __init__(self) -> None:
        self.ready: set[str] = set()
        self.moved = 0  # the step in which something was moved last

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """Answer each event in turn."""
        return [decision for event in observation.events for decision in self.answer(observation, event)]

    def answer(self, seen: Observation, event: Event) -> Sequence[Decision]:
        """What is done about one event."""
        match event:
            case StepStarted(step=0):
                return [*(Start(name, 1, EVERYTHING) for name in BOTH), *map(Subscribe, WATCHED)]
            case StepStarted(step=1):
                self.ready.clear()
                return [Sync(BOTH), Assign("a", seen.unassigned, prefix_from="b")]
            case StepStarted(step=2):
                return [Sync(BOTH)]
            case FunctionIdle(function=str(name), after="started" | "synced"):
                return self.share(seen, name)
            case Completions(every=1) if seen.step > self.moved and len(seen.unfinished("a")) < 9 - 4 * (seen.step > 1):
                return self.move(seen)
            case FunctionIdle(function="a", after="drained") if seen.step == 2:
                return [Prepare(("a",), seen.unprepared)]
            case FunctionIdle(function="a", after="woken"):
                return [Prepare(BOTH, seen.unprepared)]
            case StageFinished(stage="generation", step=1):
                return [Wake("a")]
            case StageFinished(stage="generation", step=int(step)):
                return [Prepare(("b",) if step else BOTH, seen.unprepared)]
            case StageFinished(stage="preparation"):
                return [Learn(BOTH)]
        return []

    def share(self, seen: Observation, name: str) -> Sequence[Decision]:
        """Half of the work to each, when both are ready."""
        self.ready.add(name)
        if len(self.ready) < 2:
            return []
        half = len(seen.unassigned) // 2
        return [Assign("a", seen.unassigned[:half]), Assign("b", seen.unassigned[half:])]

    def move(self, seen: Observation) -> Sequence[Decision]:
        """All that is left on one to the other: with KV, and then it parks; or without, and then it prepares."""
        self.moved = seen.step
        move = Migrate(seen.unfinished("a"), "b", with_kv=seen.step == 1)
        return [move, Park("a"), Subscribe(At(seen.time_s + 1e-3))] if seen.step == 1 else [move]


LIVES = {
    "a": ["started", "drained", "prepared", "learned", "woken", "prepared", "learned", "synced", "drained", "prepared"],
    "b": [
        "started", "drained", "prepared", "learned", "drained", "drained", "prepared", "learned", "synced", "drained",
        "prepared",
    ],
}  # fmt: skip
"""After what each function of the script is idle: the parked one drains nothing, the other prefills for it first."""


def check_job(make: Make) -> Frames:
    """A job of three steps; returns its frames."""
    watch, frames = run(make, CASE, Script())
    check_completions(watch)
    check_once_a_step(watch)
    check_stages_told(watch, frames)
    check_times_told(watch)
    told = events_of(watch.calls, FunctionIdle)
    assert {name: [event.after for event in told if event.function == name] for name in BOTH} == LIVES
    check_reports(watch)
    check_script(frames)
    return frames


def check_overlap(make: Make) -> None:
    """The same job, where no host's load can delay what one function hears until the other is done, too."""
    frames = check_job(make)
    asked_s = frames.decisions[(frames.decisions.decision == "Prepare") & (frames.decisions.step == 2)].time_s
    assert asked_s.min() < asked_s.max(), "one prepares during generation"


def check_completions(watch: Watch) -> None:
    """Whoever asks for every completion hears of every one."""
    before = 0
    for call in watch.calls:
        for trigger in (Completions(1), Completions(5)):
            told, due = trigger in call.events, call.finished // trigger.every > before // trigger.every
            assert told == due, f"{trigger} at {call.finished} after {before} responses"
        before = call.finished


def check_once_a_step(watch: Watch) -> None:
    """Shares and counts fire at the first call at which they are reached, and never again in that step."""
    total = watch.job.responses_per_step
    for step in range(watch.job.steps):
        calls = [call for call in watch.calls if call.step == step]
        reached: dict[Event, list[bool]] = {
            CompletionRatio(0.5): [call.unfinished <= total / 2 for call in calls],
            CompletionRatio(1.0): [call.unfinished == 0 for call in calls],
            UnfinishedBelow(4): [call.unfinished < 4 for call in calls],
        }
        if step == 0:  # nothing moves
            reached[CompletionRatio(0.5, "a")] = [half_is_done(call.functions.get("a")) for call in calls]
        for trigger, holds in reached.items():
            told = [index for index, call in enumerate(calls) if trigger in call.events]
            assert told == [holds.index(True)], f"{trigger} in step {step}"
        assert len([call for call in calls if CompletionRatio(0.5, "a") in call.events]) <= 1


def half_is_done(function: Function | None) -> bool:
    """Of what a function was assigned."""
    return function is not None and 0 < function.num_assigned >= 2 * function.num_unfinished


def check_stages_told(watch: Watch, frames: Frames) -> None:
    """Each end of a stage at the moment that the frames have; of the last learning nobody is there to hear."""
    phases = frames.phases.set_index(["stage", "step"])
    told = [(e.stage, e.step) for e in events_of(watch.calls, StageFinished)]
    stages: tuple[Stage, ...] = ("weight_sync", "generation", "preparation", "learning")
    assert told == [(stage, step) for step in range(watch.job.steps) for stage in stages][1:-1]
    for call in watch.calls:
        for event in events_of([call], StageFinished):
            assert call.time_s == pytest.approx(phases.end_s[event.stage, event.step], rel=1e-9)
        begun = [event.step for event in events_of([call], StepStarted)]
        learned = [event.step + 1 for event in events_of([call], StageFinished) if event.stage == "learning"]
        assert begun == (learned if call is not watch.calls[0] else [0])


def check_times_told(watch: Watch) -> None:
    """A time is told at the first call that is not before it."""
    for index, call in enumerate(watch.calls):
        for event in events_of([call], At):
            assert event.time_s <= call.time_s
            assert event.time_s > watch.calls[index - 1].time_s or index == 1
    assert len(events_of(watch.calls, At)) == 2


def events_of(calls: Iterable[Call], kind: type) -> list[Any]:
    """All events of a kind."""
    return [event for call in calls for event in call.events if isinstance(event, kind)]


def check_reports(watch: Watch) -> None:
    """Engines tell what they are at."""
    calls = [call for call in watch.calls if call.step == 0 and call.functions and call.finished]
    for name in BOTH:
        left = [call.functions[name].num_unfinished for call in calls]
        assert left == sorted(left, reverse=True)
        assert len(set(left)) > 3
        busy = [call.functions[name] for call in calls if call.functions[name].num_unfinished]
        done = calls[-1].functions[name]
        assert all(function.kv_used > 0 for function in busy)
        assert done.num_unfinished == 0 == done.kv_used
        assert busy[0].free_slots < done.free_slots
        assert {function.weights_version for function in busy} == {0}
    assert len(watch.seen_growing) > 12, "hardly a response is seen while it grows"


def check_script(frames: Frames) -> None:
    """The frames tell what was done."""
    kinds = frames.decisions.decision.value_counts().to_dict()
    assert kinds == {
        "Start": 2, "Assign": 5, "Migrate": 2, "Park": 1, "Wake": 1, "Prepare": 4, "Learn": 3, "Sync": 2,
    }  # fmt: skip
    by_step = dict(list(frames.samples.groupby("step")))
    assert [int(rows.migrations.sum()) > 2 for rows in by_step.values()] == [False, True, True]
    assert [set(rows.function) for rows in by_step.values()] == [{"a", "b"}] * 3
    assert (by_step[1].cached_tokens > 0).all(), "prompts were computed elsewhere"
    prepare = frames.decisions[(frames.decisions.decision == "Prepare") & (frames.decisions.step == 2)]
    assert prepare.function.tolist() == ["a", "b"]
    assert prepare.time_s.max() == pytest.approx(by_step[2].finished_s.max(), abs=1e-9)
    assert [rows.weights_version.unique().tolist() for rows in by_step.values()] == [[0], [1], [2]]


# --- what must not be done ---


def check_illegal(make: Make, rows: Iterable[tuple[str, Sequence[Any], str, str]], *before: Decision) -> None:
    """Each row's last decision is refused, with the reason and what is allowed: (name, decisions, reason, allowed)."""
    for _, decisions, reason, allowed in rows:
        Driver(make, SMALL).refuses(reason, allowed, *before, *decisions)


def check_stale(make: Make) -> None:
    """Nobody generates with old weights, by whichever way the work comes."""
    starts = [Start("a", 1, EVERYTHING), Start("b", 1, ("prefill", "decode"))]
    ways: list[list[Decision]] = [
        [Assign("a", (4,))],
        [Sync(("a",)), Assign("a", (4,)), Migrate((4,), "b")],
        [Sync(("a",)), Assign("a", (4,), prefix_from="b")],
    ]
    for decisions in ways:
        driver = Driver(make, SMALL)
        driver.learn(["a"], *starts)
        assert driver.seen.events == (StepStarted(1, driver.seen.prompts),)
        check_history(driver.seen)
        driver.refuses("stale weights of version 0, and step 1", "Sync it first", *decisions)


def check_history(seen: Observation) -> None:
    """The first of two steps, once it is learned."""
    (step,) = seen.history
    assert (step.step, step.epoch, step.prompt_ids) == (0, 0, (0, 1))
    assert step.response_tokens == ((3, 4), (5, 6))
    assert step.started_s == 0 < step.ended_s == seen.time_s
    assert {"generation", "preparation", "learning"} <= set(step.stage_s)
    assert all(0 < seconds <= step.ended_s for seconds in step.stage_s.values())
    assert seen.weights_version == 1


def check_staleness(make: Make) -> None:
    """Where the job allows a step's delay, two are open, and the second may be generated with the first weights."""
    driver = Driver(make, STALE)
    assert [event.step for event in driver.seen.events if isinstance(event, StepStarted)] == [0, 1]
    assert driver.seen.unassigned == tuple(range(8))
    listen = Subscribe(StageFinished("preparation"))
    work: list[Decision] = [Start("a", 1, EVERYTHING), Assign("a", driver.seen.unassigned)]
    driver.wait(lambda seen: len(seen.unprepared) == 8, listen, *work)
    driver.until(StageFinished("preparation", 1), Prepare(("a",), driver.seen.unprepared))
    assert driver.backend.advance([Learn(("a",)), Learn(("a",))]) is None
    frames = driver.recorder.frames()
    check_frames(frames, STALE.job(), STALE.work)
    assert set(frames.samples.weights_version) == {0}


def check_stalls(make: Make, policies: Mapping[str, tuple[Policy, str]]) -> None:
    """Who leaves the cluster without work is stopped, and told what is left: by name, policy and words."""
    for policy, words in policies.values():
        with pytest.raises(PolicyStalled, match=words):
            run(make, SMALL, policy)


def check_loss(make: Make) -> None:
    """What a lost function had goes on elsewhere, with the tokens that it had, and its GPU is free."""
    driver = Driver(make, CASE)
    gpus = driver.seen.nodes[0].gpus
    starts = [Start("a", 1, EVERYTHING), Start("b", 1, ("decode",))]
    driver.until(Completions(1), Subscribe(Completions(1)), *starts, Assign("b", driver.seen.unassigned))
    left = driver.seen.unfinished("b")
    known = [driver.seen.response(i).context_tokens for i in left]
    driver.backend.lose("b")
    driver.advance()
    (lost,) = [event for event in driver.seen.events if isinstance(event, FunctionLost)]
    assert lost == FunctionLost("b", lost.responses)
    assert sorted(lost.responses) == sorted(left) == sorted(driver.seen.unassigned)
    assert all(driver.seen.response(i).context_tokens >= tokens for i, tokens in zip(left, known, strict=True))
    assert list(driver.seen.functions) == ["a"]
    assert driver.seen.nodes[0].free_gpus == gpus - 1
    driver.learn(["a"])
    assert driver.seen.history[0].response_tokens == tuple(map(tuple, PLAIN))
