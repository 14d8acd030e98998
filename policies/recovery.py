"""What policies do about lost functions. Our reconstruction: the papers behind the policies do not say.

A replacement of the same name, size and roles is started at once. Others take over what it was at, since a cold start
takes longer than most of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simrl.policies.contract import Assign, Decision, Function, FunctionLost, Observation, Start, State, Sync


class Replacements:
    """Functions that were lost, and how to start them again.

    Args:
        starts: How each function was, or will be, started.
    """

    def __init__(self, starts: Iterable[Start] = ()) -> None:
        self.starts = {start.function: start for start in starts}
        self.names: dict[str, None] = {}  # started anew at some time

    def restart(self, observation: Observation) -> list[Decision]:
        """Start every function anew that is lost now. Comes before other decisions: a `Learn` needs all learners."""
        lost = lost_functions(observation)
        self.names.update(dict.fromkeys(lost))
        return [self.starts[name] for name in lost]

    def at_work(self, observation: Observation, names: Sequence[str]) -> tuple[str, ...]:
        """Those of *names* that are not being replaced, or all of them if there are none."""
        return tuple(name for name in names if self.is_at_work(observation, name)) or tuple(names)

    def is_at_work(self, observation: Observation, name: str) -> bool:
        """Whether it is neither lost nor starting in place of one that was."""
        function = observation.functions.get(name)
        return name not in self.names or (function is not None and function.state is not State.STARTING)

    def reassign(self, observation: Observation, names: Sequence[str]) -> list[Decision]:
        """Lost responses to those of *names* with the fewest unfinished, or to the replacements if none can go on."""
        responses = lost_responses(observation)
        if not responses:
            return []
        targets = self.able(observation, names, responses)
        if targets:
            return assign_dealt(responses, targets)
        anew = lost_functions(observation)
        shares = {name: responses[i :: len(anew)] for i, name in enumerate(anew)}
        return [Sync(tuple(anew)), *(Assign(name, share) for name, share in shares.items() if share)]

    def able(self, observation: Observation, names: Sequence[str], responses: Sequence[int]) -> list[Function]:
        """Those of *names* that are at work, decode, and hold weights that are fresh enough for *responses*."""
        newest = max(observation.response(response).step for response in responses)
        functions = [observation.functions[name] for name in names if self.is_at_work(observation, name)]
        holds = newest - observation.job.max_staleness
        return [f for f in functions if "decode" in f.roles and f.weights_version >= holds]


def lost_functions(observation: Observation) -> list[str]:
    """Functions that were lost since the last call."""
    return list(dict.fromkeys(event.function for event in observation.events if isinstance(event, FunctionLost)))


def lost_responses(observation: Observation) -> tuple[int, ...]:
    """Responses that were on them."""
    lost = (event.responses for event in observation.events if isinstance(event, FunctionLost))
    return tuple(response for responses in lost for response in responses)


def assign_dealt(responses: Sequence[int], targets: Sequence[Function]) -> list[Decision]:
    """Assign each response to the target with the fewest unfinished ones."""
    return [Assign(name, tuple(share)) for name, share in deal(responses, targets).items() if share]


def deal(responses: Sequence[int], targets: Sequence[Function]) -> dict[str, list[int]]:
    """Each response to the target with the fewest unfinished ones, the first of equals."""
    loads = {function.name: function.num_unfinished for function in targets}
    shares: dict[str, list[int]] = {name: [] for name in loads}
    for response in responses:
        lightest = min(loads, key=loads.__getitem__)
        shares[lightest].append(response)
        loads[lightest] += 1
    return shares
