"""Routed tokens: a token once for each of its assignments, sorted by expert; and back.

Shape legend: T tokens, K assignments per token, R = T * K routed tokens, D hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Permutation:
    """Between assignments and routed tokens, which are sorted by expert and within an expert by token.

    Assignments of no expert (-1) come last, past ``offsets_E[-1]``: permuted tokens are zero there, and what is
    unpermuted may hold anything.

    Where it is known that many have none, fewer routed tokens are kept than there are assignments: R < T * K.

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
    def by_expert(cls, experts_TK: Tensor, num_experts: int, ops: Any, size: int | None = None) -> Permutation:
        """
        Args:
            size: R, no less than assignments have an expert; if None, as many as there are assignments.
        """
        assignment_R, routed_TK, offsets_E = ops.sort_by_expert(experts_TK, num_experts)
        return cls(assignment_R[:size], routed_TK, offsets_E, ops)

    def permute(self, x_TD: Tensor) -> Tensor:
        """``[T, D] -> [R, D]``."""
        return self.ops.permute(x_TD, self.assignment_R, self.routed_TK, self.offsets_E)

    def permute_weights(self, weights_TK: Tensor) -> Tensor:
        """``[T, K] -> [R]``."""
        return weights_TK.flatten()[self.assignment_R]

    def unpermute(
        self, y_RD: Tensor, weights_R: Tensor | None = None, tokens: slice = ALL, out_TD: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """``[R, D] -> [T, D]``, the sum of each token's assignments; and ``[R] -> [T, K]`` if there are weights.

        Args:
            tokens: of these alone.
            out_TD: where to write the first.
        """
        routed_TK = self.routed_TK[tokens]
        y_TD = self.ops.unpermute(y_RD, routed_TK, self.offsets_E, out_TD)
        if weights_R is None:
            return (y_TD,)
        places_TK = routed_TK.clamp(max=len(weights_R) - 1)
        return y_TD, weights_R[places_TK].where(routed_TK < self.offsets_E[-1], 0)
