"""A trace's lengths on a simulated cluster: what would this very run have cost under another policy?

Single responses are replayed as they are. Where a log has statistics of steps only, lengths are those of a workload,
scaled and cut so that each step has the logged mean, longest and shortest length and number of truncated responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simrl.experiments import report
from simrl.experiments.compare import TOTALS, Comparison, check_same_work, row, write_comparison
from simrl.experiments.config import NAME_OF_POLICY, Config, ConfigError, Given, Layer, layers_of, merge, resolve
from simrl.experiments.run import Result, Work, drawn_work, run, write_run
from simrl.experiments.trace_info import stage_seconds, stages
from simrl.policies.runtime.steps import StepWork
from simrl.traces.lengths import load_workload
from simrl.traces.oracle import StepOracle
from simrl.traces.parameters import Parameter
from simrl.traces.summary import HOLDING, STAGES, gpu_s_between
from simrl.traces.trace import RESPONSE_COLUMNS, Provenance, Trace, TraceError, read_trace

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

    from simrl.experiments.toml_text import Path as Key

Ints = NDArray[np.int64]
_COLUMNS = ("file", "line", "step", "epoch", *(name for name in RESPONSE_COLUMNS if name != "first_token_s"))
_STEPS: Key = ("job", "steps")
_PROMPTS: Key = ("job", "prompts_per_step")
_SAMPLES: Key = ("job", "responses_per_prompt")
_CAP: Key = ("job", "max_response_tokens")
_PROMPT_CAP: Key = ("job", "max_prompt_tokens")
_DATASET: Key = ("job", "dataset_prompts")


@dataclass(frozen=True)
class Replay:
    """A trace that is ready to be replayed.

    Attributes:
        configs: One a policy, the baseline first.
        work: Of all of them.
        logged: What the trace measured itself, s a step (see `logged_seconds`); None if nothing.
        notes: What a reader of the results has to know.
        trace: Name of the file.
    """

    configs: tuple[Config, ...]
    work: Work
    logged: dict[str, Any] | None
    notes: tuple[str, ...]
    trace: str

    def run(self, progress: Callable[[int], None] | None = None) -> Replayed:
        """Simulate every policy on the trace's steps.

        Raises:
            ConfigError: as `simrl.run` does, and what else that raises.
        """
        results = []
        for index, config in enumerate(self.configs):
            done = index * config.job.steps
            told = None if progress is None else lambda steps, done=done: progress(done + steps)
            result = run(config, progress=told, work=self.work)
            results.append(replace(result, summary={**result.summary, "logged": self.logged}))
        warnings = (*self.notes, *(warning for result in results for warning in result.warnings))
        return Replayed(tuple(results), self.logged, tuple(dict.fromkeys(warnings)), self.trace)


@dataclass(frozen=True)
class Replayed:
    """What a replay leaves.

    Attributes:
        results: One a policy, the baseline first; their summaries hold `logged`.
        logged: See `Replay`.
        warnings: One line each.
        trace: Name of the file.
    """

    results: tuple[Result, ...]
    logged: dict[str, Any] | None
    warnings: tuple[str, ...]
    trace: str

    def comparison(self) -> Comparison:
        """All policies against the first, paired over steps."""
        summaries = [result.summary for result in self.results]
        check_same_work(summaries)
        steps = [_step_summaries(result) for result in self.results]
        rows = tuple(_row(each, steps[0]) for each in steps)
        return Comparison(summaries[0]["policy"], rows, tuple(summaries), self.warnings)

    def write(self, directory: Path) -> None:
        """A run directory, or that of a comparison; config.toml says in its first line that lengths are the trace's.

        Raises:
            RunDirectoryError: see `check_directory`.
        """
        comment = (
            f"replayed: lengths are those of {self.trace}; `simrl replay` takes this file, `simrl run` draws others"
        )
        if len(self.results) == 1:
            write_run(self.results[0], directory, comment)
        else:
            write_comparison(self.comparison(), self.results[0].config, directory, comment)

    def to_dict(self) -> dict[str, Any]:
        """What `simrl replay --json` prints: a run's summary, or a comparison; each with `logged`."""
        if len(self.results) == 1:
            return self.results[0].summary
        return {**self.comparison().to_dict(), "logged": self.logged}

    def table(self, directory: Path | None = None) -> RenderableType:
        """What `simrl replay` prints."""
        from rich.console import Group

        if len(self.results) == 1:
            shown = report.of_run(self.results[0], directory)
        else:
            shown = report.of_comparison(self.comparison(), directory, over="step")
        return Group(shown, *self._logged_table())

    def _logged_table(self) -> list[RenderableType]:
        from rich.table import Table
        from rich.text import Text

        if self.logged is None:
            return []
        table = Table(box=None, pad_edge=False)
        table.add_column("s/step")
        for name in ("logged", *(f"simulated, {result.summary['policy']}" for result in self.results)):
            table.add_column(Text(name), justify="right")
        for name in (*STAGES, "step"):
            simulated = [result.summary[f"{name}_s"] for result in self.results]
            values = [self.logged[f"{name}_s"], *([s["mean"] for s in simulated] if name == "step" else simulated)]
            table.add_row(name, *("" if value is None else f"{value:.2f}" for value in values))
        config, gpus = self.results[0].config, self.logged["gpus"]
        measured = f"{gpus} GPUs" if gpus else "machine"
        notes = (
            f"logged: measured on the trace's own {measured} ({self.logged['basis']}, {self.logged['steps']} steps)",
            f"simulated: the configured cluster, {config.cluster.nodes} x {config.cluster.node_type}, not the trace's",
        )
        return [table, *map(Text, notes)]


