"""What each role of a function needs on a GPU, and what is left for KV: pure arithmetic, bytes a GPU.

Equations are in docs/model.md, section "Memory".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from simrl.policies.contract import Role
from simrl.simulator.engine import BLOCK_TOKENS
from simrl.simulator.learning import adapter_parameters
from simrl.traces.job import Engine as EngineSpec
from simrl.traces.job import Job
from simrl.traces.models import Model
from simrl.traces.parameters import Parameters

if TYPE_CHECKING:
    from simrl.simulator.costs import NodeType

GB = 1e9


class DoesNotFit(ValueError):
    """A model that does not fit on the GPUs it is given; the message has the arithmetic."""


def layer_activation_values(model: Model) -> int:
    """Values that a layer keeps of a token for its backward pass, in bf16.

    Inputs and outputs of both norms (4 hidden), queries and the attention's output, keys and values, and four of the
    feed-forward layer's width: gate, its activation, up, and their product. Attention scores are not kept (flash
    attention).
    """
    q_width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return 4 * model.hidden + 2 * (q_width + kv_width) + 4 * model.intermediate


def _root_parameters(model: Model) -> int:
    """Embeddings and output head."""
    return (1 if model.tied_embeddings else 2) * model.vocab * model.hidden


def _layer_parameters(model: Model) -> float:
    return (model.parameters - _root_parameters(model)) / model.layers


class Memory:
    """Bytes on each GPU for one job on one kind of node.

    Args:
        job: What is trained.
        model: Its architecture.
        engine: The rollout engine's options.
        utilization: Share of a GPU that an engine may take.
        node: The machines' type.
        parameters: Where constants come from.
    """

    def __init__(
        self, job: Job, model: Model, engine: EngineSpec, utilization: float, node: NodeType, parameters: Parameters
    ) -> None:
        self.job, self.model, self.engine, self.node = job, model, engine, node
        self._utilization, self._parameters = utilization, parameters
        self.weight_bytes = float(model.weight_bytes())
        self.kv_token_bytes = float(model.kv_bytes_per_token()) / (2 if engine.kv_cache_dtype == "fp8" else 1)

    def _number(self, name: str) -> float:
        return self._parameters.number(name)

    # --- the learner ---

    @property
    def synced_bytes(self) -> float:
        """What new weights are: all of them, or under LoRA the adapters."""
        rank = self.job.lora_rank
        return 2.0 * adapter_parameters(self.model, rank) if rank else self.weight_bytes

    def learner_bytes(self, world: int) -> float:
        """The learner's resident state on each of *world* GPUs: master weights and optimizer.

        Under LoRA those of the adapters, and the frozen weights. The reference model waits in host memory, as in verl's
        examples; PPO has a critic of the actor's size.
        """
        trained, frozen = self._trained_and_frozen()
        state = self._number("learner.bytes_per_parameter") * trained
        if frozen:
            state += self._number("learner.frozen_bytes_per_parameter") * frozen
        models = 2 if self.job.algorithm == "ppo" else 1
        return models * state / world

    def _trained_and_frozen(self) -> tuple[int, int]:
        """Parameters of a model that learns."""
        rank, all_of_it = self.job.lora_rank, self.model.parameters
        return (adapter_parameters(self.model, rank), all_of_it) if rank else (all_of_it, 0)

    def learning_terms(self, world: int) -> dict[str, float]:
        """What a GPU holds while it learns, one model at a time.

        FSDP gathers embeddings and head, the layer at work and the next one in bf16, and has gradients of the first
        two. Megatron keeps its part of weights and gradients whole; its optimizer's state is spread over all GPUs.
        """
        trained, _ = self._trained_and_frozen()
        gradients = self._number("learner.gradient_bytes_per_parameter") * trained
        shards, tokens = self.job.learner_tensor_parallel, self._micro_batch_tokens()
        terms = {"learner state": self.learner_bytes(world)}
        if self.job.learner_strategy == "megatron":
            terms |= {"weights": self.weight_bytes / shards, "gradients": gradients / shards}
        else:
            terms["gradients"] = gradients / world
            if world > 1:
                root, layer = _root_parameters(self.model), _layer_parameters(self.model)
                terms["gathered layers"] = 2.0 * (root + 2 * layer)
                terms["their gradients"] = 2.0 * (root + layer)
        terms[f"activations of {tokens} tokens"] = self._learning_activations(tokens) / shards
        terms["their logits"] = self._logits_bytes(self.model, tokens) / shards
        return terms

    def preparing_terms(self, gpus: int, learner_world: int | None) -> dict[str, float]:
        """What a GPU holds while it prepares: one model in bf16, forward passes, beside the learner's state."""
        models = [(self.model, True)]
        if self.job.reward == "model":
            models.append((self._parameters.model(self.job.reward_model or self.job.model), False))
        terms = max((self._scoring_terms(*model, gpus) for model in models), key=lambda terms: sum(terms.values()))
        return {**terms, "learner state": self.idle_state_bytes(learner_world)}

    def _scoring_terms(self, model: Model, head: bool, gpus: int) -> dict[str, float]:
        """A model whose weights *gpus* GPUs share, in forward passes."""
        tokens, shared = self._micro_batch_tokens(), {"weights": model.weight_bytes() / gpus}
        if gpus > 1:
            shared["gathered layers"] = 2.0 * (_root_parameters(model) + 2 * _layer_parameters(model))
        shared[f"activations of {tokens} tokens"] = 2.0 * tokens * layer_activation_values(model)
        return shared | ({"their logits": self._logits_bytes(model, tokens)} if head else {})

    def _micro_batch_tokens(self) -> int:
        """Tokens of the largest micro-batch; a response that is longer than the limit has one of its own."""
        job = self.job
        longest = job.max_prompt_tokens + job.max_response_tokens
        return max(min(job.micro_batch_tokens, job.responses_per_step * longest), longest)

    def _logits_bytes(self, model: Model, tokens: int) -> float:
        return self._number("learner.logit_bytes_per_value") * tokens * model.vocab

    def _learning_activations(self, tokens: int) -> float:
        """Activations that backward needs of one micro-batch.

        Checkpointing keeps what goes into each layer, and all activations of the one layer at work.
        """
        layer = 2.0 * tokens * layer_activation_values(self.model)
        if not self.job.activation_checkpointing:
            return self.model.layers * layer
        return layer + 2.0 * tokens * self.model.hidden * self.model.layers

    def idle_state_bytes(self, learner_world: int | None) -> float:
        """Learner state that stays on a GPU while something else runs there; None = not a learner's GPU."""
        if learner_world is None or self.job.learner_offload:
            return 0.0
        return self.learner_bytes(learner_world)

    def engine_terms(self, gpus: int, learner_world: int | None) -> dict[str, float]:
        """What a GPU holds without KV while its engine is awake."""
        return {
            "weights": self.weight_bytes / gpus,
            "activations": self._number("serving.activation_bytes_per_gpu"),
            "learner state": self.idle_state_bytes(learner_world),
        }

    def engine_bytes(self, gpus: int, learner_world: int | None) -> float:
        """What a GPU holds without KV while its engine is awake."""
        return sum(self.engine_terms(gpus, learner_world).values())

    def resident_bytes(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """What a function keeps on each GPU between its tasks, and takes along when it is parked."""
        engine = self.weight_bytes / gpus if {"prefill", "decode"} & set(roles) else 0.0
        return engine + (self.learner_bytes(learner_world) if learner_world is not None else 0.0)

    def kv_bytes(self, gpus: int, learner_world: int | None) -> float:
        """KV memory of each GPU of an engine: its share of the GPU, less weights, activations and a resident learner.

        A colocated engine takes the preset's share, one that has its GPUs to itself vLLM's default of 0.9; a share that
        the user sets holds for both.
        """
        memory, own = self.node.gpu_memory_bytes, self.engine_bytes(gpus, None)
        by_share = self._share(learner_world) * memory - own
        return min(by_share, 0.98 * memory - own - self.idle_state_bytes(learner_world))

    def _share(self, learner_world: int | None) -> float:
        alone = learner_world is None and self.engine.gpu_memory_utilization is None
        return max(self._utilization, 0.9) if alone else self._utilization

    def kv_blocks(self, gpus: int, learner_world: int | None) -> int:
        """KV blocks of an engine."""
        return int(max(self.kv_bytes(gpus, learner_world), 0.0) * gpus / self.kv_token_bytes) // BLOCK_TOKENS

    # --- what does not fit ---

    def check_fit(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> None:
        """Raise `DoesNotFit` unless each role of a function has room on its GPUs.

        Args:
            gpus: Size of the function.
            roles: Its roles.
            learner_world: GPUs that share the learner's state if this function is one of them.
        """
        if "prefill" in roles or "decode" in roles:
            self._check_engine(gpus, learner_world)
        if "learn" in roles and learner_world is not None:
            self._check_shards(learner_world)
            self._check(f"learning with {self.job.model} on {learner_world} GPUs", self.learning_terms(learner_world))
        if "prepare" in roles:
            self._check(f"preparation with {self.job.model} on {gpus} GPUs", self.preparing_terms(gpus, learner_world))

    def _check_engine(self, gpus: int, learner_world: int | None) -> None:
        longest = self.job.max_prompt_tokens + self.job.max_response_tokens
        if self.kv_blocks(gpus, learner_world) * BLOCK_TOKENS >= longest:
            return
        terms = self.engine_terms(gpus, learner_world)
        terms[f"KV of one response of {longest} tokens"] = longest * self.kv_token_bytes / gpus
        share = f", of which an engine may use {self._share(learner_world):.0%}"
        self._refuse(f"{self.job.model} on {gpus} x {self.node.gpu} an engine", terms, share)

    def _check_shards(self, learner_world: int) -> None:
        shards = self.job.learner_tensor_parallel
        if learner_world % shards:
            raise DoesNotFit(f"job.learner_tensor_parallel={shards} must divide the {learner_world} GPUs that learn")

    def _check(self, what: str, terms: Mapping[str, float]) -> None:
        if sum(terms.values()) > self.node.gpu_memory_bytes:
            self._refuse(what, terms, "")

    def _refuse(self, what: str, terms: Mapping[str, float], share: str) -> NoReturn:
        """Raise `DoesNotFit` with the arithmetic, term by term, and what would help."""
        parts = " + ".join(f"{size / GB:.1f} {name}" for name, size in terms.items() if size)
        raise DoesNotFit(
            f"{what} does not fit: each {self.node.gpu} needs {sum(terms.values()) / GB:.1f} GB ({parts})"
            f" and has {self.node.gpu_memory_bytes / GB:.1f} GB{share} (try {self._advice(terms)})"
        )

    def _advice(self, terms: Mapping[str, float]) -> str:
        """What makes terms smaller that are a quarter of the sum or more."""
        job, quarter = self.job, sum(terms.values()) / 4
        learns, tries = "gradients" in terms, []
        by_tokens = sum(size for name, size in terms.items() if "activations of" in name or "logits" in name)
        if by_tokens > quarter and learns and not job.activation_checkpointing:
            tries.append("job.activation_checkpointing = true")
        if by_tokens > quarter and self._micro_batch_tokens() == job.micro_batch_tokens:
            tries.append("a smaller job.micro_batch_tokens")
        if terms["learner state"] > quarter:
            tries += [] if learns or job.learner_offload else ["job.learner_offload = true"]
            tries += [] if job.lora_rank or job.learner_strategy == "megatron" else ["job.lora_rank"]
        if not learns:
            tries.append("more GPUs an engine: engine.tensor_parallel")
        return ", ".join([*tries, "or more nodes" if tries else "more nodes"])
