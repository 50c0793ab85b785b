"""Imported models: the same logits as in transformers, the same tensors when exported again, and clear refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimax_train.convert import from_hf, to_hf
from minimax_train.errors import ConfigError
from minimax_train.model.config import deep_norm_alpha

ALPHAS = ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor")
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.75, "rope_theta": 123456.7}
CASES = {
    "defaults": {},
    "DeepNorm": dict.fromkeys(ALPHAS, deep_norm_alpha(2)),
    "another alpha": dict.fromkeys(ALPHAS, 3),
    "partly rotated": {"rope_parameters": PROPORTIONAL},
    "head dim left out": {"head_dim": None, "hidden_size": 48},
    "their layer types": {"layer_types": None, "num_hidden_layers": 4},
    "no whole pattern": {"layer_types": ["linear_attention"] * 2 + ["full_attention"], "num_hidden_layers": 3},
    "another block size": {"block_size": 64},
    "special tokens": {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8, "max_position_embeddings": 321},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_equal_and_the_export_is_the_source(lab, tmp_path, changes):
    theirs = lab.save_theirs(tmp_path / "hf", **changes)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    assert lab.largest_difference(lab.load_ours(tmp_path / "ours"), theirs) < 1e-5
    to_hf(tmp_path / "ours", tmp_path / "again")
    before, after = lab.tensors(tmp_path / "hf"), lab.tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / file).read_text()) == json.loads((tmp_path / "hf" / file).read_text())
    lab.load_theirs(tmp_path / "again")


def test_derived_configuration(lab, tmp_path):
    lab.save_theirs(tmp_path / "hf", rope_parameters=PROPORTIONAL, router_aux_loss_coef=0.004)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    config = lab.read_model_config(tmp_path / "ours" / "config.yaml")
    assert (config.layer_pattern, config.rotary_dim, config.residual_scale) == ("LS", 12, 1.0)
    assert config.rope_base == pytest.approx(123456.7**0.75)
    assert config.aux_loss_coefficient == 0.004 * 4**2 / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_every_bit(lab, tmp_path, dtype):
    lab.save_theirs(tmp_path / "hf", dtype=dtype)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()


def test_dtype_option(lab, tmp_path):
    theirs = lab.save_theirs(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours", dtype=torch.bfloat16)
    head = lab.load_ours(tmp_path / "ours", dtype=torch.bfloat16).head.weight
    assert torch.equal(head, theirs.lm_head.weight.bfloat16())
    to_hf(tmp_path / "ours", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("layout", ["sharded", "fused"])
def test_other_layouts_on_disk(lab, tmp_path, layout):
    theirs = lab.save_theirs(tmp_path / "whole")
    options = {"max_shard_size": "50KB"} if layout == "sharded" else {"save_original_format": False}
    theirs.save_pretrained(tmp_path / "hf", **options)
    names = set(lab.tensors(tmp_path / "hf"))
    assert ("model.layers.0.mlp.experts.gate_up_proj" in names) == (layout == "fused")
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 3) == (layout == "sharded")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "again")
    before, after = lab.tensors(tmp_path / "whole"), lab.tensors(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_without_decays(lab, tmp_path):
    theirs = lab.save_theirs(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "decay" not in k and "slope" not in k}, file)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    assert lab.largest_difference(lab.load_ours(tmp_path / "ours"), theirs) < 1e-5


def test_each_expert_lies_by_itself_on_disk(lab, tmp_path):
    """So that a rank reads, and the converter holds, one expert rather than all of a layer."""
    lab.save_theirs(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    metadata = lab.dcp.FileSystemReader(tmp_path / "ours").read_metadata().state_dict_metadata
    chunks = metadata["model.layers.0.experts.mlp.gate_up_proj"].chunks
    assert [tuple(chunk.sizes) for chunk in chunks] == [(1, 2, 24, 40)] * 4


def test_tokenizer_comes_along(lab, tmp_path):
    lab.save_theirs(tmp_path / "hf")
    lab.save_tokenizer(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "ours")
    assert {file.name for file in (tmp_path / "ours" / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "ours" / "model" / "imported.yaml").is_file()


def test_changed_model_is_exported_as_what_it_is(lab, tmp_path):
    """The source's configuration is written again only where it still describes the model."""
    lab.save_theirs(tmp_path / "hf", bos_token_id=5, max_position_embeddings=321)
    from_hf(tmp_path / "hf", tmp_path / "ours")
    config = tmp_path / "ours" / "config.yaml"
    config.write_text(config.read_text().replace("residual_scale: 1.0", "residual_scale: 2.5"))
    (tmp_path / "ours" / "manifest.json").unlink()  # so that the change is no damage
    to_hf(tmp_path / "ours", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert [again[name] for name in ALPHAS] == [2.5] * 3
    assert (again["bos_token_id"], again["max_position_embeddings"]) == (5, 321)
    assert lab.largest_difference(lab.load_ours(tmp_path / "ours"), lab.load_theirs(tmp_path / "again")) < 1e-5


def test_rotary_dim_that_transformers_ignores(lab, tmp_path):
    """The original model's rotary_dim beside rope_type default: refused, unless it is said what was trained."""
    theirs = lab.save_theirs(tmp_path / "hf")
    _edit(tmp_path / "hf", rotary_dim=8)
    with pytest.raises(ConfigError, match=r"rotary_dim=8: contradicts .* --rotary-dim"):
        from_hf(tmp_path / "hf", tmp_path / "ours")
    from_hf(tmp_path / "hf", tmp_path / "all", rotary_dim=16)
    assert lab.largest_difference(lab.load_ours(tmp_path / "all"), theirs) < 1e-5
    from_hf(tmp_path / "hf", tmp_path / "part", rotary_dim=8)
    part = lab.load_ours(tmp_path / "part")
    assert part.config.rotary_dim == 8
    assert torch.equal(part.layers[1].attention.q_proj.weight, theirs.model.layers[1].self_attn.q_proj.weight)
    to_hf(tmp_path / "part", tmp_path / "mended")
    assert lab.largest_difference(part, lab.load_theirs(tmp_path / "mended")) < 1e-5


REFUSED = {
    "model_type": ({"model_type": "mixtral"}, "model_type='mixtral': must be 'minimax'"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act='gelu': must be silu"),
    "sliding_window": ({"sliding_window": 64}, "sliding_window=64: must be None"),
    "attention_dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1: must be 0"),
    "router_jitter_noise": ({"router_jitter_noise": 0.01}, "router_jitter_noise=0.01: must be 0"),
    "tie_word_embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings=True: must be False"),
    "beta": ({"mlp_beta_factor": 0.5}, "mlp_beta_factor=0.5: must be 1"),
    "alphas": ({"mlp_alpha_factor": 2}, "mlp_alpha_factor=2: must equal full_attn_alpha_factor=1"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*: must be None"),
    "layer_types": (
        {"layer_types": ["linear_attention", "sliding_attention"]},
        "layer_types='sliding_attention': must be one of linear_attention, full_attention",
    ),
    "rope_type": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1.0}},
        "rope_parameters.rope_type='linear': must be 'default' or 'proportional'",
    ),
    "rope factor": (
        {"rope_parameters": {**PROPORTIONAL, "factor": 2.0}},
        "rope_parameters.factor=2.0: must be 1",
    ),
    "rope keys": (
        {"rope_parameters": {**PROPORTIONAL, "beta_fast": 32}},
        "rope_parameters=.*beta_fast not known here",
    ),
    "partial_rotary_factor": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5: contradicts rope_type 'default'",
    ),
    "strict": ({"num_hidden_layers": "two"}, "config.json: transformers refuses it: .*num_hidden_layers.*two"),
    "depth": ({"num_hidden_layers": 1, "layer_types": ["linear_attention"]}, "num_hidden_layers=1: .* of 2 layers"),
    "more layers": (
        {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        "num_hidden_layers=3: .* of 2 layers",
    ),
    "missing": ({"layer_types": ["full_attention"] * 2}, r"layers\.0\.self_attn\.q_proj\.weight is missing"),
    "shape": ({"num_local_experts": 3}, r"gate.weight has shape \(4, 40\), config.json wants \(3, 40\)|are not of a"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused(lab, tmp_path, changes, message):
    lab.save_theirs(tmp_path / "hf")
    _edit(tmp_path / "hf", **changes)
    with pytest.raises(ConfigError, match=message):
        from_hf(tmp_path / "hf", tmp_path / "ours")
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_other_decays_are_refused(lab, tmp_path):
    lab.save_theirs(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    saved = load_file(file)
    saved["model.layers.0.self_attn.slope_rate"] *= 1.1
    save_file(saved, file)
    with pytest.raises(ConfigError, match=r"slope_rate=.*must be the slopes of MiniMax-01"):
        from_hf(tmp_path / "hf", tmp_path / "ours")


def test_broken_files_are_refused(lab, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"there is no config\.json"):
        from_hf(tmp_path / "empty", tmp_path / "ours")
    lab.save_theirs(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors: not a readable safetensors file"):
        from_hf(tmp_path / "hf", tmp_path / "ours")


def _edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
