"""Published records: reading them, predicting them, and that nothing of a log helps to predict it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simrl.cli import main
from simrl.experiments.config import ConfigError
from simrl.experiments.derive_verl_steps import steps
from simrl.experiments.record_file import Record, by_log, parse_records, shipped_records
from simrl.experiments.record_model import (
    CannotPredict,
    Constants,
    Setting,
    _slowest_share,
    fit,
    fit_nulls,
    predict_s,
    response_tokens,
    setting_of,
    shipped_fit,
    solve,
    with_inferred_mean,
    with_mean,
)
from simrl.experiments.records import RecordValidation, Row, validate
from simrl.traces.models import load_model

HEADER = (
    "record,model,gpus,gpu_type,engine,train_engine,prompts_per_step,responses_per_prompt,max_response_tokens,"
    "response_mean_tokens,response_max_tokens,gen_s,old_log_prob_s,ref_s,update_actor_s,source"
)
LINE = "a,Qwen2.5-7B,8,H100,verl+vLLM 0.8 TP2 enforce_eager,FSDP,64,5,1024,200,500,23.3,2.2,1.1,7.4,a log"


def records(*lines: str, header: str = HEADER) -> list[Record]:
    return parse_records("\n".join([header, *lines]), "file.csv")


def changed(**fields: object) -> str:
    given = dict(zip(HEADER.split(","), LINE.split(","), strict=True)) | {k: str(v) for k, v in fields.items()}
    return ",".join(given.values())


def setting(**fields: object) -> Setting:
    return setting_of(records(changed(**fields))[0])


# --- reading ---


def test_records_of_one_source_are_one_log_and_stages_add_up() -> None:
    first, second, third = records(
        changed(source="some log steps 20-24"),
        changed(record="b", source="same log steps 3-4"),
        changed(source="other"),
    )
    assert (first.log, second.log, third.log) == ("some log", "some log", "other")
    assert first.seconds("log_probs") == pytest.approx(2.2 + 1.1)
    assert first.passes("log_probs") == 2
    assert (first.passes("update"), first.seconds("values")) == (1, None)


def test_unknown_columns_and_empty_fields_are_unknown() -> None:
    (record,) = records("Qwen2.5-7B,,8.5,7", header="model,gpus,gen_s,comment")
    assert record.numbers == {"gen_s": 8.5}
    assert not record.knows_lengths
    assert record.log == record.name == "record 1"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"gpus": "eight"}, "gpus='eight' must be a whole number of at least 1"),
        ({"gpus": "0"}, "gpus='0' must be a whole number of at least 1"),
        ({"prompts_per_step": "64.5"}, "prompts_per_step='64.5' must be a whole number"),
        ({"gen_s": "-3"}, "gen_s='-3' must be a number above 0"),
        ({"gen_s": "0"}, "gen_s='0' must be a number above 0"),
        ({"update_actor_s": "nan"}, "update_actor_s='nan' must be a number above 0"),
        ({"response_mean_tokens": "inf"}, "response_mean_tokens='inf' must be a number above 0"),
        ({"response_mean_tokens": "600"}, "response_mean_tokens=600 must be at most response_max_tokens=500"),
        ({"response_max_tokens": "2000"}, "response_max_tokens=2000 must be at most max_response_tokens=1024"),
    ],
)
def test_bad_values_are_told_with_line_and_column(fields: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        records(LINE, changed(**fields))
    assert str(error.value).startswith("file.csv: line 3: ")
    assert told in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "model\nQwen2.5-7B", "gen_s\n3", f"{HEADER}\n", f"{HEADER},gen_s\n", f"{HEADER}\n{LINE},more"]
)
def test_files_that_are_no_records_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"file\.csv"):
        parse_records(text, "file.csv")


@pytest.mark.parametrize("text", [None, f"{HEADER}\n{changed(gpus='x')}\n", "\x00\x01"])
def test_the_command_line_tells_in_one_line(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert main(["validate", "--records", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert str(path) in told


# --- what a record is in the simulator's terms ---


@pytest.mark.parametrize(
    ("text", "gpu"),
    [
        ("H100-class", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("gh200", "gh200"), ("H20", "h20"),
        ("NVIDIA H200", "h200"), ("L40S", "l40s"), ("H100SXM5", "h100"), ("A800", "a100"),
    ],
)  # fmt: skip
def test_gpus_are_found_by_a_word_of_their_name(text: str, gpu: str) -> None:
    assert setting(gpu_type=text).gpu == gpu


@pytest.mark.parametrize("text", ["", "unnamed", "B9000", "H1000"])
def test_gpus_without_data_are_a_reason_to_skip(text: str) -> None:
    with pytest.raises(CannotPredict):
        setting(gpu_type=text)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("Qwen2.5-Math-7B", "qwen2.5-math-7b"),
        ("somebody/new-model-13b", "qwen2.5-14b"), ("Qwen3-30B-A3B", "qwen2.5-3b"),
    ],
)  # fmt: skip
def test_models_go_by_name_else_by_size(name: str, model: str) -> None:
    found = setting(model=name)
    assert found.model == model
    assert any("architecture" in what for what in found.assumed) == ("13b" in name or "A3B" in name)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("verl+vLLM 0.8 TP2 enforce_eager", "vllm-eager"), ("verl+vLLM", "vllm-eager"),
        ("verl+vLLM 0.12", "vllm-graphs"), ("vLLM 0.8 CUDA graphs", "vllm-graphs"),
        ("OpenRLHF+vLLM 0.8", "vllm-graphs"),
        ("verl + SGLang 0.4.5", "sglang"), ("verl+vLLM enforce_eager=False", "vllm-graphs"),
    ],
)  # fmt: skip
def test_engine_classes(text: str, kind: str) -> None:
    assert setting(engine=text).engine_class == kind


@pytest.mark.parametrize(
    ("date", "engine", "kind"),
    [
        ("2025-07-17", "verl+vLLM", "vllm-eager"), ("2025-12", "verl+vLLM", "vllm-graphs"),
        ("", "verl+vLLM", "vllm-eager"), ("2025-12", "verl+vLLM 0.8", "vllm-eager"),
        ("2025-12", "verl+vLLM enforce_eager", "vllm-eager"),
    ],
)  # fmt: skip
def test_a_date_tells_what_the_default_was(date: str, engine: str, kind: str) -> None:
    (record,) = records(changed(engine=engine) + f",{date}", header=HEADER + ",date")
    assert setting_of(record).engine_class == kind


def test_a_date_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"file\.csv: line 2: date='last year' must be YYYY"):
        records(changed() + ",last year", header=HEADER + ",date")


@pytest.mark.parametrize("stage", ["generation", "log_probs", "update"])
def test_an_unknown_mean_is_inferred_from_the_other_stages_alone(stage: str) -> None:
    """Times are made from a mean of 700 tokens, which the record does not tell; the stage's own time is wrong."""
    unknown = {"response_mean_tokens": "", "response_max_tokens": "", "max_response_tokens": 16384, "ref_s": ""}
    drawn = with_mean(setting(**unknown), 0.7)
    columns = {"generation": "gen_s", "log_probs": "old_log_prob_s", "update": "update_actor_s"}
    constants = Constants(1.4e-3, 2.0, 0.15, 1e-3)
    times = {column: f"{predict_s(drawn, name, constants):.6g}" for name, column in columns.items()}
    found = setting(**unknown, **times | {columns[stage]: 2 * float(times[columns[stage]])})
    assert with_inferred_mean(found, stage, constants).mean == pytest.approx(700, rel=0.02)
    other = "update" if stage == "log_probs" else "log_probs"
    longer = setting(**unknown, **times | {columns[other]: 2 * float(times[columns[other]])})
    assert with_inferred_mean(longer, stage, constants).mean > 900


