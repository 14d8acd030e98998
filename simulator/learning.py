"""How long preparation and learning take: FLOPs, communication, optimizer. Equations are in docs/model.md."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from simrl.traces.batches import micro_batches, padded_tokens
from simrl.traces.collectives import load_collectives
from simrl.traces.job import Job
from simrl.traces.models import Model
from simrl.traces.parameters import Parameter, Parameters

if TYPE_CHECKING:
    from simrl.simulator.costs import NodeType

Floats = npt.NDArray[np.float64]
Collective = Literal["all_gather", "reduce_scatter", "all_reduce"]
LARGE_BATCH = 200_000  # sequences of a mini-batch: a heap takes half a microsecond for each


def linear_parameters(model: Model, *, head: bool = True) -> int:
    """Weights that every token is multiplied with: projections, feed-forward layers and, with *head*, the output head.

    A tied output head multiplies as well; the look-up of embeddings does not. Norms and biases are left out.
    """
    q_width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = 2 * model.hidden * (q_width + kv_width) + 3 * model.hidden * model.intermediate
    return model.layers * layer + (model.vocab * model.hidden if head else 0)


def adapter_parameters(model: Model, rank: int) -> int:
    """Weights of LoRA adapters on all linear layers but the head: *rank* times inputs plus outputs of each."""
    q_width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = 2 * (model.hidden + q_width) + 2 * (model.hidden + kv_width)
    return rank * model.layers * (attention + 3 * (model.hidden + model.intermediate))


def forward_flops(model: Model, lengths: Floats, *, head: bool = True) -> Floats:
    """FLOPs of one forward pass over each sequence: two a weight and token, and causal attention.

    A token attends to itself and all before it, n(n + 1)/2 pairs in a sequence of n, with a multiplication and an
    addition a pair for the scores and for the values.
    """
    pairs = lengths * (lengths + 1) / 2
    return 2.0 * linear_parameters(model, head=head) * lengths + (
        4.0 * model.layers * model.heads * model.head_dim * pairs
    )


def deal(lengths: Floats, ranks: int) -> npt.NDArray[np.int64]:
    """The rank of each sequence, with nearly equal sums: longest first, each to the least loaded rank.

    verl takes Karmarkar-Karp; both are within a fraction of a percent of equal with a dozen sequences a rank or more.
    Beyond `LARGE_BATCH` sequences they are dealt to and fro, which leaves a few percent.
    """
    rank_of = np.empty(len(lengths), dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    if len(lengths) > LARGE_BATCH:
        there, seat = np.divmod(np.arange(len(lengths)), ranks)
        rank_of[longest_first] = np.where(there % 2 == 0, seat, ranks - 1 - seat)
        return rank_of
    loads = list(range(ranks))  # a heap of load x ranks + rank
    order = []
    for scaled in (lengths[longest_first].astype(np.int64) * ranks).tolist():
        least = loads[0]
        order.append(least % ranks)
        heapreplace(loads, least + scaled)
    rank_of[longest_first] = order
    return rank_of


def _ring_bytes(kind: Collective, size_bytes: float, gpus: int) -> float:
    """What passes each link of a ring; an all-reduce goes round twice."""
    return size_bytes * (gpus - 1) / gpus * (2 if kind == "all_reduce" else 1)


@dataclass(frozen=True, slots=True)
class Share:
    """What the busiest rank does of a batch.

    Attributes:
        tokens: Padding included.
        flops: Of one forward pass.
        micro_batches: As many as the rank with the most has: all ranks meet in every one.
    """

    tokens: float
    flops: float
    micro_batches: int


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model that runs in preparation; *loaded* is whether its weights are on the GPUs already."""

    model: Model
    head: bool
    loaded: bool


