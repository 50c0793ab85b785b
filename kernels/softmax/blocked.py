"""Causal softmax attention over packed documents, block by block in plain PyTorch: any device, any dtype.

Works through each document in blocks of queries, so that memory grows with the block times the document length
instead of the square of the row. The backward pass starts from the stored log-sum-exp, as FlashAttention's does
(arXiv 2205.14135, algorithm 4).

Shape legend: T tokens, H query heads, G key-value heads, R query heads per key-value head, K key dim, V value dim,
Q queries of a block, S keys visible to it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.documents import Documents

BLOCK = 512


def _blocks(documents: Documents) -> Iterator[tuple[slice, slice]]:
    """Query block and the keys up to its end, for every block of every document."""
    for start, end in zip(documents.bounds, documents.bounds[1:], strict=False):
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            yield slice(first, last), slice(start, last)


def _grouped(x_QHK: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """``[Q, G * R, K] -> [G, R, Q, K]``."""
    return x_QHK.to(dtype).unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _scores(q_GRQK: Tensor, k_G1SK: Tensor, scale: float) -> Tensor:
    """Scaled scores ``[G, R, Q, S]`` of the last Q of S tokens, -inf where a key comes after its query."""
    scores = (q_GRQK @ k_G1SK.transpose(-1, -2)) * scale
    queries, keys = scores.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    return scores.masked_fill_(hidden, -torch.inf)


class _BlockedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THK, k_TGK, v_TGV, documents, scale):
        dtype = torch.promote_types(q_THK.dtype, torch.float32)
        groups = k_TGK.shape[1]
        out_THV = q_THK.new_empty(*q_THK.shape[:2], v_TGV.shape[-1])
        lse_TH = q_THK.new_empty(q_THK.shape[:2], dtype=dtype)
        for queries, keys in _blocks(documents):
            q = _grouped(q_THK[queries], groups, dtype)
            k, v = (_grouped(x[keys], groups, dtype) for x in (k_TGK, v_TGV))
            scores = _scores(q, k, scale)
            lse = scores.logsumexp(-1, keepdim=True)
            out = scores.sub_(lse).exp_() @ v
            out_THV[queries] = out.permute(2, 0, 1, 3).flatten(1, 2).to(out_THV.dtype)
            lse_TH[queries] = lse.squeeze(-1).flatten(0, 1).T
        ctx.save_for_backward(q_THK, k_TGK, v_TGV, out_THV, lse_TH)
        ctx.documents, ctx.scale, ctx.dtype = documents, scale, dtype
        ctx.mark_non_differentiable(lse_TH)
        return out_THV, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_THV, _):
        q_THK, k_TGK, v_TGV, out_THV, lse_TH = ctx.saved_tensors
        dtype, groups = ctx.dtype, k_TGK.shape[1]
        grad_q = torch.empty_like(q_THK)
        grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (k_TGK, v_TGV))
        for queries, keys in _blocks(ctx.documents):
            q, out, grad_out = (_grouped(x[queries], groups, dtype) for x in (q_THK, out_THV, grad_out_THV))
            k, v = (_grouped(x[keys], groups, dtype) for x in (k_TGK, v_TGV))
            lse = lse_TH[queries].T.unflatten(0, (groups, -1))[..., None]
            weights = _scores(q, k, ctx.scale).sub_(lse).exp_()
            grad_v[keys] += (weights.transpose(-1, -2) @ grad_out).sum(1).transpose(0, 1)
            delta = (out * grad_out).sum(-1, keepdim=True)
            grad_scores = (grad_out @ v.transpose(-1, -2)).sub_(delta).mul_(weights).mul_(ctx.scale)
            grad_q[queries] = (grad_scores @ k).permute(2, 0, 1, 3).flatten(1, 2).to(grad_q.dtype)
            grad_k[keys] += (grad_scores.transpose(-1, -2) @ q).sum(1).transpose(0, 1)
        return grad_q, grad_k.to(k_TGK.dtype), grad_v.to(v_TGV.dtype), None, None


def softmax_attention_blocked(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, documents: Documents, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in :func:`minimax_train.kernels.softmax.softmax_attention`; scores in float32."""
    return _BlockedSoftmax.apply(q_THK, k_TGK, v_TGV, documents, scale)
