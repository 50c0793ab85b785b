"""The Triton parts of the expert layer against PyTorch in float64, and bit by bit where the result is exact."""

import pytest
import torch

from minimax_train.kernels.experts import (
    Permutation,
    expert_mlp,
    expert_mlp_naive,
    has_quack,
    pytorch,
    route,
    router_logits,
)
from support.compare import relative_error

experts_triton = pytest.importorskip("minimax_train.kernels.experts.triton", exc_type=ImportError)
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
gpu = pytest.mark.gpu
HAS_QUACK = HAS_GPU and has_quack(torch.device("cuda"))
QUACK = [gpu, pytest.mark.skipif(not HAS_QUACK, reason="needs quack-kernels and a Hopper GPU")]
ON_GPU = ["triton", pytest.param("quack", marks=QUACK)]
# Relative error against float64: rounding of results, and in bfloat16 of what is kept between kernels.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, poisoned_empty):
    if not HAS_GPU:
        monkeypatch.setattr(experts_triton, "BLOCK", 16)
        monkeypatch.setattr(experts_triton, "TILE", 256)


def _randn(*shape, dtype=torch.float64):
    """Values that every dtype of these tests holds exactly."""
    return torch.randn(*shape, device=DEVICE).to(torch.bfloat16).to(dtype)


def _gradients(outputs, leaves, d_outputs, **how):
    return torch.autograd.grad(outputs, leaves, d_outputs, **how)


@pytest.mark.parametrize(
    "T, E, K, pieces", [(1, 1, 1, 1), (63, 5, 2, 1), (150, 5, 3, 4), (130, 32, 2, 2), (6, 1500, 3, 2)]
)
def test_route(T, E, K, pieces):
    torch.manual_seed(T)
    logits = torch.randn(T, E, device=DEVICE)
    piece = torch.arange(T, device=DEVICE) * pieces // T
    results = []
    d_sums, d_weights = _randn(pieces, E), _randn(T, K)
    for implementation, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        out = route(leaf, K, piece, pieces, implementation=implementation)
        both = _gradients([out.weights_TK, out.probability_PE], [leaf], [d_weights.to(dtype), d_sums.to(dtype)])
        again = route(leaf, K, piece, pieces, implementation=implementation)
        alone = _gradients(again.weights_TK, [leaf], d_weights.to(dtype), retain_graph=True)
        sums = _gradients(again.probability_PE, [leaf], d_sums.to(dtype))
        assert torch.equal(again.probability_PE, out.probability_PE) and torch.equal(again.entropy, out.entropy)
        results.append((out, *both, *alone, *sums))
    (ours, *our_gradients), (right, *right_gradients) = results
    assert torch.equal(ours.experts_TK, right.experts_TK) and torch.equal(ours.count_PE, right.count_PE)
    assert ours.count_PE.sum() == T * K
    assert float(ours.entropy) == pytest.approx(float(right.entropy), rel=1e-6, abs=1e-6)
    for a, b in (
        (ours[0], right[0]),
        (ours.probability_PE, right.probability_PE),
        (our_gradients[0], right_gradients[0]),
        (our_gradients[2], right_gradients[2]),
    ):
        assert relative_error(a, b) < 1e-6 if E > 1 else (a - b).abs().max() < 1e-6
    # The gradient of weights that must sum to one vanishes where there is one assignment.
    assert relative_error(our_gradients[1], right_gradients[1]) < 2e-6 if K > 1 else our_gradients[1].abs().max() < 1e-6


def test_equal_logits_choose_the_first_experts():
    weights, experts, counts, *_ = route(
        torch.zeros(9, 6, device=DEVICE),
        2,
        torch.zeros(9, dtype=torch.int64, device=DEVICE),
        1,
        implementation="triton",
    )
    assert experts.tolist() == [[0, 1]] * 9 and counts.tolist() == [[9, 9, 0, 0, 0, 0]]
    assert torch.equal(weights, torch.full_like(weights, 0.5))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_logits_of_nan_still_choose_experts():
    logits = torch.full((3, 6), float("nan"), device=DEVICE)
    piece = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    weights, experts, *_ = route(logits, 2, piece, 1, implementation="triton")
    assert ((experts >= 0) & (experts < 6)).all() and weights.isnan().all()


