"""RLHFless-style elastic scheduling: as few generation actors as pay off, each for prompts of similar length.

Source: RLHFless (arXiv 2602.22718), whose abstract and summaries are what we could read; the authors' code is not
public. Theirs: deduplicated prefill, assignment by EWMA-predicted length, actor scaling by a weighted sum of time and
cost, cut-and-migrate at a completion ratio, placement of prefill and heavy actors beside the learner, prewarming. Our
reconstruction: everything that they leave open, namely the numbers' defaults, the distribution behind T(N)
(`simrl.policies.prediction`, `simrl.policies.scaling`), that an actor without work is parked (not ended, since a cold
start takes longer than a step), that learner functions which do not decode are the prefill functions, and are used
where prefilling on the actors is estimated to be worse, when parking pays, and what is done about lost functions
(`simrl.policies.recovery`). Each technique, and where it wins and does not, is in docs/policies.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from simrl.policies.contract import (
    Assign,
    At,
    CompletionRatio,
    Decision,
    FunctionIdle,
    FunctionLost,
    Learn,
    Migrate,
    NodeReclaimed,
    NodeReturned,
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
from simrl.policies.prediction import Forecast, Predictor, exact_forecast
from simrl.policies.recovery import (
    Replacements,
    assign_dealt,
    lost_functions,
    lost_responses,
    nodes_that_are_up,
)
from simrl.policies.scaling import ActorScaling, Plan, best_plan, candidate_counts
from simrl.policies.verl import responses_of, start_everywhere
from simrl.traces.oracle import Oracle

LEARNER: tuple[Role, ...] = ("prefill", "decode", "prepare", "learn")
DECODER: tuple[Role, ...] = ("decode",)
CHANGES = (StepStarted, FunctionLost, NodeReclaimed, NodeReturned)  # after which other functions may be there
CORRECTION_WEIGHT = 0.3  # of the newest step; a step's maximum is noisy


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
            dedup_prefill: Prefill each prompt once, on learner functions that do not decode, where that pays.
            group_by_length: Put prompts of similar predicted length on one actor.
            scale_actors: Choose the number of actors; off: all, less one for prefill where that pays.
            cut_and_migrate: See cut_threshold.
            locality: Heaviest actors beside the learner, others only as far as they hide behind those.
            prewarm: Start and wake functions in time for their next work, as history tells, not when it is there.
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
        self.prefill_order: list[str] = []  # learners, the last one of the first node first
        self.pending_starts: dict[str, Start] = {}  # decode-only functions, started when first wanted
        self.actors: list[str] = []  # generating in this step and not cut
        self.last_actors: tuple[str, ...] = ()  # of the newest step, cut ones too
        self.parked: set[str] = set()
        self.promised: dict[str, int] = {}  # free slots given away in this call, which observations cannot show
        self.generation_ends_s = 0.0  # predicted
        self.wakes: dict[float, tuple[str, ...]] = {}  # when, and who
        self.began_s = self.predicted_s = 0.0
        self.time_correction: float | None = None  # realised over predicted generation time, smoothed over steps
        self.first_step_over = self.generating = False
        self.replacements = Replacements()

    # --- events ---

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """Answer each event in turn."""
        decisions = self.recover(observation)
        self.promised = {}
        if not self.functions:
            decisions += self.set_up(observation)
        if any(isinstance(event, CHANGES) for event in observation.events):
            self.look_around(observation)
        for event in observation.events:
            match event:
                case StepStarted(prompts=prompts):
                    decisions += self.start_step(observation, prompts)
                case CompletionRatio(function=str(function)):
                    decisions += self.cut(observation, function)
                case FunctionIdle(function=str(function), after="drained"):
                    decisions += self.park(observation, [function] if function in self.actors else [])
                case At(time_s=time_s):
                    decisions += self.wake(self.wakes.pop(time_s, ()))
                case StageFinished(stage="generation"):
                    decisions += self.finish_generation(observation)
                case StageFinished(stage="preparation"):
                    decisions += [Learn(self.learners), *self.park_decoders(), *self.prewarm_decoders(observation)]
        return decisions

    def recover(self, observation: Observation) -> list[Decision]:
        """Start lost functions anew; others generate what they had: actors, else who is awake, else who is parked."""
        lost, responses = set(lost_functions(observation)), lost_responses(observation)
        self.actors = [name for name in self.actors if name not in lost]
        self.parked -= lost
        decisions = self.replacements.restart(observation)
        if not responses:
            return decisions
        started = [name for name in self.replacements.present if name not in self.pending_starts]
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
        wakes = self.wake((*self.learners, *names))
        return [*decisions, *wakes, *self.replacements.reassign(observation, names)]

    def look_around(self, observation: Observation) -> None:
        """Which functions there are, or could be started."""
        up = nodes_that_are_up(observation)
        waiting = {name for name, start in self.pending_starts.items() if start.node not in up}
        self.functions = tuple(name for name in self.replacements.present if name not in waiting)
        self.learners = tuple(name for name in self.functions if "learn" in self.replacements.starts[name].roles)
        node_of = {name: self.replacements.starts[name].node for name in self.learners}
        beside = [name for name in self.learners if node_of[name] == node_of[self.learners[0]]]
        self.prefill_order = sorted(self.learners, key=lambda name: name != beside[-1])

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
            if not self.params.prewarm:
                self.pending_starts = {start.function: start for start in decoders}
            places = places[:count]
        else:
            decoders = []
        self.replacements = Replacements([*places, *decoders])
        triggers: list[Trigger] = [StageFinished("generation"), StageFinished("preparation"), FunctionIdle()]
        if self.params.cut_and_migrate and self.params.cut_threshold < 1:
            triggers += [CompletionRatio(self.params.cut_threshold, name) for name in self.replacements.starts]
        starts = [start for name, start in self.replacements.starts.items() if name not in self.pending_starts]
        return [*starts, *map(Subscribe, triggers)]

    def start_step(self, observation: Observation, prompts: Sequence[Prompt]) -> list[Decision]:
        """Predict, choose the number of actors, assign, and park who is not needed."""
        self.generating = True
        self.wakes.clear()
        self.predictor.observe(observation.history, observation.job.max_response_tokens)
        forecast = self.forecast(observation, prompts)
        if self.params.group_by_length:
            order = np.argsort(-forecast.sort_key, kind="stable")
            forecast, prompts = forecast.reordered(order), [prompts[i] for i in order]
        plan = self.plan(observation, forecast)
        self.actors = self.actor_order(observation, dedup=plan.helpers > 0)[: len(plan.bounds) - 1]
        self.last_actors = tuple(self.actors)
        helpers = self.prefill_functions(self.actors)[: plan.helpers]
        self.expect_end(observation, plan)
        decisions = self.bring_up([*self.actors, *helpers])
        for index, (name, first, last) in enumerate(zip(self.actors, plan.bounds, plan.bounds[1:], strict=False)):
            if first < last:
                helper = helpers[index % len(helpers)] if helpers else None
                decisions.append(Assign(name, responses_of(prompts[first:last]), prefix_from=helper))
        spare = [name for name in self.functions if name not in (*self.actors, *self.parked, *self.pending_starts)]
        return [*decisions, *self.park(observation, spare), *self.prewarm_learners(observation)]

    def expect_end(self, observation: Observation, plan: Plan) -> None:
        """Predict when generation is over."""
        self.began_s, self.predicted_s = observation.time_s, plan.seconds
        self.generation_ends_s = observation.time_s + plan.seconds * (self.time_correction or 1.0)
        if not self.first_step_over:
            self.generation_ends_s += observation.estimates.start_s(observation.engine.tensor_parallel, LEARNER)

    def bring_up(self, names: Sequence[str]) -> list[Decision]:
        """Start or wake functions, and give them the newest weights."""
        starts = [self.pending_starts.pop(name) for name in names if name in self.pending_starts]
        return [*starts, *self.wake(names), Sync(tuple(names))]

    def cut(self, observation: Observation, function: str) -> list[Decision]:
        """Hand what is left on an actor to others with free slots, if they have enough; then it is done."""
        left = observation.unfinished(function)
        if function not in self.actors or function in self.promised or not left or not self.generating:
            return []
        seen = observation.functions  # without those that start anew at this call
        others = [seen[name] for name in self.actors if name != function and name in seen]
        room = {other.name: other.free_slots - self.promised.get(other.name, 0) for other in others}
        targets = sorted(
            (other.name for other in others if other.num_unfinished),
            key=lambda name: (name not in self.promised, -room[name]),
        )
        if sum(max(room[name], 0) for name in targets) < len(left):
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
            old = realised if self.time_correction is None else self.time_correction
            self.time_correction = old + CORRECTION_WEIGHT * (realised - old)
        self.generating = False
        self.first_step_over = True  # it included the cold start
        self.wakes.clear()
        able = self.replacements.at_work(observation, self.learners)
        return [*self.wake(self.learners), Prepare(able, observation.unprepared)]

    # --- parking ---

    def park(self, observation: Observation, names: Sequence[str]) -> list[Decision]:
        """Park actors that have no more to do in this step, where the time until learning is worth it."""
        if not self.generating or not names:
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

    def prewarm_learners(self, observation: Observation) -> list[Decision]:
        """Have the learners there when generation is expected to end."""
        return self.wake_before(observation, self.generation_ends_s, LEARNER, self.learners)

    def prewarm_decoders(self, observation: Observation) -> list[Decision]:
        """Have this step's actors there when the next may begin: after the shortest learning so far."""
        decoders = tuple(name for name in self.last_actors if name not in self.learners)
        if not decoders or not observation.history:
            return []
        learning_s = min(step.stage_s["learning"] for step in observation.history)
        return self.wake_before(observation, observation.time_s + learning_s, DECODER, decoders)

    def wake_before(
        self, observation: Observation, needed_s: float, roles: tuple[Role, ...], names: tuple[str, ...]
    ) -> list[Decision]:
        """Ask to be called in time to wake *names* for work at *needed_s*."""
        wake_s = needed_s - observation.estimates.wake_s(observation.engine.tensor_parallel, roles)
        if not self.params.prewarm or wake_s <= observation.time_s:
            return []
        self.wakes[wake_s] = names
        return [Subscribe(At(wake_s))]

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

    def actor_order(self, observation: Observation, *, dedup: bool) -> list[str]:
        """Functions in the order in which they become actors; with *dedup* the first prefill function does not."""
        order = self.placement(observation)
        return [name for name in order if name != self.prefill_order[0]] if dedup else list(order)

    def prefill_functions(self, actors: Sequence[str]) -> list[str]:
        """Learner functions that do not decode."""
        decoding = set(actors)
        return [name for name in self.prefill_order if name not in decoding]

    def forecast(self, observation: Observation, prompts: Sequence[Prompt]) -> Forecast:
        """How many responses of each prompt will still be unfinished at each length."""
        cap = observation.job.max_response_tokens
        if self.oracle is None:
            return self.predictor.forecast(prompts, cap)
        epoch = observation.step // (observation.job.dataset_prompts // observation.job.prompts_per_step)
        true = [self.oracle.lengths(epoch, prompt.prompt_id) for prompt in prompts]
        return exact_forecast(prompts, np.array(true, dtype=float), cap)

    def plan(self, observation: Observation, forecast: Forecast) -> Plan:
        """The number of actors, with or without prefill functions, with the least weighted sum of T(N) and C(N)."""
        scaling = ActorScaling(observation, forecast, LEARNER, self.params.balance)
        estimates, gpus = observation.estimates, observation.engine.tensor_parallel
        nodes = {self.replacements.starts[name].node for name in self.learners}
        local = {name: self.replacements.starts[name].node in nodes for name in self.functions}
        sync_s, start_s = estimates.sync_s(gpus), estimates.start_s(gpus, DECODER)
        move_s = {n: (not local[n]) * sync_s + (n in self.pending_starts) * start_s for n in self.functions}

        order = {dedup: self.actor_order(observation, dedup=dedup) for dedup in (False, True)}

        def plan_for(actors: int, *, dedup: bool) -> Plan:
            names = order[dedup][:actors]
            helpers = min(actors, len(self.prefill_functions(names))) if dedup else 0
            return scaling.plan(np.array([move_s[n] for n in names]), np.array([local[n] for n in names]), helpers)

        most = len(self.functions)
        counts = candidate_counts(most) if self.params.scale_actors else [most]
        plans = [plan_for(actors, dedup=False) for actors in counts]
        if self.params.dedup_prefill and most > 1:
            plans += [plan_for(actors, dedup=True) for actors in sorted({min(n, most - 1) for n in counts})]
        told_apart = np.ptp(forecast.sort_key) > 0  # else no actor is the heavy one
        hide = self.params.locality and self.params.group_by_length and self.params.scale_actors and told_apart
        allowed = [plan for plan in plans if plan.hidden or not hide]
        time_weight = self.params.lambda_ if self.params.scale_actors else 1.0  # fewer actors are not what is asked
        return self.best(observation, allowed or plans, plans[len(counts) - 1], time_weight)

    def best(self, observation: Observation, plans: Sequence[Plan], reference: Plan, time_weight: float) -> Plan:
        """The best of *plans* (see `best_plan`)."""
        return best_plan(plans, reference, time_weight)
