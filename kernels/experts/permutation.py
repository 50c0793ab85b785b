"""Routed tokens: a token once for each of its assignments, sorted by expert; and back.

Shape legend: T tokens, K assignments per token, R = T * K routed tokens, D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Permutation:
    """Between assignments and routed tokens, which are sorted by expert and within an expert by token.

    Assignments of no expert (-1) come last, past ``offsets_E[-1]``: permuted tokens are zero there, and what is
    unpermuted may hold anything.

    Attributes:
        assignment_R: the assignment (``token * K + k``) of each routed token, int64.
        routed_TK: the routed token of each assignment, int64; the inverse of ``assignment_R``.
        offsets_E: end of each expert's routed tokens, int32, the form grouped GEMMs take.
        ops: the module whose ops do it: ``pytorch`` or ``triton``.
    """

    assignment_R: Tensor
    routed_TK: Tensor
    offsets_E: Tensor
    ops: Any

    @classmethod
    def by_expert(cls, experts_TK: Tensor, num_experts: int, ops: Any) -> Permutation:
        return cls(*ops.sort_by_expert(experts_TK, num_experts), ops=ops)

    def permute(self, x_TD: Tensor) -> Tensor:
        """``[T, D] -> [R, D]``."""
        return self.ops.permute(x_TD, self.assignment_R, self.routed_TK, self.offsets_E)

    def permute_weights(self, weights_TK: Tensor) -> Tensor:
        """``[T, K] -> [R]``."""
        return weights_TK.flatten()[self.assignment_R]

    def unpermute(
        self, y_RD: Tensor, weights_R: Tensor | None = None, x_TD: Tensor | None = None, scale: float = 0.0
    ) -> tuple[Tensor, ...]:
        """``[R, D] -> [T, D]``, the sum of each token's assignments, and ``scale * x``; and ``[R] -> [T, K]`` if there
        are weights."""
        x_TD = x_TD if scale else None
        y_TD, weights_TK = self.ops.unpermute(y_RD, weights_R, self.routed_TK, self.offsets_E, x_TD, scale)
        return (y_TD,) if weights_TK is None else (y_TD, weights_TK)
