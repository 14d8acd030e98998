"""What is installed and shipped: policies, presets, hardware; each with its source."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simrl.experiments.config import ConfigError, preset_names, preset_text
from simrl.policies.registry import load_policy_class, policy_names
from simrl.traces.collectives import load_collectives
from simrl.traces.iteration import VLLM_VERSIONS, load_iteration_times
from simrl.traces.models import Model
from simrl.traces.parameters import Parameter, Parameters, section_names
from simrl.traces.roofline import load_roofline

Row = dict[str, Any]


def policies() -> list[Row]:
    """Installed policies: name, where, what (the first line of its docstring) and source."""
    return [{"name": name, "where": where, **_about(name)} for name, where in policy_names().items()]


def _about(name: str) -> Row:
    try:
        found = load_policy_class(name)
    except ValueError as error:  # one broken package must not hide the others
        return {"what": str(error), "source": ""}
    texts = [inspect.getdoc(found) or "", inspect.getdoc(sys.modules[found.__module__]) or ""]
    return {"what": texts[0].partition("\n")[0], "source": next(filter(None, map(_source, texts)), "")}


def _source(docstring: str) -> str:
    """The paragraph of a docstring that begins with "Source:"."""
    for paragraph in docstring.split("\n\n"):
        if paragraph.startswith("Source:"):
            return " ".join(paragraph.removeprefix("Source:").split())
    return ""


def presets() -> list[Row]:
    """Shipped presets: name, and the comment at the head of the file."""
    return [{"name": name, "what": _head(preset_text(name))} for name in preset_names()]


def _head(text: str) -> str:
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


def hardware(parameters: Parameters) -> dict[str, list[Row]]:
    """GPUs, node types, engine presets, prices, and every parameter with its source."""
    table = {parameter.key: parameter for parameter in parameters.entries()}
    return {
        "GPUs": [_gpu(name, table) for name in section_names(table, "gpu")],
        "node types": [_node(name, table) for name in section_names(table, "node")],
        "engine presets": [_section("engine", name, table) for name in section_names(table, "engine")],
        "prices": [_section("price", name, table) for name in section_names(table, "price")],
        "parameters": [_parameter(parameter) for parameter in table.values()],
    }


def _gpu(name: str, table: Mapping[str, Parameter]) -> Row:
    number = {key: float(value) for key, value in _section("gpu", name, table).items() if key != "name"}
    return {
        "name": name,
        "memory_gb": number["memory_bytes"] / 1e9,
        "peak_tflops": number["peak_flops"] / 1e12,
        "memory_gb_per_s": number["memory_bytes_per_s"] / 1e9,
        "link_gb_per_s": number["link_bytes_per_s"] / 1e9,
        "learn_mfu": number["learn_mfu"],
        "iteration_times": "tables" if name in VLLM_VERSIONS else "roofline",
        "collectives": "measured" if load_collectives(name) else "assumed",
    }


def _node(name: str, table: Mapping[str, Parameter]) -> Row:
    row = _section("node", name, table)
    price = _section("price", str(row["price"]), table)
    return {
        "name": name,
        "gpus": row["gpus"],
        "gpu": row["gpu"],
        "host_memory_gb": float(row["host_memory_bytes"]) / 1e9,
        "nic_gb_per_s": float(row["nic_bytes_per_s"]) / 1e9,
        "price": row["price"],
        "usd_per_hour": price["usd_per_hour"],
        "per": price["per"],
    }


def _section(section: str, name: str, table: Mapping[str, Parameter]) -> Row:
    prefix = f"{section}.{name}."
    return {"name": name} | {k.removeprefix(prefix): p.value for k, p in table.items() if k.startswith(prefix)}


def _parameter(parameter: Parameter) -> Row:
    return {
        "name": parameter.key,
        "value": parameter.value,
        "unit": parameter.unit,
        "status": parameter.status,
        "low": parameter.low,
        "high": parameter.high,
        "source": parameter.source,
    }


UTILIZATION = 0.9  # vLLM's default gpu_memory_utilization, which an engine has when no learner shares its GPUs
KV_TOKENS = 4096  # of KV that there must be room for, less where the model's context is shorter
GB = 1e9


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether an engine fits on its GPUs: bytes of each, and why it does not, empty when it does."""

    needs_bytes: float
    usable_bytes: float
    problem: str


def engine_fit(model: Model, gpu: str, tensor_parallel: int, parameters: Parameters) -> Fit:
    """Weights, activations and KV of one text on each of the GPUs of an engine that shares them with nobody."""
    memory = parameters.number(f"gpu.{gpu}.memory_bytes")
    weights = model.weight_bytes() / tensor_parallel
    activations = parameters.number("serving.activation_bytes_per_gpu")
    tokens = min(KV_TOKENS, model.max_context)
    kv = tokens * model.kv_bytes_per_token() / min(tensor_parallel, model.kv_heads)
    needs, usable, problem = weights + activations + kv, UTILIZATION * memory, ""
    if model.heads % tensor_parallel:
        problem = f"{model.heads} heads do not divide by {tensor_parallel}"
    elif needs > usable:
        problem = (
            f"each GPU needs {needs / GB:.1f} GB ({weights / GB:.1f} weights + {activations / GB:.1f} activations"
            f" + {kv / GB:.1f} KV of {tokens} tokens) and an engine may use {usable / GB:.1f} of {memory / GB:.1f} GB"
        )
    return Fit(needs, usable, problem)


DEGREES = (1, 2, 4, 8)
BATCHES = (1, 32, 128)
CONTEXT = 1024
KINDS_OF_TIMES = {"derived": "table (derived)", "assumed": "roofline (assumed)"}


def hardware_of_model(name: str, parameters: Parameters) -> dict[str, list[Row]]:
    """How *name* runs on each GPU at each engine size: decode times of the kernels alone, what does not fit, sources.

    Raises:
        ConfigError: There is no such model.
    """
    try:
        model = parameters.model(name)
    except ValueError as error:
        raise ConfigError(f"{error} (--model)") from None
    times, misfits, sources = list[Row](), list[Row](), dict[str, Row]()
    for gpu, degree in itertools.product(parameters.names_in("gpu"), DEGREES):
        fit, engine = engine_fit(model, gpu, degree, parameters), f"{gpu} TP {degree}"
        row: Row = {"name": gpu, "tp": degree, "times": "does not fit"}
        row |= {"needs_gb": round(fit.needs_bytes / GB, 1), "usable_gb": round(fit.usable_bytes / GB, 1)}
        row |= dict.fromkeys(f"b{batch}_ms" for batch in BATCHES)
        if fit.problem:
            misfits.append({"name": engine, "what": fit.problem})
        else:
            found = load_iteration_times(model, gpu, degree) or load_roofline(model, gpu, degree, parameters)
            row["times"] = KINDS_OF_TIMES[found.status]
            row |= {f"b{batch}_ms": round(found.decode_s(batch, CONTEXT) * 1e3, 3) for batch in BATCHES}
            sources.setdefault(found.source, {"name": engine, "what": found.source})
        times.append(row)
    return {
        f"one iteration of b responses that decode at {CONTEXT} tokens of context, kernels only": times,
        "does not fit": misfits,
        "sources of times": list(sources.values()),
        "source of the model": [{"name": model.name, "what": model.source}],
    }
