"""Routing, permutation and grouped experts against one token at a time."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_train.kernels.experts import (
    count_choices,
    drop_over_capacity,
    expert_mlp,
    expert_mlp_naive,
    load_balancing_loss,
    top_k_routing,
)
from support.compare import relative_error


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
    choices = data.draw(st.lists(st.integers(-1, E - 1), min_size=T * K, max_size=T * K))
    experts = torch.tensor(choices).view(T, K)
    x, gate_up, down, weights = _layer(T, E, K, 5, 3, seed=T)
    out = expert_mlp(x, weights, experts, gate_up, down)
    expected = expert_mlp_naive(x, weights, experts, gate_up, down)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    if (experts >= 0).any():
        leaves = [x, gate_up, down, weights]
        right = torch.autograd.grad(expected, leaves, grad, allow_unused=True, materialize_grads=True)
        for gradient, reference in zip(torch.autograd.grad(out, leaves, grad), right, strict=True):
            torch.testing.assert_close(gradient, reference)


def test_routing_equals_softmax_over_the_chosen_logits():
    logits = torch.randn(33, 7, dtype=torch.float64)
    probabilities, weights, experts = top_k_routing(logits, 3)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(33, dtype=torch.float64))
    torch.testing.assert_close(weights, logits.topk(3).values.softmax(-1))
    assert torch.equal(experts, logits.topk(3).indices)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_capacity_keeps_the_first_choices_of_each_row(data):
    rows, length, E, K = (data.draw(st.integers(1, n)) for n in (3, 9, 4, 2))
    capacity = data.draw(st.integers(0, 6))
    choices = data.draw(st.lists(st.integers(0, E - 1), min_size=rows * length * K, max_size=rows * length * K))
    expected = []
    for row in _batched(choices, length * K):
        taken = [0] * E
        for expert in row:
            expected.append(expert if taken[expert] < capacity else -1)
            taken[expert] += 1
    # Each row in one piece, or cut in pieces of which only some are here.
    cuts = data.draw(st.lists(st.integers(1, rows * length - 1), max_size=3)) if rows * length > 1 else []
    edges = sorted({0, rows * length, *range(0, rows * length, length), *cuts})
    pieces = list(itertools.pairwise(edges))
    here = [piece for piece in pieces if data.draw(st.booleans())] or pieces
    per_token = _batched(choices, K)
    counts = [[_flat(per_token[a:b]).count(e) for e in range(E)] for a, b in here]
    taken = [[_flat(per_token[a // length * length : a]).count(e) for e in range(E)] for a, _ in here]
    experts = torch.tensor(_flat(per_token[a:b] for a, b in here))
    piece = torch.tensor([p for p, (a, b) in enumerate(here) for _ in range(a, b)])
    load = count_choices(experts, E, piece, len(here))
    assert load.tolist() == counts
    kept = drop_over_capacity(experts, piece, load, torch.tensor(taken), capacity)
    assert kept.flatten().tolist() == _flat(expected[a * K : b * K] for a, b in here)


def _flat(lists):
    return list(itertools.chain.from_iterable(lists))


def _batched(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def test_load_balancing_loss_is_transformers_over_experts_squared():
    from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

    logits = torch.randn(2 * 31, 6, dtype=torch.float64)
    probabilities, _, experts = top_k_routing(logits, 2)
    row = torch.arange(62) // 31
    ours = load_balancing_loss(probabilities, row, count_choices(experts, 6, row, 2) / 31, 31)
    theirs = sum(load_balancing_loss_func((part,), 6, 2) for part in logits.chunk(2))
    assert relative_error(ours, theirs / 6**2) < 1e-6  # theirs counts in float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dropped", [False, True])
def test_grouped_gemm_on_gpu(dropped):
    x, gate_up, down, weights = _layer(301, 6, 2, 64, 96)
    experts = torch.randint(-1 if dropped else 0, 5, (301, 2))  # the last expert gets no token
    expected = expert_mlp(x, weights, experts, gate_up, down, implementation="loop")
    half = [t.detach().bfloat16().cuda().requires_grad_() for t in (x, gate_up, down, weights)]
    out = expert_mlp(half[0], half[3], experts.cuda(), half[1], half[2], implementation="grouped")
    assert relative_error(out.cpu(), expected) < 2e-2
    grad = torch.randn_like(expected)
    right = torch.autograd.grad(expected, [x, gate_up, down, weights], grad)
    for gradient, reference in zip(torch.autograd.grad(out, half, grad.bfloat16().cuda()), right, strict=True):
        assert relative_error(gradient.cpu(), reference) < 2e-2
