"""Faults struck into runs of two ranks: what each ends with, after how many seconds, and what is printed.

    PYTHONPATH=tests/lib python tests/lib/support/fault_drills.py [--device cuda] [--timeout 20] [--only killed ...]
        [--at-once 9]

Each run is ``minimax-train`` on every rank, started directly with torchrun's variables, so that rank 0 holds the store;
of ``store`` a process of its own does. Exits with 1 if a fault is not told in its time, or not named.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANKS, STEP = 2, 4
_BEATS_S = 1.5  # after which a rank's heartbeat is of a step, however fast the steps are


@dataclass(frozen=True)
class Fault:
    """What is done to a run.

    Attributes:
        says: pattern of the line that a rank writes to standard error.
        waits: whether the line may come only after ``parallel.timeout_s``; within 10 s (after that) in any case.
        strike: a signal to a rank, in the middle of the run.
        inside: done in the process of rank 1 before it trains; it tells when it strikes.
        ends: whether the run ends by it.
        apart: whether the store of the process group is in a process of its own, which SIGKILL strikes.
    """

    says: str
    waits: bool = False
    strike: tuple[int, signal.Signals] | None = None
    inside: Callable[[Callable[[], object]], object] | None = None
    ends: bool = True
    apart: bool = False


def _be_slow(struck: Callable[[], object]) -> None:
    from minimax_train.trainer import Trainer

    next_batches = Trainer.next_batches

    def slow(self: Any, plan: Any) -> Any:
        if self.progress.step == STEP:
            struck()
            time.sleep(1000)
        return next_batches(self, plan)

    Trainer.next_batches = slow  # type: ignore[method-assign]


def _send_nan(struck: Callable[[], object]) -> None:
    from minimax_train.model.sharding import local
    from minimax_train.trainer import Trainer

    train_step = Trainer.train_step

    def poisoned(self: Any) -> Any:
        if self.progress.step == STEP:
            struck()
            for weight in self.engine.snapshot()["model"].values():  # those of them that this rank holds
                local(weight).detach().fill_(float("nan"))
        return train_step(self)

    Trainer.train_step = poisoned  # type: ignore[method-assign]


def _drift(struck: Callable[[], object]) -> None:
    import torch

    from minimax_train.engines.zero1 import Zero1Engine

    run, count = Zero1Engine.run, iter(range(10**9))

    def drifting(self: Any, *arguments: Any) -> Any:
        sums = run(self, *arguments)
        if next(count) == STEP:
            struck()
            weight = next(iter(self.parameters.values())).data.view(-1)[7:8]
            weight.view(torch.int16 if weight.element_size() == 2 else torch.int32).bitwise_xor_(1)
        return sums

    Zero1Engine.run = drifting  # type: ignore[method-assign]


def _fill_disk(struck: Callable[[], object]) -> None:
    from minimax_train.checkpoint import saving

    def full(*arguments: Any) -> Any:
        struck()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saving.write_shards = full


_STOPPED = r"is stopped \(SIGSTOP\), last heartbeat in step \d+ \([\w ]+\)"
_WAITING = r"waiting for \d+ s \(parallel.timeout_s\): rank {} in step \d+ \([\w ]+\) in \w+"
FAULTS = {
    "killed": Fault(
        r"rank 1 \(host \S+, process \d+\) (was ended by SIGKILL|has ended), last heartbeat in step \d+ \([\w ]+\)",
        strike=(1, signal.SIGKILL),
    ),
    "first_killed": Fault(
        r"rank 1: error: rank 0 \(host \S+, process \d+\), which holds the store, (was ended by SIGKILL|has ended)",
        strike=(0, signal.SIGKILL),
    ),
    "stopped": Fault(
        rf"rank 1 \(host \S+, process \d+\) {_STOPPED}; {_WAITING.format(0)}",
        waits=True,
        strike=(1, signal.SIGSTOP),
    ),
    "first_stopped": Fault(
        rf"rank 0 \(host \S+, process \d+\), which holds the store, {_STOPPED}",
        waits=True,
        strike=(0, signal.SIGSTOP),
    ),
    "slowed": Fault(
        rf"rank 1 \(host \S+, process \d+\) is in step {STEP + 1} \(data\), in slow \(fault_drills.py:\d+\), "
        rf"for \d+ s; {_WAITING.format(0)}",
        waits=True,
        inside=_be_slow,
    ),
    "nan": Fault(rf"error: step {STEP + 1}: loss .*not finite", inside=_send_nan),
    "drifting": Fault(
        rf"error: step {STEP + 1}: replicas have drifted apart .*: ranks 0 \(host \S+\), 1 \(host \S+\) differ from "
        r"each other: embedding.weight$",
        inside=_drift,
    ),
    "disk_full": Fault(r"error: .*No space left on device.*; training goes on", inside=_fill_disk, ends=False),
    "store": Fault(r"error: the launcher's store at tcp://127.0.0.1:\d+ does not answer", apart=True),
}


@dataclass
class Told:
    """What came of a fault: seconds until it was told, or until all ranks had ended, and what they wrote."""

    seconds: float
    statuses: list[int | None]
    lines: list[str]

    def problems(self, fault: Fault, timeout_s: float) -> list[str]:
        found = [] if any(re.search(fault.says, line) for line in self.lines) else [f"no line says {fault.says}"]
        limit_s = 10 + (timeout_s if fault.waits else 0)
        if self.seconds > limit_s:
            found.append(f"{self.seconds:.1f} s, more than {limit_s:g}")
        if fault.ends and 0 in self.statuses:
            found.append(f"exit statuses {self.statuses}")
        return found


class Drill:
    """A run with a fault.

    Args:
        start: of a process of the run, with environment variables, a name for its output, and a rank of the run, or -1
            for the process that holds the store; returns its process id and a function for its exit status, None while
            it runs.
    """

    def __init__(
        self,
        fault: Fault,
        folder: Path,
        start: Callable[[int, dict[str, str]], tuple[int, Callable[[], int | None]]],
    ) -> None:
        self.fault, self.folder = fault, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
        if fault.apart:
            shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        ranks = range(-1 if fault.apart else 0, RANKS)
        self._processes = {
            rank: start(rank, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if rank >= 0 else shared)
            for rank in ranks
        }
        self._struck = self._told = 0.0
        self._due = 0.0  # when a signal is to strike

    def step(self) -> bool:
        """Go on with it; whether it is over."""
        fault, statuses = self.fault, [status() for rank, (_, status) in self._processes.items() if rank >= 0]
        if not self._struck:
            mark, metrics = self.folder / "struck", self.folder / "run/metrics.jsonl"
            if fault.inside is not None:
                self._struck = mark.stat().st_mtime if mark.exists() else 0.0
            elif metrics.exists() and metrics.read_text().count("\n") >= STEP:
                self._due = self._due or time.time() + _BEATS_S
                if time.time() < self._due:
                    return None not in statuses
                rank, number = fault.strike or (-1, signal.SIGKILL)
                os.kill(self._processes[rank][0], number)
                self._struck = time.time()
            return not self._struck and None not in statuses
        if not self._told and (None not in statuses if fault.ends else self._is_told()):
            self._told = time.time()
        return bool(self._told) or time.time() > self._struck + 120

    def finish(self) -> Told:
        """End what still runs."""
        statuses = [status() for rank, (_, status) in self._processes.items() if rank >= 0]
        for pid, status in self._processes.values():
            if status() is None:
                os.kill(pid, signal.SIGKILL)
        return Told((self._told or time.time()) - self._struck, statuses, self._lines())

    def _lines(self) -> list[str]:
        return [line for path in sorted(self.folder.glob("stderr-*")) for line in path.read_text().splitlines()]

    def _is_told(self) -> bool:
        return any(re.search(self.fault.says, line) for line in self._lines())


def arguments(folder: Path, timeout_s: float, *more: str) -> list[str]:
    """Overrides of a run that does not end by itself."""
    from support.runs import overrides

    endless = ["recipe.steps=100000", "recipe.eval_interval=0", "checkpoint.interval=6", "checkpoint.async_save=false"]
    return overrides(folder, *endless, f"parallel.timeout_s={timeout_s}", "parallel.check_replicas=1", *more)


def prepare(name: str, rank: int, folder: Path) -> None:
    """Have a rank's process do what its fault has it do."""
    inside = FAULTS[name].inside
    if inside is not None and rank == 1:
        inside((folder / "struck").touch)


