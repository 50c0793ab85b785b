"""Output projection and cross-entropy in one op that never holds all logits.

Shape legend: T tokens, D hidden, V vocabulary, C tokens per chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
CHUNK = 2048


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T):
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        loss = x_TD.new_zeros((), dtype=dtype)
        # The gradient is linear in the loss, so it is made here, chunk by chunk, while the logits exist.
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x_TD = torch.empty_like(x_TD) if needs_x else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None
        for start in range(0, len(x_TD), CHUNK):
            rows = slice(start, start + CHUNK)
            x_CD, labels_C = x_TD[rows], labels_T[rows]
            logits_CV = (x_CD @ weight_VD.T).to(dtype)
            loss += F.cross_entropy(logits_CV, labels_C, ignore_index=IGNORE_INDEX, reduction="sum")
            if not (needs_x or needs_weight):
                continue
            kept_C1 = (labels_C != IGNORE_INDEX)[:, None]
            grad_CV = logits_CV.softmax(-1)
            grad_CV.scatter_add_(1, labels_C.clamp(min=0)[:, None], -kept_C1.to(dtype))
            grad_CV = grad_CV.mul_(kept_C1).to(x_TD.dtype)
            if needs_x:
                grad_x_TD[rows] = grad_CV @ weight_VD
            if needs_weight:
                grad_weight_VD += grad_CV.T @ x_CD
        ctx.save_for_backward(grad_x_TD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_x_TD, grad_weight_VD = ctx.saved_tensors
        if grad_x_TD is not None:
            grad_x_TD = (grad_x_TD * grad_loss).to(grad_x_TD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad_loss).to(ctx.weight_dtype)
        return grad_x_TD, grad_weight_VD, None


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """``sum over t of -log softmax(weight @ x_t)[label_t]``, tokens labelled -100 left out.

    Args:
        x_TD, weight_VD: any floating dtype, the same for both.
        labels_T: int64, in ``[0, V)`` or ``IGNORE_INDEX``.

    Returns:
        The summed loss in nats, a float32 scalar (float64 for float64 inputs).
    """
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T)
