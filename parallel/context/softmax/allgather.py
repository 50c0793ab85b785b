"""Softmax attention after gathering the keys and values that any rank needs: one exchange, one kernel call.

Shape legend: T tokens on this rank, S keys seen from it (some twice), M chunks per rank, W tokens gathered per chunk,
H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minimax_train.documents import Documents
from minimax_train.kernels.softmax import attention_backward, attention_forward
from minimax_train.parallel.communicator import Communicator
from minimax_train.parallel.context.layout import SequenceShard
from minimax_train.parallel.context.softmax.plan import first_shared_chunk


@dataclass(frozen=True)
class Piece:
    """A token range of the keys this rank sees: of its own tokens, or of what another gathered from one chunk."""

    source: tuple[int, int] | None
    """Rank and place of the chunk on its axis; None for this rank's own token axis."""
    tokens: slice

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """What one rank gathers and how it lines it up.

    Attributes:
        num_ranks, num_chunks, chunk_size: ranks, chunks on each, tokens of each.
        width: W, how many of its last tokens every chunk gives: the longest piece that another rank needs of any.
        pieces: the keys seen from this rank's segments, in order.
        queries, keys: the segments on the query axis, and on the axis the pieces make; causal, aligned at the end.
    """

    num_ranks: int
    num_chunks: int
    chunk_size: int
    width: int
    pieces: tuple[Piece, ...]
    queries: Documents
    keys: Documents

    @property
    def sees_own_tokens_only(self) -> bool:
        """Whether the rank's own token axis is already the axis of keys, and nobody gathers."""
        return not self.width and self.keys.num_tokens == self.num_chunks * self.chunk_size

    @property
    def tokens_sent(self) -> int:
        """Tokens whose keys and values each rank sends in a forward pass."""
        return (self.num_ranks - 1) * self.num_chunks * self.width


@lru_cache(maxsize=8)
def gather_plan(shard: SequenceShard) -> GatherPlan:
    """The plan of the rank that holds a shard; kept for the last few shards, since all layers share it."""
    width = 0
    for chunk in shard.chunks:
        for earlier in shard.chunks[first_shared_chunk(shard, chunk) : chunk.index]:
            if earlier.rank != chunk.rank:
                start, end = earlier.last_segment
                width = max(width, end - start)
            if width == shard.chunk_size:
                break
    places = {chunk.index: shard.layout.chunk_ranks[: chunk.index].count(chunk.rank) for chunk in shard.chunks}
    pieces, query_lengths, key_lengths = [], [], []
    for chunk in shard.mine:
        before = 0
        for earlier in shard.chunks[first_shared_chunk(shard, chunk) : chunk.index]:
            segment = earlier.last_segment
            if earlier.rank == shard.rank:
                pieces.append(Piece(None, shard.local(segment)))
            else:
                length = segment[1] - segment[0]
                pieces.append(Piece((earlier.rank, places[earlier.index]), slice(width - length, width)))
            before += segment[1] - segment[0]
        pieces.append(Piece(None, shard.local((chunk.start, chunk.end))))
        segments = [end - start for start, end in pairwise(chunk.edges)]
        query_lengths += segments
        key_lengths += [before + segments[0], *segments[1:]]
    device = shard.whole.device
    return GatherPlan(
        shard.layout.num_ranks,
        len(shard.mine),
        shard.chunk_size,
        width,
        tuple(pieces),
        Documents.from_lengths(query_lengths, device),
        Documents.from_lengths(key_lengths, device),
    )


def _gather(k_TGK: Tensor, v_TGV: Tensor, plan: GatherPlan, communicator: Communicator) -> tuple[Tensor, ...]:
    """Keys ``[S, G, K]`` and values ``[S, G, V]`` that this rank's queries see."""
    if plan.sees_own_tokens_only:
        return k_TGK, v_TGV
    packed_TG = torch.cat([k_TGK, v_TGV], -1)
    if plan.width:
        tails_MW = packed_TG.unflatten(0, (plan.num_chunks, plan.chunk_size))[:, -plan.width :]
        gathered_NMW = communicator.all_gather(tails_MW).wait()
    parts = [packed_TG[p.tokens] if p.source is None else gathered_NMW[p.source][p.tokens] for p in plan.pieces]
    return torch.cat(parts).split([k_TGK.shape[-1], v_TGV.shape[-1]], -1)


def _scatter(
    grad_k_SGK: Tensor, grad_v_SGV: Tensor, plan: GatherPlan, communicator: Communicator, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum the gradients of every copy of a key or value at its rank; sums in ``dtype``."""
    if plan.sees_own_tokens_only:
        return grad_k_SGK, grad_v_SGV
    packed_SG = torch.cat([grad_k_SGK, grad_v_SGV], -1)
    chunks = (plan.num_chunks, plan.chunk_size)
    own_TG = packed_SG.new_zeros(plan.num_chunks * plan.chunk_size, *packed_SG.shape[1:], dtype=dtype)
    shape = (plan.num_ranks, plan.num_chunks, plan.width, *packed_SG.shape[1:])
    others_NMW = packed_SG.new_zeros(shape, dtype=dtype)
    for piece, part in zip(plan.pieces, packed_SG.split([p.num_tokens for p in plan.pieces]), strict=True):
        target = own_TG if piece.source is None else others_NMW[piece.source]
        target[piece.tokens] += part
    if plan.width:
        own_TG.unflatten(0, chunks)[:, -plan.width :] += communicator.reduce_scatter(others_NMW).wait()
    return own_TG.split([grad_k_SGK.shape[-1], grad_v_SGV.shape[-1]], -1)


class _AllGatherAttention(Function):
    @staticmethod
    def forward(ctx, q_THK, k_TGK, v_TGV, plan: GatherPlan, communicator: Communicator, scale, implementation):
        how = {"causal": True, "scale": scale, "implementation": implementation}
        k_SGK, v_SGV = _gather(k_TGK, v_TGV, plan, communicator)
        out_THV, lse_TH = attention_forward(q_THK, k_SGK, v_SGV, plan.queries, plan.keys, **how)
        ctx.save_for_backward(q_THK, k_TGK, v_TGV, out_THV, lse_TH)
        ctx.plan, ctx.communicator, ctx.how = plan, communicator, how
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out_THV):
        q_THK, k_TGK, v_TGV, out_THV, lse_TH = ctx.saved_tensors
        plan, communicator, how = ctx.plan, ctx.communicator, ctx.how
        k_SGK, v_SGV = _gather(k_TGK, v_TGV, plan, communicator)  # again: kept, it would cost memory in every layer
        grad_q, *parts = attention_backward(
            grad_out_THV, q_THK, k_SGK, v_SGV, out_THV, lse_TH, plan.queries, plan.keys, **how
        )
        grad_k, grad_v = _scatter(*parts, plan, communicator, lse_TH.dtype)
        return grad_q, grad_k.to(k_TGK.dtype), grad_v.to(v_TGV.dtype), None, None, None, None


def allgather_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    plan: GatherPlan,
    communicator: Communicator,
    *,
    scale: float,
    implementation: str,
) -> Tensor:
    """Attention over the whole row in one kernel call, after one all-gather of the tokens that others may need.

    Nothing is merged and no transfer overlaps. The backward pass gathers again and reduces the gradients of keys and
    values in float32.

    Arguments and result as in :func:`minimax_train.parallel.context.softmax.softmax_attention_cp`.
    """
    return _AllGatherAttention.apply(q_THK, k_TGK, v_TGV, plan, communicator, scale, implementation)
