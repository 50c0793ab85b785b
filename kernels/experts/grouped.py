"""Grouped matrix products: each expert's rows times that expert's weight, and the gradient of the weights.

Shape legend: R rows sorted by expert, E experts, M, N columns.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class GroupedGemm(NamedTuple):
    """The two products of an expert layer. Rows past ``offsets_E[-1]`` are not read; in outputs they are undefined.

    Attributes:
        rows: ``(a_RM, weight_EMN, offsets_E) -> [R, N]``, the weight possibly a transposed view.
        weights: ``(a_RM, b_RN, offsets_E) -> [E, M, N]``, the sum over each expert's rows of ``a^T b``.
    """

    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    weights: Callable[[Tensor, Tensor, Tensor], Tensor]


def _loop_rows(a_RM: Tensor, weight_EMN: Tensor, offsets_E: Tensor) -> Tensor:
    out_RN = torch.empty(len(a_RM), weight_EMN.shape[-1], dtype=a_RM.dtype, device=a_RM.device)
    for (start, end), weight_MN in zip(pairwise([0, *offsets_E.tolist()]), weight_EMN.unbind(0), strict=True):
        torch.mm(a_RM[start:end], weight_MN, out=out_RN[start:end])
    return out_RN


def _loop_weights(a_RM: Tensor, b_RN: Tensor, offsets_E: Tensor) -> Tensor:
    return torch.stack([a_RM[start:end].T @ b_RN[start:end] for start, end in pairwise([0, *offsets_E.tolist()])])


def _torch_rows(a_RM: Tensor, weight_EMN: Tensor, offsets_E: Tensor) -> Tensor:
    return torch._grouped_mm(a_RM, weight_EMN, offs=offsets_E)


def _torch_weights(a_RM: Tensor, b_RN: Tensor, offsets_E: Tensor) -> Tensor:
    return torch._grouped_mm(a_RM.T, b_RN, offs=offsets_E)


# One product per expert; any device and dtype. On a GPU it waits for the offsets to reach the host.
LOOP = GroupedGemm(_loop_rows, _loop_weights)
# PyTorch's grouped GEMM: CUDA, bfloat16, rows of a multiple of 16 bytes.
TORCH = GroupedGemm(_torch_rows, _torch_weights)


def choose_gemm(x: Tensor) -> GroupedGemm:
    """The one that runs on this device and dtype without waiting for the host, if there is one."""
    return TORCH if x.is_cuda and x.dtype == torch.bfloat16 else LOOP


def grouped_linear_loop(x_RD: Tensor, weight_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """One product per expert, differentiable; rows past the last offset are zero."""
    ends = offsets_E.tolist()
    parts = [
        x_RD[start:end] @ weight_FD.T
        for start, end, weight_FD in zip([0, *ends], ends, weight_EFD.unbind(0), strict=False)
    ]
    return torch.cat([*parts, x_RD.new_zeros(len(x_RD) - ends[-1], weight_EFD.shape[1])])


def grouped_linear_torch(x_RD: Tensor, weight_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """PyTorch's grouped GEMM, differentiable: CUDA, bfloat16; rows past the last offset are left unwritten."""
    return torch._grouped_mm(x_RD, weight_EFD.transpose(-1, -2), offs=offsets_E)
