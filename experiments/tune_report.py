"""What a search leaves: files, pictures, and tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simrl.experiments import plots, toml_text
from simrl.experiments.config import full_policy_params
from simrl.experiments.statistics import NOT_SHOWN
from simrl.traces.trace import whole_file

if TYPE_CHECKING:
    import optuna
    from rich.console import RenderableType
    from rich.table import Table

    from simrl.experiments.tune import Plan, Trial, Tuning

UNITS = {"step_s": "s/step", "gpu_s_per_step": "GPU-s/step"}
MIN_FOR_IMPORTANCE = 20
"""Complete trials: optuna's manual wants 5 in the best quarter, which importance looks at."""


def write_text(path: Path, text: str) -> None:
    """A whole file or none.

    Raises:
        TraceError: the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def layer_toml(found: Tuning, trial: Trial) -> str:
    """What `simrl run --config` takes: the policy with all its parameters, and whatever else was searched."""
    config = found.config(trial)
    tree: dict[str, Any] = {"policy": {"name": config.policy, **full_policy_params(config)}}
    for path, value in trial.values.items():
        *above, last = toml_text.parse_key(path)
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        if value is not None:
            node[last] = value
    head = f"# simrl tune --objective {found.plan.objective}, trial {trial.number}, preset {config.preset}\n"
    return head + toml_text.write_toml(tree)


def write_outputs(found: Tuning, study: optuna.Study, directory: Path) -> None:
    """All files of a search but those that `tune` begins with; see docs/experiments.md."""
    frame = found.frame()
    with whole_file(directory / "trials.parquet") as file:
        frame.to_parquet(file, index=False)
    write_text(directory / "best.toml", layer_toml(found, found.best))
    if len(found.plan.metrics) > 1:
        numbers = [trial.number for trial in found.front]
        with whole_file(directory / "front.csv") as file:
            frame.set_index("trial").loc[numbers].to_csv(file)
        for trial in found.front:
            write_text(directory / "front" / f"trial-{trial.number}.toml", layer_toml(found, trial))
    _draw(found, directory / ("front.png" if len(found.plan.metrics) > 1 else "history.png"))
    _write_journal(study, directory / "journal.log")
    write_text(directory / "summary.json", json.dumps(found.to_dict(), indent=2) + "\n")


def _write_journal(study: optuna.Study, path: Path) -> None:
    """The study for optuna's own tools; a search that goes on does not read it (see `search`)."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    with whole_file(path) as file:
        storage = JournalStorage(JournalFileBackend(str(file)))
        copy = optuna.create_study(study_name=study.study_name, storage=storage, directions=study.directions)
        copy.add_trials(study.trials)


def _draw(found: Tuning, path: Path) -> None:
    """The front, or the objective by trial."""
    from matplotlib.figure import Figure

    frame = found.frame()
    complete = frame[frame["state"] == "complete"]
    with plots.theme():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        if len(found.plan.metrics) > 1:
            plots.pareto(complete, ["trial"], axes, x="step_s", y="gpu_s_per_step", label="front")
            for name, trial in {"defaults": found.defaults, **found.settings}.items():
                axes.plot(trial.mean("step_s"), trial.mean("gpu_s_per_step"), "D", label=name, zorder=3)
            axes.set(xlabel=UNITS["step_s"], ylabel=UNITS["gpu_s_per_step"])
        else:
            (metric,) = found.plan.metrics
            for state, marker, label in (("complete", ".", "complete"), ("pruned", "x", "pruned, on the seeds it ran")):
                own = [trial for trial in found.trials if trial.state == state]
                axes.plot([t.number for t in own], [1 - found.gain(t, metric) for t in own], marker, label=label)
            best = complete[metric].cummin() / found.defaults.mean(metric)
            axes.step(complete["trial"], best, where="post", label="best so far")
            axes.set(xlabel="trial", ylabel=f"{UNITS[metric]} / that of the defaults on the same seeds")
        axes.legend()
        axes.set_title(
            f"{found.plan.base.policy}: means over {found.plan.seeds} seeds, {found.plan.trial_steps} steps each"
        )
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=150)


# --- for people ---


