"""The edges of a part of the model that works on more tokens than the rest does.

Between attention, embedding and loss a rank holds only its share of the tokens; those three work on all tokens that
the ranks of its tensor-parallel group hold together, each with its share of heads or vocabulary.

Shape legend: t tokens on this rank, T tokens of the group, D hidden, W width of a projection on this rank.
"""

from __future__ import annotations

from torch import Tensor

from minimax_train.model.sharding import Linear


class TokenExchange:
    """Alone, a rank holds all tokens and all heads: nothing moves. Tensor parallelism puts its own in this place."""

    def gather(self, x_tD: Tensor) -> Tensor:
        """``[t, D] -> [T, D]``: everybody's tokens."""
        return x_tD

    def project(self, x_tD: Tensor, *projections: Linear) -> tuple[Tensor, ...]:
        """``[t, D] -> [T, W]`` of each: everybody's tokens, projected."""
        return tuple(projection(x_tD) for projection in projections)

    def scatter_sum(self, y_TD: Tensor) -> Tensor:
        """``[T, D] -> [t, D]``: this rank's tokens, summed over everybody's part of them."""
        return y_TD
