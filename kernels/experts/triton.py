"""The expert layer with Triton kernels between its matrix products.

Bytes through memory besides the products' own, in rows of D or F elements, R = T K:

    forward    permute T + R     SwiGLU 2F in, F out     combine R + T
    backward   permute dy T + R, and x again T + R       SwiGLU 3F in, 3F out     combine R + T

Kept from forward to backward: x, the output of the first product (2F a row), the plan and the weights. A choice's
weight multiplies its activation, inside SwiGLU, not its output: the weight's gradient is ``act . dact``, both at hand
there, and the expert's output is needed by no one. The activation is made again in the pass that differentiates it,
for the gradient of the second product.

Shape legend: T tokens, D hidden, E experts, F expert hidden, K choices per token, R = T * K rows, P pieces of rows.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.experts import triton_kernels
from minimax_train.kernels.experts.permutation import ExpertRows

# Elements of a tile of the kernels that only move and scale, on four warps; tokens or choices of one that sorts them.
TILE = 4096
BLOCK = 256
MOST_EXPERTS = 64  # whose weights fit in a tile


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _tile(width: int, elements: int = TILE, widest: int = 1024) -> tuple[int, int]:
    """Rows and columns of a tile over a tensor that is ``width`` wide."""
    columns = min(_power_of_two(width), widest)
    return max(1, elements // columns), columns


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# --- router -----------------------------------------------------------------------------------------------------------


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, k, piece_T, num_pieces):
        logits_TE = logits_TE.contiguous()
        T, E = logits_TE.shape
        probabilities_TE = torch.empty(T, E, dtype=torch.float32, device=logits_TE.device)
        weights_TK = torch.empty(T, k, dtype=torch.float32, device=logits_TE.device)
        experts_TK = torch.empty(T, k, dtype=torch.int64, device=logits_TE.device)
        counts_PE = torch.zeros(num_pieces, E, dtype=torch.int64, device=logits_TE.device)
        BT, BE = _tile(E, elements=2048)
        if T:
            triton_kernels.route[(triton.cdiv(T, BT),)](
                logits_TE, piece_T, probabilities_TE, weights_TK, experts_TK, counts_PE, T,
                E=E, K=k, BT=BT, BE=BE, BK=_power_of_two(k),
            )  # fmt: skip
        ctx.save_for_backward(probabilities_TE, experts_TK)
        ctx.mark_non_differentiable(experts_TK, counts_PE)
        ctx.set_materialize_grads(False)
        return probabilities_TE, weights_TK, experts_TK, counts_PE

    @staticmethod
    @once_differentiable
    def backward(ctx, d_probabilities_TE, d_weights_TK, *_):
        probabilities_TE, experts_TK = ctx.saved_tensors
        T, E = probabilities_TE.shape
        d_logits_TE = torch.empty(T, E, dtype=torch.float32, device=probabilities_TE.device)
        BT, BE = _tile(E, elements=2048)
        gradients = [None if d is None else d.contiguous() for d in (d_probabilities_TE, d_weights_TK)]
        if T:
            triton_kernels.route_backward[(triton.cdiv(T, BT),)](
                probabilities_TE, experts_TK, *gradients, d_logits_TE, T, E=E, K=experts_TK.shape[1], BT=BT, BE=BE,
                HAS_PROBABILITIES=gradients[0] is not None, HAS_WEIGHTS=gradients[1] is not None,
            )  # fmt: skip
        return d_logits_TE, None, None, None


def route_triton(logits_TE: Tensor, k: int, piece_T: Tensor, num_pieces: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`minimax_train.kernels.experts.route` in one kernel, float32."""
    return _Route.apply(logits_TE.float(), k, piece_T, num_pieces)


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """The product of 16-bit matrices as it was summed, without rounding it to theirs."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _RouterLogits(torch.autograd.Function):
    """The router's projection from bfloat16 operands, summed and returned in float32; x passes through.

    Products of bfloat16 numbers are exact in float32, so these are the logits of operands cast to float32, without the
    casts. The gradient of the logits is split in two bfloat16 numbers for the same reason. What later layers send back
    to x comes in here, and is added to in the same pass.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.set_materialize_grads(False)
        return _float32_product(x_TD, weight_ED.T), x_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logits_TE, d_x_TD):
        x_TD, weight_ED = ctx.saved_tensors
        if d_logits_TE is None:
            return d_x_TD, None
        d_logits_TE, (T, D), E = d_logits_TE.contiguous(), x_TD.shape, len(weight_ED)
        high_TE = d_logits_TE.to(x_TD.dtype)
        both_TB = torch.cat([high_TE, (d_logits_TE - high_TE).to(x_TD.dtype)], dim=1)
        d_weight_ED = _float32_product(both_TB.T, x_TD).unflatten(0, (2, -1)).sum(0).to(weight_ED.dtype)
        if d_x_TD is None:
            return both_TB @ torch.cat([weight_ED, weight_ED]), d_weight_ED
        if E > MOST_EXPERTS or T == 0:
            return torch.addmm(d_x_TD, both_TB, torch.cat([weight_ED, weight_ED])), d_weight_ED
        d_x_TD = _rows_contiguous(d_x_TD)
        out_TD = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
        BT, BD = 64, min(128, max(16, _power_of_two(D)))
        triton_kernels.add_router_gradient[(triton.cdiv(T, BT), triton.cdiv(D, BD))](
            d_logits_TE, weight_ED.contiguous(), d_x_TD, out_TD, T, d_x_TD.stride(0),
            D=D, E=E, BT=BT, BD=BD, BE=max(16, _power_of_two(E)),
        )  # fmt: skip
        return out_TD, d_weight_ED


