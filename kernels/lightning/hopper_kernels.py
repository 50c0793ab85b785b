"""The kernels of :mod:`minimax_train.kernels.lightning.triton_kernels`, scheduled by hand for Hopper.

Triton waits for every matrix product before it starts the next, which leaves the tensor cores idle for most of this
chain of four. Here the three that need only the state before the tile run back to back (scores, state times x, state
update), the decay mask is applied while the last two run, and TMA fills STAGES buffers ahead.
Written in Gluon, Triton's lower level: needs compute capability 9.0, two-byte elements and 16-byte-aligned strides.

Shape legend and docstrings of kernels: as in ``triton_kernels``.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minimax_train.kernels.lightning import triton_kernels

# Buffers per kernel: as many as fit in the 227 KB of shared memory at K = V = 128.
STAGES, STAGES_LOCAL, STAGES_BACKWARD = 3, 4, 2

DECAY_CUTOFF = gl.constexpr(triton_kernels.DECAY_CUTOFF.value)
BEGINS = gl.constexpr(triton_kernels.BEGINS.value)
ENDS = gl.constexpr(triton_kernels.ENDS.value)
MIN_TILES = gl.constexpr(triton_kernels.MIN_TILES.value)
LENGTH_SHIFT = gl.constexpr(triton_kernels.LENGTH_SHIFT.value)


# Renamed between Triton 3.6 and 3.8.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

_ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class _Layout(gl.NVMMASharedLayout):
    """A layout that spells itself once: the launcher asks every descriptor of every call for it."""

    def __repr__(self) -> str:
        text = self.__dict__.get("text")
        if text is None:
            text = super().__repr__().replace("_Layout", "NVMMASharedLayout")
            object.__setattr__(self, "text", text)
        return text


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> _Layout:
    default = gl.NVMMASharedLayout.get_default_for([1, rows, columns], _ELEMENT[dtype])
    return _Layout(default.swizzle_byte_width, default.element_bitwidth, default.rank)


def descriptors(*blocks: tuple[Tensor, int, int]) -> list[TensorDescriptor]:
    """How TMA sees each ``(x [T, H, K], rows, columns)``: as ``[H, T, K]``, that many tokens of one head at a time."""
    result = []
    for x_THK, rows, columns in blocks:
        T, H, K = x_THK.shape
        stride_t, stride_h, _ = x_THK.stride()
        layout = _layout(rows, columns, x_THK.dtype)
        result.append(TensorDescriptor(x_THK, [H, T, K], [stride_h, stride_t, 1], [1, rows, columns], layout))
    return result


@gluon.jit
def _fetch(desc, h, start, column, bar, tile, wanted):
    tma.async_copy_global_to_shared(desc, [h, start, column], bar, tile, pred=wanted)


@gluon.jit
def _uniform(x):
    """The same number, in a way that shows the assembler that all threads have it.

    What a warp group is handed comes through shared memory. Of a loop with such bounds the assembler takes every index
    to differ between threads, and moves the operands of each matrix product to uniform registers anew; so it does for
    whatever follows a branch on a number that was loaded.
    """
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _first_tile(num_tiles, subsplit, num_subsplits):
    """The tile that a sub-split begins with."""
    return (num_tiles.to(gl.int64) * subsplit // num_subsplits).to(gl.int32)


@gluon.jit
def _state_at_boundary(
    local, initial, slope, starts, document_ids, rows, cu_seqlens,
    h, boundary, edge, num_tiles, num_subsplits, PER_SPLIT,
    local_f, local_h, local_k, local_v, initial_n, initial_h, initial_k, initial_v,
    rows_k, columns_v, inside, state,
    REVERSE: gl.constexpr, HAS_INITIAL: gl.constexpr, INITIAL_MAPPED: gl.constexpr, SUBSPLITS: gl.constexpr,
):  # fmt: skip
    """``state`` plus the state at tile ``boundary``, where sub-split ``edge`` meets the one before it."""
    line: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    is_open = boundary < num_tiles if REVERSE else boundary > 0
    if is_open:
        boundary_token = gl.load(starts + boundary)
        document = gl.load(document_ids + boundary)
        document_start = gl.load(cu_seqlens + document)
        document_end = gl.load(cu_seqlens + document + 1)
        begun = boundary_token > document_start
        subsplits = gl.arange(0, SUBSPLITS, layout=line)
        ends_token = gl.load(
            starts + _first_tile(num_tiles, subsplits if REVERSE else subsplits + 1, num_subsplits),
            mask=subsplits < num_subsplits,
            other=0,
        )
        # The sub-splits of the same document whose local states have not decayed away: consecutive, up to the boundary.
        if REVERSE:
            remembered = (ends_token - boundary_token).to(gl.float32) * slope <= DECAY_CUTOFF
            exists = (subsplits >= edge) & (subsplits < num_subsplits)
            contributes = exists & remembered & begun & (ends_token < document_end)
            from_subsplit = edge
            to_subsplit = edge + gl.sum(contributes.to(gl.int32), 0)
        else:
            remembered = (boundary_token - ends_token).to(gl.float32) * slope <= DECAY_CUTOFF
            contributes = (subsplits < edge) & (ends_token > document_start) & remembered
            to_subsplit = edge
            from_subsplit = edge - gl.sum(contributes.to(gl.int32), 0)
        for f in range(from_subsplit, to_subsplit):
            end_token = gl.load(starts + _first_tile(num_tiles, f if REVERSE else f + 1, num_subsplits))
            away = end_token - boundary_token if REVERSE else boundary_token - end_token
            row = f - PER_SPLIT if REVERSE else f
            at = local + row.to(gl.int64) * local_f + h * local_h
            at = at + rows_k[:, None] * local_k + columns_v[None, :] * local_v
            state += gl.load(at, mask=inside, other=0.0) * gl.exp(-slope * away.to(gl.float32))
        if HAS_INITIAL:
            away = (document_end - boundary_token if REVERSE else boundary_token - document_start).to(gl.float32)
            n = gl.load(rows + document) if INITIAL_MAPPED else document
            if begun & (n >= 0) & (away * slope <= DECAY_CUTOFF):
                at = initial + n.to(gl.int64) * initial_n + h * initial_h
                at = at + rows_k[:, None] * initial_k + columns_v[None, :] * initial_v
                state += gl.load(at, mask=inside, other=0.0).to(gl.float32) * gl.exp(-slope * away)
    return state


@gluon.jit
def _memory_length(slope):
    """Tokens after which a contribution has decayed away; a little more, so that rounding cannot shorten it."""
    return gl.minimum(1.001 / gl.maximum(slope, 1e-12) * DECAY_CUTOFF + 2, 1.0e9).to(gl.int32)


@gluon.jit
def _accumulate(
    y_desc, z_desc, h, begin, end, slope, state, mma: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr
):
    """``state`` after the tokens from begin to end (REVERSE: from end to begin), of which there is at least one."""
    dtype: gl.constexpr = y_desc.dtype
    C: gl.constexpr = y_desc.block_type.shape[1]
    BK: gl.constexpr = y_desc.block_type.shape[2]
    BV: gl.constexpr = z_desc.block_type.shape[2]
    tile_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    tile_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], dtype)
    size: gl.constexpr = y_desc.block_type.nbytes + z_desc.block_type.nbytes
    count = (end - begin + C - 1) // C
    y_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, C, BK], y_desc.layout)
    z_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, C, BV], z_desc.layout)
    weighted_tiles = gl.allocate_shared_memory(dtype, [2, C, BV], tile_v)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    for i in gl.static_range(STAGES - 1):
        first = begin + (count - 1 - i if REVERSE else i) * C
        mbarrier.expect(bars.index(i), size, pred=i < count)
        _fetch(y_desc, h, first, 0, bars.index(i), y_tiles.index(i), i < count)
        _fetch(z_desc, h, first, 0, bars.index(i), z_tiles.index(i), i < count)
    slots = gl.arange(0, C, layout=gl.SliceLayout(1, mma))
    state = warpgroup_mma_init(state)
    for step in range(0, count):
        stage = step % STAGES
        length = gl.minimum(C, end - begin - (count - 1 - step if REVERSE else step) * C)
        away = slots + 1 if REVERSE else gl.maximum(length - 1 - slots, 0)
        weight = gl.where(slots < length, gl.exp(-slope * away.to(gl.float32)), 0.0)
        y_s = y_tiles.index(stage)._reinterpret(dtype, [C, BK], tile_k)
        z_s = z_tiles.index(stage)._reinterpret(dtype, [C, BV], tile_v)
        weighted_s = weighted_tiles.index(step % 2)
        mbarrier.wait(bars.index(stage), (step // STAGES) & 1)
        weighted_s.store((z_s.load(mma).to(gl.float32) * weight[:, None]).to(dtype))
        fence_async_shared()
        # The previous product reads the buffers refilled below, in every warp.
        state = warpgroup_mma_wait(0, deps=[state])
        thread_barrier()
        state = state * gl.exp(-slope * length.to(gl.float32))
        state = warpgroup_mma(y_s.permute((1, 0)), weighted_s, state, is_async=True)
        ahead = step + STAGES - 1
        free = ahead % STAGES
        first = begin + (count - 1 - ahead if REVERSE else ahead) * C
        mbarrier.expect(bars.index(free), size, pred=ahead < count)
        _fetch(y_desc, h, first, 0, bars.index(free), y_tiles.index(free), ahead < count)
        _fetch(z_desc, h, first, 0, bars.index(free), z_tiles.index(free), ahead < count)
    state = warpgroup_mma_wait(0, deps=[state])
    thread_barrier()
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))
    return state


@gluon.jit
def subsplit_states(
    y_desc, z_desc, local, slopes, starts, document_ids, cu_seqlens, tile_count, num_subsplits, PER_SPLIT,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    REVERSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    groups: gl.constexpr = gl.num_warps() // 4
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, BV // groups, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, mma)

    h = gl.program_id(0)
    row = gl.program_id(1)
    num_tiles = gl.load(tile_count)
    slope = gl.load(slopes + h).to(gl.float32)
    subsplit = row + PER_SPLIT if REVERSE else row
    boundary = _first_tile(num_tiles, subsplit if REVERSE else subsplit + 1, num_subsplits)
    nearest = (subsplit // PER_SPLIT) * PER_SPLIT if REVERSE else (subsplit // PER_SPLIT + 1) * PER_SPLIT
    memory = _memory_length(slope)
    boundary_token = gl.load(starts + boundary)
    far_token = gl.load(starts + _first_tile(num_tiles, subsplit + 1 if REVERSE else subsplit, num_subsplits))
    reader = gl.load(starts + _first_tile(num_tiles, nearest, num_subsplits))
    begin = boundary_token
    end = boundary_token
    if gl.abs(reader - boundary_token) < memory:
        # Of a short-memory head few programs come here: only they wait for the loads that place the document.
        document = gl.load(document_ids + boundary)
        document_start = gl.load(cu_seqlens + document)
        document_end = gl.load(cu_seqlens + document + 1)
        if REVERSE:
            if (document_start < reader) & (boundary_token > document_start):
                end = gl.minimum(gl.minimum(document_end, far_token), reader + memory)
        else:
            if (document_end > reader) & (boundary_token > document_start):
                begin = gl.maximum(gl.maximum(document_start, far_token), reader - memory)
    if begin < end:
        rows_k = gl.arange(0, BK, layout=by_row)
        columns_v = gl.arange(0, BV, layout=by_column)
        inside = (rows_k < K)[:, None] & (columns_v < V)[None, :]
        state = gl.zeros([BK, BV], gl.float32, mma)
        state = _accumulate(y_desc, z_desc, h, begin, end, slope, state, mma, REVERSE, STAGES)
        to = local + (row.to(gl.int64) * H + h) * K * V + rows_k[:, None] * V + columns_v[None, :]
        gl.store(to, state, mask=inside)


@gluon.jit
def block_states(
    y_desc, z_desc, out, block_table, slopes, ranges, num_pairs,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    PAIRS: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    groups: gl.constexpr = gl.num_warps() // 4
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, groups], [16, BV // groups, 16])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    block = gl.program_id(0)
    if block < gl.load(block_table + num_pairs):
        size = gl.load(block_table + num_pairs + 1)
        pairs = gl.arange(0, PAIRS, layout=line)
        begun = gl.load(block_table + pairs, mask=pairs < num_pairs, other=block + 1) <= block
        pair = gl.sum(begun.to(gl.int32), 0) - 1
        h = pair % H
        slope = gl.load(slopes + h).to(gl.float32)
        begin = gl.load(ranges + 2 * (pair // H))
        end = gl.load(ranges + 2 * (pair // H) + 1)
        # Counted from where the state is wanted: should rounding make the memory length longer here than in
        # ``plan_blocks``, only tokens that have decayed away are missing.
        away = (block - gl.load(block_table + pair)) * size
        if REVERSE:
            low = begin + away
            high = gl.minimum(gl.minimum(low + size, end), begin + _memory_length(slope))
        else:
            high = end - away
            low = gl.maximum(gl.maximum(high - size, begin), end - _memory_length(slope))
        state = gl.zeros([BK, BV], gl.float32, mma)
        state = _accumulate(y_desc, z_desc, h, low, high, slope, state, mma, REVERSE, STAGES)
        rows_k = gl.arange(0, BK, layout=gl.SliceLayout(1, mma))
        columns_v = gl.arange(0, BV, layout=gl.SliceLayout(0, mma))
        to = out + block.to(gl.int64) * K * V + rows_k[:, None] * V + columns_v[None, :]
        inside = (rows_k < K)[:, None] & (columns_v < V)[None, :]
        gl.store(to, state * gl.exp(-slope * away.to(gl.float32)), mask=inside)


@gluon.jit
def _produce(
    x_desc, y_desc, z_desc, starts, h, low, high, x_tiles, y_tiles, z_tiles, full, empty,
    REVERSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp keeps TMA STAGES tiles ahead of both consumers."""
    size: gl.constexpr = x_desc.block_type.nbytes + y_desc.block_type.nbytes + 2 * z_desc.block_type.nbytes
    HALF: gl.constexpr = z_desc.block_type.shape[2]
    for step in range(0, high - low):
        stage = step % STAGES
        start = gl.load(starts + (high - 1 - step if REVERSE else low + step))
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, size)
        tma.async_copy_global_to_shared(x_desc, [h, start, 0], bar, x_tiles.index(stage))
        tma.async_copy_global_to_shared(y_desc, [h, start, 0], bar, y_tiles.index(stage))
        tma.async_copy_global_to_shared(z_desc, [h, start, 0], bar, z_tiles.index(stage * 2))
        tma.async_copy_global_to_shared(z_desc, [h, start, HALF], bar, z_tiles.index(stage * 2 + 1))


