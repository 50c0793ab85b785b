"""The model as a whole: documents apart, kernels interchangeable, weights independent of sharding."""

import math
from types import SimpleNamespace

import pytest
import torch

from minimax_train.config import load_config
from minimax_train.documents import Documents
from minimax_train.engines.fsdp import FSDPConfig, shard
from minimax_train.kernels.lightning import lightning_slopes
from minimax_train.model import HybridModel, KernelConfig, count_parameters, initialize
from minimax_train.model.attention import lightning
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.initialization import standard_normal
from minimax_train.model.ranks import ModelRanks
from minimax_train.parallel.tensor import TensorParallel
from support.compare import relative_error
from support.distributed import run_ranks
from support.runs import model_config

LENGTHS = [1, 70, 13, 64, 65]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _model(config, kernels=None, ranks=None):
    model = HybridModel(config, kernels, ranks).double()
    initialize(model, seed=3)
    return model


@pytest.mark.parametrize("pattern", ["LLSL", "L", "S", "SL"])
@pytest.mark.parametrize("capacity", [None, 0.7])
def test_packed_documents_do_not_see_each_other(pattern, capacity):
    # Capacity is shared by a packed sequence, so with it each is compared as a whole.
    model = _model(model_config(layer_pattern=pattern))
    tokens = torch.randint(300, (sum(LENGTHS),))
    packed = model(tokens, Documents.from_lengths(LENGTHS))
    alone = [model(part, Documents.from_lengths([len(part)])) for part in tokens.split(LENGTHS)]
    assert relative_error(packed, torch.cat(alone)) < 1e-13
    if capacity is not None:
        model.config.capacity_factor = capacity
        tokens = torch.randint(300, (2 * 63,))
        documents = [20, 43, 63]
        packed = model(tokens, Documents.from_lengths(documents), num_sequences=2)
        apart = [model(tokens[:63], Documents.from_lengths([20, 43])), model(tokens[63:], Documents.from_lengths([63]))]
        assert relative_error(packed, torch.cat(apart)) < 1e-13


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"aux_loss_coefficient": 0.0}, set()),
        ({"aux_loss_coefficient": 0.0, "capacity_factor": 0.7, "capacity_scope": "global"}, {"global"}),
        ({"aux_loss_scope": "global"}, {"global"}),
        ({"aux_loss_scope": "rank", "capacity_factor": 0.7}, {"sequence", "rank"}),
    ],
)
def test_assignments_are_counted_only_for_what_is_used(changes, counted):
    asked = []
    sums = {
        scope: lambda counts, scope=scope: asked.append(scope) or counts for scope in ("sequence", "global", "rank")
    }
    config = model_config(num_layers=1, layer_pattern="L", **changes)
    model = _model(config, ranks=ModelRanks(sum_counts=sums))
    tokens = torch.randint(300, (64,))
    out = model(tokens, Documents.from_lengths([64]), tokens)
    assert set(asked) == counted
    assert len(asked) == len(counted)
    assert (float(out.aux_loss.detach()) > 0) == ("aux_loss_coefficient" not in changes)


def test_load_balancing_loss_of_equal_routing():
    """As docs/metrics.md has it: a router that prefers no expert has all probabilities alike."""
    config = model_config()
    model = _model(config)
    for block in model.layers:
        torch.nn.init.zeros_(block.experts.router.weight)
    tokens = torch.randint(300, (64,))
    found = model(tokens, Documents.from_lengths([64]), tokens).aux_loss.item()
    assert found == pytest.approx(config.num_layers * config.experts_per_token / config.num_experts**2)


@pytest.mark.parametrize("capacity", [None, 0.7])
def test_loss_and_gradients_equal_the_naive_kernels(capacity):
    config = model_config(capacity_factor=capacity)
    tokens, labels = torch.randint(300, (2, 126))
    labels[[5, 125]] = -100
    documents = Documents.from_lengths([63, 5, 58])
    results = []
    for kernels in (KernelConfig(), KernelConfig(lightning="naive", softmax="naive", silu="naive")):
        model = _model(config, kernels)
        out = model(tokens, documents, labels, num_sequences=2)
        logits = model(tokens, documents, num_sequences=2)
        plain = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        torch.testing.assert_close(out.token_loss, plain)
        (out.token_loss + out.aux_loss).backward()
        results.append((out, dict(model.named_parameters())))
    (out, parameters), (expected, right) = results
    torch.testing.assert_close(out.aux_loss, expected.aux_loss)
    assert torch.equal(out.tokens_per_expert_LE, expected.tokens_per_expert_LE)
    assert out.tokens_per_expert_LE.sum() == config.num_layers * 126 * 2
    assert (int(out.dropped_L.sum()) > 0) == (capacity is not None)
    for name, parameter in parameters.items():
        assert relative_error(parameter.grad, right[name].grad) < 1e-11, name


