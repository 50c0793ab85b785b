"""The optimizer's kernels, each one pass: a program owns a range of a flat tensor.

Shape legend: N parameters, flat. A block of X is BX.
"""

import triton
import triton.language as tl


@triton.jit
def _one_minus_power(step, log_beta):
    """``1 - beta^step``, precise also where that is far below 1, as in the first steps with a beta near 1."""
    y = step * log_beta
    series = -y * (1.0 + y / 2 * (1.0 + y / 3 * (1.0 + y / 4 * (1.0 + y / 5 * (1.0 + y / 6)))))
    return tl.where(y > -0.125, series, 1.0 - tl.exp(y))


@triton.jit
def _load(x, at, mask):
    return (tl.load(x + at) if mask is None else tl.load(x + at, mask=mask, other=0.0)).to(tl.float32)


@triton.jit
def _store(x, at, value, mask):
    if mask is None:
        tl.store(x + at, value.to(x.dtype.element_ty))
    else:
        tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _update(
    master, grad, exp_avg, exp_avg_sq, weight, at, mask, step_size, inverse_root, decay, grad_scale, beta1, beta2,
    one_minus_beta1, one_minus_beta2, eps,
):  # fmt: skip
    """Updates what lies at ``at``; 1 if any of it is not finite, else 0."""
    grad_B = _load(grad, at, mask) * grad_scale
    avg_B = beta1 * _load(exp_avg, at, mask) + one_minus_beta1 * grad_B
    sq_B = beta2 * _load(exp_avg_sq, at, mask) + one_minus_beta2 * grad_B * grad_B
    master_B = _load(master, at, mask)
    # Not times 1 - decay: rounded to float32, that would have lost what a small decay is.
    master_B -= decay * master_B
    master_B -= step_size * avg_B / (tl.sqrt(sq_B) * inverse_root + eps)
    _store(exp_avg, at, avg_B, mask)
    _store(exp_avg_sq, at, sq_B, mask)
    _store(master, at, master_B, mask)
    if weight is not None:
        _store(weight, at, master_B, mask)
    return tl.max((master_B - master_B != 0.0).to(tl.int32), 0)


@triton.jit
def adamw(
    master, grad, exp_avg, exp_avg_sq, weight, step, learning_rate, grad_scale, frozen, not_finite, size,
    log_beta1, log_beta2, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, weight_decay, B: tl.constexpr,
):  # fmt: skip
    """One update of a block. The scalars are read from memory, so that a captured graph follows them."""
    if tl.load(frozen).to(tl.float32) == 0.0:
        # Only the start of a block is 64 bits wide: the elements of a block stay cheap to address.
        start = tl.program_id(0).to(tl.int64) * B
        at = start + tl.arange(0, B)
        t, rate = tl.load(step).to(tl.float32), tl.load(learning_rate).to(tl.float32)
        step_size = rate / _one_minus_power(t, log_beta1)
        inverse_root = 1.0 / tl.sqrt(_one_minus_power(t, log_beta2))
        scale = tl.load(grad_scale).to(tl.float32)
        # A whole block has no mask: loads are 16 bytes wide whatever the size.
        if start + B <= size:
            bad = _update(
                master, grad, exp_avg, exp_avg_sq, weight, at, None, step_size, inverse_root, rate * weight_decay,
                scale, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
            )  # fmt: skip
        else:
            bad = _update(
                master, grad, exp_avg, exp_avg_sq, weight, at, at < size, step_size, inverse_root, rate * weight_decay,
                scale, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
            )  # fmt: skip
        if bad != 0:
            tl.store(not_finite, tl.full([], 1, not_finite.dtype.element_ty))


@triton.jit
def sum_squares(x, partial, size, B: tl.constexpr, BLOCKS: tl.constexpr):
    """The sum over BLOCKS blocks in a row: float32 within, a float64 of ``partial`` for each program."""
    start = tl.program_id(0).to(tl.int64) * (B * BLOCKS)
    sum_B = tl.zeros([B], tl.float32)
    if start + B * BLOCKS <= size:
        for block in tl.static_range(BLOCKS):
            x_B = _load(x, start + block * B + tl.arange(0, B), None)
            sum_B += x_B * x_B
    else:
        for block in range(BLOCKS):
            at = start + block * B + tl.arange(0, B)
            x_B = _load(x, at, at < size)
            sum_B += x_B * x_B
    tl.store(partial + tl.program_id(0), tl.sum(sum_B, 0).to(tl.float64))
