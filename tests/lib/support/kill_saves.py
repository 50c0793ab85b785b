"""Runs that are killed with SIGKILL while they save, against one that is not.

    PYTHONPATH=tests/lib python tests/lib/support/kill_saves.py [--kills 50] [--steps 60] [--seed 1] [--minutes M]

Two ranks train in float64 and save every second step, each with a checkpoint writer, some with a data worker. Calls
of the system that sync, rename and remove files take longer here, so that a save takes as long as several steps. Once a
save has begun, and some random time has passed, SIGKILL goes to one rank, both, all processes, or a writer. Then

    no process is left over, without anybody's help: neither ranks, nor writers, nor data workers,
    minimax-checkpoint verify finds every checkpoint whole that is named like one,
    checkpoint.resume=auto goes on from the newest, and the newest is no older than the last that was said to be saved,
    every step that was taken has the loss and gradient norm of the undisturbed run, to 1e-10.

A run whose writer was killed goes on, and saves by itself. Runs that come to their end have the weights and the
optimizer state of the undisturbed one, to 1e-10; another begins, until enough were killed.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  this and torch._dynamo so that processes forked from this one need not
import torch
import torch._dynamo
import torch.distributed.checkpoint as dcp

import minimax_train.trainer
from minimax_train.checkpoint import shards
from minimax_train.checkpoint.cli import main as checkpoint_main
from minimax_train.checkpoint.retention import named, step_of
from minimax_train.checkpoint.saving import Saver
from minimax_train.cli import main as train_main
from minimax_train.parallel.environment import end_with_parent
from support.runs import overrides

TOLERANCE = 1e-10
RANKS = 2
VICTIMS = ("one rank", "all ranks", "all processes", "a writer")
_COMPARED = ("loss", "grad_norm", "learning_rate", "tokens", "validation_loss")
_TIMEOUT_S, _RUN_TIMEOUT_S = 200.0, 900.0
_LEFT_OVER_S = 10.0
# Of a writer and of ranks: imported before anything else.
_SLOW = """
import os, random, time

def _slow(call, longest_s):
    def slowed(*arguments, **options):
        time.sleep(random.uniform(0, longest_s))
        result = call(*arguments, **options)
        time.sleep(random.uniform(0, longest_s))
        return result
    return slowed

def slow_down():
    os.fsync, os.rename = _slow(os.fsync, 0.05), _slow(os.rename, 0.05)
    os.unlink = os.remove = _slow(os.unlink, 0.01)
