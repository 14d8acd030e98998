"""KV between engines as files: a connector for vLLM that finds the KV of a token prefix under the weights it is from.

One file holds one block of one tensor-parallel rank: its KV of all layers, as raw bytes. It is named by a hash chained
over all tokens up to the end of the block, and stands in a folder named by the version of the weights. So an engine
with other weights, another block size or another tensor-parallel size cannot hit it, and blocks that prompts share are
there once. Nothing is saved on the way: `save_blocks` writes what is asked for. vLLM asks `FileConnector` for what can
be loaded.

Engines on several nodes need a folder on a file system that these share. The connectors that come with vLLM (Nixl,
LMCache, Mooncake) send KV over the network instead, but save by rules of their own and know no version of the weights.

This module imports vLLM and is itself imported by vLLM, by its name.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from simrl.real_backend.engine import KVMove


def over_ranks(moves: Sequence[KVMove]) -> KVMove:
    """What the ranks of an engine moved together, each its share of the same blocks."""
    return KVMove(
        max(move.num_blocks for move in moves),
        sum(move.num_bytes for move in moves),
        max(move.seconds for move in moves),
    )


def block_names(token_ids: Sequence[int], block_tokens: int) -> list[str]:
    """A name for each whole block of *token_ids*, from its tokens and all before it."""
    names = []
    chain = hashlib.sha256(f"{block_tokens}".encode())
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        chain.update(array("q", token_ids[start : start + block_tokens]).tobytes())
        names.append(chain.copy().hexdigest()[:40])
    return names


def version_folder(kv_folder: str | Path, version: int) -> Path:
    """Where the KV that weights *version* computed is kept."""
    return Path(kv_folder) / f"v{version}"


def forget_versions(kv_folder: str | Path, version: int) -> None:
    """Delete the KV of weights *version* and older."""
    for folder in Path(kv_folder).glob("v*"):
        if folder.name[1:].isdecimal() and int(folder.name[1:]) <= version:
            shutil.rmtree(folder, ignore_errors=True)  # another engine may be deleting it as well


def rank_file(folder: Path, name: str, rank: int, ranks: int) -> Path:
    """The file of one rank's share of a block."""
    return folder / f"{name}.{rank}of{ranks}"


def save_blocks(worker: Any, folder: str, names: Sequence[str], block_ids: Sequence[int]) -> KVMove:
    """Write blocks of a worker's KV cache to *folder*; those that are there already are skipped.

    Runs on every worker (`collective_rpc`).

    Args:
        worker: vLLM's worker.
        folder: Of the version of the weights that computed the blocks.
        names: One a block.
        block_ids: Where each of them is in the KV cache.

    Returns:
        What was really written.
    """
    started_s = time.perf_counter()
    rank, ranks = worker.rank, worker.parallel_config.tensor_parallel_size
    paths = [rank_file(Path(folder), name, rank, ranks) for name in names]
    missing = [(path, block) for path, block in zip(paths, block_ids, strict=True) if not path.exists()]
    if not missing:
        return KVMove(seconds=time.perf_counter() - started_s)
    layers = worker.vllm_config.compilation_config.static_forward_context
    caches = _kv_caches(layers, worker.model_runner.kv_cache_config.num_blocks)
    index = torch.tensor([block for _, block in missing])
    parts = [_as_bytes(cache.index_select(0, index.to(cache.device))) for cache in caches]
    rows = torch.cat(parts, dim=1)
    Path(folder).mkdir(mode=0o700, exist_ok=True)
    for (path, _), row in zip(missing, rows.numpy(), strict=True):
        _write_whole(path, row)
    return KVMove(len(missing), rows.numel(), time.perf_counter() - started_s)


def _write_whole(path: Path, content: Any) -> None:
    """Write by rename, so that no other engine reads half a block."""
    handle, name = tempfile.mkstemp(dir=path.parent)  # private: mode 0600
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(name, path)


def _kv_caches(layers: dict[str, Any], num_blocks: int) -> list[torch.Tensor]:
    """The KV caches of all attention layers, in the order of their names; each [blocks, ...].

    Raises:
        ValueError: they are laid out otherwise, so that a block's number is not its index.
    """
    found = [getattr(layer, "kv_cache", None) for _, layer in sorted(layers.items())]
    caches = [cache for cache in found if isinstance(cache, torch.Tensor)]
    if {cache.shape[0] for cache in caches} != {num_blocks}:
        raise ValueError(f"expected KV caches of {num_blocks} blocks, got shapes {[tuple(c.shape) for c in caches]}")
    return caches


