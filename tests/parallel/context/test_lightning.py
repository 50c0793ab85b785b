"""Context-parallel lightning attention against the recurrence on the whole sequence, token by token."""

import os
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from minimax_train.documents import Documents
from minimax_train.kernels.lightning import lightning_attention
from minimax_train.parallel.communicator import GroupCommunicator
from minimax_train.parallel.context import lightning
from minimax_train.parallel.context.layout import SequenceLayout
from minimax_train.parallel.context.lightning import choose_method, lightning_attention_cp
from support.compare import relative_error
from support.distributed import GPU_LINKS, run_gpu_ranks, run_ranks
from support.mixes import random_mix

# Of a chunk of 5 to 19 tokens none, one or all of these heads have a short memory.
SLOPES = [(0.917, 0.1, 1e-5), (9.0, 0.1, 1e-5), (20.0, 12.0, 9.0)]


class Case(NamedTuple):
    """Documents packed on one axis, q, k, v and the output's gradient; output and gradients by the recurrence."""

    lengths: list[int]
    slopes: torch.Tensor
    inputs: list[torch.Tensor]
    expected: list[torch.Tensor]


@cache
def _case(chunks, size, seed, dtype, slopes, K=5, V=4):
    """A random mix; the recurrence and autograd through it are in float64."""
    tokens, H, generator = chunks * size, len(slopes), torch.Generator().manual_seed(seed)
    shapes = [(tokens, H, K), (tokens, H, K), (tokens, H, V), (tokens, H, V)]
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]
    lengths, slopes = random_mix(tokens, chunks, seed), torch.tensor(slopes, dtype=torch.float64)
    return Case(lengths, slopes, inputs, _reference(inputs, slopes, lengths, "naive"))


def _reference(inputs, slopes, lengths, implementation):
    *qkv, grad = (x.double() for x in inputs)
    qkv = [x.requires_grad_() for x in qkv]
    out, _ = lightning_attention(*qkv, slopes, Documents.from_lengths(lengths), implementation=implementation)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def _worst_error(grid, kind, method, cases, implementation="auto"):
    """Largest error over all cases of this rank's output and gradients."""
    communicator = GroupCommunicator(grid.group("dp"))
    layout, worst = SequenceLayout(kind, communicator.size), 0.0
    for case in cases:
        shard = layout.shard(Documents.from_lengths(case.lengths), communicator.rank)
        *mine, grad = (shard.take(x) for x in case.inputs)
        mine = [x.requires_grad_() for x in mine]
        slopes = case.slopes.to(torch.promote_types(grad.dtype, torch.float32))
        how = {"method": method, "implementation": implementation}
        out = lightning_attention_cp(*mine, slopes, shard, communicator, **how)
        actual = [out, *torch.autograd.grad(out, mine, grad)]
        for a, e in zip(actual, case.expected, strict=True):
            error = (a.double() - shard.take(e)).abs().max() / e.abs().max().clamp(min=1)
            worst = max(worst, float(error)) if error == error else float("inf")
    return worst


def _cases(kind, ranks, seeds, dtype):
    chunks = len(SequenceLayout(kind, ranks).chunk_ranks)
    return [_case(chunks, 3 + seed % 17, seed, dtype, SLOPES[seed % 3]) for seed in seeds]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("method", ["lasp_plus", "ring", "scan"])
def test_equals_recurrence(ranks, kind, method):
    cases = _cases(kind, ranks, range(60 if method == "lasp_plus" else 25), torch.float64)
    assert max(run_ranks(_worst_error, ranks, kind, method, cases)) < 1e-10


def test_equals_recurrence_in_float32():
    cases = _cases("zigzag", 4, range(25), torch.float32)
    assert max(run_ranks(_worst_error, 4, "zigzag", "auto", cases)) < 1e-5


def _asks(grid):
    """How often the host asks which heads have a short memory, in three passes with a layer's slopes."""
    communicator, count = GroupCommunicator(grid.group("dp")), lightning.count_short_memory_heads
    case = _case(2, 8, 3, torch.float64, SLOPES[1])
    shard = SequenceLayout("contiguous", 2).shard(Documents.from_lengths([16]), communicator.rank)
    *mine, grad = (shard.take(x) for x in case.inputs)
    mine = [x.requires_grad_() for x in mine]
    count.cache_clear()
    for _ in range(3):
        with saved_tensors_hooks(torch.Tensor.detach, lambda x: x):  # as recomputation and CUDA graphs have them
            lightning_attention_cp(*mine, case.slopes, shard, communicator).backward(grad)
    return count.cache_info().misses


