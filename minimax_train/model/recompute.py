"""Selective recomputation: what is cheap to compute again is not kept from the forward to the backward pass.

Inside :func:`selective`, autograd's hooks for saved tensors look at everything that an op keeps for its backward pass.
The output of a function that ran through :func:`cheap`, or a view of it, is replaced by a handle: the function and its
inputs, which other ops keep anyway. The first op of the backward pass that needs the tensor has it computed again; it
is shared with the others that need it, and freed when the last of them has run and autograd lets go of its handle.

Nothing here waits for the device or draws random numbers, so a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class _Call:
    """A cheap function and its inputs; its output once it was computed again."""

    def __init__(self, function: Callable, inputs: list[Any]) -> None:
        self._function, self._inputs = function, inputs
        self._output: Tensor | None = None

    def output(self) -> Tensor:
        """A tensor in the storage that the function fills."""
        if self._output is None:
            with torch.no_grad():
                self._output = _first(self._function(*map(_unpack, self._inputs)))
        return self._output


class _Handle(NamedTuple):
    """In place of a tensor: where in the output of a call it lies."""

    call: _Call
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


# Of the block whose forward pass runs. A weak reference tells a storage from a later one at its address.
_calls: dict[StorageWeakRef, _Call] | None = None


@contextmanager
def selective() -> Iterator[None]:
    """Around the forward pass of a block. Not to be nested."""
    global _calls
    assert _calls is None
    _calls = {}
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _calls = None


def cheap(function: Callable, *inputs: Tensor) -> Any:
    """``function(*inputs)``, of which no output is kept for the backward pass inside :func:`selective`.

    Args:
        function: returns a tensor, or several in one storage; the same ones, laid out alike, whenever it is called. It
            communicates with no other rank.
        inputs: every tensor that it reads. Neither these nor the output may be changed in place afterwards; an engine
            may free the memory of a parameter in between, if it fills the same one again before the backward pass.
    """
    output = function(*inputs)
    if _calls is not None:
        _calls[StorageWeakRef(_first(output).untyped_storage())] = _Call(function, [_pack(x) for x in inputs])
    return output


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _pack(x: Tensor) -> Tensor | _Handle:
    assert _calls is not None
    call = _calls.get(StorageWeakRef(x.untyped_storage()))
    if call is None:
        return x.detach()  # with its graph, an output that its own op keeps would never be freed
    return _Handle(call, x.size(), x.stride(), int(x.storage_offset()))


def _unpack(packed: Tensor | _Handle) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    return packed.call.output().as_strided(packed.size, packed.stride, packed.offset)
