"""`rlhfless-adaptive`: each rule by hand, the replay against the simulator, and that the policy keeps the contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clusters import EXACT_STARTS, ROUND, Lengths, make_backend, make_costs, make_job

from simrl.experiments import adaptive_table
from simrl.experiments.check import check_policy
from simrl.experiments.config import load_config
from simrl.experiments.pool import key_of
from simrl.experiments.run import run
from simrl.policies.contract import CompletionRatio, FinishedStep, Migrate, Park, StepStarted, Subscribe
from simrl.policies.prediction import Predictor
from simrl.policies.rlhfless_adaptive import RATIOS, REPLAYS, Decoding, RLHFlessAdaptive, Scale, Tail, squared_error
from simrl.policies.scaling import Plan
from simrl.traces.job import Engine

CAP = 4096
STRAGGLERS: list[Lengths] = [[[n] for i in range(8) for n in (100, 100, 100 + 20 * i, 4000 - i)]] * 4  # one an actor
ALIKE: list[Lengths] = [[[300], [300]] * 8] * 3
PARAMETERS = {**ROUND, **EXACT_STARTS, "start": {**ROUND["start"], **EXACT_STARTS["start"]}}


def finished(step: int, tokens: Sequence[Sequence[int]], **stage_s: float) -> FinishedStep:
    return FinishedStep(step, step, tuple(range(len(tokens))), tuple(map(tuple, tokens)), 0.0, stage_s, 1.0)


# --- rule 1: what T and C are held against ---


def test_the_score_by_hand() -> None:
    score = Scale(rest_s=100.0, rest_gpus=16, actor_gpus=2).score(10.0, 40.0, 0.25)
    assert score == pytest.approx(0.25 * math.log(110) + 0.75 * math.log(1600 + 80))


@pytest.mark.parametrize(("rest_s", "chosen"), [(1.0, 10.0), (100.0, 20.0)])
def test_more_time_is_worth_it_where_generation_is_a_small_part_of_the_step(rest_s: float, chosen: float) -> None:
    """10 s and 100 actor-seconds, or 20 s and 60, with one GPU that learns.

    After 1 s: 11 x 101 < 21 x 61. After 100 s: 110 x 200 > 120 x 160. `rlhfless` compares 1 + 1 with 2 + 0.6 in both.
    """
    plans = [Plan((0, 1), 0, seconds, (0.0, 0.0), actor_s, True) for seconds, actor_s in ((10.0, 100.0), (20.0, 60.0))]
    last = finished(0, [[1]], generation=7.0, preparation=rest_s / 4, learning=rest_s / 2, weight_sync=rest_s / 4)
    seen: Any = SimpleNamespace(history=[last], engine=Engine(tensor_parallel=1))
    policy = RLHFlessAdaptive()
    policy.learners = ("learner",)
    assert policy.scale(seen) == Scale(rest_s, 1, 1)
    assert policy.best(seen, plans, plans[0], 0.5).seconds == chosen
    seen.history = []
    assert policy.best(seen, plans, plans[0], 0.5).seconds == 10.0


# --- rule 2: tau by replay ---


def tail(*lengths: list[float], slots: int = 8, late_s: float = 0.0, slope: float = 0.0) -> Tail:
    """An iteration takes 1 s, and *slope* more for each further response."""

    def iteration_s(batch: int) -> float:
        return 1 + slope * (batch - 1)

    actors = tuple(Decoding(0.0, share, 0, iteration_s) for share in lengths)
    return Tail(actors, slots, lambda count: late_s * count, moving_s=1.0)


def test_decoding_by_hand() -> None:
    """Three responses of 2, 2 and 5 tokens; an iteration of b takes 1 + (b - 1) / 2 seconds."""
    actor = tail([2, 2, 5], slope=0.5).actors[0]
    assert actor.ends_s == [4, 4, 7]  # two iterations of three, then three of one
    assert [actor.reaches_s(ratio) for ratio in (0.3, 0.7, 1.0)] == [4, 7, 7]
    assert (actor.unfinished(3.9), actor.unfinished(4.0), actor.left(2.0)) == (3, 1, [1, 1, 4])
    joined = actor.joined(5.0, [1.0], late_s=3.0)  # own: 2 left; the other: 1, and 2 that pass while it comes
    assert joined.tokens == [2, 3]
    assert joined.ends_s == [5 + 2 * 1.5, 8 + 1]
    assert joined.reaches_s(0.75) == 8  # three of four


def test_a_cut_by_hand() -> None:
    """The first actor hands its 9 tokens on at 1 s, they come 0.5 s later, and it parks; the second has nobody left."""
    two = tail([1, 1, 1, 10], [1, 1, 1, 8], late_s=0.5)
    assert two.cut_at(1.0) == (10, 10 + (8 + 1))
    # The second has then 5 responses: its fourth ends at 8, when one is left and nobody there to take it.
    assert two.cut_at(0.75) == (10.5, (1 + 1) + 10.5)


def test_what_was_handed_on_is_handed_on_again() -> None:
    """At 1 s the first hands 9 tokens to the second; of its five responses four are done at 7, and 3 tokens go on.

    Of the third's five responses four are done at 10; the last one has nobody to go to.
    """
    assert tail([1, 1, 1, 10], [1, 4, 4, 7], [1, 8, 8, 12]).cut_at(0.75) == (12, (1 + 1) + (7 + 1) + 12)


def test_a_cut_needs_slots() -> None:
    full = tail([1, 1, 1, 10], [9, 9, 9, 9], slots=4)
    assert full.cut_at(0.75) == full.cut_at(1.0)
    assert tail([1, 1, 1, 10], [9, 9, 9, 9], slots=5).cut_at(0.75) == (10, 2 + 10)


def test_larger_batches_are_slower() -> None:
    """Alone 9 iterations of 1 s; together with another they take 1.5 s each, until that is done."""
    assert tail([1, 10], [4], slope=0.5).cut_at(0.5)[0] == pytest.approx(1 * 1.5 + 2.5 * 1.5 + 6.5)


class Driven:
    """A run on 8 GPUs, one GPU a function, with the tau of each step and what the replay said of it."""

    def __init__(self, steps: Sequence[Lengths], ratio: float | None = None, **params: Any) -> None:
        job = make_job(steps, max_response_tokens=CAP)
        costs = make_costs(job, parameters=PARAMETERS)
        backend, recorder = make_backend(costs, steps)
        policy = RLHFlessAdaptive(RLHFlessAdaptive.Params(group_by_length=False, scale_actors=False, **params))
        self.ratios: list[float] = []
        self.replayed: list[tuple[float, float]] = []  # with the tau that the step had
        self.moves, self.parks = 0, [0] * len(steps)
        observation = backend.reset()
        while observation is not None:
            started = any(isinstance(event, StepStarted) for event in observation.events)
            if started and observation.history:
                self.replayed.append(policy.tail(observation).cut_at(self.ratios[-1]))
            decisions = list(policy.decide(observation))
            if started and ratio is not None:
                policy.cut_threshold = ratio
                decisions += [Subscribe(CompletionRatio(ratio, name)) for name in policy.functions]
            if started:
                self.ratios.append(policy.cut_threshold)
            self.moves += sum(isinstance(decision, Migrate) for decision in decisions)
            self.parks[observation.step] += sum(isinstance(decision, Park) for decision in decisions)
            observation = backend.advance(decisions)
        frames = recorder.frames()
        held = frames.workers[~frames.workers.state.isin(["parked", "lost"])]
        phases = frames.phases[frames.phases.stage == "generation"].set_index("step")
        self.generation_s = (phases.end_s - phases.start_s).tolist()
        self.held_s = [
            float((np.minimum(held.end_s, end) - np.maximum(held.start_s, start)).clip(lower=0).sum())
            for start, end in zip(phases.start_s, phases.end_s, strict=True)
        ]


@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_the_replay_is_what_the_simulator_does(ratio: float) -> None:
    """The replay leaves out prompts, and counts the waking of who is parked, which comes after generation here."""
    driven = Driven(STRAGGLERS, ratio, prewarm=False)
    assert bool(driven.moves) == (ratio < 1)
    wake_s = ROUND["switch"]["engine_wake_s"]
    for step in (1, 2):
        end_s, held_s = driven.replayed[step]
        assert (driven.parks[step] > 4) == (ratio < 1)
        assert end_s == pytest.approx(driven.generation_s[step], rel=0.01)
        assert held_s == pytest.approx(driven.held_s[step] + wake_s * driven.parks[step], rel=0.02)


def test_stragglers_are_cut_once_they_have_been_seen() -> None:
    chosen, never = Driven(STRAGGLERS, cut_threshold=1.0), Driven(STRAGGLERS, 1.0)
    assert chosen.ratios[0] == 1.0
    assert all(ratio < 1 for ratio in chosen.ratios[1:])
    assert sum(chosen.held_s[1:]) < 0.75 * sum(never.held_s[1:])


def test_nothing_is_cut_where_all_end_together() -> None:
    driven = Driven(ALIKE)
    assert driven.ratios == [0.7, 1.0, 1.0]
    assert driven.moves == 0


def test_tau_is_judged_by_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.9 is better by 10 in one step, worse by 1 in each later one: it holds as long as that step counts."""
    scores = [{0.9: -10.0}, *[{0.9: 1.0}] * 4]
    policy = RLHFlessAdaptive()
    policy.shares, chosen = [[]], []
    monkeypatch.setattr(policy, "tail", lambda observation: SimpleNamespace(cut_at=lambda ratio: (ratio, 0.0)))
    for changed in scores:
        score = SimpleNamespace(score=lambda ratio, _, weight, changed=changed: changed.get(ratio, 0.0))
        monkeypatch.setattr(policy, "scale", lambda observation, score=score: score)
        policy.choose_ratio(SimpleNamespace(history=[None]))  # type: ignore[arg-type]
        chosen.append(policy.cut_threshold)
    assert chosen == [*[0.9] * REPLAYS, RATIOS[0]]


