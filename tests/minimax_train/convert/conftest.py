"""Small models of both sides, and the comparison of their logits. The reference is transformers itself."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from minimax_train.convert.checkpoint import read_model_config
from minimax_train.documents import Documents
from minimax_train.model import HybridModel, ModelConfig, initialize

VOCABULARY = 97
LENGTHS = (1, 63, 301, 17)  # odd, and longer than transformers' block of 256
SEQUENCE_LENGTH = 700


def model_config(**changes) -> ModelConfig:
    """Heads times head dim (3 x 16... 6 x 16 = 96) is not the hidden size, queries are grouped."""
    return dataclasses.replace(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=40,
            num_layers=2,
            layer_pattern="LS",
            num_heads=6,
            num_kv_heads=2,
            head_dim=16,
            rotary_dim=8,
            rope_base=10000.0,
            num_experts=4,
            experts_per_token=2,
            expert_hidden_size=24,
            aux_loss_coefficient=0.01,
        ),
        **changes,
    )


def random_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> HybridModel:
    """Initial weights, norms included, made random enough that no mistake cancels."""
    model = HybridModel(config)
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def save_checkpoint(model: HybridModel, folder: Path, *, tokenizer: bool = False) -> Path:
    """As the trainer leaves it, without the trainer."""
    folder.mkdir(parents=True)
    # As there is an optimizer in a run's: it must not be in the way.
    save({"model": model.state_dict(), "optimizer": {"step": torch.tensor(3.0)}}, folder)
    values = {"model": dataclasses.asdict(model.config), "data": {"sequence_length": SEQUENCE_LENGTH}, "seed": 0}
    OmegaConf.save(OmegaConf.create(values), folder / "config.yaml")
    if tokenizer:
        save_tokenizer(folder / "tokenizer")
    return folder


def save_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save(tree: dict, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, checkpoint_id=folder, no_dist=True)


def load_ours(folder: Path, *, dtype: torch.dtype = torch.float32) -> HybridModel:
    """A checkpoint as ``checkpoint.initial_weights`` reads it."""
    model = HybridModel(read_model_config(folder / "config.yaml")).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    return model.eval()


def load_theirs(folder: Path, **options) -> MiniMaxForCausalLM:
    """With transformers, which must find neither missing nor unexpected keys."""
    model, info = MiniMaxForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def theirs_config(**changes) -> MiniMaxConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "initializer_range": 0.1,
    }
    return MiniMaxConfig(**(values | changes))


def save_theirs(folder: Path, *, dtype: torch.dtype = torch.float32, **changes) -> MiniMaxForCausalLM:
    """A model made and saved by transformers."""
    torch.manual_seed(3)
    model = MiniMaxForCausalLM(theirs_config(**changes)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def largest_difference(ours: HybridModel, theirs: MiniMaxForCausalLM, lengths: Sequence[int] = LENGTHS) -> float:
    """Of the logits: ours of the documents packed, theirs of each alone."""
    tokens = torch.randint(VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(4))
    packed = ours(tokens, Documents.from_lengths(lengths))
    alone = torch.cat([theirs(part[None]).logits[0] for part in tokens.split(list(lengths))])
    assert packed.std() > 0.1, "logits too alike to compare"
    return float((packed - alone).abs().max())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files in a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only lose by being shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("_")})
