"""The named phases of a step: one name for the profiler's traces and for the metrics."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function

_ON_DEVICE = ("graph", "forward", "backward", "norms", "optimizer")
PHASES = ("data", *_ON_DEVICE, "report", "evaluate", "checkpoint")


class Phases:
    """``with phases("forward"): ...`` marks a phase in profiler traces and adds up the seconds in it.

    Phases are ``data``, ``forward`` and ``backward`` (together ``graph``, where they are a CUDA graph), ``norms``,
    ``optimizer``, ``report``, ``evaluate`` and ``checkpoint``. On a GPU the host runs ahead of the device, whose time
    shows where the host waits for it: in ``report``, a step later. The device's own time in the phases that run on it
    is measured by events, for which nobody waits.

    Args:
        device: of this process.

    Attributes:
        step: that the run is at, from 1; 0 at its start.
        phase: that it is in, or ``after`` which it is.
        progress: changes with every phase and at every :meth:`tick`.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._has_events = device is not None and device.type == "cuda"
        self._events: list[torch.cuda.Event] = []  # to be used again
        self._pending: deque[tuple[int, str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._on_device: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # by step
        self.step, self.phase, self.progress = 0, "start-up", 0

    def begin_step(self, step: int) -> None:
        self.step = step
        self.tick()
        self._add_up_events()

    def tick(self) -> None:
        """Tell that a long phase goes on."""
        self.progress += 1

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.phase = name
        self.tick()
        begin = self._record(name)
        with record_function(name):
            yield
        end = self._record(name)
        if begin is not None and end is not None:
            self._pending.append((self.step, name, begin, end))
        self._seconds[name] += time.perf_counter() - started
        self.phase = f"after {name}"
        self.tick()

    def take(self) -> dict[str, float]:
        """The host's seconds by phase since the last call."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def take_device(self, last: int) -> dict[str, float]:
        """The device's seconds by phase in the steps up to ``last``, which it is done with, since the last call; none
        where it is no GPU."""
        self._add_up_events()
        seconds: dict[str, float] = defaultdict(float)
        for step in [step for step in self._on_device if step <= last]:
            for name, value in self._on_device.pop(step).items():
                seconds[name] += value
        return dict(seconds)

    def _record(self, name: str) -> torch.cuda.Event | None:
        # What is captured in a graph is timed as a whole, where that is replayed.
        if not self._has_events or name not in _ON_DEVICE or torch.cuda.is_current_stream_capturing():
            return None
        event = self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_up_events(self) -> None:
        """Of the phases that the device is done with."""
        while self._pending and self._pending[0][3].query():
            step, name, begin, end = self._pending.popleft()
            self._on_device[step][name] += begin.elapsed_time(end) / 1e3
            self._events += [begin, end]
