"""Derives traces/data/iteration_times.csv from the kernel measurements that aiconfigurator-core ships.

``python -m simrl.experiments.derive_iteration_times`` writes the table; with ``--check`` it prints how far look-ups in
the shipped table are from the estimator itself. Both need the extra ``simrl[aic]``.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from simrl.traces.iteration import (
    ATTENDED_KNOTS,
    BATCH_KNOTS,
    CONTEXT_KNOTS,
    TOKEN_KNOTS,
    IterationTimes,
    load_iteration_times,
)
from simrl.traces.models import Model, load_model

# resolve(): this folder is reached through a link, the table lies beside the real one.
TABLE = Path(__file__).resolve().parent.parent / "traces" / "data" / "iteration_times.csv"
COLUMNS = ("model", "gpu", "tensor_parallel", "kind", "tokens", "context", "milliseconds")
SYSTEMS = {"l40s": "l40s", "h100": "h100_sxm"}  # our name of the GPU: the estimator's
DEGREES = {
    ("qwen2.5-0.5b", "l40s"): (1, 2),
    ("qwen2.5-0.5b", "h100"): (1, 2),
    ("qwen2.5-3b", "l40s"): (1, 2, 4),
    ("qwen2.5-3b", "h100"): (1, 2, 4),
    ("qwen2.5-7b", "l40s"): (1, 2, 4),
    ("qwen2.5-7b", "h100"): (1, 2, 4),
    ("llama-2-70b", "h100"): (4, 8),
}


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
    """aiconfigurator-core's iteration model of vLLM 0.24.0 in bf16, on one node."""

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
            "backend_version": "0.24.0",
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
    config = {
        "architectures": ["Qwen2ForCausalLM" if model.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if model.qkv_bias else "llama",
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
    """Write the table of all `DEGREES`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, gpu, degree in _configurations():
            estimator = Estimator(load_model(name), gpu, degree, folder)
            writer.writerows((name, gpu, degree, *row) for row in rows(estimator))


def _configurations() -> Iterator[tuple[str, str, int]]:
    for (name, gpu), degrees in DEGREES.items():
        for degree in degrees:
            yield name, gpu, degree


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
    """Print the errors of every configuration in the shipped table."""
    print(f"{'':24s}{'decode':>24s}{'prefill':>24s}{'mixed':>24s}    (median, worst; bias in brackets)")
    for name, gpu, degree in _configurations():
        model = load_model(name)
        times = load_iteration_times(model, gpu, degree)
        if times is None:
            raise SystemExit(f"{TABLE} holds no {name} on {gpu} at TP {degree}: write it first")
        estimator = Estimator(model, gpu, degree, folder)
        parts = (decode_errors(times, estimator), prefill_errors(times, estimator), mixed_errors(times, estimator))
        print(f"{f'{name} {gpu} TP {degree}':24s}" + "".join(f"{_summary(part):>24s}" for part in parts))


def _summary(errors: Iterable[float]) -> str:
    signed = list(errors)
    sizes = [abs(error) for error in signed]
    return f"{statistics.median(sizes):.1%} {max(sizes):.1%} ({statistics.mean(signed):+.1%})"


def main() -> None:
    """Write the table, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the shipped table with the estimator")
    parser.add_argument("--output", type=Path, default=TABLE, help="where the table goes (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.check:
            check(Path(folder))
        else:
            write_table(args.output, Path(folder))


if __name__ == "__main__":
    main()
