"""The order of an expert layer's streams, and how long its memory lives, with a CPU playing the streams."""

from itertools import count

import pytest
import torch

from minimax_train.parallel.communicator import Pending
from minimax_train.parallel.experts import ExpertParallel, lanes, layer, pipeline, plan, sliced
from support.streams import Streams

GRIDS = [(1, 2), (1, 3), (2, 1), (2, 2)]
T, K, E, D, F = 13, 2, 4, 6, 12


class LocalCopies:
    """Rank 0 of several which all send the same: the reads and writes of transfers, without transfers."""

    rank = 0

    def __init__(self, size):
        self.size = size

    def all_gather(self, x, out=None):
        out = x.new_empty(self.size, *x.shape) if out is None else out
        return Pending(lambda: out.copy_(x.expand(out.shape)))

    def reduce_scatter(self, x, out=None):
        out = torch.empty_like(x[0]) if out is None else out
        return Pending(lambda: out.copy_(x.sum(0)))

    def all_to_all(self, x, out, sends, receives):
        rows = min(sum(sends), sum(receives))
        out[:rows].copy_(x[:rows])
        return Pending(lambda: out)


@pytest.fixture
def streams(monkeypatch):
    streams, numbers = Streams("/parallel/"), count(1)

    def after(lane, done):
        lane._stream = lane._stream or next(numbers)
        return streams.on(lane._stream, done)

    monkeypatch.setattr(lanes.Lane, "after", after)
    for module in (lanes, layer, pipeline, plan, sliced):
        for name in ("mark", "wait"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(streams, name))
    return streams


def _problems(streams, ep, etp, groups):
    """Of two layers after one another, forward and backward."""
    torch.manual_seed(0)
    shapes = [(T, D), (T, K), (E // ep, 2 * F // etp, D), (E // ep, D, F // etp)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    # As many rows to one rank of two as to the other.
    experts = torch.stack([torch.arange(T) % 2, 2 + torch.arange(T) % 2], 1)
    experts_of_one = ExpertParallel(LocalCopies(ep), LocalCopies(etp), num_experts=E, token_groups=groups)
    with streams:
        y = experts_of_one(*leaves[:2], experts, *leaves[2:], implementation="loop")
        y = experts_of_one(y, leaves[1], experts, *leaves[2:], implementation="loop")
        for gradient in torch.autograd.grad(y, leaves, torch.ones_like(y)):
            gradient.clone()
    return streams.problems


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("sizes", GRIDS, ids=lambda s: f"ep{s[0]}-etp{s[1]}")
def test_streams_wait_for_each_other(streams, sizes, groups):
    assert not _problems(streams, *sizes, groups)


@pytest.mark.parametrize("sizes", GRIDS, ids=lambda s: f"ep{s[0]}-etp{s[1]}")
def test_products_that_do_not_wait_are_found(monkeypatch, streams, sizes):
    monkeypatch.setattr(pipeline, "wait", lambda done: None)
    assert any("used while still in use" in problem for problem in _problems(streams, *sizes, 2))


@pytest.mark.parametrize("sizes", GRIDS, ids=lambda s: f"ep{s[0]}-etp{s[1]}")
def test_memory_given_up_too_early_is_found(monkeypatch, streams, sizes):
    monkeypatch.setattr(pipeline.Returning, "add", lambda returning, done, kept: returning.done.append(done))
    assert any("handed out while still in use" in problem for problem in _problems(streams, *sizes, 4))
