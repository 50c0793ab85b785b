"""From a checkpoint of ours to a folder that ``MiniMaxForCausalLM.from_pretrained`` loads."""

from __future__ import annotations

import json
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
from minimax_train.convert.hf_config import Surroundings, from_hf_config, parse, to_hf_config
from minimax_train.convert.names import Chunk, Parameter, Part, correspondence, take
from minimax_train.convert.shards import Output, write_shards
from minimax_train.convert.tokenizer import copy_tokenizer, open_tokenizer, write_trained_tokenizer
from minimax_train.errors import ConfigError
from minimax_train.files import CONFIG, TOKENIZER
from minimax_train.model import ModelConfig

DEFAULT_SHARD_BYTES = 5 * 10**9


def to_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Convert a checkpoint. Host memory: one shard, one parameter, and one rank's part of it as it lies on disk.

    Args:
        source: a checkpoint, or a run, whose newest is taken.
        target: a new folder.
        dtype: of the weights; as in the checkpoint if None.
        max_shard_bytes: size of a safetensors file, passed only by a tensor that is larger by itself.
        report: told of the progress, a line at a time.

    Raises:
        ConfigError: when there is no such checkpoint, transformers cannot express the model, or the target exists.
    """
    with draft_of(Path(target)) as draft:
        checkpoint = find_checkpoint(source)
        reader = CheckpointReader(checkpoint)
        model = read_model_config(checkpoint / CONFIG)
        parameters = correspondence(model)
        reader.check(parameters)
        kept = reduce(torch.promote_types, {reader.dtype(parameter) for parameter in parameters})
        report(f"converting {checkpoint} as {_name(dtype or kept)}")
        block_size, decay_dtype = _write_surroundings(checkpoint, model, dtype or kept, draft, report)
        outputs = [*_weights(parameters, reader, dtype), *decay_outputs(model, block_size, decay_dtype)]
        require_space(draft, sum(output.num_bytes for output in outputs))
        write_shards(outputs, draft, max_shard_bytes, report)
    if model.capacity_factor is not None:
        report(
            f"note: model.capacity_factor={model.capacity_factor} has no counterpart: transformers drops no token, so "
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
    checkpoint: Path, model: ModelConfig, dtype: torch.dtype, draft: Path, report: Callable[[str], None]
) -> tuple[int, torch.dtype]:
    """Write tokenizer, ``config.json`` and ``generation_config.json``; returns block size and dtype of the decays."""
    from transformers import GenerationConfig

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
            theirs, describes = parse(origin.config), _describes(origin, model)
        except ConfigError as error:
            raise ConfigError(f"{checkpoint / ORIGIN}: config: {error}") from error
        copied = copy_tokenizer(tokenizer, draft)
        if describes:
            # The very configuration it came with, block size, positions and special tokens included.
            raw = {key: value for key, value in origin.config.items() if key != "torch_dtype"}
            _write_json(raw | {"dtype": _name(dtype)}, draft / "config.json")
            if origin.generation_config is not None:
                _write_json(origin.generation_config, draft / "generation_config.json")
        if copied:
            open_tokenizer(draft, tokenizer, model.vocab_size)
        if describes:
            return theirs.block_size, getattr(torch, origin.decay_dtype)
        surroundings = Surroundings.of(theirs)
    config = to_hf_config(model, surroundings, dtype)
    config.save_pretrained(draft)
    GenerationConfig.from_model_config(config).save_pretrained(draft)
    # float32 whatever the weights: from_pretrained casts them to what it loads, and nothing is lost if that is float32
    return config.block_size, torch.float32


def _describes(origin: Origin, model: ModelConfig) -> bool:
    try:
        return from_hf_config(origin.config) == model
    except ConfigError:  # imported with --rotary-dim
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(values: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
