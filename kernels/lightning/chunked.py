"""Lightning attention in tiles, in plain PyTorch: any device, any dtype, exact backward.

Each document is cut in tiles of C tokens. A tile's output is what its own tokens contribute (a masked C x C product)
plus what the state before it contributes. These initial states of tiles are one matrix product over the local states of
tiles, because the decay between two tiles of a document depends only on the tokens between them. Every decay is the
exponential of a non-positive number, so nothing overflows at any slope.

Shape legend: T tokens, H heads, K key dim, V value dim, N documents, B tiles, C tokens per tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.documents import Documents
from minimax_train.kernels.lightning.tiles import Tiles

TILE_TOKENS = {"cpu": 64, "cuda": 256}


class _Decays(NamedTuple):
    """All decay factors of one call; each is ``exp(-slope * tokens)`` for a token count >= 0."""

    within_HCC: Tensor  # from key slot j to query slot i of a tile; 0 where j > i
    from_start_HC: Tensor  # from a tile's initial state to slot i
    to_end_BHC: Tensor  # from slot j to its tile's final state
    between_HBB: Tensor  # from a tile's final state to the initial state of a later tile of its document
    initial_HB: Tensor  # from a document's initial state to a tile's
    final_HB: Tensor  # from a tile's final state to its document's
    whole_NH: Tensor  # across a whole document


def _decays(slopes_H: Tensor, documents: Documents, tiles: Tiles) -> _Decays:
    dtype, device = slopes_H.dtype, slopes_H.device
    slots_C = torch.arange(tiles.size, device=device)
    gap_CC = slots_C[:, None] - slots_C[None, :]
    ends_B = tiles.starts_B + tiles.lengths_B
    gap_BB = tiles.starts_B[:, None] - ends_B[None, :]
    later_BB = (tiles.documents_B[:, None] == tiles.documents_B[None, :]) & (gap_BB >= 0)
    cu_seqlens = documents.cu_seqlens.long()
    before_B = tiles.starts_B - cu_seqlens[tiles.documents_B]
    after_B = cu_seqlens[tiles.documents_B + 1] - ends_B

    def decay(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        factor = torch.exp(-slopes_H.view(-1, *[1] * tokens.dim()) * tokens.clamp(min=0).to(dtype))
        return factor if mask is None else factor * mask

    return _Decays(
        within_HCC=decay(gap_CC, gap_CC >= 0),
        from_start_HC=decay(slots_C + 1),
        to_end_BHC=decay(tiles.lengths_B[:, None] - 1 - slots_C).transpose(0, 1),
        between_HBB=decay(gap_BB, later_BB),
        initial_HB=decay(before_B),
        final_HB=decay(after_B),
        whole_NH=decay(cu_seqlens.diff()).transpose(0, 1),
    )


def _gather(x_THK: Tensor, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """``[T, H, K] -> [B, H, C, K]``, empty slots zero."""
    x_BCHK = x_THK[tiles.tokens_BC].to(dtype) * tiles.valid_BC[:, :, None, None]
    return x_BCHK.transpose(1, 2)


def _scatter(x_BHCK: Tensor, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """``[B, H, C, K] -> [T, H, K]``: tiles are in token order, so dropping empty slots is all there is to do."""
    return x_BHCK.transpose(1, 2)[tiles.valid_BC].to(dtype)


def _weighted_sum(weight_HBB: Tensor, local_BHKV: Tensor) -> Tensor:
    """``out[b] = sum_a weight[:, b, a] * local[a]``: ``[H, B, B], [B, H, K, V] -> [B, H, K, V]``."""
    flat_HBS = local_BHKV.transpose(0, 1).flatten(2)
    return (weight_HBB @ flat_HBS).unflatten(2, local_BHKV.shape[2:]).transpose(0, 1)


def _sum_by_document(weight_HB: Tensor, x_BHKV: Tensor, tiles: Tiles, num_documents: int) -> Tensor:
    """``out[n] = sum over tiles b of document n of weight[:, b] * x[b]``: ``-> [N, H, K, V]``."""
    out_NHKV = x_BHKV.new_zeros(num_documents, *x_BHKV.shape[1:])
    return out_NHKV.index_add_(0, tiles.documents_B, x_BHKV * weight_HB.transpose(0, 1)[:, :, None, None])


class _ChunkedLightning(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THK, k_THK, v_THV, slopes_H, documents, initial_state_NHKV):
        dtype = torch.promote_types(q_THK.dtype, torch.float32)
        tiles = Tiles.of(documents, TILE_TOKENS.get(q_THK.device.type, TILE_TOKENS["cpu"]))
        d = _decays(slopes_H.to(dtype), documents, tiles)
        q, k, v = (_gather(x, tiles, dtype) for x in (q_THK, k_THK, v_THV))
        initial_NHKV = initial_state_NHKV.to(dtype)

        local_BHKV = (k * d.to_end_BHC[..., None]).transpose(-1, -2) @ v
        initial_BHKV = _weighted_sum(d.between_HBB, local_BHKV)
        initial_BHKV += initial_NHKV[tiles.documents_B] * d.initial_HB.T[:, :, None, None]
        out_BHCV = ((q @ k.transpose(-1, -2)) * d.within_HCC) @ v
        out_BHCV += (q * d.from_start_HC[..., None]) @ initial_BHKV
        final_NHKV = _sum_by_document(d.final_HB, local_BHKV, tiles, len(documents))
        final_NHKV += initial_NHKV * d.whole_NH[:, :, None, None]

        ctx.save_for_backward(q_THK, k_THK, v_THV, slopes_H, initial_state_NHKV, initial_BHKV)
        ctx.documents, ctx.tiles, ctx.dtype = documents, tiles, dtype
        return _scatter(out_BHCV, tiles, v_THV.dtype), final_NHKV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_THV, grad_final_NHKV):
        q_THK, k_THK, v_THV, slopes_H, initial_state_NHKV, initial_BHKV = ctx.saved_tensors
        documents, tiles, dtype = ctx.documents, ctx.tiles, ctx.dtype
        d = _decays(slopes_H.to(dtype), documents, tiles)
        q, k, v, do = (_gather(x, tiles, dtype) for x in (q_THK, k_THK, v_THV, grad_out_THV))
        grad_final = grad_final_NHKV.to(dtype)

        # The mirror image of the forward pass: gradients of initial states flow to earlier tiles.
        grad_initial_BHKV = (q * d.from_start_HC[..., None]).transpose(-1, -2) @ do
        grad_local_BHKV = _weighted_sum(d.between_HBB.transpose(-1, -2), grad_initial_BHKV)
        grad_local_BHKV += grad_final[tiles.documents_B] * d.final_HB.T[:, :, None, None]

        grad_scores_BHCC = (do @ v.transpose(-1, -2)) * d.within_HCC
        scores_BHCC = (q @ k.transpose(-1, -2)) * d.within_HCC
        dq = grad_scores_BHCC @ k + (do @ initial_BHKV.transpose(-1, -2)) * d.from_start_HC[..., None]
        dk = grad_scores_BHCC.transpose(-1, -2) @ q
        dk += (v @ grad_local_BHKV.transpose(-1, -2)) * d.to_end_BHC[..., None]
        dv = scores_BHCC.transpose(-1, -2) @ do + (k * d.to_end_BHC[..., None]) @ grad_local_BHKV
        grad_initial = _sum_by_document(d.initial_HB, grad_initial_BHKV, tiles, len(documents))
        grad_initial += grad_final * d.whole_NH[:, :, None, None]
        return (
            _scatter(dq, tiles, q_THK.dtype),
            _scatter(dk, tiles, k_THK.dtype),
            _scatter(dv, tiles, v_THV.dtype),
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