def replay(
    trace: str | Path, *policies: str, progress: Callable[[int], None] | None = None, **options: Any
) -> Replayed:
    """Simulate policies on the steps of a trace; `load_replay` tells arguments, options and errors.

    Args:
        trace: Of `simrl trace import`.
        policies: Names or import strings, the baseline first.
        progress: Called with the number of steps done, over all policies.
        options: preset, config, sets, nodes, steps, seed.
    """
    return load_replay(trace, policies, **options).run(progress)


def load_replay(
    trace: str | Path,
    policies: Sequence[str] = (),
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    sets: Sequence[str] = (),
    nodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
) -> Replay:
    """Read a trace, and resolve what is simulated.

    The configuration: the default preset, then that of the run that the trace is of (simrl runs carry it), then
    *preset*, then *config*, *sets* and the other arguments. Prompts and responses a step, and lengths, are the trace's.

    Args:
        trace: Of `simrl trace import`.
        policies: Names or import strings, the baseline first; by default the trace's own, else verl.
        preset: See `simrl presets`.
        config: A TOML file over it.
        sets: "section.key=value".
        nodes: `cluster.nodes`.
        steps: The first so many; by default all.
        seed: Root of all random streams.

    Raises:
        TraceError: the trace cannot be read, or does not hold what a replay needs: file, line, step and reason.
        ConfigError: the configuration is impossible, or contradicts the trace.
    """
    twice = sorted({name for name in policies if policies.count(name) > 1})
    if twice:
        raise ConfigError(f"policies: {twice[0]!r} is named twice (--policy)")
    found = read_trace(trace, _COLUMNS)
    one = policies[0] if len(policies) == 1 else None
    base, *given = layers_of(preset=preset, config=config, sets=sets, policy=one, nodes=nodes, steps=steps, seed=seed)
    own = _own_layer(found.provenance, str(trace), policies)
    user = merge(given)
    source = _source(found, str(trace), user)
    facts = source.facts(merge([own, *given]), base.values)
    for key in (_PROMPTS, _SAMPLES):
        if key in user and user[key].value != facts[key]:
            stated = f"{'.'.join(key)}={user[key].value!r} contradicts {trace}"
            raise ConfigError(f"{stated}, where it is {facts[key]} ({user[key].origin})")
    named = [base] if ("preset",) in user else []
    told = Layer({key: Given(value, str(trace)) for key, value in facts.items()})
    shared = resolve([base, own, *named, told, *given], list(policies) if len(policies) > 1 else None)
    work, notes = source.work(shared)
    configs = tuple(map(shared.with_policy, policies)) if len(policies) > 1 else (shared,)
    guesses = [f"{name} of {trace} is estimated: {how}" for name, how in found.provenance.estimated.items()]
    return Replay(configs, work, logged_seconds(source.logged), (*guesses, *notes), Path(trace).name)


