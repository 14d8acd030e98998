"""What each role needs on a GPU, against arithmetic by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
from clusters import ROUND, make_costs

from simrl.policies.contract import Role
from simrl.simulator.memory import DoesNotFit, Memory, layer_activation_values
from simrl.traces.job import Engine, Job

PARAMETERS_7B = 7_615_616_512  # Qwen2.5-7B, as counted in test_models.py
WEIGHTS_7B = 2 * PARAMETERS_7B
ROOT_7B = 2 * 152_064 * 3584  # embeddings and head
LAYER_7B = (PARAMETERS_7B - ROOT_7B) / 28
ACTIVATIONS_7B = 4 * 3584 + 2 * (3584 + 512) + 4 * 18944  # values a token and layer
ADAPTERS_7B = 80_740_352  # rank 32, as counted in test_learning.py
TOKENS = 16_384


def memory_of(model: str = "qwen2.5-7b", nodes: int = 1, engine: Engine | None = None, **job: Any) -> Memory:
    return make_costs(Job(model=model, **job), nodes=nodes, engine=engine, parameters=ROUND).memory


def approx(value: float) -> Any:
    return pytest.approx(value, rel=1e-12)


# --- the learner ---


def test_the_learners_state_is_sharded_over_all_its_gpus() -> None:
    assert memory_of().learner_bytes(16) == approx(12 * PARAMETERS_7B / 16)
    assert memory_of(algorithm="ppo").learner_bytes(16) == approx(2 * 12 * PARAMETERS_7B / 16)


def test_under_lora_only_adapters_have_an_optimizer_and_travel() -> None:
    lora = memory_of(lora_rank=32)
    assert lora.learner_bytes(16) == approx((4 * PARAMETERS_7B + 12 * ADAPTERS_7B) / 16)
    assert lora.learning_terms(16)["gradients"] == approx(4 * ADAPTERS_7B / 16)
    assert lora.synced_bytes == 2 * ADAPTERS_7B
    assert memory_of().synced_bytes == WEIGHTS_7B


def test_learning_needs_state_gradients_gathered_layers_activations_and_logits() -> None:
    terms = memory_of().learning_terms(16)
    assert list(terms.values()) == [
        approx(12 * PARAMETERS_7B / 16),
        approx(4 * PARAMETERS_7B / 16),
        approx(2 * (ROOT_7B + 2 * LAYER_7B)),
        approx(2 * (ROOT_7B + LAYER_7B)),
        approx(2 * TOKENS * (28 * 3584 + ACTIVATIONS_7B)),
        approx(8 * TOKENS * 152_064),
    ]
    assert max(terms, key=lambda name: terms[name]) == "their logits"
    ppo = sum(memory_of(algorithm="ppo").learning_terms(16).values())
    assert ppo - sum(terms.values()) == approx(12 * PARAMETERS_7B / 16)  # actor and critic learn in turn


def test_without_checkpointing_all_layers_keep_their_activations() -> None:
    terms = memory_of(activation_checkpointing=False).learning_terms(16)
    assert terms[f"activations of {TOKENS} tokens"] == approx(2 * TOKENS * 28 * ACTIVATIONS_7B)
    assert layer_activation_values(memory_of().model) == ACTIVATIONS_7B


def test_one_gpu_gathers_nothing() -> None:
    assert "gathered layers" not in memory_of().learning_terms(1)
    assert "gathered layers" not in memory_of().preparing_terms(1, None)


@pytest.mark.parametrize(("limit", "tokens"), [(1000, 3072), (4096, 4096), (10**9, 12 * 3072)])
def test_a_micro_batch_holds_the_longest_response_and_no_more_than_a_step(limit: int, tokens: int) -> None:
    memory = memory_of(micro_batch_tokens=limit, prompts_per_step=4, responses_per_prompt=3)
    assert memory.learning_terms(8)["their logits"] == approx(8 * tokens * 152_064)


def test_megatron_keeps_its_part_of_weights_and_gradients() -> None:
    terms = memory_of(learner_strategy="megatron", learner_tensor_parallel=4).learning_terms(16)
    assert list(terms.values()) == [
        approx(12 * PARAMETERS_7B / 16),
        approx(WEIGHTS_7B / 4),
        approx(4 * PARAMETERS_7B / 4),
        approx(2 * TOKENS * (28 * 3584 + ACTIVATIONS_7B) / 4),
        approx(8 * TOKENS * 152_064 / 4),
    ]


# --- preparation ---


def test_preparation_needs_a_model_and_forward_passes_beside_the_learners_state() -> None:
    forward = 2 * (ROOT_7B + 2 * LAYER_7B) + 2 * TOKENS * ACTIVATIONS_7B + 8 * TOKENS * 152_064
    assert sum(memory_of().preparing_terms(2, 16).values()) == approx(
        WEIGHTS_7B / 2 + 12 * PARAMETERS_7B / 16 + forward
    )
    assert sum(memory_of().preparing_terms(2, None).values()) == approx(WEIGHTS_7B / 2 + forward)
    assert sum(memory_of(learner_offload=True).preparing_terms(2, 16).values()) == approx(WEIGHTS_7B / 2 + forward)


def test_a_larger_reward_model_sets_what_preparation_needs() -> None:
    small, large = memory_of(), memory_of(reward="model", reward_model="llama-2-70b")
    assert large.preparing_terms(2, 16)["weights"] == approx(memory_of("llama-2-70b").weight_bytes / 2)
    same = memory_of(reward="model", reward_model="qwen2.5-3b")
    assert sum(same.preparing_terms(8, 16).values()) == sum(small.preparing_terms(8, 16).values())


# --- engines ---


def test_an_engine_has_weights_and_activations_beside_the_learners_state() -> None:
    memory = memory_of()
    assert memory.engine_bytes(2, 16) == approx(WEIGHTS_7B / 2 + 12 * PARAMETERS_7B / 16 + 3e9)
    assert memory.resident_bytes(2, ("decode", "learn"), 16) == approx(WEIGHTS_7B / 2 + 12 * PARAMETERS_7B / 16)


@pytest.mark.parametrize(
    ("model", "kv_bytes"), [("qwen2.5-7b", 2 * 28 * 4 * 128 * 2), ("llama-2-70b", 2 * 80 * 8 * 128 * 2)]
)
def test_kv_holds_keys_and_values_of_all_layers(model: str, kv_bytes: int) -> None:
    assert memory_of(model).kv_token_bytes == kv_bytes


def test_a_colocated_engine_has_the_presets_share_and_a_lone_one_more() -> None:
    memory = memory_of()
    assert memory.kv_bytes(2, 16) == approx(0.6 * 48e9 - WEIGHTS_7B / 2 - 3e9)
    assert memory.kv_bytes(2, None) == approx(0.9 * 48e9 - WEIGHTS_7B / 2 - 3e9)


@pytest.mark.parametrize("share", [0.6, 0.7, 0.95])
def test_a_share_that_the_user_sets_holds_for_lone_engines_too(share: float) -> None:
    memory = memory_of(engine=Engine(gpu_memory_utilization=share))
    assert memory.kv_bytes(2, None) == approx(share * 48e9 - WEIGHTS_7B / 2 - 3e9)
    assert memory.kv_bytes(2, 1600) == approx(share * 48e9 - WEIGHTS_7B / 2 - 3e9)


def test_a_resident_learner_leaves_less_for_kv() -> None:
    memory = memory_of(engine=Engine(gpu_memory_utilization=0.9))
    state = 12 * PARAMETERS_7B / 8
    assert memory.kv_bytes(2, 8) == approx(0.98 * 48e9 - WEIGHTS_7B / 2 - 3e9 - state)
    offloaded = memory_of(engine=Engine(gpu_memory_utilization=0.9), learner_offload=True)
    assert offloaded.kv_bytes(2, 8) == approx(0.9 * 48e9 - WEIGHTS_7B / 2 - 3e9)
    adapters = memory_of(engine=Engine(gpu_memory_utilization=0.9), lora_rank=32)
    assert adapters.kv_bytes(2, 8) > memory.kv_bytes(2, 8)


def test_kv_blocks_are_whole() -> None:
    memory = memory_of(engine=Engine(gpu_memory_utilization=0.6))
    assert memory.kv_blocks(2, 16) == int(2 * (0.6 * 48e9 - WEIGHTS_7B / 2 - 3e9) / 57_344 / 16)


# --- what does not fit ---


def refusal(memory: Memory, gpus: int, roles: tuple[Role, ...], world: int | None) -> str:
    with pytest.raises(DoesNotFit) as caught:
        memory.check_fit(gpus, roles, world)
    return str(caught.value)


@pytest.mark.parametrize(
    ("job", "gpus", "roles", "world", "tries"),
    [
        ({"model": "qwen2.5-14b"}, 1, ("decode", "prepare", "learn"), 4, "job.learner_offload = true"),
        ({}, 1, ("learn",), 4, "a smaller job.micro_batch_tokens"),
        ({"activation_checkpointing": False}, 1, ("learn",), 16, "job.activation_checkpointing = true"),
        ({"micro_batch_tokens": 1}, 1, ("learn",), 2, "job.lora_rank"),
        ({"lora_rank": 8, "micro_batch_tokens": 40_000}, 1, ("learn",), 2, "a smaller job.micro_batch_tokens"),
        ({"model": "qwen2.5-14b", "learner_offload": True}, 1, ("prepare",), 4, "more GPUs an engine"),
    ],
)
def test_a_refusal_has_the_arithmetic_term_by_term_and_what_to_try(
    job: dict[str, Any], gpus: int, roles: tuple[Role, ...], world: int, tries: str
) -> None:
    message = refusal(memory_of(**job), gpus, roles, world)
    found = re.search(r"needs ([\d.]+) GB \((.*?)\) and has 48\.0 GB", message)
    assert found, message
    terms = [float(term.split()[0]) for term in found[2].split(" + ")]
    assert len(terms) >= 3
    assert sum(terms) == pytest.approx(float(found[1]), abs=0.05 * len(terms))
    assert tries in message
    assert "\n" not in message


def test_what_is_refused_needs_more_than_there_is_and_what_fits_does_not() -> None:
    memory = memory_of()
    for world in range(1, 17):
        needs = sum(memory.learning_terms(world).values())
        if needs > 48e9:
            assert f"needs {needs / 1e9:.1f} GB" in refusal(memory, 2, ("learn",), world)
        else:
            memory.check_fit(2, ("learn",), world)
    assert sum(memory.learning_terms(1).values()) > 48e9 > sum(memory.learning_terms(16).values())


def test_offloading_is_no_advice_where_the_state_is_needed() -> None:
    message = refusal(memory_of(micro_batch_tokens=1), 1, ("learn",), 2)
    assert "learner_offload" not in message
    assert "more nodes" in message


def test_the_gpus_that_learn_are_whole_groups_of_tensor_parallel_ones() -> None:
    memory = memory_of(learner_strategy="megatron", learner_tensor_parallel=4, micro_batch_tokens=4096)
    memory.check_fit(4, ("learn",), 16)
    assert "job.learner_tensor_parallel=4 must divide the 14 GPUs" in refusal(memory, 2, ("learn",), 14)
