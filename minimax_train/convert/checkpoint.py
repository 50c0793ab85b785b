"""Checkpoints read and written one parameter at a time, without a process group.

A converted checkpoint holds what ``checkpoint.initial_weights`` and ``minimax-convert to-hf`` read:

    *.distcp .metadata        "model.<parameter>", each expert a file of its own
    config.yaml               the ``model`` group alone
    model/imported.yaml       the same as a Hydra group: ``minimax-train --config-dir CHECKPOINT model=imported``
    huggingface.json          what it was converted from (Origin)
    tokenizer/                where there was one
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from yaml import YAMLError

from minimax_train.convert.names import Chunk, Parameter
from minimax_train.errors import ConfigError
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
    try:
        tree = OmegaConf.select(OmegaConf.load(path), "model") or {}
        model: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), tree))
        return model
    except (OSError, AttributeError, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path}: no model configuration: {str(error).splitlines()[0]}") from error


def write_model_config(model: ModelConfig, folder: Path) -> None:
    values = dataclasses.asdict(model)
    (folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create({"model": values})))
    (folder / GROUP_FILE).parent.mkdir()
    (folder / GROUP_FILE).write_text(OmegaConf.to_yaml(OmegaConf.create(values)))


def read_sequence_length(path: str | Path) -> int | None:
    """Tokens of the packed sequences that a ``config.yaml`` names, a run's or a checkpoint's."""
    return OmegaConf.select(OmegaConf.load(path), "data.sequence_length")


def read_origin(folder: Path) -> Origin | None:
    file = folder / ORIGIN
    return Origin(**json.loads(file.read_text())) if file.is_file() else None


def write_origin(origin: Origin, folder: Path) -> None:
    (folder / ORIGIN).write_text(json.dumps(dataclasses.asdict(origin), indent=2) + "\n")


class CheckpointReader:
    """Parameters of a checkpoint, the last one kept: the host holds one at a time."""

    def __init__(self, folder: Path, parameters: Iterable[Parameter]) -> None:
        """Read the checkpoint's index.

        Raises:
            ConfigError: when it does not hold the parameters, or holds them in other shapes or as no floating type.
        """
        self.folder = folder
        found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        for parameter in parameters:
            stored = found.get(PREFIX + parameter.name)
            if not isinstance(stored, TensorStorageMetadata) or stored.size != parameter.shape:
                held = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else "none"
                raise ConfigError(
                    f"{folder}: {PREFIX}{parameter.name}: {CONFIG} wants {tuple(parameter.shape)}, it holds {held}"
                )
        self._dtypes = {
            name.removeprefix(PREFIX): stored.properties.dtype
            for name, stored in found.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._last: tuple[str, Tensor] | None = None

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self._dtypes[parameter.name]

    def read(self, parameter: Parameter) -> Tensor:
        if self._last is None or self._last[0] != parameter.name:
            self._last = None  # let go of it before the next is made
            tensor = torch.empty(parameter.shape, dtype=self.dtype(parameter))
            with _one_process():
                dcp.load({PREFIX + parameter.name: tensor}, checkpoint_id=self.folder, no_dist=True)
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
    """
    planner = _ChunkPlanner(parameters, dtype_of, make)
    # A file each: into a shared file torch would keep every tensor until the file is complete.
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, thread_count=1)
    with _one_process():
        dcp.save({"model": planner.placeholders}, storage_writer=writer, planner=planner, no_dist=True)


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


@contextmanager
def _one_process():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
