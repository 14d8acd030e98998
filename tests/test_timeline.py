"""Traces for Perfetto: well-formed, and the same GPU-seconds, times and counts as the frames that they come from."""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from simrl.cli import main
from simrl.experiments.config import load_config
from simrl.experiments.run import RunDirectoryError, run
from simrl.experiments.timeline import FIRST_NODE, OFF_GPU, events, read_frames, write_timeline
from simrl.traces.records import DECISION_COLUMNS, PHASE_COLUMNS, SAMPLE_COLUMNS, WORKER_COLUMNS, Frames

REAL = Path(__file__).parent / "data" / "real_run"
SMALL = (
    "job.model=qwen2.5-0.5b", "job.prompts_per_step=32", "job.dataset_prompts=32", "job.max_response_tokens=256",
    "engine.tensor_parallel=2", "engine.max_num_seqs=32",
)  # fmt: skip
KEYS = {
    "X": {"pid", "tid", "ts", "dur", "name", "cat", "args"},
    "C": {"pid", "name", "ts", "args"},
    "M": {"pid", "name", "args"},
    "i": {"pid", "tid", "ts", "name", "s"},
    "s": {"pid", "tid", "ts", "name", "cat", "id"},
    "f": {"pid", "tid", "ts", "name", "cat", "id", "bp"},
}
STATES = ("idle", "cold")
Event = Mapping[str, Any]


@pytest.fixture(scope="module", params=["verl", "rlhfuse", "rlhfless", "faults", "real"])
def frames(request: pytest.FixtureRequest) -> Frames:
    if request.param == "real":
        return read_frames(REAL)
    policy = "rlhfless" if request.param == "faults" else request.param
    faults = ('faults.at=[{time_s=222.0, kind="node", node=1}]',) if request.param == "faults" else ()
    return run(load_config(policy=policy, nodes=2, steps=2, sets=(*SMALL, *faults))).frames


def decoded(frames: Frames) -> list[Event]:
    return [json.loads(event) for event in events(frames)]


def spans_of_gpus(found: Sequence[Event]) -> list[Event]:
    return [e for e in found if e["ph"] == "X" and e["pid"] >= FIRST_NODE and e["tid"] < OFF_GPU]


def check_form(found: Sequence[Event]) -> None:
    """Keys, names of tracks, times that never go back, and spans of a track that do not overlap."""
    named = {(e["pid"], e.get("tid")) for e in found if e["ph"] == "M" and e["name"] != "process_sort_index"}
    now: dict[tuple[Any, ...], float] = defaultdict(float)
    free: dict[tuple[Any, ...], float] = defaultdict(float)
    for event in found:
        assert KEYS[event["ph"]] <= set(event)
        assert (event["pid"], None) in named
        if event["ph"] in "MsfiC":
            track: tuple[Any, ...] = (event["ph"], event["pid"], event["name"], event.get("id"))
        else:
            track = (event["pid"], event["tid"])
            assert track in named
            assert event["dur"] >= 0
            assert event["ts"] >= free[track] - 1e-4  # us; ts + dur rounds
            free[track] = event["ts"] + event["dur"]
        assert event.get("ts", 0.0) >= now[track]
        now[track] = event.get("ts", 0.0)


def test_a_trace_is_well_formed(frames: Frames) -> None:
    found = decoded(frames)
    check_form(found)
    spans = [e for e in found if e["ph"] == "X"]
    inside = defaultdict(list)
    for span in spans:
        inside[span["pid"], span["tid"]].append((span["ts"], span["ts"] + span["dur"]))
    flows = [e for e in found if e["ph"] in "sf"]
    for flow in flows:
        assert any(a <= flow["ts"] <= b for a, b in inside[flow["pid"], flow["tid"]]), flow
    # Each migration goes from a decision to a function that exists later; ids pair them.
    pairs = Counter(e["id"] for e in flows)
    assert len(pairs) == (frames.decisions["decision"] == "Migrate").sum()
    assert set(pairs.values()) <= {2}


def test_spans_add_up_to_the_gpu_seconds_of_the_frames(frames: Frames) -> None:
    workers = frames.workers[frames.workers["state"].isin(["busy", "idle", "cold"])]
    gpu_s = workers["gpus"] * (workers["end_s"] - workers["start_s"])
    spans = spans_of_gpus(decoded(frames))
    seconds: dict[str, float] = defaultdict(float)
    for span in spans:
        seconds["state", span["name"] if span["name"] in STATES else "busy"] += span["dur"] / 1e6
        seconds["stage", span["cat"]] += span["dur"] / 1e6
        seconds["function", span["args"]["function"]] += span["dur"] / 1e6
        seconds["node", span["pid"] - FIRST_NODE] += span["dur"] / 1e6
    wanted = {("state", key): value for key, value in gpu_s.groupby(workers["state"]).sum().items()}
    stages = workers["stage"].fillna("none").replace("", "none")
    wanted |= {("stage", key): value for key, value in gpu_s.groupby(stages).sum().items()}
    wanted |= {("function", key): value for key, value in gpu_s.groupby(workers["function"]).sum().items()}
    wanted |= {("node", key): value for key, value in gpu_s.groupby(workers["node"]).sum().items()}
    assert seconds == pytest.approx(wanted, abs=1e-6)


