"""Which tensor of transformers' MiniMax lies where in which parameter of ours.

The tables below and the ``HuggingFaceNames`` of each attention are the whole correspondence of names. Theirs are the
names on disk, as ``save_pretrained`` writes them: one tensor per expert and projection, under ``block_sparse_moe``. In
memory transformers fuses them as ``mlp.experts.gate_up_proj`` and ``down_proj``; both spellings are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minimax_train.errors import require
from minimax_train.model import HybridModel, ModelConfig
from minimax_train.model.attention import ATTENTIONS
from minimax_train.model.attention.kind import HuggingFaceNames

MODEL = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "expert_norm.weight": "post_attention_layernorm.weight",
    "experts.router.weight": "block_sparse_moe.gate.weight",
}
# Ours are [expert, gate or up, rows, columns] and [expert, rows, columns]; theirs are one tensor per expert.
EXPERTS = {"experts.mlp.gate_up_proj": ("w1", "w3"), "experts.mlp.down_proj": ("w2",)}


# Elements of a chunk that is cut from a larger tensor: 128 MiB in bfloat16.
CHUNK_ELEMENTS = 2**26


@dataclass(frozen=True)
class Part:
    """One tensor of theirs, or rows of it: ``chunk[index]``, its rows then taken in the order ``rows`` where that is
    given.

    Attributes:
        name: its name on disk.
        index: which of the chunk's leading dimensions.
        cut: which rows of theirs, where the tensor is cut into several chunks.
        rows: int64 row order, for what rotary position embedding wants elsewhere.
        fused: the other place it may be read from: a fused tensor's name, and the indices into it.
    """

    name: str
    index: tuple[int, ...] = ()
    cut: slice | None = None
    rows: Tensor | None = None
    fused: tuple[str, tuple[int | slice, ...]] | None = None


@dataclass(frozen=True)
class Chunk:
    """``parameter[start : start + length]``, made of whole tensors of theirs, or of rows of one."""

    start: int
    length: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of ours, cut along its first dimension into what can be converted by itself."""

    name: str
    shape: torch.Size
    chunks: tuple[Chunk, ...]


def correspondence(config: ModelConfig, *, permute_rotary: bool = True) -> list[Parameter]:
    """Every parameter of a model, in the order of the model.

    Args:
        config: the model.
        permute_rotary: whether theirs have the rows of partly rotated queries and keys in :func:`rotary_row_order`.
    """
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in HybridModel(config).named_parameters()}
    return [Parameter(name, shape, _chunks(name, shape, config, permute_rotary)) for name, shape in shapes.items()]


def attention_names(config: ModelConfig) -> list[HuggingFaceNames]:
    """Of every layer's attention.

    Raises:
        ConfigError: when MiniMax on Hugging Face does not have one of them.
    """
    known = " and ".join(str(kind) for kind in ATTENTIONS.values() if kind.hugging_face)
    missing = " and ".join(str(kind) for kind in dict.fromkeys(config.attentions) if not kind.hugging_face)
    accepted = f"{missing} cannot be exported: MiniMax on Hugging Face has only {known}"
    require(not missing, "model.layer_pattern", config.layer_pattern, accepted)
    return [kind.hugging_face for kind in config.attentions if kind.hugging_face]


def rotary_row_order(head_dim: int, rotary_dim: int) -> Tensor:
    """Where each row of a head of theirs lies in ours, int64 ``[head_dim]``.

    Ours rotates pairs (i, i + R/2) of the first R dimensions. Transformers' ``proportional`` RoPE pairs (i, i + K/2)
    over all K, with frequency 0 from i = R/2 on; so the second half of the rotated rows moves to K/2.
    """
    R, K = rotary_dim, head_dim
    middle = R + (K - R) // 2
    rows = torch.arange(K)
    return torch.cat([rows[: R // 2], rows[R:middle], rows[R // 2 : R], rows[middle:]])


def _chunks(name: str, shape: torch.Size, config: ModelConfig, permute_rotary: bool) -> tuple[Chunk, ...]:
    if name in MODEL:
        return _cut(shape, MODEL[name])
    _, layer, inner = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if inner in EXPERTS:
        return _expert_chunks(inner, shape, prefix)
    if inner in BLOCK:
        return _cut(shape, prefix + BLOCK[inner])
    names, own = attention_names(config)[int(layer)], inner.removeprefix("attention.")
    rows = _rotary_rows(shape[0], config) if permute_rotary and own in names.rotated else None
    theirs = f"{prefix}self_attn.{names.parameters[own]}"
    return _cut(shape, theirs) if rows is None else (Chunk(0, shape[0], (Part(theirs, rows=rows),)),)


def _cut(shape: torch.Size, theirs: str) -> tuple[Chunk, ...]:
    """A tensor that is the same on both sides, a few rows at a time."""
    most = max(1, CHUNK_ELEMENTS // shape[1:].numel())
    ends = [(start, min(start + most, shape[0])) for start in range(0, shape[0], most)]
    return tuple(Chunk(a, b - a, (Part(theirs, cut=slice(a, b)),)) for a, b in ends)


def _expert_chunks(inner: str, shape: torch.Size, prefix: str) -> tuple[Chunk, ...]:
    num_experts, height, parts = shape[0], shape[-2], len(EXPERTS[inner])

    def part(expert: int, place: int, projection: str) -> Part:
        rows = slice(place * height, (place + 1) * height)
        return Part(
            f"{prefix}block_sparse_moe.experts.{expert}.{projection}.weight",
            index=(0, place) if parts > 1 else (0,),
            fused=(f"{prefix}block_sparse_moe.experts.{inner.rpartition('.')[2]}", (expert, rows)),
        )

    return tuple(
        Chunk(expert, 1, tuple(part(expert, *item) for item in enumerate(EXPERTS[inner])))
        for expert in range(num_experts)
    )


def fused_shape(parameter: Parameter) -> tuple[int, ...]:
    """The shape of all experts' weights in one of transformers' fused tensors: gate and up in one dimension."""
    return (parameter.shape[0], parameter.shape[1:-1].numel(), parameter.shape[-1])


def _rotary_rows(num_rows: int, config: ModelConfig) -> Tensor | None:
    order = rotary_row_order(config.head_dim, config.rotary_dim)
    heads = torch.arange(0, num_rows, config.head_dim)
    rows = (heads[:, None] + order).flatten()
    return None if torch.equal(rows, torch.arange(num_rows)) else rows


def bytes_per_worker(parameters: list[Parameter]) -> int:
    """Host memory that converting any one chunk takes: three copies in float32, as read, as laid out and as cast."""
    return 3 * 4 * max(p.shape[1:].numel() * chunk.length for p in parameters for chunk in p.chunks)


def put(chunk_tensor: Tensor, part: Part, read: Callable[[Part], Tensor]) -> None:
    """Theirs into its place in a chunk of ours."""
    place = chunk_tensor[part.index]
    if part.rows is None:
        place.copy_(read(part))
    else:
        place[part.rows] = read(part).to(place.dtype)
