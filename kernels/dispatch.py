"""One dispatch point per op: an implementation by name, or the best one for the device."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

AUTO = "auto"
# Implementations that a CPU cannot run (but for Triton's, in its interpreter, by tests).
NEEDS_CUDA = frozenset({"triton", "flash", "flash4", "grouped", "quack", "apex"})
RENAMED = {"plain": "torch", "loop": "torch"}
Implementation = TypeVar("Implementation")


class OnDemand:
    """A module that is imported when one of its functions is first looked up: CPU installs have no triton.

    Decorates the function that imports and returns it, so that tools which only read see the import.
    """

    def __init__(self, load: Callable[[], ModuleType]) -> None:
        self._load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)


def refusal(requested: str, implementations: Collection[str]) -> str:
    """What is wrong with the name of an implementation; empty if nothing is."""
    if requested == AUTO or requested in implementations:
        return ""
    if RENAMED.get(requested) in implementations:
        return f"renamed: use {RENAMED[requested]!r}"
    return f"must be one of {', '.join([AUTO, *implementations])}"


def choose(op: str, implementations: Mapping[str, Implementation], requested: str, best: str) -> Implementation:
    """The implementation of ``op`` called ``requested``; ``auto`` means ``best``.

    Raises:
        ValueError: when there is no implementation of that name.
    """
    if problem := refusal(requested, implementations):
        raise ValueError(f"kernels.{op}={requested!r}: {problem}")
    return implementations[best if requested == AUTO else requested]


def triton_takes(x: Tensor) -> bool:
    """Whether ``auto`` takes a fused Triton kernel for this tensor: on a GPU, and not float64."""
    return x.is_cuda and x.dtype != torch.float64


def triton_or_torch(x: Tensor) -> str:
    """What ``auto`` means for ops with one fused Triton kernel and one implementation in PyTorch ops."""
    return "triton" if triton_takes(x) else "torch"
