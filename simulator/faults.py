"""Faults of a simulated cluster: lost workers, lost nodes, spot reclaims with notice, slow nodes. docs/faults.md.

When what happens is drawn from streams named by kind and place, and depends on no decision: every policy faces the same
faults.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from simrl.policies.contract import PolicyStalled, State
from simrl.policies.runtime.function import ClusterFunction, Process
from simrl.traces.iteration import IterationTimes
from simrl.traces.job import Faults
from simrl.traces.parameters import Parameter, Parameters, set_by_user
from simrl.traces.streams import stream

if TYPE_CHECKING:
    from simrl.simulator.backend import SimulatedBackend

FAULTS_BEFORE_STALL = 1000
"""Faults without a learned step, after which the cluster is taken to break faster than it recovers."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens at a time: the loss of a node or a worker, or the notice of a spot reclaim.

    Attributes:
        time_s: When.
        kind: What.
        node: Where; None where *function* says it.
        gpu: Of a worker: that whose first GPU this is, so that each function dies at the same rate.
        function: Of a worker: its name.
    """

    time_s: float
    kind: Literal["worker", "node", "spot"]
    node: int | None = None
    gpu: int | None = None
    function: str | None = None


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Which faults a cluster has. Mean times are between exponential events; None: never.

    Attributes:
        worker_mtbf_s: Of each function, while it holds GPUs.
        node_mtbf_s: Of each node.
        spot_mtbf_s: Between reclaims of each node.
        spot_notice_s: From the notice to the loss.
        repair_s: From a node's loss to its return.
        slow_nodes: How many nodes are slow.
        slow_factor: Their times, as a multiple of the others'.
        at: Faults at given times.
    """

    worker_mtbf_s: float | None = None
    node_mtbf_s: float | None = None
    spot_mtbf_s: float | None = None
    spot_notice_s: float = 0.0
    repair_s: float | None = None
    slow_nodes: int = 0
    slow_factor: float = 1.0
    at: tuple[Fault, ...] = ()

    @classmethod
    def load(cls, faults: Faults, nodes: int, parameters: Parameters) -> FaultPlan:
        """The plan of a configuration; what it uses is noted in *parameters*."""
        kinds = {fault.kind for fault in faults.at}
        spot = faults.spot_mtbf_s is not None or "spot" in kinds
        loses_nodes = spot or faults.node_mtbf_s is not None or "node" in kinds
        repair = loses_nodes and faults.repair
        slow_nodes = math.ceil(faults.slow_node_fraction * nodes - 1e-9)
        for name in ("worker_mtbf_s", "node_mtbf_s", "spot_mtbf_s"):
            _note(name, getattr(faults, name), "s", parameters)
        _note("slow_node_fraction", faults.slow_node_fraction or None, "1", parameters)
        return cls(
            worker_mtbf_s=faults.worker_mtbf_s,
            node_mtbf_s=faults.node_mtbf_s,
            spot_mtbf_s=faults.spot_mtbf_s,
            spot_notice_s=_given_or_shipped("spot_notice_s", faults.spot_notice_s, parameters) if spot else 0.0,
            repair_s=_given_or_shipped("repair_s", faults.repair_s, parameters) if repair else None,
            slow_nodes=slow_nodes,
            slow_factor=_given_or_shipped("slow_factor", faults.slow_factor, parameters) if slow_nodes else 1.0,
            at=tuple(Fault(f.time_s, f.kind, f.node, function=f.function) for f in faults.at),
        )


def _note(name: str, value: float | None, unit: str, parameters: Parameters) -> None:
    if value is not None:
        parameters.note(Parameter(f"faults.{name}", value, unit, "assumed", "set by the user", value, value))


def _given_or_shipped(name: str, given: float | None, parameters: Parameters) -> float:
    if given is None:
        return parameters.number(f"faults.{name}")
    parameters.note(set_by_user(parameters.entry(f"faults.{name}"), given))
    return given


