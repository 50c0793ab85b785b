"""Softmax, loss and gradient of a chunk of logits as separate PyTorch ops: any device and dtype.

Shape legend: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
TEMPORARIES = 3  # float32 tensors of [C, V] at once


def softmax_gradient_plain(logits_CV: Tensor, labels_C: Tensor, needs_gradient: bool) -> Tensor:
    """Losses ``[C]`` in float32 or float64; the logits become their gradient in place if asked to."""
    x_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    kept_C = labels_C != IGNORE_INDEX
    target_C1 = labels_C.clamp(min=0)[:, None]
    log_sum_C1 = x_CV.logsumexp(-1, keepdim=True)
    losses_C = (log_sum_C1 - x_CV.gather(1, target_C1))[:, 0].where(kept_C, 0)
    if needs_gradient:
        grad_CV = (x_CV - log_sum_C1).exp_()
        grad_CV.scatter_add_(1, target_C1, -torch.ones_like(log_sum_C1))
        logits_CV.copy_(grad_CV.mul_(kept_C[:, None]))
    return losses_C
