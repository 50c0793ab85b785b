"""Routing, permutation and grouped experts against one token at a time."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_train.kernels.experts import drop_over_capacity, expert_mlp, expert_mlp_naive, load_balancing_loss, route
from support.compare import relative_error
from support.routing import (
    drop_over_capacity_naive,
    entropy_naive,
    load_balancing_loss_naive,
    route_naive,
    tokens_per_expert_naive,
)


def _layer(T, E, K, D, F, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in [(T, D), (E, 2 * F, D), (E, D, F), (T, K)]
    ]
    return [x.requires_grad_() for x in tensors]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_one_token_at_a_time(data):
    T, E, K = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    assigned = data.draw(st.lists(st.integers(-1, E - 1), min_size=T * K, max_size=T * K))
    experts = torch.tensor(assigned).view(T, K)
    x, gate_up, down, weights = _layer(T, E, K, 5, 3, seed=T)
    residual = data.draw(st.sampled_from([0.0, 1.75]))
    out = expert_mlp(x, weights, experts, gate_up, down, residual=residual)
    expected = expert_mlp_naive(x, weights, experts, gate_up, down) + residual * x
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    if (experts >= 0).any():
        leaves = [x, gate_up, down, weights]
        right = torch.autograd.grad(expected, leaves, grad, allow_unused=True, materialize_grads=True)
        for gradient, reference in zip(torch.autograd.grad(out, leaves, grad), right, strict=True):
            torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("T, E, K, pieces", [(1, 1, 1, 1), (33, 7, 3, 2), (50, 5, 5, 4)])
def test_routing_equals_one_token_at_a_time(T, E, K, pieces):
    torch.manual_seed(T)
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    piece = torch.arange(T) * pieces // T
    ours = route(logits, K, piece, pieces, implementation="torch")
    probabilities, weights, experts = route_naive(logits, K)
    sums = torch.stack([probabilities[piece == p].sum(0) for p in range(pieces)])
    assert torch.equal(ours.experts_TK, experts)
    assert ours.count_PE.tolist() == tokens_per_expert_naive(experts, E, piece, pieces)
    assert float(ours.entropy) == pytest.approx(entropy_naive(probabilities), rel=1e-12, abs=1e-15)
    pairs = [(ours.weights_TK, weights), (ours.probability_PE, sums)]
    gradients = [torch.randn_like(x) for x, _ in pairs]
    both = [torch.autograd.grad(x, logits, gradients)[0] for x in zip(*pairs, strict=True)]
    for a, b in (*pairs, both):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_capacity_keeps_the_first_assignments_of_each_sequence(data):
    sequences, length, E, K = (data.draw(st.integers(1, n)) for n in (3, 9, 4, 2))
    capacity, tokens = data.draw(st.integers(0, 6)), sequences * length
    assigned = data.draw(st.lists(st.integers(0, E - 1), min_size=tokens * K, max_size=tokens * K))
    experts, sequence = torch.tensor(assigned).view(tokens, K), torch.arange(tokens) // length
    expected = drop_over_capacity_naive(experts, sequence, capacity)
    # Each sequence in one piece, or cut in pieces of which only some are here.
    cuts = data.draw(st.lists(st.integers(1, tokens - 1), max_size=3)) if tokens > 1 else []
    pieces = list(itertools.pairwise(sorted({0, tokens, *range(0, tokens, length), *cuts})))
    here = [piece for piece in pieces if data.draw(st.booleans())] or pieces
    mine = torch.tensor([t for a, b in here for t in range(a, b)])
    piece = torch.tensor([p for p, (a, b) in enumerate(here) for _ in range(a, b)])
    before = [experts[a // length * length : a] for a, _ in here]
    taken = torch.tensor([[int((x == e).sum()) for e in range(E)] for x in before])
    tokens_per_expert = torch.tensor(tokens_per_expert_naive(experts[mine], E, piece, len(here)))
    kept = drop_over_capacity(experts[mine], piece, tokens_per_expert, taken, capacity)
    assert torch.equal(kept, expected[mine])


@pytest.mark.parametrize("sequences, length, E, K", [(1, 1, 1, 1), (2, 31, 6, 2), (3, 17, 5, 3)])
def test_load_balancing_loss(sequences, length, E, K):
    from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

    torch.manual_seed(length)
    logits = torch.randn(sequences * length, E, dtype=torch.float64, requires_grad=True)
    sequence = torch.arange(sequences * length) // length
    _, experts, tokens_per_expert, sums, _ = route(logits, K, sequence, sequences)
    ours = load_balancing_loss(sums, tokens_per_expert.double() / length, length)
    right = load_balancing_loss_naive(logits.softmax(-1), experts, sequence)
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, right)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    theirs = sum(load_balancing_loss_func((part,), E, K) for part in logits.split(length))
    assert relative_error(ours, theirs / E**2) < 1e-6  # E^2 of ours for one sequence; theirs counts in float32


def test_former_names_of_implementations_are_refused():
    x, gate_up, down, weights = _layer(3, 2, 1, 4, 4)
    none = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"kernels.experts='loop': renamed: use 'torch'"):
        expert_mlp(x, weights, none, gate_up, down, implementation="loop")
    with pytest.raises(ValueError, match=r"kernels.router='plain': renamed: use 'torch'"):
        route(x, 1, none[:, 0], 1, implementation="plain")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dropped", [False, True])
def test_grouped_gemm_on_gpu(dropped):
    x, gate_up, down, weights = _layer(301, 6, 2, 64, 96)
    experts = torch.randint(-1 if dropped else 0, 5, (301, 2))  # the last expert gets no token
    expected = expert_mlp(x, weights, experts, gate_up, down, implementation="torch")
    half = [t.detach().bfloat16().cuda().requires_grad_() for t in (x, gate_up, down, weights)]
    out = expert_mlp(half[0], half[3], experts.cuda(), half[1], half[2], implementation="grouped")
    assert relative_error(out.cpu(), expected) < 2e-2
    grad = torch.randn_like(expected)
    right = torch.autograd.grad(expected, [x, gate_up, down, weights], grad)
    for gradient, reference in zip(torch.autograd.grad(out, half, grad.bfloat16().cuda()), right, strict=True):
        assert relative_error(gradient.cpu(), reference) < 2e-2
