"""Lightning attention on a row that several ranks share: LASP+, and the serial ring it replaces.

A chunk maps the state that enters it to the state that leaves it by ``leaving = own + carry * entering``: ``own`` is
what its tokens after the last document start contribute, ``carry`` is ``exp(-slope * length)`` where one document
covers the chunk and 0 where a document starts inside. So each rank runs its chunks as if nothing entered, the ranks
exchange the small ``own`` states, and what an entering state adds is added to the tokens before the chunk's first
document start (MiniMax-01, arXiv 2501.08313, section 2.2.4; LASP-2, arXiv 2502.07563). The gradient of the exchange
is the same exchange in the opposite direction.

Three exchanges compute the same entering states:

* ``lasp_plus``: one all-gather of the own states; every rank sums what it needs, in global chunk order.
* ``ring``: the states travel from chunk to chunk (LASP, arXiv 2404.02882): the serial baseline.
* ``scan``: the ring with the state cut in pieces that follow each other, so that all links work at once (the idea of
  ZeCO, arXiv 2507.01004); its time grows with ranks plus pieces and not with ranks times the whole state.

Shape legend: T tokens on this rank, H heads, K key dim, V value dim, N segments on this rank, M chunks on this rank,
J chunks on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.lightning import lightning_attention
from minimax_train.parallel.communicator import Communicator, Pending
from minimax_train.parallel.layout import SequenceShard

METHODS = ("lasp_plus", "scan", "ring")
SCAN_PIECES = 8

# Seconds to start a transfer, and bytes per second into one GPU. Within a node: two H200 over NVLink, an all-gather of
# 4 MB in 39 us and a send-receive of 1 GB in 2.98 ms. Between nodes: a 400 Gb/s network card per GPU.
LATENCY_S = 20e-6
NODE_BYTES_PER_S, NETWORK_BYTES_PER_S = 335e9, 50e9
RANKS_PER_NODE = 8


def lightning_attention_cp(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    slopes_H: Tensor,
    shard: SequenceShard,
    communicator: Communicator,
    *,
    method: str = AUTO,
    implementation: str = AUTO,
) -> Tensor:
    """Lightning attention over documents that may cross ranks: this rank's part of the output.

    Args:
        q_THK, k_THK, v_THV, slopes_H: as for :func:`minimax_train.kernels.lightning.lightning_attention`, this rank's
            tokens in the order of the shard.
        shard: which tokens those are.
        communicator: the ranks that share the row.
        method: ``lasp_plus``, ``scan``, ``ring``, or ``auto`` for the cheapest by :func:`choose_method`.
        implementation: of the attention within chunks.

    Returns:
        ``[T, H, V]`` in the dtype of v, differentiable in q, k and v.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in (AUTO, *METHODS):
        raise ValueError(f"parallel.linear_cp={method!r}: must be one of {', '.join([AUTO, *METHODS])}")
    crosses = any(chunk.continues_before for chunk in shard.chunks)  # the same answer on every rank
    out_THV, own_MHKV = lightning_attention(
        q_THK,
        k_THK,
        v_THV,
        slopes_H,
        shard.documents,
        final_state_of=_last_segments(shard) if crosses else None,
        implementation=implementation,
    )
    if not crosses:
        return out_THV
    if method == AUTO:
        method = choose_method(own_MHKV[0].nbytes, len(shard.chunks), communicator.size)
    entering_MHKV = _EnteringStates.apply(own_MHKV, slopes_H, shard, communicator, method)
    return _AddEntering.apply(out_THV, q_THK, entering_MHKV, slopes_H, shard)


