"""The fused loss, every implementation, against plain cross-entropy in float64; its memory."""

import pytest
import torch
import torch.nn.functional as F

from minimax_train.documents import IGNORE_INDEX
from minimax_train.kernels import cross_entropy
from minimax_train.kernels.cross_entropy import VocabularyShard, choose_chunks, linear_cross_entropy
from support.compare import relative_error

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
VOCABULARY = 200_064
# Loss; gradients. In bfloat16 logits are rounded to 8 bits, and the gradients again.
TOLERANCES = {torch.float64: (1e-14, 1e-13), torch.float32: (1e-6, 1e-5), torch.bfloat16: (3e-3, 2e-2)}


def _check(implementation, dtype, T, D, V, scale=1.0):
    torch.manual_seed(V)
    x, weight = (torch.randn(shape, device=DEVICE).bfloat16().double() for shape in [(T, D), (V, D)])
    weight *= 2 / D**0.5
    labels = torch.randint(V, (T,), device=DEVICE)
    labels[:: max(2, T // 3)] = IGNORE_INDEX
    results = []
    for kind in (dtype, torch.float64):
        leaves = [value.to(dtype).to(kind).requires_grad_() for value in (x, weight)]
        if kind == dtype:
            loss = linear_cross_entropy(*leaves, labels, implementation=implementation)
            assert loss.dtype == torch.promote_types(dtype, torch.float32)
        if kind != dtype or len(results):
            loss = F.cross_entropy(leaves[0] @ leaves[1].T, labels, reduction="sum", ignore_index=IGNORE_INDEX)
        results.append([loss, *torch.autograd.grad(loss * scale, leaves)])
    for i, (ours, right) in enumerate(zip(*results, strict=True)):
        assert relative_error(ours, right) < TOLERANCES[dtype][min(i, 1)]
    return results


@pytest.fixture
def budget(monkeypatch, poisoned_empty):
    def set_budget(size):
        monkeypatch.setattr(cross_entropy, "BUDGET", size)
        monkeypatch.setattr(cross_entropy, "SLICE", 64)

    return set_budget


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_plain_equals_cross_entropy(tokens, scale, budget):
    budget(tokens * 17 * (8 + 24))
    _check("plain", torch.float64, 11, 6, 17, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, V", [(1, 1), (11, 17), (7, 700)])
@pytest.mark.parametrize("tokens", [3, 100])
def test_triton_equals_cross_entropy(T, V, tokens, dtype, budget, monkeypatch):
    implementation = pytest.importorskip("minimax_train.kernels.cross_entropy.triton", exc_type=ImportError)
    monkeypatch.setattr(implementation, "TILE", (2, 64))
    budget(tokens * V * dtype.itemsize)
    if V > 1:
        _check("triton", dtype, T, 6, V, 0.37)


@pytest.mark.parametrize("implementation", ["plain", "triton"])
def test_sum_in_float32_beside_the_logits(implementation, budget):
    pytest.importorskip("triton")
    T, D, V = 40, 8, 30
    per_token = V * (2 + 12 * (implementation == "plain"))
    budget(2 * 4 * V * D)
    chunk, wide_sum = choose_chunks(T, D, V, itemsize=2, temporaries=3 * (implementation == "plain"))
    assert wide_sum and chunk == 4 * V * D // per_token < T
    _check(implementation, torch.bfloat16, T, D, V)


@pytest.mark.parametrize("D, wide", [(1024, True), (2048, False), (3072, False), (6144, False)])
def test_a_million_tokens_stay_under_two_gib(D, wide):
    chunk, wide_sum = choose_chunks(2**20, D, VOCABULARY, itemsize=2, temporaries=0)
    assert wide_sum == wide
    assert chunk * VOCABULARY * 2 + wide_sum * VOCABULARY * D * 4 <= cross_entropy.BUDGET < 2 * 2**30
    assert chunk >= 512


@pytest.mark.parametrize(("implementation", "dtype"), [("plain", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("tokens", [3, 100])
def test_parts_of_the_vocabulary_add_up(implementation, dtype, tokens, budget):
    pytest.importorskip("triton")
    T, D, V, ranks = 11, 6, 51, 3
    torch.manual_seed(tokens)
    x, weight = torch.randn(T, D, device=DEVICE, dtype=dtype), torch.randn(V, D, device=DEVICE, dtype=dtype)
    labels = torch.tensor([0, 16, 17, 33, 34, 50, IGNORE_INDEX, 20, 40, 1, IGNORE_INDEX], device=DEVICE)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    logits = leaves[0] @ leaves[1].T
    right = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    right_dx, right_dw = torch.autograd.grad(right, leaves)
    budget(tokens * V // ranks * dtype.itemsize * (4 if implementation == "plain" else 1))
    losses, dx, dw = [], [], []
    for rank in range(ranks):
        given = iter(logits.detach().logsumexp(-1).to(dtype).split(1))
        shard = VocabularyShard(rank * 17, ranks, lambda mine, given=given: torch.cat([next(given) for _ in mine]))
        parts = [x.clone().requires_grad_(), weight[rank * 17 :][:17].clone().requires_grad_()]
        losses.append(linear_cross_entropy(*parts, labels, shard=shard, implementation=implementation))
        for kept, gradient in zip((dx, dw), torch.autograd.grad(losses[-1], parts), strict=True):
            kept.append(gradient.double())
    assert relative_error(sum(losses), right) < TOLERANCES[dtype][0]
    assert relative_error(sum(dx), right_dx) < TOLERANCES[dtype][1]
    assert relative_error(torch.cat(dw), right_dw) < TOLERANCES[dtype][1]


def test_loss_without_gradient():
    x, weight = torch.randn(5, 3), torch.randn(4, 3)
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, 3, IGNORE_INDEX]))
    torch.testing.assert_close(loss, F.cross_entropy((x @ weight.T)[:4], torch.arange(4), reduction="sum"))


def test_factor_of_the_gradient_is_not_rounded():
    x, weight = torch.randn(5, 8).bfloat16().requires_grad_(), torch.randn(4, 8).bfloat16()
    factor = torch.tensor(1 + 0.98 * 2**-8)  # 1 in bfloat16
    plain, scaled = (
        torch.autograd.grad(linear_cross_entropy(x, weight, torch.arange(5) % 4) * f, x)[0] for f in (1.0, factor)
    )
    assert torch.equal(scaled, (plain.float() * factor).bfloat16()) and not torch.equal(scaled, plain)


def test_a_second_backward_pass_is_refused():
    x = torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(4, 8), torch.arange(5) % 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("D, bound", [(1024, 5e-3), (6144, 2e-2)])
def test_memory_and_error_at_a_real_vocabulary(D, bound):
    T = 16_384
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(VOCABULARY, D, device="cuda", dtype=torch.bfloat16) / D**0.5).requires_grad_()
    labels = torch.randint(VOCABULARY, (T,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(x, weight, labels)
    dx, dw = torch.autograd.grad(loss, [x, weight])
    extra = torch.cuda.max_memory_allocated() - before - dx.nbytes - dw.nbytes
    assert extra < 2 * 2**30
    # One slice of the vocabulary, exactly.
    some = slice(1000, 1256)
    exact = torch.zeros(256, D, device="cuda")
    for rows in range(0, T, 1024):
        logits = (x[rows : rows + 1024].detach() @ weight.detach().T).float()
        gradient = (logits[:, some] - logits.logsumexp(-1, keepdim=True)).exp()
        columns = torch.arange(1000, 1256, device="cuda")
        gradient -= (labels[rows : rows + 1024, None] == columns).float()
        exact += gradient.T @ x[rows : rows + 1024].detach().float()
    assert relative_error(dw[some], exact) < bound
