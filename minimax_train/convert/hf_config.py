"""A model's configuration as transformers' MiniMaxConfig, and back.

What one side can say and the other cannot is refused by name, never dropped: the tables say what is accepted.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minimax_train.convert.names import attention_names
from minimax_train.errors import ConfigError, one_line, require
from minimax_train.model import ModelConfig
from minimax_train.model.attention import ATTENTIONS
from minimax_train.model.config import deep_norm_alpha

if TYPE_CHECKING:
    from transformers import MiniMaxConfig

ARCHITECTURE, MODEL_TYPE = "MiniMaxForCausalLM", "minimax"

# Theirs to ours, the same number in both.
SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "intermediate_size": "expert_hidden_size",
    "rms_norm_eps": "norm_eps",
}
ALPHAS = ("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor")
BETAS = ("full_attn_beta_factor", "linear_attn_beta_factor", "mlp_beta_factor")
# What this framework has no counterpart for, and the only values with which nothing is lost.
WITHOUT_COUNTERPART = {
    "hidden_act": ("silu", "swish"),
    "sliding_window": (None,),
    "attention_dropout": (0,),
    "router_jitter_noise": (0,),
    "tie_word_embeddings": (False,),
    "quantization_config": (None,),
    **dict.fromkeys(BETAS, (1,)),
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
FLOAT32_MAX = torch.finfo(torch.float32).max
# The range of every number, ends included; the largest sizes are far above any model's, and no product of them
# overflows an int64.
WHOLE = {
    "vocab_size": (1, 2**31 - 1),
    "hidden_size": (1, 2**20),
    "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "head_dim": (1, 2**14),
    "num_local_experts": (1, 2**14),
    "num_experts_per_tok": (1, 2**14),
    "intermediate_size": (1, 2**24),
    "max_position_embeddings": (1, 2**40),
    "block_size": (1, 2**12),
}
NUMBERS = {
    "rms_norm_eps": (1e-30, 1.0),
    "router_aux_loss_coef": (0.0, 1e6),
    "initializer_range": (0.0, 1e6),
    **dict.fromkeys(ALPHAS, (1e-6, 1e6)),
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Surroundings:
    """What transformers' configuration holds besides the model."""

    max_position_embeddings: int
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def of(cls, hf: MiniMaxConfig) -> Surroundings:
        return cls(**{field.name: getattr(hf, field.name) for field in dataclasses.fields(cls)})


def to_hf_config(model: ModelConfig, surroundings: Surroundings, dtype: torch.dtype) -> MiniMaxConfig:
    """Transformers' configuration of a model of ours.

    Raises:
        ConfigError: when transformers cannot express the model.
    """
    from transformers import MiniMaxConfig

    values: dict[str, Any] = dict.fromkeys(ALPHAS, model.alpha) | dict.fromkeys(BETAS, 1)
    values |= {theirs: getattr(model, ours) for theirs, ours in SAME.items()}
    return MiniMaxConfig(
        **values,
        layer_types=[names.layer_type for names in attention_names(model)],
        rope_parameters=_to_rope(model),
        router_aux_loss_coef=their_aux(model.aux_loss_coefficient, model.num_layers, model.num_experts),
        tie_word_embeddings=False,
        max_position_embeddings=surroundings.max_position_embeddings,
        bos_token_id=surroundings.bos_token_id,
        eos_token_id=surroundings.eos_token_id,
        pad_token_id=surroundings.pad_token_id,
        architectures=[ARCHITECTURE],
        dtype=dtype,
    )


def from_hf_config(raw: dict[str, Any], *, rotary_dim: int | None = None) -> ModelConfig:
    """A model of ours that computes what transformers' does.

    Args:
        raw: the content of a ``config.json``.
        rotary_dim: leading dimensions of each head that the weights were trained to rotate, for a configuration that
            contradicts itself about it; see :func:`_from_rope`.

    Raises:
        ConfigError: naming the field, its value and what is accepted.
    """
    hf = parse(raw)
    for name, accepted in WITHOUT_COUNTERPART.items():
        value = getattr(hf, name, None)
        require(value in accepted, name, value, f"must be {' or '.join(map(str, accepted))}; there is no other here")
    values = {ours: getattr(hf, theirs) for theirs, ours in SAME.items()}
    values["head_dim"] = hf.hidden_size // hf.num_attention_heads if hf.head_dim is None else hf.head_dim
    alphas = {name: getattr(hf, name) for name in ALPHAS}
    for name, value in alphas.items():
        require(value == alphas[ALPHAS[0]], name, value, f"must equal {ALPHAS[0]}={alphas[ALPHAS[0]]!r}")
    alpha = float(alphas[ALPHAS[0]])
    layers, experts = hf.num_hidden_layers, hf.num_local_experts
    rotary_dim, base = _from_rope(hf, values["head_dim"], rotary_dim)
    theta, told = (hf.rope_parameters or {})["rope_theta"], raw.get("rope_theta")  # transformers takes the first
    require(told in (None, theta), "rope_theta", told, f"contradicts rope_parameters.rope_theta={theta}")
    try:
        return ModelConfig(
            **values,
            layer_pattern=_pattern(hf),
            rotary_dim=rotary_dim,
            rope_base=base,
            residual_scale=None if alpha == deep_norm_alpha(layers) else alpha,
            aux_loss_coefficient=our_aux(hf.router_aux_loss_coef, layers, experts),
        )
    except ConfigError as error:
        raise in_their_names(error, SAME) from error


