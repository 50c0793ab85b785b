"""Ranks that a fault ends, and all that ``minimax-launch local --max-restarts`` starts again in their place."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.commands import Command
from support.restart_time import processes, rank_of
from support.runs import overrides


def _steps(run):
    """Loss, gradient norm and tokens of each step in the run's metrics, which have it once."""
    path = run / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.endswith("}") and "loss" in (record := json.loads(line)):
            assert record["step"] not in found, "counted twice"
            found[record["step"]] = record["loss"], record["grad_norm"], record["tokens"]
    return found


def test_a_run_that_is_struck_twice_ends_as_one_that_is_not(tmp_path):
    """A rank that is stopped is found after ``parallel.timeout_s``, one that is killed at once; both times all end and
    go on from the newest checkpoint."""
    settings = ["engine.precision=float64", "recipe.steps=40", "recipe.eval_interval=0", "logging.interval=1"]
    settings += ["checkpoint.interval=5", "parallel.timeout_s=4"]
    run, command = tmp_path / "struck" / "run", [str(Path(sys.executable).with_name("minimax-launch")), "local"]
    command += ["--nproc-per-node=2", "--max-restarts=2", "--", *overrides(tmp_path / "struck", *settings)]
    with (tmp_path / "output").open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    told = (tmp_path / "output").read_text

    def wait(until):
        deadline = time.monotonic() + 120
        while not until():
            assert launcher.poll() is None and time.monotonic() < deadline, told()
            time.sleep(0.02)

    try:
        for start, (rank, number) in enumerate([(1, signal.SIGSTOP), (0, signal.SIGKILL)]):
            wait(lambda start=start: max(_steps(run), default=0) > 8 + 10 * start)
            (pid,) = (pid for pid in processes(launcher.pid) if rank_of(pid) == str(rank))
            written = (run / "metrics.jsonl").stat().st_ino  # anew by each start
            os.kill(pid, number)
            wait(lambda written=written: (run / "metrics.jsonl").stat().st_ino != written)
        assert launcher.wait(120) == 0, told()
    finally:
        if launcher.poll() is None:
            for pid in [*processes(launcher.pid), launcher.pid]:
                os.kill(pid, signal.SIGKILL)
            launcher.wait()
    assert "rank 1 (host" in told() and "is stopped (SIGSTOP)" in told()
    assert "rank 0 (host" in told() and "which holds the store" in told()
    whole = tmp_path / "whole"
    assert Command(tmp_path, overrides(whole, *settings)).finish(120).status == 0
    expected = _steps(whole / "run")
    assert sorted(expected) == list(range(1, 41))
    steps = _steps(run)
    assert steps.keys() == expected.keys()
    for step, values in expected.items():
        assert steps[step] == pytest.approx(values, rel=1e-10), step
