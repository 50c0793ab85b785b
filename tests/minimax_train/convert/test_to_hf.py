"""Exported models: transformers computes what we do, and loads every tensor."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from minimax_train.convert import from_hf, to_hf
from minimax_train.errors import ConfigError

CASES = {
    "half rotary": {},
    "full rotary": {"rotary_dim": 16},
    "quarter rotary": {"rotary_dim": 4},
    "no rotary": {"rotary_dim": 0},
    "one lightning layer": {"num_layers": 1, "layer_pattern": "L"},
    "one softmax layer": {"num_layers": 1, "layer_pattern": "S"},
    "LSSL": {"num_layers": 4, "layer_pattern": "LSSL"},
    "LLLLLLLS": {"num_layers": 8, "layer_pattern": "LLLLLLLS"},
    "long-context base": {"rope_base": 1e7},
    "odd sizes": {"hidden_size": 36, "num_heads": 3, "num_kv_heads": 1, "head_dim": 14, "rotary_dim": 6},
    "as many key-value heads": {"num_kv_heads": 6, "norm_eps": 1e-6},
    "top 1 of 3": {"num_experts": 3, "experts_per_token": 1},
    "residual scale": {"residual_scale": 1.0},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_same_logits_and_the_same_model_when_imported_again(lab, tmp_path, changes):
    ours = lab.random_model(lab.model_config(**changes))
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "hf")
    assert lab.largest_difference(ours, lab.load_theirs(tmp_path / "hf")) < 1e-5
    from_hf(tmp_path / "hf", tmp_path / "back")
    back = lab.load_ours(tmp_path / "back")
    assert back.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_pattern_comes_back_as_short_as_can_be(lab, tmp_path):
    ours = lab.random_model(lab.model_config(num_layers=4, layer_pattern="LSLS"))
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert lab.read_model_config(tmp_path / "back" / "config.yaml").layer_pattern == "LS"


def test_default_rope_would_be_silently_wrong(lab, tmp_path):
    """Why a partly rotated model is not exported under rope_type default: the logits are far off."""
    ours = lab.random_model(lab.model_config())
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "hf")
    theirs = lab.load_theirs(tmp_path / "hf", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert lab.largest_difference(ours, theirs) > 1e-2


def test_bfloat16_export_is_the_rounded_model(lab, tmp_path):
    ours = lab.random_model(lab.model_config())
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "hf", dtype=torch.bfloat16)
    saved, weights = lab.tensors(tmp_path / "hf"), dict(ours.named_parameters())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(saved["lm_head.weight"], weights["head.weight"].bfloat16())
    rounded = ours.to(torch.bfloat16).float()
    assert lab.largest_difference(rounded, lab.load_theirs(tmp_path / "hf", dtype=torch.float32)) < 1e-5
    assert lab.load_theirs(tmp_path / "hf").dtype == torch.bfloat16


def test_bfloat16_checkpoint_keeps_its_dtype_there_and_back(lab, tmp_path):
    ours = lab.random_model(lab.model_config(), dtype=torch.bfloat16)
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "back")
    to_hf(tmp_path / "back", tmp_path / "again")
    back = lab.load_ours(tmp_path / "back", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in ours.state_dict().items())
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()


def test_sharded_export_loads(lab, tmp_path):
    ours = lab.random_model(lab.model_config())
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "hf", max_shard_bytes=60_000)
    to_hf(tmp_path / "ours", tmp_path / "whole")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 5
    assert files == sorted(set(index["weight_map"].values()))
    small = [file for file in (tmp_path / "hf").glob("*.safetensors") if file.stat().st_size < 70_000]
    assert len(small) >= len(files) - 1, "all but the one with a decay matrix"
    sharded, whole = lab.tensors(tmp_path / "hf"), lab.tensors(tmp_path / "whole")
    assert sharded.keys() == whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert lab.largest_difference(ours, lab.load_theirs(tmp_path / "hf")) < 1e-5


def test_decays_are_those_transformers_computes(lab, tmp_path):
    ours = lab.random_model(lab.model_config(num_layers=8, layer_pattern="LLLLLLLS", num_heads=10))
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "hf")
    saved = lab.tensors(tmp_path / "hf")
    theirs = lab.save_theirs(
        tmp_path / "theirs",
        num_hidden_layers=8,
        num_attention_heads=10,
        layer_types=["linear_attention"] * 7 + ["full_attention"],
    )
    persistent = {name: buffer for name, buffer in theirs.named_buffers() if "rotary" not in name}
    assert len(persistent) == 7 * 4
    for name, buffer in persistent.items():
        assert torch.equal(saved[name], buffer), name


def test_tokenizer_and_its_special_tokens_come_along(lab, tmp_path):
    ours = lab.random_model(lab.model_config())
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours", tokenizer=True), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (0, None, None)
    assert config["architectures"] == ["MiniMaxForCausalLM"]
    assert config["max_position_embeddings"] == lab.SEQUENCE_LENGTH
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("a b") == [1, 2]
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 0


def test_generation_continues_as_our_logits_say(lab, tmp_path):
    ours = lab.random_model(lab.model_config(**CASES["odd sizes"]))
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "hf")
    prompt = torch.randint(lab.VOCABULARY, (230,), generator=torch.Generator().manual_seed(5))
    generated = lab.load_theirs(tmp_path / "hf").generate(prompt[None], max_new_tokens=64, do_sample=False)[0]
    tokens = prompt
    for _ in range(64):
        with torch.no_grad():
            logits = ours(tokens, lab.Documents.from_lengths([len(tokens)]))
        tokens = torch.cat([tokens, logits[-1].argmax()[None]])
    assert torch.equal(generated, tokens)


def test_auxiliary_loss_means_the_same_objective(lab, tmp_path):
    """Of one layer for any routing; of several where they route alike, as with a router that knows no preference."""
    for changes, uniform in (({"num_layers": 1, "layer_pattern": "L"}, False), ({"num_layers": 4}, True)):
        ours = lab.random_model(lab.model_config(aux_loss_coefficient=0.03, **changes))
        if uniform:
            for block in ours.layers:
                torch.nn.init.zeros_(block.experts.router.weight)
        folder = tmp_path / f"layers-{ours.config.num_layers}"
        to_hf(lab.save_checkpoint(ours, folder / "ours"), folder / "hf")
        theirs = lab.load_theirs(folder / "hf")
        tokens = torch.randint(lab.VOCABULARY, (200,), generator=torch.Generator().manual_seed(6))
        with torch.no_grad():
            loss = ours(tokens, lab.Documents.from_lengths([200]), tokens).aux_loss
            their_loss = theirs(tokens[None], output_router_logits=True).aux_loss
        assert theirs.config.router_aux_loss_coef * float(their_loss) == pytest.approx(0.03 * float(loss), rel=1e-5)


def test_newest_checkpoint_of_a_run(lab, tmp_path):
    old, new = lab.random_model(lab.model_config()), lab.random_model(lab.model_config(rotary_dim=16))
    lab.save_checkpoint(old, tmp_path / "run" / "checkpoints" / "step-00000010")
    lab.save_checkpoint(new, tmp_path / "run" / "checkpoints" / "step-00000020")
    to_hf(tmp_path / "run", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_parameters"]["rope_type"] == "default"


REFUSED = {
    "theta beyond float32": (
        {"rotary_dim": 2, "rope_base": 1e7},
        "model.rotary_dim=2: .* model.rope_base can be at most",
    ),
    "odd head dim": ({"head_dim": 15, "rotary_dim": 0}, "model.head_dim=15: must be even"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_transformers_cannot_express_is_refused(lab, tmp_path, changes, message):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config(**changes)), tmp_path / "ours")
    with pytest.raises(ConfigError, match=message):
        to_hf(checkpoint, tmp_path / "hf")
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_checkpoint_of_another_model_is_refused(lab, tmp_path):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config()), tmp_path / "ours")
    text = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(text.replace("hidden_size: 40", "hidden_size: 48", 1))
    with pytest.raises(ConfigError, match=r"model.embedding.weight: config.yaml wants \(97, 48\), it holds \(97, 40\)"):
        to_hf(checkpoint, tmp_path / "hf")
    (checkpoint / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match="no model configuration"):
        to_hf(checkpoint, tmp_path / "hf")