def test_a_mean_that_is_known_stays() -> None:
    known = setting()
    assert with_inferred_mean(known, "update", Constants(1.4e-3, 2.0, 0.15, 1e-3)) is known


def stated(**fields: object) -> Setting:
    """A record with columns beside those of `HEADER`, and other values in those."""
    more = {column: str(value) for column, value in fields.items() if column not in HEADER.split(",")}
    inside = {column: value for column, value in fields.items() if column not in more}
    header = ",".join((HEADER, *more))
    return setting_of(records(",".join((changed(**inside), *more.values())), header=header)[0])


ONLY_LAYERS = Constants(1e-3, 0, 1.0, 1e-3)
# Of 28 layers 3584 hidden, 18944 intermediate, keys of 512, and 152064 logits.
QWEN_7B_TOKEN_BYTES = 28 * (126 * 3584 + 16 * 18944 + 28 * 512) + 12 * 152064


def update_s(**fields: object) -> float:
    return predict_s(stated(**fields), "update", ONLY_LAYERS)


def test_stated_micro_batches_cost_their_layers() -> None:
    # 64 prompts in 4 parts of 10 responses a GPU: 1 micro-batch of 10, or 10 of 1. Each of the 9 more has 4 passes
    # (checkpointing) over 28 layers of 1 ms; communication between the GPUs of a node adds to it.
    more_s = update_s(micro_batch_responses=1) - update_s(micro_batch_responses=10)
    assert more_s > 4 * 9 * 4 * 28 * 1e-3
    assert update_s(micro_batch_responses=10) == update_s(micro_batch_responses=11), "both are one"
    assert update_s(micro_batch_responses=1, mini_batch_prompts=64) < update_s(micro_batch_responses=1) * 1.01
    many, one = update_s(micro_batch_responses=10), update_s(micro_batch_responses=40, mini_batch_prompts=64)
    assert many > one, "four optimizer steps and micro-batches against one"


