"""Does the real engine work here? `python -m simrl.real_backend.engine_check`.

Builds a tiny Qwen2 model of seeded random weights in a temporary folder, loads it into a vLLM engine and steps that
engine until a few responses of forced lengths are complete. `make real` ends with it.
"""

from __future__ import annotations

import sys
import tempfile
import time

from simrl.real_backend.engine import EngineSettings, VllmEngine, Work
from simrl.real_backend.tiny_model import write_tiny_model

LENGTHS = (5, 12, 31, 32)  # tokens that each response is made to have
PROMPT_TOKENS = 40


def main() -> int:
    """Run the check; 0 when every response has the length that it was made to have."""
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_model(folder, seed=0))
        engine = VllmEngine(EngineSettings(model=model, num_kv_blocks=64, max_model_len=512))
        ready_s = time.perf_counter() - started_s
        lengths, iterations = generate(engine)
        engine.close()
    import vllm

    print(f"vLLM {vllm.__version__}: ready in {ready_s:.1f} s; response lengths {lengths} in {iterations} iterations")
    if lengths != list(LENGTHS) or iterations != max(LENGTHS):
        print(f"expected {list(LENGTHS)}, batched into {max(LENGTHS)} iterations", file=sys.stderr)
        return 1
    return 0


def generate(engine: VllmEngine) -> tuple[list[int], int]:
    """Tokens of each response, and the engine's iterations: as many as the longest has tokens, if all run together."""
    for index, tokens in enumerate(LENGTHS):
        prompt = [3 + (index + i) % 1000 for i in range(PROMPT_TOKENS)]
        engine.add(Work(response_id=index, prompt_token_ids=prompt, forced_tokens=tokens))
    lengths = [0] * len(LENGTHS)
    iterations = 0
    while engine.unfinished():
        for finished in engine.step().finished:
            lengths[finished.response_id] = len(finished.token_ids)
        iterations += 1
    return lengths, iterations


if __name__ == "__main__":
    sys.exit(main())
