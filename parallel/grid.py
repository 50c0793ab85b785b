"""The grid of processes. Every process group of a run is made here and passed to whoever communicates.

The same ranks are laid out twice, each time with the last axis fastest:

    dense    pp x dp x cp x tp       attention, embedding, norms, head
    expert   epp x edp x ep x etp    the experts

so that the sizes of one side do not bind those of the other, but for pp and epp, the pipeline stages, which are the
same: two groups of the same ranks, so that activations and gradients need not wait for each other. All other axes lie
within a stage. With 8 ranks, tp=2, cp=2, ep=4, and one stage:

    rank     0  1  2  3  4  5  6  7
    dp       0  0  0  0  1  1  1  1       packed sequences are split over dp, their tokens over cp, then tp
    cp       0  0  1  1  0  0  1  1
    tp       0  1  0  1  0  1  0  1
    edp      0  0  0  0  1  1  1  1       gradients of an expert's weights are summed over edp
    ep       0  1  2  3  0  1  2  3       experts are split over ep, each expert's hidden size over etp
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from math import isqrt, prod
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from minimax_train.parallel.communicator import transfer_options

DENSE, EXPERT = ("pp", "dp", "cp", "tp"), ("epp", "edp", "ep", "etp")
# Axes taken together: the ranks that hold the same part of a dense parameter that tp splits, the ranks that share
# packed sequences, and the ranks that hold the same dense parameter where no axis splits it.
JOINED = {"dp_cp": ("dp", "cp"), "cp_tp": ("cp", "tp"), "dp_cp_tp": ("dp", "cp", "tp")}
# Likewise over all stages: the ranks that work on the same packed sequences, and all of the run, for sums of a whole
# model. With one stage they are those of cp_tp and dp_cp_tp.
SAME_SEQUENCES, WORLD = "pp_cp_tp", "world"
OVER_STAGES = {SAME_SEQUENCES: ("pp", "cp", "tp"), WORLD: DENSE}
# SMs that an expert layer's transfer may hold where it runs beside GEMMs, which get the others.
EXPERT_TRANSFER_CTAS = 16


@dataclass(frozen=True, eq=False)
class ProcessGrid:
    """The ranks of a run on named axes: those of ``DENSE`` and ``EXPERT``, and those that join several of these.

    Every rank of a stage holds tokens of its own: packed sequences are split over dp, their tokens over cp and then
    tp. So the gradient of a parameter that no axis splits is summed over ``dp_cp_tp``, of one that tp splits over
    ``dp_cp``, and of experts over ``edp``.
    """

    dense: DeviceMesh
    expert: DeviceMesh
    joined: dict[str, DeviceMesh]
    timeout: timedelta

    @classmethod
    def create(
        cls,
        device_type: str,
        timeout: timedelta,
        *,
        pp: int = 1,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
        etp: int = 1,
        token_groups: int = 1,
    ) -> ProcessGrid:
        """Lay the default process group out as a grid; all ranks together.

        Args:
            timeout: a collective of any group that takes longer ends the process with an error.
            token_groups: in how many groups tokens go through the experts. With one, most of the experts' transfers run
                beside no GEMM or a short one, and may hold as many SMs as NCCL likes.

        Raises:
            ValueError: when ``pp * cp * tp`` or ``pp * ep * etp`` does not divide the number of processes.
        """
        world_size = dist.get_world_size()
        check_sizes(world_size, pp=pp, cp=cp, tp=tp, ep=ep, etp=etp)
        # Groups of their own: one that all ranks are in would otherwise be the default group, and take turns with data
        # parallelism, whose transfers of all weights are started at once.
        is_nccl = _is_nccl(device_type)
        dense_options: dict[int | str, Any] = {axis: transfer_options() for axis in ("pp", "cp", "tp") if is_nccl}
        ctas = {"epp": None} | dict.fromkeys(("ep", "etp"), EXPERT_TRANSFER_CTAS if token_groups > 1 else None)
        expert_options: dict[int | str, Any] = {axis: transfer_options(n) for axis, n in ctas.items() if is_nccl}
        sizes = (pp, world_size // (pp * cp * tp), cp, tp)
        dense = init_device_mesh(device_type, sizes, mesh_dim_names=DENSE, backend_override=dense_options)
        sizes = (pp, world_size // (pp * ep * etp), ep, etp)
        expert = init_device_mesh(device_type, sizes, mesh_dim_names=EXPERT, backend_override=expert_options)
        own = {"cp_tp": transfer_options()} if is_nccl else {}
        joined = {name: dense[axes]._flatten(name, backend_override=own.get(name)) for name, axes in JOINED.items()}
        if pp > 1:
            joined |= {name: dense[axes]._flatten(name) for name, axes in OVER_STAGES.items()}
        else:
            joined |= {SAME_SEQUENCES: joined["cp_tp"], WORLD: joined["dp_cp_tp"]}
        grid = cls(dense, expert, joined, timeout)
        # Groups made out of the default one do not take its timeout over.
        for axis in (*DENSE, *EXPERT, *joined):
            _set_pg_timeout(timeout, grid.group(axis))
        return grid

    @property
    def device_type(self) -> str:
        return self.dense.device_type

    def mesh(self, *axes: str) -> DeviceMesh:
        """The ranks that differ from this one on the given axes: several of one side, or one that joins some."""
        if axes[0] in self.joined:
            return self.joined[axes[0]]
        return (self.dense if axes[0] in DENSE else self.expert)[axes]

    def blocks(self, axis: str, size: int) -> DeviceMesh:
        """The ranks of an axis in two dimensions: blocks of so many neighbours, and the place within a block. It makes
        process groups: all ranks together."""
        mesh = self.mesh(axis)
        mesh = mesh._unflatten(0, (mesh.size() // size, size), (f"{axis}_blocks", f"{axis}_in_block"))
        for dim in range(2):
            _set_pg_timeout(self.timeout, mesh.get_group(dim))
        return mesh

    def layout(self, *axes: str, factors: tuple[int, ...] = ()) -> DeviceMesh:
        """The ranks that differ from this one on the given axes, those of one side or joined ones, in that order: where
        parts of a tensor lie. It has no process group.

        Args:
            factors: if given, the last axis becomes as many, of these sizes.
        """
        side = self.expert if set(axes) & set(EXPERT) else self.dense
        names = list(EXPERT if side is self.expert else DENSE)
        parts = [JOINED.get(axis, (axis,)) for axis in axes]
        wanted = [name for part in parts for name in part]
        place = [slice(None) if name in wanted else side.get_local_rank(name) for name in names]
        kept = [name for name in names if name in wanted]
        ranks = side.mesh[tuple(place)].permute([kept.index(name) for name in wanted])
        sizes = [prod(side.size(names.index(name)) for name in part) for part in parts]
        if factors:
            sizes, axes = [*sizes[:-1], *factors], (*axes[:-1], *(f"{axes[-1]}_{i}" for i in range(len(factors))))
        return DeviceMesh(self.device_type, ranks.reshape(sizes), mesh_dim_names=axes, _init_backend=False)

    def size(self, axis: str) -> int:
        if axis in self.joined:
            return self.joined[axis].size()
        side, names = (self.dense, DENSE) if axis in DENSE else (self.expert, EXPERT)
        return side.size(names.index(axis))  # a mesh of the axis alone takes a millisecond to make

    def rank(self, axis: str) -> int:
        """Place of this process on an axis."""
        return self.mesh(axis).get_local_rank()

    def group(self, axis: str) -> dist.ProcessGroup:
        return self.mesh(axis).get_group()

    def group_apart(self, axis: str) -> dist.ProcessGroup:
        """Another group of the ranks of an axis, whose transfers do not take turns with those of :meth:`group`. It
        makes it: all ranks together."""
        options = transfer_options() if _is_nccl(self.device_type) else None
        group = self.mesh(axis)._flatten(f"{axis}_apart", backend_override=options).get_group()
        _set_pg_timeout(self.timeout, group)
        return group

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run: console, logs, files written once."""
        return dist.get_rank() == 0


