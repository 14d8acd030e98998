"""The experiments of RLHFless (arXiv 2602.22718) beside simrl's, as a page with tables and pictures.

Inputs come from the presets, which say of each where it comes from, and from the lists below; none is chosen by what
comes out. Where the outcome differs from the paper's, causes are tested by switching them, one at a time.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simrl.experiments.bench import commit, machine
from simrl.experiments.bound import gap
from simrl.experiments.compare import Floats, check_same_work
from simrl.experiments.config import Config, ConfigError, load_config
from simrl.experiments.explain import METRICS, variants_of
from simrl.experiments.pool import key_of, map_on_cores
from simrl.experiments.robustness import study_robustness
from simrl.experiments.run import planned, run, write_directory
from simrl.policies.contract import InvalidDecision, PolicyStalled
from simrl.simulator.costs import DoesNotFit
from simrl.traces.lengths import load_workload
from simrl.traces.oracle import Oracle

PAPERS = ("rlhfless",)
EPOCHS = 3  # as many as the paper averages over; the first has no history of lengths
CLOSE_TOKENS = 50  # of the paper's claim on lengths


class Case(NamedTuple):
    """A job on a cluster: a preset, and what differs from it."""

    name: str
    preset: str = "paper-physical"
    sets: tuple[str, ...] = ()


class Variant(NamedTuple):
    """A policy with parameters."""

    name: str
    policy: str = "rlhfless"
    sets: tuple[str, ...] = ()


POLICIES = tuple(Variant(name, name) for name in ("verl", "verl-tuned", "rlhfuse", "rlhfless"))
VERL, TUNED, RLHFUSE, RLHFLESS = POLICIES
PAIR = (VERL, RLHFLESS)
BEST = Case("Qwen2.5-3B, GSM8K, GRPO", sets=("job.model=qwen2.5-3b", "job.workload=gsm8k", "job.algorithm=grpo"))
SIMULATED = Case("Llama-2-70B, 160 H100", "paper-simulated")
HEADLINE = tuple(
    Case(
        f"{model}, {workload}, {algorithm.upper()}",
        sets=(f"job.model={model.lower()}", f"job.workload={workload.lower()}", f"job.algorithm={algorithm}"),
    )
    for model in ("Qwen2.5-3B", "Qwen2.5-7B")
    for workload in ("GSM8K", "GPQA", "LiveCodeBench")
    for algorithm in ("ppo", "grpo")
)
SWEEPS = {
    "tau, `policy.cut_threshold`": ("cut_threshold", (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
    "EWMA alpha, `policy.ewma_alpha`": ("ewma_alpha", (0.1, 0.3, 0.5, 0.7, 1.0)),
    "lambda, `policy.lambda`": ("lambda", (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)),
    "GPUs that learn, `policy.learner_gpus`": ("learner_gpus", (4, 8, 12, 16)),
}
ORACLES = (
    RLHFLESS,
    Variant("rlhfless, true lengths", sets=("policy.lengths=oracle",)),
    Variant("rlhfless, true lengths, equal work", sets=("policy.lengths=oracle", "policy.balance=work")),
)
CAUSES = tuple(
    Case(name, BEST.preset, (*BEST.sets, *sets))
    for name, sets in {
        "as it is": (),
        "shorter tail: responses end at 1024 tokens": ("job.max_response_tokens=1024",),
        "shorter tail: responses end at 512 tokens": ("job.max_response_tokens=512",),
        "longer responses: GSM8K lengths of a reasoning model": ("job.workload=gsm8k-reasoning",),
        "CUDA graphs instead of eager engines": ("engine.preset=vllm-current",),
        "CUDA graphs, and responses end at 512 tokens": ("engine.preset=vllm-current", "job.max_response_tokens=512"),
        "CUDA graphs, and only time counts": ("engine.preset=vllm-current", "policy.lambda=1.0"),
        "the learner's state in host memory meanwhile": ("job.learner_offload=true",),
        "kernels take twice as long": ("engine.calibration=2",),
        "engines of 1 GPU": ("engine.tensor_parallel=1",),
        "engines of 4 GPUs": ("engine.tensor_parallel=4",),
        "engines without prefix caching": ("engine.prefix_caching=false",),
        "128 prompts a step": ("job.prompts_per_step=128",),
        "2048 prompts a step": ("job.prompts_per_step=2048",),
        "only time counts (lambda = 1)": ("policy.lambda=1.0",),
        "8 of 16 GPUs learn": ("policy.learner_gpus=8",),
        "no reference model": ("job.kl_reference=false",),
        "slow collectives of the learner, 1.2 GB/s": ("cluster.parameters.learner.pcie.l40s.bus_bytes_per_s=1.2e9",),
        "sleeping and waking take no time": (
            "cluster.parameters.switch.engine_sleep_s=0.0",
            "cluster.parameters.switch.engine_wake_s=0.0",
        ),
    }.items()
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run.

    Attributes:
        seeds: Of each comparison: 0, 1 and so on.
        points: Of the space of assumed parameters.
        bound_steps: Last steps of a run that are held against the bound.
        every: So many values of a sweep are skipped to the next; the ends stay.
        steps_per_epoch: None: the preset's.
        sets: Over every case's own.
        headline: Cases of the first section.
        causes: Of the last one.
        name: Of the size, for the page's header.
    """

    seeds: int = 10
    points: int = 64
    bound_steps: int = 4
    every: int = 1
    steps_per_epoch: int | None = None
    sets: tuple[str, ...] = ()
    headline: tuple[Case, ...] = HEADLINE
    causes: tuple[Case, ...] = CAUSES
    name: str = "full"


