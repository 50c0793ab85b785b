"""Whether a step that was not finite comes out the same when it is run again: numerics and data do, broken hardware
does not (as Megatron-Core's rerun state machine tells them apart)."""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from minimax_train.data import MicroBatch
from minimax_train.engines import Engine
from minimax_train.model.sharding import local
from minimax_train.recipe import StepPlan


def replay(engine: Engine, micro_batches: Sequence[MicroBatch], plan: StepPlan, loss: float) -> str:
    """Run a step's forward and backward passes again, with the weights it had; called by all ranks together.

    Losses are compared bit by bit where they are the same bits each time, on a CPU and with deterministic algorithms;
    elsewhere by whether they are finite.

    Args:
        loss: this rank's part of the step's.

    Returns:
        What that says, the same on all ranks.
    """
    again = engine.run(micro_batches, plan)
    gradients = [local(gradient) for gradient in engine.gradients().values()]
    finite = bool(again.loss.isfinite()) and all(bool(gradient.isfinite().all()) for gradient in gradients)
    exact = again.loss.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    new = float(again.loss)
    same = loss == new or (math.isfinite(loss) == math.isfinite(new) and not (exact and math.isfinite(loss)))
    told: list[tuple[str, float, float, bool, bool]] = [("", 0.0, 0.0, True, True)] * dist.get_world_size()
    dist.all_gather_object(told, (socket.gethostname(), loss, new, same, finite))
    others = [
        f"rank {rank} (host {host}) has loss {new:.6g}, not {loss:.6g}"
        for rank, (host, loss, new, same, _) in enumerate(told)
        if not same
    ]
    if others:
        return f"run again, {', '.join(others)}: suspect its hardware"
    if all(finite for *_, finite in told):
        return "run again, all is finite, with the same losses: suspect the hardware, of no known rank"
    return "run again, it is the same on all ranks: suspect the data or the numerics"
