"""The two layouts in which Hugging Face folders hold these models.

Both have the same tensors under the same names, but for two things. Transformers keeps decays in the files, and pairs
dimension i of a partly rotated head with i + K/2, so the rows of queries and keys are permuted
(:func:`~minimax_train.convert.names.rotary_row_order`). MiniMax-Text-01 keeps no decays, and rotates the first R
dimensions in pairs (i, i + R/2), as this framework does: its rows are ours. Sources: vLLM's ``minimax_text_01.py``
(``MiniMaxText01RotaryEmbedding`` with ``is_neox_style=True``, frequencies ``base^(-2i / R)``; ``load_weights``), and
the release's ``modeling_minimax_text_01.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minimax_train.convert import hf_config, text_01_config
from minimax_train.convert.hf_config import Surroundings
from minimax_train.errors import require
from minimax_train.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Layout:
    """How a folder lays out a model.

    Attributes:
        loading: how to load an export from {}.
        in_transformers: whether transformers has the model: its files hold decays, and its RoPE wants rows permuted.
        read_model: the model that a ``config.json`` describes.
        read_surroundings: what else it holds.
        write: the configuration of a model with weights of a dtype.
        files: what an export has besides.
    """

    loading: str
    in_transformers: bool
    read_model: Callable[[dict[str, Any]], ModelConfig]
    read_surroundings: Callable[[dict[str, Any]], Surroundings]
    write: Callable[[ModelConfig, Surroundings, torch.dtype], PreTrainedConfig]
    files: tuple[Path, ...] = ()


MINIMAX, TEXT_01 = "minimax", "text-01"
LAYOUTS = {
    MINIMAX: Layout(
        loading="load it with MiniMaxForCausalLM.from_pretrained({})",
        in_transformers=True,
        read_model=hf_config.from_hf_config,
        read_surroundings=lambda raw: Surroundings.of(hf_config.parse(raw)),
        write=hf_config.to_hf_config,
    ),
    TEXT_01: Layout(
        loading="load it with vllm.LLM({}, trust_remote_code=True), for the class of its configuration",
        in_transformers=False,
        read_model=text_01_config.from_text_01_config,
        read_surroundings=text_01_config.text_01_surroundings,
        write=text_01_config.to_text_01_config,
        files=(text_01_config.CONFIGURATION_FILE,),
    ),
}


def layout_of(raw: dict[str, Any]) -> Layout:
    """Of the folder with this ``config.json``.

    Raises:
        ConfigError: when it is another model's.
    """
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if model_type == hf_config.MODEL_TYPE:
        return LAYOUTS[MINIMAX]
    original = isinstance(architectures, list) and architectures[:1] in [
        [name] for name in text_01_config.ARCHITECTURES
    ]
    known = " or ".join(map(repr, (hf_config.MODEL_TYPE, *text_01_config.MODEL_TYPES)))
    require(original or model_type in text_01_config.MODEL_TYPES, "model_type", model_type, f"must be {known}")
    return LAYOUTS[TEXT_01]
