"""Every implementation of lightning attention against the float64 recurrence, token by token.

Shape legend: T tokens, H heads, K key dim, V value dim, N documents.
"""

import os
from typing import NamedTuple

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.kernels.lightning import lightning_attention, lightning_slopes, lightning_state_passing

SLOPES = [0.917, 1e-5, 0.05]
# One document and several; 63 and 130 tokens; single tokens; documents that end on, before and after tile edges.
LENGTHS = [[63], [130], [40, 1, 1, 32, 16, 30, 10], [1, 1, 1], [64, 64], [5, 100, 25]]
on_cpu = not torch.cuda.is_available()


class Case(NamedTuple):
    """Leaves in float64; q, k and v are views into one projection laid out per head as (q, k, v)."""

    qkv_THQ: torch.Tensor
    initial_NHKV: torch.Tensor | None
    d_out_THV: torch.Tensor
    d_final_NHKV: torch.Tensor
    slopes_H: torch.Tensor
    documents: Documents
    K: int
    V: int
    wanted: tuple[int, ...]

    @classmethod
    def make(cls, lengths, K, V, *, with_state, some=False, slopes=SLOPES, device="cpu", round_to=torch.float64):
        generator = torch.Generator().manual_seed(sum(lengths) + K)
        T, N, H = sum(lengths), len(lengths), len(slopes)

        def randn(*shape, dtype=torch.float32):
            return torch.randn(*shape, generator=generator).to(dtype).double().to(device)

        initial_NHKV = randn(N, H, K, V) if with_state else None
        wanted = tuple(range(N))[::-2] if some else tuple(range(N))  # every other one, in another order, or all
        return cls(
            randn(T, H, 2 * K + V, dtype=round_to),
            initial_NHKV,
            randn(T, H, V, dtype=round_to),
            randn(len(wanted), H, K, V),
            torch.tensor(slopes, dtype=torch.float32, device=device).double(),
            Documents.from_lengths(lengths, device),
            K,
            V,
            wanted,
        )

    def run(self, implementation, dtype, **options):
        """Output, final state, dq, dk, dv and, with a state, its gradient."""
        state_dtype = torch.promote_types(dtype, torch.float32)
        qkv = self.qkv_THQ.to(dtype).requires_grad_()
        q, k, v = qkv.split([self.K, self.K, self.V], dim=-1)
        initial = None if self.initial_NHKV is None else self.initial_NHKV.to(state_dtype).requires_grad_()
        out, final = lightning_attention(
            q, k, v, self.slopes_H.to(state_dtype), self.documents,
            initial_state_NHKV=initial, final_state_of=self.wanted, implementation=implementation, **options,
        )  # fmt: skip
        assert out.dtype == dtype and final.dtype == state_dtype
        leaves = [qkv] if initial is None else [qkv, initial]
        grads = torch.autograd.grad([out, final], leaves, [self.d_out_THV.to(dtype), self.d_final_NHKV.to(state_dtype)])
        parts = grads[0].split([self.K, self.K, self.V], dim=-1)
        return dict(
            zip(("out", "final", "dq", "dk", "dv", "d_initial"), (out, final, *parts, *grads[1:]), strict=False)
        )


def assert_close(results, references, tolerance):
    for name, reference in references.items():
        error = ((results[name].double() - reference).norm() / reference.norm()).item()
        assert error < tolerance, f"{name}: relative error {error:.2e}"  # a NaN fails this too


@pytest.fixture
def small_tiles(monkeypatch, poisoned_empty):
    """Tiles of 16 tokens by 32 values, and as many splits and sub-splits as asked for."""
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    monkeypatch.setattr(implementation, "choose_tile", lambda *_: implementation.TileShape(16, 32, 4, 2))

    def cut(splits, per_split):
        monkeypatch.setattr(implementation, "choose_splits", lambda *_: (splits, per_split))

    return cut


interpreted = pytest.mark.skipif(
    not on_cpu or os.environ.get("TRITON_INTERPRET") != "1", reason="small float32 shapes are for the interpreter"
)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunked_equals_recurrence(lengths, with_state, dtype, tolerance):
    for some in (False, True):
        case = Case.make(lengths, 16, 24, with_state=with_state, some=some)
        assert_close(case.run("chunked", dtype), case.run("naive", torch.float64), tolerance)


