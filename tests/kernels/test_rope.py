"""Every implementation of the rotary embedding against complex multiplication in float64."""

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.kernels.rope import rotary_table, rotate_heads
from support.compare import relative_error

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}


def test_table_holds_the_angles():
    positions = Documents.from_lengths([3, 1, 9]).positions_T
    assert positions.tolist() == [0, 1, 2, 0, *range(9)]
    cos, sin = rotary_table(positions, 6, 100.0)
    angles = positions.double()[:, None] * 100.0 ** (-torch.arange(0, 6, 2).double() / 6)
    torch.testing.assert_close(torch.complex(cos, sin).to(torch.complex128), torch.polar(angles * 0 + 1, angles))


def _check(implementation, dtype, T, H, K, R, reference="naive"):
    torch.manual_seed(K)
    cos, sin = rotary_table(torch.arange(T, device=DEVICE) * 7 % 1000, R, 100.0)
    x, d_out = torch.randn(2, T, H * K, device=DEVICE).bfloat16().double().unbind(0)
    results = []
    for name, kind in ((implementation, dtype), (reference, torch.float64)):
        leaf = x.to(kind).requires_grad_()
        d = d_out.to(kind)
        # What is rotated is some op's result, as it is in a model.
        out = rotate_heads(leaf * 1, cos, sin, head_dim=K, implementation=name)
        assert out.dtype == kind
        results.append([out, *torch.autograd.grad(out * 1, leaf, d)])
        assert torch.equal(d, d_out.to(kind)), "the incoming gradient belongs to the caller"
    for ours, right in zip(*results, strict=True):
        assert relative_error(ours, right) < TOLERANCES[dtype]
    rest = torch.arange(H * K, device=DEVICE) % K >= R
    assert torch.equal(results[0][0][:, rest].double(), x[:, rest])


@pytest.mark.parametrize("H, K, R", [(2, 10, 6), (3, 8, 8), (2, 6, 0), (1, 8, 2)])
@pytest.mark.parametrize(
    "implementation, dtype", [("torch", torch.float64), ("triton", torch.float32), ("triton", torch.bfloat16)]
)
def test_equals_complex_multiplication(implementation, dtype, H, K, R, poisoned_empty):
    if implementation == "triton":
        pytest.importorskip("triton")
    _check(implementation, dtype, 13, H, K, R)


@pytest.mark.gpu
@pytest.mark.parametrize("T, H", [(8193, 64), (4097, 8), (3, 48)])
def test_triton_at_real_sizes(T, H, poisoned_empty):
    _check("triton", torch.bfloat16, T, H, 128, 64, "torch")


def test_triton_rotates_in_place():
    pytest.importorskip("triton")
    cos, sin = rotary_table(torch.arange(5, device=DEVICE), 4, 100.0)
    x = torch.randn(5, 16, device=DEVICE)
    assert rotate_heads(x, cos, sin, head_dim=8, implementation="triton").data_ptr() == x.data_ptr()


def test_triton_in_a_view_keeps_its_neighbours_and_their_gradients():
    pytest.importorskip("triton")
    cos, sin = rotary_table(torch.arange(5, device=DEVICE), 4, 100.0)
    results = []
    for implementation in ("triton", "torch"):
        leaf = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
        both = leaf * 1
        q, k = both[:, :16], both[:, 16:]
        out = rotate_heads(q, cos, sin, head_dim=8, implementation=implementation)
        results.append(torch.autograd.grad(out.square().sum() + (out[:, :8] * k).sum(), leaf)[0])
    assert relative_error(*results) < 1e-6
