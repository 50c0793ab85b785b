"""RMSNorm, alone or joined with the DeepNorm residual before it or the gate after it, in one kernel each way.

Tensors of ``T x D`` through memory, forward and backward: alone 2 and 3, handed out twice 2 and 4, with residual or
gate 3 and 5. The sum ``alpha * h + f`` is never stored: nothing but the norm reads it, and the backward pass has both
terms at hand.

Shape legend: T tokens, D width.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.norm import triton_kernels

WIDEST = 32768  # a row must fit in the registers of one program


@cache
def _programs(device: torch.device) -> int:
    """Programs of the backward pass, each of which hands one row of the weight's gradient to the final sum."""
    if device.type != "cuda":
        return 3
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _tile(D: int, per_thread: int) -> dict:
    """Rows and columns of one step of one program, and its warps for that many elements per thread."""
    BD = triton.next_power_of_2(D)
    BT = max(1, 2048 // BD)
    return {"BT": BT, "BD": BD, "num_warps": max(4, min(32, BT * BD // (32 * per_thread)))}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, second_TD, weight_D, given_T, alpha, eps, kind, twice=False):
        x_TD = x_TD.contiguous()
        second_TD = None if second_TD is None else second_TD.contiguous()
        (T, D), tile = x_TD.shape, _tile(x_TD.shape[1], 32)
        out_TD = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
        scale_T = torch.empty(T, dtype=torch.float32, device=x_TD.device) if given_T is None else given_T.contiguous()
        if T:
            grid = (triton.cdiv(T, tile["BT"]),)
            triton_kernels.forward[grid](
                x_TD, second_TD, weight_D, out_TD, scale_T, T, alpha, eps,
                D=D, KIND=kind, GIVEN=given_T is not None, **tile,
            )  # fmt: skip
        ctx.save_for_backward(x_TD, second_TD, weight_D, scale_T)
        ctx.alpha, ctx.kind, ctx.given = alpha, kind, given_T is not None
        return (out_TD, out_TD.view(T, D)) if twice else out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out_TD, d_again_TD=None):
        x_TD, second_TD, weight_D, scale_T = ctx.saved_tensors
        # Four such rows in registers at once, and none to spare.
        (T, D), tile = x_TD.shape, _tile(x_TD.shape[1], 16)
        steps = triton.cdiv(T, tile["BT"])
        per = max(1, triton.cdiv(steps, _programs(x_TD.device)))
        programs = triton.cdiv(steps, per)
        d_x_TD = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
        d_second_TD = None
        if second_TD is not None:
            d_second_TD = torch.empty(T, D, dtype=second_TD.dtype, device=x_TD.device)
        d_scale_T = torch.empty_like(scale_T) if ctx.given else None
        d_again_TD = None if d_again_TD is None else d_again_TD.contiguous()
        d_weights_PD = torch.empty(programs, D, dtype=torch.float32, device=x_TD.device)
        if T:
            triton_kernels.backward[(programs,)](
                x_TD, second_TD, weight_D, scale_T, d_out_TD.contiguous(), d_again_TD, d_x_TD, d_second_TD,
                d_weights_PD, d_scale_T, T, per, ctx.alpha, D=D, KIND=ctx.kind, GIVEN=ctx.given, **tile,
            )  # fmt: skip
        return d_x_TD, d_second_TD, d_weights_PD.sum(0).to(weight_D.dtype), d_scale_T, None, None, None, None


def _check(x_TD: Tensor) -> None:
    if x_TD.dtype == torch.float64 or x_TD.shape[1] > WIDEST:
        raise ValueError(
            f"kernels.norm='triton' takes rows of at most {WIDEST} and no float64, got {tuple(x_TD.shape)} {x_TD.dtype}"
        )


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    _check(x_TD)
    return _Norm.apply(x_TD, None, weight_D, None, 1.0, eps, triton_kernels.ALONE.value)


def rms_norm_twice(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x_TD)
    return _Norm.apply(x_TD, None, weight_D, None, 1.0, eps, triton_kernels.ALONE.value, True)


def add_rms_norm(h_TD: Tensor, f_TD: Tensor, weight_D: Tensor, alpha: float, eps: float) -> Tensor:
    _check(h_TD)
    return _Norm.apply(h_TD, f_TD, weight_D, None, alpha, eps, triton_kernels.RESIDUAL.value)


def gated_rms_norm(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    _check(x_TD)
    return _Norm.apply(x_TD, gate_TD, weight_D, None, 1.0, eps, triton_kernels.GATE.value)


def gated_scale(x_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, scale_T: Tensor) -> Tensor:
    _check(x_TD)
    return _Norm.apply(x_TD, gate_TD, weight_D, scale_T.float(), 1.0, 0.0, triton_kernels.GATE.value)