def hold_store(port: int) -> None:
    """What the process that holds the store does."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    time.sleep(1000)
    del store


def _start(name: str, folder: Path, own: Sequence[str]) -> Callable[..., tuple[int, Callable[[], int | None]]]:
    def start(rank: int, environment: dict[str, str]) -> tuple[int, Callable[[], int | None]]:
        with (folder / f"stderr-{rank}").open("w") as error:
            process = subprocess.Popen(
                [sys.executable, "-P", __file__, "--inside", name, str(rank), str(folder), *own],
                stdout=subprocess.DEVNULL,
                stderr=error,
                cwd=folder,
                env={
                    **os.environ,
                    **environment,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
                },
            )
        return process.pid, process.poll

    return start


def _inside(name: str, rank: int, folder: Path, own: Sequence[str]) -> int:
    if rank < 0:
        hold_store(int(os.environ["MASTER_PORT"]))
        return 0
    from minimax_train.__main__ import main

    sys.argv[1:] = own
    prepare(name, rank, folder)
    return main()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--timeout", type=float, default=20.0, help="parallel.timeout_s")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--at-once", type=int, default=1, help="so many runs")
    options = parser.parse_args()
    from support.runs import ON_GPU

    more = ON_GPU if options.device == "cuda" else []
    with ThreadPoolExecutor(options.at_once) as threads:
        every = [threads.submit(_drill, name, options.timeout, more) for name in options.only]
        return int(not all([each.result() for each in every]))


def _drill(name: str, timeout_s: float, more: Sequence[str]) -> bool:
    """One of them, from its beginning to what is printed; whether all was as it should be."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        drill = Drill(FAULTS[name], folder, _start(name, folder, arguments(folder, timeout_s, *more)))
        while not drill.step():
            time.sleep(0.05)
        told = drill.finish()
        problems = told.problems(FAULTS[name], timeout_s)
        stacks = [str(path.relative_to(folder)) for path in sorted(folder.glob("run/stacks/*/*"))]
    lines = [f"{name}: {told.seconds:.1f} s, exit statuses {told.statuses}, {len(told.lines)} lines of standard error"]
    lines += [f"    {line}" for line in [*told.lines[:12], *(f"stacks: {path}" for path in stacks)]]
    print("\n".join([*lines, *(f"    PROBLEM: {problem}" for problem in problems)]), flush=True)
    return not problems


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(_inside(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:]))
    sys.exit(main())
