"""The phases of lightning attention between which ranks exchange states, against autograd through the recurrence."""

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.kernels.lightning import lightning_attention, lightning_state_passing
from support.compare import relative_error

SLOPES = [0.917, 1e-5, 0.05]
K, V = 16, 24
# Lengths, and the documents with states: one and several, in another order, single tokens, longer than memory.
CASES = [
    ([63], [0]),
    ([40, 1, 1, 32, 16, 30, 10], [6, 1, 0, 2]),
    ([1, 1, 1], [1]),
    ([600], [0]),
    ([5, 100, 25], [0, 2]),
]
on_cpu = not torch.cuda.is_available()
interpreted = pytest.mark.skipif(not on_cpu, reason="small float32 shapes are for the interpreter")


def _inputs(lengths, state_of, slopes, heads, dtype=torch.float64):
    """q, k, v, the gradient of the output, initial states and the gradients of final states, in float64."""
    generator = torch.Generator().manual_seed(sum(lengths))
    (K, V), H, T, M = heads, len(slopes), sum(lengths), len(state_of)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype).double()

    tokens = [randn(T, H, dim, dtype=dtype) for dim in (K, K, V, V)]
    return [*tokens, randn(M, H, K, V), randn(M, H, K, V)]


def _expected(inputs, slopes, lengths, state_of, implementation):
    """All that the phases return, by autograd; initial and final states of the other documents are zero and unused."""
    q, k, v, grad, initial_M, grad_final = inputs
    documents = Documents.from_lengths(lengths, q.device)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    initial = initial_M.new_zeros(len(lengths), *initial_M.shape[1:])
    initial[state_of] = initial_M
    initial.requires_grad_()

    def attend(first):
        return lightning_attention(
            q, k, v, slopes, documents,
            initial_state_NHKV=first, final_state_of=state_of, implementation=implementation,
        )  # fmt: skip

    out, final = attend(initial)
    dq, dk, dv, _ = torch.autograd.grad([out, final], [q, k, v, initial], [grad, grad_final], retain_graph=True)
    _, local = attend(torch.zeros_like(initial))
    (local_gradient,) = torch.autograd.grad(out, initial, grad)
    return {"out": out, "dq": dq, "dk": dk, "dv": dv, "local": local, "local gradient": local_gradient[state_of]}


def _actual(inputs, slopes, lengths, state_of, implementation, dtype, device="cpu"):
    state_dtype = torch.promote_types(dtype, torch.float32)
    q, k, v, grad = (x.to(device, dtype) for x in inputs[:4])
    # Views into one projection, as the model's are.
    q, k, v = torch.cat([q, k, v], -1).split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
    initial, grad_final = (x.to(device, state_dtype) for x in inputs[4:])
    phases, state_of = lightning_state_passing(q, implementation), tuple(state_of)
    where = (slopes.to(device, state_dtype), Documents.from_lengths(lengths, device))
    local, split_states = phases.local_states(k, v, *where, (*state_of, None), reverse=False)
    local_gradient, grad_split_states = phases.local_states(q, grad, *where, (*state_of, None), reverse=True)
    assert not local[-1].any() and not local_gradient[-1].any()
    dk, dv = phases.backward_kv(grad, q, k, v, *where, grad_final, state_of, grad_split_states)
    results = {
        "out": phases.forward(q, k, v, *where, initial, state_of, split_states),
        "dq": phases.backward_q(grad, k, v, *where, initial, state_of, split_states),
        "dk": dk,
        "dv": dv,
        "local": local[:-1],
        "local gradient": local_gradient[:-1],
    }
    assert all(results[name].dtype == dtype for name in ("out", "dq", "dk", "dv"))
    assert results["local"].dtype == results["local gradient"].dtype == state_dtype
    return results


