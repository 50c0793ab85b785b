"""Causal softmax attention over packed documents through PyTorch's own FlashAttention."""

from __future__ import annotations

import inspect

from torch import Tensor

from minimax_train.kernels.documents import Documents


def softmax_attention_flash(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, documents: Documents, scale: float
) -> tuple[Tensor, Tensor]:
    """``torch.nn.attention.varlen.varlen_attn``: CUDA, float16 or bfloat16.

    Arguments and results as in :func:`minimax_train.kernels.softmax.softmax_attention`.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    # PyTorch 2.11 takes grouped queries unasked; later versions want to be told.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out_THV, lse_HT = varlen_attn(
        q_THK,
        k_TGK,
        v_TGV,
        documents.cu_seqlens,
        documents.cu_seqlens,
        documents.max_length,
        documents.max_length,
        return_aux=AuxRequest(lse=True),
        scale=scale,
        window_size=(-1, 0),
        **grouped,
    )
    return out_THV, lse_HT.T