def _own_layer(provenance: Provenance, trace: str, policies: Sequence[str]) -> Layer:
    """The configuration of the run that the trace is of; its policy's parameters only where that one is replayed."""
    own = Layer.from_toml(provenance.config, f"the configuration in {trace}")
    if len(policies) > 1 and own.values.get(NAME_OF_POLICY, Given(None, "")).value not in policies:
        return Layer({key: given for key, given in own.values.items() if key[0] != "policy"})
    return own


def logged_seconds(steps: pd.DataFrame) -> dict[str, Any] | None:
    """Means over the replayed steps of what the trace measured itself, s; testing and checkpoints are left out.

    Keys: `steps` (those with stage times), `basis` ("step time", or "sum of stages" where no step time is logged),
    `gpus`, and as in summary.json `step_s` and each stage (a step without it counts as 0), null where no step has it.
    """
    found = stages(steps)
    if found is None:
        return None
    gpus, work_s = steps["gpus"].dropna().unique(), found["work_mean_s"]
    return {
        "steps": found["steps"],
        "basis": found["basis"],
        "gpus": int(gpus[0]) if len(gpus) == 1 else None,
        "step_s": work_s,
        **{f"{stage}_s": found[stage]["share"] * work_s if stage in found else None for stage in STAGES},
    }


# --- which steps ---


def _source(found: Trace, trace: str, user: Mapping[Key, Given]) -> Recorded | Summarised:
    last = found.steps.dropna(subset=["step"]).sort_values(["step", "attempt"], kind="stable")
    last = last.drop_duplicates("step", keep="last")
    if len(found.responses):
        _refuse(found.responses[found.responses["step"].isna()], "the response names no step, so it cannot be replayed")
        numbers = _first(np.unique(found.responses["step"].to_numpy(dtype=np.int64)), trace, user)
        rows = found.responses[found.responses["step"].isin(numbers)]
        return Recorded(trace, found.provenance, rows, last[last["step"].isin(numbers)])
    columns = [f"{what}_tokens_{how}" for what in ("prompt", "response") for how in ("mean", "max")]
    timed = last.index.isin(stage_seconds(last).index)
    last = last[timed | last[["responses", *columns]].notna().any(axis=1)]  # others hold a validation, say
    if last.empty:
        raise TraceError(f"{trace}: no responses, and no steps with lengths or times: there is nothing to replay")
    numbers = _first(last["step"].to_numpy(dtype=np.int64), trace, user)
    return Summarised(trace, last[last["step"].isin(numbers)])


def _first(numbers: Ints, trace: str, user: Mapping[Key, Given]) -> Ints:
    """Numbers of the steps to replay: the first that are asked for, else all."""
    given = user.get(_STEPS)
    if given is None or type(given.value) is not int or given.value < 1:
        return numbers  # a value that is none is told of when the configuration is resolved
    if given.value > len(numbers):
        name = given.shown_as or "job.steps"
        raise ConfigError(f"{name}={given.value} must be at most {len(numbers)}, the steps of {trace} ({given.origin})")
    return numbers[: given.value]


def _refuse(lines: pd.DataFrame, reason: str) -> None:
    """Raise TraceError for the first of *lines*, if there are any."""
    if len(lines):
        raise TraceError(f"{_where(lines.iloc[0])}: {reason}")


def _common(counts: pd.Series[Any], of: Callable[[Any, int], str]) -> int:
    """What all *counts* are; *of* tells the index and the count of one that differs.

    Raises:
        TraceError: They differ.
    """
    usual = int(counts.mode().iloc[-1])
    others = counts[counts != usual]
    if len(others):
        raise TraceError(
            f"{of(others.index[0], int(others.iloc[0]))}, others have {usual}: steps of unequal size cannot be replayed"
            " (--steps takes the first ones only)"
        )
    return usual


