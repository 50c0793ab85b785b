"""What the backward pass computes again: the same gradients, and as much less memory as the formula says."""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimax_train import capture
from minimax_train.documents import Documents
from minimax_train.kernels.deferral import deferred, run
from minimax_train.kernels.experts import expert_mlp
from minimax_train.kernels.lightning.chunked import TILE_TOKENS
from minimax_train.model import HybridModel, KernelConfig, initialize
from minimax_train.model.attention import ATTENTIONS
from minimax_train.model.memory import (
    RECOMPUTATIONS,
    ActivationMemory,
    choose_recomputation,
    recomputation_shown,
)
from minimax_train.model.ranks import ModelRanks
from minimax_train.model.recompute import cheap, selective
from support.runs import model_config

LENGTHS = [40, 67, 30]
TOKENS = sum(LENGTHS)


class _Allocations(TorchDispatchMode):
    """Every storage that an op makes while it is on, seen from outside autograd; a model's own left out."""

    def __init__(self, model):
        super().__init__()
        self.own = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.sizes[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        return out

    @property
    def alive(self):
        gc.collect()
        return sum(n for storage, n in self.sizes.items() if storage not in self.own and not storage.expired())


def _model(kind, config, dtype, ranks=None, **kernels):
    model = HybridModel(config, KernelConfig(**kernels), ranks).to(dtype)
    initialize(model, seed=3)
    model.set_recomputation([kind] * config.num_layers if isinstance(kind, str) else kind)
    return model


def _loss(model):
    torch.manual_seed(0)
    tokens, labels = torch.randint(300, (2, TOKENS))
    out = model(tokens, Documents.from_lengths(LENGTHS), labels)
    return out.token_loss + out.aux_loss


@pytest.mark.parametrize("pattern", ["LLSL", *ATTENTIONS])
def test_gradients_are_the_same(pattern):
    gradients = []
    for kind in [*RECOMPUTATIONS, ("full", "none", "selective", "full")]:
        model = _model(kind, model_config(layer_pattern=pattern, capacity_factor=0.8), torch.float64)
        _loss(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    for none, *others in zip(*gradients, strict=True):
        assert all(torch.equal(none, other) for other in others)


class _Recording:
    """Stands for a recording of graphs: no call of the host is made inside another."""

    is_calling = False

    def call(self, run, again):
        assert not self.is_calling
        self.is_calling = True
        run()
        self.is_calling = False


@pytest.mark.parametrize("kind", RECOMPUTATIONS)
def test_calls_between_graphs_keep_what_they_need(kind, monkeypatch):
    """Nothing that graphs compute again is first asked for inside a call, which no graph captures."""
    monkeypatch.setattr(capture, "_lent", lambda x: x)
    gradients = []
    for recording in (None, _Recording()):
        model = _model(kind, model_config(), torch.float64, ModelRanks(experts=capture.uncaptured(expert_mlp)))
        with monkeypatch.context() as patch:
            patch.setattr(capture.Recording, "current", recording)
            _loss(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recorded in zip(*gradients, strict=True):
        torch.testing.assert_close(recorded, plain, rtol=1e-12, atol=1e-14)


def _kept(kind, config, **kernels):
    """Bytes that live between the forward and the backward pass."""
    model = _model(kind, config, torch.float32, **kernels)
    with _Allocations(model) as allocations:
        loss = _loss(model)
    kept = allocations.alive
    del loss
    return kept


@pytest.mark.parametrize("kind", RECOMPUTATIONS)
@pytest.mark.parametrize("pattern", ATTENTIONS)
def test_bytes_kept_by_a_block_are_those_of_the_formula(kind, pattern):
    pytest.importorskip("triton")
    sizes = {"hidden_size": 52, "num_heads": 6, "head_dim": 14, "expert_hidden_size": 36}
    one, three = (model_config(layer_pattern=pattern, num_layers=n, **sizes) for n in (1, 3))
    # Norms and SiLU as on a GPU: separate ops keep what lies between them. Beside the blocks, the two keep the same.
    kept = _kept(kind, three, norm="triton", silu="triton") - _kept(kind, one, norm="triton", silu="triton")
    if pattern == "L" and kind != "full":
        # Only the chunked implementation keeps the states of tiles, besides each document's first.
        tiles = sum(-(-length // TILE_TOKENS["cpu"]) for length in LENGTHS)
        kept -= 2 * 4 * one.num_heads * one.head_dim**2 * (tiles + len(LENGTHS))
    expected = ActivationMemory(three, itemsize=4).kept(TOKENS, [kind] * 3)
    assert kept == pytest.approx(expected * 2 / 3, rel=0.02)


def _waiting(kind, config):
    """Bytes that live between the backward pass and the gradients of weights, and after these."""
    model = _model(kind, config, torch.float32)
    with _Allocations(model) as allocations:
        with deferred():
            loss = _loss(model)
        with deferred() as pending:
            loss.backward()
        del loss
        model.zero_grad()
        waiting = allocations.alive
        run(pending)
        model.zero_grad()
    return waiting, allocations.alive


@pytest.mark.parametrize(("kind", "pattern"), [("none", "S"), ("selective", "L"), ("full", "L")])
def test_bytes_that_wait_for_gradients_of_weights_are_those_of_the_formula(kind, pattern):
    one, three = (model_config(layer_pattern=pattern, num_layers=n) for n in (1, 3))
    (few, after), (many, still) = _waiting(kind, one), _waiting(kind, three)
    memory = ActivationMemory(three, itemsize=4, deferred=[(1, 100)] * 3)
    assert many - few == pytest.approx(2 * memory._operands(0, TOKENS), rel=0.02)
    assert max(after, still) < 100  # the slopes of decays, which stay for later calls
    expected = memory.kept(TOKENS, [kind] * 3) + 300 * memory._operands(0, TOKENS) + memory._head(TOKENS)
    assert memory.peak(TOKENS, [kind] * 3) == expected


def test_nothing_is_left_after_the_backward_pass():
    model = _model("selective", model_config(), torch.float32)
    with _Allocations(model) as allocations:
        loss = _loss(model)
        loss.backward()
        del loss
        for p in model.parameters():
            p.grad = None
    assert allocations.alive < 2 * 4 * TOKENS * model.config.hidden_size


def test_a_cheap_output_is_computed_again_once_and_shared():
    calls = []

    def double(x):
        calls.append(None)
        return (2 * x).unflatten(1, (2, 3)).unbind(1)

    x, w = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with selective():
        a, b = cheap(double, x)
        (c,) = cheap(lambda *ab: (ab[0] * ab[1],), a, b)
        y = (c * w[:, :3]).sum() + (a.t() @ w[:, 3:]).square().sum()
    del a, b, c
    assert len(calls) == 1
    found = torch.autograd.grad(y, [x, w])
    assert len(calls) == 2
    a, b = double(x)
    right = torch.autograd.grad((a * b * w[:, :3]).sum() + (a.t() @ w[:, 3:]).square().sum(), [x, w])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, right, strict=True))


def test_memory_of_a_freed_output_is_not_taken_for_it():
    """A tensor that comes to lie where a cheap output was, is kept as it is."""
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    with selective():
        for _ in range(20):
            address = cheap(torch.zeros_like, x.detach()).data_ptr()
            other = torch.ones(1000, dtype=torch.float64)
            if other.data_ptr() == address:
                break
        y = (x * other).sum()
    assert torch.equal(torch.autograd.grad(y, x)[0], torch.ones_like(x))


def test_the_fastest_that_fits_is_chosen():
    memory = ActivationMemory(model_config(), itemsize=2)  # LLSL
    uniform = [(kind,) * 4 for kind in RECOMPUTATIONS]
    peaks = [memory.peak(1000, kinds) for kinds in uniform]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    assert choose_recomputation(memory, 1000, int(1.07 * peaks[0])) == uniform[0]  # 6 % are left
    assert choose_recomputation(memory, 1000, 0) == uniform[2]
    assert memory.kept(2000, uniform[0]) == 2 * memory.kept(1000, uniform[0])
    # Lightning attention is cheaper to compute again than softmax attention.
    order = [("none",) * 4]
    for kind in ("selective", "full"):
        for layer in (0, 1, 3, 2):
            order.append((*order[-1][:layer], kind, *order[-1][layer + 1 :]))
    bytes_free = range(0, int(1.1 * peaks[0]), 1000)
    found = [choose_recomputation(memory, 1000, free) for free in bytes_free]
    # All but those that lower the peak by nothing: the last layer's backward pass begins beside all that is kept.
    assert len(set(found)) >= 6 and set(found) <= set(order)
    for kinds, free in zip(found, bytes_free, strict=True):
        assert kinds == uniform[2] or memory.peak(1000, kinds) <= 0.94 * free
        assert all(memory.peak(1000, faster) > 0.94 * free for faster in order[: order.index(kinds)])


def test_the_peak_of_layers_that_differ():
    """Against a walk through both passes, block by block."""
    memory = ActivationMemory(model_config(num_layers=5, layer_pattern="LSLLS"), itemsize=2)
    kinds = ("full", "none", "full", "selective", "none")
    held = [memory._block(layer, 700, kind) for layer, kind in enumerate(kinds)]
    assert memory.kept(700, kinds) == sum(held)
    alive, highest = sum(held), sum(held) + memory._loss(700)
    for layer in reversed(range(5)):
        alive += memory._block(layer, 700, "none") - held[layer]  # computed again
        highest = max(highest, alive + memory._gradients(layer, 700))
        alive -= memory._block(layer, 700, "none")
    assert alive == 0 and memory.peak(700, kinds) == highest + memory._head(700)


def test_how_a_choice_is_told():
    assert recomputation_shown(("selective",) * 3) == "selective"
    assert recomputation_shown(("full", "selective", "none", "full")) == "full in 2 layers, selective in 1, none in 1"


def test_memory_of_a_pipeline_stage():
    """Blocks of the stage alone, each for as many micro-batches as are on their way."""
    whole, last = ActivationMemory(model_config()), ActivationMemory(model_config(), held=[0, 0, 1, 1])
    first = ActivationMemory(model_config(), held=[3, 3, 0, 0])
    for kind in RECOMPUTATIONS:
        kinds = (kind,) * 4
        assert first.kept(1000, kinds) == 3 * (whole.kept(1000, kinds) - last.kept(1000, kinds))
    assert first.peak(1000, ("none",) * 4) > whole.peak(1000, ("none",) * 4) > last.peak(1000, ("none",) * 4)
