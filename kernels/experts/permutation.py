"""Tokens to rows sorted by expert, and back. Both directions are gathers, so the result is deterministic.

Shape legend: T tokens, K choices per token, R = T * K rows, D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """Which choice sits in which row once rows are sorted by expert, and within an expert by token.

    Choices of no expert (-1) come last, past ``offsets_E[-1]``; they hold zeros and give zeros.

    Attributes:
        choice_R: index into the flattened ``[T, K]`` choices, int64.
        row_TK: the row of each choice, int64; the inverse of ``choice_R``.
        offsets_E: end row of each expert, int32, the form grouped GEMMs take.
    """

    choice_R: Tensor
    row_TK: Tensor
    offsets_E: Tensor

    @cached_property
    def used_R1(self) -> Tensor:
        """Whether the row belongs to an expert, bool."""
        return torch.arange(len(self.choice_R), device=self.choice_R.device)[:, None] < self.offsets_E[-1]

    @classmethod
    def sort(cls, experts_TK: Tensor, num_experts: int) -> ExpertRows:
        expert_R = experts_TK.flatten() % (num_experts + 1)
        sorted_R, choice_R = expert_R.sort(stable=True)
        slots_R = torch.arange(len(choice_R), device=choice_R.device)
        row_TK = torch.empty_like(choice_R).scatter_(0, choice_R, slots_R).view_as(experts_TK)
        experts_E = torch.arange(num_experts, device=choice_R.device)
        offsets_E = torch.searchsorted(sorted_R, experts_E, right=True).int()
        return cls(choice_R, row_TK, offsets_E)

    def permute(self, x_TD: Tensor) -> Tensor:
        """``[T, D] -> [R, D]``."""
        return _Permute.apply(x_TD, self)

    def unpermute(self, x_RD: Tensor) -> Tensor:
        """``[R, D] -> [T, K, D]``, zero where the choice was of no expert."""
        return _Unpermute.apply(x_RD, self)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, rows):
        ctx.rows = rows
        return x_TD[rows.choice_R // rows.row_TK.shape[1]].where(rows.used_R1, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RD):
        return grad_RD.where(ctx.rows.used_R1, 0)[ctx.rows.row_TK].sum(1), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, rows):
        ctx.rows = rows
        return x_RD.where(rows.used_R1, 0)[rows.row_TK]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TKD):
        return grad_TKD.flatten(0, 1)[ctx.rows.choice_R].where(ctx.rows.used_R1, 0), None
