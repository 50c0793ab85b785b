"""Lightning attention on a row that several ranks share: LASP+, and the serial ring it replaces.

A chunk maps the state that enters it to the state that leaves it by ``leaving = own + carry * entering``: ``own`` is
what its tokens after the last document start contribute, ``carry`` is ``exp(-slope * length)`` where one document
covers the chunk and 0 where a document starts inside. So each rank sums the ``own`` states of its chunks, the ranks
exchange them, and each runs its chunks from the states that enter them (MiniMax-01, arXiv 2501.08313, section 2.2.4;
LASP-2, arXiv 2502.07563). The gradient of the exchange is the same exchange in the opposite direction; it runs beside
the gradient of q, which does not wait for it.

An own state takes only the tokens that have not decayed away at the chunk's end. And a head through whose carry nothing
passes sends its state to the next chunk and no further. The states of the other heads, the *far* ones, are exchanged in
one of three ways:

* ``lasp_plus``: one all-gather of the own states; every rank sums what it needs, in global chunk order.
* ``ring``: the states travel from chunk to chunk (LASP, arXiv 2404.02882): the serial baseline, for which all heads are
  far.
* ``scan``: the ring with the state cut in pieces that follow each other, so that all links work at once (the idea of
  ZeCO, arXiv 2507.01004); its time grows with ranks plus pieces and not with ranks times the whole state.

``docs/context-parallelism.md`` counts the bytes of this and of other orders.

Shape legend: T tokens on this rank, H heads, K key dim, V value dim, M chunks on this rank, J chunks on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimax_train.documents import to_device
from minimax_train.kernels.dispatch import AUTO
from minimax_train.kernels.lightning import lightning_attention, lightning_parts
from minimax_train.kernels.lightning.parts import REACH, Parts
from minimax_train.parallel.communicator import Communicator, Pending
from minimax_train.parallel.context.layout import Chunk, SequenceShard
from minimax_train.parallel.cost import H200, Machine

METHODS = ("lasp_plus", "scan", "ring")
SCAN_PIECES = 8


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
    if not any(chunk.continues_before for chunk in shard.chunks):  # the same answer on every rank
        documents = shard.documents
        return lightning_attention(q_THK, k_THK, v_THV, slopes_H, documents, implementation=implementation)[0]
    exchange = _Exchange(slopes_H, shard, communicator, method)
    return _SharedLightning.apply(q_THK, k_THK, v_THV, slopes_H, exchange, lightning_parts(q_THK, implementation))


def choose_method(state_bytes: int, num_chunks: int, num_ranks: int, machine: Machine = H200) -> str:
    """``lasp_plus`` or ``scan``, whichever the cost model gives less time for.

    The all-gather takes one start and moves every other rank's states into each rank; the scan takes a start per hop
    and per piece, and moves one state per chunk through each rank:

        lasp_plus:  an all-gather of chunks / ranks * state
        scan:       (chunks - 1 + pieces - 1) send-receives of state / pieces

    Args:
        state_bytes: one chunk's state of the far heads on this rank.
        num_chunks, num_ranks: of the layout.
        machine: the cost model.
    """
    link = machine.link(num_ranks)
    gather = link.all_gather_s(num_chunks / num_ranks * state_bytes, num_ranks)
    scan = (num_chunks + SCAN_PIECES - 2) * link.send_receive_s(state_bytes / SCAN_PIECES)
    return "lasp_plus" if gather <= scan else "scan"


class _SharedLightning(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THK, k_THK, v_THV, slopes_H, exchange: _Exchange, parts: Parts):
        documents = exchange.shard.documents
        first, _ = _edge_segments(exchange.shard)
        giving = _giving_segments(exchange.shard, backwards=False)
        own_MHKV, crossing = parts.states(k_THK, v_THV, slopes_H, documents, giving, reverse=False)
        entering_MHKV = exchange.start(own_MHKV, backwards=False)()
        out_THV = parts.forward(q_THK, k_THK, v_THV, slopes_H, documents, entering_MHKV, first, crossing)
        ctx.save_for_backward(q_THK, k_THK, v_THV, slopes_H, entering_MHKV, crossing)
        ctx.exchange, ctx.parts = exchange, parts
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THV):
        q_THK, k_THK, v_THV, slopes_H, entering_MHKV, crossing = ctx.saved_tensors
        exchange, parts = ctx.exchange, ctx.parts
        documents = exchange.shard.documents
        first, last = _edge_segments(exchange.shard)
        giving = _giving_segments(exchange.shard, backwards=True)
        own_MHKV, grad_crossing = parts.states(q_THK, grad_THV, slopes_H, documents, giving, reverse=True)
        finish = exchange.start(own_MHKV, backwards=True)
        grad_q = parts.backward_q(grad_THV, k_THK, v_THV, slopes_H, documents, entering_MHKV, first, crossing)
        grad_k, grad_v = parts.backward_kv(
            grad_THV, q_THK, k_THK, v_THV, slopes_H, documents, finish(), last, grad_crossing
        )
        return grad_q, grad_k, grad_v, None, None, None


def _giving_segments(shard: SequenceShard, *, backwards: bool) -> tuple[int | None, ...]:
    """The last (backwards: first) segment of each of this rank's chunks; None where nobody will take its state."""
    first, last = _edge_segments(shard)
    gives_M = (_links(chunk, backwards=backwards)[1] for chunk in shard.mine)
    return tuple(n if gives else None for n, gives in zip(first if backwards else last, gives_M, strict=True))


def _links(chunk: Chunk, *, backwards: bool) -> tuple[bool, bool]:
    """Whether a chunk takes a state from the one before it and gives one to the one after it; backwards the reverse."""
    links = chunk.continues_before, chunk.continues_after
    return links[::-1] if backwards else links


