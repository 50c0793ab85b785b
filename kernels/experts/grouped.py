"""Grouped matrix products: each expert's rows times that expert's weight.

Shape legend: R rows sorted by expert, E experts, D in, F out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear_loop(x_RD: Tensor, weight_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """One product per expert; any device and dtype. On a GPU it waits for the offsets to reach the host."""
    ends = offsets_E.tolist()
    parts = [
        x_RD[start:end] @ weight_FD.T
        for start, end, weight_FD in zip([0, *ends], ends, weight_EFD.unbind(0), strict=False)
    ]
    return torch.cat([*parts, x_RD.new_zeros(len(x_RD) - ends[-1], weight_EFD.shape[1])])


def grouped_linear_torch(x_RD: Tensor, weight_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """PyTorch's grouped GEMM: CUDA, bfloat16; rows past the last offset are left unwritten."""
    return torch._grouped_mm(x_RD, weight_EFD.transpose(-1, -2), offs=offsets_E)
