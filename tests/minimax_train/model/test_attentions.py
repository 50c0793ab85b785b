"""The registry of attentions: its figures against independent counts, and a third kind that only registers itself.

Shape legend: t tokens on this rank between attention layers, T tokens in an attention, D hidden, W width of this rank's
heads, H heads, K head dim.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minimax_train.convert.hf_config import Surroundings
from minimax_train.convert.names import correspondence
from minimax_train.convert.text_01_config import from_text_01_config, to_text_01_config
from minimax_train.documents import Documents
from minimax_train.errors import ConfigError
from minimax_train.kernels.rope import rotary_table
from minimax_train.model import KernelConfig
from minimax_train.model.attention import ATTENTIONS, AttentionKind, lightning
from minimax_train.model.attention.context import TokenContext
from minimax_train.model.attention.kind import Activations, AttentionCost, HuggingFaceNames
from minimax_train.model.initialization import xavier
from minimax_train.model.ranks import ModelRanks
from minimax_train.model.sharding import Linear, local
from minimax_train.parallel.cost import Machine
from minimax_train.parallel.tensor import TensorParallel
from minimax_train.planner.machine import MACHINES
from minimax_train.planner.plan import Cluster, plan_run
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import run_ranks
from support.runs import DIVISIBLE, model_config, tiny_run


class MeanAttention(nn.Module):
    """Head h: ``h + 1`` times the mean of the values so far in the document."""

    def __init__(self, config, layer, kernels, ranks):
        super().__init__()
        self.config, self.ranks = config, ranks
        width = config.num_heads * config.head_dim
        self.v_proj, self.o_proj = Linear(config.hidden_size, width), Linear(width, config.hidden_size)

    def forward(self, x_tD, context):
        tp, shard = self.ranks.tp, context.shard
        (v_TW,) = tp.project(x_tD, local(self.v_proj.weight))
        if shard is None:
            mean_TW = _means(v_TW, context.documents)
        else:
            ranks = range(shard.layout.num_ranks)
            places = torch.cat([shard.layout.shard(shard.whole, rank).global_tokens_T for rank in ranks])
            v_SW = TensorParallel(self.ranks.cp).gather(v_TW)[places.argsort()]
            mean_TW = shard.take(_means(v_SW, shard.whole))
        factor_H = torch.tensor(tp.local_range(self.config.num_heads)) + 1
        return self.o_proj(mean_TW * factor_H.repeat_interleave(self.config.head_dim), tp.project_sum)

    def initializers(self):
        sizes = self.config.hidden_size, self.config.num_heads * self.config.head_dim
        return {"v_proj.weight": xavier(*sizes), "o_proj.weight": xavier(*sizes)}

    def shardings(self):
        return {"v_proj.weight": {"tp": 0}, "o_proj.weight": {"tp": 1}}


def _means(v_TW, documents):
    parts = v_TW.split(documents.cu_seqlens_cpu.diff().tolist())
    return torch.cat([part.cumsum(0) / torch.arange(1, len(part) + 1)[:, None] for part in parts])


MEAN = AttentionKind(
    letter="M",
    name="mean",
    module=MeanAttention,
    parameters=lambda config: 2 * config.hidden_size * config.num_heads * config.head_dim,
    flops=lambda config, num_scores: 4 * config.hidden_size * config.num_heads * config.head_dim,
    activations=lambda config: Activations(kept=2 * config.num_heads * config.head_dim, cheap=0, float32=0),
    cost=lambda config: AttentionCost(moved=9 * config.num_heads * config.head_dim),
    tp=("num_heads",),
    cp={},
)
SIZES = [*DIVISIBLE, "engine.precision=float64", "model.layer_pattern=LMSM"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Here, and in the ranks that are forked from here."""
    monkeypatch.setitem(ATTENTIONS, MEAN.letter, MEAN)


