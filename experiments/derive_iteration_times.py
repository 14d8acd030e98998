"""Derives the tables of iterations and of collectives from the kernel measurements that aiconfigurator-core ships.

``python -m simrl.experiments.derive_iteration_times`` writes traces/data/iteration_times.csv.gz and collectives.csv;
with ``--check`` it prints how far look-ups in the shipped table are from the estimator itself. Both need the extra
``simrl[aic]``. ``--roofline`` needs nothing: it prints how far the roofline is from the shipped table.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

from simrl.experiments.catalogue import engine_fit
from simrl.traces.collectives import KINDS
from simrl.traces.iteration import (
    ATTENDED_KNOTS,
    BATCH_KNOTS,
    CONTEXT_KNOTS,
    TOKEN_KNOTS,
    VLLM_VERSIONS,
    IterationTimes,
    load_iteration_times,
)
from simrl.traces.models import Model, load_model
from simrl.traces.parameters import Parameters
from simrl.traces.roofline import load_roofline

# resolve(): this folder is reached through a link, the tables lie beside the real one.
DATA = Path(__file__).resolve().parent.parent / "traces" / "data"
TABLE, COLLECTIVES = "iteration_times.csv.gz", "collectives.csv"
COLUMNS = ("model", "gpu", "tensor_parallel", "kind", "tokens", "context", "milliseconds")
COLLECTIVE_COLUMNS = ("gpu", "kind", "gpus", "bytes", "microseconds")
SYSTEMS = {"l40s": "l40s", "h100": "h100_sxm", "h200": "h200_sxm", "a100": "a100_sxm"}  # our name: the estimator's
NCCL = {"l40s": "2.27.3", "h100": "2.29.2", "h200": "2.29.2", "a100": "2.27.3"}  # the newest that the package has
VLLM_ALL_REDUCE = {"l40s": "0.22.0", "h100": "0.24.0", "h200": "0.24.0", "a100": "0.14.0"}
MODELS = (
    "qwen2.5-0.5b",
    "qwen2.5-3b",
    "qwen2.5-7b",
    "qwen2.5-14b",
    "qwen2.5-72b",
    "llama-2-70b",
    "llama-3.1-8b",
    "deepseek-llm-7b",
    "qwen3-4b",
)
DEGREES = (1, 2, 4, 8)
NOT_MEASURED = {("qwen2.5-0.5b", "a100")}  # the package has no attention of head size 64 there


@dataclass(frozen=True)
class Iteration:
    """What one iteration computes: prompt tokens after *cached_tokens*, and a token for each decoding request."""

    prefill_requests: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    decode_requests: int = 0
    context_tokens: int = 0

    @property
    def attended(self) -> float:
        """Tokens that a prompt token attends to, on average over requests of equal length."""
        return (self.cached_tokens + self.prefill_tokens / 2) / self.prefill_requests


class Estimator:
    """aiconfigurator-core's iteration model of vLLM in bf16, on one node."""

    def __init__(self, model: Model, gpu: str, tensor_parallel: int, folder: Path) -> None:
        try:
            from aiconfigurator_core.sdk import RustForwardPassPerfModel
        except ImportError:
            raise SystemExit("aiconfigurator-core is not installed: pip install 'simrl[aic]'") from None
        native = {
            "schema_version": 1,
            "model_name": str(_write_model_config(model, folder)),
            "system_name": SYSTEMS[gpu],
            "backend": "vllm",
            "backend_version": VLLM_VERSIONS[gpu],
            "tp_size": tensor_parallel,
            "pp_size": 1,
            "attention_dp_size": 1,
            "cp_size": None,
            "moe_tp_size": 1,
            "moe_ep_size": 1,
            "weight_dtype": "bfloat16",
            "activation_dtype": None,
            "moe_dtype": None,
            "kv_cache_dtype": None,
            "kv_block_size": 16,
            "nextn": None,
            "nextn_accept_rates": None,
            "extra": {},
        }
        self._model = RustForwardPassPerfModel.from_native(native)

    def milliseconds(self, iteration: Iteration) -> float:
        """The estimate, without CPU time."""
        requests: dict[str, Any] = {
            "num_prefill_requests": iteration.prefill_requests,
            "sum_prefill_tokens": iteration.prefill_tokens,
            "var_prefill_length": 0.0,  # the estimator ignores it
            "sum_prefill_kv_tokens": iteration.cached_tokens,
            "num_decode_requests": iteration.decode_requests,
            "sum_decode_kv_tokens": iteration.context_tokens,
        }
        return float(self._model.estimate_forward_pass_time_ms({"version": 1, "scheduled_requests": requests}))


