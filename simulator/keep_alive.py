"""Processes of released functions that wait in host memory for a start of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import simpy

from simrl.policies.contract import Role
from simrl.traces.records import Recorder
from simrl.traces.summary import KEPT_FOR


@dataclass(frozen=True, slots=True)
class Kept:
    """A released function's process.

    Attributes:
        name: Of the function that was released.
        node: Where it waits.
        gpus: That it had, and will have.
        roles: As a set: their order does not matter.
        host_bytes: That it takes there.
        since_s: When it was released.
    """

    name: str
    node: int
    gpus: int
    roles: frozenset[Role]
    host_bytes: float
    since_s: float


class KeepAlive:
    """Kept processes of a cluster. They hold no GPU, are recorded as parked, and make room for parked functions.

    Args:
        env: The clock.
        keep_s: How long one waits before it ends; 0 keeps none.
        recorder: Gets an interval for each, named after its function with " (kept)" or " (kept for b)", if b woke it.
    """

    def __init__(self, env: simpy.Environment, keep_s: float, recorder: Recorder) -> None:
        self._env, self.keep_s, self._recorder = env, keep_s, recorder
        self._kept: list[Kept] = []  # oldest first

    def keep(self, kept: Kept, room_bytes: float) -> None:
        """Keep a process if its node has *room_bytes* for it and older ones, which make room if need be."""
        if kept.host_bytes <= room_bytes:
            self.make_room(kept.node, room_bytes - kept.host_bytes)
            self._kept.append(kept)

    def take(self, function: str, node: int, gpus: int, roles: Sequence[Role]) -> bool:
        """Whether a process of this kind waits on *node*; *function* goes on with the newest of them."""
        found = [kept for kept in self._waiting(gpus, roles) if kept.node == node]
        if found:
            self._end(found[-1], self._env.now, f"{KEPT_FOR}{function})")
        return bool(found)

    def nodes(self, gpus: int, roles: Sequence[Role]) -> set[int]:
        """Nodes where a process of this kind waits."""
        return {kept.node for kept in self._waiting(gpus, roles)}

    def make_room(self, node: int, room_bytes: float) -> None:
        """End the oldest of *node* until the others fit into *room_bytes*."""
        self._expire()
        here = [kept for kept in self._kept if kept.node == node]
        while here and sum(kept.host_bytes for kept in here) > room_bytes:
            self._end(here.pop(0), self._env.now)

    def close(self) -> None:
        """End all: the run is over."""
        self._expire()
        for kept in tuple(self._kept):
            self._end(kept, self._env.now)

    def _waiting(self, gpus: int, roles: Sequence[Role]) -> list[Kept]:
        self._expire()
        return [kept for kept in self._kept if (kept.gpus, kept.roles) == (gpus, frozenset(roles))]

    def _expire(self) -> None:
        for kept in tuple(self._kept):
            if kept.since_s + self.keep_s <= self._env.now:
                self._end(kept, kept.since_s + self.keep_s)

    def _end(self, kept: Kept, end_s: float, how: str = " (kept)") -> None:
        self._kept.remove(kept)
        row = (kept.name + how, kept.node, kept.gpus, "", "parked", None, None, kept.since_s, end_s)
        if end_s > kept.since_s or how.startswith(KEPT_FOR):
            self._recorder.workers.append(row)
