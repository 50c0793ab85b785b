"""The SiLU kernels: flat over the projection forward; backward, a program walks q, k and v of some heads of tokens.

Shape legend: T tokens, H heads, K head dim, R rows, one per token and head. A block of X is BX.
"""

import triton
import triton.language as tl


@triton.jit
def forward(x, out, size, B: tl.constexpr):
    """``out = x * sigmoid(x)``."""
    # Only the start of a block is 64 bits wide: the elements of a block stay cheap to address.
    start = tl.program_id(0).to(tl.int64) * B
    inside = tl.arange(0, B)
    mask = inside < size - start
    x_B = tl.load(x + start + inside, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + inside, (x_B * tl.sigmoid(x_B)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _differentiate(x, d_out, d_x, at, tokens, heads, inside, mask, d_t, d_h, d_k):
    """``d_x`` of one of q, k, v; without a ``d_out`` it is zero."""
    if d_out is None:
        tl.store(d_x + at, tl.zeros(mask.shape, tl.float32).to(d_x.dtype.element_ty), mask=mask)
    else:
        from_d = tokens * d_t + heads * d_h + inside.to(tl.int64) * d_k
        d_RK = tl.load(d_out + from_d, mask=mask, other=0.0).to(tl.float32)
        x_RK = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid_RK = tl.sigmoid(x_RK)
        d_RK *= sigmoid_RK + x_RK * sigmoid_RK * (1.0 - sigmoid_RK)
        tl.store(d_x + at, d_RK.to(d_x.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    x, d_q, d_k, d_v, d_x, rows, q_t, q_h, q_k, k_t, k_h, k_k, v_t, v_h, v_k,
    H: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``d_x`` like the projection, from gradients of q, k and v with strides of their own, or none."""
    rows_R = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    inside = tl.arange(0, BK)[None, :]
    mask = (rows_R < rows) & (inside < K)
    tokens, heads = rows_R // H, rows_R % H
    at = rows_R * (3 * K) + inside
    _differentiate(x, d_q, d_x, at, tokens, heads, inside, mask, q_t, q_h, q_k)
    _differentiate(x, d_k, d_x, at + K, tokens, heads, inside, mask, k_t, k_h, k_k)
    _differentiate(x, d_v, d_x, at + 2 * K, tokens, heads, inside, mask, v_t, v_h, v_k)
