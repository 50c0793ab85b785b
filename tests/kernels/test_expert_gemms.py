"""The experts' GEMMs against autograd in float64, one expert at a time."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from minimax_train.kernels.experts import choose_implementation, has_quack
from support.compare import relative_error

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
HAS_QUACK = HAS_GPU and has_quack(torch.device("cuda"))
QUACK = [pytest.mark.gpu, pytest.mark.skipif(not HAS_QUACK, reason="needs quack-kernels and a Hopper GPU")]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}
IMPLEMENTATIONS = [
    ("torch", torch.float64),
    ("torch", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
    pytest.param("grouped", torch.bfloat16, marks=GPU),
    pytest.param("quack", torch.bfloat16, marks=QUACK),
]


def _reference(x, dy, weights, gate_up, down, ends):
    """y, and the gradients of x, weights, gate_up and down."""
    leaves = [value.double().requires_grad_() for value in (x, weights, gate_up, down)]
    x, weights, gate_up, down = leaves
    parts = []
    for e, (start, end) in enumerate(pairwise([0, *ends])):
        gate, up = (x[start:end] @ gate_up[e].T).chunk(2, dim=-1)
        parts.append(weights[start:end, None] * ((F.silu(gate) * up) @ down[e].T))
    y = torch.cat(parts)
    return [y, *torch.autograd.grad(y, leaves, dy.double())]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("ends", [[11, 11, 40], [0, 37, 37], [1, 2, 3]])
@pytest.mark.parametrize("implementation, dtype", IMPLEMENTATIONS)
def test_gemms_equal_autograd(poisoned_empty, implementation, dtype, ends, in_place):
    if implementation == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(sum(ends))
    E, D, hidden, used, R = len(ends), 16, 24, ends[-1], ends[-1] + 5

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE) * scale).bfloat16().to(dtype)

    x, dy, gate_up, down = randn(R, D), randn(R, D), randn(E, 2 * hidden, D, scale=0.25), randn(E, D, hidden, scale=0.2)
    weights = torch.rand(R, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    x[used:] = dy[used:] = weights[used:] = float("nan")  # of no expert: may be anything
    offsets = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    gemms, _ = choose_implementation(x, hidden, implementation)
    kept, act = gemms.up(x, gate_up, offsets, weights)
    y = gemms.down(act, down, offsets)
    # A caller keeps several groups' in one tensor.
    out = tuple(x.new_full((R + 3, width), float("nan"))[3:] for width in (2 * hidden, hidden)) if in_place else None
    d_kept, act_again, d_weights = gemms.d_hidden(dy, kept, down, offsets, weights, out)
    assert out is None or (d_kept is out[0] and act_again is out[1])
    dx = gemms.dx(d_kept, gate_up, offsets)
    d_gate_up, d_down = gemms.d_gate_up(d_kept, x, offsets), gemms.d_down(dy, act_again, offsets)
    right = _reference(x[:used], dy[:used], weights[:used], gate_up, down, ends)
    # Written, and then added: to sums of the same digits, or of more, of which quack loses none.
    spans = list(pairwise([0, *ends]))
    exact_down = torch.stack([dy[a:b].double().T @ act_again[a:b].double() for a, b in spans])
    # quack's rows are gate and up in turns.
    apart = d_kept.unflatten(1, (hidden, 2)).mT.flatten(1) if implementation == "quack" else d_kept
    exact_gate_up = torch.stack([apart[a:b].double().T @ x[a:b].double() for a, b in spans])
    for of in (dtype, torch.promote_types(dtype, torch.float32)):
        twice = [w.new_full(w.shape, float("nan"), dtype=of) for w in (gate_up, down)]
        for adds in (False, True):
            assert gemms.d_gate_up(d_kept, x, offsets, twice[0], adds) is twice[0]
            assert gemms.d_down(dy, act_again, offsets, twice[1], adds) is twice[1]
        for own, expected in zip(twice, right[3:], strict=True):
            assert relative_error(own, 2 * expected) < 2 * TOLERANCES[dtype]
        if implementation == "quack" and of == torch.float32:
            for own, exact in zip(twice, (exact_gate_up, exact_down), strict=True):
                assert relative_error(own, 2 * exact) < 1e-5
    assert act_again[:used].dtype == dtype and relative_error(act_again[:used], act[:used]) < TOLERANCES[dtype]
    ours = [y[:used], dx[:used], d_weights[:used], d_gate_up, d_down]
    for name, a, b in zip(("y", "x", "weights", "gate_up", "down"), ours, right, strict=True):
        assert a.dtype == (weights.dtype if name == "weights" else dtype), name
        assert relative_error(a, b) < TOLERANCES[dtype], name


@pytest.mark.parametrize(
    "implementation",
    ["torch", *(pytest.param(n, marks=GPU) for n in ("triton", "grouped")), pytest.param("quack", marks=QUACK)],
)
def test_no_tokens_at_all(implementation):
    x = torch.empty(0, 16, dtype=torch.bfloat16, device=DEVICE)
    gate_up, down = x.new_ones(2, 48, 16), x.new_ones(2, 16, 24)
    offsets, weights = torch.zeros(2, dtype=torch.int32, device=DEVICE), torch.empty(0, device=DEVICE)
    gemms, _ = choose_implementation(x, 24, implementation)
    kept, act = gemms.up(x, gate_up, offsets, weights)
    y = gemms.down(act, down, offsets)
    d_kept, act, d_weights = gemms.d_hidden(y, kept, down, offsets, weights)
    dx = gemms.dx(d_kept, gate_up, offsets)
    d_gate_up, d_down = gemms.d_gate_up(d_kept, x, offsets), gemms.d_down(y, act, offsets)
    assert y.shape == dx.shape == (0, 16) and d_weights.shape == (0,)
    assert d_gate_up.shape == gate_up.shape and d_down.shape == down.shape and not d_gate_up.any() and not d_down.any()
