"""Checkpoints read and written chunk by chunk, by any number of processes without a process group.

A converted checkpoint holds what ``checkpoint.initial_weights`` and ``minimax-convert to-hf`` read:

    *.distcp .metadata        "model.<parameter>", each chunk (an expert, ...) a file of its own
    config.yaml               the ``model`` group alone
    model/imported.yaml       the same as a Hydra group: ``minimax-train --config-dir CHECKPOINT model=imported``
    huggingface.json          what it was converted from (Origin)
    tokenizer/                where there was one
    manifest.json             size and SHA-256 of each of these files
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from yaml import YAMLError

from minimax_train.checkpoint.manifest import Entry, read_manifest, seal
from minimax_train.checkpoint.reading import CheckpointFiles
from minimax_train.checkpoint.remote import Folder
from minimax_train.convert.jobs import run_jobs
from minimax_train.convert.json_file import read_json
from minimax_train.convert.names import Chunk, Parameter, Part
from minimax_train.convert.records import Records
from minimax_train.convert.shards import DTYPES, require_finite
from minimax_train.errors import ConfigError, one_line, require
from minimax_train.files import CONFIG
from minimax_train.model import ModelConfig

ORIGIN = "huggingface.json"
GROUP_FILE = "model/imported.yaml"
PREFIX = "model."


@dataclass
class Origin:
    """The Hugging Face folder that a checkpoint was converted from, for what has no place in ours.

    Attributes:
        config: its ``config.json``.
        generation_config: its ``generation_config.json``.
        decay_dtype: of the decays it kept as buffers, ``float32`` or ``bfloat16``.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    decay_dtype: str


def read_model_config(path: str | Path) -> ModelConfig:
    """The ``model`` group of a ``config.yaml``, a run's or a converted checkpoint's.

    Raises:
        ConfigError: when the file is missing or its model is not one.
    """
    tree = read_yaml(path)
    try:
        model: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), tree.get("model") or {}))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # OmegaConf raises Python's own for values that are no configuration
        raise ConfigError(f"{path}: no model configuration: {one_line(error)}") from error
    return model


def read_yaml(path: str | Path) -> DictConfig:
    """A ``config.yaml``.

    Raises:
        ConfigError: when it cannot be read, or is none.
    """
    try:
        tree = OmegaConf.load(path)
    except (OSError, ValueError, RecursionError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path}: no configuration: {one_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: no configuration: holds a list, must hold a mapping")
    return tree


def write_model_config(model: ModelConfig, folder: Path) -> None:
    values = dataclasses.asdict(model)
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create({"model": values})))
    (folder / GROUP_FILE).parent.mkdir()
    (folder / GROUP_FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(values)))


def read_sequence_length(path: str | Path) -> int:
    """Tokens of the packed sequences that a ``config.yaml`` names, a run's or a checkpoint's.

    Raises:
        ConfigError: when it names none.
    """
    try:
        length = OmegaConf.select(read_yaml(path), "data.sequence_length")
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: data.sequence_length: {one_line(error)}") from error
    fits = isinstance(length, int) and not isinstance(length, bool) and 0 < length <= 2**40
    accepted = f"must be a whole number from 1 to 2^40; only a converted checkpoint, with {ORIGIN}, has none"
    require(fits, f"{path}: data.sequence_length", length, accepted)
    return length


def read_origin(folder: Path) -> Origin | None:
    """What a converted checkpoint was made from; None for a run's.

    Raises:
        ConfigError: when the file is damaged.
    """
    file = folder / ORIGIN
    if not file.is_file():
        return None
    content = read_json(file)
    names = [field.name for field in dataclasses.fields(Origin)]
    require(sorted(content) == sorted(names), f"{file}: keys", sorted(content), f"must be {', '.join(names)}")
    origin = Origin(**content)
    require(isinstance(origin.config, dict), f"{file}: config", origin.config, "must be an object")
    fits = isinstance(origin.generation_config, dict | None)
    require(fits, f"{file}: generation_config", origin.generation_config, "must be an object or null")
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
    fits = origin.decay_dtype in dtypes
    require(fits, f"{file}: decay_dtype", origin.decay_dtype, f"must be one of {', '.join(dtypes)}")
    return origin


def write_origin(origin: Origin, folder: Path) -> None:
    (folder / ORIGIN).write_text(json.dumps(dataclasses.asdict(origin), indent=2) + "\n")