def of_tuning(found: Tuning, directory: Path | None) -> RenderableType:
    """What `simrl tune` prints."""
    from rich.console import Group
    from rich.text import Text

    plan = found.plan
    counts = found.to_dict()["trials"]
    head = (
        f"{plan.base.policy}, objective {plan.objective}: {len(found.trials)} trials"
        f" ({counts['pruned']} pruned, which saved {found.saved_runs()} runs; {counts['failed']} failed),"
        f" {_seeds(plan)}; {found.computed} runs done now"
    )
    parts: list[Any] = [Text(head, style="bold"), _space(found), Text(), _front(found), Text(found.standing())]
    parts += [Text(), *_importance(found), Text(), *_comparison(found)]
    parts += [Text(f"written to {directory}", overflow="fold")] if directory is not None else []
    return Group(*parts)


def _seeds(plan: Plan) -> str:
    seed = plan.base.seed
    return f"seeds {seed} to {seed + plan.seeds - 1}, {plan.trial_steps} of {plan.base.job.steps} steps"


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column, overflow="fold", justify="right" if column in (*UNITS.values(), "gain", "trial") else "left"
        )
    return table


def _space(found: Tuning) -> Table:
    table = _table("searched", "values", "from")
    for dimension in found.plan.dimensions:
        table.add_row(dimension.axis.path, str(dimension), dimension.source)
    for path, why in found.plan.skipped.items():
        table.add_row(path, "not searched", why)
    return table


def _front(found: Tuning) -> Table:
    """The defaults and the front, each figure with its gain."""
    from rich.text import Text

    table = _table("trial", "s/step", "gain", "GPU-s/step", "gain", "changes")
    step_s, gpu_s = (found.defaults.mean(metric) for metric in UNITS)
    table.add_row("", f"{step_s:.2f}", "", f"{gpu_s:,.0f}", "", "the defaults")
    for trial in found.front:
        gains = [f"{found.gain(trial, metric):+.1%}" for metric in UNITS]
        step_s, gpu_s = (trial.mean(metric) for metric in UNITS)
        names = [f"[{name}]" for name, one in found.settings.items() if one.number == trial.number]
        changes = " ".join([*names, *map(_change, found.changes(trial).items())]) or "none"
        table.add_row(str(trial.number), f"{step_s:.2f}", gains[0], f"{gpu_s:,.0f}", gains[1], Text(changes))
    return table


def _change(change: tuple[str, Any]) -> str:
    path, value = change
    shown = f"{value:.4g}" if isinstance(value, float) else json.dumps(value, default=str).strip('"')
    return f"{path.removeprefix('policy.')}={shown}"


def _importance(found: Tuning) -> list[Any]:
    from rich.text import Text

    if found.importance is None:
        return [Text(f"importance of parameters: too few trials (complete ones must be {MIN_FOR_IMPORTANCE})")]
    names = sorted(
        {n for shares in found.importance.values() for n in shares}, key=lambda n: -_most(found.importance, n)
    )
    table = _table("importance", *(UNITS[metric] for metric in found.importance))
    for name in names:
        table.add_row(name, *(f"{shares.get(name, 0):.0%}" for shares in found.importance.values()))
    note = "importance: what tells the best quarter of the trials from all (PED-ANOVA); an indication, no effect size"
    return [table, Text(note)]


def _most(importance: Mapping[str, Mapping[str, float]] | None, name: str) -> float:
    return max(shares.get(name, 0.0) for shares in (importance or {}).values())


def _comparison(found: Tuning) -> list[Any]:
    """Fresh seeds and other workloads, beside the gain that the search saw."""
    from rich.text import Text

    if not found.settings:
        return [Text("no comparison on fresh seeds: nothing but the defaults is left to compare")]
    fresh = found.plan.fresh_seeds
    table = _table("fresh seeds", "setting", "", "defaults", "gain, 95 % paired", "in search")
    for row in found.comparison:
        verdict = f"\n{NOT_SHOWN}" if row["paired"]["verdict"] == NOT_SHOWN else ""
        gain = "{:+.1%} [{:+.1%}, {:+.1%}]".format(row["gain"], *row["gain_ci95"]) + verdict
        own = row["workload"] == found.plan.base.job.workload
        in_search = f"{found.gain(found.settings[row['setting']], row['metric']):+.1%}" if own else ""
        names = (row["workload"], row["setting"], UNITS[row["metric"]])
        table.add_row(*map(Text, (*names, f"{row['defaults']:,.5g}", gain, in_search)))
    return [
        table,
        Text(f"fresh seeds: {fresh[0]} to {fresh[-1]}, whole jobs; verdicts by Holm over all rows"),
        Text(f"in search: {_seeds(found.plan)}; what is less on fresh seeds or elsewhere was fitted to these"),
    ]
