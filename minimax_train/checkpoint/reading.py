"""Saved checkpoints opened and checked: what is damaged is told in one line that names the file."""

from __future__ import annotations

import io
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.futures import Future

from minimax_train.errors import ConfigError, one_line

METADATA = ".metadata"


class CheckpointFiles(dcp.FileSystemReader):
    """The files of one checkpoint, its index read and compared with the shards' sizes once.

    Args:
        path: the checkpoint.
        verify: compare what is read with the checksums saved beside it, which reads it twice.
    """

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        super().__init__(path)
        self._folder, self._verify = path, verify
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, once the first rank has seen every shard that it names there in full length. Reads no tensor.

        Raises:
            ConfigError: naming the file that is missing, cut short or no index.
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
            by_shard.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_shard.items():
            try:
                if self._verify:
                    for item in items:
                        self._check_record(item.storage_index)
                super().read_data(replace(plan, items=items), planner)
            except Exception as error:
                raise ConfigError(f"{self._folder / name}: damaged: it cannot be read: {one_line(error)}") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check_record(self, index: Any) -> None:
        info = self.storage_data[index]
        with open(self._folder / info.relative_path, "rb") as shard:
            shard.seek(info.offset)
            record = io.BytesIO(shard.read(info.length))
        # A record is a file of torch.save: a zip archive with the CRC-32 of its members.
        with zipfile.ZipFile(record) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile(f"the checksum of {index.fqn} is another")

    def _read_metadata(self) -> Metadata:
        file = self._folder / METADATA
        if not file.is_file():
            raise ConfigError(f"{self._folder}: not a whole checkpoint: there is no {METADATA} in it")
        ends: dict[str, int] = {}
        try:
            metadata = super().read_metadata()
            dict(metadata.state_dict_metadata)
            for info in metadata.storage_data.values():
                ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
            shards = {name: self._folder / name for name in sorted(ends)}
        except OSError:
            raise
        except Exception as error:  # unpickling damaged bytes may raise anything
            raise ConfigError(f"{file}: damaged: not the index of a checkpoint: {one_line(error)}") from error
        # One rank looks: a thousand would ask a file system for a thousand shards each.
        for name, shard in shards.items() if not dist.is_initialized() or dist.get_rank() == 0 else ():
            if not shard.is_file():
                raise ConfigError(f"{shard}: missing, though {file} names it")
            size = shard.stat().st_size
            if size < ends[name]:
                raise ConfigError(f"{shard}: damaged: it has {size} bytes, {file} says {ends[name]}")
        return metadata
