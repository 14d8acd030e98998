"""The page of `simrl reproduce`: Markdown and pictures from finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simrl.experiments.compare import Floats, interval95
from simrl.experiments.explain import ALL, METRICS, Explanation, explanation
from simrl.experiments.pool import key_of
from simrl.experiments.reproduce import (
    BEST,
    ORACLES,
    POLICIES,
    RLHFLESS,
    RLHFUSE,
    SIMULATED,
    SWEEPS,
    TUNED,
    VERL,
    Case,
    Runs,
    Sizes,
    Standing,
    Variant,
    lengths_within,
    paper_facts,
    robust_cases,
    standing,
    sweep,
)

PICTURES = "reproduction"
"""The folder of pictures, beside the page."""


class Header(NamedTuple):
    """What a page says of itself."""

    command: str
    commit: str
    machine: str
    sizes: Sizes
    tasks: int
    wall_s: float


def write_page(runs: Runs, header: Header, place: Path) -> None:
    """Write reproduction.md and its pictures into the directory *place*."""
    (place / PICTURES).mkdir()
    page = Page(runs, place / PICTURES)
    sections = (
        page.short, page.headline, page.simulated, page.ablation, page.rlhfuse, page.sensitivity, page.gaps,
        page.robustness, page.causes, page.inputs,
    )  # fmt: skip
    texts = [_head(header), *(section() for section in sections)]
    (place / "reproduction.md").write_text("\n".join(texts).rstrip() + "\n", encoding="utf-8")


def _head(header: Header) -> str:
    sizes = header.sizes
    less = "" if sizes.name == "full" else f" **This is the {sizes.name} size: few seeds, steps and points.**"
    return f"""# RLHFless (arXiv 2602.22718), reproduced

Written by `{header.command}` with simrl {version("simrl")} at commit {header.commit} on {date.today()}: seeds 0 to
{sizes.seeds - 1}, {header.tasks} tasks in {header.wall_s / 60:.1f} minutes. Machine: {header.machine}.{less}

