"""SiLU of the projection that lightning attention's q, k and v come from.

Shape legend: T tokens, H heads, K head dim, W = H * 3 * K.
"""

from __future__ import annotations

from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, OnDemand, choose, triton_or_torch
from minimax_train.kernels.silu import naive, pytorch

__all__ = ["IMPLEMENTATIONS", "silu_qkv"]


@OnDemand
def _triton():
    from minimax_train.kernels.silu import triton

    return triton


IMPLEMENTATIONS = {"triton": _triton, "torch": pytorch, "naive": naive}


def silu_qkv(x_TW: Tensor, *, head_dim: int, implementation: str = AUTO) -> tuple[Tensor, Tensor, Tensor]:
    """``x * sigmoid(x)``, and each head's q, k and v of it.

    Args:
        x_TW: the projection, in each head first q, then k, then v.
        head_dim: K.
        implementation: ``auto``, ``triton`` (computes in float32; not float64), ``torch`` or ``naive``.

    Returns:
        q, k and v, each ``[T, H, K]`` in the dtype of x: views of one tensor ``[T, H, 3, K]``, so not to be changed in
        place (autograd refuses).
    """
    return choose("silu", IMPLEMENTATIONS, implementation, triton_or_torch(x_TW)).silu_qkv(x_TW, head_dim)
