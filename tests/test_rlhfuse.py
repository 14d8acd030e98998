"""`rlhfuse` by hand arithmetic: who keeps the tail, when it begins, and where fusion pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from clusters import EXACT_STARTS, ROUND, make_backend, make_costs, make_job

from simrl.experiments.check import check_policy
from simrl.experiments.config import load_config
from simrl.experiments.run import run
from simrl.policies.contract import Decision, Migrate, Observation, Policy, Prepare, UnfinishedBelow
from simrl.policies.rlhfuse import RLHFuse
from simrl.policies.tail_search import Tail, best_tail, destinations, engine_slots, play
from simrl.policies.verl import COLOCATED, Verl
from simrl.traces.job import Engine, Job
from simrl.traces.records import Frames

EXACT = {**ROUND, "start": {**ROUND["start"], **EXACT_STARTS["start"]}}
ENGINE = Engine(tensor_parallel=1, max_num_seqs=4)  # an engine takes four responses: latency is flat far beyond
WIDE = Engine(tensor_parallel=1, max_num_seqs=16)
Work = Sequence[Sequence[Sequence[int]]]


def drive(
    policy: Policy,
    work: Work,
    parameters: Mapping[str, Any] = EXACT,
    engine: Engine = ENGINE,
    prompt_tokens: int = 20,
    **job: Any,
) -> tuple[list[Any], Frames]:
    """What *policy* saw and decided on eight engines of one GPU, call by call, and the frames."""
    costs = make_costs(make_job(work, **job), engine=engine, parameters=parameters)
    backend, recorder = make_backend(costs, work, prompt_tokens)
    observation: Observation | None = backend.reset()
    calls: list[tuple[Any, Sequence[Decision]]] = []
    while observation is not None:
        events, decisions = observation.events, policy.decide(observation)
        calls.append((events, decisions))
        observation = backend.advance(decisions)
    return calls, recorder.frames()


def step_s(frames: Frames, step: int) -> float:
    row = frames.phases.query("stage == 'step' and step == @step").iloc[0]
    return float(row.end_s - row.start_s)


def with_long(counts: Sequence[int], long: int = 64, short: int = 8) -> list[list[int]]:
    """A prompt an engine, so many of its four responses long."""
    return [[long] * count + [short] * (4 - count) for count in counts]


# --- the tail's engines ---


def test_the_fewest_engines_with_room_keep_the_tail_those_with_most_to_do() -> None:
    work = [with_long([1, 3, 1, 2, 2, 0, 0, 0])]
    calls, _ = drive(RLHFuse(RLHFuse.Params(tail_ratio=10 / 32)), work)
    [fused] = [decisions for events, decisions in calls if any(isinstance(e, UnfinishedBelow) for e in events)]
    # 9 are left, 4 an engine: three engines. 1 has three of them, 3 and 4 have two; 0 and 2 send one each.
    moves = [decision for decision in fused if isinstance(decision, Migrate)]
    assert moves == [Migrate((0,), "worker-0-3"), Migrate((8,), "worker-0-4")]
    preparing = [name for decision in fused if isinstance(decision, Prepare) for name in decision.functions]
    assert preparing == [f"worker-0-{i}" for i in (0, 2, 5, 6, 7)]


@pytest.mark.parametrize(("remaining", "slots", "engines"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (9, 4, 3), (0, 4, 1)])
def test_destinations(remaining: int, slots: int, engines: int) -> None:
    assert destinations(remaining, slots) == engines


@pytest.mark.parametrize(("flat", "kv_tokens", "slots"), [(8, 1000, 7), (5, 1000, 5), (5, 100, 1)])
def test_slots_are_what_decodes_flat_and_fits_as_kv_at_full_length(flat: int, kv_tokens: int, slots: int) -> None:
    estimates = SimpleNamespace(flat_batch=lambda gpus: flat, kv_tokens=lambda gpus, roles: kv_tokens)
    seen = SimpleNamespace(job=Job(max_prompt_tokens=100, max_response_tokens=28), estimates=estimates)
    assert engine_slots(cast("Observation", seen), 1, COLOCATED) == slots  # 128 tokens each


# --- R_t ---


def test_a_play_by_hand() -> None:
    # An iteration takes as long as its batch. 2 iterations of 2: 4 s, the first ends and the third comes in; 3 of 2
    # until the second ends: 10 s; 1 of 1: 11 s.
    played = play([2, 5, 4], [0.0] * 3, 2, lambda batch, context: float(batch))
    assert played.finished_s.tolist() == [4.0, 10.0, 11.0]
    assert played.left(4.0) == [(3, 2), (4, 0)]
    assert played.left(10.0) == [(1, 3)]


def test_the_mean_context_grows_with_the_iterations() -> None:
    seen: list[float] = []
    play([128, 256], [64.0, 192.0], 2, lambda batch, context: seen.append(context) or 1.0)  # type: ignore[func-returns-value]
    # Both: (64 + 192) / 2 and half of 128 iterations; the second alone: 192 + 192 of its own, to the nearest 64.
    assert seen == [192.0, 384.0]


def tail(*lengths: tuple[int, ...], transfer_s: float = 0.0) -> Tail:
    """Iterations take a second, preparation one a token, prompts nothing."""
    return Tail(lengths, 0.0, 4, 4, lambda batch, context: 1.0, lambda tokens: tokens, lambda tokens: transfer_s)


def test_when_all_is_prepared_by_hand() -> None:
    one_long = tail((1, 1, 1, 9), (1, 1, 1, 1))
    # Apart: 9 s, then half of 16 tokens each. Fused: from 1 s on the second engine prepares, 2 s each, 4 of the
    # responses until 9 s; the other 4 of 2 tokens on both.
    assert one_long.prepared_s(0) == 17
    assert one_long.prepared_s(2) == 13
    # Fewer than two are left from 4 s on, in which nothing is prepared until 5 s; fewer than three from 2 s on.
    steady = tail((1, 2, 4, 5), (1, 1, 1, 1))
    assert [steady.prepared_s(count) for count in (0, 2, 3)] == [5 + 8, 5 + 8, 5 + 7]
    assert tail((4, 4), (4, 4)).prepared_s(1) == tail((4, 4), (4, 4)).prepared_s(0) == 4 + 8
    # Where the one of two that are left has to move, for 30 s, that is what it costs.
    two_long = tail((1, 1, 1, 9), (1, 1, 1, 9), transfer_s=30.0)
    assert two_long.prepared_s(0) == 9 + 12
    assert two_long.prepared_s(3) == 1 + 30 + 8 + 0  # the second engine is done with all long before


def last_step_s(policy: Policy, work: Work, *cluster: Any, **options: Any) -> float:
    return step_s(drive(policy, work, *cluster, **options)[1], len(work) - 1)


# A response of 1032 tokens is prepared in some 0.6 s, by 0.8 % of 400 TFLOP/s: 63 of them take seven engines as long as
# 2000 tokens take to decode.
SLOW_PREPARATION = {**EXACT, "gpu": {"l40s": {**ROUND["gpu"]["l40s"], "forward_mfu": 0.008}}}
ONE_LONG: dict[str, Any] = {
    "work": [[[2000] + [8] * 7] + [[8] * 8] * 7] * 3,
    "parameters": SLOW_PREPARATION, "engine": WIDE, "prompt_tokens": 1024,
    "max_prompt_tokens": 1024, "max_response_tokens": 2048,
}  # fmt: skip
SLOW_NETWORK = {**EXACT, "network": {**ROUND["network"], "latency_s": 30.0}}


@pytest.mark.parametrize("ratio", [0.2, None])
def test_fusion_wins_where_one_engine_has_a_long_tail_and_preparation_takes_long(ratio: float | None) -> None:
    fused = last_step_s(RLHFuse(RLHFuse.Params(tail_ratio=ratio)), **ONE_LONG)
    assert fused < 0.9 * last_step_s(Verl(), **ONE_LONG)


def test_fusion_does_not_win_where_there_is_no_tail() -> None:
    work = [with_long([4] * 8)] * 3
    assert last_step_s(RLHFuse(), work) == last_step_s(Verl(), work)


def test_fusion_loses_where_moving_takes_longer_and_the_search_leaves_it() -> None:
    two_long = [[[64] + [8] * 7] * 2 + [[8] * 8] * 6] * 3
    apart = last_step_s(Verl(), two_long, SLOW_NETWORK, WIDE)
    assert last_step_s(RLHFuse(RLHFuse.Params(tail_ratio=0.2)), two_long, SLOW_NETWORK, WIDE) > apart + 25
    calls, frames = drive(RLHFuse(), two_long, SLOW_NETWORK, WIDE)
    assert step_s(frames, 2) == pytest.approx(apart, rel=1e-9)
    moves = [d for _, decisions in calls for d in decisions if isinstance(d, Migrate)]
    assert moves == [Migrate((8,), "worker-0-0")]  # in the first step only, before any lengths were seen


def test_the_search_takes_the_best_of_what_it_tries() -> None:
    class Spy(RLHFuse):
        tails: list[int]

        def decide(self, observation: Observation) -> Sequence[Decision]:
            if observation.history:
                self.tails = [*getattr(self, "tails", []), best_tail(observation, 8, 1, COLOCATED)]
            return super().decide(observation)

    policy = Spy()
    drive(policy, **ONE_LONG)
    # When the 63 short ones end, one is left: every tail from 2 on begins then, and 0.05 of 64 is the least tried.
    assert set(policy.tails) == {3}
    assert policy.tail == 3


# --- the whole of it ---

SETS = ["job.model=qwen2.5-0.5b", "job.prompts_per_step=16", "job.dataset_prompts=32", "job.max_response_tokens=256"]


def test_a_lost_worker_costs_no_work_whatever_it_was_at() -> None:
    config = load_config(policy="rlhfuse", steps=3, nodes=1, seed=5, sets=SETS)
    whole = run(config)
    busy = whole.frames.workers.query("function == 'worker-0-1' and state == 'busy'")
    for stage in ("generation", "preparation"):
        rows = busy[busy["stage"] == stage]
        time_s = float((rows.start_s + rows.end_s).iloc[-1] / 2)
        fault = f'faults.at=[{{time_s = {time_s}, kind = "worker", function = "worker-0-1"}}]'
        lost = run(load_config(policy="rlhfuse", steps=3, nodes=1, seed=5, sets=[*SETS, fault])).summary
        assert lost["lost_functions"] == 1
        assert lost["response_tokens"] == whole.summary["response_tokens"]


def test_it_keeps_the_contract() -> None:
    assert len(check_policy("rlhfuse")) == 4
