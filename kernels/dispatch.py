"""One dispatch point per op: an implementation by name, or the best one for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

AUTO = "auto"
# Implementations that a CPU cannot run (but for Triton's, in its interpreter, by tests).
NEEDS_CUDA = frozenset({"triton", "flash", "flash4", "grouped", "quack"})
Implementation = TypeVar("Implementation")


def choose(op: str, implementations: Mapping[str, Implementation], requested: str, best: str) -> Implementation:
    """The implementation of ``op`` called ``requested``; ``auto`` means ``best``.

    Raises:
        ValueError: when there is no implementation of that name.
    """
    name = best if requested == AUTO else requested
    if name not in implementations:
        accepted = ", ".join([AUTO, *implementations])
        raise ValueError(f"kernels.{op}={requested!r}: no such implementation (accepted: {accepted})")
    return implementations[name]


def triton_takes(x: Tensor) -> bool:
    """Whether ``auto`` takes a fused Triton kernel for this tensor: on a GPU, and not float64."""
    return x.is_cuda and x.dtype != torch.float64
