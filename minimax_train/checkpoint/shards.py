"""What each rank writes of a checkpoint, planned by PyTorch Distributed Checkpoint, and the files it writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _split_by_size_and_type, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from minimax_train.checkpoint.manifest import SHARD, Entry, seal
from minimax_train.checkpoint.remote import Folder, RemotePath

_LEAST_BYTES = 256 * 2**20
"""Of each of a rank's files, where it has several."""
_MOST_THREADS, _FILES_PER_THREAD = 4, 4  # so that some are written while others are synced or hashed


class Written(NamedTuple):
    """What a rank has written: where each item lies, and its files by name, which have reached the disk."""

    results: list[WriteResult]
    sealed: dict[str, Entry]


class SavePlanner:
    """Who writes what. It is planned by all ranks together once, for a state whose structure stays the same.

    Attributes:
        items: what this rank writes.
        metadata: on the first rank: the checkpoint's index, without the places in files.
        total_bytes: of all tensors of the state, over all ranks.
    """

    items: list[WriteItem]
    metadata: Metadata | None

    def __init__(self) -> None:
        self._planner = dcp.DefaultSavePlanner()
        self._structure: list | None = None
        self.total_bytes = 0

    def take(self, state: dict[str, Any]) -> bool:
        """The state to be saved next. Returns whether it fits the plan; if not, :meth:`plan` comes next."""
        self._planner.set_up_planner(state, is_coordinator=dist.get_rank() == 0)
        tensors = self._planner.state_dict
        structure = [(name, x.shape, x.dtype) for name, x in tensors.items()]
        fits, self._structure = structure == self._structure, structure
        self.total_bytes = sum(x.numel() * x.element_size() for x in tensors.values())
        return fits

    def plan(self) -> None:
        """Plan for the state that was taken; called by all ranks together."""

        def global_plan(local: list[SavePlan]) -> list[SavePlan]:
            plans, self.metadata = self._planner.create_global_plan(local)
            return plans

        self.metadata = None
        ranks = _DistWrapper(None, use_dist=True, coordinator_rank=0)
        self.items = ranks.reduce_scatter("plan", self._planner.create_local_plan, global_plan).items

    def hand_over(self) -> list[Tensor]:
        """This rank's parts of the state that was taken, in the order of the items, where the engine keeps them. The
        planner keeps nothing of it: an engine may have made copies."""
        tensors = [cast(Tensor, self._planner.resolve_data(item)).detach() for item in self.items]
        self._planner.state_dict = {}
        return tensors


def write_shards(folder: Folder, rank: int, items: Sequence[WriteItem], tensors: Sequence[Tensor]) -> Written:
    """Write a rank's files, several at a time, as FileSystemWriter lays them out, and seal them. Those that go to an
    object store are hashed on the way: reading them again is dear.

    FileSystemWriter itself keeps a copy of every tensor until the file is closed, the whole state in the end, and the
    errors of its threads are lost.

    Args:
        tensors: of the items, in their order, on any device.

    Raises:
        OSError: when a file cannot be written.
    """
    found = {item.index: tensor for item, tensor in zip(items, tensors, strict=True)}
    threads = min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))
    size = sum(x.numel() * x.element_size() for x in tensors)
    files = max(1, min(_FILES_PER_THREAD * threads, size // _LEAST_BYTES))
    parts = _split_by_size_and_type(files, list(items)) if items else []
    names = [f"__{rank}_{number}{SHARD}" for number in range(len(parts))]

    def write(name: str, part: list[WriteItem]) -> tuple[list[WriteResult], Entry]:
        file, tensors = folder / name, ((item, found[item.index]) for item in part)
        try:
            if isinstance(file, RemotePath):
                with file.writing() as stream:
                    results = list(_write_items(stream, name, tensors))
                return results, Entry(stream.size, stream.sha256)
            with open(file, "wb") as stream:
                results = list(_write_items(stream, name, tensors))
        except Exception as error:
            raise _cause(error) from None
        return results, seal(file)

    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(write, names, parts))
    sealed = {name: entry for name, (_, entry) in zip(names, done, strict=True)}
    return Written([result for results, _ in done for result in results], sealed)


def write_index(folder: Path, metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> None:
    """Write ``.metadata``: the plan's, with the places of all ranks' items.

    Raises:
        OSError: when it cannot be written.
    """
    dcp.FileSystemWriter(folder).finish(metadata, [list(each) for each in results])


def _write_items(stream: Any, name: str, tensors: Iterable[tuple[WriteItem, Tensor]]) -> Iterator[WriteResult]:
    for item, x in tensors:
        x = x.cpu()
        if x.untyped_storage().nbytes() != x.nbytes:
            x = x.clone()  # torch.save writes all of the memory that a view is of
        start = stream.tell()
        torch.save(x, stream)
        length = stream.tell() - start
        yield WriteResult(item.index, length, _StorageInfo(name, start, length))


def _cause(error: BaseException) -> BaseException:
    """The system's error (no space left) instead of the serializer's that comes of it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
