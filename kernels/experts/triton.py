"""The router, and what an expert layer does between its GEMMs, with Triton kernels.

Bytes through memory besides the GEMMs' own, in vectors of D or F elements, R = T K:

    forward    permute T + R     SwiGLU 2F in, F out     unpermute R + T, with the residual R + 2T
    backward   permute dy T + R, and x again T + R       SwiGLU 3F in, 3F out     unpermute as forward

Shape legend: T tokens, D hidden, E experts, F expert hidden, K assignments per token, R = T * K routed tokens, P spans
of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.experts import pytorch, triton_kernels

# Elements of a tile of the kernels that only move and scale, on four warps; assignments of one that sorts them.
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


def _router_tile(E: int) -> dict[str, int]:
    """Whole rows of a tensor that is E wide, and the warps for them."""
    BE = _power_of_two(E)
    return {"BT": max(1, 2048 // BE), "BE": BE, "num_warps": max(4, min(32, BE // 512))}


# --- router -----------------------------------------------------------------------------------------------------------


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, k, span_T, num_spans):
        logits_TE = logits_TE.contiguous()
        (T, E), device = logits_TE.shape, logits_TE.device
        probabilities_TE = torch.empty(T, E, dtype=torch.float32, device=device)
        weights_TK = torch.empty(T, k, dtype=torch.float32, device=device)
        experts_TK = torch.empty(T, k, dtype=torch.int64, device=device)
        zeros = torch.zeros(2 * num_spans * E + 1, dtype=torch.int64, device=device)
        count_PE, units_PE = zeros[:-1].view(2, num_spans, E)
        if T:
            tile = _router_tile(E)
            triton_kernels.route[(triton.cdiv(T, tile["BT"]),)](
                logits_TE, span_T, probabilities_TE, weights_TK, experts_TK, count_PE, units_PE, zeros[-1], T,
                E=E, K=k, BK=_power_of_two(k), **tile,
            )  # fmt: skip
        ctx.save_for_backward(probabilities_TE, experts_TK, span_T)
        probability_PE, entropy = units_PE / triton_kernels.ONE.value, zeros[-1] / triton_kernels.ONE.value
        ctx.mark_non_differentiable(experts_TK, count_PE, entropy)
        ctx.set_materialize_grads(False)
        return weights_TK, experts_TK, count_PE, probability_PE, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weights_TK, _, __, d_sum_PE, ___):
        probabilities_TE, experts_TK, span_T = ctx.saved_tensors
        if d_sum_PE is None and d_weights_TK is None:
            return None, None, None, None
        (T, E), d_logits_TE = probabilities_TE.shape, torch.empty_like(probabilities_TE)
        gradients = [None if d is None else d.contiguous() for d in (d_sum_PE, d_weights_TK)]
        if T:
            tile = _router_tile(E)
            triton_kernels.route_backward[(triton.cdiv(T, tile["BT"]),)](
                probabilities_TE, experts_TK, span_T, *gradients, d_logits_TE, T, E=E, K=experts_TK.shape[1],
                HAS_SUMS=gradients[0] is not None, HAS_WEIGHTS=gradients[1] is not None, **tile,
            )  # fmt: skip
        return d_logits_TE, None, None, None


def route(logits_TE: Tensor, k: int, span_T: Tensor, num_spans: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In one kernel, float32."""
    return _Route.apply(logits_TE.float(), k, span_T, num_spans)


def _float32_gemm(a: Tensor, b: Tensor) -> Tensor:
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
        return _float32_gemm(x_TD, weight_ED.T), x_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logits_TE, d_x_TD):
        x_TD, weight_ED = ctx.saved_tensors
        if d_logits_TE is None:
            return d_x_TD, None
        d_logits_TE, (T, D), E = d_logits_TE.contiguous(), x_TD.shape, len(weight_ED)
        high_TE = d_logits_TE.to(x_TD.dtype)
        both_TB = torch.cat([high_TE, (d_logits_TE - high_TE).to(x_TD.dtype)], dim=1)
        d_weight_ED = _float32_gemm(both_TB.T, x_TD).unflatten(0, (2, -1)).sum(0).to(weight_ED.dtype)
        if d_x_TD is None:
            return both_TB @ torch.cat([weight_ED, weight_ED]), d_weight_ED
        if E > MOST_EXPERTS or T == 0:
            return torch.addmm(d_x_TD, both_TB, torch.cat([weight_ED, weight_ED])), d_weight_ED
        d_x_TD = _rows_contiguous(d_x_TD)
        out_TD = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
        BT, BD = 64, min(128, max(16, _power_of_two(D)))
        factor = tl.bfloat16 if x_TD.is_cuda else tl.float32  # Triton's interpreter multiplies no bfloat16
        triton_kernels.add_router_gradient[(triton.cdiv(T, BT), triton.cdiv(D, BD))](
            both_TB, weight_ED.contiguous(), d_x_TD, out_TD, T, d_x_TD.stride(0),
            D=D, E=E, BT=BT, BD=BD, BE=max(16, _power_of_two(E)), FACTOR=factor,
        )  # fmt: skip
        return out_TD, d_weight_ED


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    if x_TD.dtype == weight_ED.dtype == torch.bfloat16:
        return _RouterLogits.apply(x_TD, weight_ED)
    return pytorch.router_logits(x_TD, weight_ED)