@pytest.mark.parametrize("capacity", [None, 0.7])
def test_triton_kernels_give_the_same_model(capacity):
    pytest.importorskip("triton")
    config = model_config(capacity_factor=capacity)
    tokens, labels = torch.randint(300, (2, 66), device=DEVICE)
    labels[[5, 65]] = -100
    documents = Documents.from_lengths([33, 5, 28], DEVICE)
    names = ("experts", "router", "norm", "rope", "silu", "loss")
    results = []
    for kernels, dtype in ((dict.fromkeys(names, "triton"), torch.float32), ({}, torch.float64)):
        model = _model(config, KernelConfig(lightning="chunked", softmax="naive", **kernels)).to(DEVICE, dtype)
        out = model(tokens, documents, labels, num_sequences=2)
        (out.token_loss + out.aux_loss).backward()
        results.append((out, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (out, gradients), (expected, right) = results
    assert relative_error(out.token_loss, expected.token_loss) < 1e-6
    assert relative_error(out.aux_loss, expected.aux_loss) < 1e-6
    assert torch.equal(out.tokens_per_expert_LE, expected.tokens_per_expert_LE) and torch.equal(
        out.dropped_L, expected.dropped_L
    )
    for name, gradient in gradients.items():
        assert relative_error(gradient, right[name]) < 2e-5, name


def test_slopes_of_a_rank_are_one_tensor_in_every_pass(monkeypatch):
    """Context parallelism keeps by that tensor what it would otherwise wait for the device to tell."""
    seen, run = [], lightning.lightning_attention
    spy = lambda *inputs, **options: (seen.append(inputs[3]), run(*inputs, **options))[1]  # noqa: E731
    monkeypatch.setattr(lightning, "lightning_attention", spy)
    second_of_three = ModelRanks(tp=TensorParallel(SimpleNamespace(rank=1, size=3)))
    attention = lightning.LightningAttention(model_config(), 1, KernelConfig(), second_of_three)
    context = TokenContext(Documents.from_lengths([9]), None, *torch.ones(2, 9, 2))
    for _ in range(2):
        attention._attend(*torch.randn(3, 9, 2, 6), context)
    assert seen[0] is seen[1]
    assert torch.equal(seen[0], lightning_slopes(6, 1, 4)[2:4])


def _sharded_weights(grid, config):
    with torch.device("meta"):
        model = HybridModel(config)
    shard(model, FSDPConfig(precision="float64"), grid)
    model.to_empty(device="cpu")
    initialize(model, seed=3)
    return {name: parameter.full_tensor() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_initial_weights_do_not_depend_on_sharding(world_size):
    expected = dict(_model(model_config()).named_parameters())
    for weights in run_ranks(_sharded_weights, world_size, model_config()):
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name]), name


def test_initial_weights_follow_xavier_and_deepnorm():
    config = model_config(
        hidden_size=150, num_heads=5, num_kv_heads=1, head_dim=40, num_experts=3, expert_hidden_size=100
    )
    model = _model(config)
    beta = (8 * config.num_layers) ** -0.25

    def xavier(fan_in, fan_out, gain=1.0):
        return gain * math.sqrt(2 / (fan_in + fan_out))

    qkv = model.layers[0].attention.qkv_proj.weight.view(5, 3, 40, 150)
    expert = model.layers[1].experts.mlp
    softmax = model.layers[2].attention
    for weight, std in [
        (qkv[:, 0], xavier(150, 200)),
        (qkv[:, 1], xavier(150, 200)),
        (qkv[:, 2], xavier(150, 200, beta)),
        (model.layers[0].attention.o_proj.weight, xavier(200, 150, beta)),
        (softmax.q_proj.weight, xavier(150, 200)),
        (softmax.v_proj.weight, xavier(150, 40, beta)),
        (expert.gate_up_proj, xavier(150, 100, beta)),
        (expert.down_proj, xavier(100, 150, beta)),
        (model.head.weight, xavier(150, 300)),
    ]:
        assert abs(weight.std().item() / std - 1) < 0.03
        assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel())


def test_random_numbers_are_independent_standard_normals():
    index = torch.arange(1 << 18)
    x, y = standard_normal(index, 1).double(), standard_normal(index, 2).double()
    n = len(index)
    for moment, expected, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((x**moment).mean()) - expected) < 5 * math.sqrt(spread / n)
    for other in (y, x.roll(1), x.roll(7)):
        assert abs(float((x * other).mean())) < 5 / math.sqrt(n)
    assert torch.equal(standard_normal(index[1000:1010], 1), x[1000:1010].float())


@pytest.mark.parametrize(
    ("name", "total", "active", "in_layers"),
    [
        ("small", 1.0e9, 150e6, None),
        ("medium", 3.1e9, 0.5e9, None),
        ("proxy", 7.85e9, 1.06e9, None),
        ("text-01", 456e9, None, 45.9e9),  # the report's own figures
    ],
)
def test_preset_sizes(name, total, active, in_layers):
    config = load_config([f"model={name}"]).model
    count = count_parameters(config)
    with torch.device("meta"):
        model = HybridModel(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.total == pytest.approx(total, rel=0.01)
    if active:
        assert count.active == pytest.approx(active, rel=0.01)
    if in_layers:
        assert count.active_in_layers == pytest.approx(in_layers, rel=0.002)