def test_only_this_steps_tau_cuts() -> None:
    policy = RLHFlessAdaptive()
    policy.cut_threshold, policy.generating, policy.actors = 0.9, True, ["a", "b"]
    functions = {n: SimpleNamespace(name=n, free_slots=4, num_unfinished=2) for n in "ab"}
    for ratio, moved in ((0.7, False), (0.9, True)):
        seen: Any = SimpleNamespace(
            events=(CompletionRatio(ratio, "a"),), functions=functions, unfinished=lambda name: (1, 2), time_s=0.0,
            engine=Engine(tensor_parallel=1),
            estimates=SimpleNamespace(park_s=lambda *_: 1.0, wake_s=lambda *_: 1.0),
        )  # fmt: skip
        assert any(isinstance(decision, Migrate) for decision in policy.cut(seen, "a")) == moved


# --- rule 3: alpha by its errors ---


def test_the_error_by_hand() -> None:
    predictor = Predictor(alpha=1.0, default=None)
    predictor.observe([finished(0, [[100, 100]])], CAP)
    step = FinishedStep(1, 1, (0, "new"), ((150, 250), (1, 1)), 0.0, {}, 1.0)
    assert squared_error(predictor, step, CAP) == pytest.approx(math.log(2) ** 2)  # the new one had no history


