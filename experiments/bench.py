"""How fast simrl is: `python -m simrl.experiments.bench` measures it and writes docs/performance.md.

Every figure comes from a process of its own, whose command stands beside it. sched-sim is no dependency: `make bench`
installs it into an environment of its own, and without that its section says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from simrl.policies.contract import Completions, Decision, Observation, Subscribe
from simrl.policies.verl import Verl
from simrl.simulator.engine import Engine, Request
from simrl.traces.iteration import BATCH_KNOTS, CONTEXT_KNOTS, TOKEN_KNOTS, IterationTimes, Table, load_iteration_times
from simrl.traces.models import load_model

BATCH_CAP = 128
GROUP = 4  # responses of a prompt
TIMEOUT_S = 3600.0
ROOT = Path(__file__).resolve().parent.parent
SCHED_SIM = Path(sys.prefix, "sched-sim", "bin", "python")
HEADER = "work|responses|wall s|responses/s|responses/CPU s|peak MB|command"
PEER_HEADER = (
    "requests|engines|simrl requests/CPU s|sched-sim|ratio|simrl makespan s|sched-sim|difference|aligned|command"
)
Lengths = Sequence[tuple[int, int, int]]
"""A request each: group, prompt tokens, response tokens."""
Outcome = tuple[int, float]
"""Completed requests, and simulated seconds until the last."""


class EveryCompletion(Verl):
    """`verl` that asks to be woken by every completion: what triggers cost."""

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """As `verl`."""
        asked = bool(self.functions)
        return [*super().decide(observation), *([] if asked else [Subscribe(Completions(1))])]


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured. Pairs are (requests, engines); `growing` ascends, `job` are options of the main job."""

    shared: tuple[tuple[int, int], ...] = ((1024, 1), (1024, 16), (4096, 160))
    job: str = "--nodes 20"
    growing: tuple[tuple[int, int], ...] = ((1_000, 1), (10_000, 10), (100_000, 100), (1_000_000, 1000))
    repetitions: int = 3


QUICK = Sizes(
    ((64, 1), (64, 4), (128, 8)), "--nodes 2 --steps 2 --set job.prompts_per_step=16", ((40, 1), (400, 10)), 1
)


class Job(NamedTuple):
    """What is measured, arguments of `python -m`, and how many responses it has to complete, if that is known."""

    work: str
    command: str
    responses: int | None = None


class Row(NamedTuple):
    """Cells under `HEADER`, and (responses, seconds) of each repetition: of CPU time, else of wall time."""

    cells: tuple[str, ...]
    points: list[tuple[int, float]]


# --- the engine alone ---


def draw_lengths(requests: int) -> Lengths:
    """GSM8K lengths at seed 0."""
    from simrl.traces.lengths import load_workload

    model, groups = load_workload("gsm8k"), math.ceil(requests / GROUP)
    prompts = model.prompt_lengths(0, groups).tolist()
    responses = model.response_lengths(0, 0, groups, GROUP, max_tokens=2048).tokens.tolist()
    return [(group, prompts[group], tokens) for group in range(groups) for tokens in responses[group]][:requests]


