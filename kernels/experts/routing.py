"""The router: logits, probabilities, assignments of tokens to experts, capacity and the load-balancing loss.

Shape legend: T tokens, D hidden, E experts, K assignments per token, P pieces of packed sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, choose, triton_takes


def router_logits(x_TD: Tensor, weight_ED: Tensor, *, implementation: str = AUTO) -> tuple[Tensor, Tensor]:
    """``weight @ x_t`` in float32 (float64 for float64), and x for those that use it next.

    Whoever uses the x returned here, rather than the one given, has its gradient added to the router's inside the
    router's own GEMM.

    Args:
        implementation: ``auto``, ``triton`` (bfloat16 operands without casts; other dtypes as torch) or ``torch``.
    """
    best = "triton" if triton_takes(x_TD) else "torch"
    return choose("router", LOGITS, implementation, best)(x_TD, weight_ED)


def _logits_torch(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return F.linear(x_TD.to(dtype), weight_ED.to(dtype)), x_TD


def _logits_triton(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    if not x_TD.dtype == weight_ED.dtype == torch.bfloat16:
        return _logits_torch(x_TD, weight_ED)
    from minimax_train.kernels.experts.triton import router_logits_triton  # CPU installs have no triton

    return router_logits_triton(x_TD, weight_ED)


def route(
    logits_TE: Tensor, k: int, piece_T: Tensor, num_pieces: int, *, implementation: str = AUTO
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over experts, the k largest renormalised, and how many tokens each expert was assigned.

    Args:
        logits_TE: float32 or float64.
        k: assignments per token.
        piece_T: the piece of a packed sequence each token lies in, int64, ascending.
        num_pieces: how many there are.
        implementation: ``auto``, ``triton`` (not float64) or ``torch``.

    Returns:
        Probabilities ``[T, E]`` and weights ``[T, K]`` in the dtype of the logits, both differentiable; the assigned
        experts ``[T, K]``, most probable first, and the tokens per expert ``[P, E]``, both int64.
    """
    best = "triton" if triton_takes(logits_TE) else "torch"
    return choose("router", ROUTER_IMPLEMENTATIONS, implementation, best)(logits_TE, k, piece_T, num_pieces)


def _route_torch(logits_TE: Tensor, k: int, piece_T: Tensor, num_pieces: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probabilities_TE = logits_TE.softmax(-1)
    weights_TK, experts_TK = probabilities_TE.topk(k, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    E = logits_TE.shape[1]
    tokens_per_expert_PE = torch.zeros(num_pieces, E, dtype=torch.int64, device=logits_TE.device)
    slot_TK = piece_T[:, None] * E + experts_TK
    tokens_per_expert_PE.view(-1).scatter_add_(0, slot_TK.flatten(), torch.ones_like(slot_TK).flatten())
    return probabilities_TE, weights_TK, experts_TK, tokens_per_expert_PE


def _route_triton(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from minimax_train.kernels.experts.triton import route_triton  # CPU installs have no triton

    return route_triton(*args)


LOGITS = {"triton": _logits_triton, "torch": _logits_torch}
ROUTER_IMPLEMENTATIONS = {"triton": _route_triton, "torch": _route_torch}


def drop_over_capacity(
    experts_TK: Tensor, piece_T: Tensor, tokens_per_expert_PE: Tensor, taken_PE: Tensor, capacity: int
) -> Tensor:
    """Assignments with those over capacity replaced by -1: of each sequence an expert keeps the first ``capacity``.

    First in token order, so whether a token is dropped depends on no later token.

    Args:
        experts_TK: the assignments, int64.
        piece_T: the piece of a packed sequence each token lies in, int64, ascending.
        tokens_per_expert_PE: in each piece, as :func:`route` gives them.
        taken_PE: assignments to each expert in the same sequence before the piece.
        capacity: assignments an expert takes of a sequence.
    """
    assigned_TKE = F.one_hot(experts_TK, tokens_per_expert_PE.shape[1])
    counted_TKE = assigned_TKE.flatten(0, 1).cumsum(0).view_as(assigned_TKE)
    # Counted from the first token here; the sequence's count is ahead of it by what came earlier on other ranks, less
    # what other pieces here came before.
    ahead_PE = taken_PE - (tokens_per_expert_PE.cumsum(0) - tokens_per_expert_PE)
    place_TK = ((counted_TKE + ahead_PE[piece_T][:, None]) * assigned_TKE).sum(-1)
    return experts_TK.masked_fill(place_TK > capacity, -1)


def load_balancing_loss(probabilities_TE: Tensor, piece_T: Tensor, fraction_PE: Tensor, sequence_length: int) -> Tensor:
    """These tokens' part of ``sum over sequences of 1 / E * sum_i f_i m_i``, in the dtype of the probabilities.

    f_i is the number of assignments to expert i per token (they sum to k), m_i its mean router probability (MiniMax-01,
    section 2.1, after GShard). With f taken per sequence it does not depend on how sequences are dealt to ranks and
    micro-batches, and transformers' ``load_balancing_loss_func`` is E^2 times this for one sequence and one layer.

    Args:
        probabilities_TE: the router's.
        piece_T: the piece of a packed sequence each token lies in, int64.
        fraction_PE: f, over the tokens that each piece is counted with, in the dtype of the probabilities.
        sequence_length: tokens of a packed sequence.
    """
    return (probabilities_TE * fraction_PE[piece_T]).sum() / (sequence_length * probabilities_TE.shape[1])
