"""Softmax attention: causal, grouped queries, over packed documents, returning the log-sum-exp.

Shape legend: T tokens, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minimax_train.documents import Documents
from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.softmax import naive
from minimax_train.kernels.softmax.dispatch import (
    IMPLEMENTATIONS,
    attention_backward,
    attention_forward,
    check_shapes,
    choose_implementation,
)

__all__ = ["IMPLEMENTATIONS", "attention_backward", "attention_forward", "choose_implementation", "softmax_attention"]


class _SelfAttention(Function):
    @staticmethod
    def forward(ctx, q_THK, k_TGK, v_TGV, documents, scale, run):
        out_THV, lse_TH = run.attention_forward(q_THK, k_TGK, v_TGV, documents, documents, True, scale)
        ctx.save_for_backward(q_THK, k_TGK, v_TGV, out_THV, lse_TH)
        ctx.documents, ctx.scale, ctx.run = documents, scale, run
        ctx.mark_non_differentiable(lse_TH)
        return out_THV, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_THV, _):
        documents = ctx.documents
        gradients = ctx.run.attention_backward(grad_out_THV, *ctx.saved_tensors, documents, documents, True, ctx.scale)
        return *gradients, None, None, None


def softmax_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, documents: Documents, *, scale: float, implementation: str = AUTO
) -> tuple[Tensor, Tensor]:
    """``o_t = sum over s <= t in the same document of softmax_s(scale q_t . k_s) v_s``.

    Args:
        q_THK, k_TGK, v_TGV: any floating dtype; query head h reads key-value head ``h // (H // G)``.
        documents: the packed documents; no token sees another document.
        scale: factor of the scores, usually ``K ** -0.5``.
        implementation: ``auto``, ``flash4`` and ``flash`` (CUDA, 16-bit), ``blocked`` or ``naive``.

    Returns:
        The output ``[T, H, V]`` in the dtype of q, differentiable; and the log-sum-exp of each query's scaled scores
        ``[T, H]`` in float32 (float64 for float64 inputs), not differentiable except in ``naive``.

    Raises:
        ValueError: for an unknown implementation, or shapes that do not agree.
    """
    check_shapes(q_THK, k_TGK, v_TGV, documents, documents)
    run = choose_implementation(q_THK, v_TGV, implementation)
    if run is naive:  # the reference is differentiated by autograd, not by a formula of ours
        return naive.attention_forward(q_THK, k_TGK, v_TGV, documents, documents, True, scale)
    return _SelfAttention.apply(q_THK, k_TGK, v_TGV, documents, scale, run)
