"""Rotary position embedding in PyTorch ops: any device and dtype.

Shape legend: T tokens, H heads, K head dim, R half of the rotary dim, W = H * K.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_heads(x_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, head_dim: int) -> Tensor:
    half = cos_TR.shape[-1]
    x_THK = x_TW.unflatten(-1, (-1, head_dim))
    first, second, rest = x_THK.split([half, half, head_dim - 2 * half], dim=-1)
    cos, sin = cos_TR[:, None].to(x_TW.dtype), sin_TR[:, None].to(x_TW.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).flatten(1)
