"""The layout of MiniMax-Text-01: an independent reader computes our logits from the exported files, both directions are
exact, and every parameter of the full model has a place.

The reader is written from the layout's public readers (vLLM's ``minimax_text_01.py``), in float64, and takes every
name, every order of rows and every number from the files alone.

T tokens, D hidden size, H heads, J key-value heads, K head dim, W H * K, F rotated pairs, E experts, A experts a token.
"""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu
from transformers import AutoConfig, dynamic_module_utils

from minimax_train.convert import from_hf, to_hf
from minimax_train.convert.cli import main
from minimax_train.convert.decays import decay_outputs
from minimax_train.convert.hf_config import Surroundings
from minimax_train.convert.names import CHUNK_ELEMENTS, correspondence
from minimax_train.convert.text_01_config import from_text_01_config, to_text_01_config
from minimax_train.documents import Documents
from minimax_train.errors import ConfigError
from minimax_train.model import ModelConfig
from minimax_train.model.config import count_parameters

ODD = {
    "hidden_size": 36,
    "num_layers": 4,
    "layer_pattern": "LLLS",
    "num_heads": 4,
    "head_dim": 14,
    "rotary_dim": 6,
    "num_experts": 3,
    "expert_hidden_size": 20,
}
CASES = {
    "odd sizes": ODD,
    "full rotary, as many key-value heads": ODD | {"rotary_dim": 14, "num_kv_heads": 4},
    "softmax first": ODD | {"layer_pattern": "SL", "head_dim": 10},
    "one lightning layer": ODD | {"layer_pattern": "L", "num_layers": 1, "num_heads": 8},
    "softmax alone, heads no power of two": ODD | {"layer_pattern": "S", "num_layers": 2, "num_heads": 6},
    "top 1, long-context base, eps": ODD | {"experts_per_token": 1, "rope_base": 1e7, "norm_eps": 1e-6},
    "residual scale": ODD | {"residual_scale": 1.25, "layer_pattern": "LS"},
}