def test_a_pass_less_without_checkpointing() -> None:
    # The busiest GPU's FLOPs at its peak, in units of a forward pass: 4 with checkpointing, 3 without.
    four_s, three_s = (update_s(checkpointing=c, micro_batch_tokens=4000) for c in ("yes", "no"))
    layers_s = 4 * 28 * 1e-3  # of one pass, 4 micro-batches
    compute_s = 2 * 7.07e9 * 40 * (200 + 100) / 989e12
    memory_s = QWEN_7B_TOKEN_BYTES * 40 * (200 + 100) / 3.35e12
    assert four_s - three_s == pytest.approx(layers_s + compute_s + memory_s, rel=0.05)


def test_ranks_wait_for_the_longest_of_their_micro_batches() -> None:
    # Of two ranks with 4 responses each, in micro-batches of two: sums 21 and 12 beside 7 and 10. One by one: 1, 20, 10
    # and 2 beside 3, 4, 4 and 6.
    found = replace(stated(micro_batch_responses=2), gpus=2, samples=1)
    tokens = [1, 20, 10, 2, 3, 4, 4, 6]
    assert _slowest_share(found, tokens, prompts=8) == pytest.approx((21 + 12) / (14 + 11))
    assert _slowest_share(found, tokens, prompts=2) == pytest.approx((3 + 20 + 10 + 6) / (14 + 11))
    assert _slowest_share(setting(), [1, 99], prompts=8) == 1, "packed micro-batches are of one size"


def test_positions_of_the_padded_batch_pass_through_the_controller() -> None:
    # 320 responses of at most 1024 tokens behind 2048 or 512 of prompt, 0.12 us a position.
    more_s, less_s = (update_s(max_prompt_tokens=n, prompt_mean_tokens=100) for n in (2048, 512))
    assert more_s - less_s == pytest.approx(0.12e-6 * 320 * (2048 - 512))


def test_activations_and_logits_go_through_gpu_memory() -> None:
    # H200 is H100 with 4.8e12 instead of 3.35e12 B/s; 64 x 5 x 300 tokens over 8 GPUs.
    slower_s, faster_s = (
        predict_s(setting(gpu_type=gpu, ref_s=""), "log_probs", ONLY_LAYERS) for gpu in ("H100", "H200")
    )
    expected_s = QWEN_7B_TOKEN_BYTES * 40 * 300 * (1 / 3.35e12 - 1 / 4.8e12)
    assert slower_s - faster_s == pytest.approx(expected_s, rel=0.01)


