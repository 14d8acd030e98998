"""Each technique of `rlhfless`: that it does what it says, where it wins, and where it must not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from clusters import EXACT_STARTS, ROUND, Lengths, make_backend, make_costs, make_job

import simrl.policies.rlhfless as rlhfless_module
from simrl.policies.contract import (
    Assign,
    CompletionRatio,
    Decision,
    FinishedStep,
    Migrate,
    Observation,
    Prompt,
    Start,
    StepStarted,
)
from simrl.policies.prediction import Forecast, Predictor, exact_forecast, length_grid
from simrl.policies.rlhfless import RLHFless
from simrl.policies.scaling import ActorScaling, Plan, best_plan, candidate_counts
from simrl.traces.job import Engine
from simrl.traces.records import Frames

CAP = 4096
PARAMETERS = {**ROUND, "start": {**ROUND["start"], **EXACT_STARTS["start"]}}


class Seen:
    """A driven policy: every call's observation facts and decisions."""

    def __init__(self, policy: RLHFless) -> None:
        self.policy = policy
        self.calls: list[tuple[Any, dict[str, tuple[int, ...]], list[Decision]]] = []

    def decide(self, observation: Observation) -> Sequence[Decision]:
        unfinished = {name: observation.unfinished(name) for name in observation.functions}
        decisions = list(self.policy.decide(observation))
        self.calls.append((observation.events, unfinished, decisions))
        return decisions


class Ran:
    """What a run of a policy on 8 GPUs a node, one GPU a function, left."""

    def __init__(
        self,
        steps: Sequence[Lengths],
        *,
        nodes: int = 1,
        prompt_tokens: int = 20,
        prefix_caching: bool = True,
        max_num_seqs: int | None = None,
        parameters: dict[str, Any] | None = None,
        **params: Any,
    ) -> None:
        job = make_job(steps, max_response_tokens=CAP, max_prompt_tokens=max(64, prompt_tokens))
        engine = Engine(tensor_parallel=1, prefix_caching=prefix_caching, max_num_seqs=max_num_seqs)
        costs = make_costs(job, nodes=nodes, engine=engine, parameters=parameters or PARAMETERS)
        backend, recorder = make_backend(costs, steps, prompt_tokens)
        self.policy = RLHFless(RLHFless.Params(**params))
        seen, observation = Seen(self.policy), backend.reset()
        while observation is not None:
            observation = backend.advance(seen.decide(observation))
        self.calls = seen.calls
        self.frames: Frames = recorder.frames()
        phases = self.frames.phases.assign(seconds=self.frames.phases.end_s - self.frames.phases.start_s)
        self.stage_s = phases.pivot_table(index="step", columns="stage", values="seconds")
        self.spans = self.frames.phases.set_index(["step", "stage"])

    def decided(self, kind: type) -> list[Any]:
        return [decision for *_, decisions in self.calls for decision in decisions if isinstance(decision, kind)]

    def assigned(self, step: int) -> list[Assign]:
        begins = (decisions for events, _, decisions in self.calls if any(_starts(e, step) for e in events))
        return [decision for decision in next(begins) if isinstance(decision, Assign)]

    def gpu_s(self, *, from_step: int, to_end_of: str) -> float:
        """GPU-seconds held from the start of each step, but not of earlier ones, to the end of a stage."""
        workers, total = self.frames.workers, 0.0
        held = workers[~workers.state.isin(["parked", "lost"])]
        for step in self.stage_s.index[from_step:]:
            first_s, last_s = self.spans.loc[(step, "step"), "start_s"], self.spans.loc[(step, to_end_of), "end_s"]
            inside = np.minimum(held.end_s, last_s) - np.maximum(held.start_s, first_s)
            total += float((held.gpus * inside.clip(lower=0)).sum())
        return total

    def step_s(self, from_step: int = 1) -> float:
        return float(self.stage_s["step"][from_step:].mean())


def _starts(event: object, step: int) -> bool:
    return isinstance(event, StepStarted) and event.step == step


