"""Causal softmax attention over packed documents with the whole score matrix in memory: the reference.

Shape legend: T tokens, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_train.kernels.documents import Documents


def softmax_attention_naive(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, documents: Documents, scale: float
) -> tuple[Tensor, Tensor]:
    """One masked softmax over all T x T pairs, in the dtype of the inputs; autograd gives the gradients.

    Arguments and results as in :func:`minimax_train.kernels.softmax.softmax_attention`.
    """
    T, H, _ = q_THK.shape
    group = H // k_TGK.shape[1]
    k_THK, v_THV = k_TGK.repeat_interleave(group, 1), v_TGV.repeat_interleave(group, 1)
    document_T = torch.bucketize(torch.arange(T, device=q_THK.device), documents.cu_seqlens[1:], right=True)
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=q_THK.device).tril()
    visible_TT = causal_TT & (document_T[:, None] == document_T[None, :])
    scores_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK) * scale
    scores_HTT = scores_HTT.masked_fill(~visible_TT, -torch.inf)
    out_THV = torch.einsum("hts,shv->thv", scores_HTT.softmax(-1), v_THV)
    return out_THV, scores_HTT.logsumexp(-1).T
