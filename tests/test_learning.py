"""Preparation and learning, against arithmetic by hand and independent counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from clusters import ROUND, make_costs
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.simulator import learning as learning_module
from simrl.simulator.learning import (
    Collective,
    Learning,
    Share,
    adapter_parameters,
    deal,
    forward_flops,
    linear_parameters,
)
from simrl.traces.batches import shares
from simrl.traces.collectives import load_collectives
from simrl.traces.job import Job
from simrl.traces.models import load_model

PARAMETERS_7B = 7_615_616_512  # Qwen2.5-7B, as counted in test_models.py
WEIGHTS_7B = 2 * PARAMETERS_7B
LAYER_7B = 2 * 3584 * (28 * 128 + 4 * 128) + 3 * 3584 * 18944  # q and o, k and v; gate, up, down
HEAD_7B = 152_064 * 3584
PAIR_7B = 4 * 28 * 28 * 128  # FLOPs of a pair of tokens: 28 layers of 28 heads of 128
RATE = 400e12 * 0.25 * 4 / 3  # FLOP/s of learning: recomputation is work, too
OVERHEAD = 0.002 * 28  # s a pass
LINK, NIC, HOST = 20e9, 40e9, 10e9


def learning(model: str = "qwen2.5-7b", *, nodes: int = 1, table: bool = False, **job: Any) -> Learning:
    """With ring collectives over the links, unless the *table* of measured ones is to be used."""
    parameters = job.pop("parameters", {})
    merged = {**ROUND, "learner": {**ROUND["learner"], **parameters}}
    made = make_costs(Job(model=model, **job), nodes=nodes, parameters=merged).learning
    if not table:
        made._collectives = None
    return made


def approx(value: float) -> Any:
    return pytest.approx(value, rel=1e-12)


def lengths(*tokens: int) -> Any:
    return np.array(tokens, dtype=np.float64)


def forward_7b(*tokens: int, head: bool = True) -> float:
    """FLOPs of a forward pass, token by token: each sees itself and all before it."""
    weights = 28 * LAYER_7B + (HEAD_7B if head else 0)
    return sum(2 * weights * n + PAIR_7B * sum(range(1, n + 1)) for n in tokens)


# --- FLOPs ---


def test_weights_that_multiply_are_those_of_all_linear_layers_and_the_head() -> None:
    model = load_model("qwen2.5-7b")
    assert linear_parameters(model) == 28 * LAYER_7B + HEAD_7B == 7_070_285_824
    assert linear_parameters(model, head=False) == 28 * LAYER_7B
    norms_and_biases = 28 * (2 * 3584 + 28 * 128 + 2 * 4 * 128) + 3584
    assert model.parameters == linear_parameters(model) + HEAD_7B + norms_and_biases  # embeddings are as large


def test_a_tied_head_multiplies_too() -> None:
    small = load_model("qwen2.5-0.5b")
    assert small.tied_embeddings
    assert linear_parameters(small) - linear_parameters(small, head=False) == 151_936 * 896


def test_flops_of_a_7b_step() -> None:
    flops = forward_flops(load_model("qwen2.5-7b"), lengths(*[500] * 4096))
    assert flops.sum() == approx(4096 * (2 * 7_070_285_824 * 500 + 401_408 * 125_250))
    assert 3 * flops.sum() == pytest.approx(8.75e16, rel=2e-3)  # six a parameter and token, and 0.7 % attention


def test_attention_is_quadratic_in_each_sequences_own_length() -> None:
    model = load_model("qwen2.5-7b")
    assert forward_flops(model, lengths(7)).sum() == approx(forward_7b(7))
    uneven, even = forward_flops(model, lengths(100, 1900)).sum(), forward_flops(model, lengths(1000, 1000)).sum()
    assert uneven - even == approx(PAIR_7B * (sum(range(1, 101)) + sum(range(1, 1901)) - 2 * sum(range(1, 1001))))


def test_recomputation_is_work_that_mfu_does_not_count() -> None:
    share = Share(tokens=1000, flops=1e15, micro_batches=1)
    assert learning().hardware_flops(share) == 4e15
    assert learning().model_flops(share) == 3e15
    kept = learning(activation_checkpointing=False)
    assert kept.hardware_flops(share) == kept.model_flops(share) == 3e15


def test_frozen_weights_have_no_gradients() -> None:
    share = Share(tokens=1000, flops=1e15, micro_batches=1)
    adapters = 32 * 28 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    lora = learning(lora_rank=32)
    assert adapter_parameters(lora.model, 32) == adapters == 80_740_352
    assert lora.hardware_flops(share) == approx(3e15 + 8 * adapters * 1000)
    assert lora.model_flops(share) == approx(2e15 + 8 * adapters * 1000)


# --- MFU ---


def test_large_micro_batches_reach_the_gpus_mfu_and_small_ones_do_not() -> None:
    made = learning()
    assert made.achieved_mfu(10**9, 1000) == pytest.approx(0.25, rel=1e-4)
    assert made.achieved_mfu(16384, 512) > made.achieved_mfu(2048, 512) > made.achieved_mfu(512, 512)
    flops_s = 4 * forward_7b(*[512] * 4) / RATE
    assert made.achieved_mfu(2048, 512) == approx(0.25 * flops_s / (flops_s + 4 * OVERHEAD))


def test_small_models_reach_less() -> None:
    mfus = [learning(f"qwen2.5-{size}").achieved_mfu(8192, 512) for size in ("0.5b", "1.5b", "3b", "7b")]
    assert mfus == sorted(mfus)
    assert mfus[0] < 0.6 * mfus[-1]


def test_without_recomputation_mfu_is_a_third_higher() -> None:
    kept = learning(activation_checkpointing=False, parameters={"layer_overhead_s": 0})
    assert kept.achieved_mfu(8192, 512) == approx(0.25 * 4 / 3)


# --- how a batch is cut ---


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 4000), min_size=1, max_size=80), st.integers(1, 12))
def test_ranks_are_as_the_learner_of_the_real_backend_balances_them(tokens: list[int], ranks: int) -> None:
    rank_of = deal(lengths(*tokens), ranks)
    parts = shares(tokens, range(len(tokens)), ranks)
    assert [sorted(np.flatnonzero(rank_of == rank).tolist()) for rank in range(ranks)] == [sorted(p) for p in parts]


def test_a_very_large_batch_is_dealt_to_and_fro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_module, "LARGE_BATCH", 5)
    assert deal(lengths(1, 6, 3, 4, 5, 2), 2).tolist() == [1, 0, 0, 1, 1, 0]  # 6, then 3 and 2; 5 and 4, then 1
    tokens = np.random.default_rng(0).integers(1, 3000, 10_000).astype(float)
    loads = np.bincount(deal(tokens, 16), tokens)
    assert loads.max() < 1.01 * loads.mean()


def test_the_busiest_rank_sets_the_pace() -> None:
    made = learning()
    share = made.share(lengths(3000, 1000, 900, 800), 2, made.model)
    assert share.tokens == 3000
    assert share.flops == approx(forward_7b(3000))
    assert share.micro_batches == 1


@pytest.mark.parametrize(("tokens", "micro_batches"), [(9_999, 1), (10_000, 1), (10_001, 2), (20_000, 2), (20_001, 3)])
def test_packed_micro_batches_are_full(tokens: int, micro_batches: int) -> None:
    made = learning(micro_batch_tokens=10_000)
    assert made.share(lengths(tokens, 50), 2, made.model).micro_batches == micro_batches


def test_without_packing_sequences_are_padded_to_the_longest_beside_them() -> None:
    made = learning(micro_batch_tokens=1000, packing=False)
    share = made.share(lengths(500, 400, 300, 100), 1, made.model)
    assert share == Share(2 * 500 + 2 * 300, share.flops, 2)
    assert share.flops == approx(forward_7b(500, 500, 300, 300))


@pytest.mark.parametrize(
    ("prompts", "mini_batch", "sizes"),
    [(8, 4, [12, 12]), (8, 8, [24]), (7, 3, [9, 9, 3]), (2, 5, [6]), (3, 1, [3] * 3)],
)
def test_mini_batches_are_whole_groups_in_order(prompts: int, mini_batch: int, sizes: list[int]) -> None:
    made = learning(prompts_per_step=prompts, mini_batch_prompts=mini_batch, responses_per_prompt=3)
    tokens = np.arange(1.0, 3 * prompts + 1)
    parts = list(made._mini_batches(tokens))
    assert [len(part) for part in parts] == sizes
    assert np.concatenate(parts).tolist() == tokens.tolist()


def test_each_mini_batch_waits_for_its_own_busiest_rank() -> None:
    """Long responses of the first half cannot be balanced by short ones of the second."""
    options = {"prompts_per_step": 2, "responses_per_prompt": 2, "parameters": {"layer_overhead_s": 0}}
    halves = learning(**options, mini_batch_prompts=1)
    whole = learning(**options, mini_batch_prompts=2)
    tokens = [4000, 2000, 3000, 1000]
    rest_s = 2 * halves._fsdp_s(2, 1)
    assert halves.learn_s(tokens, 2, 1) > whole.learn_s(tokens, 2, 1)
    compute_s = [4 * forward_7b(4000) / RATE, 4 * forward_7b(3000) / RATE]
    expected_s = sum(seconds + rest_s / 2 - min(rest_s / 4, seconds) for seconds in compute_s)
    assert halves.learn_s(tokens, 2, 1) == approx(expected_s + 2 * optimizer_s(2))


# --- communication ---


def gather_s(gpus: int, rate: float = LINK) -> float:
    """Weights in bf16 round a ring."""
    return WEIGHTS_7B * (gpus - 1) / gpus / rate


def fsdp_s(gpus: int, rate: float = LINK) -> float:
    """Two gathers, and gradients in fp32 reduced."""
    return 4 * gather_s(gpus, rate)


def optimizer_s(gpus: int) -> float:
    """One update: the state and the gradients, read and written."""
    return 2 * (12 + 4) * PARAMETERS_7B / gpus / 800e9


def test_much_computing_hides_half_of_the_communication() -> None:
    compute_s = 4 * forward_7b(*[500] * 20) / RATE + 4 * OVERHEAD  # 160 responses on 8 ranks: 10,000 tokens each
    assert compute_s > fsdp_s(8) / 2
    expected_s = 4 * (compute_s + fsdp_s(8) / 2 + optimizer_s(8))  # 1024 prompts by 256
    assert learning().learn_s([500] * 20 * 8 * 4, 8, 1) == approx(expected_s)


def test_little_computing_hides_no_more_than_it_lasts() -> None:
    compute_s = 4 * forward_7b(10) / RATE + 4 * OVERHEAD
    assert compute_s < fsdp_s(8) / 2
    made = learning(mini_batch_prompts=1024)
    assert made.learn_s([10] * 8, 8, 1) == approx(fsdp_s(8) + optimizer_s(8))


@pytest.mark.parametrize(("overlap", "share"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.0)])
def test_the_overlap_is_a_parameter(overlap: float, share: float) -> None:
    made = learning(parameters={"overlap_efficiency": overlap})
    assert made._exposed_s(4.0, 100.0) == 4 * share


def test_each_micro_batch_gathers_anew() -> None:
    many = learning(mini_batch_prompts=1024, micro_batch_tokens=1000)
    tokens = [500] * 8 * 8  # 4000 a rank
    compute_s = 4 * forward_7b(*[500] * 8) / RATE + 4 * 4 * OVERHEAD
    assert many.learn_s(tokens, 8, 1) == approx(
        compute_s + 4 * fsdp_s(8) - min(2 * fsdp_s(8), compute_s) + optimizer_s(8)
    )


def test_between_nodes_the_slower_of_link_and_nic_sets_the_pace() -> None:
    made = learning(nodes=2)
    inside_s = 4 * WEIGHTS_7B * 7 / 8 / LINK
    between_s = 4 * WEIGHTS_7B * 15 / 16 / NIC
    assert inside_s > between_s
    assert made._fsdp_s(16, 2) == approx(inside_s)
    slow = {**ROUND, "network": {"efficiency": 0.2, "latency_s": 0.01}}  # 10e9 B/s
    other = make_costs(Job(), nodes=2, parameters=slow).learning
    other._collectives = None
    assert other._fsdp_s(16, 2) == approx(4 * WEIGHTS_7B * 15 / 16 / 10e9)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
def test_inside_a_node_measured_collectives_hold(kind: Collective) -> None:
    table = load_collectives("l40s")
    assert table is not None
    made = learning(table=True)
    assert made.collective_s(kind, 1e8, 2, 1) == approx(table.seconds(kind, 1e8, 2))
    assert made.collective_s(kind, 1e8, 1, 1) == 0
    assert {p.key for p in made._parameters.used()} >= {f"collectives.l40s.{kind}.2"}


def test_a_slow_hosts_table_is_not_taken_for_all_of_its_kind() -> None:
    made, table = learning(table=True), load_collectives("l40s")
    assert table is not None
    floor = made._parameters.number("learner.pcie.l40s.bus_bytes_per_s")
    ring_s = 5e8 * 7 / 8 / floor
    assert table.seconds("all_gather", 5e8, 8) > 3 * ring_s
    assert made.collective_s("all_gather", 5e8, 8, 1) == approx(ring_s)
    assert made.collective_s("all_reduce", 5e8, 8, 1) == approx(2 * ring_s)
    h100, measured = make_costs(Job(), node_type="p5.48xlarge").learning, load_collectives("h100")
    assert measured is not None
    assert h100.collective_s("all_gather", 5e8, 8, 1) == approx(measured.seconds("all_gather", 5e8, 8))


def test_one_gpu_learns_without_communication() -> None:
    made = learning(mini_batch_prompts=1024)
    assert made.learn_s([20, 30], 1, 1) == approx(4 * forward_7b(20, 30) / RATE + 4 * OVERHEAD + optimizer_s(1))


# --- learning ---


@pytest.mark.parametrize(
    ("prompts", "mini_batch", "updates"), [(1024, 256, 4), (1024, 1024, 1), (100, 256, 1), (1000, 300, 4), (7, 1, 7)]
)
def test_each_mini_batch_is_an_optimizer_step(prompts: int, mini_batch: int, updates: int) -> None:
    made = learning(prompts_per_step=prompts, mini_batch_prompts=mini_batch, responses_per_prompt=2)
    seconds = made.learn_s([10] * 2 * prompts, 1, 1)
    tokens_s = 4 * forward_7b(*[10] * 2 * prompts) / RATE
    micro_batches = sum(
        math.ceil(20 * n / 16384) for n in [mini_batch] * (prompts // mini_batch) + [prompts % mini_batch]
    )
    assert seconds == approx(tokens_s + micro_batches * 4 * OVERHEAD + updates * optimizer_s(1))


def test_a_critic_learns_as_well_and_has_no_output_head() -> None:
    tokens = [500] * 64 * 4
    difference_s = 4 * (forward_7b(*[500] * 32) - forward_7b(*[500] * 32, head=False)) / RATE
    assert learning(algorithm="ppo").learn_s(tokens, 8, 1) == approx(
        2 * learning().learn_s(tokens, 8, 1) - difference_s
    )


def test_under_lora_only_adapters_are_reduced_and_optimized() -> None:
    lora, adapters = learning(lora_rank=32), 80_740_352
    assert lora._fsdp_s(8, 1) == approx(2 * gather_s(8) + 4 * adapters * 7 / 8 / LINK)
    assert lora.optimizer_s(8) == approx(2 * (12 + 4) * adapters / 8 / 800e9)
    tokens = [500] * 64 * 4
    assert lora.learn_s(tokens, 8, 1) < 0.8 * learning().learn_s(tokens, 8, 1)


def test_megatron_reduces_activations_a_layer_and_gradients_an_optimizer_step() -> None:
    made = learning(learner_strategy="megatron", learner_tensor_parallel=2, mini_batch_prompts=1024)
    compute_s = (
        4 * forward_7b(*[500] * 80) / 2 / RATE + 3 * 4 * OVERHEAD
    )  # 4 ranks of 2 GPUs, 40,000 tokens: 3 x 13,333
    activations = 40_000 * 3584 * 2
    all_reduce_s = 2 * 3 * 28 * activations / LINK  # two a layer, in each of three passes; a ring of two passes on all
    gradients_s = (4 + 2) * PARAMETERS_7B / 2 * 3 / 4 / LINK
    exposed_s = gradients_s - min(gradients_s / 2, compute_s)
    assert made.learn_s([500] * 320, 8, 1) == approx(compute_s + all_reduce_s + exposed_s + optimizer_s(8))


def test_megatron_needs_no_gathers_for_small_micro_batches() -> None:
    tokens = [500] * 64
    small = {"micro_batch_tokens": 1000, "mini_batch_prompts": 1024}
    megatron = learning(learner_strategy="megatron", learner_tensor_parallel=2, **small)
    assert megatron.learn_s(tokens, 8, 1) < learning(**small).learn_s(tokens, 8, 1)


# --- preparation ---


def score_s(tokens: int, count: int, gpus: int, *, head: bool = True) -> float:
    """A forward pass over *count* responses of *tokens* tokens that fit one micro-batch a GPU."""
    compute_s = forward_7b(*[tokens] * (count // gpus), head=head) / (400e12 * 0.5) + OVERHEAD
    return compute_s + gather_s(gpus) - min(gather_s(gpus) / 2, compute_s)


LOAD_S = WEIGHTS_7B / 2 / HOST


def test_preparation_runs_two_models_and_loads_one() -> None:
    tokens = [600] * 20
    assert learning().prepare_s(tokens, 2) == approx(2 * score_s(600, 20, 2) + LOAD_S)
    assert learning().prepare_s(tokens, 2, loaded=True) == approx(2 * score_s(600, 20, 2))
    assert learning(kl_reference=False).prepare_s(tokens, 2) == approx(score_s(600, 20, 2))


def test_values_come_from_a_third_model_without_an_output_head() -> None:
    tokens = [600] * 20
    expected_s = 2 * score_s(600, 20, 2) + score_s(600, 20, 2, head=False)
    assert learning(algorithm="ppo").prepare_s(tokens, 2) == approx(expected_s + 2 * LOAD_S)


def test_under_lora_the_reference_is_there_already() -> None:
    assert learning(lora_rank=8).prepare_s([600] * 20, 2) == approx(2 * score_s(600, 20, 2))


def test_a_reward_model_is_loaded_and_runs() -> None:
    tokens = [600] * 20
    same = learning(reward="model", kl_reference=False).prepare_s(tokens, 2)
    assert same == approx(score_s(600, 20, 2) + score_s(600, 20, 2, head=False) + LOAD_S)
    small = learning(reward="model", reward_model="qwen2.5-0.5b", kl_reference=False)
    assert score_s(600, 20, 2) < small.prepare_s(tokens, 2) < same


def test_rules_are_applied_on_cores_meanwhile() -> None:
    made = learning("qwen2.5-0.5b", micro_batch_tokens=10**9)
    assert made.prepare_s([1] * 100_000, 8) == approx(100_000 * 0.001 / 50)
    assert made.prepare_s([], 8) == 0
    assert learning("qwen2.5-0.5b", micro_batch_tokens=10**9, reward="model").prepare_s([1] * 100_000, 8) < 1