def router_logits_triton(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`minimax_train.kernels.experts.router_logits` for bfloat16."""
    return _RouterLogits.apply(x_TD, weight_ED)


# --- plan and movement ------------------------------------------------------------------------------------------------


def rank_rows(experts_TK: Tensor, num_experts: int) -> ExpertRows:
    """:meth:`ExpertRows.sort` by counting instead of sorting: count per block, scan, rank. No wait for the host."""
    R, device = experts_TK.numel(), experts_TK.device
    blocks, BE = max(1, triton.cdiv(R, BLOCK)), _power_of_two(num_experts + 1)
    histogram = torch.empty(blocks, BE, dtype=torch.int32, device=device)
    starts = torch.empty(BE, dtype=torch.int32, device=device)
    offsets_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    row_TK = torch.empty(experts_TK.shape, dtype=torch.int64, device=device)
    choice_R = torch.empty(R, dtype=torch.int64, device=device)
    experts_TK = experts_TK.contiguous()
    sizes = {"E": num_experts, "BE": BE}
    triton_kernels.count[(blocks,)](experts_TK, histogram, R, BR=BLOCK, **sizes, num_warps=8)
    triton_kernels.scan[(1,)](histogram, starts, offsets_E, blocks, STEP=64, **sizes, num_warps=8)
    triton_kernels.rank[(blocks,)](experts_TK, histogram, starts, row_TK, choice_R, R, BR=BLOCK, **sizes, num_warps=8)
    return ExpertRows(choice_R, row_TK, offsets_E)


def _permute(x_TD: Tensor, rows: ExpertRows) -> Tensor:
    x_TD = _rows_contiguous(x_TD)
    (T, D), K = x_TD.shape, rows.row_TK.shape[1]
    out_RD = torch.empty(T * K, D, dtype=x_TD.dtype, device=x_TD.device)
    BT, BD = _tile(D)
    triton_kernels.permute[(triton.cdiv(T, BT), triton.cdiv(D, BD))](
        x_TD, rows.row_TK, rows.offsets_E, out_RD, T, x_TD.stride(0), D=D, E=len(rows.offsets_E), K=K, BT=BT, BD=BD
    )
    return out_RD


def _combine(y_RD: Tensor, rows: ExpertRows, weights_TK: Tensor | None = None) -> Tensor:
    (T, K), D = rows.row_TK.shape, y_RD.shape[1]
    out_TD = torch.empty(T, D, dtype=y_RD.dtype, device=y_RD.device)
    BT, BD = _tile(D)
    triton_kernels.combine[(triton.cdiv(T, BT), triton.cdiv(D, BD))](
        y_RD, rows.row_TK, weights_TK, rows.offsets_E, out_TD, T,
        D=D, E=len(rows.offsets_E), K=K, BT=BT, BD=BD, HAS_WEIGHTS=weights_TK is not None,
    )  # fmt: skip
    return out_TD


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, rows):
        ctx.rows = rows
        return _permute(x_TD, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_RD):
        return _combine(d_RD.contiguous(), ctx.rows), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, weights_TK, rows):
        y_RD, weights_TK = y_RD.contiguous(), weights_TK.contiguous()
        ctx.save_for_backward(y_RD, weights_TK)
        ctx.rows = rows
        return _combine(y_RD, rows, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_TD):
        y_RD, weights_TK = ctx.saved_tensors
        rows, d_TD = ctx.rows, _rows_contiguous(d_TD)
        (T, K), D = weights_TK.shape, y_RD.shape[1]
        d_y_RD = torch.empty(y_RD.shape, dtype=y_RD.dtype, device=y_RD.device)
        d_weights_TK = torch.empty(T, K, dtype=weights_TK.dtype, device=y_RD.device)
        BT, BD = _tile(D)
        triton_kernels.combine_backward[(triton.cdiv(T, BT),)](
            d_TD, y_RD, rows.row_TK, weights_TK, rows.offsets_E, d_y_RD, d_weights_TK, T, d_TD.stride(0),
            D=D, E=len(rows.offsets_E), K=K, BT=BT, BD=BD, BK=_power_of_two(K),
        )  # fmt: skip
        return d_y_RD, d_weights_TK, None


def permute_triton(x_TD: Tensor, rows: ExpertRows) -> Tensor:
    """``[T, D] -> [R, D]``: each token's row to each of its choices' rows; zero in rows of no expert."""
    return _Permute.apply(x_TD, rows)


def combine_triton(y_RD: Tensor, weights_TK: Tensor, rows: ExpertRows) -> Tensor:
    """``[R, D] -> [T, D]``: the weighted sum over each token's choices, in float32; a choice of -1 adds nothing."""
    return _Combine.apply(y_RD, weights_TK, rows)


def add_choices_triton(y_RD: Tensor, rows: ExpertRows) -> Tensor:
    """``[R, D] -> [T, D]``: the sum over each token's choices, in float32; a choice of -1 adds nothing."""
    return _combine(y_RD, rows)


# --- the experts ------------------------------------------------------------------------------------------------------


def swiglu_into(
    gate_up_R2F: Tensor,
    act_RF: Tensor,
    offsets_E: Tensor,
    weights: Tensor | None = None,
    choice_R: Tensor | None = None,
) -> None:
    """``act = silu(gate) * up``, times the weight of the row's choice if there are weights."""
    R, F = act_RF.shape
    BR, BF = _tile(F)
    triton_kernels.swiglu[(triton.cdiv(R, BR), triton.cdiv(F, BF))](
        gate_up_R2F, weights, choice_R, offsets_E, act_RF,
        E=len(offsets_E), F=F, BR=BR, BF=BF, HAS_WEIGHTS=weights is not None,
    )  # fmt: skip


def swiglu_backward_into(
    gate_up_R2F: Tensor,
    d_act_RF: Tensor,
    act_RF: Tensor,
    d_gate_up_R2F: Tensor,
    offsets_E: Tensor,
    weights: Tensor | None = None,
    choice_R: Tensor | None = None,
    d_weights: Tensor | None = None,
) -> None:
    """Writes the activation, which may take the memory of its gradient, and the gradients of gate, up and weights."""
    R, F = d_act_RF.shape
    BR, BF = _tile(F, elements=2048)
    triton_kernels.swiglu_backward[(triton.cdiv(R, BR),)](
        gate_up_R2F, weights, choice_R, offsets_E, d_act_RF, d_gate_up_R2F, act_RF, d_weights,
        E=len(offsets_E), F=F, BR=BR, BF=BF, HAS_WEIGHTS=weights is not None,
    )  # fmt: skip


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, products, x_RD, gate_up_E2FD, down_EDF, offsets_E):
        x_RD, gate_up_E2FD, down_EDF = x_RD.contiguous(), gate_up_E2FD.contiguous(), down_EDF.contiguous()
        hidden_R2F, act_RF = products.up(x_RD, gate_up_E2FD, offsets_E)
        ctx.save_for_backward(x_RD, hidden_R2F, gate_up_E2FD, down_EDF, offsets_E)
        ctx.products = products
        return products.down(act_RF, down_EDF, offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RD):
        x_RD, hidden_R2F, gate_up_E2FD, down_EDF, offsets_E = ctx.saved_tensors
        dy_RD, products = dy_RD.contiguous(), ctx.products
        d_hidden_R2F, act_RF, _ = products.d_hidden(dy_RD, hidden_R2F, down_EDF, offsets_E)
        d_down_EDF = products.d_down(dy_RD, act_RF, offsets_E)
        d_gate_up_E2FD = products.d_gate_up(d_hidden_R2F, x_RD, offsets_E)
        return None, products.dx(d_hidden_R2F, gate_up_E2FD, offsets_E), d_gate_up_E2FD, d_down_EDF, None


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, products, x_TD, weights_TK, experts_TK, gate_up_E2FD, down_EDF):
        rows = rank_rows(experts_TK, len(gate_up_E2FD))
        weights_TK, gate_up_E2FD, down_EDF = weights_TK.contiguous(), gate_up_E2FD.contiguous(), down_EDF.contiguous()
        hidden_R2F, act_RF = products.up(_permute(x_TD, rows), gate_up_E2FD, rows.offsets_E, weights_TK, rows.choice_R)
        ctx.save_for_backward(x_TD, weights_TK, gate_up_E2FD, down_EDF, hidden_R2F)
        ctx.products, ctx.rows = products, rows
        return _combine(products.down(act_RF, down_EDF, rows.offsets_E), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        x_TD, weights_TK, gate_up_E2FD, down_EDF, hidden_R2F = ctx.saved_tensors
        rows, products = ctx.rows, ctx.products
        offsets_E = rows.offsets_E
        dy_RD = _permute(dy_TD, rows)
        d_hidden_R2F, act_RF, d_weights_TK = products.d_hidden(
            dy_RD, hidden_R2F, down_EDF, offsets_E, weights_TK, rows.choice_R
        )
        d_down_EDF = products.d_down(dy_RD, act_RF, offsets_E)
        del dy_RD, act_RF
        d_gate_up_E2FD = products.d_gate_up(d_hidden_R2F, _permute(x_TD, rows), offsets_E)
        dx_TD = _combine(products.dx(d_hidden_R2F, gate_up_E2FD, offsets_E), rows)
        return None, dx_TD, d_weights_TK, None, d_gate_up_E2FD, d_down_EDF


def grouped_swiglu_triton(products, x_RD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, offsets_E: Tensor) -> Tensor:
    """:func:`minimax_train.kernels.experts.grouped_swiglu` by these products."""
    return _GroupedSwiGLU.apply(products, x_RD, gate_up_E2FD, down_EDF, offsets_E)


def expert_mlp_triton(
    products, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """:func:`minimax_train.kernels.experts.expert_mlp` as one op; weights stay in their own precision."""
    return _ExpertMLP.apply(products, x_TD, weights_TK, experts_TK, gate_up_E2FD, down_EDF)
