"""Saved checkpoints opened and checked: what is damaged is told in one line that names the file.

A checkpoint cannot run code. Its index is a pickle, of which only the classes listed here are made; tensors are read
by ``torch.load(weights_only=True)``, as torch's FileSystemReader does; other objects, which torch would unpickle
whatever they are, are refused.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, LoadPlan, LoadPlanner, filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future
from torch.serialization import _get_layout

from minimax_train.checkpoint.manifest import (
    MANIFEST,
    SHARD,
    DamagedCheckpoint,
    check_hashes,
    check_sizes,
    read_manifest,
    readable,
)
from minimax_train.checkpoint.remote import Folder, RemotePath, cannot_be_read, sizes_of
from minimax_train.errors import ConfigError, one_line
from minimax_train.metrics.console import note

METADATA = ".metadata"
_DOWNLOAD = 256 * 2**20
"""Bytes of records that are downloaded before they are read."""

_INDEX_CLASSES = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
    _get_layout,
)
# All that an index may name, by module and name.
_INDEX_NAMES: dict[tuple[str, str], Any] = {
    **{(made.__module__, made.__qualname__): made for made in _INDEX_CLASSES},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    # The folder it was saved to. Python 3.13 alone has these classes elsewhere.
    **{(module, name): pathlib.PurePath for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath")},
}


def tell_unchecked(folder: Folder, say: Callable[[str], None] = note) -> None:
    """Say that a checkpoint is taken as it is, where there is no manifest to compare its files with."""
    if read_manifest(folder) is None:
        say(f"{folder}: has no {MANIFEST}, so its files are not compared with what was saved")


class _IndexUnpickler(pickle.Unpickler):
    """Makes what the index of a checkpoint consists of, and nothing else.

    Raises:
        ConfigError: naming the file, and the class or function it asks for.
    """

    def __init__(self, file: Folder, stream: BinaryIO) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _INDEX_NAMES[module_name, global_name]
        except KeyError:
            raise ConfigError(
                f"{self._file}: refused: it asks for {module_name}.{global_name}, which is no part of a checkpoint's "
                "index and could run code"
            ) from None


class _RemoteShards(filesystem.FileSystem):
    """Has torch's reader ask :meth:`CheckpointFiles._slice_file` for all it reads."""

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        yield path


class CheckpointFiles(dcp.FileSystemReader):
    """The files of one checkpoint; its index is read once, and the files are compared with its manifest then.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: Folder) -> None:
        super().__init__(str(path))
        if isinstance(path, RemotePath):
            self.fs, self.path = _RemoteShards(), cast(Any, path)
        self._folder, self._records = path, dict[int, bytes]()
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, once the first rank has seen every shard there in full length, and every other file as it was
        saved. Reads no tensor.

        Raises:
            DamagedCheckpoint: naming the file that is missing, not as it was saved, or no index.
            ConfigError: when the index asks for what could run code.
        """
        if self._metadata is None:
            self._metadata = self._read_metadata()
        return self._metadata

    def load(self, state: dict[str, Any], *, no_dist: bool = False) -> None:
        """Fill a state dict in place, on all ranks together unless ``no_dist``.

        Raises:
            ConfigError: naming the damaged file, or what the checkpoint does not hold. The same on all ranks, even if
                only one met it.
        """
        with readable(self._folder):
            self.read_metadata()  # not first inside dcp.load, which logs an error with its traceback
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(state, storage_reader=self, no_dist=no_dist)
        except CheckpointException as error:
            cause, _ = error.failures[min(error.failures)]
            told = (
                str(cause) if isinstance(cause, ConfigError) else f"{self._folder}: cannot be loaded: {one_line(cause)}"
            )
            raise ConfigError(told) from error

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As torch has it, a shard at a time, so that an error can name it."""
        by_shard: dict[str, list] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                name = item.storage_index.fqn
                raise ConfigError(f"{self._folder / METADATA}: refused: {name} is a pickled object, must be a tensor")
            by_shard.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_shard.items():
            shard = self._folder / name
            try:
                if isinstance(shard, RemotePath):
                    self._read_remote(shard, items, plan, planner)
                else:
                    super().read_data(replace(plan, items=items), planner)
            except Exception as error:
                raise ConfigError(f"{shard}: {cannot_be_read(shard, error)}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_remote(self, shard: RemotePath, items: Sequence[Any], plan: LoadPlan, planner: LoadPlanner) -> None:
        """Many records are small: a request after the other would mostly wait."""
        places = [self.storage_data[item.storage_index] for item in items]
        batch: list[Any] = []
        wanted: dict[int, int] = {}
        for item, place in zip(items, places, strict=True):
            batch.append(item)
            wanted[place.offset] = place.length
            if item is items[-1] or sum(wanted.values()) >= _DOWNLOAD:
                self._records = dict(zip(wanted, shard.read_ranges(list(wanted.items())), strict=True))
                super().read_data(replace(plan, items=batch), planner)
                batch, wanted, self._records = [], {}, {}

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        if isinstance(file, RemotePath):
            return io.BytesIO(self._records[sinfo.offset])
        return super()._slice_file(file, sinfo)

    def _read_metadata(self) -> Metadata:
        file = self._folder / METADATA
        if not file.is_file():
            raise DamagedCheckpoint(f"{self._folder}: not a whole checkpoint: there is no {METADATA} in it")
        # One rank looks: a thousand would ask a file system for a thousand files each.
        looks = not dist.is_initialized() or dist.get_rank() == 0
        if looks:
            self._check_files()
        ends: dict[str, int] = {}
        try:
            index = _IndexUnpickler(file, io.BytesIO(file.read_bytes())).load()
            if not isinstance(index, Metadata):
                raise TypeError(f"it holds a {type(index).__name__}")
            index.storage_meta = index.storage_meta or StorageMeta()
            index.storage_meta.load_id = self.load_id
            dict(index.state_dict_metadata)
            for info in index.storage_data.values():
                if Path(info.relative_path).name != info.relative_path:
                    raise ValueError(f"{info.relative_path!r} is no file of the checkpoint's folder")
                ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
            names = sorted(ends)
        except (OSError, ConfigError):
            raise
        except Exception as error:  # unpickling damaged bytes may raise anything
            raise DamagedCheckpoint(f"{file}: damaged: not the index of a checkpoint: {one_line(error)}") from error
        sizes = sizes_of(self._folder, names) if looks else {}
        for name in names if looks else ():
            shard, size = self._folder / name, sizes.get(name)
            if size is None:
                raise DamagedCheckpoint(f"{shard}: missing, though {file} names it")
            if size < ends[name]:
                raise DamagedCheckpoint(f"{shard}: damaged: it has {size} bytes, {file} says {ends[name]}")
        return index

    def _check_files(self) -> None:
        manifest = read_manifest(self._folder)
        if manifest is not None:
            check_sizes(self._folder, manifest)
            check_hashes(self._folder, manifest, [name for name in manifest if not name.endswith(SHARD)])
