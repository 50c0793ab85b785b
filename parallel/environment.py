"""Which process of a run this is, as torchrun or Slurm tell it, and the default process group."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST")


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
            rank, world_size, local_rank, job, step, nodes = _read(environ, _SLURM, "srun")
            # Every task of a step computes the same port; steps that share a node get different ones.
            port = 20000 + (int(job) * 7 + int(step)) % 20000
            return cls(int(rank), int(world_size), int(local_rank), f"tcp://{_first_node(nodes)}:{port}")
        return cls()

    def init_process_group(self, device_type: str, timeout: timedelta) -> torch.device:
        """Join the run: NCCL for ``cuda``, gloo for ``cpu``. Returns the device of this process.

        A collective that takes longer than the timeout ends the process with an error.

        Raises:
            ValueError: when this machine has fewer GPUs than processes.
        """
        if device_type == "cuda":
            gpus = torch.cuda.device_count()
            if self.local_rank >= gpus:
                raise ValueError(f"process {self.local_rank} of this machine has no GPU: it has {gpus}; start {gpus}")
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=device if device_type == "cuda" else None,
            init_method=self.init_method,
            store=None if self.init_method else dist.HashStore(),
        )
        return device


def share_processors(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give the tokenizer of each process that torchrun started an equal share of this machine's CPU cores.

    A ``RAYON_NUM_THREADS`` that is set stays. srun binds tasks to their CPU cores itself.
    """
    processes = int(environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1:
        environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def _first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes, where its rank 0 runs: ``gpu[007-012,020],login1`` begins with gpu007."""
    return "".join(re.findall(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)[0])


def _read(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> list[str]:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise ValueError(f"started by {launcher}, but {', '.join(missing)} not set; {launcher} sets {', '.join(names)}")
    return [environ[name] for name in names]