FULL = Sizes()
QUICK = Sizes(seeds=3, points=8, bound_steps=1, every=3, steps_per_epoch=3, name="quick")


# --- jobs, each of which a process does by itself ---


class Task(NamedTuple):
    """What to do with a configuration: `run`, `plan`, `gap` or `robustness`, at the cost of so many runs."""

    kind: str
    config: Config
    amount: int = 1


def do(task: Task) -> Any:
    """The task's answer; what cannot run says why under `impossible`."""
    try:
        match task.kind:
            case "plan":
                return planned(task.config)[0]
            case "gap":
                return _gaps(task.config, task.amount)
            case "robustness":
                return _robustness(task.config, task.amount)
        return run(task.config).summary
    except (DoesNotFit, InvalidDecision, PolicyStalled) as error:
        return {"impossible": str(error).partition(":")[0]}


def _gaps(config: Config, steps: int) -> dict[str, float]:
    """Means over the last *steps* steps of a run of its multiples of the bound."""
    result = run(config)
    phases = result.frames.phases[result.frames.phases["step"] >= config.job.steps - steps]
    found = gap(dataclasses.replace(result, frames=dataclasses.replace(result.frames, phases=phases)))
    return {
        "step_gap": float(found["step_gap"].mean()),
        "gpu_gap": float(found["gpu_gap"].mean()),
        "busy_gap": float(found["busy_gap"].mean()),
        "saving_limit": float((1 - 1 / found["gpu_gap"]).mean()),
    }


def _robustness(config: Config, points: int) -> dict[str, Any]:
    """Of all policies; *config* has the static plan, which is kept at all points."""
    policies = [variant.policy for variant in POLICIES]
    results = [run(config.with_policy(policy)) for policy in policies]
    parameters = {parameter.key: parameter for result in results for parameter in result.parameters}
    summaries = [result.summary for result in results]
    return study_robustness(config, policies, "verl", parameters.values(), summaries, points).to_dict()


# --- which runs, and what they gave ---


