"""Shipped workloads: `python -m simrl.experiments.fit_workloads [NAME...]` fits them again, `--coverage` tests the fit.

Each is what `simrl trace fit` makes of a shipped table; `--check` says how far each file is from a fresh fit.
`--coverage N` draws N data sets from known parameters, with a fifth of the responses at the cap, and counts how often
each parameter's 95 % interval holds the truth.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from simrl.experiments.trace_fit import fit_workload
from simrl.traces.fit import FitError, Form, Lengths, fit
from simrl.traces.lengths import FAMILIES, load_workload

XIANGWW = "xiangww0108, a fork of LiveCodeBench (MIT)"
INTERP = "thaotnguyen/thinking-llms-interp (no licence file: counts only)"
SKYTHOUGHT = "NovaSky-AI/SkyThought (Apache-2.0)"
ATTS = "menik1126/Asynchronous-Test-Time-Scaling (no licence file: counts only)"
LOGIT = "tobypullan/logit_cot_overthinking (no licence file: counts only)"
ALPACA = "tatsu-lab/alpaca_eval (Apache-2.0)"


@dataclass(frozen=True)
class Shipped:
    """A shipped workload: which rows of which table, and what is stated beside them."""

    table: str
    model: str
    attribution: str
    cap: int | None = None
    between_share: str | None = None
    split: str | None = None


SHIPPED: Mapping[str, Shipped] = {
    "gsm8k-qwen2.5-32b": Shipped("gsm8k_models", "Qwen2.5-32B", INTERP),
    "gsm8k-reasoning": Shipped("gsm8k_models", "QwQ-32B", INTERP),
    "gsm8k-distill": Shipped("gsm8k_models", "DeepSeek-R1-Distill-Qwen-32B", INTERP),
    "livecodebench": Shipped("livecodebench", "Qwen2.5-Coder-Ins-7B", XIANGWW),
    "livecodebench-llama": Shipped("livecodebench", "LLama3.1-8b-Ins", XIANGWW),
    "math500": Shipped("math500", "Qwen2.5-14B-Instruct", SKYTHOUGHT),
    "math500-reasoning": Shipped("math500", "DeepSeek-R1-Distill-Llama-8B(self_opt)", ATTS),
    # 198 questions once; the share is that of 75 of them, chosen by outcome, ten times each.
    "gpqa": Shipped("gpqa", "gemma-4-12B-it", LOGIT, cap=32700, between_share="0.68,0.57,0.77", split="all198;1run"),
    "chat": Shipped("chat", "Meta-Llama-3.1-8B-Instruct-Turbo", ALPACA),
}
TEMPLATE_TOKENS = 30  # a chat template with a short system prompt; assumed, from none to 60


def table_path(name: str) -> Path:
    """A shipped table."""
    return Path(str(resources.files("simrl.traces").joinpath(f"data/{name}_lengths.csv.gz")))


def fit_shipped(name: str, output: Path) -> dict[str, object]:
    """Fit a shipped workload and write it to *output*."""
    what = SHIPPED[name]
    groups = [f"model={what.model}", *([f"split={what.split}"] if what.split else [])]
    return fit_workload(
        table_path(what.table), output, groups=groups, cap=what.cap, between_share=what.between_share,
        template_tokens=TEMPLATE_TOKENS, attribution=what.attribution,
    )  # fmt: skip


# A fifth of the responses at the cap: a twentieth that never stop, the rest long ones.
TRUTH = {"mu": 6.0, "between_sd": 0.4, "within_sd": 0.3, "cap_mass": 0.05, "drift_per_epoch": -0.05}
MIXTURE_TRUTH = {"second_share": 0.25, "second_offset": -1.2, "second_sd": 0.3}
CAPS = {"lognormal": 650, "gamma": 650, "weibull": 640, "lognormal-mixture": 600}
PROMPTS, GROUP, EPOCHS = 100, 4, 2


def truth_of(family: str) -> dict[str, float]:
    """The parameters that the coverage test draws from."""
    return {**TRUTH, **(MIXTURE_TRUTH if family == "lognormal-mixture" else {})}


def simulated(family: str, seed: int, cap: int | None = None, prompts: int = PROMPTS) -> Lengths:
    """Responses of known parameters, drawn as a run draws them."""
    numbers: dict[str, Any] = dict(truth_of(family))
    model = dataclasses.replace(load_workload("gsm8k"), parameters=(), family=family, **numbers)
    cap = cap or CAPS[family]
    drawn = [model.response_lengths(seed, epoch, prompts, GROUP, cap) for epoch in range(EPOCHS)]
    return Lengths(
        prompt=np.tile(np.repeat(np.arange(prompts), GROUP), EPOCHS),
        tokens=np.concatenate([epoch.tokens.ravel() for epoch in drawn]),
        truncated=np.concatenate([epoch.truncated.ravel() for epoch in drawn]),
        epoch=np.repeat(np.arange(EPOCHS), prompts * GROUP).astype(float),
    )


def coverage(family: str, seeds: range, prompts: int = PROMPTS) -> tuple[dict[str, int], float]:
    """How many seeds' intervals hold each true parameter, and the mean share of truncated responses."""
    form, truth = Form(family, cap_mass=True, drift=True), truth_of(family)
    held, truncated = dict.fromkeys(form.names, 0), 0.0
    for seed in seeds:
        lengths = simulated(family, seed, prompts=prompts)
        truncated += float(lengths.truncated.mean()) / len(seeds)
        try:
            found = fit(lengths, form)
        except FitError:
            continue  # an interval that is not found holds nothing
        assert found.intervals is not None
        for name, (low, high) in found.intervals.items():
            held[name] += low <= truth[name] <= high
    return held, truncated


def check(name: str, folder: Path) -> float:
    """Largest difference of a parameter between the shipped file and a fresh fit, in units of its interval's width."""
    fit_shipped(name, folder / "fresh.toml")
    fresh = load_workload(str(folder / "fresh.toml"))
    worst = 0.0
    for old, new in zip(load_workload(name).parameters, fresh.parameters, strict=True):
        width = 1.0 if old.low is None or old.high is None else max(old.high - old.low, 1e-4)
        worst = max(worst, abs(float(old.value) - float(new.value)) / width)
    return worst


def main() -> None:
    """Fit, check or test coverage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="workloads to fit again; by default all")
    parser.add_argument("--check", action="store_true", help="compare fresh fits with the files, write nothing")
    parser.add_argument("--coverage", type=int, metavar="N", help="data sets to draw, seeds 0 to N - 1")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="of --coverage; by default all")
    options = parser.parse_args()
    if options.coverage:
        for family in options.family or FAMILIES:
            prompts = PROMPTS * (4 if family == "lognormal-mixture" else 1)
            held, truncated = coverage(family, range(options.coverage), prompts)
            counts = ", ".join(f"{name} {count}" for name, count in held.items())
            print(f"{family}: {truncated:.1%} truncated; of {options.coverage} intervals hold: {counts}", flush=True)
        return
    for name in options.names or SHIPPED:
        if options.check:
            import tempfile

            with tempfile.TemporaryDirectory() as folder:
                print(f"{name}: {check(name, Path(folder)):.1%} of an interval's width", flush=True)
        else:
            figures = fit_shipped(name, table_path("x").with_name(f"workload_{name}.toml"))
            print(f"{name}: {figures['form']}", flush=True)


if __name__ == "__main__":
    main()
