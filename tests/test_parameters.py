"""Every constant says where it comes from, and overrides are checked."""

from __future__ import annotations

from typing import Any

import pytest

from simrl.traces.models import load_model, model_names
from simrl.traces.parameters import STATUSES, Parameter, Parameters, shipped_parameters

SHIPPED = list(shipped_parameters().values())


def is_number(parameter: Parameter) -> bool:
    return isinstance(parameter.value, int | float) and not isinstance(parameter.value, bool)


def problems(parameter: Parameter) -> list[str]:
    """What is wrong with an entry."""
    found = []
    if not parameter.source.strip():
        found.append("no source")
    if not parameter.unit.strip():
        found.append("no unit")
    if parameter.status not in STATUSES:
        found.append(f"status {parameter.status}")
    if is_number(parameter) and parameter.status == "assumed" and not _in_range(parameter):
        found.append(f"range {parameter.low} to {parameter.high}")
    if parameter.status != "assumed" and (parameter.low is not None or parameter.high is not None):
        found.append("a range, though it is not assumed")
    return found


def _in_range(parameter: Parameter) -> bool:
    if parameter.low is None or parameter.high is None:
        return False
    return parameter.low <= float(parameter.value) <= parameter.high and parameter.low < parameter.high


@pytest.mark.parametrize("parameter", SHIPPED, ids=lambda parameter: parameter.key)
def test_every_constant_has_unit_status_source_and_range(parameter: Parameter) -> None:
    assert problems(parameter) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"source": " "}, {"unit": ""}, {"status": "guessed"}, {"status": "assumed"},
        {"status": "assumed", "low": 2.0, "high": 3.0}, {"low": 0.0},
    ],
)  # fmt: skip
def test_a_bad_entry_is_found(fields: dict[str, Any]) -> None:
    good: dict[str, Any] = {"key": "a.b", "value": 1.0, "unit": "s", "status": "measured", "source": "a log"}
    assert problems(Parameter(**good)) == []
    assert problems(Parameter(**{**good, **fields})) != []


@pytest.mark.parametrize("name", model_names())
def test_every_model_has_a_source(name: str) -> None:
    assert load_model(name).source.strip()


def test_names_refer_to_entries_that_exist() -> None:
    keys = shipped_parameters()
    for key, parameter in keys.items():
        if key.startswith("node.") and key.endswith(".gpu"):
            assert f"gpu.{parameter.value}.memory_bytes" in keys
        if key.startswith("node.") and key.endswith(".price"):
            assert f"price.{parameter.value}.usd_per_hour" in keys


def test_all_entries_of_a_kind_have_the_same_fields() -> None:
    for section in ("gpu", "node", "engine", "price"):
        fields: dict[str, set[str]] = {}
        for key in shipped_parameters():
            if key.startswith(f"{section}."):
                name, _, field = key.removeprefix(f"{section}.").rpartition(".")
                fields.setdefault(name, set()).add(field)
        assert len({frozenset(names) for names in fields.values()}) == 1, section


# --- overrides ---


def test_an_override_is_noted_with_what_it_replaced() -> None:
    parameters = Parameters({"gpu": {"l40s": {"learn_mfu": 0.4}}})
    assert parameters.number("gpu.l40s.learn_mfu") == 0.4
    used = {parameter.key: parameter for parameter in parameters.used()}
    shipped = shipped_parameters()["gpu.l40s.learn_mfu"]
    entry = used["gpu.l40s.learn_mfu"]
    assert entry.source.startswith(f"set by the user; shipped: {shipped.value}")
    assert shipped.source in entry.source
    assert (entry.status, entry.low, entry.high) == ("assumed", entry.value, entry.value)


@pytest.mark.parametrize(
    ("gpu", "reason"), [({"learn_mfu": 0}, "must be above 0"), ({"learn_mfu": 1.5}, "at most 1: it is a share")]
)
def test_impossible_values_are_refused(gpu, reason):
    with pytest.raises(ValueError, match=reason):
        Parameters({"gpu": {"l40s": gpu}})


def test_an_override_leaves_the_shipped_table_alone() -> None:
    Parameters({"gpu": {"l40s": {"learn_mfu": 0.4}}})
    assert Parameters().number("gpu.l40s.learn_mfu") == shipped_parameters()["gpu.l40s.learn_mfu"].value


def test_only_what_was_read_is_listed() -> None:
    parameters = Parameters({"gpu": {"l40s": {"learn_mfu": 0.4}}})
    parameters.number("network.latency_s")
    assert [parameter.key for parameter in parameters.used()] == ["network.latency_s"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"gpu": {"l40s": {"learn_mfo": 0.4}}}, "gpu.l40s.learn_mfo is unknown; did you mean 'gpu.l40s.learn_mfu'"),
        ({"gpu": {"l40s": {"learn_mfu": "high"}}}, "learn_mfu='high' must be a float"),
        ({"gpu": {"l40s": {"learn_mfu": True}}}, "learn_mfu=True must be a float"),
        ({"gpu": {"l40s": {"learn_mfu": -0.1}}}, "learn_mfu=-0.1 must be a finite number of at least 0"),
        ({"gpu": {"l40s": {"learn_mfu": float("nan")}}}, "learn_mfu=nan must be a finite number"),
        ({"gpu": {"l40s": {"learn_mfu": float("inf")}}}, "learn_mfu=inf must be a finite number"),
        ({"node": {"g6e.48xlarge": {"gpu": 3}}}, "gpu=3 must be a str"),
        ({"engine": {"vllm-current": {"enforce_eager": 1}}}, "enforce_eager=1 must be a bool"),
    ],
)
def test_a_bad_override_says_what_is_wrong(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Parameters(overrides)


def test_a_whole_number_will_do_where_a_fraction_is_expected() -> None:
    assert Parameters({"network": {"latency_s": 1}}).number("network.latency_s") == 1.0


def test_an_unknown_parameter_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'network.latency' is unknown; did you mean 'network.latency_s'"):
        Parameters().entry("network.latency")
