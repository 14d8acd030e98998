"""What a run is: preset < --config file < --set < flags, checked, with the origin of every value in errors."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from simrl.experiments import toml_text
from simrl.experiments.hardware_file import load_parameters, read_hardware
from simrl.policies.registry import load_policy_class, params_class
from simrl.traces.job import Billing, Cluster, Engine, Faults, Job, Section
from simrl.traces.lengths import load_workload, workload_names
from simrl.traces.parameters import Parameters, check_known
from simrl.traces.profile import load_profile

DEFAULT_PRESET = "g6e"
SECTIONS: dict[str, type[Section]] = {
    "job": Job, "cluster": Cluster, "engine": Engine, "billing": Billing, "faults": Faults,
}  # fmt: skip
NAME_OF_POLICY: toml_text.Path = ("policy", "name")


class ConfigError(ValueError):
    """Something in a configuration that the user can mend: what was given, what is allowed, where it came from."""


class Config(Section):
    """Everything that determines a run, resolved.

    Attributes:
        preset: The preset that it began with.
        policy: Installed name or `package.module:Class`.
        policy_params: The policy's parameters as given, by alias; the others have their defaults.
        job: What is trained.
        cluster: On which machines.
        engine: With which rollout engine.
        billing: At which price.
        faults: What breaks.
        seed: Root of all random streams.
    """

    preset: str = DEFAULT_PRESET
    policy: str = "verl"
    policy_params: dict[str, Any] = Field(default_factory=dict)
    job: Job = Field(default_factory=Job)
    cluster: Cluster = Field(default_factory=Cluster)
    engine: Engine = Field(default_factory=Engine)
    billing: Billing = Field(default_factory=Billing)
    faults: Faults = Field(default_factory=Faults)
    seed: int = Field(0, ge=0, lt=2**128)

    def with_seed(self, seed: int) -> Self:
        """The same run, drawn anew."""
        return self.model_copy(update={"seed": seed})

    def with_policy(self, policy: str) -> Self:
        """The same run under another policy, which keeps those given parameters that it knows."""
        known = _param_fields(_policy_class(Given(policy, "as an argument")))
        params = self.policy_params if known is None else {k: v for k, v in self.policy_params.items() if k in known}
        return self.model_copy(update={"policy": policy, "policy_params": params})

    def with_values(self, values: Mapping[str, Any]) -> Config:
        """The same run with other values at dotted paths, as in `{"cluster.nodes": 20, "policy.lambda": 0.5}`.

        Raises:
            ConfigError: a path is unknown or a value is not allowed.
        """
        own = Layer({path: Given(value, "the configuration") for path, value in toml_text.leaves_of(_tree(self))})
        new = Layer({toml_text.parse_key(path): Given(value, "with_values") for path, value in values.items()})
        return resolve([own, new], policies=None)


@dataclass(frozen=True, slots=True)
class Given:
    """A value, and how to tell the user where it came from."""

    value: Any
    origin: str
    shown_as: str | None = None  # a flag's name instead of the path


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place."""

    values: Mapping[toml_text.Path, Given] = field(default_factory=dict)

    @classmethod
    def from_toml(cls, text: str, origin: str) -> Layer:
        """The values in TOML *text*.

        Raises:
            ConfigError: it is no TOML; with the line.
        """
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            place = re.search(r" \(at line (\d+), column \d+\)", str(error))
            # At the end of the document tomllib gives no line: it is the last one.
            line = int(place[1]) if place else len(text.splitlines())
            reason = str(error).replace(place[0], "") if place else str(error)
            raise ConfigError(f"{origin}:{line}: not valid TOML: {reason}") from None
        values = {}
        for path, value in toml_text.leaves_of(tree):
            line_number = toml_text.line_of(text, path)
            values[path] = Given(value, origin if line_number is None else f"{origin}:{line_number}")
        return cls(values)

    @classmethod
    def from_sets(cls, assignments: Sequence[str]) -> Layer:
        """The values of `--set a.b=v` options; a later one wins."""
        values = {}
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or not key.strip():
                raise ConfigError(f"--set {assignment}: must have the form section.key=value")
            try:
                path = toml_text.parse_key(key.strip())
            except ValueError as error:
                raise ConfigError(f"--set {assignment}: {error}") from None
            values[path] = Given(toml_text.parse_value(text.strip()), f"--set {assignment}")
        return cls(values)


