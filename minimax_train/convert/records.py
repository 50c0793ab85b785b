"""Tensors of a checkpoint read box by box from its shards, without what lies around them.

A shard holds records, one per tensor part that a rank saved. A record is a file of ``torch.save``: a zip archive, not
compressed, so the elements lie in the shard as they lie in memory. torch's own reader loads a record whole, which holds
all experts of a layer if one rank had them.
"""

from __future__ import annotations

import hashlib
import io
import os
import resource
import zipfile
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from minimax_train.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Entry
from minimax_train.checkpoint.remote import Folder, RemotePath, cannot_be_read
from minimax_train.errors import ConfigError

_BLOCK, _REMOTE_BLOCK = 2**20, 2**18
_OTHER_FILES = 64  # that a process has open beside shards


class Records:
    """The records of a checkpoint's tensors.

    Local shards are opened at once, as far as the system lets a process: they can then be read when the checkpoint has
    been removed, as a run does that keeps few. Those in an object store cannot.

    Args:
        folder: the checkpoint.
        index: what its ``.metadata`` holds.
        names: of the tensors that will be read, all of them in the index.

    Raises:
        OSError: when a shard cannot be opened.
    """

    def __init__(self, folder: Folder, index: Metadata, names: Collection[str]) -> None:
        self.folder, self._names = folder, names
        self._stored: dict[str, TensorStorageMetadata] = {
            name: stored
            for name in names
            if isinstance(stored := index.state_dict_metadata[name], TensorStorageMetadata)
        }
        self._storage = index.storage_data
        self.shards = sorted({info.relative_path for _, info in self._records(names)})
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < (wanted := len(self.shards) + _OTHER_FILES):
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self._held: dict[str, io.FileIO | _RemoteFile] = {}
        held = self.shards[: max(0, soft - _OTHER_FILES)]
        self._held = {name: self._open(name) for name in held}

    def check(self, shard: str, entry: Entry | None) -> None:
        """Read a shard whole and compare it with its hash, or each record with the checksums in it.

        Raises:
            DamagedCheckpoint: when it is not as it was saved.
            OSError: when it cannot be read.
        """
        if entry is None:
            for index, info in self._records(self._names):
                if info.relative_path == shard:
                    self._check_record(index, info)
            return
        hashed, file = hashlib.sha256(), self._open(shard)
        if isinstance(file, _RemoteFile):
            blocks = file.path.blocks()
        else:
            view = _View(file, 0, None)
            blocks = iter(lambda: view.read(_BLOCK), b"")
        for block in blocks:
            hashed.update(block)
        if hashed.hexdigest() != entry.sha256:
            told = f"its SHA-256 is {hashed.hexdigest()}, {self.folder / MANIFEST} says {entry.sha256}"
            raise DamagedCheckpoint(f"{self.folder / shard}: damaged: {told}")

    def read(self, name: str, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of a tensor, NaN where no record holds it.

        Raises:
            ConfigError: when a record cannot be read.
            OSError: when a shard cannot be opened.
        """
        stored = self._stored[name]
        box = torch.full(tuple(sizes), torch.nan, dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            lows = [max(a, b) for a, b in zip(starts, chunk.offsets, strict=True)]
            ends = zip(starts, sizes, chunk.offsets, chunk.sizes, strict=True)
            lengths = [min(a + m, b + n) - low for low, (a, m, b, n) in zip(lows, ends, strict=True)]
            if all(length > 0 for length in lengths):
                info = self._storage[MetadataIndex(name, chunk.offsets)]
                within = [low - offset for low, offset in zip(lows, chunk.offsets, strict=True)]
                places = zip(lows, starts, lengths, strict=True)
                place = tuple(slice(low - start, low - start + n) for low, start, n in places)
                box[place] = self._read_record(info, chunk.sizes, box.dtype, within, lengths)
        return box

    def _read_record(
        self, info: Any, shape: torch.Size, dtype: torch.dtype, starts: Sequence[int], sizes: Sequence[int]
    ) -> Tensor:
        file = self._open(info.relative_path)
        try:
            record: Any = _View(file, info.offset, info.length)
            # On the meta device torch reads all but the elements, and says where these are.
            whole = torch.load(record, weights_only=True, map_location="meta")
            if (whole.shape, whole.dtype) != (shape, dtype):
                raise ValueError(f"a record holds {whole.dtype} {tuple(whole.shape)}, not {dtype} {tuple(shape)}")
            strides = whole.stride()
            first = whole.storage_offset() + sum(a * stride for a, stride in zip(starts, strides, strict=True))
            span = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
            elements = torch.empty(span, dtype=dtype)
            record.seek(whole.untyped_storage()._checkpoint_offset + first * dtype.itemsize)
            buffer: Any = elements.view(torch.uint8).numpy()
            record.fill(memoryview(buffer))
            return elements.as_strided(tuple(sizes), strides)
        except Exception as error:  # of damaged bytes, torch may raise anything
            raise ConfigError(self._told(info.relative_path, error)) from error

    def _check_record(self, index: MetadataIndex, info: Any) -> None:
        file = self._open(info.relative_path)
        try:
            with zipfile.ZipFile(_View(file, info.offset, info.length)) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile(f"the checksum of {index.fqn} is another")
        except Exception as error:
            raise DamagedCheckpoint(self._told(info.relative_path, error)) from error

    def _told(self, shard: str, error: Exception) -> str:
        path = self.folder / shard
        return f"{path}: {cannot_be_read(path, error)}"

    def _records(self, names: Collection[str]) -> Iterable[tuple[MetadataIndex, Any]]:
        return ((index, info) for index, info in self._storage.items() if index.fqn in names)

    def _open(self, shard: str) -> io.FileIO | _RemoteFile:
        if shard in self._held:
            return self._held[shard]
        file = self.folder / shard
        return _RemoteFile(file) if isinstance(file, RemotePath) else io.FileIO(file)


class _RemoteFile:
    """A shard in an object store: what torch reads around elements lies together, and is read a block at a time."""

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self._block: tuple[int, bytes] = -1, b""

    def read_into(self, target: memoryview, place: int) -> int:
        """Returns how many bytes."""
        if len(target) >= _REMOTE_BLOCK:
            (data,) = self.path.read_ranges([(place, len(target))])
        else:
            number, offset = divmod(place, _REMOTE_BLOCK)
            if self._block[0] != number:
                (block,) = self.path.read_ranges([(number * _REMOTE_BLOCK, _REMOTE_BLOCK)])
                self._block = number, block
            data = self._block[1][offset : offset + len(target)]
        target[: len(data)] = data
        return len(data)


class _View(io.RawIOBase):
    """A part of a file, with a position of its own: processes that were forked share the file's."""

    def __init__(self, file: io.FileIO | _RemoteFile, offset: int, length: int | None) -> None:
        self._file, self._offset, self._place = file, offset, 0
        if length is None:
            assert isinstance(file, io.FileIO)
            length = os.fstat(file.fileno()).st_size - offset
        self._length = length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        if origin + place < 0:
            raise ValueError(f"no place {origin + place} in a file")
        self._place = origin + place
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")[: max(0, self._length - self._place)]
        read, place = 0, self._offset + self._place
        if len(target):
            file = self._file
            read = (
                os.preadv(file.fileno(), [target], place)
                if isinstance(file, io.FileIO)
                else file.read_into(target, place)
            )
        self._place += read
        return read

    def fill(self, target: memoryview) -> None:
        """Read as much as the target holds.

        Raises:
            EOFError: when there is less.
        """
        while len(target):
            read = self.readinto(target)
            if not read:
                raise EOFError("it ends before the elements do")
            target = target[read:]
