"""Projections of gathered tokens, and those summed over ranks, against the same GEMMs on one rank."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from minimax_train.kernels.deferral import deferred, run
from minimax_train.parallel.communicator import GroupCommunicator
from minimax_train.parallel.tensor import TensorParallel
from support.compare import relative_error
from support.distributed import run_ranks

TOKENS, HIDDEN, WIDTHS = 7, 5, (9, 3, 1)


def _case(ranks):
    """Tokens of all ranks, each rank's weights, and gradients of each rank's outputs."""
    g = torch.Generator().manual_seed(ranks)
    x = torch.randn(ranks * TOKENS, HIDDEN, dtype=torch.float64, generator=g)
    weights = [[torch.randn(w, HIDDEN, dtype=torch.float64, generator=g) for w in WIDTHS] for _ in range(ranks)]
    gradients = [[torch.randn(len(x), w, dtype=torch.float64, generator=g) for w in WIDTHS] for _ in range(ranks)]
    return x, weights, gradients


def _project(grid, number):
    """Outputs, gradients, and the bytes kept for backward beside the weights, of the first projections."""
    communicator = GroupCommunicator(grid.group("tp"))
    x, weights, gradients = _case(communicator.size)
    x = x.chunk(communicator.size)[communicator.rank].clone().requires_grad_()
    weights = [w.requires_grad_() for w in weights[communicator.rank][:number]]
    kept = {}

    def pack(tensor):
        if all(tensor is not w for w in weights):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = TensorParallel(communicator).project(x, *weights)
    results = torch.autograd.grad(outputs, [x, *weights], gradients[communicator.rank][:number])
    return [y.detach() for y in outputs], results, sum(kept.values())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_equals_one_rank_in_float64(ranks, number):
    x, weights, gradients = _case(ranks)
    x.requires_grad_()
    weights = [[w.requires_grad_() for w in mine[:number]] for mine in weights]
    expected = [[x @ w.T for w in mine] for mine in weights]
    pairs = [
        (y, d) for mine, theirs in zip(expected, gradients, strict=True) for y, d in zip(mine, theirs, strict=False)
    ]
    loss = sum((y * d).sum() for y, d in pairs)
    dx, *d_weights = torch.autograd.grad(loss, [x, *(w for mine in weights for w in mine)])
    for rank, (outputs, (my_dx, *my_d_weights), kept) in enumerate(run_ranks(_project, ranks, number, tp=ranks)):
        right = [*expected[rank], dx.chunk(ranks)[rank], *d_weights[rank * number : (rank + 1) * number]]
        for actual, wanted in zip([*outputs, my_dx, *my_d_weights], right, strict=True):
            assert relative_error(actual, wanted) < 1e-12
        assert kept == TOKENS * HIDDEN * 8  # this rank's tokens, not everybody's


def _summed_case(ranks):
    """Inputs of each rank, its columns of the weight, and the gradient of all tokens' outputs."""
    g = torch.Generator().manual_seed(ranks)
    T, width = ranks * TOKENS, WIDTHS[0]
    xs = [torch.randn(T, width, dtype=torch.float64, generator=g).requires_grad_() for _ in range(ranks)]
    weights = [torch.randn(HIDDEN, width, dtype=torch.float64, generator=g).requires_grad_() for _ in range(ranks)]
    return xs, weights, torch.randn(T, HIDDEN, dtype=torch.float64, generator=g)


def _project_sum(grid, split):
    communicator = GroupCommunicator(grid.group("tp"))
    xs, weights, d = _summed_case(communicator.size)
    x, weight = xs[communicator.rank], weights[communicator.rank]
    my_d = d.chunk(communicator.size)[communicator.rank]
    if not split:
        y = TensorParallel(communicator).project_sum(x, weight)
        return y.detach(), *torch.autograd.grad(y, [x, weight], my_d)
    with deferred():
        y = TensorParallel(communicator).project_sum(x, weight)
    with deferred() as pending:
        y.backward(my_d)
    assert weight.grad is None
    run(pending)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sum_equals_one_rank_in_float64(ranks, split):
    xs, weights, d = _summed_case(ranks)
    y = torch.cat(xs, 1) @ torch.cat(weights, 1).T
    gradients = torch.autograd.grad(y, [*xs, *weights], d)
    for rank, actual in enumerate(run_ranks(_project_sum, ranks, split, tp=ranks)):
        right = y.chunk(ranks)[rank], gradients[rank], gradients[ranks + rank]
        for mine, wanted in zip(actual, right, strict=True):
            assert relative_error(mine, wanted) < 1e-12
