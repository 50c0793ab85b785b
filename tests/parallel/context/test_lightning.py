"""Lightning attention over ranks against the recurrence on one."""

from itertools import accumulate

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.kernels.lightning import lightning_attention, lightning_slopes
from minimax_train.parallel.communicator import GroupCommunicator
from minimax_train.parallel.context import lightning
from minimax_train.parallel.context.layout import SequenceLayout
from minimax_train.parallel.context.lightning import choose_method, lightning_attention_cp
from support.compare import relative_error
from support.distributed import run_ranks
from support.mixes import random_mix

H, K, V = 3, 5, 4


def _inputs(tokens, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, H, K), (tokens, H, K), (tokens, H, V), (tokens, H, V)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def _compare(grid, kind, method, seeds, dtype):
    """Largest error over many mixes of this rank's outputs and gradients."""
    communicator = GroupCommunicator(grid.group("dp"))
    layout = SequenceLayout(kind, communicator.size)
    chunks = len(layout.chunk_ranks)
    worst = 0.0
    for seed in seeds:
        tokens = chunks * (3 + seed % 17)
        # Of a chunk of 5 to 19 tokens none, one or all of these heads are near.
        slopes = torch.tensor([[0.917, 0.1, 1e-5], [9.0, 0.1, 1e-5], [20.0, 12.0, 9.0]][seed % 3], dtype=torch.float64)
        documents = Documents.from_lengths(random_mix(tokens, chunks, seed))
        *inputs, grad = _inputs(tokens, seed, dtype)
        right_inputs = [x.double().requires_grad_() for x in inputs]
        right, _ = lightning_attention(*right_inputs, slopes, documents, implementation="chunked")
        expected = [right, *torch.autograd.grad(right, right_inputs, grad.double())]
        shard = layout.shard(documents, communicator.rank)
        mine = [shard.take(x).requires_grad_() for x in inputs]
        out = lightning_attention_cp(*mine, slopes, shard, communicator, method=method)
        actual = [out, *torch.autograd.grad(out, mine, shard.take(grad))]
        for a, e in zip(actual, expected, strict=True):
            error = (a.double() - shard.take(e)).abs().max() / e.abs().max().clamp(min=1)
            worst = max(worst, float(error)) if error == error else float("inf")
    return worst


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("method", ["lasp_plus", "ring", "scan"])
def test_equals_one_rank(ranks, kind, method):
    seeds = range(60 if method == "lasp_plus" else 25)
    assert max(run_ranks(_compare, ranks, kind, method, seeds, torch.float64)) < 1e-10


def test_equals_one_rank_in_float32():
    assert max(run_ranks(_compare, 4, "zigzag", "auto", range(25), torch.float32)) < 1e-5


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("lengths", [[48], [12, 36], [5, 19, 24], [1] * 48])
def test_states_are_summed_for_those_who_take_them(kind, lengths):
    ends, layout = {0, *accumulate(lengths)}, SequenceLayout(kind, 3)
    for rank in range(3):
        shard = layout.shard(Documents.from_lengths(lengths), rank)
        for backwards in (False, True):
            edges = [c.start if backwards else c.end for c in shard.mine]
            giving = lightning._giving_segments(shard, backwards=backwards)
            assert [n is not None for n in giving] == [edge not in ends for edge in edges]
            for m, n in enumerate(giving):
                if n is not None:
                    assert shard.documents.bounds[n + (not backwards)] == shard.chunk_size * (m + (not backwards))


def _compare_on_gpu(grid, kind, dtype, method, lengths, heads):
    """Relative error of the output and of each gradient, with the kernels a real run would choose."""
    communicator = GroupCommunicator(grid.group("dp"))
    whole = Documents.from_lengths(lengths)
    slopes = torch.tensor([0.917, 0.05, 0.004, 1e-5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = (whole.num_tokens, len(slopes), heads)
    *inputs, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    right_inputs = [x.double().requires_grad_() for x in inputs]
    right, _ = lightning_attention(*right_inputs, slopes, whole, implementation="chunked")
    expected = [right, *torch.autograd.grad(right, right_inputs, grad.double())]
    shard = SequenceLayout(kind, communicator.size).shard(whole.to("cuda"), communicator.rank)
    mine = [shard.take(x).cuda().requires_grad_() for x in inputs]
    out = lightning_attention_cp(*mine, slopes.float().cuda(), shard, communicator, method=method)
    actual = [out, *torch.autograd.grad(out, mine, shard.take(grad).cuda())]
    return [relative_error(a.cpu(), shard.take(e)) for a, e in zip(actual, expected, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize(("method", "lengths"), [("lasp_plus", [16384]), ("scan", [1, 130, 9000, 7, 7246])])
def test_four_processes_on_one_gpu(kind, dtype, tolerance, method, lengths):
    """Transfers go through gloo and the host. Of chunks of 2,048 or 4,096 tokens two of the four heads are far."""
    for errors in run_ranks(_compare_on_gpu, 4, kind, dtype, method, lengths, 128, start="spawn"):
        assert max(errors) < tolerance, errors


def test_chunked_reference_is_the_recurrence():
    documents = Documents.from_lengths(random_mix(60, 4, 11))
    *inputs, _ = _inputs(60, 0, torch.float64)
    slopes = lightning_slopes(H, 0, 4)
    naive, _ = lightning_attention(*inputs, slopes, documents, implementation="naive")
    chunked, _ = lightning_attention(*inputs, slopes, documents, implementation="chunked")
    torch.testing.assert_close(chunked, naive, rtol=1e-12, atol=1e-12)


def test_the_cheaper_method():
    state = 64 * 128 * 128 * 4
    assert choose_method(state, 8, 8) == "lasp_plus"
    assert choose_method(state, 256, 128) == "scan"


def test_unknown_method():
    shard = SequenceLayout("contiguous", 1).shard(Documents.from_lengths([3]), 0)
    x = torch.zeros(3, 1, 2)
    with pytest.raises(ValueError, match=r"parallel.linear_cp='lasp': must be one of auto, lasp_plus, scan, ring"):
        lightning_attention_cp(x, x, x, torch.ones(1), shard, None, method="lasp")
