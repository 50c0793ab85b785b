"""Transfers beside GEMMs: streams, what keeps memory alive between them, and the order in which groups go.

Who may use memory when: PyTorch's allocator gives the memory of a tensor that nothing in Python refers to any more to
the next tensor made on the same stream, and knows nothing of other streams that still read or write it. Hence two
rules. Before a communication stream writes to memory of the compute stream, it waits for an event of that stream which
was recorded after the memory was handed out. And a tensor that another stream uses is kept, by the :class:`Transfer`
that uses it, until its own stream has been told to wait for that one. ``record_stream`` is not used: it withholds
memory until the host next looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimax_train.parallel.communicator import Communicator

if TYPE_CHECKING:
    from minimax_train.parallel.experts.dispatchers import RoutedTokenDispatcher, TokenDispatcher

# Groups under way beside the one that is computed: one is sent, one is gathered.
AHEAD = 2
Event = torch.Event | None  # None on a CPU, where all is done in order


def record_event(like: Tensor) -> Event:
    """What the current stream has been given so far."""
    return torch.cuda.current_stream(like.device).record_event() if like.is_cuda else None


def wait_event(event: Event) -> None:
    """Let the current stream wait."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


class Transfer:
    """A tensor whose contents are complete after an event. Keeps it, and those it was made from, until ``release``."""

    def __init__(self, tensor: Tensor, event: Event, source: Transfer | None = None) -> None:
        self.tensor, self.event, self._kept = tensor, event, source

    def __getitem__(self, index: slice) -> Transfer:
        return Transfer(self.tensor[index], self.event, self)

    def wait(self) -> Tensor:
        """Let the current stream wait for it."""
        wait_event(self.event)
        return self.tensor

    def synchronize(self) -> Tensor:
        """Let the host wait for it."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor

    def release(self) -> None:
        """Let go of the memory: the streams that it belongs to have been told to wait for those that use it."""
        del self.tensor, self._kept


def computed(*xs: Tensor) -> list[Transfer]:
    """Tensors that the current stream is computing."""
    event = record_event(xs[0])
    return [Transfer(x, event) for x in xs]


class CommunicationStream:
    """An axis of ranks: its communicator, and the stream from which its transfers are started."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.size, self.rank = communicator.size, communicator.rank
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def _after(self, xs: Sequence[Transfer]) -> Iterator[None]:
        """What is started inside waits for these and for what this axis was given before, and for no other work of the
        current stream."""
        events = {id(x.event): x.event for x in xs if x.event is not None}
        if not events:
            yield
            return
        if self._stream is None:
            # Before the GEMMs: a transfer that gets no SMs when it is ready waits for a whole GEMM.
            self._stream = torch.cuda.Stream(priority=-1)
        for event in events.values():
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            yield

    def all_gather(self, *xs: Transfer, into: Tensor | None = None) -> list[Transfer]:
        """``[n, ...] -> [size * n, ...]`` of each, by rank; the first into a buffer, if one is given."""
        if self.size == 1 or not xs[0].tensor.numel():
            return [*xs]
        with self._after(xs):
            outs = _buffers(xs, into, self.size * len(xs[0].tensor))
            by_rank = [out.unflatten(0, (self.size, -1)) for out in outs]
            self.communicator.all_gather_each([x.tensor for x in xs], by_rank).wait()
            return _made(outs, xs)

    def reduce_scatter(self, *xs: Transfer, into: Sequence[Tensor] | None = None) -> list[Transfer]:
        """``[size * n, ...] -> [n, ...]`` of each, this rank's rows of the sum over ranks; into buffers, if given."""
        if self.size == 1 or not xs[0].tensor.numel():
            return [*xs]
        with self._after(xs):
            outs = _buffers(xs, None, len(xs[0].tensor) // self.size) if into is None else into
            by_rank = [x.tensor.unflatten(0, (self.size, -1)) for x in xs]
            self.communicator.reduce_scatter_each(by_rank, outs).wait()
            return _made(outs, xs)

    def all_to_all(
        self,
        xs: Sequence[Transfer],
        input_splits: list[int],
        output_splits: list[int],
        into: Sequence[Tensor | None],
        rows: int = 0,
    ) -> list[Transfer]:
        """Rows of each to and from each rank; into buffers, or into as many new rows."""
        with self._after(xs):
            pairs = zip(xs, into, strict=True)
            outs = [x.tensor.new_empty(rows, *x.tensor.shape[1:]) if out is None else out for x, out in pairs]
            self.communicator.all_to_all_each([x.tensor for x in xs], outs, input_splits, output_splits).wait()
            return _made(outs, xs)

    def to_host(self, x: Transfer) -> Transfer:
        """To pinned memory, so that the host goes on."""
        with self._after([x]):
            return Transfer(x.tensor.to("cpu", non_blocking=True), record_event(x.tensor), x)


def _buffers(xs: Sequence[Transfer], first: Tensor | None, rows: int) -> list[Tensor]:
    made = [x.tensor.new_empty(rows, *x.tensor.shape[1:]) for x in xs[first is not None :]]
    return made if first is None else [first, *made]


def _made(outs: Sequence[Tensor], xs: Sequence[Transfer]) -> list[Transfer]:
    event = record_event(outs[0])
    return [Transfer(out, event, x) for out, x in zip(outs, xs, strict=True)]


def split_groups(size: int, groups: int) -> list[slice]:
    """The overlap schedule: ``range(size)`` as consecutive equal groups, but the first and the last half as large.

    The first dispatch and the last combine have no GEMMs to run beside, so they should be short.
    """
    shares = [1, *[2] * (groups - 2), 1][:groups]
    ends = [(2 * size * done + sum(shares)) // (2 * sum(shares)) for done in accumulate(shares)]
    return [slice(*edges) for edges in pairwise([0, *ends])]


class OverlappedRoundTrip:
    """A round trip (:class:`minimax_train.kernels.experts.mlp.Dispatcher`): two groups travel while one is computed.
    A group is of the dispatcher's own type.

    Args:
        x_TD: the tokens.
        residual: their factor in what :meth:`wait` returns.
        sent: the tokens, or routed tokens, and their weights if they have any.
    """

    def __init__(
        self, dispatcher: RoutedTokenDispatcher | TokenDispatcher, x_TD: Tensor, residual: float, *sent: Tensor
    ) -> None:
        self._dispatcher, self._x_TD, self._residual = dispatcher, x_TD, residual
        sent = tuple(x.contiguous() for x in sent)
        self.dispatched_ND = sent[0].new_empty(dispatcher.num_dispatched, sent[0].shape[1])
        self._combined: list[Tensor] = []
        self._sent = computed(*sent)
        self._groups: Iterator[Any] = iter(dispatcher.groups)
        self._under_way: deque[tuple[Any, list[Transfer]]] = deque()
        self._dispatch_next(AHEAD)
        self._returning = [*self._sent, *dispatcher.plan()]

    def _dispatch_next(self, count: int) -> None:
        for group in islice(self._groups, count):
            self._under_way.append((group, self._dispatcher.dispatch_group(group, self._sent, self.dispatched_ND)))

    def __iter__(self) -> Iterator[Any]:
        while self._under_way:
            self._dispatch_next(1)  # before this group's GEMMs take the SMs
            group, self._arrived = self._under_way.popleft()
            for transfer in self._arrived:
                transfer.wait()
            yield group

    def permute(self, group: Any) -> Tensor:
        return self._dispatcher.permute(group, self._arrived[0].tensor, self.dispatched_ND)

    def permute_weights(self, group: Any) -> Tensor:
        return self._dispatcher.permute_weights(group, self._arrived[1].tensor)

    def combine(self, group: Any, y_RD: Tensor, d_weights_R: Tensor | None = None) -> None:
        results = self._dispatcher.unpermute(group, y_RD, d_weights_R)
        if not self._combined:
            self._combined = [x.new_empty(len(self._sent[0].tensor), x.shape[1]) for x in results]
        self._returning += self._dispatcher.combine_group(group, computed(*results), self._combined)
        for transfer in self._arrived:
            transfer.release()

    def wait(self) -> tuple[Tensor, ...]:
        for transfer in self._returning:
            transfer.wait()
            transfer.release()
        return self._dispatcher.received(self._x_TD, self._residual, *self._combined)