def test_adapters_take_what_old_log_probs_take_beyond_the_reference() -> None:
    # 320 responses over 8 GPUs in micro-batches of 8: 5 of them, 28 layers, 14 units; 2.2 s against 1.1 s.
    found = fit([stated(micro_batch_responses=8, train_engine="FSDP LoRA32").record])
    assert found.value("adapter_s", "lora") == pytest.approx((2.2 - 1.1) / (5 * 28 * 14))


def test_offload_moves_the_state_there_and_back() -> None:
    # 12 bytes of 7.6e9 weights over 8 GPUs at 50e9 B/s, twice.
    assert update_s(offload="yes") - update_s(offload="no") == pytest.approx(2 * 12 * 7.62e9 / 8 / 50e9, rel=0.01)


def test_a_lora_learner_waits_for_the_units_of_its_adapters() -> None:
    # One micro-batch of 40 responses; 28 layers x 14 units x 1 ms in old log-probs, none in the reference's.
    def forward_s(train_engine: str, **unknown: str) -> float:
        return predict_s(setting(train_engine=train_engine, **unknown), "log_probs", ONLY_LAYERS)

    assert forward_s("FSDP LoRA32", ref_s="") - forward_s("FSDP", ref_s="") == pytest.approx(28 * 14 * 1e-3, rel=0.1)
    assert forward_s("FSDP LoRA32", old_log_prob_s="") == pytest.approx(forward_s("FSDP", old_log_prob_s=""))
    assert setting(train_engine="FSDP LoRA32").engine_class == "vllm-eager-lora"


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [("checkpointing", "maybe", "must be yes or no"), ("gpu_memory_utilization", 1.5, "must be at most 1")],
)
def test_settings_that_are_none_are_refused(column: str, value: object, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"file\.csv: line 2: {column}=.*{told}"):
        stated(**{column: value})


def test_lengths_that_are_unknown_are_assumed_and_marked() -> None:
    short = setting(response_mean_tokens="", response_max_tokens="", max_response_tokens=1024)
    assert short.mean == 256, "a quarter of the cap"
    long = setting(response_mean_tokens="", response_max_tokens="", max_response_tokens=28672)
    assert long.mean == 1000
    assert 1000 < long.longest < 28672
    assert {"response_mean_tokens", "response_max_tokens"} <= set(long.assumed)


@given(
    mean=st.floats(20, 900), spread=st.floats(1.01, 6), cap_share=st.booleans(), responses=st.sampled_from([64, 5120])
)
@settings(max_examples=60, deadline=None)
def test_lengths_have_the_mean_and_the_longest(mean: float, spread: float, cap_share: bool, responses: int) -> None:
    longest = int(mean * spread) + 2
    cap = longest if cap_share else longest + 1000
    found = replace(setting(), mean=mean, longest=longest, cap=cap, prompts=responses, samples=1)
    tokens = response_tokens(found, responses)
    assert len(tokens) == responses
    assert max(tokens) == longest
    assert min(tokens) >= 1
    slack = (longest - mean) / responses  # the longest is there even where the others leave no room for it
    assert sum(tokens) / responses == pytest.approx(mean, abs=0.5 + slack)


# --- predicting ---


def test_an_engine_that_launches_slowly_takes_its_launches() -> None:
    # 8 GPUs at TP 2 are 4 engines with 2 responses each, all of 100 tokens: a prefill and 99 decodes.
    found = setting(prompts_per_step=4, responses_per_prompt=2, response_mean_tokens=100, response_max_tokens=100)
    seconds = predict_s(found, "generation", Constants(1e-2, 2.5, 0.1, 1e-3))
    assert seconds == pytest.approx(2.5 + 100 * 1e-2 * load_model("qwen2.5-7b").layers)


