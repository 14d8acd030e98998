"""A verl (hydra) configuration as a job, engine and cluster, with a listing of what was taken, defaulted and ignored.

Names and defaults of verl's settings: `verl/trainer/config/_generated_ppo_trainer.yaml` and
`_generated_ppo_megatron_trainer.yaml`, github.com/verl-project/verl, commit 1a7e2ca; older names: `ppo_trainer.yaml`
at commit 1acd108; newer: `reward/reward.yaml` at commit 418de7a, `rollout/rollout.yaml` at 74530c7. What verl refuses:
`verl/utils/config.py` at commit 10f413d, and `ActorConfig.validate`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simrl.experiments import toml_text
from simrl.experiments.config import SECTIONS, Config, ConfigError, Given, Layer, layers_of, merge, resolve
from simrl.experiments.hardware_file import load_parameters, read_hardware
from simrl.experiments.verl_file import Unresolved, VerlFile, read_verl
from simrl.traces.job import Cluster
from simrl.traces.lengths import load_workload
from simrl.traces.models import model_names
from simrl.traces.trace import whole_file

if TYPE_CHECKING:
    from rich.table import Table

VERL = "verl 1a7e2ca"
ROLLOUT, ACTOR, MODEL = (f"actor_rollout_ref.{part}" for part in ("rollout", "actor", "model"))
LARGEST = 10**12  # beyond any count here, and still exact as a float
SAMPLE = 4096  # lengths drawn for a mean
FILE_NAME = "from_verl.json"


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of verl that simrl has as it is.

    Attributes:
        simrl: Path in simrl's configuration.
        verl: verl's names for it, the one that counts first.
        kind: Type, or what verl's words mean in simrl.
        default: verl's own, in simrl's terms.
        note: On the default.
    """

    simrl: str
    verl: tuple[str, ...]
    kind: type | Mapping[str, str]
    default: int | float | bool | str
    note: str = ""