def choose_method(state_bytes: int, num_chunks: int, num_ranks: int) -> str:
    """``lasp_plus`` or ``scan``, whichever the cost model gives less time for.

    The all-gather takes one start and moves every other rank's states into each rank; the scan takes a start per hop
    and per piece, and moves one state per chunk through each rank:

        lasp_plus:  latency + (ranks - 1) / ranks * chunks * state / rate
        scan:       (chunks - 1 + pieces - 1) * (latency + state / pieces / rate)

    Args:
        state_bytes: one chunk's state of all heads on this rank.
        num_chunks, num_ranks: of the layout.
    """
    rate = NODE_BYTES_PER_S if num_ranks <= RANKS_PER_NODE else NETWORK_BYTES_PER_S
    gather = LATENCY_S + (num_ranks - 1) / num_ranks * num_chunks * state_bytes / rate
    scan = (num_chunks + SCAN_PIECES - 2) * (LATENCY_S + state_bytes / SCAN_PIECES / rate)
    return "lasp_plus" if gather <= scan else "scan"


def _last_segments(shard: SequenceShard) -> list[int]:
    """Index of the last segment of each of this rank's chunks among its segments."""
    counts = [len(chunk.edges) - 1 for chunk in shard.mine]
    return [sum(counts[: i + 1]) - 1 for i in range(len(counts))]


class _EnteringStates(torch.autograd.Function):
    """States that enter this rank's chunks, from the states that all chunks leave on their own: ``[M, H, K, V]``."""

    @staticmethod
    def forward(ctx, own_MHKV, slopes_H, shard, communicator, method):
        ctx.arguments = (slopes_H, shard, communicator, method)
        return _exchange(own_MHKV, *ctx.arguments, backwards=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_MHKV):
        return _exchange(grad_MHKV.contiguous(), *ctx.arguments, backwards=True), None, None, None, None


def _exchange(
    x_MHKV: Tensor, slopes_H: Tensor, shard: SequenceShard, communicator: Communicator, method: str, *, backwards: bool
) -> Tensor:
    """For each of this rank's chunks, the decayed sum of ``x`` over the chunks before it in its document.

    Backwards: over the chunks after it. Either way the sum obeys a recurrence from each chunk to the next,
    ``sum = x + carry * sum of the one before``, which the chain follows and the all-gather unrolls.
    """
    if method == "lasp_plus":
        return _gathered_sum(x_MHKV, slopes_H, shard, communicator, backwards=backwards)
    pieces = SCAN_PIECES if method == "scan" else 1
    return _chained_sum(x_MHKV, slopes_H, shard, communicator, pieces, backwards=backwards)


def _gathered_sum(
    x_MHKV: Tensor, slopes_H: Tensor, shard: SequenceShard, communicator: Communicator, *, backwards: bool
) -> Tensor:
    pending = communicator.all_gather(x_MHKV)
    reach_MJ = _reach(shard, x_MHKV.device, backwards=backwards)
    tokens_MJ = reach_MJ.clamp(min=0).to(x_MHKV.dtype) * shard.chunk_size
    weight_HMJ = torch.exp(-slopes_H.to(x_MHKV.dtype)[:, None, None] * tokens_MJ) * (reach_MJ >= 0)
    states_HJS = pending.wait().flatten(0, 1).flatten(2).transpose(0, 1)
    return (weight_HMJ @ states_HJS).transpose(0, 1).reshape(x_MHKV.shape)


@lru_cache(maxsize=8)
def _reach(shard: SequenceShard, device: torch.device, *, backwards: bool) -> Tensor:
    """Chunks between each of this rank's chunks and each chunk before it (backwards: after it) in its document.

    Returns:
        int64 ``[M, J]``, -1 where no document is shared; J in the order of an all-gather: by rank, then as they lie.
    """
    gathered = {c.index: j for j, c in enumerate(sorted(shard.chunks, key=lambda c: (c.rank, c.index)))}
    reach_MJ = torch.full((len(shard.mine), len(gathered)), -1)
    step = 1 if backwards else -1
    for m, chunk in enumerate(shard.mine):
        linked, between = (chunk.continues_after if backwards else chunk.continues_before), 0
        while linked:
            other = shard.chunks[chunk.index + step * (between + 1)]
            reach_MJ[m, gathered[other.index]] = between
            linked, between = other.is_inside_one_document, between + 1
    return reach_MJ.to(device, non_blocking=True)


