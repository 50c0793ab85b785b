"""The pieces of lightning attention between which ranks exchange states, against autograd through the recurrence."""

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.kernels.lightning import lightning_attention, lightning_parts
from support.compare import relative_error

SLOPES = [0.917, 1e-5, 0.05]
K, V = 16, 24
# Lengths, and the documents with states: one and several, in another order, single tokens, more than decays reach.
CASES = [
    ([63], [0]),
    ([40, 1, 1, 32, 16, 30, 10], [6, 1, 0, 2]),
    ([1, 1, 1], [1]),
    ([600], [0]),
    ([5, 100, 25], [0, 2]),
]
on_cpu = not torch.cuda.is_available()
interpreted = pytest.mark.skipif(not on_cpu, reason="small float32 shapes are for the interpreter")


def _inputs(lengths, of, slopes, heads, dtype=torch.float64):
    """q, k, v, the gradient of the output, the states that enter and the gradients of those that leave, in float64."""
    generator = torch.Generator().manual_seed(sum(lengths))
    (K, V), H, T, M = heads, len(slopes), sum(lengths), len(of)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype).double()

    tokens = [randn(T, H, dim, dtype=dtype) for dim in (K, K, V, V)]
    return [*tokens, randn(M, H, K, V), randn(M, H, K, V)]


def _expected(inputs, slopes, lengths, of, implementation):
    """All that the pieces return, by autograd, with no state to or from the other documents."""
    q, k, v, grad, entering, grad_leaving = inputs
    documents = Documents.from_lengths(lengths, q.device)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    initial = entering.new_zeros(len(lengths), *entering.shape[1:])
    initial[of] = entering
    initial.requires_grad_()

    def attend(first):
        return lightning_attention(
            q, k, v, slopes, documents,
            initial_state_NHKV=first, final_state_of=of, implementation=implementation,
        )  # fmt: skip

    out, leaving = attend(initial)
    dq, dk, dv, _ = torch.autograd.grad([out, leaving], [q, k, v, initial], [grad, grad_leaving], retain_graph=True)
    _, own = attend(torch.zeros_like(initial))
    (own_gradient,) = torch.autograd.grad(out, initial, grad)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv, "own": own, "own gradient": own_gradient[of]}


def _actual(inputs, slopes, lengths, of, implementation, dtype, device="cpu"):
    state_dtype = torch.promote_types(dtype, torch.float32)
    q, k, v, grad = (x.to(device, dtype) for x in inputs[:4])
    # Views into one projection, as the model's are.
    q, k, v = torch.cat([q, k, v], -1).split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
    entering, grad_leaving = (x.to(device, state_dtype) for x in inputs[4:])
    parts, of = lightning_parts(q, implementation), tuple(of)
    where = (slopes.to(device, state_dtype), Documents.from_lengths(lengths, device))
    given = (*of, None)
    own, crossing = parts.states(k, v, *where, given, reverse=False)
    own_gradient, grad_crossing = parts.states(q, grad, *where, given, reverse=True)
    assert not own[-1].any() and not own_gradient[-1].any()
    dk, dv = parts.backward_kv(grad, q, k, v, *where, grad_leaving, of, grad_crossing)
    results = {
        "out": parts.forward(q, k, v, *where, entering, of, crossing),
        "dq": parts.backward_q(grad, k, v, *where, entering, of, crossing),
        "dk": dk,
        "dv": dv,
        "own": own[:-1],
        "own gradient": own_gradient[:-1],
    }
    assert all(results[name].dtype == dtype for name in ("out", "dq", "dk", "dv"))
    assert results["own"].dtype == results["own gradient"].dtype == state_dtype
    return results


def _assert_close(actual, expected, tolerance):
    for name, right in expected.items():
        error = relative_error(actual[name].cpu(), right.cpu())
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
@pytest.mark.parametrize(("lengths", "of"), CASES)
def test_plain_parts(implementation, lengths, of):
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    inputs = _inputs(lengths, of, SLOPES, (K, V))
    expected = _expected(inputs, slopes, lengths, of, "naive")
    _assert_close(_actual(inputs, slopes, lengths, of, implementation, torch.float64), expected, 1e-12)


