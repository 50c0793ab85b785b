"""A stand-in for CUDA graphs on the host: micro-batches are recorded and replayed, calls of the host between graphs.

A graph is the list of ops that ran while it was captured. A replay runs them again, each on the memory that it had, and
so reads what a CUDA graph would: nothing of a recording's memory is left from one replay to the next.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar
from unittest.mock import MagicMock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from minimax_train import capture
from minimax_train.capture import Recording
from minimax_train.engines import graphs
from minimax_train.engines.graphs import MicroBatchGraphs
from minimax_train.engines.transfers import Transfers
from minimax_train.engines.zero1 import Zero1Engine
from minimax_train.parallel.communicator import GroupCommunicator, Pending


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and not x.is_meta]


def _storages(tree: Any) -> set[StorageWeakRef]:
    return {StorageWeakRef(x.untyped_storage()) for x in _tensors(tree)}


class _HostGraph:
    """Ops, with their arguments, their results, and those of the results that are not in memory of the arguments."""

    def __init__(self) -> None:
        self.ops: list[tuple[Callable, Any, Any, list[torch.Tensor]]] = []

    def add(self, op: Callable, args: Any, out: Any) -> None:
        args, out = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, out))
        taken = _storages(args)
        made = [x for x in _tensors(out) if StorageWeakRef(x.untyped_storage()) not in taken]
        self.ops.append((op, args, out, made))

    def capture_end(self) -> None:
        """Of one that is given up."""

    @torch.no_grad()
    def replay(self) -> None:
        for op, (args, options), out, made in self.ops:
            again = op(*args, **options)
            for x in tree_leaves(again):
                if isinstance(x, torch.ScriptObject):  # of a sum over ranks
                    x.wait()
            for x, new in zip(_tensors(out), _tensors(again), strict=True):
                if any(x is each for each in made):
                    x.copy_(new)


class HostRecording(Recording):
    """A recording of such graphs.

    Attributes:
        every: those that were made in this process; of the first micro-batch of a shape an empty one.
        replays: how often each was.
    """

    every: ClassVar[list[HostRecording]] = []

    def __init__(self, pool: Any) -> None:
        super().__init__(pool)
        self.graphs, self.lent, self.replays = list[_HostGraph](), list[torch.Tensor](), 0
        HostRecording.every.append(self)

    def record(self, run: Callable[[], None], stream: Any) -> None:
        def captured() -> None:
            with _Capture(self):
                run()

        super().record(captured, stream)

    def resume(self) -> None:
        self._graph = _HostGraph()

    def pause(self) -> None:
        for wait in self._joins:
            wait()
        self._joins.clear()
        graph, self._graph = self._graph, None
        assert graph is not None
        self.graphs.append(graph)
        self._steps.append(graph.replay)

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for x in (x for graph in self.graphs for *_, made in graph.ops for x in made):
                x.fill_(torch.nan if x.is_floating_point() else 77)
        super().replay()

    def lend(self, x: Any) -> Any:
        self.lent += _tensors(x)
        return x

    def forget(self) -> None:
        super().forget()
        self.graphs.clear()
        self.lent.clear()

    def freed(self) -> int:
        """How many pieces of memory its replays read that it does not fill, and that nothing else has kept. Ends it."""
        ops = [op for graph in self.graphs for op in graph.ops]
        read = _storages(self.lent).union(*(_storages(args) for _, args, _, _ in ops))
        read -= set().union(*(_storages(made) for *_, made in ops))
        ops.clear()
        self.forget()
        gc.collect()
        return sum(x.expired() for x in read)


class _Capture(TorchDispatchMode):
    """Adds ops to the graph that is being captured."""

    def __init__(self, recording: HostRecording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if self.recording._graph is not None and op.namespace != "profiler":
            self.recording._graph.add(op, (args, kwargs or {}), out)
        return out


def _in_graph(transfer: Callable[..., Pending]) -> Callable[..., Pending]:
    """A method of a communicator. In a graph it is captured whole, as gloo makes ops of its own for it; elsewhere
    buffers are filled when it is waited for, and no sooner."""

    def start(self, x, out=None):
        recording = Recording.current
        if recording is not None and recording._graph is not None:
            graph, recording._graph = recording._graph, None
            result = transfer(self, x, out).wait()
            graph.add(lambda *args: transfer(self, *args).wait(), ((x, out), {}), result)
            recording._graph = graph
            return Pending(lambda: result)
        if out is None:
            return transfer(self, x)
        received = tree_map_only(torch.Tensor, torch.empty_like, out)
        pending = transfer(self, x, received)

        def wait():
            pending.wait()
            for buffer, new in zip(_tensors(out), _tensors(received), strict=True):
                buffer.copy_(new)
            return out

        return Pending(wait)

    return start


def _waited(wait: Callable[..., None]) -> Callable[..., None]:
    """A wait of a graph, in each replay for what was started before it."""

    def recorded(self, indices):
        recording = Recording.current
        graph = recording and recording._graph
        if not graph:
            return wait(self, indices)
        recording._graph = None
        wait(self, indices)
        graph.add(lambda: wait(self, indices), ((), {}), None)
        recording._graph = graph

    return recorded


def record_on_host(engine: Zero1Engine) -> None:
    """Have an engine record and replay its micro-batches, in a process that ends with the test.

    What asks the host for lengths must be in a function that is called between graphs, as it must on a GPU.
    """
    for name, transfer in list(vars(GroupCommunicator).items()):
        if name.startswith(("all_gather", "reduce_scatter")):
            setattr(GroupCommunicator, name, _in_graph(transfer))
    Transfers.wait = _waited(Transfers.wait)
    for name in ("Stream", "graph_pool_handle", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *_: None)
    torch.cuda.stream, torch.cuda.current_stream = lambda _: nullcontext(), MagicMock()
    MicroBatchGraphs._on_stream = lambda _, run: run()
    graphs.Recording = HostRecording
    capture._lent = lambda x: Recording.current.lend(x)
    engine._graphs = MicroBatchGraphs(engine._sum_gradients, engine.device, engine.phases, engine.notes.append)
