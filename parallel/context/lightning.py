"""Lightning attention on a packed sequence that context-parallel ranks share: LASP+, and the serial ring it replaces.

The *local state* of a chunk is what its tokens after the last document start add up to. The state after the chunk is

    final = local + decay * initial        decay: exp(-slope * chunk size) if one document covers the chunk, else 0

and it is the initial state of the next chunk, if a document crosses the edge between them. With local states L0, ..:

    document   AAAAAAAAAAAAAAAABBBBBBBBBBBBBBBBBBBBBBBBCCCC
    chunk      |--- 0 ----|--- 1 ----|--- 2 ----|--- 3 ----|
    initial    0          L0         L1         L2 + decay * L1

So each rank sums the local states of its chunks, the ranks exchange them, and each rank runs attention over its chunks
from their initial states (MiniMax-01, arXiv 2501.08313, section 2.2.4; LASP-2, arXiv 2502.07563): the state passing of
Mamba-2, over ranks. Backward is the mirror image: the local part of the gradient of a chunk's initial state comes from
its tokens before the first document end; the same exchange from the last chunk to the first turns it into the gradients
of final states, while the gradient of q, which does not need them, is computed.

A head has a short memory if nothing outlives a whole chunk: it takes its initial state from the chunk before it and
none further. States of the other heads, with a long memory, are exchanged in one of three ways:

* ``lasp_plus``: one all-gather of the local states; every rank sums what its chunks need.
* ``ring``: final states are passed from chunk to chunk (LASP, arXiv 2404.02882). This is the serial baseline, and takes
  all heads.
* ``scan``: the ring with the heads in pieces that follow each other, so that all links work at once (the idea of ZeCO,
  arXiv 2507.01004). Its time grows with (chunks + pieces) * piece instead of chunks * whole state.

``docs/context-parallelism.md`` has an example and the costs.

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
from minimax_train.kernels.lightning import lightning_attention, lightning_state_passing
from minimax_train.kernels.lightning.state_passing import DECAY_CUTOFF, StatePassing
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
        communicator: the ranks that share the sequence.
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
    phases = lightning_state_passing(q_THK, implementation)
    return _ContextParallelLightning.apply(q_THK, k_THK, v_THV, slopes_H, shard, communicator, method, phases)


def choose_method(state_bytes: int, num_chunks: int, num_ranks: int, machine: Machine = H200) -> str:
    """``lasp_plus`` or ``scan``, whichever the cost model gives less time for.

    The all-gather takes one start and moves every other rank's states into each rank; the scan takes a start per hop
    and per piece, and moves one state per chunk through each rank:

        lasp_plus:  an all-gather of chunks / ranks * state
        scan:       (chunks - 1 + pieces - 1) send-receives of state / pieces

    Args:
        state_bytes: one chunk's state of the long-memory heads on this rank.
        num_chunks, num_ranks: of the layout.
        machine: the cost model.
    """
    link = machine.link(num_ranks)
    gather = link.all_gather_s(num_chunks / num_ranks * state_bytes, num_ranks)
    scan = (num_chunks + SCAN_PIECES - 2) * link.send_receive_s(state_bytes / SCAN_PIECES)
    return "lasp_plus" if gather <= scan else "scan"


class _ContextParallelLightning(torch.autograd.Function):
    """The documents that the kernels see are this rank's segments. Initial states belong to the first segment of each
    chunk, final states to the last, so a list of M segment indices says whose states the M states are."""

    @staticmethod
    def forward(ctx, q_THK, k_THK, v_THV, slopes_H, shard, communicator, method, phases: StatePassing):
        where, (first, last) = (slopes_H, shard.documents), _edge_segments(shard)
        passed = _passed(last, shard, backwards=False)
        local_MHKV, split_states = phases.local_states(k_THK, v_THV, *where, passed, reverse=False)
        initial_MHKV = _start_exchange(local_MHKV, slopes_H, shard, communicator, method, backwards=False)()
        out_THV = phases.forward(q_THK, k_THK, v_THV, *where, initial_MHKV, first, split_states)
        ctx.save_for_backward(q_THK, k_THK, v_THV, initial_MHKV, split_states)
        # Not one of these: hooks for saved tensors give another, of which count_short_memory_heads would ask anew.
        ctx.slopes_H = slopes_H
        ctx.shard, ctx.communicator, ctx.method, ctx.phases = shard, communicator, method, phases
        return out_THV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THV):
        q_THK, k_THK, v_THV, initial_MHKV, split_states = ctx.saved_tensors
        slopes_H, shard, phases = ctx.slopes_H, ctx.shard, ctx.phases
        where, (first, last) = (slopes_H, shard.documents), _edge_segments(shard)
        passed = _passed(first, shard, backwards=True)
        local_MHKV, grad_split_states = phases.local_states(q_THK, grad_THV, *where, passed, reverse=True)
        finish = _start_exchange(local_MHKV, slopes_H, shard, ctx.communicator, ctx.method, backwards=True)
        grad_q = phases.backward_q(grad_THV, k_THK, v_THV, *where, initial_MHKV, first, split_states)
        grad_final_MHKV = finish()
        grad_k, grad_v = phases.backward_kv(
            grad_THV, q_THK, k_THK, v_THV, *where, grad_final_MHKV, last, grad_split_states
        )
        return grad_q, grad_k, grad_v, None, None, None, None, None


def _edge_segments(shard: SequenceShard) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Index of the first and of the last segment of each of this rank's chunks among its segments."""
    ends = tuple(accumulate(len(chunk.edges) - 1 for chunk in shard.mine))
    return (0, *ends[:-1]), tuple(end - 1 for end in ends)


