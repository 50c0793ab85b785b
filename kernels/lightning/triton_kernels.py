"""The Triton kernels of lightning attention; :mod:`minimax_train.kernels.lightning.triton` says how they compose.

All walk tiles of at most C tokens, each inside one document, forwards or (REVERSE) backwards. ``attend`` computes
``out_i = sum_j decay^|i - j| (x_i . y_j) z_j`` over the tokens j of i's document on its side of i, token i included.
One program walks one split of the tiles, with one head's float32 state ``sum_j decay^... y_j z_j^T`` in registers. It
begins with the state at the split's boundary, which it sums from the local states that ``subsplit_states`` has written.
How many tiles there are only the device knows: ``cut_tiles`` makes the tables, and every kernel reads their length.
``block_states`` computes the local states of any token ranges, for context parallelism.

Every decay is the exponential of a non-positive number. Contributions that have decayed below exp(-DECAY_CUTOFF) before
they reach the split that would use them are dropped: 4e-8 of the state they would join, below float32 rounding.

Shape legend: T tokens, H heads, K dim of x and y, V dim of z, C tokens per tile, N documents, F sub-splits.
"""

import torch
import triton
import triton.language as tl

from minimax_train.kernels.lightning import state_passing

DECAY_CUTOFF = tl.constexpr(state_passing.DECAY_CUTOFF[torch.float32])
# Least tiles in a block of ``block_states``.
MIN_TILES = tl.constexpr(8)
# Tiles, or documents, that ``cut_tiles`` looks at together.
LANES = tl.constexpr(128)
# Bits of a tile's info word: whether its document begins and ends with it, then its length.
BEGINS = tl.constexpr(1)
ENDS = tl.constexpr(2)
LENGTH_SHIFT = tl.constexpr(2)


