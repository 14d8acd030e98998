"""A user's own GPUs, nodes, models, prices and engines: what a file adds, and what every mistake is told."""

import re
from pathlib import Path

import pytest

from simrl.experiments.config import ConfigError, config_toml, load_config
from simrl.experiments.hardware_file import read_hardware
from simrl.experiments.run import run
from simrl.traces.parameters import shipped_parameters

GPU = {
    "memory_bytes": '{ value = 192e9, unit = "B", status = "derived", source = "data sheet" }',
    "peak_flops": '{ value = 2250e12, unit = "FLOP/s", status = "derived", source = "data sheet" }',
    "memory_bytes_per_s": '{ value = 8e12, unit = "B/s", status = "derived", source = "data sheet" }',
    "link_bytes_per_s": '{ value = 900e9, unit = "B/s", status = "derived", source = "data sheet" }',
    "learn_mfu": '{ value = 0.3, unit = "1", status = "assumed", low = 0.2, high = 0.5, source = "a guess" }',
    "forward_mfu": '{ value = 0.4, unit = "1", source = "a guess" }',
}
NODE = {
    "gpu": '{ value = "b200", unit = "name", status = "measured", source = "mine" }',
    "gpus": '{ value = 4, unit = "GPU", status = "measured", source = "mine" }',
    "host_memory_bytes": '{ value = 2e12, unit = "B", status = "measured", source = "mine" }',
    "nic_bytes_per_s": '{ value = 400e9, unit = "B/s", status = "measured", source = "mine" }',
    "host_bytes_per_s": '{ value = 50e9, unit = "B/s", source = "mine" }',
    "price": '{ value = "mine", unit = "name", status = "measured", source = "mine" }',
}
MODEL = {
    "layers": "16", "hidden": "2048", "heads": "32", "kv_heads": "8", "head_dim": "64", "intermediate": "8192",
    "vocab": "128256", "tied_embeddings": "true", "qkv_bias": "false", "max_context": "131072",
    "source": '"config.json of mine"',
}  # fmt: skip


def copied(section, name):
    """The text of a shipped entry, to be one of the user's."""
    rows = {
        key.rpartition(".")[2]: p for key, p in shipped_parameters().items() if key.startswith(f"{section}.{name}.")
    }
    return {
        field: f'{{ value = {str(p.value).lower() if isinstance(p.value, bool) else repr(p.value)}, unit = "{p.unit}",'
        f' status = "measured", source = "mine" }}'
        for field, p in rows.items()
    }


def text_of(**sections):
    tables = {"gpu.b200": GPU, 'node."my.node"': NODE, "price.mine": copied("price", "modal-h100")}
    tables |= {'model."My-1B"': MODEL, "engine.mine": copied("engine", "vllm-current")}
    for name, fields in sections.items():
        (header,) = (header for header in tables if header.startswith(f"{name}."))
        tables[header] = {key: value for key, value in {**tables[header], **fields}.items() if value is not None}
    return "\n".join(
        f"[{header}]\n" + "".join(f"{key} = {value}\n" for key, value in fields.items())
        for header, fields in tables.items()
    )


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def small(path, **options):
    sets = [
        f"cluster.hardware={path}", 'cluster.node_type="my.node"', "job.model=My-1B", "engine.preset=mine",
        "job.prompts_per_step=8", "job.dataset_prompts=8", "job.max_response_tokens=64",
    ]  # fmt: skip
    return load_config(nodes=1, steps=1, sets=sets, **options)


def test_a_run_on_own_hardware_lists_every_number_with_its_source(write):
    result = run(small(write(text_of())))
    used = {parameter.key: parameter for parameter in result.parameters}
    assert (result.summary["gpus"], result.summary["steps"]) == (4, 1)
    guess = used["gpu.b200.forward_mfu"]
    assert (guess.value, guess.status, guess.low, guess.high, guess.source) == (0.4, "assumed", 0.4, 0.4, "a guess")
    assert (used["gpu.b200.learn_mfu"].low, used["gpu.b200.learn_mfu"].high) == (0.2, 0.5)
    assert used["node.my.node.gpus"].value == 4
    assert used["model.my-1b.parameters"].source == "config.json of mine"
    assert used["price.mine.usd_per_hour"].value == shipped_parameters()["price.modal-h100.usd_per_hour"].value
    assert used["engine.mine.calibration"].status == "measured"
    assert result.warnings == ("no measured iteration times of My-1B on 2 x b200: a roofline stands in",)


