"""RLHFless-style elastic scheduling: as few generation actors as pay off, each for prompts of similar length.

Source: RLHFless (arXiv 2602.22718), whose abstract and summaries are what we could read; the authors' code is not
public. Theirs: deduplicated prefill, assignment by EWMA-predicted length, actor scaling by a weighted sum of time and
cost, cut-and-migrate at a completion ratio, placement of heavy actors beside the learner, prewarming. Our
reconstruction: everything that they leave open, namely the numbers' defaults, the expected maximum in T(N), that an
actor without work is parked (not ended, since a cold start takes longer than a step), that otherwise idle learner
functions serve as prefill actors, when parking pays, and what is done about lost functions
(`simrl.policies.recovery`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import ndtr

from simrl.policies.contract import (
    Assign,
    At,
    CompletionRatio,
    Decision,
    FinishedStep,
    FunctionIdle,
    Learn,
    Migrate,
    Observation,
    Park,
    Prepare,
    Prompt,
    Role,
    StageFinished,
    Start,
    StepStarted,
    Subscribe,
    Sync,
    Trigger,
    Wake,
)
from simrl.policies.recovery import (
    Replacements,
    assign_dealt,
    lost_functions,
    lost_responses,
    nodes_that_are_up,
)
from simrl.policies.verl import responses_of, start_everywhere
from simrl.traces.oracle import Oracle

FloatArray = NDArray[np.float64]
LEARNER: tuple[Role, ...] = ("prefill", "decode", "prepare", "learn")
DECODER: tuple[Role, ...] = ("decode",)
GRID_POINTS = 32  # lengths at which T(N) looks at who is still unfinished
CORRECTION_WEIGHT = 0.3  # of the newest step; a step's maximum is noisy
FIRST_SPREAD = 0.6  # sd of ln length before anything was observed; public chat and maths sets lie between 0.2 and 1


class RLHFless:
    """Elastic generation actors on a colocated learner's GPUs, and on others if there are any."""

    class Params(BaseModel):
        """Parameters of `rlhfless`. Defaults are ours where the paper gives none.

        Attributes:
            lambda_: Weight of time against cost in actor scaling: 0 cheapest, 1 fastest (`lambda` in files).
            cut_threshold: Completion ratio tau at which an actor hands on what is left; 1 never does.
            ewma_alpha: Weight of the newest observation in a prompt's predicted length.
            default_length: Predicted tokens of a prompt without history; None: the mean of what was seen so far, and
                a quarter of the cap before that.
            lengths: `ewma`, or `oracle`: true lengths of each prompt's responses, only where a trace is replayed.
            balance: Chunks of equally many prompts, as the paper says, or of equal predicted work.
            learner_gpus: GPUs that learn; None: all of them, as the baseline.
            dedup_prefill: Prefill unique prompts on otherwise idle learner functions.
            group_by_length: Put prompts of similar predicted length on one actor.
            scale_actors: Choose the number of actors; off: all.
            cut_and_migrate: See cut_threshold.
            locality: Heaviest actors beside the learner.
            prewarm: Wake parked functions in time for the predicted end of generation, not at it.
        """

        model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
        lambda_: float = Field(0.5, alias="lambda", ge=0, le=1)
        cut_threshold: float = Field(0.7, gt=0, le=1)
        ewma_alpha: float = Field(1.0, gt=0, le=1)
        default_length: int | None = Field(None, ge=1)
        lengths: Literal["ewma", "oracle"] = "ewma"
        balance: Literal["count", "work"] = "count"
        learner_gpus: int | None = Field(None, ge=1)
        dedup_prefill: bool = True
        group_by_length: bool = True
        scale_actors: bool = True
        cut_and_migrate: bool = True
        locality: bool = True
        prewarm: bool = True

    def __init__(self, params: Params | None = None, oracle: Oracle | None = None) -> None:
        self.params = params or self.Params()
        self.predictor = Predictor(self.params.ewma_alpha, self.params.default_length)
        self.oracle = oracle if self.params.lengths == "oracle" else None
        if self.params.lengths == "oracle" and oracle is None:
            raise ValueError("policy.lengths=oracle needs a trace, whose lengths are known beforehand")
        self.functions: tuple[str, ...] = ()
        self.learners: tuple[str, ...] = ()
        self.pending_starts: dict[str, Start] = {}  # decode-only functions, started when first wanted
        self.actors: list[str] = []  # generating in this step and not cut
        self.parked: set[str] = set()
        self.promised: dict[str, int] = {}  # free slots given away in this call, which observations cannot show
        self.generation_ends_s = 0.0  # predicted
        self.wake_at_s = math.inf
        self.began_s = self.predicted_s = 0.0
        self.time_correction = 1.0  # realised over predicted generation time, smoothed over steps
        self.first_step_over = self.generating = False
        self.replacements = Replacements()

    # --- events ---

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """Answer each event in turn."""
        decisions = self.recover(observation)
        self.promised = {}
        if not self.functions:
            decisions += self.set_up(observation)
        self.look_around(observation)
        for event in observation.events:
            match event:
                case StepStarted(prompts=prompts):
                    decisions += self.start_step(observation, prompts)
                case CompletionRatio(function=str(function)):
                    decisions += self.cut(observation, function)
                case FunctionIdle(function=str(function), after="drained"):
                    decisions += self.park(observation, [function] if function in self.actors else [])
                case At(time_s=time_s) if time_s == self.wake_at_s:
                    decisions += self.wake_learners()
                case StageFinished(stage="generation"):
                    decisions += self.finish_generation(observation)
                case StageFinished(stage="preparation"):
                    decisions += [Learn(self.learners), *self.park_decoders()]
        return decisions

    def recover(self, observation: Observation) -> list[Decision]:
        """Start lost functions anew; others generate what they had: actors, else who is awake, else who is parked."""
        lost, responses = set(lost_functions(observation)), lost_responses(observation)
        self.actors = [name for name in self.actors if name not in lost]
        self.parked -= lost
        decisions = self.replacements.restart(observation)
        if not responses:
            return decisions
        started = [name for name in self.replacements.present() if name not in self.pending_starts]
        able = self.replacements.able(observation, started, responses)
        actors = [function for function in able if function.name in self.actors]
        awake = [function for function in able if function.name not in self.parked]
        targets = actors or awake or able
        rest = [name for name in started if name in observation.functions]
        names = [function.name for function in targets] or list(self.replacements.started) or rest
        self.actors += [name for name in names if name not in self.actors]
        if targets:
            return [*decisions, *self.wake(names), *assign_dealt(responses, targets)]
        # A sync needs all learners awake.
        wakes = [*self.wake_learners(), *self.wake(names)]
        return [*decisions, *wakes, *self.replacements.reassign(observation, names)]

    def look_around(self, observation: Observation) -> None:
        """Which functions there are, or could be started."""
        up = nodes_that_are_up(observation)
        waiting = {name for name, start in self.pending_starts.items() if start.node not in up}
        self.functions = tuple(name for name in self.replacements.present() if name not in waiting)
        self.learners = tuple(name for name in self.functions if "learn" in self.replacements.starts[name].roles)

    def set_up(self, observation: Observation) -> list[Decision]:
        """Start the learner's functions; remember where decode-only ones could be started."""
        if observation.job.max_staleness:
            raise ValueError(
                f"job.max_staleness={observation.job.max_staleness} must be 0: rlhfless plans one step at a time"
            )
        places = start_everywhere(observation, LEARNER)
        if self.params.learner_gpus is not None:
            count = self.params.learner_gpus // observation.engine.tensor_parallel
            if not 1 <= count <= len(places) or self.params.learner_gpus % observation.engine.tensor_parallel:
                raise ValueError(
                    f"policy.learner_gpus={self.params.learner_gpus} must be a multiple of"
                    f" engine.tensor_parallel={observation.engine.tensor_parallel} and at most the cluster's"
                    f" {len(places) * observation.engine.tensor_parallel} GPUs"
                )
            decoders = [Start(s.function, s.gpus, DECODER, s.node) for s in places[count:]]
            self.pending_starts = {start.function: start for start in decoders}
            places = places[:count]
        self.replacements = Replacements([*places, *self.pending_starts.values()])
        triggers: list[Trigger] = [StageFinished("generation"), StageFinished("preparation"), FunctionIdle()]
        if self.params.cut_and_migrate and self.params.cut_threshold < 1:
            triggers += [CompletionRatio(self.params.cut_threshold, name) for name in self.replacements.starts]
        return [*places, *map(Subscribe, triggers)]

    def start_step(self, observation: Observation, prompts: Sequence[Prompt]) -> list[Decision]:
        """Predict, choose the number of actors, assign, and park who is not needed."""
        self.generating = True
        self.predictor.observe(observation.history, observation.job.max_response_tokens)
        forecast = self.forecast(observation, prompts)
        if self.params.group_by_length:
            order = np.argsort(-forecast.sort_key, kind="stable")
            forecast, prompts = forecast.reordered(order), [prompts[i] for i in order]
        plan = self.plan(observation, forecast)
        self.actors = list(self.placement(observation)[: len(plan.bounds) - 1])
        self.began_s, self.predicted_s = observation.time_s, plan.seconds
        self.generation_ends_s = observation.time_s + plan.seconds * self.time_correction
        if not self.first_step_over:
            self.generation_ends_s += observation.estimates.start_s(observation.engine.tensor_parallel, LEARNER)
        spare = [name for name in self.learners if name not in self.actors and name not in self.parked]
        helpers = spare if self.params.dedup_prefill else []
        decisions = self.bring_up([*self.actors, *helpers])
        for index, (name, first, last) in enumerate(zip(self.actors, plan.bounds, plan.bounds[1:], strict=False)):
            if first < last:
                helper = helpers[index % len(helpers)] if helpers else None
                decisions.append(Assign(name, responses_of(prompts[first:last]), prefix_from=helper))
        return [*decisions, *self.park(observation, spare), *self.schedule_wake(observation)]

    def bring_up(self, names: Sequence[str]) -> list[Decision]:
        """Start or wake functions, and give them the newest weights."""
        starts = [self.pending_starts.pop(name) for name in names if name in self.pending_starts]
        return [*starts, *self.wake(names), Sync(tuple(names))]

    def cut(self, observation: Observation, function: str) -> list[Decision]:
        """Hand what is left on an actor to others with free slots, if they have enough; then it is done."""
        left = observation.unfinished(function)
        if function not in self.actors or not left or not self.generating:
            return []
        seen = observation.functions  # without those that start anew at this call
        others = [seen[name] for name in self.actors if name != function and name in seen]
        room = {other.name: other.free_slots - self.promised.get(other.name, 0) for other in others}
        targets = sorted((other.name for other in others if other.num_unfinished), key=room.__getitem__, reverse=True)
        if sum(max(room[name], 0) for name in targets) < len(left) or function in self.promised:
            return []
        moves: list[Decision] = []
        for name in targets:
            taken, left = left[: room[name]], left[room[name] :]
            if taken:
                moves.append(Migrate(taken, name))
                self.promised[name] = self.promised.get(name, 0) + len(taken)
            if not left:
                break
        return [*moves, *self.park(observation, [function])]

    def finish_generation(self, observation: Observation) -> list[Decision]:
        """Everyone who learns prepares."""
        if self.first_step_over and self.generating:  # what is lost after it is only prepared again
            realised = (observation.time_s - self.began_s) / self.predicted_s
            self.time_correction += CORRECTION_WEIGHT * (realised - self.time_correction)
        self.generating = False
        self.first_step_over = True  # it included the cold start
        able = self.replacements.at_work(observation, self.learners)
        return [*self.wake_learners(), Prepare(able, observation.unprepared)]

    # --- parking ---

    def park(self, observation: Observation, names: Sequence[str]) -> list[Decision]:
        """Park actors that have no more to do in this step, where the time until learning is worth it."""
        if not self.generating:
            return []
        self.actors = [name for name in self.actors if name not in names]
        left_s = self.generation_ends_s - observation.time_s
        gpus, estimates = observation.engine.tensor_parallel, observation.estimates
        moving_s = estimates.park_s(gpus, LEARNER) + estimates.wake_s(gpus, LEARNER)
        done = [name for name in names if left_s > moving_s or name not in self.learners]
        self.parked |= set(done)
        return [Park(name) for name in done]

    def park_decoders(self) -> list[Decision]:
        """Decode-only functions have nothing to do while the learner learns."""
        idle = [name for name in self.functions if name not in self.learners and name not in self.pending_starts]
        awake = [name for name in idle if name not in self.parked]
        self.parked |= set(awake)
        return [Park(name) for name in awake]

    def schedule_wake(self, observation: Observation) -> list[Decision]:
        """Ask to be woken when the learners have to be, so that they are there when generation ends."""
        if not self.params.prewarm:
            return []
        wake_s = observation.estimates.wake_s(observation.engine.tensor_parallel, LEARNER)
        self.wake_at_s = self.generation_ends_s - wake_s
        return [Subscribe(At(self.wake_at_s))] if self.wake_at_s > observation.time_s else []

    def wake_learners(self) -> list[Decision]:
        """Wake every parked learner."""
        self.wake_at_s = math.inf
        return self.wake(self.learners)

    def wake(self, names: Sequence[str]) -> list[Decision]:
        """Wake those that are parked."""
        parked = [name for name in names if name in self.parked]
        self.parked -= set(parked)
        return [Wake(name) for name in parked]

    # --- how many actors ---

    def placement(self, observation: Observation) -> Sequence[str]:
        """Functions in the order in which they get work, the heaviest first."""
        if self.params.locality:
            return self.functions  # node after node, the learner's first
        per_node = observation.nodes[0].gpus // observation.engine.tensor_parallel
        return [name for i in range(per_node) for name in self.functions[i::per_node]]

    def forecast(self, observation: Observation, prompts: Sequence[Prompt]) -> Forecast:
        """How many responses of each prompt will still be unfinished at each length."""
        cap = observation.job.max_response_tokens
        ends = cap * np.linspace(0.0, 1.0, GRID_POINTS + 1) ** 2  # finer where most responses end
        lengths, widths = (ends[1:] + ends[:-1]) / 2, np.diff(ends)
        if self.oracle is None:
            return self.predictor.forecast(prompts, lengths, widths, cap)
        epoch = observation.step // (observation.job.dataset_prompts // observation.job.prompts_per_step)
        true = np.array([self.oracle.lengths(epoch, prompt.prompt_id) for prompt in prompts])
        alive = (true[:, :, None] > lengths).sum(axis=1).astype(float)
        return Forecast(true.max(axis=1).astype(float), true.mean(axis=1), alive, lengths, widths)

    def plan(self, observation: Observation, forecast: Forecast) -> Plan:
        """The number of actors with the least weighted sum of T(N) and C(N), both relative to all actors."""
        speed = DecodeSpeed.of(observation, forecast)
        everyone = self.plan_for(len(self.functions), forecast, speed)
        if not self.params.scale_actors:
            return everyone
        weight = self.params.lambda_
        best, best_score = everyone, 1.0
        for actors in candidate_counts(len(self.functions)):
            plan = self.plan_for(actors, forecast, speed)
            score = weight * plan.seconds / everyone.seconds + (1 - weight) * plan.actor_s / everyone.actor_s
            if score < best_score:
                best, best_score = plan, score
        return best

    def plan_for(self, actors: int, forecast: Forecast, speed: DecodeSpeed) -> Plan:
        """Chunks for so many actors, with T(N) and C(N)."""
        bounds = forecast.bounds(actors, self.params.balance)
        seconds, actor_s = speed.seconds(forecast.alive_by_chunk(bounds))
        return Plan(tuple(bounds.tolist()), seconds, actor_s)


