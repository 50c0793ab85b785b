"""Every implementation of the norms against the formulas in float64."""

import pytest
import torch

from minimax_train.apex import has_apex
from minimax_train.kernels.norm import (
    add_rms_norm,
    gated_rms_norm,
    gated_scale,
    rms_norm,
    rms_norm_twice,
    sum_of_squares,
)
from support.compare import relative_error

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
EPS = 1e-3


def _gate_in_parts(x, gate, weight, **kw):
    """Two ranks' columns of the same rows, which know of each other the sum of squares only."""
    D = x.shape[1]
    cut = [D // 3, D - D // 3]
    x_parts = x.split(cut, 1)
    scale = (sum(sum_of_squares(part) for part in x_parts) / D + EPS).rsqrt()
    parts = zip(x_parts, gate.split(cut, 1), weight.split(cut), strict=True)
    return torch.cat([gated_scale(*part, scale, **kw) for part in parts], 1)


def _read_twice(x, weight, **kw):
    once, again = rms_norm_twice(x, weight, EPS, **kw)
    assert once.data_ptr() == again.data_ptr()
    return once - 4 * again


def _read_second_only(x, weight, **kw):
    return rms_norm_twice(x, weight, EPS, **kw)[1]


OPS = {
    "alone": (1, lambda x, w, **kw: rms_norm(x, w, EPS, **kw)),
    "residual": (2, lambda h, f, w, **kw: add_rms_norm(h, f, w, alpha=3.5566, eps=EPS, **kw)),
    "gate": (2, lambda x, gate, w, **kw: gated_rms_norm(x, gate, w, eps=EPS, **kw)),
    "gate in parts": (2, _gate_in_parts),
    "twice": (1, _read_twice),
    "twice, read once": (1, _read_second_only),
}
REFERENCES = {**OPS, "gate in parts": OPS["gate"]}
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3}
# apex has the norm alone: residual, sigmoid and product are rounded one by one.
APEX_TOLERANCES = TOLERANCES | {torch.bfloat16: 1.5e-2}


def _scaled(x, w):
    return x * (x.square().mean(1, keepdim=True) + EPS).rsqrt() * w


# For many tokens, where the naive implementation would take minutes.
FORMULAS = {
    "alone": _scaled,
    "residual": lambda h, f, w: _scaled(3.5566 * h + f, w),
    "gate": lambda x, gate, w: _scaled(x, w) / (1 + (-gate).exp()),
}
FORMULAS["gate in parts"] = FORMULAS["gate"]
FORMULAS["twice"] = lambda x, w: -3 * _scaled(x, w)
FORMULAS["twice, read once"] = _scaled


def _results(op, dtype, values, d_out, **options):
    leaves = [value.to(dtype).requires_grad_() for value in values]
    out = op(*leaves, **options)
    assert out.dtype == dtype
    return [out, *torch.autograd.grad(out, leaves, d_out.to(dtype))]


def _check(kind, implementation, dtype, T, D, tolerances=TOLERANCES):
    inputs, op = OPS[kind]
    torch.manual_seed(D)
    *values, d_out = torch.randn(inputs + 1, T, D, device=DEVICE).bfloat16().double().unbind(0)
    weight_D = torch.randn(D, device=DEVICE).bfloat16().double()
    if implementation == "apex":  # whose gradient of x takes a weight below eps to be eps
        weight_D = weight_D.where(weight_D.abs() > EPS, 1.0)
    values.append(weight_D)
    ours = _results(op, dtype, values, d_out, implementation=implementation)
    if D < 1000:
        right = _results(REFERENCES[kind][1], torch.float64, values, d_out, implementation="naive")
    else:
        right = _results(FORMULAS[kind], torch.float64, values, d_out)
    for result, expected in zip(ours, right, strict=True):
        assert relative_error(result, expected) < tolerances[dtype]


@pytest.mark.parametrize("T, D", [(1, 3), (7, 63), (13, 130)])
@pytest.mark.parametrize("kind", OPS)
def test_torch_equals_the_formula(kind, T, D):
    _check(kind, "torch", torch.float64, T, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, D", [(1, 3), (29, 63), (13, 130), (5, 2100)])
@pytest.mark.parametrize("kind", OPS)
def test_triton_equals_the_formula(kind, T, D, dtype, poisoned_empty):
    pytest.importorskip("triton")
    _check(kind, "triton", dtype, T, D)


@pytest.mark.gpu
@pytest.mark.parametrize("T, D", [(8191, 1024), (4097, 6144), (3000, 8192), (700, 16384)])
@pytest.mark.parametrize("kind", OPS)
def test_triton_at_real_sizes(kind, T, D, poisoned_empty):
    _check(kind, "triton", torch.bfloat16, T, D)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("T, D", [(1, 3), (29, 63), (13, 130), (4097, 6144)])
@pytest.mark.parametrize("kind", OPS)
def test_apex_equals_the_formula(kind, T, D, dtype):
    if not has_apex("fused_layer_norm_cuda"):
        pytest.skip("NVIDIA's apex is not installed")
    _check(kind, "apex", dtype, T, D, APEX_TOLERANCES)


@pytest.mark.parametrize(
    "name, message", [("fast", "must be one of auto, triton, torch, apex, naive"), ("plain", "renamed: use 'torch'")]
)
def test_unknown_implementation_is_named(name, message):
    with pytest.raises(ValueError, match=f"^kernels.norm='{name}': {message}$"):
        rms_norm(torch.ones(2, 3), torch.ones(3), EPS, implementation=name)
