"""Output projection and cross-entropy in one op that never holds all logits.

The gradient is linear in the loss, so it is made in the forward pass, one block of tokens after the other, while their
logits exist; the backward pass only scales it. Memory beyond the inputs and their gradients is held under ``BUDGET``,
whatever the number of tokens: the logits of one block, which turn into their own gradient in place, and, where it takes
no more than half of that, a float32 sum for the gradient of a 16-bit weight. Where it would take more (beyond D = 1,174
at a vocabulary of 200,064) the sum is kept in the weight's dtype: each block's GEMM sums in float32 and rounds once.
``docs/kernels.md`` has the error of that.

Shape legend: T tokens, D hidden, V vocabulary, B tokens of a block.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.cross_entropy import pytorch
from minimax_train.kernels.cross_entropy.vocabulary import VocabularyShard
from minimax_train.kernels.dispatch import AUTO, OnDemand, choose, triton_or_torch

__all__ = ["BUDGET", "IMPLEMENTATIONS", "VocabularyShard", "choose_block", "linear_cross_entropy"]

BUDGET = 1792 * 2**20  # bytes
# Tokens: PyTorch ops on a CPU are faster within its caches than near the budget.
TORCH_BLOCK = 2048
# Elements of a float32 temporary while gradients are scaled, or summed where no GEMM adds to float32.
SLICE = 2**24


@OnDemand
def _triton():
    from minimax_train.kernels.cross_entropy import triton

    return triton


IMPLEMENTATIONS = {"triton": _triton, "torch": pytorch}


def choose_block(T: int, D: int, V: int, *, itemsize: int, temporaries: int) -> tuple[int, bool]:
    """Tokens per block, and whether a float32 sum of the weight's gradient fits beside it.

    Args:
        itemsize: bytes of a logit.
        temporaries: float32 numbers per logit beside it; 0 for kernels that work in place.
    """
    per_token = V * (itemsize + 4 * temporaries)
    sum_bytes = 4 * V * D if itemsize < 4 else 0
    wide_sum = 0 < sum_bytes <= BUDGET // 2 and BUDGET // per_token < T
    block = (BUDGET - wide_sum * sum_bytes) // per_token
    if temporaries:
        block = min(block, TORCH_BLOCK)
    if block >= T:
        return max(1, T), False  # one GEMM, one rounding
    return max(1, block // 256 * 256 or block), wide_sum


@cache
def _gemm_adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch's GEMM of 16-bit matrices adds to a float32 one: on CUDA, and not in every version."""
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _add_gemm(total_VD: Tensor, grad_BV: Tensor, x_BD: Tensor, *, first: bool) -> None:
    """``total += grad^T x``, summed in float32 at least and rounded once to the dtype of the total."""
    if total_VD.dtype == x_BD.dtype:
        if first:
            torch.mm(grad_BV.T, x_BD, out=total_VD)
        else:
            total_VD.addmm_(grad_BV.T, x_BD)
    elif _gemm_adds_to_float32(x_BD.device, x_BD.dtype):
        torch.addmm(total_VD, grad_BV.T, x_BD, beta=0 if first else 1, out_dtype=torch.float32, out=total_VD)
    else:
        step = max(1, SLICE // max(total_VD.shape[1], len(x_BD)))
        x_BD = x_BD.to(total_VD.dtype)
        for total_vD, grad_Bv in zip(total_VD.split(step), grad_BV.split(step, dim=1), strict=True):
            if first:
                total_vD.zero_()
            total_vD.addmm_(grad_Bv.T.to(total_VD.dtype), x_BD)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * factor`` in ``dtype``, in place if that is x's own; multiplied in float32 at least.

    In slices: in one op, PyTorch's CUDA kernel rounds the factor to the dtype of x.
    """
    out = x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
    step = max(1, SLICE // max(1, x.shape[1]))
    for from_rows, to_rows in zip(x.split(step), out.split(step), strict=True):
        to_rows.copy_(from_rows.to(factor.dtype) * factor)
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T, softmax, shard):
        (T, D), V = x_TD.shape, len(weight_VD)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        temporaries = softmax.TEMPORARIES * dtype.itemsize // 4
        block, wide_sum = choose_block(T, D, V, itemsize=x_TD.element_size(), temporaries=temporaries)
        grad_x_TD = torch.empty_like(x_TD) if needs_x else None
        make, kind = torch.empty if T else torch.zeros, dtype if wide_sum else weight_VD.dtype
        grad_weight_VD = make(V, D, dtype=kind, device=x_TD.device) if needs_weight else None
        logits_BV = torch.empty(min(block, T), V, dtype=x_TD.dtype, device=x_TD.device)
        losses = []
        for start in range(0, T, block):
            tokens = slice(start, start + block)
            x_BD = x_TD[tokens]
            grad_BV = logits_BV[: len(x_BD)]
            torch.mm(x_BD, weight_VD.T, out=grad_BV)
            losses.append(softmax.softmax_gradient(grad_BV, labels_T[tokens], needs_x or needs_weight, shard))
            if grad_x_TD is not None:
                torch.mm(grad_BV, weight_VD, out=grad_x_TD[tokens])
            if grad_weight_VD is not None:
                _add_gemm(grad_weight_VD, grad_BV, x_BD, first=start == 0)
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.dtypes = x_TD.dtype, weight_VD.dtype
        losses_T = torch.cat(losses) if losses else x_TD.new_zeros(0, dtype=dtype)
        ctx.mark_non_differentiable(losses_T)
        ctx.set_materialize_grads(False)
        return losses_T.sum(), losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        # In place: a second backward pass through the same graph is refused by autograd, which sees the change.
        gradients = [
            None if gradient is None else _scaled(gradient, grad_loss, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    shard: VocabularyShard | None = None,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """``sum over t of -log softmax(weight @ x_t)[label_t]``, tokens labelled -100 left out.

    Args:
        x_TD, weight_VD: any floating dtype, the same for both; logits are rounded to it.
        labels_T: int64, in ``[0, V)`` or ``IGNORE_INDEX``.
        shard: which part of the vocabulary ``weight`` is, where several ranks hold parts; labels are of the whole.
        implementation: of the softmax: ``auto``, ``triton`` (not float64) or ``torch``.

    Returns:
        The summed loss in nats, a float32 scalar (float64 for float64 inputs), and its summands ``[T]``, which have no
        gradient: 0 where there is no label. With a shard this rank's part of both: the sum over ranks is the loss, and
        the gradient of x is this rank's part of the gradient of that sum.
    """
    softmax = choose("loss", IMPLEMENTATIONS, implementation, triton_or_torch(x_TD))
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, softmax, shard)
