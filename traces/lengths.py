"""Prompt and response lengths: a fitted hierarchical model, drawn from named streams before any policy acts.

ln L = mu + drift_per_epoch * epoch + prompt effect + sample effect, cut at the response cap, with a second mass of
responses that never stop by themselves. The prompt effect is normal; the sample effect is of one of four families
(`simrl.traces.families`). Every draw is keyed by (epoch, prompt, sample) and by nothing else, so all policies, data set
sizes and group sizes see the same responses.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simrl.traces.parameters import STATUSES, Parameter, did_you_mean
from simrl.traces.streams import stream

_PREFIX, _SUFFIX = "workload_", ".toml"
MIXTURE = "lognormal-mixture"
FAMILIES = ("lognormal", "gamma", "weibull", MIXTURE)
UNITS = {
    "mu": "ln token",
    "between_sd": "ln token",
    "within_sd": "ln token",
    "cap_mass": "1",
    "drift_per_epoch": "ln token",
    "template_tokens": "token",
}
MIXTURE_UNITS = {"second_share": "1", "second_offset": "ln token", "second_sd": "ln token"}
_SHARES = ("cap_mass", "second_share")
_NEVER_NEGATIVE = ("between_sd", "within_sd", "second_sd", "template_tokens")
_FIELDS = ("value", "unit", "status", "source", "low", "high")


@dataclass(frozen=True, slots=True)
class Responses:
    """Lengths of all responses of one epoch.

    Attributes:
        tokens: Generated tokens, [dataset_prompts, responses_per_prompt], 1 <= tokens <= max_tokens.
        truncated: Whether the cap ended the response, same shape.
    """

    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]


@dataclass(frozen=True)
class LengthModel:
    """How long prompts and responses of a workload are.

    Attributes:
        mu: Mean of ln response tokens in epoch 0 (of a mixture: of its first component).
        between_sd: Standard deviation of the prompt effect, ln tokens; it stays with a prompt over all epochs.
        within_sd: Standard deviation of the sample effect, ln tokens; drawn anew for every response. Of a mixture: of
            its first component.
        cap_mass: Probability that a response repeats itself without end and runs to the cap, whatever the cap.
        drift_per_epoch: Change of mu from one epoch to the next.
        template_tokens: Chat template and instruction, added to every question.
        prompt_tokens: Measured question lengths, resampled by prompt id.
        source: Where the model comes from.
        status: measured | derived | assumed, for the model as a whole.
        parameters: The same numbers with unit, source, status and 95 % interval or held range, for the run's record.
        family: Of the sample effect: lognormal | gamma | weibull | lognormal-mixture.
        second_share: Probability of a mixture's second component.
        second_offset: Mean of a mixture's second component less that of its first, ln tokens.
        second_sd: Standard deviation of a mixture's second component, ln tokens.
    """

    mu: float
    between_sd: float
    within_sd: float
    cap_mass: float
    drift_per_epoch: float
    template_tokens: int
    prompt_tokens: tuple[int, ...]
    source: str
    status: str
    parameters: tuple[Parameter, ...] = ()
    family: str = "lognormal"
    second_share: float = 0.0
    second_offset: float = 0.0
    second_sd: float = 0.0

    def __post_init__(self) -> None:
        for name in (*UNITS, *MIXTURE_UNITS):
            check_domain(name, getattr(self, name))
        if self.family not in FAMILIES:
            raise ValueError(f"family={self.family!r} must be one of {', '.join(FAMILIES)}")
        if not self.prompt_tokens or min(self.prompt_tokens) < 1:
            raise ValueError("prompt_tokens must hold at least one length, each >= 1")
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status!r} must be one of {', '.join(STATUSES)}")

    def prompt_lengths(self, seed: int, dataset_prompts: int) -> NDArray[np.int64]:
        """Tokens of every prompt, template included, [dataset_prompts]."""
        _at_least_one(dataset_prompts=dataset_prompts)
        measured = np.asarray(self.prompt_tokens, dtype=np.int64)
        picks = stream(seed, "prompt length").integers(measured.size, size=dataset_prompts)
        return measured[picks] + self.template_tokens

    def response_lengths(
        self, seed: int, epoch: int, dataset_prompts: int, responses_per_prompt: int, max_tokens: int
    ) -> Responses:
        """Lengths of every response that the data set gets in one epoch.

        A smaller data set, fewer responses per prompt or a smaller cap give the same numbers, cut off.

        Raises:
            ValueError: If a count is below 1 or the epoch below 0.
        """
        _at_least_one(dataset_prompts=dataset_prompts, responses_per_prompt=responses_per_prompt, max_tokens=max_tokens)
        if epoch < 0:
            raise ValueError(f"{epoch=} must be >= 0")
        prompt_effect = stream(seed, "prompt effect").standard_normal(dataset_prompts)
        level = self.mu + self.drift_per_epoch * epoch + self.between_sd * prompt_effect
        # One stream per sample, a vector over prompts each: one per response would take 100 times as long.
        columns = [self._sample(seed, epoch, sample, level) for sample in range(responses_per_prompt)]
        tokens = np.stack(columns, axis=1)
        return Responses(np.minimum(tokens, max_tokens).astype(np.int64), tokens > max_tokens)

    def _sample(self, seed: int, epoch: int, sample: int, level: NDArray[np.float64]) -> NDArray[np.float64]:
        """Uncut lengths of response number *sample* of every prompt; infinite for those that never stop."""
        normal = stream(seed, "sample effect", epoch, sample).standard_normal(level.size)
        with np.errstate(over="ignore"):  # a length that overflows runs to the cap
            tokens = np.maximum(np.rint(np.exp(level + self._effect(normal, seed, epoch, sample))), 1.0)
        # A stream of its own: drawn after the normals it would start where the data set's size puts it.
        never_stops = stream(seed, "never stops", epoch, sample).random(level.size) < self.cap_mass
        return np.where(never_stops, np.inf, tokens)

    def _effect(self, normal: NDArray[np.float64], seed: int, epoch: int, sample: int) -> NDArray[np.float64]:
        """The family's sample effects, from the same normals in every family."""
        first = self.within_sd * normal
        if self.family == MIXTURE:
            chance = stream(seed, "sample component", epoch, sample).random(normal.size)
            return np.where(chance < self.second_share, self.second_offset + self.second_sd * normal, first)
        if self.family == "lognormal" or self.within_sd == 0:
            return first
        from simrl.traces import families  # scipy: only for those who need it

        effect = families.gamma_effect if self.family == "gamma" else families.weibull_effect
        return effect(normal, self.within_sd)


