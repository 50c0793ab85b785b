"""Transfers of data parallelism that go on while a micro-batch is computed, with CUDA graphs and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minimax_train.capture import Recording
from minimax_train.parallel.communicator import Pending


class Transfers:
    """Transfers under way, by number of their bucket, each waited for once.

    While a micro-batch is captured, they are part of the graph, or go on beside graphs.

    Args:
        beside: the latter. It takes the host time for each: worth it where a rank's part of all parameters is reduced,
            as context parallelism does, and not with expert parallelism alone, which waits for the host and shares few.
    """

    def __init__(self, beside: bool) -> None:
        self.beside, self._pending = beside, dict[int, Pending]()

    def start(self, bucket: int, begin: Callable[[], Pending]) -> None:
        def run() -> None:
            self._pending[bucket] = begin()

        if (recording := _capturing()) is None:
            run()
        elif self.beside:
            recording.between(run)
        else:
            run()
            recording.join(lambda: self._wait([bucket]))

    def wait(self, buckets: Sequence[int]) -> None:
        recording = _capturing()
        if recording is None or not self.beside:
            self._wait(buckets)
        elif any(bucket in self._pending for bucket in buckets):
            recording.call(lambda: self._wait(buckets), lambda: self._wait(buckets))

    def wait_all(self) -> None:
        """At the end of a micro-batch."""
        if (recording := _capturing()) is None:
            self._wait(list(self._pending))
        else:  # also for what its calls have started
            recording.between(lambda: self._wait(list(self._pending)))

    def _wait(self, buckets: Sequence[int]) -> None:
        for bucket in buckets:
            if (pending := self._pending.pop(bucket, None)) is not None:
                pending.wait()


def _capturing() -> Recording | None:
    """The recording into whose graph goes what is launched now."""
    recording = Recording.current
    return None if recording is None or recording.is_calling else recording
