"""Checkpoints read and written one parameter at a time, without a process group.

A converted checkpoint holds what ``checkpoint.initial_weights`` and ``minimax-convert to-hf`` read:

    *.distcp .metadata        "model.<parameter>", each expert a file of its own
    config.yaml               the ``model`` group alone
    model/imported.yaml       the same as a Hydra group: ``minimax-train --config-dir CHECKPOINT model=imported``
    huggingface.json          what it was converted from (Origin)
    tokenizer/                where there was one
    manifest.json             size and SHA-256 of each of these files
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from yaml import YAMLError

from minimax_train.checkpoint.reading import CheckpointFiles
from minimax_train.convert.json_file import read_json
from minimax_train.convert.names import Chunk, Parameter
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
    tree = _read_yaml(path)
    try:
        model: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), tree.get("model") or {}))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # OmegaConf raises Python's own for values that are no configuration
        raise ConfigError(f"{path}: no model configuration: {one_line(error)}") from error
    return model


def _read_yaml(path: str | Path) -> DictConfig:
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
        length = OmegaConf.select(_read_yaml(path), "data.sequence_length")
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
    """Parameters of a checkpoint, the last one kept: the host holds one at a time."""

    def __init__(self, folder: Path) -> None:
        """Read the checkpoint's index.

        Raises:
            ConfigError: when a file is missing or damaged.
        """
        self.folder = folder
        self._files = CheckpointFiles(folder, verify=True)
        self._found = self._files.read_metadata().state_dict_metadata
        self._dtypes: dict[str, torch.dtype] = {}
        self._last: tuple[str, Tensor] | None = None

    def check(self, parameters: Iterable[Parameter]) -> None:
        """Refuse a checkpoint that does not hold the parameters, or holds them in other shapes or as no floating type.

        Raises:
            ConfigError: naming the parameter.
        """
        for parameter in parameters:
            stored = self._found.get(PREFIX + parameter.name)
            if not isinstance(stored, TensorStorageMetadata) or stored.size != parameter.shape:
                held = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else "none"
                raise ConfigError(
                    f"{self.folder}: {PREFIX}{parameter.name}: {CONFIG} wants {tuple(parameter.shape)}, it holds {held}"
                )
            self._dtypes[parameter.name] = dtype = stored.properties.dtype
            accepted = f"weights must be one of {', '.join(map(str, DTYPES.values()))}"
            require(dtype in DTYPES.values(), f"{self.folder}: {PREFIX}{parameter.name}", dtype, accepted)

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self._dtypes[parameter.name]

    def read(self, parameter: Parameter) -> Tensor:
        """A parameter, every element finite.

        Raises:
            ConfigError: when one is not, or the file that holds it is damaged.
        """
        if self._last is None or self._last[0] != parameter.name:
            self._last = None  # let go of it before the next is made
            # NaN, so that a part of it that no shard has is found out too
            tensor = torch.full(parameter.shape, torch.nan, dtype=self.dtype(parameter))
            self._files.load({PREFIX + parameter.name: tensor}, no_dist=True)
            require_finite(tensor, f"{self.folder}: {PREFIX}{parameter.name}")
            self._last = (parameter.name, tensor)
        return self._last[1]


def write_parameters(
    folder: Path,
    parameters: list[Parameter],
    dtype_of: Callable[[Parameter], torch.dtype],
    make: Callable[[Parameter, Chunk], Tensor],
) -> None:
    """Write a checkpoint of parameters alone, each chunk made when its turn comes.

    Args:
        make: the chunk's tensor, in the dtype of its parameter.

    Raises:
        ConfigError: when ``make`` raises it.
        OSError: when the files cannot be written.
    """
    planner = _ChunkPlanner(parameters, dtype_of, make)
    # A file each: into a shared file torch would keep every tensor until the file is complete.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, thread_count=1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save({"model": planner.placeholders}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        cause: BaseException | None
        cause, _ = error.failures[min(error.failures)]
        if isinstance(cause, ConfigError):
            raise cause from error
        told = one_line(cause)
        while cause is not None:  # torch's archive writer hides the system's error behind its own
            told = str(cause) if isinstance(cause, OSError) else told
            cause = cause.__context__
        raise OSError(f"{folder}: cannot be written: {told}") from error


class _ChunkPlanner(dcp.DefaultSavePlanner):
    """Plans from shapes alone, and resolves a chunk to its data when the writer asks for it."""

    def __init__(self, parameters: list[Parameter], dtype_of, make) -> None:
        super().__init__()
        self._parameters, self._make = parameters, make
        self.placeholders = {p.name: torch.empty(p.shape, dtype=dtype_of(p), device="meta") for p in parameters}

    def create_local_plan(self) -> SavePlan:
        pairs = [(parameter, chunk) for parameter in self._parameters for chunk in parameter.chunks]
        items = [self._write_item(*pair) for pair in pairs]
        self._made_from = {item.index: pair for item, pair in zip(items, pairs, strict=True)}
        self.plan = SavePlan(items, planner_data=self.mappings)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._make(*self._made_from[index])

    def _write_item(self, parameter: Parameter, chunk: Chunk) -> WriteItem:
        placeholder = self.placeholders[parameter.name]
        offsets = torch.Size([chunk.start, *[0] * (placeholder.dim() - 1)])
        sizes = torch.Size([chunk.length, *placeholder.shape[1:]])
        return WriteItem(
            index=MetadataIndex(PREFIX + parameter.name, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, sizes),
                properties=TensorProperties(dtype=placeholder.dtype),
                size=placeholder.shape,
            ),
        )
