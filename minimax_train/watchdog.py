"""Ends a run in which a rank stands still or has ended, and says which, where, and what the others wait for.

Two threads per rank. One looks at this process, several times a second: whether the main thread does anything. The
other speaks with the store of the process group, through a connection of its own: it leaves a heartbeat (where the rank
is), and looks whether there is an alarm.

    alarm     by a rank whose main thread has stood still for ``parallel.timeout_s``, whose neighbour's process has
              gone, or whose collective has failed; the first one judges
    answers   every rank that can writes its stacks to ``run_dir/stacks`` and says where it is
    look      a rank on the machine of each that did not answer reads its stacks from outside, and ends it
    verdict   the judge writes one line, and all end

Without an alarm a rank writes one key and reads two each beat; nothing waits for it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from minimax_train.checkpoint.store import CheckpointStore
from minimax_train.errors import exit_status
from minimax_train.first_rank import is_of_communication
from minimax_train.metrics.console import Output, note, to_stderr
from minimax_train.parallel.environment import ProcessEnvironment, allow_to_be_read, store_is_the_launchers
from minimax_train.phases import Phases
from minimax_train.stacks import (
    Process,
    last_collective,
    main_frame,
    standing,
    within,
    write_flight_record,
    write_own_stacks,
    write_stacks_of,
)
from minimax_train.verdict import SHOWN, shown_phase, shown_rank, verdict

BACKSTOP = timedelta(seconds=30)
"""Of a collective, after ``parallel.timeout_s``: PyTorch's own end of a run, with none of this, comes later."""
_LOOK_S = 0.5
# Other waits have the same limit, and know better what they waited for: that of a data worker, that of a checkpoint.
_MARGIN_S = 1.5
_BEAT_S = 1.0
_RANKS_PER_BEAT_S = 1000
"""So many ranks' heartbeats a second, at most, reach the store."""
_ANSWER_S = 3.0
_VERDICT_S = 3.5
_TELL_S = 2.0
# A rank that fails by itself says why, and ends; those that it takes along get so long before it is called dead.
_GONE_S = 2.5
_STORE_GONE_S = 5.0
_STORE_KEPT_S = 2.0


