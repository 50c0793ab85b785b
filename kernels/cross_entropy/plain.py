"""Softmax, loss and gradient of a chunk of logits as separate PyTorch ops: any device and dtype.

Shape legend: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_train.documents import IGNORE_INDEX
from minimax_train.kernels.cross_entropy.vocabulary import VocabularyShard, shared_losses

WHOLE = VocabularyShard(0, 1, lambda log_sum_C: log_sum_C)
TEMPORARIES = 3  # float32 tensors of [C, V] at once


def softmax_gradient_plain(
    logits_CV: Tensor, labels_C: Tensor, needs_gradient: bool, shard: VocabularyShard | None
) -> Tensor:
    """Losses ``[C]`` in float32 or float64; the logits become their gradient in place if asked to."""
    x_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    shard = shard or WHOLE
    log_sum_C = shard.merge(x_CV.logsumexp(-1))
    losses_C, local_C = shared_losses(x_CV, labels_C, log_sum_C, shard)
    if needs_gradient:
        grad_CV = (x_CV - log_sum_C[:, None]).exp_()
        is_here_C1 = (local_C >= 0)[:, None]
        grad_CV.scatter_add_(1, local_C.clamp(min=0)[:, None], -is_here_C1.to(grad_CV.dtype))
        logits_CV.copy_(grad_CV.mul_((labels_C != IGNORE_INDEX)[:, None]))
    return losses_C
