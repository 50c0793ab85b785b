"""One dispatch point per op: an implementation by name, or the best one for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

AUTO = "auto"


def choose(op: str, implementations: Mapping[str, Callable], requested: str, best: str) -> Callable:
    """The implementation of ``op`` called ``requested``; ``auto`` means ``best``.

    Raises:
        ValueError: when there is no implementation of that name.
    """
    name = best if requested == AUTO else requested
    if name not in implementations:
        accepted = ", ".join([AUTO, *implementations])
        raise ValueError(f"kernels.{op}={requested!r}: no such implementation (accepted: {accepted})")
    return implementations[name]
