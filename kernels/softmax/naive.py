"""Softmax attention over packed documents with the whole score matrix in memory, in float64: the reference.

Shape legend: Q queries, S keys, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_train.documents import Documents


def _hidden(queries: Documents, keys: Documents, causal: bool) -> Tensor:
    """Which keys a query does not see, ``[Q, S]``: those of other documents and, if causal, later ones."""

    def account(documents: Documents) -> tuple[Tensor, Tensor]:
        """Document of each token, and its distance to the document's end."""
        lengths = documents.cu_seqlens.diff().long()
        document = torch.arange(len(documents), device=documents.device).repeat_interleave(lengths)
        return document, documents.cu_seqlens[1:][document] - torch.arange(len(document), device=documents.device)

    (document_Q, left_Q), (document_S, left_S) = account(queries), account(keys)
    hidden_QS = document_Q[:, None] != document_S
    return hidden_QS | (left_S < left_Q[:, None]) if causal else hidden_QS


def _widen(x_SGK: Tensor, heads: int) -> Tensor:
    """One copy of each key-value head per query head, in float64."""
    return x_SGK.double().repeat_interleave(heads // x_SGK.shape[1], 1)


def attention_forward(
    q_QHK: Tensor, k_SGK: Tensor, v_SGV: Tensor, queries: Documents, keys: Documents, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """One masked softmax over all Q x S pairs; differentiable by autograd, log-sum-exp too.

    Arguments and results as in :func:`minimax_train.kernels.softmax.attention_forward`.
    """
    heads = q_QHK.shape[1]
    scores_HQS = torch.einsum("qhk,shk->hqs", q_QHK.double(), _widen(k_SGK, heads)) * scale
    scores_HQS = scores_HQS.masked_fill(_hidden(queries, keys, causal), -torch.inf)
    out_QHV = torch.einsum("hqs,shv->qhv", scores_HQS.softmax(-1), _widen(v_SGV, heads))
    lse_QH = scores_HQS.logsumexp(-1).T
    return out_QHV.to(q_QHK.dtype), lse_QH.to(torch.promote_types(q_QHK.dtype, torch.float32))


def attention_backward(
    grad_out_QHV: Tensor,
    q_QHK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    out_QHV: Tensor,
    lse_QH: Tensor,
    queries: Documents,
    keys: Documents,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of ``softmax`` written out, with the normalisation taken from the given log-sum-exp.

    Arguments and results as in :func:`minimax_train.kernels.softmax.attention_backward`.
    """
    heads, groups = q_QHK.shape[1], k_SGK.shape[1]
    q, k, v = q_QHK.double(), _widen(k_SGK, heads), _widen(v_SGV, heads)
    grad_out, lse_HQ = grad_out_QHV.double(), lse_QH.double().T
    weights = torch.exp(torch.einsum("qhk,shk->hqs", q, k) * scale - lse_HQ[..., None])
    weights = weights.masked_fill(_hidden(queries, keys, causal), 0)
    delta_HQ = (out_QHV.double() * grad_out).sum(-1).T
    grad_scores = weights * (torch.einsum("qhv,shv->hqs", grad_out, v) - delta_HQ[..., None]) * scale
    grad_q = torch.einsum("hqs,shk->qhk", grad_scores, k)
    grad_k = torch.einsum("hqs,qhk->shk", grad_scores, q).unflatten(1, (groups, -1)).sum(2)
    grad_v = torch.einsum("hqs,qhv->shv", weights, grad_out).unflatten(1, (groups, -1)).sum(2)
    return grad_q.to(q_QHK.dtype), grad_k.to(k_SGK.dtype), grad_v.to(v_SGV.dtype)
