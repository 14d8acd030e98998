"""Iteration times from data sheets, for a model on a GPU that no table covers.

Every GPU of an engine does its share of the linear layers and of attention, each at the slower of computing and reading
memory; a layer takes at least its kernels' latency, and under tensor parallelism two all-reduces.
``python -m simrl.experiments.derive_iteration_times --roofline`` prints how far this is from the shipped tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from simrl.traces.collectives import load_collectives
from simrl.traces.iteration import (
    ATTENDED_KNOTS,
    BATCH_KNOTS,
    CONTEXT_KNOTS,
    TOKEN_KNOTS,
    Execution,
    IterationTimes,
    Table,
)
from simrl.traces.models import Model
from simrl.traces.parameters import Parameters

KERNELS_ONLY = Execution()


@dataclass(frozen=True, slots=True)
class Rates:
    """What one GPU reaches, and what its engine's all-reduces take.

    Attributes:
        flops_per_s: In large matrix products.
        bytes_per_s: Reading its memory.
        layer_latency_s: Of a layer's kernels, however little they do.
        all_reduce_s: Seconds by the bytes of the message; not asked at tensor parallelism 1.
    """

    flops_per_s: float
    bytes_per_s: float
    layer_latency_s: float = 0.0
    all_reduce_s: Callable[[float], float] = lambda size_bytes: 0.0

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s"):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and > 0")
        if not 0 <= self.layer_latency_s < inf:
            raise ValueError(f"layer_latency_s={self.layer_latency_s} must be finite and >= 0")


def load_roofline(
    model: Model, gpu: str, tensor_parallel: int, parameters: Parameters, execution: Execution = KERNELS_ONLY
) -> IterationTimes:
    """Times of *model* on *tensor_parallel* GPUs, whose rates are in the parameter table."""
    number = parameters.number
    peak_flops, memory_bytes_per_s = number(f"gpu.{gpu}.peak_flops"), number(f"gpu.{gpu}.memory_bytes_per_s")
    efficiencies = number("roofline.flops_efficiency"), number("roofline.memory_efficiency")
    all_reduce_s, origin = _all_reduce(gpu, tensor_parallel, parameters)
    rates = Rates(
        peak_flops * efficiencies[0],
        memory_bytes_per_s * efficiencies[1],
        number("roofline.layer_latency_s"),
        all_reduce_s,
    )
    source = (
        f"roofline: {peak_flops:.4g} FLOP/s at {efficiencies[0]:g}, {memory_bytes_per_s:.4g} B/s at "
        f"{efficiencies[1]:g}, TP {tensor_parallel}{origin}"
    )
    return roofline_iteration_times(model, rates, tensor_parallel, execution=execution, source=source)


def _all_reduce(gpu: str, gpus: int, parameters: Parameters) -> tuple[Callable[[float], float], str]:
    """Seconds of an engine's all-reduce by bytes, and where they come from: measured ones where there are any."""
    if gpus == 1:
        return (lambda size_bytes: 0.0), ""
    measured = load_collectives(gpu)
    if measured is not None and gpus <= measured.measured_gpus("vllm_all_reduce")[-1]:
        return (lambda size_bytes: measured.seconds("vllm_all_reduce", size_bytes, gpus)), ", all-reduce measured"
    latency_s = parameters.number("roofline.allreduce_latency_s")
    rate = parameters.number(f"gpu.{gpu}.link_bytes_per_s") * parameters.number("roofline.allreduce_efficiency")
    # A ring sends each byte 2 (n - 1) / n times.
    return (lambda size_bytes: latency_s + 2 * (gpus - 1) / gpus * size_bytes / rate), f", all-reduce {rate:.4g} B/s"


def roofline_iteration_times(
    model: Model,
    rates: Rates,
    tensor_parallel: int,
    *,
    execution: Execution = KERNELS_ONLY,
    source: str = "roofline",
) -> IterationTimes:
    """Times at *rates*, on the shipped table's knots, in bf16.

    Raises:
        ValueError: ``tensor_parallel`` is below 1.
    """
    if tensor_parallel < 1:
        raise ValueError(f"tensor_parallel={tensor_parallel} must be at least 1")
    engine = _Engine(model, rates, tensor_parallel)
    decode = ((b, c, engine.decode_s(b, c)) for b in BATCH_KNOTS for c in CONTEXT_KNOTS)
    prefill = ((t, a, engine.prefill_s(t, a)) for t in TOKEN_KNOTS for a in ATTENDED_KNOTS)
    tables = Table.from_rows(decode), Table.from_rows(prefill)
    return IterationTimes(*tables, execution=execution, source=source, status="assumed")


@dataclass(frozen=True, slots=True)
class _Engine:
    """Seconds of one iteration of *model* over *gpus* GPUs."""

    model: Model
    rates: Rates
    gpus: int

    def decode_s(self, batch: int, context: float) -> float:
        read_tokens = batch * context
        return (
            self._linear_s(batch, logits=batch) + self._attention_s(batch, context, read_tokens) + self._fixed_s(batch)
        )

    def prefill_s(self, tokens: int, attended: float) -> float:
        # As one request: its last token attends to attended + tokens / 2. Several read more, but compute is the bound.
        read_tokens = attended + tokens / 2
        return (
            self._linear_s(tokens, logits=1) + self._attention_s(tokens, attended, read_tokens) + self._fixed_s(tokens)
        )

    def _linear_s(self, tokens: int, logits: int) -> float:
        model, head = self.model, self.model.vocab * self.model.hidden
        layers = model.parameters - head * (1 if model.tied_embeddings else 2)  # looking an embedding up costs nothing
        flops_s = 2 * (layers * tokens + head * logits) / self.gpus / self.rates.flops_per_s
        return max(flops_s, 2 * (layers + head) / self.gpus / self.rates.bytes_per_s)

    def _attention_s(self, tokens: int, attended: float, read_tokens: float) -> float:
        model = self.model
        flops = 4 * model.layers * model.heads * model.head_dim * tokens * attended  # scores and values, 2 FLOPs each
        # Key-value heads are divided among the GPUs while there are enough of them, then doubled.
        read_bytes = read_tokens * model.kv_bytes_per_token() / min(self.gpus, model.kv_heads)
        return max(flops / self.gpus / self.rates.flops_per_s, read_bytes / self.rates.bytes_per_s)

    def _fixed_s(self, tokens: int) -> float:
        """Kernel latencies, and two all-reduces a layer, after attention and after the feed-forward."""
        message_bytes = 2 * tokens * self.model.hidden
        all_reduces_s = 2 * self.rates.all_reduce_s(message_bytes) if self.gpus > 1 else 0.0
        return self.model.layers * (self.rates.layer_latency_s + all_reduces_s)
