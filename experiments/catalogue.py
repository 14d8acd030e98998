"""What is installed and shipped: policies, presets, hardware; each with its source."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from simrl.experiments.config import preset_names, preset_text
from simrl.policies.registry import load_policy_class, policy_names
from simrl.traces.parameters import Parameter, section_names, shipped_parameters

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


def hardware() -> dict[str, list[Row]]:
    """Tables of the shipped parameters: node types, engine presets, prices, and every parameter."""
    table = shipped_parameters()
    return {
        "node types": [_node(name, table) for name in section_names(table, "node")],
        "engine presets": [_section("engine", name, table) for name in section_names(table, "engine")],
        "prices": [_section("price", name, table) for name in section_names(table, "price")],
        "parameters": [_parameter(parameter) for parameter in table.values()],
    }


def _node(name: str, table: Mapping[str, Parameter]) -> Row:
    row = _section("node", name, table)
    gpu = _section("gpu", str(row["gpu"]), table)
    price = _section("price", str(row["price"]), table)
    return {
        "name": name,
        "gpus": row["gpus"],
        "gpu": row["gpu"],
        "gpu_memory_bytes": gpu["memory_bytes"],
        "gpu_peak_flops": gpu["peak_flops"],
        "nic_bytes_per_s": row["nic_bytes_per_s"],
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
