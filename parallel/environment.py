"""Which process of a run this is, as torchrun or Slurm tell it, and the default process group."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from minimax_train.parallel.communicator import transfer_options

_PR_SET_PDEATHSIG = 1
_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)
# The first line of a process that a rank starts: signals to all processes of a job or a terminal are the rank's to
# answer, also while the process is still importing.
_IGNORE_SIGNALS = (
    "import signal; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]"
)
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MOST_PROCESSES = 2**20
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
            ValueError: when a launcher set only part of its variables, or one to what it cannot be.
        """
        if "RANK" in environ or "WORLD_SIZE" in environ:
            host = _read(environ, _TORCHRUN, "torchrun")["MASTER_ADDR"]
            if not re.fullmatch(r"[\w.:%-]+", host):
                raise ValueError(f"MASTER_ADDR={host!r}: must be the name or address of a host")
            port = _integer(environ, "MASTER_PORT", 1, 65535)
            host = f"[{host}]" if ":" in host else host
            return cls(*_places(environ, *_TORCHRUN[:3]), f"tcp://{host}:{port}")
        if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:
            node = _first_node(_read(environ, _SLURM, "srun")["SLURM_STEP_NODELIST"])
            # Every task of a step computes the same port; steps that share a node get different ones.
            job, step = (_integer(environ, name, 0, 2**63) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
            return cls(*_places(environ, *_SLURM[:3]), f"tcp://{node}:{20000 + (job * 7 + step) % 20000}")
        return cls()

    def init_process_group(self, device_type: str, timeout: timedelta) -> torch.device:
        """Join the run: NCCL for ``cuda``, gloo for ``cpu``. Returns the device of this process.

        A collective that takes longer than the timeout ends the process with an error.

        Raises:
            ValueError: when this machine has fewer GPUs than processes, or where they are to meet has no address.
            ConnectionError: when the processes have not met within the timeout.
        """
        if device_type == "cuda":
            gpus = torch.cuda.device_count()
            if self.local_rank >= gpus:
                raise ValueError(f"process {self.local_rank} of this machine has no GPU: it has {gpus}; start {gpus}")
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
            # Ranks capture CUDA graphs at different times, as their documents have it: a capture must not exchange
            # anything between them, as NCCL does to register the memory of captured collectives.
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
            options = transfer_options()  # which groups made out of this one take over
            options._timeout = timeout
        else:
            device, options = torch.device("cpu"), None
        if self.init_method and (host := urlsplit(self.init_method).hostname):
            _check_host(host)
        try:
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
                rank=self.rank,
                world_size=self.world_size,
                timeout=timeout,
                device_id=device if device_type == "cuda" else None,
                init_method=self.init_method,
                store=None if self.init_method else dist.HashStore(),
                pg_options=options,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            what = f"the {self.world_size} processes did not meet at {self.init_method}"
            raise ConnectionError(f"{what}: {str(error).splitlines()[0]}") from error
        return device


def start_main(
    module: str, *arguments: object, environ: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen:
    """Run ``main()`` of a module in a Python process of its own, which imports from where this one does and ignores the
    signals that are this one's to answer.

    Args:
        arguments: what follows in ``sys.argv``; last comes the id of this process, for :func:`end_with_parent`.
        environ: variables beside those of this process.
        options: of :class:`subprocess.Popen`.

    Raises:
        OSError: when it cannot be started.
    """
    start = f"{_IGNORE_SIGNALS}; from {module} import main; main()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", start, *map(str, arguments), str(os.getpid())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environ or {})},
        **options,
    )


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when process ``parent``, which started it, ends however it does (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def store_is_the_launchers() -> bool:
    """Whether the processes meet at a store that torchrun holds; else rank 0's process does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def allow_to_be_read() -> None:
    """Let other processes of this user look at this one's memory, as py-spy does, where Yama would allow it to its
    ancestors only (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY)


def share_processors(environ: MutableMapping[str, str] = os.environ) -> None:
    """Give the tokenizer of each process that torchrun started an equal share of this machine's CPU cores.

    A ``RAYON_NUM_THREADS`` that is set stays. srun binds tasks to their CPU cores itself.
    """
    given = environ.get("LOCAL_WORLD_SIZE", "")
    processes = int(given) if given.isdecimal() else 1
    if processes > 1:
        environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def _first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes, where its rank 0 runs: ``gpu[007-012,020],login1`` begins with gpu007."""
    return "".join(re.findall(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)[0])


def _read(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> dict[str, str]:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise ValueError(f"started by {launcher}, but {', '.join(missing)} not set; {launcher} sets {', '.join(names)}")
    return {name: environ[name] for name in names}


def _places(environ: Mapping[str, str], rank: str, world_size: str, local_rank: str) -> tuple[int, int, int]:
    """Rank, world size and local rank."""
    size = _integer(environ, world_size, 1, MOST_PROCESSES)
    among = f", for {world_size}={size}"
    return _integer(environ, rank, 0, size - 1, among), size, _integer(environ, local_rank, 0, size - 1, among)


def _integer(environ: Mapping[str, str], name: str, least: int, greatest: int, among: str = "") -> int:
    value = environ[name].strip()
    if not re.fullmatch(r"[0-9]{1,19}", value) or not least <= int(value) <= greatest:
        raise ValueError(f"{name}={environ[name]!r}: must be an integer between {least} and {greatest}{among}")
    return int(value)


def _check_host(host: str) -> None:
    """Refuse a host that has no address; PyTorch would look for it until its timeout."""
    for attempts_left in (2, 1, 0):
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            if attempts_left and getattr(error, "errno", None) == socket.EAI_AGAIN:
                time.sleep(1)  # the name server is busy, as when many processes start
                continue
            problem = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{host!r}, where the processes are to meet (MASTER_ADDR, or the first node of the Slurm step), "
                f"has no address: {problem}"
            ) from error