def _where(line: Any) -> str:
    step = "" if _missing(line["step"]) else f", step {int(line['step'])}"
    return f"{line['file']}:{line['line']}{step}"


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _caps(
    values: Mapping[Key, Given], preset: Mapping[Key, Given], longest: Sequence[int], cut: int | None
) -> dict[Key, int]:
    """Caps that neither a user nor the trace's configuration gives: where responses were cut, else the preset's."""
    response, prompt = (max(most, preset[key].value) for most, key in zip(longest, (_CAP, _PROMPT_CAP), strict=True))
    facts = {_CAP: response if cut is None else cut, _PROMPT_CAP: prompt}
    return {**facts, **{key: values[key].value for key in (_CAP, _PROMPT_CAP, _DATASET) if key in values}}


def _check_caps(config: Config, line: Any, longest: float, what: str) -> None:
    cap = config.job.max_response_tokens if what == "response" else config.job.max_prompt_tokens
    if longest > cap:
        raise TraceError(f"{_where(line)}: a {what} of {longest:g} tokens exceeds job.max_{what}_tokens={cap}")


# --- single responses ---


@dataclass(frozen=True)
class Recorded:
    """Steps whose single responses are known; *rows* are in the order of the source."""

    trace: str
    provenance: Provenance
    rows: pd.DataFrame
    logged: pd.DataFrame

    def facts(self, values: Mapping[Key, Given], preset: Mapping[Key, Given]) -> dict[Key, int]:
        """Everything about the work; the cap where some responses were cut."""
        rows = self.rows
        drawn = bool(rows["prompt_tokens"].isna().all())  # from the workload
        for name in ("prompt_id", "sample", *(() if drawn else ("prompt_tokens",))):
            _refuse(rows[rows[name].isna()], f"the response has no {name}, so it cannot be replayed")
        for name in ("prompt_tokens", "response_tokens"):
            _refuse(rows[rows[name] < 1], f"{name}=0 must be at least 1")
        prompts, samples = self._shape()
        facts: dict[Key, int] = {
            _STEPS: int(rows["step"].nunique()), _PROMPTS: prompts, _SAMPLES: samples,
            _DATASET: max(prompts, int(rows["prompt_id"].nunique())),
        }  # fmt: skip
        longest = [_most(rows[f"{what}_tokens"]) for what in ("response", "prompt")]
        return {**facts, **_caps(values, preset, longest, longest[0] if rows["truncated"].eq(True).any() else None)}

    def _shape(self) -> tuple[int, int]:
        """Prompts a step and responses a prompt, if they are the same everywhere."""
        groups = self.rows.groupby(["step", "prompt_id"], sort=True)
        sizes, lengths = groups.size(), groups["prompt_tokens"].nunique()
        steps, place = sizes.groupby(level="step").size(), "step {}, prompt {}"
        prompts = _common(steps, lambda step, count: f"{self.trace}: step {step} has {count} prompts")
        samples = _common(
            sizes, lambda key, count: f"{self.trace}: {place.format(*key)} has {count} responses of a prompt"
        )
        torn = lengths[lengths > 1]
        if len(torn):
            raise TraceError(f"{self.trace}: {place.format(*torn.index[0])}: its responses disagree on prompt_tokens")
        return prompts, samples

    def work(self, config: Config) -> tuple[Work, tuple[str, ...]]:
        """The responses as they are."""
        rows, cap, notes = self.rows, config.job.max_response_tokens, []
        rows = rows.assign(prompt_id=_as_numbers(rows["prompt_id"]), epoch=_epochs(rows))
        if rows["prompt_tokens"].isna().all():
            rows = rows.assign(prompt_tokens=_drawn_prompts(config, rows["prompt_id"]))
            notes.append(f"{self.trace} has no prompt lengths: they are those of workload {config.job.workload!r}")
        for what in ("response", "prompt"):
            longest = rows.iloc[int(rows[f"{what}_tokens"].to_numpy().argmax())]
            _check_caps(config, longest, longest[f"{what}_tokens"], what)
        at_cap = rows["truncated"].isna() & (rows["response_tokens"] >= cap)
        rows = rows.assign(truncated=rows["truncated"].eq(True) | at_cap)
        steps = [_recorded_step(group, config.job.responses_per_prompt) for _, group in rows.groupby("step", sort=True)]
        guessed = "response_tokens" in self.provenance.estimated or self.provenance.importer == "simrl"
        source = f"{self.trace}: {self.provenance.importer}, {', '.join(self.provenance.files[:3])}"
        mean = Parameter(
            "workload.trace.response_tokens", round(float(rows["response_tokens"].mean()), 2), "token",
            "derived" if guessed else "measured", f"mean of the lengths that are replayed; {source}",
        )  # fmt: skip
        return _work(steps, (mean,)), tuple(notes)


