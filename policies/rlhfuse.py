"""RLHFuse-style inter-stage fusion: move the tail of generation onto few engines, prepare on the others meanwhile.

Source: RLHFuse (arXiv 2409.13221, NSDI'25), read in summaries. When fewer than R_t responses are unfinished, they are
migrated to the m engines with the most work left, m being the fewest whose batch slots (with flat decode latency) and
KV (at full length) suffice; the freed GPUs compute log-probs, values and rewards of finished responses. Intra-stage
fusion of actor and critic pipelines needs a critic and pipeline parallelism: on FSDP it is a no-op. Learning is not
fused with preparation. How the last responses are prepared, and what is done about lost functions
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
    Role,
    StageFinished,
    StepStarted,
    Subscribe,
    Sync,
    UnfinishedBelow,
)
from simrl.policies.recovery import Replacements, deal
from simrl.policies.verl import assign_shares, chunks, start_everywhere

PIECES = 8  # pieces that an engine's fair share of a step's preparation is done in (our reconstruction)


class RLHFuse:
    """Static and colocated like `verl`, but the tail of generation overlaps with preparation."""

    class Params(BaseModel):
        """Parameters of `rlhfuse`.

        Attributes:
            tail_ratio: R_t as a share of the step's responses; RLHFuse finds the best near 0.2. Where half of the
                engines could not hold so many, R_t is what they can hold (our reconstruction): else none is freed.
        """

        model_config = ConfigDict(frozen=True, extra="forbid")
        tail_ratio: float = Field(0.2, gt=0, lt=1)

    def __init__(self, params: Params | None = None) -> None:
        self.params = params or self.Params()
        self.functions: tuple[str, ...] = ()
        self.freed: set[str] = set()  # engines that prepare while others still generate
        self.left: list[int] = []  # unprepared, and not given to anyone in this call
        self.replacements = Replacements()

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """As `verl`, with a migration when the tail begins."""
        decisions = self.replacements.restart(observation)
        freed_before, self.left = self.freed, list(observation.unprepared)
        if not self.functions:
            decisions += self.set_up(observation)
        self.functions = self.replacements.present()
        for event in observation.events:
            match event:
                case StepStarted(prompts=prompts):
                    shares = chunks(prompts, len(self.functions))
                    decisions += [Sync(self.functions), *assign_shares(self.functions, shares)]
                case UnfinishedBelow():
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
        generating = [name for name in self.functions if name not in self.freed]
        some = any(self.replacements.is_at_work(observation, name) for name in generating)
        return self.replacements.reassign(observation, generating if some else self.functions)

    def set_up(self, observation: Observation) -> list[Decision]:
        """Start on every GPU, and ask to hear of the tail."""
        starts = start_everywhere(observation)
        self.replacements = Replacements(starts)
        tail = min(
            round(self.params.tail_ratio * observation.job.responses_per_step),
            engine_slots(observation, starts[0].gpus, starts[0].roles) * (len(starts) // 2),
        )
        tail_begins = UnfinishedBelow(max(tail, 1))
        triggers = (StageFinished("generation"), StageFinished("preparation"), tail_begins, FunctionIdle())
        return [*starts, *(Subscribe(trigger) for trigger in triggers)]

    def fuse(self, observation: Observation) -> list[Decision]:
        """Gather the unfinished on the fewest engines, and let the others prepare what is finished."""
        at_work = [f for name, f in observation.functions.items() if self.replacements.is_at_work(observation, name)]
        by_work = sorted(at_work, key=lambda f: f.num_unfinished, reverse=True)
        remaining = sum(function.num_unfinished for function in by_work)
        if not remaining:  # all that were left may be lost just now
            return []
        slots = engine_slots(observation, by_work[0].gpus, by_work[0].roles)
        destinations = by_work[: max(1, -(-remaining // slots))]
        freed = by_work[len(destinations) :]
        if not freed:
            return []
        moving = [response for function in freed for response in observation.unfinished(function.name)]
        decisions: list[Decision] = [
            Migrate(tuple(responses), target) for target, responses in deal(moving, destinations).items() if responses
        ]
        self.freed = {function.name for function in freed}
        return [*decisions, *self.prepare_next([function.name for function in freed], observation)]

    def prepare_next(self, functions: Sequence[str], observation: Observation) -> list[Decision]:
        """A piece of what is finished for each of *functions*: small, so that the end can be shared by all."""
        piece = -(-observation.job.responses_per_step // (PIECES * len(self.functions)))
        decisions: list[Decision] = []
        for function in functions:
            taken, self.left = self.left[:piece], self.left[piece:]
            if taken:
                decisions.append(Prepare((function,), tuple(taken)))
        return decisions

    def prepare_rest(self, observation: Observation) -> list[Decision]:
        """Generation is over: everyone prepares what is left."""
        self.freed = set()
        rest, self.left = self.left, []
        able = self.replacements.at_work(observation, self.functions)
        return [Prepare(able, tuple(rest))] if rest else []


def engine_slots(observation: Observation, gpus: int, roles: tuple[Role, ...]) -> int:
    """Responses that an engine takes with decode latency flat and KV fitting even if all grow to the cap."""
    longest = observation.job.max_prompt_tokens + observation.job.max_response_tokens
    kv_slots = observation.estimates.kv_tokens(gpus, roles) // longest
    return max(1, min(observation.estimates.flat_batch(gpus), kv_slots))
