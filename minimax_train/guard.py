"""Steps whose results are on their way to the host, and noticing that one of them was not applied.

Shape legend: G groups of parameters.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minimax_train.data import MicroBatch
from minimax_train.engines import Engine, StepReport, StepSums
from minimax_train.errors import SuspiciousStep, TrainingError
from minimax_train.recipe import StepPlan
from minimax_train.recipe.config import RecipeConfig
from minimax_train.replay import replay


class TakenStep(NamedTuple):
    """An optimizer step that the device was given.

    Attributes:
        number: of the step, from 1.
        tokens: that the run has trained on, this step included.
        at: the host's clock when the device had been given all of it, less ``paused_s``.
        paused_s: what evaluations and checkpoints have taken since the run began.
        plan: what it trained on, and how.
        totals, report: sums of all ranks, and what became of the step: on the host, once ``copied``.
        own_loss: this rank's part of the loss, likewise.
        norms_2G: as of :meth:`Engine.norms`, likewise; None of a step whose norms are not written.
        copied: when the device is done with it; None where there is no GPU, whose steps are done when they are taken.
    """

    number: int
    tokens: int
    at: float
    paused_s: float
    plan: StepPlan
    totals: StepSums
    report: StepReport
    own_loss: Tensor
    norms_2G: Tensor | None
    copied: torch.Event | None

    @property
    def is_done(self) -> bool:
        return self.copied is None or self.copied.query()

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()

    def seconds_since(self, earlier: TakenStep) -> float:
        """From the end of a step before to the end of this one; both are done. By the device's clock where it has one:
        the host may be late while the device has enough to do, and catch up."""
        if self.copied is None or earlier.copied is None:
            return self.at - earlier.at
        return earlier.copied.elapsed_time(self.copied) / 1e3 - (self.paused_s - earlier.paused_s)


def to_host(x: Tensor) -> Tensor:
    """The tensor on its way to the host, which goes on meanwhile."""
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True) if x.is_cuda else x


class StepGuard:
    """Keeps the micro-batches of steps until the device has said that they were applied; of those that were not, the
    first's.

    An engine freezes the weights at the first step with a loss, gradient or updated weight that is not finite
    (:class:`minimax_train.engines.StepReport`), but for losses and gradients with ``recipe.outliers=skip``. The host
    runs on until :meth:`check`, which stops the run on all ranks before anything of the frozen steps is reported or
    saved.
    """

    def __init__(self, engine: Engine, recipe: RecipeConfig) -> None:
        self._engine, self._recipe = engine, recipe
        self._outliers: list[TakenStep] = []
        self._told = 0  # the last step of which outliers were taken
        self._watched: deque[tuple[TakenStep, Sequence[MicroBatch]]] = deque()

    def watch(self, taken: TakenStep, micro_batches: Sequence[MicroBatch]) -> None:
        """Keep a step, and forget those before it that were applied. Does not wait for the device."""
        self._watched.append((taken, micro_batches))
        while self._watched and self._watched[0][0].is_done:
            if not self._watched[0][0].report.applied:
                while len(self._watched) > 1:  # frozen like the first
                    self._watched.pop()
                return
            self._forget()

    def check(self, last: int | None = None) -> None:
        """Wait for the device to be done with step ``last``, or with all; called by all ranks together.

        Raises:
            SuspiciousStep: when a step was not applied, naming the first, its loss, what was not finite in it, and
                whether that is so when it is run again; with ``recipe.outliers=rollback`` also when one was an outlier.
            TrainingError: when more updates were skipped as outliers than the recipe allows.
        """
        while self._watched and (last is None or self._watched[0][0].number <= last):
            taken, micro_batches = self._watched[0]
            taken.wait()
            if not taken.report.applied:
                found = f"loss {float(taken.totals.loss)}, gradient norm {float(taken.report.gradient_norm)}"
                found += f"; {self._engine.diagnose(micro_batches, taken.plan)}"
                if not taken.report.gradient_norm.isfinite():  # else the update spoilt the weights that it had
                    found += f"; {replay(self._engine, micro_batches, taken.plan, float(taken.own_loss))}"
                raise SuspiciousStep(f"step {taken.number}: {found}")
            self._forget()
        outliers = [taken for taken in self._outliers if last is None or taken.number <= last]
        if self._recipe.outliers == "rollback" and outliers:
            raise SuspiciousStep(self._describe(outliers[0]))
        self._check_skipped([taken.number for taken in outliers])

    def take_outliers(self, last: int) -> list[str]:
        """Of the steps since the last call up to step ``last``, which :meth:`check` has seen; a line each."""
        found = [taken for taken in self._outliers if self._told < taken.number <= last]
        self._told, oldest = last, last - self._recipe.outlier_window
        self._outliers = [taken for taken in self._outliers if taken.number > oldest]
        what = "; its update was skipped" if self._recipe.outliers == "skip" else ""
        return [f"{self._describe(taken)}{what}" for taken in found]

    def forget(self) -> None:
        """All steps: the run goes back before them."""
        self._watched.clear()
        self._outliers.clear()

    def _describe(self, taken: TakenStep) -> str:
        loss, norm = float(taken.totals.loss), float(taken.report.gradient_norm)
        if not math.isfinite(norm):
            return f"step {taken.number}: loss {loss:.4f}, gradient norm {norm}: not finite"
        return (
            f"step {taken.number}: loss {loss:.4f}, gradient norm {norm:.3g}: more than "
            f"{self._recipe.outlier_sigmas:g} standard deviations above the last {self._recipe.outlier_window} steps "
            "(recipe.outlier_sigmas)"
        )

    def _forget(self) -> None:
        """The oldest step, which was applied."""
        taken, _ = self._watched.popleft()
        if taken.report.outlier:
            self._outliers.append(taken)

    def _check_skipped(self, numbers: list[int]) -> None:
        """Of outliers up to the step that all ranks look at: a rank may know already what became of later ones."""
        recipe = self._recipe
        if recipe.outliers != "skip":
            return
        recent = [number for number in numbers if number > numbers[-1] - recipe.outlier_window]
        if len(recent) > recipe.outlier_limit:
            raise TrainingError(
                f"step {recent[-1]}: {len(recent)} updates were skipped within {recipe.outlier_window} steps as "
                f"outliers of loss or gradient norm, or not finite (recipe.outlier_limit={recipe.outlier_limit})"
            )
