"""A user's own GPUs, node types, models, prices and engine presets, from a TOML file in the form of the shipped."""

from __future__ import annotations

import contextlib
import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simrl.experiments import toml_text
from simrl.traces.job import Cluster
from simrl.traces.models import Model, model_names
from simrl.traces.parameters import (
    STATUSES,
    Hardware,
    Parameter,
    Parameters,
    check_known,
    check_number,
    did_you_mean,
    section_names,
    shipped_parameters,
)

SECTIONS = ("gpu", "node", "model", "price", "engine")
FORM = '{ value = 1e9, unit = "B", source = "data sheet", status = "derived" }'
ENTRY = tuple(field.name for field in dataclasses.fields(Parameter) if field.name != "key")
FIELDS_OF_MODEL = {field.name: field for field in dataclasses.fields(Model) if field.name != "name"}
REQUIRED_OF_MODEL = [name for name, field in FIELDS_OF_MODEL.items() if field.default is dataclasses.MISSING]
POINTERS = {"gpu": "gpu", "price": "price"}  # fields of a node that name an entry of another section


def load_parameters(cluster: Cluster) -> Parameters:
    """The parameters of *cluster*: shipped, of its hardware file, and as overridden.

    Raises:
        ValueError: The file or an override is wrong; see `read_hardware`.
    """
    return Parameters(cluster.parameters, read_hardware(cluster.hardware))


def read_hardware(path: str | None) -> Hardware:
    """What the file at *path* adds; nothing where there is none.

    Raises:
        ValueError: It cannot be read, or an entry is wrong: the message has file, line, key and what is allowed.
    """
    if path is None:
        return Hardware()
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"cluster.hardware={path!r} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    return _Reader(path, text).hardware(tree)


class _Reader:
    """Reads one file; every error of an entry begins with its place."""

    def __init__(self, path: str, text: str) -> None:
        self._path, self._text = path, text

    def hardware(self, tree: Mapping[str, Any]) -> Hardware:
        """All entries of the parsed file."""
        parameters: dict[str, Parameter] = {}
        models: dict[str, Model] = {}
        for section, names in tree.items():
            with self._at(section):
                check_known("section", section, list(SECTIONS))
                _check_table(section, names)
            for name, fields in names.items():
                with self._at(section, name):
                    _check_table(f"{section}.{name}", fields)
                    _check_is_new(section, name)
                if section == "model":
                    models[name.lower()] = self._model(name, fields)
                else:
                    parameters |= self._entries(section, name, fields)
        for key, parameter in parameters.items():
            self._check_pointer(key, parameter, parameters)
        return Hardware(parameters, models)

    def _entries(self, section: str, name: str, fields: Mapping[str, Any]) -> dict[str, Parameter]:
        """All parameters of one name; it must have those that shipped ones of its section have."""
        wanted, found = _fields_of(section), {}
        for field, entry in fields.items():
            with self._at(section, name, field):
                check_known(f"field of {section}.{name}", field, sorted(wanted))
                key = f"{section}.{name}.{field}"
                found[key] = _entry(key, entry, wanted[field])
        missing = [f"{field} ({example.unit})" for field, example in wanted.items() if field not in fields]
        with self._at(section, name):
            if missing:
                raise ValueError(f"{section}.{name} lacks {', '.join(missing)}")
        return found

    def _model(self, name: str, fields: Mapping[str, Any]) -> Model:
        for field, value in fields.items():
            with self._at("model", name, field):
                _check_model_field(f"model.{name}", field, value)
        with self._at("model", name):
            missing = [field for field in REQUIRED_OF_MODEL if field not in fields]
            if missing:
                raise ValueError(f"model.{name} lacks {', '.join(missing)}; they are in the model's config.json")
            if fields["heads"] % fields["kv_heads"]:
                raise ValueError(f"model.{name}.kv_heads={fields['kv_heads']} must divide heads={fields['heads']}")
        return Model(name=name.lower(), **fields)

    def _check_pointer(self, key: str, parameter: Parameter, own: Mapping[str, Parameter]) -> None:
        section, _, rest = key.partition(".")
        name, _, field = rest.rpartition(".")
        if section == "node" and field in POINTERS:
            with self._at(section, name, field):
                check_known(key, str(parameter.value), section_names({**shipped_parameters(), **own}, POINTERS[field]))

    @contextlib.contextmanager
    def _at(self, *where: str) -> Iterator[None]:
        """Errors of the block come with the file and the line of *where*."""
        try:
            yield
        except ValueError as error:
            line = toml_text.line_of(self._text, where)
            raise ValueError(f"{self._path}{'' if line is None else f':{line}'}: {error}") from None