# --- permutation and SwiGLU, as in pytorch.py -----------------------------------------------------------------------


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """By counting instead of sorting: count per block, scan, rank. No wait for the host."""
    R, device = experts_TK.numel(), experts_TK.device
    blocks, BE = max(1, triton.cdiv(R, BLOCK)), _power_of_two(num_experts + 1)
    histogram = torch.empty(blocks, BE, dtype=torch.int32, device=device)
    starts = torch.empty(BE, dtype=torch.int32, device=device)
    offsets_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    routed_TK = torch.empty(experts_TK.shape, dtype=torch.int64, device=device)
    assignment_R = torch.empty(R, dtype=torch.int64, device=device)
    experts_TK, sizes = experts_TK.contiguous(), {"E": num_experts, "BE": BE, "num_warps": 8}
    triton_kernels.count[(blocks,)](experts_TK, histogram, R, BR=BLOCK, **sizes)
    triton_kernels.scan[(1,)](histogram, starts, offsets_E, blocks, STEP=64, **sizes)
    triton_kernels.rank[(blocks,)](experts_TK, histogram, starts, routed_TK, assignment_R, R, BR=BLOCK, **sizes)
    return assignment_R, routed_TK, offsets_E


def permute(x_TD: Tensor, assignment_R: Tensor, routed_TK: Tensor, offsets_E: Tensor) -> Tensor:
    x_TD = _rows_contiguous(x_TD)
    (T, D), K = x_TD.shape, routed_TK.shape[1]
    out_RD = torch.empty(T * K, D, dtype=x_TD.dtype, device=x_TD.device)
    BT, BD = _tile(D)
    triton_kernels.permute[(triton.cdiv(T, BT), triton.cdiv(D, BD))](
        x_TD, routed_TK, offsets_E, out_RD, T, x_TD.stride(0), D=D, E=len(offsets_E), K=K, BT=BT, BD=BD
    )
    return out_RD


def unpermute(
    y_RD: Tensor, weights_R: Tensor | None, routed_TK: Tensor, offsets_E: Tensor, x_TD: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Sums in float32."""
    (T, K), D = routed_TK.shape, y_RD.shape[1]
    weights_R = None if weights_R is None else weights_R.contiguous()
    weights_TK = None if weights_R is None else weights_R.new_empty(T, K)
    x_TD = None if x_TD is None else _rows_contiguous(x_TD)
    out_TD = torch.empty(T, D, dtype=y_RD.dtype, device=y_RD.device)
    BT, BD = _tile(D)
    triton_kernels.unpermute[(triton.cdiv(T, BT), triton.cdiv(D, BD))](
        y_RD, weights_R, routed_TK, offsets_E, x_TD, out_TD, weights_TK, T, D if x_TD is None else x_TD.stride(0),
        scale, D=D, E=len(offsets_E), K=K, BT=BT, BD=BD,
    )  # fmt: skip
    return out_TD, weights_TK


def swiglu(hidden_R2F: Tensor, weights_R: Tensor, offsets_E: Tensor) -> Tensor:
    R, F = len(hidden_R2F), hidden_R2F.shape[1] // 2
    act_RF = torch.empty(R, F, dtype=hidden_R2F.dtype, device=hidden_R2F.device)
    BR, BF = _tile(F)
    triton_kernels.swiglu[(triton.cdiv(R, BR), triton.cdiv(F, BF))](
        hidden_R2F, weights_R, offsets_E, act_RF, E=len(offsets_E), F=F, BR=BR, BF=BF
    )
    return act_RF


def swiglu_backward(
    hidden_R2F: Tensor, weights_R: Tensor, d_act_RF: Tensor, act_RF: Tensor, d_hidden_R2F: Tensor, offsets_E: Tensor
) -> Tensor:
    (R, F), d_weights_R = d_act_RF.shape, torch.empty_like(weights_R)
    BR, BF = _tile(F, elements=2048)
    triton_kernels.swiglu_backward[(triton.cdiv(R, BR),)](
        hidden_R2F, weights_R, offsets_E, d_act_RF, d_hidden_R2F, act_RF, d_weights_R,
        E=len(offsets_E), F=F, BR=BR, BF=BF,
    )  # fmt: skip
    return d_weights_R