@interpreted
@pytest.mark.parametrize("segments", [(1, 1), (3, 2)], ids=["one-segment", "three-segments"])
@pytest.mark.parametrize(("lengths", "of"), [*CASES, ([290], [0])])
@pytest.mark.parametrize("pieces", [1, 264])
def test_triton_parts(monkeypatch, poisoned_empty, lengths, of, segments, pieces):
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    monkeypatch.setattr(implementation, "PIECES", pieces)
    monkeypatch.setattr(implementation, "choose_tiles", lambda *_: implementation.Tiles(16, 32, 4, 2))
    monkeypatch.setattr(implementation, "choose_segments", lambda *_: segments)
    slopes = torch.tensor(SLOPES, dtype=torch.float32).double()
    inputs = _inputs(lengths, of, SLOPES, (K, V))
    expected = _expected(inputs, slopes, lengths, of, "chunked")
    _assert_close(_actual(inputs, slopes, lengths, of, "triton", torch.float32), expected, 1e-5)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
def test_a_reach_that_comes_out_shorter_costs_what_has_decayed(monkeypatch, poisoned_empty, reverse):
    """Pieces are counted by one kernel and summed by another, whose rounding may differ; here of a single head."""
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    monkeypatch.setattr(implementation, "choose_tiles", lambda *_: implementation.Tiles(16, 32, 4, 2))
    slopes, documents = torch.tensor([17.017 / 255.5]), Documents.from_lengths([600])  # 257 tokens reach
    y, _, _, grad, *_ = _inputs([600], [0], slopes, (K, V))
    count = implementation.triton_kernels.share_pieces

    class CountsFewer:
        def __getitem__(self, grid):
            # 256 tokens: two pieces of 8 chunks, where 257 are three.
            return lambda places, slopes_H, *rest, **constants: count[grid](
                places, slopes_H * 1.004, *rest, **constants
            )

    expected = lightning_parts(y, "naive").states(y, grad, slopes.double(), documents, (0,), reverse=reverse)[0]
    y, grad = y.float(), grad.float()
    for kernel in (count, CountsFewer()):
        monkeypatch.setattr(implementation.triton_kernels, "share_pieces", kernel)
        actual = lightning_parts(y, "triton").states(y, grad, slopes, documents, (0,), reverse=reverse)[0]
        assert relative_error(actual, expected) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["hopper", "portable"])
@pytest.mark.parametrize(("lengths", "of"), [([5000], [0]), ([700, 1, 63, 64, 3000, 65, 1], [4, 0, 6, 1])], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("heads", [(128, 128), (64, 96)], ids=str)
def test_gpu_parts(monkeypatch, poisoned_empty, lengths, of, dtype, tolerance, heads, kernel):
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    if kernel == "portable":
        monkeypatch.setattr(implementation, "choose_hopper", lambda _: False)
    elif torch.cuda.get_device_capability()[0] != 9 or dtype != torch.bfloat16:
        pytest.skip("needs compute capability 9.0 and 16-bit tensors")
    slopes = [0.917, 0.3, 0.05, 0.004, 1e-3, 1e-5]
    slopes_H = torch.tensor(slopes, dtype=torch.float32, device="cuda").double()
    inputs = [x.cuda() for x in _inputs(lengths, of, slopes, heads, dtype)]
    expected = _expected(inputs, slopes_H, lengths, of, "chunked")
    actual = _actual(inputs, slopes_H, lengths, of, "triton", dtype, "cuda")
    _assert_close(actual, expected, tolerance)
    again = _actual(inputs, slopes_H, lengths, of, "triton", dtype, "cuda")
    assert all(torch.equal(actual[name], again[name]) for name in actual)
