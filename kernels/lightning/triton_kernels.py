"""The Triton kernels of lightning attention; :mod:`minimax_train.kernels.lightning.triton` says how they compose.

All walk chunks of at most C tokens, each inside one document, forwards or (REVERSE) backwards. ``attend`` computes
``out_i = sum_j decay^|i - j| (x_i . y_j) z_j`` over the tokens j of i's document on its side of i, token i included,
in one pass over a segment of chunks, carrying the float32 state ``sum_j decay^... y_j z_j^T`` in registers. Where the
token axis is cut in several segments, ``partials`` has first summed the states that cross the cuts; ``states`` does so
for any ranges of tokens, for ranks that share documents.

Every decay is the exponential of a non-positive number. Contributions that have decayed below exp(-REACH) before they
reach the segment that would use them are dropped: 4e-8 of the state they would join, below float32 rounding.

Shape legend: T tokens, H heads, K dim of x and y, V dim of z, C tokens per chunk, M chunks, N documents, F fine
segments. A fine segment is one share of ``partials``; ``PER`` consecutive fine segments are one segment of ``attend``.
"""

import torch
import triton
import triton.language as tl

from minimax_train.kernels.lightning import parts

REACH = tl.constexpr(parts.REACH[torch.float32])
# Least chunks in a piece of ``states``.
SHORTEST = tl.constexpr(8)
# Bits of a chunk's info word: whether its document begins and ends with it, then its length.
BEGINS = tl.constexpr(1)
ENDS = tl.constexpr(2)
LENGTH_SHIFT = tl.constexpr(2)


