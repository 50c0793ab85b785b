"""Transfers of data parallelism that go on while a micro-batch is computed, with CUDA graphs and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minimax_train.capture import Recording
from minimax_train.parallel.communicator import Pending


class Transfers:
    """Transfers under way, by parameter, each waited for once.

    While a micro-batch is captured, they are part of the graph, or go on beside graphs.

    Args:
        beside: the latter. It takes the host time for each: worth it where a rank's part of all parameters is reduced,
            as context parallelism does, and not with expert parallelism alone, which waits for the host and shares few.
    """

    def __init__(self, beside: bool) -> None:
        self.beside, self._pending = beside, dict[str, Pending]()

    def start(self, name: str, begin: Callable[[], Pending]) -> None:
        def run() -> None:
            self._pending[name] = begin()

        if (recording := _capturing()) is None:
            run()
        elif self.beside:
            recording.between(run)
        else:
            run()
            recording.join(lambda: self._wait([name]))

    def wait(self, names: Sequence[str]) -> None:
        recording = _capturing()
        if recording is None or not self.beside:
            self._wait(names)
        elif any(name in self._pending for name in names):
            recording.call(lambda: self._wait(names), lambda: self._wait(names))

    def wait_all(self) -> None:
        """At the end of a micro-batch."""
        if (recording := _capturing()) is None:
            self._wait(list(self._pending))
        else:  # also for what its calls have started
            recording.between(lambda: self._wait(list(self._pending)))

    def _wait(self, names: Sequence[str]) -> None:
        for name in names:
            if (pending := self._pending.pop(name, None)) is not None:
                pending.wait()


def _capturing() -> Recording | None:
    """The recording into whose graph goes what is launched now."""
    recording = Recording.current
    return None if recording is None or recording.is_calling else recording
