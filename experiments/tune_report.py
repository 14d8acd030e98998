"""What a search leaves: files, pictures, and tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simrl.experiments import plots, toml_text
from simrl.experiments.config import full_policy_params
from simrl.experiments.kept import write_json, write_text
from simrl.experiments.statistics import NOT_SHOWN
from simrl.traces.trace import whole_file

if TYPE_CHECKING:
    import optuna
    from rich.console import RenderableType
    from rich.table import Table

    from simrl.experiments.tune import Trial, Tuning

UNITS = {"step_s": "s/step", "gpu_s_per_step": "GPU-s/step"}
MIN_FOR_IMPORTANCE = 20
"""Complete trials: optuna's manual wants 5 in the best quarter, which importance looks at."""


def layer_toml(found: Tuning, trial: Trial) -> str:
    """What `simrl run --config` takes: the policy with all its parameters, and whatever else was searched."""
    config = found.plan.config(trial.values)
    tree: dict[str, Any] = {"policy": {"name": config.policy, **full_policy_params(config)}}
    for path, value in trial.values.items():
        *above, last = toml_text.parse_key(path)
        reduce(lambda node, name: node.setdefault(name, {}), above, tree)[last] = value
    head = f"# simrl tune --objective {found.plan.objective}, trial {trial.number}, preset {config.preset}\n"
    return head + toml_text.write_toml(tree)


def write_outputs(found: Tuning, directory: Path) -> None:
    """All files of a search but those that `tune` begins with; see docs/experiments.md."""
    frame, is_front = found.frame(), len(found.plan.metrics) > 1
    with whole_file(directory / "trials.parquet") as file:
        frame.to_parquet(file, index=False)
    write_text(directory / "best.toml", layer_toml(found, found.best))
    if is_front:
        with whole_file(directory / "front.csv") as file:
            frame.set_index("trial").loc[[trial.number for trial in found.front]].to_csv(file)
        for trial in found.front:
            write_text(directory / "front" / f"trial-{trial.number}.toml", layer_toml(found, trial))
    _draw(found, directory / ("front.png" if is_front else "history.png"))
    _write_journal(found.study, directory / "journal.log")
    write_json(directory / "summary.json", found.to_dict())


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

    plan, frame = found.plan, found.frame()
    complete = frame[frame["state"] == "complete"]
    with plots.theme():
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        if len(plan.metrics) > 1:
            plots.pareto(complete, ["trial"], axes, x="step_s", y="gpu_s_per_step", label="front")
            for name, trial in {"defaults": found.defaults, **found.settings}.items():
                axes.plot(trial.mean("step_s"), trial.mean("gpu_s_per_step"), "D", label=name, zorder=3)
            axes.set(xlabel=UNITS["step_s"], ylabel=UNITS["gpu_s_per_step"])
        else:
            (metric,) = plan.metrics
            for state, marker, label in (("complete", ".", "complete"), ("pruned", "x", "pruned, on the seeds it ran")):
                own = [trial for trial in found.trials if trial.state == state]
                axes.plot([t.number for t in own], [1 - found.gain(t, metric) for t in own], marker, label=label)
            best = complete[metric].cummin() / found.defaults.mean(metric)
            axes.step(complete["trial"], best, where="post", label="best so far")
            axes.set(xlabel="trial", ylabel=f"{UNITS[metric]} / that of the defaults on the same seeds")
        axes.legend()
        axes.set_title(f"{plan.base.policy}: means over {plan.seeds} seeds, {plan.steps} steps each")
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=150)


# --- for people ---


