"""`verl` by hand arithmetic, and the static plan of `verl-tuned` against all there are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from clusters import EXACT_STARTS, ROUND, make_backend, make_costs, make_job
from pandas.testing import assert_frame_equal

from simrl.experiments import static_search
from simrl.experiments.check import check_policy
from simrl.experiments.compare import compare
from simrl.experiments.config import Config, ConfigError, load_config
from simrl.experiments.run import planned, run, simulate, write_run
from simrl.experiments.static_search import engine_sizes, search_seeds, static_steps
from simrl.policies.contract import Prompt, drive
from simrl.policies.verl import Verl, chunks, least_loaded
from simrl.simulator.learning import forward_flops
from simrl.traces.job import Engine, Job
from simrl.traces.records import Frames

PARAMETERS = {**ROUND, "start": {**ROUND["start"], **EXACT_STARTS["start"]}}
LENGTHS = [[[30, 30]] * 8] * 2  # two steps of a prompt an engine


def frames_of(work: Sequence[Sequence[Sequence[int]]], *, engine: Engine | None = None, **job: Any) -> Frames:
    """A run of `verl` on eight engines of one L40S, prompts of 64 tokens."""
    costs = make_costs(make_job(work, **job), engine=engine, parameters=PARAMETERS)
    backend, recorder = make_backend(costs, work, prompt_tokens=64)
    drive(backend, Verl())
    return recorder.frames()


def seconds(frames: Frames, stage: str, step: int) -> float:
    row = frames.phases.query("stage == @stage and step == @step").iloc[0]
    return float(row.end_s - row.start_s)


# --- verl ---


def test_least_loaded_takes_the_part_with_the_fewest_prompt_tokens() -> None:
    prompts = [Prompt(i, tokens, (i,)) for i, tokens in enumerate((10, 3, 4, 5, 2))]
    first, second = least_loaded(prompts, 2)  # 10 | 3, then 10 | 7, 10 | 12, 12 | 12
    assert [prompt.prompt_id for prompt in first] == [0, 4]
    assert [prompt.prompt_id for prompt in second] == [1, 2, 3]


@pytest.mark.parametrize(("dispatch", "owner"), [("chunks", [0, 0, 1, 1]), ("least_loaded", [0, 1, 1, 1])])
def test_dispatch_by_hand(dispatch: Any, owner: list[int]) -> None:
    work = [[[5, 6]] * 4]
    costs = make_costs(make_job(work), engine=Engine(tensor_parallel=4), parameters=PARAMETERS)
    backend, recorder = make_backend(costs, work, prompt_tokens=[50, 10, 10, 10])
    drive(backend, Verl(Verl.Params(dispatch=dispatch)))
    samples = recorder.frames().samples.sort_values("response_id")
    assert samples.function.tolist() == [f"worker-0-{i}" for i in owner for _ in range(2)]


@pytest.mark.parametrize("offload", [False, True])
def test_engines_sleep_and_wake_and_weights_are_resharded_around_generation(offload: bool) -> None:
    frames = frames_of(LENGTHS, learner_offload=offload)
    state_s = 12 * 494_032_768 / 8 / 10e9 if offload else 0.0  # over each GPU's host link
    one = frames.workers.query("function == 'worker-0-0'")
    spans = [(row.state, row.stage, row.end_s - row.start_s) for row in one.fillna("").itertuples()][1:]  # cold start
    moved_s = 2 * 494_032_768 / 20e9  # the weights over each GPU's link
    asleep_s, awake_s = 1.5 + state_s, 0.5 + state_s
    step = ["generation", asleep_s, "preparation", "learning"]
    expected = [*step, awake_s, 1.0 + moved_s, *step]
    assert len(spans) == len(expected)
    for (state, stage, span_s), value in zip(spans, expected, strict=True):
        if isinstance(value, str):
            assert (state, stage) == ("busy", value)
        else:
            assert span_s == pytest.approx(value)
            assert (state, stage) in (("cold", ""), ("busy", "weight_sync"))


def test_a_group_shares_its_prompt_and_new_weights_empty_the_cache() -> None:
    computed = frames_of(LENGTHS).samples.sort_values("response_id").prefill_tokens
    # Three of a prompt's four blocks are hit, the last is never shared; the same prompts again are computed again.
    assert computed.tolist() == [64, 16] * 16
    alone = frames_of(LENGTHS, engine=Engine(tensor_parallel=1, prefix_caching=False)).samples.prefill_tokens
    assert alone.tolist() == [64] * 32


def test_stages_of_grpo_and_ppo_by_hand() -> None:
    costs = make_costs(make_job(LENGTHS), parameters=PARAMETERS)
    model = costs.model

    def forward_s(*, head: bool) -> float:
        """Two responses of 94 tokens on one GPU at half of 400 TFLOP/s, 2 ms a layer."""
        flops = forward_flops(model, pd.Series([94.0, 94.0]).to_numpy(), head=head).sum()
        return float(flops) / 200e12 + model.layers * 0.002

    weights = 2 * 494_032_768
    head = 0  # the output head is tied to the embeddings, which a critic has as well
    grpo_s = 2 * forward_s(head=True) + weights / 10e9  # old and reference, which comes over the host link
    ppo_s = grpo_s + forward_s(head=False) + (weights - head) / 10e9
    for algorithm, expected_s in (("grpo", grpo_s), ("ppo", ppo_s)):
        frames = frames_of(LENGTHS, algorithm=algorithm)
        assert seconds(frames, "preparation", 0) == pytest.approx(expected_s, rel=1e-6)
        stages = frames.phases.query("step == 1").sort_values("start_s").stage.tolist()
        assert stages == ["step", "weight_sync", "generation", "preparation", "learning"]


def test_learning_balances_lengths_over_ranks() -> None:
    apart, mixed = [[[50, 50], [10, 10]] * 4], [[[50, 10]] * 8]  # the same lengths, contiguous shares unlike
    learning_s = [seconds(frames_of(work), "learning", 0) for work in (apart, mixed, [[[50, 50]] * 8])]
    assert learning_s[0] == pytest.approx(learning_s[1], rel=1e-12)
    assert learning_s[0] < learning_s[2]


def test_a_critic_learns_after_the_actor() -> None:
    grpo, ppo = (seconds(frames_of(LENGTHS, algorithm=algorithm), "learning", 0) for algorithm in ("grpo", "ppo"))
    assert 1.5 * grpo < ppo <= 2 * grpo  # the critic has no output head, which is 28 % of 0.5B


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 100])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_chunks_are_contiguous_and_equal(count: int, parts: int) -> None:
    shares = chunks(range(count), parts)
    assert [number for share in shares for number in share] == list(range(count))
    sizes = [len(share) for share in shares]
    assert len(sizes) == parts
    assert max(sizes) - min(sizes) <= 1


# --- verl-tuned ---

JOB = [
    "job.model=qwen2.5-0.5b", "job.prompts_per_step=32", "job.dataset_prompts=32", "job.max_response_tokens=256",
    "job.steps=3",
]  # fmt: skip  # an epoch a step: the search simulates the very job


def tuned(*sets: str, nodes: int = 3, seed: int = 5) -> Config:
    return load_config(policy="verl-tuned", nodes=nodes, seed=seed, sets=[*JOB, *sets])


def plan_of(config: Config) -> tuple[int, int]:
    params = planned(config)[0].policy_params
    return params["nodes"], params["tensor_parallel"]


@pytest.fixture(scope="module")
def every_plan() -> dict[tuple[int, int], tuple[float, float]]:
    """Step and GPU-seconds of `verl` itself on each cluster, by nodes and size of an engine, on the search's seeds."""
    found = {}
    for nodes, size in itertools.product((1, 2, 3), (1, 2)):
        config = tuned(f"engine.tensor_parallel={size}", nodes=nodes).with_policy("verl")
        later = [run(config.with_seed(seed)).summary["later_epochs"] for seed in search_seeds(5)]
        means = [sum(epochs[key] for epochs in later) / len(later) for key in ("step_s", "gpu_s_per_step")]
        found[nodes, size] = (means[0], means[1])
    return found