@triton.jit
def cut_tiles(cu_seqlens, starts, infos, document_ids, tile_count, C: tl.constexpr):
    """The tiles of one document, after those of the documents before it. A document without tokens has none.

    Of the B tiles there are: ``starts [B + 1]``, first token of each, then T; ``infos [B]``; ``document_ids [B]``;
    ``tile_count [1]``, which is B. All int32.
    """
    n = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    first = 0
    for i in range(0, n, LANES):
        earlier = i + lanes
        begin = tl.load(cu_seqlens + earlier, mask=earlier < n, other=0)
        end = tl.load(cu_seqlens + earlier + 1, mask=earlier < n, other=0)
        first += tl.sum((end - begin + C - 1) // C, 0)
    begin = tl.load(cu_seqlens + n)
    end = tl.load(cu_seqlens + n + 1)
    count = (end - begin + C - 1) // C
    for i in range(0, count, LANES):
        tile = i + lanes
        start = begin + tile * C
        info = tl.minimum(end - start, C) << LENGTH_SHIFT
        info += tl.where(tile == 0, BEGINS, 0) + tl.where(tile == count - 1, ENDS, 0)
        tl.store(starts + first + tile, start, mask=tile < count)
        tl.store(infos + first + tile, info, mask=tile < count)
        tl.store(document_ids + first + tile, tl.zeros_like(tile) + n, mask=tile < count)
    if n == tl.num_programs(0) - 1:
        tl.store(starts + first + count, end)
        tl.store(tile_count, first + count)


@triton.jit
def _first_tile(num_tiles, subsplit, num_subsplits):
    """The tile that a sub-split begins with."""
    return (num_tiles.to(tl.int64) * subsplit // num_subsplits).to(tl.int32)


@triton.jit
def _memory_length(slope):
    """Tokens after which a contribution has decayed away; a little more, so that rounding cannot shorten it."""
    return tl.minimum(1.001 / tl.maximum(slope, 1e-12) * DECAY_CUTOFF + 2, 1.0e9).to(tl.int32)


@triton.jit
def _state_cells(states, n, h, stride_n, stride_h, stride_k, stride_v, columns_k, columns_v):
    """Pointers to the elements of the state of row n and head h."""
    at = states + n.to(tl.int64) * stride_n + h * stride_h
    return at + columns_k[:, None] * stride_k + columns_v[None, :] * stride_v


@triton.jit
def _load_rows(base, stride, valid, columns, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, C)
    mask = (
        valid[:, None] & tl.full([1, BLOCK], True, tl.int1)
        if WIDTH % BLOCK == 0
        else (valid[:, None] & (columns < WIDTH)[None, :])
    )
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _accumulate(
    y, z, y_t, z_t, begin, end, slope, state, columns_k, columns_v,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``state`` after the tokens from begin to end (REVERSE: from end to begin)."""
    slots = tl.arange(0, C)
    count = (end - begin + C - 1) // C
    for step in range(0, count):
        # Weights are local to the tile: near one for a slow decay, so that rounding z to its dtype costs nothing.
        offset = (count - 1 - step if REVERSE else step) * C
        length = tl.minimum(end - begin - offset, C)
        valid = slots < length
        first = (begin + offset).to(tl.int64)
        y_CK = _load_rows(y + first * y_t, y_t, valid, columns_k, K, C, BK)
        z_CV = _load_rows(z + first * z_t, z_t, valid, columns_v, V, C, BV)
        away = slots + 1 if REVERSE else tl.maximum(length - 1 - slots, 0)
        z_CV = (z_CV * tl.exp(-slope * away)[:, None]).to(z_CV.dtype)
        state = tl.dot(tl.trans(y_CK), z_CV, state * tl.exp(-slope * length), input_precision=PRECISION)
    return state


@triton.jit
def subsplit_states(
    y, z, local, slopes, starts, document_ids, cu_seqlens,
    y_t, y_h, z_t, z_h,
    tile_count, num_subsplits, PER_SPLIT,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``local[f, h]``, ``[F', H, K, V]``: the local state of sub-split f, of the document that crosses its boundary.

    The boundary is its end (REVERSE: its start). Written only where a split of ``attend`` reads it, and summed from
    the tokens that have not decayed away there. F' is F - PER_SPLIT: nobody reads the last (REVERSE: first) split's.
    """
    slice_v = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)  # times a stride it may not fit in 32 bits
    row = tl.program_id(2)
    num_tiles = tl.load(tile_count)
    slope = tl.load(slopes + h).to(tl.float32)
    subsplit = row + PER_SPLIT if REVERSE else row
    # The sub-split's boundary, its other edge, and the nearest boundary of a split, where the state is read first.
    boundary = _first_tile(num_tiles, subsplit if REVERSE else subsplit + 1, num_subsplits)
    nearest = (subsplit // PER_SPLIT) * PER_SPLIT if REVERSE else (subsplit // PER_SPLIT + 1) * PER_SPLIT
    boundary_token = tl.load(starts + boundary)
    far_token = tl.load(starts + _first_tile(num_tiles, subsplit + 1 if REVERSE else subsplit, num_subsplits))
    reader = tl.load(starts + _first_tile(num_tiles, nearest, num_subsplits))
    memory = _memory_length(slope)
    document = tl.load(document_ids + boundary)
    document_start = tl.load(cu_seqlens + document)
    document_end = tl.load(cu_seqlens + document + 1)
    begin = boundary_token
    end = boundary_token
    if boundary_token > document_start:
        if REVERSE:
            if document_start < reader:
                end = tl.minimum(tl.minimum(document_end, far_token), reader + memory)
        else:
            if document_end > reader:
                begin = tl.maximum(tl.maximum(document_start, far_token), reader - memory)
    if begin < end:
        columns_k = tl.arange(0, BK)
        columns_v = slice_v * BV + tl.arange(0, BV)
        inside = (columns_k < K)[:, None] & (columns_v < V)[None, :]
        state = tl.zeros([BK, BV], tl.float32)
        state = _accumulate(
            y + h * y_h, z + h * z_h, y_t, z_t, begin, end, slope, state, columns_k, columns_v,
            K, V, C, BK, BV, REVERSE, PRECISION,
        )  # fmt: skip
        to = local + (row.to(tl.int64) * H + h) * K * V + columns_k[:, None] * V + columns_v[None, :]
        tl.store(to, state, mask=inside)


@triton.jit
def plan_blocks(
    block_table, slopes, ranges, num_pairs,
    H: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Cut the tokens that ``block_states`` sums in blocks of one size, about BLOCKS of them.

    A pair is a token range and a head. ``block_table [num_pairs + 2]``: the first block of each pair, how many blocks
    there are, and the tokens of one.
    """
    pair = tl.arange(0, PAIRS)
    inside = pair < num_pairs
    begin = tl.load(ranges + 2 * (pair // H), mask=inside, other=0)
    end = tl.load(ranges + 2 * (pair // H) + 1, mask=inside, other=0)
    slope = tl.load(slopes + pair % H, mask=inside, other=1.0).to(tl.float32)
    tokens = tl.where(inside, tl.minimum(end - begin, _memory_length(slope)), 0)
    size = tl.maximum((tl.sum(tokens, 0) + C * BLOCKS - 1) // (C * BLOCKS), MIN_TILES) * C
    count = (tokens + size - 1) // size
    tl.store(block_table + pair, tl.cumsum(count, 0) - count, mask=inside)
    tl.store(block_table + num_pairs, tl.sum(count, 0))
    tl.store(block_table + num_pairs + 1, size)


@triton.jit
def block_states(
    y, z, out, block_table, slopes, ranges, num_pairs, y_t, y_h, z_t, z_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PAIRS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[b]``, ``[.., K, V]``: what block b adds to the local state of its pair at the range's end (REVERSE: start).

    Blocks past the last are not written.
    """
    slice_v = tl.program_id(0)
    block = tl.program_id(1)
    if block < tl.load(block_table + num_pairs):
        size = tl.load(block_table + num_pairs + 1)
        pairs = tl.arange(0, PAIRS)
        begun = tl.load(block_table + pairs, mask=pairs < num_pairs, other=block + 1) <= block
        pair = tl.sum(begun.to(tl.int32), 0) - 1
        h = (pair % H).to(tl.int64)
        slope = tl.load(slopes + h).to(tl.float32)
        begin = tl.load(ranges + 2 * (pair // H))
        end = tl.load(ranges + 2 * (pair // H) + 1)
        # Counted from where the state is wanted: should rounding make the memory length longer here than in
        # ``plan_blocks``, only tokens that have decayed away are missing.
        away = (block - tl.load(block_table + pair)) * size
        if REVERSE:
            low = begin + away
            high = tl.minimum(tl.minimum(low + size, end), begin + _memory_length(slope))
        else:
            high = end - away
            low = tl.maximum(tl.maximum(high - size, begin), end - _memory_length(slope))
        columns_k = tl.arange(0, BK)
        columns_v = slice_v * BV + tl.arange(0, BV)
        state = tl.zeros([BK, BV], tl.float32)
        state = _accumulate(
            y + h * y_h, z + h * z_h, y_t, z_t, low, high, slope, state, columns_k, columns_v,
            K, V, C, BK, BV, REVERSE, PRECISION,
        )  # fmt: skip
        to = out + block.to(tl.int64) * K * V + columns_k[:, None] * V + columns_v[None, :]
        tl.store(to, state * tl.exp(-slope * away), mask=(columns_k < K)[:, None] & (columns_v < V)[None, :])


@triton.jit
def sum_blocks(blocks, out, block_table, KV: tl.constexpr, B: tl.constexpr):
    """``out[pair]``: the sum of a pair's blocks, in order. ``out [pairs, KV]``."""
    pair = tl.program_id(1)
    cells = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    first = tl.load(block_table + pair)
    at = blocks + first.to(tl.int64) * KV + cells
    for _ in range(0, tl.load(block_table + pair + 1) - first):
        total += tl.load(at, mask=cells < KV, other=0.0)
        at += KV
    tl.store(out + pair.to(tl.int64) * KV + cells, total, mask=cells < KV)


@triton.jit
def attend(
    x, y, z, out, initial, final, local, slopes, starts, infos, document_ids, rows, cu_seqlens,
    x_t, x_h, y_t, y_h, z_t, z_h, out_t, out_h,
    initial_n, initial_h, initial_k, initial_v, final_n, final_h, final_k, final_v,
    local_f, local_h, local_k, local_v,
    tile_count, num_subsplits, PER_SPLIT,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_LOCAL: tl.constexpr,
    INITIAL_MAPPED: tl.constexpr, FINAL_MAPPED: tl.constexpr, SUBSPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [T, H, V]`` of one head, slice of V and split; ``final [N, H, K, V]`` of the documents that end in it."""
    slice_v = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)  # times a stride it may not fit in 32 bits
    split = tl.program_id(2)
    num_tiles = tl.load(tile_count)
    slope = tl.load(slopes + h).to(tl.float32)
    low = _first_tile(num_tiles, split * PER_SPLIT, num_subsplits)
    high = _first_tile(num_tiles, split * PER_SPLIT + PER_SPLIT, num_subsplits)

    slots = tl.arange(0, C)
    columns_k = tl.arange(0, BK)
    columns_v = slice_v * BV + tl.arange(0, BV)
    inside = (columns_k < K)[:, None] & (columns_v < V)[None, :]
    distance = slots[None, :] - slots[:, None] if REVERSE else slots[:, None] - slots[None, :]
    within_CC = tl.where(distance >= 0, tl.exp(-slope * tl.maximum(distance, 0)), 0.0)

    state = tl.zeros([BK, BV], tl.float32)
    if HAS_LOCAL:
        # The sub-splits that contribute to the state at this split's boundary: of its document, and not decayed away.
        boundary = high if REVERSE else low
        is_open = boundary < num_tiles if REVERSE else boundary > 0
        if is_open:
            boundary_token = tl.load(starts + boundary)
            document = tl.load(document_ids + boundary)
            document_start = tl.load(cu_seqlens + document)
            document_end = tl.load(cu_seqlens + document + 1)
            begun = boundary_token > document_start
            subsplits = tl.arange(0, SUBSPLITS)
            ends = _first_tile(num_tiles, subsplits if REVERSE else subsplits + 1, num_subsplits)
            ends_token = tl.load(starts + ends, mask=subsplits < num_subsplits, other=0)
            remembered = tl.abs(boundary_token - ends_token) * slope <= DECAY_CUTOFF
            if REVERSE:
                exists = (subsplits >= split * PER_SPLIT + PER_SPLIT) & (subsplits < num_subsplits)
                contributes = exists & (ends_token < document_end)
                from_subsplit = split * PER_SPLIT + PER_SPLIT
                to_subsplit = from_subsplit + tl.sum((contributes & remembered & begun).to(tl.int32), 0)
            else:
                contributes = (subsplits < split * PER_SPLIT) & (ends_token > document_start)
                to_subsplit = split * PER_SPLIT
                from_subsplit = to_subsplit - tl.sum((contributes & remembered).to(tl.int32), 0)
            for f in range(from_subsplit, to_subsplit):
                end = _first_tile(num_tiles, f if REVERSE else f + 1, num_subsplits)
                away = tl.abs(boundary_token - tl.load(starts + end))
                row = f - PER_SPLIT if REVERSE else f
                at = _state_cells(local, row, h, local_f, local_h, local_k, local_v, columns_k, columns_v)
                state += tl.load(at, mask=inside, other=0.0) * tl.exp(-slope * away)
            if HAS_INITIAL:
                away = document_end - boundary_token if REVERSE else boundary_token - document_start
                n = tl.load(rows + document) if INITIAL_MAPPED else document
                if begun & (n >= 0) & (away * slope <= DECAY_CUTOFF):
                    at = _state_cells(initial, n, h, initial_n, initial_h, initial_k, initial_v, columns_k, columns_v)
                    state += tl.load(at, mask=inside, other=0.0).to(tl.float32) * tl.exp(-slope * away)

    # The next tile's place is passed from step to step: loaded in the same step as the tensors whose addresses it
    # gives, it would cost the software pipeline a stage.
    next_start = tl.load(starts + (high - 1 if REVERSE else low)).to(tl.int64)
    next_info = tl.load(infos + (high - 1 if REVERSE else low))
    for step in range(0, high - low):
        m = high - 1 - step if REVERSE else low + step
        start = next_start
        info = next_info
        following = tl.maximum(m - 1, 0) if REVERSE else tl.minimum(m + 1, num_tiles - 1)
        next_start = tl.load(starts + following).to(tl.int64)
        next_info = tl.load(infos + following)
        length = info >> LENGTH_SHIFT
        is_first = (info & (ENDS if REVERSE else BEGINS)) != 0
        valid = slots < length
        x_CK = _load_rows(x + start * x_t + h * x_h, x_t, valid, columns_k, K, C, BK)
        y_CK = _load_rows(y + start * y_t + h * y_h, y_t, valid, columns_k, K, C, BK)
        z_CV = _load_rows(z + start * z_t + h * z_h, z_t, valid, columns_v, V, C, BV)
        # Decay from the state before the tile to a slot, and from a slot to the state after the tile.
        before = slots + 1
        after = tl.maximum(length - 1 - slots, 0)
        from_state = tl.exp(-slope * (after if REVERSE else before))
        to_state = tl.exp(-slope * (before if REVERSE else after))
        through = tl.exp(-slope * length)
        if HAS_INITIAL:
            if is_first:
                n = tl.load(document_ids + m)
                n = tl.load(rows + n) if INITIAL_MAPPED else n
                at = _state_cells(initial, n, h, initial_n, initial_h, initial_k, initial_v, columns_k, columns_v)
                state = tl.load(at, mask=inside & (n >= 0) if INITIAL_MAPPED else inside, other=0.0).to(tl.float32)
        else:
            from_state = tl.where(is_first, 0.0, from_state)
            through = tl.where(is_first, 0.0, through)

        scores_CC = tl.dot(x_CK, tl.trans(y_CK), input_precision=PRECISION)
        acc_CV = tl.dot(x_CK, state.to(x_CK.dtype), input_precision=PRECISION)
        weighted_CV = (z_CV * to_state[:, None]).to(z_CV.dtype)
        state = tl.dot(tl.trans(y_CK), weighted_CV, state * through, input_precision=PRECISION)
        scores_CC = (scores_CC * within_CC).to(z_CV.dtype)
        acc_CV = tl.dot(scores_CC, z_CV, acc_CV * from_state[:, None], input_precision=PRECISION)

        cells = out + start * out_t + h * out_h + slots[:, None] * out_t + columns_v[None, :]
        tl.store(cells, acc_CV.to(out.dtype.element_ty), mask=valid[:, None] & (columns_v < V)[None, :])
        if HAS_FINAL:
            if (info & (BEGINS if REVERSE else ENDS)) != 0:
                n = tl.load(document_ids + m)
                n = tl.load(rows + n) if FINAL_MAPPED else n
                at = _state_cells(final, n, h, final_n, final_h, final_k, final_v, columns_k, columns_v)
                tl.store(at, state, mask=inside & (n >= 0) if FINAL_MAPPED else inside)