def _is_nccl(device_type: str) -> bool:
    return f"{device_type}:nccl" in dist.get_backend_config()


class AxisSizes(Protocol):
    """What has named axes: a :class:`ProcessGrid`, or the :class:`GridSizes` of one that need not be there."""

    def size(self, axis: str) -> int: ...


@dataclass(frozen=True)
class GridSizes:
    """The sizes of a grid's axes, without processes.

    Raises:
        ValueError: as :func:`check_sizes`.
    """

    world_size: int
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1

    _of: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_sizes(self.world_size, pp=self.pp, cp=self.cp, tp=self.tp, ep=self.ep, etp=self.etp)
        of = {axis: getattr(self, axis) for axis in ("pp", "cp", "tp", "ep", "etp")}
        of |= {"dp": self.world_size // (self.pp * self.cp * self.tp), "epp": self.pp}
        of |= {"edp": self.world_size // (self.pp * self.ep * self.etp)}
        of |= {name: prod(of[axis] for axis in axes) for name, axes in (JOINED | OVER_STAGES).items()}
        object.__setattr__(self, "_of", of)

    def size(self, axis: str) -> int:
        return self._of[axis]


def check_sizes(world_size: int, *, pp: int, cp: int, tp: int, ep: int, etp: int) -> None:
    """Refuse sizes of axes whose product, on either side, does not divide the number of processes.

    Raises:
        ValueError: naming the sizes, and the nearest of each that would do beside the others.
    """
    _check_side(world_size, pp=pp, cp=cp, tp=tp)
    _check_side(world_size, pp=pp, ep=ep, etp=etp)


def _check_side(world_size: int, **sizes: int) -> None:
    product = prod(sizes.values())
    if world_size % product == 0:
        return
    sizes = {axis: size for axis, size in sizes.items() if size > 1}
    given = ", ".join(f"parallel.{axis}={size}" for axis, size in sizes.items())
    together = f"together {product}, " if len(sizes) > 1 else ""
    fixes = []
    for axis, size in sizes.items():
        others = product // size
        if world_size % others == 0:
            fixes.append(f"parallel.{axis} = {nearest_divisors(world_size // others, size)}")
    remedy = f"; {' or '.join(fixes)} would do" if fixes else ""
    raise ValueError(f"{given}: {together}must divide the number of processes, {world_size}{remedy}")


def divisors(number: int) -> list[int]:
    """All divisors in order, 1 and the number included, in the time of its square root."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of a number next to one that is none: ``"2 or 4"``."""
    found = divisors(number)
    below = [d for d in found if d < wanted][-1:]
    above = [d for d in found if d > wanted][:1]
    return " or ".join(map(str, below + above))