@interpreted
@pytest.mark.parametrize("splits", [(1, 1), (3, 2)], ids=["one-split", "three-splits"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_triton_equals_recurrence(small_tiles, lengths, splits):
    small_tiles(*splits)
    case = Case.make(lengths, 16, 24, with_state=True)
    assert_close(case.run("triton", torch.float32), case.run("naive", torch.float64), 1e-5)


@interpreted
@pytest.mark.parametrize("lengths", [[63], [40, 1, 1, 32, 16, 30, 10]], ids=str)
def test_triton_without_initial_state(small_tiles, lengths):
    small_tiles(2, 2)
    case = Case.make(lengths, 16, 24, with_state=False)
    assert_close(case.run("triton", torch.float32), case.run("naive", torch.float64), 1e-5)


@interpreted
@pytest.mark.parametrize("splits", [(1, 1), (3, 2)], ids=["one-split", "three-splits"])
@pytest.mark.parametrize("with_state", [False, True])
def test_triton_final_states_of_some(small_tiles, splits, with_state):
    small_tiles(*splits)
    case = Case.make([40, 1, 1, 32, 16, 30, 10], 16, 24, with_state=with_state, some=True)
    results = case.run("triton", torch.float32)
    assert len(results["final"]) == 4
    assert_close(results, case.run("naive", torch.float64), 1e-5)


@interpreted
@pytest.mark.parametrize("K, V", [(8, 40), (24, 16)])
def test_triton_head_dims(small_tiles, K, V):
    small_tiles(2, 2)
    case = Case.make([70, 33], K, V, with_state=True)
    assert_close(case.run("triton", torch.float32), case.run("naive", torch.float64), 1e-5)


@interpreted
def test_triton_forgets_only_what_has_decayed_away(small_tiles):
    """Short-memory heads drop the states of distant splits: the result must not show it."""
    small_tiles(4, 3)
    case = Case.make([400], 16, 16, with_state=True, slopes=[0.917, 0.2, 0.05, 1e-5])
    assert_close(case.run("triton", torch.float32), case.run("naive", torch.float64), 1e-5)


@interpreted
def test_triton_heads_far_apart(small_tiles):
    """Heads 1.2 billion elements apart, as those of a long row are where heads come first."""
    small_tiles(2, 1)
    case = Case.make([50, 30], 16, 16, with_state=True, round_to=torch.float16)
    far = torch.empty_strided(case.qkv_THQ.shape, (48, 1_200_000_000, 1), dtype=torch.float16)  # memory hardly used
    far.copy_(case.qkv_THQ)
    close, far = case.qkv_THQ.half().split(16, -1), far.split(16, -1)
    how = {"initial_state_NHKV": case.initial_NHKV.float(), "final_state_of": [1, 0], "implementation": "triton"}
    results = []
    for q, k, v in (close, far):
        out, final = lightning_attention(q, k, v, case.slopes_H.float(), case.documents, **how)
        phases, where = lightning_state_passing(q, "triton"), (case.slopes_H.float(), case.documents, (1,))
        results.append((out, final, phases.local_states(k, v, *where, reverse=True)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_triton_float16(small_tiles):
    """Stands for bfloat16 too, which the interpreter's matrix product does not take."""
    small_tiles(2, 1)
    case = Case.make([50, 30], 16, 16, with_state=True, round_to=torch.float16)
    assert_close(case.run("triton", torch.float16), case.run("naive", torch.float64), 1e-3)


IMPLEMENTATIONS = ["naive", "chunked", pytest.param("triton", marks=interpreted)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_calls_equal_one(request, implementation):
    """With the final state of the first half as initial state of the second, two calls equal one."""
    if implementation == "triton":
        request.getfixturevalue("small_tiles")(2, 1)
    case = Case.make([90], 16, 16, with_state=True)
    q, k, v = case.qkv_THQ.float().split([16, 16, 16], dim=-1)
    slopes_H = case.slopes_H.float()

    def run(tokens, initial):
        documents = Documents.from_lengths([len(q[tokens])])
        return lightning_attention(
            q[tokens], k[tokens], v[tokens], slopes_H, documents,
            initial_state_NHKV=initial, final_state_of=[0], implementation=implementation,
        )  # fmt: skip

    whole, whole_final = run(slice(0, 90), case.initial_NHKV.float())
    first, state = run(slice(0, 37), case.initial_NHKV.float())
    second, final = run(slice(37, 90), state)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, whole_final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_final_state_is_optional(request, implementation):
    if implementation == "triton":
        request.getfixturevalue("small_tiles")(2, 1)
    case = Case.make([40, 9], 16, 16, with_state=False)
    q, k, v = case.qkv_THQ.float().split([16, 16, 16], dim=-1)
    arguments = (q, k, v, case.slopes_H.float(), case.documents)
    out, none = lightning_attention(*arguments, implementation=implementation)
    expected, _ = lightning_attention(*arguments, final_state_of=[0, 1], implementation=implementation)
    assert none is None
    assert torch.equal(out, expected)


def test_wrong_arguments_are_named():
    case = Case.make([12], 16, 16, with_state=False)
    q, k, v = case.qkv_THQ.split([16, 16, 16], dim=-1)
    with pytest.raises(ValueError, match=r"auto, naive, chunked, triton"):
        lightning_attention(q, k, v, case.slopes_H, case.documents, implementation="fast")
    with pytest.raises(ValueError, match="shapes disagree"):
        lightning_attention(q, k[:-1], v, case.slopes_H, case.documents)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="float64"):
        lightning_attention(q, k, v, case.slopes_H, case.documents, implementation="triton")


def test_slopes_span_the_published_range():
    slopes_H = lightning_slopes(64, 0, 80)
    assert slopes_H[0].item() == pytest.approx(2 ** (-8 / 64), rel=1e-4)
    assert (slopes_H.diff() < 0).all()
    assert 0 < lightning_slopes(64, 79, 80)[0] < 1.1e-5


GPU_SLOPES = [0.917, 0.3, 0.05, 0.004, 1e-3, 1e-5]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["hopper", "portable"])
@pytest.mark.parametrize("K, V", [(128, 128), (64, 64), (96, 96), (128, 64), (64, 96)])
@pytest.mark.parametrize("lengths", [[2048], [700, 1, 63, 64, 65, 1, 1000, 154]], ids=["one", "packed"])
def test_gpu_equals_float64(monkeypatch, poisoned_empty, lengths, K, V, kernel):
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    if kernel == "portable":
        monkeypatch.setattr(implementation, "choose_hopper", lambda _: False)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs compute capability 9.0")
    for with_state in (False, True):
        case = Case.make(
            lengths, K, V, with_state=with_state, slopes=GPU_SLOPES, device="cuda", round_to=torch.bfloat16
        )
        results = case.run("triton", torch.bfloat16)
        assert_close(results, case.run("chunked", torch.float64), 3e-3)
        again = case.run("triton", torch.bfloat16)
        assert all(torch.equal(results[name], again[name]) for name in results)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [(1, 1), (5, 3), (16, 1)], ids=str)
def test_gpu_splits(monkeypatch, poisoned_empty, splits):
    implementation = pytest.importorskip("minimax_train.kernels.lightning.triton", exc_type=ImportError)
    monkeypatch.setattr(implementation, "choose_splits", lambda *_: splits)
    case = Case.make(
        [3000, 1, 5000, 191], 128, 128, with_state=True, slopes=GPU_SLOPES, device="cuda", round_to=torch.bfloat16
    )
    assert_close(case.run("triton", torch.bfloat16), case.run("chunked", torch.float64), 3e-3)


@pytest.mark.gpu
def test_gpu_float32():
    case = Case.make([300, 100], 128, 64, with_state=True, slopes=GPU_SLOPES, device="cuda", round_to=torch.float32)
    assert_close(case.run("triton", torch.float32), case.run("chunked", torch.float64), 1e-4)
