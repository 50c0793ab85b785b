"""When a run will be done."""

from __future__ import annotations

import time
from collections import deque

_REPORTS = 50


class TimeLeft:
    """Goes by the tokens and the time between the last reports, with the evaluations and checkpoints among them.

    Args:
        tokens: that the run has trained on when this process begins.
    """

    def __init__(self, tokens: int) -> None:
        self._began = time.perf_counter(), tokens
        self._seen: deque[tuple[float, int]] = deque(maxlen=_REPORTS)

    def add(self, tokens: int) -> None:
        """At a report."""
        self._seen.append((time.perf_counter(), tokens))

    def seconds(self, tokens: int) -> float:
        """That so many more tokens will take."""
        # From the first report on, where there are several: until then kernels were compiled.
        (began, before), (now, after) = self._seen[0] if len(self._seen) > 1 else self._began, self._seen[-1]
        return tokens * (now - began) / (after - before)
