"""Output projection and cross-entropy in one op that never holds all logits.

The gradient is linear in the loss, so it is made in the forward pass, chunk by chunk, while the logits exist; the
backward pass only scales it. Memory beyond the inputs and their gradients is held under ``BUDGET``, whatever the
number of tokens: one chunk of logits, which turns into its own gradient in place, and, where it takes no more than
half of that, a float32 sum for the gradient of a 16-bit weight. Where it would take more (beyond D = 1,174 at a
vocabulary of 200,064) the sum is kept in the weight's dtype: each chunk's product is summed in float32 and rounded
once. ``docs/kernels.md`` has the error of that.

Shape legend: T tokens, D hidden, V vocabulary, C tokens per chunk.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.cross_entropy.plain import TEMPORARIES, softmax_gradient_plain
from minimax_train.kernels.cross_entropy.vocabulary import VocabularyShard
from minimax_train.kernels.dispatch import AUTO, choose, triton_takes

__all__ = ["BUDGET", "IMPLEMENTATIONS", "VocabularyShard", "choose_chunks", "linear_cross_entropy"]

BUDGET = 1792 * 2**20  # bytes
# Tokens: a processor without kernels of its own is better off in its caches than near the budget.
PLAIN_CHUNK = 2048
# Elements of a float32 temporary while gradients are scaled, or summed where no product can add itself.
SLICE = 2**24


def _triton(*args) -> Tensor:
    # CPU installs have no triton: imported only when asked for.
    from minimax_train.kernels.cross_entropy.triton import softmax_gradient_triton

    return softmax_gradient_triton(*args)


IMPLEMENTATIONS = {"triton": _triton, "plain": softmax_gradient_plain}


def choose_chunks(T: int, D: int, V: int, *, itemsize: int, temporaries: int) -> tuple[int, bool]:
    """Tokens per chunk, and whether a float32 sum of the weight's gradient fits beside it.

    Args:
        itemsize: bytes of a logit.
        temporaries: float32 numbers per logit beside it; 0 for kernels that work in place.
    """
    per_token = V * (itemsize + 4 * temporaries)
    sum_bytes = 4 * V * D if itemsize < 4 else 0
    wide_sum = 0 < sum_bytes <= BUDGET // 2 and BUDGET // per_token < T
    chunk = (BUDGET - wide_sum * sum_bytes) // per_token
    if temporaries:
        chunk = min(chunk, PLAIN_CHUNK)
    if chunk >= T:
        return max(1, T), False  # one product, one rounding
    return max(1, chunk // 256 * 256 or chunk), wide_sum


@cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds the product of 16-bit matrices to a float32 one: on CUDA, and not in every version."""
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _add_product(total_VD: Tensor, grad_CV: Tensor, x_CD: Tensor, *, first: bool) -> None:
    """``total += grad^T x``, summed in float32 at least and rounded once to the dtype of the total."""
    if total_VD.dtype == x_CD.dtype:
        if first:
            torch.mm(grad_CV.T, x_CD, out=total_VD)
        else:
            total_VD.addmm_(grad_CV.T, x_CD)
    elif _adds_to_float32(x_CD.device, x_CD.dtype):
        torch.addmm(total_VD, grad_CV.T, x_CD, beta=0 if first else 1, out_dtype=torch.float32, out=total_VD)
    else:
        step = max(1, SLICE // max(total_VD.shape[1], len(x_CD)))
        x_CD = x_CD.to(total_VD.dtype)
        for total_vD, grad_Cv in zip(total_VD.split(step), grad_CV.split(step, dim=1), strict=True):
            if first:
                total_vD.zero_()
            total_vD.addmm_(grad_Cv.T.to(total_VD.dtype), x_CD)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * factor`` in ``dtype``, in place if that is x's own; the product is made in float32 at least.

    In slices: in one op, PyTorch's CUDA kernel rounds the factor to the dtype of x.
    """
    out = x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device=x.device)
    step = max(1, SLICE // max(1, x.shape[1]))
    for from_rows, to_rows in zip(x.split(step), out.split(step), strict=True):
        to_rows.copy_(from_rows.to(factor.dtype) * factor)
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T, softmax_gradient, temporaries, shard):
        (T, D), V = x_TD.shape, len(weight_VD)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        chunk, wide_sum = choose_chunks(T, D, V, itemsize=x_TD.element_size(), temporaries=temporaries)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        grad_x_TD = torch.empty_like(x_TD) if needs_x else None
        grad_weight_VD = None
        if needs_weight:
            kind = dtype if wide_sum else weight_VD.dtype
            grad_weight_VD = torch.empty(V, D, dtype=kind, device=x_TD.device)
            if T == 0:
                grad_weight_VD.zero_()
        logits_CV = torch.empty(min(chunk, T), V, dtype=x_TD.dtype, device=x_TD.device)
        losses = []
        for start in range(0, T, chunk):
            rows = slice(start, start + chunk)
            x_CD = x_TD[rows]
            grad_CV = logits_CV[: len(x_CD)]
            torch.mm(x_CD, weight_VD.T, out=grad_CV)
            losses.append(softmax_gradient(grad_CV, labels_T[rows], needs_x or needs_weight, shard))
            if needs_x:
                torch.mm(grad_CV, weight_VD, out=grad_x_TD[rows])
            if needs_weight:
                _add_product(grad_weight_VD, grad_CV, x_CD, first=start == 0)
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.dtypes = x_TD.dtype, weight_VD.dtype
        return torch.cat(losses).sum() if losses else x_TD.new_zeros((), dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        # In place: a second backward pass through the same graph is refused by autograd, which sees the change.
        gradients = [
            None if gradient is None else _scaled(gradient, grad_loss, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    shard: VocabularyShard | None = None,
    implementation: str = AUTO,
) -> Tensor:
    """``sum over t of -log softmax(weight @ x_t)[label_t]``, tokens labelled -100 left out.

    Args:
        x_TD, weight_VD: any floating dtype, the same for both; logits are rounded to it.
        labels_T: int64, in ``[0, V)`` or ``IGNORE_INDEX``.
        shard: which part of the vocabulary ``weight`` is, where several ranks hold parts; labels are of the whole.
        implementation: of the softmax: ``auto``, ``triton`` (not float64) or ``plain``.

    Returns:
        The summed loss in nats, a float32 scalar (float64 for float64 inputs). With a shard this rank's part of it:
        the sum over ranks is the loss, and the gradient of x is this rank's part of the gradient of that sum.
    """
    name = implementation
    if name == AUTO:
        name = "triton" if triton_takes(x_TD) else "plain"
    softmax_gradient = choose("loss", IMPLEMENTATIONS, name, name)
    temporaries = TEMPORARIES * (2 if x_TD.dtype == torch.float64 else 1) if name == "plain" else 0
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, softmax_gradient, temporaries, shard)