KV_CACHE = {"auto": "auto", "bfloat16": "auto", "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}
STRATEGY = {"fsdp": "fsdp", "fsdp2": "fsdp", "dp": "fsdp", "megatron": "megatron"}
STRATEGY |= {"ppo_trainer": "fsdp", "ppo_megatron_trainer": "megatron"}  # by the names of whole configurations
SETTINGS = (
    Setting("job.prompts_per_step", ("data.train_batch_size",), int, 1024),
    Setting("job.responses_per_prompt", (f"{ROLLOUT}.n",), int, 1),
    Setting("job.mini_batch_prompts", (f"{ACTOR}.ppo_mini_batch_size",), int, 256),
    Setting("job.max_prompt_tokens", ("data.max_prompt_length", f"{ROLLOUT}.prompt_length"), int, 512),
    Setting("job.max_response_tokens", ("data.max_response_length", f"{ROLLOUT}.response_length"), int, 512),
    Setting("job.learner_strategy", (f"{ACTOR}.strategy", "model_engine", "--config-name"), STRATEGY, "fsdp"),
    Setting("engine.tensor_parallel", (f"{ROLLOUT}.tensor_model_parallel_size",), int, 2),
    Setting("engine.max_num_seqs", (f"{ROLLOUT}.max_num_seqs",), int, 1024, "256 at commit 74530c7"),
    Setting("engine.max_num_batched_tokens", (f"{ROLLOUT}.max_num_batched_tokens",), int, 8192),
    Setting("engine.gpu_memory_utilization", (f"{ROLLOUT}.gpu_memory_utilization",), float, 0.5),
    Setting("engine.enforce_eager", (f"{ROLLOUT}.enforce_eager",), bool, False, "true at commit 1acd108"),
    Setting("engine.prefix_caching", (f"{ROLLOUT}.enable_prefix_caching",), bool, True),
    Setting(
        "engine.kv_cache_dtype",
        (f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_dtype", f"{ROLLOUT}.kv_cache_dtype"), KV_CACHE, "auto", "vLLM's",
    ),
    Setting("cluster.nodes", ("trainer.nnodes",), int, 1),
)  # fmt: skip
"""What needs no thought; the others have a method each."""

NO_NAME = re.compile(r"[0-9a-f]{12,}|snapshots|main|huggingface|hf|hf_model|actor|model|(global_step_|checkpoint-)\d+")
"""Last folders of a model's path that do not name it."""

BEYOND_VERL = ("cluster.node_type", "job.workload", "job.dataset_prompts", "engine.preset")

SAME = "simrl does so in any case"
ANYTHING = object()
IGNORED: tuple[tuple[str, object, str], ...] = (
    (r".*\.ppo_epochs", 1, "a response is learned from once: every further epoch adds as much learning again"),
    (r".*\.ulysses_sequence_parallel_size", 1, "sequence parallelism is not simulated"),
    (r".*(pipeline|context|expert)_.*parallel_size", 1, "pipeline, context and expert parallelism are not simulated"),
    (r".*\.fsdp_size", -1, "all GPUs shard together"),
    (rf"{ROLLOUT}\.data_parallel_size", 1, "an engine has no data parallelism of its own"),
    (rf"{ROLLOUT}\.enable_chunked_prefill", True, "prefill is always chunked"),
    (rf"{ROLLOUT}\.(temperature|top_.|do_sample|sampling_kwargs)", ANYTHING, "lengths come from job.workload"),
    (rf"{ROLLOUT}\.ignore_eos", False, "lengths come from job.workload"),
    (rf"{ROLLOUT}\.name", "vllm", "engines are vLLM's"),
    (rf"{ROLLOUT}\.mode", "sync", "the host time of agent loops is not simulated"),
    (rf"{ROLLOUT}\.multi_turn\.enable", False, "a response has one turn, and calls no tools"),
    (rf"{ROLLOUT}\.quantization", None, "weights are bf16"),
    (rf"{ROLLOUT}\.dtype", "bfloat16", "weights are bf16"),
    (rf"{ROLLOUT}\.free_cache_engine", True, "engines always sleep while others use their GPUs"),
    (rf"{ROLLOUT}\.over_sample_rate", 0, "every response is waited for"),
    (rf"{ROLLOUT}\.skip_rollout", False, "every response is generated"),
    (rf"{ROLLOUT}\.max_model_len", None, "the caps on prompt and response hold"),
    (rf"{ROLLOUT}\.(prompt|response)_length", ANYTHING, "data.max_prompt_length and max_response_length hold"),
    (r".*log_prob_(micro|use_dynamic|max_token).*", ANYTHING, "preparation is cut by job.micro_batch_tokens"),
    (rf"{ACTOR}\.(ppo_micro_batch|ppo_max_token|use_dynamic).*", ANYTHING, "use_dynamic_bsz decides which limit holds"),
    (r".*\.ref\..*offload", True, "what is not learned waits in host memory"),
    (
        rf"{ACTOR}\..*offload", False,
        "job.learner_offload moves weights and optimizer together: optimizer_offload, the larger part, decides",
    ),
    (rf"{MODEL}\.enable_activation_offload", False, "activations stay on the GPU"),
    (rf"{MODEL}\.lora\.merge", False, "adapters are synced, not merged weights"),
    (r"trainer\.balance_batch", True, "batches are always balanced over ranks"),
    (r"algorithm\.filter_groups\.enable", False, "groups are not sampled again"),
    (r"algorithm\.filter_groups\..*|data\.gen_batch_size", ANYTHING, "groups are not sampled again"),
    (r"critic\..*", ANYTHING, "a critic has the actor's size and settings"),
    (r"reward(_model|_manager)?\..*|custom_reward_.*", ANYTHING, "of the reward only its model is simulated"),
    (r"data\..*", ANYTHING, "data files are not read: see job.workload, job.dataset_prompts"),
    (r"trainer\..*(val|test|save|ckpt|resume|log|dir|name).*|.*\.(checkpoint|val_kwargs)\..*", ANYTHING,
     "validation, checkpoints and logs are not simulated"),
    (r"algorithm\..*|.*\.optim\..*|.*(clip|coef|loss|_target_|profiler).*", ANYTHING, "changes no times"),
)  # fmt: skip
"""What simrl cannot express: keys, the value that means what simrl does, and the reason; the first that fits."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the listing.

    Attributes:
        status: Whether the file's value was used.
        simrl: Path in simrl's configuration; None for what is ignored.
        value: The value in simrl.
        verl: verl's settings that decide it.
        given: Their values as in the file.
        note: How it was derived, where a default comes from, or why it is ignored.
    """

    status: Literal["taken", "defaulted", "ignored"]
    simrl: str | None
    value: Any
    verl: tuple[str, ...]
    given: tuple[Any, ...]
    note: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What became of a verl configuration.

    Attributes:
        source: The file.
        lines: In simrl's order; ignored ones last.
    """

    source: str
    lines: tuple[Line, ...]

    def table(self) -> Table:
        """For a terminal; ignored settings together by reason."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, title=Text(f"--from-verl {self.source}"), title_justify="left")
        for name in ("", "simrl", "value", "from", "note"):
            table.add_column(name, overflow="fold")
        reasons: dict[str, list[Line]] = {}
        for line in self.lines:
            if line.status == "ignored":
                reasons.setdefault(line.note, []).append(line)
            else:
                table.add_row(*map(Text, (line.status, str(line.simrl), _shown(line.value), _pairs([line]), line.note)))
        for reason, lines in reasons.items():
            more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
            table.add_row(*map(Text, ("ignored", "", "", _pairs(lines[:3]) + more, reason)))
        return table

    def write(self, directory: Path) -> None:
        """Add the listing to a run directory; it appears when it is complete."""
        tree = {"source": self.source, "defaults": VERL, "lines": [asdict(line) for line in self.lines]}
        with whole_file(directory / FILE_NAME) as file:
            file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")

    def show(self) -> None:
        """Print the table to stderr."""
        from rich.console import Console

        Console(stderr=True, file=sys.stderr).print(self.table())


def load_verl_config(path: Path, *, policies: Sequence[str] | None = None, **options: Any) -> tuple[Config, Listing]:
    """Resolve a configuration: preset, then verl's file, then what else is given.

    Args:
        path: Of hydra's `config.yaml` or `overrides.yaml`, a part of one, or a launch script.
        policies: As in `load_config`.
        options: The other arguments of `load_config`.

    Raises:
        ConfigError: in one line, what was given, what is allowed and where it came from.
    """
    preset, *above = layers_of(**options)
    translation = _Translation(read_verl(path), merge(above), preset.values)
    translation.run()
    config = resolve([preset, Layer(translation.values), *above], policies)
    return config, Listing(str(path), tuple(translation.lines))


@dataclass
class _Translation:
    """From verl's settings to simrl's."""

    file: VerlFile
    above: Mapping[toml_text.Path, Given]
    below: Mapping[toml_text.Path, Given]
    values: dict[toml_text.Path, Given] = field(default_factory=dict)
    """What is set in simrl."""
    lines: list[Line] = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)
    """Settings that have their line, or that cannot be read: with the reason then."""

    def run(self) -> None:
        """Fill values and lines."""
        for setting in SETTINGS:
            self._setting(setting)
        for part in (
            self._algorithm, self._model, self._learner, self._offload, self._reference, self._reward, self._gpus,
            self._steps, self._micro_batches, self._check_batches, self._beyond_verl, self._rest,
        ):  # fmt: skip
            part()

    # --- reading ---

    def _get(self, keys: str | tuple[str, ...], kind: type | Mapping[str, str]) -> tuple[str, Any] | None:
        """The first of *keys* that is given, and its value; None where none is, or where it cannot be told."""
        for key in (keys,) if isinstance(keys, str) else keys:
            try:
                value = self.file.value(key)
                if value is not None:
                    return key, _typed(key, value, kind, self.file.source)
            except Unresolved as error:
                self.used[key] = str(error)
        return None

    def _value(self, keys: str | tuple[str, ...], kind: type | Mapping[str, str]) -> Any:
        found = self._get(keys, kind)
        return None if found is None else found[1]

    def chosen(self, key: str) -> Any:
        """The value that a path of simrl will have."""
        section, name = path = toml_text.parse_key(key)
        given = self.above.get(path) or self.values.get(path) or self.below.get(path)
        return given.value if given else SECTIONS[section].model_fields[name].default

    # --- noting ---

    def _set(self, key: str, value: Any, verl: Sequence[str], note: str = "") -> None:
        """Take *value* from the settings *verl*, or as verl's default where there are none."""
        path, given = toml_text.parse_key(key), tuple(_plain(self.file.leaves[name]) for name in verl)
        self.used |= dict.fromkeys(verl, "")
        origin = f"{', '.join(verl)} in" if verl else f"{VERL}'s default; not in"
        self.values[path] = Given(value, f"{origin} {self.file.source}")
        note = note if verl else f"default of {VERL}" + (f"; {note}" if note else "")
        if path in self.above:
            note = f"overridden in simrl's own terms: {_shown(self.above[path].value)}"
        self.lines.append(Line("taken" if verl else "defaulted", key, value, tuple(verl), given, note))

    def _setting(self, setting: Setting) -> None:
        found = self._get(setting.verl, setting.kind)
        if found is None:
            self._set(setting.simrl, setting.default, (), setting.note)
        else:
            self._set(setting.simrl, found[1], found[:1])

    # --- what needs thought ---

    def _algorithm(self) -> None:
        """A critic is there if `critic.enable` says so, else if advantages are estimated by GAE."""
        estimator, critic = self._get("algorithm.adv_estimator", str), self._get("critic.enable", bool)
        name = "gae" if estimator is None else estimator[1]
        has_critic = name == "gae" if critic is None else critic[1]
        note = "" if name in ("gae", "grpo") else f"{_shown(name)} costs what {'PPO' if has_critic else 'GRPO'} costs"
        if name == "remax":
            note += ", but for its greedy responses"
        keys = [found[0] for found in (estimator, critic) if found]
        self._set("job.algorithm", "ppo" if has_critic else "grpo", keys, note)

    def _model(self) -> None:
        try:
            path = self.file.value(f"{MODEL}.path", last_part=True)
        except Unresolved as error:
            self.used[f"{MODEL}.path"] = str(error)
            path = None
        if path is None:
            return  # verl's default is a place holder, so the preset's stands
        path = _typed(f"{MODEL}.path", path, str, self.file.source)
        name, last = self._known_model(path), path.rstrip("/").rpartition("/")[2]
        note = "" if name in (None, last.lower()) else "derived: family and size by the path"
        self._set("job.model", name or last, [f"{MODEL}.path"], note)  # an unknown one is refused

    def _known_model(self, path: str) -> str | None:
        try:
            own = read_hardware(self.chosen("cluster.hardware")).models
        except (ValueError, TypeError):
            own = {}
        return match_model(path, [*model_names(), *own])

    def _learner(self) -> None:
        megatron = self.values["job", "learner_strategy"].value == "megatron"
        lora = [found for key in ("lora.rank", "lora_rank") if (found := self._get(f"{MODEL}.{key}", int)) and found[1]]
        zero = [key for key in (f"{MODEL}.lora.rank", f"{MODEL}.lora_rank") if self.file.leaves.get(key) == 0]
        self._set("job.lora_rank", lora[0][1] if lora else 0, [lora[0][0]] if lora else zero[:1])
        padding: tuple[str, ...] = (f"{MODEL}.use_remove_padding",)
        if megatron:
            padding = (f"{ACTOR}.megatron.use_remove_padding", *padding)
        self._setting(Setting("job.packing", padding, bool, True, "false at commit 1acd108"))
        if not megatron:
            checkpointing = (f"{MODEL}.enable_gradient_checkpointing",)
            self._setting(Setting("job.activation_checkpointing", checkpointing, bool, True))
            return
        tensor_parallel = (f"{ACTOR}.megatron.tensor_model_parallel_size",)
        self._setting(Setting("job.learner_tensor_parallel", tensor_parallel, int, 1))
        granularity = self._get(f"{ACTOR}.megatron.override_transformer_config.recompute_granularity", str)
        full = granularity is not None and granularity[1] == "full"
        note = "" if granularity is None or full else "recomputing a part counts as recomputing nothing"
        self._set("job.activation_checkpointing", full, granularity[:1] if granularity else (), note)

    def _offload(self) -> None:
        """The optimizer's 8 of 12 bytes a parameter decide, where the parameters go another way."""
        part = "megatron" if self.values["job", "learner_strategy"].value == "megatron" else "fsdp_config"
        names = ("optimizer_offload", "offload_policy", "param_offload", "grad_offload")
        given = {name: found for name in names if (found := self._get(f"{ACTOR}.{part}.{name}", bool))}
        offload = any(found[1] for name, found in given.items() if name in names[:2])
        self._set("job.learner_offload", offload, [key for key, value in given.values() if value == offload])

    def _reference(self) -> None:
        """Either KL needs the reference; before `use_kl_in_reward` a coefficient alone meant that."""
        keys = (f"{ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward")
        given = [found for key in keys if (found := self._get(key, bool))]
        coefficient = self._get("algorithm.kl_ctrl.kl_coef", float)
        note = ""
        if coefficient and keys[1] not in self.file.leaves:
            given.append(coefficient)
            note = "a coefficient without use_kl_in_reward, as before verl had that"
        self._set("job.kl_reference", any(value for _, value in given), [key for key, _ in given], note)

    def _reward(self) -> None:
        enabled = self._get(("reward.reward_model.enable", "reward_model.enable"), bool)
        by_model = enabled is not None and enabled[1]
        self._set("job.reward", "model" if by_model else "rule", enabled[:1] if enabled else ())
        found = self._get(("reward.reward_model.model_path", "reward_model.model.path"), str) if by_model else None
        if found is None:
            return
        name = self._known_model(found[1])
        if name is None:
            self.used[found[0]] = "an unknown model: one like that which is trained stands in"
        else:
            self._set("job.reward_model", name, found[:1], "derived: family and size by the path")

    def _gpus(self) -> None:
        """GPUs a node, if they are not those of the node type."""
        node_type = self.chosen("cluster.node_type")
        try:
            cluster = Cluster(hardware=self.chosen("cluster.hardware"))
            has = int(load_parameters(cluster).number(f"node.{node_type}.gpus"))
        except ValueError:
            return  # load_config says what is wrong with it
        found = self._get("trainer.n_gpus_per_node", int)
        if found is not None and found[1] == has:
            self.used[found[0]] = f"{SAME}: GPUs of cluster.node_type"
        elif found is not None:
            note = f"of the {has} of a {node_type}, whose NIC and price stay whole"
            self._set(f'cluster.parameters.node."{node_type}".gpus', found[1], found[:1], note)

    def _steps(self) -> None:
        """Whole batches of every epoch, as verl's data loader drops the rest."""
        samples = self._get("data.train_max_samples", int)
        if samples is not None and samples[1] > 0:
            self._set("job.dataset_prompts", samples[1], samples[:1], "if the data set has as many")
        steps = self._get("trainer.total_training_steps", int)
        if steps is not None:
            self._set("job.steps", steps[1], steps[:1])
            return
        prompts, batch = self.chosen("job.dataset_prompts"), self.chosen("job.prompts_per_step")
        if not (type(prompts) is type(batch) is int and batch > 0):
            return  # load_config says what is wrong with them
        epochs = self._get("trainer.total_epochs", int)
        count, an_epoch = 30 if epochs is None else epochs[1], max(prompts // batch, 1)
        note = f"{count} epochs of {an_epoch} steps, by job.dataset_prompts={prompts}"
        self._set("job.steps", count * an_epoch, epochs[:1] if epochs else (), note)

    def _micro_batches(self) -> None:
        """A limit of tokens under `use_dynamic_bsz`, else of responses."""
        dynamic = self._get(f"{ACTOR}.use_dynamic_bsz", bool)
        tokens = self._get(f"{ACTOR}.ppo_max_token_len_per_gpu", int)
        count = None if dynamic and dynamic[1] else self._micro_batch()
        if count is None:
            keys = [found[0] for found in (tokens, dynamic) if found] if tokens else []
            note = "" if dynamic and dynamic[1] else "ppo_max_token_len_per_gpu, as no micro-batch is given"
            self._set("job.micro_batch_tokens", tokens[1] if tokens else 16384, keys, note)
            return
        tokens_each, note = self._tokens_of_response()
        if tokens_each is not None:
            keys = [count[0], *([dynamic[0]] if dynamic else [])]
            note = f"{count[1]:g} responses a GPU of {tokens_each:.0f} tokens with their prompts, {note}"
            self._set("job.micro_batch_tokens", math.ceil(count[1] * tokens_each), keys, note)

    def _tokens_of_response(self) -> tuple[float | None, str]:
        """Tokens that a response and its prompt take in a micro-batch: with padding their caps, else their mean."""
        caps = self.chosen("job.max_prompt_tokens"), self.chosen("job.max_response_tokens")
        if not all(type(cap) is int and cap > 0 for cap in caps):
            return None, ""  # load_config says what is wrong with them
        if self.chosen("job.packing") is False:
            return float(sum(caps)), "padded to their caps"
        try:
            lengths = load_workload(self.chosen("job.workload"))
        except (ValueError, TypeError, AttributeError):
            return None, ""  # likewise
        prompts = lengths.prompt_lengths(0, SAMPLE).clip(max=caps[0])
        responses = lengths.response_lengths(0, 0, SAMPLE, 1, caps[1]).tokens
        return float(prompts.mean() + responses.mean()), "the mean of job.workload"

    def _micro_batch(self) -> tuple[str, float] | None:
        """Responses a GPU in a micro-batch; GPUs of one sequence-parallel group share theirs."""
        group = max(self._sequence_parallel(), 1)
        found = self._get(f"{ACTOR}.ppo_micro_batch_size_per_gpu", int)
        if found is not None:
            return found[0], found[1] / group
        found = self._get(f"{ACTOR}.ppo_micro_batch_size", int)  # of all GPUs
        return None if found is None else (found[0], found[1] / max(self._all_gpus(), 1))

    def _sequence_parallel(self) -> int:
        names = (f"{ACTOR}.ulysses_sequence_parallel_size", f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size")
        return int(self._value(names, int) or 1)

    def _all_gpus(self) -> int:
        return (self._value("trainer.nnodes", int) or 1) * (self._value("trainer.n_gpus_per_node", int) or 8)

    def _check_batches(self) -> None:
        """What verl refuses, as far as the file itself says it.

        Raises:
            ConfigError: A batch does not divide.
        """
        batch, mini = (self._value(key, int) for key in ("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size"))
        if self._value(f"{ACTOR}.use_dynamic_bsz", bool) or batch is None:
            return
        if mini is not None and batch < mini:
            raise ConfigError(
                f"{ACTOR}.ppo_mini_batch_size={mini} must be at most data.train_batch_size={batch}"
                f" without use_dynamic_bsz ({self.file.source})"
            )
        samples, gpus = self._value(f"{ROLLOUT}.n", int) or 1, max(self._all_gpus(), 1)
        if (
            self.values["job", "learner_strategy"].value == "megatron"
            or self._value("trainer.n_gpus_per_node", int) is None
        ):
            return
        if batch * samples % gpus:
            raise ConfigError(
                f"data.train_batch_size={batch} times {ROLLOUT}.n={samples} must be a multiple of the {gpus} GPUs"
                f" without use_dynamic_bsz ({self.file.source})"
            )
        micro = self._value(f"{ACTOR}.ppo_micro_batch_size_per_gpu", int)
        group = max(gpus // max(self._sequence_parallel(), 1), 1)
        if micro and mini is not None and mini * samples // group % micro:
            raise ConfigError(
                f"{ACTOR}.ppo_micro_batch_size_per_gpu={micro} must divide the {mini * samples // group} responses of a"
                f" rank's mini-batch: ppo_mini_batch_size={mini}, n={samples}, {group} ranks ({self.file.source})"
            )

    def _beyond_verl(self) -> None:
        """What verl's file cannot tell, and the model if it does not."""
        for key in (*BEYOND_VERL, "job.model"):
            path = toml_text.parse_key(key)
            if path not in self.values:
                source = "given in simrl's terms" if path in self.above else "preset's"
                note = f"not in verl's file: {source}"
                self.lines.append(Line("defaulted", key, self.chosen(key), (), (), note))

    def _rest(self) -> None:
        for key, value in self.file.leaves.items():
            if self.used.get(key, "unread"):
                means = value
                with contextlib.suppress(Unresolved):
                    means = self.file.value(key)
                reason = self.used.get(key) or reason_to_ignore(key, means)
                self.lines.append(Line("ignored", None, None, (key,), (_plain(value),), reason))
        for text, reason in self.file.unread.items():
            self.lines.append(Line("ignored", None, None, (text,), (), reason))


def reason_to_ignore(key: str, value: object) -> str:
    """Why simrl has no use for a setting of verl."""
    if value is None:
        return "not set"
    for pattern, same, reason in IGNORED:
        if re.fullmatch(pattern, key):
            return SAME if value == same and isinstance(value, bool) == isinstance(same, bool) else reason
    return "no counterpart in simrl"


def match_model(path: str, known: Sequence[str]) -> str | None:
    """The one known model whose name a Hugging Face path or a folder contains; None where there is not just one.

    Quantised weights are none that simrl knows. A name within a longer one that fits does not count.
    """
    if re.search(r"awq|gptq|int4|int8|fp8|gguf", path.lower()):
        return None
    parts = [part for part in re.split(r"[/\\]", path.lower()) if part and not NO_NAME.fullmatch(part)]
    text = parts[-1].replace("_", "-") if parts else ""
    found = [name for name in known if re.search(rf"(?<![a-z0-9.]){re.escape(name)}(?![a-z0-9.])", text)]
    longest = [name for name in found if not any(name != other and name in other for other in found)]
    return longest[0] if len(longest) == 1 else None


def _typed(key: str, value: object, kind: type | Mapping[str, str], source: str) -> Any:
    """*value* as *kind*.

    Raises:
        ConfigError: It is of another type.
        Unresolved: It is a word that simrl has no counterpart of.
    """
    if isinstance(kind, Mapping):
        word = _typed(key, value, str, source).removesuffix(".yaml")
        if word not in kind:
            raise Unresolved(f"simrl has only {', '.join(dict.fromkeys(kind))}")
        return kind[word]
    if kind is float and isinstance(value, str):  # YAML 1.1 takes 1e-3 for a text
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST:
        return value
    if kind is int and type(value) is int and abs(value) < LARGEST:
        return value
    if kind in (str, bool) and type(value) is kind:
        return value
    allowed = {int: "a whole number below 10^12", float: "a number", bool: "true or false", str: "a text"}[kind]
    raise ConfigError(f"{key}={_shown(value)} must be {allowed} ({source})")


def _plain(value: object) -> object:
    """What JSON can hold: other things, and trees that may refer to themselves, as a short text."""
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if value is None or (isinstance(value, str | int | float) and finite) else reprlib.repr(value)


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else reprlib.repr(value)


def _pairs(lines: Sequence[Line]) -> str:
    words: list[str] = []
    for line in lines:
        keys = [key.removeprefix("actor_rollout_ref.") for key in line.verl]
        words += [f"{key}={_shown(value)}" for key, value in zip(keys, line.given, strict=True)] if line.given else keys
    return ", ".join(words)
