"""What policies do about lost functions. Our reconstruction: the papers behind the policies do not say.

A replacement of the same name, size and roles is started at once, or, where its node is lost or will be, when that is
back. Others take over what it was at, since a cold start takes longer than most of a step; the job goes on with what is
left. Functions on a reclaimed node work on until they are lost, as the tokens that they make till then are kept.
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
        self.names: dict[str, None] = {}  # lost at some time
        self.absent: dict[str, None] = {}  # lost, and not started anew
        self.present = tuple(self.starts)  # not absent, those too that wait, or were never started
        self.started: tuple[str, ...] = ()  # anew, in this call

    def restart(self, observation: Observation) -> list[Decision]:
        """Start lost functions anew where their node is up. Comes before other decisions: a `Learn` needs all learners.

        When no learner is left, those lost just now are started all the same: they wait for their node, and all else
        for them.
        """
        lost = lost_functions(observation)
        if not lost and not self.absent:
            self.started = ()
            return []
        self.names.update(dict.fromkeys(lost))
        self.absent.update(dict.fromkeys(lost))
        up = nodes_that_are_up(observation) if self.absent else set()
        self.started = tuple(name for name in self.absent if self.starts[name].node in up)
        left = (name for name in self.starts if name not in self.absent or name in self.started)
        if lost and not any("learn" in self.starts[name].roles for name in left):
            self.started = tuple(dict.fromkeys((*self.started, *lost)))
        for name in self.started:
            del self.absent[name]
        self.present = tuple(name for name in self.starts if name not in self.absent)
        return [self.starts[name] for name in self.started]

    def at_work(self, observation: Observation, names: Sequence[str]) -> tuple[str, ...]:
        """Those of *names* that are not being replaced, or all of them if there are none."""
        return tuple(name for name in names if self.is_at_work(observation, name)) or tuple(names)

    def is_at_work(self, observation: Observation, name: str) -> bool:
        """Whether it is neither lost nor starting in place of one that was."""
        function = observation.functions.get(name)
        return name not in self.names or (function is not None and function.state is not State.STARTING)

    def reassign(self, observation: Observation, names: Sequence[str]) -> list[Decision]:
        """Lost responses to those of *names* with the fewest unfinished.

        If none can go on, they go to the replacements, or else to those of *names* that wait for weights.
        """
        responses = lost_responses(observation) if self.names else ()
        if not responses:
            return []
        targets = self.able(observation, names, responses)
        if targets:
            return assign_dealt(responses, targets)
        later = self.started or tuple(name for name in names if name in observation.functions)
        shares = {name: responses[i :: len(later)] for i, name in enumerate(later)}
        return [Sync(later), *(Assign(name, share) for name, share in shares.items() if share)]

    def able(self, observation: Observation, names: Sequence[str], responses: Sequence[int]) -> list[Function]:
        """Those of *names* that are at work, decode, and hold weights that are fresh enough for *responses*."""
        newest = max(observation.response(response).step for response in responses)
        functions = [observation.functions[name] for name in names if self.is_at_work(observation, name)]
        holds = newest - observation.job.max_staleness
        return [f for f in functions if "decode" in f.roles and f.weights_version >= holds]


def nodes_that_are_up(observation: Observation) -> set[int]:
    """Nodes that are there, and will not be reclaimed."""
    return {node.index for node in observation.nodes if node.condition == "up"}


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
