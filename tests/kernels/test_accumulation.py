"""Gradients of weights that are added up where an engine keeps them."""

import torch
from torch import nn

from minimax_train.kernels.accumulation import find_accumulators, set_accumulator
from minimax_train.kernels.deferral import deferred, run
from minimax_train.kernels.experts import expert_mlp, expert_mlp_naive
from support.compare import relative_error

T, K, E, D, F = 11, 2, 3, 6, 5


class Sum:
    """Of one parameter, float64; the first is written over what is there."""

    def __init__(self, parameter):
        self.total, self.told = torch.full(parameter.shape, float("nan"), dtype=torch.float64), 0
        set_accumulator(parameter, self)

    def sum(self):
        return self.total, self.told > 0

    def added(self):
        self.told += 1


def _layer():
    g = torch.Generator().manual_seed(0)
    shapes = [(T, D), (T, K), (E, 2, F, D), (E, D, F)]
    x, weights, gate_up, down = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    experts = torch.randint(-1, E, (T, K), generator=g)
    return x.requires_grad_(), weights, experts, nn.Parameter(gate_up), nn.Parameter(down)


def _apply(layer, function=expert_mlp):
    x, weights, experts, gate_up, down = layer
    return function(x, weights, experts, gate_up.flatten(1, 2), down)


def test_sums_of_passes_and_no_gradient_for_autograd():
    layer = _layer()
    reference = torch.autograd.grad(_apply(layer, expert_mlp_naive).square().sum(), [layer[0], *layer[3:]])
    sums = [Sum(parameter) for parameter in layer[3:]]
    for _ in range(3):
        _apply(layer).square().sum().backward()
    assert relative_error(layer[0].grad, 3 * reference[0]) < 1e-12
    for parameter, total, expected in zip(layer[3:], sums, reference[1:], strict=True):
        assert parameter.grad is None and total.told == 3
        assert relative_error(total.total, 3 * expected) < 1e-12


def test_deferred_gradients_go_to_autograd():
    layer = _layer()
    reference = torch.autograd.grad(_apply(layer, expert_mlp_naive).sum(), layer[3:])
    sums = [Sum(parameter) for parameter in layer[3:]]
    with deferred() as pending:
        _apply(layer).sum().backward()
    run(pending)
    assert not any(total.told for total in sums)
    for parameter, expected in zip(layer[3:], reference, strict=True):
        assert relative_error(parameter.grad, expected) < 1e-12


def test_accumulators_that_are_found():
    parameter, other = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(2))
    assert find_accumulators([parameter]) is None
    accumulator = Sum(parameter)
    assert find_accumulators([parameter, parameter.flatten()]) == [accumulator, accumulator]
    assert find_accumulators([parameter, other]) is None
    for part in (parameter[:2], parameter[2:], parameter.T, parameter.detach()):
        assert find_accumulators([part]) is None
    columns = nn.Parameter(torch.zeros(4, 6).T)  # whose transpose is contiguous, in another order
    Sum(columns)
    assert find_accumulators([columns.T]) is None
