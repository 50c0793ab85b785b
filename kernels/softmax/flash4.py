"""Softmax attention over packed documents through FlashAttention-4: CUDA, float16 or bfloat16, extra ``cuda``.

Its package compiles one kernel per shape of head in a few seconds at the first call. The functions beneath its public
one are called because they take a given output and log-sum-exp, which a ring needs.

Shape legend: Q queries, S keys, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

from minimax_train.documents import Documents
from minimax_train.kernels.compile_cache import one_at_a_time

# Longer than a tile of any kernel: the largest has 256 rows. Told that no document is longer than a tile, the package
# compiles a kernel for that (is_static_persistent, single_q_block, single_k_block of its interface): seconds in the
# middle of a run, when a ring first has only such pieces to compute.
LEAST_BOUND = 257


@cache
def is_installed() -> bool:
    """Whether the package is there; does not import it."""
    try:
        return importlib.util.find_spec("flash_attn.cute.interface") is not None
    except ModuleNotFoundError:
        return False


@cache
def _interface() -> ModuleType:
    try:
        from flash_attn.cute import interface
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"kernels.softmax=flash4 needs FlashAttention-4 ({error}): pip install 'minimax-train[cuda]'"
        ) from error
    return interface


def _options(queries: Documents, keys: Documents, causal: bool, scale: float) -> dict[str, Any]:
    longest_q, longest_k = (max(documents.max_length, LEAST_BOUND) for documents in (queries, keys))
    lengths = {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
    lengths |= {"cu_seqlens_q": queries.cu_seqlens, "cu_seqlens_k": keys.cu_seqlens}
    return {"causal": causal, "softmax_scale": scale, **lengths}


def _kernel(q_QHK: Tensor, k_SGK: Tensor, v_SGV: Tensor, causal: bool) -> tuple:
    """What a kernel is compiled for."""
    return q_QHK.dtype, q_QHK.shape[1:], k_SGK.shape[1], v_SGV.shape[2], causal


def attention_forward(
    q_QHK: Tensor, k_SGK: Tensor, v_SGV: Tensor, queries: Documents, keys: Documents, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in :func:`minimax_train.kernels.softmax.attention_forward`."""
    options = _options(queries, keys, causal, scale)
    with one_at_a_time("forward", *_kernel(q_QHK, k_SGK, v_SGV, causal)):
        out_QHV, lse_HQ, *_ = _interface()._flash_attn_fwd(q_QHK, k_SGK, v_SGV, return_lse=True, **options)
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
    lse_HQ, options = lse_QH.T.contiguous(), _options(queries, keys, causal, scale)
    with one_at_a_time("backward", *_kernel(q_QHK, k_SGK, v_SGV, causal)):
        grad_q, grad_k, grad_v, *_ = _interface()._flash_attn_bwd(
            q_QHK, k_SGK, v_SGV, out_QHV, grad_out_QHV, lse_HQ, **options
        )
    return grad_q, grad_k, grad_v
