"""Logs become traces: every number as the log has it, every bad line named or counted, nothing half written."""

from __future__ import annotations

import csv
import gzip
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simrl.cli import main
from simrl.traces.importers import detect, formats, import_trace
from simrl.traces.importers.mapping import load_mapping, parse_mapping, shipped_mappings
from simrl.traces.importers.reading import value_of
from simrl.traces.trace import COLUMNS, TraceError, read_trace, whole_file

REAL_LOG = Path(__file__).parent / "data" / "verl_qwen2-7b_gpg_math.log.gz"
PREFIX = "\x1b[36m(TaskRunner pid=17)\x1b[0m "
STEP_1 = "step:1 - timing_s/gen:4.000 - response_length/mean:100.500 - actor/loss:-0.250 - timing_s/step:9.000"
STEP_2 = "step:2 - timing_s/gen:5.000 - response_length/mean:110.500 - actor/loss:-0.125 - timing_s/step:8.000"


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def imported(tmp_path: Path, *files: Path, **options: object):
    output = tmp_path / "out.parquet"
    import_trace(list(files), output, imported="2026-01-02", **options)  # type: ignore[arg-type]
    return read_trace(output)


def of_lines(tmp_path: Path, *lines: str, name: str = "run.log", **options: object):
    return imported(tmp_path, write(tmp_path / name, *lines), **options)


def refused(tmp_path: Path, *lines: str, name: str = "run.log", **options: object) -> str:
    """The error of an import that must leave nothing behind."""
    (tmp_path / "out.parquet").unlink(missing_ok=True)
    with pytest.raises(TraceError) as caught:
        of_lines(tmp_path, *lines, name=name, **options)
    assert not (tmp_path / "out.parquet").exists()
    assert not list(tmp_path.glob(".*"))
    return str(caught.value)


def metrics(frame: pd.DataFrame, index: int = 0) -> dict[str, object]:
    return json.loads(frame["metrics"].iloc[index])


# --- verl's console ---


def plain_lines(path: Path) -> list[dict[str, float]]:
    """The log's numbers, read another way: one regular expression for `key:number` and nothing else."""
    found = []
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        bare = line[line.index("step:") :]
        found.append({key: float(text) for key, text in re.findall(r"(?:^| - )(.+?):(-?[\d.]+)(?= - |\s*$)", bare)})
    return found


def test_every_number_of_a_real_log_is_in_its_trace(tmp_path: Path) -> None:
    trace = imported(tmp_path, REAL_LOG)
    expected = plain_lines(REAL_LOG)
    assert len(expected) == len(trace.steps) == 211
    assert sum(map(len, expected)) > 10_000
    for index, numbers in enumerate(expected):
        assert metrics(trace.steps, index) == numbers
    assert trace.steps["step"].tolist() == list(range(211))
    assert trace.steps["line"].tolist() == list(range(1, 212))


def test_columns_of_a_real_log(tmp_path: Path) -> None:
    steps = imported(tmp_path, REAL_LOG).steps
    first = steps[steps["step"] == 1].iloc[0]
    assert (first["generation_s"], first["rollout_mean_s"], first["reshard_s"]) == (74.891, 59.778, 4.391)
    assert (first["old_log_prob_s"], first["update_actor_s"], first["step_s"]) == (35.029, 140.568, 252.485)
    assert first["truncated_share"] == 0.036
    assert steps["testing_s"].sum() == pytest.approx(sum(n.get("timing_s/testing", 0) for n in plain_lines(REAL_LOG)))
    # 2,094,523 tokens / (252.485 s x 1,036.956 tokens/s/GPU) = 8.0000; / (308.049 + 101.037) = 5,120.0: 1,024 x 5.
    assert set(steps["gpus"].dropna()) == {8}
    assert set(steps["responses"].dropna()) == {5120}
    assert len(steps["responses"].dropna()) == 210
    assert steps[steps["step"] == 0]["gpus"].isna().all()  # validation only


def test_derived_columns_are_marked(tmp_path: Path) -> None:
    assert set(imported(tmp_path, REAL_LOG).provenance.derived) == {"gpus", "responses"}
    assert of_lines(tmp_path, STEP_1).provenance.derived == {}


