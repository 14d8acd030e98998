"""What the simulator's own cost model makes of a published step, and the few constants that are fitted to others.

Method and assumptions are in docs/records.md.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm

from simrl.experiments.record_file import STAGES, Record, by_log
from simrl.simulator.costs import Costs, NodeType
from simrl.simulator.engine import BLOCK_TOKENS, Engine, Request
from simrl.traces.job import Engine as EngineSpec
from simrl.traces.job import Job
from simrl.traces.models import Model, load_model, model_names
from simrl.traces.parameters import Parameters, shipped_parameters
from simrl.traces.streams import stream

# --- what is assumed where a record is silent; sources are in docs/records.md ---

PROMPT_TOKENS = 100  # the shipped verl log's prompts have 98-101, GSM8K's 84-104; assumed range 60-250
PROMPTS_PER_STEP, RESPONSES_PER_PROMPT, GPUS = 1024, 5, 8  # verl's GSM8K and MATH example scripts
TENSOR_PARALLEL = 2  # verl's default rollout.tensor_model_parallel_size
LENGTH_SD = 0.65  # sd of ln length over a batch: 0.2-1.0 between prompts, 0.07-0.45 within; assumed range 0.35-1.1
MEAN_OF_CAP = 0.25  # mean / cap where both are known, caps 512-1024: 0.19-0.57
MEAN_TOKENS = 1000.0  # verl issue 3816: Qwen2.5-3B in verl's DAPO script, cap 20480
MEAN_TOKENS_THINKING = 7000.0  # the same issue: Qwen3-4B
MEAN_RANGE = (0.5, 2.5)  # held possible, as multiples of an assumed mean
THINKING = re.compile(r"qwen3|qwq|-r1|thinking|distill", re.IGNORECASE)
GRAPHS_SINCE_VLLM = (0, 10)  # vLLM of August 2025, when verl's default became CUDA graphs (verl pull request 2956)
GRAPHS_SINCE_DATE = "2025-09"
MINI_BATCHES = 4  # verl's GSM8K examples: 1024 prompts a step, 256 an update
LORA_RANK = 32  # where a record says LoRA without a rank: verl's example scripts
LORA_UNITS = 14  # A and B of a layer's seven linear maps: FSDP units of their own in verl (get_fsdp_wrap_policy)
MICRO_BATCH_TOKENS = 16384  # verl's default ppo_max_token_len_per_gpu
NODE_GPUS = 8  # most of an engine
MOST_UTILIZATION = 0.9  # vLLM's default, where verl's 0.6 leaves no room
MAX_PROMPT_TOKENS = 1024  # verl's GSM8K and MATH example scripts: 512 to 2048
POSITION_S = 0.12e-6  # s a padded position that verl's controller hands to workers; range 0.025e-6 to 0.6e-6
HIDDEN_BYTES, INTERMEDIATE_BYTES, KV_BYTES, VOCAB_BYTES = 126, 16, 28, 12
"""Bytes that a token's forward pass moves through GPU memory: by width of a layer, and by entry of the vocabulary.

