"""The router one token and one assignment at a time: what tests compare with.

Shape legend: T tokens, E experts, K assignments per token.
"""

import math

import torch
from torch import Tensor


def route_naive(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities ``[T, E]``, weights ``[T, K]`` and experts ``[T, K]``, the most probable first, of equals any."""
    probabilities, weights, experts = [], [], []
    for logits_E in logits_TE:
        exponentials_E = (logits_E - logits_E.max()).exp()
        best = sorted(range(len(logits_E)), key=lambda e: -logits_E[e].item())[:k]
        probabilities.append(exponentials_E / exponentials_E.sum())
        weights.append(exponentials_E[best] / sum(exponentials_E[e] for e in best))
        experts.append(best)
    return torch.stack(probabilities), torch.stack(weights), torch.tensor(experts)


def entropy_naive(probabilities_TE: Tensor) -> float:
    """In nats, summed over tokens."""
    return -sum(p * math.log(p) for row in probabilities_TE.tolist() for p in row if p > 0)


def tokens_per_expert_naive(experts_TK: Tensor, num_experts: int, span_T: Tensor, num_spans: int) -> list[list[int]]:
    """How many tokens of each span each expert was assigned."""
    counts = [[0] * num_experts for _ in range(num_spans)]
    for experts, span in zip(experts_TK.tolist(), span_T.tolist(), strict=True):
        for expert in experts:
            counts[span][expert] += 1
    return counts


def drop_over_capacity_naive(experts_TK: Tensor, sequence_T: Tensor, capacity: int) -> Tensor:
    """Assignments in token order, each kept while its expert has fewer than ``capacity`` of the sequence, else -1."""
    taken: dict[tuple[int, int], int] = {}
    kept = torch.full_like(experts_TK, -1)
    for t, (experts, sequence) in enumerate(zip(experts_TK.tolist(), sequence_T.tolist(), strict=True)):
        for k, expert in enumerate(experts):
            if taken.get((sequence, expert), 0) < capacity:
                taken[sequence, expert] = taken.get((sequence, expert), 0) + 1
                kept[t, k] = expert
    return kept


def load_balancing_loss_naive(probabilities_TE: Tensor, experts_TK: Tensor, sequence_T: Tensor) -> Tensor:
    """``sum over sequences of 1 / E * sum_i f_i m_i``, f_i assignments to i per token, m_i its mean probability."""
    loss, E = probabilities_TE.new_zeros(()), probabilities_TE.shape[1]
    for sequence in set(sequence_T.tolist()):
        tokens = [t for t, s in enumerate(sequence_T.tolist()) if s == sequence]
        for expert in range(E):
            assigned = sum(experts_TK[t].tolist().count(expert) for t in tokens)
            mean = sum(probabilities_TE[t, expert] for t in tokens) / len(tokens)
            loss = loss + assigned / len(tokens) * mean / E
    return loss