def load_config(
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    sets: Sequence[str] = (),
    policy: str | None = None,
    nodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    policies: Sequence[str] | None = None,
) -> Config:
    """Resolve a configuration: preset, then file, then `sets`, then the other arguments; each overrides those before.

    A file that names a policy gives its parameters to that policy only: under another one they do not hold.

    Args:
        preset: A shipped one; None takes the file's, else the default.
        config: A TOML file with the sections job, cluster, engine, billing, faults and policy.
        sets: "section.key=value", the value in TOML or a bare text.
        policy: Name or import string.
        nodes: `cluster.nodes`.
        steps: `job.steps`.
        seed: Root of all random streams.
        policies: Several policies that share the configuration: each parameter must be known to one of them.

    Raises:
        ConfigError: in one line, what was given, what is allowed and where it came from.
    """
    layers = layers_of(preset=preset, config=config, sets=sets, policy=policy, nodes=nodes, steps=steps, seed=seed)
    return resolve(layers, policies)


def layers_of(
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    sets: Sequence[str] = (),
    policy: str | None = None,
    nodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
) -> list[Layer]:
    """The preset, the file, `sets` and the other arguments, as `load_config` takes them.

    Raises:
        ConfigError: a file or an assignment cannot be read, or the preset is unknown.
    """
    file = _read_file(Path(config)) if config is not None else Layer()
    flags: dict[toml_text.Path, Given] = {}
    for path, flag, value in (
        (("preset",), "preset", preset),
        (NAME_OF_POLICY, "policy", policy),
        (("cluster", "nodes"), "nodes", nodes),
        (("job", "steps"), "steps", steps),
        (("seed",), "seed", seed),
    ):
        if value is not None:
            flags[path] = Given(value, f"--{flag}", flag)
    upper = [file, Layer.from_sets(sets), Layer(flags)]
    base = next((layer.values[("preset",)] for layer in reversed(upper) if ("preset",) in layer.values), None)
    return [_read_preset(base or Given(DEFAULT_PRESET, "the default")), *upper]


def preset_names() -> list[str]:
    """Presets that come with simrl."""
    names = [entry.name for entry in resources.files("simrl.experiments").joinpath("presets").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def preset_text(name: str) -> str:
    """A preset's TOML."""
    return resources.files("simrl.experiments").joinpath(f"presets/{name}.toml").read_text(encoding="utf-8")


def _read_preset(given: Given) -> Layer:
    if not isinstance(given.value, str):
        raise ConfigError(f"preset={_shown(given.value)} must be a text ({given.origin})")
    try:
        check_known("preset", given.value, preset_names())
    except ValueError as error:
        raise ConfigError(f"{error} ({given.origin})") from None
    layer = Layer.from_toml(preset_text(given.value), f"preset {given.value}")
    return Layer({**layer.values, ("preset",): given})


def _read_file(path: Path) -> Layer:
    if not path.exists():
        raise ConfigError(f"config file {str(path)!r} does not exist (--config)")
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} is not a file (--config)")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"config file {str(path)!r} is not TOML: it is not UTF-8 text (--config)") from None
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror} (--config)") from None
    return Layer.from_toml(text, str(path))


# --- from layers to a Config ---


def resolve(layers: Sequence[Layer], policies: Sequence[str] | None = None) -> Config:
    """The configuration that *layers* make, a later one over those before; see `load_config`.

    Raises:
        ConfigError: as `load_config` does.
    """
    merged = merge(layers)
    name = merged.get(NAME_OF_POLICY, Given(Config.model_fields["policy"].default, "the default"))
    classes = [_policy_class(Given(policy, "--policies")) for policy in policies or ()] or [_policy_class(name)]
    _check_keys(merged, classes)
    tree = _nested(merged)
    params = tree.pop("policy", {})
    params.pop("name", None)
    for policy_class in classes:
        _check_params(policy_class, params, merged)
    config: Config = _validated(Config, {**tree, "policy": name.value, "policy_params": params}, merged, ())
    _check_names(config, merged)
    return _with_whole_paths(config)


