"""The expert layer's compute: routing, permutation, and the SwiGLU experts as grouped matrix products.

Shape legend: T tokens, D hidden, E experts, F expert hidden, K choices per token, R = T * K rows sorted by expert, P
pieces of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, choose, triton_takes
from minimax_train.kernels.experts.grouped import grouped_linear_loop, grouped_linear_torch
from minimax_train.kernels.experts.naive import expert_mlp_naive
from minimax_train.kernels.experts.permutation import ExpertRows
from minimax_train.kernels.experts.products import best_implementation, expert_products, has_quack
from minimax_train.kernels.experts.routing import (
    count_choices,
    drop_over_capacity,
    load_balancing_loss,
    route_plain,
    router_logits_plain,
    top_k_routing,
)

__all__ = [
    "ExpertRows",
    "add_choices",
    "combine",
    "count_choices",
    "drop_over_capacity",
    "expert_mlp",
    "expert_mlp_naive",
    "expert_products",
    "grouped_swiglu",
    "has_quack",
    "load_balancing_loss",
    "permute",
    "plan_rows",
    "route",
    "router_logits",
    "top_k_routing",
]


def _with(linear):
    """The experts as separate ops around one grouped product."""

    def grouped_swiglu(x_RD, gate_up_E2FD, down_EDF, offsets_E):
        gate_RF, up_RF = linear(x_RD, gate_up_E2FD, offsets_E).chunk(2, dim=-1)
        return linear(F.silu(gate_RF) * up_RF, down_EDF, offsets_E)

    return grouped_swiglu


def _by_products(name: str):
    """The experts as one op."""

    def grouped_swiglu(x_RD, gate_up_E2FD, down_EDF, offsets_E):
        # CPU installs have no triton: imported only when asked for.
        from minimax_train.kernels.experts.triton import grouped_swiglu_triton

        products = expert_products(x_RD, down_EDF.shape[2], name)
        return grouped_swiglu_triton(products, x_RD, gate_up_E2FD, down_EDF, offsets_E)

    return grouped_swiglu


def _route_triton(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from minimax_train.kernels.experts.triton import route_triton

    return route_triton(*args)


IMPLEMENTATIONS = {
    "quack": _by_products("quack"),
    "triton": _by_products("triton"),
    "grouped": _with(grouped_linear_torch),
    "loop": _with(grouped_linear_loop),
}
ROUTER_IMPLEMENTATIONS = {"triton": _route_triton, "plain": route_plain}


def router_logits(x_TD: Tensor, weight_ED: Tensor, *, implementation: str = AUTO) -> tuple[Tensor, Tensor]:
    """``weight @ x_t`` in float32 (float64 for float64), and x for those that use it next.

    Whoever uses the x returned here, rather than the one given, has its gradient added to the router's inside the
    router's own product.

    Args:
        implementation: ``auto``, ``triton`` (bfloat16 operands without casts; other dtypes as plain) or ``plain``.
    """
    choose("router", ROUTER_IMPLEMENTATIONS, implementation, "plain")
    name = ("triton" if triton_takes(x_TD) else "plain") if implementation == AUTO else implementation
    if name == "triton" and x_TD.dtype == weight_ED.dtype == torch.bfloat16:
        from minimax_train.kernels.experts.triton import router_logits_triton

        return router_logits_triton(x_TD, weight_ED)
    return router_logits_plain(x_TD, weight_ED)


def route(
    logits_TE: Tensor, k: int, piece_T: Tensor, num_pieces: int, *, implementation: str = AUTO
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over experts, the k largest renormalised, and how often each expert was chosen.

    Args:
        logits_TE: float32 or float64.
        k: choices per token.
        piece_T: the piece of a row each token lies in, int64, ascending.
        num_pieces: how many there are.
        implementation: ``auto``, ``triton`` (not float64) or ``plain``.

    Returns:
        Probabilities ``[T, E]`` and weights ``[T, K]`` in the dtype of the logits, both differentiable, the chosen
        experts ``[T, K]`` and the counts ``[P, E]``, both int64.
    """
    best = "triton" if triton_takes(logits_TE) else "plain"
    return choose("router", ROUTER_IMPLEMENTATIONS, implementation, best)(logits_TE, k, piece_T, num_pieces)


