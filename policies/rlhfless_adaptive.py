"""`rlhfless` that sets its own weights from what it has observed: three rules, no parameter to tune but lambda.

Source: ours, no system's. RLHFless (arXiv 2602.22718) leaves open how T(N) and C(N) are normalised, where tau lies and
how long the history of lengths is; `simrl.policies.rlhfless` fixes all three. Here, from the first finished step on:

1. **Normalisation.** Generation of T seconds and C actor-seconds scores
   lambda ln(R + T) + (1 - lambda) ln(G_l R + g C), the least is best. R: the newest step's seconds outside of
   generation, in which all G_l GPUs of the learner are held; g: GPUs of an actor. That is the logarithm of
   step seconds^lambda * GPU-seconds^(1 - lambda): one percent of the one is worth one percent of the other at
   lambda = 1/2, whatever the job. Relative to generation alone, as in `rlhfless`, that depends on its share of a step.
2. **tau.** Each finished step is replayed with its true lengths on the actors that it had, cut at each of RATIOS. The
   tau whose replays of the newest REPLAYS steps score least by rule 1 holds for the next step. Cuts pay where few are
   left for long and parking is short; both are in the replay, and no constant tells them for all jobs.
3. **EWMA.** A predictor for each of ALPHAS predicts every prompt before it is observed. The alpha with the least sum
   of squared errors of ln mean length so far predicts: how long to remember depends on drift and on noise, which the
   errors weigh, and errors of logarithms do not let the longest prompts decide.

The rules and their constants were written down with the workload `gsm8k` alone; docs/adaptive.md has what came out on
it and on the others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heapify, heappop, heappush

import numpy as np

from simrl.policies.contract import Assign, CompletionRatio, Decision, FinishedStep, Observation, Prompt, Subscribe
from simrl.policies.prediction import Predictor
from simrl.policies.rlhfless import LEARNER, RLHFless
from simrl.policies.scaling import Plan
from simrl.policies.tail_search import engine_slots
from simrl.traces.oracle import Oracle

RATIOS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)  # candidates for tau; the first of equals: the fewest moves
REPLAYS = 4  # steps that a tau is judged by; one step's stragglers are chance
ALPHAS = (0.3, 0.6, 1.0)
EPSILON = 1e-9  # responses; 0.7 of 10 is reached at the 7th


class RLHFlessAdaptive(RLHFless):
    """`rlhfless` with a normalisation, tau and alpha of its own."""

    class Params(RLHFless.Params):
        """Parameters of `rlhfless-adaptive`: those of `rlhfless`, of which three mean less.

        Attributes:
            lambda_: Weight of step time against GPU-seconds, both relative: 0 cheapest, 1 fastest (`lambda` in files).
            cut_threshold: tau of the first step.
            ewma_alpha: Weight of the newest observation until errors tell the candidates apart; one of them.
        """

    def __init__(self, params: Params | None = None, oracle: Oracle | None = None) -> None:
        super().__init__(params or self.Params(), oracle)
        self.cut_threshold = self.params.cut_threshold  # tau of this step
        self.shares: list[list[Prompt]] = []  # of each actor of the newest step
        self.replays: deque[dict[float, float]] = deque(maxlen=REPLAYS)  # score of each of RATIOS
        alphas = sorted({*ALPHAS, self.params.ewma_alpha})
        self.predictors = {alpha: Predictor(alpha, self.params.default_length) for alpha in alphas}
        self.squared_errors = dict.fromkeys(alphas, 0.0)
        self.steps_seen = 0

    def start_step(self, observation: Observation, prompts: Sequence[Prompt]) -> list[Decision]:
        """Set alpha and tau, then go on as `rlhfless`, and remember who generates what."""
        self.choose_alpha(observation)
        subscriptions = self.choose_ratio(observation)
        decisions = super().start_step(observation, prompts)
        of_response = {prompt.responses[0]: prompt for prompt in prompts}
        assigned = [decision.responses for decision in decisions if isinstance(decision, Assign)]
        self.shares = [[of_response[r] for r in responses if r in of_response] for responses in assigned]
        return [*subscriptions, *decisions]

    # --- rule 1 ---

    def best(self, observation: Observation, plans: Sequence[Plan], reference: Plan, time_weight: float) -> Plan:
        """The plan with the least score; without a finished step as `rlhfless`."""
        if not observation.history:
            return super().best(observation, plans, reference, time_weight)
        scale, correction = self.scale(observation), self.time_correction or 1.0
        return min(plans, key=lambda p: scale.score(correction * p.seconds, correction * p.actor_s, time_weight))

    def scale(self, observation: Observation) -> Scale:
        """What generation is held against: the rest of the newest step."""
        stage_s = observation.history[-1].stage_s
        gpus = observation.engine.tensor_parallel
        return Scale(sum(stage_s.values()) - stage_s["generation"], gpus * len(self.learners), gpus)

    # --- rule 2 ---

    def choose_ratio(self, observation: Observation) -> list[Decision]:
        """Replay the newest step, set tau, and ask to hear of it."""
        if not (self.params.cut_and_migrate and self.shares and observation.history):
            return []
        tail, scale = self.tail(observation), self.scale(observation)
        self.replays.append({ratio: scale.score(*tail.cut_at(ratio), self.params.lambda_) for ratio in RATIOS})
        self.cut_threshold = min(RATIOS, key=lambda ratio: sum(scores[ratio] for scores in self.replays))
        if self.cut_threshold == 1:
            return []
        return [Subscribe(CompletionRatio(self.cut_threshold, name)) for name in self.functions]

    def cut(self, observation: Observation, function: str) -> list[Decision]:
        """As `rlhfless`, if it is this step's tau that was reached."""
        reached = CompletionRatio(self.cut_threshold, function) in observation.events
        return super().cut(observation, function) if reached else []

    def tail(self, observation: Observation) -> Tail:
        """The newest step's lengths on the actors that it had, and what profiling knows of them."""
        estimates, gpus = observation.estimates, observation.engine.tensor_parallel
        step = observation.history[-1]
        tokens_of = dict(zip(step.prompt_ids, step.response_tokens, strict=True))
        shares = [[n for prompt in share for n in tokens_of[prompt.prompt_id]] for share in self.shares]
        prompt_tokens = [prompt.tokens for share in self.shares for prompt in share]
        generated = [tokens for share in shares for tokens in share]
        # Time goes by with tokens: in half of it a response of n tokens has n / 2, and long ones are there for longer.
        context = float(np.mean(prompt_tokens)) + sum(n * n for n in generated) / sum(generated) / 2
        room = max(1, int(estimates.kv_tokens(gpus, LEARNER) / context))

        def iteration_s(batch: int) -> float:
            turns = max(batch / room, 1.0)  # beyond what fits in KV responses take turns
            return turns * estimates.decode_s(min(batch, room), context, gpus)

        paced = cache(iteration_s)
        return Tail(
            actors=tuple(Decoding(0.0, sorted(share), 0, paced) for share in shares if share),
            slots=engine_slots(observation, gpus, LEARNER),
            transfer_s=cache(lambda n: estimates.transfer_s(round(n * context), gpus, same_node=False)),
            moving_s=estimates.park_s(gpus, LEARNER) + estimates.wake_s(gpus, LEARNER),
        )

    # --- rule 3 ---

    def choose_alpha(self, observation: Observation) -> None:
        """Book how far each alpha was off for steps not seen before, and take the best."""
        history, cap = observation.history, observation.job.max_response_tokens
        for seen in range(self.steps_seen, len(history)):
            for alpha, predictor in self.predictors.items():
                self.squared_errors[alpha] += squared_error(predictor, history[seen], cap)
                predictor.observe(history[: seen + 1], cap)
        self.steps_seen = len(history)
        first = self.params.ewma_alpha
        best = min(self.predictors, key=lambda alpha: (self.squared_errors[alpha], abs(alpha - first)))
        self.predictor = self.predictors[best]


