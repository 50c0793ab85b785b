"""Triton kernels around the experts' GEMMs; :mod:`minimax_train.kernels.experts.triton` composes them.

All indices are of assignments, token-major (``token * K + k``), or of routed tokens, sorted by expert. Every output
element has one writer, and counts, sums of probabilities and entropy are sums of integers, so results do not depend on
the order in which programs run.

Shape legend: T tokens, D hidden, E experts, F expert hidden, K assignments per token, R = T * K routed tokens. A block
of X is BX.
"""

import triton
import triton.language as tl

ONE = tl.constexpr(2.0**32)
"""In sums of integers, which do not depend on their order as those of floating-point numbers do."""


@triton.jit
def route(
    logits, spans, probabilities, weights, experts, counts, sums, entropy, T,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Softmax, the K largest (of equals the first), renormalised.

    ``counts [P, E]`` grows by each span's tokens, ``sums [P, E]`` by its probabilities, ``entropy`` by that of all
    tokens, the last two in units of :data:`ONE`.
    """
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.arange(0, BE)
    slots = tl.arange(0, BK)
    valid = tokens < T
    inside = valid[:, None] & (columns < E)[None, :]
    x_TE = tl.load(logits + tokens[:, None] * E + columns[None, :], mask=inside, other=0.0)
    x_TE = tl.where((columns < E)[None, :], x_TE, float("-inf"))
    p_TE = tl.exp(x_TE - tl.max(x_TE, 1)[:, None])
    total_T = tl.sum(p_TE, 1)
    p_TE = p_TE / total_T[:, None]
    tl.store(probabilities + tokens[:, None] * E + columns[None, :], p_TE, mask=inside)

    left_TE = tl.where((columns < E)[None, :], p_TE, -1.0)
    chosen_TE = tl.zeros([BT, BE], tl.int64)
    best_TK = tl.zeros([BT, BK], tl.float32)
    expert_TK = tl.zeros([BT, BK], tl.int64)
    for k in tl.static_range(K):
        best_T = tl.max(left_TE, 1)
        # Probabilities of NaN equal nothing: the assignments must still be experts.
        expert_T = tl.min(tl.where(left_TE == best_T[:, None], columns[None, :], E - 1), 1)
        hit_TE = columns[None, :] == expert_T[:, None]
        left_TE = tl.where(hit_TE, -1.0, left_TE)
        chosen_TE += hit_TE.to(tl.int64)
        best_TK = tl.where((slots == k)[None, :], best_T[:, None], best_TK)
        expert_TK = tl.where((slots == k)[None, :], expert_T[:, None].to(tl.int64), expert_TK)
    at = tokens[:, None] * K + slots[None, :]
    mask = valid[:, None] & (slots < K)[None, :]
    # The only output that tells of logits of NaN: sums of integers do not.
    weight_TK = tl.where((total_T == total_T)[:, None], best_TK / tl.sum(best_TK, 1)[:, None], float("nan"))
    tl.store(weights + at, weight_TK, mask=mask)
    tl.store(experts + at, expert_TK, mask=mask)

    chosen_TE = tl.where(inside, chosen_TE, 0)
    p_TE = tl.where(inside, p_TE, 0.0)
    entropy_T = -tl.sum(p_TE * tl.log(tl.maximum(p_TE, 1e-37)), 1)
    tl.atomic_add(entropy, (tl.sum(entropy_T, 0) * ONE).to(tl.int64), sem="relaxed")
    first = tl.load(spans + tl.program_id(0).to(tl.int64) * BT)
    last = tl.load(spans + tl.minimum(tl.program_id(0).to(tl.int64) * BT + BT, T) - 1)
    if first == last:
        tl.atomic_add(counts + first * E + columns, tl.sum(chosen_TE, 0), mask=columns < E, sem="relaxed")
        units_E = (tl.sum(p_TE, 0) * ONE).to(tl.int64)
        tl.atomic_add(sums + first * E + columns, units_E, mask=columns < E, sem="relaxed")
    else:
        span_T = tl.load(spans + tokens, mask=valid, other=0)
        at_TE = span_T[:, None] * E + columns[None, :]
        tl.atomic_add(counts + at_TE, chosen_TE, mask=chosen_TE > 0, sem="relaxed")
        tl.atomic_add(sums + at_TE, (p_TE * ONE).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit
def route_backward(
    probabilities, experts, spans, d_sums, d_weights, d_logits, T,
    E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
    HAS_SUMS: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """With ``w_k = p_k / s``, ``dp_k`` is the gradient of its span's sum and ``(dw_k - sum_j dw_j w_j) / s``; then the
    gradient of the softmax."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.arange(0, BE)
    valid = tokens < T
    at = tokens[:, None] * E + columns[None, :]
    inside = valid[:, None] & (columns < E)[None, :]
    p_TE = tl.load(probabilities + at, mask=inside, other=0.0)
    dp_TE = tl.zeros([BT, BE], tl.float32)
    if HAS_SUMS:
        span_T = tl.load(spans + tokens, mask=valid, other=0)
        dp_TE += tl.load(d_sums + span_T[:, None] * E + columns[None, :], mask=inside, other=0.0)
    if HAS_WEIGHTS:
        chosen_T = tl.zeros([BT], tl.float32)
        dot_T = tl.zeros([BT], tl.float32)
        for k in tl.static_range(K):
            expert_T = tl.load(experts + tokens * K + k, mask=valid, other=0)
            dw_T = tl.load(d_weights + tokens * K + k, mask=valid, other=0.0)
            p_T = tl.sum(tl.where(columns[None, :] == expert_T[:, None], p_TE, 0.0), 1)
            chosen_T += p_T
            dot_T += p_T * dw_T
        chosen_T = tl.where(valid, chosen_T, 1.0)
        mean_T = dot_T / chosen_T
        for k in tl.static_range(K):
            expert_T = tl.load(experts + tokens * K + k, mask=valid, other=0)
            dw_T = tl.load(d_weights + tokens * K + k, mask=valid, other=0.0)
            share_T = (dw_T - mean_T) / chosen_T
            dp_TE += tl.where(columns[None, :] == expert_T[:, None], share_T[:, None], 0.0)
    d_TE = p_TE * (dp_TE - tl.sum(dp_TE * p_TE, 1)[:, None])
    tl.store(d_logits + at, d_TE, mask=inside)


@triton.jit
def add_router_gradient(
    d_logits, weight, d_x, out, T, d_x_t,
    D: tl.constexpr, E: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """``out = d_x + (high + low) weight``, summed in float32.

    ``d_logits`` is ``[T, 2E]`` in the dtype of the weight: of each token all that is high, then all that is low.
    FACTOR is the dtype in which they are multiplied.
    """
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    experts = tl.arange(0, BE)
    mask_TE = (tokens < T)[:, None] & (experts < E)[None, :]
    mask_ED = (experts < E)[:, None] & (columns < D)[None, :]
    mask_TD = (tokens < T)[:, None] & (columns < D)[None, :]
    high = d_logits + tokens[:, None] * 2 * E + experts[None, :]
    high_TE = tl.load(high, mask=mask_TE, other=0.0).to(FACTOR)
    low_TE = tl.load(high + E, mask=mask_TE, other=0.0).to(FACTOR)
    weight_ED = tl.load(weight + experts[:, None] * D + columns[None, :], mask=mask_ED, other=0.0).to(FACTOR)
    acc_TD = tl.load(d_x + tokens[:, None] * d_x_t + columns[None, :], mask=mask_TD, other=0.0).to(tl.float32)
    acc_TD = tl.dot(low_TE, weight_ED, acc_TD)
    acc_TD = tl.dot(high_TE, weight_ED, acc_TD)
    tl.store(out + tokens[:, None] * D + columns[None, :], acc_TD.to(out.dtype.element_ty), mask=mask_TD)


@triton.jit
def _expert_of(experts, assignments, R, E: tl.constexpr):
    """The expert of each assignment, int32; E where it is none (-1), and past the last one -1, which counts nowhere."""
    expert = tl.load(experts + assignments, mask=assignments < R, other=0).to(tl.int32)
    return tl.where(assignments < R, tl.where(expert < 0, E, expert), -1)


@triton.jit
def count(experts, histogram, R, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr):
    """``histogram[b, e]``: assignments to e in block b of the assignments."""
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BE)
    expert_R = _expert_of(experts, block * BR + tl.arange(0, BR), R, E)
    hit_RE = (expert_R[:, None] == columns[None, :]).to(tl.int32)
    tl.store(histogram + block * BE + columns, tl.sum(hit_RE, 0))


@triton.jit
def scan(histogram, starts, offsets, blocks, E: tl.constexpr, BE: tl.constexpr, STEP: tl.constexpr):
    """In place, counts to how many assignments to e come before block b; where each expert's tokens start and end."""
    columns = tl.arange(0, BE)
    total_E = tl.zeros([BE], tl.int32)
    for first in range(0, blocks, STEP):
        rows = first + tl.arange(0, STEP)
        at = histogram + rows[:, None] * BE + columns[None, :]
        counts = tl.load(at, mask=(rows < blocks)[:, None], other=0)
        tl.store(at, tl.cumsum(counts, 0) - counts + total_E[None, :], mask=(rows < blocks)[:, None])
        total_E += tl.sum(counts, 0)
    ends_E = tl.cumsum(total_E, 0)
    tl.store(starts + columns, ends_E - total_E)
    tl.store(offsets + columns, ends_E, mask=columns < E)


@triton.jit
def rank(
    experts, histogram, starts, routed_of, assignment_of, R, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    """The routed token of each assignment, and the reverse: within an expert, in the order of the assignments."""
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BE)
    assignments = block * BR + tl.arange(0, BR)
    expert_R = _expert_of(experts, assignments, R, E)
    hit_RE = (expert_R[:, None] == columns[None, :]).to(tl.int32)
    first_E = tl.load(histogram + block * BE + columns) + tl.load(starts + columns)
    routed_R = tl.sum(hit_RE * (tl.cumsum(hit_RE, 0) - 1 + first_E[None, :]), 1).to(tl.int64)
    tl.store(routed_of + assignments, routed_R, mask=assignments < R)
    tl.store(assignment_of + routed_R, assignments, mask=assignments < R)


@triton.jit
def permute(
    x, routed_of, offsets, out, T, x_t,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``out[routed token] = x[token]``, each token read once; zero where there is no expert."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    valid = tokens < T
    mask = valid[:, None] & (columns < D)[None, :]
    x_TD = tl.load(x + tokens[:, None] * x_t + columns[None, :], mask=mask, other=0.0)
    used = tl.load(offsets + E - 1)
    for k in tl.static_range(K):
        routed_T = tl.load(routed_of + tokens * K + k, mask=valid, other=0)
        at = out + routed_T[:, None] * D + columns[None, :]
        tl.store(at, tl.where((routed_T < used)[:, None], x_TD, 0.0), mask=mask)


@triton.jit
def unpermute(
    y, weights, routed_of, offsets, x, out, weights_out, T, x_t, scale,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``out[t] = sum over k of y[routed token] + scale x[t]``, without x the sum; and, if there are weights,
    ``weights_out[t, k] = weights[routed token]``. Without an expert neither is read: 0."""
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    valid = tokens < T
    used = tl.load(offsets + E - 1)
    acc_TD = tl.zeros([BT, BD], tl.float32)
    for k in tl.static_range(K):
        routed_T = tl.load(routed_of + tokens * K + k, mask=valid, other=0)
        mask = (valid & (routed_T < used))[:, None] & (columns < D)[None, :]
        acc_TD += tl.load(y + routed_T[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if weights is not None:
            is_first = tl.program_id(1) == 0
            weight_T = tl.load(weights + routed_T, mask=valid & (routed_T < used) & is_first, other=0.0)
            tl.store(weights_out + tokens * K + k, weight_T, mask=valid & is_first)
    mask = valid[:, None] & (columns < D)[None, :]
    if x is not None:
        acc_TD += scale * tl.load(x + tokens[:, None] * x_t + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + tokens[:, None] * D + columns[None, :], acc_TD.to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu(
    gate_up, weights, offsets, act, E: tl.constexpr, F: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """``act = weight * silu(gate) * up``; where there is no expert, nothing is read or written."""
    routed = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    columns = tl.program_id(1) * BF + tl.arange(0, BF)
    used = tl.load(offsets + E - 1)
    mask = (routed < used)[:, None] & (columns < F)[None, :]
    at = gate_up + routed[:, None] * (2 * F) + columns[None, :]
    gate_RF = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up_RF = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    act_RF = gate_RF * tl.sigmoid(gate_RF) * up_RF
    act_RF *= tl.load(weights + routed, mask=routed < used, other=0.0).to(tl.float32)[:, None]
    tl.store(act + routed[:, None] * F + columns[None, :], act_RF.to(act.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward(
    gate_up, weights, offsets, d_act, d_gate_up, act, d_weights,
    E: tl.constexpr, F: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Gradients of ``swiglu`` and, again, its output; ``act`` may be ``d_act`` itself."""
    routed = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    used = tl.load(offsets + E - 1)
    w_R1 = tl.load(weights + routed, mask=routed < used, other=0.0).to(tl.float32)[:, None]
    dot_R = tl.zeros([BR], tl.float32)
    for first in range(0, F, BF):
        columns = first + tl.arange(0, BF)
        mask = (routed < used)[:, None] & (columns < F)[None, :]
        wide = routed[:, None] * (2 * F) + columns[None, :]
        narrow = routed[:, None] * F + columns[None, :]
        gate_RF = tl.load(gate_up + wide, mask=mask, other=0.0).to(tl.float32)
        up_RF = tl.load(gate_up + wide + F, mask=mask, other=0.0).to(tl.float32)
        d_RF = tl.load(d_act + narrow, mask=mask, other=0.0).to(tl.float32)
        s_RF = tl.sigmoid(gate_RF)
        silu_RF = gate_RF * s_RF
        act_RF = silu_RF * up_RF
        dot_R += tl.sum(d_RF * act_RF, 1)
        d_RF *= w_R1
        act_RF *= w_R1
        d_gate_RF = d_RF * up_RF * (s_RF + silu_RF * (1.0 - s_RF))
        element = d_gate_up.dtype.element_ty
        tl.store(d_gate_up + wide, d_gate_RF.to(element), mask=mask)
        tl.store(d_gate_up + wide + F, (d_RF * silu_RF).to(element), mask=mask)
        tl.store(act + narrow, act_RF.to(act.dtype.element_ty), mask=mask)
    tl.store(d_weights + routed, dot_R.to(d_weights.dtype.element_ty), mask=routed < used)