def test_counts_that_do_not_come_out_whole_are_not_claimed(tmp_path: Path) -> None:
    line = (
        "step:1 - prompt_length/mean:100.000 - response_length/mean:200.000 - perf/total_num_tokens:{} "
        "- perf/time_per_step:10.000 - perf/throughput:{}"
    )
    whole = of_lines(tmp_path, line.format("3000.000", "75.000")).steps.iloc[0]
    assert (whole["responses"], whole["gpus"]) == (10, 4)
    neither = of_lines(tmp_path, line.format("3100.000", "70.000")).steps.iloc[0]  # 10.33 responses, 4.43 GPUs
    assert math.isnan(neither["responses"])
    assert math.isnan(neither["gpus"])


@pytest.mark.parametrize(
    "prefix",
    [
        "", PREFIX, "[36m(TaskRunner pid=17)[0m ", "\x1b[2m\x1b[36m(main_task pid=64899)\x1b[0m ",
        "Training:   3%|| 3/100 [00:09<05:00,  3.0s/it]", "2026-01-02 10:00:00 - INFO - ", "\ufeff",
    ],
)  # fmt: skip
def test_prefixes_of_console_lines(prefix: str, tmp_path: Path) -> None:
    steps = of_lines(tmp_path, "Some noise: a:b - c", prefix + STEP_1, "loss step:x - global_step:3 - a:1").steps
    assert steps[["step", "generation_s", "step_s"]].to_numpy().tolist() == [[1, 4.0, 9.0]]


def test_sentences_are_no_step_lines(tmp_path: Path) -> None:
    """Logs print what the model says, and what engines are asked."""
    said = [
        "(pid=1) step:1 - compute the sum - then: halve it",
        "Received request r: prompt: 'x'",
        "step:2",
        "step:3 - so x is 5",
    ]
    steps = of_lines(tmp_path, *said, STEP_1, "step:9 - val/my set/acc:0.5 - val/b:1").steps
    assert steps["step"].tolist() == [1, 9]
    assert metrics(steps, 1) == {"step": 9, "val/my set/acc": 0.5, "val/b": 1}


def test_values_as_numpy_and_torch_print_them(tmp_path: Path) -> None:
    line = "step:3 - timing_s/gen:np.float64(2.5) - a:np.int64(7) - b:tensor(0.5, device='cuda:0') - c:True - d:None"
    line += " - e(1e-4):1e-05 - f:nan - g:inf - val/x:y/mean@1:0.25 - mode:auto - h:-inf"
    steps = of_lines(tmp_path, line).steps
    assert steps["generation_s"].iloc[0] == 2.5
    assert metrics(steps) == {
        "step": 3, "timing_s/gen": 2.5, "a": 7, "b": 0.5, "c": True, "d": None, "e(1e-4)": 1e-05, "f": "NaN",
        "g": "Infinity", "val/x:y/mean@1": 0.25, "mode": "auto", "h": "-Infinity",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["1_000", "0x10", "1e", "--1", "", "٣", "np.float64()", "a)"])
def test_what_is_no_number_stays_text(text: str) -> None:
    assert value_of(text) in (text, None)


def test_lines_of_a_step_are_put_together(tmp_path: Path) -> None:
    """As in logs of 2024: validation before training, both as step 0."""
    lines = ["step:0 - test_score/q:0.521", "step:0 - timing/gen:48.956 - timing/ref:12.070", "step:1 - timing/gen:4.5"]
    steps = of_lines(tmp_path, *lines).steps
    assert steps["generation_s"].tolist() == [48.956, 4.5]
    assert steps["line"].tolist() == [1, 3]
    assert metrics(steps) == {"step": 0, "test_score/q": 0.521, "timing/gen": 48.956, "timing/ref": 12.07}


def test_a_step_done_again_after_a_restart_is_another_attempt(tmp_path: Path) -> None:
    again = STEP_1.replace("gen:4.000", "gen:4.250")
    trace = of_lines(tmp_path, STEP_1, STEP_2, again, STEP_2)
    assert trace.steps[["step", "attempt", "generation_s"]].to_numpy().tolist() == [
        [1, 0, 4.0],
        [2, 0, 5.0],
        [1, 1, 4.25],
    ]
    assert "step 1 comes again" in trace.provenance.notes[0]


def test_late_lines_beyond_the_window_are_kept(tmp_path: Path) -> None:
    lines = [f"step:{n} - timing_s/gen:1.0" for n in range(200)]
    steps = of_lines(tmp_path, *lines, "step:0 - val/x:0.5").steps
    assert len(steps) == 201
    assert metrics(steps, 200) == {"step": 0, "val/x": 0.5}


