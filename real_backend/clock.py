"""Two ways in which time passes on a real cluster.

`VirtualClock`: real work is done one call at a time, and the clock of the run is advanced by what the call measured. So
many functions share one core without slowing each other down, and a run on a laptop has the concurrency of a cluster.
`WallClock`: calls run side by side, and time is time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import simpy


class Clock(Protocol):
    """How work that other processes do becomes an event."""

    env: simpy.Environment

    def each(self, begins: Sequence[Callable[[], Any]], seconds: Callable[[Any], float]) -> simpy.Event:
        """An event that fires when all of several independent pieces of work are done."""

    def call(self, begin: Callable[[], Any], seconds: Callable[[Any], float]) -> simpy.Event:
        """An event whose value is what the work returned; *seconds* are read off that."""


class VirtualClock:
    """One call at a time; see the module.

    Args:
        get: Waits for what `begin` returned.
    """

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self.env = simpy.Environment()
        self._get = get

    def call(self, begin: Callable[[], Any], seconds: Callable[[Any], float]) -> simpy.Event:
        """Do the work now; the event fires when it would be over."""
        result = self._get(begin())
        return self.env.timeout(seconds(result), value=result)

    def each(self, begins: Sequence[Callable[[], Any]], seconds: Callable[[Any], float]) -> simpy.Event:
        """One after the other, so that none slows another down; it lasts as long as the longest."""
        results = [self._get(begin()) for begin in begins]
        return self.env.timeout(max(map(seconds, results)), value=results)


class WallEnvironment(simpy.Environment):
    """An environment in which a second is a second, and events may come from other processes.

    Args:
        wait: Waits for one of some calls, at most so many seconds (None: for ever); returns those that are done.
        get: The result of a call that is done.
    """

    def __init__(self, wait: Callable[[list[Any], float | None], list[Any]], get: Callable[[Any], Any]) -> None:
        super().__init__()
        self._began_s = time.monotonic()
        self._wait, self._get = wait, get
        self._pending: dict[Any, simpy.Event] = {}

    def wall_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began_s

    def future(self, call: Any) -> simpy.Event:
        """An event that fires when *call* is done, with its result; it fails with the call's error."""
        event = self.event()
        self._pending[call] = event
        return event

    def step(self) -> None:
        """Wait for the next event, whichever kind it is, and process it."""
        while self._pending and self.peek() > max(self._now, self.wall_s()):
            due_s = self.peek()
            self._collect(None if due_s == simpy.core.Infinity else max(due_s - self.wall_s(), 0.0))
        rest_s = self.peek() - self.wall_s()
        if not self._pending and 0 < rest_s < simpy.core.Infinity:
            time.sleep(rest_s)
        super().step()

    def _collect(self, timeout_s: float | None) -> None:
        for call in self._wait(list(self._pending), timeout_s):
            event = self._pending.pop(call)
            self._now = max(self.wall_s(), self._now)
            try:
                event.succeed(self._get(call))
            except Exception as error:  # whatever the process says; the function that waits for it decides
                event.fail(error)


class WallClock:
    """Calls side by side; see the module."""

    def __init__(self, wait: Callable[[list[Any], float | None], list[Any]], get: Callable[[Any], Any]) -> None:
        self.env: simpy.Environment = WallEnvironment(wait, get)

    def call(self, begin: Callable[[], Any], seconds: Callable[[Any], float]) -> simpy.Event:
        """Begin the work; the event fires when it is over."""
        assert isinstance(self.env, WallEnvironment)
        calls = begin()
        if isinstance(calls, list):
            return self.env.process(self._all([self.env.future(call) for call in calls]))
        return self.env.future(calls)

    def each(self, begins: Sequence[Callable[[], Any]], seconds: Callable[[Any], float]) -> simpy.Event:
        """All at once."""
        return self.call(lambda: [begin() for begin in begins], seconds)

    def _all(self, events: list[simpy.Event]) -> Any:
        done = yield self.env.all_of(events)
        return [done[event] for event in events]
