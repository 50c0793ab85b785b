"""Whether ranks that must hold the same tensors do, bit for bit.

Shape legend: P tensors of a rank that others hold too.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_train.errors import TrainingError
from minimax_train.parallel.grid import WORLD, ProcessGrid

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 3

_Told = tuple[str, list[tuple[str, tuple[int, ...], int]]]
"""By a rank: its host, and of tensors that differ name, ranks that must hold them alike, sum of bits here."""

Replicas = Mapping[str, tuple[Tensor, dist.ProcessGroup]]
"""By name: what this rank holds, and the ranks that must hold the same. All of these have the same names, in the same
order."""


def check_replicas(replicas: Replicas, grid: ProcessGrid, step: int) -> None:
    """Compare sums of the tensors' bits; called by all ranks together. The host waits for the device.

    A change that leaves the sum as it was, as of two elements that change places, is not seen.

    Args:
        step: after which, for the message.

    Raises:
        TrainingError: on all ranks, naming tensors, and the ranks and hosts that hold others than most.
    """
    sums: dict[dist.ProcessGroup, dict[str, Tensor]] = defaultdict(dict)
    for name, (tensor, ranks) in replicas.items():
        sums[ranks][name] = tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
    if not sums:  # on any rank: there are as many copies on all
        return
    found = []
    for ranks, values in sums.items():
        sums_P = torch.stack(list(values.values()))
        extremes_2P = torch.stack([sums_P, -sums_P])
        dist.all_reduce(extremes_2P, dist.ReduceOp.MAX, group=ranks)
        found.append(extremes_2P[0] != -extremes_2P[1])
    any_differs = torch.cat(found).any().to(torch.int32)
    dist.all_reduce(any_differs, dist.ReduceOp.MAX, group=grid.group(WORLD))
    if not any_differs:
        return
    differs_P = torch.cat(found).tolist()
    own = [(name, ranks, int(x)) for ranks, values in sums.items() for name, x in values.items()]
    mine = [
        (name, tuple(dist.get_process_group_ranks(ranks)), value)
        for (name, ranks, value), differs in zip(own, differs_P, strict=True)
        if differs
    ]
    told: list[_Told] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(told, (socket.gethostname(), mine))
    raise TrainingError(f"step {step}: replicas have drifted apart (parallel.check_replicas): {_describe(told)}")


def _describe(told: list[_Told]) -> str:
    """Which tensors differ, by the ranks that hold others than most.

    Args:
        told: by every rank.
    """
    held: dict[tuple[str, tuple[int, ...]], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, (_, mine) in enumerate(told):
        for name, ranks, value in mine:
            held[name, ranks][value].append(rank)
    by_ranks: dict[str, list[str]] = defaultdict(list)
    for (name, _), holders in held.items():
        *few, most = sorted(holders.values(), key=len)
        others = [rank for ranks in few for rank in ranks]
        if len(others) < len(most):
            who = f"{_named(others, told)} against {len(most)} others"
        else:  # as of two: nobody knows which is right
            who = f"{_named(sorted(others + most), told)} differ from each other"
        by_ranks[who].append(name)
    return "; ".join(f"{who}: {_shortened(list(dict.fromkeys(names)))}" for who, names in by_ranks.items())


def _named(ranks: list[int], told: list[_Told]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_shortened([f'{rank} (host {told[rank][0]})' for rank in ranks])}"


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