def plan_rows(experts_TK: Tensor, num_experts: int, *, implementation: str = AUTO) -> ExpertRows:
    """Which choice goes to which row, rows sorted by expert and within an expert by token; -1 goes last.

    Args:
        implementation: as of :func:`grouped_swiglu`; ``triton`` counts and ranks, the others sort.
    """
    if _movement(experts_TK, implementation) == "triton":
        from minimax_train.kernels.experts.triton import rank_rows

        return rank_rows(experts_TK, num_experts)
    return ExpertRows.sort(experts_TK, num_experts)


def permute(x_TD: Tensor, rows: ExpertRows, *, implementation: str = AUTO) -> Tensor:
    """``[T, D] -> [R, D]``, each token's row to its choices' rows; zero in rows of no expert. Differentiable."""
    if _movement(x_TD, implementation) == "triton":
        from minimax_train.kernels.experts.triton import permute_triton

        return permute_triton(x_TD, rows)
    return rows.permute(x_TD)


def combine(y_RD: Tensor, weights_TK: Tensor, rows: ExpertRows, *, implementation: str = AUTO) -> Tensor:
    """``[R, D] -> [T, D]``, the weighted sum of each token's choices; one of no expert adds nothing. Differentiable.

    Rows of no expert may hold anything. Weights may be of higher precision than y, and unless in Triton are rounded.
    """
    if _movement(y_RD, implementation) == "triton":
        from minimax_train.kernels.experts.triton import combine_triton

        return combine_triton(y_RD, weights_TK, rows)
    return (rows.unpermute(y_RD) * weights_TK[..., None].to(y_RD.dtype)).sum(1)


def add_choices(y_RD: Tensor, rows: ExpertRows, *, implementation: str = AUTO) -> Tensor:
    """``[R, D] -> [T, D]``, the sum of each token's choices: :func:`combine` without weights or gradient."""
    if _movement(y_RD, implementation) == "triton":
        from minimax_train.kernels.experts.triton import add_choices_triton

        return add_choices_triton(y_RD, rows)
    return rows.unpermute(y_RD).sum(1)


def _movement(x: Tensor, implementation: str) -> str:
    """Moving rows needs no grouped GEMM: Triton is the best choice for every dtype it takes."""
    best = "triton" if triton_takes(x) else "loop"
    choose("experts", IMPLEMENTATIONS, implementation, best)
    return {AUTO: best, "quack": "triton"}.get(implementation, implementation)


def grouped_swiglu(
    x_RD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, offsets_E: Tensor, *, implementation: str = AUTO
) -> Tensor:
    """``down_e (silu(gate_e x) * up_e x)`` for rows sorted by expert; rows past ``offsets_E[-1]`` are undefined.

    Args:
        x_RD: any floating dtype, the same as the weights'.
        gate_up_E2FD: gate over up, as in transformers' fused expert weights.
        offsets_E: end row of each expert, int32.
        implementation: ``auto``; ``quack`` (SwiGLU in the products' epilogues; bfloat16 on Hopper, F a multiple of 8,
            extra ``cuda``); ``triton`` (SwiGLU a kernel between the products; not float64); ``grouped`` (CUDA,
            bfloat16) or ``loop``, as separate ops.
    """
    run = choose("experts", IMPLEMENTATIONS, implementation, best_implementation(x_RD, down_EDF.shape[2]))
    return run(x_RD, gate_up_E2FD, down_EDF, offsets_E)


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
        ``[T, D]`` in the dtype of x; weights may be of higher precision, and unless in Triton are rounded to it.
    """
    name = best_implementation(x_TD, down_EDF.shape[2]) if implementation == AUTO else implementation
    if name in ("quack", "triton"):
        from minimax_train.kernels.experts.triton import expert_mlp_triton

        products = expert_products(x_TD, down_EDF.shape[2], name)
        return expert_mlp_triton(products, x_TD, weights_TK, experts_TK, gate_up_E2FD, down_EDF)
    rows = plan_rows(experts_TK, len(gate_up_E2FD), implementation=name)
    x_RD = permute(x_TD, rows, implementation=name)
    y_RD = grouped_swiglu(x_RD, gate_up_E2FD, down_EDF, rows.offsets_E, implementation=name)
    return combine(y_RD, weights_TK, rows, implementation=name)
