"""Softmax, loss and gradient of a chunk of logits in one kernel: logits read twice (the second time in part from L2)
and written once, in their own memory. Two kernels where other ranks hold other parts of the vocabulary.

Shape legend: C tokens of a chunk, V vocabulary.
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


def softmax_gradient_triton(
    logits_CV: Tensor, labels_C: Tensor, needs_gradient: bool, shard: VocabularyShard | None
) -> Tensor:
    """Losses ``[C]`` in float32; the logits, contiguous, become their gradient in place if asked to.

    Raises:
        ValueError: for float64.
    """
    if logits_CV.dtype == torch.float64:
        raise ValueError("kernels.loss='triton' computes in float32 and takes no float64")
    assert logits_CV.stride(1) == 1
    C, V = logits_CV.shape
    per_token = torch.empty(C, dtype=torch.float32, device=logits_CV.device)
    tile = {"V": V, "W": TILE[0], "B": min(TILE[1], triton.next_power_of_2(V)), "num_warps": WARPS}
    stride, labels_C = logits_CV.stride(0), labels_C.contiguous()
    if C == 0:
        return per_token
    if shard is None:
        triton_kernels.softmax_gradient[(C,)](
            logits_CV, labels_C, per_token, stride, IGNORE_INDEX, NEEDS_GRADIENT=needs_gradient, **tile
        )
        return per_token
    triton_kernels.log_sums[(C,)](logits_CV, per_token, stride, **tile)
    log_sum_C = shard.merge(per_token)
    losses_C, local_C = shared_losses(logits_CV, labels_C, log_sum_C, shard)
    if needs_gradient:
        triton_kernels.gradients[(C,)](logits_CV, local_C, log_sum_C, stride, IGNORE_INDEX, **tile)
    return losses_C
