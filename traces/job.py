"""The sections of a configuration: what is trained, where, with which engine and faults, billed how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Job(Section):
    """Synchronous RL post-training: *steps* times generate, prepare, learn, sync."""

    algorithm: Literal["grpo", "ppo"] = "grpo"
    model: str = "qwen2.5-7b"
    workload: str = Field("gsm8k", description="a shipped length model, or a path to a workload TOML")
    prompts_per_step: int = Field(1024, ge=1, le=1_000_000)
    responses_per_prompt: int = Field(4, ge=1, le=10_000)
    mini_batch_prompts: int = Field(256, ge=1, description="prompts an optimizer step; verl's GSM8K examples")
    steps: int = Field(45, ge=1, le=1_000_000)
    dataset_prompts: int = Field(
        7473, ge=1, le=10_000_000, description="prompts in one epoch; 7473 is GSM8K's training split"
    )
    max_prompt_tokens: int = Field(1024, ge=1)
    max_response_tokens: int = Field(2048, ge=1)
    max_staleness: int = Field(0, ge=0, description="steps that weights may be behind when a response is generated")
    learner_offload: bool = Field(False, description="keep the learner's state in host memory between its stages")
    learner_strategy: Literal["fsdp", "megatron"] = Field("fsdp", description="how the learner is spread over its GPUs")
    learner_tensor_parallel: int = Field(1, ge=1, le=8, description="GPUs that share each layer; megatron only")
    micro_batch_tokens: int = Field(
        16384, ge=1, description="tokens that a rank takes at once; verl's ppo_max_token_len_per_gpu"
    )
    packing: bool = Field(True, description="no padding (verl's use_remove_padding); false: padded to the longest")
    activation_checkpointing: bool = Field(True, description="recompute activations instead of keeping them")
    lora_rank: int = Field(0, ge=0, description="rank of the adapters that learn; 0: all weights learn")
    kl_reference: bool = Field(True, description="score responses under the reference model as well")
    reward: Literal["rule", "model"] = Field("rule", description="rules run on CPU cores, a reward model on the GPUs")
    reward_model: str | None = Field(None, description="a known model; by default one like that which is trained")

    @model_validator(mode="after")
    def _learner_is_possible(self) -> Job:
        if self.learner_strategy == "fsdp" and self.learner_tensor_parallel > 1:
            raise ValueError(
                f"learner_tensor_parallel={self.learner_tensor_parallel} must be 1 with learner_strategy='fsdp';"
                " learner_strategy='megatron' allows more"
            )
        if self.learner_strategy == "megatron" and self.lora_rank:
            raise ValueError(f"lora_rank={self.lora_rank} must be 0 with learner_strategy='megatron'")
        if self.reward == "rule" and self.reward_model is not None:
            raise ValueError(f"reward_model={self.reward_model!r} must be left out with reward='rule'")
        return self

    @model_validator(mode="after")
    def _epoch_holds_a_step(self) -> Job:
        if self.dataset_prompts < self.prompts_per_step:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} must be at most dataset_prompts={self.dataset_prompts}"
            )
        return self

    @property
    def responses_per_step(self) -> int:
        """Prompts times group size."""
        return self.prompts_per_step * self.responses_per_prompt


class Cluster(Section):
    """Machines, all of one type.

    `parameters` overrides entries of the shipped parameter table, for example
    `{"gpu": {"l40s": {"learn_mfu": 0.4}}}`.
    """

    node_type: str = "g6e.48xlarge"
    nodes: int = Field(2, ge=1, le=10_000)
    weight_sync: Literal["nccl", "object-store"] = Field(
        "nccl", description="how new weights reach engines that share no GPUs with the learner"
    )
    keep_alive_s: float = Field(0.0, ge=0, description="how long a released function's process waits in host memory")
    images_cached: bool = Field(True, description="nodes have the container's image; false: their first start pulls it")
    hardware: str | None = Field(None, description="a TOML file with GPUs, nodes, models, prices and engine presets")
    parameters: dict[str, Any] = Field(default_factory=dict)


class Engine(Section):
    """The rollout engine's options. None takes the preset's value."""

    preset: str = "vllm-current"
    tensor_parallel: int = Field(2, ge=1, le=8, description="GPUs an engine, where the policy does not choose")
    max_num_seqs: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    prefix_caching: bool = True
    enforce_eager: bool | None = Field(None, description="launch kernel by kernel instead of by CUDA graphs")
    kv_cache_dtype: Literal["auto", "fp8"] = Field("auto", description="auto: the model's, bf16; fp8 halves the KV")
    calibration: float | None = Field(None, gt=0)
    overhead_s: float | None = Field(None, ge=0)
    profile: str | None = Field(None, description="of `simrl profile`: times measured on that machine, not the tables")


class Billing(Section):
    """Which price row turns leases into dollars. None takes the node type's own."""

    price: str | None = None


class ScriptedFault(Section):
    """A fault at a given time: of the worker that is called *function*, or of *node*; `spot` is the notice."""

    time_s: float = Field(ge=0)
    kind: Literal["worker", "node", "spot"]
    node: int | None = Field(None, ge=0)
    function: str | None = None

    @model_validator(mode="after")
    def _has_its_place(self) -> ScriptedFault:
        needed, other = ("function", "node") if self.kind == "worker" else ("node", "function")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise ValueError(f"kind={self.kind!r} needs {needed} and no {other}")
        return self


class Faults(Section):
    """What breaks; nothing by default. Mean times are of exponential ones. None takes the parameter table's value."""

    worker_mtbf_s: float | None = Field(None, gt=0, description="of each function while it holds GPUs; none by default")
    node_mtbf_s: float | None = Field(None, gt=0, description="of each node; none by default")
    spot_mtbf_s: float | None = Field(None, gt=0, description="between reclaims of each node; none by default")
    spot_notice_s: float | None = Field(None, ge=0, description="from the notice to the loss")
    repair: bool = Field(True, description="whether another machine takes a lost node's place")
    repair_s: float | None = Field(None, gt=0, description="from the loss until it does")
    slow_node_fraction: float = Field(0.0, ge=0, le=1, description="of the nodes, rounded up")
    slow_factor: float | None = Field(None, ge=1, description="times on slow nodes as a multiple of the others'")
    at: tuple[ScriptedFault, ...] = Field((), description='for example [{time_s = 400, kind = "node", node = 1}]')