def in_their_names(error: ConfigError, theirs_to_ours: dict[str, str]) -> ConfigError:
    """What is wrong with a model, in the names of ``config.json``."""
    names = {ours: theirs for theirs, ours in theirs_to_ours.items()}
    return ConfigError(re.sub(r"\bmodel\.(\w+)", lambda match: names.get(match[1], match[0]), str(error)))


def parse(raw: dict[str, Any]) -> MiniMaxConfig:
    """A ``config.json`` as transformers reads it, defaults filled in.

    Raises:
        ConfigError: when it is another kind of model's, transformers refuses it, or a number is out of its range.
    """
    from transformers import MiniMaxConfig

    require(raw.get("model_type") == MODEL_TYPE, "model_type", raw.get("model_type"), f"must be {MODEL_TYPE!r}")
    for name in ("num_hidden_layers", "num_labels"):  # before transformers makes lists as long
        if isinstance(raw.get(name), int):
            require_within(name, raw[name], *WHOLE["num_hidden_layers"])
    for name in ("dtype", "torch_dtype"):  # what else transformers does not check
        value = raw.get(name)
        known = isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
        require(value is None or known, name, value, "must be the name of a dtype, or left out")
    require(
        isinstance(raw.get("auto_map", {}), dict), "auto_map", raw.get("auto_map"), "must be an object, or left out"
    )
    experts = raw.get("num_local_experts")
    same = experts is None or raw.get("num_experts", experts) == experts
    require(same, "num_experts", raw.get("num_experts"), f"contradicts num_local_experts={experts!r}")
    try:
        hf = MiniMaxConfig.from_dict(copy.deepcopy(raw))  # a copy, for it changes what it is given
    except Exception as error:  # it checks types, and raises whatever comes of those that it does not check
        raise ConfigError(f"transformers refuses it: {one_line(error)}") from error
    for name, ends in (WHOLE | NUMBERS).items():
        if getattr(hf, name) is not None:
            require_within(name, getattr(hf, name), *ends)
    for name in TOKEN_IDS:
        require_token_ids(name, getattr(hf, name), hf.vocab_size)
    return hf


def require_within(name: str, value: Any, lowest: float, highest: float) -> None:
    """Refuse a number outside a range, ends included: a whole number where the ends are."""
    kind = "whole number" if isinstance(lowest, int) else "number"
    require(lowest <= value <= highest, name, value, f"must be a {kind} from {lowest} to {highest}")