def of_tuning(found: Tuning, directory: Path | None) -> RenderableType:
    """What `simrl tune` prints."""
    from rich.console import Group
    from rich.text import Text

    plan, about = found.plan, found.to_dict()
    searched = about["seeds"]["search"]
    seeds = f"seeds {searched[0]} to {searched[-1]}, {plan.steps} of {plan.base.job.steps} steps"
    head = (
        f"{plan.base.policy}, objective {plan.objective}: {len(found.trials)} trials"
        f" ({about['trials']['pruned']} pruned, which saved {about['runs_saved_by_pruning']} runs;"
        f" {about['trials']['failed']} failed), {seeds}; {found.computed} runs done now"
    )
    space = [(d.axis.path, str(d), d.source) for d in plan.dimensions]
    space += [(path, "not searched", why) for path, why in plan.skipped.items()]
    parts: list[Any] = [Text(head, style="bold"), _table(("searched", "values", "from"), space), Text(), _front(found)]
    parts += [about["standing"], "", *_importance(found), "", *_comparison(found, seeds)]
    parts += [Text(f"written to {directory}", overflow="fold")] if directory is not None else []
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        numbers = column in (*UNITS.values(), "gain", "trial")
        table.add_column(column, overflow="fold", justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _front(found: Tuning) -> Table:
    """The defaults and the front, each figure with its gain."""
    rows = []
    for trial in (found.defaults, *found.front):
        gains = [f"{found.gain(trial, metric):+.1%}" for metric in UNITS]
        names = [f"[{name}]" for name, one in found.settings.items() if one is trial]
        changes = " ".join([*names, *map(_change, found.changes(trial).items())]) or "none"
        number, *others = (str(trial.number), *gains, changes) if trial.number >= 0 else ("", "", "", "the defaults")
        step_s, gpu_s = f"{trial.mean('step_s'):.2f}", f"{trial.mean('gpu_s_per_step'):,.0f}"
        rows.append((number, step_s, others[0], gpu_s, others[1], others[2]))
    return _table(("trial", "s/step", "gain", "GPU-s/step", "gain", "changes"), rows)


def _change(change: tuple[str, Any]) -> str:
    path, value = change
    shown = f"{value:.4g}" if isinstance(value, float) else json.dumps(value, default=str).strip('"')
    return f"{path.removeprefix('policy.')}={shown}"


def _importance(found: Tuning) -> list[RenderableType]:
    if found.importance is None:
        return [f"importance of parameters: too few trials (complete ones must be {MIN_FOR_IMPORTANCE})"]
    metrics = list(found.importance.values())
    names = dict.fromkeys(name for shares in metrics for name in shares)
    shares = {name: [each.get(name, 0.0) for each in metrics] for name in names}
    rows = [(n, *(f"{share:.0%}" for share in shares[n])) for n in sorted(names, key=lambda n: -max(shares[n]))]
    note = "importance: what tells the best quarter of the trials from all (PED-ANOVA); an indication, no effect size"
    return [_table(("importance", *(UNITS[metric] for metric in found.importance)), rows), note]


def _comparison(found: Tuning, seeds: str) -> list[RenderableType]:
    """Fresh seeds and other workloads, beside the gain that the search saw."""
    if not found.settings:
        return ["no comparison on fresh seeds: nothing but the defaults is left to compare"]
    fresh, rows = found.plan.fresh_seeds, []
    for row in found.comparison:
        gain = "{:+.1%} [{:+.1%}, {:+.1%}]".format(row["gain"], *row["gain_ci95"])
        gain += f"\n{NOT_SHOWN}" * (row["paired"]["verdict"] == NOT_SHOWN)
        own = row["workload"] == found.plan.base.job.workload
        in_search = f"{found.gain(found.settings[row['setting']], row['metric']):+.1%}" if own else ""
        rows.append((row["workload"], row["setting"], UNITS[row["metric"]], f"{row['defaults']:,.5g}", gain, in_search))
    return [
        _table(("fresh seeds", "setting", "", "defaults", "gain, 95 % paired", "in search"), rows),
        f"fresh seeds: {fresh[0]} to {fresh[-1]}, whole jobs; verdicts by Holm over all rows",
        f"in search: {seeds}; what is less on fresh seeds or elsewhere was fitted to these",
    ]