@gluon.jit
def _consume(
    half: gl.constexpr, x_tiles, y_tiles, z_tiles, weighted_tiles, state_tiles, out_tiles, full, empty,
    out_desc, out, initial, final, local, slope, starts, infos, document_ids, rows, cu_seqlens, h, low, high, edge,
    out_t, out_h, initial_n, initial_h, initial_k, initial_v, final_n, final_h, final_k, final_v,
    local_f, local_h, local_k, local_v,
    num_tokens, num_tiles, num_subsplits, PER_SPLIT,
    K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, HALF: gl.constexpr,
    REVERSE: gl.constexpr, HAS_INITIAL: gl.constexpr, HAS_FINAL: gl.constexpr, HAS_LOCAL: gl.constexpr,
    INITIAL_MAPPED: gl.constexpr, FINAL_MAPPED: gl.constexpr, SUBSPLITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp group: half of the value columns, with its own half of the state."""
    low = _uniform(low)
    high = _uniform(high)
    dtype: gl.constexpr = out_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    mma_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    by_column: gl.constexpr = gl.SliceLayout(0, mma)
    tile_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    tile_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, HALF], dtype)
    weighted_s = weighted_tiles.index(half)
    state_s = state_tiles.index(half)
    out_s = out_tiles.index(half)

    rows_k = gl.arange(0, BK, layout=by_row)
    columns_v = half * HALF + gl.arange(0, HALF, layout=by_column)
    inside = (rows_k < K)[:, None] & (columns_v < V)[None, :]
    slots = gl.arange(0, C, layout=by_row)
    here = gl.arange(0, C, layout=gl.SliceLayout(1, mma_scores))
    others = gl.arange(0, C, layout=gl.SliceLayout(0, mma_scores))
    distance = others[None, :] - here[:, None] if REVERSE else here[:, None] - others[None, :]
    within_CC = gl.where(distance >= 0, gl.exp(-slope * gl.maximum(distance, 0).to(gl.float32)), 0.0)

    state = gl.zeros([BK, HALF], gl.float32, mma)
    if HAS_LOCAL:
        state = _state_at_boundary(
            local, initial, slope, starts, document_ids, rows, cu_seqlens, h, high if REVERSE else low, edge,
            num_tiles, num_subsplits, PER_SPLIT, local_f, local_h, local_k, local_v,
            initial_n, initial_h, initial_k, initial_v, rows_k, columns_v, inside, state,
            REVERSE, HAS_INITIAL, INITIAL_MAPPED, SUBSPLITS,
        )  # fmt: skip

    for step in range(0, high - low):
        stage = step % STAGES
        m = high - 1 - step if REVERSE else low + step
        start = _uniform(gl.load(starts + m))
        info = _uniform(gl.load(infos + m))
        length = info >> LENGTH_SHIFT
        is_first = (info & (ENDS if REVERSE else BEGINS)) != 0

        valid = slots < length
        before = (slots + 1).to(gl.float32)
        after = gl.maximum(length - 1 - slots, 0).to(gl.float32)
        from_state = gl.exp(-slope * (after if REVERSE else before))
        to_state = gl.where(valid, gl.exp(-slope * (before if REVERSE else after)), 0.0)
        through = gl.exp(-slope * length.to(gl.float32))
        if HAS_INITIAL:
            if is_first:
                n = gl.load(document_ids + m)
                n = gl.load(rows + n) if INITIAL_MAPPED else n
                at = initial + n.to(gl.int64) * initial_n + h * initial_h
                at = at + rows_k[:, None] * initial_k + columns_v[None, :] * initial_v
                state = gl.load(at, mask=inside & (n >= 0) if INITIAL_MAPPED else inside, other=0.0).to(gl.float32)
        else:
            from_state = gl.where(is_first, 0.0, from_state)
            through = gl.where(is_first, 0.0, through)

        x_s = x_tiles.index(stage)._reinterpret(dtype, [C, BK], tile_k)
        y_s = y_tiles.index(stage)._reinterpret(dtype, [C, BK], tile_k)
        z_s = z_tiles.index(stage * 2 + half)._reinterpret(dtype, [C, HALF], tile_v)
        state_s.store(state.to(dtype))
        # Before the first product: registers of a product in flight cannot be written without waiting for all.
        state = state * through
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        weighted_s.store((z_s.load(mma).to(gl.float32) * to_state[:, None]).to(dtype))
        fence_async_shared()
        tma.store_wait(0)
        thread_barrier()

        scores = gl.zeros([C, C], gl.float32, mma_scores)
        scores = warpgroup_mma(x_s, y_s.permute((1, 0)), scores, use_acc=False, is_async=True)
        acc = gl.zeros([C, HALF], gl.float32, mma)
        acc = warpgroup_mma(x_s, state_s, acc, use_acc=False, is_async=True)
        state = warpgroup_mma(y_s.permute((1, 0)), weighted_s, state, is_async=True)

        scores = warpgroup_mma_wait(2, deps=[scores])
        scores = scores * within_CC
        if REVERSE:
            scores = gl.where((others < length)[None, :], scores, 0.0)
        scores = gl.convert_layout(scores.to(dtype), gl.DotOperandLayout(0, mma, 2))
        acc = warpgroup_mma_wait(1, deps=[acc])
        acc = warpgroup_mma(scores, z_s, acc * from_state[:, None], is_async=True)
        state = warpgroup_mma_wait(1, deps=[state])
        acc = warpgroup_mma_wait(0, deps=[acc])

        # A tile of C tokens is stored by TMA; a shorter one row by row, and its TMA store is sent out of range.
        out_s._reinterpret(dtype, [C, HALF], tile_v).store(acc.to(dtype))
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        tma.async_copy_shared_to_global(out_desc, [h, gl.where(length == C, start, num_tokens), half * HALF], out_s)
        if length < C:
            cells = out + start.to(gl.int64) * out_t + h * out_h + slots[:, None] * out_t + columns_v[None, :]
            gl.store(cells, acc.to(dtype), mask=valid[:, None] & (columns_v < V)[None, :])
        if HAS_FINAL:
            if (info & (BEGINS if REVERSE else ENDS)) != 0:
                n = gl.load(document_ids + m)
                n = gl.load(rows + n) if FINAL_MAPPED else n
                at = final + n.to(gl.int64) * final_n + h * final_h
                at = at + rows_k[:, None] * final_k + columns_v[None, :] * final_v
                gl.store(at, state, mask=inside & (n >= 0) if FINAL_MAPPED else inside)
    tma.store_wait(0)


@gluon.jit
def attend(
    x_desc, y_desc, z_desc, out_desc, out, initial, final, local, slopes, starts, infos, document_ids, rows, cu_seqlens,
    out_t, out_h, initial_n, initial_h, initial_k, initial_v, final_n, final_h, final_k, final_v,
    local_f, local_h, local_k, local_v,
    num_tokens, tile_count, num_subsplits, PER_SPLIT,
    K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    REVERSE: gl.constexpr, HAS_INITIAL: gl.constexpr, HAS_FINAL: gl.constexpr, HAS_LOCAL: gl.constexpr,
    INITIAL_MAPPED: gl.constexpr, FINAL_MAPPED: gl.constexpr, SUBSPLITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    HALF: gl.constexpr = BV // 2
    h = gl.program_id(0)
    split = gl.program_id(1)
    num_tiles = gl.load(tile_count)
    slope = gl.load(slopes + h).to(gl.float32)
    low = _first_tile(num_tiles, split * PER_SPLIT, num_subsplits)
    high = _first_tile(num_tiles, split * PER_SPLIT + PER_SPLIT, num_subsplits)
    edge = split * PER_SPLIT + PER_SPLIT if REVERSE else split * PER_SPLIT

    x_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, C, BK], x_desc.layout)
    y_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, C, BK], y_desc.layout)
    z_tiles = gl.allocate_shared_memory(dtype, [STAGES * 2, 1, C, HALF], z_desc.layout)
    weighted_tiles = gl.allocate_shared_memory(
        dtype, [2, C, HALF], gl.NVMMASharedLayout.get_default_for([C, HALF], dtype)
    )
    state_tiles = gl.allocate_shared_memory(
        dtype, [2, BK, HALF], gl.NVMMASharedLayout.get_default_for([BK, HALF], dtype)
    )
    out_tiles = gl.allocate_shared_memory(dtype, [2, 1, C, HALF], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    left: gl.constexpr = 0
    right: gl.constexpr = 1
    # Spelled out in place: a tuple given a name would turn its compile-time constants into run-time values.
    gl.warp_specialize(
        [
            (_consume, (
                left, x_tiles, y_tiles, z_tiles, weighted_tiles, state_tiles, out_tiles, full, empty,
                out_desc, out, initial, final, local, slope, starts, infos, document_ids, rows, cu_seqlens, h, low,
                high, edge, out_t, out_h, initial_n, initial_h, initial_k, initial_v,
                final_n, final_h, final_k, final_v, local_f, local_h, local_k, local_v,
                num_tokens, num_tiles, num_subsplits, PER_SPLIT,
                K, V, C, BK, HALF, REVERSE, HAS_INITIAL, HAS_FINAL, HAS_LOCAL, INITIAL_MAPPED, FINAL_MAPPED, SUBSPLITS,
                STAGES,
            )),
            (_consume, (
                right, x_tiles, y_tiles, z_tiles, weighted_tiles, state_tiles, out_tiles, full, empty,
                out_desc, out, initial, final, local, slope, starts, infos, document_ids, rows, cu_seqlens, h, low,
                high, edge, out_t, out_h, initial_n, initial_h, initial_k, initial_v,
                final_n, final_h, final_k, final_v, local_f, local_h, local_k, local_v,
                num_tokens, num_tiles, num_subsplits, PER_SPLIT,
                K, V, C, BK, HALF, REVERSE, HAS_INITIAL, HAS_FINAL, HAS_LOCAL, INITIAL_MAPPED, FINAL_MAPPED, SUBSPLITS,
                STAGES,
            )),
            (_produce, (
                x_desc, y_desc, z_desc, starts, h, low, high, x_tiles, y_tiles, z_tiles, full, empty, REVERSE, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))
        mbarrier.invalidate(empty.index(i))


@gluon.jit
def _produce_backward(
    q_desc, k_desc, v_desc, do_desc, starts, h, low, high, q_tiles, k_tiles, v_tiles, do_tiles, full, empty,
    STAGES: gl.constexpr,
):  # fmt: skip
    size: gl.constexpr = 2 * (q_desc.block_type.nbytes + v_desc.block_type.nbytes)
    for step in range(0, high - low):
        stage = step % STAGES
        start = gl.load(starts + high - 1 - step)
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, size)
        tma.async_copy_global_to_shared(do_desc, [h, start, 0], bar, do_tiles.index(stage))
        tma.async_copy_global_to_shared(q_desc, [h, start, 0], bar, q_tiles.index(stage))
        tma.async_copy_global_to_shared(k_desc, [h, start, 0], bar, k_tiles.index(stage))
        tma.async_copy_global_to_shared(v_desc, [h, start, 0], bar, v_tiles.index(stage))


@gluon.jit
def _consume_backward(
    side: gl.constexpr, q_tiles, k_tiles, v_tiles, do_tiles, weighted_tiles, state_s, out_s,
    full, empty, ready, free, out_desc, out, initial, final, local, slope, starts, infos, document_ids, rows, runs,
    cu_seqlens, h, low, high, edge, out_t, out_h,
    initial_n, initial_h, initial_k, initial_v, final_n, final_h, final_k, final_v,
    local_f, local_h, local_k, local_v,
    num_tokens, num_tiles, num_subsplits, PER_SPLIT,
    K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    HAS_INITIAL: gl.constexpr, HAS_FINAL: gl.constexpr, HAS_LOCAL: gl.constexpr,
    INITIAL_MAPPED: gl.constexpr, SUBSPLITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp group: dv (side 0) or dk (side 1), and half of the state that both read."""
    low = _uniform(low)
    high = _uniform(high)
    dtype: gl.constexpr = out_desc.dtype
    HALF: gl.constexpr = BV // 2
    WIDTH: gl.constexpr = K if side == 1 else V
    BLOCK: gl.constexpr = BK if side == 1 else BV
    mma_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    mma_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    tile_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], dtype)
    tile_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BV], dtype)
    tile_out: gl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BLOCK], dtype)
    weighted_s = weighted_tiles.index(side)
    my_state_s = state_s.slice(side * HALF, HALF, dim=1)

    rows_k = gl.arange(0, BK, layout=gl.SliceLayout(1, mma_state))
    columns_v = side * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, mma_state))
    inside = (rows_k < K)[:, None] & (columns_v < V)[None, :]
    slots = gl.arange(0, C, layout=gl.SliceLayout(1, mma))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, mma))
    sources = gl.arange(0, C, layout=gl.SliceLayout(1, mma_state))
    here = gl.arange(0, C, layout=gl.SliceLayout(1, mma_scores))
    others = gl.arange(0, C, layout=gl.SliceLayout(0, mma_scores))
    distance = others[None, :] - here[:, None]
    within_CC = gl.where(distance >= 0, gl.exp(-slope * gl.maximum(distance, 0).to(gl.float32)), 0.0)

    state = gl.zeros([BK, HALF], gl.float32, mma_state)
    if HAS_LOCAL:
        state = _state_at_boundary(
            local, initial, slope, starts, document_ids, rows, cu_seqlens, h, high, edge,
            num_tiles, num_subsplits, PER_SPLIT, local_f, local_h, local_k, local_v,
            initial_n, initial_h, initial_k, initial_v, rows_k, columns_v, inside, state,
            True, HAS_INITIAL, INITIAL_MAPPED, SUBSPLITS,
        )  # fmt: skip

    # In runs from one given state to the next: with the load of a state inside it, the loop takes 1.5 times as long.
    count = high - low
    begin = 0
    while begin < count:
        end = count
        took = 0
        if HAS_INITIAL:
            top = high - 1 - begin
            end = gl.minimum(count, begin + gl.load(runs + top))
            n = gl.load(document_ids + top)
            n = gl.load(rows + n) if INITIAL_MAPPED else n
            took = (((gl.load(infos + top) & ENDS) != 0) & (n >= 0)).to(gl.int32)
            if took != 0:
                at = initial + n.to(gl.int64) * initial_n + h * initial_h
                at = at + rows_k[:, None] * initial_k + columns_v[None, :] * initial_v
                state = gl.load(at, mask=inside, other=0.0).to(gl.float32)
        for step in range(begin, end):
            stage = step % STAGES
            m = high - 1 - step
            start = _uniform(gl.load(starts + m))
            info = _uniform(gl.load(infos + m))
            length = info >> LENGTH_SHIFT
            resets = ((info & ENDS) != 0) & ((step != begin) | (took == 0))
            from_state = gl.exp(-slope * gl.maximum(length - 1 - slots, 0).to(gl.float32))
            to_state = gl.where(sources < length, gl.exp(-slope * (sources + 1).to(gl.float32)), 0.0)
            through = gl.exp(-slope * length.to(gl.float32))
            from_state = gl.where(resets, 0.0, from_state)
            through = gl.where(resets, 0.0, through)

            q_s = q_tiles.index(stage)._reinterpret(dtype, [C, BK], tile_k)
            k_s = k_tiles.index(stage)._reinterpret(dtype, [C, BK], tile_k)
            v_s = v_tiles.index(stage)._reinterpret(dtype, [C, BV], tile_v)
            do_s = do_tiles.index(stage)._reinterpret(dtype, [C, BV], tile_v)
            # Both sides have read the state of the previous tile.
            mbarrier.wait(free, (step & 1) ^ 1)
            my_state_s.store(state.to(dtype))
            state = state * through
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            do_half = do_s.slice(side * HALF, HALF, dim=1).load(mma_state)
            weighted_s.store((do_half.to(gl.float32) * to_state[:, None]).to(dtype))
            fence_async_shared()
            tma.store_wait(0)
            thread_barrier()
            mbarrier.arrive(ready, count=1)

            scores = gl.zeros([C, C], gl.float32, mma_scores)
            acc = gl.zeros([C, BLOCK], gl.float32, mma)
            if side == 0:
                scores = warpgroup_mma(k_s, q_s.permute((1, 0)), scores, use_acc=False, is_async=True)
                mbarrier.wait(ready, step & 1)
                acc = warpgroup_mma(k_s, state_s, acc, use_acc=False, is_async=True)
            else:
                scores = warpgroup_mma(v_s, do_s.permute((1, 0)), scores, use_acc=False, is_async=True)
                mbarrier.wait(ready, step & 1)
                acc = warpgroup_mma(v_s, state_s.permute((1, 0)), acc, use_acc=False, is_async=True)
            state = warpgroup_mma(q_s.permute((1, 0)), weighted_s, state, is_async=True)
            scores = warpgroup_mma_wait(2, deps=[scores])
            scores = gl.where((others < length)[None, :], scores * within_CC, 0.0)
            scores = gl.convert_layout(scores.to(dtype), gl.DotOperandLayout(0, mma, 2))
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(free, count=1)
            if side == 0:
                acc = warpgroup_mma(scores, do_s, acc * from_state[:, None], is_async=True)
            else:
                acc = warpgroup_mma(scores, q_s, acc * from_state[:, None], is_async=True)
            state = warpgroup_mma_wait(1, deps=[state])
            acc = warpgroup_mma_wait(0, deps=[acc])

            out_s._reinterpret(dtype, [C, BLOCK], tile_out).store(acc.to(dtype))
            fence_async_shared()
            thread_barrier()
            mbarrier.arrive(empty.index(stage), count=1)
            tma.async_copy_shared_to_global(out_desc, [h, gl.where(length == C, start, num_tokens), 0], out_s)
            if length < C:
                cells = out + start.to(gl.int64) * out_t + h * out_h + slots[:, None] * out_t + columns[None, :]
                gl.store(cells, acc.to(dtype), mask=(slots < length)[:, None] & (columns < WIDTH)[None, :])
            if HAS_FINAL:
                if (info & BEGINS) != 0:
                    at = final + gl.load(document_ids + m).to(gl.int64) * final_n + h * final_h
                    at = at + rows_k[:, None] * final_k + columns_v[None, :] * final_v
                    gl.store(at, state, mask=inside)
        begin = end
    tma.store_wait(0)


