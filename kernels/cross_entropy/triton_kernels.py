"""Logits to their own gradient, in place.

A program owns one token, and walks its logits in tiles of R rows of W.

Shape legend: V vocabulary, R x W a tile.
"""

import triton
import triton.language as tl


@triton.jit
def _log_sum(row, V: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """``log sum_v exp(row[v])`` in float32."""
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    steps: tl.constexpr = (V + R * W - 1) // (R * W)
    # A maximum and a sum per column of the tile, so that the walk needs no exchange between threads. Not -inf: the
    # difference of two of those is NaN.
    top_W = tl.full([W], -1.0e30, tl.float32)
    sum_W = tl.zeros([W], tl.float32)
    for step in range(0, steps):
        columns = step * R * W + offsets
        x_RW = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        new_W = tl.maximum(top_W, tl.max(x_RW, 0))
        sum_W = sum_W * tl.exp(top_W - new_W) + tl.sum(tl.exp(x_RW - new_W[None, :]), 0)
        top_W = new_W
    top = tl.max(top_W, 0)
    return top + tl.log(tl.sum(sum_W * tl.exp(top_W - top), 0))


@triton.jit
def _to_gradient(row, label, log_sum, V: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """``row <- exp(row - log_sum) - onehot(label)``, from the end, which was read last."""
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    steps: tl.constexpr = (V + R * W - 1) // (R * W)
    for step in range(0, steps):
        columns = (steps - 1 - step) * R * W + offsets
        x_RW = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        d_RW = tl.exp(x_RW - log_sum) - (columns == label).to(tl.float32)
        tl.store(row + columns, d_RW.to(row.dtype.element_ty), mask=columns < V)


@triton.jit
def _clear(row, V: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    offsets = tl.arange(0, R)[:, None] * W + tl.arange(0, W)[None, :]
    for start in range(0, V, R * W):
        tl.store(row + start + offsets, tl.zeros([R, W], row.dtype.element_ty), mask=start + offsets < V)


@triton.jit
def softmax_gradient(
    logits, labels, losses, logits_t, ignored,
    V: tl.constexpr, R: tl.constexpr, W: tl.constexpr, NEEDS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """``losses[t] = -log softmax(logits[t])[label]`` and ``logits[t] <- softmax(logits[t]) - onehot(label)``.

    The second walk over a token's logits goes backwards, so that it begins with what the first has just left in L2.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * logits_t
    label = tl.load(labels + token)
    if label == ignored:
        tl.store(losses + token, 0.0)
        if NEEDS_GRADIENT:
            _clear(row, V, R, W)
    else:
        at_label = tl.load(row + label).to(tl.float32)
        log_sum = _log_sum(row, V, R, W)
        tl.store(losses + token, log_sum - at_label)
        if NEEDS_GRADIENT:
            _to_gradient(row, label, log_sum, V, R, W)


@triton.jit
def log_sums(logits, out, logits_t, V: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """``out[t] = log sum_v exp(logits[t, v])``: the first walk alone, for a vocabulary of which only a part is here."""
    token = tl.program_id(0).to(tl.int64)
    tl.store(out + token, _log_sum(logits + token * logits_t, V, R, W))


@triton.jit
def gradients(
    logits, labels, log_sum, logits_t, ignored, V: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """``logits[t] <- exp(logits[t] - log_sum[t]) - onehot(label)``: the second walk; a label may lie elsewhere."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * logits_t
    label = tl.load(labels + token)
    if label == ignored:
        _clear(row, V, R, W)
    else:
        _to_gradient(row, label, tl.load(log_sum + token), V, R, W)