def _write_model_config(model: Model, folder: Path) -> Path:
    """Describe a model that the estimator does not bundle, as its own config.json would."""
    architecture, model_type = "LlamaForCausalLM", "llama"
    if model.qkv_bias:
        architecture, model_type = "Qwen2ForCausalLM", "qwen2"
    elif model.qk_norm:
        architecture, model_type = "Qwen3ForCausalLM", "qwen3"
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.intermediate,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.max_context,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    }
    path = folder / model.name
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def decode(batch: int, context: int) -> Iteration:
    """*batch* requests of equal context."""
    return Iteration(decode_requests=batch, context_tokens=batch * context)


def prefill(tokens: int, attended: int) -> Iteration:
    """The fewest requests of equal length, fresh or after a cached prefix, whose tokens attend to *attended* tokens."""
    # The estimator rounds a request's length down, so that a number of requests that does not divide tokens loses some.
    requests = next(n for n in range(ceil(tokens / (2 * attended)), tokens + 1) if tokens % n == 0)
    return Iteration(requests, tokens, round(requests * attended - tokens / 2))


def rows(estimator: Estimator) -> Iterator[tuple[str, int, int, str]]:
    """(kind, tokens, context, milliseconds) of the whole grid."""
    for batch in BATCH_KNOTS:
        for context in CONTEXT_KNOTS:
            yield "decode", batch, context, f"{estimator.milliseconds(decode(batch, context)):.5g}"
    for tokens in TOKEN_KNOTS:
        for attended in ATTENDED_KNOTS:
            yield "prefill", tokens, attended, f"{estimator.milliseconds(prefill(tokens, attended)):.5g}"


def write_table(path: Path, folder: Path) -> None:
    """Write the iteration times of all `configurations`, the same bytes for the same times."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, gpu, degree in configurations():
        estimator = Estimator(load_model(name), gpu, degree, folder)
        writer.writerows((name, gpu, degree, *row) for row in rows(estimator))
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def configurations() -> Iterator[tuple[str, str, int]]:
    """(model, GPU, tensor-parallel degree) of all engines that fit and whose kernels were measured."""
    parameters = Parameters()
    for name, gpu, degree in product(MODELS, SYSTEMS, DEGREES):
        if (name, gpu) not in NOT_MEASURED and not engine_fit(load_model(name), gpu, degree, parameters).problem:
            yield name, gpu, degree


def write_collectives(path: Path) -> None:
    """Write the measured collectives; the package counts elements of two bytes, and milliseconds."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLLECTIVE_COLUMNS)
        for gpu in SYSTEMS:
            writer.writerows(collective_rows(gpu))


def collective_rows(gpu: str) -> Iterator[tuple[str, str, int, int, str]]:
    """(GPU, kind, GPUs, bytes, microseconds) of one GPU."""
    import aiconfigurator_core
    import pandas as pd

    folder = Path(aiconfigurator_core.__file__).parent / "systems" / "data" / SYSTEMS[gpu] / "comm"
    nccl = pd.read_parquet(folder / "nccl" / NCCL[gpu] / "nccl_perf.parquet")
    nccl = nccl[(nccl["nccl_dtype"] == "half") & nccl["op_name"].isin(KINDS)]
    engine = pd.read_parquet(folder / "vllm" / VLLM_ALL_REDUCE[gpu] / "custom_allreduce_perf.parquet")
    engine = engine[engine["backend"] == "vllm_graph"].assign(op_name="vllm_all_reduce")
    both = pd.concat([nccl, engine]).sort_values(["op_name", "num_gpus", "message_size"])
    for kind, gpus, elements, milliseconds in both[["op_name", "num_gpus", "message_size", "latency"]].to_numpy():
        yield gpu, kind, gpus, 2 * elements, f"{1e3 * milliseconds:.5g}"


def decode_errors(times: IterationTimes, estimator: Estimator) -> Iterator[float]:
    """Relative errors of decode iterations between the knots."""
    for batch in range(1, 513, 3):
        for context in (80, 300, 700, 1500, 3000, 6000, 12000):
            yield times.decode_s(batch, context) * 1e3 / estimator.milliseconds(decode(batch, context)) - 1


