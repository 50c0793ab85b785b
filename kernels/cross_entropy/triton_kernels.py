"""Logits to their own gradient, in place.

A program owns one token, and has W rows of B of its logits at hand.

Shape legend: C tokens of a chunk, V vocabulary.
"""

import triton
import triton.language as tl


@triton.jit
def _log_sum(row, V: tl.constexpr, W: tl.constexpr, B: tl.constexpr):
    """``log sum_v exp(row[v])`` in float32."""
    offsets = tl.arange(0, W)[:, None] * B + tl.arange(0, B)[None, :]
    steps: tl.constexpr = (V + W * B - 1) // (W * B)
    # A maximum and a sum per column of the tile, so that the walk needs no exchange between threads. Not -inf: the
    # difference of two of those is NaN.
    top_B = tl.full([B], -1.0e30, tl.float32)
    sum_B = tl.zeros([B], tl.float32)
    for step in range(0, steps):
        columns = step * W * B + offsets
        x_WB = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        new_B = tl.maximum(top_B, tl.max(x_WB, 0))
        sum_B = sum_B * tl.exp(top_B - new_B) + tl.sum(tl.exp(x_WB - new_B[None, :]), 0)
        top_B = new_B
    top = tl.max(top_B, 0)
    return top + tl.log(tl.sum(sum_B * tl.exp(top_B - top), 0))


@triton.jit
def _to_gradient(row, label, log_sum, V: tl.constexpr, W: tl.constexpr, B: tl.constexpr):
    """``row <- exp(row - log_sum) - onehot(label)``, from the end, which was read last."""
    offsets = tl.arange(0, W)[:, None] * B + tl.arange(0, B)[None, :]
    steps: tl.constexpr = (V + W * B - 1) // (W * B)
    for step in range(0, steps):
        columns = (steps - 1 - step) * W * B + offsets
        x_WB = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        d_WB = tl.exp(x_WB - log_sum) - (columns == label).to(tl.float32)
        tl.store(row + columns, d_WB.to(row.dtype.element_ty), mask=columns < V)


@triton.jit
def _clear(row, V: tl.constexpr, W: tl.constexpr, B: tl.constexpr):
    offsets = tl.arange(0, W)[:, None] * B + tl.arange(0, B)[None, :]
    for start in range(0, V, W * B):
        tl.store(row + start + offsets, tl.zeros([W, B], row.dtype.element_ty), mask=start + offsets < V)


@triton.jit
def softmax_gradient(
    logits, labels, losses, logits_c, ignored,
    V: tl.constexpr, W: tl.constexpr, B: tl.constexpr, NEEDS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """``losses[c] = -log softmax(logits[c])[label]`` and ``logits[c] <- softmax(logits[c]) - onehot(label)``.

    The second walk over a token's logits goes backwards, so that it begins with what the first has just left in L2.
    """
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * logits_c
    label = tl.load(labels + token)
    if label == ignored:
        tl.store(losses + token, 0.0)
        if NEEDS_GRADIENT:
            _clear(row, V, W, B)
    else:
        at_label = tl.load(row + label).to(tl.float32)
        log_sum = _log_sum(row, V, W, B)
        tl.store(losses + token, log_sum - at_label)
        if NEEDS_GRADIENT:
            _to_gradient(row, label, log_sum, V, W, B)


@triton.jit
def log_sums(logits, out, logits_c, V: tl.constexpr, W: tl.constexpr, B: tl.constexpr):
    """``out[c] = log sum_v exp(logits[c, v])``: the first walk alone, for a vocabulary of which only a part is here."""
    token = tl.program_id(0).to(tl.int64)
    tl.store(out + token, _log_sum(logits + token * logits_c, V, W, B))


@triton.jit
def gradients(
    logits, labels, log_sum, logits_c, ignored, V: tl.constexpr, W: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """``logits[c] <- exp(logits[c] - log_sum[c]) - onehot(label)``: the second walk; a label may lie elsewhere."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * logits_c
    label = tl.load(labels + token)
    if label == ignored:
        _clear(row, V, W, B)
    else:
        _to_gradient(row, label, tl.load(log_sum + token), V, W, B)
