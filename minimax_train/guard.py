"""Noticing, without waiting for the device, that an optimizer step was not applied, and saying why."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minimax_train.data import MicroBatch
from minimax_train.engines import Engine, StepReport, StepSums
from minimax_train.errors import TrainingError
from minimax_train.recipe import StepPlan


@dataclass
class _Watched:
    step: int
    micro_batches: Sequence[MicroBatch]
    plan: StepPlan
    sums: StepSums
    report: StepReport
    applied: Tensor
    """``report.applied`` on the host, once ``copied``."""
    copied: torch.Event | None


class StepGuard:
    """Keeps the micro-batches of steps until the device has said that they were applied; of those that were not, the
    first's.

    An engine freezes the weights at the first step with a loss, gradient or updated weight that is not finite
    (:class:`minimax_train.engines.StepReport`). The host runs on until :meth:`check`, which stops the run on all ranks
    before anything of the frozen steps is reported or saved.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watched: deque[_Watched] = deque()

    def watch(
        self, step: int, micro_batches: Sequence[MicroBatch], plan: StepPlan, sums: StepSums, report: StepReport
    ) -> None:
        """Keep a step, and forget those before it that were applied. Does not wait for the device."""
        applied, copied = report.applied, None
        if applied.is_cuda:
            applied = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(applied, non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        self._watched.append(_Watched(step, micro_batches, plan, sums, report, applied, copied))
        while self._watched and (self._watched[0].copied is None or self._watched[0].copied.query()):
            if not self._watched[0].applied:
                while len(self._watched) > 1:  # frozen like the first
                    self._watched.pop()
                return
            self._watched.popleft()

    def check(self) -> None:
        """Wait for the device; called by all ranks together.

        Raises:
            TrainingError: when a step was not applied, naming the first, its loss, and what was not finite in it.
        """
        while self._watched:
            first = self._watched.popleft()
            if first.copied is not None:
                first.copied.synchronize()
            if not first.applied:
                self._watched.clear()
                norm, totals = float(first.report.gradient_norm), self._engine.totals(first.sums)
                problem = f"step {first.step}: loss {float(totals.loss)}, gradient norm {norm}"
                raise TrainingError(f"{problem}; {self._engine.diagnose(first.micro_batches, first.plan)}")
