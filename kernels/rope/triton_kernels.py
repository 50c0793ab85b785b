"""The rotation kernel: a program turns some heads of some tokens, so that a token's angles are read once per program.

Shape legend: T tokens, H heads, K head dim, R half of the rotary dim. A block of X is BX.
"""

import triton
import triton.language as tl


@triton.jit
def rotate(
    x, out, cos, sin, T, x_t, out_t,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
    BREST: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """``out`` from ``x``, which may be the same memory; then BREST is 0 and what is not rotated is left alone."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None, None]
    heads = tl.program_id(1) * BH + tl.arange(0, BH)[None, :, None]
    pairs = tl.arange(0, BR)[None, None, :]
    mask = (tokens < T) & (pairs < R)
    cos_T1R = tl.load(cos + tokens * R + pairs, mask=mask, other=0.0).to(tl.float32)
    sin_T1R = tl.load(sin + tokens * R + pairs, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin_T1R = -sin_T1R
    mask = mask & (heads < H)
    from_THR = x + tokens * x_t + heads * K + pairs
    to_THR = out + tokens * out_t + heads * K + pairs
    first_THR = tl.load(from_THR, mask=mask, other=0.0).to(tl.float32)
    second_THR = tl.load(from_THR + R, mask=mask, other=0.0).to(tl.float32)
    element = out.dtype.element_ty
    tl.store(to_THR, (first_THR * cos_T1R - second_THR * sin_T1R).to(element), mask=mask)
    tl.store(to_THR + R, (second_THR * cos_T1R + first_THR * sin_T1R).to(element), mask=mask)
    if BREST > 0:
        rest = 2 * R + tl.arange(0, BREST)[None, None, :]
        mask = (tokens < T) & (heads < H) & (rest < K)
        x_THK = tl.load(x + tokens * x_t + heads * K + rest, mask=mask, other=0.0)
        tl.store(out + tokens * out_t + heads * K + rest, x_THK, mask=mask)
