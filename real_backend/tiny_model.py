"""A model of seeded random weights, small enough for a CPU, in the files that real engines and learners read."""

from __future__ import annotations

from pathlib import Path

CONFIG = Path(__file__).with_name("data") / "tiny_qwen2.json"


def write_tiny_model(folder: str | Path, seed: int) -> Path:
    """Write a Qwen2 model of 3.4 million float32 parameters in Hugging Face's format.

    Its weights are drawn ten times wider than usual (`initializer_range` 0.2), so that greedy decoding makes many
    different tokens: a test that compares tokens could not fail on a model that repeats one.

    Args:
        folder: Where to write `config.json` and `model.safetensors`; made if it is not there.
        seed: Of the weights. The same seed gives the same weights on one version of torch.

    Returns:
        The folder.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(Qwen2Config.from_json_file(CONFIG))
    model.to(torch.float32).save_pretrained(folder)
    return folder