"""


def recipe(folder: Path, steps: int) -> list[str]:
    """Overrides of a run. A checkpoint has some 10 MB, in several files of each rank."""
    return overrides(
        folder,
        "engine.precision=float64",
        "model.num_experts=40",
        "model.expert_hidden_size=48",
        "model.num_layers=2",
        "model.layer_pattern=LS",
        f"recipe.steps={steps}",
        "recipe.eval_interval=20",
        "checkpoint.keep=2",
        "checkpoint.resume=auto",
        "parallel.timeout_s=100",
    )


class Run:
    """A run's folder, and the processes that train in it.

    Args:
        steps: of the whole run.
        slowed: whether it saves while it trains, and what touches files takes longer.
    """

    def __init__(self, folder: Path, steps: int, slowed: bool = True) -> None:
        # Saves move no loss.
        self.arguments = [*recipe(folder, steps), f"checkpoint.interval={2 if slowed else 0}"]
        self.folder, self.starts = folder, 0
        self.checkpoints, self._slowed = folder / "run/checkpoints", slowed
        self.ranks: list[BaseProcess] = []
        (folder / "slow").mkdir()
        (folder / "slow/sitecustomize.py").write_text(f"{_SLOW}\nslow_down()\n")

    def start(self) -> None:
        """Start the ranks, in sessions of their own, which nothing that they start leaves."""
        self.starts += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        self.ranks = [context.Process(target=self._train, args=(rank, port)) for rank in range(RANKS)]
        for process in self.ranks:
            process.start()
        self._sessions = {process.pid for process in self.ranks}

    def _train(self, rank: int, port: int) -> None:
        end_with_parent(multiprocessing.parent_process().pid)
        os.setsid()
        os.chdir(self.folder)
        output = os.open(self.output(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(each, "w", buffering=1, closefd=False) for each in (1, 2))
        torch.set_num_threads(1)
        launched = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in (launched | {"MASTER_PORT": port}).items()})
        shards._LEAST_BYTES = 1_000_000
        save, init = Saver.save, minimax_train.trainer.Trainer.__init__

        def watched(saver: Saver, progress: Any, *arguments: Any) -> None:
            save(saver, progress, *arguments)
            if saver.is_saving and rank == 0:
                (self.folder / "beside-training").write_text(str(progress.step))

        def started(trainer: Any, *arguments: Any, **options: Any) -> None:
            init(trainer, *arguments, **options)
            (self.folder / f"first-{rank}-{self.starts}").write_text(str(trainer.first_step))

        Saver.save = watched  # type: ignore[method-assign]
        minimax_train.trainer.Trainer.__init__ = started  # type: ignore[method-assign]
        if self._slowed:
            sys.path.insert(0, str(self.folder / "slow"))  # which writers are given
            made: dict[str, Any] = {}
            exec(_SLOW, made)
            made["slow_down"]()
        # Starting a data worker takes longer than the rest of a rank's start.
        status = train_main([*self.arguments, f"data.num_workers={int(self.starts % 4 == 1)}"])
        sys.stdout.flush()
        os._exit(status)

    def output(self, rank: int) -> Path:
        return self.folder / f"output-{self.starts}-{rank}"

    @property
    def said(self) -> str:
        files = [self.output(rank) for rank in range(RANKS)]
        return "\n".join(file.read_text(errors="replace")[-6000:] for file in files if file.exists())

    def processes(self) -> list[int]:
        """All that the ranks have started and that still runs, and they themselves."""
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = status.read_text().rpartition(")")[2].split()[:4]
                if int(session) in self._sessions and state != "Z":
                    found.append(int(status.parent.name))
        return found

    def writers(self) -> list[int]:
        return [pid for pid in self.processes() if b"checkpoint.writer" in _command(pid)]

    @property
    def drafts(self) -> list[Path]:
        """Checkpoints that are being written or removed."""
        return [path for path in self.checkpoints.glob("*") if not path.name[-1].isdecimal()]

    def complete_steps(self) -> list[int]:
        return [step_of(path) for path in named(self.checkpoints)]

    def names(self) -> list[str]:
        """Of all checkpoints, also of those that are being written or removed."""
        return sorted(path.name for path in self.checkpoints.glob("*"))

    def is_over(self) -> bool:
        return any(process.exitcode is not None for process in self.ranks)

    def wait_for(self, what: str, condition: Callable[[], bool]) -> bool:
        """Until something is the case. False when a rank ended before."""
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            if self.is_over():
                return False
            assert time.monotonic() < deadline, f"waited {_TIMEOUT_S} s for {what}:\n{self.said}"
            time.sleep(0.002)
        return True

    def kill(self, whom: str, choose: random.Random) -> None:
        victims = {
            "one rank": [choose.choice(self.ranks).pid],
            "all ranks": [process.pid for process in self.ranks],
            "all processes": self.processes(),
            "a writer": [choose.choice(self.writers() or [0])],
        }[whom]
        for pid in victims:
            with suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGKILL)

    def moment(self) -> str:
        """What the save that is under way is at."""
        drafts = self.drafts
        writing = [path for path in drafts if ".old" not in path.name]
        if not drafts:
            return "between saves"
        if not writing:
            return "an old checkpoint is removed"
        step, beside = writing[0].name[5:13], self.folder / "beside-training"
        how = "background" if beside.exists() and beside.read_text() == str(int(step)) else "synchronous"
        names = {path.name for path in writing[0].glob("*")}
        stage = "manifest" if "manifest.json" in names else "index" if ".metadata" in names else "shards"
        return f"{how}, {stage}"

    def wait_until_gone(self) -> list[int]:
        """Until the ranks have ended, by themselves. Processes that are left over some time later; they are killed."""
        deadline = time.monotonic() + _RUN_TIMEOUT_S
        for process in self.ranks:
            process.join(max(0, deadline - time.monotonic()))
        deadline = time.monotonic() + _LEFT_OVER_S
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.ranks:
            process.join()
        return left

    def first_steps(self) -> set[int]:
        """From which step each rank of the last start went on."""
        return {int((self.folder / f"first-{rank}-{self.starts}").read_text()) for rank in range(RANKS)}

    def metrics(self) -> dict[tuple[int, bool], dict[str, float]]:
        """Records by step, and whether of an evaluation."""
        file = self.folder / "run/metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return {(record["step"], "validation_loss" in record): record for record in records}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _verify(path: Path) -> str:
    """What ``minimax-checkpoint verify`` says, where it finds damage."""
    out = io.StringIO()
    with redirect_stdout(out):
        status = checkpoint_main(["verify", str(path)])
    return out.getvalue() if status else ""


def compare_metrics(run: Run, right: dict[tuple[int, bool], dict[str, float]]) -> list[str]:
    """How steps and evaluations differ from those of the undisturbed run, a line each."""
    found = []
    for place, record in run.metrics().items():
        for name in _COMPARED:
            a, b = record.get(name, 0.0), right[place].get(name, 0.0)
            if not abs(a - b) <= TOLERANCE * abs(b):
                found.append(f"step {place[0]}: {name} {a!r} against {b!r}")
    return found


def compare_states(run: Run, right: Run) -> list[str]:
    """How weights and optimizer state of the last checkpoints differ, a line each."""
    states = []
    for each in (run, right):
        checkpoint = named(each.checkpoints)[-1]
        stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        states.append({name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()})
        dcp.load(states[-1], checkpoint_id=checkpoint, no_dist=True)
    found = [] if states[0].keys() == states[1].keys() else ["other names"]
    for name, x in states[1].items():
        apart = float((states[0][name] - x).abs().max())
        if not apart <= TOLERANCE * float(x.abs().max()):
            found.append(f"{name}: differs by {apart:.1e}")
    return found


class Sweep:
    """Runs that are killed, and what was not as it must be, which is printed at once.

    Args:
        steps: of every run.
        kills, seconds: how often processes are killed, and after how long no more are.
    """

    def __init__(self, folder: Path, steps: int, seed: int, kills: int, seconds: float) -> None:
        self.folder, self.steps, self.kills_wanted = folder, steps, kills
        self.began, self.seconds = time.monotonic(), seconds
        self.choose, self.moments = random.Random(seed), Counter[str]()
        self.kills = self.resumed = self.ended = self.faults = 0
        (folder / "right").mkdir()
        self.undisturbed = Run(folder / "right", steps, slowed=False)
        self.undisturbed.start()
        self.undisturbed.wait_until_gone()
        assert not any(process.exitcode for process in self.undisturbed.ranks), self.undisturbed.said
        self.right = self.undisturbed.metrics()

    @property
    def is_enough(self) -> bool:
        return self.kills >= self.kills_wanted or time.monotonic() - self.began > self.seconds

    def train_and_kill(self, number: int) -> None:
        """A run, started again as often as it is killed."""
        (self.folder / str(number)).mkdir()
        run, ends = Run(self.folder / str(number), self.steps), False
        while not ends:
            newest = max(run.complete_steps(), default=0)
            (run.folder / "beside-training").unlink(missing_ok=True)
            run.start()
            ends = not self._kill(run)
            self._check(run, f"run {number}, {'its end' if ends else f'kill {self.kills}'}", newest, ends)
        if max(run.complete_steps(), default=0) == self.steps:
            self.ended += 1
            self._tell(f"run {number}", compare_states(run, self.undisturbed))
            missing = self.right.keys() - run.metrics().keys()
            self._tell(f"run {number}", [f"nothing recorded of {sorted(missing)}"] if missing else [])

    def _kill(self, run: Run) -> bool:
        """Kill processes of a run, until it stops. False where it comes to its end."""
        beside = self.choose.random() < 0.8  # else any save: the first ones are synchronous
        whom = self.choose.choice(VICTIMS if beside else VICTIMS[:3])
        before = run.names()  # with what the kill before left half written

        def saves() -> bool:
            ready = not beside or (run.folder / "beside-training").exists()
            return ready and bool(run.drafts) and run.names() != before

        while not self.is_enough and run.wait_for("a save", saves):
            time.sleep(self.choose.uniform(0, 1))
            moment, before = run.moment(), run.names()
            run.kill(whom, self.choose)
            self.kills += 1
            self.moments[moment] += 1
            at = f"{time.monotonic() - self.began:4.0f} s: kill {self.kills} of {whom}"
            print(f"{at} after step {max((step for step, _ in run.metrics()), default=0)}: {moment}", flush=True)
            if whom != "a writer":
                return True
            whom = self.choose.choice(VICTIMS[:3])
            was = run.complete_steps()
            run.wait_for("a later checkpoint", lambda was=was: run.complete_steps() != was)
        return False

    def _check(self, run: Run, what: str, newest: int, ends: bool) -> None:
        """Wait until a run has ended, by itself, and look at what it left.

        Args:
            newest: step of the checkpoint that it was to go on from.
            ends: whether it came to its end.
        """
        if left := run.wait_until_gone():
            self._tell(what, [f"left over: {[(pid, _command(pid)[:200]) for pid in left]}"])
        steps, said = run.complete_steps(), run.said
        if ends and any(process.exitcode for process in run.ranks):
            self._tell(what, [f"ended with {[process.exitcode for process in run.ranks]}: {said}"])
        if steps and (damage := _verify(run.folder / "run")):
            self._tell(what, [damage])
        saved = [int(step) for step in re.findall(r"checkpoint step-(\d+): \S+ MB, blocked", said)]
        if saved and max(saved) > max(steps, default=0):
            self._tell(what, [f"step {max(saved)} was said to be saved, {steps} are there"])
        if len(list(run.folder.glob(f"first-*-{run.starts}"))) == RANKS:  # else it was killed before
            self.resumed += newest > 0
            if run.first_steps() != {newest}:
                self._tell(what, [f"went on from {run.first_steps()}, the newest was {newest}"])
        if list(run.checkpoints.glob("*.damaged*")) or "damaged" in said:
            self._tell(what, [f"a checkpoint was damaged: {said}"])
        self._tell(what, compare_metrics(run, self.right))

    def _tell(self, what: str, faults: Sequence[str]) -> None:
        self.faults += len(faults)
        for fault in faults:
            print(f"FAULT: {what}: {fault}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=240.0, help="after which nothing more is killed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(Path(folder), options.steps, options.seed, options.kills, 60 * options.minutes)
        number = 0
        while not sweep.is_enough:
            number += 1
            sweep.train_and_kill(number)
    for moment, count in sorted(sweep.moments.items()):
        print(f"{count:4} kills: {moment}")
    took = f"{time.monotonic() - sweep.began:.0f} s"
    print(
        f"{sweep.kills} kills, {sweep.resumed} times resumed, {sweep.ended} runs to their end, {took}: "
        f"{sweep.faults} faults"
    )
    return int(sweep.faults > 0)


if __name__ == "__main__":
    sys.exit(main())
