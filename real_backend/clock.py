"""Two ways in which time passes on a real cluster.

`VirtualClock`: real work is done one call at a time, and the clock of the run is advanced by what the call measured. So
many functions share one core without slowing each other down, and a run on a laptop has the concurrency of a cluster.
`WallClock`: calls run side by side, and time is time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import simpy


class Clock(Protocol):
    """How work that other processes do becomes an event.

    Attributes:
        env: What happens when.
        in_turn: Whether functions take turns on a core.
    """

    env: simpy.Environment
    in_turn: bool

    def took(self, seconds: float) -> simpy.Event:
        """What was waited for already, so long on the wall, takes its time."""

    def call(self, begin: Callable[[], Any], seconds: Callable[[Any], float]) -> simpy.Event:
        """An event whose value is what the work returned; *seconds* are read off that."""


class VirtualClock:
    """One call at a time; see the module.

    Args:
        get: Waits for what `begin` returned.
    """

    in_turn = True

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self.env = simpy.Environment()
        self._get = get

    def call(self, begin: Callable[[], Any], seconds: Callable[[Any], float]) -> simpy.Event:
        """Do the work now; the event fires when it would be over."""
        result = self._get(begin())
        return self.env.timeout(seconds(result), value=result)

    def took(self, seconds: float) -> simpy.Event:
        """It takes as long in the run."""
        return self.env.timeout(seconds)


class WallEnvironment(simpy.Environment):
    """An environment in which a second is a second, and events may come from other processes.

    Args:
        wait: Waits for one of some calls, at most so many seconds (None: for ever); returns those that are done.
        get: The result of a call that is done.
        limit_s: How long a call may take.
    """

    def __init__(
        self, wait: Callable[[list[Any], float | None], list[Any]], get: Callable[[Any], Any], limit_s: float
    ) -> None:
        super().__init__()
        self._began_s = time.monotonic()
        self._wait, self._get, self._limit_s = wait, get, limit_s
        self._pending: dict[Any, tuple[simpy.Event, float]] = {}  # with the time at which it began

    def wall_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began_s

    def future(self, call: Any) -> simpy.Event:
        """An event that fires when *call* is done, with its result; it fails with the call's error."""
        event = self.event()
        self._pending[call] = event, self.wall_s()
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
            event, _ = self._pending.pop(call)
            self._now = max(self.wall_s(), self._now)
            try:
                event.succeed(self._get(call))
            except Exception as error:  # whatever the process says; the function that waits for it decides
                self._fail(event, error)
        for call, (event, began_s) in list(self._pending.items()):
            if self.wall_s() > began_s + self._limit_s:
                del self._pending[call]
                self._fail(event, TimeoutError(f"a call to another process took more than {self._limit_s:g} s"))

    def _fail(self, event: simpy.Event, error: Exception) -> None:
        event.defused = not event.callbacks  # nobody waits for it any more
        event.fail(error)


class WallClock:
    """Calls side by side; see the module."""

    in_turn = False

    def __init__(
        self, wait: Callable[[list[Any], float | None], list[Any]], get: Callable[[Any], Any], limit_s: float
    ) -> None:
        self.env: simpy.Environment = WallEnvironment(wait, get, limit_s)

    def call(self, begin: Callable[[], Any], seconds: Callable[[Any], float]) -> simpy.Event:
        """Begin the work; the event fires when it is over."""
        assert isinstance(self.env, WallEnvironment)
        calls = begin()
        if isinstance(calls, list):
            return self.env.process(self._all([self.env.future(call) for call in calls]))
        return self.env.future(calls)

    def took(self, seconds: float) -> simpy.Event:
        """It is over."""
        return self.env.timeout(0.0)

    def _all(self, events: list[simpy.Event]) -> Any:
        done = yield self.env.all_of(events)
        return [done[event] for event in events]
