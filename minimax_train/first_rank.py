"""Work that one rank does for all of them, or all of them do, and whose errors all of them raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from minimax_train.errors import ConfigError, TrainingError

Result = TypeVar("Result")


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Run ``work`` on the first rank while the others wait. Every rank gets its result (pickled), or raises its error.

    Raises:
        ConfigError, TrainingError: what ``work`` raised. Any other error is raised as it is on the first rank, and as a
            TrainingError on the others, so that none of them waits for ever.
    """
    if not dist.is_initialized():
        return work()
    told: list[Any] = [None, None, None]
    problem: Exception | None = None
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except Exception as error:  # raised below, once the ranks that wait have been told
            problem = error
            kind = type(error) if isinstance(error, (ConfigError, TrainingError)) else TrainingError
            told = [None, kind, str(error)]
    dist.broadcast_object_list(told, src=0)
    result, kind, message = told
    if kind is not None:
        problem = problem or kind(message)
        if isinstance(problem, ConfigError):
            problem.on_all_ranks = True
        raise problem
    return result


def on_every_rank(work: Callable[[], Result]) -> list[Result]:
    """Run ``work`` on every rank; it must not communicate. The results of all ranks (pickled), by rank.

    Raises:
        ConfigError, TrainingError: what ``work`` raised on the first rank where it did, on all of them. Any other error
            is raised as it is there, and as a TrainingError elsewhere.
    """
    told: Any = None
    problem: Exception | None = None
    try:
        told = (None, work())
    except Exception as error:  # raised below, once the others have been told
        problem = error
        kind = type(error) if isinstance(error, (ConfigError, TrainingError)) else TrainingError
        told = (kind, str(error))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, told)
    failed = [(kind, message) for kind, message in every if kind is not None]
    if not failed:
        return [result for _, result in every]
    if problem is not None and not isinstance(problem, (ConfigError, TrainingError)):
        raise problem
    kind, message = failed[0]
    error = kind(message)
    error.on_all_ranks = True
    raise error


def is_of_communication(error: BaseException) -> bool:
    """Whether a collective or the store failed, mostly because another rank has ended: the watchdog says which."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
