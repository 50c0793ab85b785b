"""How parameters are split, as data: which axis of the process grid splits which dimension.

A module that owns parameters says so in ``shardings() -> {relative name: {axis: dimension}}``; a parameter that no
module mentions is whole on every rank. :class:`ParameterLayout` is what follows from it. Modules compute with
:func:`local` and do not know how much of a parameter that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from minimax_train.kernels.deferral import linear
from minimax_train.parallel.grid import EXPERT, AxisSizes, ProcessGrid

Sharding = Mapping[str, int]
"""Of one parameter: the dimension that each axis of the grid splits, ``{axis: dim}``."""


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter or its gradient that is on this rank: all of it, unless an axis of the grid splits it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Linear(nn.Linear):
    """``x @ weight^T`` without bias, of the rows and columns on this rank."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor] = linear) -> Tensor:
        """
        Args:
            product: of x and the weight; another where ranks make it together, as
                :meth:`minimax_train.parallel.tensor.TensorParallel.project_sum`.
        """
        return product(x, local(self.weight))


Cut = tuple[int, ...]
"""Over how many ranks each of a tensor's leading dimensions is cut, the ranks of the last varying fastest. All but the
last, of several, are cut into single rows, and the last evenly: so a rank's part is one stretch of memory."""


@dataclass(frozen=True)
class ParameterLayout:
    """How one parameter lies over the process grid: the one thing from which an engine's placements, the checkpoint's
    layout, initial weights and the ranks over which gradients are summed are derived.

    Attributes:
        shape: of the whole parameter.
        splits: which axis of the grid splits which dimension, in equal parts; the parameter is whole along every other.
    """

    shape: tuple[int, ...]
    splits: Sharding

    def part(self, grid: AxisSizes) -> tuple[int, ...]:
        """Shape of what a rank holds."""
        shape = list(self.shape)
        for axis, dim in self.splits.items():
            shape[dim] //= grid.size(axis)
        return tuple(shape)

    def wrap(self, grid: ProcessGrid, make: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """The parameter as this rank holds it: a DTensor over the axes that split it, a plain tensor where none does.

        Args:
            make: makes this rank's part, given its shape.
        """
        splits = {axis: dim for axis, dim in self.splits.items() if grid.size(axis) > 1}
        tensor = make(self.part(grid))
        if not splits:
            return tensor
        return self._distributed(tensor, grid.mesh(*splits), [Shard(dim) for dim in splits.values()])

    def cut(self, grid: AxisSizes) -> Cut:
        """How a rank's part is split further over :meth:`replicas`: each has one stretch of its memory.

        Along dimension 0 as ``torch.chunk`` does, the last of more ranks than rows having none; but where every row, as
        an expert, can be split evenly over several ranks, so are they.
        """
        ranks, cut = grid.size(self.replicas(grid)), []
        left = ranks
        for size in self.part(grid):
            if left > size and left % size == 0:
                cut.append(size)
                left //= size
                continue
            if cut and size % left == 0:
                return (*cut, left)
            break
        return (ranks,)

    def piece_shape(self, grid: AxisSizes) -> list[int]:
        """Of one stretch of :meth:`cut`; its first rows where they are not the same number everywhere."""
        part, cut = self.part(grid), self.cut(grid)
        return [-(-size // ranks) for size, ranks in zip(part, (*cut, *[1] * len(part)), strict=False)]

    def shard(self, grid: ProcessGrid, part: Tensor) -> Tensor:
        """What is split further over :meth:`replicas`, as :meth:`cut` says.

        Args:
            part: this rank's.
        """
        axes = [axis for axis in self.splits if grid.size(axis) > 1]
        placements = [Shard(self.splits[axis]) for axis in axes]
        cut: Cut = ()
        if grid.size(replicas := self.replicas(grid)) > 1:
            axes, cut = [*axes, replicas], self.cut(grid)
            placements += [Shard(dim) for dim in range(len(cut))]
        if not axes:
            return part
        return self._distributed(part, grid.layout(*axes, factors=cut), placements)

    def place(self, grid: ProcessGrid) -> slice:
        """Where this rank's stretch of :meth:`cut` lies in its part, laid flat."""
        size, end = math.prod(self.piece_shape(grid)), math.prod(self.part(grid))
        start = min(grid.rank(self.replicas(grid)) * size, end)
        return slice(start, min(start + size, end))

    def shard_flat(self, grid: ProcessGrid, stretch: Tensor) -> Tensor:
        """:meth:`shard` of what lies at :meth:`place`, one axis."""
        return self.shard(grid, stretch.view(-1, *self.piece_shape(grid)[1:]))

    def _distributed(self, part: Tensor, mesh: DeviceMesh, placements: list[Shard]) -> DTensor:
        strides = tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        size = {"shape": torch.Size(self.shape), "stride": strides}
        return DTensor.from_local(part, mesh, placements, run_check=False, **size)

    def replicas(self, grid: AxisSizes) -> str:
        """The axis of the ranks that hold the same part, over which its gradient is summed."""
        axes = [axis for axis in self.splits if grid.size(axis) > 1]
        if any(axis in EXPERT for axis in axes):
            return "edp"
        return "dp_cp" if axes else "dp_cp_tp"


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put another parameter in the place of one, by its full name."""
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, parameter)


def parameter_layouts(model: nn.Module) -> dict[str, ParameterLayout]:
    """Every parameter's layout by its full name.

    Raises:
        AssertionError: when a module declares one for a parameter that does not exist.
    """
    found = {name: ParameterLayout(tuple(parameter.shape), {}) for name, parameter in model.named_parameters()}
    for prefix, module in model.named_modules():
        for name, sharding in getattr(module, "shardings", dict)().items():
            full = f"{prefix}.{name}" if prefix else name
            assert full in found, f"{full}: a sharding for no parameter"
            found[full] = replace(found[full], splits=sharding)
    return found