def test_log_probs_take_a_pass_for_each_measured_part_at_the_given_rate() -> None:
    both, one = setting(), setting(ref_s="")
    constants = Constants(1e-3, 0, 0.1, 1e-3)
    once_s = predict_s(one, "log_probs", constants)
    assert predict_s(both, "log_probs", constants) == pytest.approx(2 * once_s)
    # 40 sequences of some 300 tokens a GPU; linear layers and head of Qwen2.5-7B have 7.07e9 weights.
    compute_s = 2 * 7.07e9 * 40 * (200 + 100) / (0.1 * 989e12)
    assert compute_s < once_s < 1.3 * compute_s


def synthetic(log: str, constants: Constants, **fields: object) -> list[Record]:
    """Two records of a log, with the times that the constants give."""
    made = []
    for longest in (500, 900):
        blank = records(changed(source=log, response_max_tokens=longest, **fields))[0]
        times = {"gen_s": "generation", "update_actor_s": "update", "old_log_prob_s": "log_probs"}
        numbers = {k: v for k, v in blank.numbers.items() if k != "ref_s"}
        blank = replace(blank, numbers=numbers, name=f"{log}-{longest}")
        predicted = {column: predict_s(setting_of(blank), stage, constants) for column, stage in times.items()}
        made.append(replace(blank, numbers=numbers | predicted | {"reshard_s": constants.startup_s}))
    return made


def test_a_fit_finds_the_constants_that_made_the_records() -> None:
    h100, h20 = Constants(2e-3, 1.5, 0.2, 1e-3), Constants(1e-3, 3.5, 0.4, 1e-3)
    found = fit([*synthetic("x", h100), *synthetic("y", h20, gpu_type="H20"), *synthetic("z", h100)])
    # The median over both classes is 0.3; it weighs as one log beside two of H100 and one of H20.
    assert found.value("efficiency", "l40s") == pytest.approx(0.3, rel=0.01)
    assert found.value("efficiency", "h100") == pytest.approx((0.2**2 * 0.3) ** (1 / 3), rel=0.01)
    assert found.value("efficiency", "h20") == pytest.approx((0.4 * 0.3) ** (1 / 2), rel=0.01)
    assert found.value("host_s_per_layer", "vllm-eager") == pytest.approx(2e-3, rel=0.01), "median of its logs"
    assert found.value("startup_s", "vllm-eager") == pytest.approx(1.5)
    left = found.without({"x", "z"})
    assert left.value("efficiency", "h100") == pytest.approx(0.4, rel=0.01), "h20's, the only class that is left"


def test_rows_without_lengths_or_that_no_value_meets_are_not_fitted() -> None:
    unknown = records(changed(response_mean_tokens=""))
    assert fit(unknown).values == {}
    assert solve(setting(gen_s=0.01), "generation", "host_s_per_layer", ONLY_LAYERS) is None


def test_null_models_by_hand() -> None:
    # Tokens a GPU: 64 x 5 x (mean + 100) / 8. One vote a log: the median of (0.01, 0.03) and of 0.05.
    made = records(
        changed(source="x", response_mean_tokens=100, response_max_tokens=200, gen_s=80),
        changed(source="x", response_mean_tokens=100, response_max_tokens=200, gen_s=240),
        changed(source="y", response_mean_tokens=300, response_max_tokens=600, gen_s=800),
    )
    nulls = fit_nulls(made, ["generation"])
    assert nulls.tokens["generation"] == pytest.approx((0.02 + 0.05) / 2)
    line = fit_nulls([made[0], made[2]], ["generation"]).line["generation"]
    assert line == pytest.approx((-280, 1.8)), "through (200, 80) and (600, 800)"
    tokens_s, longest_s = fit_nulls([made[0], made[2]]).seconds(setting(response_max_tokens=300), "generation")
    assert tokens_s == pytest.approx((0.01 + 0.05) / 2 * 64 * 5 * 300 / 8)
    assert longest_s == pytest.approx(260)


# --- leaving logs out ---