def _drawn_prompts(config: Config, prompt_ids: pd.Series[Any]) -> Ints:
    import pandas as pd

    prompt, ids = pd.factorize(prompt_ids)
    lengths = load_workload(config.job.workload).prompt_lengths(config.seed, len(ids))
    return lengths.clip(max=config.job.max_prompt_tokens)[prompt]


def _as_numbers(ids: pd.Series[Any]) -> pd.Series[Any]:
    """Whole numbers where all ids are: a trace keeps them as texts."""
    numbers = ids.str.isdecimal() & ((ids == "0") | ~ids.str.startswith("0")) & (ids.str.len() < 19)
    return ids.astype(np.int64) if bool(numbers.all()) else ids


def _epochs(rows: pd.DataFrame) -> pd.Series[Any]:
    """The log's epoch, else how often the step's most frequent prompt was there before."""
    if rows["epoch"].notna().all():
        return rows["epoch"].astype(np.int64)
    before = rows.groupby("prompt_id")["step"].rank("dense") - 1
    return before.groupby(rows["step"]).transform("max").astype(np.int64)


def _recorded_step(rows: pd.DataFrame, samples: int) -> StepWork:
    """Prompts in the order in which they come first, their responses by number."""
    import pandas as pd

    prompt, ids = pd.factorize(rows["prompt_id"])
    order = np.lexsort((rows["sample"].to_numpy(), prompt))

    def column(name: str) -> list[list[Any]]:
        table: list[list[Any]] = rows[name].to_numpy()[order].reshape(-1, samples).tolist()
        return table

    return StepWork(
        epoch=int(rows["epoch"].iloc[0]),
        prompt_ids=ids.tolist(),
        prompt_tokens=[int(tokens[0]) for tokens in column("prompt_tokens")],
        response_tokens=column("response_tokens"),
        truncated=column("truncated"),
    )


def _work(steps: Sequence[StepWork], parameters: tuple[Parameter, ...]) -> Work:
    oracle = StepOracle()

    def of_step(step: int) -> StepWork:
        oracle.open(steps[step].prompt_ids, steps[step].response_tokens)
        return steps[step]

    return Work(of_step, oracle, parameters)


# --- statistics of steps ---


