"""Sourced constants: every number that a run uses, with its unit, where it comes from and how sure it is."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from simrl.traces.models import Model, load_model

NEVER_ZERO = ("B/s", "FLOP/s", "GPU", "core", "response", "token", "1")  # units of what is divided by
SHARES = ("mfu", "efficiency", "utilization")
STATUSES = ("measured", "derived", "assumed")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A constant and its origin.

    Attributes:
        key: Dotted path in the parameter table.
        value: Number, flag or name, in *unit*.
        unit: SI, or the thing that is counted.
        status: measured | derived | assumed.
        source: Log, paper, data sheet or price list; for an assumed one, the reasoning.
        low: Lower end of what is held possible; only for assumed numbers.
        high: Upper end.
    """

    key: str
    value: float | bool | str
    unit: str
    status: str
    source: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a user adds to the shipped tables: parameters by key, models by name in lower case."""

    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)


class Parameters:
    """The shipped parameter table, with what a user adds and overrides; remembers which entries were read."""

    def __init__(self, overrides: Mapping[str, Any] | None = None, hardware: Hardware = Hardware()) -> None:
        self._table = {**shipped_parameters(), **hardware.parameters}
        self._models = hardware.models
        self._used: dict[str, Parameter] = {}
        for key, value in _flatten(overrides or {}):
            self._override(key, value)

    def _override(self, key: str, value: object) -> None:
        shipped = self._table.get(key)
        if shipped is None:
            raise ValueError(f"cluster.parameters.{key} is unknown{did_you_mean(key, self._table)}")
        wanted = str if isinstance(shipped.value, str) else bool if isinstance(shipped.value, bool) else float
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, wanted):
            raise ValueError(f"cluster.parameters.{key}={value!r} must be a {wanted.__name__} ({shipped.unit})")
        if isinstance(value, float):
            check_number(f"cluster.parameters.{key}", value, shipped.unit)
        self._table[key] = set_by_user(shipped, value)

    def entry(self, key: str) -> Parameter:
        """The parameter at *key*, noted as used."""
        parameter = self._table.get(key)
        if parameter is None:
            raise ValueError(f"parameter {key!r} is unknown{did_you_mean(key, self._table)}")
        self._used[key] = parameter
        return parameter

    def number(self, key: str) -> float:
        """A numeric parameter's value."""
        value = self.entry(key).value
        assert not isinstance(value, str), f"{key} is a name"
        return float(value)

    def name(self, key: str) -> str:
        """A parameter that names something."""
        return str(self.entry(key).value)

    def model(self, name: str) -> Model:
        """A shipped model or one of the user's, noted as used.

        Raises:
            ValueError: No such model.
        """
        model = load_model(name, self._models)
        count = float(model.parameters)
        self.note(Parameter(f"model.{model.name}.parameters", count, "parameter", "derived", model.source))
        return model

    def note(self, parameter: Parameter) -> None:
        """Record a parameter that does not come from the table, so that it is listed with the run."""
        self._used[parameter.key] = parameter

    def entries(self) -> list[Parameter]:
        """The whole table; reading it notes nothing."""
        return list(self._table.values())

    def names_in(self, section: str) -> list[str]:
        """Entries below a section, for instance the node types in "node"."""
        return section_names(self._table, section)

    def used(self) -> list[Parameter]:
        """Every parameter that was read or noted, by key."""
        return [self._used[key] for key in sorted(self._used)]


def check_number(key: str, value: float, unit: str) -> None:
    """Raise ValueError, naming *key*, unless *value* is possible in *unit*."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{key}={value!r} must be a finite number of at least 0 ({unit})")
    if not value and unit in NEVER_ZERO:
        raise ValueError(f"{key}=0 must be above 0 ({unit})")
    if value > 1 and key.endswith(SHARES):
        raise ValueError(f"{key}={value!r} must be at most 1: it is a share")


def set_by_user(shipped: Parameter, value: float | bool | str) -> Parameter:
    """A user's value in place of a shipped one: an assumption of theirs, without a range of ours."""
    number = isinstance(value, float)
    return replace(
        shipped,
        value=value,
        status="assumed",
        source=f"set by the user; shipped: {shipped.value} ({shipped.source})",
        low=float(value) if number else None,
        high=float(value) if number else None,
    )


def section_names(table: Mapping[str, Parameter], section: str) -> list[str]:
    """Sorted names directly below *section*: `node.g6e.48xlarge.gpus` is in "node" as `g6e.48xlarge`."""
    return sorted(
        {key.removeprefix(section + ".").rpartition(".")[0] for key in table if key.startswith(section + ".")}
    )


@functools.cache
def shipped_parameters() -> Mapping[str, Parameter]:
    """The table that comes with simrl, by dotted key."""
    text = resources.files("simrl.traces").joinpath("data/parameters.toml").read_text(encoding="utf-8")
    return {key: Parameter(key=key, **fields) for key, fields in _leaves(tomllib.loads(text))}


def _leaves(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for name, node in tree.items():
        key = f"{path}.{name}" if path else name
        found += [(key, node)] if "value" in node else _leaves(node, key)
    return found


def _flatten(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, node in tree.items():
        key = f"{path}.{name}" if path else name
        found += _flatten(node, key) if isinstance(node, Mapping) else [(key, node)]
    return found


def did_you_mean(given: str, known: Mapping[str, object] | list[str] | tuple[str, ...]) -> str:
    """A clause for error messages: '; did you mean "x"?', or nothing where no known name is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_known(key: str, given: str, known: list[str]) -> None:
    """Raise ValueError, naming what is allowed, unless *given* is one of the *known* names."""
    if given not in known:
        raise ValueError(f"{key}={given!r} is unknown{did_you_mean(given, known)}; known: {', '.join(known)}")
