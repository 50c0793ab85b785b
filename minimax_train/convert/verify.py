"""Both sides of a conversion loaded in turn, and their logits of the same tokens compared.

T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimax_train.convert.jobs import available_memory
from minimax_train.convert.names import Chunk, Parameter
from minimax_train.documents import Documents
from minimax_train.errors import require
from minimax_train.model import HybridModel, ModelConfig
from minimax_train.model.config import count_parameters

LENGTHS = (83, 45)  # tokens of the two documents
# Of the largest logit, by the dtype in which a folder keeps decays. Both sides compute in float32 with the same
# weights, so only decays that were rounded to fewer bits may make a difference beyond float32's own.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_OVERHEAD = 1.25  # of weights in float32: what transformers holds while it loads them, and activations


def require_memory(model: ModelConfig, device: str) -> None:
    """Refuse a device that is not there, or a model that does not fit in its memory.

    Raises:
        ConfigError: with what is needed and what is there.
    """
    accepted = "must be cpu, cuda or cuda:N, and there"
    there = device == "cpu" or (device.partition(":")[0] == "cuda" and torch.cuda.is_available())
    require(there, "--device", device, accepted)
    needed = int(4 * count_parameters(model).total * _OVERHEAD)
    free = available_memory() if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    accepted = f"--verify takes {needed / 1e9:.3f} GB for one side in float32; {free / 1e9:.3f} GB are free"
    require(needed <= free, "--device", device, accepted)


def compare(
    ours_TV: Tensor, theirs_TV: Tensor, decay_dtype: torch.dtype, theirs: str, report: Callable[[str], None]
) -> bool:
    """Report the largest difference of logits, float32. Returns whether it is within the tolerance."""
    difference, largest = float((ours_TV - theirs_TV).abs().max()), float(ours_TV.abs().max())
    tolerance = TOLERANCES[decay_dtype] * largest
    within = difference <= tolerance  # not so for NaN
    told = (
        f"largest difference of logits to {theirs}: {difference:.3g} ({len(ours_TV)} tokens, largest logit "
        f"{largest:.3g}, tolerance {tolerance:.3g})"
    )
    report(f"verified: {told}" if within else f"error: not the same model: {told}")
    return within


@torch.no_grad()
def our_logits(
    model: ModelConfig,
    parameters: list[Parameter],
    read: Callable[[Parameter, Chunk], Tensor],
    dtype: torch.dtype | None,
    device: str,
) -> Tensor:
    """Logits of this framework's model, float32 ``[T, V]`` on the host.

    Args:
        read: a chunk of a parameter.
        dtype: what the weights are rounded to first.
    """
    # Tokens beyond an expert's capacity are dropped in training alone; no other reader does.
    net = HybridModel(dataclasses.replace(model, capacity_factor=None)).to(device).eval()
    own = dict(net.named_parameters())
    for parameter in parameters:
        for chunk in parameter.chunks:
            values = read(parameter, chunk)
            own[parameter.name][chunk.start : chunk.start + chunk.length] = values.to(dtype or values.dtype)
    logits_TV = net(_tokens(model).to(device), Documents.from_lengths(LENGTHS).to(device))
    return logits_TV.float().cpu()


@torch.no_grad()
def transformers_logits(folder: Path, model: ModelConfig, dtype: torch.dtype | None, device: str) -> Tensor:
    """Logits of transformers' MiniMax, float32 ``[T, V]`` on the host; each document by itself."""
    from transformers import MiniMaxForCausalLM

    gc.collect()  # the other side is done with
    net: Any = MiniMaxForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    net = net.to(device).eval()
    for parameter in net.parameters() if dtype is not None else ():
        parameter.copy_(parameter.to(dtype))
    documents = _tokens(model).to(device).split(LENGTHS)
    return torch.cat([net(tokens_T[None]).logits[0] for tokens_T in documents]).float().cpu()


def _tokens(model: ModelConfig) -> Tensor:
    return torch.randint(model.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