@dataclass(frozen=True)
class Summarised:
    """Steps of which only the lengths' statistics are known."""

    trace: str
    logged: pd.DataFrame

    def facts(self, values: Mapping[Key, Given], preset: Mapping[Key, Given]) -> dict[Key, int]:
        """Prompts and samples, as far as the log has their product; the cap where some responses were cut."""
        rows = self.logged
        for name in ("response_tokens_mean", "response_tokens_max"):
            reason = f"the log says no {name}, so the step cannot be replayed (--steps takes the first ones only)"
            _refuse(rows[rows[name].isna()], reason)
        cut = rows.loc[rows["truncated_share"] > 0, "response_tokens_max"]
        longest = [_most(rows[f"{what}_tokens_max"]) for what in ("response", "prompt")]
        prompts, samples = self._shape(values)
        facts: dict[Key, int] = {_STEPS: len(rows), _PROMPTS: prompts, _SAMPLES: samples}
        facts[_DATASET] = max(prompts, preset[_DATASET].value)
        return {**facts, **_caps(values, preset, longest, _most(cut) if len(cut) else None)}

    def _shape(self, values: Mapping[Key, Given]) -> tuple[int, int]:
        """Prompts a step and responses a prompt: of three numbers (with the log's responses a step) two must be given.

        Not the preset's: it knows nothing of this job.
        """
        counts = self.logged["responses"].dropna()
        prompts, samples = (_whole(values.get(key)) for key in (_PROMPTS, _SAMPLES))
        if counts.empty:
            if prompts is None or samples is None:
                needed = [".".join(key) for key, n in ((_PROMPTS, prompts), (_SAMPLES, samples)) if n is None]
                raise ConfigError(
                    f"{self.trace} does not say how many responses a step has: --set {'=N --set '.join(needed)}=N"
                )
            return prompts, samples
        total = _common(counts, lambda index, count: f"{_where(self.logged.loc[index])}: {count} responses")
        if prompts is None and samples is None:
            raise ConfigError(
                f"{self.trace} has {total} responses a step, and does not say of how many prompts: --set"
                " job.responses_per_prompt=N or --set job.prompts_per_step=N"
            )
        key, known = (_SAMPLES, samples) if samples is not None else (_PROMPTS, prompts)
        assert known is not None
        if total % known:
            raise ConfigError(
                f"{'.'.join(key)}={known} must divide {total}, the responses of a step of {self.trace}"
                f" ({values[key].origin})"
            )
        return (total // known, known) if samples is not None else (known, total // known)

    def work(self, config: Config) -> tuple[Work, tuple[str, ...]]:
        """Lengths of the configuration's workload, made to fit each step."""
        drawn = drawn_work(config)
        steps = [_fitted_step(config, line, drawn.of_step(i)) for i, line in enumerate(self.logged.to_dict("records"))]
        notes = [
            f"{self.trace} has statistics of steps: what they leave open is as in workload {config.job.workload!r}"
            f" (job.workload), and prompts recur as in job.dataset_prompts={config.job.dataset_prompts}"
        ]
        if not (self.logged["truncated_share"] > 0).any():
            notes.append(f"no cap is logged: job.max_response_tokens={config.job.max_response_tokens} is taken")
        if self.logged["prompt_tokens_mean"].isna().any():
            notes.append("where no prompt lengths are logged they are the workload's")
        return _work(steps, drawn.parameters), tuple(notes)


def _whole(given: Given | None) -> int | None:
    return given.value if given is not None and type(given.value) is int and given.value > 0 else None


def _most(column: pd.Series[Any]) -> int:
    return math.ceil(column.max()) if column.notna().any() else 1


def _fitted_step(config: Config, line: Mapping[Any, Any], shape: StepWork) -> StepWork:
    """*shape* with lengths that have the statistics of a step."""
    job = config.job
    shapes: NDArray[Any] = np.array(shape.response_tokens)
    lengths: NDArray[Any] = _fitted(shapes.ravel(), line, "response", job.max_response_tokens).reshape(shapes.shape)
    prompts = np.array(shape.prompt_tokens)
    if not _missing(line["prompt_tokens_mean"]):
        prompts = _fitted(prompts, line, "prompt", job.max_prompt_tokens)
    truncated = lengths == job.max_response_tokens
    return replace(
        shape, prompt_tokens=prompts.tolist(), response_tokens=lengths.tolist(), truncated=truncated.tolist()
    )


def _fitted(shape: Ints, line: Mapping[Any, Any], what: str, cap: int) -> Ints:
    """Lengths in the order of *shape*, with the logged mean, longest, shortest and, of responses, number at the cap.

    Raises:
        TraceError: No lengths have these statistics.
    """
    mean, longest, shortest = (line[f"{what}_tokens_{how}"] for how in ("mean", "max", "min"))
    share = line["truncated_share"] if what == "response" else math.nan
    where = _where(line)

    def bad(reason: str) -> TraceError:
        return TraceError(f"{where}: {what} lengths cannot be: {reason}")

    for how, value in (("max", longest), ("min", shortest)):
        if not _missing(value) and (value != int(value) or value < (how == "max")):
            raise bad(f"{how} {value:g} must be a whole number of at least 1")
    if not _missing(longest) and longest > cap:
        raise bad(f"max {longest:g} exceeds job.max_{what}_tokens={cap}")
    low = 1 if _missing(shortest) else max(int(shortest), 1)
    high = cap if _missing(longest) else int(longest)
    if not low <= mean <= high:
        raise bad(f"mean {mean:g} is not between {low} and {high}")
    top = 0 if _missing(longest) else 1
    if not _missing(share):
        cut = round(float(share) * shape.size)
        if cut and high < cap:
            raise bad(f"{cut} were truncated, and max {high} is below job.max_{what}_tokens={cap}")
        top = max(cut, top)
    exact_top = not _missing(share) and high == cap  # no further one may be at the cap
    fixed = [high] * top + ([low] if not _missing(shortest) and top < shape.size else [])
    if top == shape.size and low < high and not _missing(shortest):
        raise bad(f"all {top} are {high}, and min is {low}")
    between = (low, max(high - 1, low) if exact_top else high)
    total, rest = round(float(mean) * shape.size) - sum(fixed), shape.size - len(fixed)
    if not rest * between[0] <= total <= rest * between[1]:
        ends = [(sum(fixed) + rest * end) / shape.size for end in between]
        raise bad(f"mean {mean:g} with {top} of {high} and min {low} must be between {ends[0]:.6g} and {ends[1]:.6g}")
    order = np.argsort(shape, kind="stable")
    lengths = np.empty(shape.size, dtype=np.int64)
    shorter = order[: shape.size - top]
    lengths[order[shape.size - top :]] = high
    lengths[shorter[: len(fixed) - top]] = low
    middle = shorter[len(fixed) - top :]
    lengths[middle] = _scaled(shape[middle].astype(float), total, *between)
    return lengths


def _scaled(shape: NDArray[np.float64], total: int, low: int, high: int) -> Ints:
    """*shape* times a factor, cut to low..high and rounded so that the sum is exactly *total*, which can be."""
    from scipy.optimize import brentq

    if not shape.size:
        return shape.astype(np.int64)

    def excess(factor: float) -> float:
        return float(np.clip(factor * shape, low, high).sum() - total)

    # At twice the factor that brings the least to *high* all are cut there, whatever the rounding.
    factor = brentq(excess, 0.0, 2 * high / shape.min(), xtol=1e-15)
    exact = np.clip(factor * shape, low, high)
    whole = np.floor(exact).astype(np.int64)
    up = np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]  # those that lose most by rounding down
    whole[up] += 1
    assert whole.sum() == total
    assert low <= whole.min()
    assert whole.max() <= high
    return whole