class Runs:
    """Configurations of all sections, run once each on all cores.

    Args:
        sizes: How much is run.
        workers: Processes; by default one a core.
    """

    def __init__(self, sizes: Sizes, workers: int | None = None) -> None:
        self.sizes, self.workers = sizes, workers
        self.answers: dict[tuple[str, str], Any] = {}
        self._configs: dict[tuple[Case, Variant], Config] = {}

    def config(self, case: Case, variant: Variant) -> Config:
        """Of a case under a variant; its seed is 0."""
        if (case, variant) not in self._configs:
            own = (*case.sets, *self.sizes.sets, *variant.sets)
            config = load_config(preset=case.preset, policies=[variant.policy, "rlhfless"], sets=own)
            prompts = config.job.prompts_per_step
            steps = self.sizes.steps_per_epoch or _steps_per_epoch(case.preset)
            job = config.job.model_copy(update={"dataset_prompts": steps * prompts, "steps": EPOCHS * steps})
            self._configs[case, variant] = config.model_copy(update={"job": job}).with_policy(variant.policy)
        return self._configs[case, variant]

    def tasks(self) -> list[Task]:
        """Of all sections, the longest first."""
        sizes, wanted = self.sizes, list[Task]()
        wanted += [Task("robustness", self.config(case, TUNED), sizes.points) for case in robust_cases(sizes)]
        compared = [(case, variant) for case in (*sizes.headline, SIMULATED) for variant in POLICIES]
        compared += [(case, variant) for case in sizes.causes for variant in PAIR]
        compared += [(BEST, variant) for variant in (VERL, *ORACLES, *sweep_variants(sizes.every))]
        bounded = [(case, VERL) for case in (*sizes.headline, SIMULATED, *sizes.causes)]
        bounded += [(BEST, variant) for variant in (*POLICIES, *ORACLES)]
        seeds = range(sizes.seeds)
        wanted += [Task("gap", self.seeded(*pair, seed), sizes.bound_steps) for pair in bounded for seed in seeds]
        wanted += [Task("run", self.seeded(*pair, seed)) for pair in compared for seed in seeds]
        wanted += [Task("run", config.with_seed(s)) for config in self.ablation().values() for s in seeds]
        return list({(task.kind, key_of(task.config)): task for task in wanted}.values())

    def ablation(self) -> dict[str, Config]:
        """Of the paper's best case: with and without each technique."""
        return variants_of(self.config(BEST, RLHFLESS))

    def do(self, progress: Callable[[int], None] | None = None) -> None:
        """Plan static clusters, then run everything."""
        tuned = [(case, TUNED) for case in (*self.sizes.headline, SIMULATED, BEST)]
        plans = map_on_cores(do, [Task("plan", self.config(*pair)) for pair in tuned], workers=self.workers)
        self._configs |= dict(zip(tuned, plans, strict=True))
        tasks = self.tasks()
        answers = map_on_cores(do, tasks, workers=self.workers, progress=progress)
        self.answers = {(t.kind, key_of(t.config)): answer for t, answer in zip(tasks, answers, strict=True)}

    def seeded(self, case: Case, variant: Variant, seed: int) -> Config:
        """The configuration with another seed."""
        return self.config(case, variant).with_seed(seed)

    def of(self, case: Case, variant: Variant, kind: str = "run") -> list[dict[str, Any]]:
        """The answers, one a seed."""
        return self.of_config(self.config(case, variant), kind)

    def of_config(self, config: Config, kind: str = "run") -> list[dict[str, Any]]:
        """The answers of a configuration, one a seed."""
        return [self.answers[kind, key_of(config.with_seed(seed))] for seed in range(self.sizes.seeds)]


def _steps_per_epoch(preset: str) -> int:
    job = load_config(preset=preset).job
    return job.dataset_prompts // job.prompts_per_step


def robust_cases(sizes: Sizes) -> list[Case]:
    """The best case, the same with the larger model, and the simulated cluster."""
    larger = [case for case in sizes.headline if case.name == BEST.name.replace("3B", "7B")]
    return [SIMULATED, *larger, BEST]


def sweep_variants(every: int) -> list[Variant]:
    """All values of all sweeps."""
    return [variant for title in SWEEPS for variant in sweep(title, every)]


def sweep(title: str, every: int) -> list[Variant]:
    """Values of a sweep: one in *every*, and the last."""
    key, values = SWEEPS[title]
    chosen = dict.fromkeys([*values[::every], values[-1]])
    return [Variant(f"{value:g}", sets=(f"policy.{key}={value}",)) for value in chosen]