def _check_table(name: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name}={given!r} must be a table")


def _check_is_new(section: str, name: str) -> None:
    shipped = model_names() if section == "model" else section_names(shipped_parameters(), section)
    if name.lower() in shipped:
        how = "" if section == "model" else f", or override its entries: cluster.parameters.{section}.{name}"
        raise ValueError(f"{section}.{name} is shipped: give yours another name{how}")


def _fields_of(section: str) -> dict[str, Parameter]:
    """Fields of a section by name, each with a shipped entry as an example."""
    keys = (key for key in shipped_parameters() if key.startswith(f"{section}."))
    return {key.rpartition(".")[2]: shipped_parameters()[key] for key in keys}


def _entry(key: str, given: object, example: Parameter) -> Parameter:
    if not isinstance(given, Mapping):
        raise ValueError(f"{key}={given!r} must be a table with value, unit and source, as in {FORM}")
    unknown = next((name for name in given if name not in ENTRY), None)
    if unknown is not None:
        raise ValueError(f"{key}.{unknown} is unknown{did_you_mean(unknown, list(ENTRY))}; known: {', '.join(ENTRY)}")
    missing = [name for name in ("value", "unit", "source") if not str(given.get(name, "")).strip()]
    if missing:
        raise ValueError(f"{key} lacks {' and '.join(missing)}; the form is {FORM}")
    if given["unit"] != example.unit:
        raise ValueError(f"{key}.unit={given['unit']!r} must be {example.unit!r}")
    value, status = _value(key, given["value"], example), given.get("status", "assumed")
    check_known(f"{key}.status", status, list(STATUSES))
    low, high = _range(key, given, value, status)
    return Parameter(key, value, example.unit, status, str(given["source"]), low, high)


def _value(key: str, value: object, example: Parameter) -> float | bool | str:
    for kind, name in ((str, "a text"), (bool, "true or false")):
        if isinstance(example.value, kind):
            if not isinstance(value, kind):
                raise ValueError(f"{key}.value={value!r} must be {name}, such as {example.value!r}")
            return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}.value={value!r} must be a number ({example.unit})")
    check_number(key, float(value), example.unit)
    return float(value)


def _range(
    key: str, given: Mapping[str, Any], value: float | bool | str, status: str
) -> tuple[float | None, float | None]:
    """Ends of what is held possible: of assumed numbers, the number itself where none are given."""
    if isinstance(value, bool | str) or status != "assumed":
        if "low" in given or "high" in given:
            raise ValueError(f"{key}: low and high belong to assumed numbers")
        return None, None
    low, high = given.get("low", value), given.get("high", value)
    if not all(isinstance(end, int | float) for end in (low, high)) or not low <= value <= high:
        raise ValueError(f"{key}: low={low!r} and high={high!r} must be numbers around the value {value!r}")
    return float(low), float(high)


def _check_model_field(model: str, field: str, value: object) -> None:
    check_known(f"field of {model}", field, list(FIELDS_OF_MODEL))
    kind = FIELDS_OF_MODEL[field].type
    right = {"int": type(value) is int and value > 0, "bool": type(value) is bool, "str": type(value) is str and value}
    if not right[str(kind)]:
        allowed = {"int": "a whole number of at least 1", "bool": "true or false", "str": "a text"}[str(kind)]
        raise ValueError(f"{model}.{field}={value!r} must be {allowed}")
