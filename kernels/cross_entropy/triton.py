"""Softmax, loss and gradient of a chunk of logits in one kernel: logits read twice (the second time in part from L2)
and written once, in their own memory.

Shape legend: C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from minimax_train.kernels.cross_entropy import triton_kernels
from minimax_train.kernels.cross_entropy.plain import IGNORE_INDEX

# Logits at hand: rows by columns. Few tokens are in flight at 32 warps each, so that what they have read fits in L2.
TILE = (4, 8192)
WARPS = 32


def softmax_gradient_triton(logits_CV: Tensor, labels_C: Tensor, needs_gradient: bool) -> Tensor:
    """Losses ``[C]`` in float32; the logits, contiguous, become their gradient in place if asked to.

    Raises:
        ValueError: for float64.
    """
    if logits_CV.dtype == torch.float64:
        raise ValueError("kernels.loss='triton' computes in float32 and takes no float64")
    assert logits_CV.stride(1) == 1
    C, V = logits_CV.shape
    losses_C = torch.empty(C, dtype=torch.float32, device=logits_CV.device)
    columns = min(TILE[1], triton.next_power_of_2(V))
    if C:
        triton_kernels.softmax_gradient[(C,)](
            logits_CV, labels_C.contiguous(), losses_C, logits_CV.stride(0), IGNORE_INDEX,
            V=V, W=TILE[0], B=columns, NEEDS_GRADIENT=needs_gradient, num_warps=WARPS,
        )  # fmt: skip
    return losses_C
