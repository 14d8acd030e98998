"""A run as a Chrome / Perfetto trace: what each GPU did, stages, decisions, migrations, counts; docs/timeline.md."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from simrl.experiments.run import RunDirectoryError
from simrl.traces.records import DECISION_COLUMNS, PHASE_COLUMNS, SAMPLE_COLUMNS, WORKER_COLUMNS, Frames
from simrl.traces.summary import HOLDING, NO_STAGE, STAGES
from simrl.traces.trace import whole_file

if TYPE_CHECKING:
    import pandas as pd

CLUSTER, BY_FUNCTION, FIRST_NODE = 1, 2, 3
"""Processes of the trace: the whole cluster, counters of functions, and node n as FIRST_NODE + n."""
POLICY, FIRST_STAGE = 0, 1
"""Threads of CLUSTER: decisions, then the step and its stages; overlapping ones take further lanes."""
OFF_GPU = 1000
"""First thread of a node for functions that hold no GPU."""
LANES = 100
"""Room between the threads of two stages."""
CLUSTER_POINTS, FUNCTION_POINTS = 5_000, 50_000
"""At most so many values of each counter of the cluster, and of all counters of functions together."""
DECISION_NS = 1_000
"""Width of a policy call, so that a flow has something to start from: decisions take no time."""
LEFT_OUT = (
    "Not in a run's frames, so not here: batch, queue and KV use of an engine over time, and the functions that"
    " responses migrated from. Counters are thinned: each value is exact at its moment."
)
Nanoseconds = NDArray[np.int64]
COLUMNS = {
    "samples": SAMPLE_COLUMNS,
    "phases": PHASE_COLUMNS,
    "workers": WORKER_COLUMNS,
    "decisions": DECISION_COLUMNS,
}


def read_frames(directory: Path) -> Frames:
    """The frames of a run directory, simulated or real.

    Args:
        directory: Of `simrl run --output`, or a run's folder in one of `simrl validate --output`.

    Raises:
        RunDirectoryError: it is no run directory, or a file of it is broken; the message names the file.
    """
    return Frames(**{name: _read_frame(directory, name, columns) for name, columns in COLUMNS.items()})


def _read_frame(directory: Path, name: str, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd
    from pandas.api.types import is_numeric_dtype

    path = directory / f"{name}.parquet"
    if not path.is_file():
        raise RunDirectoryError(
            f"run {str(directory)!r} has no {path.name}: name a directory that simrl run --output wrote,"
            f" or a run's folder in one of simrl validate --output"
        )
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{str(path)!r} cannot be read: {error}") from error
    lacking = [column for column in columns if column not in frame]
    if lacking:
        raise RunDirectoryError(f"{str(path)!r} is not of a run: it lacks the columns {', '.join(lacking)}")
    texts = [column for column in columns if column.endswith("_s") and not is_numeric_dtype(frame[column])]
    if texts and not frame.empty:
        raise RunDirectoryError(f"{str(path)!r} is not of a run: {texts[0]} holds no seconds")
    return frame


def write_timeline(frames: Frames, path: Path) -> None:
    """Write a trace for ui.perfetto.dev or chrome://tracing; times in it are in microseconds.

    Args:
        frames: Of a run, simulated or real.
        path: File to write; gzipped if its name ends in .gz.

    Raises:
        RunDirectoryError: an interval that holds GPUs does not name as many.
        TraceError: the place cannot be written.
    """
    with whole_file(path) as hidden, hidden.open("wb") as raw:
        # No time stamp and no name in a gzip file's head: the same run gives the same bytes.
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else raw
        with io.TextIOWrapper(packed, encoding="utf-8") as file:
            _write(frames, file)


def _write(frames: Frames, file: TextIO) -> None:
    file.write('{"displayTimeUnit":"ms","otherData":' + json.dumps({"left_out": LEFT_OUT}) + ',"traceEvents":[\n')
    for before, event in zip(itertools.chain([""], itertools.repeat(",\n")), events(frames), strict=False):
        file.write(before + event)
    file.write("\n]}\n")


def events(frames: Frames) -> Iterator[str]:
    """Events of the trace as JSON objects; the times of a track never go back."""
    workers = frames.workers.sort_values("start_s", kind="stable")
    holds = workers["state"].isin(HOLDING)
    held = workers[holds]
    yield from _process(CLUSTER, "cluster")
    yield from _gpus(held)
    yield from _without_gpus(workers[~holds])
    yield from _phases(frames.phases)
    yield from _decisions(frames.decisions, held)
    yield from _cluster_counters(frames, held)
    yield from _function_counters(frames.samples)


# --- tracks ---


def _gpus(held: pd.DataFrame) -> Iterator[str]:
    """A span on each GPU that an interval holds, so that spans add up to GPU-seconds."""
    seen: set[tuple[int, int]] = set()
    names = ("function", "node", "gpus", "gpu_ids", "state", "role", "stage")
    for (function, node, gpus, gpu_ids, state, role, stage), start_ns, end_ns in _rows(held, names):
        threads = [int(gpu) for gpu in gpu_ids.split(",")] if gpu_ids else []
        if len(threads) != gpus:
            raise RunDirectoryError(
                f"workers.parquet: {function!r} holds {gpus} GPUs from {start_ns / 1e9} s, gpu_ids={gpu_ids!r}"
            )
        serves = stage if stage in STAGES else NO_STAGE
        details = {"function": function, "role": role} if isinstance(role, str) else {"function": function}
        name = serves if state == "busy" else state
        for thread in threads:
            yield _span(FIRST_NODE + node, thread, name, serves, start_ns, end_ns, details)
        seen.update((node, thread) for thread in threads)
    for node in sorted({node for node, _ in seen}):
        yield from _process(FIRST_NODE + node, f"node {node}")
    for node, thread in sorted(seen):
        yield _thread(FIRST_NODE + node, thread, f"GPU {thread}")


def _without_gpus(workers: pd.DataFrame) -> Iterator[str]:
    """Parked functions and lost nodes, side by side below the GPUs of their node; losses of functions as instants."""
    instant = workers["start_s"] == workers["end_s"]
    for (function, node, state), at_ns, _ in _rows(workers[instant], ("function", "node", "state")):
        where = CLUSTER if node != node or node is None else FIRST_NODE + int(node)
        name = json.dumps(f"{function or 'node'} {state}")
        yield f'{{"ph":"i","s":"p","pid":{where},"tid":{OFF_GPU},"ts":{_us(at_ns)},"name":{name}}}'
    lasting = workers[~instant]
    for node in sorted(lasting["node"].astype(int).unique().tolist()):
        rows, lanes = lasting[lasting["node"] == node], 0
        for lane, (function, state), start_ns, end_ns in _in_lanes(rows, ("function", "state")):
            lanes = max(lanes, lane + 1)
            details = {"function": function} if function else {}
            yield _span(FIRST_NODE + node, OFF_GPU + lane, state, NO_STAGE, start_ns, end_ns, details)
        for lane in range(lanes):
            yield _thread(FIRST_NODE + node, OFF_GPU + lane, f"without GPU {lane}")


def _phases(phases: pd.DataFrame) -> Iterator[str]:
    for index, stage in enumerate(("step", *STAGES)):
        rows = phases[phases["stage"] == stage].sort_values("start_s", kind="stable")
        used = set()
        for lane, (step, epoch), start_ns, end_ns in _in_lanes(rows, ("step", "epoch")):
            thread = FIRST_STAGE + LANES * index + lane
            if lane not in used:
                used.add(lane)
                yield _thread(CLUSTER, thread, stage if lane == 0 else f"{stage} {lane + 1}")
            name = f"step {step}" if stage == "step" else stage
            yield _span(CLUSTER, thread, name, stage, start_ns, end_ns, {"step": step, "epoch": epoch})


def _decisions(decisions: pd.DataFrame, held: pd.DataFrame) -> Iterator[str]:
    """A span a policy call that decided something, and a flow from it to each function that responses migrate to."""
    names = ("decision", "function", "responses", "detail")
    values = zip(_ns(decisions["time_s"]).tolist(), *(decisions[name].tolist() for name in names), strict=True)
    calls = [(at_ns, list(rows)) for at_ns, rows in itertools.groupby(values, key=lambda row: row[0])]
    if calls:
        yield _thread(CLUSTER, POLICY, "policy")
    targets = _intervals(held)
    flow = 0
    for index, (at_ns, rows) in enumerate(calls):
        details: dict[str, list[str]] = {}
        for _, decision, function, responses, detail in rows:
            count = f"{responses} responses" if responses else ""
            details.setdefault(decision, []).append(" ".join(filter(None, (function, count, detail))))
        next_ns = calls[index + 1][0] if index + 1 < len(calls) else at_ns + DECISION_NS
        end_ns = min(at_ns + DECISION_NS, next_ns)
        yield _span(CLUSTER, POLICY, " + ".join(details), "decision", at_ns, end_ns, details)
        for _, decision, function, _, _ in rows:
            if decision == "Migrate" and (arrival := _interval_at(targets, function, at_ns)):
                flow += 1
                node, thread, to_ns = arrival
                same = f'"cat":"migration","name":"Migrate","id":{flow}'
                yield f'{{"ph":"s",{same},"pid":{CLUSTER},"tid":{POLICY},"ts":{_us(at_ns)}}}'
                yield f'{{"ph":"f","bp":"e",{same},"pid":{FIRST_NODE + node},"tid":{thread},"ts":{_us(to_ns)}}}'


Intervals = Mapping[str, tuple[Nanoseconds, Nanoseconds, list[int], list[int]]]


def _intervals(held: pd.DataFrame) -> Intervals:
    """Starts, ends, nodes and first GPUs of each function's intervals."""
    first = held["gpu_ids"].str.split(",", n=1).str[0].astype(int) if len(held) else held["node"]
    return {
        str(function): (_ns(rows["start_s"]), _ns(rows["end_s"]), rows["node"].tolist(), first[rows.index].tolist())
        for function, rows in held.groupby("function")
    }


