"""A CPU plays a GPU's streams, to see whether every use of memory comes after those that it must come after.

A CPU does everything in the order it is told to, so what a GPU would do too early goes right there, and so it does
where transfers pass through the host. Here each operation is noted with the stream it would run on. A stream knows how
far it and the others must have come by now: a *clock* per stream, which events carry from one stream to another. Memory
goes as PyTorch's allocator hands it out: a tensor's belongs to the stream it was made on, and once nothing refers to it
any more, whatever is made there next may get it.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimax_train.parallel.communicator import Communicator, Pending

COMPUTE = 0
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Use(NamedTuple):
    """Some bytes of a tensor's memory, used by a stream as its ``time``-th operation."""

    stream: int
    time: int
    begin: int
    end: int
    writes: bool
    where: str

    def excludes(self, other: Use) -> bool:
        return (self.writes or other.writes) and self.begin < other.end and other.begin < self.end


@dataclass
class Memory:
    owner: int
    born: Use
    uses: list[Use] = field(default_factory=list)


class Event:
    """How far a stream must have come, as ``torch.cuda.Event``."""

    def __init__(self, streams: Streams) -> None:
        self.streams, self.clock = streams, streams.clocks[streams.current].copy()

    def synchronize(self) -> None:
        """The host waits, and with it all it says afterwards, to whatever stream."""
        for clock in self.streams.clocks.values():
            clock |= self.clock


class Streams(TorchDispatchMode):
    """While this mode is on, ``problems`` collects what could go wrong.

    Args:
        within: part of the file names of which the innermost is named in a problem.
    """

    def __init__(self, within: str) -> None:
        super().__init__()
        self.within, self.problems = within, set()
        self.clocks: dict[int, Counter] = defaultdict(Counter)
        self._stack, self._numbers = [COMPUTE], count(1)
        self._memory: dict[int, Memory] = {}
        self._freed: dict[int, list[Use]] = defaultdict(list)

    @property
    def current(self) -> int:
        return self._stack[-1]

    def make(self) -> int:
        """A new stream."""
        return next(self._numbers)

    def record_event(self, like: Tensor) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.clocks[self.current] |= event.clock

    @contextmanager
    def on(self, stream: int, *events: Event) -> Iterator[None]:
        self._stack.append(stream)
        for event in events:
            self.wait_event(event)
        try:
            yield
        finally:
            self._stack.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        self.clocks[self.current][self.current] += 1
        written = set()
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name, args[i] if i < len(args) else None)
                written |= {id(x.untyped_storage()) for x in _tensors(value)}
        allocates = func._schema.name.split("::")[1] in ALLOCATIONS
        for x in () if allocates else _tensors((args, kwargs)):
            self._use(x, id(x.untyped_storage()) in written)
        for x in _tensors(out):
            if id(x.untyped_storage()) not in self._memory:
                self._hand_out(x)
                if not allocates:
                    self._use(x, True)
        return out

    def _note(self, x: Tensor, writes: bool) -> Use:
        begin = x.storage_offset() * x.itemsize
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
        frame = sys._getframe()
        while frame is not None and self.within not in frame.f_code.co_filename:
            frame = frame.f_back
        where = "elsewhere" if frame is None else f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        time = self.clocks[self.current][self.current]
        return Use(self.current, time, begin, begin + (last + 1) * x.itemsize, writes, where)

    def _is_over(self, use: Use) -> bool:
        """Whether what the current stream does now comes after that use."""
        return self.clocks[self.current][use.stream] >= use.time

    def _hand_out(self, x: Tensor) -> None:
        born = self._note(x, True)
        self._remember(x.untyped_storage(), Memory(self.current, born))
        for use in self._freed.pop(self.current, []):
            if not self._is_over(use):
                self._problem("handed out while still in use", born, use)

    def _remember(self, storage: torch.UntypedStorage, memory: Memory) -> None:
        self._memory[id(storage)] = memory
        weakref.finalize(storage, self._free, id(storage))

    def _free(self, key: int) -> None:
        memory = self._memory.pop(key)
        self._freed[memory.owner] += memory.uses

    def _use(self, x: Tensor, writes: bool) -> None:
        use = self._note(x, writes)
        if id(x.untyped_storage()) not in self._memory:  # made before
            self._remember(x.untyped_storage(), Memory(COMPUTE, use._replace(stream=COMPUTE, time=0)))
        memory = self._memory[id(x.untyped_storage())]
        if not self._is_over(memory.born):
            self._problem("used before it was handed out", use, memory.born)
        for other in memory.uses:
            if use.excludes(other) and not self._is_over(other):
                self._problem("used while still in use", use, other)
        memory.uses.append(use)

    def _problem(self, what: str, use: Use, other: Use) -> None:
        self.problems.add(f"{what}: {use.where} on stream {use.stream}, {other.where} on stream {other.stream}")


class Link(Communicator):
    """A communicator of which every other rank sends what this one does: transfers on a stream of their own.

    As those of NCCL they begin after what the current stream was given before, keep what they send and fill until
    somebody waits, and only then are later operations told to come after them.
    """

    def __init__(self, streams: Streams, rank: int, size: int) -> None:
        self.streams, self.rank, self.size = streams, rank, size
        self._stream = streams.make()

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Pending:
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape) if out is None else out
        return self._transfer([(x.expand(out.shape), out)], out)

    def reduce_scatter(self, x: Tensor, out: Tensor | None = None) -> Pending:
        out = torch.empty_like(x[0]) if out is None else out
        return self._transfer([(row, out) for row in x.contiguous()], out)

    def all_to_all(self, x: Tensor, out: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Pending:
        rows = min(sum(sends), sum(receives))
        return self._transfer([(x[:rows].contiguous(), out[:rows])], out)

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Pending:
        outgoing = [(x.contiguous(), None) for x in sends.values()]
        return self._transfer([*outgoing, *((None, x) for x in receives.values())], None)

    def _transfer(self, copies: list[tuple[Tensor | None, Tensor | None]], result: Tensor | None) -> Pending:
        with self.streams.on(self._stream, Event(self.streams)):
            for source, target in copies:
                if target is None:
                    source.clone()  # reads it
                elif source is None:
                    target.fill_(0.01)
                else:
                    target.copy_(source)
            done = Event(self.streams)

        def wait() -> Tensor | None:
            self.streams.wait_event(done)
            copies.clear()
            return result

        return Pending(wait)


def _tensors(values: object) -> Iterable[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