# --- figures of comparisons ---


class Standing(NamedTuple):
    """A policy against a baseline, paired over seeds; every column holds one figure a seed, after the first epoch.

    Attributes:
        step_s: Mean seconds of a step.
        gpu_s: GPU-seconds a step.
        speedup: Baseline's step over this one's.
        saved: Share of the baseline's GPU-seconds.
        saved_paper: Of `gpu_s_paper`, over all epochs.
        first_speedup: In the first epoch.
        first_saved: In the first epoch.
    """

    step_s: Floats
    gpu_s: Floats
    speedup: Floats
    saved: Floats
    saved_paper: Floats
    first_speedup: Floats
    first_saved: Floats


def standing(runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> Standing:
    """Seed by seed; all must have done the same work."""
    for pair in zip(runs, baseline, strict=True):
        check_same_work(pair)

    def column(summaries: Sequence[Mapping[str, Any]], epochs: str, key: str) -> Floats:
        return np.array([summary[epochs][key] for summary in summaries])

    step_s, gpu_s = (column(runs, "later_epochs", key) for key in METRICS)
    paper, theirs = (np.array([summary["gpu_s_paper"] for summary in those]) for those in (runs, baseline))
    return Standing(
        step_s,
        gpu_s,
        column(baseline, "later_epochs", "step_s") / step_s,
        1 - gpu_s / column(baseline, "later_epochs", "gpu_s_per_step"),
        1 - paper / theirs,
        column(baseline, "first_epoch", "step_s") / column(runs, "first_epoch", "step_s"),
        1 - column(runs, "first_epoch", "gpu_s_per_step") / column(baseline, "first_epoch", "gpu_s_per_step"),
    )


class Fact(NamedTuple):
    """What the paper says.

    Attributes:
        value: In *unit*.
        unit: Of it.
        certainty: `abstract`, `second-hand` (a reader's notes) or `one summary`.
        source: Where it stands, and of what.
    """

    value: float
    unit: str
    certainty: str
    source: str


def paper_facts() -> dict[str, Fact]:
    """Figures of the paper by quantity, from data/rlhfless_paper.csv."""
    text = resources.files("simrl.experiments").joinpath("data/rlhfless_paper.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {r["quantity"]: Fact(float(r["value"]), r["unit"], r["certainty"], r["source"]) for r in rows}


def lengths_within(config: Config) -> float:
    """Share of prompts whose mean length moves by less than 50 tokens from the first epoch to the second."""
    job = config.job
    oracle = Oracle(
        load_workload(job.workload), config.seed, job.dataset_prompts, job.responses_per_prompt,
        max_tokens=job.max_response_tokens,
    )  # fmt: skip
    first, second = (oracle.responses(epoch).tokens.mean(axis=1) for epoch in (0, 1))
    return float((np.abs(second - first) < CLOSE_TOKENS).mean())


def reproduce(
    paper: str,
    directory: Path,
    sizes: Sizes = FULL,
    *,
    command: str = "simrl.reproduce",
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write DIRECTORY/reproduction.md and its pictures, or nothing.

    Args:
        paper: `rlhfless`.
        directory: See `check_directory`.
        sizes: How much is run.
        command: That the page names.
        workers: Processes; by default one a core.
        progress: Called with the percentage of tasks done.

    Raises:
        ConfigError: no such paper.
        RunDirectoryError: *directory* cannot be written.
    """
    from simrl.experiments.reproduction_page import Header, write_page

    check_paper(paper)
    begin_wall_s, at = time.perf_counter(), commit()
    runs = Runs(sizes, workers)
    runs.do(progress)
    header = Header(command, at, machine(), sizes, len(runs.answers), time.perf_counter() - begin_wall_s)
    write_directory(directory, lambda place: write_page(runs, header, place))


def check_paper(paper: str) -> None:
    """Raise ConfigError unless there is such a reproduction."""
    if paper not in PAPERS:
        raise ConfigError(f"paper={paper!r} must be one of {', '.join(PAPERS)}")