@pytest.mark.parametrize(("kind", "alpha"), [("noise", 0.3), ("drift", 1.0)])
def test_noise_asks_for_a_long_memory_and_drift_for_a_short_one(kind: str, alpha: float) -> None:
    rng = np.random.default_rng(3)
    level, policy = np.full(50, 6.0), RLHFlessAdaptive()
    history: list[FinishedStep] = []
    for step in range(8):
        level = level + 0.5 * rng.standard_normal(50) if kind == "drift" else level
        noise = 0.5 * rng.standard_normal((50, 2)) if kind == "noise" else np.zeros((50, 2))
        history.append(finished(step, np.exp(level[:, None] + noise).astype(int).tolist()))
        policy.choose_alpha(SimpleNamespace(history=tuple(history), job=make_job(ALIKE)))  # type: ignore[arg-type]
        assert policy.predictor.alpha == (alpha if step >= 2 else 1.0)  # till then all predict alike
    reference = Predictor(alpha, None)
    reference.observe(history, 64)
    assert policy.predictor.predicted == reference.predicted


# --- the table ---


def test_the_best_setting_is_chosen_by_seeds_of_its_own() -> None:
    """1 s and 9 GPU s against 2 s and 4: 3 > sqrt(8), by the choice's seeds; by the comparison's the reverse."""
    assert not set(adaptive_table.SEEDS) & set(adaptive_table.CHOICE_SEEDS)
    configs = [load_config(sets=[f"job.steps={steps}"]) for steps in (3, 4)]
    later = {3: {"step_s": 1.0, "gpu_s_per_step": 9.0}, 4: {"step_s": 2.0, "gpu_s_per_step": 4.0}}
    summaries = {
        key_of(config.with_seed(seed)): {"later_epochs": later[config.job.steps if own else 7 - config.job.steps]}
        for config in configs
        for own, seeds in ((True, adaptive_table.CHOICE_SEEDS), (False, adaptive_table.SEEDS))
        for seed in seeds
    }
    assert adaptive_table.best_of(configs, summaries) is configs[1]
    assert adaptive_table.values_of(configs[1], (0,), summaries)["both"].tolist() == [3.0]