Counted in transformers' eager Qwen2 in bf16: 36 a norm, 20 rotations, 34 other reads and writes of the hidden width.
"""

SAME_CHIP = {"a800": "a100"}  # but for its NVLink
LIMITS = {"host_s_per_layer": (1e-5, 2e-2), "efficiency": (1e-3, 1.0)}
"""Where constants are looked for."""
UNITS = {"host_s_per_layer": "s/layer", "startup_s": "s", "efficiency": "1", "adapter_s": "s"}
POOLED = "pooled"  # the class of a log whose own class has no other
STAGES_OF = {"host_s_per_layer": ("generation",), "efficiency": ("log_probs", "update")}
MEAN_FROM = ("log_probs", "update")  # stages whose time tells an unknown mean length: they grow with tokens alone
ROWS_A_LOG = 8  # of a long log, evenly spaced: enough to fit one constant


@dataclass(frozen=True)
class Constants:
    """What is fitted, or taken from the shipped fit.

    Attributes:
        host_s_per_layer: Host time of an engine iteration, s a layer: launches in eager mode, else overhead.
        startup_s: What generation takes before the engine starts: waking up and resharding.
        efficiency: Share of its peak that a GPU achieves in matrix products.
        adapter_s: What an FSDP unit of LoRA's adapters adds to a pass.
    """

    host_s_per_layer: float
    startup_s: float
    efficiency: float
    adapter_s: float


class CannotPredict(ValueError):
    """A record that lacks what nothing can stand for; the message is the reason."""


@dataclass(frozen=True)
class Setting:
    """A record in the simulator's terms.

    Attributes:
        record: The record.
        gpu: Its GPU in the parameter table.
        engine_class: vllm-eager, vllm-eager-lora, vllm-graphs or sglang.
        model: Name of the architecture.
        gpus: GPUs of the job.
        tensor_parallel: GPUs an engine.
        prompts: Prompts a step.
        samples: Responses a prompt.
        cap: Longest response allowed.
        mean: Mean response.
        longest: Longest response.
        prompt_tokens: Mean prompt.
        lora_rank: Of the learner's adapters; 0 = all weights learn.
        assumed: What the record does not say.
    """

    record: Record
    gpu: str
    engine_class: str
    model: str
    gpus: int
    tensor_parallel: int
    prompts: int
    samples: int
    cap: int
    mean: float
    longest: int
    prompt_tokens: float
    lora_rank: int
    assumed: tuple[str, ...] = ()

    @property
    def tokens(self) -> float:
        """Tokens of a step, prompts included."""
        return self.prompts * self.samples * (self.mean + self.prompt_tokens)

    @property
    def preset(self) -> str:
        """The engine preset that the class goes by."""
        return "vllm-0.8-eager" if self.eager else "vllm-current"

    @property
    def eager(self) -> bool:
        """Whether the engine launches kernel by kernel."""
        return self.engine_class.startswith("vllm-eager")

    @property
    def learner_parallel(self) -> int:
        """GPUs that share the sequences or layers of a data-parallel rank of the learner."""
        return self.record.count("learner_parallel") or 1


# --- from a record to a setting ---


def setting_of(record: Record) -> Setting:
    """What the record says, and documented assumptions for the rest.

    Raises:
        CannotPredict: Its GPU or its model is not named, or is none that the simulator has.
    """
    assumed: list[str] = []

    def known(column: str, otherwise: float) -> float:
        if column not in record.numbers:
            assumed.append(column)
        return record.numbers.get(column, otherwise)

    gpu, model = _gpu(record), _model(record, assumed)
    gpus = int(known("gpus", GPUS))
    prompts = int(known("prompts_per_step", PROMPTS_PER_STEP))
    samples = int(
        known("responses_per_prompt", 1 if record.texts["algorithm"].lower() == "ppo" else RESPONSES_PER_PROMPT)
    )
    cap, mean, longest = _lengths(record, prompts * samples, assumed)
    prompt_tokens = record.numbers.get("prompt_mean_tokens")
    if prompt_tokens is None:  # nearly always: not worth a mark
        prompt_tokens = min(PROMPT_TOKENS, record.numbers.get("max_prompt_tokens", PROMPT_TOKENS))
    engine_class = _engine_class(record.texts["engine"], record.texts["date"], assumed)
    tensor_parallel = _tensor_parallel(record.texts["engine"], gpus, assumed)
    lora = re.search(r"lora\D{0,6}(\d*)", record.texts["train_engine"].lower())
    lora_rank = int(lora[1] or LORA_RANK) if lora else 0
    if lora_rank and engine_class == "vllm-eager":
        engine_class = "vllm-eager-lora"  # adapters are kernels of their own: vLLM launches more a layer
    return Setting(
        record, gpu, engine_class, model, gpus, tensor_parallel, prompts, samples, cap, mean, longest,
        prompt_tokens, lora_rank, tuple(assumed),
    )  # fmt: skip


def _gpu(record: Record) -> str:
    """The GPU in the parameter table, by the part of its name that is one: "H100-class", "NVIDIA A100-SXM4-80GB"."""
    text, known = record.texts["gpu_type"], Parameters().names_in("gpu")
    if record.texts["gpu_type_known"].lower() == "no" or text.lower() in ("", "unnamed", "unknown"):
        raise CannotPredict("its GPUs are not named")
    words = [SAME_CHIP.get(word, word) for word in re.split(r"[^a-z0-9]+", text.lower())]
    for name in known:
        if any(re.fullmatch(rf"{name}(sxm\d?|pcie|nvl)?", word) for word in words):
            return name
    raise CannotPredict(f"gpu_type={text!r} is none that the simulator has data of: {', '.join(known)}")


def _model(record: Record, assumed: list[str]) -> str:
    """The architecture: the model's own, its base model's, or the nearest in size."""
    known = model_names()
    name = record.texts["model"].lower().rpartition("/")[2]
    for short in (name, re.sub(r"-(instruct|chat|it|base|hf)\b", "", name)):
        if short in known:
            return short
    active = re.search(r"-a(\d+(?:\.\d+)?)b\b", name)  # mixture of experts: what computes
    size = active or re.search(r"(?<![\d.])(\d+(?:\.\d+)?)b\b", name)
    if size is None:
        raise CannotPredict(f"model={record.texts['model']!r} is unknown, and its name tells no size")
    wanted = float(size[1]) * 1e9
    nearest = min(known, key=lambda other: abs(math.log(load_model(other).parameters / wanted)))
    assumed.append(f"architecture of {nearest}")
    return nearest


def _engine_class(text: str, date: str, assumed: list[str]) -> str:
    """Eager or CUDA graphs, where the record does not say by what was the default then."""
    lower = text.lower()
    if "sglang" in lower:
        return "sglang"
    if re.search(r"graph|eager\W*false|no.?eager", lower):
        return "vllm-graphs"
    if "eager" in lower:
        return "vllm-eager"
    assumed.append("eager or graphs")
    version = re.search(r"vllm\D{0,2}(\d+)\.(\d+)", lower)
    newer = (int(version[1]), int(version[2])) >= GRAPHS_SINCE_VLLM if version else date >= GRAPHS_SINCE_DATE
    return "vllm-graphs" if newer or "verl" not in lower else "vllm-eager"


def _tensor_parallel(text: str, gpus: int, assumed: list[str]) -> int:
    found = re.search(r"tp\W?(\d+)", text.lower())
    if found is None:
        assumed.append("tensor parallel")
    wanted = int(found[1]) if found else TENSOR_PARALLEL
    return next(size for size in range(min(wanted, gpus), 0, -1) if gpus % size == 0)


def _lengths(record: Record, responses: int, assumed: list[str]) -> tuple[int, float, int]:
    """Cap, mean and longest response; the longest of a lognormal batch where it is unknown."""
    mean, longest, cap = (
        record.numbers.get(c) for c in ("response_mean_tokens", "response_max_tokens", "max_response_tokens")
    )
    if mean is None:
        usual = MEAN_TOKENS_THINKING if THINKING.search(record.texts["model"]) else MEAN_TOKENS
        mean = min(usual, MEAN_OF_CAP * cap if cap else math.inf, longest or math.inf)
        assumed.append("response_mean_tokens")
    if longest is None:
        longest = max(mean, min(cap or math.inf, _expected_longest(mean, LENGTH_SD, responses)))
        assumed.append("response_max_tokens")
    if cap is None:
        cap = longest
        assumed.append("max_response_tokens")
    return round(cap), mean, max(round(longest), math.ceil(mean))


def with_mean(setting: Setting, factor: float) -> Setting:
    """The setting with its assumed mean multiplied by *factor*, and the longest response that belongs to it."""
    mean, longest = factor * setting.mean, setting.longest
    if "response_max_tokens" in setting.assumed:
        cap = math.inf if "max_response_tokens" in setting.assumed else setting.cap
        longest = round(min(cap, _expected_longest(mean, LENGTH_SD, setting.prompts * setting.samples)))
    return replace(setting, mean=min(mean, longest), longest=longest, cap=max(setting.cap, longest))


def with_inferred_mean(setting: Setting, stage: str, constants: Constants) -> Setting:
    """The setting with the mean length that meets the record's other stages, never *stage* itself.

    Only where the mean is assumed and log-probs or updates are known; of both, the geometric mean.
    """
    if "response_mean_tokens" not in setting.assumed:
        return setting
    others = [other for other in MEAN_FROM if other != stage]
    factors = [factor for other in others if (factor := _mean_factor(setting, other, constants)) is not None]
    return with_mean(setting, statistics.geometric_mean(factors)) if factors else setting


def _mean_factor(setting: Setting, stage: str, constants: Constants) -> float | None:
    """What the assumed mean has to be multiplied with for *stage* to take what was measured; None if nothing does."""
    measured_s = setting.record.seconds(stage)
    if measured_s is None:
        return None

    def excess(log_factor: float) -> float:
        return predict_s(with_mean(setting, math.exp(log_factor)), stage, constants) - measured_s

    low, high = math.log(1 / setting.mean), math.log(setting.cap / setting.mean)
    if not low < high or excess(low) * excess(high) > 0:
        return None
    return math.exp(float(brentq(excess, low, high, xtol=5e-3)))


def _expected_longest(mean: float, sd: float, responses: int) -> float:
    """Of so many lognormal lengths: their quantile at 1 - 1 / (2 n)."""
    return float(mean * math.exp(sd * norm.isf(0.5 / responses) - sd * sd / 2))


# --- lengths of an engine's responses ---


def response_tokens(setting: Setting, count: int) -> list[int]:
    """*count* lengths with the setting's mean, among them its longest: quantiles of a lognormal, cut there.

    Where the longest is below the cap, it tells how wide the distribution is; at the cap, `LENGTH_SD` stands.
    """
    mean, longest = setting.mean, setting.longest
    if count == 1 or longest <= mean:
        return [longest] * count
    responses = setting.prompts * setting.samples
    sd = LENGTH_SD
    if longest < setting.cap:
        widest = norm.isf(0.5 / responses)  # mean exp(sd z - sd^2 / 2) rises up to sd = z
        reach = math.log(longest / mean)
        sd = min(widest, max(0.05, widest - math.sqrt(max(widest * widest - 2 * reach, 0.0))))
    scores = norm.ppf((np.arange(count) + 0.5) / count)

    def lengths(mu: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        cut = np.clip(np.exp(mu + sd * scores), 1, longest)
        cut[-1] = longest
        return cut

    def excess(mu: float) -> float:
        return float(lengths(mu).mean()) - mean

    low, high = math.log(mean) - 3 * sd - 3, math.log(longest) + 4 * sd
    mu = low if excess(low) > 0 else float(brentq(excess, low, high, xtol=1e-6))
    return [max(1, round(float(tokens))) for tokens in lengths(mu)]


# --- predicting ---


def _costs(setting: Setting, constants: Constants, utilization: float | None = None, *, adapters: bool = True) -> Costs:
    """The simulator's cost model of the setting, with these constants in place of the shipped ones.

    *adapters* is whether those of LoRA take part.
    """
    record = setting.record
    host = "launch_s_per_layer" if setting.eager else "overhead_s_per_layer"
    units = LORA_UNITS if adapters and setting.lora_rank else 0
    mfu = {"learn_mfu": constants.efficiency * 3 / 4, "forward_mfu": constants.efficiency}  # one rate: see learning
    parameters = Parameters({
        "engine": {setting.preset: {host: constants.host_s_per_layer}}, "gpu": {setting.gpu: mfu},
        "learner": {"layer_overhead_s": _shipped("learner.layer_overhead_s") + units * constants.adapter_s},
    })  # fmt: skip
    node = next(n for n in parameters.names_in("node") if parameters.name(f"node.{n}.gpu") == setting.gpu)
    node_type = NodeType.load(node, parameters)
    job = Job(
        model=setting.model, prompts_per_step=setting.prompts, responses_per_prompt=setting.samples,
        dataset_prompts=setting.prompts, mini_batch_prompts=_mini_batch_prompts(setting),
        max_response_tokens=setting.cap, learner_offload=True, lora_rank=setting.lora_rank,
        activation_checkpointing=record.texts["checkpointing"] != "no",
        learner_strategy="megatron" if "megatron" in record.texts["train_engine"].lower() else "fsdp",
    )  # fmt: skip
    # Not validated: beside Megatron's tensor parallelism this stands for sequence parallelism under FSDP.
    job = job.model_copy(update={"learner_tensor_parallel": setting.learner_parallel})
    spec = EngineSpec(preset=setting.preset, gpu_memory_utilization=utilization)
    return Costs(job, spec, node_type, -(-setting.gpus // node_type.gpus), parameters)


def _mini_batch_prompts(setting: Setting) -> int:
    stated = setting.record.count("mini_batch_prompts")
    return min(stated, setting.prompts) if stated else max(1, setting.prompts // MINI_BATCHES)


def _micro_batch_tokens(setting: Setting, prompts: int) -> int:
    """Tokens of a GPU's micro-batch where *prompts* make a batch."""
    responses, stated = setting.record.count("micro_batch_responses"), setting.record.count("micro_batch_tokens")
    if responses is None:
        return stated or MICRO_BATCH_TOKENS
    count = _micro_batches(setting, prompts, responses)
    tokens = prompts * setting.samples * (setting.mean + setting.prompt_tokens) / setting.gpus
    return math.ceil(tokens / (count - 0.5))  # half a micro-batch of room: shares are not quite equal


