"""How a signal ends a run: SIGINT at once, SIGTERM and SIGUSR1 after a checkpoint, each within a given time.

Ctrl-C sends SIGINT. SIGTERM comes from ``scancel``, pre-emption and torchrun; SIGUSR1 is Slurm's warning before the end
of a job (``--signal=USR1@120``). A signal may reach some of the ranks only, or all at different times.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_train.errors import LEFT
from minimax_train.metrics.console import to_stderr

# From a SIGINT to the end of a process that does not come to it by itself; torchrun kills after 30.
_INTERRUPT_S = 20.0
_SAVING = (signal.SIGTERM, signal.SIGUSR1)


class Leave:
    """What signals ask of this process, and what the ranks agree on.

    Args:
        rank: of this process, for messages.
    """

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._asked = 0  # number of the signal
        self._limit: tuple[float, Callable[[], str]] | None = None
        self._vote: tuple[dist.Work, Tensor] | None = None
        self._tells: socket.socket | None = None
        self._timers: list[threading.Timer] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Inside, signals are answered, by a thread: it also ends a process that waits for another rank, where Python
        cannot raise anything. A signal that was ignored before stays ignored.

        The first SIGINT raises KeyboardInterrupt and others do nothing: torchrun repeats a Ctrl-C.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        told, self._tells = socket.socketpair()
        self._tells.setblocking(False)
        thread = threading.Thread(target=self._answer, args=(told,), name="signals", daemon=True)
        thread.start()
        wakeup, before = signal.set_wakeup_fd(self._tells.fileno()), {}
        for number, handler in [(signal.SIGINT, _interrupt), *((number, _go_on) for number in _SAVING)]:
            if signal.getsignal(number) != signal.SIG_IGN:  # SIGINT is, in the background of a shell script
                before[number] = signal.signal(number, handler)
                # Not every library repeats a system call that a signal cut short.
                signal.siginterrupt(number, number == signal.SIGINT)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._tells.close()
            thread.join()
            for timer in self._timers:
                timer.cancel()

    def begin(self, within_s: float, to_go_on: Callable[[], str]) -> None:
        """The run trains from here on. Before, SIGTERM and SIGUSR1 end the process at once.

        Args:
            within_s: seconds from the signal to the end of a process that does not come to it by itself.
            to_go_on: says what the run can go on from; called in another thread.
        """
        self._limit = within_s, to_go_on

    def agreed(self) -> int:
        """The signal at which all ranks leave now, the same on all of them; 0 for none. Called by all ranks together,
        once a step. None waits for another: a call reads what the ranks said in the call before.
        """
        if dist.get_world_size() == 1:
            return self._asked
        agreed = 0
        if self._vote is not None:
            work, vote = self._vote
            work.wait()
            agreed, self._vote = int(vote), None
        if agreed and not self._asked and self._tells is not None:
            self._tells.send(bytes([agreed]))  # the time of this process begins too
        if not agreed:
            vote = torch.tensor(self._asked)
            work = dist.all_reduce(vote, dist.ReduceOp.MAX, async_op=True)
            assert work is not None
            self._vote = work, vote
        return agreed

    def _answer(self, told: socket.socket) -> None:
        """Until the other end of the socket is closed."""
        with told:
            while number := told.recv(1):
                asked = number[0]
                if asked == signal.SIGINT:
                    self._end_after(_INTERRUPT_S, "interrupted", None, 130)
                elif asked in _SAVING and not self._asked:
                    name = signal.Signals(asked).name
                    if self._limit is None:
                        self._end(f"{name} before the first step", LEFT)
                    self._asked = asked
                    self._end_after(self._limit[0], name, self._limit[1], LEFT)

    def _end_after(self, seconds: float, why: str, to_go_on: Callable[[], str] | None, status: int) -> None:
        def end() -> None:
            line = f"{why}; what ran did not end within {seconds:g} s and was left"
            self._end(line if to_go_on is None else f"{line}; {to_go_on()}", status)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _end(self, line: str, status: int) -> NoReturn:
        to_stderr(f"{f'rank {self._rank}: ' if self._rank else ''}error: {line}")
        os._exit(status)


def _interrupt(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _go_on(number: int, frame: object) -> None:
    """The thread answers."""