The paper's full text and code were not available to us: its figures are from the abstract and from summaries, each
with how sure it is (`experiments/data/rlhfless_paper.csv`); `rlhfless` is a reconstruction
([policies.md](policies.md)). Inputs were fixed beforehand and none was chosen by what comes out. Unless a column says
otherwise, figures leave out the first epoch, in which there is no history and whose first step holds the cold starts,
and are means with 95 % intervals (Student's t, paired over seeds). Speed-up and saving are against `verl`, unless
another baseline is named; `verl-tuned` is the best static plan that is as fast.
"""


class Page:
    """Sections as Markdown.

    Args:
        runs: Finished.
        pictures: Directory to draw into.
    """

    def __init__(self, runs: Runs, pictures: Path) -> None:
        self.runs, self.pictures, self.facts = runs, pictures, paper_facts()

    def standing(self, case: Case, variant: Variant, baseline: Variant = VERL) -> Standing:
        """Of a variant against a baseline."""
        return standing(self.runs.of(case, variant), self.runs.of(case, baseline))

    def limits(self, case: Case) -> tuple[Floats, Floats]:
        """The largest speed-up over `verl` that any policy can have, and the largest saving in `verl`'s time."""
        gaps = self.runs.of(case, VERL, "gap")
        return np.array([g["step_gap"] for g in gaps]), np.array([g["saving_limit"] for g in gaps])

    def _fact(self, quantity: str, unit: str) -> str:
        value = self.facts[quantity].value
        return f"{value:.1%}" if unit == "%" else f"{value:g}{unit}"

    def refusal(self, case: Case) -> str | None:
        """Why `verl` or `rlhfless` cannot run a case, if so."""
        answers = [*self.runs.of(case, VERL), *self.runs.of(case, RLHFLESS), *self.runs.of(case, VERL, "gap")]
        return next((answer["impossible"] for answer in answers if "impossible" in answer), None)

    # --- sections ---

    def short(self) -> str:
        """The paper's figures beside these."""
        best, simulated = self.standing(BEST, RLHFLESS), self.standing(SIMULATED, RLHFLESS)
        over_fuse = self.standing(BEST, RLHFLESS, RLHFUSE)
        ewma, oracle = (self.standing(BEST, variant).saved for variant in ORACLES[:2])
        policy_s = np.array([s["policy_wall_s"] / s["steps"] for s in self.runs.of(BEST, RLHFLESS)])
        config = self.runs.config(BEST, VERL)
        close = np.array([lengths_within(config.with_seed(seed)) for seed in range(self.runs.sizes.seeds)])
        dedup = self.runs.of_config(self.runs.ablation()["-deduplicated prefill"])
        whole = self.runs.of(BEST, RLHFLESS)
        rows = [
            self._beside("speedup_best", "speed-up, best case", best.speedup, "{:.3f}x"),
            self._beside("gpu_s_reduction_best", "GPU-seconds saved, best case", best.saved),
            self._beside("gpu_s_reduction_best", "the same, paper's measure, all epochs", best.saved_paper),
            self._beside("speedup_simulated", "speed-up, simulated cluster", simulated.speedup, "{:.3f}x"),
            self._beside("gpu_s_reduction_simulated", "GPU-seconds saved, simulated cluster", simulated.saved),
            self._beside("gpu_s_reduction_over_rlhfuse", "saved against `rlhfuse`, best case", over_fuse.saved),
            self._beside("share_of_oracle", "share of what true lengths save (at least)", ewma / oracle),
            self._beside("dedup_prefill_cost", "cost without deduplicated prefill, more by", _more(dedup, whole)),
            self._beside("scheduling_s_per_step", "scheduling, s a step (at most; this host)", policy_s, "{:.4f}"),
            self._beside("lengths_within_50_tokens", "prompts that move by < 50 tokens an epoch", close),
        ]
        limit, _ = self.limits(BEST)
        fact = self.facts["speedup_best"].value
        highest = (interval95(limit) or [0.0, float(limit.max())])[1]
        verdict = "out of reach" if highest < fact else "not excluded by it"
        return f"""## In short

{_table("quantity|paper|how sure|here|difference", rows)}
In the best case no policy whatever can be more than {_mean(limit, "{:.3f}")} times as fast as `verl` with these
inputs ([bound.md](bound.md)): the paper's {fact:g} is {verdict}. What would change that is tested at the end of
the page.
"""

    def _beside(self, quantity: str, name: str, values: Floats, form: str = "{:z.1%}") -> list[str]:
        fact = self.facts[quantity]
        difference = float(values.mean()) - fact.value
        shown = f"{100 * difference:+z.1f} points" if "%" in form else f"{difference:+.3f}"
        return [name, form.format(fact.value), fact.certainty, _mean(values, form), shown]

    def headline(self) -> str:
        """The physical cluster."""
        cases = self.runs.sizes.headline
        rows = [self._row(case, variant) for case in cases for variant in POLICIES]
        self.bars("headline", [case.name for case in cases], {
            variant.name: [self.standing(case, variant) for case in cases] for variant in POLICIES[1:]
        }, ("speedup_best", "gpu_s_reduction_best"))  # fmt: skip
        return f"""## (a) The physical cluster: 16 L40S, 3 responses a prompt

{_table(STANDINGS, rows)}
In the last columns, the most that any policy could have over `verl`: speed-up, and saving in `verl`'s step time.
The paper's {self._fact("speedup_best", "x")} and {self._fact("gpu_s_reduction_best", "%")} (dotted) are of {BEST.name};
we know no figure of the other cells.

![speed-up and saving by cell]({PICTURES}/headline.png)
"""

    def _row(self, case: Case, variant: Variant) -> list[str]:
        found = self.standing(case, variant)
        limits = self.limits(case) if variant == VERL else None
        return [
            case.name, f"`{variant.name}`", f"{found.step_s.mean():.1f}", _mean(found.speedup, "{:.3f}"),
            f"{found.gpu_s.mean():,.0f}", _mean(found.saved), _mean(found.saved_paper),
            f"{found.first_speedup.mean():.3f}", f"{found.first_saved.mean():z.1%}",
            "" if limits is None else _mean(limits[0], "{:.3f}"), "" if limits is None else _mean(limits[1]),
        ]  # fmt: skip

    def simulated(self) -> str:
        """The larger cluster."""
        self.bars("simulated", [SIMULATED.name], {v.name: [self.standing(SIMULATED, v)] for v in POLICIES[1:]},
                  ("speedup_simulated", "gpu_s_reduction_simulated"))  # fmt: skip
        return f"""## (b) The simulated cluster: 20 nodes of 8 H100, Llama-2-70B

{_table(STANDINGS, [self._row(SIMULATED, variant) for variant in POLICIES])}
![speed-up and saving]({PICTURES}/simulated.png)
"""

    def ablation(self) -> str:
        """Each technique switched off, and the waterfall."""
        variants = {label: self.runs.of_config(config) for label, config in self.runs.ablation().items()}
        baseline = self.runs.of(BEST, VERL)
        labels = [label for label in variants if not label.startswith("+")]
        found = {label: standing(variants[label], baseline) for label in labels}
        whole = found[ALL]
        rows = [
            [_ablated(label), f"{s.step_s.mean():.1f}", _mean(s.step_s / whole.step_s - 1, "{:+z.2%}"),
             f"{s.gpu_s.mean():,.0f}", _mean(s.gpu_s / whole.gpu_s - 1, "{:+z.2%}"), _mean(s.speedup, "{:.3f}"),
             _mean(s.saved)]
            for label, s in found.items()
        ]  # fmt: skip
        self.bars("ablation", [_ablated(label) for label in labels], {"rlhfless": [found[label] for label in labels]})
        waterfall = explanation("rlhfless", "verl", variants, baseline)
        return f"""## (c) Ablation: {BEST.name}

{_table("rlhfless|step s|longer than all by|GPU-s a step|dearer than all by|speed-up|GPU-s saved", rows)}
In the paper, by one summary: deduplicated prefill is 5 to 10 % of cost, actor scaling matters most for speed,
assignment for cost.

Where the difference to `verl` comes from, a step, all epochs (`simrl compare --explain`): for each technique the mean
of what it changes as the only one that is on and as the last one to be on; what that leaves is the interaction.
Negative is faster or cheaper.

{_waterfall(waterfall)}
![each technique switched off]({PICTURES}/ablation.png)
"""

    def rlhfuse(self) -> str:
        """Against RLHFuse-style migration."""
        cases = [*self.runs.sizes.headline, SIMULATED]
        found = {case: self.standing(case, RLHFLESS, RLHFUSE) for case in cases}
        rows = [
            [case.name, _mean(s.speedup, "{:.3f}"), _mean(s.saved), _mean(s.saved_paper)] for case, s in found.items()
        ]
        rows.append(["mean of the cells", *(
            f"{np.mean([getattr(s, name).mean() for s in found.values()]):{form}}"
            for name, form in (("speedup", ".3f"), ("saved", ".1%"), ("saved_paper", ".1%"))
        )])  # fmt: skip
        self.bars("rlhfuse", [case.name for case in cases], {"rlhfless": list(found.values())},
                  (None, "gpu_s_reduction_over_rlhfuse"))  # fmt: skip
        return f"""## (d) Against `rlhfuse`

{_table("job|speed-up over rlhfuse|GPU-s saved|paper's measure", rows)}
The paper, second-hand: {self._fact("gpu_s_reduction_over_rlhfuse", "%")} cheaper than RLHFuse-style migration; of which
job is not known.

![against rlhfuse]({PICTURES}/rlhfuse.png)
"""

    def sensitivity(self) -> str:
        """One parameter of the policy at a time."""
        tables, labels, found = [], list[str](), list[Standing]()
        for title in SWEEPS:
            rows = []
            for variant in sweep(title, self.runs.sizes.every):
                s = self.standing(BEST, variant)
                moves = np.array([run["migrations"] / run["steps"] for run in self.runs.of(BEST, variant)])
                rows.append([variant.name, f"{s.step_s.mean():.1f}", _mean(s.speedup, "{:.3f}"),
                             f"{s.gpu_s.mean():,.0f}", _mean(s.saved), f"{moves.mean():.1f}"])  # fmt: skip
                labels.append(f"{title.partition(',')[0]} {variant.name}")
                found.append(s)
            tables.append(_table(f"{title}|step s|speed-up|GPU-s a step|GPU-s saved|migrations a step", rows))
        joined = "\n".join(tables)
        self.bars("sensitivity", labels, {"rlhfless": found})
        return f"""## (e) Sensitivity: {BEST.name}

{joined}
![one parameter at a time]({PICTURES}/sensitivity.png)
"""

    def gaps(self) -> str:
        """Beside true lengths and the bound."""
        variants = [*POLICIES[:-1], *ORACLES]
        rows = []
        for variant in variants:
            s, gaps = self.standing(BEST, variant), self.runs.of(BEST, variant, "gap")
            columns = [np.array([g[key] for g in gaps]) for key in ("step_gap", "gpu_gap", "busy_gap")]
            rows.append([f"`{variant.name}`", _mean(s.speedup, "{:.3f}"), _mean(s.saved),
                         *(_mean(c, "{:.3f}") for c in columns)])  # fmt: skip
        self.bars("gap", [v.name for v in variants], {"against verl": [self.standing(BEST, v) for v in variants]})
        return f"""## (f) True lengths, and the lower bound: {BEST.name}

{_table("policy|speed-up|GPU-s saved|step / bound|GPU-s / bound|busy GPU-s / bound", rows)}
The bound on GPU-seconds is that of each run's own step time; means over the last {self.runs.sizes.bound_steps} steps.
[bound.md](bound.md) says how tight it is.

![true lengths]({PICTURES}/gap.png)
"""

    def robustness(self) -> str:
        """How far the order depends on what is assumed."""
        rows, notes = [], []
        for case in robust_cases(self.runs.sizes):
            study = self.runs.answers["robustness", key_of(self.runs.config(case, TUNED))]
            if "impossible" in study:
                rows.append([case.name, "cannot run", study["impossible"], "", "", ""])
                continue
            for metric, found in study["by"].items():
                rows += [
                    [case.name, metric, f"`{pair['better']}` < `{pair['worse']}`", f"{pair['ratio']:.3f}",
                     " to ".join(f"{end:.3f}" for end in pair["ratio_range"] or ()), _share(pair["share_holds"])]
                    for pair in found["pairs"]
                ]  # fmt: skip
            notes.append(
                f"{case.name}: {len(study['parameters'])} parameters, {study['points']} points,"
                f" {study['impossible_points']} more at which a policy cannot run"
                f" ({'; '.join(study['impossible_because']) or 'none'})."
            )
        return f"""## Does it hold over what is assumed?

All assumed parameters at once over their ranges ([metrics.md](metrics.md), Robustness), seed 0, all epochs.
`verl-tuned` keeps the plan that it made with the values as they are.
{" ".join(notes)}

{_table("job|by|order|ratio|over the points|holds at", rows)}"""

    def causes(self) -> str:
        """Suspected causes of the differences, switched one at a time."""
        rows, reached = [], []
        first: Standing | None = None
        for case in self.runs.sizes.causes:
            refusal = self.refusal(case)
            if refusal:
                rows.append([case.name, f"cannot run: {refusal}", *[""] * 6])
                continue
            s, (faster, _) = self.standing(case, RLHFLESS), self.limits(case)
            first = first or s
            if s.speedup.mean() >= self.facts["speedup_best"].value:
                reached.append(case.name)
            moved = [_mean(a - b, "{:+z.3f}") for a, b in ((s.speedup, first.speedup), (s.saved, first.saved))]
            verl_s = self.standing(case, VERL).step_s.mean()
            rows.append([case.name, f"{verl_s:.1f}", f"{s.step_s.mean():.1f}", _mean(s.speedup, "{:.3f}"), moved[0],
                         _mean(faster, "{:.3f}"), _mean(s.saved), moved[1]])  # fmt: skip
        answer = f"These reach it: {'; '.join(reached)}." if reached else "None of them reaches it."
        header = "switched|verl step s|rlhfless step s|speed-up|moved by|most possible|GPU-s saved|moved by"
        return f"""## What explains the differences: suspected causes, switched

{BEST.name}, one change at a time, both policies with it. "Most possible" is the bound on any policy's speed-up
over `verl`. The paper's speed-up is {self._fact("speedup_best", "x")}. {answer} Three rows (the two with two
changes, and the learner's state in host memory) were added after a first look at the others; none was left out.

{_table(header, rows)}"""

    def inputs(self) -> str:
        """What was run."""
        sizes = self.runs.sizes
        rows = []
        for case in (*sizes.headline, SIMULATED):
            job, engine = self.runs.config(case, VERL).job, self.runs.config(case, VERL).engine
            plan = self.runs.config(case, POLICIES[1]).policy_params
            rows.append([case.name, f"`{case.preset}`", f"{job.prompts_per_step} x {job.responses_per_prompt}",
                         f"{job.steps}", f"{job.dataset_prompts}", engine.preset, f"{engine.tensor_parallel}",
                         f"{plan.get('nodes')} nodes, engines of {plan.get('tensor_parallel')}"])  # fmt: skip
        facts = [
            [name, f"{f.value:g} {f.unit}".removesuffix(" 1"), f.certainty, f.source] for name, f in self.facts.items()
        ]
        return f"""## Inputs

{_table("job|preset|responses a step|steps|prompts an epoch|engine|GPUs an engine|plan of verl-tuned", rows)}
Lengths: [workloads.md](workloads.md); hardware: [hardware.md](hardware.md); each preset's file says of its values where
they come from (`experiments/presets`).

{_table("quantity|value|how sure|source", facts)}"""

    # --- pictures ---

    def bars(
        self, name: str, labels: Sequence[str], series: Mapping[str, Sequence[Standing]],
        facts: tuple[str | None, str | None] = (None, None),
    ) -> None:  # fmt: skip
        """Speed-up and saving side by side, with 95 % intervals; dotted: the paper's figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.4 + 0.16 * len(labels) * (1 + len(series))), dpi=70, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        panels = (("speedup", "speed-up", 1.0), ("saved", "share of GPU-seconds saved", 0.0))
        for axis, (column, title, neutral), fact in zip(axes, panels, facts, strict=True):
            for index, (policy, found) in enumerate(series.items()):
                columns = [getattr(s, column) for s in found]
                y = np.arange(len(labels)) + 0.8 * (index + 0.5) / len(series) - 0.4
                errors = [_half(values) for values in columns]
                means = [values.mean() - neutral for values in columns]
                axis.barh(y, means, 0.8 / len(series), left=neutral, xerr=errors, label=policy)
            axis.axvline(neutral, color="black", linewidth=0.8)
            if fact:
                axis.axvline(self.facts[fact].value, color="black", linestyle=":")
            axis.set_title(title)
        axes[0].set_yticks(np.arange(len(labels)), labels)
        axes[0].invert_yaxis()
        if len(series) > 1:
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(series))
        figure.savefig(self.pictures / f"{name}.png")


STANDINGS = (
    "job|policy|step s|speed-up|GPU-s a step|GPU-s saved|saved, paper's measure, all epochs|first epoch: speed-up"
    "|first epoch: saved|speed-up possible|saving possible"
)


def _more(runs: Sequence[dict[str, Any]], whole: Sequence[dict[str, Any]]) -> Floats:
    """Share by which runs are dearer than others."""
    return -standing(runs, whole).saved


def _ablated(label: str) -> str:
    return {"all": "all techniques", "none": "no technique"}.get(label, f"without {label[1:]}")


def _waterfall(found: Explanation) -> str:
    rows = [
        [name, *(_mean(term[metric], "{:+z,.2f}") for metric in METRICS)] for name, term in found.by_mechanism.items()
    ]
    rows.append(["**difference**", *(_mean(found.difference[metric], "{:+z,.2f}") for metric in METRICS)])
    return _table("mechanism|s a step|GPU-s a step", rows)


def _mean(values: Floats, form: str = "{:z.1%}") -> str:
    interval = interval95(values)
    shown = form.format(float(values.mean()))
    return shown if interval is None else f"{shown} ({form.format(interval[0])} to {form.format(interval[1])})"


def _half(values: Floats) -> float:
    interval = interval95(values)
    return 0.0 if interval is None else (interval[1] - interval[0]) / 2


def _share(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"


def _table(header: str, rows: Sequence[Sequence[str]]) -> str:
    names = header.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