def same(one: Ran, other: Ran) -> bool:
    frames = zip(
        (one.frames.samples, one.frames.phases, one.frames.workers),
        (other.frames.samples, other.frames.phases, other.frames.workers),
        strict=True,
    )
    return all(a.equals(b) for a, b in frames)


def rows(*lengths: int, samples: int = 2) -> list[list[int]]:
    return [[length] * samples for length in lengths]


# --- deduplicated prefill ---

LONG_PROMPTS: list[Lengths] = [rows(*[40] * 64, samples=8)] * 3  # 64 prompts of 2001 tokens, 8 responses each
PROMPT = 2001
BLOCK = 16


@pytest.fixture(scope="module")
def dedup() -> dict[tuple[bool, bool], Ran]:
    options: dict[str, Any] = {"prompt_tokens": PROMPT, "cut_and_migrate": False}
    return {
        (caching, on): Ran(LONG_PROMPTS, prefix_caching=caching, dedup_prefill=on, **options)
        for caching, on in itertools.product((False, True), (False, True))
    }


def test_each_unique_prefix_is_computed_once(dedup: dict[tuple[bool, bool], Ran]) -> None:
    # Whole blocks are sent: 2000 of 2001 tokens; each response computes the last one for its logits.
    assert (PROMPT - 1) % BLOCK == 0
    on, off = (dedup[False, switch].frames.samples.groupby("step").prefill_tokens.sum() for switch in (True, False))
    assert on.tolist() == [64 * (PROMPT + 8 * 1)] * 3
    assert off.tolist() == [64 * 8 * PROMPT] * 3
    for step in range(3):
        assigned = dedup[False, True].assigned(step)
        assert all(decision.prefix_from for decision in assigned)
        named = [response for decision in assigned for response in decision.responses]
        assert sorted(named) == list(range(step * 512, step * 512 + 512))
        prompts = [r // 8 for decision in assigned for r in {r - r % 8 for r in decision.responses}]
        assert len(prompts) == len(set(prompts)) == 64  # groups whole: no prompt is prefilled for two actors


def test_dedup_wins_without_local_prefix_caching(dedup: dict[tuple[bool, bool], Ran]) -> None:
    on, off = dedup[False, True], dedup[False, False]
    assert on.step_s() < off.step_s()
    assert on.gpu_s(from_step=1, to_end_of="generation") < off.gpu_s(from_step=1, to_end_of="generation")


def test_dedup_is_left_alone_where_engines_cache_prefixes(dedup: dict[tuple[bool, bool], Ran]) -> None:
    assert not any(decision.prefix_from for decision in dedup[True, True].decided(Assign))
    assert same(dedup[True, True], dedup[True, False])


def test_prefill_functions_are_on_the_learners_node_and_do_not_decode() -> None:
    ran = Ran(LONG_PROMPTS, nodes=2, learner_gpus=8, prompt_tokens=PROMPT, prefix_caching=False, **{"lambda": 0})
    starts = {start.function: start for start in ran.decided(Start)}
    for step in range(3):
        assigned = ran.assigned(step)
        helpers, actors = {d.prefix_from for d in assigned}, {d.function for d in assigned}
        assert helpers
        assert not helpers & actors
        assert all("learn" in starts[str(name)].roles and starts[str(name)].node == 0 for name in helpers)


# --- grouping by predicted length ---

TWO_KINDS: list[Lengths] = [rows(*[4000, 100] * 8)] * 4


def test_equal_predictions_share_an_actor_and_groups_are_whole() -> None:
    ran = Ran(TWO_KINDS, scale_actors=False)
    for step in (1, 2, 3):
        assigned = ran.assigned(step)
        kinds = [{(r % 32) // 2 % 2 for r in decision.responses} for decision in assigned]
        assert kinds == [{0}] * 4 + [{1}] * 4  # even prompts are the long ones
        assert all(len(decision.responses) == 4 for decision in assigned)
        groups = [{r // 2 for r in decision.responses} for decision in assigned]
        assert not any(a & b for a, b in itertools.combinations(groups, 2))


def test_chunks_of_equal_count_or_equal_work() -> None:
    mean = np.array([600.0, 300.0, 200.0, 100.0])  # of 1200
    prompts = tuple(Prompt(i, 20, (i,)) for i in range(4))
    forecast = exact_forecast(prompts, mean[:, None], CAP)
    observation = first_observation([[[int(n)] for n in mean]])
    bounds = {b: ActorScaling(observation, forecast, ("decode",), b).bounds(2).tolist() for b in ("count", "work")}
    assert bounds == {"count": [0, 2, 4], "work": [0, 1, 4]}


def test_grouping_wins_with_two_kinds_of_prompts() -> None:
    on, off = (Ran(TWO_KINDS, scale_actors=False, cut_and_migrate=False, group_by_length=g) for g in (True, False))
    # Four of eight actors are done after 100 of 4000 tokens, and park: half of the rest is saved, less their parking.
    saved = 1 - on.gpu_s(from_step=1, to_end_of="generation") / off.gpu_s(from_step=1, to_end_of="generation")
    assert 0.2 < saved < 0.5


def test_grouping_does_nothing_where_all_are_alike() -> None:
    alike: list[Lengths] = [rows(*[500] * 16)] * 3
    assert same(*(Ran(alike, scale_actors=False, group_by_length=group) for group in (True, False)))


# --- actor scaling ---

MIXED: list[Lengths] = [rows(*np.linspace(200, 1600, 64).astype(int).tolist(), samples=8)] * 3


def first_observation(steps: Sequence[Lengths]) -> Observation:
    job = make_job(steps, max_response_tokens=CAP)
    backend, _ = make_backend(make_costs(job, parameters=PARAMETERS), steps)
    return backend.reset()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_number_of_actors_is_the_best_of_all(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brute force: the simulator runs every number of actors, and knows nothing of T(N) and C(N)."""
    options: dict[str, Any] = {"lambda": weight, "dedup_prefill": False, "cut_and_migrate": False}
    chosen = Ran(MIXED, **options)

    def figure(ran: Ran) -> float:
        if weight:
            return float(ran.stage_s["generation"][2])
        workers = ran.frames.workers
        mine = workers[(workers.state == "busy") & (workers.stage == "generation")]
        mine = mine[mine.start_s >= ran.spans.loc[(2, "step"), "start_s"]]
        return float((mine.gpus * (mine.end_s - mine.start_s)).sum())

    def forced(count: int) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(rlhfless_module, "candidate_counts", lambda most: [count, most])
            patch.setattr(rlhfless_module, "best_plan", lambda plans, *_: plans[0])
            return figure(Ran(MIXED, **options))

    figures = [forced(count) for count in range(1, 9)]
    assert max(figures) > 1.2 * min(figures), "any number would do"
    assert figure(chosen) <= 1.01 * min(figures)
    assert len(chosen.assigned(2)) == 1 + int(np.argmin(figures))


def test_the_weight_decides_between_plans() -> None:
    plans = [Plan((0, 1), 0, seconds, (seconds, seconds), cost, True) for seconds, cost in [(9, 1), (4, 2), (3, 9)]]
    # 0.5 * 4 / 3 + 0.5 * 2 / 9 = 0.78, against 1.56 and 1 for the others
    assert [best_plan(plans, plans[-1], weight).seconds for weight in (0.0, 0.5, 1.0)] == [9, 4, 3]
    assert candidate_counts(8) == list(range(1, 9))
    assert candidate_counts(1000)[-1] == 1000


def test_actors_elsewhere_have_to_hide_behind_the_heavy_one() -> None:
    """With lambda = 1 more actors are always faster, as long as what they need gets there in time."""
    steps: list[Lengths] = [rows(*[1600] * 8, *[300] * 24)] * 2
    options: dict[str, Any] = {"nodes": 2, "learner_gpus": 8, "lambda": 1}
    slow_node = {"g6e.48xlarge": {**ROUND["node"]["g6e.48xlarge"], "nic_bytes_per_s": 1e7}}  # 1 GB takes 100 s and more
    fast, slow = (Ran(steps, parameters={**PARAMETERS, "node": node}, **options) for node in (ROUND["node"], slow_node))
    assert len(fast.assigned(1)) > 8
    assert len(slow.assigned(1)) <= 8
    nodes = {start.function: start.node for start in slow.decided(Start)}
    assert {nodes[decision.function] for decision in slow.assigned(1)} == {0}
    everyone = Ran(steps, parameters={**PARAMETERS, "node": slow_node}, scale_actors=False, **options)
    assert len(everyone.assigned(1)) == 16  # nobody asks what it takes


def test_a_plan_is_hidden_if_the_others_end_before_the_heavy_one() -> None:
    """Two actors of one prompt each, 1600 and 300 tokens: the light one may come late by less than the difference."""
    observation = first_observation([[[1600], [300]]])
    forecast = exact_forecast(observation.prompts, np.array([[1600.0], [300.0]]), CAP)
    scaling = ActorScaling(observation, forecast, ("decode",), "count")
    iteration_s = observation.estimates.decode_s(1, 1000, 1)
    slack_s = (1600 - 300) * iteration_s
    local = np.array([True, False])
    hidden = [scaling.plan(np.array([0.0, share * slack_s]), local).hidden for share in (0.0, 0.8, 1.2)]
    assert hidden == [True, True, False]
    plan = scaling.plan(np.zeros(2), local)
    assert plan.seconds == pytest.approx(1600 * iteration_s, rel=0.06)
    assert plan.actor_s == pytest.approx(1900 * iteration_s, rel=0.06)
    assert plan.interval_s[0] <= plan.seconds <= plan.interval_s[1]


def test_scaling_wins_with_little_work_and_not_with_much() -> None:
    little: list[Lengths] = [rows(*[4000] * 8, samples=1)] * 3
    on, off = (Ran(little, scale_actors=scale, **{"lambda": 0}) for scale in (True, False))
    # A decode iteration of 8 hardly takes longer than one of 1: one actor for eight.
    assert (len(on.assigned(1)), len(off.assigned(1))) == (1, 8)
    # 8 x 9 s, against 9 s and the parking of seven; syncs and wakes are in both.
    assert on.gpu_s(from_step=1, to_end_of="generation") < 0.6 * off.gpu_s(from_step=1, to_end_of="generation")
    much: list[Lengths] = [rows(*[100] * 512, samples=8)] * 2
    assert same(*(Ran(much, scale_actors=scale, **{"lambda": 1}) for scale in (True, False)))


# --- the forecast ---


def history_of(
    rng: np.random.Generator, medians: np.ndarray, sigma: float, epoch: int, samples: int = 4
) -> FinishedStep:
    tokens = np.maximum(np.exp(np.log(medians)[:, None] + sigma * rng.standard_normal((len(medians), samples))), 1)
    told = tuple(map(tuple, np.minimum(tokens, CAP).astype(int).tolist()))
    return FinishedStep(epoch, epoch, tuple(range(len(medians))), told, 0.0, {}, 1.0)


@pytest.mark.parametrize(("sigma", "prompts", "alpha"), [(0.25, 64, 0.5), (0.5, 64, 1.0)])
def test_the_longest_response_lies_in_its_interval_as_often_as_stated(sigma: float, prompts: int, alpha: float) -> None:
    rng = np.random.default_rng(11)
    medians = np.exp(5.3 + 0.4 * rng.standard_normal(prompts))
    asked = tuple(Prompt(i, 20, tuple(range(4 * i, 4 * i + 4))) for i in range(prompts))
    predictor, history = Predictor(alpha=alpha, default=None), [history_of(rng, medians, sigma, 0)]
    inside = 0
    for epoch in range(1, 401):
        predictor.observe(history, CAP)
        low, high = predictor.forecast(asked, CAP).longest()
        history.append(history_of(rng, medians, sigma, epoch))
        inside += low <= max(map(max, history[-1].response_tokens)) <= high
    # 0.9, 3 standard deviations of 400 draws, and 1 % for the grid and for errors that a group shares
    assert inside / 400 == pytest.approx(0.9, abs=0.055)


def test_the_expected_maximum_is_not_the_maximum_of_means() -> None:
    """100 lognormal responses around 200 tokens with sd 0.5: the expected longest is 669 tokens (numeric integral)."""
    forecast = normal_forecast(200.0, 0.5, 100)
    done = np.exp(forecast.log_done.sum(axis=0))
    x = np.linspace(1, CAP, 200_000)
    from scipy.stats import norm

    exact = np.trapezoid(1 - norm.cdf((np.log(x) - np.log(200)) / 0.5) ** 100, x) + 1
    assert np.trapezoid(1 - done, forecast.lengths) == pytest.approx(exact, rel=0.03)
    assert exact > 3 * 200


def normal_forecast(mean: float, sd: float, prompts: int) -> Forecast:
    predictor = Predictor(alpha=1.0, default=None)
    predictor.predicted = dict.fromkeys(range(prompts), mean)
    x = np.log(mean)
    predictor.with_history.count, predictor.with_history.sums = 2, 2 * np.array([x, x, x * x, x * x, x * x + sd**2])
    return predictor.forecast(tuple(Prompt(i, 20, (i,)) for i in range(prompts)), CAP)


def test_known_lengths_are_forecast_exactly() -> None:
    tokens = np.array([[100.0, 50.0], [CAP, 10.0]])
    forecast = exact_forecast(tuple(Prompt(i, 20, (2 * i, 2 * i + 1)) for i in range(2)), tokens, CAP)
    grid = length_grid(CAP)
    assert forecast.alive[0].tolist() == [sum(own > n for own in (100, 50)) for n in grid.tolist()]
    assert forecast.longest()[0] > grid[-2]  # of 4096


def test_ewma_by_hand_and_first_epoch_default() -> None:
    predictor = Predictor(alpha=0.25, default=128)
    assert predictor.predictions(["a"], CAP)[0].tolist() == [128.0]
    predictor.observe([FinishedStep(0, 0, ("a",), ((100, 300),), 0.0, {}, 1.0)], CAP)
    assert predictor.predictions(["a", "b"], CAP)[0].tolist() == [200.0, 128.0]  # the first one is taken whole
    predictor.observe([FinishedStep(s, s, ("a",), ((400, 400),), 0.0, {}, 1.0) for s in (0, 1)], CAP)
    assert predictor.predictions(["a"], CAP)[0].tolist() == [0.25 * 400 + 0.75 * 200]
    assert Predictor(alpha=1.0, default=None).predictions(["a"], CAP)[0].tolist() == [CAP / 4]


# --- cut and migrate ---

STRAGGLERS: list[Lengths] = [rows(*([100, 100, 100, 4000] * 8), samples=1)] * 3


def test_one_cut_moves_exactly_the_unfinished() -> None:
    ran = Ran(STRAGGLERS, scale_actors=False, group_by_length=False, cut_threshold=0.5)
    cuts = 0
    for events, unfinished, decisions in ran.calls:
        moved = {r for d in decisions if isinstance(d, Migrate) for r in d.responses}
        told = [str(e.function) for e in events if isinstance(e, CompletionRatio)]
        cut = [name for name in told if set(unfinished[name]) & moved]
        assert moved == {r for name in cut for r in unfinished[name]}
        cuts += len(cut)
    assert cuts >= 3
    assert ran.frames.samples.response_id.is_unique
    assert ran.frames.samples.response_tokens.tolist() == [n for step in STRAGGLERS for row in step for n in row]


def test_a_cut_fills_one_target_after_the_other() -> None:
    """Eight slots an actor: four are left on the first, five on each of the others."""
    first, other = [200] * 4 + [4000] * 4, [100] * 3 + [3900] * 5
    steps: list[Lengths] = [rows(*first, *other * 7, samples=1)]
    ran = Ran(steps, max_num_seqs=8, scale_actors=False, group_by_length=False, cut_threshold=0.5)
    moves = [(decision.responses, decision.target) for decision in ran.decided(Migrate)]
    assert [responses for responses, _ in moves[:2]] == [(4, 5, 6), (7,)]  # later ones: the others reach it too
    assert len({target for _, target in moves[:2]} - {"worker-0-0"}) == 2


def test_cutting_wins_with_stragglers_on_every_actor() -> None:
    options: dict[str, Any] = {"scale_actors": False, "group_by_length": False}
    on, off = (Ran(STRAGGLERS, cut_and_migrate=cut, **options) for cut in (True, False))
    saved = 1 - on.gpu_s(from_step=1, to_end_of="generation") / off.gpu_s(from_step=1, to_end_of="generation")
    assert saved > 0.25  # seven of eight actors are free after a twelfth of the time, less parking
    assert on.step_s() < 1.1 * off.step_s()


def test_nothing_is_cut_at_a_threshold_of_one_or_without_stragglers() -> None:
    options: dict[str, Any] = {"scale_actors": False, "group_by_length": False}
    assert not Ran(STRAGGLERS, cut_threshold=1, **options).decided(Migrate)
    alike: list[Lengths] = [rows(*[300] * 16)] * 2
    assert same(*(Ran(alike, cut_and_migrate=cut, **options) for cut in (True, False)))


# --- locality ---


def test_locality_wins_with_heavy_and_light_actors() -> None:
    steps: list[Lengths] = [rows(*[2000, 1800, 1600, 1400] * 16, samples=8)] * 3
    options: dict[str, Any] = {"nodes": 2, "learner_gpus": 8, "cut_and_migrate": False, "lambda": 1}
    on, off = (Ran(steps, locality=local, **options) for local in (True, False))
    nodes = {start.function: start.node for start in on.decided(Start)}
    for ran, expected in ((on, [0] * 8 + [1] * 8), (off, [0, 1] * 8)):
        used = [nodes[decision.function] for decision in ran.assigned(2)]
        assert used == expected[: len(used)]
        assert len(used) > 8
    assert on.step_s() < off.step_s()


def test_locality_does_nothing_on_one_node() -> None:
    assert same(*(Ran(TWO_KINDS, locality=local) for local in (True, False)))


# --- prewarming ---


SLOW_WAKE = {**PARAMETERS, "switch": {**ROUND["switch"], "engine_wake_s": 5.0}}


def test_prewarming_hides_the_wake_where_history_is_steady() -> None:
    steady = [*TWO_KINDS, *TWO_KINDS[:2]]
    on, off = (Ran(steady, scale_actors=False, prewarm=warm, parameters=SLOW_WAKE) for warm in (True, False))
    for step in (3, 4, 5):
        assert parked_in(on, step) == parked_in(off, step) == 4
        late_s = [ran.stage_s["step"][step] - ran.stage_s["generation"][step] for ran in (on, off)]
        # Those who generated change their role in the engine's sleep of 1.5 s; the others need 5 s and more to wake.
        assert late_s[1] - late_s[0] == pytest.approx(5.0 - 1.5, abs=0.2)


def test_prewarming_does_not_pay_where_waking_is_shorter_than_a_change_of_role() -> None:
    on, off = (Ran(TWO_KINDS, scale_actors=False, prewarm=warm) for warm in (True, False))  # 0.5 s against 1.5 s
    assert on.step_s(2) == pytest.approx(off.step_s(2), rel=1e-3)
    assert on.gpu_s(from_step=2, to_end_of="learning") >= off.gpu_s(from_step=2, to_end_of="learning")


def parked_in(ran: Ran, step: int) -> int:
    first_s, last_s = ran.spans.loc[(step, "generation"), ["start_s", "end_s"]]
    workers: pd.DataFrame = ran.frames.workers.query("state == 'parked'")
    return int(((workers.start_s < last_s) & (workers.end_s > first_s)).sum())


def test_prewarming_does_nothing_where_nobody_parks() -> None:
    alike: list[Lengths] = [rows(*[200] * 16)] * 3
    on, off = (Ran(alike, scale_actors=False, prewarm=warm) for warm in (True, False))
    assert not (on.frames.workers.state == "parked").any()
    assert same(on, off)


def test_functions_beyond_the_learners_start_with_them_or_when_wanted() -> None:
    on, off = (Ran(TWO_KINDS, nodes=2, learner_gpus=8, scale_actors=False, prewarm=warm) for warm in (True, False))
    assert len([d for d in on.calls[0][2] if isinstance(d, Start)]) == 16
    held = {ran: ran.frames.workers.query("state == 'parked'").gpu_ids for ran in (on, off)}
    assert all((ids == "").all() for ids in held.values())