@triton.jit
def _cut(num_chunks, fine, num_fine):
    """The chunk that fine segment ``fine`` begins with."""
    return (num_chunks.to(tl.int64) * fine // num_fine).to(tl.int32)


@triton.jit
def _reach(slope):
    """A distance that no contribution outlives, a little generous so that rounding cannot shorten it."""
    return tl.minimum(1.001 / tl.maximum(slope, 1e-12) * REACH + 2, 1.0e9).to(tl.int32)


@triton.jit
def _cells(states, n, h, stride_n, stride_h, stride_k, stride_v, columns_k, columns_v):
    """Where the elements of the state of row n and head h lie."""
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
        # Weights are local to the tile: near one for a slow head, so that rounding z to its dtype costs nothing.
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
def partials(
    y, z, partial, slopes, starts, owners, cu_seqlens,
    y_t, y_h, z_t, z_h,
    num_chunks, num_fine, PER,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``partial[f, h]``: what fine segment f adds to the state of the one document that leaves it. ``[F', H, K, V]``.

    Written only where some segment of ``attend`` will read it, from the tokens that reach that segment. F' is F - PER:
    nothing reads what the last segment (REVERSE: the first) hands on.
    """
    slice_v = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)  # times a stride it may not fit in 32 bits
    row = tl.program_id(2)
    slope = tl.load(slopes + h).to(tl.float32)
    fine = row + PER if REVERSE else row
    # The cut the state crosses, the segment's other edge, and the nearest boundary where a segment may read it.
    cut = _cut(num_chunks, fine if REVERSE else fine + 1, num_fine)
    nearest = (fine // PER) * PER if REVERSE else (fine // PER + 1) * PER
    cut_token = tl.load(starts + cut)
    far_token = tl.load(starts + _cut(num_chunks, fine + 1 if REVERSE else fine, num_fine))
    reader = tl.load(starts + _cut(num_chunks, nearest, num_fine))
    reach = _reach(slope)
    document = tl.load(owners + cut)
    document_start = tl.load(cu_seqlens + document)
    document_end = tl.load(cu_seqlens + document + 1)
    begin = cut_token
    end = cut_token
    if cut_token > document_start:
        if REVERSE:
            if document_start < reader:
                end = tl.minimum(tl.minimum(document_end, far_token), reader + reach)
        else:
            if document_end > reader:
                begin = tl.maximum(tl.maximum(document_start, far_token), reader - reach)
    if begin < end:
        columns_k = tl.arange(0, BK)
        columns_v = slice_v * BV + tl.arange(0, BV)
        inside = (columns_k < K)[:, None] & (columns_v < V)[None, :]
        state = tl.zeros([BK, BV], tl.float32)
        state = _accumulate(
            y + h * y_h, z + h * z_h, y_t, z_t, begin, end, slope, state, columns_k, columns_v,
            K, V, C, BK, BV, REVERSE, PRECISION,
        )  # fmt: skip
        to = partial + (row.to(tl.int64) * H + h) * K * V + columns_k[:, None] * V + columns_v[None, :]
        tl.store(to, state, mask=inside)


@triton.jit
def share_pieces(
    places, slopes, edges, N,
    H: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Cut the tokens that ``states`` sums in pieces of one size, about PIECES of them.

    A column is a token range and a head. ``places [N + 2]``: the first piece of each of the N columns, how many pieces
    there are, and the tokens of one.
    """
    column = tl.arange(0, COLUMNS)
    inside = column < N
    begin = tl.load(edges + 2 * (column // H), mask=inside, other=0)
    end = tl.load(edges + 2 * (column // H) + 1, mask=inside, other=0)
    slope = tl.load(slopes + column % H, mask=inside, other=1.0).to(tl.float32)
    tokens = tl.where(inside, tl.minimum(end - begin, _reach(slope)), 0)
    size = tl.maximum((tl.sum(tokens, 0) + C * PIECES - 1) // (C * PIECES), SHORTEST) * C
    count = (tokens + size - 1) // size
    tl.store(places + column, tl.cumsum(count, 0) - count, mask=inside)
    tl.store(places + N, tl.sum(count, 0))
    tl.store(places + N + 1, size)


@triton.jit
def states(
    y, z, out, places, slopes, edges, N, y_t, y_h, z_t, z_h,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    COLUMNS: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[p]``: what piece p adds to the state that leaves its range at the end (REVERSE: at the start).

    ``out [.., K, V]``; pieces past the last are not written.
    """
    slice_v = tl.program_id(0)
    p = tl.program_id(1)
    if p < tl.load(places + N):
        size = tl.load(places + N + 1)
        columns = tl.arange(0, COLUMNS)
        begun = tl.load(places + columns, mask=columns < N, other=p + 1) <= p
        column = tl.sum(begun.to(tl.int32), 0) - 1
        h = (column % H).to(tl.int64)
        slope = tl.load(slopes + h).to(tl.float32)
        begin = tl.load(edges + 2 * (column // H))
        end = tl.load(edges + 2 * (column // H) + 1)
        # From where the state leaves: a reach that came out otherwise than above would cost what has decayed, no more.
        away = (p - tl.load(places + column)) * size
        if REVERSE:
            low = begin + away
            high = tl.minimum(tl.minimum(low + size, end), begin + _reach(slope))
        else:
            high = end - away
            low = tl.maximum(tl.maximum(high - size, begin), end - _reach(slope))
        columns_k = tl.arange(0, BK)
        columns_v = slice_v * BV + tl.arange(0, BV)
        state = tl.zeros([BK, BV], tl.float32)
        state = _accumulate(
            y + h * y_h, z + h * z_h, y_t, z_t, low, high, slope, state, columns_k, columns_v,
            K, V, C, BK, BV, REVERSE, PRECISION,
        )  # fmt: skip
        to = out + p.to(tl.int64) * K * V + columns_k[:, None] * V + columns_v[None, :]
        tl.store(to, state * tl.exp(-slope * away), mask=(columns_k < K)[:, None] & (columns_v < V)[None, :])


@triton.jit
def add_pieces(pieces, out, places, KV: tl.constexpr, B: tl.constexpr):
    """``out[column]``: the sum of a column's pieces, in order. ``out [N, KV]``."""
    column = tl.program_id(1)
    cells = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    first = tl.load(places + column)
    at = pieces + first.to(tl.int64) * KV + cells
    for _ in range(0, tl.load(places + column + 1) - first):
        total += tl.load(at, mask=cells < KV, other=0.0)
        at += KV
    tl.store(out + column.to(tl.int64) * KV + cells, total, mask=cells < KV)


@triton.jit
def attend(
    x, y, z, out, initial, final, partial, slopes, starts, infos, owners, rows, cu_seqlens,
    x_t, x_h, y_t, y_h, z_t, z_h, out_t, out_h,
    initial_n, initial_h, initial_k, initial_v, final_n, final_h, final_k, final_v,
    partial_f, partial_h, partial_k, partial_v,
    num_chunks, num_fine, PER,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_PARTIAL: tl.constexpr,
    INITIAL_MAPPED: tl.constexpr, FINAL_MAPPED: tl.constexpr, FINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out [T, H, V]`` of one head, slice of V and segment; ``final [N, H, K, V]`` of the documents it ends."""
    slice_v = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)  # times a stride it may not fit in 32 bits
    segment = tl.program_id(2)
    slope = tl.load(slopes + h).to(tl.float32)
    low = _cut(num_chunks, segment * PER, num_fine)
    high = _cut(num_chunks, segment * PER + PER, num_fine)

    slots = tl.arange(0, C)
    columns_k = tl.arange(0, BK)
    columns_v = slice_v * BV + tl.arange(0, BV)
    inside = (columns_k < K)[:, None] & (columns_v < V)[None, :]
    distance = slots[None, :] - slots[:, None] if REVERSE else slots[:, None] - slots[None, :]
    within_CC = tl.where(distance >= 0, tl.exp(-slope * tl.maximum(distance, 0)), 0.0)

    state = tl.zeros([BK, BV], tl.float32)
    if HAS_PARTIAL:
        # The fine segments whose states reach this segment's edge: of the same document, and not decayed away.
        cut = high if REVERSE else low
        is_open = cut < num_chunks if REVERSE else cut > 0
        if is_open:
            cut_token = tl.load(starts + cut)
            document = tl.load(owners + cut)
            document_start = tl.load(cu_seqlens + document)
            document_end = tl.load(cu_seqlens + document + 1)
            begun = cut_token > document_start
            fines = tl.arange(0, FINE)
            ends = _cut(num_chunks, fines if REVERSE else fines + 1, num_fine)
            ends_token = tl.load(starts + ends, mask=fines < num_fine, other=0)
            near = tl.abs(cut_token - ends_token) * slope <= REACH
            if REVERSE:
                reaching = (fines >= segment * PER + PER) & (fines < num_fine) & (ends_token < document_end)
                from_fine = segment * PER + PER
                to_fine = from_fine + tl.sum((reaching & near & begun).to(tl.int32), 0)
            else:
                reaching = (fines < segment * PER) & (ends_token > document_start)
                to_fine = segment * PER
                from_fine = to_fine - tl.sum((reaching & near).to(tl.int32), 0)
            for f in range(from_fine, to_fine):
                end = _cut(num_chunks, f if REVERSE else f + 1, num_fine)
                away = tl.abs(cut_token - tl.load(starts + end))
                row = f - PER if REVERSE else f
                at = _cells(partial, row, h, partial_f, partial_h, partial_k, partial_v, columns_k, columns_v)
                state += tl.load(at, mask=inside, other=0.0) * tl.exp(-slope * away)
            if HAS_INITIAL:
                away = document_end - cut_token if REVERSE else cut_token - document_start
                n = tl.load(rows + document) if INITIAL_MAPPED else document
                if begun & (n >= 0) & (away * slope <= REACH):
                    at = _cells(initial, n, h, initial_n, initial_h, initial_k, initial_v, columns_k, columns_v)
                    state += tl.load(at, mask=inside, other=0.0).to(tl.float32) * tl.exp(-slope * away)

    # The next chunk's place is carried from step to step: loaded in the same step as the tensors whose addresses it
    # gives, it would cost the software pipeline a stage.
    next_start = tl.load(starts + (high - 1 if REVERSE else low)).to(tl.int64)
    next_info = tl.load(infos + (high - 1 if REVERSE else low))
    for step in range(0, high - low):
        m = high - 1 - step if REVERSE else low + step
        start = next_start
        info = next_info
        following = tl.maximum(m - 1, 0) if REVERSE else tl.minimum(m + 1, num_chunks - 1)
        next_start = tl.load(starts + following).to(tl.int64)
        next_info = tl.load(infos + following)
        length = info >> LENGTH_SHIFT
        enters = (info & (ENDS if REVERSE else BEGINS)) != 0
        valid = slots < length
        x_CK = _load_rows(x + start * x_t + h * x_h, x_t, valid, columns_k, K, C, BK)
        y_CK = _load_rows(y + start * y_t + h * y_h, y_t, valid, columns_k, K, C, BK)
        z_CV = _load_rows(z + start * z_t + h * z_h, z_t, valid, columns_v, V, C, BV)
        # Decay from the entering state to a slot, and from a slot to the leaving state.
        before = slots + 1
        after = tl.maximum(length - 1 - slots, 0)
        from_state = tl.exp(-slope * (after if REVERSE else before))
        to_state = tl.exp(-slope * (before if REVERSE else after))
        through = tl.exp(-slope * length)
        if HAS_INITIAL:
            if enters:
                n = tl.load(owners + m)
                n = tl.load(rows + n) if INITIAL_MAPPED else n
                at = _cells(initial, n, h, initial_n, initial_h, initial_k, initial_v, columns_k, columns_v)
                state = tl.load(at, mask=inside & (n >= 0) if INITIAL_MAPPED else inside, other=0.0).to(tl.float32)
        else:
            from_state = tl.where(enters, 0.0, from_state)
            through = tl.where(enters, 0.0, through)

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
                n = tl.load(owners + m)
                n = tl.load(rows + n) if FINAL_MAPPED else n
                at = _cells(final, n, h, final_n, final_h, final_k, final_v, columns_k, columns_v)
                tl.store(at, state, mask=inside & (n >= 0) if FINAL_MAPPED else inside)
