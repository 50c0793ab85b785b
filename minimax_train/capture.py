"""CUDA graphs of work that the host must interrupt: graphs with calls between them.

A :class:`Recording` is made while a function runs: what it launches is captured, and each call of a function that was
wrapped by :func:`uncaptured` ends one graph and begins the next. The call itself is made by the host, then and in every
replay: on the same input memory, its results copied to the memory where the next graph reads them. So is its backward
pass, when autograd comes to it. Whatever the host must know for it (split sizes, which ranks exchange what) it learns
in the call.

Everything is captured in the order in which it runs, and each graph is replayed as soon as it is captured: what a call
is given is real, and the recorded pass counts.

A transfer that a graph starts must be done when the graph ends (:meth:`Recording.join`). One that is to go on beside
the graphs is started between two and waited for between two others (:meth:`Recording.between`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

Value = TypeVar("Value")


class Latest(Generic[Value]):
    """Something on the host that differs between replays: a function that :func:`uncaptured` wraps, given this, gets
    the value that was set last when it is called.

    Attributes:
        value: to be set before each replay.
    """

    value: Value


def latest(x: Value | Latest[Value]) -> Value:
    """The value, of a :class:`Latest` too."""
    return x.value if isinstance(x, Latest) else x


class Recording:
    """Work of one stream as graphs and calls in their order.

    Args:
        pool: graph memory pool, shared by recordings that do not run at the same time and begin on the same stream.
    """

    current: Recording | None = None
    """The one that is being made or replayed."""

    def __init__(self, pool: Any) -> None:
        self._pool, self._steps = pool, list[Callable[[], None]]()
        self._joins: list[Callable[[], object]] = []
        self._waiting: list[Callable[[], None]] = []
        self.is_calling = False
        """Whether a call is being made, between two graphs."""
        self.is_repeatable = True
        """Whether nothing that it computed has been added to what stays: no backward pass has begun."""
        self._graph: torch.cuda.CUDAGraph | None = None

    def record(self, run: Callable[[], None], stream: torch.cuda.Stream) -> None:
        """Capture and run ``run`` on a stream, after all that the current one has been given.

        Raises:
            RuntimeError: when something in it cannot be captured; the stream captures no more then. What a call raises
                ends it too, and leaves it not repeatable.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        Recording.current = self
        try:
            with torch.cuda.stream(stream):
                self.resume()
                run()
                self.pause()
                self._make_waiting()
        except BaseException:
            self.is_repeatable &= self._graph is not None
            self._abandon(stream)
            raise
        finally:
            Recording.current = None
        torch.cuda.current_stream().wait_stream(stream)

    @property
    def has_run(self) -> bool:
        """Whether the device was given any of it."""
        return bool(self._steps)

    def replay(self) -> None:
        """Run all of it again, on the stream that was recorded."""
        Recording.current = self
        try:
            for step in self._steps:
                step()
        finally:
            Recording.current = None

    def call(self, run: Callable[[], None], again: Callable[[], None]) -> None:
        """Make a call between two graphs; ``again`` makes it in a replay."""
        self.pause()
        self._make_waiting()
        self._make(run, again)
        self.resume()

    def between(self, run: Callable[[], None]) -> None:
        """Make a call, in replays too, where the graph ends that is being captured."""
        self._waiting.append(run)

    def _make_waiting(self) -> None:
        for run in self._waiting:
            self._make(run, run)
        self._waiting.clear()

    def _make(self, run: Callable[[], None], again: Callable[[], None]) -> None:
        self._call(run)
        self._steps.append(lambda: self._call(again))

    def _call(self, run: Callable[[], None]) -> None:
        self.is_calling = True
        try:
            run()
        finally:
            self.is_calling = False

    def forget(self) -> None:
        """Let go of the graphs: its steps refer to the recording, which would keep them."""
        self._steps.clear()

    def join(self, wait: Callable[[], object]) -> None:
        """Call ``wait`` before the graph ends that is being captured: for work on other streams that began in it."""
        self._joins.append(wait)

    def pause(self) -> None:
        """End a graph, and run it."""
        assert self._graph is not None
        for wait in self._joins:
            wait()
        self._joins.clear()
        graph = self._graph
        graph.capture_end()
        self._graph = None
        graph.replay()
        self._steps.append(graph.replay)

    def resume(self) -> None:
        """Begin a graph."""
        self._graph = torch.cuda.CUDAGraph()
        # Relaxed: autograd's thread may end what this one began, and NCCL's watchdog and the loader make calls.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")

    def _abandon(self, stream: torch.cuda.Stream) -> None:
        if self._graph is not None:
            with torch.cuda.stream(stream), suppress(RuntimeError):  # what went wrong is being raised already
                self._graph.capture_end()
            self._graph = None


