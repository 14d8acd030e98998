"""Queues in front of a full cluster: against queueing theory, and against Lindley's recursion for each single wait."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import numpy as np
import pytest
import simpy
from clusters import make_backend, make_costs, make_job

from simrl.policies.contract import At, Decision, FunctionIdle, Release, Start, Subscribe
from simrl.policies.runtime.leases import GpuPool

GPUS = 8


def waits_s(gpus: int, arrivals_s: Sequence[float], leases_s: Sequence[float]) -> list[float]:
    """How long each lease of *gpus* GPUs of one node has to wait."""
    env = simpy.Environment()
    pool = GpuPool(env, 1, GPUS)
    waits: list[float] = []

    def customer(lease_s: float) -> Generator[simpy.Event, tuple[int, tuple[int, ...]], None]:
        asked_s = env.now
        node, gpu_ids = yield pool.lease(gpus, None)
        waits.append(env.now - asked_s)
        yield env.timeout(lease_s)
        pool.give_back(node, gpu_ids)

    def source() -> Generator[simpy.Event, None, None]:
        for arrival_s, lease_s in zip(arrivals_s, leases_s, strict=True):
            yield env.timeout(arrival_s - env.now)
            env.process(customer(lease_s))

    env.process(source())
    env.run()
    return waits


def erlang_c(servers: int, load: float) -> float:
    """Probability of having to wait, of *load* Erlang on so many servers."""
    last = load**servers / math.factorial(servers) / (1 - load / servers)
    return last / (sum(load**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize(("gpus", "utilization"), [(8, 0.5), (8, 0.8), (2, 0.7), (1, 0.8)])
def test_the_mean_wait_is_that_of_m_m_c(gpus: int, utilization: float) -> None:
    """Poisson arrivals and exponential leases: 8 // gpus servers. For one, rho / (mu - lambda)."""
    servers, mu = GPUS // gpus, 1.0
    rate = utilization * servers * mu
    expected_s = erlang_c(servers, rate / mu) / (servers * mu - rate)
    if servers == 1:
        assert expected_s == pytest.approx(utilization / (mu - rate))
    means = []
    for seed in range(40):
        rng = np.random.default_rng([gpus, seed])
        arrivals_s = np.cumsum(rng.exponential(1 / rate, 3000)).tolist()
        means.append(np.mean(waits_s(gpus, arrivals_s, rng.exponential(1 / mu, 3000).tolist())[500:]))
    error_s = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    assert error_s < 0.06 * expected_s, "too few arrivals to tell"
    assert abs(float(np.mean(means)) - expected_s) < 3 * error_s


def test_starts_wait_in_line_for_a_full_cluster_as_long_as_lindley_says() -> None:
    """Through the backend: each start asks for the whole node, and is released a while after it is ready."""
    rng = np.random.default_rng(3)
    count = 60
    arrivals_s = np.cumsum(rng.exponential(100.0, count)).tolist()
    holds_s = rng.exponential(70.0, count).tolist()
    costs = make_costs(make_job([[[1]]]))
    backend, recorder = make_backend(costs, [[[1]]])
    backend.reset()
    decisions: list[Decision] = [Subscribe(FunctionIdle()), *(Subscribe(At(arrival_s)) for arrival_s in arrivals_s)]
    release_s: dict[float, str] = {}
    ready_s: dict[str, float] = {}
    arrived = 0
    while len(ready_s) < count or release_s:
        observation = backend.advance(decisions)
        assert observation is not None
        decisions = []
        for event in observation.events:
            match event:
                case At(time_s=time_s) if time_s in release_s:
                    decisions.append(Release(release_s.pop(time_s)))
                case At():
                    decisions.append(Start(f"f{arrived}", GPUS, ("decode",)))
                    arrived += 1
                case FunctionIdle(function=str(name), after="started"):
                    ready_s[name] = observation.time_s
                    until_s = observation.time_s + holds_s[int(name[1:])]
                    release_s[until_s] = name
                    decisions.append(Subscribe(At(until_s)))
                case _:
                    pass
    granted_s = recorder.frames().workers.query("state == 'cold'").groupby("function").start_s.min()
    assert list(ready_s) == [f"f{n}" for n in range(count)], "nobody overtakes"
    free_s, waited = 0.0, 0
    for n, arrival_s in enumerate(arrivals_s):
        expected_s = max(arrival_s, free_s)
        assert granted_s[f"f{n}"] == pytest.approx(expected_s, rel=1e-12)
        waited += expected_s > arrival_s
        free_s = ready_s[f"f{n}"] + holds_s[n]
    assert waited > count / 2


def test_nodes_are_packed() -> None:
    pool = GpuPool(simpy.Environment(), 3, GPUS)
    placed = [pool.lease(gpus, None).value for gpus in (6, 4, 2, 4)]
    assert placed == [(0, (0, 1, 2, 3, 4, 5)), (1, (0, 1, 2, 3)), (0, (6, 7)), (1, (4, 5, 6, 7))]


def test_room_is_what_nobody_waits_for() -> None:
    pool = GpuPool(simpy.Environment(), 3, GPUS)
    pool.lease(6, 0)
    assert pool.nodes_with_room(2) == [0, 1, 2]
    assert pool.nodes_with_room(4) == [1, 2]
    waiting = pool.lease(4, 0)
    assert pool.nodes_with_room(2) == [1, 2]
    pool.lease(8, 1), pool.lease(8, 2)
    pool.lease(8, None)
    assert pool.nodes_with_room(1) == []
    pool.withdraw(waiting)
    assert pool.nodes_with_room(1) == []  # those two wait for any node


# --- one by one ---


def pool(nodes: int = 2) -> GpuPool:
    return GpuPool(simpy.Environment(), nodes, GPUS)


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