def _with_whole_paths(config: Config) -> Config:
    """Files by their absolute paths, so that the run's config.toml means the same from everywhere."""
    for section, key in (("job", "workload"), ("cluster", "hardware"), ("engine", "profile")):
        part = getattr(config, section)
        name = getattr(part, key)
        if name is not None and not (key == "workload" and name in workload_names()):
            update = {key: str(Path(name).resolve())}
            config = config.model_copy(update={section: part.model_copy(update=update)})
    return config


def merge(layers: Sequence[Layer]) -> dict[toml_text.Path, Given]:
    """One value a path, the last given. Parameters of a policy that a later layer replaces are left out."""
    named = [layer.values[NAME_OF_POLICY].value if NAME_OF_POLICY in layer.values else None for layer in layers]
    final = next((name for name in reversed(named) if name is not None), None)
    merged: dict[toml_text.Path, Given] = {}
    for layer, name in zip(layers, named, strict=True):
        foreign = name is not None and name != final
        merged |= {path: given for path, given in layer.values.items() if not (foreign and path[0] == "policy")}
    return merged


def _nested(merged: Mapping[toml_text.Path, Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, given in merged.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{_dotted(path)}: {name} is a value already, it has no parts ({given.origin})")
        node[path[-1]] = given.value
    return tree


def _policy_class(name: Given) -> type[Any]:
    if not isinstance(name.value, str):
        raise ConfigError(f"policy.name={name.value!r} must be a text ({name.origin})")
    try:
        return load_policy_class(name.value)
    except ValueError as error:
        raise ConfigError(f"{error} ({name.origin})") from error


def _param_fields(policy_class: type[Any]) -> dict[str, FieldInfo] | None:
    """A policy's parameters by alias; None when it takes any."""
    model = params_class(policy_class)
    if model is None:
        return {}
    if model.model_config.get("extra") == "allow":
        return None
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _check_keys(merged: Mapping[toml_text.Path, Given], classes: Sequence[type[Any]]) -> None:
    per_class = [_param_fields(policy_class) for policy_class in classes]
    any_param = any(fields is None for fields in per_class)
    params = {name for fields in per_class for name in fields or ()}
    known = [*_section_paths(), "policy.name", *(f"policy.{name}" for name in sorted(params)), "preset", "seed"]
    for path, given in merged.items():
        if len(path) == 1 and path[0] in (*SECTIONS, "policy"):
            raise ConfigError(f"{path[0]}={_shown(given.value)} must be a table ({given.origin})")
        if path[0] == "policy" and len(path) > 1 and (any_param or path[1] in params):
            continue
        if path[:2] == ("cluster", "parameters") and len(path) > 2:
            continue  # checked against the parameter table
        if _dotted(path) not in known:
            raise ConfigError(f"{_dotted(path)} is unknown{_suggestion(path, known)} ({given.origin})")


@cache
def _section_paths() -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields)


def _suggestion(path: toml_text.Path, known: Sequence[str]) -> str:
    """The nearest known path, else one whose last part is near, else what the section has."""
    near = difflib.get_close_matches(_dotted(path), known, n=1, cutoff=0.75)
    if not near:
        by_last = {name.rpartition(".")[2]: name for name in known}
        near = [by_last[last] for last in difflib.get_close_matches(path[-1], by_last, n=1)]
    if near:
        return f"; did you mean {near[0]!r}?"
    section = [name for name in known if name.startswith(path[0] + ".") and name != "policy.name"]
    if path[0] == "policy" and not section:
        return "; the policy has no parameters"
    return f"; known: {', '.join(section or [*SECTIONS, 'policy', 'preset', 'seed'])}"


def _check_params(policy_class: type[Any], params: Mapping[str, Any], merged: Mapping[toml_text.Path, Given]) -> None:
    model, known = params_class(policy_class), _param_fields(policy_class)
    if model is not None:
        mine = {name: value for name, value in params.items() if known is None or name in known}
        _validated(model, mine, merged, ("policy",))


def _validated(
    model: type[BaseModel],
    tree: Mapping[str, Any],
    merged: Mapping[toml_text.Path, Given],
    prefix: toml_text.Path,
) -> Any:
    """An instance, or a ConfigError for the first problem."""
    try:
        # JSON mode: strict about types (true is no number), yet lists may become tuples and texts enums.
        return model.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, merged, prefix)) from None


