"""What moves and how long it takes alone, and the phases of a start, against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
from clusters import ROUND, estimates, make_costs, switch_s

from simrl.simulator.costs import Costs
from simrl.traces.job import Engine, Job

PARAMETERS_7B = 7_615_616_512  # Qwen2.5-7B, as counted in test_models.py
WEIGHTS_7B = 2 * PARAMETERS_7B


def costs_of(model: str = "qwen2.5-7b", nodes: int = 1, engine: Engine | None = None, **job: Any) -> Costs:
    return make_costs(Job(model=model, **job), nodes=nodes, engine=engine, parameters=ROUND)


def approx(value: float | dict[str, float]) -> Any:
    return pytest.approx(value, rel=1e-12)


def test_a_sync_takes_the_slower_of_link_and_network() -> None:
    assert estimates(costs_of()).sync_s(2) == approx(1 + WEIGHTS_7B / 2 / 20e9)
    # Of two nodes each holds half, of four a quarter; what the others hold comes at 25e9 B/s, not the NIC's 40e9.
    assert estimates(costs_of(nodes=2)).sync_s(1) == approx(1 + WEIGHTS_7B / 20e9)
    assert estimates(costs_of(nodes=2)).sync_s(4) == approx(1 + WEIGHTS_7B / 2 / 25e9)
    assert estimates(costs_of(nodes=4)).sync_s(4) == approx(1 + 0.75 * WEIGHTS_7B / 25e9)


def test_a_sync_is_no_faster_than_a_slow_nic() -> None:
    slow = {**ROUND, "network": {"efficiency": 0.2, "latency_s": 0.01}}  # 10e9 B/s
    assert estimates(make_costs(Job(), nodes=2, parameters=slow)).sync_s(2) == approx(1 + WEIGHTS_7B / 2 / 10e9)
    assert estimates(make_costs(Job(), nodes=1, parameters=slow)).sync_s(2) == approx(1 + WEIGHTS_7B / 2 / 20e9)


def test_under_lora_only_adapters_are_synced() -> None:
    whole, lora = costs_of(), costs_of(lora_rank=8)
    loads = [costs.movement.sync_load("nccl", 8, rebuilt=False, crossing=1.0) for costs in (whole, lora)]
    assert loads[0].size_bytes == WEIGHTS_7B
    assert loads[1].size_bytes == lora.memory.synced_bytes < WEIGHTS_7B / 50


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_within_a_node_kv_goes_over_the_links_of_all_gpus(gpus: int) -> None:
    assert estimates(costs_of()).transfer_s(1000, gpus, same_node=True) == approx(0.01 + 1000 * 57_344 / (gpus * 20e9))


@pytest.mark.parametrize(("gpus", "rate"), [(1, 10e9), (2, 20e9), (4, 40e9), (8, 40e9)])
def test_between_nodes_kv_goes_over_the_host_links_of_all_gpus_up_to_the_nic(gpus: int, rate: float) -> None:
    assert estimates(costs_of()).transfer_s(1000, gpus, same_node=False) == approx(0.01 + 1000 * 57_344 / rate)


def test_parking_moves_the_learners_state_and_waking_the_weights_too() -> None:
    state = 12 * PARAMETERS_7B / 8
    costs = costs_of()
    assert estimates(costs).park_s(2, ("decode",)) == 1.5
    assert estimates(costs, 8).park_s(2, ("decode", "learn")) == approx(1.5 + state / 10e9)
    assert estimates(costs).wake_s(2, ("decode",)) == approx(
        WEIGHTS_7B / 2 / 10e9
    )  # .76 s, more than the .5 s of small ones
    assert estimates(costs).wake_s(8, ("decode",)) == 0.5  # .19 s would do for the weights
    assert estimates(costs, 8).wake_s(2, ("decode", "learn")) == approx((WEIGHTS_7B / 2 + state) / 10e9)
    assert estimates(costs, 8).wake_s(8, ("decode", "learn")) == approx(0.5 + state / 10e9)
    assert estimates(costs, 8).wake_s(2, ("learn",)) == approx(0.5 + state / 10e9)


def test_offloaded_state_is_in_the_host_already() -> None:
    costs = costs_of(learner_offload=True)
    assert estimates(costs, 8).park_s(2, ("decode", "learn")) == 1.5
    assert estimates(costs, 8).wake_s(2, ("decode", "learn")) == approx(WEIGHTS_7B / 2 / 10e9)


def test_only_changing_between_engine_and_trainer_takes_time() -> None:
    costs = costs_of()
    assert switch_s(costs, "prefill", "decode", 8) == switch_s(costs, "prepare", "learn", 8) == 0
    assert switch_s(costs, "decode", "prepare", 8) == 1.5
    assert switch_s(costs, "learn", "decode", 8) == 0.5
    offload_s = 12 * PARAMETERS_7B / 8 / 10e9
    assert switch_s(costs_of(learner_offload=True), "decode", "prepare", 8) == approx(1.5 + offload_s)


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_offloaded_state_moves_for_each_gpu(gpus: int) -> None:
    switch = costs_of(learner_offload=True).movement.switch_load("decode", "learn", gpus, 8)
    assert switch.size_bytes == approx(gpus * 12 * PARAMETERS_7B / 8)


# --- starts ---


def test_a_start_compiles_only_with_cuda_graphs() -> None:
    own = {"runtime_s": 30, "init_s": 60, "warm_up_s": 5, "compile_s": 50, "capture_s": 40}
    table = {**ROUND, "start": {**own, "download_bytes_per_s": 250e6, "load_bytes_per_s": 500e6}}
    graphs, eager = (
        make_costs(Job(), engine=Engine(preset=preset), parameters=table)
        for preset in ("vllm-current", "vllm-0.8-eager")
    )
    always = {"runtime": 30.0, "download": WEIGHTS_7B / 250e6, "weights": WEIGHTS_7B / 2 / 500e6, "init": 60.0}
    engine = {**always, "warm_up": 5.0}
    assert graphs.movement.start_phases(2, ("decode",), cached=False) == approx(
        {**engine, "compile": 50.0, "capture": 40.0}
    )
    assert list(graphs.movement.start_phases(2, ("decode",), cached=False))[-3:] == ["compile", "capture", "warm_up"]
    assert eager.movement.start_phases(2, ("decode",), cached=False) == approx(engine)
    assert graphs.movement.start_phases(2, ("learn",), cached=True) == approx({**always, "download": 0.0})


def test_the_shipped_phases_are_those_of_the_measured_start() -> None:
    """Llama-3.1-8B on an L40S, Tensorfuse blog: 294 s, of which the download takes 61 and the weights 33."""
    phases = make_costs(Job(model="llama-3.1-8b")).movement.start_phases(1, ("decode",), cached=False)
    assert sum(phases.values()) == pytest.approx(294, rel=0.01)
    assert (phases["download"], phases["weights"]) == pytest.approx((61, 33), rel=0.01)
    assert phases["runtime"] + phases["init"] + phases["warm_up"] == pytest.approx(94)