@dataclass(frozen=True, slots=True)
class Scale:
    """What generation is held against.

    Attributes:
        rest_s: Seconds of a step outside of generation.
        rest_gpus: GPUs that are held then.
        actor_gpus: Of an actor.
    """

    rest_s: float
    rest_gpus: int
    actor_gpus: int

    def score(self, seconds: float, actor_s: float, time_weight: float) -> float:
        """Ln of step seconds and of GPU-seconds, weighted; less is better."""
        gpu_s = self.rest_s * self.rest_gpus + actor_s * self.actor_gpus
        return time_weight * math.log(self.rest_s + seconds) + (1 - time_weight) * math.log(gpu_s)


@dataclass(frozen=True, slots=True)
class Tail:
    """A step of known lengths, and what its actors take.

    Attributes:
        actors: Each with all of its responses, from the beginning on.
        slots: Responses that an actor decodes at once, at most, after it was handed some.
        transfer_s: Seconds until so many responses have moved.
        moving_s: Seconds that an actor needs to park and to wake.
    """

    actors: tuple[Decoding, ...]
    slots: int
    transfer_s: Callable[[int], float]
    moving_s: float

    def cut_at(self, ratio: float) -> tuple[float, float]:
        """Seconds until the last response, and held by all actors: until parked, or else until the last response.

        As `RLHFless.cut`: an actor at *ratio* hands on what is left, to those with the most free slots, if there are
        enough. Of cuts at the same moment one comes after the other here, where `RLHFless` gathers them on few.
        """
        actors = list(self.actors)
        done_s: dict[int, float] = {}  # of actors that were cut
        asked: set[int] = set()
        events = [(actor.reaches_s(ratio), i) for i, actor in enumerate(actors)]
        heapify(events)
        while events:
            now_s, i = heappop(events)
            if i in asked or now_s != actors[i].reaches_s(ratio):
                continue
            asked.add(i)
            unfinished = {j: actor.unfinished(now_s) for j, actor in enumerate(actors) if j not in done_s}
            left = unfinished.pop(i)
            targets = sorted((j for j, count in unfinished.items() if count), key=unfinished.__getitem__)
            if not left or sum(max(self.slots - unfinished[j], 0) for j in targets) < left:
                continue
            done_s[i], moving = now_s, actors[i].left(now_s)
            for j in targets:
                count = min(self.slots - unfinished[j], len(moving))
                taken, moving = moving[:count], moving[count:]
                actors[j] = actors[j].joined(now_s, taken, self.transfer_s(count))
                heappush(events, (actors[j].reaches_s(ratio), j))
                if not moving:
                    break
        free_s = [done_s.get(i, actor.ends_s[-1]) for i, actor in enumerate(actors)]
        end_s = max(free_s)  # of those who are not cut: who is handed something ends later than who was cut
        return end_s, sum(min(free + self.moving_s, end_s) for free in free_s)