def test_old_and_new_keys_of_one_step_must_agree(tmp_path: Path) -> None:
    error = refused(tmp_path, STEP_1, "step:2 - timing/gen:1.000 - timing_s/gen:2.000")
    assert "run.log:2: timing_s/gen=2.0 and timing/gen=1.0 disagree" in error
    assert of_lines(tmp_path, "step:1 - timing/gen:1.0", "step:2 - timing_s/gen:2.0").steps[
        "generation_s"
    ].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("step:2 - timing_s/gen:5.000 - response_length/me", "may be cut off"),
        ("step:2 - timing_s/gen:", "may be cut off"),
        ("step:2 - timing_s/gen:fast", "generation_s='fast' must be a number"),
        ("step:2 - timing_s/gen:nan", "generation_s=nan must be finite"),
        ("step:2 - timing_s/gen:-1.0", "generation_s=-1.0 must be >= 0"),
        ("step:-2 - timing_s/gen:1.0", "step=-2 must be >= 0"),
        ("step:2 - a:1 - a:2", "a occurs twice"),
        ("step:99999999999999999999 - a:1", "below 2**63"),
        ("step:2 - a:1\0", "NUL bytes"),
    ],
)
def test_bad_step_lines(line: str, reason: str, tmp_path: Path) -> None:
    error = refused(tmp_path, STEP_1, line, STEP_2)
    assert f"{tmp_path / 'run.log'}:2: " in error
    assert reason in error
    trace = of_lines(tmp_path, STEP_1, line, STEP_2, skip_bad=True)
    assert trace.steps["step"].tolist() == [1, 2]
    assert trace.provenance.skipped == 1
    assert trace.provenance.skipped_examples[0].startswith("run.log:2: ")


