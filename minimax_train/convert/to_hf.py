"""From a checkpoint of ours to a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimax_train.checkpoint.manifest import MANIFEST, SHARD
from minimax_train.checkpoint.reading import tell_unchecked
from minimax_train.checkpoint.remote import Folder, RemotePath, local_copy
from minimax_train.checkpoint.store import find_checkpoint, owner_of
from minimax_train.convert.card import write_card
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
from minimax_train.convert.from_hf import Tensors
from minimax_train.convert.hf_config import Surroundings, parse
from minimax_train.convert.jobs import default_workers
from minimax_train.convert.json_file import read_json
from minimax_train.convert.layouts import LAYOUTS, MINIMAX, Layout, layout_of
from minimax_train.convert.names import Parameter, bytes_per_worker, correspondence
from minimax_train.convert.shards import Output, TensorFolder, write_shards
from minimax_train.convert.text_01_config import AUTO_MAP
from minimax_train.convert.tokenizer import copy_tokenizer, open_tokenizer, write_trained_tokenizer
from minimax_train.convert.verify import compare, our_logits, require_memory, transformers_logits
from minimax_train.errors import ConfigError, require, require_choice
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
    workers: int | None = None,
    verify_on: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> bool:
    """Convert a checkpoint. Host memory: a few chunks of the parameters, per worker.

    Args:
        source: path or URL of a checkpoint, or of a run, whose newest is taken.
        target: a new folder.
        layout: one of :data:`~minimax_train.convert.layouts.LAYOUTS`.
        dtype: of the weights; as in the checkpoint if None.
        max_shard_bytes: size of a safetensors file, passed only by a tensor that is larger by itself.
        workers: processes; None for as many as cores and memory allow.
        verify_on: the device on which both sides are loaded afterwards and their logits compared; None for not.
        report: told of the progress, a line at a time.

    Returns:
        Whether the logits agree, if they are compared.

    Raises:
        ConfigError: when there is no such checkpoint, the layout cannot express the model, or the target exists.
    """
    require_choice("--layout", layout, tuple(LAYOUTS))
    while True:
        checkpoint = find_checkpoint(source)
        try:
            with draft_of(Path(target)) as draft:
                return _convert(checkpoint, draft, LAYOUTS[layout], dtype, max_shard_bytes, workers, verify_on, report)
        except (ConfigError, OSError):
            # A run that keeps few checkpoints removes them, by renaming, while it goes on.
            if _is_there(checkpoint):
                raise
            report(f"note: {checkpoint} was removed before it could be opened: beginning again with what is there now")


def _is_there(checkpoint: Folder) -> bool:
    return (checkpoint / MANIFEST).is_file() if isinstance(checkpoint, RemotePath) else checkpoint.exists()


def _convert(
    checkpoint: Folder,
    draft: Path,
    layout: Layout,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    workers: int | None,
    verify_on: str | None,
    report: Callable[[str], None],
) -> bool:
    reader = CheckpointReader(checkpoint)
    beside = local_copy(checkpoint, without=SHARD)
    model = read_model_config(beside / CONFIG)
    parameters = correspondence(model, permute_rotary=layout.in_transformers)
    reader.open(parameters)
    if verify_on is not None:
        require_memory(model, verify_on)
    kept = reduce(torch.promote_types, {reader.dtype(parameter) for parameter in parameters})
    report(f"converting {checkpoint} as {_name(dtype or kept)}")
    tell_unchecked(checkpoint, lambda told: report(f"note: {told}"))
    run = owner_of(checkpoint.parent)
    decay_dtype = _write_surroundings(beside, Path(run) if run else None, model, layout, dtype or kept, draft, report)
    # From here on only shards are read, which are open.
    require(_is_there(checkpoint), "SRC", str(checkpoint), "was removed while it was read")
    outputs = _weights(parameters, reader, dtype)
    if layout.in_transformers:
        outputs += decay_outputs(model, parse(read_json(draft / "config.json")).block_size, decay_dtype)
    total = sum(output.num_bytes for output in outputs)
    require_space(draft, total)
    workers = workers or default_workers(total, bytes_per_worker(parameters))
    reader.check(workers)
    write_shards(outputs, draft, max_shard_bytes, report, workers)
    if model.capacity_factor is not None:
        report(
            f"note: model.capacity_factor={model.capacity_factor} has no counterpart: readers drop no token, so "
            "logits differ where training would have"
        )
    if verify_on is None:
        return True
    ours_TV = our_logits(model, parameters, reader.read, dtype, verify_on)
    if layout.in_transformers:
        theirs_TV = transformers_logits(draft, model, None, verify_on)
        return compare(ours_TV, theirs_TV, decay_dtype, "transformers' MiniMax", report)
    theirs_TV = our_logits(model, parameters, Tensors(TensorFolder(draft)).chunk, None, verify_on)
    return compare(ours_TV, theirs_TV, decay_dtype, "the export as from-hf reads it", report)


def _weights(parameters: list[Parameter], reader: CheckpointReader, dtype: torch.dtype | None) -> list[Output]:
    pieces: dict[str, list[Callable[[], Tensor]]] = {}
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for parameter in parameters:
        for chunk in parameter.chunks:
            empty = torch.empty(chunk.length, *parameter.shape[1:], device="meta")
            for part in chunk.parts:
                shape = empty[part.index].shape if part.index else parameter.shape
                shapes[part.name] = tuple(shape), dtype or reader.dtype(parameter)
                pieces.setdefault(part.name, []).append(partial(reader.read, parameter, chunk, part))
    return [Output(name, *shapes[name], tuple(made)) for name, made in pieces.items()]


def _write_surroundings(
    checkpoint: Path,
    run: Path | None,
    model: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    draft: Path,
    report: Callable[[str], None],
) -> torch.dtype:
    """Write all but the weights: card, tokenizer, ``config.json``, generation's. Returns the dtype of decays."""
    from transformers import GenerationConfig

    for file in layout.files:
        shutil.copyfile(file, draft / file.name)
    origin, tokenizer = read_origin(checkpoint), checkpoint / TOKENIZER
    write_card(checkpoint, run, model, origin, _name(dtype), layout.in_transformers, draft)
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
