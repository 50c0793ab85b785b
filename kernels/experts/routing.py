"""Router arithmetic: probabilities, choices, load and capacity.

Shape legend: T tokens, E experts, K choices per token, P pieces of rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits_plain(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Operands cast to float32 (float64 stays), any device."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return F.linear(x_TD.to(dtype), weight_ED.to(dtype)), x_TD


def route_plain(logits_TE: Tensor, k: int, piece_T: Tensor, num_pieces: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Any device and dtype."""
    probabilities_TE, weights_TK, experts_TK = top_k_routing(logits_TE, k)
    counts_PE = count_choices(experts_TK, logits_TE.shape[1], piece_T, num_pieces)
    return probabilities_TE, weights_TK, experts_TK, counts_PE


def top_k_routing(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over experts, the k largest, renormalised over the k.

    Returns:
        Router probabilities ``[T, E]`` and weights of the choices ``[T, K]``, both in the dtype of the logits, and
        the chosen experts ``[T, K]``, int64, most probable first.
    """
    probabilities_TE = logits_TE.softmax(-1)
    weights_TK, experts_TK = probabilities_TE.topk(k, dim=-1)
    return probabilities_TE, weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK


def count_choices(experts_TK: Tensor, num_experts: int, piece_T: Tensor, num_pieces: int) -> Tensor:
    """How often each expert was chosen within each piece of the tokens, int64 ``[P, E]``; -1 is not counted.

    Args:
        experts_TK: the choices, int64.
        piece_T: the piece each token lies in, int64.
    """
    slot_TK = piece_T[:, None] * (num_experts + 1) + experts_TK % (num_experts + 1)
    counts = torch.zeros(num_pieces * (num_experts + 1), dtype=torch.int64, device=experts_TK.device)
    counts.scatter_add_(0, slot_TK.flatten(), torch.ones_like(slot_TK).flatten())
    return counts.view(num_pieces, num_experts + 1)[:, :num_experts]


def drop_over_capacity(experts_TK: Tensor, piece_T: Tensor, load_PE: Tensor, taken_PE: Tensor, capacity: int) -> Tensor:
    """Choices with those over capacity replaced by -1: each expert keeps the first ``capacity`` choices of each row.

    First in token order, so whether a token is dropped depends on no later token.

    Args:
        experts_TK: the choices, int64.
        piece_T: the piece of a row each token lies in, int64, ascending.
        load_PE: choices of each expert in each piece, as :func:`count_choices` gives them.
        taken_PE: choices of each expert in the same row before the piece.
        capacity: choices an expert takes of a row.
    """
    choice_TKE = torch.nn.functional.one_hot(experts_TK, load_PE.shape[1])
    counted_TKE = choice_TKE.flatten(0, 1).cumsum(0).view_as(choice_TKE)
    # Counted from the first token here; the row's count is ahead of it by what came earlier on other ranks, less what
    # other pieces here came before.
    ahead_PE = taken_PE - (load_PE.cumsum(0) - load_PE)
    rank_TK = ((counted_TKE + ahead_PE[piece_T][:, None]) * choice_TKE).sum(-1)
    return experts_TK.masked_fill(rank_TK > capacity, -1)


def load_balancing_loss(probabilities_TE: Tensor, piece_T: Tensor, fraction_PE: Tensor, row_length: int) -> Tensor:
    """These tokens' part of ``sum over rows of 1 / E * sum_i f_i m_i``, a scalar in the dtype of the probabilities.

    f_i is the number of choices of expert i per token (they sum to k), m_i its mean router probability (MiniMax-01,
    section 2.1, after GShard). With f taken per row it does not depend on how rows are dealt to ranks and
    micro-batches, and transformers' ``load_balancing_loss_func`` is E^2 times this for one row and one layer.

    Args:
        probabilities_TE: the router's.
        piece_T: the piece each token lies in, int64.
        fraction_PE: f, over the tokens that each piece is counted with, in the dtype of the probabilities.
        row_length: tokens of a row.
    """
    return (probabilities_TE * fraction_PE[piece_T]).sum() / (row_length * probabilities_TE.shape[1])
