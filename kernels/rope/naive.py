"""Rotary position embedding as complex multiplication, token by token: the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_heads(x_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, head_dim: int) -> Tensor:
    half = cos_TR.shape[-1]
    rows = []
    for x_W, cos_R, sin_R in zip(x_TW, cos_TR.to(x_TW.dtype), sin_TR.to(x_TW.dtype), strict=True):
        for x_K in x_W.split(head_dim):
            turned_R = torch.complex(x_K[:half], x_K[half : 2 * half]) * torch.complex(cos_R, sin_R)
            rows += [turned_R.real, turned_R.imag, x_K[2 * half :]]
    return torch.cat(rows).view_as(x_TW)
