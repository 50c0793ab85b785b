"""A rank that dies or stands still ends the run within the configured time, and is named, with the stacks of all."""

import json
import os
import pickle
import re
import socket
import threading
import time
from functools import partial

import pytest

from minimax_train.stacks import main_frame, standing, write_stacks_of
from minimax_train.watchdog import verdict
from support.commands import Command
from support.fault_drills import FAULTS, Drill, arguments, hold_store, prepare
from support.runs import overrides

TIMEOUT_S = 3


def _start(name, folder, rank, environment):
    def inside():
        os.environ.update(environment)
        os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
        if rank < 0:
            hold_store(int(environment["MASTER_PORT"]))
        prepare(name, rank, folder)

    elsewhere = [f"checkpoint.folder={folder}/elsewhere", "checkpoint.interval=1000"] if name == "killed" else []
    process = Command(folder, [*arguments(folder, TIMEOUT_S), *elsewhere], inside).process
    return process.pid, lambda: process.exitcode


@pytest.fixture(scope="module")
def drills(tmp_path_factory):
    """All at once: they mostly wait."""
    folders = {name: tmp_path_factory.mktemp(name) for name in FAULTS}
    running = {name: Drill(FAULTS[name], folder, partial(_start, name, folder)) for name, folder in folders.items()}
    told = {}
    while running:
        for name, drill in list(running.items()):
            if drill.step():
                told[name] = folders[name], drill.finish()
                del running[name]
        time.sleep(0.02)
    return told


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told(drills, name):
    _, told = drills[name]
    assert not told.problems(FAULTS[name], TIMEOUT_S), told
    # Without the launcher, that ends the others, each rank says that the store has gone.
    assert sum("error: " in line for line in told.lines) <= 1 + (name == "store"), told


def test_what_the_run_can_go_on_from_is_told(drills):
    folder, told = drills["killed"]
    line = next(line for line in told.lines if "error: " in line)
    assert f"no checkpoint is in {folder}/elsewhere" in line


@pytest.mark.parametrize("name", ["killed", "stopped", "first_stopped", "slowed"])
def test_stacks_are_written(drills, name):
    folder, told = drills[name]
    found = {path.name: path.read_text() for path in folder.glob("run/stacks/*/*.txt")}
    line = next(line for line in told.lines if "error: " in line)
    assert str(next(folder.glob("run/stacks/*"))) in line
    dead, stopped = {"killed": ("rank-1.txt", ""), "slowed": ("", "")}.get(name, ("", "stopped"))
    for rank in range(2):
        file = f"rank-{rank}.txt"
        if file == dead:
            assert file not in found
        elif stopped and rank == (name == "stopped") and "py-spy: " in line:
            assert "Permission" in line, line  # containers may forbid to read another process
        else:
            # A signal may come at any point of a step, which reports and saves as well.
            assert ("train_step" if name == "slowed" else "_go_on") in found[file]


def test_the_last_collectives_and_an_event_are_kept(drills):
    folder, told = drills["killed"]  # rank 1
    (record,) = folder.glob("run/stacks/*/collectives/*")
    entries = pickle.loads(record.read_bytes())["entries"]
    assert record.name == "rank_0" and any("all_reduce" in entry["profiling_name"] for entry in entries)
    event = json.loads((folder / "run/events.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "stall" and event["text"] in next(line for line in told.lines if "error: " in line)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet_fail_as_a_run_does(tmp_path, rank):
    """Status 2 would say that the run can never start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    prepare = partial(os.environ.update, {name: str(value) for name, value in places.items()})
    status, _, error = Command(tmp_path, overrides(tmp_path, "parallel.timeout_s=1"), prepare).finish(30)
    said = f"error: the 2 processes did not meet at tcp://127.0.0.1:{port}: .*imed out.* \\(parallel.timeout_s=1\\)"
    assert status == 1 and re.search(said, error.splitlines()[-1]), error


def test_without_py_spy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    problem = write_stacks_of(os.getpid(), tmp_path / "stacks", "")
    assert problem == "py-spy is not installed (pip install minimax_train[debug])"
    assert not (tmp_path / "stacks").exists()


def _answer(rank, waits=True, step=7, **more):
    where = {"rank": rank, "host": f"n{rank // 8}", "pid": 100 + rank, "step": step, "phase": "forward", "idle_s": 30.4}
    return {**where, "at": "f (g.py:1)", "waits": waits, "collective": "all_gather (group tp)" if waits else "", **more}


@pytest.mark.parametrize(
    ("alarm", "answers", "silent", "line"),
    [
        (
            {"why": "timeout"},
            [_answer(rank) for rank in range(12) if rank != 9],
            [{"rank": 9, "host": "n1", "pid": 109, "step": 7, "phase": "data", "seen": "is stopped (SIGSTOP)"}],
            "rank 9 (host n1, process 109) is stopped (SIGSTOP), last heartbeat in step 7 (data); waiting for 30 s "
            "(parallel.timeout_s): ranks 0, 1, 2, 3, 4, 5, 6, 7 and 3 more in step 7 (forward) in all_gather "
            "(group tp)",
        ),
        (  # rank 3 still runs too, but a step later: it has yet to wait
            {"why": "timeout"},
            [_answer(0), _answer(1, waits=False, step=6), _answer(2, phase="graph"), _answer(3, waits=False)],
            [],
            "rank 1 (host n0, process 101) is in step 6 (forward), in f (g.py:1), for 30 s; waiting for 30 s "
            "(parallel.timeout_s): rank 0 in step 7 (forward) in all_gather (group tp), rank 2 in step 7 (graph) in "
            "all_gather (group tp)",
        ),
        (
            {"why": "timeout"},
            [_answer(0), _answer(1, collective="all_reduce (group dp)")],
            [],
            "no rank goes on; waiting for 30 s (parallel.timeout_s): rank 0 in step 7 (forward) in all_gather "
            "(group tp), rank 1 in step 7 (forward) in all_reduce (group dp)",
        ),
        (
            {"why": "no route", "judge": 0, "failed": "all_reduce (group dp)"},
            [_answer(0, waits=False)],
            [{"rank": 1, "host": "n1", "pid": 9, "step": 0, "phase": "start-up", "ended": "has ended with status 2"}],
            "rank 1 (host n1, process 9) has ended with status 2, last heartbeat in start-up; on rank 0 all_reduce "
            "(group dp) failed: no route",
        ),
    ],
)
def test_verdicts(alarm, answers, silent, line):
    assert verdict(alarm, answers, silent, 30) == line


def test_a_frame_between_lines_has_a_place():
    """Python says at moments that a frame is in no line: a watchdog that failed of it would end nothing."""
    seen, done = [], threading.Event()

    def work():
        while not done.is_set():
            pass

    def look():
        while main_frame().f_code.co_name != "work":
            time.sleep(0.01)
        seen.extend([main_frame().f_lineno, standing().at])
        done.set()

    work.__code__ = work.__code__.replace(co_linetable=b"")
    looker = threading.Thread(target=look)
    looker.start()
    work()
    looker.join()
    assert seen[0] is None and seen[1].startswith("work (test_failures.py:")
