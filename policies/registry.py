"""Finding policies: by the name of an entry point, by import string, or as an object."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from simrl.policies.contract import Policy
from simrl.traces.parameters import did_you_mean

GROUP = "simrl.policies"


def policy_names() -> dict[str, str]:
    """Installed policies: name -> where it lives. Any package can add to the entry-point group "simrl.policies"."""
    return {entry.name: entry.value for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def load_policy_class(spec: str) -> type[Policy]:
    """The class behind an installed name or an import string `package.module:Class`.

    Modules in the working directory can be imported, as with `python -m`.

    Raises:
        ValueError: unknown name, module or class, or a class without `decide`.
    """
    if ":" not in spec:
        installed = policy_names()
        if spec not in installed:
            known = ", ".join(installed)
            raise ValueError(
                f"policy {spec!r} is unknown{did_you_mean(spec, installed)}; known: {known}, or package.module:Class"
            )
        spec = installed[spec]
    found = _import(spec)
    if not (inspect.isclass(found) and callable(getattr(found, "decide", None))):
        raise ValueError(f"policy {spec!r} is no class with a method decide(observation)")
    return cast("type[Policy]", found)


def _import(spec: str) -> object:
    module_name, _, attribute = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ValueError(f"policy {spec!r}: there is no module {error.name!r} (looked in {here} too)") from error
        raise ValueError(f"policy {spec!r}: importing it failed: {error}") from error
    except Exception as error:  # the user's own module may fail in any way
        raise ValueError(f"policy {spec!r}: importing it failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise ValueError(f"policy {spec!r}: {module_name} has no {attribute!r}{did_you_mean(attribute, names)}")
    return getattr(module, attribute)


def params_class(policy_class: type[Policy]) -> type[BaseModel] | None:
    """The pydantic model of a policy's parameters, if it has any."""
    params = getattr(policy_class, "Params", None)
    return params if inspect.isclass(params) and issubclass(params, BaseModel) else None


def build_policy(policy_class: type[Policy], params: Mapping[str, Any], oracle: object = None) -> Policy:
    """An instance with validated parameters.

    Args:
        policy_class: From `load_policy_class`.
        params: By name or alias.
        oracle: The workload's true lengths. Given only to a policy whose constructor asks for `oracle`.

    Raises:
        pydantic.ValidationError: a parameter is unknown or out of range.
        ValueError: parameters for a policy that has none.
    """
    model = params_class(policy_class)
    arguments: dict[str, Any] = {}
    if model is not None:
        arguments["params"] = model.model_validate(dict(params))
    elif params:
        raise ValueError(f"policy.{next(iter(params))}: {policy_class.__name__} has no parameters")
    if "oracle" in inspect.signature(policy_class).parameters:
        arguments["oracle"] = oracle
    try:
        return policy_class(**arguments)
    except ValueError:
        raise
    except Exception as error:  # somebody else's code may fail in any way
        raise ValueError(f"{policy_class.__name__} cannot be made: {type(error).__name__}: {error}") from error