class Reader:
    """A folder's logits of one document."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        files = sorted(folder.glob("*.safetensors"))
        self.tensors = {name: tensor.double() for file in files for name, tensor in load_file(file).items()}
        self.unread = set(self.tensors)

    def __call__(self, tokens_T):
        config = self.config
        x_TD = self.weight("model.embed_tokens")[tokens_T]
        for layer, kind in enumerate(config["attn_type_list"]):
            name = f"model.layers.{layer}"
            attention = (self.lightning, self.softmax)[kind]
            alpha, beta = self.factors(("linear_attention", "full_attention")[kind])
            x_TD = self.rms_norm(x_TD, f"{name}.input_layernorm", config["rms_norm_eps"])
            x_TD = alpha * x_TD + beta * attention(x_TD, f"{name}.self_attn", layer)
            alpha, beta = self.factors("mlp")
            x_TD = self.rms_norm(x_TD, f"{name}.post_attention_layernorm", config["rms_norm_eps"])
            x_TD = alpha * x_TD + beta * self.experts(x_TD, f"{name}.block_sparse_moe")
        x_TD = self.rms_norm(x_TD, "model.norm", config["rms_norm_eps"])
        return x_TD @ self.weight("lm_head").T

    def weight(self, name):
        self.unread.discard(f"{name}.weight")
        return self.tensors[f"{name}.weight"]

    def factors(self, sublayer):
        return (self.config[f"layernorm_{sublayer}_{which}"] for which in ("alpha", "beta"))

    def rms_norm(self, x, name, eps):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self.weight(name)

    def slopes(self, layer):
        heads, layers = self.config["num_attention_heads"], self.config["num_hidden_layers"]
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        slopes_H = torch.tensor([start * start**head for head in range(heads)], dtype=torch.float64)
        return slopes_H * (1 + 1e-5 if layers == 1 else 1 - layer / (layers - 1) + 1e-5)

    def lightning(self, x_TD, name, layer):
        heads, T = self.config["num_attention_heads"], len(x_TD)
        qkv_THW = silu(x_TD @ self.weight(f"{name}.qkv_proj").T).view(T, heads, -1)
        q_THK, k_THK, v_THK = qkv_THW.split(self.config["head_dim"], dim=-1)
        age_TT = torch.arange(T)[:, None] - torch.arange(T)
        decay_HTT = torch.exp(-self.slopes(layer)[:, None, None] * age_TT.clamp(min=0)) * (age_TT >= 0)
        scores_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK) * decay_HTT
        out_TW = torch.einsum("hts,shk->thk", scores_HTT, v_THK).reshape(T, -1)
        gate_TW = torch.sigmoid(x_TD @ self.weight(f"{name}.output_gate").T)
        return (gate_TW * self.rms_norm(out_TW, f"{name}.norm", 1e-6)) @ self.weight(f"{name}.out_proj").T

    def softmax(self, x_TD, name, layer):
        config, T = self.config, len(x_TD)
        width, heads, kv_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
        q_THK, k_TJK, v_TJK = ((x_TD @ self.weight(f"{name}.{p}_proj").T).view(T, -1, width) for p in "qkv")
        assert (q_THK.shape[1], k_TJK.shape[1]) == (heads, kv_heads)
        k_THK, v_THK = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (self.rotate(k_TJK), v_TJK))
        scores_HTT = torch.einsum("thk,shk->hts", self.rotate(q_THK), k_THK) / math.sqrt(width)
        future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights_HTT = scores_HTT.masked_fill(future_TT, -math.inf).softmax(-1)
        return torch.einsum("hts,shk->thk", weights_HTT, v_THK).reshape(T, -1) @ self.weight(f"{name}.o_proj").T

    def rotate(self, x_THK):
        R = self.config["rotary_dim"]
        frequency_F = float(self.config["rope_theta"]) ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        angle_T1F = torch.arange(len(x_THK))[:, None, None] * frequency_F
        first, second, rest = x_THK[..., : R // 2], x_THK[..., R // 2 : R], x_THK[..., R:]
        cos, sin = angle_T1F.cos(), angle_T1F.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def experts(self, x_TD, name):
        probability_TE = (x_TD @ self.weight(f"{name}.gate").T).softmax(-1)
        top_TA, chosen_TA = probability_TE.topk(self.config["num_experts_per_tok"])
        share_TE = torch.zeros_like(probability_TE).scatter(1, chosen_TA, top_TA / top_TA.sum(-1, keepdim=True))
        out_TD = torch.zeros_like(x_TD)
        for expert in range(self.config["num_local_experts"]):
            w1, w2, w3 = (self.weight(f"{name}.experts.{expert}.{w}") for w in ("w1", "w2", "w3"))
            out_TD += share_TE[:, expert, None] * ((silu(x_TD @ w1.T) * (x_TD @ w3.T)) @ w2.T)
        return out_TD


@torch.no_grad()
def largest_difference(lab, ours, folder: Path) -> float:
    """Of the logits, ours and the reader's, which must have read every tensor."""
    tokens = torch.randint(lab.VOCABULARY, (53,), generator=torch.Generator().manual_seed(4))
    reader = Reader(folder)
    theirs, logits = reader(tokens), ours(tokens, Documents.from_lengths([53]))
    assert not reader.unread
    assert logits.std() > 0.1, "logits too alike to compare"
    return float((logits - theirs).abs().max())


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_a_reader_computes_our_logits_and_the_way_back_is_exact(lab, tmp_path, changes):
    ours = lab.random_model(lab.model_config(**changes))
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "hf", layout="text-01", max_shard_bytes=40_000)
    assert largest_difference(lab, ours, tmp_path / "hf") < 1e-5
    from_hf(tmp_path / "hf", tmp_path / "back")
    back = lab.load_ours(tmp_path / "back")
    assert back.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    to_hf(tmp_path / "back", tmp_path / "again", layout="text-01", max_shard_bytes=40_000)
    hf, again = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.name != "README.md"}
        for name in ("hf", "again")
    )
    assert hf == again


def test_from_one_layout_to_the_other(lab, tmp_path):
    """Queries and keys of transformers' files are permuted, those of MiniMax-Text-01's are not."""
    ours = lab.random_model(lab.model_config(**ODD), dtype=torch.bfloat16)
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours"), tmp_path / "text-01", layout="text-01")
    from_hf(tmp_path / "text-01", tmp_path / "middle")
    to_hf(tmp_path / "middle", tmp_path / "minimax")
    ours = ours.float()
    assert lab.largest_difference(ours, lab.load_theirs(tmp_path / "minimax", dtype=torch.float32)) < 1e-5
    from_hf(tmp_path / "minimax", tmp_path / "back")
    to_hf(tmp_path / "back", tmp_path / "again", layout="text-01")
    first, again, minimax = (lab.tensors(tmp_path / name) for name in ("text-01", "again", "minimax"))
    assert first.keys() == again.keys() < minimax.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], minimax[name])}
    assert changed == {f"model.layers.3.self_attn.{p}_proj.weight" for p in "qk"}
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("text-01", "again")]
    assert configs[0] == configs[1]


# As MiniMaxAI/MiniMax-M1-80k has it; MiniMax-Text-01's differs in name, positions and rope_theta.
RELEASED = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "auto_map": {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_m1",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 200064,
}


