"""A policy that decides at random whatever is legal, so that runs go where no sensible policy leads them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from simrl.policies.contract import (
    Assign,
    At,
    CompletionRatio,
    Completions,
    Decision,
    FunctionIdle,
    Learn,
    Migrate,
    Observation,
    Park,
    Prepare,
    Release,
    Role,
    StageFinished,
    Start,
    Subscribe,
    Sync,
    UnfinishedBelow,
    Wake,
)

ROLE_SETS: tuple[tuple[Role, ...], ...] = (
    ("decode",), ("prefill", "decode"), ("prefill",), ("prepare",), ("decode", "prepare"),
    ("decode", "prepare", "learn"),
)  # fmt: skip
EVERYTHING: tuple[Role, ...] = ("prefill", "decode", "prepare", "learn")
MOST_FUNCTIONS = 9
CALM_AFTER = 400  # calls; a sync waits for every function that starts, so the coming and going has to end


class RandomPolicy:
    """Random legal decisions; every choice has a chance at every call, so that the job ends.

    Args:
        seed: Of all choices.
        watchful: Whether it asks to hear of completions wherever they are.

    Attributes:
        done: Decisions by kind.
    """

    def __init__(self, seed: int, *, watchful: bool = True) -> None:
        self.watchful = watchful
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.roles: dict[str, tuple[Role, ...]] = {}
        self.parked: set[str] = set()
        self.versions: dict[str, int] = {}
        self.calls = 0
        self.learning = 0  # steps that Learn was decided for
        self.prepared: set[int] = set()
        self.decisions: list[Decision] = []

    def decide(self, observation: Observation) -> Sequence[Decision]:
        self.decisions = []
        self.calls += 1
        if not self.roles:
            self.begin(observation)
        for event in observation.events:
            if isinstance(event, StageFinished) and event.stage == "preparation" and event.step is not None:
                self.prepared.add(event.step)
        for choice in self.random.sample(self.CHOICES, len(self.CHOICES)):
            if self.calls < CALM_AFTER or choice not in self.UNREST:
                choice(self, observation)
        wait_s = self.random.choice((0.01, 0.3, 5.0, 40.0))
        self.do(Subscribe(At(observation.time_s + wait_s)))
        return self.decisions

    def do(self, decision: Decision) -> None:
        self.decisions.append(decision)
        self.done[type(decision).__name__] += 1

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def some(self, things: Sequence[int]) -> tuple[int, ...]:
        """A random part in random order; the whole in one case of three."""
        count = len(things) if self.chance(0.33) else self.random.randint(0, len(things))
        return tuple(self.random.sample(things, count))

    def awake(self, role: Role) -> list[str]:
        return [name for name, roles in self.roles.items() if role in roles and name not in self.parked]

    def begin(self, observation: Observation) -> None:
        if self.watchful:
            for trigger in (Completions(self.random.randint(1, 3)), CompletionRatio(0.5), UnfinishedBelow(3)):
                self.do(Subscribe(trigger))
        else:
            self.do(Subscribe(CompletionRatio(0.7, "f0")))
        self.do(Subscribe(FunctionIdle()))
        self.do(Subscribe(StageFinished("preparation")))
        for _ in range(self.random.randint(1, 2)):
            self.start(observation, EVERYTHING)
        for _ in range(self.random.randint(0, 2)):  # at most 8 GPUs in all: any node may be chosen
            self.start(observation, self.random.choice(ROLE_SETS))

    def start(self, observation: Observation, roles: tuple[Role, ...], node: int | None = None) -> None:
        name = f"f{self.done['Start']}"
        self.do(Start(name, self.random.choice((1, 2)), roles, node))
        self.roles[name], self.versions[name] = roles, 0  # what is on disk

    # --- what may happen at any call ---

    def maybe_start(self, observation: Observation) -> None:
        roles = self.random.choice(ROLE_SETS)
        node = self.random.choice(observation.nodes)
        # Parked functions need their GPUs back: a gang stands still if one member holds GPUs that another waits for.
        taken = sum(function.gpus for function in observation.functions.values() if function.node == node.index)
        room = taken + 2 <= node.gpus and len(self.roles) < MOST_FUNCTIONS
        if room and self.chance(0.05) and not ("learn" in roles and self.learning):
            self.start(observation, roles, node.index)

    def maybe_park(self, observation: Observation) -> None:
        awake = [name for name in self.roles if name not in self.parked]
        if awake and self.chance(0.05):
            name = self.random.choice(awake)
            self.parked.add(name)
            self.do(Park(name))

    def maybe_wake(self, observation: Observation) -> None:
        if self.parked and self.chance(0.3):
            self.wake(self.random.choice(sorted(self.parked)))

    def wake(self, name: str) -> None:
        self.parked.remove(name)
        self.do(Wake(name))

    def maybe_release(self, observation: Observation) -> None:
        spare = [name for name, roles in self.roles.items() if "learn" not in roles]
        if spare and self.chance(0.04):
            name = self.random.choice(spare)
            self.parked.discard(name)
            del self.roles[name]
            self.do(Release(name))

    def maybe_sync(self, observation: Observation) -> None:
        engines = [name for name in sorted({*self.awake("decode"), *self.awake("prefill")}) if self.chance(0.5)]
        if engines and self.chance(0.4):
            for name in sorted(self.parked):
                if "learn" in self.roles[name]:  # it holds the weights
                    self.wake(name)
            self.do(Sync(tuple(engines)))
            self.versions.update(dict.fromkeys(engines, self.learning))

    def maybe_assign(self, observation: Observation) -> None:
        fresh = self.fresh("decode", observation)
        if not observation.unassigned or not fresh or not self.chance(0.6):
            return
        senders = [None, *self.fresh("prefill", observation)]
        chosen = self.some(observation.unassigned)
        self.do(Assign(self.random.choice(fresh), chosen, self.random.choice(senders)))

    def fresh(self, role: Role, observation: Observation) -> list[str]:
        needed = observation.step - observation.job.max_staleness
        return [name for name in self.awake(role) if self.versions[name] >= needed]

    def maybe_migrate(self, observation: Observation) -> None:
        targets = self.fresh("decode", observation)
        sources = [name for name in observation.functions if observation.unfinished(name)]
        if not targets or not sources or not self.chance(0.1):
            return
        target, source = self.random.choice(targets), self.random.choice(sources)
        if source != target:
            moved = self.some(observation.unfinished(source))
            self.do(Migrate(moved, target, self.chance(0.5)))

    def maybe_prepare(self, observation: Observation) -> None:
        able = [name for name in self.awake("prepare") if self.chance(0.6)]
        if able and observation.unprepared and self.chance(0.4):
            self.do(Prepare(tuple(able), self.some(observation.unprepared)))

    def maybe_learn(self, observation: Observation) -> None:
        learners = tuple(name for name, roles in self.roles.items() if "learn" in roles)
        if self.learning not in self.prepared or not self.chance(0.5):
            return
        for name in learners:
            if name in self.parked:
                self.wake(name)
        self.do(Learn(learners))
        self.learning += 1

    CHOICES = (
        maybe_start, maybe_park, maybe_wake, maybe_release, maybe_sync, maybe_assign, maybe_migrate, maybe_prepare,
        maybe_learn,
    )  # fmt: skip
    UNREST = (maybe_start, maybe_park, maybe_release, maybe_migrate)
