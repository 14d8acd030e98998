"""Replays of random workloads on real engines, one or several in turn: what a profile and a probe are made of."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simrl.real_backend.actors import HostPool
from simrl.real_backend.backend import ClockName, Replay
from simrl.real_backend.engine import StepReport
from simrl.real_backend.function import ITERATIONS_PER_CALL
from simrl.traces.profile import Iteration
from simrl.traces.streams import stream

FIRST_TOKEN = 3  # ids below are left to special tokens
PROMPT_TOKENS = (8, 256)
MAX_RESPONSE_TOKENS = 400
DONE = object()


@dataclass(frozen=True, slots=True)
class Item:
    """A response of a workload.

    Attributes:
        group: Responses of one group have the same prompt and come one after the other.
        prompt_tokens: Its length.
        response_tokens: Length that it is made to have.
        arrives: Iterations before it is added; earlier, if the engine runs out of work.
    """

    group: int
    prompt_tokens: int
    response_tokens: int
    arrives: int = 0


Workload = tuple[Item, ...]


def draw_workload(rng: np.random.Generator, kind: Literal["burst", "stream"]) -> Workload:
    """Mixed lengths: prompts of 8 to 256 tokens, responses of 1 to 400, mostly short with a long tail.

    A burst arrives at once and its batch shrinks; a stream arrives in small lots over its whole length. Some workloads
    have only short prompts and some only long ones: else the context would be much the same in all batches of a size.
    """
    shortest, longest = (PROMPT_TOKENS, (8, 48), (192, 256))[rng.integers(3)]
    group_size = int(rng.choice([1, 1, 4]))
    groups = int(rng.integers(6, 49)) // group_size + 1
    arrives = np.zeros(groups) if kind == "burst" else np.sort(rng.integers(0, 160, groups))
    items = []
    for group in range(groups):
        prompt_tokens = int(rng.integers(shortest, longest + 1))
        items += [Item(group, prompt_tokens, draw_length(rng), int(arrives[group])) for _ in range(group_size)]
    return tuple(items)


def draw_length(rng: np.random.Generator) -> int:
    """Tokens of a response."""
    return int(np.clip(rng.lognormal(math.log(60), 0.9), 1, MAX_RESPONSE_TOKENS))


def probe_workload() -> Workload:
    """The fixed one: 10 responses of 4 to 40 tokens."""
    return tuple(Item(i, 32, 4 * (i + 1)) for i in range(10))


@dataclass(frozen=True, slots=True)
class Played:
    """A workload that was run: its iterations, and the wall time of all calls."""

    iterations: tuple[Iteration, ...]
    wall_s: float

    @property
    def seconds(self) -> float:
        """Of the iterations alone."""
        return sum(iteration.seconds for iteration in self.iterations)


class Prefills:
    """Tells which tokens an iteration prefilled: first come, first served, a group's later members hit whole blocks.

    True as long as nothing is preempted.
    """

    def __init__(self, workload: Workload, block_tokens: int) -> None:
        self._spans: list[list[int]] = []  # computed or cached so far, prompt tokens; in the order of arrival
        seen: set[int] = set()
        for item in workload:
            cached = (item.prompt_tokens - 1) // block_tokens * block_tokens if item.group in seen else 0
            seen.add(item.group)
            self._spans.append([cached, item.prompt_tokens])

    def attended(self, tokens: int) -> float:
        """Tokens that the next *tokens* prompt tokens attend to, in sum.

        Raises:
            ValueError: so many are not left.
        """
        attended = 0.0
        while tokens:
            if not self._spans:
                raise ValueError(f"{tokens} tokens were prefilled that nobody waits for")
            done, end = self._spans[0]
            chunk = min(tokens, end - done)
            attended += chunk * (done + chunk / 2)
            tokens -= chunk
            self._spans[0][0] += chunk
            if done + chunk == end:
                del self._spans[0]
        return attended


class Player:
    """Plays workloads on idle engines of a pool, always with prompts that no engine has cached.

    On the virtual clock of the real backend many engines share a core and take turns, a few iterations each; see
    `VllmEngine.warm_caches`. So engines are played in turn, too, where that is the regime to be measured.
    """

    def __init__(self, hosts: HostPool, seed: int) -> None:
        self._hosts, self._block_tokens = hosts, hosts.engine.block_tokens
        self.vocabulary = int(json.loads((Path(hosts.engine.model) / "config.json").read_text("utf-8"))["vocab_size"])
        self._replay = Replay(seed, self.vocabulary)  # sampled as in a run: greedy decoding takes 0.9 times as long
        self._ids = itertools.count()
        self._tokens = stream(seed, "tokens")

    def new_id(self) -> int:
        """Of a response, or of anything else."""
        return next(self._ids)

    def prompt(self, tokens: int) -> list[int]:
        """Another one each time."""
        ids: list[int] = self._tokens.integers(FIRST_TOKEN, self.vocabulary, tokens).tolist()
        return ids

    def play(self, engines: Sequence[Any], workloads: Sequence[Workload], clock: ClockName) -> list[Played]:
        """In turn, a call each; an engine that is done takes the next workload, so that few calls see few others."""
        waiting = list(enumerate(workloads))
        played: dict[int, Played] = {}
        playing: dict[int, Generator[None, None, None]] = {}  # by engine

        def go_on(index: int, workload: Workload, engine: Any) -> Generator[None, None, None]:
            played[index] = yield from self._calls(engine, workload, clock)

        while waiting or playing:
            for place, engine in enumerate(engines):
                if place not in playing and waiting:
                    playing[place] = go_on(*waiting.pop(0), engine)
                if place in playing and next(playing[place], DONE) is DONE:
                    del playing[place]
        return [played[index] for index in range(len(workloads))]

    def _calls(self, engine: Any, workload: Workload, clock: ClockName) -> Generator[None, None, Played]:
        prompts = {item.group: self.prompt(item.prompt_tokens) for item in workload}
        works = [self._replay.work(self.new_id(), prompts[item.group], item.response_tokens) for item in workload]
        prefills = Prefills(workload, self._block_tokens)
        iterations: list[Iteration] = []
        limits = ITERATIONS_PER_CALL, len(works), clock == "virtual"
        added, unfinished, wall_s = 0, 0, 0.0
        while added < len(works) or unfinished:
            first = added
            if not unfinished:
                added += 1
            while added < len(works) and workload[added].arrives <= len(iterations):
                added += 1
            called_s = time.perf_counter()
            reports: list[StepReport] = self._hosts.get(engine.step.remote(works[first:added], *limits))
            wall_s += time.perf_counter() - called_s
            unfinished += added - first - sum(len(report.finished) for report in reports)
            iterations += [
                Iteration(r.batch, r.context_tokens, r.prefill_tokens, prefills.attended(r.prefill_tokens), r.seconds)
                for r in reports
            ]
            yield
        return Played(tuple(iterations), wall_s)

    def probe(self, engines: Sequence[Any], clock: ClockName) -> list[Played]:
        """The fixed workload as engines run it on that clock: all in turn on the virtual one, else the first alone.

        Played twice, since engines that were parked or idle begin slowly; the second time counts.
        """
        engines = engines if clock == "virtual" else engines[:1]
        self.play(engines, [probe_workload()] * len(engines), clock)
        return self.play(engines, [probe_workload()] * len(engines), clock)


def mean_s(played: Sequence[Played]) -> float:
    """Seconds of iterations, of the average engine."""
    return statistics.fmean(one.seconds for one in played)