def _micro_batches(setting: Setting, prompts: int, responses: int) -> int:
    return math.ceil(prompts * setting.samples * setting.learner_parallel / setting.gpus / responses)


def predict_s(setting: Setting, stage: str, constants: Constants) -> float:
    """Seconds of a stage."""
    if stage == "generation":
        return constants.startup_s + _engine_s(setting, constants)
    lengths = _in_random_order(response_tokens(setting, setting.prompts * setting.samples), setting)
    tokens = [round(setting.prompt_tokens) + length for length in lengths]
    columns = [column for column in STAGES[stage] if column in setting.record.numbers]
    return sum(_pass_s(setting, column, tokens, constants) for column in columns)


def _pass_s(setting: Setting, column: str, tokens: Sequence[int], constants: Constants) -> float:
    """A model's update, or its forward pass: the reference is the actor without its adapters."""
    updates = column.startswith("update")
    prompts = _mini_batch_prompts(setting) if updates else setting.prompts
    waiting = _slowest_share(setting, tokens, prompts)
    slower = replace(constants, efficiency=constants.efficiency / waiting)
    costs = _costs(setting, slower, adapters=column != "ref_s")
    learning, gpus = costs.learning, setting.gpus
    limit = _micro_batch_tokens(setting, prompts) * (setting.learner_parallel if updates else 1)
    learning.job = learning.job.model_copy(update={"micro_batch_tokens": limit})
    if updates:
        passes, seconds = learning.learning_passes(), learning.learn_s(tokens, gpus, costs.nodes)
        moved_bytes = costs.memory.learner_bytes(gpus)
    else:
        passes, seconds = 1, learning.score_s(learning.scorers()[0], np.asarray(tokens, dtype=np.float64), gpus)
        moved_bytes = _shipped("learner.frozen_bytes_per_parameter") * learning.model.parameters / gpus
    moves_bytes = passes * sum(tokens) / gpus * _token_bytes(learning.model)
    memory_s = moves_bytes / _shipped(f"gpu.{setting.gpu}.memory_bytes_per_s")
    return seconds + waiting * memory_s + _dispatch_s(setting) + _offload_s(setting, costs, moved_bytes)