class Learning:
    """Seconds of preparation and learning for one job on one kind of node.

    Args:
        job: What is trained.
        model: Its architecture.
        node: The machines' type.
        parameters: Where constants come from.
    """

    def __init__(self, job: Job, model: Model, node: NodeType, parameters: Parameters) -> None:
        self.job, self.model, self.node = job, model, node
        self._parameters = parameters
        self._collectives = load_collectives(node.gpu)
        self._inside_s = functools.cache(self._compute_inside_s)

    # --- computing ---

    def _gpu(self, name: str) -> float:
        return self._parameters.number(f"gpu.{self.node.gpu}.{name}")

    def _layers_s(self, model: Model, passes: float) -> float:
        """What a micro-batch of any size takes: layers are launched one by one."""
        return passes * model.layers * self._parameters.number("learner.layer_overhead_s")

    def learning_passes(self) -> int:
        """FLOPs of learning in forward passes: one forward, two backward, one more that checkpointing recomputes.

        Of frozen weights under LoRA there are no gradients: one backward pass less.
        """
        return 3 + self.job.activation_checkpointing - bool(self.job.lora_rank)

    def model_flops(self, share: Share) -> float:
        """FLOPs of learning as MFU counts them: without recomputation."""
        return (self.learning_passes() - self.job.activation_checkpointing) * share.flops + self._adapter_flops(share)

    def hardware_flops(self, share: Share) -> float:
        """FLOPs of learning that the GPU carries out: with recomputation."""
        return self.learning_passes() * share.flops + self._adapter_flops(share)

    def _adapter_flops(self, share: Share) -> float:
        """Adapters are small: forward, backward and recomputation count as if all were there."""
        return 8.0 * adapter_parameters(self.model, self.job.lora_rank) * share.tokens

    def learning_compute_s(self, model: Model, share: Share) -> float:
        """Forward and backward of the busiest rank.

        ``learn_mfu`` is the model FLOPs utilisation of large micro-batches with checkpointing, as logs report it, so
        the hardware does 4/3 of it.
        """
        rate = self._gpu("peak_flops") * self._gpu("learn_mfu") * 4 / 3
        flops_s = self.hardware_flops(share) / (rate * self._tensor_parallel)
        return flops_s + share.micro_batches * self._layers_s(model, self.learning_passes())

    def achieved_mfu(self, micro_batch_tokens: int, length: int) -> float:
        """MFU of learning on micro-batches of so many tokens in sequences of *length*, communication apart."""
        sequences = np.full(max(micro_batch_tokens // length, 1), float(length))
        share = Share(float(sequences.sum()), float(forward_flops(self.model, sequences).sum()), 1)
        seconds = self.learning_compute_s(self.model, share) * self._tensor_parallel
        return self.model_flops(share) / (seconds * self._gpu("peak_flops"))

    # --- how a batch is cut ---

    @property
    def _tensor_parallel(self) -> int:
        return self.job.learner_tensor_parallel

    def share(self, lengths: Floats, ranks: int, model: Model, *, head: bool = True) -> Share:
        """The busiest of *ranks* data-parallel ranks.

        With packing, a rank's tokens make micro-batches of equal sums (verl's dynamic batch without padding); without,
        sequences of similar length come together and are padded to the longest.
        """
        rank_of = deal(lengths, ranks)
        limit = self.job.micro_batch_tokens
        if not self.job.packing:
            return self._padded_share(lengths, rank_of, ranks, model, head)
        tokens = np.bincount(rank_of, lengths, ranks).max()
        flops = np.bincount(rank_of, forward_flops(model, lengths, head=head), ranks).max()
        return Share(float(tokens), float(flops), math.ceil(tokens / limit))

    def _padded_share(
        self, lengths: Floats, rank_of: npt.NDArray[np.int64], ranks: int, model: Model, head: bool
    ) -> Share:
        tokens, flops, most = 0, 0.0, 0
        sizes = lengths.astype(int).tolist()
        by_rank = np.split(np.argsort(rank_of, kind="stable"), np.bincount(rank_of, minlength=ranks).cumsum()[:-1])
        for indices in by_rank:
            parts = micro_batches(sizes, indices.tolist(), self.job.micro_batch_tokens)
            padded = np.repeat([float(sizes[part[0]]) for part in parts], [len(part) for part in parts])
            tokens = max(tokens, padded_tokens(sizes, parts))
            flops = max(flops, float(forward_flops(model, padded, head=head).sum()))
            most = max(most, len(parts))
        return Share(float(tokens), flops, most)

    def _mini_batches(self, lengths: Floats) -> Iterator[Floats]:
        """A part for each optimizer step: whole groups in the order of the step, if *lengths* are those of a step."""
        job = self.job
        updates = math.ceil(job.prompts_per_step / job.mini_batch_prompts)
        ends = [min(update * job.mini_batch_prompts / job.prompts_per_step, 1.0) for update in range(1, updates)]
        yield from (part for part in np.split(lengths, [round(end * len(lengths)) for end in ends]) if len(part))

    # --- communication ---

    def collective_s(self, kind: Collective, size_bytes: float, gpus: int, nodes: int) -> float:
        """A collective over *gpus* GPUs of *nodes* nodes.

        Inside a node from measured NCCL tables, or a ring over the GPUs' links where there are none; where the table is
        that of a slow host, at least the bandwidth in `learner.pcie`. Between nodes the rings enter and leave each
        node through its NIC; the slower of the two sets the pace.

        Args:
            kind: Of NCCL.
            size_bytes: Of the whole buffer.
            gpus: All of them.
            nodes: That they are spread over, evenly.
        """
        if gpus == 1 or not size_bytes:
            return 0.0
        inside_s = self._inside_s(kind, size_bytes, math.ceil(gpus / nodes))
        if nodes == 1:
            return inside_s
        return max(inside_s, _ring_bytes(kind, size_bytes, gpus) / self.node.nic_bytes_per_s)

    def _compute_inside_s(self, kind: Collective, size_bytes: float, gpus: int) -> float:
        """Inside a node: measured, or no faster than a ring over the GPUs' links."""
        table, parameters, gpu = self._collectives, self._parameters, self.node.gpu
        ring_bytes = _ring_bytes(kind, size_bytes, gpus)
        if table is None:
            return ring_bytes / self.node.link_bytes_per_s
        measured_gpus = min(gpus, table.measured_gpus(kind)[-1])
        key, size = f"collectives.{gpu}.{kind}.{measured_gpus}", 2**28
        at_size_s = table.seconds(kind, size, measured_gpus)
        parameters.note(Parameter(key, at_size_s, "s, 256 MiB", "measured", table.source))
        seconds = table.seconds(kind, size_bytes, measured_gpus)
        if gpu not in parameters.names_in("learner.pcie"):
            return seconds
        return min(seconds, ring_bytes / parameters.number(f"learner.pcie.{gpu}.bus_bytes_per_s"))

    def _by_layer_s(self, kind: Collective, size_bytes: float, layers: int, gpus: int, nodes: int) -> float:
        """FSDP communicates layer by layer."""
        return layers * self.collective_s(kind, size_bytes / layers, gpus, nodes)

    def _trained_parameters(self) -> int:
        rank = self.job.lora_rank
        return adapter_parameters(self.model, rank) if rank else self.model.parameters

    def _fsdp_s(self, gpus: int, nodes: int) -> float:
        """A micro-batch: weights are gathered for forward and for backward, gradients reduced and scattered."""
        layers = self.model.layers
        gather_s = self._by_layer_s("all_gather", self.model.weight_bytes(), layers, gpus, nodes)
        reduced = self._parameters.number("learner.reduce_bytes_per_parameter") * self._trained_parameters()
        return 2 * gather_s + self._by_layer_s("reduce_scatter", reduced, layers, gpus, nodes)

    def _tensor_parallel_s(self, share: Share) -> float:
        """All-reduces of activations, two a layer and pass; nothing computes meanwhile."""
        passes = 2 + self.job.activation_checkpointing
        size_bytes = share.tokens / share.micro_batches * self.model.hidden * 2
        reduce_s = self.collective_s("all_reduce", size_bytes, self._tensor_parallel, 1)
        return share.micro_batches * passes * 2 * self.model.layers * reduce_s

    def _gradients_s(self, gpus: int, nodes: int) -> float:
        """Megatron's distributed optimizer: gradients are reduced and weights gathered once an optimizer step."""
        ranks, shard = self._ranks(gpus), self.model.parameters / self._tensor_parallel
        reduced = self._parameters.number("learner.reduce_bytes_per_parameter") * shard
        reduce_s = self.collective_s("reduce_scatter", reduced, ranks, nodes)
        return reduce_s + self.collective_s("all_gather", 2.0 * shard, ranks, nodes)

    def _exposed_s(self, communication_s: float, compute_s: float) -> float:
        """What computing does not hide of communication."""
        hidden_s = self._parameters.number("learner.overlap_efficiency") * communication_s
        return communication_s - min(hidden_s, compute_s)

    # --- stages ---

    def _ranks(self, gpus: int) -> int:
        return max(gpus // self._tensor_parallel, 1)

    def learn_s(self, tokens: Sequence[int], gpus: int, nodes: int) -> float:
        """A step's updates, at the pace of the busiest rank of each; under PPO the critic learns after the actor.

        Args:
            tokens: Of each response, prompt included, in the order of their ids.
            gpus: Of all learners.
            nodes: That they are spread over.
        """
        lengths = np.asarray(tokens, dtype=np.float64)
        heads = (True, False) if self.job.algorithm == "ppo" else (True,)
        return sum(self._update_s(part, gpus, nodes, head) for part in self._mini_batches(lengths) for head in heads)

    def _update_s(self, lengths: Floats, gpus: int, nodes: int, head: bool) -> float:
        """Forward, backward and the optimizer step of one model on one mini-batch."""
        share = self.share(lengths, self._ranks(gpus), self.model, head=head)
        compute_s = self.learning_compute_s(self.model, share)
        if self.job.learner_strategy == "megatron":
            return (
                compute_s
                + self._tensor_parallel_s(share)
                + self._exposed_s(self._gradients_s(gpus, nodes), compute_s)
                + self.optimizer_s(gpus)
            )
        communication_s = share.micro_batches * self._fsdp_s(gpus, nodes)
        return compute_s + self._exposed_s(communication_s, compute_s) + self.optimizer_s(gpus)

    def optimizer_s(self, gpus: int) -> float:
        """Adam reads and writes its state and the gradients once, sharded over all GPUs, at the GPU's memory rate."""
        number = self._parameters.number
        per_parameter = number("learner.bytes_per_parameter") + number("learner.gradient_bytes_per_parameter")
        return 2 * per_parameter * self._trained_parameters() / gpus / self._gpu("memory_bytes_per_s")

    def scorers(self) -> list[Scorer]:
        """The models that run in preparation.

        Old log-probs under the actor; the reference, which under LoRA is the actor without its adapters; PPO's critic,
        of the actor's size; the reward model.
        """
        job = self.job
        found = [Scorer(self.model, True, True)]
        if job.kl_reference:
            found.append(Scorer(self.model, True, bool(job.lora_rank)))
        if job.algorithm == "ppo":
            found.append(Scorer(self.model, False, False))
        if job.reward == "model":
            found.append(Scorer(self._parameters.model(job.reward_model or job.model), False, False))
        return found

    def prepare_s(self, tokens: Sequence[int], gpus: int, *, loaded: bool = False) -> float:
        """Log-probs, values and rewards of responses of so many tokens each, on one function of *gpus* GPUs.

        The function's GPUs share the weights and gather them layer by layer. Models other than the actor come over the
        host link, unless they are *loaded* from the task before. Rules are applied on CPU cores meanwhile.
        """
        if not len(tokens):
            return 0.0
        lengths = np.asarray(tokens, dtype=np.float64)
        score_s = functools.cache(lambda model, head: self.score_s(Scorer(model, head, True), lengths, gpus))
        seconds = 0.0
        for scorer in self.scorers():
            seconds += score_s(scorer.model, scorer.head)
            if not (loaded or scorer.loaded):
                seconds += scorer.model.weight_bytes() / gpus / self.node.host_bytes_per_s
        return max(seconds, self._rules_s(len(tokens)))

    def score_s(self, scorer: Scorer, lengths: Floats, gpus: int) -> float:
        """One forward pass of one model."""
        share = self.share(lengths, gpus, scorer.model, head=scorer.head)
        rate = self._gpu("peak_flops") * self._gpu("forward_mfu")
        compute_s = share.flops / rate + share.micro_batches * self._layers_s(scorer.model, 1)
        gather_s = self._by_layer_s("all_gather", scorer.model.weight_bytes(), scorer.model.layers, gpus, 1)
        return compute_s + self._exposed_s(share.micro_batches * gather_s, compute_s)

    def _rules_s(self, responses: int) -> float:
        if self.job.reward == "model":
            return 0.0
        number = self._parameters.number
        return number("learner.rule_reward_s") * responses / number("learner.reward_workers")