def test_stages_last_as_long_as_in_the_frames(frames: Frames) -> None:
    found = [e for e in decoded(frames) if e["ph"] == "X" and e["cat"] != "none" and e["pid"] < FIRST_NODE]
    spans = Counter((e["cat"], e["args"]["step"], round(e["dur"])) for e in found if e["cat"] != "decision")
    phases = frames.phases
    rows = zip(phases["stage"], phases["step"], (phases["end_s"] - phases["start_s"]) * 1e6, strict=True)
    assert spans == Counter((stage, step, round(us)) for stage, step, us in rows)


def test_every_decision_is_told_once(frames: Frames) -> None:
    told = Counter[str]()
    for event in decoded(frames):
        if event["ph"] == "X" and event["cat"] == "decision":
            told.update({kind: len(each) for kind, each in event["args"].items()})
    assert told == Counter(frames.decisions["decision"])


def test_counters_equal_a_recount(frames: Frames) -> None:
    """At each moment: intervals with start <= moment < end, counted anew."""
    counters: dict[tuple[int, str], list[tuple[float, int]]] = defaultdict(list)
    for event in decoded(frames):
        if event["ph"] == "C":
            counters[event["pid"], event["name"]].append((event["ts"], event["args"]["value"]))
    workers, samples = frames.workers, frames.samples
    busy = workers[workers["state"] == "busy"]
    steps = frames.phases[frames.phases["stage"] == "step"].set_index("step")["start_s"]
    stayed = samples[samples["migrations"] == 0]
    wanted = {
        (1, "GPUs busy"): (busy["start_s"], busy["end_s"], busy["gpus"]),
        (1, "responses not yet assigned"): (samples["step"].map(steps), samples["assigned_s"], 1),
        (1, "responses assigned, unfinished"): (samples["assigned_s"], samples["finished_s"], 1),
        (1, "responses finished, unprepared"): (samples["finished_s"], samples["prepared_s"], 1),
        **{(2, name): (own["assigned_s"], own["finished_s"], 1) for name, own in stayed.groupby("function")},
    }
    for key, (start_s, end_s, weight) in wanted.items():
        assert counters[key], key
        assert counters[key][-1][1] == 0
        start_us, end_us = (start_s * 1e6).round(3), (end_s * 1e6).round(3)
        for at_us, value in counters[key]:
            assert (((start_us <= at_us) & (at_us < end_us)) * weight).sum() == value, (key, at_us)


# --- by hand ---


def by_hand(workers: Sequence[tuple[object, ...]], phases: Sequence[tuple[object, ...]] = ()) -> Frames:
    decisions = [(1.5, 0, "Migrate", "b", 3, "with_kv=True"), (1.5, 0, "Park", "a", 0, "")]
    return Frames(
        samples=pd.DataFrame({name: pd.Series(dtype=float) for name in SAMPLE_COLUMNS}),
        phases=pd.DataFrame(list(phases), columns=list(PHASE_COLUMNS)),
        workers=pd.DataFrame(workers, columns=list(WORKER_COLUMNS)),
        decisions=pd.DataFrame(decisions, columns=list(DECISION_COLUMNS)),
    )


HAND = (
    ("a", 0, 2, "0,1", "busy", "decode", "generation", 0.0, 2.0),
    ("c", 0, 1, "", "parked", None, None, 3.0, 4.0),
    ("a", 0, 2, "", "parked", None, None, 2.0, 5.0),
    ("b", 1, 1, "3", "idle", "decode", "generation", 1.0, 1.5),
    ("b", 1, 1, "3", "cold", None, None, 1.75, 2.5),
    ("b", 1, 1, "", "lost", None, None, 2.5, 2.5),
)  # fmt: skip


