"""One call at a time on a thread beside the caller's."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

_EXIT_TIMEOUT_S = 5.0


@dataclass
class _Shared:
    """What the thread and the owner's finalizer both hold; it must not hold the owner."""

    stop: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    error: BaseException | None = None


class Background:
    """Runs ``work(stopped)`` on a thread; ``wait`` returns when it is done and raises what it raised.

    Work that takes long asks ``stopped()`` now and then and returns early. An error stays until ``stop``: the work
    may have left its objects half-way. The thread is a daemon, and at exit it is asked to stop and given five seconds:
    neither a hung read nor a thread killed inside native code spoils the exit.
    """

    def __init__(self) -> None:
        self._shared = _Shared()
        weakref.finalize(self, _stop, self._shared, _EXIT_TIMEOUT_S)

    def start(self, work: Callable[[Callable[[], bool]], None]) -> None:
        """Starts the work; the one before must have been waited for."""
        shared = self._shared
        assert shared.thread is None, "wait for the work before starting more"

        def run() -> None:
            try:
                work(shared.stop.is_set)
            except BaseException as error:
                shared.error = error

        shared.thread = threading.Thread(target=run, name="data-prefetch", daemon=True)
        shared.thread.start()

    def wait(self) -> None:
        """Waits for the work, if there is any, and raises its error."""
        if self._shared.thread is not None:
            self._shared.thread.join()
            self._shared.thread = None
        if self._shared.error is not None:
            raise self._shared.error

    def stop(self) -> None:
        """Asks the work to stop, waits for it, and forgets its error."""
        shared = self._shared
        _stop(shared, None)
        shared.stop.clear()
        shared.thread = shared.error = None


def _stop(shared: _Shared, timeout: float | None) -> None:
    shared.stop.set()
    # By its number: at its very end a thread no longer is its own current_thread(), and may still collect garbage.
    if shared.thread is not None and shared.thread.ident != threading.get_ident():
        shared.thread.join(timeout)
