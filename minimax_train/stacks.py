"""What a process is doing, seen from a thread of its own or from another process of its machine."""

from __future__ import annotations

import faulthandler
import json
import linecache
import pickle
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch._C._distributed_c10d as c10d

from minimax_train.errors import one_line

# Calls in which a thread waits for other ranks, or for the device, which waits for them.
_WAITS = ("wait(", "synchronize(", ".item()", ".tolist()", "float(", ".cpu()", "run_backward(")
_FLIGHT_RECORDER_S = 1.0
_PY_SPY_S = 2.5


class Standing(NamedTuple):
    """Where a thread is.

    Attributes:
        at: function, file and line.
        waits: whether it waits for other ranks, as far as its innermost call tells.
    """

    at: str
    waits: bool


def main_frame() -> FrameType | None:
    """The innermost frame of this process's main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def standing(failed: BaseException | None = None) -> Standing:
    """Where the main thread is, or was when it failed; where one of autograd's threads waits that it waits for."""
    if failed is not None:
        frame, line = list(traceback.walk_tb(failed.__traceback__))[-1]
        return _standing(frame, line)._replace(waits=False)
    found = _standing(main_frame())
    if "_engine_run_backward" in found.at:
        known = {thread.ident for thread in threading.enumerate()}
        others = [_standing(frame) for ident, frame in sys._current_frames().items() if ident not in known]
        return next((other for other in others if other.waits), found)
    return found


def _standing(frame: FrameType | None, number: int | None = None) -> Standing:
    """Of a frame, maybe at another line than its own."""
    if frame is None:
        return Standing("nowhere", False)
    number = _line(frame) if number is None else number
    line = linecache.getline(frame.f_code.co_filename, number)
    waits, inner = any(call in line for call in _WAITS), frame
    while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
        waits = waits or "/torch/distributed/" in frame.f_code.co_filename
        frame = frame.f_back
        number = _line(frame)
    name = "" if frame is inner else f"{inner.f_code.co_name} of "
    return Standing(f"{name}{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{number})", waits)


def _line(frame: FrameType) -> int:
    """Where a frame is; for moments, between the instructions of its lines, it is in none."""
    return frame.f_lineno or frame.f_code.co_firstlineno


def last_collective() -> str:
    """The collective that has not ended, by PyTorch's flight recorder: NCCL's oldest, else the newest over gloo, which
    does not tell the end of any. Empty where it knows none; it does not know those within CUDA graphs."""
    for name, newest in (("_dump_nccl_trace_json", False), ("_dump_fr_trace_json", True)):
        dump: Callable[[bool, bool], str] | None = getattr(c10d, name, None)
        # With those that ended, by which one sees that others have.
        entries = within(_FLIGHT_RECORDER_S, lambda dump=dump: json.loads(dump(True, False))["entries"]) if dump else []
        if entries := _under_way(entries or []):
            entry = entries[-1 if newest else 0]
            group = entry["process_group"][1].removeprefix("mesh_").replace("default_pg", "of all ranks")
            return f"{entry['profiling_name'].rpartition(':')[2]} (group {group})"
    return ""


def _under_way(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a flight recorder's entries that have not ended, in their order.

    Collectives that were started as one stay as scheduled for ever: the recorder hears only of the end of the whole.
    But a group's collectives run one after the other, so none is under way where a later one of its group has ended.
    """
    ended: dict[str, int] = {}
    for place, entry in enumerate(entries):
        if entry.get("state") == "completed" and not entry.get("is_p2p"):
            ended[str(entry["process_group"])] = place
    return [
        entry
        for place, entry in enumerate(entries)
        if entry.get("state") != "completed"
        and (entry.get("is_p2p") or place > ended.get(str(entry["process_group"]), -1))
    ]


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of what may fail or hang; None if it does."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception:  # of another version's format: without the collective's name
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def write_own_stacks(path: Path, head: str) -> None:
    """Of all Python threads of this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(f"{head}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def write_flight_record(path: Path) -> None:
    """The last collectives of this process, pickled by PyTorch's flight recorder: NCCL's, else gloo's. No file
    where it has none."""
    dumps: list[Callable[[], bytes]] = [
        getattr(c10d, name) for name in ("_dump_nccl_trace", "_dump_fr_trace") if hasattr(c10d, name)
    ]
    for dump in dumps:
        record = within(2 * _FLIGHT_RECORDER_S, dump)
        if record and pickle.loads(record).get("entries"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(record)
            return


def write_stacks_of(pid: int, path: Path, head: str) -> str:
    """Of another process of this machine, read by py-spy, also of one that is stopped. Returns why not, else nothing.

    Yama's default forbids it between siblings: the process must have called
    :func:`minimax_train.parallel.environment.allow_to_be_read`.
    """
    beside = Path(sys.executable).with_name("py-spy")
    command = str(beside) if beside.exists() else shutil.which("py-spy")
    if command is None:
        return "py-spy is not installed (pip install minimax_train[debug])"
    try:
        arguments = [command, "dump", "--nonblocking", "--pid", str(pid)]
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=_PY_SPY_S)
        if result.returncode:
            return f"py-spy: {' '.join(result.stderr.split())[:200]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{head}\n\n{result.stdout}")
    except (OSError, subprocess.SubprocessError) as error:
        return one_line(error)
    return ""


class Process(NamedTuple):
    """A process of this machine, as the system tells it (on Linux).

    Attributes:
        started: ticks from the start of the machine to its own, which tells it from a later one of the same id.
        state: a letter: T stopped, Z ended and not waited for.
        exit_code: as ``waitpid`` gives it, of one that has ended.
    """

    started: int
    state: str
    exit_code: int

    @classmethod
    def find(cls, pid: int | str) -> Process | None:
        """None for one that has gone, or where the system does not say."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return cls(int(fields[19]), fields[0], int(fields[49]))
