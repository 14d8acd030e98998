"""What wakes a policy: subscriptions, and the events that wait to be told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import simpy

from simrl.policies.contract import (
    STAGES,
    At,
    CompletionRatio,
    Completions,
    Event,
    FunctionIdle,
    Stage,
    StageFinished,
    Trigger,
    UnfinishedBelow,
)
from simrl.policies.runtime.function import ClusterFunction, Process
from simrl.policies.runtime.steps import StepState

EPSILON = 1e-9  # responses; a ratio such as 0.7 of 10 must fire at the 7th


class Triggers:
    """Subscriptions of one run.

    Attributes:
        events: What happened since the policy was last asked.
    """

    def __init__(self, env: simpy.Environment) -> None:
        self.events: list[Event] = []
        self._env = env
        self._subscribed: dict[Trigger, None] = {}
        self._every: list[Completions] = []
        self._below: list[UnfinishedBelow] = []
        self._ratios: dict[str | None, list[CompletionRatio]] = {}  # by function; None: over all
        self._completions = 0

    def take_events(self) -> tuple[Event, ...]:
        """The events so far; they are told once."""
        events, self.events = tuple(self.events), []
        return events

    def subscribe(self, trigger: Trigger) -> None:
        """Watch for *trigger*; asking twice changes nothing."""
        if trigger in self._subscribed:
            return
        self._subscribed[trigger] = None
        match trigger:
            case Completions():
                self._every.append(trigger)
            case UnfinishedBelow():
                self._below.append(trigger)
            case CompletionRatio():
                self._ratios.setdefault(trigger.function, []).append(trigger)
            case At():
                self._env.process(self._alarm(trigger))

    def _alarm(self, trigger: At) -> Process:
        yield self._env.timeout(max(trigger.time_s - self._env.now, 0.0))
        self.events.append(trigger)

    def idle(self, function: str, after: str) -> None:
        """A function has nothing to do."""
        asked = (FunctionIdle(name, what) for name in (None, function) for what in (None, after))
        if any(trigger in self._subscribed for trigger in asked):
            self.events.append(FunctionIdle(function, after))

    def stage_finished(self, stage: Stage, step: int) -> None:
        """All responses of a step passed a stage."""
        if StageFinished(stage) in self._subscribed:
            self.events.append(StageFinished(stage, step))

    def stage_finished_again(self, stage: Stage, step: int) -> None:
        """A stage was over, and what it led to is undone."""
        if StageFinished(stage, step) not in self.events:
            self.stage_finished(stage, step)

    def completions_ahead(self, open_steps: Mapping[int, StepState], function: ClusterFunction) -> int:
        """Completions on *function* up to the first that may fire a trigger or be the last of a step."""
        if self._every:
            return 1
        watched = (*self._below, *self._ratios.get(None, ()))
        if watched and not all(state.fired.issuperset(watched) for state in open_steps.values()):
            return 1
        ahead = []
        for step, unfinished in function.unfinished_by_step.items():
            if unfinished:
                ahead.append(unfinished)
                assigned, fired = function.assigned_by_step[step], open_steps[step].fired
                own = (ratio for ratio in self._ratios.get(function.name, ()) if ratio not in fired)
                ahead += [math.ceil(unfinished - (1 - ratio.ratio) * assigned - EPSILON) for ratio in own]
        return max(min(ahead, default=1), 1)

    def completed(
        self, count: int, open_steps: Mapping[int, StepState], touched: Iterable[StepState], function: ClusterFunction
    ) -> None:
        """*count* responses of the *touched* steps finished on *function*."""
        if not (self._every or self._below or self._ratios):
            return
        before, self._completions = self._completions, self._completions + count
        for every in self._every:
            if before // every.every != self._completions // every.every:
                self.events.append(every)
        self.fire_unfinished_below(open_steps)
        for state in touched:
            for ratio in self._ratios.get(None, ()):
                if state.unfinished <= (1 - ratio.ratio) * len(state.rollouts) + EPSILON:
                    self._fire_once(state, ratio)
            for ratio in self._ratios.get(function.name, ()):
                assigned = function.assigned_by_step[state.step]
                if function.unfinished_by_step[state.step] <= (1 - ratio.ratio) * assigned + EPSILON:
                    self._fire_once(state, ratio)

    def fire_unfinished_below(self, open_steps: Mapping[int, StepState]) -> None:
        """Look at the oldest open step."""
        oldest = next(iter(open_steps.values()), None)
        for below in self._below:
            if oldest is not None and oldest.unfinished < below.count:
                self._fire_once(oldest, below)

    def _fire_once(self, state: StepState, trigger: Trigger) -> None:
        if trigger not in state.fired:
            state.fired.add(trigger)
            self.events.append(trigger)


def trigger_problem(trigger: object) -> tuple[str, str] | None:
    """Why a trigger cannot fire, and what is allowed; None when it is fine."""
    match trigger:
        case CompletionRatio(ratio=ratio) if not 0 < ratio <= 1:
            return f"ratio {ratio}", "0 < ratio <= 1"
        case Completions(every=every) if every < 1:
            return f"every {every} responses", "every >= 1"
        case UnfinishedBelow(count=count) if count < 1:
            return f"fewer than {count} responses", "count >= 1"
        case StageFinished(stage=stage) if stage not in STAGES:
            return f"stage {stage!r}", ", ".join(STAGES)
        case StageFinished(step=int(step)):
            return f"step {step}", "step=None: the event names the step"
        case At(time_s=time_s) if not -math.inf < time_s < math.inf:
            return f"time {time_s}", "a finite time"
        case FunctionIdle() | CompletionRatio() | UnfinishedBelow() | Completions() | StageFinished() | At():
            return None
    return (
        f"{trigger!r} is not a trigger",
        "FunctionIdle, CompletionRatio, UnfinishedBelow, Completions, StageFinished, At",
    )