def shares(lengths: Lengths, engines: int) -> list[Lengths]:
    """Contiguous shares of whole groups, one an engine."""
    groups = math.ceil(len(lengths) / GROUP)
    bounds = [GROUP * (groups * i // engines) for i in range(engines + 1)]
    return [lengths[bounds[i] : bounds[i + 1]] for i in range(engines)]


def shipped_times() -> IterationTimes:
    """Iteration times of Qwen2.5-7B on two L40S."""
    times = load_iteration_times(load_model("qwen2.5-7b"), "l40s", 2)
    assert times is not None, "the shipped table holds them"
    return times


def simulate_engines(parts: Sequence[Lengths], times: IterationTimes, **options: Any) -> Outcome:
    """Engines that get one part each at t = 0."""
    completed, makespan_s = 0, 0.0
    for part in parts:
        engine: Engine[Request] = Engine(times, max_num_seqs=BATCH_CAP, **options)
        for i, (group, prompt_tokens, target_tokens) in enumerate(part):
            engine.add(Request(i, group, prompt_tokens, target_tokens))
        now_s = 0.0
        while (span := engine.plan(BATCH_CAP)) is not None:
            now_s += span.seconds
            completed += len(engine.advance(span.iterations))
        makespan_s = max(makespan_s, now_s)
    return completed, makespan_s


def timed(simulate: Callable[[], Outcome]) -> tuple[Outcome, float, float]:
    """What *simulate* returns, and its CPU and wall seconds."""
    # Of this thread: idle BLAS threads spin for some milliseconds after numpy's import.
    cpu_s, wall_s = time.thread_time(), time.perf_counter()
    outcome = simulate()
    return outcome, time.thread_time() - cpu_s, time.perf_counter() - wall_s


def measure_engine(requests: int, engines: int, repetitions: int) -> dict[str, Any]:
    """Seconds of each repetition; the first pass fills the table's rows and does not count."""
    parts, times = shares(draw_lengths(requests), engines), shipped_times()
    gc.disable()  # as the command line does for a run

    def simulate() -> Outcome:
        return simulate_engines(parts, times, kv_blocks=1_000_000, max_batched_tokens=8192)

    completed, _ = simulate()
    _, cpu_s, wall_s = zip(*(timed(simulate) for _ in range(repetitions)), strict=True)
    return {"responses": completed, "cpu_s": cpu_s, "wall_s": wall_s}


# --- beside sched-sim, in its environment, which has no numpy ---


def common_times() -> IterationTimes:
    """The shipped table, but all prefills attend to 64 tokens: sched-sim tells a latency model counts only."""
    shipped = shipped_times()
    decode = ((b, c, shipped.decode_s(b, c)) for b in BATCH_KNOTS for c in CONTEXT_KNOTS)
    prefill = ((tokens, 64, shipped.prefill_s(tokens, 64)) for tokens in TOKEN_KNOTS)
    return IterationTimes(Table.from_rows(decode), Table.from_rows(prefill), source=shipped.source, status="derived")


def simulate_sched_sim(parts: Sequence[Lengths], times: IterationTimes, *, aligned: bool) -> Outcome:
    """As `simulate_engines`, by sched-sim's FCFS; *aligned* takes away what it counts otherwise than vLLM."""
    module = importlib.import_module
    events, requests = module("sched_sim.core.event_engine"), module("sched_sim.core.request")
    memory, preemption = module("sched_sim.memory.block_manager"), module("sched_sim.memory.preemption")
    hardware = module("sched_sim.hardware.profile").HardwareProfile(
        vram_gb=40.0, parameter_count_billions=7.6, num_layers=28, num_kv_heads=4, head_dim=128
    )
    latency = SimpleNamespace(
        launch_overhead_s=0.0,
        compute_prefill_step_time=lambda tokens: times.prefill_s(tokens, 64),
        compute_decode_step_time=lambda batch, context: times.decode_s(batch, context / batch + aligned),
        compute_mixed_step_time=lambda tokens, b, context: times.iteration_s(tokens, 64, b, context / b + aligned),
    )
    completed, makespan_s = 0, 0.0
    for part in parts:
        blocks = memory.BlockManager(hardware, cpu_memory_gb=0.1)
        handler = preemption.PreemptionHandler(blocks, latency)
        fcfs = module("sched_sim.schedulers.fcfs").FCFSScheduler(blocks, latency, handler, BATCH_CAP)
        simulator = events.Simulator(hardware, fcfs)
        for i, (_, prompt, tokens) in enumerate(part):
            sizes = {"prompt_tokens": prompt, "output_tokens": tokens - aligned}
            simulator.submit_workload([requests.Request(request_id=str(i), arrived_at=0.0, **sizes)])
        completed += simulator.run().completed_requests
        makespan_s = max([makespan_s, *(r.completed_at for r in simulator.all_requests if r.completed_at)])
    return completed, makespan_s


def measure_peer(lengths: Lengths, engines: int, repetitions: int) -> dict[str, Any]:
    """Both on the same requests, without prefix caching, by turns: median CPU seconds, and makespans (aligned last)."""
    parts, times = shares(lengths, engines), common_times()
    gc.disable()

    def ours() -> Outcome:
        # FCFS has no token budget. Its 40 GB leave so many blocks, enough for any 128 of these responses.
        return simulate_engines(parts, times, kv_blocks=29_660, max_batched_tokens=2**30, prefix_caching=False)

    outcomes = [ours(), *(simulate_sched_sim(parts, times, aligned=aligned) for aligned in (False, True))]
    both = (ours, functools.partial(simulate_sched_sim, parts, times, aligned=False))
    cpu_s = [[timed(simulate)[1] for simulate in both] for _ in range(repetitions)]
    return {
        "responses": min(completed for completed, _ in outcomes),
        "makespan_s": [makespan_s for _, makespan_s in outcomes],
        "cpu_s": [statistics.median(seconds) for seconds in zip(*cpu_s, strict=True)],
    }


def compare(requests: int, engines: int, repetitions: int, python: Path) -> tuple[str, ...]:
    """Cells under `PEER_HEADER`; *python* has sched-sim."""
    options = f"--requests {requests} --engines {engines} --repetitions {repetitions}"
    command = f"simrl.experiments.bench peer {options}".split()
    result = checked(run_command(command, python, json.dumps(draw_lengths(requests))), requests)
    (ours_s, peer_s), (ours, peer, aligned) = result["cpu_s"], result["makespan_s"]
    speeds = f"{requests / ours_s:,.0f}", f"{requests / peer_s:,.0f}", f"{peer_s / ours_s:.0f}"
    makespans = f"{ours:.3f}", f"{peer:.3f}", f"{peer / ours - 1:+.2%}", f"{aligned / ours - 1:+.0e}"
    shown = f"`python -m simrl.experiments.bench sched-sim {options}`"
    return f"{requests:,}", f"{engines}", *speeds, *makespans, shown


# --- processes ---


def run_command(command: Sequence[str], python: Path | None = None, text: str = "") -> dict[str, Any]:
    """The JSON that `python -m ...` prints when *text* is its input, and its peak memory as `peak_mb`.

    Raises:
        RuntimeError: it failed, or took longer than `TIMEOUT_S`.
    """
    print("bench:", shlex.join(command), file=sys.stderr)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} if python else None
    program = [str(python or sys.executable), "-m", *command]
    with subprocess.Popen(program, stdin=-1, stdout=-1, env=environment, text=True) as process:
        assert process.stdin, "a pipe"
        assert process.stdout, "a pipe"
        timer = threading.Timer(TIMEOUT_S, process.kill)
        timer.start()
        process.stdin.write(text)
        process.stdin.close()
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # only this tells one child's memory from another's
        process.returncode = os.waitstatus_to_exitcode(status)
        timer.cancel()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(program)} ended with {process.returncode}")
    return {**json.loads(output), "peak_mb": usage.ru_maxrss * 1024 / 1e6}  # Linux counts in KiB


