"""Router arithmetic: probabilities, choices, load and capacity.

Shape legend: T tokens, E experts, K choices per token, B rows of the micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_routing(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over experts, the k largest, renormalised over the k.

    Returns:
        Router probabilities ``[T, E]`` and weights of the choices ``[T, K]``, both in the dtype of the logits, and
        the chosen experts ``[T, K]``, int64, most probable first.
    """
    probabilities_TE = logits_TE.softmax(-1)
    weights_TK, experts_TK = probabilities_TE.topk(k, dim=-1)
    return probabilities_TE, weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK


def count_choices(experts_TK: Tensor, num_experts: int, rows: int) -> Tensor:
    """How often each expert was chosen within each row, int64 ``[B, E]``; choices of -1 are not counted."""
    experts_BC = experts_TK.reshape(rows, -1)
    counts_BE = torch.zeros(rows, num_experts + 1, dtype=torch.int64, device=experts_TK.device)
    counts_BE.scatter_add_(1, experts_BC % (num_experts + 1), torch.ones_like(experts_BC))
    return counts_BE[:, :num_experts]


def drop_over_capacity(experts_TK: Tensor, num_experts: int, rows: int, capacity: int) -> Tensor:
    """Choices with those over capacity replaced by -1: each expert keeps the first ``capacity`` choices of each row.

    First in token order, so whether a token is dropped depends on no later token.
    """
    choice_BCE = torch.nn.functional.one_hot(experts_TK.reshape(rows, -1), num_experts)
    rank_BC = (choice_BCE.cumsum(1) * choice_BCE).sum(-1)
    return experts_TK.masked_fill((rank_BC > capacity).view_as(experts_TK), -1)


def load_balancing_loss(probabilities_TE: Tensor, counts_BE: Tensor) -> Tensor:
    """``sum over rows of 1 / E * sum_i f_i m_i``, a scalar in the dtype of the probabilities.

    f_i is the number of choices of expert i per token of the row (they sum to k), m_i its mean router probability
    (MiniMax-01, section 2.1, after GShard). Taken per row, so that it does not depend on how rows are dealt to ranks
    and micro-batches. Transformers' ``load_balancing_loss_func`` is E^2 times this for one row and one layer.
    """
    rows, num_experts = counts_BE.shape
    probabilities_BSE = probabilities_TE.view(rows, -1, num_experts)
    fraction_BE = counts_BE.to(probabilities_TE.dtype) / probabilities_BSE.shape[1]
    return (fraction_BE * probabilities_BSE.mean(1)).sum() / num_experts
