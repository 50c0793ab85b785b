"""The fused loss, every implementation, against the naive one in float64; its memory."""

import pytest
import torch
import torch.nn.functional as F

from minimax_train.documents import IGNORE_INDEX
from minimax_train.kernels import cross_entropy
from minimax_train.kernels.cross_entropy import VocabularyShard, choose_block, linear_cross_entropy
from support.compare import relative_error
from support.cross_entropy import linear_cross_entropy_naive

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
VOCABULARY = 200_064
# Loss; gradients. In bfloat16 logits are rounded to 8 bits, and the gradients again.
TOLERANCES = {torch.float64: (1e-14, 1e-13), torch.float32: (1e-6, 1e-5), torch.bfloat16: (3e-3, 2e-2)}


@torch.no_grad()
def _one_by_one(x, weight, labels):
    tokens = zip(x.split(1), labels.split(1), strict=True)
    return torch.stack([linear_cross_entropy_naive(x_1D, weight, label_1) for x_1D, label_1 in tokens])


def _check(implementation, dtype, T, D, V, scale=1.0):
    torch.manual_seed(V)
    x, weight = (torch.randn(shape, device=DEVICE).bfloat16().double() for shape in [(T, D), (V, D)])
    weight *= 2 / D**0.5
    labels = torch.randint(V, (T,), device=DEVICE)
    labels[:: max(2, T // 3)] = IGNORE_INDEX
    results = []
    for kind in (dtype, torch.float64):
        leaves = [value.to(dtype).to(kind).requires_grad_() for value in (x, weight)]
        if results:
            loss = linear_cross_entropy_naive(*leaves, labels)
        else:
            loss, losses = linear_cross_entropy(*leaves, labels, implementation=implementation)
            assert loss.dtype == losses.dtype == torch.promote_types(dtype, torch.float32)
            assert not losses.requires_grad
        results.append([loss, *torch.autograd.grad(loss * scale, leaves)])
    assert relative_error(losses, _one_by_one(*leaves, labels)) < TOLERANCES[dtype][0]
    assert not losses[labels == IGNORE_INDEX].any()
    for i, (ours, right) in enumerate(zip(*results, strict=True)):
        assert relative_error(ours, right) < TOLERANCES[dtype][min(i, 1)]
    return results


@pytest.fixture
def budget(monkeypatch, poisoned_empty):
    def set_budget(size):
        monkeypatch.setattr(cross_entropy, "BUDGET", size)
        monkeypatch.setattr(cross_entropy, "SLICE", 64)

    return set_budget


@pytest.mark.parametrize("T, D, V", [(1, 1, 1), (7, 3, 5), (29, 13, 101)])
def test_naive_equals_pytorch(T, D, V):
    g = torch.Generator().manual_seed(V)
    x, weight = (3 * torch.randn(n, D, dtype=torch.float64, generator=g) for n in (T, V))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    labels = torch.randint(V, (T,), generator=g)
    labels[1::3] = IGNORE_INDEX
    right = F.cross_entropy(x @ weight.T, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    ours = linear_cross_entropy_naive(x, weight, labels)
    for result, expected in zip(
        (ours, *torch.autograd.grad(ours, leaves)), (right, *torch.autograd.grad(right, leaves)), strict=True
    ):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_torch_equals_naive(tokens, scale, budget):
    budget(tokens * 17 * (8 + 24))
    _check("torch", torch.float64, 11, 6, 17, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, V", [(1, 1), (11, 17), (7, 700)])
@pytest.mark.parametrize("tokens", [3, 100])
def test_triton_equals_naive(T, V, tokens, dtype, budget, monkeypatch):
    implementation = pytest.importorskip("minimax_train.kernels.cross_entropy.triton", exc_type=ImportError)
    monkeypatch.setattr(implementation, "TILE", (2, 64))
    budget(tokens * V * dtype.itemsize)
    _check("triton", dtype, T, 6, V, 0.37)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_sum_in_float32_beside_the_logits(implementation, budget):
    pytest.importorskip("triton")
    T, D, V = 40, 8, 30
    per_token = V * (2 + 12 * (implementation == "torch"))
    budget(2 * 4 * V * D)
    block, wide_sum = choose_block(T, D, V, itemsize=2, temporaries=3 * (implementation == "torch"))
    assert wide_sum and block == 4 * V * D // per_token < T
    _check(implementation, torch.bfloat16, T, D, V)


@pytest.mark.parametrize("D, wide", [(1024, True), (2048, False), (3072, False), (6144, False)])
def test_a_million_tokens_stay_under_two_gib(D, wide):
    block, wide_sum = choose_block(2**20, D, VOCABULARY, itemsize=2, temporaries=0)
    assert wide_sum == wide
    assert block * VOCABULARY * 2 + wide_sum * VOCABULARY * D * 4 <= cross_entropy.BUDGET < 2 * 2**30
    assert block >= 512


@pytest.mark.parametrize(("implementation", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])
@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("sizes", [(17, 17, 17), (13, 37, 1)])
def test_parts_of_the_vocabulary_add_up(implementation, dtype, tokens, sizes, budget):
    pytest.importorskip("triton")
    T, D, V, ranks = 11, 6, 51, len(sizes)
    torch.manual_seed(tokens)
    x, weight = torch.randn(T, D, device=DEVICE, dtype=dtype), torch.randn(V, D, device=DEVICE, dtype=dtype)
    labels = torch.tensor([0, 16, 17, 33, 34, 50, IGNORE_INDEX, 20, 40, 1, IGNORE_INDEX], device=DEVICE)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    right = linear_cross_entropy_naive(*leaves, labels)
    right_dx, right_dw = torch.autograd.grad(right, leaves)
    budget(tokens * V // ranks * dtype.itemsize * (4 if implementation == "torch" else 1))

    def run(rank, merge):
        start = sum(sizes[:rank])
        parts = [x.clone().requires_grad_(), weight[start : start + sizes[rank]].clone().requires_grad_()]
        shard = VocabularyShard(start, ranks, merge)
        loss, losses = linear_cross_entropy(*parts, labels, shard=shard, implementation=implementation)
        return loss, losses, *torch.autograd.grad(loss, parts)

    # Ranks take turns here: first they say their log-sums, then they are told what these come to.
    said = [[] for _ in sizes]
    for rank, mine in enumerate(said):
        run(rank, lambda log_sum, mine=mine: mine.append(log_sum.clone()) or log_sum)
    merged = torch.stack([torch.cat(mine) for mine in said]).logsumexp(0)
    results = []
    for rank in range(ranks):
        told = iter(merged)
        results.append(run(rank, lambda log_sum, told=told: torch.stack([next(told) for _ in log_sum])))
    loss, losses, dx, dw = zip(*results, strict=True)
    assert relative_error(sum(loss), right) < TOLERANCES[dtype][0]
    assert relative_error(sum(losses), _one_by_one(*leaves, labels)) < TOLERANCES[dtype][0]
    assert relative_error(sum(dx), right_dx) < TOLERANCES[dtype][1]
    assert relative_error(torch.cat(dw), right_dw) < TOLERANCES[dtype][1]


def test_loss_without_gradient():
    x, weight = torch.randn(5, 3), torch.randn(4, 3)
    loss, _ = linear_cross_entropy(x, weight, torch.tensor([0, 1, 2, 3, IGNORE_INDEX]))
    torch.testing.assert_close(loss, F.cross_entropy((x @ weight.T)[:4], torch.arange(4), reduction="sum"))


def test_factor_of_the_gradient_is_not_rounded():
    x, weight = torch.randn(5, 8).bfloat16().requires_grad_(), torch.randn(4, 8).bfloat16()
    factor = torch.tensor(1 + 0.98 * 2**-8)  # 1 in bfloat16
    unscaled, scaled = (
        torch.autograd.grad(linear_cross_entropy(x, weight, torch.arange(5) % 4)[0] * f, x)[0] for f in (1.0, factor)
    )
    assert torch.equal(scaled, (unscaled.float() * factor).bfloat16()) and not torch.equal(scaled, unscaled)


def test_a_second_backward_pass_is_refused():
    x = torch.randn(5, 8, requires_grad=True)
    loss, _ = linear_cross_entropy(x, torch.randn(4, 8), torch.arange(5) % 4)
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
    loss, _ = linear_cross_entropy(x, weight, labels)
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
