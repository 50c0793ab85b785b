"""Softmax, loss and gradient of a block of tokens' logits in one kernel: logits read twice (the second time in part
from L2) and written once, in their own memory. Two kernels where other ranks hold other parts of the vocabulary.

Shape legend: B tokens of a block, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from minimax_train.documents import IGNORE_INDEX
from minimax_train.kernels.cross_entropy import triton_kernels
from minimax_train.kernels.cross_entropy.vocabulary import VocabularyShard, shared_losses

# Logits at hand: rows by columns. Few tokens are in flight at 32 warps each, so that what they have read fits in L2.
TILE = (4, 8192)
WARPS = 32
TEMPORARIES = 0  # the kernels work in place


def softmax_gradient(
    logits_BV: Tensor, labels_B: Tensor, needs_gradient: bool, shard: VocabularyShard | None
) -> Tensor:
    """Losses ``[B]`` in float32; the logits, contiguous, become their gradient in place if asked to.

    Raises:
        ValueError: for float64.
    """
    if logits_BV.dtype == torch.float64:
        raise ValueError("kernels.loss='triton' computes in float32 and takes no float64")
    assert logits_BV.stride(1) == 1
    B, V = logits_BV.shape
    per_token = torch.empty(B, dtype=torch.float32, device=logits_BV.device)
    tile = {"V": V, "R": TILE[0], "W": min(TILE[1], triton.next_power_of_2(V)), "num_warps": WARPS}
    stride, labels_B = logits_BV.stride(0), labels_B.contiguous()
    if B == 0:
        return per_token
    if shard is None:
        triton_kernels.softmax_gradient[(B,)](
            logits_BV, labels_B, per_token, stride, IGNORE_INDEX, NEEDS_GRADIENT=needs_gradient, **tile
        )
        return per_token
    triton_kernels.log_sums[(B,)](logits_BV, per_token, stride, **tile)
    log_sum_B = shard.merge(per_token)
    losses_B, local_B = shared_losses(logits_BV, labels_B, log_sum_B, shard)
    if needs_gradient:
        triton_kernels.gradients[(B,)](logits_BV, local_B, log_sum_B, stride, IGNORE_INDEX, **tile)
    return losses_B
