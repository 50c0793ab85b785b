"""Softmax attention over packed documents through PyTorch's own FlashAttention-2: CUDA, float16 or bfloat16.

These are the operators beneath ``torch.nn.attention.varlen``, called directly because its public function makes its
own backward pass: a ring needs one that starts from a merged log-sum-exp. The operators are the same in PyTorch 2.11
and 2.13; the public function is not.

Shape legend: Q queries, S keys, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_train.documents import Documents

# A longest query of one token would take the kernel's decoding path, which lays the log-sum-exp out differently.
SHORTEST = 2


def _lengths(queries: Documents, keys: Documents) -> tuple[Tensor, Tensor, int, int]:
    longest_query, longest_key = (max(x.max_length, SHORTEST) for x in (queries, keys))
    return queries.cu_seqlens, keys.cu_seqlens, longest_query, longest_key


def attention_forward(
    q_QHK: Tensor, k_SGK: Tensor, v_SGV: Tensor, queries: Documents, keys: Documents, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in :func:`minimax_train.kernels.softmax.attention_forward`."""
    out_QHV, lse_HQ, *_ = torch.ops.aten._flash_attention_forward(
        q_QHK, k_SGK, v_SGV, *_lengths(queries, keys), 0.0, causal, False, scale=scale
    )
    return out_QHV, lse_HQ.T


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
    """Arguments and results as in :func:`minimax_train.kernels.softmax.attention_backward`."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q_QHK.device)
    return torch.ops.aten._flash_attention_backward(
        grad_out_QHV, q_QHK, k_SGK, v_SGV, out_QHV, lse_QH.T.contiguous(), *_lengths(queries, keys),
        0.0, causal, no_dropout, q_QHK.new_empty(0), scale=scale,
    )  # fmt: skip
