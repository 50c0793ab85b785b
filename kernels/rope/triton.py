"""Rotary position embedding in place, in one kernel.

Forward, only the rotated dimensions pass through memory: ``R / K`` of a tensor read and as much written, where
PyTorch ops read and write everything several times. Backward, the inverse rotation goes to new memory (all of a
tensor read and written): a gradient that comes in may belong to someone else as well.

Shape legend: T tokens, H heads, K head dim, R rotary dim, W = H * K.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.rope import triton_kernels

TILE = 2048  # pairs per program


def _rotate(x_TW: Tensor, out_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, K: int, *, inverse: bool) -> None:
    (T, W), R = x_TW.shape, cos_TR.shape[1]
    H, BR = W // K, triton.next_power_of_2(R)
    BH = min(triton.next_power_of_2(H), max(1, TILE // BR))
    BT = max(1, TILE // (BH * BR))
    rest = 0 if x_TW is out_TW or K == 2 * R else triton.next_power_of_2(K - 2 * R)
    triton_kernels.rotate[(triton.cdiv(T, BT), triton.cdiv(H, BH))](
        x_TW, out_TW, cos_TR, sin_TR, T, x_TW.stride(0), out_TW.stride(0),
        H=H, K=K, R=R, BT=BT, BH=BH, BR=BR, BREST=rest, INVERSE=inverse,
    )  # fmt: skip


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TW, cos_TR, sin_TR, head_dim):
        ctx.mark_dirty(x_TW)
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.head_dim = head_dim
        _rotate(x_TW, x_TW, cos_TR, sin_TR, head_dim, inverse=False)
        return x_TW

    @staticmethod
    @once_differentiable
    def backward(ctx, d_TW):
        d_TW = d_TW if d_TW.stride(-1) == 1 else d_TW.contiguous()
        out_TW = torch.empty(d_TW.shape, dtype=d_TW.dtype, device=d_TW.device)
        _rotate(d_TW, out_TW, *ctx.saved_tensors, K=ctx.head_dim, inverse=True)
        return out_TW, None, None, None


def rotate_heads(x_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, head_dim: int) -> Tensor:
    """x itself, rotated in place; autograd is told.

    Raises:
        ValueError: for float64.
    """
    if x_TW.dtype == torch.float64:
        raise ValueError("kernels.rope='triton' computes in float32 and takes no float64")
    if cos_TR.shape[1] == 0 or len(x_TW) == 0:
        return x_TW
    if x_TW.stride(-1) != 1:
        x_TW = x_TW.contiguous()
    return _Rotate.apply(x_TW, cos_TR.contiguous(), sin_TR.contiguous(), head_dim)