def _token_bytes(model: Model) -> float:
    """What a token's forward pass moves through GPU memory beside weights: norms, rotations, activations, logits."""
    width = HIDDEN_BYTES * model.hidden + INTERMEDIATE_BYTES * model.intermediate
    return model.layers * (width + KV_BYTES * model.kv_heads * model.head_dim) + VOCAB_BYTES * model.vocab


def _slowest_share(setting: Setting, tokens: Sequence[int], prompts: int) -> float:
    """Tokens of the ranks' longest simultaneous micro-batch over their mean: FSDP's ranks meet in each layer."""
    stated, ranks = setting.record.count("micro_batch_responses"), max(1, setting.gpus // setting.learner_parallel)
    responses = min(stated or 0, prompts * setting.samples // ranks)
    if not responses or "megatron" in setting.record.texts["train_engine"].lower():
        return 1.0
    count = len(tokens) // (ranks * responses)
    sums = np.reshape(tokens[: ranks * count * responses], (ranks, count, responses)).sum(axis=2)
    return float(sums.max(axis=0).sum() / sums.mean(axis=0).sum())


def _dispatch_s(setting: Setting) -> float:
    """The controller serialises the padded batch for each stage, and workers read it."""
    prompt = setting.record.numbers.get("max_prompt_tokens", MAX_PROMPT_TOKENS)
    return POSITION_S * setting.prompts * setting.samples * (prompt + setting.cap)


def _offload_s(setting: Setting, costs: Costs, gpu_bytes: float) -> float:
    """From host memory and back, where the record says that verl's offload is on: it is inside the stages' times."""
    return 2 * gpu_bytes / costs.node.host_bytes_per_s if setting.record.texts["offload"] == "yes" else 0.0


def _engine_s(setting: Setting, constants: Constants) -> float:
    """The slowest engine: verl deals the batch in contiguous parts, and all wait for the last."""
    costs, tensor_parallel = _that_fits(setting, constants)
    engines = max(1, setting.gpus // tensor_parallel)
    lengths = _in_random_order(response_tokens(setting, setting.prompts * setting.samples), setting)
    times, blocks = costs.times(tensor_parallel), costs.memory.kv_blocks(tensor_parallel, setting.gpus)
    ends = [round(len(lengths) * i / engines) for i in range(engines + 1)]
    slowest_s = 0.0
    for start, end in itertools.pairwise(ends):
        engine: Engine[Request] = Engine(times, blocks, costs.max_num_seqs, costs.max_batched_tokens)
        for i in range(start, end):
            engine.add(Request(i, i // setting.samples, max(1, round(setting.prompt_tokens)), lengths[i]))
        seconds = 0.0
        while (span := engine.plan(len(lengths))) is not None:
            seconds += span.seconds
            engine.advance(span.iterations)
        slowest_s = max(slowest_s, seconds)
    return slowest_s


def _that_fits(setting: Setting, constants: Constants) -> tuple[Costs, int]:
    """Costs and GPUs an engine with room for the longest response: as few more GPUs or as little more memory as needed.

    Engines are colocated, the learner's state waits in host memory.
    """
    needed = -(-(round(setting.prompt_tokens) + setting.longest) // BLOCK_TOKENS) + 1
    most = setting.tensor_parallel if "tensor parallel" not in setting.assumed else min(NODE_GPUS, setting.gpus)
    sizes = [n for n in range(setting.tensor_parallel, most + 1) if setting.gpus % n == 0 and n & (n - 1) == 0]
    for utilization in (setting.record.numbers.get("gpu_memory_utilization"), MOST_UTILIZATION):
        costs = _costs(setting, constants, utilization)
        for size in sizes or [setting.tensor_parallel]:
            if costs.memory.kv_blocks(size, setting.gpus) >= needed:
                return costs, size
    raise CannotPredict(
        f"{setting.model} with its longest response does not fit on {sizes[-1:]} x {setting.gpu} an engine"
    )


def _in_random_order(lengths: Sequence[int], setting: Setting) -> list[int]:
    return [lengths[i] for i in stream(0, "order", setting.record.name).permutation(len(lengths))]


# --- fitting ---


@dataclass(frozen=True)
class Fit:
    """Constants by class, and what they come from.

    Attributes:
        values: By constant, class and log: what this log alone would give.
    """

    values: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    def without(self, logs: Collection[str]) -> Fit:
        """What the other logs give."""
        left: dict[str, dict[str, dict[str, float]]] = {}
        for constant, classes in self.values.items():
            for name, found in classes.items():
                kept = {log: value for log, value in found.items() if log not in logs}
                if kept:
                    left.setdefault(constant, {})[name] = kept
        return Fit(left)

    def value(self, constant: str, class_name: str) -> float:
        """The median over the class's logs; where it has none, over all classes, one vote each.

        An efficiency is the geometric mean of the class's, with the weight of its logs, and of the median over
        classes, with the weight of one log. A table that has the class `POOLED` is as it was fitted.
        """
        classes = self.values.get(constant, {})
        medians = {name: statistics.median(logs.values()) for name, logs in classes.items()}
        pooled = medians.get(POOLED, statistics.median(medians.values()) if medians else _unfitted(constant))
        own = medians.get(class_name, pooled)
        if constant != "efficiency" or POOLED in medians:
            return own
        weight = 1 / (len(classes.get(class_name, ())) + 1)
        return float(own ** (1 - weight) * pooled**weight)

    def constants(self, setting: Setting) -> Constants:
        """For one record."""
        host = self.value("host_s_per_layer", setting.engine_class)
        if setting.engine_class == "vllm-graphs" and "vllm-graphs" not in self.values.get("host_s_per_layer", {}):
            host = _shipped("engine.vllm-current.overhead_s_per_layer")  # it has a source of its own
        startup_s = self.value("startup_s", setting.engine_class)
        return Constants(host, startup_s, self.value("efficiency", setting.gpu), self.value("adapter_s", "lora"))

    def to_toml(self) -> str:
        """The `[class.*]` sections of the parameter table."""
        classes: dict[str, list[str]] = {}
        for constant, by_class in self.values.items():
            for name in (*by_class, POOLED):
                logs = by_class.get(name, {})
                each = "; ".join(f"{log}: {v:.4g}" for log, v in logs.items()) or "the median over classes"
                value = float(f"{self.value(constant, name):.4g}")
                line = f'{constant:16} = {{ value = {value!r}, unit = "{UNITS[constant]}", status = "derived", '
                classes.setdefault(name, []).append(f'{line}source = "fitted by simrl.experiments.records; {each}" }}')
        return "\n\n".join(f"[class.{name}]\n" + "\n".join(lines) for name, lines in classes.items())


@functools.cache
def shipped_fit() -> Fit:
    """The `[class.*]` sections of the shipped parameter table."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    for key, parameter in shipped_parameters().items():
        section, _, rest = key.partition(".")
        if section == "class":
            class_name, _, constant = rest.rpartition(".")
            values.setdefault(constant, {})[class_name] = {"shipped": float(parameter.value)}
    return Fit(values)


def _shipped(key: str) -> float:
    return float(shipped_parameters()[key].value)


def _unfitted(constant: str) -> float:
    """Where no log says anything: the simulator's own."""
    if constant == "host_s_per_layer":
        return _shipped("engine.vllm-0.8-eager.launch_s_per_layer")
    if constant == "startup_s":
        return _shipped("switch.engine_wake_s")
    return _shipped("gpu.h100.forward_mfu" if constant == "efficiency" else "learner.layer_overhead_s")


def fit(records: Iterable[Record]) -> Fit:
    """Constants that would have met the records: each row's own, the median of a log's rows, of a class's logs.

    Rows whose lengths are not known say nothing about constants and are left out, as are rows that no value meets.
    """
    values: dict[str, dict[str, dict[str, float]]] = {}
    for log, rows in by_log([record for record in records if record.knows_lengths]).items():
        for constant, class_name, value in _of_log(rows):
            values.setdefault(constant, {}).setdefault(class_name, {})[log] = value
    return Fit(values)


def _of_log(rows: Sequence[Record]) -> Iterable[tuple[str, str, float]]:
    """(constant, class, value) that one log gives."""
    picked = rows[:: math.ceil(len(rows) / ROWS_A_LOG)]
    settings = [setting for setting in map(try_setting, picked) if setting is not None]
    if not settings:
        return
    first = settings[0]
    reshards = [r.numbers["reshard_s"] for r in picked if "reshard_s" in r.numbers]
    if reshards:
        yield "startup_s", first.engine_class, statistics.median(reshards)
    adapters = [value for s in settings if (value := _adapter_s(s)) is not None]
    if adapters:
        yield "adapter_s", "lora", statistics.median(adapters)
    neutral = Constants(
        1e-6, statistics.median(reshards or [0.0]), 0.3,
        statistics.median(adapters or [_unfitted("adapter_s")]),
    )  # fmt: skip
    for constant, stages in STAGES_OF.items():
        found = []
        for stage in stages:
            met = [value for s in settings if (value := solve(s, stage, constant, neutral)) is not None]
            found += [statistics.median(met)] if met else []
        if found:
            class_name = first.engine_class if stages == ("generation",) else first.gpu
            yield constant, class_name, statistics.geometric_mean(found)


def _adapter_s(setting: Setting) -> float | None:
    """An adapter's unit in a micro-batch: what old log-probs take beyond the reference's, which have no adapters."""
    numbers, responses = setting.record.numbers, setting.record.count("micro_batch_responses")
    if not setting.lora_rank or responses is None or not {"old_log_prob_s", "ref_s"} <= numbers.keys():
        return None
    units = _micro_batches(setting, setting.prompts, responses) * load_model(setting.model).layers * LORA_UNITS
    return max(0.0, numbers["old_log_prob_s"] - numbers["ref_s"]) / units


def try_setting(record: Record) -> Setting | None:
    """The record's setting, None where there is none."""
    try:
        return setting_of(record)
    except CannotPredict:
        return None


def solve(setting: Setting, stage: str, constant: str, others: Constants) -> float | None:
    """The constant's value with which the stage takes what was measured beside *others*; None if none does."""
    measured_s = setting.record.seconds(stage)
    if measured_s is None:
        return None

    @functools.cache
    def excess(log_value: float) -> float:
        return predict_s(setting, stage, replace(others, **{constant: math.exp(log_value)})) - measured_s

    low, high = (math.log(limit) for limit in LIMITS[constant])
    if excess(low) * excess(high) > 0:
        return None
    return math.exp(float(brentq(excess, low, high, xtol=5e-3)))


# --- null models ---


@dataclass(frozen=True)
class Nulls:
    """Two models without physics, fitted to the same logs: one vote a log.

    Attributes:
        tokens: By stage, seconds for a token of the step and GPU (and pass).
        line: By stage, (intercept, slope) of seconds (a pass) over the longest response.
    """

    tokens: Mapping[str, float]
    line: Mapping[str, tuple[float, float]]

    def seconds(self, setting: Setting, stage: str) -> tuple[float | None, float | None]:
        """Predictions of both for a stage; None where there was nothing to fit."""
        passes = setting.record.passes(stage)
        by_tokens = self.tokens.get(stage)
        line = self.line.get(stage)
        return (
            None if by_tokens is None else passes * by_tokens * setting.tokens / setting.gpus,
            None if line is None else passes * (line[0] + line[1] * setting.longest),
        )


def fit_nulls(records: Sequence[Record], stages: Iterable[str] = tuple(STAGES)) -> Nulls:
    """Both null models on records whose lengths are known."""
    settings = [s for s in map(try_setting, (r for r in records if r.knows_lengths)) if s is not None]
    tokens, line = {}, {}
    for stage in stages:
        rows = pd.DataFrame(
            [
                (s.record.log, s.tokens / s.gpus, s.longest, seconds / s.record.passes(stage))
                for s in settings
                if (seconds := s.record.seconds(stage)) is not None
            ],
            columns=["log", "tokens", "longest", "seconds"],
        )
        if len(rows):
            logs = rows.groupby("log")
            tokens[stage] = float((rows.seconds / rows.tokens).groupby(rows.log).median().median())
            line[stage] = _line(rows.longest, rows.seconds, 1 / rows.seconds / np.sqrt(logs.seconds.transform("size")))
    return Nulls(tokens, line)


def _line(longest: pd.Series[int], seconds: pd.Series[float], weight: pd.Series[float]) -> tuple[float, float]:
    """(Intercept, slope) by least squares of relative errors, each log of the same weight; level if all are equal."""
    slope, intercept = (
        np.polyfit(longest, seconds, 1, w=weight)
        if longest.nunique() > 1
        else (
            0.0,
            float(np.polyfit(longest, seconds, 0, w=weight)[0]),
        )
    )
    return float(intercept), float(slope)
