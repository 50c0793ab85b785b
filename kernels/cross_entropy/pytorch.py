"""Softmax, loss and gradient of a block of tokens' logits as separate PyTorch ops: any device and dtype.

Shape legend: B tokens of a block, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_train.documents import IGNORE_INDEX
from minimax_train.kernels.cross_entropy.vocabulary import VocabularyShard, shared_losses

WHOLE = VocabularyShard(0, 1, lambda log_sum_B: log_sum_B)
TEMPORARIES = 3  # float32 tensors of [B, V] at once


def softmax_gradient(
    logits_BV: Tensor, labels_B: Tensor, needs_gradient: bool, shard: VocabularyShard | None
) -> Tensor:
    """Losses ``[B]`` in float32 or float64; the logits become their gradient in place if asked to."""
    x_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    shard = shard or WHOLE
    log_sum_B = shard.merge(x_BV.logsumexp(-1))
    losses_B, local_B = shared_losses(x_BV, labels_B, log_sum_B, shard)
    if needs_gradient:
        grad_BV = (x_BV - log_sum_B[:, None]).exp_()
        is_here_B1 = (local_B >= 0)[:, None]
        grad_BV.scatter_add_(1, local_B.clamp(min=0)[:, None], -is_here_B1.to(grad_BV.dtype))
        logits_BV.copy_(grad_BV.mul_((labels_B != IGNORE_INDEX)[:, None]))
    return losses_B
