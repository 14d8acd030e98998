"""Where processes run: nodes of a Ray cluster, GPUs of a node. The nodes are Ray's own, all on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import simpy
from ray.cluster_utils import Cluster

from simrl.policies.runtime.leases import GpuPool
from simrl.real_backend.actors import HostPool, Place
from simrl.real_backend.engine import EngineSettings
from simrl.real_backend.learner_settings import LearnerSettings
from simrl.real_backend.ray_cluster import ClusterError


def stand_in() -> type:
    """A host that tells where it is and what it sees, without an engine; local, so that Ray sends its code along."""

    class Where:
        def __init__(self, *settings: object) -> None:
            self.visible = os.environ.get("CUDA_VISIBLE_DEVICES")

        def ready(self) -> tuple[str, str | None]:
            import ray

            return ray.get_runtime_context().get_node_id(), self.visible

        def reset(self, folder: str) -> None:
            pass

    return Where


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of two nodes, on loopback."""
    from ray._private import ray_constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # else it leaves the loopback interface
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "node_ip_address": "127.0.0.1"})
        cluster.add_node(num_cpus=2, node_ip_address="127.0.0.1")
        yield cluster.address
        cluster.shutdown()


def pool_of(address: str, folder: Path, **engine: Any) -> HostPool:
    settings = EngineSettings(model="none", num_kv_blocks=4, **engine)
    return HostPool(settings, LearnerSettings("none", 0, 1, ""), address=address, folder=folder)


def test_hosts_and_ranks_run_on_the_node_of_their_lease(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("simrl.real_backend.actors.EngineHost", stand_in())
    monkeypatch.setattr("simrl.real_backend.actors.LearnerHost", stand_in())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pool_of(address, tmp_path, device="cuda", block_tokens=16) as pool:
        places = [Place(0, (0, 1)), Place(1, (0, 1)), Place(1, (2, 3))]
        hosts = [pool.take_ready(place) for place in places]
        found = [pool.get(host.actor.ready.remote()) for host in hosts]
        assert found[0][0] != found[1][0] == found[2][0]
        assert [visible for _, visible in found] == ["0,1", "0,1", "2,3"]
        pool.give_back(hosts[1])
        pool.give_back(hosts[2])
        assert pool.take_ready(places[2]) is hosts[2], "a warm host has its GPUs"
        ranks = pool.learners([Place(1, (3,)), Place(0, (0,))])
        seen = [pool.get(rank.ready.remote()) for rank in ranks]
        assert [node for node, _ in seen] == [found[1][0], found[0][0]]
        assert [visible for _, visible in seen] == ["3", "0"]
        assert pool.learners([Place(0, (0,)), Place(1, (3,))]) == ranks[::-1]
        with pytest.raises(ClusterError, match=r"the Ray cluster has 2 nodes, and node 2 was asked for"):
            pool.take(Place(2, (0,)))
        assert pool.folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_lease_of_the_same_gpus_waits_for_them() -> None:
    env = simpy.Environment()
    gpus = GpuPool(env, 2, 4)
    first = gpus.lease(2, 0).value
    assert first == (0, (0, 1))
    gpus.give_back(*first)
    other = gpus.lease(1, 0).value
    assert other == (0, (0,))
    back = gpus.lease(2, 0, same=(0, 1))
    assert not back.triggered, "two others are free, but not these"
    gpus.give_back(*other)
    assert back.value == (0, (0, 1))
