"""The router: logits, probabilities, assignments of tokens to experts, capacity and the load-balancing loss.

Shape legend: T tokens, D hidden, E experts, K assignments per token, P spans of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, choose, triton_or_torch
from minimax_train.kernels.experts import pytorch
from minimax_train.kernels.experts.gemms import triton_ops

ROUTER_IMPLEMENTATIONS = {"triton": triton_ops, "torch": pytorch}


class Routing(NamedTuple):
    """Where tokens go. Of logits of NaN the weights are NaN; sums and entropy need not be.

    Attributes:
        weights_TK: the k largest probabilities of each token, renormalised, in the dtype of the logits; differentiable.
        experts_TK: the experts that they are of, most probable first, int64.
        count_PE: tokens assigned to each expert in each span, int64.
        probability_PE: the sum of each expert's probabilities in each span, as the weights; differentiable.
        entropy: of the probabilities in nats, summed over tokens, scalar; not differentiable.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    count_PE: Tensor
    probability_PE: Tensor
    entropy: Tensor


def router_logits(x_TD: Tensor, weight_ED: Tensor, *, implementation: str = AUTO) -> tuple[Tensor, Tensor]:
    """``weight @ x_t`` in float32 (float64 for float64), and x for those that use it next.

    Whoever uses the x returned here, rather than the one given, has its gradient added to the router's inside the
    router's own GEMM.

    Args:
        implementation: ``auto``, ``triton`` (bfloat16 operands without casts; other dtypes as torch) or ``torch``.
    """
    module = choose("router", ROUTER_IMPLEMENTATIONS, implementation, triton_or_torch(x_TD))
    return module.router_logits(x_TD, weight_ED)


def route(logits_TE: Tensor, k: int, span_T: Tensor, num_spans: int, *, implementation: str = AUTO) -> Routing:
    """Softmax over experts, the k largest renormalised, and sums over the tokens of each span. Sums are the same in
    every run.

    Args:
        logits_TE: float32 or float64.
        k: assignments per token.
        span_T: the span each token lies in: tokens that follow each other in a packed sequence, int64, ascending.
        num_spans: how many there are.
        implementation: ``auto``, ``triton`` (not float64) or ``torch``.
    """
    module = choose("router", ROUTER_IMPLEMENTATIONS, implementation, triton_or_torch(logits_TE))
    return Routing(*module.route(logits_TE, k, span_T, num_spans))


def drop_over_capacity(
    experts_TK: Tensor, span_T: Tensor, count_PE: Tensor, before_PE: Tensor, capacity: int
) -> Tensor:
    """Assignments with those over capacity replaced by -1: of each sequence an expert keeps the first ``capacity``.

    First in token order, so whether a token is dropped depends on no later token.

    Args:
        experts_TK: the assignments, int64.
        span_T: the span each token lies in, int64, ascending.
        count_PE: tokens per expert in each span, as :func:`route` gives them.
        before_PE: assignments to each expert in the same sequence before the span.
        capacity: assignments an expert takes of a sequence.
    """
    assigned_TKE = F.one_hot(experts_TK, count_PE.shape[1])
    counted_TKE = assigned_TKE.flatten(0, 1).cumsum(0).view_as(assigned_TKE)
    # Counted from the first token here; the sequence's count is ahead of it by what came earlier on other ranks, less
    # what other spans here came before.
    ahead_PE = before_PE - (count_PE.cumsum(0) - count_PE)
    place_TK = ((counted_TKE + ahead_PE[span_T][:, None]) * assigned_TKE).sum(-1)
    return experts_TK.masked_fill(place_TK > capacity, -1)


def load_balancing_loss(probability_PE: Tensor, fraction_PE: Tensor, sequence_length: int) -> Tensor:
    """These tokens' part of ``sum over sequences of 1 / E * sum_i f_i m_i``, in the dtype of the probabilities.

    f_i is the number of assignments to expert i per token (they sum to k), m_i its mean router probability (MiniMax-01,
    section 2.1, after GShard). With f taken per sequence it does not depend on how sequences are dealt to ranks and
    micro-batches, and transformers' ``load_balancing_loss_func`` is E^2 times this for one sequence and one layer.

    Args:
        probability_PE: the sum of the router's over each span.
        fraction_PE: f, over the tokens that each span is counted with, in the dtype of the probabilities.
        sequence_length: tokens of a packed sequence.
    """
    return (probability_PE * fraction_PE).sum() / (sequence_length * probability_PE.shape[1])
