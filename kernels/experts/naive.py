"""The expert layer one token and one assignment at a time: the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_mlp_naive(
    x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """``y_t = sum_k weight_tk * down_e (silu(gate_e x_t) * up_e x_t)`` with e the k-th expert of t; no expert if -1."""
    outputs = []
    for t in range(len(x_TD)):
        y_D = torch.zeros_like(x_TD[t])
        for weight, expert in zip(weights_TK[t], experts_TK[t].tolist(), strict=True):
            if expert >= 0:
                gate_F, up_F = (gate_up_E2FD[expert] @ x_TD[t]).chunk(2)
                y_D = y_D + weight * (down_EDF[expert] @ (F.silu(gate_F) * up_F))
        outputs.append(y_D)
    return torch.stack(outputs)
