"""Logits to their own gradient, in place.

A program owns one token, and has W rows of B of its logits at hand.

Shape legend: C tokens of a chunk, V vocabulary.
"""

import triton
import triton.language as tl


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
    offsets = tl.arange(0, W)[:, None] * B + tl.arange(0, B)[None, :]
    steps: tl.constexpr = (V + W * B - 1) // (W * B)
    if label == ignored:
        tl.store(losses + token, 0.0)
        if NEEDS_GRADIENT:
            for step in range(0, steps):
                columns = step * W * B + offsets
                tl.store(row + columns, tl.zeros([W, B], logits.dtype.element_ty), mask=columns < V)
    else:
        at_label = tl.load(row + label).to(tl.float32)
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
        log_sum = top + tl.log(tl.sum(sum_B * tl.exp(top_B - top), 0))
        tl.store(losses + token, log_sum - at_label)
        if NEEDS_GRADIENT:
            for step in range(0, steps):
                columns = (steps - 1 - step) * W * B + offsets
                x_WB = tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
                d_WB = tl.exp(x_WB - log_sum) - (columns == label).to(tl.float32)
                tl.store(row + columns, d_WB.to(logits.dtype.element_ty), mask=columns < V)
