"""Faults: nothing is lost silently, every policy meets the same ones, and none by default."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import pytest
from clusters import EXACT_STARTS, make_backend, make_costs, make_job
from conformance import check_leases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simrl.experiments.config import Config, ConfigError, load_config
from simrl.experiments.run import Result, run, simulate
from simrl.policies.contract import (
    Assign,
    At,
    Decision,
    FunctionIdle,
    FunctionLost,
    InvalidDecision,
    Learn,
    NodeReclaimed,
    NodeReturned,
    Observation,
    Policy,
    PolicyStalled,
    Prepare,
    Role,
    StageFinished,
    Start,
    Subscribe,
    Sync,
    drive,
)
from simrl.policies.rlhfless import RLHFless
from simrl.policies.rlhfuse import RLHFuse
from simrl.policies.runtime.function import ClusterFunction
from simrl.policies.verl import Verl
from simrl.simulator.backend import SimulatedBackend
from simrl.simulator.faults import Fault, FaultInjector, FaultPlan, SlowTimes
from simrl.traces.job import Engine, Faults, ScriptedFault
from simrl.traces.parameters import Parameters
from simrl.traces.records import Recorder

POLICIES = ("verl", "rlhfuse", "rlhfless")
EVERYTHING: tuple[Role, ...] = ("prefill", "decode", "prepare", "learn")
LATER: Mapping[str, Any] = {"time_s": 1e9, "kind": "node", "node": 0}


def config(policy: str = "verl", faults: Mapping[str, Any] | None = None, steps: int = 4, **values: Any) -> Config:
    """The default preset, smaller, with short starts."""
    small = {"job.prompts_per_step": 256, "job.dataset_prompts": 512, "job.steps": steps, "job.model": "qwen2.5-3b"}
    starts = {"cluster.parameters.start.init_s": 5.0, "cluster.parameters.start.compile_s": 1.0}
    given = {f"faults.{name}": value for name, value in (faults or {}).items()}
    return load_config(policy=policy, nodes=2).with_values({**small, **starts, **given, **values})


def middle_of_generation(result: Result, step: int) -> float:
    phases = result.frames.phases.set_index(["stage", "step"])
    begin_s, end_s = phases.loc[("generation", step), ["start_s", "end_s"]]
    return float(begin_s + end_s) / 2


def accounted(result: Result) -> tuple[list[int], list[int]]:
    """Ids of the responses, each once, and their lengths."""
    samples = result.frames.samples.sort_values("response_id")
    for column in ("finished_s", "prepared_s"):
        assert samples[column].notna().all()
    return samples["response_id"].tolist(), samples["response_tokens"].tolist()


def losses(result: Result) -> pd.DataFrame:
    workers = result.frames.workers
    return workers[workers["state"] == "lost"]


# --- a node lost in mid-generation ---


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("node", [0, 1])
def test_a_job_goes_on_without_a_node_and_takes_it_back(policy: str, node: int) -> None:
    whole = run(config(policy))
    at = [{"time_s": middle_of_generation(whole, 1), "kind": "node", "node": node}]
    broken = run(config(policy, {"at": at, "repair_s": 60.0}))
    assert accounted(broken) == accounted(whole)
    assert accounted(whole)[0] == list(range(4 * 256 * 4))
    assert broken.summary["simulated_s"] > whole.summary["simulated_s"]
    assert broken.summary["step_s"]["mean"] > whole.summary["step_s"]["mean"]
    assert broken.summary["cost_usd"] > whole.summary["cost_usd"]
    assert broken.summary["cold_starts"] == whole.summary["cold_starts"] + 4
    assert (broken.summary["lost_functions"], broken.summary["lost_nodes"]) == (4, 1)
    after = broken.frames.workers[broken.frames.workers["start_s"] > at[0]["time_s"] + 60]
    assert node in set(after["node"]), "it is used again"


@pytest.mark.parametrize("policy", POLICIES)
def test_a_job_ends_on_the_nodes_that_are_left(policy: str) -> None:
    whole = run(config(policy))
    lost_s = middle_of_generation(whole, 1)
    broken = run(config(policy, {"at": [{"time_s": lost_s, "kind": "node", "node": 1}], "repair": False}))
    assert accounted(broken) == accounted(whole)
    assert broken.summary["simulated_s"] > whole.summary["simulated_s"]
    after = broken.frames.workers[broken.frames.workers["end_s"] > lost_s]
    assert set(after[after["state"] != "lost"]["node"]) == {0}
    (absence,) = after[after["function"] == ""].itertuples()
    assert (absence.node, absence.start_s) == (1, pytest.approx(lost_s))
    assert absence.end_s == broken.frames.workers["end_s"].max()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_job_waits_for_its_only_node(policy: str) -> None:
    one = {"cluster.nodes": 1, "job.model": "qwen2.5-1.5b"}
    whole = run(config(policy, **one))
    at = [{"time_s": middle_of_generation(whole, 1), "kind": "node", "node": 0}]
    broken = run(config(policy, {"at": at, "repair_s": 500.0}, **one))
    assert accounted(broken) == accounted(whole)
    assert broken.summary["simulated_s"] > whole.summary["simulated_s"] + 500
    with pytest.raises(PolicyStalled, match=r"4 waiting for GPUs; lost nodes: 0"):
        run(config(policy, {"at": at, "repair": False}, **one))


@pytest.mark.parametrize("policy", POLICIES)
def test_both_nodes_may_be_lost_and_only_one_return(policy: str) -> None:
    whole = run(config(policy))
    lost_s = middle_of_generation(whole, 1)
    at = [{"time_s": lost_s + delay_s, "kind": "node", "node": node} for node, delay_s in ((0, 0.0), (1, 1.0))]
    assert accounted(run(config(policy, {"at": at, "repair_s": 100.0}))) == accounted(whole)


# --- other kinds ---


@pytest.mark.parametrize("policy", POLICIES)
def test_random_faults_leave_every_response_and_repeat_with_the_seed(policy: str) -> None:
    faults = {"worker_mtbf_s": 1500.0, "node_mtbf_s": 400.0, "spot_mtbf_s": 500.0, "repair_s": 60.0}
    first, again = (run(config(policy, faults, 8)) for _ in range(2))
    assert accounted(first) == accounted(run(config(policy, None, 8)))
    assert first.summary["lost_functions"] > 0 < first.summary["lost_nodes"]
    for one, other in zip(first.frames.by_name().values(), again.frames.by_name().values(), strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_every_policy_meets_the_same_faults() -> None:
    results = [run(config(policy, {"node_mtbf_s": 300.0, "repair_s": 60.0})) for policy in POLICIES]
    shortest_s = min(result.summary["simulated_s"] for result in results)
    times = []
    for result in results:
        absences = losses(result)[losses(result)["function"] == ""]
        times.append([row for row in zip(absences["node"], absences["start_s"], strict=True) if row[1] < shortest_s])
    assert len(times[0]) > 1
    assert [sorted(rows) for rows in times] == [sorted(times[0])] * 3


@pytest.mark.parametrize("policy", POLICIES)
def test_the_policy_hears_of_a_reclaim_before_the_loss_and_starts_nothing_there(policy: str) -> None:
    whole = run(config(policy))
    told_s = middle_of_generation(whole, 1)
    # A worker dies after the notice: its replacement has to wait for another machine.
    at = [
        {"time_s": told_s, "kind": "spot", "node": 1},
        {"time_s": told_s + 1, "kind": "worker", "function": "worker-1-0"},
    ]
    simulation = simulate(config(policy, {"at": at, "spot_notice_s": 5.0, "repair_s": 60.0}))
    heard, starts = follow(simulation.backend, policy)
    assert [(time_s, event) for time_s, event in heard if isinstance(event, NodeReclaimed)] == [
        (pytest.approx(told_s), NodeReclaimed(1, pytest.approx(told_s + 5)))
    ]
    assert [time_s for time_s, event in heard if isinstance(event, NodeReturned)] == [pytest.approx(told_s + 65)]
    lost_s = [time_s for time_s, event in heard if isinstance(event, FunctionLost)]
    assert lost_s == [pytest.approx(told_s + delay_s) for delay_s in (1, 5, 5, 5)]
    assert [time_s for time_s, start in starts if time_s > told_s] == [pytest.approx(told_s + 65)] * 4


def follow(backend: SimulatedBackend, name: str) -> tuple[list[tuple[float, object]], list[tuple[float, Start]]]:
    """Drive a policy; what it heard, and what it started, with times."""
    from simrl.policies.registry import build_policy, load_policy_class

    policy, heard, starts = build_policy(load_policy_class(name), {}, None), [], []
    observation: Observation | None = backend.reset()
    while observation is not None:
        now = observation.time_s
        heard += [(now, event) for event in observation.events]
        decisions = policy.decide(observation)
        starts += [(now, decision) for decision in decisions if isinstance(decision, Start)]
        observation = backend.advance(decisions)
    return heard, starts


def test_a_slow_node_takes_longer_and_sets_the_pace_of_learning() -> None:
    plain = run(config())
    slow = run(config(faults={"slow_node_fraction": 0.5, "slow_factor": 2.0}))
    assert accounted(slow) == accounted(plain)
    assert slow.summary["learning_s"] == pytest.approx(2 * plain.summary["learning_s"])
    seconds = {}
    for name, result in (("plain", plain), ("slow", slow)):
        workers = result.frames.workers
        rows = workers[(workers["stage"] == "preparation") & (workers["state"] == "busy")]
        seconds[name] = (rows["end_s"] - rows["start_s"]).groupby(rows["node"]).sum()
    ratios = sorted(round(float(ratio), 6) for ratio in seconds["slow"] / seconds["plain"])
    assert ratios == [1.0, 2.0]


def test_an_engine_on_a_slow_node_jumps_to_the_same_places() -> None:
    times = simulate(config()).costs.times(2)
    slow = SlowTimes(times, 1.7)
    assert slow.decode_span_s(8, 300, 50) == pytest.approx(1.7 * times.decode_span_s(8, 300, 50), rel=1e-12)
    for iterations in (1, 2, 17, 400):
        assert slow.iterations_until(8, 300, slow.decode_span_s(8, 300, iterations)) == iterations
    pairs = [
        (slow.decode_s(8, 300), times.decode_s(8, 300)),
        (slow.prefill_s(512, 40), times.prefill_s(512, 40)),
        (slow.iteration_s(512, 40, 8, 300), times.iteration_s(512, 40, 8, 300)),
    ]
    assert [slower / faster for slower, faster in pairs] == [pytest.approx(1.7)] * 3


STARTS = {"init_s": 0.02, "compile_s": 0.01, "capture_s": 0.01, "load_bytes_per_s": 1e11, "download_bytes_per_s": 1e11}
MAKE: Mapping[str, Callable[[], Policy]] = {
    "verl": Verl, "rlhfuse": RLHFuse, "rlhfless": RLHFless,
    "rlhfless with decoders": lambda: RLHFless(RLHFless.Params(learner_gpus=8)),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKE)
def test_a_job_ends_whatever_breaks(name: str) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**31))
    def check(seed: int) -> None:
        draw = random.Random(seed)
        steps = [[[draw.randint(1, 64) for _ in range(3)] for _ in range(draw.randint(2, 9))]] * draw.randint(1, 3)
        nodes = draw.randint(1 + ("decoders" in name), 3)
        engine = Engine(tensor_parallel=draw.choice((2, 4)))
        costs = make_costs(make_job(steps), nodes=nodes, engine=engine, parameters={"start": STARTS})
        plain, recorder = make_backend(costs, steps, seed=seed)
        drive(plain, MAKE[name]())
        at = some_faults(draw, recorder.frames().workers, nodes)
        plan = FaultPlan(
            at=at, spot_notice_s=0.3, repair_s=draw.choice((0.05, 5.0)), slow_nodes=draw.randint(0, nodes),
            slow_factor=1.5,
        )  # fmt: skip
        broken = SimulatedBackend(costs, plain._work, Recorder(), seed, faults=plan)
        drive(broken, MAKE[name]())
        frames = broken.recorder.frames()
        samples = frames.samples.sort_values("response_id")
        wanted = [length for step in steps for row in step for length in row]
        assert samples.response_id.tolist() == list(range(len(wanted)))
        assert samples.response_tokens.tolist() == wanted
        lost = frames.workers[frames.workers.state == "lost"]
        check_leases(dataclasses.replace(frames, workers=frames.workers.drop(lost.index)))
        check_nothing_runs_on_lost_nodes(frames.workers)
        seen.update(lost_functions=(lost.function != "").sum(), lost_nodes=(lost.function == "").sum())

    check()
    assert seen["lost_functions"] > seen["lost_nodes"] > 50


def some_faults(draw: random.Random, workers: pd.DataFrame, nodes: int) -> tuple[Fault, ...]:
    """While functions are at something; some at one moment."""
    faults = []
    for _ in range(draw.randint(1, 4)):
        row = workers.iloc[draw.randrange(len(workers))]
        time_s = draw.choice((draw.uniform(row.start_s, row.end_s), row.end_s))
        place: dict[str, Any] = {"kind": "worker", "function": row.function}
        if draw.random() < 0.7:
            place = {"kind": draw.choice(("node", "spot")), "node": draw.randrange(nodes)}
        faults.append(Fault(time_s, **place))
    return tuple(faults)


def check_nothing_runs_on_lost_nodes(workers: pd.DataFrame) -> None:
    absences = workers[workers.function == ""]
    held = workers[workers.state != "lost"]
    for absence in absences.itertuples():
        there = held[held.node == absence.node]
        assert not ((there.start_s < absence.end_s - 1e-9) & (there.end_s > absence.start_s + 1e-9)).any()


# --- off by default ---


def test_no_fault_is_asked_for_and_none_happens() -> None:
    result = run(config())
    assert not [p.key for p in result.parameters if p.key.startswith("faults.")]
    assert (result.summary["lost_functions"], result.summary["lost_nodes"]) == (0, 0)
    assert losses(result).empty


def test_a_fault_that_never_comes_changes_nothing() -> None:
    for policy in POLICIES:
        plain, waiting = run(config(policy)), run(config(policy, {"at": [LATER]}))
        for one, other in zip(plain.frames.by_name().values(), waiting.frames.by_name().values(), strict=True):
            pd.testing.assert_frame_equal(one, other)


# --- the injector ---


def first(plan: FaultPlan, count: int, seed: int = 3) -> list[Fault]:
    return list(itertools.islice(FaultInjector(plan, seed, 2, 4).faults(), count))


def test_faults_come_in_order_and_at_their_rates() -> None:
    drawn = first(FaultPlan(worker_mtbf_s=100.0, node_mtbf_s=400.0, at=(Fault(5.0, "spot", 0),)), 20_000)
    assert [fault.time_s for fault in drawn] == sorted(fault.time_s for fault in drawn)
    assert Fault(5.0, "spot", 0) in drawn
    end_s = drawn[-1].time_s
    # 8 GPUs, each the first of a function, die every 100 s, 2 nodes every 400 s: 0.08 and 0.005 a second.
    assert sum(fault.kind == "worker" for fault in drawn) / end_s == pytest.approx(0.08, rel=0.03)
    assert sum(fault.kind == "node" for fault in drawn) / end_s == pytest.approx(0.005, rel=0.1)


def test_faults_of_a_kind_do_not_depend_on_others() -> None:
    alone = [f for f in first(FaultPlan(node_mtbf_s=400.0), 50) if f.time_s < 1000]
    both = [f for f in first(FaultPlan(node_mtbf_s=400.0, worker_mtbf_s=100.0), 500) if f.time_s < 1000]
    assert alone == [fault for fault in both if fault.kind == "node"]
    assert alone != [f for f in first(FaultPlan(node_mtbf_s=400.0), 50, seed=4) if f.time_s < 1000]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.1, 1), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_the_share_of_slow_nodes_is_rounded_up(fraction: float, count: int) -> None:
    plan = FaultPlan.load(Faults(slow_node_fraction=fraction, slow_factor=3.0), 4, Parameters())
    injector = FaultInjector(plan, 0, 4, 8)
    assert sorted(injector.slowness(node) for node in range(4)) == [1.0] * (4 - count) + [3.0] * count


def test_what_faults_take_is_listed_with_its_source() -> None:
    parameters = Parameters()
    faults = Faults(at=(ScriptedFault(time_s=1.0, kind="spot", node=0),), worker_mtbf_s=50.0, repair_s=7.0)
    plan = FaultPlan.load(faults, 2, parameters)
    assert (plan.spot_notice_s, plan.repair_s) == (120.0, 7.0)
    used = {p.key: p for p in parameters.used()}
    assert set(used) == {"faults.spot_notice_s", "faults.repair_s", "faults.worker_mtbf_s"}
    assert used["faults.spot_notice_s"].status == "measured"
    assert used["faults.repair_s"].source.startswith("set by the user; shipped: 600")
    assert used["faults.worker_mtbf_s"].source == "set by the user"


# --- the contract, by hand ---


def cluster(
    *faults: Fault, repair_s: float | None = None, worker_mtbf_s: float | None = None, nodes: int = 2
) -> SimulatedBackend:
    work = [[[30, 40], [50, 60]]] * 3
    costs = make_costs(make_job(work), nodes=nodes, engine=Engine(tensor_parallel=1), parameters=EXACT_STARTS)
    backend, _ = make_backend(costs, work)
    plan = FaultPlan(at=faults, repair_s=repair_s, worker_mtbf_s=worker_mtbf_s)
    backend.faults = FaultInjector(plan, 0, nodes, costs.node.gpus)
    backend.reset()
    return backend


def until(backend: SimulatedBackend, kind: type, *decisions: Decision) -> Observation:
    observation = backend.advance(decisions)
    while observation is not None and not any(isinstance(event, kind) for event in observation.events):
        observation = backend.advance([])
    assert observation is not None
    return observation


def names(observation: Observation, kind: type = FunctionLost) -> list[str]:
    return sorted(event.function for event in observation.events if isinstance(event, kind))


def test_all_functions_of_a_lost_node_go_those_too_that_wait_for_it() -> None:
    backend = cluster(Fault(1.0, "node", 1), repair_s=50.0)
    starts = [Start("a", 8, EVERYTHING, 1), Start("b", 8, ("decode",), 1), Start("c", 8, ("decode",), 0)]
    seen = until(backend, FunctionLost, *starts, Start("d", 4, ("decode",)))
    assert names(seen) == ["a", "b"]
    assert list(seen.functions) == ["c", "d"]
    assert [(node.condition, node.free_gpus) for node in seen.nodes] == [("up", 0), ("lost", 0)]
    seen = until(backend, NodeReturned, Start("e", 2, ("decode",), 1))
    assert seen.time_s == pytest.approx(51.0)
    seen = until(backend, At, Subscribe(At(52.0)))
    # d, which takes any node, came first; e waited for this one.
    assert [(node.condition, node.free_gpus) for node in seen.nodes] == [("up", 0), ("up", 2)]
    assert {name: function.node for name, function in seen.functions.items()} == {"c": 0, "d": 1, "e": 1}


def test_a_reclaimed_node_is_not_chosen_but_may_be_asked_for() -> None:
    backend = cluster(Fault(1.0, "spot", 0))
    backend.faults.plan = FaultPlan(at=backend.faults.plan.at, spot_notice_s=30.0)  # type: ignore[union-attr]
    seen = until(backend, NodeReclaimed, Start("a", 2, ("decode",), 1))
    assert seen.events == (NodeReclaimed(0, 31.0),)
    starts = [Start("any", 2, ("decode",)), Start("there", 2, ("decode",), 0)]
    seen = until(backend, At, *starts, Subscribe(At(2.0)))
    assert {name: function.node for name, function in seen.functions.items()} == {"a": 1, "any": 1, "there": 0}
    seen = until(backend, FunctionLost)
    assert (seen.time_s, names(seen)) == (31.0, ["there"])


def test_a_returned_node_has_nothing_on_its_disk() -> None:
    backend = cluster(Fault(400.0, "node", 1), repair_s=10.0)
    listen = Subscribe(FunctionIdle(None, "started"))
    first_s = until(backend, FunctionIdle, listen, Start("a", 1, ("learn",), 1)).time_s
    cached_s = until(backend, FunctionIdle, Start("b", 1, ("learn",), 1)).time_s - first_s
    assert cached_s < first_s
    lost_s = until(backend, NodeReturned, Subscribe(At(1e4))).time_s
    again_s = until(backend, FunctionIdle, Start("a", 1, ("learn",), 1)).time_s - lost_s
    assert again_s == pytest.approx(first_s)


def test_a_lost_learner_may_be_replaced_later_and_only_as_often() -> None:
    backend = cluster()
    listen = [Subscribe(StageFinished(stage)) for stage in ("generation", "preparation", "learning")]
    until(backend, StageFinished, *listen, *(Start(n, 1, EVERYTHING) for n in "ab"), Assign("a", (0, 1, 2, 3)))
    until(backend, StageFinished, Prepare(("a", "b"), (0, 1, 2, 3)))
    backend.lose("b")
    until(backend, FunctionLost)
    seen = until(backend, StageFinished, Learn(("a",)))
    assert seen.weights_version == 1
    work = [Start("b", 1, EVERYTHING), Sync(("a",)), Assign("a", (4, 5, 6, 7))]
    until(backend, StageFinished, *work)
    until(backend, StageFinished, Prepare(("a",), (4, 5, 6, 7)))
    with pytest.raises(InvalidDecision, match="sharded over 2 functions and 1 are named"):
        backend.advance([Learn(("a",))])
    assert until(backend, StageFinished, Learn(("a", "b"))).weights_version == 2
    with pytest.raises(InvalidDecision, match="shards are placed"):
        backend.advance([Start("c", 1, EVERYTHING)])


def test_a_cluster_that_breaks_faster_than_it_recovers_is_told_of() -> None:
    with pytest.raises(PolicyStalled, match=r"1000 faults without a learned step"):
        run(config(faults={"worker_mtbf_s": 5.0}))


def test_random_faults_do_not_keep_a_stalled_policy_waiting() -> None:
    class Idle:
        def decide(self, observation: Observation) -> Sequence[Decision]:
            return [Start("a", 8, ("decode",), 1)] if observation.time_s == 0 else []

    with pytest.raises(PolicyStalled, match="1024 responses unassigned"):
        run(config(faults={"node_mtbf_s": 1e5}), policy=Idle())
    # Deaths where no function is would go on for ever, and nobody be told.
    with pytest.raises(PolicyStalled, match="nothing runs and no trigger is due"):
        cluster(worker_mtbf_s=10.0).advance([])


def test_a_function_dies_with_its_first_gpu_only() -> None:
    backend = cluster(*(Fault(10.0 + place, "worker", 0, gpu) for place, gpu in enumerate((1, 0, 3, 2))))
    seen = until(backend, FunctionLost, *(Start(name, 2, ("learn",), 0) for name in "ab"))
    assert (seen.time_s, names(seen)) == (11.0, ["a"])
    seen = until(backend, FunctionLost)
    assert (seen.time_s, names(seen)) == (13.0, ["b"])


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"node_mtbf_s": 0.0}, r"faults.node_mtbf_s=0.0 must be a number above 0"),
        ({"slow_factor": 0.5}, r"faults.slow_factor=0.5 must be a number of at least 1"),
        ({"at": [{"time_s": 1.0, "kind": "node", "node": 2}]}, r"faults.at\[0\].node=2 must be below cluster.nodes=2"),
        ({"at": [{"time_s": 1.0, "kind": "node"}]}, r"kind='node' needs node and no function"),
        ({"at": [{"time_s": 1.0, "kind": "worker", "node": 1}]}, r"kind='worker' needs function and no node"),
        ({"at": [{"time_s": 1.0, "kind": "fire", "node": 1}]}, r"faults.at.0.kind='fire'"),
        ({"mtbf": 3.0}, r"faults.mtbf is unknown"),
    ],
)
def test_impossible_faults_are_refused(faults: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(faults=faults)


def test_the_configuration_reads_back() -> None:
    from simrl.experiments.config import config_toml

    given = config(faults={"at": [{"time_s": 1.0, "kind": "spot", "node": 1}], "slow_node_fraction": 0.5})
    import tomllib

    tree = tomllib.loads(config_toml(given))
    assert tree["faults"] == {
        "repair": True, "slow_node_fraction": 0.5, "at": [{"time_s": 1.0, "kind": "spot", "node": 1}],
    }  # fmt: skip


def test_places_are_known_before_gpus_are_taken() -> None:
    backend = cluster()
    backend.advance([Start("a", 8, ("decode",), 1), Start("b", 8, ("decode",), 1), Subscribe(At(0.0))])
    places: dict[str, int | None] = {n: ClusterFunction.place(f) for n, f in backend.functions.items()}
    assert places == {"a": 1, "b": 1}
