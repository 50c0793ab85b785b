"""Run a function on several ranks, each a process of its own, and collect what they return."""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from minimax_train.parallel.environment import ProcessEnvironment
from minimax_train.parallel.grid import ProcessGrid

TIMEOUT = timedelta(seconds=150)
# How ranks use GPUs: four share one over gloo, their transfers staged through the host; over NCCL two have one each.
GPU_LINKS = [
    "gloo",
    pytest.param("nccl", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")),
]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    timeout_s: float = 180,
    start: str = "fork",
    device: str = "cpu",
    **grid: int,
) -> list[Any]:
    """``function(grid, *arguments)`` on each rank; returns each rank's result. ``grid``: sizes of its axes.

    The function must be defined at the top of a test module. A rank that raises fails the test with its traceback; one
    that hangs fails it after the timeout. Ranks speak over gloo, or with ``device="cuda"`` over NCCL, on a GPU each.
    Those that use a GPU must ``start`` by ``spawn``: CUDA does not survive a fork.
    """
    name = (function.__code__.co_filename, function.__name__)
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context(start)
        processes = [
            context.Process(
                target=_rank,
                args=(function if start == "fork" else name, rank, world_size, device, grid, folder, arguments),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        started = last = time.monotonic()
        pause = 0.0
        while (running := [p.sentinel for p in processes if p.is_alive()]) and last - started < timeout_s:
            connection.wait(running, timeout=1)
            pause, last = max(pause, time.monotonic() - last), time.monotonic()
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        if hanging or (errors and last - started > TIMEOUT.total_seconds()):
            # Where every rank was, and whether none of them could run: a machine that is paused for longer than the
            # timeout fails collectives that nothing is wrong with.
            errors += [f"{path.name}:\n{path.read_text()}" for path in sorted(Path(folder).glob("stacks-*"))]
            errors.append(
                f"ranks {hanging} still ran after {last - started:.0f} s; longest pause of this process: {pause:.0f} s"
            )
        assert not errors, "\n".join(errors)
        assert not any(codes), f"ranks ended with exit codes {codes}; a signal's is negative"
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=False) for rank in range(world_size)]


def run_gpu_ranks(function: Callable[..., Any], link: str, *arguments: Any) -> list[Any]:
    """:func:`run_ranks` with GPUs, whose current device is each rank's; ``link``: one of ``GPU_LINKS``."""
    world_size, device = {"gloo": (4, "cpu"), "nccl": (2, "cuda")}[link]
    return run_ranks(function, world_size, *arguments, start="spawn", device=device)


def _load(path: str, name: str) -> Callable[..., Any]:
    """A function of a test module, which has no name that a spawned process could import."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _rank(
    function: Callable[..., Any] | tuple[str, str],
    rank: int,
    world_size: int,
    device: str,
    grid: dict[str, int],
    folder: str,
    arguments: tuple,
) -> None:
    try:
        faulthandler.enable()
        stacks = open(Path(folder) / f"stacks-{rank}", "w")  # noqa: SIM115
        faulthandler.dump_traceback_later(TIMEOUT.total_seconds() - 10, file=stacks)
        torch.set_num_threads(1)
        if isinstance(function, tuple):
            function = _load(*function)
        environment = ProcessEnvironment(rank, world_size, rank, f"file://{folder}/store")
        environment.init_process_group(device, TIMEOUT)
        result = function(ProcessGrid.create(device, TIMEOUT, **grid), *arguments)
        torch.save(result, Path(folder) / f"result-{rank}")
        gc.collect()  # NCCL's communicators wait for the CUDA graphs that were captured with them
        torch.distributed.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
