"""From a Hugging Face folder, in either layout, to a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from minimax_train.checkpoint.manifest import write_manifest
from minimax_train.convert.checkpoint import (
    CheckpointReader,
    Origin,
    write_model_config,
    write_origin,
    write_parameters,
)
from minimax_train.convert.decays import SLOPES, decay_outputs
from minimax_train.convert.draft import draft_of, require_space
from minimax_train.convert.hf_config import from_hf_config, parse
from minimax_train.convert.jobs import default_workers
from minimax_train.convert.json_file import read_json
from minimax_train.convert.layouts import layout_of
from minimax_train.convert.names import Chunk, Parameter, Part, bytes_per_worker, correspondence, fused_shape, put
from minimax_train.convert.shards import Output, TensorFolder, require_finite
from minimax_train.convert.tokenizer import copy_tokenizer, note_of_added_tokens, open_tokenizer
from minimax_train.convert.verify import compare, our_logits, require_memory, transformers_logits
from minimax_train.errors import ConfigError, require
from minimax_train.files import TOKENIZER
from minimax_train.model import ModelConfig

# Decays stored in bfloat16 are this close to the ones they were rounded from, and in float16 those near 0.
_RELATIVE, _ABSOLUTE = 2.0**-8, 2.0**-23


def from_hf(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    workers: int | None = None,
    verify_on: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> bool:
    """Convert a Hugging Face folder. Host memory: a few chunks of the parameters, per worker.

    Args:
        source: a folder with ``config.json``, which says in which layout it is, and safetensors.
        target: a new folder.
        dtype: of the weights; as in the source if None.
        rotary_dim: how many leading dimensions of each head the weights were trained to rotate, where ``config.json``
            names another number than transformers would rotate; None in the layout of MiniMax-Text-01.
        workers: processes; None for as many as cores and memory allow.
        verify_on: the device on which both sides are loaded afterwards and their logits compared; None for not.
        report: told of the progress, a line at a time.

    Returns:
        Whether the logits agree, if they are compared.

    Raises:
        ConfigError: when the source is no such folder, its model is not one of ours, or the target exists.
    """
    source = Path(source)
    with draft_of(Path(target)) as draft:
        if not (source / "config.json").is_file():
            raise ConfigError(f"{source}: not a Hugging Face model: there is no config.json")
        raw = read_json(source / "config.json")
        try:
            layout = layout_of(raw)
            if layout.in_transformers:
                model = from_hf_config(raw, rotary_dim=rotary_dim)
            else:
                accepted = "only for transformers' layout: here config.json says what is rotated, as rotary_dim"
                require(rotary_dim is None, "--rotary-dim", rotary_dim, accepted)
                model = layout.read_model(raw)
        except ConfigError as error:
            raise ConfigError(f"{source / 'config.json'}: {error}") from error
        if verify_on is not None:
            accepted = "must be left out with --verify: transformers would rotate another number of dimensions"
            require(rotary_dim is None, "--rotary-dim", rotary_dim, accepted)
            require_memory(model, verify_on)
        generation = source / "generation_config.json"
        generation_config = read_json(generation) if generation.is_file() else None
        if copy_tokenizer(source, draft / TOKENIZER):
            note_of_added_tokens(open_tokenizer(draft / TOKENIZER, source, model.vocab_size), report)
        tensors = Tensors(TensorFolder(source))
        tensors.check_sizes(model)
        # Weights that were trained to rotate the leading dimensions lie as ours do.
        parameters = correspondence(model, permute_rotary=layout.in_transformers and rotary_dim is None)
        decays: list[Output] = []
        if layout.in_transformers:
            decays += decay_outputs(model, parse(raw).block_size, torch.float32)
        tensors.check(parameters, model, decays)
        decay_dtype = tensors.check_decays(decays)
        total = sum(parameter.shape.numel() for parameter in parameters)
        report(f"converting {source}: {total:,} parameters")
        written = 0

        def dtype_of(parameter: Parameter) -> torch.dtype:
            return dtype or reduce(torch.promote_types, map(tensors.dtype, _parts(parameter)))

        size = sum(parameter.shape.numel() * dtype_of(parameter).itemsize for parameter in parameters)
        require_space(draft, size)

        def make(parameter: Parameter, chunk: Chunk) -> Tensor:
            return tensors.chunk(parameter, chunk, dtype_of(parameter))

        def done(parameter: Parameter, chunk: Chunk) -> None:
            nonlocal written
            before, written = written, written + chunk.length * parameter.shape[1:].numel()
            if 10 * written // total > 10 * before // total:
                report(f"{100 * written // total} % at {parameter.name}")

        workers = workers or default_workers(size, bytes_per_worker(parameters))
        sealed = write_parameters(draft, parameters, dtype_of, make, workers, done)
        write_model_config(model, draft)
        write_origin(Origin(raw, generation_config, decay_dtype), draft)
        write_manifest(draft, sealed)
        if verify_on is None:
            return True
        ours_TV = our_logits(model, parameters, CheckpointReader(draft).open(parameters).read, None, verify_on)
        if layout.in_transformers:
            theirs_TV = transformers_logits(source, model, dtype, verify_on)
            return compare(ours_TV, theirs_TV, getattr(torch, decay_dtype), "transformers' MiniMax", report)

        def theirs(parameter: Parameter, chunk: Chunk) -> Tensor:
            return tensors.chunk(parameter, chunk)

        theirs_TV = our_logits(model, parameters, theirs, dtype, verify_on)
        return compare(ours_TV, theirs_TV, torch.float32, "the source as from-hf reads it", report)


class Tensors:
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
        name, index = self._find(part)
        return self.folder.read(name, (part.cut,) if part.cut else index)

    def chunk(self, parameter: Parameter, chunk: Chunk, dtype: torch.dtype = torch.float32) -> Tensor:
        """A chunk of a parameter of ours, every element finite.

        Raises:
            ConfigError: when one is not.
        """
        tensor = torch.empty(chunk.length, *parameter.shape[1:], dtype=dtype)
        for part in chunk.parts:
            put(tensor, part, self.read)
            require_finite(tensor[part.index], f"{self.folder.folder}: {part.name}")
        return tensor

    def check_sizes(self, model: ModelConfig) -> None:
        """Refuse another number of layers or experts, before lists are made of as many as the configuration says."""
        layers = {name.split(".")[2] for name in self._stored if name.startswith("model.layers.")}
        accepted = f"{self.folder.folder} holds tensors of {len(layers)} layers"
        wanted = {str(layer) for layer in range(model.num_layers)}
        require(layers == wanted, "num_hidden_layers", model.num_layers, accepted)
        for layer in range(model.num_layers):
            router = self._stored.get(f"model.layers.{layer}.block_sparse_moe.gate.weight")
            if router is not None:
                self._check_shape(router, (model.num_experts, model.hidden_size))

    def check(self, parameters: list[Parameter], model: ModelConfig, decays: list[Output]) -> None:
        """Refuse missing tensors, tensors of another shape or type, and tensors that would be left behind."""
        found = set()
        for parameter in parameters:
            for chunk in parameter.chunks:
                empty = torch.empty(chunk.length, *parameter.shape[1:], device="meta")
                for part in chunk.parts:
                    name, index = self._find(part)
                    found.add(name)
                    self.folder.dtype(name)
                    whole = empty[part.index].shape if part.index else parameter.shape
                    self._check_shape(name, tuple(fused_shape(parameter) if index else whole))
        unknown = sorted(self.folder.names() - found - {decay.name for decay in decays})
        if unknown:
            raise ConfigError(
                f"{self.folder.folder}: {len(unknown)} tensors are not of a {model.num_layers}-layer model: "
                f"{', '.join(unknown[:5])}"
            )

    def check_decays(self, decays: list[Output]) -> str:
        """Refuse decays that are not the architecture's. Returns the dtype in which they are stored."""
        dtype = "float32"
        for decay in decays:
            if decay.name not in self.folder.names():
                continue
            dtype = str(self.folder.dtype(decay.name)).removeprefix("torch.")
            self._check_shape(decay.name, decay.shape)
            (make,) = decay.pieces
            expected, stored = make(), self.folder.read(decay.name).float()
            if torch.allclose(stored, expected, rtol=_RELATIVE, atol=_ABSOLUTE):
                continue
            if decay.name.endswith(SLOPES):
                accepted = f"must be the slopes of MiniMax-01, {expected.flatten().tolist()}"
                shown = stored.flatten().tolist()
            else:
                place = int((stored - expected).abs().nan_to_num(nan=torch.inf).argmax())
                accepted = f"must be {expected.flatten()[place]:.4g} there, as slopes and block_size say"
                shown = f"{stored.flatten()[place]:.4g} at {place}"
            hint = "a model that transformers initialised in bfloat16 has others: initialise it in float32, then cast"
            raise ConfigError(f"{self.folder.folder}: {decay.name}={shown}: {accepted}; {hint}")
        return dtype

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        stored = self.folder.shape(name)
        if stored != wanted:
            raise ConfigError(f"{self.folder.folder}: {name} has shape {stored}, config.json wants {wanted}")


def _parts(parameter: Parameter) -> list[Part]:
    return [part for chunk in parameter.chunks for part in chunk.parts]
