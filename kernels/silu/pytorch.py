"""SiLU of q, k and v in PyTorch ops: any device and dtype. Backward, their gradients are stacked first."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_qkv(x_TW: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    q_THK, k_THK, v_THK = F.silu(x_TW).unflatten(-1, (-1, 3, head_dim)).unbind(2)
    return q_THK, k_THK, v_THK
