"""Norms of gradient and weights by group of parameters.

Shape legend: G groups of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minimax_train.model import ModelConfig
from minimax_train.model.attention import ATTENTIONS
from minimax_train.model.sharding import local

GROUPS = (
    "embedding",
    *(f"{kind.name}_attention" for kind in ATTENTIONS.values()),
    "router",
    "experts",
    "norms",
    "head",
)


def group_of(name: str, model: ModelConfig) -> str:
    """The group of a parameter: the scales of all normalisations are one, wherever they are.

    Args:
        name: in the whole model, such as ``layers.3.attention.o_proj.weight``.
    """
    parts = name.split(".")
    if any(part.endswith("norm") for part in parts):
        return "norms"
    if parts[0] != "layers":
        return parts[0]
    if parts[2] == "attention":
        return f"{model.attentions[int(parts[1])].name}_attention"
    return "router" if "router" in parts else "experts"


def squares_by_group(tensors: Mapping[str, Tensor], model: ModelConfig, copies: Mapping[str, int]) -> Tensor:
    """Sums of squares of this rank's shards, float64 ``[G]`` on their device; all ranks' add up to the model's.

    Args:
        tensors: weights or gradients by parameter name.
        copies: how many ranks have the same shard, where that is not one.
    """
    names: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in tensors:
        names[group_of(name, model)].append(name)
    ordered = [name for group in names.values() for name in group]
    norms = torch._foreach_norm([local(tensors[name]) for name in ordered])
    norms = torch._foreach_div(norms, [copies.get(name, 1) ** 0.5 for name in ordered])
    squares = torch.stack(norms).double().square()
    # No index is sent to the device: the host would wait for it.
    return torch.stack([part.sum() for part in squares.split([len(group) for group in names.values()])])


def norm_metrics(norms_2G: Tensor) -> dict[str, float]:
    """``grad_norm/GROUP`` and ``weight_norm/GROUP`` of the groups that the model has.

    Args:
        norms_2G: of gradient and weights, on the host.
    """
    metrics = {}
    for kind, values in zip(("grad_norm", "weight_norm"), norms_2G.tolist(), strict=True):
        metrics |= {f"{kind}/{group}": v for group, v, w in zip(GROUPS, values, norms_2G[1], strict=True) if w > 0}
    return metrics