# --- policies side by side ---


def _step_summaries(result: Result) -> list[dict[str, Any]]:
    """What `compare.row` needs of a run, of each of its steps; GPU-seconds are those between its begin and end."""
    frames = result.frames
    held = frames.workers[frames.workers["state"].isin(HOLDING)]
    phases = frames.phases[frames.phases["stage"] == "step"].sort_values("step")
    totals = frames.samples.assign(responses=1).groupby("step")[list(TOTALS)].sum()
    found = []
    for line, total in zip(phases.to_dict("records"), totals.to_dict("records"), strict=True):
        found.append({
            **{str(name): int(count) for name, count in total.items()},
            "policy": result.summary["policy"],
            "epoch": int(line["epoch"]),
            "step_s": {"mean": line["end_s"] - line["start_s"]},
            "gpu_s_per_step": gpu_s_between(held, line["start_s"], line["end_s"]),
            "later_epochs": None,
        })  # fmt: skip
    return found


def _row(steps: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A policy's line, with steps where a comparison of seeds has seeds; later epochs are all but the first one's."""
    later = [index for index, step in enumerate(steps) if step["epoch"] > min(s["epoch"] for s in steps)]
    line = row(steps, baseline)
    if later:
        inner = row([steps[i] for i in later], [baseline[i] for i in later])
        kept = ("step_s", "gpu_s_per_step", "speedup", "speedup_ci95", "gpu_s_reduction", "gpu_s_reduction_ci95")
        line["later_epochs"] = {name: inner[name] for name in kept}
    return line