def test_own_entries_can_be_overridden_and_the_run_repeated_from_elsewhere(write, tmp_path, monkeypatch):
    path = write(text_of())
    monkeypatch.chdir(tmp_path)
    config = small("my.toml")
    assert config.cluster.hardware == str(path.resolve())
    (tmp_path / "run.toml").write_text(config_toml(config), encoding="utf-8")
    monkeypatch.chdir("/")
    assert load_config(config=tmp_path / "run.toml") == config.model_copy(
        update={"policy_params": {"dispatch": "chunks"}}
    )
    faster = config.with_values({"cluster.parameters.gpu.b200.memory_bytes_per_s": 80e12})
    assert run(faster).summary["generation_s"] < run(config).summary["generation_s"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (text_of(gpu={"learn_mfu": None, "peak_flops": None}), ":1: gpu.b200 lacks peak_flops (FLOP/s), learn_mfu (1)"),
        (text_of(gpu={"peak_flops": "2e15"}), ":3: gpu.b200.peak_flops=2000000000000000.0 must be a table with value,"),
        (
            text_of(gpu={"peak_flops": "{ value = 2e15 }"}),
            ":3: gpu.b200.peak_flops lacks unit and source; the form is { value",
        ),
        (
            text_of(gpu={"peak_flops": '{ value = 2e15, unit = "TFLOP/s", source = "x" }'}),
            ":3: gpu.b200.peak_flops.unit='TFLOP/s' must be 'FLOP/s'",
        ),
        (
            text_of(gpu={"peak_flops": '{ value = "fast", unit = "FLOP/s", source = "x" }'}),
            "peak_flops.value='fast' must be a number (FLOP/s)",
        ),
        (
            text_of(gpu={"peak_flops": '{ value = 0, unit = "FLOP/s", source = "x" }'}),
            "peak_flops=0 must be above 0 (FLOP/s)",
        ),
        (
            text_of(gpu={"learn_mfu": '{ value = 1.2, unit = "1", source = "x" }'}),
            "learn_mfu=1.2 must be at most 1: it is a share",
        ),
        (
            text_of(gpu={"learn_mfu": '{ value = 0.2, unit = "1", source = "x", low = 0.3 }'}),
            "low=0.3 and high=0.2 must be numbers around the value 0.2",
        ),
        (
            text_of(gpu={"learn_mfu": '{ value = 0.2, unit = "1", source = "x", status = "sure" }'}),
            "learn_mfu.status='sure' is unknown",
        ),
        (
            text_of(gpu={"learn_mfu": '{ value = 0.2, unit = "1", source = "x", status = "measured", low = 0.1 }'}),
            "learn_mfu: low and high belong to assumed numbers",
        ),
        (
            text_of(gpu={"learn_mfu": '{ value = 0.2, unit = "1", sauce = "x" }'}),
            "learn_mfu.sauce is unknown; did you mean 'source'?",
        ),
        (
            text_of(gpu={"learn_mfo": '{ value = 0.2, unit = "1", source = "x" }'}),
            ":8: field of gpu.b200='learn_mfo' is unknown; did you mean 'learn_mfu'?",
        ),
        (
            text_of(node={"gpu": '{ value = "b20", unit = "name", source = "x" }'}),
            ":10: node.my.node.gpu='b20' is unknown; did you mean 'b200'?",
        ),
        (
            text_of(node={"price": '{ value = "free", unit = "name", source = "x" }'}),
            "node.my.node.price='free' is unknown; known: aws-g6e.48xlarge",
        ),
        (text_of(model={"layers": None}), "model.My-1B lacks layers; they are in the model's config.json"),
        (text_of(model={"layers": "16.0"}), "model.My-1B.layers=16.0 must be a whole number of at least 1"),
        (text_of(model={"qkv_bias": '"no"'}), "model.My-1B.qkv_bias='no' must be true or false"),
        (text_of(model={"source": '""'}), "model.My-1B.source='' must be a text"),
        (text_of(model={"kv_heads": "5"}), "model.My-1B.kv_heads=5 must divide heads=32"),
        (text_of(model={"layer": "5"}), "field of model.My-1B='layer' is unknown; did you mean 'layers'?"),
        ("[gpu.l40s]\n", ":1: gpu.l40s is shipped: give yours another name, or override its entries"),
        ('[model."Qwen2.5-7B"]\n', ":1: model.Qwen2.5-7B is shipped: give yours another name"),
        ("[gpus.b200]\n", "section='gpus' is unknown; did you mean 'gpu'?; known: gpu, node, model, price, engine"),
        ("gpu = 3\n", ":1: gpu=3 must be a table"),
        ("[gpu]\nb200 = 3\n", ":2: gpu.b200=3 must be a table"),
        ("[gpu.b200\n", "not valid TOML"),
    ],
)
def test_mistakes_are_told_with_file_line_and_what_is_allowed(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(sets=[f"cluster.hardware={path}"])
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert f"(--set cluster.hardware={path})" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match=r"cluster.hardware='no.toml' cannot be read: No such file or directory"):
        load_config(sets=["cluster.hardware=no.toml"])


def test_no_file_adds_nothing():
    assert read_hardware(None).parameters == {}


def test_a_plain_value_is_refused_though_all_else_is_right(write):
    assert len(read_hardware(str(write(text_of()))).models) == 1, "the text that the cases above change is right"


def test_the_example_of_the_documentation_runs(write):
    page = (Path(__file__).parents[1] / "docs" / "hardware.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    sets = [
        f"cluster.hardware={write(example)}", "cluster.node_type=my-node", "job.model=My-1B",
        "job.prompts_per_step=8", "job.dataset_prompts=8", "job.max_response_tokens=64",
    ]  # fmt: skip
    assert run(load_config(nodes=1, steps=1, sets=sets)).summary["steps"] == 1