def test_a_trace_by_hand() -> None:
    found = decoded(by_hand(HAND))
    check_form(found)
    spans = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in found if e["ph"] == "X"]
    assert spans == [
        (3, 0, "generation", 0.0, 2e6),
        (3, 1, "generation", 0.0, 2e6),
        (4, 3, "idle", 1e6, 0.5e6),
        (4, 3, "cold", 1.75e6, 0.75e6),
        (3, OFF_GPU, "parked", 2e6, 3e6),
        (3, OFF_GPU + 1, "parked", 3e6, 1e6),  # beside the other one
        (1, 0, "Migrate + Park", 1.5e6, 1.0),
    ]
    assert [(e["pid"], e["name"], e["ts"]) for e in found if e["ph"] == "i"] == [(4, "b lost", 2.5e6)]
    # The target has no GPU at the decision, and one a quarter of a second later.
    assert [(e["pid"], e["tid"], e["ts"]) for e in found if e["ph"] in "sf"] == [(1, 0, 1.5e6), (4, 3, 1.75e6)]
    (call,) = (e["args"] for e in found if e["ph"] == "X" and e["cat"] == "decision")
    assert call == {"Migrate": ["b 3 responses with_kv=True"], "Park": ["a"]}


def test_steps_that_overlap_lie_side_by_side() -> None:
    phases = [(0, 0, "step", 0.0, 3.0), (1, 0, "step", 2.0, 5.0), (2, 0, "step", 3.0, 6.0)]
    found = decoded(by_hand(HAND, phases))
    check_form(found)
    lanes = [(e["name"], e["tid"]) for e in found if e["ph"] == "X" and e["cat"] == "step"]
    assert lanes == [("step 0", 1), ("step 1", 2), ("step 2", 1)]


def test_gpus_that_are_held_must_be_named() -> None:
    row = ("a", 0, 2, "0", "busy", "decode", "generation", 0.0, 2.0)
    with pytest.raises(RunDirectoryError, match=r"'a' holds 2 GPUs from 0\.0 s, gpu_ids='0'"):
        decoded(by_hand([row]))


def test_long_counters_are_thinned_to_exact_values() -> None:
    times = [(i / 8, i / 8 + i**3 % 17 / 8) for i in range(10_000)]
    rows = [("a", 0, 1, "0", "busy", "decode", "generation", start_s, end_s) for start_s, end_s in times]
    values = [e for e in decoded(by_hand(rows)) if e["ph"] == "C" and e["name"] == "GPUs busy"]
    assert 2_000 < len(values) <= 5_000
    assert values[-1]["args"]["value"] == 0
    for event in values[::10]:
        at_s = event["ts"] / 1e6
        near = times[max(0, int(at_s * 8) - 20) : int(at_s * 8) + 2]
        assert event["args"]["value"] == sum(a <= at_s < b for a, b in near)


def test_names_are_escaped() -> None:
    name = 'a"</script>\\\n'
    found = decoded(by_hand([(name, 0, 1, "0", "busy", "decode", "generation", 0.0, 1.0)]))
    assert [e["args"]["function"] for e in found if e["ph"] == "X" and e["pid"] == FIRST_NODE] == [name]


# --- the command ---


def test_the_command_writes_plain_and_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", str(REAL), "-o", str(tmp_path / "t.json")]) == 0
    assert "perfetto" in capsys.readouterr().out
    write_timeline(read_frames(REAL), tmp_path / "t.json.gz")
    plain = (tmp_path / "t.json").read_bytes()
    packed = (tmp_path / "t.json.gz").read_bytes()
    assert gzip.decompress(packed) == plain
    assert packed[3:8] == bytes(5)  # no name and no time: the same run gives the same bytes
    trace = json.loads(plain)
    assert trace["traceEvents"] == decoded(read_frames(REAL))
    assert "KV use" in trace["otherData"]["left_out"]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(directory: Path, output: Path = tmp_path / "t.json") -> str:
        assert main(["timeline", str(directory), "-o", str(output)]) == 2
        assert not output.exists()
        assert not list(tmp_path.glob(".*"))
        return capsys.readouterr().err

    assert "has no samples.parquet" in told(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in REAL.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    workers = read_frames(REAL).workers
    for content, message in (
        (workers.drop(columns="gpu_ids"), "lacks the columns gpu_ids"),
        (workers.assign(start_s="soon"), "start_s holds no seconds"),
        (workers.assign(gpu_ids=""), "holds 1 GPUs"),
    ):
        content.to_parquet(broken / "workers.parquet")
        assert message in told(broken)
    (broken / "workers.parquet").write_bytes(b"PAR1")
    assert "cannot be read" in told(broken)
    assert "cannot be written" in told(REAL, tmp_path / "missing" / "t.json")


def test_an_unfinished_response_is_counted_nowhere() -> None:
    frames = read_frames(REAL)
    samples = frames.samples.assign(prepared_s=None)
    found = decoded(replace(frames, samples=samples))
    assert not any(e["name"] == "responses finished, unprepared" for e in found)