def test_one_vote_a_log() -> None:
    def made(log: str, simulated_s: float, known: str = "yes") -> Row:
        return Row("r", log, None, "update", 10.0, simulated_s, None, None, known, held_out=True, assumed=())

    rows = (made("x", 11), made("x", 12), made("x", 11.5), made("y", 20), made("z", 13, "inferred"))
    found = RecordValidation(rows, (), ())
    assert found.median_abs_error()["update"] == pytest.approx(0.3), "median of 0.15, 1.0 and 0.3; of all rows 0.2"
    assert found.logs() == {"update": 3}
    assert found.to_json()["median_abs_error_by_gpu_type_known"]["inferred"]["update"] == pytest.approx(0.3)


def small() -> list[Record]:
    """Three made-up logs."""
    h100, slow = Constants(2e-3, 1.5, 0.2, 1e-3), Constants(1e-3, 3.5, 0.4, 1e-3)
    return [*synthetic("x", h100), *synthetic("y", slow), *synthetic("z", slow, gpu_type="H20")]


def predictions(rows: Sequence[Row], log: str) -> list[float]:
    return [row.simulated_s for row in rows if row.log == log]


def test_what_a_log_measured_does_not_help_to_predict_it() -> None:
    shipped = small()
    before = validate(shipped, shipped)
    slower = [
        replace(r, numbers={k: v * (3 if k.endswith("_s") else 1) for k, v in r.numbers.items()}) if r.log == "x" else r
        for r in shipped
    ]
    after = validate(slower, slower)
    assert predictions(after.rows, "x") == predictions(before.rows, "x")
    assert predictions(after.rows, "y") != predictions(before.rows, "y"), "y is of x's class"


def test_logs_of_one_repository_can_be_left_out_together() -> None:
    shipped = [replace(r, log=f"{'a' if r.log in 'xy' else 'b'}/repository {r.log}") for r in small()]
    slower = {"gen_s": 99.0, "update_actor_s": 99.0, "old_log_prob_s": 99.0}
    changed_y = [replace(r, numbers=r.numbers | slower) if r.log.endswith("y") else r for r in shipped]
    first, second = (validate(all_of, all_of, by_source=True).rows for all_of in (shipped, changed_y))
    assert predictions(first, "a/repository x") == predictions(second, "a/repository x"), "y does not help x"
    assert predictions(first, "b/repository z") != predictions(second, "b/repository z")


def test_a_renamed_copy_of_a_shipped_log_is_left_out_as_well() -> None:
    shipped = small()
    renamed = [replace(r, log="copy") if r.log == "x" else r for r in shipped]
    assert validate(renamed, shipped).median_abs_error() == validate(shipped, shipped).median_abs_error()


def test_other_records_of_a_shipped_log_do_not_get_its_constants() -> None:
    shipped = small()
    slower = {"gen_s": 99.0, "update_actor_s": 99.0, "old_log_prob_s": 99.0}
    others = [replace(r, name=f"new {r.name}", numbers=r.numbers | slower) for r in shipped if r.log == "x"]
    expected = predictions(validate([r for r in shipped if r.log == "x"], shipped).rows, "x")
    assert predictions(validate(others, shipped).rows, "x") == pytest.approx(expected, rel=0.01)


def test_a_copy_without_settings_has_those_of_the_shipped_log() -> None:
    texts = {"checkpointing": "no", "engine": "verl+vLLM 0.8 TP4 enforce_eager", "date": "2025-06-18"}
    shipped = [
        replace(
            r, texts={**r.texts, **texts}, numbers=r.numbers | {"mini_batch_prompts": 16, "micro_batch_responses": 4}
        )
        for r in small()
    ]
    bare = [replace(r, texts={**r.texts, "engine": "verl+vLLM 0.8"}) for r in small() if r.log == "x"]
    assert predictions(validate(bare, shipped).rows, "x") == predictions(validate(shipped, shipped).rows, "x")


def test_steps_that_are_shipped_of_a_log_come_with_it() -> None:
    shipped = small()
    step = replace(shipped[1], name="step", numbers=shipped[1].numbers | {"step": 7})
    found = validate([shipped[0]], [*shipped, step])
    assert {row.step for row in found.rows} == {None, 7}


