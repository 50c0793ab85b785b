"""The decays that transformers keeps as buffers of every lightning layer, in the state dict beside the weights.

Evaluated in transformers' order and precision, float32, so that they come out the same bit for bit. Its names:
``slope_rate [H, 1, 1]``, ``query_decay`` and ``key_decay [H, C, 1]``, ``diagonal_decay [1, H, C, C]`` for blocks of C.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from minimax_train.convert.names import attention_names
from minimax_train.convert.shards import Output
from minimax_train.kernels.lightning import lightning_slopes
from minimax_train.model import ModelConfig

SLOPES = "slope_rate"


def decay_name(layer: int, buffer: str) -> str:
    """Theirs, on disk and in memory."""
    return f"model.layers.{layer}.self_attn.{buffer}"


def lightning_layers(config: ModelConfig) -> list[int]:
    return [layer for layer, names in enumerate(attention_names(config)) if names.has_decays]


def decay_outputs(config: ModelConfig, block_size: int, dtype: torch.dtype) -> Iterator[Output]:
    """Every lightning layer's buffers, slopes first, computed when they are written or compared."""
    H, C = config.num_heads, block_size
    shapes = {SLOPES: (H, 1, 1), "query_decay": (H, C, 1), "key_decay": (H, C, 1), "diagonal_decay": (1, H, C, C)}
    for layer in lightning_layers(config):
        for buffer, shape in shapes.items():
            make = partial(decays, config, layer, buffer, block_size)
            yield Output(decay_name(layer, buffer), shape, dtype, (make,))


def decays(config: ModelConfig, layer: int, buffer: str, block_size: int) -> Tensor:
    """One buffer of one layer, float32."""
    slope_H11 = lightning_slopes(config.num_heads, layer, config.num_layers)[:, None, None]
    if buffer == SLOPES:
        return slope_H11
    position_C = torch.arange(block_size) + 1
    if buffer == "query_decay":
        return torch.exp(-slope_H11 * position_C[:, None])
    if buffer == "key_decay":
        return torch.exp(-slope_H11 * (block_size - position_C[:, None]))
    assert buffer == "diagonal_decay", buffer
    exponent_1HCC = slope_H11 * (position_C[:, None] - position_C)[None, None]
    return torch.exp(torch.where(exponent_1HCC >= 0, -exponent_1HCC, float("-inf")))