def _interval_at(intervals: Intervals, function: str, at_ns: int) -> tuple[int, int, int] | None:
    """Node, GPU and moment at which *function* holds GPUs, from *at_ns* on; None if it does not any more."""
    if function not in intervals:
        return None
    starts_ns, ends_ns, nodes, gpus = intervals[function]
    index = int(np.searchsorted(ends_ns, at_ns, side="right"))
    return None if index == len(nodes) else (nodes[index], gpus[index], max(at_ns, int(starts_ns[index])))


# --- counters ---


def _cluster_counters(frames: Frames, held: pd.DataFrame) -> Iterator[str]:
    for state in ("held", *HOLDING):
        rows = held if state == "held" else held[held["state"] == state]
        changes = _changes(_ns(rows["start_s"]), _ns(rows["end_s"]), rows["gpus"].to_numpy(dtype=np.int64))
        yield from _counter(CLUSTER, f"GPUs {state}", *changes, CLUSTER_POINTS)
    samples, steps = frames.samples, frames.phases[frames.phases["stage"] == "step"]
    offered_s = samples["step"].map(steps.set_index("step")["start_s"])
    spans = {
        "responses not yet assigned": (offered_s, samples["assigned_s"]),
        "responses assigned, unfinished": (samples["assigned_s"], samples["finished_s"]),
        "responses finished, unprepared": (samples["finished_s"], samples["prepared_s"]),
    }
    for name, (start_s, end_s) in spans.items():
        known = start_s.notna() & end_s.notna()
        changes = _changes(_ns(start_s[known]), _ns(end_s[known]))
        yield from _counter(CLUSTER, name, *changes, CLUSTER_POINTS)


