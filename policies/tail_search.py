"""When RLHFuse's tail begins: R_t from the lengths of a finished step, played through with the profiled estimates.

RLHFuse (arXiv 2409.13221) finds R_t by simulating its stages on the observed distribution of lengths, and does so anew
from time to time. How it simulates them is our reconstruction: decoding by the profiled time of an iteration, prompts
free, preparation by its profiled time, and KV that moves in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from simrl.policies.contract import Observation, Role
from simrl.policies.verl import chunks

RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Shares of a step's responses that are tried as R_t."""
PIECES = 8
"""Pieces that an engine's fair share of a step's preparation is done in (our reconstruction)."""

Floats = NDArray[np.float64]
DecodeSeconds = Callable[[int, float], float]
"""Seconds of an iteration, by batch and mean context."""


def destinations(remaining: int, slots: int) -> int:
    """The fewest engines of so many slots that hold what remains: RLHFuse's m."""
    return max(1, -(-remaining // slots))


def engine_slots(observation: Observation, gpus: int, roles: tuple[Role, ...]) -> int:
    """Responses that an engine takes with decode latency flat and KV fitting even if all grow to the cap."""
    longest = observation.job.max_prompt_tokens + observation.job.max_response_tokens
    kv_slots = observation.estimates.kv_tokens(gpus, roles) // longest
    return max(1, min(observation.estimates.flat_batch(gpus), kv_slots))


def piece_of(responses: int, engines: int) -> int:
    """Responses that a freed engine prepares at once."""
    return -(-responses // (PIECES * engines))


def largest_tail(observation: Observation, engines: int, gpus: int, roles: tuple[Role, ...]) -> int:
    """What half of the engines hold: a larger tail frees too few (our reconstruction)."""
    return max(engine_slots(observation, gpus, roles) * (engines // 2), 1)


def best_tail(observation: Observation, engines: int, gpus: int, roles: tuple[Role, ...]) -> int:
    """R_t in responses with which the newest finished step would have been prepared earliest; 0: not to fuse."""
    estimates, step = observation.estimates, observation.history[-1]
    prompt_tokens = float(np.mean([prompt.tokens for prompt in observation.prompts]))
    typical = prompt_tokens + float(np.mean(step.response_tokens))
    shares = [[tokens for group in share for tokens in group] for share in chunks(step.response_tokens, engines)]
    tail = Tail(
        lengths=tuple(tuple(share) for share in shares),
        prompt_tokens=prompt_tokens,
        slots=engine_slots(observation, gpus, roles),
        room=max(1, int(estimates.kv_tokens(gpus, roles) / typical)),
        decode_s=cache(lambda batch, context: estimates.decode_s(batch, context, gpus)),
        prepare_s=lambda tokens: estimates.prepare_s(round(tokens), gpus),
        transfer_s=lambda tokens: estimates.transfer_s(round(tokens), gpus, same_node=False),
    )
    most = largest_tail(observation, engines, gpus, roles)
    counts = sorted({min(round(ratio * tail.responses), most) for ratio in RATIOS} - {0})
    return min([0, *counts], key=tail.prepared_s)  # the first of equals: the smallest


@dataclass(frozen=True)
class Tail:
    """A step of known lengths on engines of one kind.

    Attributes:
        lengths: Response tokens by engine, in the order of admission.
        prompt_tokens: Mean of a prompt.
        slots: Responses that an engine takes over, at most.
        room: Responses that are decoded at once.
        decode_s: Seconds of an iteration.
        prepare_s: Seconds that one engine's GPUs prepare so many tokens.
        transfer_s: Seconds that the KV of so many tokens moves.
    """

    lengths: tuple[tuple[int, ...], ...]
    prompt_tokens: float
    slots: int
    room: int
    decode_s: DecodeSeconds
    prepare_s: Callable[[float], float]
    transfer_s: Callable[[float], float]

    @property
    def responses(self) -> int:
        """Of the step."""
        return sum(map(len, self.lengths))

    @cached_property
    def plays(self) -> tuple[Play, ...]:
        """Each engine's generation to its end."""
        return tuple(play(share, [self.prompt_tokens] * len(share), self.room, self.decode_s) for share in self.lengths)

    def prepared_s(self, count: int) -> float:
        """When all is generated and prepared, if the tail begins with fewer than *count* unfinished; 0: no fusion."""
        engines, total = len(self.lengths), self.responses
        tokens = self.prompt_tokens + sum(map(sum, self.lengths)) / total
        finished_s = np.sort(np.concatenate([engine.finished_s for engine in self.plays]))
        apart_s = float(finished_s[-1]) + self.prepare_s(total * tokens / engines)
        if count == 0:
            return apart_s
        begin_s = float(finished_s[total - count])
        left = sorted((engine.left(begin_s) for engine in self.plays), key=len, reverse=True)
        kept = destinations(sum(map(len, left)), self.slots)
        if kept >= engines or not left[0]:
            return apart_s
        end_s = begin_s + self._tail_s(left[:kept], [one for share in left[kept:] for one in share])
        piece = piece_of(total, engines)
        pieces = (engines - kept) * int((end_s - begin_s) / self.prepare_s(piece * tokens))
        rest = max(total - pieces * piece, 0)
        return end_s + (self.prepare_s(rest * tokens / engines) if rest else 0.0)

    def _tail_s(self, there: Sequence[Sequence[tuple[int, int]]], moving: Sequence[tuple[int, int]]) -> float:
        """Seconds until the kept engines are done with theirs and with what is *moving*: (tokens left, generated)."""
        batches = [list(share) for share in there]
        for one in moving:
            min(batches, key=len).append(one)
        moved_s = self.transfer_s(sum(self.prompt_tokens + done for _, done in moving) / len(there)) if moving else 0.0
        ends_s = [
            play([n for n, _ in batch], [self.prompt_tokens + done for _, done in batch], self.room, self.decode_s)
            for batch in batches
        ]
        return moved_s + max(float(engine.times_s[-1]) for engine in ends_s)


@dataclass(frozen=True)
class Play:
    """An engine's generation.

    Attributes:
        iterations: At which the batch changed.
        times_s: When.
        begins: Iteration before each response's first.
        ends: Each response's last iteration.
    """

    iterations: Floats
    times_s: Floats
    begins: Floats
    ends: Floats

    @cached_property
    def finished_s(self) -> Floats:
        """When each response is finished."""
        return np.interp(self.ends, self.iterations, self.times_s)

    def left(self, time_s: float) -> list[tuple[int, int]]:
        """Of each response that is unfinished at a time: tokens left, and generated."""
        now = np.floor(np.interp(time_s, self.times_s, self.iterations))
        unfinished = self.finished_s > time_s
        done = np.maximum(now - self.begins, 0)[unfinished]
        left = np.maximum((self.ends - self.begins)[unfinished] - done, 1)
        return list(zip(left.astype(int).tolist(), done.astype(int).tolist(), strict=True))


def play(tokens: Sequence[int], contexts: Sequence[float], room: int, decode_s: DecodeSeconds) -> Play:
    """Decode responses of so many *tokens* each, from such *contexts* on, *room* at a time, first come first served."""
    iterations, times_s, begins = [0], [0.0], [0] * len(tokens)
    running: list[tuple[int, int]] = []  # (last iteration, response)
    admitted, context_sum = 0, 0.0  # context_sum / batch + iteration is the mean context
    while running or admitted < len(tokens):
        now = iterations[-1]
        while admitted < len(tokens) and len(running) < room:
            begins[admitted] = now
            heappush(running, (now + tokens[admitted], admitted))
            context_sum += contexts[admitted] - now
            admitted += 1
        end, batch = running[0][0], len(running)
        context = context_sum / batch + (now + end) / 2
        times_s.append(times_s[-1] + (end - now) * decode_s(batch, 64.0 * round(context / 64)))
        iterations.append(end)
        while running and running[0][0] == end:
            _, response = heappop(running)
            context_sum -= contexts[response] - begins[response]
    ends = np.asarray(begins, dtype=float) + np.asarray(tokens, dtype=float)
    return Play(np.asarray(iterations, dtype=float), np.asarray(times_s), np.asarray(begins, dtype=float), ends)