def _chained_sum(
    x_MHKV: Tensor,
    slopes_H: Tensor,
    shard: SequenceShard,
    communicator: Communicator,
    pieces: int,
    *,
    backwards: bool,
) -> Tensor:
    chunks = shard.chunks[::-1] if backwards else shard.chunks
    carry_H11 = torch.exp(-slopes_H.to(x_MHKV.dtype) * shard.chunk_size)[:, None, None]
    heads = [slice(int(h[0]), int(h[-1]) + 1) for h in torch.arange(len(slopes_H)).tensor_split(pieces) if len(h)]
    sum_MHKV = torch.zeros_like(x_MHKV)
    sent: list[Pending] = []
    for place, chunk in enumerate(chunks):
        if chunk.rank != shard.rank:
            continue
        m = shard.mine.index(chunk)
        takes, gives = chunk.continues_before, chunk.continues_after
        if backwards:
            takes, gives = gives, takes
        for piece in heads:
            if takes and (giver := chunks[place - 1].rank) != shard.rank:
                communicator.exchange({}, {giver: sum_MHKV[m, piece]}).wait()
            if not gives:
                continue
            leaving_hKV = x_MHKV[m, piece]
            if takes and len(chunk.edges) == 2:
                leaving_hKV = leaving_hKV + carry_H11[piece] * sum_MHKV[m, piece]
            taker = chunks[place + 1]
            if taker.rank == shard.rank:
                sum_MHKV[shard.mine.index(taker), piece] = leaving_hKV
            else:
                sent.append(communicator.exchange({taker.rank: leaving_hKV}, {}))
    for pending in sent:
        pending.wait()
    return sum_MHKV


class _AddEntering(torch.autograd.Function):
    """Add ``exp(-slope * (t + 1)) entering^T q_t`` to the tokens t of each chunk's first segment, in place.

    Takes the entering states of every chunk, whether or not a token needs them, so that every rank reaches the
    exchange of gradients.
    """

    @staticmethod
    def forward(ctx, out_THV, q_THK, entering_MHKV, slopes_H, shard):
        ctx.save_for_backward(q_THK, entering_MHKV, slopes_H)
        ctx.shard = shard
        ctx.mark_dirty(out_THV)
        for m, tokens, decay_HL1 in _entered(shard, slopes_H, entering_MHKV.dtype):
            q_HLK = q_THK[tokens].to(entering_MHKV.dtype).transpose(0, 1)
            added_HLV = (q_HLK @ entering_MHKV[m]) * decay_HL1
            out_THV[tokens] += added_HLV.transpose(0, 1).to(out_THV.dtype)
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THV):
        q_THK, entering_MHKV, slopes_H = ctx.saved_tensors
        dtype = entering_MHKV.dtype
        grad_q_THK, grad_entering_MHKV = torch.zeros_like(q_THK), torch.zeros_like(entering_MHKV)
        for m, tokens, decay_HL1 in _entered(ctx.shard, slopes_H, dtype):
            grad_HLV = grad_THV[tokens].to(dtype).transpose(0, 1) * decay_HL1
            q_HLK = q_THK[tokens].to(dtype).transpose(0, 1)
            grad_q_THK[tokens] = (grad_HLV @ entering_MHKV[m].mT).transpose(0, 1).to(q_THK.dtype)
            grad_entering_MHKV[m] = q_HLK.mT @ grad_HLV
        return grad_THV, grad_q_THK, grad_entering_MHKV, None, None


def _entered(shard: SequenceShard, slopes_H: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice, Tensor]]:
    """Each of this rank's chunks that a state enters: its number, its first segment, and the decay to each token."""
    for m, chunk in enumerate(shard.mine):
        if chunk.continues_before:
            tokens = shard.local(chunk.first_segment)
            steps_L = torch.arange(1, tokens.stop - tokens.start + 1, device=slopes_H.device, dtype=dtype)
            yield m, tokens, torch.exp(-slopes_H.to(dtype)[:, None] * steps_L)[..., None]
