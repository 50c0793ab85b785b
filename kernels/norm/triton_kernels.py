"""The RMSNorm kernels: a row is read once and held in registers, forward and backward.

KIND says what the second input is: nothing, what is added to ``alpha * x`` before the norm, or the gate after it.
GIVEN says that ``scale`` is an input of its own, made from more of the row than is here; else it is made from the row.

Shape legend: T tokens, D width, P programs of the backward pass. A block of X is BX.
"""

import triton
import triton.language as tl

ALONE = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)
GATE = tl.constexpr(2)


@triton.jit
def forward(
    x, second, weight, out, scale, T, alpha, eps,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, KIND: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """``out`` and, for the backward pass, ``scale[t] = 1 / sqrt(mean(x^2) + eps)``, unless that is given."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.arange(0, BD)
    mask = (tokens < T)[:, None] & (columns < D)[None, :]
    at = tokens[:, None] * D + columns[None, :]
    x_TD = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if KIND == RESIDUAL:
        x_TD = alpha * x_TD + tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
    if GIVEN:
        scale_T = tl.load(scale + tokens, mask=tokens < T, other=0.0)
    else:
        scale_T = 1.0 / tl.sqrt(tl.sum(x_TD * x_TD, 1) / D + eps)
        tl.store(scale + tokens, scale_T, mask=tokens < T)
    weight_D = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    y_TD = x_TD * scale_T[:, None] * weight_D[None, :]
    if KIND == GATE:
        y_TD *= tl.sigmoid(tl.load(second + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(out + at, y_TD.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    x, second, weight, scale, d_out, d_again, d_x, d_second, d_weights, d_scale, T, per, alpha,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, KIND: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Gradients of both inputs, and each program's part ``[P, D]`` of the weight's, summed over its tokens in order.

    A given scale has a gradient of its own, ``[T]``. The gradient of the output is ``d_out``, plus ``d_again`` where it
    was handed out twice.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    d_weight_TD = tl.zeros([BT, BD], tl.float32)
    for step in range(0, per):
        tokens = (program * per + step) * BT + tl.arange(0, BT)
        mask = (tokens < T)[:, None] & (columns < D)[None, :]
        at = tokens[:, None] * D + columns[None, :]
        x_TD = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        d_TD = tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32)
        if d_again is not None:
            d_TD += tl.load(d_again + at, mask=mask, other=0.0).to(tl.float32)
        scale_T = tl.load(scale + tokens, mask=tokens < T, other=0.0)
        # Again in every step, from the cache: kept, it would cost registers that another program can use.
        weight_D = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        if KIND == RESIDUAL:
            x_TD = alpha * x_TD + tl.load(second + at, mask=mask, other=0.0).to(tl.float32)
        if GIVEN:
            unscaled_TD = x_TD
        x_TD *= scale_T[:, None]
        if KIND == GATE:
            gate_TD = tl.sigmoid(tl.load(second + at, mask=mask, other=0.0).to(tl.float32))
            d_gate_TD = d_TD * x_TD * weight_D[None, :] * gate_TD * (1.0 - gate_TD)
            tl.store(d_second + at, d_gate_TD.to(d_second.dtype.element_ty), mask=mask)
            d_TD *= gate_TD
        d_weight_TD += d_TD * x_TD
        d_TD *= weight_D[None, :]
        if GIVEN:
            tl.store(d_scale + tokens, tl.sum(d_TD * unscaled_TD, 1), mask=tokens < T)
            d_TD *= scale_T[:, None]
        else:
            along_T = tl.sum(d_TD * x_TD, 1) / D
            d_TD = (d_TD - x_TD * along_T[:, None]) * scale_T[:, None]
        if KIND == RESIDUAL:
            tl.store(d_second + at, d_TD.to(d_second.dtype.element_ty), mask=mask)
            d_TD *= alpha
        tl.store(d_x + at, d_TD.to(d_x.dtype.element_ty), mask=mask)
    tl.store(d_weights + program * D + columns, tl.sum(d_weight_TD, 0), mask=columns < D)
