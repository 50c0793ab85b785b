"""Weight gradients that the backward pass leaves for later: the same bits, at the time asked for, and nothing kept."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from minimax_train.kernels.deferral import begin_layer, deferred, linear, run
from minimax_train.kernels.experts import expert_mlp
from minimax_train.parallel.tensor import TensorParallel

T, D, W, E, HIDDEN, K = 11, 12, 7, 3, 5, 2


def _weights(dtype):
    g = torch.Generator().manual_seed(0)
    shapes = [(W, D), (D, D), (D, W), (E, 2, HIDDEN, D), (E, D, HIDDEN)]
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def _inputs(dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x_TD, d_TD = (torch.randn(T, D, generator=g).to(dtype) for _ in range(2))
    weights_TK = torch.rand(T, K, generator=g)
    experts_TK = torch.rand(T, E, generator=g).topk(K).indices
    return x_TD.requires_grad_(), d_TD, weights_TK.requires_grad_(), experts_TK


def _layer(x_TD, weights_TK, experts_TK, a_WD, b_DD, c_DW, gate_up, down):
    """Every way in which tokens are multiplied with weights; experts with a view of their parameter."""
    y_TW, z_TD = TensorParallel().project(x_TD, a_WD, b_DD)
    x_TD = z_TD + linear(y_TW.sigmoid(), c_DW)
    return expert_mlp(x_TD, weights_TK, experts_TK, gate_up.flatten(1, 2), down)


def _gradients(dtype, split, recompute):
    """Of two micro-batches, whose backward passes come before the gradients of any weights where these are split."""
    weights, kept, found = _weights(dtype), [], []
    for seed in (1, 2):
        x_TD, d_TD, weights_TK, experts_TK = _inputs(dtype, seed)

        def forward(x_TD, weights_TK=weights_TK, experts_TK=experts_TK):
            return _layer(x_TD, weights_TK, experts_TK, *weights)

        def passes(x_TD=x_TD, d_TD=d_TD, forward=forward):
            y_TD = checkpoint(forward, x_TD, use_reentrant=False) if recompute else forward(x_TD)
            yield
            y_TD.backward(d_TD)
            yield

        steps = passes()
        if split:
            with deferred() as pending:
                next(steps)
            assert not pending
            with deferred() as pending:
                next(steps)
            assert len(pending) == 3
            assert all(weight.grad is None for weight in weights)
            kept.append(pending)
        else:
            list(steps)
        found += [x_TD.grad, weights_TK.grad]
    for pending in kept:
        run(pending)
        assert not pending
    return found + [weight.grad for weight in weights]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_same_bits_later(dtype, recompute):
    found, expected = _gradients(dtype, True, recompute), _gradients(dtype, False, recompute)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_operands_are_freed_one_by_one():
    weights = [torch.randn(D, D, requires_grad=True) for _ in range(2)]
    x_TD = torch.randn(T, D, requires_grad=True)
    with deferred():
        h_TD = linear(x_TD, weights[0])
        inputs = [weakref.ref(h_TD)]
        y_TD = linear(h_TD * 1, weights[1])
    del h_TD
    with deferred() as pending:
        y_TD.sum().backward()
    del y_TD
    inputs += [weakref.ref(compute) for _, compute in pending]
    run(pending)
    gc.collect()
    assert [each() for each in inputs] == [None] * 3


def test_layers_are_told_in_the_order_of_the_backward_pass():
    weights = [torch.randn(D, D, requires_grad=True) for _ in range(3)]
    x_TD = torch.randn(T, D, requires_grad=True)
    with deferred():
        y_TD = x_TD
        for layer, weight in enumerate(weights):
            y_TD = begin_layer(y_TD, layer)
            y_TD = y_TD + linear(linear(y_TD, weight), weight)
    with deferred() as pending:
        y_TD.sum().backward()
    told = []
    run(pending, lambda layer: told.append((layer, [weight.grad is not None for weight in weights])))
    assert told == [(2, [False, False, True]), (1, [False, True, True]), (0, [True] * 3)]


def test_nothing_is_deferred_without_a_backward_pass_to_do_it():
    weight = torch.randn(W, D, requires_grad=True)
    with deferred() as pending:
        linear(torch.randn(T, D), weight).sum().backward()
        assert not pending and weight.grad is not None
        with torch.no_grad():
            assert not linear(torch.randn(T, D, requires_grad=True), weight).requires_grad
    y_TW = None
    with deferred():
        y_TW = linear(torch.randn(T, D, requires_grad=True), weight)
    with pytest.raises(AssertionError, match="inside deferred"):
        y_TW.sum().backward()
