"""The experts' phases against autograd in float64, one expert at a time."""

import pytest
import torch
import torch.nn.functional as F

from minimax_train.kernels.experts import expert_mlp_naive, has_quack, permute, plan_rows
from minimax_train.kernels.experts.phases import (
    experts_backward_down,
    experts_backward_gate_up,
    experts_backward_rows,
    experts_forward,
    tokens_backward,
    tokens_forward,
)
from support.compare import relative_error

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
HAS_QUACK = HAS_GPU and has_quack(torch.device("cuda"))
QUACK = [pytest.mark.gpu, pytest.mark.skipif(not HAS_QUACK, reason="needs quack-kernels and a Hopper GPU")]
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def _reference(x, dy, gate_up, down, ends):
    leaves = [value.double().requires_grad_() for value in (x, gate_up, down)]
    x, gate_up, down = leaves
    parts = []
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        gate, up = (x[start:end] @ gate_up[e].T).chunk(2, dim=-1)
        parts.append((F.silu(gate) * up) @ down[e].T)
    y = torch.cat(parts)
    return [y, *torch.autograd.grad(y, leaves, dy.double())]


def _inputs(rows, E, D, hidden, dtype):
    """x, the gradient of y, and both weights."""

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE) * scale).bfloat16().to(dtype)

    return randn(rows, D), randn(rows, D), randn(E, 2 * hidden, D, scale=0.25), randn(E, D, hidden, scale=0.2)


IMPLEMENTATIONS = [
    ("loop", torch.float64),
    ("loop", torch.bfloat16),
    ("triton", torch.float32),
    pytest.param("quack", torch.bfloat16, marks=QUACK),
]


@pytest.mark.parametrize("ends", [[11, 11, 40], [0, 37, 37], [1, 2, 3]])
@pytest.mark.parametrize("implementation, dtype", IMPLEMENTATIONS)
def test_phases_equal_autograd(implementation, dtype, ends):
    if implementation == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(sum(ends))
    R, E, D, hidden = ends[-1], len(ends), 16, 24
    x, dy, gate_up, down = _inputs(R, E, D, hidden, dtype)
    offsets = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    how = {"implementation": implementation}
    y, kept = experts_forward(x, gate_up, down, offsets, **how)
    # A caller keeps several groups' in one tensor.
    act, d_kept = (x.new_full((R + 3, width), float("nan"))[3:] for width in (hidden, 2 * hidden))
    dx = experts_backward_rows(dy, kept, gate_up, down, offsets, act, d_kept, **how)
    d_gate_up = experts_backward_gate_up(x, d_kept, offsets, **how)
    d_down = experts_backward_down(dy, act, offsets, **how)
    right = _reference(x, dy, gate_up, down, ends)
    for name, ours, reference in zip(("y", "x", "gate_up", "down"), (y, dx, d_gate_up, d_down), right, strict=True):
        assert ours.dtype == dtype and relative_error(ours, reference) < TOLERANCES[dtype], name


@pytest.mark.parametrize("chosen", ["all", "some", "none"])
@pytest.mark.parametrize("implementation, dtype", IMPLEMENTATIONS)
def test_phases_of_tokens_equal_autograd(poisoned_empty, implementation, dtype, chosen):
    if implementation == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    T, K, E, D, hidden = 37, 2, 5, 16, 24
    x, dy, gate_up, down = _inputs(T, E, D, hidden, dtype)
    weights = torch.rand(T, K, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    experts = torch.stack([torch.randint(3, (T,)), torch.randint(3, 5, (T,))], 1)
    experts[torch.rand(T, K) < {"all": 0.0, "some": 0.4, "none": 1.1}[chosen]] = -1
    experts = experts.to(DEVICE)
    rows, how = plan_rows(experts, E, implementation=implementation), {"implementation": implementation}
    y, kept = tokens_forward(x, weights, rows, gate_up, down, **how)
    act, d_kept = (x.new_full((T * K, width), float("nan")) for width in (hidden, 2 * hidden))
    dx, d_weights = tokens_backward(dy, kept, weights, rows, gate_up, down, act, d_kept, **how)
    d_gate_up = experts_backward_gate_up(permute(x, rows, **how), d_kept, rows.offsets_E, **how)
    d_down = experts_backward_down(permute(dy, rows, **how), act, rows.offsets_E, **how)
    ours = [y, dx, d_weights, d_gate_up, d_down]
    leaves = [value.double().requires_grad_() for value in (x, weights, gate_up, down)]
    right = expert_mlp_naive(*leaves[:2], experts, *leaves[2:]) + 0 * leaves[0]
    gradients = torch.autograd.grad(right, leaves, dy.double(), allow_unused=True, materialize_grads=True)
    for name, a, b in zip(("y", "x", "weights", "gate_up", "down"), ours, (right, *gradients), strict=True):
        error = relative_error(a, b) if b.norm() else a.norm()
        assert error < TOLERANCES[dtype], (name, error)


@pytest.mark.parametrize("implementation", ["loop", pytest.param("quack", marks=QUACK)])
def test_no_rows_at_all(implementation):
    x = torch.empty(0, 16, dtype=torch.bfloat16, device=DEVICE)
    gate_up, down = x.new_ones(2, 48, 16), x.new_ones(2, 16, 24)
    offsets = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    how = {"implementation": implementation}
    y, kept = experts_forward(x, gate_up, down, offsets, **how)
    act, d_kept = x.new_empty(0, 24), x.new_empty(0, 48)
    dx = experts_backward_rows(y, kept, gate_up, down, offsets, act, d_kept, **how)
    d_gate_up = experts_backward_gate_up(x, d_kept, offsets, **how)
    d_down = experts_backward_down(y, act, offsets, **how)
    assert y.shape == dx.shape == (0, 16) and not d_gate_up.any() and not d_down.any()
    assert d_gate_up.shape == gate_up.shape and d_down.shape == down.shape