def _function_counters(samples: pd.DataFrame) -> Iterator[str]:
    """Responses on each function; of a migrated one the frame knows the last function only, so it is left out."""
    stayed = samples[(samples["migrations"] == 0) & samples["finished_s"].notna()]
    functions = stayed.groupby("function")
    if len(functions):
        yield from _process(BY_FUNCTION, "responses assigned, unfinished, never migrated")
    for function, rows in functions:
        changes = _changes(_ns(rows["assigned_s"]), _ns(rows["finished_s"]))
        yield from _counter(BY_FUNCTION, str(function), *changes, FUNCTION_POINTS // len(functions))


def _changes(
    start_ns: Nanoseconds, end_ns: Nanoseconds, each: Nanoseconds | int = 1
) -> tuple[Nanoseconds, Nanoseconds]:
    """Moments at which the sum of *each* over intervals changes, and the sums from then on."""
    weight = np.broadcast_to(np.asarray(each, dtype=np.int64), start_ns.shape)
    moments, index = np.unique(np.concatenate([start_ns, end_ns]), return_inverse=True)
    sums = np.cumsum(np.bincount(index, np.concatenate([weight, -weight]), len(moments)))
    counts: Nanoseconds = np.rint(sums).astype(np.int64)
    changed = np.diff(counts, prepend=-1) != 0
    return moments[changed], counts[changed]


def _counter(pid: int, name: str, moments: Nanoseconds, counts: Nanoseconds, points: int) -> Iterator[str]:
    """Values of a counter: of the changes in each of *points* equal spans of time the last."""
    if len(moments) > points:
        span = (moments - moments[0]) * points // (moments[-1] - moments[0] + 1)
        last = np.diff(span, append=points) != 0
        moments, counts = moments[last], counts[last]
    head = f'{{"ph":"C","pid":{pid},"name":{json.dumps(name)},"ts":'
    for at_ns, count in zip(moments.tolist(), counts.tolist(), strict=True):
        yield f'{head}{_us(at_ns)},"args":{{"value":{count}}}}}'


# --- events ---


def _rows(frame: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], int, int]]:
    """The values of *names*, start and end of each interval."""
    values = zip(*(frame[name].tolist() for name in names), strict=True)
    yield from zip(values, _ns(frame["start_s"]).tolist(), _ns(frame["end_s"]).tolist(), strict=True)


