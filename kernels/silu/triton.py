"""SiLU of q, k and v in one kernel each way.

Tensors of ``T x H x K`` through memory: 6 forward, 9 backward. Attention hands back three gradients, each its own
tensor; PyTorch would put them in one first (6 more), because the projection's gradient is one. Here the backward
kernel reads them where they lie.

Shape legend: T tokens, H heads, K head dim, W = H * 3 * K.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.silu import triton_kernels

TILE = 2048  # elements of one tensor at a time in a program


class _SiluQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TW, head_dim):
        x_TW = x_TW.contiguous()
        out_TW = torch.empty(x_TW.shape, dtype=x_TW.dtype, device=x_TW.device)
        if size := x_TW.numel():
            triton_kernels.forward[(triton.cdiv(size, TILE),)](x_TW, out_TW, size, B=TILE)
        ctx.save_for_backward(x_TW)
        ctx.head_dim = head_dim
        # A gradient that nobody sends is not made of zeros and read, but left out.
        ctx.set_materialize_grads(False)
        return out_TW.unflatten(1, (-1, 3, head_dim)).unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_THK, dk_THK, dv_THK):
        (x_TW,), K = ctx.saved_tensors, ctx.head_dim
        (T, W), gradients = x_TW.shape, (dq_THK, dk_THK, dv_THK)
        H = W // (3 * K)
        d_TW = torch.empty(T, W, dtype=x_TW.dtype, device=x_TW.device)
        BK = triton.next_power_of_2(K)
        BR = max(1, TILE // BK)
        if d_TW.numel():
            strides = [stride for d_THK in gradients for stride in ((0, 0, 0) if d_THK is None else d_THK.stride())]
            triton_kernels.backward[(triton.cdiv(T * H, BR),)](
                x_TW, *gradients, d_TW, T * H, *strides, H=H, K=K, BR=BR, BK=BK
            )
        return d_TW, None


def silu_qkv(x_TW: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[T, H, K]``; their gradients may have any strides.

    Raises:
        ValueError: for float64.
    """
    if x_TW.dtype == torch.float64:
        raise ValueError("kernels.silu='triton' computes in float32 and takes no float64")
    return _SiluQKV.apply(x_TW, head_dim)