def check_domain(name: str, value: float) -> None:
    """Refuse what a parameter of a length model cannot be.

    Raises:
        ValueError: If the value is not finite, negative where it must not be, or no probability.
    """
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    if name in _NEVER_NEGATIVE and value < 0:
        raise ValueError(f"{name}={value} must be >= 0")
    if name in _SHARES and not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must be a probability")


def prompts_of_step(seed: int, step: int, prompts_per_step: int, dataset_prompts: int) -> tuple[int, NDArray[np.int64]]:
    """Epoch and prompt ids of a step, counted from 0.

    Every epoch is a fresh permutation of the data set whose incomplete last batch is dropped, as verl's data loader
    does it (RandomSampler, drop_last=True).

    Raises:
        ValueError: If the step is below 0 or the data set does not fill one step.
    """
    _at_least_one(prompts_per_step=prompts_per_step)
    if step < 0:
        raise ValueError(f"{step=} must be >= 0")
    if dataset_prompts < prompts_per_step:
        raise ValueError(f"{dataset_prompts=} must be at least {prompts_per_step=}: an epoch would have no step")
    epoch, batch = divmod(step, dataset_prompts // prompts_per_step)
    order = stream(seed, "prompt order", epoch).permutation(dataset_prompts).astype(np.int64)
    return epoch, order[batch * prompts_per_step : (batch + 1) * prompts_per_step]


def workload_names() -> list[str]:
    """Length models that come with simrl."""
    names = [entry.name for entry in resources.files("simrl.traces").joinpath("data").iterdir()]
    return sorted(n[len(_PREFIX) : -len(_SUFFIX)] for n in names if n.startswith(_PREFIX) and n.endswith(_SUFFIX))


def load_workload(name_or_path: str) -> LengthModel:
    """The shipped length model of that name, or the one in a TOML file of the same form.

    Raises:
        ValueError: If there is no such name or file, or if the file is malformed; it names the file and the key.
    """
    names = workload_names()
    if name_or_path in names:
        shipped = resources.files("simrl.traces").joinpath(f"data/{_PREFIX}{name_or_path}{_SUFFIX}")
        return parse_workload(shipped.read_text(encoding="utf-8"), f"workload {name_or_path!r}")
    path = Path(name_or_path)
    if not path.is_file():
        known = f"known: {', '.join(names)}, or a path to a TOML file"
        raise ValueError(f"unknown workload {name_or_path!r}{did_you_mean(name_or_path, names)}; {known}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    return parse_workload(text, str(path))


def parse_workload(text: str, origin: str) -> LengthModel:
    """A length model from TOML text; *origin* names it in errors.

    Raises:
        ValueError: If the text is not TOML, a key is missing, unknown or of the wrong kind, or a range does not hold
            its value, reaches beyond what the parameter can be, or is missing of an assumed one.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{origin}: not TOML: {error}") from None
    _only(document, ("source", "status", "family", "parameters", "prompt_tokens", "fit"), origin)
    family = _text(document, "family", origin) if "family" in document else "lognormal"
    if "fit" in document:
        _table(document, "fit", origin)  # how the file was made: for readers, not for the model
    table = _table(document, "parameters", origin)
    units = {**UNITS, **MIXTURE_UNITS} if family == MIXTURE else UNITS
    _only(table, tuple(units), origin, "parameters.")
    parameters = {key: _parameter(table, key, units[key], origin) for key in units}
    values = {key: float(parameter.value) for key, parameter in parameters.items()}
    template_tokens = values.pop("template_tokens")
    if not template_tokens.is_integer():
        raise ValueError(f"{origin}: parameters.template_tokens.value={template_tokens} must be a whole number")
    prompt_tokens = _prompt_tokens(document, origin)
    source, status = _text(document, "source", origin), _text(document, "status", origin)
    try:
        model = LengthModel(
            **values,
            template_tokens=int(template_tokens),
            prompt_tokens=prompt_tokens,
            source=source,
            status=status,
            parameters=tuple(parameters.values()),
            family=family,
        )
        for parameter in parameters.values():
            _check_range(parameter)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    return model


def _check_range(parameter: Parameter) -> None:
    name = parameter.key.removeprefix("workload.")
    low, high, where = parameter.low, parameter.high, f"parameters.{name}"
    if (low is None) != (high is None):
        raise ValueError(f"{where} has {'low' if high is None else 'high'} alone; give both ends of the range, or none")
    if low is None or high is None:
        if parameter.status == "assumed":
            raise ValueError(f"{where}.status='assumed' needs a range: low and high, in {parameter.unit}")
        return
    if not low <= float(parameter.value) <= high:
        raise ValueError(f"{where}: low={low}, value={parameter.value}, high={high} must be in this order")
    for end in (low, high):
        try:
            check_domain(name, end)
        except ValueError as error:
            raise ValueError(f"{where}, an end of its range: {error}") from None


def _parameter(table: Mapping[str, Any], key: str, wanted_unit: str, origin: str) -> Parameter:
    entry, where = _table(table, key, origin, "parameters."), f"parameters.{key}."
    _only(entry, _FIELDS, origin, where)
    if "value" not in entry:
        raise ValueError(f"{origin}: {where}value is missing")
    for field in ("value", "low", "high"):
        number = entry.get(field, 0)
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{origin}: {where}{field}={number!r} must be a finite number")
    unit, status = _text(entry, "unit", origin, where), _text(entry, "status", origin, where)
    if unit != wanted_unit:
        raise ValueError(f"{origin}: {where}unit={unit!r} must be {wanted_unit!r}")
    if status not in STATUSES:
        raise ValueError(f"{origin}: {where}status={status!r} must be one of {', '.join(STATUSES)}")
    source = _text(entry, "source", origin, where)
    return Parameter(f"workload.{key}", entry["value"], unit, status, source, entry.get("low"), entry.get("high"))


def _prompt_tokens(document: Mapping[str, Any], origin: str) -> tuple[int, ...]:
    table = _table(document, "prompt_tokens", origin)
    _only(table, ("unit", "status", "source", "values"), origin, "prompt_tokens.")
    tokens = table.get("values")
    if not isinstance(tokens, list) or not all(type(n) is int and n >= 1 for n in tokens) or not tokens:
        raise ValueError(f"{origin}: prompt_tokens.values must be a list of whole numbers >= 1, with at least one")
    return tuple(tokens)


def _only(table: Mapping[str, Any], allowed: tuple[str, ...], origin: str, where: str = "") -> None:
    for key in table:
        if key not in allowed:
            raise ValueError(f"{origin}: unknown key {where}{key}{did_you_mean(key, allowed)}")


def _table(table: Mapping[str, Any], key: str, origin: str, where: str = "") -> Mapping[str, Any]:
    found = table.get(key)
    if not isinstance(found, dict):
        raise ValueError(f"{origin}: {where}{key} must be a table" + ("" if key in table else ", and is missing"))
    return found


def _text(table: Mapping[str, Any], key: str, origin: str, where: str = "") -> str:
    found = table.get(key)
    if not isinstance(found, str) or not found:
        raise ValueError(f"{origin}: {where}{key} must be a text" + ("" if key in table else ", and is missing"))
    return found


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be >= 1")
