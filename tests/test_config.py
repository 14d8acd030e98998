"""Configuration: who overrides whom, every error in one line with its origin, and the way to TOML and back."""

import re
import tomllib

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from simrl.experiments import toml_text
from simrl.experiments.config import (
    Config,
    ConfigError,
    config_toml,
    full_policy_params,
    load_config,
    preset_names,
)
from simrl.traces.lengths import prompts_of_step


class Tuned:
    """A policy with a parameter that has an alias, a bound, and one without a default."""

    class Params(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
        lambda_: float = Field(0.5, ge=0, le=1, alias="lambda")
        sizes: tuple[int, ...] = (1, 2)

    def __init__(self, params=None):
        self.params = params

    def decide(self, observation):
        return ()


class Plain:
    """A policy without parameters."""

    def decide(self, observation):
        return ()


class Demanding(Plain):
    """A policy with a parameter that must be given."""

    class Params(BaseModel):
        size: int


TUNED, PLAIN, DEMANDING = (f"{__name__}:{name}" for name in ("Tuned", "Plain", "Demanding"))


def refused(**options):
    """The message; always one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(**options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def toml_file(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --- who overrides whom ---


def test_the_default_preset_is_the_main_job():
    config = load_config()
    job = config.job
    assert (config.preset, config.policy, config.seed) == ("g6e", "verl", 0)
    assert (job.prompts_per_step, job.responses_per_prompt, job.steps, job.model) == (1024, 4, 45, "qwen2.5-7b")
    assert (config.cluster.node_type, config.cluster.nodes) == ("g6e.48xlarge", 2)


def test_each_layer_overrides_those_before(toml_file):
    file = toml_file("seed = 1\n[job]\nsteps = 2\n[cluster]\nnodes = 2\nnode_type = 'p5.48xlarge'\n")
    in_file = load_config(config=file)
    assert (in_file.seed, in_file.job.steps, in_file.cluster.nodes) == (1, 2, 2)
    assert in_file.job.prompts_per_step == 1024, "the preset holds where the file is silent"
    by_set = load_config(config=file, sets=["cluster.nodes=3", "job.steps=3"])
    assert (by_set.seed, by_set.job.steps, by_set.cluster.nodes) == (1, 3, 3)
    by_flag = load_config(config=file, sets=["cluster.nodes=3", "job.steps=3"], nodes=4, steps=5, seed=6)
    assert (by_flag.seed, by_flag.job.steps, by_flag.cluster.nodes) == (6, 5, 4)
    assert by_flag.cluster.node_type == "p5.48xlarge"


def test_the_last_set_of_a_key_wins():
    assert load_config(sets=["job.steps=3", "job.steps=4"]).job.steps == 4


def test_a_file_can_name_its_preset_and_the_flag_overrides_it(toml_file):
    file = toml_file("preset = 'paper-simulated'\n")
    assert load_config(config=file).job.model == "llama-2-70b"
    assert load_config(config=file, preset="paper-physical").job.model == "qwen2.5-3b"


def test_set_values_are_toml_else_texts():
    sets = ["job.model=qwen2.5-3b", "engine.prefix_caching=false", "engine.calibration=2"]
    config = load_config(sets=[*sets, 'billing.price="modal-l40s"'])
    assert config.job.model == "qwen2.5-3b"
    assert config.engine.prefix_caching is False
    assert config.engine.calibration == 2.0
    assert config.billing.price == "modal-l40s"


@pytest.mark.parametrize("key", ['node."g6e.48xlarge".nic_bytes_per_s', "node.g6e.48xlarge.nic_bytes_per_s"])
def test_parameters_of_the_table_can_be_set(key):
    assert load_config(sets=[f"cluster.parameters.{key}=1e9"]).cluster.parameters


def test_policy_parameters_have_their_section():
    config = load_config(policy=TUNED, sets=["policy.lambda=0.25", "policy.sizes=[3]"])
    assert config.policy_params == {"lambda": 0.25, "sizes": [3]}


def test_a_file_names_policy_and_parameters(toml_file):
    config = load_config(config=toml_file(f"[policy]\nname = '{TUNED}'\nlambda = 1\n"))
    assert (config.policy, config.policy_params) == (TUNED, {"lambda": 1})


def test_a_files_parameters_belong_to_the_policy_that_it_names(toml_file):
    file = toml_file(f"[policy]\nname = '{TUNED}'\nlambda = 1\n")
    assert load_config(config=file, policy="verl").policy_params == {}
    assert "policy.lambda is unknown" in refused(config=toml_file("[policy]\nlambda = 1\n"), policy="verl")


def test_policies_of_a_comparison_share_parameters():
    config = load_config(policies=["verl", TUNED], sets=["policy.lambda=0.2", "policy.dispatch=chunks"])
    assert config.policy_params == {"lambda": 0.2, "dispatch": "chunks"}
    assert "policy.lambda=2 must be" in refused(policies=["verl", TUNED], sets=["policy.lambda=2"])
    assert "policy.lambd is unknown" in refused(policies=["verl", TUNED], sets=["policy.lambd=2"])


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes=0 must be at least 1 and at most 10000 (--nodes)"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        (
            {"sets": ["job.steps=abc"]},
            "job.steps='abc' must be a whole number of at least 1 and at most 1000000 (--set job.steps=abc)",
        ),
        (
            {"sets": ["job.steps=true"]},
            "job.steps=true must be a whole number of at least 1 and at most 1000000 (--set job.steps=true)",
        ),
        (
            {"sets": ["job.steps=1.5"]},
            "job.steps=1.5 must be a whole number of at least 1 and at most 1000000 (--set job.steps=1.5)",
        ),
        ({"sets": ["engine.overhead_s=nan"]}, "engine.overhead_s=nan must be a number of at least 0"),
        (
            {"sets": ["engine.gpu_memory_utilization=2"]},
            "engine.gpu_memory_utilization=2 must be a number above 0 and at most 1",
        ),
        ({"sets": ["job.algorithm=dpo"]}, "job.algorithm='dpo' must be one of 'grpo', 'ppo'"),
        ({"sets": ["job.learner_offload=1"]}, "job.learner_offload=1 must be true or false"),
        ({"sets": ["job=3"]}, "job=3 must be a table (--set job=3)"),
        ({"sets": ["cluster.parameters=3"]}, "cluster.parameters=3 must be a table"),
        ({"sets": ["job.steps.x=3"]}, "job.steps.x is unknown; did you mean 'job.steps'? (--set job.steps.x=3)"),
        ({"sets": ["job.step=3"]}, "job.step is unknown; did you mean 'job.steps'? (--set job.step=3)"),
        ({"sets": ["nodes=3"]}, "nodes is unknown; did you mean 'cluster.nodes'? (--set nodes=3)"),
        ({"sets": ["zzz.qqq=3"]}, "zzz.qqq is unknown; known: job, cluster, engine, billing, faults, policy"),
        ({"sets": ["steps"]}, "--set steps: must have the form section.key=value"),
        ({"sets": ["a b=1"]}, "--set a b=1: 'a b' is not a key"),
        ({"policy": "rlhfles"}, "policy 'rlhfles' is unknown; did you mean 'rlhfless'?"),
        ({"policy": "ver"}, "policy 'ver' is unknown; did you mean 'verl'?"),
        ({"policy": "no.such:Thing"}, "there is no module 'no'"),
        ({"preset": "g6"}, "preset='g6' is unknown; did you mean 'g6e'?; known: g6e, paper-physical"),
        ({"sets": ["preset=3"]}, "preset=3 must be a text (--set preset=3)"),
        ({"sets": ["policy.name=3"]}, "policy.name=3 must be a text (--set policy.name=3)"),
        ({"sets": ["policy.dispach=x"]}, "policy.dispach is unknown; did you mean 'policy.dispatch'?"),
        ({"sets": ["policy.dispatch=x"]}, "policy.dispatch='x' must be one of 'chunks', 'least_loaded' (--set"),
        (
            {"policy": TUNED, "sets": ["policy.lambda=2"]},
            "policy.lambda=2 must be a number of at least 0 and at most 1",
        ),
        ({"policy": PLAIN, "sets": ["policy.x=2"]}, "policy.x is unknown; the policy has no parameters"),
        ({"policy": DEMANDING}, "policy.size is missing, and has no default"),
        ({"sets": ["job.model=qwen2.5-8b"]}, "model 'qwen2.5-8b' is unknown; did you mean 'qwen2.5-7b'?"),
        ({"sets": ["job.workload=gsm9k"]}, "unknown workload 'gsm9k'; did you mean 'gsm8k'?"),
        ({"sets": ["cluster.node_type=g7"]}, "cluster.node_type='g7' is unknown"),
        ({"sets": ["engine.preset=vllm"]}, "engine.preset='vllm' is unknown"),
        ({"sets": ["billing.price=modal"]}, "billing.price='modal' is unknown"),
        (
            {"sets": ["cluster.parameters.gpu.l40s.learn_mf=1"]},
            "cluster.parameters.gpu.l40s.learn_mf is unknown; did you mean 'gpu.l40s.learn_mfu'? (--set",
        ),
        (
            {"sets": ["job.prompts_per_step=9000"]},
            "prompts_per_step=9000 must be at most dataset_prompts=7473 (--set job.prompts_per_step=9000)",
        ),
        (
            {"sets": ["engine.tensor_parallel=3"]},
            "engine.tensor_parallel=3 must divide the 8 GPUs of a g6e.48xlarge (--set engine.tensor_parallel=3)",
        ),
        (
            {"sets": ["engine.max_num_batched_tokens=512"]},
            "engine.max_num_batched_tokens=512 must be at least engine.max_num_seqs=1024"
            " (--set engine.max_num_batched_tokens=512)",
        ),
        (
            {"preset": "paper-simulated", "sets": ["job.max_response_tokens=4000"]},
            "must be at most 4096, the context of llama-2-70b (--set job.max_response_tokens=4000)",
        ),
    ],
)
def test_errors_say_what_was_given_what_is_allowed_and_where(options, message):
    assert message in refused(**options)


def test_unknown_keys_of_a_file_come_with_their_line(toml_file):
    file = toml_file("# a comment\n\n[job]\nsteps = 2\nstps = 3\n")
    assert refused(config=file) == f"job.stps is unknown; did you mean 'job.steps'? ({file}:5)"


def test_wrong_values_of_a_file_come_with_their_line(toml_file):
    file = toml_file('[cluster]\nnodes = 2\n[job] # steps = 1\nmodel = "qwen2.5-3b"\nsteps = 0\n')
    assert refused(config=file) == f"job.steps=0 must be a whole number of at least 1 and at most 1000000 ({file}:5)"


def test_malformed_toml_comes_with_its_line(toml_file):
    file = toml_file("[job]\nsteps = 2\nmodel = = 3\n")
    assert refused(config=file).startswith(f"{file}:3: not valid TOML: ")
    file = toml_file("[job]\nsteps = [1,\n")
    assert re.match(rf"{re.escape(str(file))}:\d: not valid TOML: ", refused(config=file))


def test_files_that_cannot_be_read(tmp_path):
    assert refused(config=tmp_path / "no.toml").endswith("no.toml' does not exist (--config)")
    assert refused(config=tmp_path).endswith("is not a file (--config)")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not TOML: it is not UTF-8 text (--config)" in refused(config=binary)


# --- Config ---


def test_configurations_do_not_change():
    config = load_config()
    with pytest.raises(ValidationError):
        config.seed = 3
    assert config.with_seed(3).seed == 3
    assert config.seed == 0


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError):
        Config(nodes=3)


def test_values_can_be_set_by_path():
    config = load_config(policy=TUNED, sets=["policy.lambda=0.1", "engine.calibration=1.5"])
    other = config.with_values({"cluster.nodes": 7, "policy.lambda": 0.9})
    assert (other.cluster.nodes, other.policy_params) == (7, {"lambda": 0.9})
    assert (other.policy, other.engine.calibration) == (TUNED, 1.5)
    with pytest.raises(ConfigError, match=r"cluster\.nodes=0 must be a whole number of at least 1 and at most 10000"):
        config.with_values({"cluster.nodes": 0})


@pytest.mark.parametrize("preset", preset_names())
def test_presets_resolve_and_begin_with_a_comment(preset):
    from simrl.experiments.config import preset_text

    config = load_config(preset=preset)
    assert config.preset == preset
    assert preset_text(preset).startswith("# ")
    last_epoch, _ = prompts_of_step(0, config.job.steps - 1, config.job.prompts_per_step, config.job.dataset_prompts)
    assert last_epoch >= 2, "length history starts with the second epoch, so presets run three at least"


@pytest.mark.parametrize("preset", preset_names())
def test_every_choice_of_a_preset_has_its_reason(preset):
    from simrl.experiments.config import preset_text

    for line in preset_text(preset).splitlines():
        if "=" in line and not line.startswith("#"):
            assert "#" in line, line


def test_toml_text_comes_back_to_the_same_configuration(toml_file):
    sets = ['cluster.parameters.node."g6e.48xlarge".nic_bytes_per_s=1e9', "policy.sizes=[4, 5]", "engine.calibration=2"]
    config = load_config(preset="paper-physical", policy=TUNED, seed=2**70, sets=sets)
    back = load_config(config=toml_file(config_toml(config)))
    assert full_policy_params(config) == {"lambda": 0.5, "sizes": [4, 5]}
    assert back == config.model_copy(update={"policy_params": full_policy_params(config)})


def test_config_toml_holds_every_value(toml_file):
    tree = tomllib.loads(config_toml(load_config(nodes=20)))
    assert tree["policy"] == {"name": "verl", "dispatch": "chunks"}
    assert tree["cluster"]["nodes"] == 20
    assert tree["job"]["max_staleness"] == 0, "defaults too"


# --- TOML text ---


@pytest.mark.parametrize(
    "tree",
    [
        {"a": 1, "b": 1e300, "c": 1e-7, "d": True, "e": "", "t": {}},
        {"t": {"text": 'quote " back \\ new\nline tab\t \x7f \x01 é 😀', "list": [1, [2.5, "x"], []]}},
        {"t": {"deep": {"a.b": {"c d": False}}, "é": 3}},
        {"x": float("inf"), "y": -0.0},
    ],
)
def test_written_toml_reads_back(tree):
    assert tomllib.loads(toml_text.write_toml(tree)) == tree


def test_none_is_left_out():
    assert tomllib.loads(toml_text.write_toml({"a": None, "t": {"b": None, "c": 1}})) == {"t": {"c": 1}}


def test_lines_of_keys():
    text = '# top\nseed = 1\n[job]  # a table\nsteps = 2\n\n[cluster.parameters]\ngpu.l40s = { x = 1 }\n"a.b" = 2\n'
    assert toml_text.line_of(text, ("seed",)) == 2
    assert toml_text.line_of(text, ("job", "steps")) == 4
    assert toml_text.line_of(text, ("cluster", "parameters", "gpu", "l40s", "x")) == 7
    assert toml_text.line_of(text, ("cluster", "parameters", "a.b")) == 8
    assert toml_text.line_of(text, ("engine", "preset")) is None
    assert toml_text.line_of("[a.b]\nc = 1\n[a]\nd = 2\n", ("a", "b", "c")) == 2, "the deepest holds"


def test_values_of_options():
    given = ["3", "0.5", "true", "[1, 2]", '"3"', "rlhfless", "", "1\nx = 2"]
    assert [toml_text.parse_value(text) for text in given] == [3, 0.5, True, [1, 2], "3", "rlhfless", "", "1\nx = 2"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["job.micro_batch_tokens=0"], "job.micro_batch_tokens=0 must be a whole number of at least 1"),
        (["job.learner_strategy=zero"], "job.learner_strategy='zero' must be one of 'fsdp', 'megatron'"),
        (["job.learner_tensor_parallel=2"], "learner_tensor_parallel=2 must be 1 with learner_strategy='fsdp'"),
        (
            ["job.learner_strategy=megatron", "job.learner_tensor_parallel=3"],
            "job.learner_tensor_parallel=3 must divide the 8 GPUs of a g6e.48xlarge",
        ),
        (
            ["job.learner_strategy=megatron", "job.lora_rank=8"],
            "lora_rank=8 must be 0 with learner_strategy='megatron'",
        ),
        (["job.reward_model=qwen2.5-3b"], "reward_model='qwen2.5-3b' must be left out with reward='rule'"),
        (["job.reward=model", "job.reward_model=qwen"], "model 'qwen' is unknown; did you mean 'qwen"),
    ],
)
def test_a_learner_that_cannot_be_is_refused_with_its_origin(sets, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(sets=sets)
    assert f"--set {sets[-1]}" in str(caught.value)
    assert "\n" not in str(caught.value)