def require_token_ids(name: str, value: int | list[int] | None, vocab_size: int) -> None:
    """Refuse ids that are not of the vocabulary; null is accepted."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    fits = all(0 <= i < vocab_size for i in ids) and value != []
    require(fits, name, value, f"must be null, or an id from 0 to {vocab_size - 1}: vocab_size is {vocab_size}")


def _pattern(hf: MiniMaxConfig) -> str:
    """``layer_types`` as ``model.layer_pattern``."""
    layers = hf.num_hidden_layers
    kinds = {kind.hugging_face.layer_type: letter for letter, kind in ATTENTIONS.items() if kind.hugging_face}
    names = hf.layer_types or ()
    for name in names:
        require(name in kinds, "layer_types", name, f"must be one of {', '.join(kinds)}")
    letters = "".join(kinds[name] for name in names)
    require(len(letters) == layers, "layer_types", hf.layer_types, f"must name num_hidden_layers={layers} layers")
    return shortest_pattern(letters)


def shortest_pattern(letters: str) -> str:
    """The shortest text whose repetition is ``letters``."""
    layers = len(letters)
    lengths = [length for length in range(1, layers + 1) if layers % length == 0]
    return next(letters[:length] for length in lengths if letters[:length] * (layers // length) == letters)


# Rotary position embedding. Transformers rotates the whole head under rope_type "default", whatever
# partial_rotary_factor says. Its "proportional" type rotates a part, with frequencies theta^(-2i / K) where ours are
# base^(-2i / R): so theta = base^(K / R), and the rows of queries and keys are permuted (names.rotary_row_order).


def _to_rope(model: ModelConfig) -> dict[str, Any]:
    R, K = model.rotary_dim, model.head_dim
    require(K % 2 == 0, "model.head_dim", K, "must be even: transformers pairs the two halves of a head")
    if R == K:
        return {"rope_type": "default", "rope_theta": model.rope_base}
    theta = _theta(model.rope_base, R, K)
    accepted = (
        f"transformers would need rope_theta={model.rope_base}^({K}/{R}), which does not fit in float32; "
        f"model.rope_base can be at most about {FLOAT32_MAX ** (R / K):.4g} with it"
    )
    require(theta <= FLOAT32_MAX, "model.rotary_dim", R, accepted)
    return {"rope_type": "proportional", "partial_rotary_factor": _fraction(R, K), "rope_theta": theta}


def _from_rope(hf: MiniMaxConfig, head_dim: int, rotary_dim: int | None) -> tuple[int, float]:
    """Rotary dimensions and base.

    ``rotary_dim`` beside rope_type "default", as in configurations derived from the original MiniMax-Text-01, is
    refused: transformers ignores it and rotates the whole head, but the weights may have been trained otherwise.
    Whoever knows says so.
    """
    rope: dict[str, Any] = dict(hf.rope_parameters or {})
    unknown = [key for key in rope if key not in ROPE_KEYS]
    require(not unknown, "rope_parameters", rope, f"{', '.join(unknown)} not known here: accepted {sorted(ROPE_KEYS)}")
    factor = rope.get("factor", 1)
    require(_is_number(factor) and factor == 1, "rope_parameters.factor", factor, "must be 1, or left out")
    _require_rope_number(rope, "rope_theta", 1.0, FLOAT32_MAX)
    if "partial_rotary_factor" in rope:
        _require_rope_number(rope, "partial_rotary_factor", 0.0, 1.0)
    kind, theta, part = rope["rope_type"], float(rope["rope_theta"]), rope.get("partial_rotary_factor", 1.0)
    accepted = "must be 'default' or 'proportional'"
    require(kind in ("default", "proportional"), "rope_parameters.rope_type", kind, accepted)
    if kind == "proportional":
        accepted = "only for rope_type 'default'; 'proportional' is explicit"
        require(rotary_dim is None, "--rotary-dim", rotary_dim, accepted)
        # int() of it, as transformers has it.
        rotary_dim = 2 * int(part * head_dim // 2)
        if rotary_dim == 0:
            return 0, theta
        guess = theta ** (rotary_dim / head_dim)
        return rotary_dim, _invert(theta, guess, lambda base: _theta(base, rotary_dim, head_dim))
    if rotary_dim is not None:
        fits = rotary_dim % 2 == 0 and 0 <= rotary_dim <= head_dim
        require(fits, "--rotary-dim", rotary_dim, f"must be even and between 0 and head_dim={head_dim}")
        return rotary_dim, theta
    told = {
        "rope_parameters.partial_rotary_factor": (part, 1),
        "rotary_dim": (getattr(hf, "rotary_dim", None), head_dim),
    }
    accepted = (
        f"contradicts rope_type 'default', with which transformers rotates all {head_dim} dimensions; pass "
        f"--rotary-dim with the number the weights were trained with ({head_dim} to do as transformers does)"
    )
    for key, (value, whole) in told.items():
        require(value in (None, whole), key, value, accepted)
    return head_dim, theta


def _require_rope_number(rope: dict[str, Any], key: str, lowest: float, highest: float) -> None:
    value = rope.get(key)  # transformers checks no type here
    require(_is_number(value), f"rope_parameters.{key}", value, "must be a number")
    highest = min(highest, 2**63 - 1) if isinstance(value, int) else highest  # torch's for a whole number
    require_within(f"rope_parameters.{key}", value, lowest, highest)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _theta(base: float, rotary_dim: int, head_dim: int) -> float:
    if rotary_dim == 0:
        return base
    try:
        return base ** (head_dim / rotary_dim)
    except OverflowError:
        return float("inf")


def _fraction(rotary_dim: int, head_dim: int) -> float:
    """R / K, such that transformers' ``int(fraction * K // 2)`` is R / 2 in spite of rounding."""
    fraction = rotary_dim / head_dim
    return fraction if int(fraction * head_dim // 2) == rotary_dim // 2 else (rotary_dim + 0.5) / head_dim


def their_aux(coefficient: float, num_layers: int, num_experts: int) -> float:
    """Ours is the sum over layers of ``1/E sum_i f_i m_i``; theirs ``E sum_i f_i m_i`` with f and m averaged over
    layers. The same objective for one layer, or for layers that route alike."""
    return coefficient * num_layers / num_experts**2


def our_aux(coefficient: float, num_layers: int, num_experts: int) -> float:
    guess = coefficient * num_experts**2 / num_layers
    return _invert(coefficient, guess, lambda ours: their_aux(ours, num_layers, num_experts))


def _invert(value: float, guess: float, forward: Callable[[float], float]) -> float:
    """The shortest decimal at the guess that ``forward`` takes to the value exactly, or else a float beside the guess
    that it does; the guess where there is none."""
    decimals = (float(f"{guess:.{digits}g}") for digits in range(1, 18))
    return next((x for x in itertools.chain(decimals, _beside(guess)) if forward(x) == value), guess)


def _beside(x: float) -> Iterator[float]:
    """The 64 floats below and above, nearest first: as far as rounding an exponent K / R can take a base."""
    below = above = x
    for _ in range(64):
        below, above = math.nextafter(below, -math.inf), math.nextafter(above, math.inf)
        yield from (below, above)
