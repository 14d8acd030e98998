"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from simrl.experiments.config import Config
    from simrl.experiments.explain import Explanation
    from simrl.experiments.from_verl import Listing

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Simulate RL post-training clusters and compare scheduling policies.",
    epilog="Example: simrl compare --policies verl,rlhfless --nodes 2 --seeds 3",
)
# typer carries its own click since 0.26 and imports it before: this is the base of usage errors in either.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number") from None


INTERRUPTED = 130  # as shells report a process that Ctrl-C ended

PolicyOption = Annotated[
    str | None, typer.Option(help="Installed name or package.module:Class; by default verl.", metavar="NAME")
]
NodesOption = Annotated[
    int | None, typer.Option(parser=_whole_number, help="cluster.nodes; by default the preset's.", metavar="N")
]
PresetOption = Annotated[str | None, typer.Option(help="See `simrl presets`.", metavar="NAME")]
ConfigOption = Annotated[str | None, typer.Option(help="TOML file over the preset.", metavar="FILE")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; repeatable.", metavar="A.B=V")]
StepsOption = Annotated[int | None, typer.Option(parser=_whole_number, help="job.steps.", metavar="N")]
SeedOption = Annotated[int | None, typer.Option(parser=_whole_number, help="Root of all random streams.", metavar="S")]
FromVerlOption = Annotated[
    Path | None,
    typer.Option(help="verl's config.yaml, overrides.yaml or launch script, over the preset.", metavar="FILE"),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory to write; must not exist or be empty.", metavar="DIR")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main(arguments: list[str] | None = None) -> int:
    """The console script: runs a command and returns the exit code.

    0, 1 (another process died), 2 (the user can mend it), 128 + the number of a signal that ended it: 130 after Ctrl-C.
    Any other exception is a bug, ours or a policy's, and keeps its traceback (exit code 1).
    """
    with _signals_as_interrupts() as received:
        try:
            code = app(arguments, standalone_mode=False, prog_name="simrl")
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            failure = _user_message(error)
            if failure is None:
                raise
            return _fail(*failure)
    if received:
        return _fail(f"ended by {signal.Signals(received[0]).name}", 128 + received[0])
    if code == INTERRUPTED:  # typer >= 0.26 returns it in place of raising Abort
        return _fail("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _signals_as_interrupts() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does: what it started is ended. The list gets what came."""
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
        before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fail(message: str, code: int) -> int:
    print("simrl:", " ".join(message.split()), file=sys.stderr)
    return code


def _user_message(error: Exception) -> tuple[str, int] | None:
    """What to tell the user about an error that is no bug, and the exit code."""
    if isinstance(error, UsageError):
        return str(error.format_message()), 2  # type: ignore[attr-defined]
    from simrl.experiments.config import ConfigError
    from simrl.experiments.run import RunDirectoryError
    from simrl.policies.check import PolicyCheckFailed
    from simrl.policies.contract import InvalidDecision, PolicyStalled
    from simrl.real_backend.learner_settings import LearnerLost
    from simrl.real_backend.ray_cluster import ClusterError, death, last_line
    from simrl.simulator.costs import DoesNotFit
    from simrl.traces.profile import ProfileError
    from simrl.traces.trace import TraceError

    theirs = (InvalidDecision, PolicyStalled, PolicyCheckFailed)
    mendable = (ClusterError, ConfigError, DoesNotFit, ProfileError, RunDirectoryError, TraceError, *theirs)
    if isinstance(error, mendable):
        return ": ".join([*getattr(error, "__notes__", ()), str(error)]), 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space to write {error.filename or 'files'}: {error.strerror}", 2
    profiler = sys.modules.get("simrl.real_backend.profiler")  # too much to import for this
    if isinstance(error, (TimeoutError, LearnerLost, *([profiler.ProfilingFailed] if profiler else []))):
        return last_line(error), 1
    died = str(error) if isinstance(error, BrokenExecutor) else death(error)
    return None if died is None else (died, 1)


@app.callback(invoke_without_command=True)
def _simrl(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import simrl

        typer.echo(f"simrl {simrl.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog="Example: simrl run --policy rlhfless --nodes 20 --set policy.lambda=0.8 -o first")
def run(
    policy: PolicyOption = None,
    nodes: NodesOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    from_verl: FromVerlOption = None,
    sets: SetOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate one policy and write a run directory."""
    from simrl.experiments import report
    from simrl.experiments.run import check_directory, write_run
    from simrl.experiments.run import run as simulate

    resolved, listing = _load_listed(
        from_verl, show=not as_json,
        policy=policy, nodes=nodes, preset=preset, config=config, sets=sets, steps=steps, seed=seed,
    )  # fmt: skip
    directory = output if output or as_json else _default_directory(resolved)
    if directory:
        check_directory(directory)
    with _no_collection(), _progress("steps", resolved.job.steps) as progress:
        result = simulate(resolved, progress=progress)
    if directory:
        write_run(result, directory)
        if listing:
            listing.write(directory)
    _warn(result.warnings)
    _print(json.dumps(result.summary, indent=2) if as_json else report.of_run(result, directory))


@app.command(epilog="Example: simrl compare --policies verl,rlhfuse,rlhfless --nodes 2 --seeds 5")
def compare(
    policies: Annotated[str, typer.Option(help="Names, separated by commas.", metavar="A,B,...")],
    seeds: Annotated[int, typer.Option(parser=_whole_number, help="Seeds: --seed, --seed + 1, ...", metavar="K")] = 1,
    baseline: Annotated[str | None, typer.Option(help="What the others are compared with.", metavar="NAME")] = None,
    robustness: Annotated[
        int | None,
        typer.Option(parser=_whole_number, help="Points at which to vary all that is assumed.", metavar="K"),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Where differences come from: by technique, stage and state.")
    ] = False,
    nodes: NodesOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    from_verl: FromVerlOption = None,
    sets: SetOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run several policies on the same work, and compare them pair by pair over seeds."""
    from simrl.experiments import report
    from simrl.experiments.compare import compare as compare_policies
    from simrl.experiments.compare import write_comparison
    from simrl.experiments.explain import of_explanations
    from simrl.experiments.run import check_directory
    from simrl.traces.trace import whole_file

    names = [name.strip() for name in policies.split(",") if name.strip()]
    everyone = [*names, *([baseline] if baseline and baseline not in names else [])]
    resolved, listing = _load_listed(
        from_verl, show=not as_json,
        preset=preset, config=config, sets=sets, nodes=nodes, steps=steps, seed=seed, policies=everyone or None,
    )  # fmt: skip
    if output:
        check_directory(output)
    with _progress("runs", (seeds + (robustness or 0)) * len(everyone)) as progress:
        comparison = compare_policies(resolved, names, seeds, baseline, robustness=robustness, progress=progress)
    explained = _explain(resolved, names, comparison.baseline, seeds) if explain else []
    why = {"explain": [explanation.to_dict() for explanation in explained]} if explain else {}
    if output:
        write_comparison(comparison, resolved, output)
        if explain:
            with whole_file(output / "explain.json") as file:
                file.write_text(json.dumps(why["explain"], indent=2) + "\n", encoding="utf-8")
        if listing:
            listing.write(output)
    _warn(comparison.warnings)
    if as_json:
        _print(json.dumps({**comparison.to_dict(), **why}, indent=2))
        return
    _print(report.of_comparison(comparison, output))
    if explained:
        _print(of_explanations(explained))


def _explain(config: Config, policies: list[str], baseline: str, seeds: int) -> list[Explanation]:
    from simrl.experiments.explain import explain

    with _progress("percent", 100) as progress:
        return explain(config, policies, baseline, seeds, progress=progress)


@app.command(epilog="Example: simrl reproduce rlhfless --quick -o reproduction")
def reproduce(
    paper: Annotated[str, typer.Argument(help="rlhfless.", metavar="PAPER")],
    quick: Annotated[bool, typer.Option("--quick", help="Few seeds, steps and points: some minutes.")] = False,
    output: OutputOption = None,
) -> None:
    """Run a paper's experiments, and write a page with its figures beside these."""
    from simrl.experiments.reproduce import FULL, QUICK, check_paper
    from simrl.experiments.reproduce import reproduce as reproduce_paper
    from simrl.experiments.run import check_directory

    check_paper(paper)
    directory = output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-reproduce-{paper}"
    check_directory(directory)
    command = f"simrl reproduce {paper}{' --quick' if quick else ''}"
    with _progress("percent", 100) as progress:
        reproduce_paper(paper, directory, QUICK if quick else FULL, command=command, progress=progress)
    typer.echo(f"written to {directory}")


@app.command(epilog="Example: simrl sweep --policy rlhfless --param policy.lambda=0:1:0.1 --seeds 5 -o sweep")
def sweep(
    params: Annotated[
        list[str] | None,
        typer.Option("--param", help="path=lo:hi:step (both ends), lo:hi, or a,b,...; repeatable.", metavar="P=V"),
    ] = None,
    design: Annotated[str, typer.Option(help="grid, list, random or sobol.", metavar="DESIGN")] = "grid",
    cells: Annotated[
        int | None, typer.Option(parser=_whole_number, help="To draw: random, sobol.", metavar="N")
    ] = None,
    seeds: Annotated[int, typer.Option(parser=_whole_number, help="Seeds: --seed, --seed + 1, ...", metavar="K")] = 1,
    engine: Annotated[str, typer.Option(help="local (processes) or ray.", metavar="ENGINE")] = "local",
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", parser=_whole_number, help="Runs at once; by default all cores.", metavar="J"),
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="Of a Ray cluster; by default this machine's own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --output.")] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Keep finished runs here, for other sweeps too.", metavar="FOLDER")
    ] = None,
    policy: PolicyOption = None,
    nodes: NodesOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a policy over a design of parameters, every cell on the same work, on all cores or on Ray."""
    from simrl.experiments import report
    from simrl.experiments.sweep import assignments, design_sweep, failed_run, run_sweep

    if resume and output is None:
        raise typer.BadParameter("--resume goes on in the directory of --output: name it")
    base = _load(preset=preset, config=config, sets=sets, policy=policy, nodes=nodes, steps=steps, seed=seed)
    planned = design_sweep(base, assignments(params or []), seeds=seeds, design=design, cells=cells)
    directory = output if output or as_json else _default_directory(base)
    with _progress("runs", planned.runs) as progress:
        result = run_sweep(
            planned, directory, resume=resume, cache=cache, engine=engine, jobs=jobs,
            ray_address=ray_address, progress=progress,
        )  # fmt: skip
    _warn(result.warnings)
    _print(json.dumps(result.to_dict(), indent=2) if as_json else report.of_sweep(result, directory))
    if result.failures:
        for failure in result.failures:
            print("simrl:", failed_run(failure), file=sys.stderr)
        raise typer.Exit(1)


@app.command(epilog="Example: simrl tune --policy rlhfless --trials 60 --objective pareto -o tuned")
def tune(
    trials: Annotated[
        int | None, typer.Option(parser=_whole_number, help="Settings to try; by default 60.", metavar="N")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="End the search after so long; alone: no limit of trials.", metavar="S")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="cost (GPU-s/step), time (s/step) or pareto (both).", metavar="OBJECTIVE")
    ] = "cost",
    seeds: Annotated[
        int, typer.Option(parser=_whole_number, help="Of every trial: --seed, --seed + 1, ...", metavar="K")
    ] = 3,
    params: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            help="path=lo:hi, lo:hi:step or a,b,... in place of the policy's own bounds, as policy.lambda=0.0:0.6,"
            " or for other keys, as engine.tensor_parallel=1,2,4; repeatable.",
            metavar="P=V",
        ),
    ] = None,
    trial_steps: Annotated[
        int | None, typer.Option(parser=_whole_number, help="Of the job, in a trial; by default 2 epochs.", metavar="N")
    ] = None,
    check_workloads: Annotated[
        str | None,
        typer.Option(help="To compare on as well: none, or as chat,gpqa; by default three others.", metavar="A,B,..."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", parser=_whole_number, help="Runs at once; by default all cores.", metavar="J"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --output.")] = False,
    policy: PolicyOption = None,
    nodes: NodesOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search a policy's parameters, and compare what is found with the defaults on fresh seeds and other workloads."""
    from simrl.experiments.sweep import assignments
    from simrl.experiments.tune import tune as tune_policy
    from simrl.experiments.tune_report import of_tuning

    if resume and output is None:
        raise typer.BadParameter("--resume goes on in the directory of --output: name it")
    base = _load(preset=preset, config=config, sets=sets, policy=policy, nodes=nodes, steps=steps, seed=seed)
    directory = output if output or as_json else _default_directory(base, "tune-")
    with _progress("percent", 100) as progress:
        found = tune_policy(
            base, assignments(params or []), output=directory, resume=resume, jobs=jobs, progress=progress,
            objective=objective, trials=trials, seconds=seconds, seeds=seeds, trial_steps=trial_steps,
            check_workloads=check_workloads,
        )  # fmt: skip
    _warn(found.notes)
    _print(json.dumps(found.to_dict(), indent=2) if as_json else of_tuning(found, directory))


@app.command(epilog="Example: simrl replay run.parquet --policy verl --policy rlhfless")
def replay(
    trace: Annotated[Path, typer.Argument(help="Of `simrl trace import`.", metavar="T.parquet")],
    policies: Annotated[
        list[str] | None, typer.Option("--policy", help="Repeatable: the first is the baseline.", metavar="NAME")
    ] = None,
    nodes: NodesOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    steps: Annotated[int | None, typer.Option(parser=_whole_number, help="The first N only.", metavar="N")] = None,
    seed: SeedOption = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate policies on the lengths of a trace."""
    from simrl.experiments.replay import load_replay
    from simrl.experiments.run import check_directory

    loaded = load_replay(
        trace, policies or (), preset=preset, config=config, sets=sets or (), nodes=nodes, steps=steps, seed=seed
    )
    first, single = loaded.configs[0], len(loaded.configs) == 1
    directory = output if output or as_json or not single else _default_directory(first)
    if directory:
        check_directory(directory)
    with _no_collection(), _progress("steps", first.job.steps * len(loaded.configs)) as progress:
        replayed = loaded.run(progress)
    if directory:
        replayed.write(directory)
    _warn(replayed.warnings)
    _print(json.dumps(replayed.to_dict(), indent=2) if as_json else replayed.table(directory))


@app.command(epilog="Example: simrl validate --policy verl --policy rlhfless -o validation")
def validate(
    policies: Annotated[
        list[str] | None, typer.Option("--policy", help="Repeatable; by default the three that ship.", metavar="NAME")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.", metavar="DEVICE")] = "cpu",
    clock: Annotated[
        str | None, typer.Option(help="virtual or wall; by default virtual on CPUs, wall on GPUs.", metavar="CLOCK")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Of `simrl profile`; measured now without.")] = None,
    model: Annotated[str, typer.Option(help="Folder in Hugging Face's format, or tiny.", metavar="MODEL")] = "tiny",
    gpus: Annotated[int, typer.Option(parser=_whole_number, help="GPUs (or logical cores) a node.", metavar="N")] = 8,
    repeats: Annotated[int, typer.Option(parser=_whole_number, help="Real runs of each policy.", metavar="N")] = 2,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; by default this machine's own.")] = None,
    folder: Annotated[Path | None, typer.Option(help="That all nodes of the cluster see.", metavar="FOLDER")] = None,
    interface: Annotated[str | None, typer.Option(help="Between ranks on a cluster.", metavar="NAME")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    output: OutputOption = None,
    records: Annotated[
        Path | None, typer.Option(help="Published stage times to predict instead.", metavar="FILE.csv")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="A run's steps to predict instead, from its first tenth.", metavar="T.parquet")
    ] = None,
    preset: PresetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run policies on real engines and simulated, and print how far the simulator is off; or predict records, a run."""
    if records is not None and trace is not None:
        raise typer.BadParameter("--records and --trace exclude each other")
    if preset is not None and trace is None:
        raise typer.BadParameter("--preset goes with --trace only; real runs have settings of their own")
    if records is not None:
        _validate_records(records, as_json=as_json)
        return
    if trace is not None:
        _validate_trace(trace, _load(preset=preset, config=config, sets=sets, seed=seed), as_json=as_json)
        return
    from simrl.experiments import report
    from simrl.experiments.run import check_directory
    from simrl.experiments.validate import run_validation, write_validation

    if output:
        check_directory(output)
    validation = run_validation(
        policies or ["verl", "rlhfuse", "rlhfless"], device=device, clock=clock, profile=profile, model=model,
        gpus=gpus, repeats=repeats, address=address, folder=folder, interface=interface, config_file=config,
        sets=sets or [], steps=steps, seed=seed,
        progress=lambda what: print("simrl:", what, file=sys.stderr) if sys.stderr.isatty() else None,
    )  # fmt: skip
    if output:
        write_validation(validation, output)
    _print(json.dumps(validation.to_json(), indent=2) if as_json else report.of_validation(validation, output))


def _validate_records(path: Path, *, as_json: bool) -> None:
    from simrl.experiments.records import of_records, validate_records

    found = validate_records(path)
    _print(json.dumps(found.to_json(), indent=2) if as_json else of_records(found))


def _validate_trace(path: Path, config: Config, *, as_json: bool) -> None:
    from simrl.experiments.trace_check import check_trace, of_check

    with _progress("percent", 100) as progress:
        found = check_trace(path, config, progress)
    _print(json.dumps(found, indent=2) if as_json else of_check(found))


@app.command(epilog="Example: simrl policies --check my_policy:RoundRobin")
def policies(
    check: Annotated[str | None, typer.Option(help="Hold this policy to the contract.", metavar="NAME")] = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the installed policies, with their sources; or check one."""
    from simrl.experiments import catalogue, report

    if check is not None:
        from simrl.experiments.check import check_each

        for passed in check_each(check, _load(policy=check, sets=sets)):
            typer.echo(f"ok    {passed}")
        return
    rows = catalogue.policies()
    _print(json.dumps(rows, indent=2) if as_json else report.of_list("policies", rows))


@app.command(epilog="Example: simrl presets --json")
def presets(as_json: JsonOption = False) -> None:
    """List the presets."""
    from simrl.experiments import catalogue, report

    rows = catalogue.presets()
    _print(json.dumps(rows, indent=2) if as_json else report.of_list("presets", rows))


@app.command(epilog="Example: simrl hardware --model qwen2.5-7b")
def hardware(
    model: Annotated[str | None, typer.Option(help="How this model runs on each GPU.", metavar="NAME")] = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List GPUs, node types, engine presets, prices and every parameter; or how a model runs on each GPU."""
    from simrl.experiments import catalogue, report
    from simrl.experiments.hardware_file import load_parameters

    parameters = load_parameters(_load(config=config, sets=sets).cluster)
    tables = catalogue.hardware_of_model(model, parameters) if model else catalogue.hardware(parameters)
    if as_json:
        _print(json.dumps(tables, indent=2))
    else:
        for title, rows in tables.items():
            if rows:
                _print(report.of_list(title, rows))


@app.command(epilog="Example: simrl profile --device cpu --model tiny -o profile.json")
def profile(
    device: Annotated[str, typer.Option(help="cpu or cuda.", metavar="DEVICE")],
    model: Annotated[str, typer.Option(help="A folder in Hugging Face's format, or tiny.", metavar="FOLDER")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", metavar="FILE")],
    quick: Annotated[bool, typer.Option("--quick", help="Few repetitions.")] = False,
    seed: Annotated[int, typer.Option(parser=_whole_number, help="Of workloads and order.", metavar="S")] = 0,
) -> None:
    """Measure what real engines and learners take on this machine."""
    from simrl.experiments import report
    from simrl.real_backend.profiler import check_profiling, profile_model

    check_profiling(device, model, output)
    with _progress("percent", 100) as progress:
        measured = profile_model(device, model, quick=quick, seed=seed, on_progress=progress)
    measured.write(output)
    _print(report.of_list("profile", measured.overview()))


@app.command(epilog="Example: simrl timeline runs/RUN -o timeline.json.gz")
def timeline(
    run_directory: Annotated[Path, typer.Argument(help="Of a simulated or a real run.", metavar="RUN")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; gzipped if *.gz.", metavar="T.json")],
) -> None:
    """Write a run as a Chrome / Perfetto trace: GPUs, stages, decisions, counts."""
    from simrl.experiments.timeline import read_frames, write_timeline
    from simrl.traces.trace import check_output

    check_output(output)
    write_timeline(read_frames(run_directory), output)
    typer.echo(f"{output}: open it in https://ui.perfetto.dev or chrome://tracing")


@app.command(epilog="Example: simrl report runs/A runs/B -o report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of run, compare or a real run.", metavar="RUN...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", metavar="REPORT.html")],
    baseline: Annotated[str | None, typer.Option(help="What the others are compared with.", metavar="NAME")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Simulate again with techniques switched, for differences by technique.")
    ] = False,
) -> None:
    """Write finished runs as one HTML page that needs no network: figures, timelines, parameters, commands."""
    from simrl.experiments.html_report import write_report

    with _progress("percent", 100) if explain else contextlib.nullcontext() as progress:
        write_report(runs, output, baseline=baseline, explain=explain, progress=progress)
    typer.echo(f"{output}: open it in a browser")


trace_app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(trace_app, name="trace", help="Import logs of real runs, and show what is in them.")


@trace_app.command("import", epilog="Example: simrl trace import train.log -o run.parquet")
def trace_import(
    files: Annotated[list[Path], typer.Argument(help="Logs of one format, or a simrl run.", metavar="FILE...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.", metavar="T.parquet")],
    log_format: Annotated[
        str, typer.Option("--format", help="See docs/traces.md; or a mapping's path.", metavar="F")
    ] = "auto",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder with a tokenizer.json, for logs of texts.", metavar="FOLDER")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad lines out, and count them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read logs of a run into a trace."""
    from simrl.experiments import report
    from simrl.experiments.trace_info import overview, provenance_warnings
    from simrl.traces.importers import import_trace

    inner = [file for path in files for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
    megabytes = sum(file.stat().st_size for file in inner) // 10**6
    with _progress("MB", megabytes) as bar:
        provenance = import_trace(
            files, output, log_format=log_format, imported=time.strftime("%Y-%m-%d"), tokenizer=tokenizer,
            skip_bad=skip_bad, progress=None if bar is None else lambda done: bar(done // 10**6),
        )  # fmt: skip
    _warn(provenance_warnings(provenance))
    row = overview(output, provenance)
    _print(json.dumps(row, indent=2) if as_json else report.of_list("imported", [row]))


@trace_app.command("info", epilog="Example: simrl trace info run.parquet -o run.png")
def trace_info(
    trace: Annotated[Path, typer.Argument(help="Of `simrl trace import`.", metavar="T.parquet")],
    picture: Annotated[Path | None, typer.Option("--output", "-o", help="Picture to draw.", metavar="PNG")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a trace says: steps, lengths, their spread and stability, stages, GPUs."""
    from simrl.experiments.trace_info import RESPONSE_COLUMNS, draw, info, of_info
    from simrl.traces.trace import check_output, read_trace

    if picture:
        check_output(picture)
    found = read_trace(trace, RESPONSE_COLUMNS)
    figures = info(found)
    if picture:
        draw(found, picture)
    _print(json.dumps(figures, indent=2) if as_json else of_info(figures))


@trace_app.command("fit", epilog="Example: simrl trace fit run.parquet -o mine.toml")
def trace_fit(
    source: Annotated[Path, typer.Argument(help="A trace, or a CSV of lengths.", metavar="T")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Workload file to write.", metavar="WORKLOAD.toml")],
    group: Annotated[list[str] | None, typer.Option(help="Rows of a CSV; repeatable.", metavar="COLUMN=VALUE")] = None,
    cap: Annotated[
        int | None, typer.Option(parser=_whole_number, help="Responses of so many tokens are truncated.", metavar="N")
    ] = None,
    between_share: Annotated[
        str | None, typer.Option(help="Of the variance, where prompts have one response.", metavar="V,LOW,HIGH")
    ] = None,
    template_tokens: Annotated[
        int, typer.Option(parser=_whole_number, help="To add to the prompts' lengths.", metavar="N")
    ] = 0,
    steps_per_epoch: Annotated[
        int | None, typer.Option(parser=_whole_number, help="Where prompts do not show it.", metavar="N")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="QQ plot to draw.", metavar="PNG")] = None,
    attribution: Annotated[str, typer.Option(help="Who published the lengths, and licence.", metavar="TEXT")] = "",
    as_json: JsonOption = False,
) -> None:
    """Fit a length model to measured lengths, and write the workload file."""
    from simrl.experiments.trace_fit import fit_workload, of_fit

    with _progress("forms", 16) as progress:
        figures = fit_workload(
            source, output, groups=group or [], cap=cap, between_share=between_share, template_tokens=template_tokens,
            steps_per_epoch=steps_per_epoch, picture=picture, attribution=attribution, on_fit=progress,
        )  # fmt: skip
    _print(json.dumps(figures, indent=2) if as_json else of_fit(figures))


def _load(**options: Any) -> Config:
    from simrl.experiments.config import load_config

    sets = options.pop("sets", None)
    return load_config(sets=sets or (), **options)


def _load_listed(from_verl: Path | None, *, show: bool, **options: Any) -> tuple[Config, Listing | None]:
    """The configuration and, with a verl configuration below it, what became of that."""
    if from_verl is None:
        return _load(**options), None
    from simrl.experiments.from_verl import load_verl_config

    options["sets"] = options["sets"] or ()
    config, listing = load_verl_config(from_verl, **options)
    if show:
        listing.show()
    return config, listing


def _default_directory(config: Config, what: str = "") -> Path:
    """runs/<time>-<what><policy>-s<seed>; an import string's colon is no good in file names."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{what}{config.policy.replace(':', '.')}-s{config.seed}"
    directory = Path("runs") / name
    again = 2
    while directory.exists():
        directory = Path("runs") / f"{name}-{again}"
        again += 1
    return directory


def _warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        print("simrl: warning:", warning, file=sys.stderr)


def _print(what: object) -> None:
    """Plain text as it is, tables by rich, which minds NO_COLOR and the terminal's width."""
    if isinstance(what, str):
        typer.echo(what)
        return
    from rich.console import Console

    Console().print(what)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No search for garbage meanwhile: a single run makes little of it, and is 15 % faster."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what is left lives as long as the command; looking through it takes 0.2 s
        gc.enable()


@contextlib.contextmanager
def _progress(unit: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr while the block runs; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich import progress as rich
    from rich.console import Console

    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    columns = (rich.TextColumn(unit), rich.BarColumn(), rich.MofNCompleteColumn(), *times)
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(unit, total=total)
        yield lambda done: bar.update(task, completed=done)
