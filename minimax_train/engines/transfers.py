"""Transfers of data parallelism that go on while a micro-batch is computed, with CUDA graphs and without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from minimax_train.capture import Recording
from minimax_train.parallel.communicator import Pending


class Transfers:
    """Transfers, each of which can be started again once it was waited for.

    Args:
        begins: start each, on memory that stays where it is.
        replayed: each is captured in a CUDA graph of its own when it is started for the second time, so that a start is
            one launch, where it takes a call for each of a block's tensors.
        in_graph: those that are started while a micro-batch is captured become part of its graph, at whose end they are
            done. If not, they are started where that graph ends, and go on beside the next.
    """

    def __init__(self, begins: Sequence[Callable[[], Pending]], *, replayed: bool, in_graph: bool = False) -> None:
        self._begins, self._in_graph = begins, in_graph
        if replayed:
            stream = torch.cuda.Stream()
            self._begins = [_Replayed(begin, stream) for begin in begins]
        self._under_way = dict[int, Pending]()

    def start(self, index: int) -> None:
        if (recording := _capturing()) is None:
            self._start(index)
        elif self._in_graph:
            recording.join(self._begins[index]().wait)
        else:
            recording.between(partial(self._start, index))

    def _start(self, index: int) -> None:
        self._under_way[index] = self._begins[index]()

    def wait(self, indices: Sequence[int]) -> None:
        """Wait for those that are under way. Each replay of a graph that is captured then waits for what was started
        last before it."""
        for index in indices:
            # In a capture it stays under way: each graph of the recording that needs it has a node of its own.
            own = self._under_way.pop(index, None) if _capturing() is None else self._under_way.get(index)
            if own is not None:
                own.wait()

    def wait_all(self) -> None:
        """At the end of a micro-batch."""
        if (recording := _capturing()) is None:
            self._wait_all()
        else:  # also for what its calls have started
            recording.between(self._wait_all)

    def _wait_all(self) -> None:
        self.wait(list(self._under_way))

    def drop(self) -> None:
        """Those under way: of a pass that could not be captured."""
        self._under_way.clear()


class _Replayed:
    """Starts a transfer on a stream of its own."""

    def __init__(self, begin: Callable[[], Pending], stream: torch.cuda.Stream) -> None:
        self._begin, self._stream = begin, stream
        self._graph: torch.cuda.CUDAGraph | None = None
        self._has_run = False
        self._done = torch.cuda.Event(external=True)  # of which a graph that waits for it makes a node

    def __call__(self) -> Pending:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if not self._has_run:
                self._begin().wait()
                self._has_run = True
            else:
                if self._graph is None:
                    self._graph = self._captured()
                self._graph.replay()
            self._done.record()
        return Pending(self._done.wait)

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="relaxed")  # NCCL's watchdog and the loader make calls
        try:
            self._begin().wait()
        finally:
            graph.capture_end()
        return graph


def _capturing() -> Recording | None:
    """The recording into whose graph goes what is launched now."""
    recording = Recording.current
    return None if recording is None or recording.is_calling else recording
