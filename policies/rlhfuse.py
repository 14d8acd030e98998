"""RLHFuse-style inter-stage fusion: move the tail of generation onto few engines, prepare on the others meanwhile.

Source: RLHFuse (arXiv 2409.13221, NSDI'25), read in summaries. When fewer than R_t responses are unfinished, they are
migrated to the m engines with the most work left, m being the fewest whose batch slots (with flat decode latency) and
KV (at full length) suffice; the freed GPUs compute log-probs, values and rewards of finished responses. R_t is found by
simulating observed lengths (`simrl.policies.tail_search`). Intra-stage fusion of actor and critic pipelines needs a
critic and pipeline parallelism: on learners without it, and no other can be simulated or run here, there is nothing to
fuse. Learning is not fused with preparation. How the last responses are prepared, and what is done about lost functions
(`simrl.policies.recovery`), is our reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from simrl.policies.contract import (
    Decision,
    FunctionIdle,
    Learn,
    Migrate,
    Observation,
    Prepare,
    StageFinished,
    StepStarted,
    Subscribe,
    Sync,
    UnfinishedBelow,
)
from simrl.policies.recovery import Replacements, deal, lost_functions, lost_responses
from simrl.policies.tail_search import best_tail, destinations, engine_slots, largest_tail, piece_of
from simrl.policies.verl import COLOCATED, assign_shares, chunks, start_everywhere

FIRST_RATIO = 0.2  # before any lengths were seen: RLHFuse finds the best near it
RETUNE_STEPS = 5  # its authors say periodically, not how often


class RLHFuse:
    """Static and colocated like `verl`, but the tail of generation overlaps with preparation."""

    class Params(BaseModel):
        """Parameters of `rlhfuse`.

        Attributes:
            tail_ratio: R_t as a share of the step's responses; None: found by simulating lengths of a finished step,
                anew every 5 steps, which may also find that fusion does not pay. Where half of the engines could not
                hold so many, R_t is what they can hold (our reconstruction): else none is freed.
        """

        model_config = ConfigDict(frozen=True, extra="forbid")
        tail_ratio: float | None = Field(None, gt=0, lt=1)

    def __init__(self, params: Params | None = None) -> None:
        self.params = params or self.Params()
        self.functions: tuple[str, ...] = ()
        self.tail = 0  # R_t, in responses; 0: no fusion
        self.freed: set[str] = set()  # engines that prepare while others still generate
        self.left: tuple[int, ...] | None = None  # unprepared, and not given to anyone in this call; None: not asked
        self.replacements = Replacements()

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """As `verl`, with a migration when the tail begins."""
        decisions = self.replacements.restart(observation)
        freed_before, self.left = self.freed, None
        if not self.functions:
            decisions += self.set_up(observation)
        if decisions or lost_functions(observation):
            self.functions = self.replacements.present
        for event in observation.events:
            match event:
                case StepStarted(prompts=prompts):
                    shares = chunks(prompts, len(self.functions))
                    decisions += [*self.tune(observation), Sync(self.functions), *assign_shares(self.functions, shares)]
                case UnfinishedBelow(count=count) if count == self.tail and not self.freed:
                    decisions += self.fuse(observation)
                case StageFinished(stage="generation"):
                    decisions += self.prepare_rest(observation)
                case StageFinished(stage="preparation"):
                    decisions.append(Learn(self.functions))
        ready = [event.function for event in observation.events if isinstance(event, FunctionIdle)]
        # Those freed just now have their first piece already, even if they became idle at this very moment.
        waiting = [name for name in ready if name in freed_before and name in self.freed]
        return [*decisions, *self.prepare_next(waiting, observation), *self.reassign(observation)]

    def reassign(self, observation: Observation) -> list[Decision]:
        """Lost responses to engines that generate, or else to all."""
        if not lost_responses(observation):
            return []
        generating = [name for name in self.functions if name not in self.freed]
        some = any(self.replacements.is_at_work(observation, name) for name in generating)
        return self.replacements.reassign(observation, generating if some else self.functions)

    def set_up(self, observation: Observation) -> list[Decision]:
        """Start on every GPU, and ask to hear of the tail."""
        starts = start_everywhere(observation)
        self.replacements = Replacements(starts)
        triggers = (StageFinished("generation"), StageFinished("preparation"), FunctionIdle())
        return [*starts, *(Subscribe(trigger) for trigger in triggers)]

    def tune(self, observation: Observation) -> list[Decision]:
        """Choose R_t, and ask to hear of the tail; again from time to time if it is found by search."""
        seen, gpus = len(observation.history), observation.engine.tensor_parallel
        place = (len(self.functions), gpus, COLOCATED)
        if seen == 0:
            tail = round((self.params.tail_ratio or FIRST_RATIO) * observation.job.responses_per_step)
            self.tail = max(min(tail, largest_tail(observation, *place)), 1)
        elif self.params.tail_ratio is None and seen % RETUNE_STEPS == 1:
            self.tail = best_tail(observation, *place)
        return [Subscribe(UnfinishedBelow(self.tail))] if self.tail else []

    def fuse(self, observation: Observation) -> list[Decision]:
        """Gather the unfinished on the fewest engines, and let the others prepare what is finished."""
        at_work = [f for name, f in observation.functions.items() if self.replacements.is_at_work(observation, name)]
        by_work = sorted(at_work, key=lambda f: f.num_unfinished, reverse=True)
        remaining = sum(function.num_unfinished for function in by_work)
        if not remaining:  # all that were left may be lost just now
            return []
        slots = engine_slots(observation, by_work[0].gpus, by_work[0].roles)
        kept = by_work[: destinations(remaining, slots)]
        freed = by_work[len(kept) :]
        if not freed:
            return []
        moving = [response for function in freed for response in observation.unfinished(function.name)]
        decisions: list[Decision] = [
            Migrate(tuple(responses), target) for target, responses in deal(moving, kept).items() if responses
        ]
        self.freed = {function.name for function in freed}
        return [*decisions, *self.prepare_next([function.name for function in freed], observation)]

    def prepare_next(self, functions: Sequence[str], observation: Observation) -> list[Decision]:
        """A piece of what is finished for each of *functions*: small, so that the end can be shared by all."""
        piece = piece_of(observation.job.responses_per_step, len(self.functions))
        decisions: list[Decision] = []
        for function in functions:
            taken = self.take(observation, piece)
            if taken:
                decisions.append(Prepare((function,), taken))
        return decisions

    def take(self, observation: Observation, count: int | None = None) -> tuple[int, ...]:
        """The first *count* of what is finished and not given to anyone, or all of it."""
        left = observation.unprepared if self.left is None else self.left
        taken, self.left = left[:count], left[len(left[:count]) :]
        return taken

    def prepare_rest(self, observation: Observation) -> list[Decision]:
        """Generation is over: everyone prepares what is left."""
        self.freed = set()
        rest = self.take(observation)
        able = self.replacements.at_work(observation, self.functions)
        return [Prepare(able, rest)] if rest else []
