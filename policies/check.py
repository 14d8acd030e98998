"""The conformance suite for policies: anyone can run it, on any backend."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from pydantic import ValidationError

from simrl.policies.contract import (
    Backend,
    Decision,
    InvalidDecision,
    Observation,
    Policy,
    PolicyStalled,
    State,
    drive,
)

MUTATION_HINTS = ("does not support item assignment", "does not support item deletion", "has no setter", "read-only")


class PolicyCheckFailed(ValueError):
    """A policy broke a rule; the message says on which cluster, which rule, and how."""


class _Mutated(Exception):
    pass


def check_policy(policy: Policy, backends: Mapping[str, Callable[[], Backend]]) -> list[str]:
    """Run *policy* on every backend and hold it to the contract.

    On each: it decides with a sequence of legal decisions only; it never starves the cluster; it changes nothing that
    it observes; every function that it starts gets GPUs in the end; and a second run makes the same decisions.

    Args:
        policy: Stays as it is: copies are run.
        backends: Makers of fresh backends, by a name for messages.

    Returns:
        A line for each backend that it passed.

    Raises:
        PolicyCheckFailed: at the first broken rule.
    """
    if not isinstance(policy, Policy):
        raise PolicyCheckFailed(f"{type(policy).__name__} has no method decide(observation)")
    try:
        copy.deepcopy(policy)
    except Exception as error:
        raise PolicyCheckFailed(f"it cannot be copied, but every run works on a copy: {error}") from error
    passed = []
    for name, make_backend in backends.items():
        first = _run(policy, name, make_backend)
        again = _run(policy, name, make_backend)
        if first != again:
            raise PolicyCheckFailed(
                f"on {name}: two runs with the same seed decided differently"
                f" (call {_first_difference(first, again)}): it keeps state outside itself, or uses a global random"
                f" generator or the clock"
            )
        passed.append(f"{name}: {len(first)} calls, {sum(map(len, first)) - len(first)} decisions, the same twice")
    return passed


def _run(policy: Policy, name: str, make_backend: Callable[[], Backend]) -> list[tuple[str, ...]]:
    """Every call's time and decisions, as text."""
    watched = _Watched(policy)
    try:
        drive(make_backend(), watched)
    except InvalidDecision as error:
        raise PolicyCheckFailed(f"on {name}: {error}") from error
    except PolicyStalled as error:
        raise PolicyCheckFailed(f"on {name}: it starves the cluster: {error}") from error
    except _Mutated as error:
        raise PolicyCheckFailed(f"on {name}: it changes what it observes: {error}") from error
    except (Exception, SystemExit) as error:
        if not watched.log.deciding:
            raise  # the backend's own fault
        raise PolicyCheckFailed(f"on {name}: decide raised {type(error).__name__}: {error}") from error
    if watched.log.waiting:
        raise PolicyCheckFailed(
            f"on {name}: it wants more GPUs than there are: {', '.join(sorted(watched.log.waiting)[:5])} never got any"
        )
    return watched.log.calls


def _first_difference(first: Sequence[object], again: Sequence[object]) -> int:
    differing = (i for i, (a, b) in enumerate(zip(first, again, strict=False)) if a != b)
    return next(differing, min(len(first), len(again)))


class _Log:
    """What a watched run left; the one thing that is shared with its copy."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.waiting: set[str] = set()
        self.deciding = False

    def __deepcopy__(self, memo: object) -> _Log:
        return self


class _Watched:
    """A policy under observation."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.log = _Log()

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """Ask the policy, and compare what it saw before and after."""
        before = _fingerprint(observation)
        self.log.deciding = True
        try:
            decisions = self.policy.decide(observation)
        except (dataclasses.FrozenInstanceError, AttributeError, TypeError, ValidationError) as error:
            if isinstance(error, dataclasses.FrozenInstanceError) or _is_mutation(str(error)):
                raise _Mutated(str(error).splitlines()[0]) from error
            raise
        after = _fingerprint(observation)
        if before != after:
            changed = ", ".join(key for key in before if before[key] != after[key])
            raise _Mutated(f"{changed} differed after decide")
        if not isinstance(decisions, Sequence):
            raise TypeError(f"decide must return a sequence of decisions, got {type(decisions).__name__}")
        self.log.deciding = False
        functions = observation.functions
        self.log.waiting = {n for n, f in functions.items() if f.state is State.STARTING and f.node is None}
        self.log.calls.append((f"at {observation.time_s!r}", *map(repr, decisions)))
        return decisions


def _is_mutation(message: str) -> bool:
    return any(hint in message for hint in MUTATION_HINTS) or "frozen" in message


def _fingerprint(observation: Observation) -> dict[str, str]:
    """All that can be seen, as text."""
    seen = {
        "events": observation.events,
        "functions": dict(observation.functions),
        "nodes": tuple(observation.nodes),
        "prompts": observation.prompts,
        "unassigned": observation.unassigned,
        "unprepared": observation.unprepared,
        "history": tuple(observation.history),
        "job": observation.job,
        "engine": observation.engine,
        "time": (observation.time_s, observation.step, observation.weights_version),
    }
    return {name: repr(value) for name, value in seen.items()}