def _explain(
    error: ValidationError, model: type[BaseModel], merged: Mapping[toml_text.Path, Given], prefix: toml_text.Path
) -> str:
    first = error.errors()[0]
    path = (*prefix, *map(str, first["loc"]))
    if first["type"] == "value_error":  # a rule of ours over several keys
        message = str(first["msg"]).removeprefix("Value error, ")
        return f"{'.'.join(path[:1])}: {message} ({_origin_of_rule(path, message, merged)})"
    if first["type"] == "missing":
        return f"{_dotted(path)} is missing, and has no default"
    given = merged.get(path) or Given(first["input"], _origins_below(path, merged))
    info = _field(model, tuple(map(str, first["loc"])))
    allowed = f"must be {_allowed(info)}" if info is not None and _allowed(info) else str(first["msg"])
    if given.shown_as and _type_is_right(given.value, info):  # a flag's type was checked: tell only its range
        allowed = f"must be {_bounds(info)}" if info is not None and _bounds(info) else allowed
    return f"{given.shown_as or _dotted(path)}={_shown(given.value)} {allowed} ({given.origin})"


def _origin_of_rule(path: toml_text.Path, message: str, merged: Mapping[toml_text.Path, Given]) -> str:
    """Where the keys that a message names were given; the preset's only when nobody else's."""
    words = set(re.findall(r"\w+", message))
    origins = [given.origin for key, given in merged.items() if key[: len(path)] == path and key[-1] in words]
    users = [origin for origin in origins if not origin.startswith("preset ")]
    return ", ".join(dict.fromkeys(users or origins)) or "the configuration"


def _origins_below(path: toml_text.Path, merged: Mapping[toml_text.Path, Given]) -> str:
    """Where anything at *path*, below it or above it was given."""
    near = [given.origin for key, given in merged.items() if key[: len(path)] == path or path[: len(key)] == key]
    return ", ".join(dict.fromkeys(near)) or "the configuration"


def _field(model: type[BaseModel], path: toml_text.Path) -> FieldInfo | None:
    info = next((f for name, f in model.model_fields.items() if path and path[0] in (name, f.alias)), None)
    if info is None or len(path) == 1:
        return info
    inner = info.annotation
    return _field(inner, path[1:]) if isinstance(inner, type) and issubclass(inner, BaseModel) else None


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a table",
}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _allowed(info: FieldInfo) -> str:
    """What a field takes, in words."""
    types = _types(info)
    if len(types) == 1 and get_origin(types[0]) is Literal:
        return "one of " + ", ".join(map(repr, get_args(types[0])))
    kinds = [_KINDS.get(get_origin(kind) or kind, "") for kind in types]
    if not all(kinds):
        return ""
    bounds = _bounds(info)
    of = " of " if bounds.startswith("at") else " "
    return " or ".join(kinds) + (of + bounds if bounds else "")


def _types(info: FieldInfo) -> list[Any]:
    annotation: Any = info.annotation
    union = get_origin(annotation) in (Union, UnionType)
    return [kind for kind in (get_args(annotation) if union else (annotation,)) if kind is not NoneType]


def _bounds(info: FieldInfo | None) -> str:
    found = []
    for item in info.metadata if info is not None else ():
        found += [f"{word} {getattr(item, name)}" for name, word in _BOUNDS.items() if hasattr(item, name)]
    return " and ".join(found)


