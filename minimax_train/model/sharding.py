"""How parameters are split, as data: which axis of the process grid splits which dimension.

A module that owns parameters says so in ``shardings() -> {relative name: {axis: dimension}}``; a parameter that no
module mentions is whole on every rank. From this follow the DTensor placements, and with them the checkpoint's layout,
initial weights, and the ranks over which gradients are summed. Modules compute with :func:`local` and do not know how
much of a parameter that is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Sharding = Mapping[str, int]


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter or its gradient that is on this rank: all of it, unless an axis of the grid splits it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Linear(nn.Linear):
    """``x @ weight^T`` without bias, of the rows and columns on this rank."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight))


def declared_shardings(model: nn.Module) -> dict[str, Sharding]:
    """Every parameter's sharding by its full name.

    Raises:
        AssertionError: when a module declares one for a parameter that does not exist.
    """
    found: dict[str, Sharding] = {name: {} for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        for name, sharding in getattr(module, "shardings", dict)().items():
            full = f"{prefix}.{name}" if prefix else name
            assert full in found, f"{full}: a sharding for no parameter"
            found[full] = sharding
    return found