@pytest.mark.parametrize(
    "T, E, K, least", [(1, 1, 1, 0), (63, 5, 2, -1), (200, 7, 3, 0), (70, 32, 2, -1), (5, 4, 2, None)]
)
def test_routed_tokens_are_those_of_a_stable_sort(T, E, K, least):
    torch.manual_seed(T)
    experts = torch.randint(least, E, (T, K)) if least is not None else torch.full((T, K), -1)
    ours, right = (ops.sort_by_expert(experts.to(DEVICE), E) for ops in (experts_triton, pytorch))
    for a, b in zip(ours, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("T, K, D", [(1, 1, 5), (37, 2, 40), (19, 3, 300)])
def test_permute_and_unpermute(T, K, D, dtype):
    torch.manual_seed(T)
    experts = torch.randint(-1, 4, (T, K), device=DEVICE)
    ours, right = (Permutation.by_expert(experts, 4, ops) for ops in (experts_triton, pytorch))
    x, y, weights = _randn(T, D), _randn(T * K, D), torch.rand(T, K, device=DEVICE)
    assert torch.equal(ours.permute(x.to(dtype)).double(), right.permute(x))
    assert torch.equal(ours.permute_weights(weights), weights.flatten()[right.assignment_R])
    # What no expert wrote may hold anything.
    y[int(right.offsets_E[-1]) :] = float("nan")
    d_weights = torch.rand(T * K, device=DEVICE).where(~y[:, 0].isnan(), float("nan"))
    sums, of_weights = ours.unpermute(y.to(dtype), d_weights)
    assert relative_error(sums, right.unpermute(y)[0]) < TOLERANCES[dtype]
    assert torch.equal(of_weights, d_weights[right.routed_TK].where(experts >= 0, 0))
    # Plus a multiple of the tokens, which may be columns of something wider.
    wide = torch.cat([x, x], 1)[:, :D].to(dtype)
    (added,) = ours.unpermute(y.to(dtype), None, wide, 1.75)
    assert relative_error(added, right.unpermute(y)[0] + 1.75 * x) < TOLERANCES[dtype]
    assert relative_error(right.unpermute(y, None, x, 1.75)[0], right.unpermute(y)[0] + 1.75 * x) < 1e-12
    # One token at a time.
    for t in range(T):
        kept = [int(right.routed_TK[t, k]) for k in range(K) if experts[t, k] >= 0]
        assert torch.equal(right.unpermute(y)[0][t], sum((y[r] for r in kept), torch.zeros_like(x[t])))
        assert all(torch.equal(right.permute(x)[r], x[t]) for r in kept)


def _layer(T, E, K, D, F):
    torch.manual_seed(T)
    return [_randn(T, D), torch.rand(T, K).to(DEVICE).double(), _randn(E, 2 * F, D) / 8, _randn(E, D, F) / 8]


def _check_mlp(T, E, K, D, F, least, dtype, reference, implementation="triton"):
    residual = 1.75
    values = _layer(T, E, K, D, F)
    # The last expert gets no token.
    experts = torch.randint(least, max(1, E - 1), (T, K), device=DEVICE)
    d_out = _randn(T, D)
    results = []

    def ours(*args):
        return expert_mlp(*args, residual=residual, implementation=implementation)

    def right(*args):
        return reference(*args) + residual * args[0]

    for run, kind in ((ours, dtype), (right, torch.float64)):
        # Weights come from the router, in float32.
        kinds = [kind, torch.promote_types(kind, torch.float32), kind, kind]
        x, weights, gate_up, down = leaves = [
            value.to(to).requires_grad_() for value, to in zip(values, kinds, strict=True)
        ]
        out = run(x, weights, experts, gate_up, down)
        assert out.dtype == kind
        results.append([out, *_gradients(out, leaves, d_out.to(kind))])
    for name, a, b in zip(("out", "x", "weights", "gate_up", "down"), *results, strict=True):
        assert relative_error(a, b) < TOLERANCES[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("T, E, K, D, F, least", [(1, 1, 1, 8, 8, 0), (33, 5, 2, 24, 40, -1), (21, 4, 3, 16, 264, 0)])
def test_expert_mlp_equals_one_token_at_a_time(T, E, K, D, F, least, dtype):
    _check_mlp(T, E, K, D, F, least, dtype, expert_mlp_naive)


@pytest.mark.parametrize("implementation", ["torch", *ON_GPU])
def test_tokens_of_no_expert(implementation):
    values = [value.bfloat16() for value in _layer(9, 3, 2, 16, 24)]
    leaves = [value.requires_grad_() for value in (values[0], values[1].float(), *values[2:])]
    out = expert_mlp(*leaves[:2], torch.full((9, 2), -1, device=DEVICE), *leaves[2:], implementation=implementation)
    for x in (out, *_gradients(out, leaves, torch.ones_like(out))):
        assert not x.any()


# Few tokens per expert, but for the second: the GEMMs by quack have other clusters then.
REAL_SIZES = [
    (4097, 32, 2, 1024, 2816),
    (3001, 3, 2, 2048, 264),
    (1000, 6, 2, 6144, 1152),
    (77, 5, 3, 256, 264),
    (1, 2, 1, 64, 8),
]


@gpu
@pytest.mark.parametrize("implementation", ON_GPU)
@pytest.mark.parametrize("least", [-1, 0])
@pytest.mark.parametrize("T, E, K, D, F", REAL_SIZES)
def test_expert_mlp_at_real_sizes(T, E, K, D, F, least, implementation):
    def by_torch(*args):
        return expert_mlp(*args, implementation="torch")

    _check_mlp(T, E, K, D, F, least, torch.bfloat16, by_torch, implementation)


@gpu
@pytest.mark.parametrize("implementation", ON_GPU)
def test_numbers_of_tokens_may_differ_from_call_to_call(implementation):
    for T in (300, 41, 1025):
        _check_mlp(T, 4, 2, 128, 192, -1, torch.bfloat16, expert_mlp_naive, implementation)


@pytest.mark.parametrize("T, D, E", [(1, 8, 3), (70, 40, 5), pytest.param(4097, 6144, 32, marks=gpu)])
def test_router_logits_from_bfloat16_are_those_of_float32(T, D, E):
    torch.manual_seed(T)
    x, weight, d_logits, d_x = _randn(T, D), _randn(E, D) / D, torch.randn(T, E, device=DEVICE), _randn(T, D)
    results = []
    for implementation, kind in (("triton", torch.bfloat16), ("torch", torch.float64)):
        leaves = [x.to(kind).requires_grad_(), weight.bfloat16().to(kind).requires_grad_()]
        logits, through = router_logits(*leaves, implementation=implementation)
        both = _gradients([logits, through], leaves, [d_logits.to(logits.dtype), d_x.to(kind)])
        logits_again, _ = router_logits(*leaves, implementation=implementation)
        alone = _gradients(logits_again, leaves, d_logits.to(logits.dtype))
        results.append([logits, *both, *alone])
    (logits, *ours), (right, *references) = results
    # Tensor cores cut off what they add, where the CPU rounds: 3e-6 for a sum of 6144 terms.
    assert logits.dtype == torch.float32 and relative_error(logits, right) < (1e-5 if HAS_GPU else 1e-6)
    for gradient, reference in zip(ours, references, strict=True):
        assert relative_error(gradient, reference) < 4e-3  # one rounding


@gpu
@pytest.mark.parametrize("implementation", ON_GPU)
def test_two_runs_give_the_same_bits(implementation):
    x, weights, gate_up, down = (value.bfloat16() for value in _layer(2000, 8, 2, 512, 704))
    experts = torch.randint(8, (2000, 2), device=DEVICE)
    runs = []
    for _ in range(2):
        leaves = [value.detach().requires_grad_() for value in (x, weights, gate_up, down)]
        out = expert_mlp(leaves[0], leaves[1], experts, *leaves[2:], implementation=implementation)
        runs.append([out, *_gradients(out, leaves, torch.ones_like(out))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
