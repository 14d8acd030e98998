"""How a batch is cut: mini-batches for optimizer steps, shares for ranks, micro-batches.

Every rank of a learner gets the whole batch (token ids are small) and cuts it here by the same rules, so that all ranks
know, without asking each other, who takes what and how many micro-batches the busiest of them has. A profile's times
are of such cuts, and so the simulator cuts as the learner does.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapreplace
from itertools import chain


def mini_batches(groups: Sequence[int | str], prompts: int) -> list[list[int]]:
    """Positions of the responses of each optimizer step: whole groups, *prompts* of them, in the order of the batch."""
    members: dict[int | str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    whole = list(members.values())
    return [list(chain(*whole[start : start + prompts])) for start in range(0, len(whole), prompts)]


def shares(tokens: Sequence[int], indices: Sequence[int], ranks: int) -> list[list[int]]:
    """Divide *indices* over *ranks* with nearly equal sums of *tokens*: longest first, each to the least loaded rank.

    A share can be empty.
    """
    parts: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]  # a heap
    for index in _longest_first(tokens, indices):
        load, rank = loads[0]
        parts[rank].append(index)
        heapreplace(loads, (load + tokens[index], rank))
    return parts


def micro_batches(tokens: Sequence[int], indices: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Cut *indices* so that each part, padded to its longest sequence, has at most *micro_batch_tokens* tokens.

    Sequences of similar length come together. One that is longer than the limit has a micro-batch of its own.
    """
    parts: list[list[int]] = []
    for index in _longest_first(tokens, indices):
        if parts and (len(parts[-1]) + 1) * tokens[parts[-1][0]] <= micro_batch_tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def padded_tokens(tokens: Sequence[int], parts: Sequence[Sequence[int]]) -> int:
    """Tokens of micro-batches, each padded to its longest sequence."""
    return sum(len(part) * max(tokens[index] for index in part) for part in parts)


def rank_micro_batches(
    tokens: Sequence[int], indices: Sequence[int], rank: int, world: int, micro_batch_tokens: int
) -> tuple[list[list[int]], int]:
    """One rank's micro-batches of *indices*, and how many the rank with the most of them has."""
    by_rank = [micro_batches(tokens, share, micro_batch_tokens) for share in shares(tokens, indices, world)]
    return by_rank[rank], max(map(len, by_rank))


def _longest_first(tokens: Sequence[int], indices: Sequence[int]) -> list[int]:
    return sorted(indices, key=lambda index: (-tokens[index], index))
