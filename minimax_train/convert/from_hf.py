"""From a folder of transformers' ``MiniMaxForCausalLM`` to a checkpoint of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimax_train.convert.checkpoint import Origin, write_model_config, write_origin, write_parameters
from minimax_train.convert.decays import SLOPES, decay_name, decay_outputs, decays, lightning_layers
from minimax_train.convert.draft import draft_of
from minimax_train.convert.hf_config import from_hf_config
from minimax_train.convert.names import Chunk, Parameter, Part, correspondence, fused_shape, put
from minimax_train.convert.shards import TensorFolder
from minimax_train.convert.tokenizer import copy_tokenizer
from minimax_train.errors import ConfigError, require
from minimax_train.files import TOKENIZER
from minimax_train.model import ModelConfig

# Slopes stored in bfloat16 are this close to the ones they were rounded from.
_SLOPE_TOLERANCE = 2.0**-8


def from_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Convert a Hugging Face folder. Host memory: one parameter, or one expert where a parameter holds all of them.

    Args:
        source: a folder with ``config.json`` and safetensors, as ``save_pretrained`` writes it.
        target: a new folder.
        dtype: of the weights; as in the source if None.
        rotary_dim: how many leading dimensions of each head the weights were trained to rotate, where ``config.json``
            names another number than transformers would rotate.
        report: told of the progress, a line at a time.

    Raises:
        ConfigError: when the source is no such folder, its model is not one of ours, or the target exists.
    """
    source = Path(source)
    with draft_of(Path(target)) as draft:
        raw = _read_json(source / "config.json")
        if raw is None:
            raise ConfigError(f"{source}: not a Hugging Face model: there is no config.json")
        model = from_hf_config(raw, rotary_dim=rotary_dim)
        # Weights that were trained to rotate the leading dimensions lie as ours do.
        parameters = correspondence(model, permute_rotary=rotary_dim is None)
        tensors = _Tensors(TensorFolder(source))
        tensors.check(parameters, model)
        decay_dtype = tensors.check_slopes(model)
        total = sum(parameter.shape.numel() for parameter in parameters)
        report(f"converting {source}: {total:,} parameters")
        done = 0

        def dtype_of(parameter: Parameter) -> torch.dtype:
            return dtype or reduce(torch.promote_types, map(tensors.dtype, _parts(parameter)))

        def make(parameter: Parameter, chunk: Chunk) -> Tensor:
            nonlocal done
            tensor = torch.empty(chunk.length, *parameter.shape[1:], dtype=dtype_of(parameter))
            for part in chunk.parts:
                put(tensor, part, tensors.read)
            before, done = done, done + tensor.numel()
            if 10 * done // total > 10 * before // total:
                report(f"{100 * done // total} % at {parameter.name}")
            return tensor

        write_parameters(draft, parameters, dtype_of, make)
        write_model_config(model, draft)
        write_origin(Origin(raw, _read_json(source / "generation_config.json"), decay_dtype), draft)
        copy_tokenizer(source, draft / TOKENIZER)


class _Tensors:
    """Theirs by their names on disk, whether experts are fused or not, and whatever the expert layer is called."""

    def __init__(self, folder: TensorFolder) -> None:
        self.folder = folder
        self._stored = {name.replace(".mlp.", ".block_sparse_moe."): name for name in folder.names()}

    def _find(self, part: Part) -> tuple[str, tuple[int | slice, ...]]:
        """Where it is stored: a tensor's name there, and indices into it."""
        for name, index in [(part.name, ()), *([part.fused] if part.fused else [])]:
            if name in self._stored:
                return self._stored[name], index
        raise ConfigError(f"{self.folder.folder}: {part.name} is missing")

    def dtype(self, part: Part) -> torch.dtype:
        return self.folder.dtype(self._find(part)[0])

    def read(self, part: Part) -> Tensor:
        return self.folder.read(*self._find(part))

    def check(self, parameters: list[Parameter], model: ModelConfig) -> None:
        """Refuse missing tensors, tensors of another shape, and tensors that would be left behind."""
        ignored = {output.name for output in decay_outputs(model, 1, torch.float32)}
        found = set()
        for parameter in parameters:
            for chunk in parameter.chunks:
                empty = torch.empty(chunk.length, *parameter.shape[1:], device="meta")
                for part in chunk.parts:
                    name, index = self._find(part)
                    found.add(name)
                    stored = self.folder.shape(name)
                    wanted = tuple(fused_shape(parameter) if index else empty[part.index].shape)
                    if stored != wanted:
                        raise ConfigError(
                            f"{self.folder.folder}: {name} has shape {stored}, config.json wants {wanted}"
                        )
        unknown = sorted(self.folder.names() - found - ignored)
        if unknown:
            raise ConfigError(
                f"{self.folder.folder}: {len(unknown)} tensors are not of a {model.num_layers}-layer model: "
                f"{', '.join(unknown[:5])}"
            )

    def check_slopes(self, model: ModelConfig) -> str:
        """Refuse decays that are not the architecture's. Returns the dtype in which they are stored."""
        dtype = "float32"
        for layer in lightning_layers(model):
            name = decay_name(layer, SLOPES)
            if name not in self.folder.names():
                continue
            expected, stored = decays(model, layer, SLOPES, 1), self.folder.read(name).float()
            same = expected.shape == stored.shape and torch.allclose(stored, expected, rtol=_SLOPE_TOLERANCE, atol=0)
            accepted = (
                f"must be the slopes of MiniMax-01, {expected.flatten().tolist()}; a model that transformers "
                "initialised in bfloat16 has others: initialise it in float32, then cast"
            )
            require(same, name, stored.flatten().tolist(), accepted)
            dtype = str(self.folder.dtype(name)).removeprefix("torch.")
        return dtype


def _parts(parameter: Parameter) -> list[Part]:
    return [part for chunk in parameter.chunks for part in chunk.parts]


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
