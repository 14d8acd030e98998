"""Does the real engine work here? `python -m simrl.real_backend.engine_check`.

Builds a tiny Qwen2 model of seeded random weights in a temporary folder, loads it into a vLLM engine and steps that
engine until a few responses of forced lengths are complete. `make real` ends with it; the backend that runs policies on
such engines is not written yet.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TINY_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "float32", "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (5, 12, 31, 32)  # tokens that each response is made to have
PROMPT_TOKENS = 40


def main() -> int:
    """Run the check; 0 when every response has the length that it was made to have."""
    # Set before vLLM is imported, which reads them once. One process, no hub, no usage reports, no thread pinning.
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(TINY_QWEN2), encoding="utf-8")
        engine = make_engine(folder)
        ready_s = time.perf_counter() - started_s
        lengths, iterations = generate(engine)
    import vllm

    print(f"vLLM {vllm.__version__}: ready in {ready_s:.1f} s; response lengths {lengths} in {iterations} iterations")
    if lengths != list(LENGTHS) or iterations != max(LENGTHS):
        print(f"expected {list(LENGTHS)}, batched into {max(LENGTHS)} iterations", file=sys.stderr)
        return 1
    return 0


def make_engine(folder: str) -> Any:
    """A vLLM engine in this process, with random weights."""
    from vllm import EngineArgs, LLMEngine

    arguments = EngineArgs(
        model=folder,
        load_format="dummy",
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        seed=0,
    )
    return LLMEngine.from_engine_args(arguments)


def generate(engine: Any) -> tuple[list[int], int]:
    """Tokens of each response, and the engine's iterations: as many as the longest has tokens, if all run together."""
    from vllm import SamplingParams

    for index, tokens in enumerate(LENGTHS):
        sampling = SamplingParams(
            min_tokens=tokens, max_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False
        )
        prompt = {"prompt_token_ids": [3 + (index + i) % 1000 for i in range(PROMPT_TOKENS)]}
        engine.add_request(str(index), prompt, sampling)
    lengths = [0] * len(LENGTHS)
    iterations = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                lengths[int(output.request_id)] = len(output.outputs[0].token_ids)
        iterations += 1
    return lengths, iterations


if __name__ == "__main__":
    sys.exit(main())
