"""How long collectives take between the GPUs of one node.

The shipped table, `data/collectives.csv`, comes from aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), whose project ran
nccl-tests (NCCL 2.27.3 on L40S and A100, 2.29.2 on H100 and H200) and vLLM's own all-reduce in a CUDA graph on the GPUs
themselves; `simrl.experiments.derive_iteration_times` copied the measurements on 2026-11-22, elements of two bytes
turned into bytes. Nothing in it was measured between nodes.

The L40S of that host are slow together: a bus bandwidth of 20 GB/s between two of them, 5 GB/s over four, 1.2 to
1.7 GB/s over eight. A host whose GPUs reach each other directly will be faster; no public table of one is known to us.
"""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import pairwise
from math import exp, inf, log
from typing import Literal, get_args

SOURCE = (
    "aiconfigurator-core 0.12.0 (Apache-2.0): its measurements of NCCL and of vLLM's all-reduce inside one node; "
    "derived 2026-11-22 by simrl.experiments.derive_iteration_times"
)

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "vllm_all_reduce"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Curve = tuple[tuple[float, float], ...]
"""(bytes, seconds), ascending in bytes."""


@dataclass(frozen=True, slots=True)
class Collectives:
    """Measured seconds of collectives on one kind of GPU.

    Attributes:
        gpu: Its name in the parameter table.
        curves: By kind and number of GPUs.
        source: Where they come from.

    Raises:
        ValueError: A curve is empty, does not ascend in bytes, or has a time that is not positive and finite.
    """

    gpu: str
    curves: Mapping[tuple[str, int], Curve]
    source: str = SOURCE

    def __post_init__(self) -> None:
        for (kind, gpus), curve in self.curves.items():
            where = f"{kind} over {gpus} x {self.gpu}"
            if not curve or curve[0][0] <= 0 or any(a[0] >= b[0] for a, b in pairwise(curve)):
                raise ValueError(f"{where}: sizes must be positive and ascend, got {[size for size, _ in curve]}")
            if not all(0 < seconds < inf for _, seconds in curve):
                raise ValueError(f"{where}: seconds must be positive and finite, got {[s for _, s in curve]}")

    def measured_gpus(self, kind: Kind) -> tuple[int, ...]:
        """Numbers of GPUs that *kind* was measured on, ascending."""
        return tuple(sorted(gpus for name, gpus in self.curves if name == kind))

    def seconds(self, kind: Kind, size_bytes: float, gpus: int) -> float:
        """Seconds of one collective over *gpus* GPUs of one node; 0 for a single GPU or nothing to send.

        Between measured sizes the logarithm of the time is linear in that of the size; below the smallest its time
        holds, beyond the largest its bandwidth. Between measured numbers of GPUs the time is linear in the number.

        Args:
            kind: NCCL's all_gather, reduce_scatter or all_reduce; vllm_all_reduce, which engines use.
            size_bytes: The whole buffer: what an all-gather leaves on each GPU, what a reduce-scatter starts from,
                what an all-reduce has on each GPU before and after.
            gpus: At most as many as were measured.

        Raises:
            ValueError: no such kind, a negative size, or more GPUs than were measured.
        """
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
        if not 0 <= size_bytes < inf:
            raise ValueError(f"size_bytes={size_bytes} must be finite and >= 0")
        counts = self.measured_gpus(kind)
        if not counts:
            raise ValueError(f"{kind} was not measured on {self.gpu}")
        if not 1 <= gpus <= counts[-1]:
            raise ValueError(f"gpus={gpus} of {self.gpu}: {kind} was measured over up to {counts[-1]} GPUs of a node")
        if gpus == 1 or not size_bytes:
            return 0.0
        i = bisect_left(counts, gpus)
        many_s = _at(self.curves[kind, counts[i]], size_bytes)
        if counts[i] == gpus or i == 0:
            return many_s
        few_s = _at(self.curves[kind, counts[i - 1]], size_bytes)
        return few_s + (many_s - few_s) * (gpus - counts[i - 1]) / (counts[i] - counts[i - 1])


def _at(curve: Curve, size_bytes: float) -> float:
    i = bisect_left(curve, (size_bytes,))
    if i == 0:
        return curve[0][1]
    if i == len(curve):
        return curve[-1][1] * size_bytes / curve[-1][0]
    (low, low_s), (high, high_s) = curve[i - 1], curve[i]
    share = log(size_bytes / low) / log(high / low)
    return exp(log(low_s) + share * log(high_s / low_s))


def load_collectives(gpu: str) -> Collectives | None:
    """The shipped measurements of *gpu*, in any case; None when there are none."""
    return _shipped().get(gpu.lower())


@cache
def _shipped() -> dict[str, Collectives]:
    curves: dict[str, dict[tuple[str, int], list[tuple[float, float]]]] = {}
    path = files("simrl.traces").joinpath("data/collectives.csv")
    for line in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        curve = curves.setdefault(line["gpu"], {}).setdefault((line["kind"], int(line["gpus"])), [])
        curve.append((float(line["bytes"]), float(line["microseconds"]) / 1e6))
    return {gpu: Collectives(gpu, {key: tuple(points) for key, points in by.items()}) for gpu, by in curves.items()}