@pytest.fixture(scope="module")
def text_01() -> ModelConfig:
    """``model=text-01``."""
    with initialize_config_dir(str(Path(__file__).parents[3] / "configs" / "model"), version_base=None):
        return ModelConfig(**OmegaConf.to_container(compose("text-01")))


def test_the_released_configuration_is_model_text_01(text_01):
    model = from_text_01_config(RELEASED)
    released = {"rope_base": 1e7, "aux_loss_coefficient": model.aux_loss_coefficient}
    assert model == dataclasses.replace(text_01, **released)
    again = to_text_01_config(model, Surroundings(max_position_embeddings=10240000), torch.bfloat16).to_dict()
    ignored = {"architectures", "model_type", "auto_map", "initializer_range", "use_cache", "output_router_logits"}
    assert {name: again[name] for name in RELEASED.keys() - ignored} == {
        name: value for name, value in RELEASED.items() if name not in ignored
    }


def expected_shapes(text_01: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of MiniMax-Text-01 in its own files, from the description of the layout."""
    D, F, V, width, kv_width = 6144, 9216, 200064, 64 * 128, 8 * 128
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    for layer in range(80):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.input_layernorm": (D,), f"{name}.post_attention_layernorm": (D,)}
        if layer % 8 == 7:
            own = {"q_proj": (width, D), "k_proj": (kv_width, D), "v_proj": (kv_width, D), "o_proj": (D, width)}
        else:
            own = {"qkv_proj": (3 * width, D), "output_gate": (width, D), "norm": (width,), "out_proj": (D, width)}
        shapes |= {f"{name}.self_attn.{which}": shape for which, shape in own.items()}
        shapes[f"{name}.block_sparse_moe.gate"] = (32, D)
        for expert in range(32):
            for which, shape in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D))):
                shapes[f"{name}.block_sparse_moe.experts.{expert}.{which}"] = shape
    return {f"{name}.weight": shape for name, shape in shapes.items()}


@pytest.mark.parametrize("in_transformers", [False, True])
def test_all_456_billion_parameters_have_a_place(text_01, in_transformers):
    found: dict[str, tuple[int, ...]] = {}
    permuted = Counter()
    for parameter in correspondence(text_01, permute_rotary=in_transformers):
        place = 0
        for chunk in parameter.chunks:
            assert chunk.start == place
            place += chunk.length
            empty = torch.empty(chunk.length, *parameter.shape[1:], device="meta")
            shapes = {part.name: tuple(empty[part.index].shape) for part in chunk.parts}
            assert len({part.index for part in chunk.parts}) == len(chunk.parts) == len(shapes)
            assert sum(map(math.prod, shapes.values())) == empty.numel() <= 2 * CHUNK_ELEMENTS
            for part in chunk.parts:
                rows, *rest = shapes[part.name]
                before = found.pop(part.name, (0, *rest))[0]
                assert before == (part.cut.start if part.cut else 0)
                found[part.name] = (before + rows, *rest)
            for part in chunk.parts:
                if part.rows is not None:
                    permuted[part.name.rsplit(".", 2)[1]] += 1
                    assert torch.equal(part.rows.sort().values, torch.arange(len(part.rows)))
        assert place == parameter.shape[0], parameter.name
    assert found == expected_shapes(text_01)
    assert permuted == ({"q_proj": 10, "k_proj": 10} if in_transformers else {})
    total = sum(map(math.prod, found.values()))
    assert total == count_parameters(text_01).total
    assert 455.5e9 < total < 456.5e9
    decays = {output.name for output in decay_outputs(text_01, 256, torch.float32)}
    assert len(decays) == 70 * 4 and not decays & found.keys()


def test_transformers_opens_the_configuration(lab, tmp_path, monkeypatch):
    """What vLLM asks for first: the class that config.json names, from the file beside it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    ours = lab.random_model(lab.model_config(**ODD))
    to_hf(lab.save_checkpoint(ours, tmp_path / "ours", tokenizer=True), tmp_path / "hf", layout="text-01")
    config = AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert (config.architectures, config.model_type) == (["MiniMaxText01ForCausalLM"], "minimax_text_01")
    assert (config.rotary_dim, config.rope_theta, config.attn_type_list) == (6, 10000, [0, 0, 0, 1])
    assert (config.max_position_embeddings, config.eos_token_id) == (lab.SEQUENCE_LENGTH, 0)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 0


REFUSED = {
    "another model": ({"model_type": "x", "architectures": ["Y"]}, "model_type='x': must be 'minimax' or 'minimax_te"),
    "no rotary dim": ({"rotary_dim": None}, " rotary_dim=None: must be a whole number from 2 to"),
    "odd rotary dim": ({"rotary_dim": 5}, " rotary_dim=5: must be even and between 0 and head_dim=14"),
    "a broken base": ({"rope_theta": 10000.5}, r"rope_theta=10000\.5: must be a whole number"),
    "no kinds": ({"attn_type_list": None}, "attn_type_list=None: must be a list of num_hidden_layers=4 kinds, 0 for"),
    "a third kind": ({"attn_type_list": [0, 0, 2, 1]}, r"attn_type_list=\[0, 0, 2, 1\]: must be a list"),
    "kinds as booleans": ({"attn_type_list": [False, False, False, True]}, r"attn_type_list=\[False, .*must be a list"),
    "pre-norm": ({"postnorm": False}, "postnorm=False: must be True"),
    "shared expert": ({"shared_intermediate_size": 64}, "shared_intermediate_size=64: must be 0"),
    "scaled positions": ({"rope_scaling": {"type": "linear"}}, "rope_scaling={'type': 'linear'}: must be None"),
    "quantised": ({"quantization_config": {"bits": 8}}, "quantization_config={'bits': 8}: must be None"),
    "beta": ({"layernorm_mlp_beta": 0.5}, r"layernorm_mlp_beta=0\.5: must be 1"),
    "alphas": ({"layernorm_mlp_alpha": 2.0}, r"layernorm_mlp_alpha=2\.0: must equal layernorm_full_attention_alpha="),
    "NaN": ({"rms_norm_eps": math.nan}, r"rms_norm_eps=nan: must be a number from 1e-30 to 1\.0"),
    "a string": ({"vocab_size": "97"}, "vocab_size='97': must be a whole number from 1 to"),
    "experts by layer": ({"num_local_experts": [3, 3, 3, 3]}, r"num_local_experts=\[3, 3, 3, 3\]: must be a whole"),
    "no such id": ({"eos_token_id": 97}, "eos_token_id=97: must be null, or an id from 0 to 96"),
    "an id as a string": ({"pad_token_id": "a"}, "pad_token_id='a': must be null, a token id or a list of them"),
    "no positions": ({"max_position_embeddings": 0}, "max_position_embeddings=0: must be a whole number from 1 to"),
    "heads that do not divide": (
        {"num_key_value_heads": 3},
        "num_key_value_heads=3: must divide num_attention_heads=4",
    ),
    "other decays": ({"num_attention_heads": 6}, "num_attention_heads=6: must be a power of two"),
}


@pytest.fixture(scope="module")
def exported(lab, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text-01")
    ours = lab.random_model(lab.model_config(**ODD))
    to_hf(lab.save_checkpoint(ours, folder / "ours"), folder / "hf", layout="text-01")
    return folder / "hf"


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED.keys())
def test_config_json_that_is_refused(exported, tmp_path, change, message):
    config = json.loads((exported / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message) as error:
        from_hf(tmp_path, tmp_path / "ours")
    assert str(error.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_tensors_of_the_other_layout_are_refused(exported, tmp_path):
    (tmp_path / "config.json").write_text((exported / "config.json").read_text())
    decay = {"model.layers.0.self_attn.slope_rate": torch.ones(4, 1, 1)}
    save_file(load_file(exported / "model.safetensors") | decay, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"1 tensors are not of a 4-layer model: .*slope_rate"):
        from_hf(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 6}, "model.num_heads=6: must be a power of two"),
        ({"num_experts": 1, "experts_per_token": 1}, "model.num_experts=1: must be at least 2"),
        ({"rope_base": 10000.5}, r"model.rope_base=10000\.5: must be a whole number"),
        ({"rotary_dim": 0}, "model.rotary_dim=0: must be at least 2"),
    ],
)
def test_models_that_readers_would_compute_otherwise_are_refused(lab, change, message):
    model = lab.model_config(**(ODD | change))
    with pytest.raises(ConfigError, match=message):
        to_text_01_config(model, Surroundings(max_position_embeddings=64), torch.float32)


def test_command(lab, exported, tmp_path, capsys):
    assert main(["from-hf", str(exported), str(tmp_path / "ours"), "--rotary-dim", "6"]) == 2
    assert "--rotary-dim=6: only for transformers' layout" in capsys.readouterr().err
    assert main(["from-hf", str(exported), str(tmp_path / "ours")]) == 0
    assert main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "hf"), "--layout", "text-01"]) == 0
    assert f"vllm.LLM('{tmp_path}/hf', trust_remote_code=True)" in capsys.readouterr().out
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
