"""What a machine of a run finds out about itself, without speaking to any other."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minimax_train.checkpoint.staging import available_memory
from minimax_train.config import Config
from minimax_train.data.sources import TRAIN, VALIDATION, open_sources
from minimax_train.errors import ConfigError, one_line, require
from minimax_train.files import replace_text

LIMIT_S = 30.0
"""From the first look to the record, whatever hangs."""
_WRITTEN_BYTES, _COPIED_BYTES = 64 << 20, 256 << 20
_GPU_WIDTH, _GPU_GEMMS = 8192, 200
_CPU_WIDTH, _CPU_GEMMS = 384, 20
_FILES = 64  # of a data source, which are opened
_STA_UNSYNC = 0x40  # of adjtimex(2)


def name_of_node() -> str:
    """As Slurm calls this machine, or the machine itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look(config: Config, folder: Path) -> Path:
    """Look at this machine, and write what is found to ``folder/NODE.json``, within :data:`LIMIT_S`.

    A look that fails is a line in the record's ``problems``. One that hangs is too, and ends the process with status 1.

    Raises:
        ConfigError: when the record cannot be written.
    """
    record: dict[str, Any] = {"node": name_of_node(), "started": _process_started(), "problems": []}
    path, now = folder / f"{record['node']}.json", [""]

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(record, indent=1))

    def give_up() -> None:
        record["problems"].append(f"{now[0]}: no result within {LIMIT_S:g} s")
        write()
        os._exit(1)

    timer = threading.Timer(LIMIT_S, give_up)
    timer.daemon = True
    timer.start()
    for name, part in _PARTS.items():
        now[0] = name
        try:
            record |= part(config)
        except (ConfigError, OSError, RuntimeError, ValueError) as error:
            told = " ".join(str(error).split()) if isinstance(error, ConfigError) else f"{name}: {one_line(error)}"
            record["problems"].append(told)
    timer.cancel()
    try:
        write()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error
    return path


def _clock(config: Config) -> dict[str, Any]:
    """Whether the system's clock follows others', as adjtimex(2) has it; without it as if it did."""
    timex = ctypes.create_string_buffer(512)
    state = getattr(ctypes.CDLL(None), "adjtimex", lambda _: -1)(timex)
    # struct timex: modes, offset, freq, maxerror, esterror, status, of which the first and last are 4 bytes.
    status = ctypes.c_int.from_buffer(timex, 5 * ctypes.sizeof(ctypes.c_long)).value
    return {"clock_synchronised": state < 0 or not status & _STA_UNSYNC}


def _software(config: Config) -> dict[str, Any]:
    nvidia = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\d+(\.\d+)+", nvidia.read_text()) if nvidia.is_file() else None
    return {
        "software": {
            "driver": driver[0] if driver else "none",
            "CUDA": torch.version.cuda or "none",
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if _gpus(config) else "none",
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "minimax_train": importlib.metadata.version("minimax_train"),
        }
    }


def _devices(config: Config) -> dict[str, Any]:
    """GPUs: name, memory in GiB, and how much of it nobody holds; without any, the machine's processor."""
    memory = {"host_memory_gib": available_memory() / 2**30}
    if not _gpus(config):
        require(config.device != "cuda", "device", config.device, "this machine has no GPU")
        return {**memory, "devices": [{"name": f"CPU {platform.machine()}"}]}
    devices = []
    for index in range(_gpus(config)):
        free, total = torch.cuda.mem_get_info(index)
        devices.append(
            {"name": torch.cuda.get_device_name(index), "memory_gib": total / 2**30, "free_gib": free / 2**30}
        )
    return {**memory, "devices": devices}


def _gemms(config: Config) -> dict[str, Any]:
    """TFLOP/s of each device: of GPUs at the same time, as in training, in bfloat16."""
    flops = 2 * _GPU_WIDTH**3
    if not _gpus(config):
        x = torch.ones(_CPU_WIDTH, _CPU_WIDTH)
        return {"gemm_tflops": [2 * _CPU_WIDTH**3 / min(_seconds(lambda: x @ x) for _ in range(_CPU_GEMMS)) / 1e12]}
    timed = []
    for index in range(_gpus(config)):
        with torch.cuda.device(index):
            x = torch.randn(_GPU_WIDTH, _GPU_WIDTH, dtype=torch.bfloat16, device="cuda")
            out = x @ x
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(_GPU_GEMMS):
                torch.mm(x, x, out=out)
            end.record()
            timed.append((begin, end))
    rates = []
    for begin, end in timed:
        end.synchronize()
        rates.append(_GPU_GEMMS * flops / (begin.elapsed_time(end) / 1e3) / 1e12)
    return {"gemm_tflops": rates}


def _links(config: Config) -> dict[str, Any]:
    """GB/s of copies from each GPU to the next and from the host to each, one after the other."""
    gpus, links = _gpus(config), {}
    if not gpus:
        return {"link_gb_per_s": links}
    host = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
    buffers = [torch.empty(_COPIED_BYTES, dtype=torch.uint8, device=f"cuda:{index}") for index in range(gpus)]
    pairs = {f"host to GPU {index}": (host, buffer) for index, buffer in enumerate(buffers)}
    if gpus > 1:
        pairs |= {f"GPU {i} to GPU {(i + 1) % gpus}": (buffers[i], buffers[(i + 1) % gpus]) for i in range(gpus)}

    def copy(source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        for buffer in buffers:
            torch.cuda.synchronize(buffer.device)

    for name, (source, target) in pairs.items():
        links[name] = _COPIED_BYTES / min(_seconds(lambda s=source, t=target: copy(s, t)) for _ in range(4)) / 1e9
    return {"link_gb_per_s": links}


def _disk(config: Config) -> dict[str, Any]:
    """Of ``run_dir``: free bytes, and MB/s at which a file reaches the disk."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    block, path = os.urandom(1 << 20), folder / f".preflight-{name_of_node()}"

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(_WRITTEN_BYTES >> 20):
                if file.write(block) != len(block):
                    raise OSError(f"{path}: no more than {file.tell()} bytes can be written")
            os.fsync(file.fileno())

    try:
        seconds = _seconds(write)
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir!r}: cannot be written: {error}") from error
    finally:
        path.unlink(missing_ok=True)
    return {"disk": {"free_gb": shutil.disk_usage(folder).free / 1e9, "mb_per_s": _WRITTEN_BYTES / seconds / 1e6}}


def _data(config: Config) -> dict[str, Any]:
    """A fingerprint of the list of files, of which some are opened."""
    told = hashlib.sha256()
    for split in (TRAIN, VALIDATION):
        for source in open_sources(config.data, split).values():
            files = source.files[:: -(-len(source.files) // _FILES) or 1]
            dataclasses.replace(source, files=files).digests()
            told.update(source.fingerprint.encode())
    return {"data": told.hexdigest()[:12]}


_PARTS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "clock": _clock,
    "software": _software,
    "devices": _devices,
    "data": _data,
    "run_dir": _disk,
    "links": _links,
    "GEMM": _gemms,
}


def _gpus(config: Config) -> int:
    return 0 if config.device == "cpu" else torch.cuda.device_count()


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _process_started() -> float:
    """Seconds since the epoch by this machine's clock, when this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
