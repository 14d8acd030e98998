"""How long things take and how much memory they need: pure arithmetic over sourced parameters.

Time-keeping is elsewhere; nothing here knows the clock. Equations are in docs/model.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from simrl.policies.contract import Role
from simrl.policies.runtime.steps import deal_to_and_fro
from simrl.simulator.engine import BLOCK_TOKENS
from simrl.traces.iteration import (
    Execution,
    IterationTimes,
    graph_batches,
    load_iteration_times,
    roofline_iteration_times,
)
from simrl.traces.job import Engine as EngineSpec
from simrl.traces.job import Job
from simrl.traces.models import Model, load_model
from simrl.traces.parameters import Parameter, Parameters, check_known, set_by_user

GB = 1e9


class DoesNotFit(ValueError):
    """A model that does not fit on the GPUs it is given; the message has the arithmetic."""


@dataclass(frozen=True, slots=True)
class NodeType:
    """A machine: what it has and how fast its links are, in bytes and bytes a second."""

    name: str
    gpu: str
    gpus: int
    host_memory_bytes: float
    host_bytes_per_s: float
    nic_bytes_per_s: float
    link_bytes_per_s: float
    gpu_memory_bytes: float

    @classmethod
    def load(cls, name: str, parameters: Parameters) -> NodeType:
        """The node type *name* out of the parameter table."""
        check_known("cluster.node_type", name, parameters.names_in("node"))
        gpu = parameters.name(f"node.{name}.gpu")
        return cls(
            name=name,
            gpu=gpu,
            gpus=int(parameters.number(f"node.{name}.gpus")),
            host_memory_bytes=parameters.number(f"node.{name}.host_memory_bytes"),
            host_bytes_per_s=parameters.number(f"node.{name}.host_bytes_per_s"),
            nic_bytes_per_s=parameters.number(f"node.{name}.nic_bytes_per_s") * parameters.number("network.efficiency"),
            link_bytes_per_s=parameters.number(f"gpu.{gpu}.link_bytes_per_s"),
            gpu_memory_bytes=parameters.number(f"gpu.{gpu}.memory_bytes"),
        )


class CostModel(Protocol):
    """What the simulated cluster asks: seconds and bytes for one job on one kind of node. See `Costs`."""

    job: Job
    engine: EngineSpec
    node: NodeType
    nodes: int
    block_tokens: int
    max_num_seqs: int
    max_batched_tokens: int
    prefix_caching: bool
    latency_s: float

    @property
    def times(self) -> Callable[[int], IterationTimes]:
        """Iteration times of an engine, by its GPUs."""

    def flat_batch(self, gpus: int, context: float) -> int:
        """Largest batch at which decode latency counts as flat."""

    def kv_blocks(self, gpus: int, learner_world: int | None) -> int:
        """KV blocks of an engine."""

    def check_fit(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> None:
        """Raise `DoesNotFit` unless each role of a function has room on its GPUs."""

    def prepare_s(self, tokens: Sequence[int], gpus: int, *, loaded: bool = False) -> float:
        """Preparation of responses of so many tokens each, prompts included, on one function."""

    def learn_s(self, tokens: Sequence[int], gpus: int, nodes: int) -> float:
        """An update with a step's responses of so many tokens each, prompts included, in the order of their ids."""

    def sync_s(self, gpus: int, nodes: int) -> float:
        """New weights into all engines."""

    def transfer_s(self, kv_tokens: int, gpus: int, *, same_node: bool) -> float:
        """KV from one function to another."""

    def resident_bytes(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """What a parked function keeps in host memory, of each GPU."""

    def park_s(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """GPU to host."""

    def wake_s(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """Host to GPU."""

    def switch_s(self, old: Role | None, new: Role, learner_world: int | None) -> float:
        """Changing the awake role."""

    def start_phases(self, gpus: int, roles: Sequence[Role], *, cached: bool) -> dict[str, float]:
        """Expected seconds of each phase of a cold start, "download" among them."""

    def start_spread(self) -> float:
        """Standard deviation of ln of each phase."""


class Costs:
    """Seconds and bytes for one job on one kind of node.

    Args:
        job: What is trained.
        engine: The rollout engine's options.
        node: The machines' type.
        nodes: How many of them.
        parameters: Where constants come from; what is read is noted there.
    """

    def __init__(self, job: Job, engine: EngineSpec, node: NodeType, nodes: int, parameters: Parameters) -> None:
        check_known("engine.preset", engine.preset, parameters.names_in("engine"))
        self.job, self.node, self.nodes = job, node, nodes
        self.model: Model = load_model(job.model)
        self.engine = engine
        self._parameters = parameters
        self.max_num_seqs = int(self._option("max_num_seqs"))
        self.max_batched_tokens = int(self._option("max_num_batched_tokens"))
        self._utilization = self._option("gpu_memory_utilization")
        self._eager = bool(self._option("enforce_eager"))
        self.latency_s = parameters.number("network.latency_s")
        self.block_tokens = BLOCK_TOKENS
        self.prefix_caching = engine.prefix_caching
        self.weight_bytes = float(self.model.weight_bytes())
        self.kv_token_bytes = float(self.model.kv_bytes_per_token())
        if engine.kv_cache_dtype == "fp8":
            self.kv_token_bytes /= 2
        self._forward_flops = 2.0 * self.model.parameters
        self.times = functools.cache(self._times)
        self._flat_batch = functools.cache(self._compute_flat_batch)

    def _option(self, name: str) -> float:
        """An engine option: the user's, else the preset's."""
        key = f"engine.{self.engine.preset}.{name}"
        given: float | bool | None = getattr(self.engine, name)
        if given is None:
            return self._parameters.number(key)
        shipped = self._parameters.entry(key)
        self._parameters.note(set_by_user(shipped, given if isinstance(given, bool) else float(given)))
        return given

    # --- engine iterations ---

    def _times(self, gpus: int) -> IterationTimes:
        """Iteration times of an engine that is tensor-parallel over *gpus* GPUs."""
        run = self._execution()
        times = load_iteration_times(self.model, self.node.gpu, gpus, run) or self._roofline(gpus, run)
        key = f"iteration_times.{self.model.name}.{self.node.gpu}.tp{gpus}"
        ends = (0.5, 2.0) if times.status == "assumed" else (None, None)
        self._parameters.note(
            Parameter(key, times.decode_s(1, 512), "s, one response at 512 tokens", times.status, times.source, *ends)
        )
        return times

    def _overhead_s(self) -> float:
        given = self.engine.overhead_s
        if given is not None:
            key = f"engine.{self.engine.preset}.overhead_s"
            self._parameters.note(Parameter(key, given, "s", "assumed", "set by the user", given, given))
            return given
        return self._parameters.number(f"engine.{self.engine.preset}.overhead_s_per_layer") * self.model.layers

    def _execution(self) -> Execution:
        """What the engine preset and the user's options make of the kernel times."""
        number, preset = self._parameters.number, f"engine.{self.engine.preset}"
        launch_s, batches = 0.0, tuple[int, ...]()
        if self._eager:
            launch_s = number(f"{preset}.launch_s_per_layer") * self.model.layers
        else:
            largest = min(int(number(f"{preset}.graph_max_batch")), self.max_batched_tokens)
            batches = graph_batches(largest, 256, int(number(f"{preset}.graph_wide_step")))
        factor = number("serving.fp8_kv_read_factor") if self.engine.kv_cache_dtype == "fp8" else 1.0
        return Execution(self._option("calibration"), self._overhead_s(), launch_s, batches, factor)

    def _roofline(self, gpus: int, execution: Execution) -> IterationTimes:
        number = self._parameters.number
        return roofline_iteration_times(
            self.model,
            peak_flops=number(f"gpu.{self.node.gpu}.peak_flops"),
            memory_bytes_per_s=number(f"gpu.{self.node.gpu}.memory_bytes_per_s"),
            tensor_parallel=gpus,
            flops_efficiency=number("roofline.flops_efficiency"),
            memory_efficiency=number("roofline.memory_efficiency"),
            allreduce_bytes_per_s=self.node.link_bytes_per_s,
            execution=execution,
        )

    def flat_batch(self, gpus: int, context: float) -> int:
        """Largest batch at which decode latency counts as flat, on *gpus* GPUs at a mean context, in steps of 64."""
        return self._flat_batch(gpus, 64 * math.ceil(context / 64))

    def _compute_flat_batch(self, gpus: int, context: int) -> int:
        tolerance = self._parameters.number("serving.flat_tolerance")
        return min(self.times(gpus).flat_batch(context, tolerance), self.max_num_seqs)

    # --- memory, bytes a GPU ---

    def learner_bytes(self, world: int) -> float:
        """The learner's resident state on each of *world* GPUs: master weights and optimizer.

        The reference model waits in host memory, as in verl's examples; PPO has a critic of the actor's size.
        """
        trained = 2 if self.job.algorithm == "ppo" else 1
        return trained * self._parameters.number("learner.bytes_per_parameter") * self.model.parameters / world

    def learning_bytes(self, world: int) -> float:
        """What a GPU holds while it learns: with gradients."""
        gradients = self._parameters.number("learner.gradient_bytes_per_parameter") * self.model.parameters / world
        return self.learner_bytes(world) + gradients + self._parameters.number("serving.workspace_bytes_per_gpu")

    def preparing_bytes(self, gpus: int, learner_world: int | None) -> float:
        """What a GPU holds while it prepares: one model in bf16 beside the learner's state."""
        state = self._idle_state_bytes(learner_world)
        return self.weight_bytes / gpus + state + self._parameters.number("serving.workspace_bytes_per_gpu")

    def _idle_state_bytes(self, learner_world: int | None) -> float:
        """Learner state that stays on a GPU while something else runs there; None = not a learner's GPU."""
        if learner_world is None or self.job.learner_offload:
            return 0.0
        return self.learner_bytes(learner_world)

    def engine_bytes(self, gpus: int, learner_world: int | None) -> float:
        """What a GPU holds without KV while its engine is awake."""
        activations = self._parameters.number("serving.activation_bytes_per_gpu")
        return self.weight_bytes / gpus + activations + self._idle_state_bytes(learner_world)

    def kv_bytes(self, gpus: int, learner_world: int | None) -> float:
        """KV memory of each GPU of an engine: its share of the GPU, less weights, activations and a resident learner.

        A colocated engine takes the preset's share, one that has its GPUs to itself vLLM's default of 0.9; a share that
        the user sets holds for both.
        """
        memory = self.node.gpu_memory_bytes
        alone = learner_world is None and self.engine.gpu_memory_utilization is None
        share = max(self._utilization, 0.9) if alone else self._utilization
        activations = self._parameters.number("serving.activation_bytes_per_gpu")
        by_share = share * memory - self.weight_bytes / gpus - activations
        return min(by_share, 0.98 * memory - self.engine_bytes(gpus, learner_world))

    def kv_blocks(self, gpus: int, learner_world: int | None) -> int:
        """KV blocks of an engine."""
        return int(max(self.kv_bytes(gpus, learner_world), 0.0) * gpus / self.kv_token_bytes) // BLOCK_TOKENS

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
            needs = self.learning_bytes(learner_world)
            self._check_bytes(needs, f"learning state of {self.job.model} over {learner_world} GPUs")
        if "prepare" in roles:
            needs = self.preparing_bytes(gpus, learner_world)
            self._check_bytes(needs, f"preparation with {self.job.model} on {gpus} GPUs")

    def _check_engine(self, gpus: int, learner_world: int | None) -> None:
        longest = self.job.max_prompt_tokens + self.job.max_response_tokens
        without_kv = self.engine_bytes(gpus, learner_world)
        kv = longest * self.kv_token_bytes / gpus
        room = self.kv_blocks(gpus, learner_world) * BLOCK_TOKENS
        if room < longest:
            state = self._idle_state_bytes(learner_world)
            weights = self.weight_bytes / gpus
            parts = f"{weights / GB:.1f} weights + {(without_kv - state - weights) / GB:.1f} activations"
            parts += f" + {state / GB:.1f} learner + {kv / GB:.1f} KV of one response of {longest} tokens"
            raise DoesNotFit(
                f"{self.job.model} does not fit on {gpus} x {self.node.gpu} an engine:"
                f" each GPU needs {(without_kv + kv) / GB:.1f} GB ({parts}) and has"
                f" {self.node.gpu_memory_bytes / GB:.1f} GB, of which an engine may use {self._utilization:.0%}"
                f" (try more GPUs an engine: engine.tensor_parallel, or more nodes)"
            )

    def _check_bytes(self, needs: float, what: str) -> None:
        has = self.node.gpu_memory_bytes
        if needs > has:
            raise DoesNotFit(
                f"{what} does not fit: each {self.node.gpu} needs {needs / GB:.1f} GB and has {has / GB:.1f} GB"
                f" (try more nodes, or job.learner_offload with a smaller model)"
            )

    # --- preparation and learning ---

    def _passes(self, kind: Literal["prepare", "learn"]) -> int:
        """Models that run: old and reference log-probs (and values) before learning, the actor (and critic) in it."""
        critic = self.job.algorithm == "ppo"
        return (2 if kind == "prepare" else 1) + critic

    def _token_flops(self, context: float) -> float:
        """Forward FLOPs of one token that attends to *context* others on average."""
        return self._forward_flops + 4.0 * self.model.layers * self.model.heads * self.model.head_dim * context

    def forward_s(self, tokens: int, gpus: int, mean_tokens: float) -> float:
        """One forward pass over *tokens* tokens in sequences of *mean_tokens* on average."""
        gpu = self.node.gpu
        rate = self._parameters.number(f"gpu.{gpu}.peak_flops") * self._parameters.number(f"gpu.{gpu}.forward_mfu")
        return tokens * self._token_flops(mean_tokens / 2) / (rate * gpus)

    def prepare_s(self, tokens: Sequence[int], gpus: int, *, loaded: bool = False) -> float:
        """Log-probs (values) and rule rewards of responses of so many tokens each, on one function of *gpus* GPUs.

        Models other than the engine's own come over the host link, unless they are *loaded* from the task before;
        rewards are scored on CPU cores meanwhile.
        """
        if not tokens:
            return 0.0
        passes = self._passes("prepare")
        loads = 0.0 if loaded else (passes - 1) * self.weight_bytes / gpus / self.node.host_bytes_per_s
        reward_s = self._parameters.number("learner.rule_reward_s") * len(tokens)
        reward_s /= self._parameters.number("learner.reward_workers")
        return max(passes * self.forward_s(sum(tokens), gpus, sum(tokens) / len(tokens)) + loads, reward_s)

    def learn_s(self, tokens: Sequence[int], gpus: int, nodes: int) -> float:
        """Forward, backward and an optimizer step a mini-batch, at the pace of the FSDP rank with the most tokens.

        Three forward passes' worth of FLOPs, as MFU counts them: what checkpointing recomputes lowers the MFU.
        Communication overlaps with computing; the longer of the two counts.
        """
        rank_tokens = max(map(sum, deal_to_and_fro(sorted(tokens, reverse=True), gpus)))
        mean_tokens = sum(tokens) / len(tokens)
        gpu = self.node.gpu
        rate = self._parameters.number(f"gpu.{gpu}.peak_flops") * self._parameters.number(f"gpu.{gpu}.learn_mfu")
        compute_s = 3 * rank_tokens * self._token_flops(mean_tokens / 2) / rate
        updates = math.ceil(self.job.prompts_per_step / self.job.mini_batch_prompts)
        micro_batches = updates * math.ceil(
            rank_tokens / updates / self._parameters.number("learner.micro_batch_tokens")
        )
        # All-gather for forward and for backward, then reduce-scatter.
        comm_s = 3 * micro_batches * self._collective_s(self.weight_bytes, gpus, nodes)
        return self._passes("learn") * (max(compute_s, comm_s) + updates * self._optimizer_s(gpus))

    def _collective_s(self, size_bytes: float, gpus: int, nodes: int) -> float:
        """A ring all-gather or reduce-scatter of *size_bytes* over *gpus* GPUs: its slowest link sets the pace."""
        if gpus == 1:
            return 0.0
        slowest = self.node.link_bytes_per_s
        if nodes > 1:
            slowest = min(slowest, self.node.nic_bytes_per_s)
        return size_bytes * (gpus - 1) / gpus / slowest

    def _optimizer_s(self, gpus: int) -> float:
        """Adam reads and writes its state once."""
        per_parameter = self._parameters.number("learner.bytes_per_parameter")
        per_parameter += self._parameters.number("learner.gradient_bytes_per_parameter")
        return (
            2
            * per_parameter
            * self.model.parameters
            / gpus
            / self._parameters.number(f"gpu.{self.node.gpu}.memory_bytes_per_s")
        )

    # --- movement ---

    def sync_s(self, gpus: int, nodes: int) -> float:
        """New weights into engines of *gpus* GPUs each, spread over *nodes* nodes.

        Every GPU takes in its share of the weights, every node's NIC one whole copy; the two are pipelined.
        """
        inside_s = self.weight_bytes / gpus / self.node.link_bytes_per_s
        between = min(self.node.nic_bytes_per_s, self._parameters.number("switch.sync_bytes_per_s"))
        between_s = self.weight_bytes / between if nodes > 1 else 0.0
        return self._parameters.number("switch.sync_setup_s") + max(inside_s, between_s)

    def transfer_s(self, kv_tokens: int, gpus: int, *, same_node: bool) -> float:
        """The KV of *kv_tokens* tokens between functions of *gpus* GPUs: each GPU's link, or over the idle NIC."""
        rate = gpus * self.node.link_bytes_per_s
        if not same_node:
            rate = min(gpus * self.node.host_bytes_per_s, self.node.nic_bytes_per_s)
        return self.latency_s + kv_tokens * self.kv_token_bytes / rate

    def host_move_s(self, bytes_per_gpu: float) -> float:
        """Moving that much between each GPU and host memory, all at once."""
        return bytes_per_gpu / self.node.host_bytes_per_s

    def resident_bytes(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """What a function keeps on each GPU between its tasks, and takes along when it is parked."""
        engine = self.weight_bytes / gpus if {"prefill", "decode"} & set(roles) else 0.0
        return engine + (self.learner_bytes(learner_world) if learner_world is not None else 0.0)

    def park_s(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """GPU to host. Engine weights have a host copy already (vLLM's sleep mode), the learner's state moves."""
        state_s = self.host_move_s(self._idle_state_bytes(learner_world))
        return self._parameters.number("switch.engine_sleep_s") + state_s

    def wake_s(self, gpus: int, roles: Sequence[Role], learner_world: int | None) -> float:
        """Host to GPU: engine weights and the learner's state."""
        weights_s = self.host_move_s(self.resident_bytes(gpus, roles, None))
        state_s = self.host_move_s(self._idle_state_bytes(learner_world))
        # The measured wake-up of small models includes their weights.
        return max(self._parameters.number("switch.engine_wake_s"), weights_s) + state_s

    def switch_s(self, old: Role | None, new: Role, learner_world: int | None) -> float:
        """Changing the awake role. Prefill and decode share an engine, prepare and learn a trainer.

        After a start or a wake (*old* is None) both are ready.
        """
        engine_before, engine_after = (role in ("prefill", "decode") for role in (old, new))
        offload_s = 0.0
        if self.job.learner_offload and learner_world is not None:
            offload_s = self.host_move_s(self.learner_bytes(learner_world))
        if old is None:
            return 0.0 if engine_after else offload_s
        if engine_before == engine_after:
            return 0.0
        return self._parameters.number("switch.engine_wake_s" if engine_after else "switch.engine_sleep_s") + offload_s

    def start_phases(self, gpus: int, roles: Sequence[Role], *, cached: bool) -> dict[str, float]:
        """Expected seconds of each phase of a cold start; *cached*: the node has the weights on its disk."""
        number = self._parameters.number
        phases = {"download": 0.0 if cached else self.weight_bytes / number("start.download_bytes_per_s")}
        phases["weights"] = self.weight_bytes / gpus / number("start.load_bytes_per_s")
        phases["init"] = number("start.init_s")
        if not self._eager and {"prefill", "decode"} & set(roles):
            phases["compile"] = number("start.compile_s")
            phases["capture"] = number("start.capture_s")
        return phases

    def start_spread(self) -> float:
        """Standard deviation of ln of each phase."""
        return self._parameters.number("start.spread")