def prefill_errors(times: IterationTimes, estimator: Estimator) -> Iterator[float]:
    """Relative errors of pure prefills, over sizes, splits into requests and cached prefixes."""
    for tokens in (48, 192, 448, 640, 896, 1280, 2048, 2560, 5120, 8192, 12288):
        for requests in (1, 2, 4, 16, 64):
            for prefix in (0, 512, 4096):
                if tokens >= 16 * requests:
                    iteration = Iteration(requests, tokens, requests * prefix)
                    estimate_ms = estimator.milliseconds(iteration)
                    yield times.prefill_s(tokens, iteration.attended) * 1e3 / estimate_ms - 1


def mixed_errors(times: IterationTimes, estimator: Estimator) -> Iterator[float]:
    """Relative errors of iterations that prefill and decode at once."""
    for tokens in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        for requests, prefix in ((1, 0), (1, 1024), (4, 0), (4, 1024)):
            for batch in (1, 8, 32, 64, 128, 256):
                for context in (256, 1024, 4096):
                    iteration = Iteration(requests, tokens, requests * prefix, batch, batch * context)
                    ours_s = times.iteration_s(tokens, iteration.attended, batch, context)
                    yield ours_s * 1e3 / estimator.milliseconds(iteration) - 1


def check(folder: Path) -> None:
    """Print the errors of look-ups in the shipped table between its knots, over all engine sizes of a model and GPU."""
    print(f"{'':24s}{'decode':>24s}{'prefill':>24s}{'mixed':>24s}    (median, worst; bias in brackets)")
    errors: dict[tuple[str, str], tuple[list[float], list[float], list[float]]] = {}
    for name, gpu, degree in configurations():
        model, times = load_model(name), _shipped(name, gpu, degree)
        estimator = Estimator(model, gpu, degree, folder)
        decodes, prefills, mixed = errors.setdefault((name, gpu), ([], [], []))
        decodes += decode_errors(times, estimator)
        prefills += prefill_errors(times, estimator)
        mixed += mixed_errors(times, estimator)
    for (name, gpu), parts in errors.items():
        print(f"{f'{name} {gpu}':24s}" + "".join(f"{_summary(part):>24s}" for part in parts))


def check_roofline() -> None:
    """Print the errors of the roofline at the knots of the shipped table, by engine, and over all of a GPU."""
    print(f"{'':28s}{'decode':>26s}{'prefill':>26s}    (median, worst; bias in brackets)")
    by_gpu: dict[str, tuple[list[float], list[float]]] = {}
    for name, gpu, degree in configurations():
        model, measured = load_model(name), _shipped(name, gpu, degree)
        ours = load_roofline(model, gpu, degree, Parameters())
        decodes = [
            ours.decode_s(b, c) / measured.decode_s(b, c) - 1
            for b in BATCH_KNOTS
            for c in CONTEXT_KNOTS
            if c <= model.max_context
        ]
        prefills = [
            ours.prefill_s(t, a) / measured.prefill_s(t, a) - 1
            for t in TOKEN_KNOTS
            for a in ATTENDED_KNOTS
            if a <= model.max_context
        ]
        print(f"{f'{name} {gpu} TP {degree}':28s}{_summary(decodes):>26s}{_summary(prefills):>26s}")
        for pooled, part in zip(by_gpu.setdefault(gpu, ([], [])), (decodes, prefills), strict=True):
            pooled += part
    for gpu, (decodes, prefills) in by_gpu.items():
        print(f"{f'all on {gpu}':28s}{_summary(decodes):>26s}{_summary(prefills):>26s}")


def _shipped(name: str, gpu: str, degree: int) -> IterationTimes:
    times = load_iteration_times(load_model(name), gpu, degree)
    if times is None:
        raise SystemExit(f"{TABLE} holds no {name} on {gpu} at TP {degree}: write it first")
    return times


def _summary(errors: Iterable[float]) -> str:
    signed = list(errors)
    sizes = [abs(error) for error in signed]
    return f"{statistics.median(sizes):.1%} {max(sizes):.1%} ({statistics.mean(signed):+.1%})"


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the shipped table with the estimator")
    parser.add_argument("--roofline", action="store_true", help="compare the roofline with the shipped table")
    parser.add_argument("--output", type=Path, default=DATA, help="folder of the tables (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.roofline:
            check_roofline()
        elif args.check:
            check(Path(folder))
        else:
            write_table(args.output / TABLE, Path(folder))
            write_collectives(args.output / COLLECTIVES)


if __name__ == "__main__":
    main()
