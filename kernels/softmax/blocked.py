"""Softmax attention over packed documents, block by block in PyTorch operations: any device, any dtype.

Works through each document in blocks of queries, so that memory grows with the block times the document's keys instead
of the square of all tokens. The backward pass starts from a given log-sum-exp, as FlashAttention's does
(arXiv 2205.14135, algorithm 4).

Shape legend: Q queries, S keys, H query heads, G key-value heads, R query heads per key-value head, K key dim,
V value dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from minimax_train.documents import Documents

BLOCK = 512


def _blocks(queries: Documents, keys: Documents, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Query block and the keys that some of it sees, for every block of every document."""
    for (start, end), (first_key, last_key) in zip(pairwise(queries.bounds), pairwise(keys.bounds), strict=True):
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            yield slice(first, last), slice(first_key, last_key - (end - last) if causal else last_key)


def _grouped(x_QHK: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``[Q, G * R, K] -> [G, R, Q, K]``."""
    return x_QHK.to(dtype).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _scores(q_GRQK: Tensor, k_G1SK: Tensor, causal: bool, scale: float) -> Tensor:
    """Scaled scores ``[G, R, Q, S]``; if causal, of the last Q of S tokens, -inf where a key comes after its query."""
    scores = (q_GRQK @ k_G1SK.transpose(-1, -2)) * scale
    if not causal:
        return scores
    queries, keys = scores.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    return scores.masked_fill_(hidden, -torch.inf)


def attention_forward(
    q_QHK: Tensor, k_SGK: Tensor, v_SGV: Tensor, queries: Documents, keys: Documents, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in :func:`minimax_train.kernels.softmax.attention_forward`; scores in float32."""
    dtype, groups = torch.promote_types(q_QHK.dtype, torch.float32), k_SGK.shape[1]
    out_QHV = q_QHK.new_empty(*q_QHK.shape[:2], v_SGV.shape[-1])
    lse_QH = q_QHK.new_empty(q_QHK.shape[:2], dtype=dtype)
    for rows, columns in _blocks(queries, keys, causal):
        q = _grouped(q_QHK[rows], groups, dtype)
        k, v = (_grouped(x[columns], groups, dtype) for x in (k_SGK, v_SGV))
        scores = _scores(q, k, causal, scale)
        lse = scores.logsumexp(-1, keepdim=True)
        out = scores.sub_(lse).exp_() @ v
        out_QHV[rows] = out.permute(2, 0, 1, 3).flatten(1, 2).to(out_QHV.dtype)
        lse_QH[rows] = lse.squeeze(-1).flatten(0, 1).T
    return out_QHV, lse_QH


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
    """Arguments and results as in :func:`minimax_train.kernels.softmax.attention_backward`; sums in float32."""
    dtype, groups = lse_QH.dtype, k_SGK.shape[1]
    grad_q = torch.empty_like(q_QHK)
    grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (k_SGK, v_SGV))
    for rows, columns in _blocks(queries, keys, causal):
        q, out, grad_out = (_grouped(x[rows], groups, dtype) for x in (q_QHK, out_QHV, grad_out_QHV))
        k, v = (_grouped(x[columns], groups, dtype) for x in (k_SGK, v_SGV))
        lse = lse_QH[rows].T.unflatten(0, (groups, -1))[..., None]
        weights = _scores(q, k, causal, scale).sub_(lse).exp_()
        grad_v[columns] += (weights.transpose(-1, -2) @ grad_out).sum(1).transpose(0, 1)
        delta = (out * grad_out).sum(-1, keepdim=True)
        grad_scores = (grad_out @ v.transpose(-1, -2)).sub_(delta).mul_(weights).mul_(scale)
        grad_q[rows] = (grad_scores @ k).permute(2, 0, 1, 3).flatten(1, 2).to(grad_q.dtype)
        grad_k[columns] += (grad_scores.transpose(-1, -2) @ q).sum(1).transpose(0, 1)
    return grad_q, grad_k.to(k_SGK.dtype), grad_v.to(v_SGV.dtype)
