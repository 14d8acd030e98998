"""Links that concurrent flows share max-min fair: NICs, the links of GPUs, the store for images and weights.

What a flow takes is in docs/model.md. Nothing here knows models or costs.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import simpy

SAME_MOMENT = 1e-12  # relative; completions that only rounding keeps apart are one


@dataclass(frozen=True, slots=True)
class Load:
    """Something to move.

    Attributes:
        fixed_s: Passes before the first byte moves.
        size_bytes: 0 takes no link: only the time passes.
        limit_bytes_per_s: What its own end can do, however free the links are.
    """

    fixed_s: float
    size_bytes: float = 0.0
    limit_bytes_per_s: float = math.inf

    def times(self, factor: float) -> Load:
        """*factor* as many bytes."""
        return replace(self, size_bytes=self.size_bytes * factor)

    def alone_s(self, bytes_per_s: float) -> float:
        """Seconds over an idle link."""
        if not self.size_bytes:
            return self.fixed_s
        return self.fixed_s + self.size_bytes / min(bytes_per_s, self.limit_bytes_per_s)


@dataclass(slots=True, eq=False)
class Link:
    """One direction of a wire, or of all wires of a function's GPUs together."""

    bytes_per_s: float
    flows: dict[Flow, None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Flow:
    """Bytes under way.

    Attributes:
        links: What it goes over, with the bytes that pass there for each of its own.
        done: Fires when the last byte has arrived.
        left_bytes: Not moved yet, as of *since_s*.
        rate: Bytes a second from then on.
        finish_s: When it is over if nothing changes.
    """

    links: Mapping[Link, float]
    done: simpy.Event
    left_bytes: float
    since_s: float
    rate: float = 0.0
    finish_s: float = math.inf

    def pace(self, rate: float, now_s: float) -> None:
        """Go on at another rate."""
        self.left_bytes = max(self.left_bytes - self.rate * (now_s - self.since_s), 0.0)
        self.since_s, self.rate = now_s, rate
        self.finish_s = now_s + self.left_bytes / rate


@dataclass(slots=True)
class GpuLinks:
    """The ends of a function's transfers: all of its GPUs together, each direction by itself."""

    leave: Link  # to other GPUs of the node
    arrive: Link
    to_host: Link
    from_host: Link

    @classmethod
    def of(cls, gpus: int, link_bytes_per_s: float, host_bytes_per_s: float) -> GpuLinks:
        """The links of *gpus* GPUs."""
        link, host = gpus * link_bytes_per_s, gpus * host_bytes_per_s
        return cls(Link(link), Link(link), Link(host), Link(host))


@dataclass(slots=True)
class NodeLinks:
    """A machine's NIC, and what has been or is being pulled onto its disk."""

    sends: Link
    receives: Link
    pulled: dict[str, simpy.Event] = field(default_factory=dict)


class Network:
    """A cluster's links, and the flows over them.

    Rates change when a flow begins or ends, and only those of flows that share links with it, be it through others.

    Args:
        env: The clock.
        nodes: Machines.
        nic_bytes_per_s: Of each machine and direction.
        store_bytes_per_s: The store for images and weights, all machines together, each direction.
    """

    def __init__(
        self, env: simpy.Environment, nodes: int, nic_bytes_per_s: float, store_bytes_per_s: float = math.inf
    ) -> None:
        self.env = env
        self.nodes = [NodeLinks(Link(nic_bytes_per_s), Link(nic_bytes_per_s)) for _ in range(nodes)]
        self.store_reads, self.store_writes = Link(store_bytes_per_s), Link(store_bytes_per_s)
        self._changed: dict[Link, None] = {}  # since rates were last shared out
        self._due: list[tuple[float, int, Flow]] = []  # a heap; what no longer holds is passed over
        self._order = itertools.count()
        self._timer_s = math.inf  # the next look at `_due`

    def move(self, load: Load, links: Mapping[Link, float]) -> simpy.Event:
        """Begin moving *load*; the event fires when it has arrived.

        Args:
            load: What.
            links: Over which links, with the bytes that pass over each for a byte of the load.
        """
        if not load.size_bytes:
            return self.env.timeout(load.fixed_s)
        done = self.env.event()
        if load.limit_bytes_per_s < math.inf:
            links = {**links, Link(load.limit_bytes_per_s): 1.0}
        if load.fixed_s > 0:
            _then(self.env.timeout(load.fixed_s), lambda: self._begin(load.size_bytes, links, done))
        else:
            self._begin(load.size_bytes, links, done)
        return done

    def send(self, load: Load, source: tuple[int, GpuLinks], target: tuple[int, GpuLinks]) -> simpy.Event:
        """Move *load* between functions, given by node and links: inside a node from GPU to GPU, else by NIC."""
        (source_node, leaving), (target_node, arriving) = source, target
        if source_node == target_node:
            return self.move(load, {leaving.leave: 1.0, arriving.arrive: 1.0})
        between = (leaving.to_host, self.nodes[source_node].sends, self.nodes[target_node].receives, arriving.from_host)
        return self.move(load, dict.fromkeys(between, 1.0))

    def pull(self, what: str, node: int, load: Load) -> simpy.Event:
        """Get an image or weights onto a node's disk, once: whoever asks meanwhile waits for the same pull."""
        pulled = self.nodes[node].pulled
        if what not in pulled:
            pulled[what] = self.move(load, {self.store_reads: 1.0, self.nodes[node].receives: 1.0})
        return pulled[what]

    def _begin(self, size_bytes: float, links: Mapping[Link, float], done: simpy.Event) -> None:
        flow = Flow(links, done, size_bytes, self.env.now)
        for link in links:
            link.flows[flow] = None
        self._change(links)

    def _end(self, flow: Flow) -> None:
        for link in flow.links:
            del link.flows[flow]
        flow.finish_s = math.inf
        flow.done.succeed()
        self._change(flow.links)

    def _change(self, links: Iterable[Link]) -> None:
        """Share these links out anew, once for all that begins or ends at this moment."""
        if not self._changed:
            _then(self.env.timeout(0), self._share_out)
        self._changed.update(dict.fromkeys(links))

    def _share_out(self) -> None:
        now_s = self.env.now
        flows, self._changed = _connected(self._changed), {}
        for flow, rate in fair_rates(flows).items():
            if rate != flow.rate:
                flow.pace(rate, now_s)
                heapq.heappush(self._due, (flow.finish_s, next(self._order), flow))
        self._set_timer()

    def _set_timer(self) -> None:
        while self._due and self._due[0][0] != self._due[0][2].finish_s:
            heapq.heappop(self._due)  # its rate has changed, or it is over
        if self._due and self._due[0][0] < self._timer_s:
            self._timer_s = due_s = self._due[0][0]
            _then(self.env.timeout(max(due_s - self.env.now, 0.0)), lambda: self._look(due_s))

    def _look(self, due_s: float) -> None:
        """End what is over by now; a timer that was set too early, or twice, finds nothing."""
        while self._due and self._due[0][0] <= due_s * (1 + SAME_MOMENT):
            finish_s, _, flow = heapq.heappop(self._due)
            if finish_s == flow.finish_s:
                self._end(flow)
        if due_s == self._timer_s:
            self._timer_s = math.inf
            self._set_timer()


def _then(event: simpy.Event, act: Callable[[], None]) -> None:
    assert event.callbacks is not None, "the event has not happened yet"
    event.callbacks.append(lambda _: act())


def _connected(links: Iterable[Link]) -> list[Flow]:
    """Flows over *links*, over the links of those flows, and so on."""
    seen, flows = dict.fromkeys(links), dict[Flow, None]()
    waiting = list(seen)
    while waiting:
        for flow in waiting.pop().flows:
            if flow not in flows:
                flows[flow] = None
                for link in flow.links:
                    if link not in seen:
                        seen[link] = None
                        waiting.append(link)
    return list(flows)


def fair_rates(flows: Iterable[Flow]) -> dict[Flow, float]:
    """Max-min fair rates by progressive filling: all grow alike until a link is full, whose flows then stay.

    *flows* are all that go over any of their links. Bertsekas and Gallager, Data Networks, section 6.5.2.
    """
    growing = dict.fromkeys(flows)
    free: dict[Link, float] = {}  # capacity that flows with a rate leave
    wanted: dict[Link, float] = {}  # bytes over the link for one byte of every growing flow
    users: Counter[Link] = Counter()  # growing flows
    for flow in growing:
        for link, share in flow.links.items():
            free.setdefault(link, link.bytes_per_s)
            wanted[link] = wanted.get(link, 0.0) + share
            users[link] += 1
    rates: dict[Flow, float] = {}
    while growing:
        full = min(wanted, key=lambda link: free[link] / wanted[link])
        level = free[full] / wanted[full]
        for flow in [flow for flow in full.flows if flow in growing]:
            rates[flow] = level
            del growing[flow]
            for link, share in flow.links.items():
                free[link] -= share * level
                wanted[link] -= share
                users[link] -= 1
                if not users[link]:
                    del wanted[link]
    return rates