def checked(result: dict[str, Any], expected: int | None) -> dict[str, Any]:
    """The *result* of a command.

    Raises:
        RuntimeError: it has not all *expected* responses.
    """
    if expected not in (None, result["responses"]):
        raise RuntimeError(f"{result['responses']} of {expected} responses are complete")
    return result


def measure(jobs: Sequence[Job], repetitions: int) -> list[Row]:
    """A row each. Repetitions go round all jobs, so that what changes on the machine does not hit one of them alone."""
    results: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for _ in range(repetitions):
        for job, own in zip(jobs, results, strict=True):
            own.append(checked(run_command(job.command.split()), job.responses))
    return [row(job, own) for job, own in zip(jobs, results, strict=True)]


def row(job: Job, results: Sequence[dict[str, Any]]) -> Row:
    """Medians over repetitions of the process, and over those inside it."""
    responses, wall_s, cpu_s = results[0]["responses"], figures(results, "wall_s"), figures(results, "cpu_s")
    by_wall, by_cpu = (f"{responses / statistics.median(s):,.0f}" if s else "-" for s in (wall_s, cpu_s))
    peak_mb = statistics.median(result["peak_mb"] for result in results)
    cells = job.work, f"{responses:,}", f"{statistics.median(wall_s):.3g}", by_wall, by_cpu, f"{peak_mb:,.0f}"
    return Row((*cells, f"`python -m {job.command}`"), [(responses, seconds) for seconds in cpu_s or wall_s])