def _train(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    steps = [trainer.metrics(trainer.train_step()) for _ in range(3)]
    return [(step["loss"], step["grad_norm"]) for step in steps]


def test_a_third_kind_trains_alike_on_every_grid(tmp_path):
    overrides = [*SIZES, "recipe.learning_rate=0.01", "recipe.warmup_steps=0"]
    (expected,) = run_ranks(_train, 1, tiny_run(tmp_path / "one", *overrides))
    assert expected[-1][0] < expected[0][0]
    for world, grid, layout in [
        (2, {"tp": 2}, "zigzag"),
        (2, {"cp": 2}, "zigzag"),
        (4, {"tp": 2, "cp": 2}, "contiguous"),
    ]:
        axes = [f"parallel.layout={layout}", *(f"parallel.{axis}={size}" for axis, size in grid.items())]
        config = tiny_run(tmp_path / "-".join(grid), *overrides, *axes)
        for steps in run_ranks(_train, world, config, **grid):
            for actual, right in zip(steps, expected, strict=True):
                assert actual == pytest.approx(right, rel=1e-10), grid


@pytest.mark.parametrize(("axis", "what"), [("tp", "heads"), ("cp", "packed sequences")])
def test_a_kind_that_cannot_be_split_is_refused_by_name(tmp_path, monkeypatch, axis, what):
    monkeypatch.setitem(ATTENTIONS, "M", replace(MEAN, **{axis: None}))
    other = {"tp": "cp", "cp": "tp"}[axis]
    tiny_run(tmp_path, *SIZES, f"parallel.{other}=2")
    tiny_run(tmp_path, *DIVISIBLE, f"parallel.{axis}=2")
    refused = rf"parallel.{axis}=2: must be 1 with M \(mean\) in .*='LMSM', which cannot split its {what} over ranks"
    with pytest.raises(ConfigError, match=refused):
        tiny_run(tmp_path, *SIZES, f"parallel.{axis}=2")


def test_sizes_that_kinds_share_are_the_ones_that_must_divide(tmp_path):
    sizes = ["model.num_heads=6", "model.num_kv_heads=2", "model.vocab_size=300"]
    tiny_run(tmp_path, "parallel.tp=3", *sizes, "model.layer_pattern=LM")
    with pytest.raises(ConfigError, match=r"parallel.tp=3: must divide model.num_kv_heads=2"):
        tiny_run(tmp_path, "parallel.tp=3", *sizes, "model.layer_pattern=MS")
    with pytest.raises(ConfigError, match=r"parallel.tp=5: must divide model.num_heads=6"):
        tiny_run(tmp_path, "parallel.tp=5", *sizes, "model.layer_pattern=M")


def test_only_registered_letters_make_a_pattern(monkeypatch):
    with pytest.raises(ConfigError, match=r"'LX': must be made of L \(lightning\) and S \(softmax\) .*and M \(mean\)"):
        model_config(layer_pattern="LX")
    monkeypatch.delitem(ATTENTIONS, "M")
    with pytest.raises(ConfigError, match=r"model.layer_pattern='LM': must be made of L \(lightning\) and S"):
        model_config(layer_pattern="LM")


def test_fields_of_a_kind_are_null_without_it(monkeypatch):
    monkeypatch.setitem(ATTENTIONS, "M", replace(MEAN, fields=("residual_scale",)))
    model_config(layer_pattern="LM", residual_scale=2.0)
    with pytest.raises(ConfigError, match=r"residual_scale=None: must be given, for M \(mean\) in .*_pattern='LM'"):
        model_config(layer_pattern="LM")
    with pytest.raises(ConfigError, match=r"residual_scale=2.0: must be null: there is no M \(mean\) in .*='LS'"):
        model_config(layer_pattern="LS", residual_scale=2.0)
    monkeypatch.setitem(ATTENTIONS, "S", replace(ATTENTIONS["S"], fields=("residual_scale",)))
    model_config(layer_pattern="LS", residual_scale=2.0)
    with pytest.raises(ConfigError, match=r"must be null: there is no S \(softmax\) or M \(mean\) in .*='L'"):
        model_config(layer_pattern="L", residual_scale=2.0)


def test_the_planner_tells_the_time_of_each_kind(tmp_path):
    def rows(pattern):
        config = tiny_run(tmp_path, f"model.layer_pattern={pattern}")
        compute = plan_run(config, Cluster(1, MACHINES["h100"], Machine()), 50.0).cost.compute_s
        return {what: seconds for what, seconds in compute.items() if what.endswith("attention")}

    mixed, alone = rows("LMSM"), rows("L") | rows("M") | rows("S")
    shares = {"lightning attention": 1 / 4, "mean attention": 2 / 4, "softmax attention": 1 / 4}
    assert mixed == pytest.approx({row: alone[row] * share for row, share in shares.items()})


def test_what_cannot_be_exported_is_refused_by_name():
    accepted = r"M \(mean\) cannot be exported: MiniMax on Hugging Face has only L \(lightning\) and S \(softmax\)"
    with pytest.raises(ConfigError, match=rf"model.layer_pattern='LM': {accepted}"):
        correspondence(model_config(layer_pattern="LM"))


def test_a_third_kind_that_can_be_exported(monkeypatch):
    names = HuggingFaceNames("mean_attention", 7, {"v_proj.weight": "values.weight", "o_proj.weight": "out.weight"})
    monkeypatch.setitem(ATTENTIONS, "M", replace(MEAN, hugging_face=names))
    model = model_config(layer_pattern="MS", num_kv_heads=3, norm_eps=1e-6)
    theirs = [part.name for parameter in correspondence(model) for chunk in parameter.chunks for part in chunk.parts]
    assert {"model.layers.0.self_attn.values.weight", "model.layers.2.self_attn.out.weight"} < set(theirs)
    text_01 = to_text_01_config(model, Surroundings(max_position_embeddings=64), torch.float32)
    assert text_01.attn_type_list == [7, 1, 7, 1]
    # Six heads: no power of two, which only decays ask for.
    assert from_text_01_config(text_01.to_dict()) == model
    with pytest.raises(ConfigError, match=r"attn_type_list=\[7, 1, 7, 2\]: .*1 for softmax and 7 for mean attention"):
        from_text_01_config(text_01.to_dict() | {"attn_type_list": [7, 1, 7, 2]})


def _recurrence(q_THK, k_THK, v_THK, slopes_H, documents, **_):
    """Lightning attention of one document as matrix products, which are counted."""
    state_HKK, outputs = torch.zeros(()), []
    for q_HK, k_HK, v_HK in zip(q_THK, k_THK, v_THK, strict=True):
        state_HKK = torch.exp(-slopes_H.double())[:, None, None] * state_HKK + k_HK[:, :, None] @ v_HK[:, None, :]
        outputs.append((q_HK[:, None] @ state_HKK)[:, 0])
    return torch.stack(outputs), None


@pytest.mark.parametrize("letter", [*ATTENTIONS, "M"])
def test_parameters_and_flops_are_those_of_the_module(letter, monkeypatch):
    config, kind, T = model_config(layer_pattern=letter), ATTENTIONS[letter], 9
    kernels = KernelConfig(softmax="naive")
    attention = kind.module(config, 1, kernels, ModelRanks()).double()
    assert kind.parameters(config) == sum(parameter.numel() for parameter in attention.parameters())
    documents, x_TD = Documents.from_lengths([T]), torch.randn(T, config.hidden_size, dtype=torch.float64)
    context = TokenContext(documents, None, *rotary_table(documents.positions_T, config.rotary_dim, config.rope_base))
    expected = attention(x_TD, context)
    monkeypatch.setattr(lightning, "lightning_attention", _recurrence)
    with FlopCounterMode(display=False) as counter:
        out_TD = attention(x_TD, context)
    assert relative_error(out_TD, expected) < 1e-12
    # The naive softmax scores all T keys of every token, later ones too.
    assert T * kind.flops(config, T) == counter.get_total_flops()
