"""Safetensors folders as transformers lays them out, read and written a tensor, or rows of one, at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minimax_train.convert.jobs import run_jobs
from minimax_train.convert.json_file import read_json
from minimax_train.errors import ConfigError, require

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_DTYPE_ORDER = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Output:
    """A tensor to be written.

    Attributes:
        pieces: each makes some rows of it, in order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Callable[[], Tensor], ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500 MB``, ``1048576``; powers of ten, as in transformers.

    Raises:
        ConfigError: when it is not such a size, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip(), re.IGNORECASE | re.ASCII)
    size = Decimal(match[1]) * _UNITS[(match[2] or "").upper()] if match else Decimal(0)
    accepted = "must be a size such as 5GB or 500MB, at least one byte and less than 2^63"
    require(1 <= size < 2**63, "--max-shard-size", text, accepted)
    return int(size)


def write_shards(
    outputs: Iterable[Output],
    folder: Path,
    max_shard_bytes: int,
    report: Callable[[str], None],
    workers: int = 1,
) -> list[str]:
    """Write the tensors in order, a new file wherever the next one would take the file over the limit.

    Names, sizes and places are known before anything is made, so each worker makes a piece of a tensor and writes it to
    where it belongs.

    Returns:
        The files' names.

    Raises:
        ConfigError: when a value is not finite in the dtype it is cast to, or ``pieces`` raise it.
        OSError: when the files cannot be written.
    """
    shards, filled = [[]], 0
    for output in outputs:
        if shards[-1] and filled + output.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.num_bytes
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    jobs: list[_Job] = []
    for name, shard in zip(names, shards, strict=True):
        size = sum(output.num_bytes for output in shard)
        report(f"writing {name}: {len(shard)} tensors, {size / 1e9:.2f} GB")
        jobs += [_Job(folder / name, offset, output) for output, offset in _begin_shard(shard, folder / name)]
    total = sum(job.output.num_bytes for job in jobs)
    written = 0

    def done(written_now: tuple[str, int]) -> None:
        nonlocal written
        name, num_bytes = written_now
        before, written = written, written + num_bytes
        if 10 * written // total > 10 * before // total:
            report(f"{100 * written // total} % at {name}")

    run_jobs(_write_tensor, jobs, workers, done)
    if len(shards) > 1:
        everything = [output for shard in shards for output in shard]
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(output.shape) for output in everything),
                "total_size": sum(output.num_bytes for output in everything),
            },
            "weight_map": {o.name: name for name, shard in zip(names, shards, strict=True) for o in shard},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


class _Job(NamedTuple):
    file: Path
    offset: int
    output: Output


def _begin_shard(shard: list[Output], file: Path) -> list[tuple[Output, int]]:
    """Write a safetensors file without its tensors. Returns these with their places in the file.

    The file is the one that the safetensors library would write: tensors by dtype, the widest first, then by name.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    ordered = sorted(shard, key=lambda output: (_DTYPE_ORDER.index(output.dtype), output.name))
    ends = list(accumulate((output.num_bytes for output in ordered), initial=0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for output, start, end in zip(ordered, ends[:-1], ends[1:], strict=True):
        header[output.name] = {"dtype": codes[output.dtype], "shape": output.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _writing(file), open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + ends[-1])
    return [(output, 8 + len(text) + start) for output, start in zip(ordered, ends[:-1], strict=True)]


def _write_tensor(job: _Job) -> tuple[str, int]:
    """Make a tensor, a piece at a time, and write it to its place. Returns its name, and its size in bytes."""
    place = job.offset
    with _writing(job.file), open(job.file, "r+b", buffering=0) as stream:
        for piece in job.output.pieces:
            made = piece()
            cast = made.to(job.output.dtype).contiguous()
            if cast.dtype != made.dtype:  # what is made is finite
                require_finite(cast, job.output.name)
            buffer: Any = cast.flatten().view(torch.uint8).numpy()
            left = memoryview(buffer)
            while len(left):
                written = os.pwrite(stream.fileno(), left, place)
                place, left = place + written, left[written:]
    assert place == job.offset + job.output.num_bytes, job.output.name
    return job.output.name, job.output.num_bytes


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Errors of the operating system that name no file are about this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{file}: cannot be written: {error}") from error


def require_finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and infinity: a model that computes nothing, or a number too large for the dtype it was cast to.

    Raises:
        ConfigError: with their number.
    """
    finite = torch.isfinite(tensor)
    if not finite.all():
        count = tensor.numel() - int(finite.sum())
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ConfigError(f"{what}: {count} of {tensor.numel()} values are NaN or infinite as {dtype}; must be finite")


class TensorFolder:
    """The tensors of a safetensors folder, sharded or not; each is read from disk when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the index.

        Raises:
            ConfigError: when there are no safetensors, a file that the index names is missing or broken, or the index
                and the files disagree about a tensor.
        """
        self.folder = folder
        weight_map = _read_index(folder)
        self._files, self._file_of = {}, {}
        for file in sorted(set(weight_map.values())) if weight_map else [WEIGHTS]:
            try:
                self._files[file] = safe_open(folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{folder / file}: not a readable safetensors file: {error}") from error
            names = self._files[file].keys()
            for name in names:
                other = self._file_of.setdefault(name, file)
                if other != file:
                    raise ConfigError(f"{folder / file}: holds {name}, as {other} does; a tensor must be in one file")
        if weight_map:
            for name in sorted(weight_map.keys() | self._file_of.keys()):
                said, found = weight_map.get(name), self._file_of.get(name)
                if said != found:
                    where = "no file has it" if found is None else f"it is in {found}"
                    raise ConfigError(f"{folder / INDEX}: weight_map[{name!r}]={said!r}: {where}")

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor.

        Raises:
            ConfigError: when it is none that a weight can have here, such as a quantised one.
        """
        code = self._slice(name).get_dtype()
        require(code in DTYPES, name, code, f"weights must be one of {', '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str, index: Index = ()) -> Tensor:
        """A tensor, or the part of it at basic indices, without reading the rest."""
        return self._slice(name)[index or ...]

    def _slice(self, name: str):
        return self._files[self._file_of[name]].get_slice(name)


def _read_index(folder: Path) -> dict[str, str]:
    """File names by tensor; empty where there is one file, without an index."""
    index, whole = folder / INDEX, folder / WEIGHTS
    if not index.is_file():
        if not whole.is_file():
            raise ConfigError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}; weights must be safetensors")
        return {}
    if whole.is_file():
        raise ConfigError(f"{folder}: holds both {WEIGHTS} and {INDEX}; remove the one that is not the model")
    weight_map = read_json(index).get("weight_map")
    accepted = 'must be an object of tensors\' names and file names, {"name": "file"}'
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: weight_map={str(weight_map)[:80]}: {accepted}")
    for name, file in weight_map.items():
        fits = isinstance(file, str) and file == Path(file).name
        require(fits, f"{index}: weight_map[{name!r}]", file, "must be the name of a file beside the index")
    return weight_map
