"""The named phases of a step: one name for the profiler's traces and for the metrics."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function


class Phases:
    """``with phases("forward"): ...`` marks a phase in profiler traces and adds up the host's seconds in it.

    Phases are ``data``, ``forward`` and ``backward`` (together ``graph``, where they are a CUDA graph), ``optimizer``,
    ``report``, ``evaluate`` and ``checkpoint``. On a GPU the host runs ahead of the device, whose time shows where the
    host waits for it: in ``report``, a step later.

    Attributes:
        step: that the run is at, from 1; 0 at its start.
        phase: that it is in, or ``after`` which it is.
        progress: changes with every phase and at every :meth:`tick`.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self.step, self.phase, self.progress = 0, "start-up", 0

    def begin_step(self, step: int) -> None:
        self.step = step
        self.tick()

    def tick(self) -> None:
        """Tell that a long phase goes on."""
        self.progress += 1

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.phase = name
        self.tick()
        with record_function(name):
            yield
        self._seconds[name] += time.perf_counter() - started
        self.phase = f"after {name}"
        self.tick()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