class Watchdog:
    """Watches this process, and with others theirs, inside ``with``.

    A rank alone is not ended: nobody waits for it. It says where it stands still.

    Args:
        phases: tell where the run is.
        store: of the run's checkpoints, from which it can go on; stacks are written in its ``run_dir``.
        timeout_s: how long ranks wait for each other.
    """

    def __init__(
        self, environment: ProcessEnvironment, phases: Phases, store: CheckpointStore, timeout_s: float
    ) -> None:
        self._environment, self._phases, self._checkpoints = environment, phases, store
        self._rank, self._size, self._timeout_s = environment.rank, environment.world_size, timeout_s
        self._beat_s = max(_BEAT_S, self._size / _RANKS_PER_BEAT_S)
        self._host = socket.gethostname()
        self._closed, self._wake = threading.Event(), threading.Event()
        self._idle_s = 0.0  # that the main thread has done nothing
        self._alarm = ""  # why this rank gives it: "timeout", "gone", or what a collective failed with
        self._failed = ""  # which collective
        self._error: BaseException | None = None  # and how
        self._gone_s: dict[int, float] = {}  # since when a neighbour's process is not there
        self._answered = False
        self._first: dict[str, Any] = {}  # the heartbeat of rank 0, whose process may hold the store
        self._heard = time.monotonic()  # when the store answered last
        self._store_error = ""
        self.tell: Callable[[str], None] | None = None  # of the first rank: the verdict, before it ends
        self._lock = threading.Lock()  # of the connection to the store
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        allow_to_be_read()
        work = [self._look]
        if self._size > 1:
            self._store = dist.PrefixStore("watchdog", cast(Any, _get_default_store()).clone())
            self._write_heartbeat()
            work.append(self._beat)
        for target in work:
            self._threads.append(threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._size > 1 and error is not None and is_of_communication(error):
            self._await_verdict(error)
        self._closed.set()
        self._wake.set()
        # A store that does not answer has the thread, and the lock.
        if self._size > 1 and self._lock.acquire(timeout=2):
            try:
                self._write_heartbeat("is done" if error is None else f"has ended with status {exit_status(error)}")
                self._store.add("done", 1)
                self._keep_store()
            except RuntimeError:
                pass  # it has gone, as rank 0 may have
            finally:
                self._lock.release()
        for thread in self._threads:
            thread.join(timeout=1)

    def _keep_store(self) -> None:
        """Of rank 0: until the others no longer look into the store that it holds."""
        deadline = time.monotonic() + _STORE_KEPT_S
        while self._rank == 0 and self._store.add("done", 0) < self._size and time.monotonic() < deadline:
            time.sleep(0.01)

    # The process itself

    def _look(self) -> None:
        """The thread that looks at the main thread."""
        seen: tuple[int, int, int] | None = None
        told: tuple[int, int, int] | None = None
        before = time.monotonic()
        while not self._closed.wait(_LOOK_S):
            frame = main_frame()
            here = (self._phases.progress, id(frame), -1 if frame is None else frame.f_lasti)
            del frame
            now = time.monotonic()
            # A process that was stopped itself, or a machine that was, has not waited meanwhile.
            self._idle_s = 0.0 if here != seen else self._idle_s + min(now - before, 2 * _LOOK_S)
            seen, before = here, now
            if self._idle_s > self._timeout_s + _MARGIN_S:
                if self._size == 1:
                    if told != here:
                        told = here
                        note(f"{self._place(self._where())}; {self._write_stacks()}")
                    continue
                self._alarm = self._alarm or "timeout"
                self._wake.set()
            if self._size > 1 and (self._alarm or self._store_error):
                self._judge_without_store(now)

    def _where(self) -> dict[str, Any]:
        """Where this rank is."""
        at, waits = standing(self._error)
        return {
            "rank": self._rank,
            "host": self._host,
            "pid": os.getpid(),
            "step": self._phases.step,
            "phase": self._phases.phase,
            "at": at,
            "waits": waits and self._idle_s > 2 * _LOOK_S,
            "idle_s": self._idle_s,
        }

    def _place(self, where: dict[str, Any]) -> str:
        idle = f" for {where['idle_s']:.0f} s" if where["idle_s"] > 2 * _LOOK_S else ""
        return f"{shown_rank(where)} is in {shown_phase(where)}, in {where['at']}{idle}"

    def _folder(self, step: int) -> Path:
        return self._checkpoints.run_dir / "stacks" / f"step-{step:08d}"

    def _write_stacks(self, step: int | None = None) -> str:
        """Of this process; returns where they are, or why not."""
        folder = self._folder(self._phases.step if step is None else step)
        trace = [] if self._error is None else traceback.format_exception(self._error)
        try:
            write_own_stacks(folder / f"rank-{self._rank}.txt", "\n".join([self._place(self._where()), *trace]))
        except OSError as error:
            return f"no stacks: {error}"
        return f"stacks: {folder}"

    # The store

    def _write_heartbeat(self, ended: str = "") -> None:
        own = Process.find(os.getpid())
        beat = {
            "rank": self._rank,
            "host": self._host,
            "pid": os.getpid(),
            "started": 0 if own is None else own.started,
            "step": self._phases.step,
            "phase": self._phases.phase,
            "ended": ended,
        }
        self._store.set(f"rank/{self._rank}", json.dumps(beat))

    def _read(self, key: str) -> Any:
        """None where it is not written."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _beat(self) -> None:
        """The thread that speaks with the store."""
        neighbour = -1
        while True:
            self._wake.wait(self._beat_s)
            if self._closed.is_set():
                return
            self._wake.clear()
            try:
                with self._lock:
                    if self._closed.is_set():
                        return
                    self._write_heartbeat()
                    if not store_is_the_launchers():
                        self._first = self._read("rank/0") or self._first
                    alarm = self._read("why")
                    if neighbour < 0:
                        neighbour = self._find_neighbour()
                    self._look_at(neighbour)
                    self._heard = time.monotonic()
                    if alarm is None and self._alarm and self._store.add("alarm", 1) == 1:
                        alarm = {"judge": self._rank, "step": self._phases.step, "why": self._alarm}
                        alarm["failed"] = self._failed
                        self._store.set("why", json.dumps(alarm))
                    if alarm is not None:
                        self._answer(alarm)
            except (RuntimeError, ValueError) as error:  # of the store
                self._store_error = _first_sentence(error)
                return

    def _find_neighbour(self) -> int:
        """The next rank of this machine, whose process this one sees; -1 before it is known, itself if it is alone."""
        beats = self._read(f"rank/{(self._rank + 1) % self._size}")
        if beats is None:
            return -1
        if beats["host"] == self._host:
            return int(beats["rank"])
        first = self._rank - self._environment.local_rank
        beats = self._read(f"rank/{first}")
        return first if beats is not None and beats["host"] == self._host else self._rank

    def _look_at(self, neighbour: int) -> None:
        """Give the alarm when its process has gone, and it has not said that it ends."""
        if neighbour in (-1, self._rank):
            return
        beat = self._read(f"rank/{neighbour}")
        if _is_there(beat) or beat["ended"]:
            self._gone_s.pop(neighbour, None)
        elif time.monotonic() - self._gone_s.setdefault(neighbour, time.monotonic()) > _GONE_S:
            self._alarm = self._alarm or "gone"

    # The alarm

    def _await_verdict(self, error: BaseException) -> None:
        """Of a rank whose collective has failed: the threads end the process; returns if they cannot."""
        self._error, self._failed = error, last_collective() or "a collective"
        self._alarm = self._alarm or _first_sentence(error)
        self._wake.set()
        time.sleep(_STORE_GONE_S + _ANSWER_S + 2 * _VERDICT_S)

    def _answer(self, alarm: dict[str, Any]) -> NoReturn:
        """Say where this rank is, look at those that do not answer, and end."""
        self._answered = True
        deadline = time.monotonic() + _ANSWER_S + 2 * _VERDICT_S
        stacks = self._write_stacks(alarm["step"])
        answer = {**self._where(), "collective": last_collective(), "stacks": stacks}
        self._store.set(f"answer/{self._rank}", json.dumps(answer))
        self._store.add("answers", 1)
        with suppress(OSError):
            # Named as the reader of these files has it: torchfrtrace FOLDER -p rank_
            write_flight_record(self._folder(alarm["step"]) / "collectives" / f"rank_{self._rank}")
        if alarm["judge"] == self._rank:
            self._judge(alarm)
        while (silent := self._read("silent")) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        for beat in silent or []:
            if beat.get("looker") == self._rank:
                self._store.set(f"seen/{beat['rank']}", json.dumps(self._look_from_outside(beat, alarm["step"])))
        while not self._store.check(["verdict"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        if (line := self._read("verdict")) is not None:
            self._tell(line)
        os._exit(1)

    def _judge(self, alarm: dict[str, Any]) -> NoReturn:
        """Collect the answers, have the others looked at, and say what is wrong."""
        began, missing = time.monotonic(), list(range(self._size))
        while missing and time.monotonic() < began + _ANSWER_S:
            if len(missing) <= SHOWN and self._cannot_answer(missing):
                break
            time.sleep(0.1)
            if self._size - self._store.add("answers", 0) < len(missing):
                missing = [rank for rank in missing if not self._store.check([f"answer/{rank}"])]
        present = sorted(set(range(self._size)) - set(missing))
        answers = [json.loads(text) for text in self._store.multi_get([f"answer/{rank}" for rank in present])]
        silent = []
        for rank in missing:
            beat = self._read(f"rank/{rank}") or {"rank": rank, "host": "", "pid": 0, "step": 0, "phase": "start-up"}
            beat["looker"] = next((answer["rank"] for answer in answers if answer["host"] == beat["host"]), None)
            silent.append(beat)
        self._store.set("silent", json.dumps(silent))
        for beat in silent:
            if beat["looker"] == self._rank:
                self._store.set(f"seen/{beat['rank']}", json.dumps(self._look_from_outside(beat, alarm["step"])))
        deadline = time.monotonic() + _VERDICT_S
        for beat in silent:
            while beat["looker"] is not None and "seen" not in beat and time.monotonic() < deadline:
                if (seen := self._read(f"seen/{beat['rank']}")) is not None:
                    beat["seen"], beat["note"] = seen
                else:
                    time.sleep(0.1)
        own = next(answer for answer in answers if answer["rank"] == self._rank)
        notes = list(dict.fromkeys(beat["note"] for beat in silent if beat.get("note")))
        line = "; ".join([verdict(alarm, answers, silent, self._timeout_s), own["stacks"], *notes])
        self._say(line)
        self._store.set("verdict", json.dumps(line))
        self._tell(line)
        time.sleep(0.3)  # rank 0 may hold the store: the others read that it is told
        os._exit(1)

    def _tell(self, line: str) -> None:
        if self.tell is not None:
            tell = self.tell
            within(_TELL_S, lambda: tell(line))

    def _cannot_answer(self, ranks: Sequence[int]) -> bool:
        """Whether they are or were processes of this machine, and have all ended or are stopped."""
        for rank in ranks:
            beat = self._read(f"rank/{rank}")
            if beat is None or beat["host"] != self._host:
                return False
            process = Process.find(beat["pid"])
            if process is not None and process.started == beat["started"] and process.state not in "TtZ":
                return False
        return True

    def _look_from_outside(self, beat: dict[str, Any], step: int) -> tuple[str, str]:
        """What has become of a rank of this machine that does not answer, and what kept its stacks from being read. If
        it is still there, it is ended: it would not answer a launcher's SIGTERM either."""
        process = Process.find(beat["pid"])
        if process is None or process.started != beat["started"]:
            return beat.get("ended") or "has ended", ""
        if process.state == "Z":
            number = process.exit_code & 0x7F
            if number:
                return f"was ended by {signal.Signals(number).name}", ""
            return f"has ended with status {process.exit_code >> 8}", ""
        seen = "is stopped (SIGSTOP)" if process.state in "Tt" else "does not answer"
        path = self._folder(step) / f"rank-{beat['rank']}.txt"
        problem = write_stacks_of(beat["pid"], path, f"{shown_rank(beat)} {seen} in {shown_phase(beat)}")
        os.kill(beat["pid"], signal.SIGKILL)
        return seen, problem and f"no stacks of rank {beat['rank']}: {problem}"

    def _judge_without_store(self, now: float) -> None:
        """Once the store has not answered for some seconds: by what this rank knows alone. One speaks: the first that
        is not the holder of the store."""
        if self._answered or now - self._heard < _STORE_GONE_S:
            return
        if self._rank > (not store_is_the_launchers()):
            time.sleep(2)  # in which torchrun or srun end this one, for the first to speak has ended
        if self._closed.is_set():
            return
        own = self._where()
        stacks = self._write_stacks()
        collective = last_collective() if own["waits"] else ""
        waits = f"; {self._place(own)}" + (f", in the collective {collective}" if collective else "")
        notes = [stacks]
        if store_is_the_launchers():
            line = f"the launcher's store at {self._environment.init_method} does not answer"
            line += f" ({self._store_error})" if self._store_error else ""
        else:
            beat = self._first or {"rank": 0, "host": "", "pid": 0, "step": 0, "phase": "start-up"}
            seen, problem = "does not answer", ""
            if beat["host"] == self._host:
                seen, problem = self._look_from_outside(beat, self._phases.step)
            elif self._store_error:
                seen = "has ended or cannot be reached"
            line = f"{shown_rank(beat)}, which holds the store, {seen}, last heartbeat in {shown_phase(beat)}"
            notes += [problem] if problem else []
        self._say("; ".join([f"{line}{waits}", *notes]))
        os._exit(1)

    def _say(self, line: str) -> None:
        Output(sys.stdout).flush()
        to_stderr(f"{f'rank {self._rank}: ' if self._rank else ''}error: {line}; {self._checkpoints.to_go_on()}")


def _first_sentence(error: BaseException) -> str:
    """Of an error of gloo, NCCL or the store, without the line of their source."""
    return re.sub(r"^\[\S*\] ", "", str(error)).partition("\n")[0].partition(". ")[0]


def _is_there(beat: dict[str, Any]) -> bool:
    process = Process.find(beat["pid"])
    return process is not None and process.started == beat["started"] and process.state != "Z"