def _as_bytes(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks [n, ...] of any type on any device -> [n, bytes] in host memory."""
    return blocks.reshape(len(blocks), -1).view(torch.uint8).cpu()


@dataclass
class BlocksToLoad(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the workers before an iteration: which files go into which blocks.

    Attributes:
        folder: Of the version of the weights.
        names: One a block.
        block_ids: One a block.
        num_blocks: In the KV cache.
    """

    folder: str = ""
    names: list[str] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_blocks: int = 0


@dataclass
class Loaded(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the workers tell the scheduler after an iteration."""

    move: KVMove

    def aggregate(self, other: Loaded) -> Loaded:
        """What two ranks loaded together."""
        return Loaded(over_ranks([self.move, other.move]))


class FileConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Loads whole blocks of KV from files when vLLM admits a request whose prefix they hold.

    Extra configuration: `kv_folder` and `weights_version`. What the worker's side needs comes with each iteration, so
    that engines of one process can share the worker's side, which vLLM keeps once a process.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError("this connector moves the KV of models with one kind of attention only")
        config = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._kv_folder = Path(config["kv_folder"])
        self._block_tokens: int = vllm_config.cache_config.block_size
        self._ranks: int = vllm_config.parallel_config.tensor_parallel_size
        self._rank: int = vllm_config.parallel_config.rank
        self._folder = version_folder(self._kv_folder, config["weights_version"])
        self._asked: _Prefix | None = None
        self._to_load = BlocksToLoad()
        self._num_loading = 0
        self._loaded: KVMove | None = None
        self._failed_blocks: set[int] = set()

    # --- The scheduler's side. ---

    def set_weights_version(self, version: int) -> None:
        """From now on only KV that weights *version* computed can be hit."""
        self._folder = version_folder(self._kv_folder, version)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens beyond the locally cached ones whose whole blocks are in files; all but the last known one at most."""
        prefix = self._prefix_of(request)
        prefix.num_local = num_computed_tokens // self._block_tokens
        most = (request.num_tokens - 1) // self._block_tokens
        found = itertools.takewhile(self._is_there, prefix.names[prefix.num_local : most])
        return sum(1 for _ in found) * self._block_tokens, False

    def _prefix_of(self, request: Any) -> _Prefix:
        """Block names of a request, kept while vLLM asks for the same one again, iteration after iteration."""
        asked = self._asked
        if asked is None or (asked.request_id, asked.num_tokens) != (request.request_id, request.num_tokens):
            names = block_names(request.all_token_ids, self._block_tokens)
            self._asked = asked = _Prefix(request.request_id, request.num_tokens, names)
        return asked

    def _is_there(self, name: str) -> bool:
        return all(rank_file(self._folder, name, rank, self._ranks).exists() for rank in range(self._ranks))

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which blocks of an admitted request are to be loaded: those that follow its locally cached ones."""
        prefix = self._prefix_of(request)  # as vLLM has just asked for it
        wanted = slice(prefix.num_local, prefix.num_local + num_external_tokens // self._block_tokens)
        self._to_load.names += prefix.names[wanted]
        self._to_load.block_ids += blocks.get_block_ids()[0][wanted]

    def build_connector_meta(self, scheduler_output: Any) -> BlocksToLoad:
        """What the workers have to load before this iteration."""
        to_load, self._to_load = self._to_load, BlocksToLoad()
        to_load.folder = str(self._folder)
        to_load.num_blocks = self._kv_cache_config.num_blocks
        self._num_loading = len(to_load.names)
        return to_load

    def update_connector_output(self, connector_output: Any) -> None:
        """Take note of what the workers loaded."""
        if connector_output.kv_connector_worker_meta is not None:
            self._loaded = connector_output.kv_connector_worker_meta.move

    def take_loaded(self) -> KVMove:
        """What the last iteration loaded.

        Raises:
            RuntimeError: blocks were to be loaded and no worker did, so that the KV cache holds garbage.
        """
        loaded, self._loaded = self._loaded, None
        expected, self._num_loading = self._num_loading, 0
        if expected and loaded is None:
            raise RuntimeError(f"no worker loaded the {expected} KV blocks of this iteration")
        return loaded or KVMove()

    # --- The worker's side. ---

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Read this iteration's blocks; one whose file is gone or short is reported and computed anew."""
        to_load: BlocksToLoad = self._get_connector_metadata()
        if not to_load.names:
            return
        started_s = time.perf_counter()
        caches = _kv_caches(forward_context.no_compile_layers, to_load.num_blocks)
        block_bytes = [cache[0].numel() * cache.element_size() for cache in caches]
        block_ids, contents = [], []
        for name, block in zip(to_load.names, to_load.block_ids, strict=True):
            content = _read(rank_file(Path(to_load.folder), name, self._rank, self._ranks))
            if len(content) == sum(block_bytes):
                block_ids.append(block)
                contents.append(content)
            else:
                self._failed_blocks.add(block)
        if contents:
            _fill(caches, block_ids, torch.frombuffer(bytearray().join(contents), dtype=torch.uint8), block_bytes)
        moved = KVMove(len(contents), len(contents) * sum(block_bytes), time.perf_counter() - started_s)
        self._loaded = moved

    def build_connector_worker_meta(self) -> Loaded | None:
        """What this worker loaded before the iteration that just ran."""
        loaded, self._loaded = self._loaded, None
        return None if loaded is None else Loaded(loaded)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be read before the iteration that just ran."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: all layers are loaded before the iteration."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved on the way."""

    def wait_for_save(self) -> None:
        """Nothing is saved on the way."""


@dataclass
class _Prefix:
    """Block names of the request that is to be admitted next, and how many of these blocks are cached locally."""

    request_id: str
    num_tokens: int
    names: list[str]
    num_local: int = 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # its version was forgotten between the scheduler's look and now
        return b""


def _fill(caches: list[torch.Tensor], block_ids: list[int], content: torch.Tensor, block_bytes: list[int]) -> None:
    """Copy blocks into KV caches; *content* is [blocks * bytes], each block's layers one after the other."""
    index = torch.tensor(block_ids)
    parts = content.view(len(block_ids), -1).split(block_bytes, dim=1)
    for cache, part in zip(caches, parts, strict=True):
        blocks = part.contiguous().view(cache.dtype).view(-1, *cache.shape[1:])
        cache.index_copy_(0, index.to(cache.device), blocks.to(cache.device))
