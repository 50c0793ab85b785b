"""Joining softmax attention over two disjoint sets of keys.

Shape legend: Q queries, H query heads, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out_QHV: Tensor, lse_QH: Tensor, part_QHV: Tensor, part_lse_QH: Tensor) -> None:
    """Add to a running output, in place, what the same queries got from further keys.

    Output o_i over the keys of set i has weights that sum to one under exp(lse_i). Over both sets,

        lse = log(exp(lse_1) + exp(lse_2))
        o   = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2
            = o_1 + w (o_2 - o_1),   w = exp(lse_2 - lse) = sigmoid(lse_2 - lse_1)

    (the online softmax of arXiv 1805.02867, section 3.1, applied to whole blocks; arXiv 2310.01889). Neither line
    exponentiates anything positive, so nothing overflows.

    Args:
        out_QHV, lse_QH: the running result, float32 or float64; overwritten.
        part_QHV, part_lse_QH: the further result, any floating dtype.
    """
    weight_QH = torch.sigmoid(part_lse_QH - lse_QH)
    out_QHV.lerp_(part_QHV.to(out_QHV.dtype), weight_QH[..., None])
    torch.logaddexp(lse_QH, part_lse_QH, out=lse_QH)