def uncaptured(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A differentiable function, called by the host also where a :class:`Recording` is made.

    Args:
        function: of a tensor, whose result is a tensor of the same shape and dtype, and of others, some of which may
            be parameters, whose gradients it adds up as autograd does. What differs between replays and is not on the
            device it is given as :class:`Latest`.
    """

    @wraps(function)
    def call(*args: Any, **options: Any) -> Tensor:
        recording = Recording.current
        if recording is None:
            return function(*map(latest, args), **options)
        # Autograd is not shown parameters: their gradients are added up in the call, and no other comes.
        shown = [_Parameter(x) if _is_parameter(x) else x for x in args]
        return _Uncaptured.apply(recording, lambda *tensors: function(*tensors, **options), *shown)

    return call


class _Parameter(NamedTuple):
    """A parameter, or a view of one."""

    x: Tensor


class _Call:
    """One call of a function and its backward pass: what lies between the two, of the latest replay."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._inputs: list[Any] = []
        self._edge: Any = None

    def forward(self, args: list[Any], needs_gradient: list[bool], out: Tensor) -> None:
        self._inputs = [
            x.detach().requires_grad_() if needs else x for x, needs in zip(args, needs_gradient, strict=True)
        ]
        kept: list[list[Tensor]] = []

        def keep(x: Tensor) -> list[Tensor]:
            kept.append([x.detach()])
            return kept[-1]

        # Replays know nothing of recomputation: what the call keeps is kept, whatever hooks the recorded pass has.
        with torch.set_grad_enabled(any(needs_gradient)), saved_tensors_hooks(keep, lambda held: held[0]):
            result = self._function(*(x.x if isinstance(x, _Parameter) else latest(x) for x in self._inputs))
        if result.requires_grad:  # of the result no more is kept than its own op keeps
            self._edge = get_gradient_edge(result)
        out.copy_(result.detach())
        for held in kept:  # and that where the graphs have it
            if _place(held[0]) == _place(result) and out.stride() == result.stride():
                held[0] = out.detach()

    def backward(self, d_out: Tensor, gradients: list[Tensor | None]) -> None:
        edge, inputs = self._edge, self._inputs
        self._edge, self._inputs = None, []
        torch.autograd.backward((edge,), (d_out,))
        for x, gradient in zip(inputs, gradients, strict=True):
            if gradient is not None:
                gradient.zero_() if x.grad is None else gradient.copy_(x.grad)


class _Uncaptured(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording, function, *args):
        needs = list(ctx.needs_input_grad[2:])
        call, out = _Call(function), torch.empty_like(args[0])
        # The memory belongs to the graphs: a replay knows where it is, and does not keep it.
        lent, lent_out = [_lent(x) for x in args], _lent(out)
        recording.call(lambda: call.forward(list(args), needs, out), lambda: call.forward(lent, needs, lent_out))
        ctx.recording, ctx.call = recording, call
        ctx.like = [torch.empty_like(x, device="meta") if need else None for need, x in zip(needs, args, strict=True)]
        ctx.device = args[0].device
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        recording, call = ctx.recording, ctx.call
        d_out = d_out.contiguous()
        gradients = [None if x is None else torch.empty_like(x, device=ctx.device) for x in ctx.like]
        lent, lent_d_out = [_lent(x) for x in gradients], _lent(d_out)
        recording.is_repeatable = False
        recording.call(lambda: call.backward(d_out, gradients), lambda: call.backward(lent_d_out, lent))
        return None, None, *gradients


def _place(x: Tensor) -> tuple:
    return x.data_ptr(), x.shape, x.stride(), x.dtype


def _is_parameter(x: Any) -> bool:
    """Whether a tensor's gradient is added up where it is: of a leaf, or a view of one."""
    if not isinstance(x, Tensor) or not x.requires_grad:
        return False
    base = x if x._base is None else x._base
    return base.is_leaf and base.requires_grad


class _Memory:
    def __init__(self, x: Tensor) -> None:
        size = x.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(x.shape),
            "strides": tuple(stride * size for stride in x.stride()),
            "typestr": f"<i{size}",
            "data": (x.data_ptr(), False),
            "version": 3,
        }


def _lent(x: Any) -> Any:
    """The same elements, without keeping their memory; whatever is not a tensor of a graph stays what it is."""
    if not isinstance(x, Tensor) or x.numel() == 0:
        return x
    return torch.as_tensor(_Memory(x), device=x.device).view(x.dtype)
