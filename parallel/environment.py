"""Which process of a run this is, as torchrun or Slurm tell it, and the default process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_LAUNCH_NODE_IPADDR")


@dataclass(frozen=True)
class ProcessEnvironment:
    """One process of a run.

    Attributes:
        rank, world_size: place among all processes.
        local_rank: place among the processes of this node, which is the index of its device.
        init_method: where the processes meet, ``tcp://host:port``; None for a process on its own.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    init_method: str | None = None

    @classmethod
    def detect(cls, environ: Mapping[str, str] = os.environ) -> ProcessEnvironment:
        """Read torchrun's variables, else those of an srun task, else be a run of one process.

        Raises:
            ValueError: when a launcher set only part of its variables.
        """
        if "RANK" in environ or "WORLD_SIZE" in environ:
            rank, world_size, local_rank, host, port = _read(environ, _TORCHRUN, "torchrun")
            return cls(int(rank), int(world_size), int(local_rank), f"tcp://{host}:{port}")
        if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
            rank, world_size, local_rank, job, host = _read(environ, _SLURM, "srun")
            # Every task of a job computes the same port; jobs sharing a node get different ones.
            port = 20000 + int(job) % 20000
            return cls(int(rank), int(world_size), int(local_rank), f"tcp://{host}:{port}")
        return cls()

    def init_process_group(self, device_type: str, timeout: timedelta) -> torch.device:
        """Join the run: NCCL for ``cuda``, gloo for ``cpu``. Returns the device of this process.

        A collective that takes longer than the timeout ends the process with an error.
        """
        if device_type == "cuda":
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        meeting = {"init_method": self.init_method} if self.init_method else {"store": dist.HashStore()}
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=device if device_type == "cuda" else None,
            **meeting,
        )
        return device


def _read(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> list[str]:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise ValueError(f"started by {launcher}, but {', '.join(missing)} not set; {launcher} sets {', '.join(names)}")
    return [environ[name] for name in names]
