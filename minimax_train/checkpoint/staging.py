"""Host memory that a state is copied into, to be written by another process: allocated once, shared, page-locked."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PIECE = 256 * 2**20
"""Bytes that are allocated, page-locked and copied in one call; each such call holds up others of the process."""
_ALIGNMENT = 4096
_CGROUP = Path("/sys/fs/cgroup")


class Place(NamedTuple):
    """Where a tensor lies in staging memory; ``offset`` in bytes, strides in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Stretch(NamedTuple):
    """Memory of one storage that tensors lie in without large gaps; ``offset``: of its copy in staging memory."""

    bytes_N: Tensor
    offset: int


class StagingMemory:
    """Memory of a size, which a descriptor hands to another process.

    Attributes:
        descriptor: of the memory, a file of its own that lies on no file system.
        failure: why it could not be allocated, once that is known.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
        self.descriptor = os.memfd_create("checkpoint")
        self.failure: str | None = None
        self._memory: mmap.mmap | None = None
        self._device, self._locked, self._closing = device, list[int](), False
        self._stream: torch.cuda.Stream | None = None
        self._thread = threading.Thread(target=self._allocate, name="checkpoint-staging", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether it can be copied into."""
        return self._memory is not None

    def copy(self, tensors: Sequence[Tensor]) -> tuple[list[Place], torch.Event | None]:
        """Copy tensors, on a GPU beside whatever is launched next: nothing may change them before the event, which is
        recorded when they are copied.

        Raises:
            ValueError: when they take more than the memory has.
        """
        assert self._memory is not None
        stretches, places, size = lay_out(tensors)
        if size > self.size:
            raise ValueError(f"{size} bytes to be staged, more than the {self.size} there are")
        if self._stream is None and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
        if self._stream is None:
            self._copy(stretches)
            return places, None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._copy(stretches)
        return places, self._stream.record_event()

    def close(self) -> None:
        """Give the memory back; nothing may be copying into it."""
        self._closing = True
        self._thread.join()
        for address in self._locked:
            _cudart().cudaHostUnregister(address)
        self._locked.clear()
        self._memory = None
        os.close(self.descriptor)

    def _allocate(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of this thread
            os.ftruncate(self.descriptor, self.size)
            memory = mmap.mmap(self.descriptor, self.size)
            for start in range(0, self.size, _PIECE):
                if self._closing:
                    return
                length = min(_PIECE, self.size - start)
                os.posix_fallocate(self.descriptor, start, length)
                if self._device.type == "cuda":
                    piece_N = torch.frombuffer(memory, dtype=torch.uint8, count=length, offset=start)
                    torch.cuda.check_error(int(_cudart().cudaHostRegister(piece_N.data_ptr(), length, 0)))
                    self._locked.append(piece_N.data_ptr())
            self._memory = memory
        except (OSError, RuntimeError) as error:
            self.failure = f"its staging memory of {self.size / 1e9:,.1f} GB cannot be allocated: {error}"

    def _copy(self, stretches: Sequence[_Stretch]) -> None:
        for stretch in stretches:
            done, end = 0, len(stretch.bytes_N)
            while done < end:
                # Memory that was page-locked in two calls does not take one copy.
                length = min(end - done, _PIECE - (stretch.offset + done) % _PIECE)
                source = stretch.bytes_N[done : done + length]
                place = {"count": length, "offset": stretch.offset + done}
                torch.frombuffer(self._memory, dtype=torch.uint8, **place).copy_(source, non_blocking=True)
                done += length


def lay_out(tensors: Sequence[Tensor]) -> tuple[list[_Stretch], list[Place], int]:
    """Where tensors go in staging memory, and its size. Those that lie beside each other, or are the same, are copied
    in one stretch: an engine's few large tensors, not its thousands of views of them."""
    spans = []
    for x in tensors:
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        spans.append((x.untyped_storage().data_ptr(), x.data_ptr(), reach * x.element_size() if x.numel() else 0))
    stretches: list[_Stretch] = []
    offsets = [0] * len(tensors)
    size, i = 0, 0
    order = sorted((i for i, span in enumerate(spans) if span[2]), key=lambda i: spans[i])
    while i < len(order):
        storage, start, _ = spans[order[i]]
        start = storage + (start - storage) // 64 * 64  # so that copies are as aligned as what is copied
        end, first = start, i
        while i < len(order) and spans[order[i]][0] == storage and spans[order[i]][1] <= end + _ALIGNMENT:
            end = max(end, spans[order[i]][1] + spans[order[i]][2])
            i += 1
        for j in order[first:i]:
            offsets[j] = size + spans[j][1] - start
        whole = torch.empty(0, dtype=torch.uint8, device=tensors[order[first]].device)
        whole.set_(tensors[order[first]].untyped_storage(), start - storage, (end - start,), (1,))
        stretches.append(_Stretch(whole, size))
        size += -(-(end - start) // _ALIGNMENT) * _ALIGNMENT
    described = zip(offsets, tensors, strict=True)
    return stretches, [Place(at, tuple(x.shape), tuple(x.stride()), x.dtype) for at, x in described], size


def staged(memory: mmap.mmap, place: Place) -> Tensor:
    """A tensor in staging memory; one that is contiguous has a storage of its own, which needs no copy to be saved."""
    itemsize = place.dtype.itemsize
    if 0 in place.shape:
        return torch.empty(place.shape, dtype=place.dtype)
    reach = sum((size - 1) * stride for size, stride in zip(place.shape, place.strides, strict=True)) + 1
    part = torch.frombuffer(memory, dtype=torch.uint8, count=reach * itemsize, offset=place.offset).view(place.dtype)
    return part.as_strided(place.shape, place.strides)


def _cudart() -> Any:
    return torch.cuda.cudart()


def available_memory() -> int:
    """Bytes that this machine, or the container that the process is in, can still give: caches of files count."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        for line in (_CGROUP / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name in ("active_file", "inactive_file"):
                used -= int(value)
        available = min(available, limit - used)
    except (OSError, ValueError):  # no such limit
        pass
    return available
