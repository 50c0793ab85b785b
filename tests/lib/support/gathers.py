"""How often FSDP2 gathers each module's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def weight_gathers(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Counter[str]]:
    """What the function returns, and by FSDP2's name of each all-gather how often it ran meanwhile on this rank.

    ``trace.events()`` would build a Python object of each event, seconds here and minutes late in a long test run.
    """
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        result = function(*arguments)
    names = (event.name() for event in trace.profiler.kineto_results.events())
    return result, Counter(name for name in names if name.startswith("FSDP::all_gather "))
