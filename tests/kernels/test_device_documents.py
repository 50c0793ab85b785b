"""Documents whose lengths only the device knows: the same results as from plain ones, fill after fill, and in graphs.

Shape legend: T tokens, H heads, K head dim, N documents, B tiles, C tokens per tile.
"""

import os
import random
from functools import cache

import numpy as np
import pytest
import torch

from minimax_train.documents import DeviceDocuments, Documents
from minimax_train.kernels.lightning import lightning_attention
from minimax_train.kernels.softmax import flash4, softmax_attention
from support.compare import relative_error
from support.graphs import assert_replays_equal_eager, random_lengths

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
interpreted = pytest.mark.skipif(
    HAS_GPU or os.environ.get("TRITON_INTERPRET") != "1", reason="small float32 shapes are for the interpreter"
)


def test_the_host_cannot_read_lengths():
    held = DeviceDocuments.of_shape(num_documents=3, num_tokens=20, max_length=10, device=DEVICE)
    with pytest.raises(RuntimeError, match="only the device knows"):
        _ = held.bounds
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        held.cu_seqlens_cpu.tolist()
    q = torch.randn(20, 2, 8, device=DEVICE)
    for implementation in ("chunked", "naive"):
        with pytest.raises((RuntimeError, NotImplementedError)):
            lightning_attention(q, q, q, torch.ones(2, device=DEVICE), held, implementation=implementation)
    with pytest.raises(RuntimeError, match="only the device knows"):
        softmax_attention(q, q, q, held, scale=1.0, implementation="blocked")


def _tiles(lengths, C):
    """First token, length and document of every tile, and whether its document begins and ends with it."""
    tiles, begin = [], 0
    for n, length in enumerate(lengths):
        for offset in range(0, length, C):
            size = min(C, length - offset)
            tiles.append((begin + offset, size, n, offset == 0, offset + size == length))
        begin += length
    return np.array(tiles)


@pytest.mark.parametrize("C", [16, 7])
def test_tiles_are_cut_on_the_device(poisoned_empty, C):
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    rng = random.Random(C)
    # A document of more tiles than the kernel looks at together, more documents than that; then some empty ones.
    shapes = [([3, 150 * C, 1], 4), ([1] * 130, 130), (random_lengths(rng, 133, 11, 60), 23)]
    for lengths, most in shapes:
        T = sum(lengths)
        held = DeviceDocuments.of_shape(num_documents=most, num_tokens=T, max_length=T, device=DEVICE)
        held.fill(Documents.from_lengths(lengths))
        table, expected = implementation._table(held, C), _tiles(lengths, C)
        starts, infos, ids = (x.cpu().numpy() for x in (table.starts, table.infos, table.document_ids))
        B = len(expected)
        assert table.count.tolist() == [B] and len(infos) >= B
        np.testing.assert_array_equal(starts[: B + 1], [*expected[:, 0], T])
        np.testing.assert_array_equal(infos[:B] >> 2, expected[:, 1])
        np.testing.assert_array_equal(infos[:B] & 3, expected[:, 3] + 2 * expected[:, 4])
        np.testing.assert_array_equal(ids[:B], expected[:, 2])


def _attend(attention, inputs, d_out, documents):
    """Output and the gradients of the inputs."""
    out = attention(*inputs, documents)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


@cache
def _slopes(heads, device, dtype):
    """Made before a graph is captured, which could not copy them from the host."""
    return torch.tensor([0.917, 0.004, 1e-5, 0.05][:heads], dtype=torch.float32).to(device, dtype)


def _lightning(q, k, v, documents, implementation="triton"):
    slopes = _slopes(q.shape[1], q.device, torch.promote_types(q.dtype, torch.float32))
    return lightning_attention(q, k, v, slopes, documents, implementation=implementation)[0]


def _tensors(T, H, K, dtype, heads=None):
    generator = torch.Generator().manual_seed(T + K)
    shapes = [(T, H, K), *[(T, heads or H, K)] * 2, (T, H, K)]
    *inputs, d_out = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return [x.requires_grad_() for x in inputs], d_out


@interpreted
def test_lightning_attention_of_several_fills(monkeypatch, poisoned_empty):
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    monkeypatch.setattr(implementation, "choose_tile", lambda *_: implementation.TileShape(16, 32, 4, 2))
    monkeypatch.setattr(implementation, "choose_splits", lambda *_: (2, 2))
    inputs, d_out = _tensors(75, 2, 16, torch.float32)
    held = DeviceDocuments.of_shape(num_documents=7, num_tokens=75, max_length=75, device="cpu")
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for lengths in ([75], [1, 33, 1, 1, 16, 20, 3], [40, 35]):
        plain = Documents.from_lengths(lengths)
        held.fill(plain)
        results = _attend(_lightning, inputs, d_out, held)
        naive = _attend(lambda *x: _lightning(*x, implementation="naive"), wide, d_out.double(), plain)
        for result, expected, reference in zip(results, _attend(_lightning, inputs, d_out, plain), naive, strict=True):
            assert torch.equal(result, expected)
            assert relative_error(result, reference) < 1e-5


@interpreted
def test_there_are_no_states_of_documents_that_may_be_empty():
    pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    held = DeviceDocuments.of_shape(num_documents=3, num_tokens=20, max_length=20, device="cpu")
    q = torch.randn(20, 2, 16)
    with pytest.raises(ValueError, match="no states of DeviceDocuments"):
        lightning_attention(q, q, q, torch.ones(2), held, final_state_of=[0], implementation="triton")


FILLS = [[2000], [700, 1, 63, 64, 65, 1, 1000, 106], [1, 1, 1996, 1, 1], [500] * 4]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["hopper", "portable"])
def test_gpu_graph_of_lightning_attention(monkeypatch, poisoned_empty, kernel):
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    if kernel == "portable":
        monkeypatch.setattr(implementation, "choose_hopper", lambda _: False)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    inputs, d_out = _tensors(2000, 4, 128, torch.bfloat16)
    assert_replays_equal_eager(lambda held: _attend(_lightning, inputs, d_out, held), FILLS, 40, 2000, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["flash", "flash4"])
@pytest.mark.parametrize("heads", [4, 1])
def test_gpu_graph_of_softmax_attention(implementation, heads):
    if implementation == "flash4" and not (flash4.is_installed() and torch.cuda.get_device_capability()[0] == 9):
        pytest.skip("needs FlashAttention-4 and compute capability 9.0")
    inputs, d_out = _tensors(2000, 4, 128, torch.bfloat16, heads)

    def attention(q, k, v, documents):
        return softmax_attention(q, k, v, documents, scale=0.1, implementation=implementation)[0]

    # The gradient of q is summed in any order.
    assert_replays_equal_eager(lambda held: _attend(attention, inputs, d_out, held), FILLS, 40, 2000, 5e-3)