def figures(results: Sequence[dict[str, Any]], key: str) -> list[float]:
    """All values of a figure, of which a process prints one, several or none."""
    values = []
    for result in results:
        value = result.get(key, [])
        values += value if isinstance(value, list) else [value]
    return values


def engine_job(requests: int, engines: int) -> Job:
    """The engine alone, five times in one process."""
    command = f"simrl.experiments.bench engine --requests {requests} --engines {engines}"
    return Job(f"engine x {engines}", command, requests)


def step_job(requests: int, engines: int) -> Job:
    """One step of the whole simulator, with an engine a node of 8 GPUs."""
    prompts = requests // GROUP
    sets = f"--set job.prompts_per_step={prompts} --set job.dataset_prompts={prompts}"
    sets += f" --set engine.tensor_parallel=8 --set engine.max_num_seqs={BATCH_CAP}"
    command = f"simrl run --policy verl --nodes {engines} --steps 1 {sets} --json"
    return Job(f"one step, engine x {engines}", command, requests)


# --- the page ---


def table(header: str, rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars separate the cells of *header*."""
    names = header.split("|")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows))


def whole_jobs(sizes: Sizes) -> list[Job]:
    """The whole simulator: one step of each size, then the main job."""
    every = "simrl.experiments.bench:EveryCompletion"
    policies = {"verl": "verl", "verl, each completion a trigger": every, "rlhfless": "rlhfless"}
    jobs = [Job(f"main job, {name}", f"simrl run --policy {p} {sizes.job} --json") for name, p in policies.items()]
    return [*(step_job(*size) for size in sizes.shared), *jobs]


def growth(sizes: Sizes) -> str:
    """Ever larger jobs, one of them on ever more engines, and exponents."""
    alone = measure([engine_job(*size) for size in sizes.growing], 1)
    whole = measure([step_job(*size) for size in sizes.growing], sizes.repetitions)
    spread = measure([step_job(sizes.growing[-2][0], engines) for _, engines in sizes.growing], sizes.repetitions)
    texts = [exponents([point for row in rows for point in row.points]) for rows in (alone, whole)]
    rows = table(HEADER, [row.cells for row in (*alone, *whole, *spread)])
    return f"{rows}\n\n- Engine alone, CPU time: {texts[0]}\n- Whole simulator, wall time: {texts[1]}"


def exponents(points: Sequence[tuple[int, float]]) -> str:
    """The k of time ~ n^k beside n log n's own, over all sizes and over the last two."""
    from scipy.special import stdtrit
    from scipy.stats import linregress

    texts, sizes = [], sorted({n for n, _ in points})
    for first in (sizes[0], sizes[-2]):
        n, seconds = zip(*(point for point in points if point[0] >= first), strict=True)
        fit = linregress([math.log(x) for x in n], [math.log(s) for s in seconds])
        bound = linregress([math.log(x) for x in n], [math.log(x * math.log(x)) for x in n]).slope
        # Two points leave nothing to judge the noise by.
        half = float(stdtrit(len(n) - 2, 0.975) * fit.stderr) if len(n) > 2 else math.inf
        verdict = "below it" if fit.slope + half < bound else "above it" if fit.slope - half > bound else "within noise"
        texts.append(f"from {first:,} requests on n^{fit.slope:.2f} ± {half:.2f} (n log n: n^{bound:.2f}; {verdict})")
    return "; ".join(texts) + "."


def peer_section(shared: Sequence[tuple[int, int]], repetitions: int, python: Path) -> str:
    """Both simulators on the same work, or why that is missing."""
    if not python.exists():
        return "Not measured: sched-sim is not installed (`make bench` does it)."
    return table(PEER_HEADER, [compare(n, e, repetitions, python) for n, e in shared])


def machine() -> str:
    """Processor, cores, load, Python and system; no names."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    python = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    return f"{cpu}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, {python}"


def commit() -> str:
    """The checkout's, and whether files differ from it."""
    texts = []
    for arguments in ("rev-parse --short HEAD", "status --porcelain"):
        try:
            done = subprocess.run(["git", *arguments.split()], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        texts.append(done.stdout.strip())
    return texts[0] + (" with changes" if texts[1] else "")


PAGE = """# Performance

Written by `{command}` on {date}, at commit {commit}. Machine: {machine}.

Figures are medians: of {repetitions} processes each, by turns; for the engine alone of 5 repetitions in one process,
after one that fills its tables. Lengths are GSM8K's in groups of 4, all at t = 0. No garbage collection, as in
`simrl run`. Peak memory is the whole process's.

## Engine alone

`plan` and `advance` in a loop, engines and requests made anew: Qwen2.5-7B on two L40S, at most 128 running, prefix
caching, more KV than needed, an equal share for each engine. `responses/CPU s` counts its thread's own time.

{engine}

## Whole simulator

Policy, triggers, cluster, learner, recording and frames: `wall_s` of the run's summary, without imports. One step
has an engine on each node, of 8 GPUs (a roofline: no table is shipped for so many). The main job is 45 steps of
1024 x 4 responses if its command has no `--steps`.

{whole}

## Growth

First the work grows with the cluster, then the same work is spread over ever more engines. Time ~ n^k is fitted by
least squares on logarithms (95 % interval). Fixed costs lower k over all sizes; so the last two stand beside it.

{growth}

## Beside sched-sim 0.2.1

[sched-sim](https://pypi.org/project/sched-sim/) simulates one engine, so it runs once for each. Both read the same
table in one process, by turns. Its FCFS scheduler is used, because the one for chunked prefill does not apply
`max_batch_size`; FCFS has no token budget, so simrl gets none here. No prefix caching; all prefills attend to 64
tokens.

{peer}

- Speed: sched-sim visits every running request in every iteration; simrl jumps from one change of the batch to the
  next.
- Makespan: in sched-sim a prefill yields no token, so a response takes an iteration more than in vLLM and simrl,
  and a decode does not attend to the token that it feeds in. `aligned` is the difference with one token less a
  response and one more of context: where only rounding is left, nothing else differs.

## Quoted

Not this command's, nor the same work: Vidur, measured on 2026-11-22 on a 2-core machine: 285-795 requests/s, and
108 at 160 replicas (4096 requests: 38 s).
"""


def page(sizes: Sizes, python: Path | None, command: str) -> str:
    """Measure everything; *python* has sched-sim, None leaves it out."""
    head = {"command": command, "date": date.today(), "commit": commit(), "machine": machine()}
    return PAGE.format(
        **head,
        repetitions=sizes.repetitions,
        engine=table(HEADER, [row.cells for row in measure([engine_job(*size) for size in sizes.shared], 1)]),
        whole=table(HEADER, [row.cells for row in measure(whole_jobs(sizes), sizes.repetitions)]),
        growth=growth(sizes),
        peer=peer_section(sizes.shared, sizes.repetitions, python) if python else "Not measured: `--quick`.",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or print one measurement."""
    parser = argparse.ArgumentParser(prog="python -m simrl.experiments.bench", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("page", "engine", "sched-sim", "peer"), default="page")
    parser.add_argument("--quick", action="store_true", help="small sizes, once, without sched-sim")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--sched-sim", type=Path, default=SCHED_SIM, help="a Python that has sched-sim 0.2.1")
    for name, default in (("requests", 1024), ("engines", 1), ("repetitions", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(arguments)
    command, repetitions = "python -m simrl.experiments.bench", given.repetitions or Sizes().repetitions
    if given.what == "engine":
        print(json.dumps(measure_engine(given.requests, given.engines, given.repetitions or 5)))
    elif given.what == "peer":
        print(json.dumps(measure_peer(json.load(sys.stdin), given.engines, repetitions)))
    elif given.what == "sched-sim":
        print(peer_section([(given.requests, given.engines)], repetitions, given.sched_sim))
    elif given.quick:
        given.output.write_text(page(QUICK, None, f"{command} --quick"), encoding="utf-8")
    else:
        command += f" --repetitions {repetitions}" if given.repetitions else ""
        text = page(dataclasses.replace(Sizes(), repetitions=repetitions), given.sched_sim, command)
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