def _edge_segments(shard: SequenceShard) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Index of the first and of the last segment of each of this rank's chunks among its segments."""
    ends = tuple(accumulate(len(chunk.edges) - 1 for chunk in shard.mine))
    return (0, *ends[:-1]), tuple(end - 1 for end in ends)


class _Exchange:
    """From what chunks leave on their own to what enters them, or backwards to the gradient of what they leave."""

    def __init__(self, slopes_H: Tensor, shard: SequenceShard, communicator: Communicator, method: str) -> None:
        self.slopes_H, self.shard, self.communicator, self.method = slopes_H, shard, communicator, method

    def start(self, x_MHKV: Tensor, *, backwards: bool) -> Callable[[], Tensor]:
        """For each of this rank's chunks, the decayed sum of ``x`` over the chunks before it in its document.

        Backwards: over the chunks after it. Either way the sum obeys a recurrence from each chunk to the next,
        ``sum = x + carry * sum of the one before``, which the chain follows and the all-gather unrolls.

        Returns:
            What waits for the sum and returns it, ``[M, H, K, V]``.
        """
        where = (self.shard, self.communicator)
        if self.method == "ring":
            return lambda: _chained_sum(x_MHKV, self.slopes_H, *where, 1, backwards=backwards)
        near = count_near_heads(self.slopes_H, self.shard.chunk_size, x_MHKV.dtype)
        x_near, x_far, far_slopes = x_MHKV[:, :near], x_MHKV[:, near:], self.slopes_H[near:]
        parts = []
        if x_near.shape[1]:
            parts.append(_start_neighbours(x_near, *where, backwards=backwards))
        if x_far.shape[1]:
            method = self.method
            if method == AUTO:
                method = choose_method(x_far[0].nbytes, len(self.shard.chunks), self.communicator.size)
            if method == "lasp_plus":
                parts.append(_start_gathered_sum(x_far, far_slopes, *where, backwards=backwards))
            else:
                parts.append(lambda: _chained_sum(x_far, far_slopes, *where, SCAN_PIECES, backwards=backwards))
        return lambda: torch.cat([finish() for finish in parts], 1) if len(parts) > 1 else parts[0]()


@lru_cache(maxsize=1024)
def count_near_heads(slopes_H: Tensor, chunk_size: int, dtype: torch.dtype) -> int:
    """How many heads, from the first on, forget whatever enters a chunk before its end, for states of a dtype.

    Waits for the device once per tensor of slopes: they must not change.
    """
    outlives = (slopes_H.cpu() * chunk_size <= REACH[dtype]).tolist()
    return outlives.index(True) if True in outlives else len(outlives)


def _start_neighbours(
    x_MHKV: Tensor, shard: SequenceShard, communicator: Communicator, *, backwards: bool
) -> Callable[[], Tensor]:
    """Each of this rank's chunks takes what the chunk before it leaves (backwards: after it)."""
    step = 1 if backwards else -1
    taken_MHKV = torch.empty_like(x_MHKV, memory_format=torch.contiguous_format)
    sends, receives = {}, {}
    for m, chunk in enumerate(shard.mine):
        takes, gives = _links(chunk, backwards=backwards)
        if takes:
            giver = shard.chunks[chunk.index + step]
            if giver.rank == shard.rank:
                taken_MHKV[m] = x_MHKV[shard.mine.index(giver)]
            else:
                receives[giver.rank] = taken_MHKV[m]
        else:
            taken_MHKV[m] = 0
        if gives and (taker := shard.chunks[chunk.index - step].rank) != shard.rank:
            sends[taker] = x_MHKV[m]
    pending = communicator.exchange(sends, receives)
    return lambda: (pending.wait(), taken_MHKV)[1]


def _start_gathered_sum(
    x_MHKV: Tensor, slopes_H: Tensor, shard: SequenceShard, communicator: Communicator, *, backwards: bool
) -> Callable[[], Tensor]:
    pending = communicator.all_gather(x_MHKV)
    device = x_MHKV.device
    reach_MJ = shard.derive(("reach", device, backwards), lambda shard: _reach(shard, device, backwards=backwards))
    tokens_MJ = reach_MJ.clamp(min=0).to(x_MHKV.dtype) * shard.chunk_size
    weight_HMJ = torch.exp(-slopes_H.to(x_MHKV.dtype)[:, None, None] * tokens_MJ) * (reach_MJ >= 0)

    def finish() -> Tensor:
        states_HJS = pending.wait().flatten(0, 1).flatten(2).transpose(0, 1)
        return (weight_HMJ @ states_HJS).transpose(0, 1).reshape(x_MHKV.shape)

    return finish


def _reach(shard: SequenceShard, device: torch.device, *, backwards: bool) -> Tensor:
    """Chunks between each of this rank's chunks and each chunk before it (backwards: after it) in its document.

    Returns:
        int64 ``[M, J]``, -1 where no document is shared; J in the order of an all-gather: by rank, then as they lie.
    """
    gathered = {c.index: j for j, c in enumerate(sorted(shard.chunks, key=lambda c: (c.rank, c.index)))}
    reach_MJ = torch.full((len(shard.mine), len(gathered)), -1)
    step = 1 if backwards else -1
    for m, chunk in enumerate(shard.mine):
        linked, between = _links(chunk, backwards=backwards)[0], 0
        while linked:
            other = shard.chunks[chunk.index + step * (between + 1)]
            reach_MJ[m, gathered[other.index]] = between
            linked, between = other.is_inside_one_document, between + 1
    return to_device(reach_MJ, device)


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
        takes, gives = _links(chunk, backwards=backwards)
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
