"""The grid of processes. Every process group of a run is made here and passed to whoever communicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, eq=False)
class ProcessGrid:
    """All ranks on one data-parallel axis, ``dp``."""

    mesh: DeviceMesh

    @classmethod
    def create(cls, device_type: str) -> ProcessGrid:
        """Lay the default process group out as a grid."""
        return cls(init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("dp",)))

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
    def is_first(self) -> bool:
        """Whether this rank speaks for the run: console, logs, files written once."""
        return self.mesh.get_rank() == 0
