"""The grid of processes. Every process group of a run is made here and passed to whoever communicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, eq=False)
class ProcessGrid:
    """Ranks on a data-parallel axis ``dp`` and a context-parallel axis ``cp``, the latter fastest.

    Ranks with the same place on ``dp`` share their rows; ranks with different places train on different rows.
    Parameters are sharded, and gradients summed, over both: ``dp_cp``.
    """

    mesh: DeviceMesh
    dp_cp_mesh: DeviceMesh

    @classmethod
    def create(cls, device_type: str, *, cp: int = 1) -> ProcessGrid:
        """Lay the default process group out as a grid.

        Raises:
            ValueError: when ``cp`` does not divide the number of processes.
        """
        world_size = dist.get_world_size()
        if world_size % cp:
            raise ValueError(f"parallel.cp={cp}: must divide the number of processes, {world_size}")
        mesh = init_device_mesh(device_type, (world_size // cp, cp), mesh_dim_names=("dp", "cp"))
        return cls(mesh, mesh._flatten("dp_cp"))

    @property
    def device_type(self) -> str:
        return self.mesh.device_type

    @property
    def dp_size(self) -> int:
        return self.mesh["dp"].size()

    @property
    def dp_rank(self) -> int:
        return self.mesh.get_local_rank("dp")

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group("dp")

    @property
    def cp_size(self) -> int:
        return self.mesh["cp"].size()

    @property
    def cp_rank(self) -> int:
        return self.mesh.get_local_rank("cp")

    @property
    def cp_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group("cp")

    @property
    def dp_cp_group(self) -> dist.ProcessGroup:
        return self.dp_cp_mesh.get_group()

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run: console, logs, files written once."""
        return dist.get_rank() == 0
