"""A model of seeded random weights, small enough for a CPU, in the files that real engines and learners read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LEARNS = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 256, "initializer_range": 0.05,
}  # fmt: skip
"""Changes that make a model of 0.3 million parameters which learns `rewards.ResidueTask` within a dozen steps."""

CONFIG = Path(__file__).with_name("data") / "tiny_qwen2.json"


def write_tiny_model(folder: str | Path, seed: int, **changes: Any) -> Path:
    """Write a Qwen2 model of 3.4 million float32 parameters in Hugging Face's format.

    Its weights are drawn ten times wider than usual (`initializer_range` 0.2), so that greedy decoding makes many
    different tokens: a test that compares tokens could not fail on a model that repeats one.

    Args:
        folder: Where to write `config.json` and `model.safetensors`; made if it is not there.
        seed: Of the weights. The same seed gives the same weights on one version of torch.
        changes: Entries of the configuration to have otherwise. A model that is to learn wants a narrower
            `initializer_range`: see `LEARNS`.

    Returns:
        The folder.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Qwen2Config.from_dict(json.loads(CONFIG.read_text(encoding="utf-8")) | changes)
        model = Qwen2ForCausalLM(config)
    model.to(torch.float32).save_pretrained(folder)
    return folder