def _passed(segments: tuple[int, ...], shard: SequenceShard, *, backwards: bool) -> tuple[int | None, ...]:
    """The given segments, one of each of this rank's chunks; None where no other chunk takes the chunk's state."""
    targets = (_neighbours(chunk, shard, backwards=backwards)[1] for chunk in shard.mine)
    return tuple(n if target else None for n, target in zip(segments, targets, strict=True))


def _neighbours(chunk: Chunk, shard: SequenceShard, *, backwards: bool) -> tuple[Chunk | None, Chunk | None]:
    """The chunk from which this one takes a state and the one to which it passes its own, where a document crosses."""
    before = shard.chunks[chunk.index - 1] if chunk.continues_before else None
    after = shard.chunks[chunk.index + 1] if chunk.continues_after else None
    return (after, before) if backwards else (before, after)


def _start_exchange(
    local_MHKV: Tensor,
    slopes_H: Tensor,
    shard: SequenceShard,
    communicator: Communicator,
    method: str,
    *,
    backwards: bool,
) -> Callable[[], Tensor]:
    """Start the exchange that turns the local states of all chunks into the initial states of this rank's.

    The initial state of a chunk is the decayed sum of the local states of the chunks before it in its document.
    Backwards: after it, which turns the local parts of the gradients of initial states into those of final states.

    Returns:
        What waits for the exchange and returns the initial states, ``[M, H, K, V]``.
    """
    where, H = (shard, communicator), len(slopes_H)
    short = 0 if method == "ring" else count_short_memory_heads(slopes_H, shard.chunk_size, local_MHKV.dtype)
    long_MHKV, slopes_H = local_MHKV[:, short:], slopes_H[short:]
    if method == AUTO and short < H:
        method = choose_method(long_MHKV[0].nbytes, len(shard.chunks), communicator.size)
    started = []
    if short:
        started.append(_start_from_neighbours(local_MHKV[:, :short], *where, backwards=backwards))
    if short < H and method == "lasp_plus":
        started.append(_start_all_gather(long_MHKV, slopes_H, *where, backwards=backwards))
    elif short < H:
        pieces = 1 if method == "ring" else SCAN_PIECES
        started.append(lambda: _pass_along(long_MHKV, slopes_H, *where, pieces, backwards=backwards))
    return lambda: torch.cat([finish() for finish in started], 1) if len(started) > 1 else started[0]()


@lru_cache(maxsize=1024)
def count_short_memory_heads(slopes_H: Tensor, chunk_size: int, dtype: torch.dtype) -> int:
    """How many heads, from the first on, have a short memory, for states of a dtype.

    Waits for the device once per tensor of slopes: they must not change.
    """
    outlives = (slopes_H.cpu() * chunk_size <= DECAY_CUTOFF[dtype]).tolist()
    return outlives.index(True) if True in outlives else len(outlives)