def test_the_search_finds_what_brute_force_finds(every_plan: dict[tuple[int, int], tuple[float, float]]) -> None:
    assert static_steps(tuned().job) == (0, 1, 2)
    assert engine_sizes(tuned(), simulate(tuned()).costs) == [1, 2]  # for 4 and 8 there is only the roofline
    plans = every_plan
    everyone_s, everyone_gpu_s = plans[3, 2]  # all nodes, the preset's size of an engine
    middle_s = sorted(step_s for step_s, _ in plans.values())[len(plans) // 2]
    chosen = set()
    for limit_s, sets in (
        (everyone_s, ()),
        (middle_s, (f"policy.step_limit_s={middle_s!r}",)),
        (1e9, ("policy.step_slack=1e9",)),
    ):
        within = {key: gpu_s for key, (step_s, gpu_s) in plans.items() if step_s <= limit_s * (1 + 1e-12)}
        best = min(within, key=within.__getitem__)
        assert plan_of(tuned(*sets)) == best
        chosen.add(best)
        if limit_s >= everyone_s:
            assert plans[best][1] <= everyone_gpu_s
    assert len(chosen) > 1


def test_a_plan_on_some_nodes_is_verl_on_a_cluster_of_them_and_pays_for_no_other() -> None:
    plan = run(tuned("policy.nodes=1", "policy.tensor_parallel=4"))
    alone = run(tuned("engine.tensor_parallel=4", nodes=1).with_policy("verl"))
    for name, frame in plan.frames.by_name().items():
        assert_frame_equal(frame, alone.frames.by_name()[name], check_exact=True)
    for key in ("gpu_s", "cost_usd", "busy_fraction"):
        assert plan.summary[key] == alone.summary[key] > 0
    assert plan.summary["gpu_s"] == pytest.approx(8 * plan.summary["simulated_s"], rel=1e-9)
    [usd_per_hour] = [p.value for p in plan.parameters if p.key.startswith("price.") and p.key.endswith("usd_per_hour")]
    assert plan.summary["cost_usd"] == pytest.approx(usd_per_hour * plan.summary["simulated_s"] / 3600, rel=1e-9)


def test_a_plan_is_found_once_and_repeated_from_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tuned("policy.step_slack=2"))
    assert result.warnings[0].startswith("verl-tuned: of 3 nodes, ")
    write_run(result, tmp_path / "run")

    def no_search(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(static_search, "candidates", no_search)
    assert plan_of(tuned("policy.step_slack=2", seed=6)) == plan_of(result.config)  # one search for all seeds
    again = run(load_config(config=tmp_path / "run" / "config.toml"))
    assert_frame_equal(again.frames.samples, result.frames.samples)


def test_the_search_has_seeds_of_its_own() -> None:
    seeds = search_seeds(0)
    assert len(set(seeds)) == 2
    assert search_seeds(7) == seeds
    assert seeds[0] not in search_seeds(seeds[0])


def test_steps_of_the_search() -> None:
    assert static_steps(Job()) == (0, 7, 44)
    assert static_steps(Job(steps=5)) == (0, 1, 4)
    assert static_steps(Job(steps=1)) == (0,)


def test_another_policy_may_set_the_limit_with_its_own_parameters() -> None:
    sets = ["policy.step_limit_of=rlhfless", "policy.lambda=0", *JOB]
    config = load_config(nodes=1, seed=5, sets=sets, policies=["rlhfless", "verl-tuned"])
    seen: list[Config] = []
    limit_s = static_search._limit_s

    def watched(limit: Config, seeds: Sequence[int], make: static_search.Simulate) -> float:
        seen.append(limit)
        return limit_s(limit, seeds, make)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_search, "_limit_s", watched)
        rows = compare(config, ["rlhfless", "verl-tuned"]).rows
    assert [row["policy"] for row in rows] == ["rlhfless", "verl-tuned"]
    assert [(limit.policy, limit.policy_params) for limit in seen] == [("rlhfless", {"lambda": 0})]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["policy.step_limit_s=0.01"], r"no static plan is within 0\.01 s a step \(policy\.step_limit_s.*takes "),
        (["policy.nodes=4", "policy.tensor_parallel=2"], r"policy\.nodes=4 must be at most cluster\.nodes=1"),
        (["policy.nodes=1", "policy.tensor_parallel=3"], r"policy\.tensor_parallel=3 must divide the 8 GPUs"),
        (["policy.step_limit_of=verl-tuned"], r"policy\.step_limit_of='verl-tuned' must be another"),
        (["policy.step_limit_of=vrl"], r"policy 'vrl' is unknown; did you mean 'verl'"),
    ],
)  # fmt: skip
def test_impossible_plans_are_told_in_a_line(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tuned(*sets, nodes=1))


def test_a_lost_worker_costs_time_and_no_work() -> None:
    config = tuned("policy.nodes=1", "policy.tensor_parallel=2")
    whole = run(config).summary
    time_s = whole["simulated_s"] - 2  # in the last step
    faults = f'faults.at=[{{time_s = {time_s}, kind = "worker", function = "worker-0-1"}}]'
    lost = run(tuned("policy.nodes=1", "policy.tensor_parallel=2", faults)).summary
    assert lost["lost_functions"] == 1
    assert lost["response_tokens"] == whole["response_tokens"]
    assert lost["simulated_s"] > whole["simulated_s"]


def test_it_keeps_the_contract() -> None:
    assert len(check_policy("verl-tuned", tuned("policy.nodes=1", "policy.tensor_parallel=4"))) == 4
