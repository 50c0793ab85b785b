"""Rotary position embedding on the first R of K head dimensions (RoFormer, arXiv 2104.09864; half-split pairing).

Shape legend: T tokens, H heads, K head dim, R rotary dim, W = H * K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, OnDemand, choose, triton_or_torch
from minimax_train.kernels.rope import naive, pytorch

__all__ = ["IMPLEMENTATIONS", "rotary_table", "rotate_heads"]


@OnDemand
def _triton():
    from minimax_train.kernels.rope import triton

    return triton


IMPLEMENTATIONS = {"triton": _triton, "torch": pytorch, "naive": naive}


def rotary_table(positions_T: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, R / 2]`` in float32 of ``position * base^(-2i / R)``.

    Frequencies and angles are float32, as in transformers and the inference engines that will read the weights.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=positions_T.device) / rotary_dim
    angles = positions_T.float()[:, None] * (1.0 / base**exponent)
    return angles.cos(), angles.sin()


def rotate_heads(x_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, head_dim: int, implementation: str = AUTO) -> Tensor:
    """Rotate pairs (i, i + R / 2) of the first R dimensions of each head; the others pass through.

    Args:
        x_TW: heads side by side, as a projection returns them; **may be overwritten** (``triton`` works in place),
            so nobody else may need it. Best not a view: autograd copies when a view is changed in place.
        cos_TR, sin_TR: ``[T, R / 2]``, as :func:`rotary_table` gives them.
        implementation: ``auto``, ``triton`` (in place, rotates in float32; not float64), ``torch`` or ``naive``.

    Returns:
        ``[T, W]`` in the dtype of x.
    """
    module = choose("rope", IMPLEMENTATIONS, implementation, triton_or_torch(x_TW))
    return module.rotate_heads(x_TW, cos_TR, sin_TR, head_dim)