class Decoding:
    """Responses that an actor decodes together, from a moment on.

    Args:
        since_s: The moment, in seconds.
        tokens: Left of each response then, ascending.
        finished: Responses that were finished on the actor before.
        iteration_s: Seconds of an iteration, by batch.
    """

    def __init__(
        self, since_s: float, tokens: Sequence[float], finished: int, iteration_s: Callable[[int], float]
    ) -> None:
        self.since_s, self.tokens, self.finished, self.iteration_s = since_s, tokens, finished, iteration_s
        self.ends_s: list[float] = []
        now_s, made = since_s, 0.0
        for batch, end in zip(range(len(tokens), 0, -1), tokens, strict=True):
            now_s += (end - made) * iteration_s(batch)
            made = end
            self.ends_s.append(now_s)

    def reaches_s(self, ratio: float) -> float:
        """When so large a share of all that it was given is finished."""
        count = math.ceil(ratio * (self.finished + len(self.tokens)) - EPSILON) - self.finished
        return self.ends_s[count - 1] if count > 0 else self.since_s

    def unfinished(self, now_s: float) -> int:
        """Responses that are not finished at a moment."""
        return len(self.ends_s) - bisect_right(self.ends_s, now_s)

    def left(self, now_s: float) -> list[float]:
        """Tokens left of each of them, ascending."""
        first = bisect_right(self.ends_s, now_s)
        before_s, made = (self.ends_s[first - 1], self.tokens[first - 1]) if first else (self.since_s, 0.0)
        made += (now_s - before_s) / self.iteration_s(len(self.tokens) - first)
        return [tokens - made for tokens in self.tokens[first:]]

    def joined(self, now_s: float, others: Sequence[float], late_s: float) -> Decoding:
        """With further responses of so many tokens, which come *late_s* seconds later."""
        own = self.left(now_s)
        late = late_s / self.iteration_s(len(own) + len(others))
        together = sorted([*own, *(tokens + late for tokens in others)])
        return Decoding(now_s, together, self.finished + len(self.tokens) - len(own), self.iteration_s)


def squared_error(predictor: Predictor, step: FinishedStep, cap: int) -> float:
    """Of ln mean tokens of the prompts that have a history, summed."""
    predicted, known = predictor.predictions(step.prompt_ids, cap)
    observed = np.array(step.response_tokens, dtype=float).mean(axis=1)
    return float((np.log(predicted / observed)[known] ** 2).sum())
