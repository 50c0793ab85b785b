"""Lightning attention in chunks, in plain PyTorch: any device, any dtype, exact backward.

Each document is cut in chunks of C tokens. A chunk's output is what its own tokens contribute (a masked C x C
product) plus what the state entering it contributes; the entering states are one matrix product over chunks, because
the decay between two chunks of a document depends only on the tokens between them. Every decay is the exponential of
a non-positive number, so nothing overflows at any slope.

Shape legend: T tokens, H heads, K key dim, V value dim, N documents, M chunks, C tokens per chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.documents import Chunks, Documents

CHUNK = {"cpu": 64, "cuda": 256}


class _Decays(NamedTuple):
    """All decay factors of one call; each is ``exp(-slope * tokens)`` for a token count >= 0."""

    within_HCC: Tensor  # from key slot j to query slot i of a chunk; 0 where j > i
    enter_HC: Tensor  # from the state entering a chunk to slot i
    leave_MHC: Tensor  # from slot j to the state leaving its chunk
    between_HMM: Tensor  # from the state chunk m leaves to the state entering a later chunk of its document
    initial_HM: Tensor  # from a document's initial state to the state entering chunk m
    final_HM: Tensor  # from the state chunk m leaves to its document's final state
    whole_NH: Tensor  # across a whole document


def _decays(slopes_H: Tensor, documents: Documents, chunks: Chunks, size: int) -> _Decays:
    dtype, device = slopes_H.dtype, slopes_H.device
    slots_C = torch.arange(size, device=device)
    gap_CC = slots_C[:, None] - slots_C[None, :]
    ends_M = chunks.starts_M + chunks.lengths_M
    gap_MM = chunks.starts_M[:, None] - ends_M[None, :]
    later_MM = (chunks.documents_M[:, None] == chunks.documents_M[None, :]) & (gap_MM >= 0)
    cu_seqlens = documents.cu_seqlens.long()
    from_start_M = chunks.starts_M - cu_seqlens[chunks.documents_M]
    to_end_M = cu_seqlens[chunks.documents_M + 1] - ends_M

    def decay(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        factor = torch.exp(-slopes_H.view(-1, *[1] * tokens.dim()) * tokens.clamp(min=0).to(dtype))
        return factor if mask is None else factor * mask

    return _Decays(
        within_HCC=decay(gap_CC, gap_CC >= 0),
        enter_HC=decay(slots_C + 1),
        leave_MHC=decay(chunks.lengths_M[:, None] - 1 - slots_C).transpose(0, 1),
        between_HMM=decay(gap_MM, later_MM),
        initial_HM=decay(from_start_M),
        final_HM=decay(to_end_M),
        whole_NH=decay(cu_seqlens.diff()).transpose(0, 1),
    )


def _gather(x_THK: Tensor, chunks: Chunks, dtype: torch.dtype) -> Tensor:
    """``[T, H, K] -> [M, H, C, K]``, empty slots zero."""
    x_MCHK = x_THK[chunks.tokens_MC].to(dtype) * chunks.valid_MC[:, :, None, None]
    return x_MCHK.transpose(1, 2)


def _scatter(x_MHCK: Tensor, chunks: Chunks, dtype: torch.dtype) -> Tensor:
    """``[M, H, C, K] -> [T, H, K]``: chunks are in token order, so dropping empty slots is all there is to do."""
    return x_MHCK.transpose(1, 2)[chunks.valid_MC].to(dtype)


def _carry(weight_HMM: Tensor, update_MHKV: Tensor) -> Tensor:
    """``out[m] = sum_j weight[:, m, j] * update[j]``: ``[H, M, M], [M, H, K, V] -> [M, H, K, V]``."""
    flat_HMS = update_MHKV.transpose(0, 1).flatten(2)
    return (weight_HMM @ flat_HMS).unflatten(2, update_MHKV.shape[2:]).transpose(0, 1)


def _sum_by_document(weight_HM: Tensor, x_MHKV: Tensor, chunks: Chunks, num_documents: int) -> Tensor:
    """``out[n] = sum over chunks m of document n of weight[:, m] * x[m]``: ``-> [N, H, K, V]``."""
    out_NHKV = x_MHKV.new_zeros(num_documents, *x_MHKV.shape[1:])
    return out_NHKV.index_add_(0, chunks.documents_M, x_MHKV * weight_HM.transpose(0, 1)[:, :, None, None])


class _ChunkedLightning(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THK, k_THK, v_THV, slopes_H, documents, initial_state_NHKV):
        size = CHUNK.get(q_THK.device.type, CHUNK["cpu"])
        dtype = torch.promote_types(q_THK.dtype, torch.float32)
        chunks = documents.chunks(size)
        d = _decays(slopes_H.to(dtype), documents, chunks, size)
        q, k, v = (_gather(x, chunks, dtype) for x in (q_THK, k_THK, v_THV))
        initial = initial_state_NHKV.to(dtype)

        update_MHKV = (k * d.leave_MHC[..., None]).transpose(-1, -2) @ v
        entering_MHKV = _carry(d.between_HMM, update_MHKV)
        entering_MHKV += initial[chunks.documents_M] * d.initial_HM.T[:, :, None, None]
        out_MHCV = ((q @ k.transpose(-1, -2)) * d.within_HCC) @ v
        out_MHCV += (q * d.enter_HC[..., None]) @ entering_MHKV
        final_NHKV = _sum_by_document(d.final_HM, update_MHKV, chunks, len(documents))
        final_NHKV += initial * d.whole_NH[:, :, None, None]

        ctx.save_for_backward(q_THK, k_THK, v_THV, slopes_H, initial_state_NHKV, entering_MHKV)
        ctx.documents, ctx.size, ctx.dtype = documents, size, dtype
        return _scatter(out_MHCV, chunks, v_THV.dtype), final_NHKV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_THV, grad_final_NHKV):
        q_THK, k_THK, v_THV, slopes_H, initial_state_NHKV, entering_MHKV = ctx.saved_tensors
        documents, dtype = ctx.documents, ctx.dtype
        chunks = documents.chunks(ctx.size)
        d = _decays(slopes_H.to(dtype), documents, chunks, ctx.size)
        q, k, v, do = (_gather(x, chunks, dtype) for x in (q_THK, k_THK, v_THV, grad_out_THV))
        grad_final = grad_final_NHKV.to(dtype)

        # The mirror image of the forward pass: gradients of entering states flow to earlier chunks.
        grad_entering_MHKV = (q * d.enter_HC[..., None]).transpose(-1, -2) @ do
        grad_update_MHKV = _carry(d.between_HMM.transpose(-1, -2), grad_entering_MHKV)
        grad_update_MHKV += grad_final[chunks.documents_M] * d.final_HM.T[:, :, None, None]

        grad_scores_MHCC = (do @ v.transpose(-1, -2)) * d.within_HCC
        scores_MHCC = (q @ k.transpose(-1, -2)) * d.within_HCC
        dq = grad_scores_MHCC @ k + (do @ entering_MHKV.transpose(-1, -2)) * d.enter_HC[..., None]
        dk = grad_scores_MHCC.transpose(-1, -2) @ q
        dk += (v @ grad_update_MHKV.transpose(-1, -2)) * d.leave_MHC[..., None]
        dv = scores_MHCC.transpose(-1, -2) @ do + (k * d.leave_MHC[..., None]) @ grad_update_MHKV
        grad_initial = _sum_by_document(d.initial_HM, grad_entering_MHKV, chunks, len(documents))
        grad_initial += grad_final * d.whole_NH[:, :, None, None]
        return (
            _scatter(dq, chunks, q_THK.dtype),
            _scatter(dk, chunks, k_THK.dtype),
            _scatter(dv, chunks, v_THV.dtype),
            None,
            None,
            grad_initial.to(initial_state_NHKV.dtype),
        )


def lightning_attention_chunked(
    q_THK: Tensor, k_THK: Tensor, v_THV: Tensor, slopes_H: Tensor, documents: Documents, initial_state_NHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Block form of lightning attention (Lightning Attention-2, arXiv 2401.04658, equations 5-7, with documents).

    States and decays are float32 (float64 for float64 inputs). Arguments and results as in
    :func:`minimax_train.kernels.lightning.lightning_attention`.
    """
    return _ChunkedLightning.apply(q_THK, k_THK, v_THV, slopes_H, documents, initial_state_NHKV)
