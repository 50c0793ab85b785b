"""A run's ranks built as training builds it, without GPUs, memory or other ranks."""

from __future__ import annotations

import dataclasses
import gc
import time
import warnings
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from minimax_train.config import Config
from minimax_train.model.sharding import local
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.parallelize import build_engine
from minimax_train.phases import Phases


def dry_run(config: Config, world_size: int, rank: int = 0) -> tuple[float, int]:
    """Build the engine of a rank of so many on the meta device, its process groups fake: nothing is sent.

    Returns:
        Seconds that took, and bytes of the tensors that the rank would hold beside activations.

    Raises:
        ConfigError: as training does at its start.
    """
    started = time.perf_counter()
    timeout = timedelta(seconds=60)
    if config.engine.precision == "auto":  # as on a GPU
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="bfloat16"))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Set timeout is now only supported")
            grid = ProcessGrid.create("cpu", timeout, **config.parallel.grid)
            engine = build_engine(config, grid, torch.device("meta"), Phases())
        num_bytes = held_bytes(engine)
        del engine
        gc.collect()
        return time.perf_counter() - started, num_bytes
    finally:
        dist.destroy_process_group()
        # DTensor keeps shapes of this rank by mesh; another rank in this process, on a mesh alike, would take them.
        # (As torch.distributed.tensor.debug does, whose import takes a second.)
        cast(Any, DTensor)._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
        getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", lambda: None)()


def held_bytes(engine: object) -> int:
    """Of all tensors that an engine refers to, each memory counted once."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[object] = [engine]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            part = local(thing)
            storage = part.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            if thing.is_leaf and thing.grad is not None:
                waiting.append(thing.grad)
        elif isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, (list, tuple, set)):
            waiting += thing
        elif type(thing).__module__.startswith("minimax_train") and hasattr(thing, "__dict__"):
            waiting += vars(thing).values()
    return sum(found.values())
