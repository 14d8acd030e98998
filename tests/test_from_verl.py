"""verl's configurations of several generations, what they become by hand, and what is wrong with them."""

import itertools
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from simrl.cli import main
from simrl.experiments.config import ConfigError, config_toml, load_config
from simrl.experiments.from_verl import SETTINGS, load_verl_config, match_model
from simrl.traces.models import model_names

CURRENT = Path(__file__).parent / "data" / "verl_config.yaml"
EARLY_2025 = """
data: {train_batch_size: 1024, max_prompt_length: 512, max_response_length: 512, val_batch_size: 1312}
actor_rollout_ref:
  model: {path: /models/qwen2-7b-instruct/, enable_gradient_checkpointing: True, use_remove_padding: False}
  actor:
    strategy: fsdp
    ppo_mini_batch_size: 256
    ppo_micro_batch_size: 64
    use_kl_loss: False
    fsdp_config: {param_offload: True, grad_offload: True, optimizer_offload: False}
  rollout: {name: vllm, tensor_model_parallel_size: 2, gpu_memory_utilization: 5e-1, enforce_eager: True, n: 1}
critic: {model: {path: /models/qwen2-7b-instruct}}
reward_model: {enable: False}
algorithm: {adv_estimator: gae, kl_ctrl: {type: fixed, kl_coef: 0.001}}
trainer: {nnodes: 2, n_gpus_per_node: 8, total_epochs: 15, total_training_steps: 100}
"""
MEGATRON_SCRIPT = """
#!/usr/bin/env bash
# it's the launch script
set -x
NODES=${NNODES:-3}; tp=4
prompt=$((1024 * 2))
answer=$(( (prompt - 1024) / 2 ))
FOLDER=${FOLDER:-"${HOME}/models"}
MODEL_PATH=${MODEL_PATH:-"${FOLDER}/Qwen2.5-14B"}
DATA=(
    data.train_batch_size=96 data.max_prompt_length=$prompt data.max_response_length="${answer}")
python3 -m verl.trainer.main_ppo --config-name='ppo_megatron_trainer.yaml' "${DATA[@]}" \\
    algorithm.adv_estimator=rloo \\
    actor_rollout_ref.model.path="$MODEL_PATH" \\
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size=${tp} \\
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2 \\
    +actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full \\
    actor_rollout_ref.actor.megatron.optimizer_offload=True \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=$GEN_TP \\
    trainer.logger=['console','wandb'] trainer.n_gpus_per_node=4 trainer.nnodes=$NODES $@
"""


