"""Cold starts phase by phase, what is cached on a node, and processes that are kept alive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import simpy
from clusters import make_backend, make_costs, make_job

from simrl.experiments.config import load_config
from simrl.experiments.run import run
from simrl.policies.contract import (
    Assign,
    At,
    Decision,
    FunctionIdle,
    InvalidDecision,
    Learn,
    Observation,
    Park,
    Prepare,
    Release,
    Role,
    StageFinished,
    Start,
    Subscribe,
    Sync,
)
from simrl.simulator.backend import SimulatedBackend
from simrl.simulator.keep_alive import KeepAlive, Kept
from simrl.traces.job import Cluster
from simrl.traces.records import Recorder
from simrl.traces.summary import Price, summarise

COLOCATED: tuple[Role, ...] = ("decode", "prepare", "learn")
STEPS = [[[1]], [[1]]]
ROUND = {
    "start": {
        "spread": 0.0, "pull_spread": 0.0, "image_bytes": 600.0, "image_bytes_per_s": 20.0, "runtime_s": 10.0,
        "download_bytes_per_s": 1e9, "load_bytes_per_s": 1e9, "init_s": 7.0, "compile_s": 5.0, "capture_s": 3.0,
        "warm_up_s": 2.0,
    },
    "switch": {"engine_sleep_s": 1.5, "engine_wake_s": 4.0},
}  # fmt: skip
LOAD_S = 2 * 494_032_768 / 1e9  # weights of qwen2.5-0.5b at 1e9 B/s, over the network or onto one GPU

Script = Mapping[str, Sequence[Decision]]


def backend_of(nodes: int = 1, parameters: Mapping[str, Any] | None = None, **options: Any) -> SimulatedBackend:
    table = {**ROUND, **(parameters or {})}
    backend, _ = make_backend(make_costs(make_job(STEPS), nodes=nodes, parameters=table), STEPS)
    backend.options = Cluster(**options)
    return backend


def told(backend: SimulatedBackend, script: Script, until_s: float = 1e3) -> dict[str, float]:
    """When functions were idle for the first time after what; *script* has decisions for these and for "at 3"."""
    lines, observation = dict(script), backend.reset()
    times = [float(name.split()[1]) for name in script if name.startswith("at ")]
    decisions: list[Decision] = [Subscribe(FunctionIdle()), *(Subscribe(At(time_s)) for time_s in [*times, until_s])]
    decisions += lines.pop("begin", ())
    happened: dict[str, float] = {}
    while observation.time_s < until_s:
        seen = backend.advance(decisions)
        assert seen is not None
        observation, decisions = seen, []
        for event in observation.events:
            name = f"at {event.time_s:g}" if isinstance(event, At) else ""
            if isinstance(event, FunctionIdle):
                name = f"{event.function} {event.after}"
            happened.setdefault(name, observation.time_s)
            decisions += lines.pop(name, ())
    return happened


# --- phases ---


def test_a_cold_start_goes_through_its_phases() -> None:
    starts = {"begin": [Start("a", 1, ("decode",)), Start("b", 2, ("decode",)), Start("p", 1, ("prepare",))]}
    happened = told(backend_of(), starts)
    engine_s = 10 + LOAD_S + LOAD_S + 7 + 5 + 3 + 2
    expected = {"a started": engine_s, "b started": engine_s - LOAD_S / 2, "p started": 10 + 2 * LOAD_S + 7}
    assert {name: happened[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_image_and_weights_are_pulled_once_a_node() -> None:
    script: Script = {
        "begin": [Start("a", 1, ("prepare",), 0)],
        "at 13": [Start("b", 1, ("prepare",), 0), Start("c", 1, ("prepare",), 1)],
        "a started": [Start("d", 1, ("prepare",), 0)],
    }
    happened = told(backend_of(2, images_cached=False), script)
    first_s = 30 + 10 + LOAD_S + LOAD_S + 7
    expected = {
        "a started": first_s,
        "b started": first_s,  # waits for the image until 30 s, then for the weights with a
        "c started": 13 + first_s,
        "d started": first_s + 10 + LOAD_S + 7,
    }
    assert {name: happened[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_nodes_share_the_store_that_they_pull_from() -> None:
    store = {"network": {"store_bytes_per_s": 20.0}}  # what one node could take alone
    script: Script = {"begin": [Start("a", 1, ("prepare",), 0), Start("b", 1, ("prepare",), 1)]}
    weights = 2 * 494_032_768 / 20.0 * 2
    happened = told(backend_of(2, store, images_cached=False), script, until_s=2e8)
    assert happened["a started"] == pytest.approx(60 + 10 + weights + LOAD_S + 7, rel=1e-9)


def test_each_phase_varies_around_its_mean() -> None:
    """One seed is one draw for each function, whatever the others do."""
    spread = {"start": {**ROUND["start"], "spread": 0.2, "pull_spread": 0.4, "download_bytes_per_s": 1e7}}
    script: Script = {"begin": [Start(f"f{n}", 1, ("prepare",)) for n in range(8)]}
    runs = []
    for seed in range(40):
        backend = backend_of(parameters=spread)
        backend.seed = seed
        runs.append(list(told(backend, script).values())[:8])
    repeated = backend_of(parameters=spread)
    repeated.seed = 39
    assert list(told(repeated, script).values())[:8] == runs[-1]
    # All wait for one pull of 98.8 s; then weights and init vary by 20 %: a spread of all, and one among the 8.
    means = np.array(runs).mean(axis=1)
    assert means.mean() == pytest.approx(10 + 98.8 + LOAD_S + 7, rel=0.15)
    assert 0.2 < np.log(means).std() < 0.5
    assert 0.3 < np.array([np.std(run) for run in runs]).mean() < 3


# --- keep-alive ---


def test_a_kept_process_is_woken_by_a_start_of_its_kind() -> None:
    script: Script = {
        "begin": [Start("a", 2, ("decode", "prepare"), 1)],
        "at 100": [Release("a")],
        "at 150": [Start("b", 2, ("prepare", "decode"))],  # where the process is, not on the first node
        "b started": [Start("c", 2, ("prepare", "decode"))],
    }
    backend = backend_of(2, keep_alive_s=60.0)
    happened = told(backend, script)
    assert happened["b started"] == pytest.approx(154.0)  # 4 s to wake; the small weights take less
    assert backend.functions["b"].node == 1
    assert happened["c started"] > 154 + 20  # there was one
    rows = _rows(backend)
    assert rows[("a", "cold", 100.0)] == pytest.approx(101.5)  # to host memory, still on its GPUs
    assert rows[("a (kept for b)", "parked", 101.5)] == pytest.approx(150.0)


@pytest.mark.parametrize(
    ("late", "other"),
    [
        (161.6, Start("b", 2, ("decode",))),  # 60 s after 101.5
        (150.0, Start("b", 1, ("decode",))),
        (150.0, Start("b", 2, ("decode", "prepare"))),
        (150.0, Start("b", 2, ("decode",), 0)),
    ],
)
def test_others_start_cold(late: float, other: Start) -> None:
    script: Script = {"begin": [Start("a", 2, ("decode",), 1)], "at 100": [Release("a")], f"at {late:g}": [other]}
    backend = backend_of(2, keep_alive_s=60.0)
    assert told(backend, script)["b started"] > late + 20
    backend.keep_alive.close()
    assert _rows(backend)[("a (kept)", "parked", 101.5)] == pytest.approx(161.5)


def test_nothing_is_kept_by_default_nor_of_learners() -> None:
    engine: Script = {
        "begin": [Start("a", 2, ("decode",))],
        "at 100": [Release("a")],
        "at 120": [Start("b", 2, ("decode",))],
    }
    assert told(backend_of(), engine)["b started"] > 140
    learner: Script = {
        "begin": [Start("a", 2, COLOCATED)],
        "at 100": [Release("a")],
        "at 120": [Start("b", 2, COLOCATED)],
    }
    assert told(backend_of(keep_alive_s=1e3), learner)["b started"] > 135


def test_a_parked_function_is_kept_when_it_is_released() -> None:
    script: Script = {
        "begin": [Start("a", 8, ("decode",))],
        "a started": [Park("a")],
        "at 100": [Release("a"), Start("b", 8, ("decode",))],
    }
    backend = backend_of(keep_alive_s=1e3)
    assert told(backend, script)["b started"] == pytest.approx(104.0)


def test_parked_functions_have_the_host_memory_first() -> None:
    size = 2 * 494_032_768
    memory = {"node": {"g6e.48xlarge": {"host_memory_bytes": 2.5 * size}}}
    script: Script = {
        "begin": [Start(name, 1, ("decode",)) for name in "abc"],
        "at 100": [Release("a")],
        "at 110": [Release("b")],
        "at 120": [Park("c")],  # room for one of the two
        "at 130": [Start("d", 1, ("decode",)), Start("e", 1, ("decode",))],
    }
    backend = backend_of(parameters=memory, keep_alive_s=1e3)
    happened = told(backend, script)
    assert happened["d started"] == pytest.approx(134.0)
    assert happened["e started"] > 150
    rows = _rows(backend)
    assert rows[("a (kept)", "parked", 101.5)] == pytest.approx(120.0)  # the older one
    assert rows[("b (kept for d)", "parked", 111.5)] == pytest.approx(130.0)
    more: list[Decision] = [Start("f", 2, ("decode",), 0), Start("g", 1, ("decode",), 0), Park("f"), Park("g")]
    with pytest.raises(InvalidDecision, match="host memory"):
        told(backend, {**script, "at 125": more})


def test_what_does_not_fit_is_not_kept() -> None:
    keep = KeepAlive(simpy.Environment(), 60.0, Recorder())
    kept = [Kept(name, 0, 1, frozenset({"decode"}), 10.0, 0.0) for name in "abc"]
    keep.keep(kept[0], 25.0)
    keep.keep(kept[1], 25.0)
    keep.keep(kept[2], 9.0)
    assert keep.nodes(1, ("decode",)) == {0}
    keep.keep(kept[2], 25.0)  # the oldest makes room
    assert [keep.take("z", 0, 1, ("decode",)) for _ in range(3)] == [True, True, False]
    keep.keep(kept[0], 25.0)
    keep.make_room(0, -5.0)
    assert not keep.take("z", 0, 1, ("decode",))


def test_kept_processes_end_with_the_run_and_need_a_sync() -> None:
    """A start has version 0, whether a process was kept or not."""
    steps = [[[1]], [[1]]]
    quick = {**ROUND, "switch": {"engine_sleep_s": 1e-4}}  # before the run is over
    backend, recorder = make_backend(make_costs(make_job(steps), parameters=quick), steps)
    backend.options = Cluster(keep_alive_s=1e6)
    observation: Observation | None = backend.reset()
    script: dict[str, list[Decision]] = {
        "a started": [Start("d", 1, ("decode",)), Assign("d", (0,))],
        "generation 0": [Release("d"), Prepare(("a",), (0,))],
        "preparation 0": [Learn(("a",))],
        "learning 0": [Start("e", 1, ("decode",)), Sync(("e",)), Assign("e", (1,))],
        "generation 1": [Release("e"), Prepare(("a",), (1,))],
        "preparation 1": [Learn(("a",))],
    }
    stages = [Subscribe(StageFinished(stage)) for stage in ("generation", "preparation", "learning")]
    decisions: list[Decision] = [Start("a", 1, COLOCATED), Subscribe(FunctionIdle()), *stages]
    while observation is not None:
        observation = backend.advance(decisions)
        decisions = []
        for event in observation.events if observation is not None else ():
            name = f"{event.stage} {event.step}" if isinstance(event, StageFinished) else ""
            name = f"{event.function} {event.after}" if isinstance(event, FunctionIdle) else name
            decisions += script.pop(name, [])
    assert not script
    frames = recorder.frames()
    assert frames.samples.weights_version.tolist() == [0, 1]
    kept = frames.workers[frames.workers.function.str.contains("(kept", regex=False)]
    assert kept.function.tolist() == ["d (kept for e)", "e (kept)"]
    assert kept.end_s.tolist() == [frames.workers.query("function == 'e'").start_s.min(), frames.phases.end_s.max()]
    price = Price(1.0, "gpu", 0.0)
    summary = summarise(frames, policy="p", seed=0, nodes=1, gpus=8, price=price, policy_wall_s=0.0, wall_s=0.0)
    assert summary["cold_starts"] == 2, "a and d; e went on with what was kept of d"


def test_rlhfless_syncs_as_told_to_actors_that_do_not_learn_and_keeps_nothing_as_it_parks() -> None:
    small = ("job.prompts_per_step=8", "job.dataset_prompts=16", "policy.learner_gpus=8", "policy.scale_actors=false")

    def summary(*sets: str) -> dict[str, Any]:
        found = run(load_config(policy="rlhfless", nodes=2, steps=2, sets=[*small, *sets])).summary
        return {name: value for name, value in found.items() if "wall" not in name}

    plain = summary()
    assert summary("cluster.keep_alive_s=1e4") == plain
    assert summary("cluster.weight_sync=object-store")["weight_sync_s"] > 1.5 * plain["weight_sync_s"]


def _rows(backend: SimulatedBackend) -> dict[tuple[str, str, float], float]:
    """Ends of all intervals, by function, state and start."""
    workers: pd.DataFrame = backend.recorder.frames().workers
    return {(row.function, row.state, round(row.start_s, 6)): row.end_s for row in workers.itertuples()}
