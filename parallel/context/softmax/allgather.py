"""Softmax attention after gathering the keys and values that any rank needs: one exchange, one kernel call.

Shape legend: T tokens on this rank, S keys seen from it (some twice), N ranks, M chunks per rank, W tokens gathered per
chunk, H query heads, G key-value heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from minimax_train.documents import Documents
from minimax_train.kernels.softmax import attention_backward, attention_forward
from minimax_train.parallel.communicator import Communicator
from minimax_train.parallel.context.layout import SequenceShard


@dataclass(frozen=True)
class KeyRange:
    """A token range of the keys this rank sees.

    Attributes:
        source: rank and place of the chunk it was gathered from; None where it is local.
        tokens: on the rank's own token axis, or among the W tokens gathered from that chunk.
    """

    source: tuple[int, int] | None
    tokens: slice


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """What one rank gathers and how it lines it up.

    Attributes:
        num_ranks, num_chunks, chunk_size: ranks, chunks on each, tokens of each.
        width: W, how many of its last tokens every chunk gives: the most that another rank needs of any.
        ranges: the keys seen from this rank's segments, in order.
        queries, keys: this rank's segments on the query axis, and with the keys before them on the axis that the
            ranges make; causal, aligned at the end.
    """

    num_ranks: int
    num_chunks: int
    chunk_size: int
    width: int
    ranges: tuple[KeyRange, ...]
    queries: Documents
    keys: Documents

    @property
    def sees_local_keys_only(self) -> bool:
        """Whether the rank's own token axis is already the axis of keys, and nobody gathers."""
        return not self.width and self.keys.num_tokens == self.num_chunks * self.chunk_size


def gather_plan(shard: SequenceShard) -> GatherPlan:
    """The plan of the rank that holds a shard, on its device; made once per shard."""
    return shard.derive(("gather plan", shard.whole.device), _make_gather_plan)


def _make_gather_plan(shard: SequenceShard) -> GatherPlan:
    width = 0
    for chunk in shard.chunks:
        for earlier in shard.earlier_chunks(chunk):
            if earlier.rank != chunk.rank:
                start, end = earlier.last_segment
                width = max(width, end - start)
            if width == shard.chunk_size:
                break
    ranges, query_lengths, key_lengths = [], [], []
    for chunk in shard.mine:
        lengths = [end - start for start, end in chunk.segments]
        query_lengths += lengths
        for earlier in shard.earlier_chunks(chunk):
            start, end = earlier.last_segment
            lengths[0] += end - start
            if earlier.rank == shard.rank:
                ranges.append(KeyRange(None, shard.local((start, end))))
            else:
                ranges.append(KeyRange((earlier.rank, earlier.place), slice(width - (end - start), width)))
        ranges.append(KeyRange(None, shard.local((chunk.start, chunk.end))))
        key_lengths += lengths
    queries, keys = (Documents.from_lengths(x, shard.whole.device) for x in (query_lengths, key_lengths))
    num_ranks = shard.layout.num_ranks
    return GatherPlan(num_ranks, len(shard.mine), shard.chunk_size, width, tuple(ranges), queries, keys)


def _gather(k_TGK: Tensor, v_TGV: Tensor, plan: GatherPlan, communicator: Communicator) -> tuple[Tensor, ...]:
    """Keys ``[S, G, K]`` and values ``[S, G, V]`` that this rank's queries see."""
    if plan.sees_local_keys_only:
        return k_TGK, v_TGV
    local_TG = torch.cat([k_TGK, v_TGV], -1)
    given_MW = local_TG.unflatten(0, (plan.num_chunks, plan.chunk_size))[:, plan.chunk_size - plan.width :]
    gathered_NMW = communicator.all_gather(given_MW).wait() if plan.width else given_MW
    seen = [local_TG[r.tokens] if r.source is None else gathered_NMW[r.source][r.tokens] for r in plan.ranges]
    return torch.cat(seen).split([k_TGK.shape[-1], v_TGV.shape[-1]], -1)


def _scatter(
    grad_k_SGK: Tensor, grad_v_SGV: Tensor, plan: GatherPlan, communicator: Communicator, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Gradients of this rank's keys and values: the sum over all ranks that saw them, in ``dtype``."""
    if plan.sees_local_keys_only:
        return grad_k_SGK, grad_v_SGV
    grad_SG = torch.cat([grad_k_SGK, grad_v_SGV], -1)
    chunks, dims = (plan.num_chunks, plan.chunk_size), grad_SG.shape[1:]
    local_TG = grad_SG.new_zeros(plan.num_chunks * plan.chunk_size, *dims, dtype=dtype)
    gathered_NMW = grad_SG.new_zeros(plan.num_ranks, plan.num_chunks, plan.width, *dims, dtype=dtype)
    grads = grad_SG.split([r.tokens.stop - r.tokens.start for r in plan.ranges])
    for seen, grad in zip(plan.ranges, grads, strict=True):
        target = local_TG if seen.source is None else gathered_NMW[seen.source]
        target[seen.tokens] += grad
    if plan.width:
        local_TG.unflatten(0, chunks)[:, -plan.width :] += communicator.reduce_scatter(gathered_NMW).wait()
    return local_TG.split([grad_k_SGK.shape[-1], grad_v_SGV.shape[-1]], -1)


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
        grad_q, grad_k, grad_v = attention_backward(
            grad_out_THV, q_THK, k_SGK, v_SGV, out_THV, lse_TH, plan.queries, plan.keys, **how
        )
        grad_k, grad_v = _scatter(grad_k, grad_v, plan, communicator, lse_TH.dtype)
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
    """Attention over the packed sequence in one kernel call, after one all-gather of the keys that others may need.

    Nothing is merged and no transfer overlaps. The backward pass gathers again and reduces the gradients of keys and
    values in float32.

    Arguments and result as in :func:`minimax_train.parallel.context.softmax.softmax_attention_cp`.
    """
    return _AllGatherAttention.apply(q_THK, k_TGK, v_TGV, plan, communicator, scale, implementation)