@pytest.mark.parametrize("cut", range(1, len(STEP_2)))
def test_a_last_line_cut_anywhere_is_noticed(cut: int, tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text(f"{STEP_1}\n{STEP_2[:-cut]}")
    if cut >= len(STEP_2) - len("step:2"):  # what is left is no step line with a key
        return
    with pytest.raises(TraceError, match=r"run.log:2: .*cut off"):
        imported(tmp_path, tmp_path / "run.log", log_format="verl-log")


def test_a_whole_last_line_needs_no_line_end(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text(f"{STEP_1}\n{STEP_2}")
    assert len(imported(tmp_path, tmp_path / "run.log").steps) == 2


# --- verl's dumps ---


def dump(path: Path, step: int, rows: list[tuple[str, str]], **more: object) -> Path:
    records = [{"input": i, "output": o, "gts": "g" * 99, "score": 0.5, "step": step, **more} for i, o in rows]
    return write(path, *(json.dumps(record) for record in records))


def test_rollout_dumps(tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    folder.mkdir()
    dump(folder / "10.jsonl", 10, [("one?", "x" * 40), ("one?", "y" * 5)])
    dump(folder / "2.jsonl", 2, [("one?", "z" * 8), ("two?", "ü" * 4)], acc=True)
    trace = imported(tmp_path, folder, log_format="auto")
    found = trace.responses
    assert found[["step", "sample", "prompt_tokens", "response_tokens"]].to_numpy().tolist() == [
        [2, 0, 1, 2], [2, 0, 1, 2], [10, 0, 1, 10], [10, 1, 1, 2]
    ]  # fmt: skip
    ids = found["prompt_id"].tolist()
    assert ids[0] == ids[2] == ids[3] != ids[1]
    assert metrics(found) == {"score": 0.5, "step": 2, "acc": True}  # no texts
    assert set(trace.provenance.estimated) == {"prompt_tokens", "response_tokens"}
    assert trace.provenance.files == ["10.jsonl", "2.jsonl"]


def test_rollouts_with_a_tokenizer(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "model").mkdir()
    words.save(str(tmp_path / "model" / "tokenizer.json"))
    log = dump(tmp_path / "1.jsonl", 1, [("a b", "a a b b a"), ("b", "\ud800")])
    trace = imported(tmp_path, log, tokenizer=tmp_path / "model")
    assert trace.responses[["prompt_tokens", "response_tokens"]].to_numpy().tolist() == [[2, 5], [1, 1]]
    assert trace.provenance.estimated == {}
    assert "no tokenizer.json" in refused(
        tmp_path, "{}", name="2.jsonl", log_format="verl-rollouts", tokenizer=tmp_path
    )


def test_a_dump_without_step_takes_it_from_its_name(tmp_path: Path) -> None:
    found = of_lines(tmp_path, '{"input": "a", "output": "b"}', name="7.jsonl").responses
    assert found["step"].tolist() == [7]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"input": "a", "outp', "not valid JSON, perhaps cut off"),
        ('{"input": "a", "output": 3}', "must be texts"),
        ('["a"]', "not a JSON object"),
        ('{"input": "a", "output": "b", "step": "x"}', "step='x' must be a number"),
        ('{"input": "a", "output": "b", "step": 1.5}', "step=1.5 must be a whole number"),
        ('{"input": "a", "output": "b", "step": -1}', "step=-1 must be >= 0"),
        ('{"input": "a", "output": "b", "step": NaN}', "step=nan must be finite"),
        ('{"input": "a", "output": "b", "step": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ("x" * 2**20, "not valid JSON"),
        ("\x80", "not UTF-8"),
        ('{"input": "a", "output": "b", "step": 1, "request_id": "r1"}', "request_id='r1' occurs twice"),
    ],
    ids=range(12),
)
def test_bad_records(line: str, reason: str, tmp_path: Path) -> None:
    good = '{"input": "a", "output": "b", "step": 1, "request_id": "r%d"}\n'
    log = tmp_path / "1.jsonl"
    log.write_bytes((good % 1).encode() + line.encode("latin-1") + b"\n" + (good % 2).encode())
    with pytest.raises(TraceError) as caught:
        imported(tmp_path, log)
    assert f"{log}:2: " in str(caught.value)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500
    trace = imported(tmp_path, log, skip_bad=True)
    assert trace.responses["line"].tolist() == [1, 3]
    assert trace.provenance.skipped == 1


def test_a_line_of_a_megabyte_is_read(tmp_path: Path) -> None:
    log = dump(tmp_path / "1.jsonl", 1, [("a", "b" * 2**20)])
    assert imported(tmp_path, log).responses["response_tokens"].tolist() == [2**18]


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simrl.traces.importers.reading.MAX_LINE_BYTES", 2**20)
    good = '{"input": "a", "output": "b", "step": 1}'
    error = refused(tmp_path, good, '{"input": "' + "a" * 2**22 + '"}', good, name="1.jsonl")
    assert ":2: the line is longer than 1 MiB" in error
    trace = imported(tmp_path, tmp_path / "1.jsonl", skip_bad=True)
    assert trace.responses["line"].tolist() == [1, 3]


# --- mappings ---

RECORDS = {
    "openrlhf": {
        "global_step": 4, "timing/generation": 1.5, "timing/make_experience": 2.5, "timing/ppo_train": 3.5,
        "timing/broadcast": 0.5, "timing/step_total": 8.5, "response_length": 120.25, "reward": -0.5,
    },
    "trl": {"step": 4, "step_time": 8.5, "completions/mean_length": 120.25, "completions/max_length": 200.5, "e": 0.1},
    "nemo-rl": {
        "step": 4, "timing/train/total_step_time": 8.5, "timing/train/generation": 1.5,
        "mean_gen_tokens_per_sample": 120.25, "timing/train/policy_training": 3.5, "x": 1,
    },
    "skyrl": {
        "step": 4, "timing/step": 8.5, "timing/generate": 1.5, "generate/avg_num_tokens": 120.25,
        "timing/train_critic_and_policy": 3.5, "timing/policy_train": 3.25,
    },
    "verl-log": {"step": 4, "data": {"timing_s/step": 8.5, "timing_s/gen": 1.5, "response_length/mean": 120.25}},
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("form", ["json lines", "json", "csv"])
def test_shipped_mappings(name: str, form: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    flat = {"step": record["step"], **record["data"]} if "data" in record else record  # type: ignore[dict-item]
    second = record | {key: 5 for key in ("step", "global_step") if key in record}
    path = tmp_path / {"json lines": "log.jsonl", "json": "state.json", "csv": "log.csv"}[form]
    if form == "json lines":
        write(path, json.dumps(record), "", json.dumps(second))
    elif form == "json":
        document = [record, second]
        path.write_text(json.dumps({"log_history": document} if name == "trl" else document, indent=1))
    else:
        with path.open("w", newline="") as file:
            rows = csv.DictWriter(file, list(flat))
            rows.writeheader()
            rows.writerows([flat, flat | {k: 5 for k in ("step", "global_step") if k in flat}])
    assert detect(path) == name
    steps = imported(tmp_path, path).steps
    assert steps["step"].tolist() == [4, 5]
    assert steps["response_tokens_mean"].tolist() == [120.25, 120.25]
    assert steps["step_s"].tolist() == [8.5, 8.5]
    if name != "trl":
        assert steps["generation_s"].tolist() == [1.5, 1.5]
    assert metrics(steps) == flat


def test_mappings_say_how_sure_they_are() -> None:
    assert shipped_mappings() == ["nemo-rl", "openrlhf", "skyrl", "trl", "verl"]
    for name in shipped_mappings():
        mapping = load_mapping(name)
        assert mapping.source
        assert name == "verl" or mapping.seen == "not yet seen on a real log"
    assert formats() == ["auto", "verl-log", "verl-rollouts", "vllm", "simrl", "nemo-rl", "openrlhf", "skyrl", "trl"]


def test_printed_dictionaries(tmp_path: Path) -> None:
    lines = [
        "config: {'lr': 1e-6, 'nested': {'a': [1, 2]}}",
        "\x1b[36m(pid=3)\x1b[0m Global step 7: {'timing/generation': 1.5, 'timing/ppo_train': np.float64(2.25), "
        "'n': 'a, b'}",
        "Global step 8: {'timing/generation': 1.75, 'timing/ppo_train': 2.5}",
    ]
    trace = of_lines(tmp_path, *lines)
    assert trace.provenance.importer == "openrlhf"
    assert trace.steps[["step", "generation_s", "learning_s"]].to_numpy().tolist() == [[7, 1.5, 2.25], [8, 1.75, 2.5]]
    assert metrics(trace.steps)["n"] == "a, b"
    cut = refused(tmp_path, *lines, "Global step 9: {'timing/generation': 1.75, 'timing/pp")
    assert ":4: " in cut
    assert "cut off" in cut


def test_trl_console_lines_are_numbered(tmp_path: Path) -> None:
    line = "{{'loss': 0.1, 'completions/mean_length': {}, 'completions/max_length': 9.0, 'epoch': 0.01}}"
    trace = of_lines(tmp_path, line.format(5.5), "{'train_runtime': 9.0}", line.format(6.5))
    assert trace.steps[["step", "response_tokens_mean"]].to_numpy().tolist() == [[1, 5.5], [2, 6.5]]
    assert trace.provenance.notes == ["records that name no step are numbered in their order"]


MAPPING = """
framework = "mine"
rows = "response"
[fields]
response_tokens = "out"
prompt_id = "q"
sample = "k"
step = "it"
end_s = {keys = "ms", factor = 0.001}
"""


def test_a_mapping_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MAPPING)
    name = str(tmp_path / "mine.toml")
    trace = of_lines(tmp_path, "it,q,k,out,ms,note", "1,a,0,5,1500,x", "1,a,1,7,,", name="log.csv", log_format=name)
    assert trace.responses[["response_tokens", "sample"]].to_numpy().tolist() == [[5, 0], [7, 1]]
    assert trace.responses["end_s"].tolist()[0] == 1.5
    assert metrics(trace.responses) == {"it": 1, "q": "a", "k": 0, "out": 5, "ms": 1500, "note": "x"}
    assert trace.provenance.importer == "mine.toml"
    console = of_lines(tmp_path, "noise a=1", "it=1 out=9 ms=20", name="a.log", log_format=name)
    assert console.responses["response_tokens"].tolist() == [9]


@pytest.mark.parametrize(
    ("lines", "place", "reason"),
    [
        (["1,a,0,5,1", "1,a,0,5,1"], 3, "sample 0 occurs twice"),
        (["1,a,0,5,1", "1,b,0,5"], 3, "4 cells, the header has 5"),
        (["1,a,0,-5,1"], 2, "response_tokens=-5 must be >= 0"),
        (["1,a,0,nan,1"], 2, "response_tokens=nan must be finite"),
        (["1,a,0,,1"], 2, "no response_tokens"),
        (["1,a,0,5,soon"], 2, "ms='soon' must be a number"),
    ],
)
def test_bad_csv(lines: list[str], place: int, reason: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(MAPPING)
    name = str(tmp_path / "mine.toml")
    error = refused(tmp_path, "it,q,k,out,ms", *lines, name="log.csv", log_format=name)
    assert f"log.csv:{place}: " in error
    assert reason in error
    trace = of_lines(tmp_path, "it,q,k,out,ms", "9,z,0,1,1", *lines, name="log.csv", log_format=name, skip_bad=True)
    assert trace.provenance.skipped == 1
    assert len(trace.responses) == len(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[fields", "not TOML"),
        ("x = 1\n[fields]\nstep = 's'", "unknown key x"),
        ("[fields]\nstepp = 's'", "unknown key fields.stepp; did you mean 'step'"),
        ("[fields]\nstep = 3", "must be a key or a list"),
        ("[fields]\nstep = {keys = 's', factor = 0}", "factor=0 must be a number > 0"),
        ("rows = 'both'\n[fields]\nstep = 's'", "rows='both' must be one of"),
        ("[fields]\nstep_s = 's'", "fields.step is missing"),
        ("rows = 'response'\n[fields]\nstep = 's'", "fields.response_tokens is missing"),
        ("", "[fields] must name"),
    ],
)
def test_bad_mappings(text: str, reason: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_mapping(text, "mine.toml")
    assert str(caught.value).startswith("mine.toml: ")
    assert reason in str(caught.value)


# --- vLLM ---


def test_vllm_server_log(tmp_path: Path) -> None:
    trace = of_lines(
        tmp_path,
        "INFO 11-22 10:00:00 [loggers.py:1] Engine 000: Avg prompt throughput: 1.0 tokens/s",
        "INFO 11-22 10:00:01 [logger.py:40] Received request cmpl-1-0: prompt: 'a, b', params: SamplingParams(n=1, "
        "max_tokens=3), prompt_token_ids: [5, 6, 7], lora_request: None.",
        "INFO 11-22 10:00:02 [logger.py:40] Received request cmpl-2-0: prompt: 'long', params: SamplingParams("
        "max_tokens=3), prompt_token_ids: [5], lora_request: None.",
        "INFO 11-22 10:00:05 [logger.py:50] Generated response cmpl-1-0 (streaming complete): output: 'x', "
        "output_token_ids: [1, 2, 3], finish_reason: length",
        "INFO 11-22 10:00:06 [logger.py:66] Received request cmpl-3-0: params: SamplingParams(max_tokens=9), "
        "lora_request: None.",
        "DEBUG 11-22 10:00:07 [logger.py:100] Generated response cmpl-3-0 details: output_token_ids: [1, 2]",
        "INFO 11-22 10:00:07 [logger.py:108] Generated response cmpl-3-0: output: 'yes it is', finish_reason: stop",
    )
    assert trace.provenance.importer == "vllm"
    found = trace.responses
    assert found["response_tokens"].tolist() == [3, 2]
    assert found["truncated"].tolist() == [True, False]
    assert (found["end_s"] - found["start_s"]).tolist() == [4.0, 1.0]
    assert found["prompt_tokens"].iloc[0] == 3
    assert metrics(found)["request_id"] == "cmpl-1-0"
    assert trace.provenance.estimated == {}
    assert trace.provenance.notes == ["run.log: 1 requests without a response are left out"]


def test_vllm_texts_are_estimated_and_said_to_be(tmp_path: Path) -> None:
    line = "INFO 11-22 10:00:07 Generated response r-{}: output: '12345678', finish_reason: stop"
    trace = of_lines(tmp_path, line.format(1), line.format(2))
    assert trace.responses["response_tokens"].tolist() == [2, 2]
    assert set(trace.provenance.estimated) == {"response_tokens"}
    assert "request_id='r-1' occurs twice" in refused(tmp_path, line.format(1), line.format(1))


def test_vllm_benchmark_result(tmp_path: Path) -> None:
    document = {
        "duration": 9.5, "input_lens": [3, 4, 5], "output_lens": [10, 0, 30], "ttfts": [0.5, 0.0, 0.25],
        "latencies": [2.0, 0.0, 4.0], "start_times": [100.0, 100.5, 101.0], "errors": ["", "timeout", ""],
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(document))
    with pytest.raises(TraceError, match="request 1 failed: 'timeout'"):
        imported(tmp_path, tmp_path / "result.json")
    found = imported(tmp_path, tmp_path / "result.json", skip_bad=True).responses
    columns = ["prompt_tokens", "response_tokens", "start_s", "first_token_s", "end_s"]
    assert found[columns].to_numpy().tolist() == [[3, 10, 100.0, 100.5, 102.0], [5, 30, 101.0, 101.25, 105.0]]


# --- simrl's own runs ---


def make_run(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    from simrl.traces.records import PHASE_COLUMNS, SAMPLE_COLUMNS

    folder.mkdir()
    rng = np.random.default_rng(0)
    count = 24
    samples = pd.DataFrame({name: np.arange(count) for name in SAMPLE_COLUMNS})
    samples["step"] = np.arange(count) // 12
    samples["prompt_id"], samples["sample"] = np.arange(count) // 4 % 3, np.arange(count) % 4
    samples["truncated"] = rng.random(count) < 0.5
    samples["function"] = [f"worker-{i % 2}" for i in range(count)]
    samples["assigned_s"] = rng.random(count)
    samples["finished_s"] = samples["assigned_s"] + rng.random(count)
    phases = [
        (step, 0, stage, 10.0 * step + start, 10.0 * step + end)
        for step in (0, 1)
        for stage, start, end in [("generation", 0.5, 6.0), ("learning", 6.0, 9.5), ("step", 0.0, 10.0)]
    ]
    frame = pd.DataFrame(phases, columns=list(PHASE_COLUMNS))
    samples.to_parquet(folder / "samples.parquet")
    frame.to_parquet(folder / "phases.parquet")
    (folder / "summary.json").write_text('{"gpus": 8}')
    return samples, frame


def test_a_run_of_simrl_comes_back_exactly(tmp_path: Path) -> None:
    samples, _ = make_run(tmp_path / "run")
    trace = imported(tmp_path, tmp_path / "run")
    found = trace.responses
    for name in ("step", "epoch", "sample", "prompt_tokens", "response_tokens", "truncated", "function"):
        assert found[name].tolist() == samples[name].tolist(), name
    assert found["prompt_id"].astype(int).tolist() == samples["prompt_id"].tolist()
    assert found["start_s"].tolist() == samples["assigned_s"].tolist()
    assert found["end_s"].tolist() == samples["finished_s"].tolist()
    rest = pd.DataFrame([json.loads(text) for text in found["metrics"]])
    for name in rest:
        assert rest[name].tolist() == samples[name].tolist(), name
    assert {*rest, "assigned_s", "finished_s"} | set(found) >= set(samples)
    assert trace.steps[["step", "gpus", "generation_s", "learning_s", "step_s"]].to_numpy().tolist() == [
        [0, 8, 5.5, 3.5, 10.0], [1, 8, 5.5, 3.5, 10.0]
    ]  # fmt: skip
    assert trace.provenance.importer == "simrl"


# --- files ---


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (bytes(range(256)) * 40, "of no known format"),
        (b"\x7fELF" + b"\0" * 4096, "a binary file"),
        (pickle.dumps({"step": 1, "timing_s/gen": 2.0}), "a binary file"),
        (gzip.compress(b"step:1 - a:1\n" * 9000)[:60], "cannot be read"),
        (b"hello world\n", "of no known format"),
        (b'{"a": 1}\n', "of no known format"),
        (b"{\n", "not valid JSON"),
        ("step:1 - timing_s/gen:1.0\n".encode("utf-16"), "a binary file"),
    ],
)
def test_files_of_no_use(content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "thing"
    log.write_bytes(content)
    for options in ([], ["--skip-bad"], ["--format", "verl-log"], ["--format", "verl-rollouts"], ["--format", "trl"]):
        assert main(["trace", "import", str(log), "-o", str(tmp_path / "t.parquet"), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith("simrl: ")
        assert error.count("\n") == 1
        assert str(log) in error
        assert options[:1] == ["--format"] or reason in error
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_names_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "run.log", STEP_1)

    def error(*arguments: str) -> str:
        assert main(["trace", *arguments]) == 2
        return capsys.readouterr().err

    output = str(tmp_path / "t.parquet")
    assert "does not exist" in error("import", str(tmp_path / "none"), "-o", output)
    assert "unknown format 'verl'" in error("import", str(log), "--format", "verl", "-o", output)
    assert "cannot be read" in error("import", str(log), "--format", "none.toml", "-o", output)
    assert "is a folder" in error("import", str(log), "-o", str(tmp_path))
    assert "cannot be written" in error("import", str(log), "-o", str(tmp_path / "no" / "t.parquet"))
    assert "also a file to import" in error("import", str(log), "-o", str(log))
    assert "holds no .jsonl files" in error("import", str(tmp_path), "-o", output)
    assert "does not exist" in error("info", output)
    assert "not a trace" in error("info", str(log))
    pd.DataFrame({"a": [1]}).to_parquet(output)
    assert "but not a trace" in error("info", output)


def test_a_trace_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_lines(tmp_path, STEP_1)
    monkeypatch.setattr("simrl.traces.trace.SCHEMA_VERSION", 2)
    with pytest.raises(TraceError, match="schema version 1; this simrl reads version 2"):
        read_trace(tmp_path / "out.parquet")


def test_an_older_file_survives_a_failed_import(tmp_path: Path) -> None:
    of_lines(tmp_path, STEP_1)
    before = (tmp_path / "out.parquet").read_bytes()
    with pytest.raises(TraceError):
        of_lines(tmp_path, STEP_1, "step:2 - timing_s/gen:x")
    assert (tmp_path / "out.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "run.log"]


def test_a_trace_opens_in_pandas_and_names_no_folder(tmp_path: Path) -> None:
    of_lines(tmp_path, STEP_1)
    frame = pd.read_parquet(tmp_path / "out.parquet")
    assert list(frame) == list(COLUMNS)
    assert frame["kind"].tolist() == ["step"]
    assert str(tmp_path).encode() not in (tmp_path / "out.parquet").read_bytes()


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A log twice as large takes no more memory; a whole file in memory would take 64 MB more."""
    line = json.dumps({"input": "q", "output": "a" * 4000, "step": 1})
    with (tmp_path / "1.jsonl").open("w") as file:
        file.writelines(line.replace('"q"', f'"q{i}"') + "\n" for i in range(16_000))
    with (tmp_path / "2.jsonl").open("w") as file:
        file.writelines(line.replace('"q"', f'"q{i}"') + "\n" for i in range(32_000))
    one, two = (peak_mb(tmp_path, tmp_path / f"{n}.jsonl") for n in (1, 2))
    assert two - one < 24


def peak_mb(tmp_path: Path, log: Path) -> float:
    code = (
        "import resource, sys; from pathlib import Path; from simrl.traces.importers import import_trace;"
        "import_trace([Path(sys.argv[1])], Path(sys.argv[2]), imported='2026-01-02');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, log, tmp_path / "big.parquet"], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1024


# --- anything at all ---

PIECES = st.sampled_from(
    [
        "step:", "1", "2", " - ", "timing_s/gen", "timing/gen", ":", "nan", "-1", "1e999", "np.float64(", ")",
        "\x1b[36m", '{"input": "a", "output": "b"', '"step"', ": 1", "}", "{", "[", "]", "\n", "\r", "\0",
        ",", "'", '"', "\\",
        "Global step 3: ", "{'timing/generation': 1, 'timing/ppo_train': 2}", "Received request a: prompt: 'x'",
        "Generated response a: output: 'y'", "prompt_token_ids: [1, 2]", "11-22 10:00:00", "02-30 99:00:00",
        "step,timing_s/gen,timing_s/step", "\ufeff", "\u2028", '"input_lens": [1], "output_lens": [2]', "9" * 400,
        "log_history", "\ud800",
    ]
)  # fmt: skip
CONTENT = st.one_of(
    st.binary(max_size=200),
    st.lists(PIECES, max_size=30).map(lambda pieces: "".join(pieces).encode("utf-8", "surrogatepass")),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=CONTENT,
    log_format=st.sampled_from(formats()),
    name=st.sampled_from(["log", "a.jsonl", "a.json", "a.csv", "a.log.gz"]),
    skip_bad=st.booleans(),
)
def test_any_input_gives_a_trace_or_one_error(
    content: bytes, log_format: str, name: str, skip_bad: bool, tmp_path: Path
) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    (tmp_path / name).write_bytes(content)
    error = ""
    try:
        trace = imported(tmp_path, tmp_path / name, log_format=log_format, skip_bad=skip_bad)
    except TraceError as caught:
        error = str(caught)
    if error:
        assert name in error
        assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    else:
        assert len(trace.steps) + len(trace.responses) > 0


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text("old")

    def interrupted() -> None:
        with whole_file(path) as file:
            file.write_text("ne")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert (path.read_text(), [found.name for found in tmp_path.iterdir()]) == ("old", ["w.toml"])
    with whole_file(path) as file:
        file.write_text("new")
    assert (path.read_text(), [found.name for found in tmp_path.iterdir()]) == ("new", ["w.toml"])
    missing = tmp_path / "no" / "w.toml"
    with pytest.raises(TraceError, match=r"w.toml' cannot be written: No such file"), whole_file(missing) as file:
        file.write_text("new")