def test_differences_are_percent_of_the_rival() -> None:
    values = {"default": (10.0, 10.0, 10.0), "best": (7.0, 9.0, 11.0), "adaptive": (9.0, 9.0, 9.0)}
    metrics = {name: dict.fromkeys(adaptive_table.METRICS, np.array(value)) for name, value in values.items()}
    row = adaptive_table.Row("gsm8k", {"lambda": 0.5, "cut_threshold": 0.9, "ewma_alpha": 1.0}, metrics)
    page = adaptive_table.page([row])
    assert "| `gsm8k` | 2048 | 0.5, 0.9, 1.0 | 10.0 | 9.0 | 9.0 | 10 | 9 | 9 |" in page
    assert "| `gsm8k` | -10.0 % (-10.0 to -10.0) * |" in page
    # sd 2 of three: 4.303 * 2 / sqrt(3) = 4.969, of 9
    assert "| `gsm8k` | +0.0 % (-55.2 to +55.2) |" in page
    assert "Against default, shown in so many of 1 workloads: step s less 1, more 0" in page
    assert "Against best, shown in so many of 1 workloads: step s less 0, more 0" in page


# --- the contract ---


def test_it_passes_the_conformance_suite() -> None:
    assert len(check_policy("rlhfless-adaptive")) == 4


SMALL = ("job.model=qwen2.5-0.5b", "job.prompts_per_step=16", "job.dataset_prompts=32", "job.max_response_tokens=1024")


def test_a_job_goes_on_when_functions_are_lost_and_runs_are_the_same_twice() -> None:
    config = load_config(policy="rlhfless-adaptive", steps=6, seed=5, sets=[*SMALL, "faults.worker_mtbf_s=600"])
    one, other = run(config), run(config)
    assert one.summary["lost_functions"] > 3
    assert one.summary["steps"] == 6
    assert one.frames.samples.response_id.nunique() == 6 * 16 * 4
    assert one.frames.decisions.equals(other.frames.decisions)
