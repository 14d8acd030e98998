"""The cost model, the GPU pool and the network, against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import simpy
from clusters import make_costs, make_job

from simrl.policies.runtime.leases import GpuPool
from simrl.simulator.costs import Costs, DoesNotFit
from simrl.simulator.network import Network, NodeLinks
from simrl.traces.job import Engine, Job

# Round numbers, so that re-sourcing a constant does not touch these tests.
ROUND = {
    "gpu": {
        "l40s": {
            "memory_bytes": 48e9, "peak_flops": 400e12, "learn_mfu": 0.25, "forward_mfu": 0.5,
            "memory_bytes_per_s": 800e9, "link_bytes_per_s": 20e9,
        },
    },
    "node": {"g6e.48xlarge": {"nic_bytes_per_s": 50e9, "host_bytes_per_s": 10e9, "host_memory_bytes": 1.5e12}},
    "network": {"efficiency": 0.8, "latency_s": 0.01},
    "serving": {"activation_bytes_per_gpu": 3e9, "workspace_bytes_per_gpu": 5e9, "flat_tolerance": 0.25},
    "start": {
        "download_bytes_per_s": 250e6, "load_bytes_per_s": 500e6, "init_s": 90, "compile_s": 50, "capture_s": 40,
        "spread": 0.1,
    },
    "switch": {"engine_sleep_s": 1.5, "engine_wake_s": 0.5, "sync_setup_s": 1.0, "sync_bytes_per_s": 25e9},
    "learner": {
        "bytes_per_parameter": 12, "gradient_bytes_per_parameter": 4, "micro_batch_tokens": 10_000,
        "rule_reward_s": 0.001, "reward_workers": 50,
    },
}  # fmt: skip
PARAMETERS_7B = 7_615_616_512  # Qwen2.5-7B, as counted in test_models.py
WEIGHTS_7B = 2 * PARAMETERS_7B


def costs_of(model: str = "qwen2.5-7b", nodes: int = 1, engine: Engine | None = None, **job: Any) -> Costs:
    return make_costs(Job(model=model, **job), nodes=nodes, engine=engine, parameters=ROUND)


def approx(value: float | dict[str, float]) -> Any:
    return pytest.approx(value, rel=1e-12)


# --- memory ---


def test_the_learners_state_is_sharded_over_all_its_gpus() -> None:
    assert costs_of().learner_bytes(16) == approx(12 * PARAMETERS_7B / 16)
    assert costs_of(algorithm="ppo").learner_bytes(16) == approx(2 * 12 * PARAMETERS_7B / 16)


def test_gradients_take_room_only_while_learning() -> None:
    costs, ppo = costs_of(), costs_of(algorithm="ppo")
    assert costs.learning_bytes(16) == approx((12 + 4) * PARAMETERS_7B / 16 + 5e9)
    assert ppo.learning_bytes(16) == approx((2 * 12 + 4) * PARAMETERS_7B / 16 + 5e9)  # actor and critic in turn
    assert costs.preparing_bytes(2, 16) == approx(WEIGHTS_7B / 2 + 12 * PARAMETERS_7B / 16 + 5e9)
    assert costs.engine_bytes(2, 16) == approx(WEIGHTS_7B / 2 + 12 * PARAMETERS_7B / 16 + 3e9)
    assert costs.resident_bytes(2, ("decode", "learn"), 16) == approx(WEIGHTS_7B / 2 + 12 * PARAMETERS_7B / 16)


@pytest.mark.parametrize(
    ("model", "kv_bytes"), [("qwen2.5-7b", 2 * 28 * 4 * 128 * 2), ("llama-2-70b", 2 * 80 * 8 * 128 * 2)]
)
def test_kv_holds_keys_and_values_of_all_layers(model: str, kv_bytes: int) -> None:
    assert costs_of(model).kv_token_bytes == kv_bytes


def test_a_colocated_engine_has_the_presets_share_and_a_lone_one_more() -> None:
    costs = costs_of()
    assert costs.kv_bytes(2, 16) == approx(0.6 * 48e9 - WEIGHTS_7B / 2 - 3e9)
    assert costs.kv_bytes(2, None) == approx(0.9 * 48e9 - WEIGHTS_7B / 2 - 3e9)


@pytest.mark.parametrize("share", [0.6, 0.7, 0.95])
def test_a_share_that_the_user_sets_holds_for_lone_engines_too(share: float) -> None:
    costs = costs_of(engine=Engine(gpu_memory_utilization=share))
    assert costs.kv_bytes(2, None) == approx(share * 48e9 - WEIGHTS_7B / 2 - 3e9)
    assert costs.kv_bytes(2, 1600) == approx(share * 48e9 - WEIGHTS_7B / 2 - 3e9)


def test_a_resident_learner_leaves_less_for_kv() -> None:
    costs = costs_of(engine=Engine(gpu_memory_utilization=0.9))
    state = 12 * PARAMETERS_7B / 8
    assert costs.kv_bytes(2, 8) == approx(0.98 * 48e9 - WEIGHTS_7B / 2 - 3e9 - state)
    offloaded = costs_of(engine=Engine(gpu_memory_utilization=0.9), learner_offload=True)
    assert offloaded.kv_bytes(2, 8) == approx(0.9 * 48e9 - WEIGHTS_7B / 2 - 3e9)


def test_kv_blocks_are_whole() -> None:
    costs = costs_of(engine=Engine(gpu_memory_utilization=0.6))
    assert costs.kv_blocks(2, 16) == int(2 * (0.6 * 48e9 - WEIGHTS_7B / 2 - 3e9) / 57_344 / 16)


def test_what_does_not_fit_says_what_is_needed_and_what_there_is() -> None:
    costs = costs_of("qwen2.5-14b")
    needed = 2 * costs.model.parameters + 3e9 + 3072 * costs.kv_token_bytes + costs.learner_bytes(1)
    with pytest.raises(DoesNotFit, match=rf"needs {needed / 1e9:.1f} GB .* has 48.0 GB"):
        costs.check_fit(1, ("decode", "prepare", "learn"), 1)
    with pytest.raises(DoesNotFit, match=rf"needs {((12 + 4) * PARAMETERS_7B / 2 + 5e9) / 1e9:.1f} GB and has 48.0 GB"):
        costs_of().check_fit(1, ("learn",), 2)
    costs_of().check_fit(1, ("learn",), 3)


# --- compute ---


def test_a_forward_pass_takes_two_flops_a_parameter_and_four_a_layer_for_each_pair_of_tokens() -> None:
    flops_a_token = 2 * PARAMETERS_7B + 4 * 28 * 28 * 128 * (600 / 2)  # a token attends to half its sequence on average
    assert costs_of().forward_s(12_000, 4, 600) == approx(12_000 * flops_a_token / (400e12 * 0.5 * 4))


def test_preparation_runs_two_models_and_loads_one() -> None:
    costs = costs_of()
    forward_s = costs.forward_s(12_000, 2, 12_000 / 20)
    assert costs.prepare_s([600] * 20, 2) == approx(2 * forward_s + WEIGHTS_7B / 2 / 10e9)
    ppo = costs_of(algorithm="ppo")
    assert ppo.prepare_s([600] * 20, 2) == approx(3 * forward_s + 2 * WEIGHTS_7B / 2 / 10e9)


def test_models_that_are_loaded_already_are_not_loaded_again() -> None:
    costs = costs_of()
    assert costs.prepare_s([600] * 20, 2, loaded=True) == approx(2 * costs.forward_s(12_000, 2, 12_000 / 20))
    assert costs_of(algorithm="ppo").prepare_s([600] * 20, 2, loaded=True) == approx(
        3 * costs.forward_s(12_000, 2, 12_000 / 20)
    )


def test_preparation_is_no_faster_than_scoring() -> None:
    costs = make_costs(make_job([[[1]]]), parameters=ROUND)
    assert costs.prepare_s([1] * 1_000_000, 8) == approx(1_000_000 * 0.001 / 50)
    assert costs.prepare_s([], 8) == 0


def optimizer_s(gpus: int) -> float:
    """One update: the state and the gradients, read and written."""
    return 2 * (12 + 4) * PARAMETERS_7B / gpus / 800e9


def test_learning_on_much_is_bound_by_computing() -> None:
    flops_a_token = 2 * PARAMETERS_7B + 4 * 28 * 28 * 128 * 250
    compute_s = 3 * 40_000 * flops_a_token / (400e12 * 0.25)
    communication_s = 3 * 4 * WEIGHTS_7B * 7 / 8 / 20e9
    assert compute_s > communication_s
    assert costs_of().learn_s([500] * 80 * 8, 8, 1) == approx(compute_s + 4 * optimizer_s(8))  # 1024 prompts by 256


def test_learning_on_little_is_bound_by_communication() -> None:
    compute_s = 3 * 100 * 2 * PARAMETERS_7B / (400e12 * 0.25)
    communication_s = 3 * 4 * WEIGHTS_7B * 15 / 16 / 20e9  # the PCIe link, not the NIC of 40e9, is the slowest
    assert compute_s < communication_s
    assert costs_of(nodes=2).learn_s([100] * 16, 16, 2) == approx(communication_s + 4 * optimizer_s(16))


def test_between_nodes_a_slow_nic_sets_the_pace_of_learning() -> None:
    slow = {**ROUND, "network": {"efficiency": 0.2, "latency_s": 0.01}}  # 10e9 B/s
    costs = make_costs(Job(), nodes=2, parameters=slow)
    assert costs.learn_s([100] * 16, 16, 2) == approx(3 * 4 * WEIGHTS_7B * 15 / 16 / 10e9 + 4 * optimizer_s(16))
    assert costs.learn_s([100] * 8, 8, 1) == approx(3 * 4 * WEIGHTS_7B * 7 / 8 / 20e9 + 4 * optimizer_s(8))


@pytest.mark.parametrize(
    ("prompts", "mini_batch", "updates"), [(1024, 256, 4), (1024, 1024, 1), (100, 256, 1), (1000, 300, 4), (7, 1, 7)]
)
def test_each_mini_batch_is_an_optimizer_step(prompts: int, mini_batch: int, updates: int) -> None:
    costs = costs_of(prompts_per_step=prompts, mini_batch_prompts=mini_batch)
    gather_s = WEIGHTS_7B * 7 / 8 / 20e9
    # 10 tokens a rank: a micro-batch an update, three collectives each.
    assert costs.learn_s([10] * 8, 8, 1) == approx(updates * (3 * gather_s + optimizer_s(8)))


def test_micro_batches_are_rounded_up_within_each_mini_batch() -> None:
    slow = {**ROUND, "network": {"efficiency": 0.02, "latency_s": 0.01}}  # 1e9 B/s: communication is the bound
    gather_s = WEIGHTS_7B * 15 / 16 / 1e9
    for rank_tokens, micro_batches in ((40_000, 4), (40_001, 8), (44_000, 8), (80_000, 8), (80_004, 12)):
        learn_s = make_costs(Job(), nodes=2, parameters=slow).learn_s([rank_tokens] * 16, 16, 2)
        assert learn_s == approx(3 * micro_batches * gather_s + 4 * optimizer_s(16))
    one = make_costs(Job(mini_batch_prompts=1024), nodes=2, parameters=slow)
    assert one.learn_s([500] * 88 * 16, 16, 2) == approx(3 * 5 * gather_s + optimizer_s(16))


def test_ppo_trains_a_critic_as_well() -> None:
    assert costs_of(algorithm="ppo").learn_s([500] * 88 * 8, 8, 1) == approx(
        2 * costs_of().learn_s([500] * 88 * 8, 8, 1)
    )


def test_one_gpu_learns_without_communication() -> None:
    costs = make_costs(make_job([[[1]]]), parameters=ROUND)
    parameters = costs.model.parameters
    flops_a_token = 2 * parameters + 4 * 24 * 14 * 64 * 12.5
    expected_s = 3 * 50 * flops_a_token / (400e12 * 0.25) + 2 * (12 + 4) * parameters / 800e9
    assert costs.learn_s([20, 30], 1, 1) == approx(expected_s)


# --- the flat batch ---


def test_the_flat_batch_is_that_of_the_next_context_in_steps_of_64() -> None:
    costs = costs_of()
    times = costs.times(2)
    flat = {context: times.flat_batch(context, 0.25) for context in (64, 128, 1024, 2048, 2112)}
    assert len(set(flat.values())) > 2, "the context makes no difference here"
    assert costs.flat_batch(2, 1.0) == costs.flat_batch(2, 64) == flat[64]
    assert costs.flat_batch(2, 64.5) == costs.flat_batch(2, 128.0) == flat[128]
    assert costs.flat_batch(2, 1024) == flat[1024]
    assert costs.flat_batch(2, 2048) == costs.flat_batch(2, 1984.1) == flat[2048]
    assert costs.flat_batch(2, 2048.1) == flat[2112]


def test_the_flat_batch_is_at_most_what_an_engine_runs() -> None:
    assert costs_of(engine=Engine(max_num_seqs=3)).flat_batch(2, 512) == 3


# --- movement ---


def test_a_sync_takes_the_slower_of_link_and_network() -> None:
    assert costs_of().sync_s(2, 1) == approx(1 + WEIGHTS_7B / 2 / 20e9)
    assert costs_of(nodes=2).sync_s(1, 2) == approx(1 + WEIGHTS_7B / 20e9)
    assert costs_of(nodes=2).sync_s(2, 2) == approx(1 + WEIGHTS_7B / 25e9)  # not the 40e9 that the NIC could
    assert costs_of(nodes=2).sync_s(4, 2) == approx(1 + WEIGHTS_7B / 25e9)


def test_a_sync_is_no_faster_than_a_slow_nic() -> None:
    slow = {**ROUND, "network": {"efficiency": 0.2, "latency_s": 0.01}}  # 10e9 B/s
    assert make_costs(Job(), nodes=2, parameters=slow).sync_s(2, 2) == approx(1 + WEIGHTS_7B / 10e9)
    assert make_costs(Job(), nodes=1, parameters=slow).sync_s(2, 1) == approx(1 + WEIGHTS_7B / 2 / 20e9)


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_within_a_node_kv_goes_over_the_links_of_all_gpus(gpus: int) -> None:
    assert costs_of().transfer_s(1000, gpus, same_node=True) == approx(0.01 + 1000 * 57_344 / (gpus * 20e9))


@pytest.mark.parametrize(("gpus", "rate"), [(1, 10e9), (2, 20e9), (4, 40e9), (8, 40e9)])
def test_between_nodes_kv_goes_over_the_host_links_of_all_gpus_up_to_the_nic(gpus: int, rate: float) -> None:
    assert costs_of().transfer_s(1000, gpus, same_node=False) == approx(0.01 + 1000 * 57_344 / rate)


def test_parking_moves_the_learners_state_and_waking_the_weights_too() -> None:
    state = 12 * PARAMETERS_7B / 8
    costs = costs_of()
    assert costs.park_s(2, ("decode",), None) == 1.5
    assert costs.park_s(2, ("decode", "learn"), 8) == approx(1.5 + state / 10e9)
    assert costs.wake_s(2, ("decode",), None) == approx(
        WEIGHTS_7B / 2 / 10e9
    )  # .76 s, more than the .5 s of small ones
    assert costs.wake_s(8, ("decode",), None) == 0.5  # .19 s would do for the weights
    assert costs.wake_s(2, ("decode", "learn"), 8) == approx((WEIGHTS_7B / 2 + state) / 10e9)
    assert costs.wake_s(8, ("decode", "learn"), 8) == approx(0.5 + state / 10e9)
    assert costs.wake_s(2, ("learn",), 8) == approx(0.5 + state / 10e9)


def test_offloaded_state_is_in_the_host_already() -> None:
    costs = costs_of(learner_offload=True)
    assert costs.park_s(2, ("decode", "learn"), 8) == 1.5
    assert costs.wake_s(2, ("decode", "learn"), 8) == approx(WEIGHTS_7B / 2 / 10e9)


def test_only_changing_between_engine_and_trainer_takes_time() -> None:
    costs = costs_of()
    assert costs.switch_s("prefill", "decode", 8) == costs.switch_s("prepare", "learn", 8) == 0
    assert costs.switch_s("decode", "prepare", 8) == 1.5
    assert costs.switch_s("learn", "decode", 8) == 0.5
    offload_s = 12 * PARAMETERS_7B / 8 / 10e9
    assert costs_of(learner_offload=True).switch_s("decode", "prepare", 8) == approx(1.5 + offload_s)


def test_fp8_kv_takes_half_the_memory_and_is_marked_as_assumed() -> None:
    job = make_job([[[8]]])
    plain, fp8 = make_costs(job), make_costs(job, engine=Engine(tensor_parallel=1, kv_cache_dtype="fp8"))
    assert fp8.kv_token_bytes == plain.kv_token_bytes / 2
    assert fp8.kv_blocks(1, None) == pytest.approx(2 * plain.kv_blocks(1, None), abs=1)
    fp8.times(1)
    used = {parameter.key: parameter for parameter in fp8._parameters.used()}
    assert used["serving.fp8_kv_read_factor"].status == "assumed"


def test_eager_mode_waits_for_launches_and_graphs_do_not() -> None:
    job = make_job([[[8]]])
    graphs, eager = make_costs(job), make_costs(job, engine=Engine(tensor_parallel=1, enforce_eager=True))
    assert eager.times(1).decode_s(1, 64) == pytest.approx(1.43e-3 * 24)  # qwen2.5-0.5b has 24 layers
    assert graphs.times(1).decode_s(1, 64) < 5e-3
    used = {parameter.key: parameter for parameter in eager._parameters.used()}
    assert used["engine.vllm-current.enforce_eager"].value is True
    assert used["engine.vllm-current.enforce_eager"].source.startswith("set by the user")


def test_graphs_pad_batches_up_to_the_largest_captured() -> None:
    times = make_costs(make_job([[[8]]])).times(1)
    assert times.decode_s(249, 1) == pytest.approx(times.decode_s(256, 1))
    assert times.decode_s(257, 1) == pytest.approx(times.decode_s(272, 1))


def test_a_start_compiles_only_with_cuda_graphs() -> None:
    weights = {"download": WEIGHTS_7B / 250e6, "weights": WEIGHTS_7B / 2 / 500e6, "init": 90.0}
    graphs = costs_of(engine=Engine(preset="vllm-current"))
    eager = costs_of(engine=Engine(preset="vllm-0.8-eager"))
    assert graphs.start_phases(2, ("decode",), cached=False) == approx({**weights, "compile": 50.0, "capture": 40.0})
    assert eager.start_phases(2, ("decode",), cached=False) == approx(weights)
    assert graphs.start_phases(2, ("learn",), cached=True) == approx({**weights, "download": 0.0})


# --- the network ---


def network(nodes: int = 3) -> tuple[simpy.Environment, Network, Costs]:
    costs = costs_of(nodes=nodes)
    env = simpy.Environment()
    return env, Network(env, [NodeLinks() for _ in range(nodes)], costs), costs


def arrivals(env: simpy.Environment, sends: dict[str, simpy.Event]) -> dict[str, float]:
    seen: dict[str, float] = {}

    def wait(name: str, event: simpy.Event) -> Generator[simpy.Event, None, None]:
        yield event
        seen[name] = env.now

    for name, event in sends.items():
        env.process(wait(name, event))
    env.run()
    return seen


def test_two_transfers_share_a_nic() -> None:
    env, net, _ = network()
    bytes_s = 100_000 * 57_344 / 40e9
    sends = {
        "first": net.send(0, 1, 100_000, 8),
        "to 2": net.send(0, 2, 100_000, 8),
        "to 1": net.send(0, 1, 100_000, 8),
    }
    expected = {"first": bytes_s + 0.01, "to 2": 2 * bytes_s + 0.01, "to 1": 3 * bytes_s + 0.01}
    assert arrivals(env, sends) == approx(expected)


def test_transfers_between_other_nodes_and_in_the_other_direction_go_on_meanwhile() -> None:
    env, net, costs = network(4)
    one_s = costs.transfer_s(100_000, 8, same_node=False)
    sends = {
        "0 to 1": net.send(0, 1, 100_000, 8),
        "2 to 3": net.send(2, 3, 100_000, 8),
        "1 to 0": net.send(1, 0, 100_000, 8),
    }
    assert arrivals(env, sends) == approx(dict.fromkeys(sends, one_s))


def test_a_receiver_is_shared_as_well() -> None:
    env, net, _ = network()
    bytes_s = 100_000 * 57_344 / 40e9
    sends = {"0 to 2": net.send(0, 2, 100_000, 8), "1 to 2": net.send(1, 2, 100_000, 8)}
    assert arrivals(env, sends) == approx({"0 to 2": bytes_s + 0.01, "1 to 2": 2 * bytes_s + 0.01})


def test_within_a_node_no_nic_is_needed() -> None:
    env, net, costs = network()
    sends = {"between": net.send(0, 1, 100_000, 8), "within": net.send(0, 0, 100_000, 8)}
    assert arrivals(env, sends)["within"] == approx(costs.transfer_s(100_000, 8, same_node=True))


def test_small_functions_hold_up_a_nic_for_longer() -> None:
    env, net, _ = network()
    size = 100_000 * 57_344
    sends = {
        "one GPU": net.send(0, 1, 100_000, 1),
        "eight": net.send(0, 2, 100_000, 8),
        "inside": net.send(0, 0, 100_000, 2),
    }
    expected = {"one GPU": size / 10e9 + 0.01, "eight": size / 10e9 + size / 40e9 + 0.01, "inside": size / 40e9 + 0.01}
    assert arrivals(env, sends) == approx(expected)


# --- the pool ---


def pool(nodes: int = 2) -> GpuPool:
    costs = costs_of(nodes=nodes)
    return GpuPool(simpy.Environment(), nodes, costs.node.gpus)


def test_all_gpus_of_a_lease_are_on_one_node() -> None:
    gpus = pool()
    assert gpus.lease(6, None).value == (0, (0, 1, 2, 3, 4, 5))
    assert gpus.lease(4, None).value == (1, (0, 1, 2, 3))
    assert not gpus.lease(5, None).triggered  # 2 + 4 are free, on two nodes


def test_a_large_lease_is_not_overtaken_for_ever_by_small_ones() -> None:
    gpus = pool()
    gpus.lease(6, 0), gpus.lease(6, 1)
    large = gpus.lease(4, None)
    small = gpus.lease(2, None)
    assert not small.triggered  # 2 + 2 are free, but the large one came first
    gpus.give_back(1, (0, 1))
    assert large.value == (1, (0, 1, 6, 7))
    assert small.value == (0, (6, 7))


def test_leases_are_granted_in_order() -> None:
    gpus = pool(1)
    gpus.lease(8, None)
    waiting = [gpus.lease(2, None) for _ in range(3)]
    for count, freed in enumerate(((0, 1), (2, 3), (4, 5)), start=1):
        gpus.give_back(0, freed)
        assert [lease.triggered for lease in waiting] == [True] * count + [False] * (3 - count)
        assert waiting[count - 1].value == (0, freed)


def test_who_waits_for_a_certain_node_does_not_hold_up_the_others() -> None:
    gpus = pool()
    gpus.lease(8, 0)
    patient = gpus.lease(1, 0)
    assert gpus.lease(1, None).value == (1, (0,))
    assert gpus.lease(1, 1).value == (1, (1,))
    assert not patient.triggered
    gpus.give_back(0, (3,))
    assert patient.value == (0, (3,))


def test_gpus_are_given_back_once() -> None:
    gpus = pool()
    gpus.lease(2, 0)
    gpus.give_back(0, (0, 1))
    with pytest.raises(AssertionError, match="given back twice"):
        gpus.give_back(0, (0,))
