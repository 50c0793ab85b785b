"""The streams that an expert layer's transfers run on, one of each axis, and the phases that send rows.

Who may use memory when: a tensor belongs to the stream it was made on, and its memory goes to the next tensor made
there as soon as nothing in Python refers to it. So whatever happens on a lane first waits for a mark of the computing
stream, and writes no memory handed out there after that mark; and whoever passes a tensor to another stream keeps it
until its own stream has waited for that one. ``record_stream`` is not used: it withholds memory until the host next
looks.

Shape legend: N rows as they arrive, ``etp * padded``, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minimax_train.parallel.communicator import Communicator

if TYPE_CHECKING:
    from minimax_train.parallel.experts.plan import Group

Mark = torch.cuda.Event | None  # None on a CPU, where all is done in order


def mark(like: Tensor) -> Mark:
    """What the current stream has been given so far."""
    return torch.cuda.current_stream(like.device).record_event() if like.is_cuda else None


def wait(done: Mark) -> None:
    """Let the current stream wait for a mark."""
    if done is not None:
        torch.cuda.current_stream().wait_event(done)


class Lane:
    """An axis: its communicator, and the stream from which its transfers are started."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.size, self.rank = communicator.size, communicator.rank
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def after(self, done: Mark) -> Iterator[None]:
        """What is started inside waits for this mark and for the lane, and not for other work of the current stream."""
        if done is None:
            yield
            return
        if self._stream is None:
            # Before the products: a transfer that gets no processors when it is ready waits for a whole product.
            self._stream = torch.cuda.Stream(priority=-1)
        self._stream.wait_event(done)
        with torch.cuda.stream(self._stream):
            yield


class Arriving(NamedTuple):
    """Rows ``[N, D]``, when they are there, and what must live until they go back."""

    rows_ND: Tensor
    done: Mark
    kept: Tensor | None = None


def dispatch(group: Group, x_RD: Tensor, arranged_MD: Tensor, start: Mark, ep: Lane, etp: Lane) -> Arriving:
    """A group's rows ``[R, D]`` at home -> ``[N, D]`` where their experts are, by etp rank, ep rank and expert.

    Where that is by expert already, they arrive in their place in ``arranged_MD``.
    """
    with ep.after(start):
        arriving = arranged_MD[group.here] if group.arrives_arranged else x_RD.new_empty(group.padded, x_RD.shape[1])
        rows = ep.communicator.all_to_all(x_RD[group.home], arriving, group.sends, group.receives).wait()
        done = mark(rows)
    received = rows
    if etp.size > 1 and group.padded:
        with etp.after(done):
            rows = etp.communicator.all_gather(rows).wait().flatten(0, 1)
            done = mark(rows)
    return Arriving(rows, done, received)


def send_back(
    group: Group, y_ND: Tensor, home_RD: Tensor, done: Mark, ep: Lane, etp: Lane
) -> tuple[Mark, tuple[Tensor, ...]]:
    """A group's rows ``[N, D]`` where their experts are -> into ``[R, D]`` at home, summed over etp.

    Returns:
        When they are there, and what must live until then.
    """
    rows = y_ND
    if etp.size > 1 and group.padded:
        with etp.after(done):
            rows = etp.communicator.reduce_scatter(y_ND.unflatten(0, (etp.size, -1))).wait()
            done = mark(rows)
    with ep.after(done):
        ep.communicator.all_to_all(rows, home_RD[group.home], group.receives, group.sends).wait()
        return mark(rows), (y_ND, rows)
