"""Links that concurrent flows share max-min fair: NICs, the links of GPUs, the store for images and weights.

What a flow takes is in docs/model.md. Nothing here knows models or costs.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import simpy

SAME_MOMENT = 1e-12  # relative; completions that only rounding keeps apart are one
SAME_RATE = 1e-9  # relative; rates are fair if no more than rounding is missing


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
    """One direction of a wire, or of all wires of a function's GPUs together.

    Attributes:
        bytes_per_s: What it can do.
        bundles: All that go over it.
        holds_up: Those whose bottleneck it is.
        used_bytes_per_s: By all of them.
    """

    bytes_per_s: float
    bundles: dict[Bundle, None] = field(default_factory=dict)
    holds_up: dict[Bundle, None] = field(default_factory=dict)
    used_bytes_per_s: float = 0.0


@dataclass(slots=True, eq=False)
class Bundle:
    """Flows over the same links: fair rates are the same for all of them, so they are looked at together.

    Attributes:
        links: What each goes over, with the bytes that pass there for each of its own.
        since_s: When it last went over to another rate.
        moved_bytes: Of a flow that was there from the first, as of then.
        rate: Bytes a second of each flow from then on.
        ends: A heap: `moved_bytes` when a flow is over, its number, the event that fires then.
        finish_s: When the next one is over if nothing changes.
        bottleneck: The full link on which none is faster; None before the first rate.
    """

    links: Mapping[Link, float]
    since_s: float
    moved_bytes: float = 0.0
    rate: float = 0.0
    ends: list[tuple[float, int, simpy.Event]] = field(default_factory=list)
    finish_s: float = math.inf
    bottleneck: Link | None = None

    def pace(self, rate: float, now_s: float) -> None:
        """Go on at another rate."""
        self.use((rate - self.rate) * len(self.ends))
        self.moved_bytes += self.rate * (now_s - self.since_s)
        self.since_s, self.rate = now_s, rate
        self.look_ahead()

    def use(self, bytes_per_s: float) -> None:
        """Take so much more of the links, or less."""
        for link, share in self.links.items():
            link.used_bytes_per_s += bytes_per_s * share

    def held_up_by(self, link: Link | None) -> None:
        """Have another bottleneck, or none."""
        if self.bottleneck is not None:
            del self.bottleneck.holds_up[self]
        if link is not None:
            link.holds_up[self] = None
        self.bottleneck = link

    def look_ahead(self) -> None:
        """Reckon when the next flow is over."""
        moving = self.ends and self.rate
        self.finish_s = self.since_s + max(self.ends[0][0] - self.moved_bytes, 0.0) / self.rate if moving else math.inf


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

    When a flow begins or ends, rates are shared out anew among those that its links hold up, and then, until rates are
    fair again, among those too beside whom they are not.

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
        self._bundles: dict[tuple[tuple[Link, float], ...], Bundle] = {}
        self._changed: dict[Link, None] = {}  # since rates were last shared out
        self._due: list[tuple[float, int, Bundle]] = []  # a heap; what no longer holds is passed over
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
        bundle = self._bundles.setdefault(tuple(links.items()), Bundle(links, self.env.now))
        bundle.pace(0.0, self.env.now)  # until rates are shared out, at this moment
        heapq.heappush(bundle.ends, (bundle.moved_bytes + size_bytes, next(self._order), done))
        for link in links:
            link.bundles[bundle] = None
        self._change(links)

    def _end(self, bundle: Bundle) -> None:
        heapq.heappop(bundle.ends)[2].succeed()
        bundle.use(-bundle.rate)
        bundle.look_ahead()
        if bundle.ends:
            self._await(bundle)
        else:
            del self._bundles[tuple(bundle.links.items())]
            bundle.held_up_by(None)
            for link in bundle.links:
                del link.bundles[bundle]
                if not link.bundles:
                    link.used_bytes_per_s = 0.0  # what rounding left is forgotten
        self._change(bundle.links)

    def _await(self, bundle: Bundle) -> None:
        heapq.heappush(self._due, (bundle.finish_s, next(self._order), bundle))

    def _change(self, links: Iterable[Link]) -> None:
        """Share these links out anew, once for all that begins or ends at this moment."""
        if not self._changed:
            _then(self.env.timeout(0), self._share_out)
        self._changed.update(dict.fromkeys(links))

    def _share_out(self) -> None:
        now_s = self.env.now
        changed, self._changed = self._changed, {}
        rates: dict[Bundle, float] = {}
        more = [
            b for link in reversed(changed) for b in link.bundles if b.bottleneck is None or b.bottleneck in changed
        ]
        while more:
            rates = fair_rates((*rates, *more))
            more = _unfair_beside(rates)
        for bundle, rate in rates.items():
            if rate != bundle.rate:
                bundle.pace(rate, now_s)
                self._await(bundle)
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
            finish_s, _, bundle = heapq.heappop(self._due)
            if finish_s == bundle.finish_s:
                self._end(bundle)
        if due_s == self._timer_s:
            self._timer_s = math.inf
            self._set_timer()


def _then(event: simpy.Event, act: Callable[[], None]) -> None:
    assert event.callbacks is not None, "the event has not happened yet"
    event.callbacks.append(lambda _: act())


def _unfair_beside(rates: Mapping[Bundle, float]) -> list[Bundle]:
    """Flows without new rates that are too fast or too slow beside those with.

    Rates are max-min fair if each flow has a bottleneck, a full link on which none is faster (Bertsekas and Gallager,
    Data Networks, section 6.5.2). Links that no flow with a new rate goes over are as they were.
    """
    found: dict[Bundle, None] = {}
    for link in dict.fromkeys(link for bundle in rates for link in bundle.links if link.holds_up):
        held_up, fastest, spare = math.inf, 0.0, link.bytes_per_s
        others = []
        for bundle in link.bundles:
            rate = rates.get(bundle)
            if rate is None:
                others.append(bundle)
                rate = bundle.rate
            else:
                fastest = max(fastest, rate)
                if bundle.bottleneck is link:
                    held_up = rate
            spare -= rate * bundle.links[link] * len(bundle.ends)
        loose = spare > SAME_RATE * link.bytes_per_s
        for bundle in others:
            too_slow = bundle.bottleneck is link and (loose or fastest > bundle.rate * (1 + SAME_RATE))
            if too_slow or bundle.rate > held_up * (1 + SAME_RATE):
                found[bundle] = None
    return list(found)


def fair_rates(bundles: Iterable[Bundle]) -> dict[Bundle, float]:
    """Max-min fair rates by progressive filling: all grow alike until a link is full, whose flows then stay.

    Other flows over their links keep their rates. Each bundle's `bottleneck` is set. Bertsekas and Gallager, Data
    Networks, section 6.5.2.
    """
    growing = dict.fromkeys(bundles)
    # Of each link: capacity that flows with a rate leave, bytes for one byte of every growing flow, growing bundles.
    usage: dict[Link, list[float]] = {}
    for bundle in growing:
        flows = len(bundle.ends)
        for link, share in bundle.links.items():
            used = usage.get(link)
            if used is None:
                usage[link] = used = [link.bytes_per_s - link.used_bytes_per_s, 0.0, 0]
            used[0] += share * flows * bundle.rate
            used[1] += share * flows
            used[2] += 1
    rates: dict[Bundle, float] = {}
    while growing:
        full, (free, wanted, _) = min(usage.items(), key=lambda item: item[1][0] / item[1][1])
        level = max(free / wanted, 0.0)
        for bundle in [bundle for bundle in full.bundles if bundle in growing]:
            rates[bundle] = level
            bundle.held_up_by(full)
            del growing[bundle]
            flows = len(bundle.ends)
            for link, share in bundle.links.items():
                used = usage[link]
                used[0] -= share * flows * level
                used[1] -= share * flows
                used[2] -= 1
                if not used[2]:
                    del usage[link]
    return rates
