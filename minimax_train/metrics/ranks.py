"""Which rank is the slowest in each phase, and which has the least memory left.

Shape legend: P phases and memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from minimax_train.phases import PHASES

_RANK_BITS = 20  # of an int64; the others hold microseconds, or MiB


def slowest_ranks(seconds: Mapping[str, float], memory_gib: float, steps: int) -> dict[str, float]:
    """Compares all ranks, in one sum of a few numbers on the host; all must call it, with as many steps.

    Args:
        seconds: of this rank by phase, over ``steps``.
        memory_gib: that this rank has used at most.

    Returns:
        ``slowest_seconds/PHASE`` per step, and ``slowest_rank/PHASE``, of the phases in which a rank was;
        ``fullest_memory_gib`` and ``fullest_rank``.
    """
    amounts = [round(seconds.get(phase, 0.0) * 1e6) for phase in PHASES] + [round(memory_gib * 1024)]
    # The greatest amount, and of several alike the last rank.
    packed_P = torch.tensor([(amount << _RANK_BITS) + dist.get_rank() for amount in amounts])
    dist.all_reduce(packed_P, op=dist.ReduceOp.MAX)
    *times, memory = (divmod(value, 1 << _RANK_BITS) for value in packed_P.tolist())
    metrics: dict[str, float] = {}
    for phase, (microseconds, rank) in zip(PHASES, times, strict=True):
        if microseconds:
            metrics[f"slowest_seconds/{phase}"] = microseconds / 1e6 / steps
            metrics[f"slowest_rank/{phase}"] = rank
    return metrics | {"fullest_memory_gib": memory[0] / 1024, "fullest_rank": memory[1]}


def host_memory_gib() -> float:
    """Memory of the host that this process holds; 0 where the system does not say (other than Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