def test_the_straggler_step_follows_from_its_log_s_other_steps() -> None:
    found = validate([r for r in shipped_records() if r.numbers.get("gen_s", 99) < 50], small())
    straggler = max(found.within, key=lambda row: row.real_s)
    errors = [straggler.error(of) for of in ("null_tokens", "null_longest", "null_share")]
    error = straggler.error()
    assert error is not None
    assert abs(error) < 0.10
    assert all(null is not None and abs(error) < abs(null) for null in errors)
    assert not straggler.held_out
    assert straggler.null_share_s == pytest.approx(23.3 / 464 * 1024), "the median of three ratios"
    tokens = [(23.3, 231), (24.3, 247), (24.9, 235)]  # seconds and mean response, beside 100 tokens of prompt
    rate = sorted(seconds / (mean + 100) for seconds, mean in tokens)[1]
    assert straggler.null_tokens_s == pytest.approx(rate * (260 + 100))


def test_shipped_constants_are_the_fit_to_the_shipped_records() -> None:
    fitted, shipped = fit(shipped_records()), shipped_fit()
    for constant, by_class in fitted.values.items():
        for name in (*by_class, "l40s"):
            assert shipped.value(constant, name) == pytest.approx(fitted.value(constant, name), rel=1e-3), (
                f"{constant} of {name}: run python -m simrl.experiments.records --fit"
            )


def test_only_records_of_unnamed_gpus_lack_a_setting() -> None:
    reasons = {}
    for record in shipped_records():
        try:
            setting_of(record)
        except CannotPredict as reason:
            reasons[record.name] = str(reason)
    assert reasons == {"gemma-2-2b-ppo-gsm8k": "its GPUs are not named"}


def test_json_has_rows_medians_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.csv"
    path.write_text("\n".join([HEADER, LINE, changed(record="b", gpu_type="", source="")]), encoding="utf-8")
    assert main(["validate", "--records", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["stage"] for row in found["rows"]} == {"generation", "log_probs", "update"}
    first = found["rows"][0]
    assert first["relative_error"] == pytest.approx(first["simulated_s"] / first["real_s"] - 1)
    assert found["median_abs_error"]["generation"] == pytest.approx(abs(first["relative_error"]))
    assert found["n"] == {"generation": 1, "log_probs": 1, "update": 1}
    assert found["skipped"] == [{"record": "b", "reason": "its GPUs are not named"}]
    assert main(["validate", "--records", str(path)]) == 0
    assert "its GPUs are not named" in capsys.readouterr().out


# --- the log's importer ---


def test_a_step_of_a_log_by_hand(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        "step:0 - val-core/x:0.5\n"
        "\x1b[36m(TaskRunner pid=1)\x1b[0m step:3 - response_length/mean:np.float64(150.0) - response_length/max:900.0"
        " - prompt_length/mean:100.0 - timing_s/gen:20.5 - timing_s/reshard:2.0 - timing_s/step:100.0"
        " - timing_s/testing:30.0 - timing_s/save_checkpoint:10.0 - perf/total_num_tokens:80000"
        " - perf/time_per_step:100.0 - perf/throughput:100.0\n",
        encoding="utf-8",
    )
    (found,) = steps(tmp_path / "log", {"record": "a", "responses_per_prompt": "5"}).to_dict("records")
    assert (found["record"], found["gen_s"], found["reshard_s"]) == ("a-3", 20.5, 2.0)
    assert found["step_s"] == 60.0, "without testing and checkpoint"
    assert found["gpus"] == 8, "80000 tokens / (100 s x 100 tokens/s/GPU)"
    assert found["prompts_per_step"] == 64, "80000 / 250 / 5"


def test_the_shipped_steps_agree_with_the_shipped_medians() -> None:
    logs = by_log(shipped_records())
    members = logs["diqiuzhuanzhuan/verldata qwen2-7b_math.log"]
    early = next(r for r in members if r.step is None)
    first = sorted(r.numbers["update_actor_s"] for r in members if r.step in range(2, 12))
    assert (first[4] + first[5]) / 2 == pytest.approx(early.numbers["update_actor_s"], abs=0.1)
