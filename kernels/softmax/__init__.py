"""Softmax attention: causal, grouped queries, over packed documents, returning the log-sum-exp.

Shape legend: T tokens, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimax_train.kernels.dispatch import AUTO, choose
from minimax_train.kernels.documents import Documents
from minimax_train.kernels.softmax.blocked import softmax_attention_blocked
from minimax_train.kernels.softmax.flash import softmax_attention_flash
from minimax_train.kernels.softmax.naive import softmax_attention_naive

IMPLEMENTATIONS = {
    "naive": softmax_attention_naive,
    "blocked": softmax_attention_blocked,
    "flash": softmax_attention_flash,
}


def softmax_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    documents: Documents,
    *,
    scale: float,
    implementation: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """``o_t = sum over s <= t in the same document of softmax_s(scale q_t . k_s) v_s``.

    Args:
        q_THK, k_TGK, v_TGV: any floating dtype; query head h reads key-value head ``h // (H // G)``.
        documents: the packed documents; no token sees another document.
        scale: factor of the scores, usually ``K ** -0.5``.
        implementation: ``auto``, ``flash`` (CUDA, 16-bit), ``blocked`` or ``naive``.

    Returns:
        The output ``[T, H, V]`` in the dtype of q, differentiable; and the log-sum-exp of each query's scaled scores
        ``[T, H]`` in float32 (float64 for float64 inputs), not differentiable except in ``naive``.

    Raises:
        ValueError: for an unknown implementation, or shapes that do not agree.
    """
    (T, H, K), G = q_THK.shape, k_TGK.shape[1]
    if k_TGK.shape != (T, G, K) or v_TGV.shape[:2] != (T, G) or H % G or documents.num_tokens != T:
        raise ValueError(
            f"softmax_attention: shapes disagree: q {tuple(q_THK.shape)}, k {tuple(k_TGK.shape)}, "
            f"v {tuple(v_TGV.shape)}, documents of {documents.num_tokens} tokens; "
            "query heads must be a multiple of key-value heads"
        )
    half = q_THK.dtype in (torch.float16, torch.bfloat16)
    best = "flash" if q_THK.is_cuda and half else "blocked"
    run = choose("softmax", IMPLEMENTATIONS, implementation, best)
    return run(q_THK, k_TGK, v_TGV, documents, scale)
