"""The memory of ``engine=zero1``: weights and gradients whole, states of the optimizer sharded, all of a kind in one
tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from minimax_train.model.sharding import Cut
from minimax_train.parallel.communicator import GroupCommunicator

ALIGNMENT = 64  # of a parameter, in elements: GEMMs and TMA want 16 bytes, memory 128


class ParameterShards:
    """Parameters that the same ranks hold and that decay, or do not: one tensor of each kind, cut by parameter.

    Args:
        shapes, cuts: of each parameter, and how it is cut over the ranks.

    Attributes:
        weights, gradients: of all ranks, every rank's stretch after one another for each parameter. The dtype of
            compute, and of the master weights.
        master, exp_avg, exp_avg_sq: this rank's shards.
        gradient_shards: this rank's shards of the summed gradients.
        weight_shards: those of the weights, where AdamW writes them.
    """

    def __init__(
        self, shapes: dict[str, torch.Size], cuts: dict[str, Cut], ranks: GroupCommunicator, device: torch.device,
        compute: torch.dtype, moments: torch.dtype,
    ) -> None:  # fmt: skip
        self.shapes, self.ranks, self._cuts = shapes, ranks, cuts
        master, n = torch.promote_types(compute, torch.float32), ranks.size
        sizes = {name: prod(shard_shape(shape, cuts[name])) for name, shape in shapes.items()}
        self._parts, total = _places(sizes)
        self._wholes, whole_total = _places({name: n * size for name, size in sizes.items()})

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self.weights, self.gradients = zeros(whole_total, compute), zeros(whole_total, master)
        self.weight_shards = self.weights if n == 1 else zeros(total, compute)
        self.gradient_shards = self.gradients if n == 1 else zeros(total, master)
        self.master = self.weight_shards if compute == master else zeros(total, master)
        moments = master if moments == torch.float32 else moments
        self.exp_avg, self.exp_avg_sq = zeros(total, moments), zeros(total, moments)

    def whole(self, x: Tensor) -> dict[str, Tensor]:
        """By name, as this rank's part of the model has it: views of ``weights`` or ``gradients``."""
        return {name: x[self._wholes[name]].view(-1, *shape[1:])[: shape[0]] for name, shape in self.shapes.items()}

    def shards(self, x: Tensor) -> dict[str, Tensor]:
        """By name, this rank's rows: views of one of the other tensors."""
        found = {}
        for name, shape in self.shapes.items():
            rows, *others = shard_shape(shape, self._cuts[name])
            start = self.ranks.rank * rows if len(self._cuts[name]) == 1 else 0
            found[name] = x[self._parts[name]].view(rows, *others)[: max(0, min(rows, shape[0] - start))]
        return found

    def gradient(self, name: str) -> tuple[Tensor, Tensor]:
        """Of a parameter, all ranks' stretches and this rank's shard of the sum."""
        return self.gradients[self._wholes[name]], self.gradient_shards[self._parts[name]]

    def weight(self, name: str) -> tuple[Tensor, Tensor]:
        """Of a parameter, all ranks' stretches and this rank's shard."""
        return self.weights[self._wholes[name]], self.weight_shards[self._parts[name]]

    def round_master(self) -> None:
        """This rank's shards of the weights of compute, from the master weights."""
        if self.master is not self.weight_shards:
            self.weight_shards.copy_(self.master)


def shard_shape(shape: Sequence[int], cut: Cut) -> list[int]:
    """Of a rank's shard; its first rows where they are not the same number everywhere."""
    return [-(-size // ranks) for size, ranks in zip(shape, (*cut, *[1] * len(shape)), strict=False)]


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _places(sizes: dict[str, int]) -> tuple[dict[str, slice], int]:
    """Where pieces of these sizes lie one after the other, each on an aligned address, and where the last ends."""
    room = [aligned(size) for size in sizes.values()]
    *starts, total = accumulate(room, initial=0)
    places = {name: slice(start, start + size) for start, (name, size) in zip(starts, sizes.items(), strict=True)}
    return places, total
