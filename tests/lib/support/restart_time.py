"""How long a run stands still when one of its processes is killed: until the step after the newest checkpoint is done.

    PYTHONPATH=tests/lib python tests/lib/support/restart_time.py [--device cuda] [--ranks 2] [overrides]

A run of ``minimax-launch local --max-restarts=1``, whose rank 1 gets SIGKILL after a few steps. Exits with 1 if it does
not go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.runs import ON_GPU, overrides

LIMIT_S, STEP = 300, 20


def processes(parent: int) -> list[int]:
    """All that descend from a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found += [int(stat.parent.name), *processes(int(stat.parent.name))]
    return found


def rank_of(pid: int) -> str | None:
    try:
        environment = dict(part.partition(b"=")[::2] for part in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    # Data workers and writers have their rank's variables, and the repository's folder may have the command's name.
    is_rank = any(part.rpartition(b"/")[2] == b"minimax-train" for part in command)
    return environment.get(b"RANK", b"").decode() if is_rank else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    endless = ["recipe.steps=100000", "recipe.eval_interval=0", "checkpoint.interval=5", "logging.interval=1"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = overrides(folder, *endless, *(ON_GPU if options.device == "cuda" else []), *options.overrides)
        launch = [str(Path(sys.executable).with_name("minimax-launch")), "local", "--max-restarts=1"]
        with (folder / "output").open("w") as output:
            run = subprocess.Popen(
                [*launch, f"--nproc-per-node={options.ranks}", "--", *own],
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        metrics = folder / "run/metrics.jsonl"

        def last_step() -> int:
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

        def wait(done) -> bool:
            deadline = time.monotonic() + LIMIT_S
            while not done() and time.monotonic() < deadline and run.poll() is None:
                time.sleep(0.02)
            return done()

        try:
            if not wait(lambda: last_step() >= STEP):
                print((folder / "output").read_text())
                return 1
            (victim,) = (pid for pid in processes(run.pid) if rank_of(pid) == "1")
            inode = metrics.stat().st_ino
            os.kill(victim, signal.SIGKILL)
            killed, reached = time.monotonic(), last_step()
            # The restarted run writes the file anew, with the steps up to its checkpoint.
            began = wait(lambda: metrics.stat().st_ino != inode)
            saved = last_step() if began else 0
            if not began or not wait(lambda: last_step() > saved):
                print((folder / "output").read_text())
                return 1
            first = time.monotonic() - killed
            wait(lambda: last_step() > reached)
            again = time.monotonic() - killed
        finally:
            for pid in processes(run.pid):
                os.kill(pid, signal.SIGKILL)
            run.kill()
            run.wait()
    print(f"killed in step {reached + 1}; step {saved + 1} is done after {first:.1f} s, and so far after {again:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
