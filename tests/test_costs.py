"""The cost model, against arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
from clusters import ROUND, make_costs, make_job

from simrl.simulator.costs import Costs
from simrl.traces.job import Engine, Job


def costs_of(model: str = "qwen2.5-7b", nodes: int = 1, engine: Engine | None = None, **job: Any) -> Costs:
    return make_costs(Job(model=model, **job), nodes=nodes, engine=engine, parameters=ROUND)


def approx(value: float | dict[str, float]) -> Any:
    return pytest.approx(value, rel=1e-12)


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


# --- options of the engine ---


def test_fp8_kv_takes_half_the_memory_and_is_marked_as_assumed() -> None:
    job = make_job([[[8]]])
    plain, fp8 = make_costs(job), make_costs(job, engine=Engine(tensor_parallel=1, kv_cache_dtype="fp8"))
    assert fp8.memory.kv_token_bytes == plain.memory.kv_token_bytes / 2
    assert fp8.memory.kv_blocks(1, None) == pytest.approx(2 * plain.memory.kv_blocks(1, None), abs=1)
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