class CheckpointReader:
    """Parameters of a checkpoint, read part by part.

    Args:
        folder: the checkpoint.

    Raises:
        ConfigError: naming the file that is missing or damaged.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._index = CheckpointFiles(folder).read_metadata()
        self._manifest = read_manifest(folder)
        self._dtypes: dict[str, torch.dtype] = {}

    def open(self, parameters: Iterable[Parameter]) -> CheckpointReader:
        """Open the shards of what will be read; a local checkpoint may then be removed. Returns itself.

        Raises:
            ConfigError: naming the parameter that it does not hold, or holds in another shape or as no floating type.
            OSError: when a shard cannot be opened.
        """
        for parameter in parameters:
            stored = self._index.state_dict_metadata.get(PREFIX + parameter.name)
            if not isinstance(stored, TensorStorageMetadata) or stored.size != parameter.shape:
                held = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else "none"
                raise ConfigError(
                    f"{self.folder}: {PREFIX}{parameter.name}: {CONFIG} wants {tuple(parameter.shape)}, it holds {held}"
                )
            self._dtypes[parameter.name] = dtype = stored.properties.dtype
            accepted = f"weights must be one of {', '.join(map(str, DTYPES.values()))}"
            require(dtype in DTYPES.values(), f"{self.folder}: {PREFIX}{parameter.name}", dtype, accepted)
        self._records = Records(self.folder, self._index, {PREFIX + name for name in self._dtypes})
        return self

    def check(self, workers: int = 1) -> None:
        """Compare what is read with its checksums; each shard is read once.

        Raises:
            ConfigError: naming the shard that is damaged.
        """
        entries = self._manifest or {}

        def check(shard: str) -> None:
            self._records.check(shard, entries.get(shard))

        shards = sorted(self._records.shards, key=lambda name: -entries[name].size if name in entries else 0)
        run_jobs(check, shards, workers)

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self._dtypes[parameter.name]

    def read(self, parameter: Parameter, chunk: Chunk, part: Part | None = None) -> Tensor:
        """A chunk of a parameter, or a part of it, every element finite.

        Raises:
            ConfigError: when one is not, or the file that holds it is damaged.
        """
        starts = [chunk.start] + [0] * (len(parameter.shape) - 1)
        sizes = [chunk.length, *parameter.shape[1:]]
        index = () if part is None else part.index
        for dim, place in enumerate(index):
            starts[dim] += place
            sizes[dim] = 1
        box = self._records.read(PREFIX + parameter.name, starts, sizes).view(sizes[len(index) :])
        require_finite(box, f"{self.folder}: {PREFIX}{parameter.name}")
        return box if part is None or part.rows is None else box[part.rows]


def write_parameters(
    folder: Path,
    parameters: list[Parameter],
    dtype_of: Callable[[Parameter], torch.dtype],
    make: Callable[[Parameter, Chunk], Tensor],
    workers: int = 1,
    done: Callable[[Parameter, Chunk], None] = lambda parameter, chunk: None,
) -> dict[str, Entry]:
    """Write a checkpoint of parameters alone, each chunk a file, made when its turn comes.

    Args:
        make: the chunk's tensor, in the dtype of its parameter.
        workers: how many processes do.
        done: told which chunks have been written.

    Returns:
        The files of the chunks as they were written, by name.

    Raises:
        ConfigError: when ``make`` raises it.
        OSError: when the files cannot be written.
    """
    pairs = [(parameter, chunk) for parameter in parameters for chunk in parameter.chunks]
    items = [_write_item(parameter, chunk, dtype_of(parameter)) for parameter, chunk in pairs]
    planner = _ChunkPlanner(make, {item.index: pair for item, pair in zip(items, pairs, strict=True)})
    # A file each: into a shared file torch would keep every tensor until the file is complete.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, thread_count=1, sync_files=False)
    writer.set_up_storage_writer(True)
    # Each chunk is planned as a rank's of its own, so that any process can write it.
    plans, index = planner.create_global_plan([SavePlan([item]) for item in items])
    sealed: dict[str, Entry] = {}

    def write(plan: SavePlan) -> tuple[list[WriteResult], str, Entry]:
        try:
            results = writer.write_data(plan, planner).wait()
        except ConfigError:
            raise
        except Exception as error:
            raise OSError(f"{folder}: cannot be written: {_root(error)}") from error
        (name,) = {result.storage_data.relative_path for result in results}
        return results, name, seal(folder / name)

    def written(result: tuple[list[WriteResult], str, Entry]) -> None:
        (of_chunk,), name, entry = result
        sealed[name] = entry
        done(*planner.made_from[of_chunk.index])

    results = run_jobs(write, writer.prepare_global_plan(plans), workers, written)
    writer.finish(index, [of_plan for of_plan, _, _ in results])
    return sealed


def _root(error: BaseException) -> str:
    """torch's archive writer hides the system's error behind its own."""
    told, cause = one_line(error), error.__cause__ or error.__context__
    while cause is not None:
        told = str(cause) if isinstance(cause, OSError) else told
        cause = cause.__cause__ or cause.__context__
    return told


class _ChunkPlanner(dcp.DefaultSavePlanner):
    """Resolves a chunk to its data when the writer asks for it."""

    def __init__(self, make, made_from: dict[MetadataIndex, tuple[Parameter, Chunk]]) -> None:
        super().__init__(flatten_state_dict=False)
        self._make, self.made_from = make, made_from

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._make(*self.made_from[index])


def _write_item(parameter: Parameter, chunk: Chunk, dtype: torch.dtype) -> WriteItem:
    offsets = torch.Size([chunk.start, *[0] * (len(parameter.shape) - 1)])
    sizes = torch.Size([chunk.length, *parameter.shape[1:]])
    return WriteItem(
        index=MetadataIndex(PREFIX + parameter.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes),
            properties=TensorProperties(dtype=dtype),
            size=parameter.shape,
        ),
    )
