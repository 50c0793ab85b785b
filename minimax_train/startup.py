"""Where the time goes from the start of a process to the end of its first step."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Startup:
    """Seconds by phase; made when all is imported, and what was before that is the first phase."""

    def __init__(self) -> None:
        self._phases = {"imports": process_age()}
        self._marked = time.perf_counter()

    def mark(self, phase: str) -> None:
        """What was done since the mark before belongs to this phase."""
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._marked
        self._marked = now

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._phases.items())
        return f"started in {sum(self._phases.values()):.1f} s: {phases}"


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python does not look for cyclic garbage. Imports make half a million objects, almost all of which stay,
    and have all that there are searched again and again: a fourth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def process_age() -> float:
    """Seconds since the system started this process; 0 where it does not say (other than Linux)."""
    try:
        # Behind the name in parentheses, which may hold anything, begins the third field; the start is the 22nd.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError):
        return 0.0