@gluon.jit
def attend_dk_dv(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, dk, dv, initial, final, local,
    slopes, starts, infos, document_ids, rows, runs, cu_seqlens,
    dk_t, dk_h, dv_t, dv_h, initial_n, initial_h, initial_k, initial_v, final_n, final_h, final_k, final_v,
    local_f, local_h, local_k, local_v,
    num_tokens, tile_count, num_subsplits, PER_SPLIT,
    K: gl.constexpr, V: gl.constexpr, C: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    HAS_INITIAL: gl.constexpr, HAS_FINAL: gl.constexpr, HAS_LOCAL: gl.constexpr,
    INITIAL_MAPPED: gl.constexpr, SUBSPLITS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both reverse passes of the backward in one: they share q, k, v, do and the running gradient of the state."""
    dtype: gl.constexpr = q_desc.dtype
    h = gl.program_id(0)
    split = gl.program_id(1)
    num_tiles = gl.load(tile_count)
    slope = gl.load(slopes + h).to(gl.float32)
    low = _first_tile(num_tiles, split * PER_SPLIT, num_subsplits)
    high = _first_tile(num_tiles, split * PER_SPLIT + PER_SPLIT, num_subsplits)
    edge = split * PER_SPLIT + PER_SPLIT

    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, C, BK], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, C, BK], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, C, BV], v_desc.layout)
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, C, BV], do_desc.layout)
    weighted_tiles = gl.allocate_shared_memory(
        dtype, [2, C, BV // 2], gl.NVMMASharedLayout.get_default_for([C, BV // 2], dtype)
    )
    state_s = gl.allocate_shared_memory(dtype, [BK, BV], gl.NVMMASharedLayout.get_default_for([BK, BV], dtype))
    dk_s = gl.allocate_shared_memory(dtype, [1, C, BK], dk_desc.layout)
    dv_s = gl.allocate_shared_memory(dtype, [1, C, BV], dv_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(ready, count=2)
    mbarrier.init(free, count=2)
    for_dv: gl.constexpr = 0
    for_dk: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consume_backward, (
                for_dv, q_tiles, k_tiles, v_tiles, do_tiles, weighted_tiles, state_s, dv_s,
                full, empty, ready, free, dv_desc, dv, initial, final, local, slope, starts, infos, document_ids, rows,
                runs, cu_seqlens, h, low, high, edge, dv_t, dv_h,
                initial_n, initial_h, initial_k, initial_v, final_n, final_h, final_k, final_v,
                local_f, local_h, local_k, local_v, num_tokens, num_tiles, num_subsplits, PER_SPLIT,
                K, V, C, BK, BV, HAS_INITIAL, HAS_FINAL, HAS_LOCAL, INITIAL_MAPPED, SUBSPLITS, STAGES,
            )),
            (_consume_backward, (
                for_dk, q_tiles, k_tiles, v_tiles, do_tiles, weighted_tiles, state_s, dk_s,
                full, empty, ready, free, dk_desc, dk, initial, final, local, slope, starts, infos, document_ids, rows,
                runs, cu_seqlens, h, low, high, edge, dk_t, dk_h,
                initial_n, initial_h, initial_k, initial_v, final_n, final_h, final_k, final_v,
                local_f, local_h, local_k, local_v, num_tokens, num_tiles, num_subsplits, PER_SPLIT,
                K, V, C, BK, BV, HAS_INITIAL, HAS_FINAL, HAS_LOCAL, INITIAL_MAPPED, SUBSPLITS, STAGES,
            )),
            (_produce_backward, (
                q_desc, k_desc, v_desc, do_desc, starts, h, low, high, q_tiles, k_tiles, v_tiles, do_tiles,
                full, empty, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))
        mbarrier.invalidate(empty.index(i))
    mbarrier.invalidate(ready)
    mbarrier.invalidate(free)
