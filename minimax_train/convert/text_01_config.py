"""A model's configuration in the original layout of MiniMax-Text-01, and back.

Sources: ``config.json`` of MiniMaxAI/MiniMax-Text-01 and MiniMax-M1, and their readers: vLLM's
``model_executor/models/minimax_text_01.py`` and the ``modeling_minimax_text_01.py`` of the release. Where these compute
something else than this framework, or than each other, the model is refused: the tables and :func:`_require_readable`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minimax_train.convert.hf_config import (
    NUMBERS,
    SAME,
    TOKEN_IDS,
    WHOLE,
    Surroundings,
    in_their_names,
    our_aux,
    require_token_ids,
    require_within,
    shortest_pattern,
    their_aux,
)
from minimax_train.convert.names import attention_names
from minimax_train.errors import ConfigError, require
from minimax_train.model import ModelConfig
from minimax_train.model.attention import ATTENTIONS
from minimax_train.model.config import deep_norm_alpha

if TYPE_CHECKING:
    from minimax_train.convert.configuration_minimax_text_01 import MiniMaxText01Config

ARCHITECTURES = ("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM")  # the same model; exports have the first
MODEL_TYPES = ("minimax_text_01", "minimax_m1")
# Transformers has no class for the configuration, so an export brings one along.
CONFIGURATION_FILE = Path(__file__).with_name("configuration_minimax_text_01.py")
AUTO_MAP = {"AutoConfig": f"{CONFIGURATION_FILE.stem}.MiniMaxText01Config"}
SUBLAYERS = ("full_attention", "linear_attention", "mlp")
ALPHAS = tuple(f"layernorm_{sublayer}_alpha" for sublayer in SUBLAYERS)
BETAS = tuple(f"layernorm_{sublayer}_beta" for sublayer in SUBLAYERS)
# What a key must be. Where it is missing, readers take the first, but for "postnorm", which they take as false.
FIXED: dict[str, tuple[Any, ...]] = {
    "postnorm": (True,),
    "shared_intermediate_size": (0, [0], None),
    "hidden_act": ("silu", "swish"),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "attention_dropout": (0,),
    "router_jitter_noise": (0,),
    "tie_word_embeddings": (False,),
    "quantization_config": (None,),
    **dict.fromkeys(BETAS, (1,)),
}
# Theirs to ours.
ROPE = {"rotary_dim": "rotary_dim", "rope_theta": "rope_base"}
# Keys that must be there, and the ends of their range.
REQUIRED = {name: ends for name, ends in (WHOLE | NUMBERS).items() if name in SAME}
REQUIRED |= {"router_aux_loss_coef": NUMBERS["router_aux_loss_coef"], **dict.fromkeys(ALPHAS, (1e-6, 1e6))}
REQUIRED |= {"rotary_dim": (2, WHOLE["head_dim"][1]), "rope_theta": (1.0, 1e12)}


def to_text_01_config(model: ModelConfig, surroundings: Surroundings, dtype: torch.dtype) -> MiniMaxText01Config:
    """The configuration of a model of ours.

    Raises:
        ConfigError: when the layout or its readers cannot express the model.
    """
    from minimax_train.convert.configuration_minimax_text_01 import MiniMaxText01Config

    _require_readable(model)
    values: dict[str, Any] = {
        **{theirs: getattr(model, ours) for theirs, ours in SAME.items()},
        **dict.fromkeys(ALPHAS, model.alpha),
        **dict.fromkeys(BETAS, 1.0),
        "attn_type_list": [names.attn_type for names in attention_names(model)],
        "postnorm": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "hidden_act": "silu",
        "rotary_dim": model.rotary_dim,
        "rope_theta": int(model.rope_base),
        "sliding_window": None,
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "router_aux_loss_coef": their_aux(model.aux_loss_coefficient, model.num_layers, model.num_experts),
        "tie_word_embeddings": False,
        **dataclasses.asdict(surroundings),
        "architectures": [ARCHITECTURES[0]],
        "auto_map": AUTO_MAP,
        "dtype": dtype,
    }
    return MiniMaxText01Config(**values)


def from_text_01_config(raw: dict[str, Any]) -> ModelConfig:
    """A model of ours that computes what the readers of MiniMax-Text-01 do.

    Args:
        raw: the content of a ``config.json``.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """
    for name, ends in REQUIRED.items():
        _require_number(name, raw.get(name), *ends)
    for name, accepted in FIXED.items():
        value = raw.get(name, False if name == "postnorm" else accepted[0])
        fits = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted)
        require(fits, name, value, f"must be {' or '.join(map(str, accepted))}; there is no other here")
    for name in ALPHAS:
        require(raw[name] == raw[ALPHAS[0]], name, raw[name], f"must equal {ALPHAS[0]}={raw[ALPHAS[0]]!r}")
    text_01_surroundings(raw)
    layers, experts, alpha = raw["num_hidden_layers"], raw["num_local_experts"], float(raw[ALPHAS[0]])
    numbers = raw.get("attn_type_list")
    known = {kind.hugging_face.attn_type: kind for kind in ATTENTIONS.values() if kind.hugging_face}
    fits = isinstance(numbers, list) and len(numbers) == layers and all(type(n) is int and n in known for n in numbers)
    kinds = " and ".join(f"{number} for {kind.name}" for number, kind in known.items())
    accepted = f"must be a list of num_hidden_layers={layers} kinds, {kinds} attention"
    require(fits, "attn_type_list", numbers, accepted)
    assert isinstance(numbers, list)
    try:
        model = ModelConfig(
            **{ours: raw[theirs] for theirs, ours in SAME.items()},
            layer_pattern=shortest_pattern("".join(known[number].letter for number in numbers)),
            rotary_dim=raw["rotary_dim"],
            rope_base=float(raw["rope_theta"]),
            residual_scale=None if alpha == deep_norm_alpha(layers) else alpha,
            aux_loss_coefficient=our_aux(raw["router_aux_loss_coef"], layers, experts),
        )
        _require_readable(model)
    except ConfigError as error:
        raise in_their_names(error, SAME | ROPE) from error
    return model


def text_01_surroundings(raw: dict[str, Any]) -> Surroundings:
    """What a ``config.json`` holds besides the model.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """
    _require_number("vocab_size", raw.get("vocab_size"), *WHOLE["vocab_size"])
    for name in TOKEN_IDS:
        value = raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        accepted = "must be null, a token id or a list of them"
        require(all(type(i) is int for i in ids), name, value, accepted)
        require_token_ids(name, value, raw["vocab_size"])
    name = "max_position_embeddings"
    _require_number(name, raw.get(name), *WHOLE[name])
    return Surroundings(raw[name], *(raw.get(name) for name in TOKEN_IDS))


def _require_readable(model: ModelConfig) -> None:
    """Refuse what readers of the layout compute otherwise.

    Its files hold no decays: readers make them from the number of heads. For a power of two these are ours, for others
    they interleave those of two powers, as ALiBi does (vLLM: ``_build_slope_tensor``), where ours stay geometric.
    """
    heads, R, base = model.num_heads, model.rotary_dim, model.rope_base
    accepted = "must be a power of two: for others, readers of MiniMax-Text-01 have other decays in lightning layers"
    has_decays = any(names.has_decays for names in attention_names(model))
    require(not has_decays or heads & (heads - 1) == 0, "model.num_heads", heads, accepted)
    accepted = "must be at least 2: readers of MiniMax-Text-01 take one expert for a dense MLP"
    require(model.num_experts > 1, "model.num_experts", model.num_experts, accepted)
    require(R > 0, "model.rotary_dim", R, "must be at least 2: MiniMax-Text-01 has no model without rotary embedding")
    accepted = "must be a whole number: vLLM cuts off the rest of it"
    require(base.is_integer(), "model.rope_base", base, accepted)


def _require_number(name: str, value: Any, lowest: float, highest: float) -> None:
    whole = isinstance(lowest, int)
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    kind = "whole number" if whole else "number"
    require(fits, name, value, f"must be a {kind} from {lowest} to {highest}")
    require_within(name, value, lowest, highest)
