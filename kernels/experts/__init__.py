"""The expert layer's compute: routing, permutation, and the SwiGLU experts as grouped matrix products.

Shape legend: T tokens, D hidden, E experts, F expert hidden, K choices per token, R = T * K rows sorted by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, choose
from minimax_train.kernels.experts.grouped import grouped_linear_loop, grouped_linear_torch
from minimax_train.kernels.experts.naive import expert_mlp_naive
from minimax_train.kernels.experts.permutation import ExpertRows
from minimax_train.kernels.experts.routing import (
    count_choices,
    drop_over_capacity,
    load_balancing_loss,
    top_k_routing,
)

__all__ = [
    "ExpertRows",
    "count_choices",
    "drop_over_capacity",
    "expert_mlp",
    "expert_mlp_naive",
    "grouped_swiglu",
    "load_balancing_loss",
    "top_k_routing",
]

IMPLEMENTATIONS = {"loop": grouped_linear_loop, "grouped": grouped_linear_torch}
NEEDS_CUDA = ("grouped",)


def grouped_swiglu(
    x_RD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, offsets_E: Tensor, *, implementation: str = AUTO
) -> Tensor:
    """``down_e (silu(gate_e x) * up_e x)`` for rows sorted by expert; rows past ``offsets_E[-1]`` are undefined.

    Args:
        x_RD: any floating dtype, the same as the weights'.
        gate_up_E2FD: gate over up, as in transformers' fused expert weights.
        offsets_E: end row of each expert, int32.
        implementation: ``auto``, ``grouped`` (CUDA, bfloat16) or ``loop``.
    """
    aligned = gate_up_E2FD.shape[1] % 16 == 0 and gate_up_E2FD.shape[2] % 8 == 0  # rows on 16 bytes, in both products
    best = "grouped" if x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and aligned else "loop"
    linear = choose("experts", IMPLEMENTATIONS, implementation, best)
    gate_RF, up_RF = linear(x_RD, gate_up_E2FD, offsets_E).chunk(2, dim=-1)
    return linear(F.silu(gate_RF) * up_RF, down_EDF, offsets_E)


def expert_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    implementation: str = AUTO,
) -> Tensor:
    """``y_t = sum_k weight_tk * expert_tk(x_t)``; a choice of -1 adds nothing.

    Returns:
        ``[T, D]`` in the dtype of x; weights may be of higher precision, and are rounded to it.
    """
    rows = ExpertRows.sort(experts_TK, len(gate_up_E2FD))
    y_RD = grouped_swiglu(rows.permute(x_TD), gate_up_E2FD, down_EDF, rows.offsets_E, implementation=implementation)
    return (rows.unpermute(y_RD) * weights_TK[..., None].to(x_TD.dtype)).sum(1)
