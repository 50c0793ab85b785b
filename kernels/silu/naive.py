"""SiLU of q, k and v a token and a head at a time: the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def silu_qkv(x_TW: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = [x_W.split(3 * head_dim) for x_W in (x_TW / (1 + (-x_TW).exp()))]
    q_THK, k_THK, v_THK = (
        torch.stack([torch.stack([x_3K[i * head_dim : (i + 1) * head_dim] for x_3K in token]) for token in heads])
        for i in range(3)
    )
    return q_THK, k_THK, v_THK