def _start_from_neighbours(
    local_MHKV: Tensor, shard: SequenceShard, communicator: Communicator, *, backwards: bool
) -> Callable[[], Tensor]:
    """The initial state of each of this rank's chunks is the local state of the one before it (backwards: after it)."""
    initial_MHKV = torch.empty_like(local_MHKV, memory_format=torch.contiguous_format)
    sends, receives = {}, {}
    for chunk in shard.mine:
        source, target = _neighbours(chunk, shard, backwards=backwards)
        if source is None:
            initial_MHKV[chunk.place] = 0
        elif source.rank == shard.rank:
            initial_MHKV[chunk.place] = local_MHKV[source.place]
        else:
            receives[source.rank] = initial_MHKV[chunk.place]
        if target is not None and target.rank != shard.rank:
            sends[target.rank] = local_MHKV[chunk.place]
    pending = communicator.exchange(sends, receives)
    return lambda: (pending.wait(), initial_MHKV)[1]


def _start_all_gather(
    local_MHKV: Tensor, slopes_H: Tensor, shard: SequenceShard, communicator: Communicator, *, backwards: bool
) -> Callable[[], Tensor]:
    """Gather the local states of all chunks; one matrix product sums what this rank's chunks need."""
    pending, device = communicator.all_gather(local_MHKV), local_MHKV.device
    key = ("distances", device, backwards)
    distance_MJ = shard.derive(key, lambda shard: _distances(shard, device, backwards=backwards))
    tokens_MJ = distance_MJ.clamp(min=0).to(local_MHKV.dtype) * shard.chunk_size
    weight_HMJ = torch.exp(-slopes_H.to(local_MHKV.dtype)[:, None, None] * tokens_MJ) * (distance_MJ >= 0)

    def finish() -> Tensor:
        local_HJS = pending.wait().flatten(0, 1).flatten(2).transpose(0, 1)
        return (weight_HMJ @ local_HJS).transpose(0, 1).reshape(local_MHKV.shape)

    return finish


def _distances(shard: SequenceShard, device: torch.device, *, backwards: bool) -> Tensor:
    """Chunks between each of this rank's chunks and each chunk before it (backwards: after it) in its document.

    Returns:
        int64 ``[M, J]``, -1 where no document is shared; J in the order of an all-gather: by rank, then as they lie.
    """
    distance_MJ, order = [], sorted(shard.chunks, key=lambda c: (c.rank, c.index))
    for chunk in shard.mine:
        first, end = chunk.document_start // shard.chunk_size, -(-chunk.document_end // shard.chunk_size)
        sources = range(chunk.index + 1, end) if backwards else range(first, chunk.index)
        distance_MJ.append([abs(c.index - chunk.index) - 1 if c.index in sources else -1 for c in order])
    return to_device(torch.tensor(distance_MJ), device)


def _pass_along(
    local_MHKV: Tensor,
    slopes_H: Tensor,
    shard: SequenceShard,
    communicator: Communicator,
    pieces: int,
    *,
    backwards: bool,
) -> Tensor:
    """Each chunk waits for its initial state and passes its final state on to the next, some heads at a time."""
    decay_H11 = torch.exp(-slopes_H.to(local_MHKV.dtype) * shard.chunk_size)[:, None, None]
    heads = [slice(int(h[0]), int(h[-1]) + 1) for h in torch.arange(len(slopes_H)).tensor_split(pieces) if len(h)]
    initial_MHKV = torch.zeros_like(local_MHKV)
    sent: list[Pending] = []
    for chunk in shard.mine[::-1] if backwards else shard.mine:
        m = chunk.place
        source, target = _neighbours(chunk, shard, backwards=backwards)
        for piece in heads:
            if source is not None and source.rank != shard.rank:
                communicator.exchange({}, {source.rank: initial_MHKV[m, piece]}).wait()
            if target is None:
                continue
            final_hKV = local_MHKV[m, piece]
            if chunk.is_inside_one_document:
                final_hKV = final_hKV + decay_H11[piece] * initial_MHKV[m, piece]
            if target.rank == shard.rank:
                initial_MHKV[target.place, piece] = final_hKV
            else:
                sent.append(communicator.exchange({target.rank: final_hKV}, {}))
    for pending in sent:
        pending.wait()
    return initial_MHKV
