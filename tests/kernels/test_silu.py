"""Every implementation of the SiLU of q, k and v against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minimax_train.documents import Documents
from minimax_train.kernels.lightning import lightning_attention, lightning_slopes
from minimax_train.kernels.silu import silu_qkv
from support.compare import relative_error

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# Gradients as attention, or another reader, may hand them back: the same values under other strides.
LAYOUTS = {
    "contiguous": lambda d: d.contiguous(),
    "in one projection": lambda d: torch.stack([d + 1, d, d + 2], 2)[:, :, 1],
    "heads first": lambda d: d.transpose(0, 1).contiguous().transpose(0, 1),
    "head dim first": lambda d: d.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other": lambda d: torch.stack([d, d + 1], 3).flatten(2)[..., ::2],
    "expanded": lambda d: d[:1, :, :1].expand(d.shape),
    "absent": lambda d: None,
}


def _check(implementation, dtype, T, H, K, layouts=("contiguous",) * 3, reference="naive"):
    torch.manual_seed(K)
    x = torch.randn(T, H * 3 * K, device=DEVICE).bfloat16().double()
    d_outs = torch.randn(3, T, H, K, device=DEVICE).bfloat16().double()
    results = []
    for name, kind in ((implementation, dtype), (reference, torch.float64)):
        leaf = x.to(kind).requires_grad_()
        outs = silu_qkv(leaf, head_dim=K, implementation=name)
        assert all(out.dtype == kind and out.shape == (T, H, K) for out in outs)
        laid_out = [LAYOUTS[layout](d.to(kind)) for layout, d in zip(layouts, d_outs, strict=True)]
        read, gradients = zip(*((out, d) for out, d in zip(outs, laid_out, strict=True) if d is not None), strict=True)
        results.append([*outs, *torch.autograd.grad(read, leaf, gradients)])
    for ours, right in zip(*results, strict=True):
        assert relative_error(ours, right) < TOLERANCES[dtype]


@pytest.mark.parametrize("T, H, K", [(1, 1, 1), (13, 3, 10), (5, 2, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_the_formula(T, H, K, dtype, poisoned_empty):
    pytest.importorskip("triton")
    _check("triton", dtype, T, H, K)


@pytest.mark.parametrize("T, H, K", [(1, 1, 1), (13, 3, 10)])
def test_torch_equals_the_formula(T, H, K):
    _check("torch", torch.float64, T, H, K)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_takes_gradients_as_they_lie(layout, place, poisoned_empty):
    pytest.importorskip("triton")
    layouts = ["contiguous"] * 3
    layouts[place] = layout
    _check("triton", torch.float32, 7, 3, 10, layouts)


@pytest.mark.parametrize("layouts", [("absent", "absent", "every other"), ("expanded", "heads first", "absent")])
def test_triton_takes_any_mix_of_gradients(layouts, poisoned_empty):
    pytest.importorskip("triton")
    _check("triton", torch.float32, 7, 3, 10, layouts)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # to infinity, of which the reciprocal is right
def test_far_from_zero(implementation, dtype):
    if implementation == "triton":
        pytest.importorskip("triton")
    x = torch.tensor([0.0, 20, 88, 89, 104, 1000, 3e38], device=DEVICE)
    leaf = torch.cat([x, -x])[None].repeat(1, 3).to(dtype).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    outs = torch.stack(silu_qkv(leaf, head_dim=14, implementation=implementation), 2)
    for ours, right in [
        (outs.flatten(), F.silu(exact).flatten()),
        (torch.autograd.grad(outs.sum(), leaf)[0], torch.autograd.grad(F.silu(exact).sum(), exact)[0]),
    ]:
        torch.testing.assert_close(ours.double(), right, rtol=1e-2, atol=1e-30)


def test_triton_takes_no_tokens_and_rows_that_are_not_packed():
    pytest.importorskip("triton")
    leaf = torch.randn(5, 2 * 12, device=DEVICE, requires_grad=True)
    for x in (leaf[:0], leaf[:, :12], leaf[:, ::2]):
        results = []
        for implementation in ("triton", "torch"):
            q, k, v = silu_qkv(x, head_dim=2, implementation=implementation)
            results.append(torch.autograd.grad((q * k + v).sum(), leaf)[0])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_results_share_memory_and_refuse_to_be_changed(implementation):
    if implementation == "triton":
        pytest.importorskip("triton")
    x = torch.randn(5, 18, device=DEVICE, requires_grad=True)
    q, k, v = silu_qkv(x, head_dim=3, implementation=implementation)
    assert q.stride() == k.stride() == v.stride() == (18, 9, 1)
    assert k.data_ptr() - q.data_ptr() == v.data_ptr() - k.data_ptr() == 3 * 4
    with pytest.raises(RuntimeError, match="modified inplace"):
        q.add_(1)


def test_triton_before_attention_and_recomputed():
    pytest.importorskip("triton")
    x, documents = torch.randn(50, 2 * 3 * 16, device=DEVICE), Documents.from_lengths([20, 30], DEVICE)
    slopes = lightning_slopes(2, 0, 4).to(DEVICE)

    def attention(leaf, implementation):
        qkv = silu_qkv(leaf, head_dim=16, implementation=implementation)
        return lightning_attention(*qkv, slopes.to(leaf.dtype), documents, implementation="chunked")[0]

    runs = {
        "torch": (torch.float64, lambda leaf: attention(leaf, "torch")),
        "kept": (torch.float32, lambda leaf: attention(leaf, "triton")),
        "recomputed": (torch.float32, lambda leaf: checkpoint(attention, leaf, "triton", use_reentrant=False)),
    }
    results = {}
    for name, (dtype, run) in runs.items():
        leaf = x.to(dtype).requires_grad_()
        results[name] = torch.autograd.grad(run(leaf).square().sum(), leaf)[0]
    assert relative_error(results["kept"], results["torch"]) < 2e-6
    assert torch.equal(results["recomputed"], results["kept"])


@pytest.mark.gpu
@pytest.mark.parametrize("T, H, K", [(8193, 64, 128), (4097, 8, 128), (1001, 5, 96), (3, 48, 128)])
@pytest.mark.parametrize("layouts", [("contiguous",) * 3, ("in one projection", "heads first", "absent")])
def test_triton_at_real_sizes(T, H, K, layouts, poisoned_empty):
    _check("triton", torch.bfloat16, T, H, K, layouts, "torch")


@pytest.mark.gpu
def test_triton_beyond_32_bits(poisoned_empty):
    T, H, K = 700_001, 8, 128
    x = torch.randn(T, H * 3 * K, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    assert x.numel() > 2**31
    # Gradients in one tensor: they end beyond 32 bits as well.
    d_outs = torch.randn(T, H, 3, K, device=DEVICE, dtype=torch.bfloat16).unbind(2)
    outs = silu_qkv(x, head_dim=K, implementation="triton")
    (d_x,) = torch.autograd.grad(outs, x, d_outs)
    border = 2**31 // x.shape[1]
    for some in (slice(0, 99), slice(border - 50, border + 50), slice(T - 99, T)):
        leaf = x[some].detach().double().requires_grad_()
        right = silu_qkv(leaf, head_dim=K, implementation="torch")
        (d_right,) = torch.autograd.grad(right, leaf, [d[some].double() for d in d_outs])
        for ours, expected in zip((*(out[some] for out in outs), d_x[some]), (*right, d_right), strict=True):
            assert relative_error(ours, expected) < TOLERANCES[torch.bfloat16]


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"kernels.silu='fast'.*torch"):
        silu_qkv(torch.ones(2, 6), head_dim=2, implementation="fast")


def test_triton_refuses_float64():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"kernels.silu='triton'"):
        silu_qkv(torch.ones(2, 6, dtype=torch.float64), head_dim=2, implementation="triton")
