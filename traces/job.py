"""The sections of a configuration: what is trained, on which cluster, with which engine, billed how."""

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


class Billing(Section):
    """Which price row turns leases into dollars. None takes the node type's own."""

    price: str | None = None