@dataclass(frozen=True, slots=True)
class Plan:
    """A number of actors: where their chunks end, when the last one is done, and how long all are busy together."""

    bounds: tuple[int, ...]
    seconds: float
    actor_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted lengths of a step's prompts.

    Attributes:
        sort_key: Tokens by which prompts are ranked, [prompts].
        mean: Predicted mean tokens of a response, [prompts].
        alive: Expected unfinished responses at each length, [prompts, lengths].
        lengths: Mid-points of intervals from 0 to the cap, in tokens.
        widths: Tokens that each interval spans.
    """

    sort_key: FloatArray
    mean: FloatArray
    alive: FloatArray
    lengths: FloatArray
    widths: FloatArray

    def reordered(self, order: NDArray[np.intp]) -> Forecast:
        """The same prompts in another order."""
        return Forecast(self.sort_key[order], self.mean[order], self.alive[order], self.lengths, self.widths)

    def bounds(self, parts: int, balance: Literal["count", "work"]) -> NDArray[np.intp]:
        """Ends of contiguous chunks, [parts + 1], of equally many prompts or of equal predicted tokens."""
        if balance == "count":
            return np.round(np.linspace(0, len(self.mean), parts + 1)).astype(np.intp)
        work = np.concatenate([[0.0], np.cumsum(self.mean)])
        return np.searchsorted(work, np.linspace(0.0, work[-1], parts + 1)).astype(np.intp)

    def alive_by_chunk(self, bounds: NDArray[np.intp]) -> FloatArray:
        """Expected unfinished responses of each chunk, [chunks, lengths]."""
        total = np.concatenate([np.zeros((1, len(self.lengths))), np.cumsum(self.alive, axis=0)])
        by_chunk: FloatArray = np.diff(total[bounds], axis=0)
        return by_chunk


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """Seconds of an iteration by batch and generated length, from the cluster's profile.

    Attributes:
        batches: Knots, ascending.
        seconds_by_batch: Seconds of an iteration, [lengths, batches].
        iterations: Iterations that each length stands for, [lengths].
    """

    batches: FloatArray
    seconds_by_batch: FloatArray
    iterations: FloatArray

    @classmethod
    def of(cls, observation: Observation, forecast: Forecast) -> DecodeSpeed:
        """Profile for the functions of this cluster."""
        estimates = observation.estimates
        gpus = observation.engine.tensor_parallel
        prompt_tokens = np.mean([prompt.tokens for prompt in observation.prompts])
        typical = float(prompt_tokens + np.mean(forecast.mean))
        fits = max(1, int(estimates.kv_tokens(gpus, LEARNER) / typical))
        batches = np.unique(np.minimum(2.0 ** np.arange(0, 10), fits))
        seconds = np.array([
            [estimates.decode_s(int(batch), float(prompt_tokens + length), gpus) for batch in batches]
            for length in forecast.lengths
        ])  # fmt: skip
        # Beyond what fits in KV responses take turns: time grows with their number.
        batches, seconds = np.append(batches, 1e3 * batches[-1]), np.column_stack([seconds, 1e3 * seconds[:, -1]])
        return cls(batches, seconds, forecast.widths)

    def seconds(self, alive: FloatArray) -> tuple[float, float]:
        """Expected generation time, until the last response of all, and the expected busy time of all actors together.

        The chance that any of so many responses is unfinished is taken as 1 - exp(-expected number), for a chunk and
        for all of them: so expected maxima count, not the maximum of expectations. While any is unfinished, the
        largest batch sets the pace.

        Args:
            alive: Expected unfinished responses, [chunks, lengths].
        """
        batch = np.maximum(alive, 1.0)
        columns = [np.interp(batch[:, i], self.batches, row) for i, row in enumerate(self.seconds_by_batch)]
        iteration_s: FloatArray = np.stack(columns, axis=1)
        all_s = iteration_s.max(axis=0) * -np.expm1(-alive.sum(axis=0)) @ self.iterations
        actor_s = (iteration_s * -np.expm1(-alive) @ self.iterations).sum()
        return float(all_s), float(actor_s)


def candidate_counts(most: int) -> list[int]:
    """Numbers of actors to look at: all small ones, then some 15 % apart."""
    counts, count = [], 1
    while count < most:
        counts.append(count)
        count = max(count + 1, math.ceil(count * 1.15))
    return [*counts, most]


@dataclass(slots=True)
class Predictor:
    """Predicted response lengths by prompt: an EWMA over epochs, and how far it was off.

    Attributes:
        alpha: Weight of the newest observation.
        default: Predicted tokens of an unseen prompt; None: the mean so far.
    """

    alpha: float
    default: int | None
    predicted: dict[int | str, float] = field(default_factory=dict)
    _steps_seen: int = 0
    _tokens: float = 0.0
    _responses: int = 0
    _at_cap: int = 0
    _errors: dict[bool, tuple[float, float]] = field(default_factory=dict)  # known prompt -> (sum of squares, count)

    def observe(self, history: Sequence[FinishedStep], cap: int) -> None:
        """Learn from steps not seen before."""
        for step in history[self._steps_seen :]:
            self._observe_step(step, cap)
        self._steps_seen = len(history)

    def _observe_step(self, step: FinishedStep, cap: int) -> None:
        tokens = np.array(step.response_tokens, dtype=float)
        old, known = self.predictions(step.prompt_ids, cap)
        errors, uncut = np.log(tokens / old[:, None]), tokens < cap
        for group in (True, False):
            chosen = errors[uncut & (known == group)[:, None]]
            squares, count = self._errors.get(group, (0.0, 0.0))
            self._errors[group] = (squares + float(chosen @ chosen), count + chosen.size)
        mean = tokens.mean(axis=1)
        new = np.where(known, self.alpha * mean + (1 - self.alpha) * old, mean)
        self.predicted.update(zip(step.prompt_ids, new.tolist(), strict=True))
        self._tokens += float(tokens.sum())
        self._responses += tokens.size
        self._at_cap += int(tokens.size - uncut.sum())

    def predictions(self, prompt_ids: Sequence[int | str], cap: int) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Predicted mean tokens of each prompt, and whether it has a history."""
        unseen = self.unseen(cap)
        found = [self.predicted.get(prompt_id) for prompt_id in prompt_ids]
        return np.array([unseen if mean is None else mean for mean in found]), np.array([m is not None for m in found])

    def unseen(self, cap: int) -> float:
        """Predicted tokens of a prompt without history."""
        if self.default is not None:
            return float(self.default)
        return self._tokens / self._responses if self._responses else cap / 4

    def spread(self, *, known: bool) -> float:
        """Root mean square of ln(observed / predicted), of prompts with or without history."""
        squares, count = self._errors.get(known) or self._errors.get(False) or (FIRST_SPREAD**2, 1.0)
        return max(math.sqrt(squares / count), 0.01) if count else FIRST_SPREAD

    def forecast(self, prompts: Sequence[Prompt], lengths: FloatArray, widths: FloatArray, cap: int) -> Forecast:
        """Lognormal lengths around the prediction, with the observed share that runs to the cap."""
        mean, known = self.predictions([prompt.prompt_id for prompt in prompts], cap)
        spread = np.where(known, self.spread(known=True), self.spread(known=False))
        at_cap = self._at_cap / self._responses if self._responses else 0.0
        z = (np.log(lengths)[None, :] - np.log(mean)[:, None]) / spread[:, None]
        group = np.array([len(prompt.responses) for prompt in prompts])
        alive = group[:, None] * (at_cap + (1 - at_cap) * ndtr(-z))
        return Forecast(mean, mean, alive, lengths, widths)