def _assert_close(actual, expected, tolerance):
    for name, right in expected.items():
        error = relative_error(actual[name].cpu(), right.cpu())
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("implementation", ["naive", "chunked"])
@pytest.mark.parametrize(("lengths", "state_of"), CASES)
def test_torch_phases(implementation, lengths, state_of):
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    inputs = _inputs(lengths, state_of, SLOPES, (K, V))
    expected = _expected(inputs, slopes, lengths, state_of, "naive")
    _assert_close(_actual(inputs, slopes, lengths, state_of, implementation, torch.float64), expected, 1e-12)


@interpreted
@pytest.mark.parametrize("splits", [(1, 1), (3, 2)], ids=["one-split", "three-splits"])
@pytest.mark.parametrize(("lengths", "state_of"), [*CASES, ([290], [0])])
@pytest.mark.parametrize("blocks", [1, 264])
def test_triton_phases(monkeypatch, poisoned_empty, lengths, state_of, splits, blocks):
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    monkeypatch.setattr(implementation, "BLOCKS", blocks)
    monkeypatch.setattr(implementation, "choose_tile", lambda *_: implementation.TileShape(16, 32, 4, 2))
    monkeypatch.setattr(implementation, "choose_splits", lambda *_: splits)
    slopes = torch.tensor(SLOPES, dtype=torch.float32).double()
    inputs = _inputs(lengths, state_of, SLOPES, (K, V))
    expected = _expected(inputs, slopes, lengths, state_of, "naive")
    _assert_close(_actual(inputs, slopes, lengths, state_of, "triton", torch.float32), expected, 1e-5)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
def test_a_memory_length_rounded_down_loses_what_has_decayed(monkeypatch, poisoned_empty, reverse):
    """Blocks are counted by one kernel and summed by another, whose rounding may differ; here of a single head."""
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    monkeypatch.setattr(implementation, "choose_tile", lambda *_: implementation.TileShape(16, 32, 4, 2))
    slopes, documents = torch.tensor([17.017 / 255.5]), Documents.from_lengths([600])  # a memory of 257 tokens
    y, _, _, grad, *_ = _inputs([600], [0], slopes, (K, V))
    count = implementation.triton_kernels.plan_blocks

    class CountsFewer:
        def __getitem__(self, grid):
            # 256 tokens: two blocks of 8 tiles, where 257 are three.
            return lambda table, slopes_H, *rest, **constants: count[grid](table, slopes_H * 1.004, *rest, **constants)

    def local_states(slopes, implementation):
        phases = lightning_state_passing(y, implementation)
        return phases.local_states(y, grad, slopes, documents, (0,), reverse=reverse)[0]

    expected = local_states(slopes.double(), "naive")
    y, grad = y.float(), grad.float()
    for kernel in (count, CountsFewer()):
        monkeypatch.setattr(implementation.triton_kernels, "plan_blocks", kernel)
        assert relative_error(local_states(slopes, "triton"), expected) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["hopper", "portable"])
@pytest.mark.parametrize(
    ("lengths", "state_of"), [([5000], [0]), ([700, 1, 63, 64, 3000, 65, 1], [4, 0, 6, 1])], ids=str
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("heads", [(128, 128), (64, 96)], ids=str)
def test_gpu_phases(monkeypatch, poisoned_empty, lengths, state_of, dtype, tolerance, heads, kernel):
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    if kernel == "portable":
        monkeypatch.setattr(implementation, "choose_hopper", lambda _: False)
    elif torch.cuda.get_device_capability()[0] != 9 or dtype != torch.bfloat16:
        pytest.skip("needs compute capability 9.0 and 16-bit tensors")
    slopes = [0.917, 0.3, 0.05, 0.004, 1e-3, 1e-5]
    slopes_H = torch.tensor(slopes, dtype=torch.float32, device="cuda").double()
    inputs = [x.cuda() for x in _inputs(lengths, state_of, slopes, heads, dtype)]
    expected = _expected(inputs, slopes_H, lengths, state_of, "chunked")
    actual = _actual(inputs, slopes_H, lengths, state_of, "triton", dtype, "cuda")
    _assert_close(actual, expected, tolerance)
    again = _actual(inputs, slopes_H, lengths, state_of, "triton", dtype, "cuda")
    assert all(torch.equal(actual[name], again[name]) for name in actual)