def test_the_host_asks_once_which_heads_have_a_short_memory():
    assert run_ranks(_asks, 2) == [1, 1]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="small float32 shapes are for the interpreter")
@pytest.mark.parametrize(("kind", "ranks"), [("contiguous", 3), ("zigzag", 2)])
@pytest.mark.parametrize("method", ["lasp_plus", "ring", "scan"])
def test_triton_state_passing_equals_recurrence(monkeypatch, poisoned_empty, kind, ranks, method):
    """A chunk has two tiles at least, with a boundary of splits between them; one head of two has a short memory."""
    triton = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    monkeypatch.setattr(triton, "choose_tile", lambda *_: triton.TileShape(16, 32, 4, 2))
    monkeypatch.setattr(triton, "choose_splits", lambda *_: (3, 1))
    monkeypatch.setattr(triton, "BLOCKS", 2)
    chunks = len(SequenceLayout(kind, ranks).chunk_ranks)
    cases = [_case(chunks, size, seed, torch.float32, (0.917, 0.01), 12, 20) for size, seed in [(21, 0), (23, 11)]]
    assert max(run_ranks(_worst_error, ranks, kind, method, cases, "triton")) < 1e-5


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("lengths", [[48], [12, 36], [5, 19, 24], [1] * 48])
def test_local_states_are_summed_where_a_chunk_takes_them(kind, lengths):
    ends, layout = {0, *accumulate(lengths)}, SequenceLayout(kind, 3)
    for rank in range(3):
        shard = layout.shard(Documents.from_lengths(lengths), rank)
        for backwards in (False, True):
            edges = [c.start if backwards else c.end for c in shard.mine]
            segments = lightning._edge_segments(shard)[not backwards]
            passed = lightning._passed(segments, shard, backwards=backwards)
            assert [n is not None for n in passed] == [edge not in ends for edge in edges]
            for m, n in enumerate(passed):
                if n is not None:
                    assert shard.documents.bounds[n + (not backwards)] == shard.chunk_size * (m + (not backwards))


def _errors_on_gpu(grid, kind, dtype, method, lengths, K):
    """Relative error of the output and of each gradient, with the kernels a real run would choose."""
    communicator = GroupCommunicator(grid.group("dp"))
    whole = Documents.from_lengths(lengths)
    slopes = torch.tensor([0.917, 0.05, 0.004, 1e-5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = (whole.num_tokens, len(slopes), K)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    # The recurrence would keep a state per token for autograd: gigabytes.
    expected = _reference(inputs, slopes, lengths, "chunked")
    shard = SequenceLayout(kind, communicator.size).shard(whole.to("cuda"), communicator.rank)
    *mine, grad = (shard.take(x).cuda() for x in inputs)
    mine = [x.requires_grad_() for x in mine]
    out = lightning_attention_cp(*mine, slopes.float().cuda(), shard, communicator, method=method)
    actual = [out, *torch.autograd.grad(out, mine, grad)]
    return [relative_error(a.cpu(), shard.take(e)) for a, e in zip(actual, expected, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("link", GPU_LINKS)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize(("method", "lengths"), [("lasp_plus", [16384]), ("scan", [1, 130, 9000, 7, 7246])])
def test_gpu_ranks(link, kind, dtype, tolerance, method, lengths):
    """Of chunks of 2,048 to 8,192 tokens at least one of the four heads has a long memory, and one a short one."""
    for errors in run_gpu_ranks(_errors_on_gpu, link, kind, dtype, method, lengths, 128):
        assert max(errors) < tolerance, errors


def test_the_cheaper_method():
    state = 64 * 128 * 128 * 4
    assert choose_method(state, 8, 8) == "lasp_plus"
    assert choose_method(state, 256, 128) == "scan"


def test_unknown_method():
    shard = SequenceLayout("contiguous", 1).shard(Documents.from_lengths([3]), 0)
    x = torch.zeros(3, 1, 2)
    with pytest.raises(ValueError, match=r"parallel.linear_cp='lasp': must be one of auto, lasp_plus, scan, ring"):
        lightning_attention_cp(x, x, x, torch.ones(1), shard, None, method="lasp")
