"""What a run shows on a real terminal, and in a log."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from fcntl import ioctl

import pytest

from minimax_train.metrics.console import count, duration

# Records of a run of 40 steps; at its end the table stays.
RUN = """
from minimax_train.metrics.console import ConsoleReporter
shown = ConsoleReporter(40, 10)
shown.stage = "decay"
for step in range(11, 33):
    shown.report(step, {"loss": 60 / step, "grad_norm": 0.5, "tokens_per_second": 123456.7, "tokens": 2 * 10**9,
        "learning_rate": 3e-4, "expert_load_max": 1.25, "seconds_left": 3700.0, "slowest_seconds/data": 0.02,
        "slowest_rank/data": 3})
shown.report(32, {"validation_loss": 2.5})
shown.close()
"""


def _on_terminal(columns):
    """The rows of the table as a terminal of so many columns shows them in the end."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": ""}
    process = subprocess.Popen([sys.executable, "-P", "-c", RUN], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    timer = threading.Timer(60, process.kill)
    timer.start()
    written = b""
    try:
        while part := os.read(ours, 2**16):
            written += part
    except OSError:  # the other end is closed
        pass
    timer.cancel()
    assert process.wait() == 0, written
    last = re.split(r"\x1b\[1A\x1b\[2K", written.decode())[-1]
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).splitlines()], written.decode()


@pytest.mark.parametrize(("columns", "cells"), [(60, 2), (130, 4)])
def test_a_live_table_on_a_terminal(columns, cells):
    lines, written = _on_terminal(columns)
    assert all(len(line) <= columns for line in lines)
    (head,) = (line for line in lines if line.startswith("decay"))
    assert "step 32 of 40" in head and head.endswith("1 h 1 min left")
    first = lines[lines.index(head) + 1]
    names = ["loss", "tokens/s", "grad norm", "held-out loss"][:cells]
    assert re.findall(r"[a-z][\w/-]*(?: [a-z]+)*", first) == names and first.split()[1] == "1.8750"
    assert lines[-1] == "slowest: data rank 3 0.02 s"
    assert "step 32/40  decay  held-out loss 2.5000" in written  # stays above the table


def test_plain_lines_in_a_log():
    result = subprocess.run([sys.executable, "-P", "-c", RUN], capture_output=True, text=True, timeout=60)
    lines = result.stdout.splitlines()
    assert "\x1b" not in result.stdout and len(lines) == 23
    assert lines[0] == "step 11/40  decay  loss 5.4545  grad 0.50  lr 3.00e-04  2,000,000,000 tokens  123,457 tok/s"


def test_durations_and_counts():
    given = [0.2, 12, 245, 3600, 12_010, 97_200, 360_000]
    assert list(map(duration, given)) == ["0 s", "12 s", "4 min 5 s", "1 h", "3 h 20 min", "1 d 3 h", "4 d 4 h"]
    assert list(map(count, [12, 999_999, 1_234_567, 123_456_789_012])) == ["12", "999,999", "1.235 M", "123.5 B"]