class FaultInjector:
    """Lets a plan's faults happen to a cluster.

    Args:
        plan: Which.
        seed: Root of the random streams.
        nodes: Of the cluster.
        gpus_per_node: Of each.
    """

    def __init__(self, plan: FaultPlan, seed: int, nodes: int, gpus_per_node: int) -> None:
        self.plan, self.seed = plan, seed
        self._places = [(node, gpu) for node in range(nodes) for gpu in range(gpus_per_node)]
        draws = [float(stream(seed, "faults", "slow", node).random()) for node in range(nodes)]
        self._slow = set(sorted(range(nodes), key=draws.__getitem__)[: plan.slow_nodes])

    def slowness(self, node: int | None) -> float:
        """Times on *node* as a multiple of those of others."""
        return self.plan.slow_factor if node in self._slow else 1.0

    def begin(self, cluster: SimulatedBackend) -> None:
        """From now on faults happen to *cluster*."""
        self._cluster = cluster
        self._lost_s: dict[int, float] = {}  # when nodes were lost that have not returned
        self._version, self._faults = 0, 0
        cluster.env.process(self._happen())

    def close(self) -> None:
        """The run is over."""
        for node in tuple(self._lost_s):
            self._record_absence(node)

    # --- what happens when ---

    def faults(self) -> Iterator[Fault]:
        """All faults in the order of time; without end where there are random ones."""
        plan = self.plan
        nodes = sorted({node for node, _ in self._places})
        kinds: list[Iterator[Fault]] = [iter(sorted(plan.at, key=lambda fault: fault.time_s))]
        if plan.node_mtbf_s is not None:
            kinds += [self._drawn("node", plan.node_mtbf_s, node) for node in nodes]
        if plan.spot_mtbf_s is not None:
            kinds += [self._drawn("spot", plan.spot_mtbf_s, node) for node in nodes]
        if plan.worker_mtbf_s is not None:
            kinds += [self._drawn("worker", plan.worker_mtbf_s, *place) for place in self._places]
        return heapq.merge(*kinds, key=lambda fault: fault.time_s)

    def _drawn(
        self, kind: Literal["worker", "node", "spot"], mtbf_s: float, node: int, gpu: int | None = None
    ) -> Iterator[Fault]:
        rng, time_s = stream(self.seed, "faults", kind, node, *(() if gpu is None else (gpu,))), 0.0
        while True:
            time_s += float(rng.exponential(mtbf_s))
            yield Fault(time_s, kind, node, gpu)

    def _happen(self) -> Process:
        env = self._cluster.env
        for fault in self.faults():
            yield env.timeout(max(fault.time_s - env.now, 0.0))
            if env.peek() == math.inf:
                return  # nothing else will ever happen: the policy has stalled
            self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        cluster = self._cluster
        if fault.kind == "worker":
            function = self._function_of(fault)
            if function is not None:
                self._count()
                cluster.lose(function.name)
                self._record_lost(function.name, function.node, function.gpus)
            return
        assert fault.node is not None, "nodes and reclaims have a node"
        condition = cluster.pool.nodes[fault.node].condition
        if fault.kind == "node" and condition != "lost":
            self._lose_node(fault.node)
        elif fault.kind == "spot" and condition == "up":
            self._count()
            cluster.reclaim_node(fault.node, cluster.env.now + self.plan.spot_notice_s)
            cluster.env.process(self._after_notice(fault.node))

    def _function_of(self, fault: Fault) -> ClusterFunction | None:
        """The function that dies: the one of that name, else the one that holds this GPU as its first."""
        there = [f for f in self._cluster.functions.values() if f.state is not State.GONE]
        if fault.function is not None:
            return next((f for f in there if f.name == fault.function), None)
        return next((f for f in there if f.node == fault.node and f.gpu_ids[:1] == (fault.gpu,)), None)

    def _after_notice(self, node: int) -> Process:
        yield self._cluster.env.timeout(self.plan.spot_notice_s)
        if self._cluster.pool.nodes[node].condition == "reclaimed":  # it may have been lost before
            self._lose_node(node)

    def _lose_node(self, node: int) -> None:
        cluster = self._cluster
        self._count()
        gpus = {name: function.gpus for name, function in cluster.functions.items()}
        lost = cluster.lose_node(node)
        cluster.forget_disk(node)
        self._lost_s[node] = cluster.env.now
        for name in lost:
            self._record_lost(name, node, gpus[name])
        if self.plan.repair_s is not None:
            cluster.env.process(self._repair(node, self.plan.repair_s))

    def _repair(self, node: int, repair_s: float) -> Process:
        yield self._cluster.env.timeout(repair_s)
        self._record_absence(node)
        self._cluster.return_node(node)

    def _count(self) -> None:
        """Stop a run that would never end."""
        cluster = self._cluster
        self._faults = self._faults + 1 if cluster.version == self._version else 1
        self._version = cluster.version
        if self._faults > FAULTS_BEFORE_STALL:
            raise PolicyStalled(
                f"policy stalled at {cluster.env.now:.1f} s in step {max(cluster.steps)}: {FAULTS_BEFORE_STALL} faults"
                f" without a learned step; the cluster breaks faster than it recovers (faults.*)"
            )

    # --- records ---

    def _record_lost(self, function: str, node: int | None, gpus: int) -> None:
        now = self._cluster.env.now
        self._cluster.recorder.workers.append((function, node, gpus, "", "lost", None, None, now, now))

    def _record_absence(self, node: int) -> None:
        cluster, lost_s = self._cluster, self._lost_s.pop(node)
        row = ("", node, cluster.gpus_per_node, "", "lost", None, None, lost_s, cluster.env.now)
        cluster.recorder.workers.append(row)


class SlowTimes(IterationTimes):
    """Iteration times as a multiple of others: of an engine on a slow node, or one that has a core to itself.

    Args:
        times: The others; count look-ups beyond their tables.
        factor: The multiple.
    """

    def __init__(self, times: IterationTimes, factor: float) -> None:
        self._times, self._factor = times, factor
        self.source, self.status = times.source, times.status

    def decode_s(self, batch: int, context: float) -> float:
        """Seconds of an iteration of decoding."""
        return self._factor * self._times.decode_s(batch, context)

    def prefill_s(self, tokens: int, attended: float) -> float:
        """Seconds of an iteration over prompt tokens."""
        return self._factor * self._times.prefill_s(tokens, attended)

    def iteration_s(self, prefill_tokens: int, attended: float, batch: int, context: float) -> float:
        """Seconds of an iteration that does both."""
        return self._factor * self._times.iteration_s(prefill_tokens, attended, batch, context)

    def decode_span_s(self, batch: int, context: float, iterations: int) -> float:
        """Seconds of consecutive iterations of decoding."""
        return self._factor * self._times.decode_span_s(batch, context, iterations)

    def iterations_until(self, batch: int, context: float, seconds: float) -> int:
        """Iterations that take at least *seconds*."""
        return self._times.iterations_until(batch, context, seconds / self._factor)

    def flat_batch(self, context: float, tolerance: float) -> int:
        """Largest batch at which decode latency is flat: a factor changes nothing."""
        return self._times.flat_batch(context, tolerance)
