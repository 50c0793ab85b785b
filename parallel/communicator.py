"""Communication between ranks: all-gather, reduce-scatter, all-to-all, batches of sends and receives.

The algorithms are given a :class:`Communicator` and know no process group, so the same code runs over NCCL, over gloo,
and over an emulated link (``benchmarks/``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 gave these second names and deprecated the first.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Received = TypeVar("Received", Tensor, None)


@dataclass
class Pending(Generic[Received]):
    """A transfer under way."""

    wait: Callable[[], Received]
    """Blocks the current stream (or the host, on CPU) until the transfer is done; returns what was received, None
    where it is in buffers that the caller gave."""


class Communicator(Protocol):
    """Some ranks, on one axis of a grid. Every method is called by all of them in the same order."""

    rank: int
    size: int

    @abstractmethod
    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Pending[Tensor]:
        """Start gathering equal tensors of all ranks; ``wait()`` returns ``[size, *x.shape]``, by rank.

        In ``out`` if given, which must be contiguous.
        """

    @abstractmethod
    def reduce_scatter(self, x: Tensor, out: Tensor | None = None) -> Pending[Tensor]:
        """Start summing ``[size, ...]`` over all ranks; ``wait()`` returns this rank's slice of the sum.

        In ``out`` if given, which must be contiguous.
        """

    @abstractmethod
    def all_to_all(self, x: Tensor, out: Tensor, input_splits: list[int], output_splits: list[int]) -> Pending[Tensor]:
        """Start sending ``input_splits[r]`` rows of x to each rank r, in order, and receiving ``output_splits[r]``.

        They arrive in ``out``, which ``wait()`` returns. Both tensors may have more rows than are sent or received.
        """

    def all_gather_each(self, xs: Sequence[Tensor], outs: Sequence[Tensor]) -> Pending[None]:
        """:meth:`all_gather` of several contiguous tensors into buffers; over NCCL as one group call."""
        return _all([self.all_gather(x, out) for x, out in zip(xs, outs, strict=True)])

    def reduce_scatter_each(self, xs: Sequence[Tensor], outs: Sequence[Tensor]) -> Pending[None]:
        """:meth:`reduce_scatter` of several contiguous tensors into buffers; over NCCL as one group call."""
        return _all([self.reduce_scatter(x, out) for x, out in zip(xs, outs, strict=True)])

    def all_to_all_each(
        self, xs: Sequence[Tensor], outs: Sequence[Tensor], input_splits: list[int], output_splits: list[int]
    ) -> Pending[None]:
        """:meth:`all_to_all` of several contiguous tensors, as many rows of each; over NCCL as one group call."""
        pairs = zip(xs, outs, strict=True)
        return _all([self.all_to_all(x, out, input_splits, output_splits) for x, out in pairs])

    @abstractmethod
    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Pending[None]:
        """Start sending a tensor to each of some ranks and receiving one from each of some, into the given buffers.

        Buffers may be used again after ``wait()``. Each pair of ranks must agree on what passes between them.
        """


def _all(pending: Sequence[Pending[Any]]) -> Pending[None]:
    def wait() -> None:
        for each in pending:
            each.wait()

    return Pending(wait)


class GroupCommunicator(Communicator):
    """A communicator over a process group: NCCL as it is, gloo with CUDA tensors staged through the host.

    Args:
        group: the ranks, in the order of the axis. Over NCCL it must have been made with a ``device_id``, which sets
            its connections up at once: a first exchange between some ranks only would wait for the others.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # get_backend names all of a group's backends at once ("cpu:gloo,cuda:nccl"): ask for the device's.
        self._is_nccl = "cuda:nccl" in dist.get_backend_config(group)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Pending[Tensor]:
        return self._start(_all_gather, x, x.new_empty(self.size, *x.shape) if out is None else out)

    def reduce_scatter(self, x: Tensor, out: Tensor | None = None) -> Pending[Tensor]:
        return self._start(_reduce_scatter, x, x.new_empty(x.shape[1:]) if out is None else out)

    def all_gather_each(self, xs: Sequence[Tensor], outs: Sequence[Tensor]) -> Pending[None]:
        return self._start_each(_all_gather, [*zip(xs, outs, strict=True)])

    def reduce_scatter_each(self, xs: Sequence[Tensor], outs: Sequence[Tensor]) -> Pending[None]:
        return self._start_each(_reduce_scatter, [*zip(xs, outs, strict=True)])

    def all_to_all_each(
        self, xs: Sequence[Tensor], outs: Sequence[Tensor], input_splits: list[int], output_splits: list[int]
    ) -> Pending[None]:
        pairs = zip(xs, outs, strict=True)
        operations = [_sent_and_received(x, out, input_splits, output_splits) for x, out in pairs]
        return self._start_each(dist.all_to_all_single, operations)

    def _start_each(self, collective: Callable, operations: Sequence[tuple[Any, ...]]) -> Pending[None]:
        """
        Args:
            operations: of each what is sent, a buffer, and splits as ``all_to_all_single`` takes them.
        """
        device = operations[0][0].device
        if len(operations) == 1 or not (self._is_nccl and device.type == "cuda"):
            return _all([self._start(collective, *operation) for operation in operations])
        # Not the group's own coalesced collectives: those of a capture stay in the flight recorder as never ended.
        group = self.group
        group._start_coalescing(device)
        try:
            for x, out, *splits in operations:
                collective(out.view(-1), x.contiguous().view(-1), *splits, group=group, async_op=True)
        finally:  # else all that comes later would be part of it
            work = group._end_coalescing(device)
        return Pending(lambda: (work.wait(), None)[1])

    def _start(self, collective: Callable, x: Tensor, out: Tensor, *splits: list[int]) -> Pending[Tensor]:
        x = x.contiguous()
        if not self._is_nccl and x.is_cuda:  # gloo
            host = self._start(collective, x.cpu(), out.new_empty(out.shape, device="cpu"), *splits)
            return Pending(lambda: out.copy_(host.wait()))
        work = collective(out.view(-1), x.view(-1), *splits, group=self.group, async_op=True)
        return Pending(lambda: (work.wait(), out)[1])

    def all_to_all(self, x: Tensor, out: Tensor, input_splits: list[int], output_splits: list[int]) -> Pending[Tensor]:
        operation = _sent_and_received(x, out, input_splits, output_splits)
        pending = self._start(dist.all_to_all_single, *operation)
        return Pending(lambda: (pending.wait(), out)[1])

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Pending[None]:
        if not sends and not receives:
            return Pending(lambda: None)
        staged = not self._is_nccl and any(x.is_cuda for x in [*sends.values(), *receives.values()])
        outgoing = {peer: x.contiguous().cpu() if staged else x.contiguous() for peer, x in sends.items()}
        incoming = {peer: torch.empty_like(x, device="cpu") if staged else x for peer, x in receives.items()}
        operations = [
            *(dist.P2POp(dist.isend, x, group=self.group, group_peer=peer) for peer, x in outgoing.items()),
            *(dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer) for peer, x in incoming.items()),
        ]
        works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            for work in works:
                work.wait()
            if staged:
                for peer, x in incoming.items():
                    receives[peer].copy_(x)
            outgoing.clear()  # kept alive until here

        return Pending(wait)


def _sent_and_received(
    x: Tensor, out: Tensor, input_splits: list[int], output_splits: list[int]
) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """What an all-to-all takes: the rows, and how many elements come from and go to each rank."""
    row = prod(x.shape[1:])
    received, sent = ([row * rows for rows in splits] for splits in (output_splits, input_splits))
    return x[: sum(input_splits)], out[: sum(output_splits)], received, sent


def transfer_options(max_ctas: int | None = None) -> dist.ProcessGroupNCCL.Options:
    """How NCCL is to run transfers beside GEMMs: one that becomes ready gets SMs as soon as any is free, rather than
    when the GEMMs that were queued before it are done.

    Every group needs options of its own: making the group writes in them.

    Args:
        max_ctas: the most SMs a transfer may hold; None for NCCL's own choice.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if max_ctas is not None:
        options.config.max_ctas = max_ctas
    return options
