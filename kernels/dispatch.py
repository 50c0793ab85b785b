"""One dispatch point per op: an implementation by name, or the best one for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

AUTO = "auto"
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
