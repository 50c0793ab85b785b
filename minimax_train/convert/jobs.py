"""Jobs shared out among processes of this machine, each job to the process that is free first."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from minimax_train.errors import one_line
from minimax_train.fields import Range
from minimax_train.parallel.environment import end_with_parent

Job = TypeVar("Job")
Result = TypeVar("Result")
WORKERS = Range(1, 1024)
_LEAST_BYTES = 64 * 2**20  # worth a process
_BASE_BYTES = 100 * 2**20  # of a process, whatever it works on


def default_workers(total_bytes: int, bytes_per_worker: int) -> int:
    """As many as there are CPU cores for this process, as have their memory in half of what is available, and as have
    something to do.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fit = available_memory() // 2 // (bytes_per_worker + _BASE_BYTES)
    return max(1, min(cores, fit, total_bytes // _LEAST_BYTES))


def available_memory() -> int:
    """Bytes of host memory that programs can still take, page cache that can be dropped included."""
    try:
        with open("/proc/meminfo") as file:
            (kilobytes,) = (line.split()[1] for line in file if line.startswith("MemAvailable:"))
        return int(kilobytes) * 1024
    except (OSError, ValueError):  # not on Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Do the jobs; with one worker, or one job, in this process.

    The processes are forks, so ``work`` and ``jobs`` may be anything. They end with this one, however it ends.

    Args:
        done: told each result, in the order in which jobs end.

    Returns:
        Results (pickled), in the order of the jobs.

    Raises:
        OSError: when a process was killed.
        Exception: what ``work`` raised first. The other jobs are then given up.
    """
    results: dict[int, Result] = {}
    if min(workers, len(jobs)) <= 1:
        for number, job in enumerate(jobs):
            results[number] = work(job)
            done(results[number])
        return [results[number] for number in range(len(jobs))]
    context = multiprocessing.get_context("fork")
    parent, waiting = os.getpid(), iter(range(len(jobs)))
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(min(workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(parent, theirs, work, jobs), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
            ours.send(next(waiting))
        while len(results) < len(jobs):
            for connection in wait(list(processes)):
                assert isinstance(connection, Connection)
                try:
                    number, result, error = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise _killed(processes[connection]) from None
                if error is not None:
                    raise error
                results[number] = result
                done(result)
                if (following := next(waiting, None)) is not None:
                    connection.send(following)
    finally:
        for process in processes.values():
            process.kill()
        for connection, process in processes.items():
            process.join()
            connection.close()
    return [results[number] for number in range(len(jobs))]


def _serve(parent: int, connection: Connection, work: Callable, jobs: Sequence) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is told to the parent, which ends us
    torch.set_num_threads(1)  # a fork has none of the threads of its parent's pool
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number = connection.recv()
            try:
                told = (number, work(jobs[number]), None)
            except Exception as error:
                told = (number, None, _portable(error))
            connection.send(told)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(one_line(error))
    return error


def _killed(process: Any) -> OSError:
    process.join()
    name = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit status {process.exitcode}"
    return OSError(f"a process that converts ended ({name}): out of memory? fewer at a time: --workers")
