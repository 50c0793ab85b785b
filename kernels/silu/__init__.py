"""SiLU of the projection that lightning attention's q, k and v come from.

Shape legend: T tokens, H heads, K head dim, W = H * 3 * K.
"""

from __future__ import annotations

from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, choose, triton_takes
from minimax_train.kernels.silu.naive import silu_qkv_naive
from minimax_train.kernels.silu.plain import silu_qkv_plain

__all__ = ["IMPLEMENTATIONS", "silu_qkv"]


def _triton(*args) -> tuple[Tensor, Tensor, Tensor]:
    # CPU installs have no triton: imported only when asked for.
    from minimax_train.kernels.silu.triton import silu_qkv_triton

    return silu_qkv_triton(*args)


IMPLEMENTATIONS = {"triton": _triton, "plain": silu_qkv_plain, "naive": silu_qkv_naive}


def silu_qkv(x_TW: Tensor, *, head_dim: int, implementation: str = AUTO) -> tuple[Tensor, Tensor, Tensor]:
    """``x * sigmoid(x)``, and each head's q, k and v of it.

    Args:
        x_TW: the projection, in each head first q, then k, then v.
        head_dim: K.
        implementation: ``auto``, ``triton`` (computes in float32; not float64), ``plain`` or ``naive``.

    Returns:
        q, k and v, each ``[T, H, K]`` in the dtype of x: views of one tensor ``[T, H, 3, K]``, so not to be changed in
        place (autograd refuses).
    """
    best = "triton" if triton_takes(x_TW) else "plain"
    return choose("silu", IMPLEMENTATIONS, implementation, best)(x_TW, head_dim)
