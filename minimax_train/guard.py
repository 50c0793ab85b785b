"""Steps whose results are on their way to the host, and noticing that one of them was not applied.

Shape legend: L layers, E experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minimax_train.data import MicroBatch
from minimax_train.engines import Engine, StepReport, StepSums
from minimax_train.errors import TrainingError
from minimax_train.recipe import StepPlan


class HostCopy:
    """Tensors on their way to the host, which goes on meanwhile."""

    def __init__(self, *tensors: Tensor) -> None:
        def copy(x: Tensor) -> Tensor:
            return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True) if x.is_cuda else x

        self._tensors = [copy(x) for x in tensors]
        self._event = torch.cuda.current_stream().record_event() if any(x.is_cuda for x in tensors) else None

    @property
    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> list[Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class TakenStep(NamedTuple):
    """An optimizer step that the device was given.

    Attributes:
        number: of the step, from 1.
        tokens: that the run has trained on, this step included.
        at: the host's clock when the device had been given all of it.
        plan: what it trained on, and how.
        results: a ``StepSums`` over all ranks, then a ``StepReport``.
    """

    number: int
    tokens: int
    at: float
    plan: StepPlan
    results: HostCopy

    def totals(self) -> StepSums:
        """Waits for the device."""
        return StepSums(*self.results.wait()[: len(StepSums._fields)])

    def report(self) -> StepReport:
        """Waits for the device."""
        return StepReport(*self.results.wait()[len(StepSums._fields) :])


class StepGuard:
    """Keeps the micro-batches of steps until the device has said that they were applied; of those that were not, the
    first's.

    An engine freezes the weights at the first step with a loss, gradient or updated weight that is not finite
    (:class:`minimax_train.engines.StepReport`). The host runs on until :meth:`check`, which stops the run on all ranks
    before anything of the frozen steps is reported or saved.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watched: deque[tuple[TakenStep, Sequence[MicroBatch]]] = deque()

    def watch(self, taken: TakenStep, micro_batches: Sequence[MicroBatch]) -> None:
        """Keep a step, and forget those before it that were applied. Does not wait for the device."""
        self._watched.append((taken, micro_batches))
        while self._watched and self._watched[0][0].results.arrived:
            if not self._watched[0][0].report().applied:
                while len(self._watched) > 1:  # frozen like the first
                    self._watched.pop()
                return
            self._watched.popleft()

    def check(self, last: int | None = None) -> None:
        """Wait for the device to be done with step ``last``, or with all; called by all ranks together.

        Raises:
            TrainingError: when a step was not applied, naming the first, its loss, and what was not finite in it.
        """
        while self._watched and (last is None or self._watched[0][0].number <= last):
            taken, micro_batches = self._watched[0]
            if not taken.report().applied:
                found = f"loss {float(taken.totals().loss)}, gradient norm {float(taken.report().gradient_norm)}"
                raise TrainingError(f"step {taken.number}: {found}; {self._engine.diagnose(micro_batches, taken.plan)}")
            self._watched.popleft()