def _type_is_right(value: object, info: FieldInfo | None) -> bool:
    return info is not None and type(value) in _types(info)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_names(config: Config, merged: Mapping[toml_text.Path, Given]) -> None:
    """Names and combinations that only the shipped tables can judge."""

    def checked(path: toml_text.Path, check: Callable[[], object]) -> Any:
        try:
            return check()
        except ValueError as error:
            section = len(path) == 1  # a rule over several keys
            origin = _origin_of_rule(path, str(error), merged) if section else _origins_below(path, merged)
            raise ConfigError(f"{error} ({origin})") from None

    checked(("cluster", "hardware"), lambda: read_hardware(config.cluster.hardware))
    table = checked(("cluster", "parameters"), lambda: load_parameters(config.cluster))
    node_type = config.cluster.node_type
    checked(("cluster", "node_type"), lambda: check_known("cluster.node_type", node_type, table.names_in("node")))
    checked(("engine", "preset"), lambda: check_known("engine.preset", config.engine.preset, table.names_in("engine")))
    price = config.billing.price
    if price is not None:
        checked(("billing", "price"), lambda: check_known("billing.price", price, table.names_in("price")))
    checked(("job", "workload"), lambda: load_workload(config.job.workload))
    checked(("job", "model"), lambda: table.model(config.job.model))
    if config.job.reward_model is not None:
        reward_model = config.job.reward_model
        checked(("job", "reward_model"), lambda: table.model(reward_model))
    checked(("job", "max_response_tokens"), lambda: check_context(config.job, table))
    if config.engine.profile is not None:
        path = config.engine.profile
        checked(("engine", "profile"), lambda: load_profile(path))
    gpus = int(table.number(f"node.{node_type}.gpus"))
    checked(("engine", "tensor_parallel"), lambda: check_tensor_parallel(config.engine, node_type, gpus))
    checked(("job", "learner_tensor_parallel"), lambda: check_learner(config.job, node_type, gpus))
    checked(("engine",), lambda: check_token_budget(config.engine, table))
    checked(("faults", "at"), lambda: check_faults(config.faults, config.cluster.nodes))


def check_context(job: Job, parameters: Parameters) -> None:
    """Raise ValueError unless the longest response fits the model's context."""
    longest, allowed = job.max_prompt_tokens + job.max_response_tokens, parameters.model(job.model).max_context
    if longest > allowed:
        raise ValueError(
            f"job.max_prompt_tokens={job.max_prompt_tokens} + job.max_response_tokens={job.max_response_tokens}"
            f" must be at most {allowed}, the context of {job.model}"
        )


def check_tensor_parallel(engine: Engine, node_type: str, gpus: int) -> None:
    """Raise ValueError unless engines fill a node."""
    if gpus % engine.tensor_parallel:
        raise ValueError(
            f"engine.tensor_parallel={engine.tensor_parallel} must divide the {gpus} GPUs of a {node_type}"
        )


def check_learner(job: Job, node_type: str, gpus: int) -> None:
    """Raise ValueError unless the GPUs that share the learner's layers fill a node."""
    if gpus % job.learner_tensor_parallel:
        raise ValueError(
            f"job.learner_tensor_parallel={job.learner_tensor_parallel} must divide the {gpus} GPUs of a {node_type}"
        )


def check_token_budget(engine: Engine, parameters: Parameters) -> None:
    """Raise ValueError unless a full batch fits an engine's token budget, as vLLM demands."""
    preset = f"engine.{engine.preset}"
    budget = engine.max_num_batched_tokens or int(parameters.number(f"{preset}.max_num_batched_tokens"))
    batch = engine.max_num_seqs or int(parameters.number(f"{preset}.max_num_seqs"))
    if budget < batch:
        raise ValueError(f"engine.max_num_batched_tokens={budget} must be at least engine.max_num_seqs={batch}")


def check_faults(faults: Faults, nodes: int) -> None:
    """Raise ValueError unless every scripted fault is on a node of the cluster."""
    for index, fault in enumerate(faults.at):
        if fault.node is not None and fault.node >= nodes:
            raise ValueError(f"faults.at[{index}].node={fault.node} must be below cluster.nodes={nodes}")


def _dotted(path: toml_text.Path) -> str:
    return ".".join(path)


# --- and back to TOML ---


def _tree(config: Config, *, policy_params: Mapping[str, Any] | None = None) -> dict[str, Any]:
    sections = {name: getattr(config, name).model_dump(exclude_none=True) for name in SECTIONS}
    params = config.policy_params if policy_params is None else policy_params
    policy = {"name": config.policy, **params}
    return {"preset": config.preset, "seed": config.seed, "policy": policy, **sections}


def full_policy_params(config: Config) -> dict[str, Any]:
    """The policy's parameters, defaults included, by alias."""
    model = params_class(load_policy_class(config.policy))
    if model is None:
        return dict(config.policy_params)
    return model.model_validate(config.policy_params).model_dump(mode="json", by_alias=True)


def config_toml(config: Config) -> str:
    """The whole configuration as TOML, defaults of the policy included; `--config` reads it back to the same run."""
    return toml_text.write_toml(_tree(config, policy_params=full_policy_params(config)))