def _in_lanes(frame: pd.DataFrame, names: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...], int, int]]:
    """`_rows` with a lane for each interval, the first in which none is open; *frame* is sorted by start."""
    free_ns: list[int] = []
    for values, start_ns, end_ns in _rows(frame, names):
        lane = next((lane for lane, free in enumerate(free_ns) if free <= start_ns), len(free_ns))
        free_ns[lane : lane + 1] = [end_ns]
        yield lane, values, start_ns, end_ns


def _ns(seconds: pd.Series[Any]) -> Nanoseconds:
    """Whole nanoseconds, as Perfetto keeps them: intervals that meet still meet."""
    nanoseconds: Nanoseconds = np.rint(seconds.to_numpy(dtype=float) * 1e9).astype(np.int64)
    return nanoseconds


def _us(nanoseconds: int) -> str:
    """Microseconds, the unit of the format, exactly."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"


def _span(
    pid: int, tid: int, name: str, category: str, start_ns: int, end_ns: int, details: Mapping[str, object]
) -> str:
    return (
        f'{{"ph":"X","pid":{pid},"tid":{tid},"ts":{_us(start_ns)},"dur":{_us(end_ns - start_ns)},'
        f'"name":{json.dumps(name)},"cat":"{category}","args":{json.dumps(details)}}}'
    )


def _process(pid: int, name: str) -> Iterator[str]:
    yield json.dumps({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
    yield json.dumps({"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}})


def _thread(pid: int, tid: int, name: str) -> str:
    return json.dumps({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}})
