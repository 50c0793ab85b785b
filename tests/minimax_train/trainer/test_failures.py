"""A rank that dies or stands still ends the others with an error, within the configured time."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from support.runs import overrides

TIMEOUT_S = 8


def _start(folder, arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "minimax_train", *arguments],
            cwd=folder,
            env={**shared, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("cp", [1, 2])
def test_the_other_rank_ends_too(tmp_path, blow, cp):
    endless = ["recipe.steps=100000", "recipe.eval_interval=0", "checkpoint.interval=0"]
    parallel = [f"parallel.timeout_s={TIMEOUT_S}", f"parallel.cp={cp}", "data.sequence_length=64"]
    processes = _start(tmp_path, overrides(tmp_path, *endless, *parallel))
    try:
        metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 90
        while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 3):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        assert metrics.read_text().count("\n") >= 3
        processes[1].send_signal(blow)
        struck = time.monotonic()
        _, error = processes[0].communicate(timeout=TIMEOUT_S + 30)
        assert time.monotonic() - struck < TIMEOUT_S + 15
        assert processes[0].returncode not in (0, None)
        assert "Error" in error
    finally:
        for process in processes:
            process.kill()
            process.wait()
