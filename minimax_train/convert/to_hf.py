"""From a checkpoint of ours to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimax_train.checkpoint.store import find_checkpoint
from minimax_train.convert.checkpoint import (
    ORIGIN,
    CheckpointReader,
    Origin,
    read_model_config,
    read_origin,
    read_sequence_length,
)
from minimax_train.convert.decays import decay_outputs
from minimax_train.convert.draft import draft_of, require_space
from minimax_train.convert.hf_config import Surroundings, parse
from minimax_train.convert.json_file import read_json
from minimax_train.convert.layouts import LAYOUTS, MINIMAX, Layout, layout_of
from minimax_train.convert.names import Chunk, Parameter, Part, correspondence, take
from minimax_train.convert.shards import Output, write_shards
from minimax_train.convert.text_01_config import AUTO_MAP
from minimax_train.convert.tokenizer import copy_tokenizer, open_tokenizer, write_trained_tokenizer
from minimax_train.errors import ConfigError, require_choice
from minimax_train.files import CONFIG, TOKENIZER
from minimax_train.model import ModelConfig

DEFAULT_SHARD_BYTES = 5 * 10**9


def to_hf(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = MINIMAX,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Convert a checkpoint. Host memory: one shard, one parameter, and one rank's part of it as it lies on disk.

    Args:
        source: a checkpoint, or a run, whose newest is taken.
        target: a new folder.
        layout: one of :data:`~minimax_train.convert.layouts.LAYOUTS`.
        dtype: of the weights; as in the checkpoint if None.
        max_shard_bytes: size of a safetensors file, passed only by a tensor that is larger by itself.
        report: told of the progress, a line at a time.

    Raises:
        ConfigError: when there is no such checkpoint, the layout cannot express the model, or the target exists.
    """
    require_choice("--layout", layout, tuple(LAYOUTS))
    theirs = LAYOUTS[layout]
    with draft_of(Path(target)) as draft:
        checkpoint = find_checkpoint(source)
        reader = CheckpointReader(checkpoint)
        model = read_model_config(checkpoint / CONFIG)
        parameters = correspondence(model, permute_rotary=theirs.in_transformers)
        reader.check(parameters)
        kept = reduce(torch.promote_types, {reader.dtype(parameter) for parameter in parameters})
        report(f"converting {checkpoint} as {_name(dtype or kept)}")
        decay_dtype = _write_surroundings(checkpoint, model, theirs, dtype or kept, draft, report)
        outputs = list(_weights(parameters, reader, dtype))
        if theirs.in_transformers:
            outputs += decay_outputs(model, parse(read_json(draft / "config.json")).block_size, decay_dtype)
        require_space(draft, sum(output.num_bytes for output in outputs))
        write_shards(outputs, draft, max_shard_bytes, report)
    if model.capacity_factor is not None:
        report(
            f"note: model.capacity_factor={model.capacity_factor} has no counterpart: readers drop no token, so "
            "logits differ where training would have"
        )


def _weights(parameters: list[Parameter], reader: CheckpointReader, dtype: torch.dtype | None) -> Iterator[Output]:
    for parameter in parameters:
        stored = reader.dtype(parameter)
        for chunk in parameter.chunks:
            empty = torch.empty(chunk.length, *parameter.shape[1:], device="meta")
            for part in chunk.parts:
                yield Output(
                    part.name, empty[part.index].shape, dtype or stored, _maker(reader, parameter, chunk, part)
                )


def _maker(reader: CheckpointReader, parameter: Parameter, chunk: Chunk, part: Part) -> Callable[[], Tensor]:
    return lambda: take(reader.read(parameter)[chunk.start : chunk.start + chunk.length], part)


def _write_surroundings(
    checkpoint: Path,
    model: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    draft: Path,
    report: Callable[[str], None],
) -> torch.dtype:
    """Write all but the weights: tokenizer, ``config.json`` and ``generation_config.json``. Returns decays' dtype."""
    from transformers import GenerationConfig

    for file in layout.files:
        shutil.copyfile(file, draft / file.name)
    origin, tokenizer = read_origin(checkpoint), checkpoint / TOKENIZER
    if origin is None:  # a run's
        length = read_sequence_length(checkpoint / CONFIG)
        if tokenizer.is_dir():
            ids = write_trained_tokenizer(tokenizer, draft, model.vocab_size)
        else:
            ids = {}
            report(f"note: {checkpoint} has no tokenizer: the export has none, and no end-of-text id")
        surroundings = Surroundings(max_position_embeddings=length, **ids)
    else:
        try:
            came_in = layout_of(origin.config)
            surroundings = came_in.read_surroundings(origin.config)
            describes = came_in is layout and _describes(origin, layout, model)
        except ConfigError as error:
            raise ConfigError(f"{checkpoint / ORIGIN}: config: {error}") from error
        copied = copy_tokenizer(tokenizer, draft)
        if describes:
            # The very configuration it came with, block size, positions and special tokens included.
            raw = {key: value for key, value in origin.config.items() if key != "torch_dtype"}
            if layout.files:  # the code that it names is not here
                raw["auto_map"] = AUTO_MAP
            _write_json(raw | {"dtype": _name(dtype)}, draft / "config.json")
            if origin.generation_config is not None:
                _write_json(origin.generation_config, draft / "generation_config.json")
        if copied:
            open_tokenizer(draft, tokenizer, model.vocab_size)
        if describes:
            return getattr(torch, origin.decay_dtype)
    config = layout.write(model, surroundings, dtype)
    config.save_pretrained(draft)
    GenerationConfig.from_model_config(config).save_pretrained(draft)
    # float32 whatever the weights: from_pretrained casts them to what it loads, and nothing is lost if that is float32
    return torch.float32


def _describes(origin: Origin, layout: Layout, model: ModelConfig) -> bool:
    try:
        return layout.read_model(origin.config) == model
    except ConfigError:  # imported with --rotary-dim
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(values: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
