"""`simrl validate --trace`: constants from the first tenth of a run's steps, the rest predicted. See docs/traces.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.stats import spearmanr

from simrl.experiments.config import Config, ConfigError
from simrl.experiments.hardware_file import load_parameters
from simrl.experiments.record_file import Record
from simrl.experiments.record_model import PROMPT_TOKENS, Setting, response_tokens
from simrl.experiments.trace_info import stage_seconds
from simrl.simulator.costs import Costs, NodeType
from simrl.simulator.engine import Engine, Request
from simrl.simulator.learning import Scorer
from simrl.traces.streams import stream
from simrl.traces.trace import LEARNING, TraceError, read_trace

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

Floats = NDArray[np.float64]
STAGES: Mapping[str, Sequence[str]] = {
    "generation": ("generation_s",),
    "preparation": ("preparation_s",),
    "log_probs": ("old_log_prob_s", "ref_log_prob_s"),
    "values": ("values_s",),
    "update": LEARNING,
}
"""Stages, and the columns of a trace that add up to each: a log has some of them."""
FIT_PARTS = 10  # constants come from the first of so many parts of the run
LEAST_FITTED, LEAST_STEPS = 3, 6
USUAL_FACTOR = 2.0  # a factor between its inverse and this goes without a note
FOLDS = 24  # at most, in choosing constants: each step by itself in runs of up to 240 steps
LIMITS = {"generation": 0.20, "preparation": 0.25, "log_probs": 0.25, "values": 0.25, "update": 0.25, "step": 0.25}
"""Median absolute relative error above which advice is refused."""
PREDICTIONS = ("simrl", "null", "null_previous")


@dataclass(frozen=True, slots=True)
class Work:
    """What a step had to do.

    Attributes:
        prompt_tokens: Of each response.
        response_tokens: Of each response.
        groups: Responses of one number share their prompt.
    """

    prompt_tokens: Sequence[int]
    response_tokens: Sequence[int]
    groups: Sequence[int]


Constants = Mapping[str, float]
"""Of a stage: what each of its parts is multiplied with."""
UNITS = {"calibration": "1", "scale": "1", "host_s": "s/iteration", "overhead_s": "s", "rest_s": "s"}


def check_trace(path: Path, config: Config, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Fit a run's first steps, predict the others, and say how far off that is.

    Args:
        path: Of `simrl trace import`.
        config: What a trace does not tell: model, node type, engine, group size, mini-batches.
        progress: Told the percentage of steps that are simulated.

    Raises:
        TraceError: It is no trace, has too few steps with stage times and lengths, or responses that do not fit.
        ConfigError: The configuration has a profile.
        DoesNotFit: The model does not fit on the configuration's GPUs.
    """
    if config.engine.profile is not None:
        raise ConfigError(f"engine.profile={config.engine.profile!r} must be left out: --trace fits its own constants")
    run = _read(path, config)
    costs, gpus = _costs(config, run)
    fitted = max(LEAST_FITTED, len(run.steps) // FIT_PARTS)
    parts, tokens = _simulated(run, config, costs, gpus, progress)
    constants, predicted = _predicted(run.real_s, parts, fitted)
    tables = {stage: _table(run, stage, predicted_s, tokens, fitted) for stage, predicted_s in predicted.items()}
    stages = {stage: _errors(stage, table) for stage, table in tables.items() if len(table) >= LEAST_FITTED}
    if not stages:
        raise TraceError(f"{path}: no stage has times in {LEAST_FITTED} of the first {fitted} steps and in later ones")
    reasons = [reason for found in stages.values() for reason in found["refusals"]]
    job, engine = config.job, config.engine
    return {
        "trace": str(path),
        "steps": len(run.steps),
        "fitted_steps": fitted,
        "setting": {
            "model": job.model, "gpus": gpus, "gpu": costs.node.gpu, "engine": engine.preset,
            "tensor_parallel": engine.tensor_parallel, "responses_per_prompt": job.responses_per_prompt,
            "mini_batch_prompts": job.mini_batch_prompts,
        },
        "constants": [
            {"stage": stage, "name": name, "value": value, "unit": UNITS[name],
             "steps": int(run.real_s[stage].iloc[:fitted].count())}
            for stage, found in constants.items()
            for name, value in found.items()
        ],
        "stages": stages,
        "notes": [*run.notes, *_fit_notes(run, fitted, stages, constants)],
        "advice": not reasons,
        "reasons": reasons,
        "rows": [row for stage in stages for row in tables[stage].assign(stage=stage).to_dict("records")],
    }  # fmt: skip


def _fit_notes(run: Run, fitted: int, stages: Mapping[str, Any], constants: Mapping[str, Constants]) -> Iterator[str]:
    yield from (f"{stage}: times in too few steps to fit and check" for stage in run.real_s if stage not in stages)
    if fitted * FIT_PARTS > len(run.steps):
        yield f"constants come from {fitted} steps, more than a tenth of {len(run.steps)}"
    for stage, found in constants.items():
        for name in {"calibration", "scale"} & found.keys():
            if not 1 / USUAL_FACTOR <= found[name] <= USUAL_FACTOR:
                yield f"{stage}: {name} {found[name]:.2g} is far from 1: the run differs from the setting"


# --- what the trace says ---


@dataclass(frozen=True, slots=True)
class Run:
    """The steps of a trace that have stage times and lengths, in the order of the log.

    Attributes:
        steps: As in the trace.
        real_s: Seconds by stage, and `step`; NaN where they are not known.
        responses: By step, where the trace has them.
        notes: What was assumed.
    """

    steps: pd.DataFrame
    real_s: pd.DataFrame
    responses: Mapping[Any, pd.DataFrame]
    notes: Sequence[str]


def _read(path: Path, config: Config) -> Run:
    trace = read_trace(path, ("step", "prompt_id", "prompt_tokens", "response_tokens"))
    steps, real_s = trace.steps, _measured(trace.steps)
    once = set(steps["step"][~steps["step"].duplicated(keep=False)].dropna())
    responses = {step: group for step, group in trace.responses.groupby("step") if step in once}
    single = steps["step"].isin(list(responses))
    usable = real_s.drop(columns="step").notna().any(axis=1) & (single | (steps["response_tokens_mean"] > 0))
    if usable.sum() < LEAST_STEPS:
        raise TraceError(
            f"{path}: {usable.sum()} steps have both stage times and response lengths,"
            f" at least {LEAST_STEPS} must (--trace)"
        )
    drawn = steps[usable & ~single]
    instead = {
        "responses": f"{config.job.responses_per_step}, job.prompts_per_step x job.responses_per_prompt",
        "prompt_tokens_mean": f"{PROMPT_TOKENS} tokens",
        "response_tokens_max": f"{config.job.max_response_tokens} tokens, job.max_response_tokens",
    }
    notes = [
        f"{column} is not logged in {drawn[column].isna().sum()} steps, taken to be {value}"
        for column, value in instead.items()
        if drawn[column].isna().any()
    ]
    return Run(steps[usable], real_s[usable], responses, notes)


def _measured(steps: pd.DataFrame) -> pd.DataFrame:
    """Seconds by stage, NaN where a part that the log has elsewhere is missing; `step` without testing, checkpoints.

    Where no step time is logged, it is the sum of the stages.
    """
    import pandas as pd

    logged = {stage: [name for name in names if steps[name].notna().any()] for stage, names in STAGES.items()}
    sums = {stage: steps[names].sum(axis=1, skipna=False) for stage, names in logged.items() if names}
    table = pd.DataFrame(sums, index=steps.index)
    timed = steps["step_s"].notna() if steps["step_s"].notna().any() else table.notna().all(axis=1)
    table["step"] = stage_seconds(steps)["work"].where(timed)
    return table.where(table > 0)


def _exact(responses: pd.DataFrame) -> Work:
    """Of a step whose responses are in the trace."""
    prompts = responses["prompt_tokens"].fillna(PROMPT_TOKENS).clip(lower=1).astype(int)
    lengths = responses["response_tokens"].clip(lower=1).astype(int)
    return Work(prompts.tolist(), lengths.tolist(), responses["prompt_id"].factorize(use_na_sentinel=False)[0].tolist())


def _drawn(index: int, row: Mapping[Any, Any], config: Config) -> Work:
    """Of a step of which the trace has mean and longest length: quantiles of a lognormal, in a fixed random order."""
    job, mean = config.job, float(row["response_tokens_mean"])
    count = round(_known(row["responses"], job.responses_per_step))
    longest = max(round(_known(row["response_tokens_max"], job.max_response_tokens)), math.ceil(mean))
    prompt_tokens = _known(row["prompt_tokens_mean"], PROMPT_TOKENS)
    setting = Setting(
        record=Record("", ""), gpu="", engine_class="", model=job.model, gpus=1, tensor_parallel=1, prompts=count,
        samples=1, cap=max(job.max_response_tokens, longest), mean=mean, longest=longest,
        prompt_tokens=prompt_tokens, lora_rank=0,
    )  # fmt: skip
    order = stream(config.seed, "trace order", index).permutation(count)
    lengths = np.array(response_tokens(setting, count))[order]
    groups = np.arange(count) // job.responses_per_prompt
    return Work([max(1, round(prompt_tokens))] * count, lengths.tolist(), groups.tolist())


def _known(value: float, otherwise: float) -> float:
    return float(value) if value > 0 else otherwise


# --- what simrl says ---


def _costs(config: Config, run: Run) -> tuple[Costs, int]:
    """The cost model of the run, and its GPUs: what is logged goes before what is configured.

    Its engines have nothing but kernels: calibration and host time are fitted.
    """
    launch = f'cluster.parameters.engine."{config.engine.preset}".launch_s_per_layer'
    config = config.with_values({"engine.calibration": 1.0, "engine.overhead_s": 0.0, launch: 0.0})
    parameters = load_parameters(config.cluster)
    node = NodeType.load(config.cluster.node_type, parameters)
    gpus = round(_known(run.steps["gpus"].median(), node.gpus * config.cluster.nodes))
    if gpus % config.engine.tensor_parallel:
        raise ConfigError(
            f"engine.tensor_parallel={config.engine.tensor_parallel} must divide the {gpus} GPUs of the trace"
        )
    job = config.job
    sizes = run.steps["step"].map({step: len(group) for step, group in run.responses.items()})
    responses = _known(run.steps["responses"].fillna(sizes).median(), job.responses_per_step)
    update: dict[str, Any] = {"prompts_per_step": math.ceil(responses / job.responses_per_prompt)}
    if run.steps["update_critic_s"].notna().any():
        update["algorithm"] = "ppo"
    job = job.model_copy(update=update)
    costs = Costs(job, config.engine, node, math.ceil(gpus / node.gpus), parameters)
    costs.memory.check_fit(config.engine.tensor_parallel, ("prefill", "decode"), gpus)
    return costs, gpus


def _simulated(
    run: Run, config: Config, costs: Costs, gpus: int, progress: Callable[[int], None] | None
) -> tuple[dict[str, pd.DataFrame], Floats]:
    """By measured stage, a row a step: what simrl says, then what may come on top. And the tokens of each step."""
    import pandas as pd

    learning, actor, critic = costs.learning, Scorer(costs.model, True, True), Scorer(costs.model, False, True)
    models: dict[str, Callable[[list[int]], float]] = {
        "preparation": lambda tokens: learning.prepare_s(tokens, gpus),
        "log_probs": lambda tokens: learning.score_s(actor, np.array(tokens, dtype=float), gpus),
        "values": lambda tokens: learning.score_s(critic, np.array(tokens, dtype=float), gpus),
        "update": lambda tokens: learning.learn_s(tokens, gpus, costs.nodes),
    }
    rows: dict[str, list[dict[str, float]]] = {stage: [] for stage in STAGES if stage in run.real_s}
    totals: list[float] = []
    for index, row in enumerate(run.steps.to_dict("records")):
        one = run.responses.get(row["step"])
        work = _drawn(index, row, config) if one is None else _exact(one)
        tokens = [prompt + response for prompt, response in zip(work.prompt_tokens, work.response_tokens, strict=True)]
        for stage, found in rows.items():
            if stage == "generation":
                kernels_s, iterations = _generation(work, costs, config.engine.tensor_parallel, gpus)
                found.append({"calibration": kernels_s, "host_s": iterations, "overhead_s": 1.0})
            else:
                found.append({"scale": models[stage](tokens), "overhead_s": 1.0})
        totals.append(float(sum(tokens)))
        if progress is not None:
            progress(100 * len(totals) // len(run.steps))
    return {stage: pd.DataFrame(found, index=run.steps.index) for stage, found in rows.items()}, np.array(totals)


def _generation(work: Work, costs: Costs, tensor_parallel: int, gpus: int) -> tuple[float, int]:
    """Seconds of kernels and iterations, each of the engine that has most of them.

    verl deals a batch to its engines in contiguous parts, and all wait for the last.
    """
    engines, count = max(1, gpus // tensor_parallel), len(work.groups)
    blocks, times = costs.memory.kv_blocks(tensor_parallel, gpus), costs.times(tensor_parallel)
    most_s, most_iterations = 0.0, 0
    for start, end in itertools.pairwise(round(count * i / engines) for i in range(engines + 1)):
        engine: Engine[Request] = Engine(
            times, blocks, costs.max_num_seqs, costs.max_batched_tokens, costs.prefix_caching
        )
        for i in range(start, end):
            try:
                engine.add(Request(i, work.groups[i], work.prompt_tokens[i], work.response_tokens[i]))
            except ValueError as error:  # longer than all KV of an engine
                raise TraceError(f"engines of the given setting are too small: {error} (--trace)") from error
        seconds, iterations = 0.0, 0
        while (span := engine.plan(count)) is not None:
            seconds += span.seconds
            iterations += span.iterations
            engine.advance(span.iterations)
        most_s, most_iterations = max(most_s, seconds), max(most_iterations, iterations)
    return most_s, most_iterations


# --- fitting and predicting ---


def fit(parts: pd.DataFrame, real_s: pd.Series[float]) -> Constants:
    """Weights >= 0 of the first part and at most one other, with the least sum of absolute relative errors.

    The other part is that which best predicts each step from all others; none, if the first alone does it better.
    """
    main, *others = parts.columns
    choices = [[main], *([main, other] for other in others)]
    shares = parts.div(real_s, axis=0)
    chosen = min(choices, key=lambda names: round(_left_out_error(shares[names].to_numpy()), 4))  # 0.01 %: a tie
    return dict(zip(chosen, map(abs, _least_absolute(shares[chosen].to_numpy()).tolist()), strict=True))


def _least_absolute(shares: Floats) -> Floats:
    """Weights >= 0 with the least sum of |shares @ weights - 1|, as a linear programme."""
    count, columns = shares.shape
    bounds = np.block([[shares, -np.eye(count)], [-shares, -np.eye(count)]])
    goal = np.concatenate([np.zeros(columns), np.ones(count)])
    found = linprog(goal, bounds, np.repeat([1.0, -1.0], count))
    return np.asarray(found.x, dtype=float)[:columns]


def _left_out_error(shares: Floats) -> float:
    """Mean error of rows, with weights from the others."""
    rows = np.arange(len(shares))
    folds = [rows % FOLDS == i for i in range(min(len(shares), FOLDS))]
    errors = [shares[fold] @ _least_absolute(shares[~fold]) - 1 for fold in folds]
    return float(np.abs(np.concatenate(errors)).mean())


def _predicted(
    real: pd.DataFrame, parts: Mapping[str, pd.DataFrame], fitted: int
) -> tuple[dict[str, Constants], dict[str, pd.Series[float]]]:
    """Constants from the first *fitted* steps, and what they give for all. A step is its stages and a constant rest."""
    import pandas as pd

    constants: dict[str, Constants] = {}
    predicted: dict[str, pd.Series[float]] = {}
    for stage, table in parts.items():
        known = real[stage].iloc[:fitted].dropna()
        if len(known) >= LEAST_FITTED:
            constants[stage] = fit(table.loc[known.index], known)
            predicted[stage] = table[list(constants[stage])] @ pd.Series(constants[stage])
    rest_s = (real["step"] - real[list(constants)].sum(axis=1, skipna=False)).iloc[:fitted].dropna()
    if constants and len(rest_s) >= LEAST_FITTED:
        constants["step"] = {"rest_s": float(rest_s.median())}
        predicted["step"] = pd.DataFrame(predicted).sum(axis=1) + constants["step"]["rest_s"]
    return constants, predicted


def _table(run: Run, stage: str, predicted_s: pd.Series[float], tokens: Floats, fitted: int) -> pd.DataFrame:
    """The predicted steps that have this stage: what it took, what simrl says, what both nulls say."""
    import pandas as pd

    real_s = run.real_s[stage]
    per_token_s = real_s / tokens
    last_fitted = per_token_s.iloc[:fitted].dropna().iloc[-1]
    table = pd.DataFrame({
        "step": run.steps["step"].astype(object).where(run.steps["step"].notna(), None), "real_s": real_s,
        "simrl_s": predicted_s, "null_s": last_fitted * tokens, "null_previous_s": per_token_s.ffill().shift() * tokens,
    })  # fmt: skip
    return table.iloc[fitted:].dropna(subset=["real_s"])


# --- judging ---


def _errors(stage: str, table: pd.DataFrame) -> dict[str, Any]:
    """Errors of a stage over the predicted steps, and why they would refuse advice."""
    errors = {name: table[f"{name}_s"] / table["real_s"] - 1 for name in PREDICTIONS}
    found = {
        name: {"median_abs_error": float(error.abs().median()), "rank_correlation": _ranks(table, name)}
        for name, error in errors.items()
    }
    thirds = np.array_split(errors["simrl"].to_numpy(), 3)
    return {
        "steps": len(table),
        **found,
        "thirds": [
            {"median_abs_error": float(np.median(abs(third))), "median_error": float(np.median(third))}
            for third in thirds
        ],
        "refusals": _refusals(stage, found),
    }


def _ranks(table: pd.DataFrame, name: str) -> float | None:
    """Spearman's correlation with what was measured; 0 of a prediction that does not vary, None if nothing does."""
    real_s, predicted_s = table["real_s"], table[f"{name}_s"]
    if real_s.nunique() < 2:
        return None
    return float(spearmanr(real_s, predicted_s).statistic) if predicted_s.nunique() > 1 else 0.0


def _refusals(stage: str, found: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    error, null = found["simrl"]["median_abs_error"], found["null"]["median_abs_error"]
    ranks = found["simrl"]["rank_correlation"]
    assert error is not None
    assert null is not None
    reasons = []
    if error > LIMITS[stage]:
        reasons.append(f"{stage}: median error {error:.1%} is above {LIMITS[stage]:.0%}")
    if error > null:
        reasons.append(f"{stage}: median error {error:.1%} is above the null's {null:.1%}")
    if ranks is not None and ranks <= 0:
        reasons.append(f"{stage}: rank correlation {ranks:.2f} is not positive")
    return reasons


# --- printing ---


def of_check(figures: Mapping[str, Any]) -> RenderableType:
    """The figures as tables, and the verdict as a sentence."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    errors = Table("stage", "steps", *(f"{name.replace('_', ': ')}" for name in PREDICTIONS), "thirds of the run")
    errors.title = "median absolute relative error, rank correlation"
    for stage, found in figures["stages"].items():
        cells = (_cell(found[name]) for name in PREDICTIONS)
        thirds = ", ".join(f"{third['median_error']:+.1%}" for third in found["thirds"])
        errors.add_row(stage, str(found["steps"]), *cells, thirds)
    constants = Table("stage", "constant", "value", "unit", "steps", title="fitted constants")
    for row in figures["constants"]:
        constants.add_row(row["stage"], row["name"], f"{row['value']:.4g}", row["unit"], str(row["steps"]))
    setting = ", ".join(f"{name} {value}" for name, value in figures["setting"].items())
    verdict = "advice: the constants predict this run within the limits"
    if not figures["advice"]:
        verdict = f"advice refused: {'; '.join(figures['reasons'])}"
    lines = [
        f"{figures['trace']}: constants from the first {figures['fitted_steps']} of {figures['steps']} steps",
        setting, *(f"note: {note}" for note in figures["notes"]),
    ]  # fmt: skip
    return Group(*map(Text, lines), constants, errors, Text(verdict))


def _cell(found: Mapping[str, float | None]) -> str:
    ranks = found["rank_correlation"]
    return f"{found['median_abs_error']:.1%}, {'-' if ranks is None else f'{ranks:.2f}'}"