def write(folder: Path, text: str, name: str = "verl.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def values(path: Path, **options):
    """simrl's values by path, and the listing."""
    config, listing = load_verl_config(path, **options)
    tree = {section: getattr(config, section).model_dump() for section in ("job", "cluster", "engine")}
    return {f"{section}.{key}": value for section, part in tree.items() for key, value in part.items()}, listing


def by_status(listing, status):
    """{simrl's path: (verl's settings, note)} of a status."""
    return {line.simrl: (line.verl, line.note) for line in listing.lines if line.status == status}


def ignored(listing):
    return {line.verl[0]: line.note for line in listing.lines if line.status == "ignored"}


def test_a_current_configuration():
    found, listing = values(CURRENT)
    expected = {
        "job.algorithm": "grpo", "job.model": "qwen2.5-3b", "job.prompts_per_step": 256, "job.responses_per_prompt": 8,
        "job.mini_batch_prompts": 64, "job.max_prompt_tokens": 384, "job.max_response_tokens": 1024,
        "job.dataset_prompts": 4096, "job.steps": 32,  # 2 epochs of 4096 / 256
        "job.learner_strategy": "fsdp", "job.learner_offload": True, "job.micro_batch_tokens": 12288,
        "job.packing": True, "job.activation_checkpointing": False, "job.lora_rank": 32, "job.kl_reference": True,
        "job.reward": "model", "job.reward_model": "qwen2.5-7b",
        "engine.tensor_parallel": 4, "engine.max_num_seqs": 512, "engine.max_num_batched_tokens": 16384,
        "engine.gpu_memory_utilization": 0.7, "engine.enforce_eager": True, "engine.prefix_caching": False,
        "engine.kv_cache_dtype": "fp8", "cluster.nodes": 4,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert set(by_status(listing, "taken")) == set(expected)
    defaults = by_status(listing, "defaulted")
    assert set(defaults) == {"cluster.node_type", "job.workload", "engine.preset"}
    assert all("not in verl's file" in note for _, note in defaults.values())
    reasons = ignored(listing)
    assert "every further epoch" in reasons["actor_rollout_ref.actor.ppo_epochs"]
    assert "sequence parallelism" in reasons["actor_rollout_ref.actor.ulysses_sequence_parallel_size"]
    assert "job.workload" in reasons["actor_rollout_ref.rollout.temperature"]
    assert "in any case" in reasons["actor_rollout_ref.rollout.enable_chunked_prefill"]
    assert reasons["trainer.total_training_steps"] == "not set"


def test_nothing_is_passed_over():
    tree = yaml.safe_load(CURRENT.read_text(encoding="utf-8"))

    def leaves(node, key=""):
        if not isinstance(node, dict):
            return [key]
        return [leaf for name, part in node.items() for leaf in leaves(part, f"{key}.{name}" if key else name)]

    _, listing = values(CURRENT)
    listed = [key for line in listing.lines for key in line.verl]
    assert sorted(listed) == sorted(leaves(tree))


def test_a_configuration_of_early_2025(tmp_path):
    found, listing = values(write(tmp_path, EARLY_2025))
    expected = {
        "job.algorithm": "ppo", "job.model": "qwen2-7b", "job.responses_per_prompt": 1, "job.steps": 100,
        "job.packing": False, "job.micro_batch_tokens": 4096,  # 64 responses / 16 GPUs, padded to 512 + 512
        "job.kl_reference": True, "job.learner_offload": False, "job.reward": "rule", "job.lora_rank": 0,
        "engine.enforce_eager": True, "engine.gpu_memory_utilization": 0.5, "engine.max_num_seqs": 1024,
        "cluster.nodes": 2,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert by_status(listing, "taken")["job.model"][1] == "derived: family and size by the path"
    assert by_status(listing, "defaulted")["job.lora_rank"][1] == "default of verl 1a7e2ca"
    assert "optimizer_offload" in ignored(listing)["actor_rollout_ref.actor.fsdp_config.param_offload"]


def test_a_launch_script_for_megatron(tmp_path):
    found, listing = values(write(tmp_path, MEGATRON_SCRIPT, "run.sh"))
    expected = {
        "job.algorithm": "grpo", "job.model": "qwen2.5-14b", "job.prompts_per_step": 96,
        "job.max_prompt_tokens": 2048, "job.max_response_tokens": 512, "job.learner_strategy": "megatron",
        "job.learner_tensor_parallel": 4, "job.learner_offload": True, "job.activation_checkpointing": True,
        "job.packing": True, "job.kl_reference": False, "job.mini_batch_prompts": 256,
        "job.micro_batch_tokens": 16384, "job.steps": 30 * (7473 // 96), "engine.tensor_parallel": 2,
        "engine.enforce_eager": False, "cluster.nodes": 3,
        "cluster.parameters": {"node": {"g6e.48xlarge": {"gpus": 4}}},
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert by_status(listing, "taken")["job.algorithm"][1] == "'rloo' costs what GRPO costs"
    path = next(line.given for line in listing.lines if line.simrl == "job.model")
    assert path == ("${HOME}/models/Qwen2.5-14B",)
    reasons = ignored(listing)
    assert "shell variable" in reasons["actor_rollout_ref.rollout.tensor_model_parallel_size"]
    assert "pipeline" in reasons["actor_rollout_ref.actor.megatron.pipeline_model_parallel_size"]


def test_a_list_of_overrides(tmp_path):
    items = ["data.train_batch_size=64", "+trainer.nnodes=2", "model_engine=megatron", "~trainer.logger", "a=b"]
    found, listing = values(write(tmp_path, yaml.safe_dump(items), "overrides.yaml"))
    assert (found["job.prompts_per_step"], found["cluster.nodes"]) == (64, 2)
    assert found["job.learner_strategy"] == "megatron"
    assert set(ignored(listing)) == {"~trainer.logger", "a=b"}


def test_micro_batches_without_padding_have_the_mean_tokens_of_the_workload(tmp_path):
    text = EARLY_2025.replace("use_remove_padding: False", "use_remove_padding: True")
    found, _ = values(write(tmp_path, text))
    four_of_the_mean = 4 * (100 + 250)  # GSM8K's prompts have some 100 tokens, its responses 200 to 300
    assert found["job.micro_batch_tokens"] == pytest.approx(four_of_the_mean, rel=0.2)


def test_every_setting_of_the_table_has_verls_default(tmp_path):
    """A file that says next to nothing: each default from verl's own file, by hand in SETTINGS and here."""
    found, listing = values(write(tmp_path, "trainer: {project_name: x}"))
    assert found["job.algorithm"] == "ppo"
    assert found["job.steps"] == 30 * 7
    assert (found["job.prompts_per_step"], found["job.responses_per_prompt"]) == (1024, 1)
    assert (found["job.max_prompt_tokens"], found["job.max_response_tokens"]) == (512, 512)
    assert (found["engine.max_num_seqs"], found["engine.max_num_batched_tokens"]) == (1024, 8192)
    assert (found["engine.gpu_memory_utilization"], found["engine.enforce_eager"]) == (0.5, False)
    assert found["job.model"] == "qwen2.5-7b"
    assert set(by_status(listing, "defaulted")) >= {setting.simrl for setting in SETTINGS}
    assert by_status(listing, "taken") == {}


def test_what_is_said_in_simrls_terms_wins_and_is_listed(tmp_path):
    toml = write(tmp_path, "[engine]\nenforce_eager = true\n[cluster]\nnode_type = 'p5.48xlarge'\n", "own.toml")
    file = write(tmp_path, "data: {train_batch_size: 512}\ntrainer: {nnodes: 2}")
    sets = ["job.prompts_per_step=256", "job.dataset_prompts=2560"]
    found, listing = values(file, config=toml, sets=sets, nodes=5)
    assert found["engine.enforce_eager"] is True  # verl's default does not beat --config
    assert (found["job.prompts_per_step"], found["cluster.nodes"]) == (256, 5)
    assert found["cluster.node_type"] == "p5.48xlarge"
    assert found["job.steps"] == 30 * 10
    assert by_status(listing, "taken")["job.prompts_per_step"][1] == "overridden in simrl's own terms: 256"
    assert "given in simrl's terms" in by_status(listing, "defaulted")["cluster.node_type"][1]


def test_the_resolved_configuration_stands_alone(tmp_path):
    config, _ = load_verl_config(write(tmp_path, MEGATRON_SCRIPT, "run.sh"))
    again = load_config(config=write(tmp_path, config_toml(config), "config.toml"))
    assert config_toml(again) == config_toml(config)
    assert again.job == config.job


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("/models/qwen2-7b-instruct", "qwen2-7b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("~/models/deepseek-llm-7b-chat", "deepseek-llm-7b"),
        ("Qwen/Qwen2.5-Math-7B", "qwen2.5-math-7b"),
        ("~/.cache/hub/models--Qwen--Qwen2.5-1.5B/snapshots/989aa7980e4cf806f80c7fef2b1adb7bc71aa306", "qwen2.5-1.5b"),
        ("ckpts/Qwen3_4B/global_step_100/actor/huggingface", "qwen3-4b"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", None),  # other bytes
        ("Qwen/Qwen2.5-VL-7B-Instruct", None),
        ("Qwen/Qwen2.5-77B", None),
        ("/exp/qwen2.5-7b/llama-13b", None),  # the last folder decides
        ("merge-of-qwen2.5-7b-and-qwen2-7b", None),  # two
        ("", None),
    ],
)
def test_models_by_path(path, name):
    assert match_model(path, model_names()) == name


BATCHES = (
    "data: {train_batch_size: 100}\ntrainer: {n_gpus_per_node: 8}\nactor_rollout_ref: {actor: {%s}, rollout: {n: %d}}"
)
LAUGHS = [f"{b}: &{b} {{x: *{a}, y: *{a}}}\n" for a, b in itertools.pairwise("abcdefghijklmnop")]  # 2^15 leaves
WRONG = {
    "not YAML": ("a: [", "verl.yaml:1: not valid YAML"),
    "another YAML": ("- {a: 1}\n- 2", "must be a YAML mapping, or a list of overrides"),
    "a number": ("17", "must be a YAML mapping"),
    "no verl": ("services: {web: {image: nginx}}", "has no settings of verl"),
    "empty": ("", "must be a YAML mapping"),
    "binary": ("data:\0", "is binary"),
    "deep": ("[" * 5000, "nested too deeply"),
    "itself": ("data: &a\n  b: *a", "50 levels"),
    "many": ("data: {" + ", ".join(f"k{i}: 1" for i in range(20_001)) + "}", "more than 20000 settings"),
    "a laughing file": ("a: &a {x: 1, y: 1}\n" + "".join(LAUGHS), "more than 20000 settings"),
    "wrong type": ("data: {train_batch_size: many}", "data.train_batch_size='many' must be a whole number"),
    "a list": ("data: {train_batch_size: [1, 2]}", "data.train_batch_size=[1, 2] must be a whole number"),
    "a flag": ("trainer: {nnodes: true}", "trainer.nnodes=true must be a whole number"),
    "no flag": (
        "actor_rollout_ref: {rollout: {enforce_eager: 1}}",
        "actor_rollout_ref.rollout.enforce_eager=1 must be true or false",
    ),
    "out of range": (
        "data: {train_batch_size: 0}",
        "job.prompts_per_step=0 must be a whole number of at least 1 and at most 1000000 (data.train_batch_size in",
    ),
    "unknown model": (
        "actor_rollout_ref: {model: {path: Qwen/Qwen2.5-9B}}", "model 'Qwen2.5-9B' is unknown; did you mean",
    ),
    "over the data set": (
        "data: {train_batch_size: 8192}", "must be at most dataset_prompts=7473 (data.train_batch_size in",
    ),
    "batch on GPUs": (BATCHES % ("ppo_mini_batch_size: 50", 1), "must be a multiple of the 8 GPUs"),
    "mini-batch": (BATCHES % ("ppo_mini_batch_size: 200", 2), "must be at most data.train_batch_size=100"),
    "micro-batch": (
        BATCHES % ("ppo_mini_batch_size: 40, ppo_micro_batch_size_per_gpu: 3", 2), "must divide the 10 responses of a",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_told_in_a_line(tmp_path, text, message, capsys):
    path = write(tmp_path, text)
    assert main(["run", "--from-verl", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "verl.yaml" in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_names_verls_key(tmp_path):
    with pytest.raises(ConfigError, match=r"\(actor_rollout_ref\.model\.path in .*verl\.yaml\)$"):
        load_verl_config(write(tmp_path, "actor_rollout_ref: {model: {path: Qwen/Qwen2.5-9B}}"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.yaml", None, "does not exist"),
        ("big.yaml", b"#" * (4 * 1024 * 1024 + 1), "has more than 4194304 bytes"),
        ("bytes.yaml", b"\xff\xfe\x00", "is not UTF-8"),
        ("quote.sh", b"python main.py data.train_batch_size='1", "not a shell script"),
        ("other.sh", b"echo hello", "has no settings of verl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_verl_config(tmp_path / name)


def test_references_that_lead_nowhere_are_ignored_with_the_reason(tmp_path):
    text = """
data: {train_batch_size: "${oc.env:BATCH}", max_prompt_length: "${data.max_prompt_length}"}
actor_rollout_ref: {rollout: {n: "${a.b}", max_num_seqs: "${.like}", like: 64}}
"""
    found, listing = values(write(tmp_path, text))
    reasons = ignored(listing)
    assert reasons["data.train_batch_size"] == "it is resolved only when verl runs"
    assert reasons["data.max_prompt_length"] == "it refers to itself"
    assert reasons["actor_rollout_ref.rollout.n"] == "it refers to a.b, which the file does not have"
    assert found["engine.max_num_seqs"] == 64
    assert found["job.prompts_per_step"] == 1024


KEYS = sorted(
    {key for setting in SETTINGS for key in setting.verl}
    | {
        f"actor_rollout_ref.{key}"
        for key in (
            "model.path", "model.lora_rank", "model.lora.rank", "model.use_remove_padding", "actor.use_dynamic_bsz",
            "actor.ppo_micro_batch_size", "actor.ppo_micro_batch_size_per_gpu", "actor.ulysses_sequence_parallel_size",
            "actor.use_kl_loss", "actor.fsdp_config.offload_policy", "actor.megatron.tensor_model_parallel_size",
        )
    }
    | {
        "algorithm.adv_estimator", "critic.enable", "reward_model.enable", "reward_model.model.path", "data.x.y",
        "trainer.n_gpus_per_node", "trainer.total_epochs", "trainer.total_training_steps", "data.train_max_samples",
    }
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.integers(-2, 2**70),
    st.sampled_from(["gae", "megatron", "${data.x.y}", "${.n}", "???", "1e-1", "$X", "Qwen/Qwen2.5-7B"]),
)  # fmt: skip
SETTINGS_OF_ANY_KIND = st.dictionaries(
    st.one_of(st.sampled_from(KEYS), st.text(max_size=5)),
    st.one_of(SCALARS, st.integers(1, 64), st.lists(SCALARS)),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(tree=SETTINGS_OF_ANY_KIND, as_script=st.booleans())
@example(tree={"data.x.y": float("nan"), "trainer.nnodes": 1}, as_script=False)
@example(tree={"trainer.n_gpus_per_node": 10**400}, as_script=False)
def test_no_settings_whatever_give_a_traceback(tmp_path_factory, tree, as_script):
    folder = tmp_path_factory.mktemp("fuzz")
    if as_script:
        path = folder / "run.sh"
        text = " ".join(f"{key}={value}" for key, value in tree.items())
    else:
        path = folder / "verl.yaml"
        text = yaml.safe_dump(tree, allow_unicode=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        _, listing = load_verl_config(path)
    except ConfigError:
        return
    listing.write(folder)
    json.loads((folder / "from_verl.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert listing.table().row_count


def test_a_run_prints_and_keeps_the_listing_and_repeats_without_verl(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    small = ["--set", "job.model=qwen2.5-0.5b", "--set", "job.dataset_prompts=16", "--steps", "2"]
    text = "data: {train_batch_size: 8, max_response_length: 128}\nactor_rollout_ref: {rollout: {n: 2}}"
    file = str(write(tmp_path, text))
    assert main(["run", "--from-verl", file, *small, "--output", "one"]) == 0
    shown = capsys.readouterr().err
    assert all(
        word in shown for word in ("taken", "defaulted", "data.train_batch_size=8", "rollout.n=2", "g6e.48xlarge")
    )
    lines = json.loads(Path("one/from_verl.json").read_text(encoding="utf-8"))["lines"]
    assert {"status": "taken", "simrl": "job.prompts_per_step", "value": 8, "verl": ["data.train_batch_size"],
            "given": [8], "note": ""} in lines  # fmt: skip
    assert main(["run", "--config", "one/config.toml", "--output", "two"]) == 0
    one, two = (json.loads(Path(run, "summary.json").read_text(encoding="utf-8")) for run in ("one", "two"))
    assert {k: v for k, v in one.items() if "wall" not in k} == {k: v for k, v in two.items() if "wall" not in k}
    capsys.readouterr()
    compare = ["compare", "--policies", "verl,rlhfuse", "--from-verl", file, *small, "--output", "three", "--json"]
    assert main(compare) == 0
    assert Path("three/from_verl.json").exists()
    assert "taken" not in capsys.readouterr().err
