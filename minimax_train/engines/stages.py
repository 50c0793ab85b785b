"""A step's micro-batches through pipeline stages, whose passes an :class:`AutogradEngine` computes.

Shape legend: T tokens of the rank's part of a micro-batch, D hidden.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minimax_train.data import MicroBatch
from minimax_train.kernels import deferral
from minimax_train.model import ModelLoss, ModelPart, StageOutput
from minimax_train.parallel.communicator import GroupCommunicator, Pending
from minimax_train.parallel.pipeline import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    Pass,
    Transfer,
    deferred,
    held,
    program,
    stages_of_rank,
    table,
)
from minimax_train.recipe import StepPlan

if TYPE_CHECKING:
    from minimax_train.engines.autograd import AutogradEngine

_SENDS = 4
"""So many may be under way; each keeps what it sends."""


class _Kept(NamedTuple):
    """Of a forward pass, until its backward pass.

    Attributes:
        x_TD: what the stage was given; None for the first.
        outputs: that have a gradient: the loss, or what is handed on and the auxiliary loss.
        gradients: of these; None where that of the next stage is still to come, or the output is the loss.
    """

    x_TD: Tensor | None
    outputs: list[Tensor]
    gradients: list[Tensor | None]


class Stages:
    """The stages of this rank, and what it exchanges with those before and after them.

    The auxiliary loss of a stage's layers is differentiated in the stage's own backward pass, beside the gradient that
    arrives from the next stage.

    Args:
        engine: computes the passes; its model has a part for each stage.
        before_last: told, before the step's last backward pass of a part, which part. Its weights are not needed after
            it, and its gradients are whole, unless the schedule splits.
        layer_done: told, in the step's last pass of weights of a part, each layer whose gradients are whole.
        after_weights: told, after a pass of weights, whether it was the step's last.
    """

    def __init__(
        self,
        engine: AutogradEngine,
        before_last: Callable[[int], None],
        layer_done: Callable[[int], None],
        after_weights: Callable[[bool], None],
    ) -> None:
        self._engine, self._before_last = engine, before_last
        self._layer_done, self._after_weights = layer_done, after_weights
        grid, self._parts = engine.grid, engine.model.parts
        self._ranks, self._rank = grid.size("pp"), grid.rank("pp")
        self._schedule = engine.config.parallel.pp_schedule
        self.splits = SCHEDULES[self._schedule].splits
        self._own = stages_of_rank(self._schedule, self._ranks, len(self._parts), self._rank)
        self._links = {FORWARD: GroupCommunicator(grid.group("pp")), BACKWARD: GroupCommunicator(grid.group("epp"))}
        self._dtype = engine.config.engine.compute_dtype(engine.device.type)
        self._programs: dict[tuple[int, bool], list[Pass | Transfer]] = {}

    def run(self, batches: Sequence[MicroBatch], plan: StepPlan) -> None:
        """Forward and backward passes of a step's micro-batches, in the order of the schedule."""
        _Run(self, batches, plan).run(self._program(len(batches), False))

    def evaluate(self, batches: Sequence[MicroBatch], plan: StepPlan) -> Tensor:
        """Forward passes alone: the cross-entropy summed over this rank's targets, float64; 0 but on the last stage."""
        run = _Run(self, [batch.to(self._engine.device) for batch in batches], plan)
        run.run(self._program(len(batches), True))
        return run.loss

    def held_layers(self) -> tuple[list[int], list[tuple[int, int]]]:
        """``held`` and ``deferred`` of :class:`minimax_train.model.memory.ActivationMemory`, on this rank."""
        layers = self._engine.config.model.num_layers
        return held_layers(self._schedule, self._parts, self._ranks, self._rank, layers)

    def _program(self, micro_batches: int, forward_only: bool) -> list[Pass | Transfer]:
        key = micro_batches, forward_only
        if key not in self._programs:
            orders = table(self._schedule, self._ranks, len(self._parts), micro_batches, forward_only=forward_only)
            self._programs[key] = program(orders, self._rank)
        return self._programs[key]


def held_layers(
    schedule: str, parts: Sequence[ModelPart], ranks: int, rank: int, num_layers: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """``held`` and ``deferred`` of :class:`minimax_train.model.memory.ActivationMemory`, of one of so many pipeline
    ranks.

    Args:
        parts: the stages of this rank.
    """
    counts, before, after = _held_stages(schedule, ranks, len(parts), rank)
    own = stages_of_rank(schedule, ranks, len(parts), rank)
    stage_of = {i: stage for stage, part in zip(own, parts, strict=True) for i in part.layers}
    stages = [stage_of.get(layer, -1) for layer in range(num_layers)]  # -1, of another rank: 0 in all counts
    layers = [counts[stage] for stage in stages]
    return layers, [(before[stage], after[stage]) for stage in stages] if SCHEDULES[schedule].splits else []


@lru_cache(1024)
def _held_stages(schedule: str, ranks: int, parts: int, rank: int) -> tuple[Counter[int], Counter[int], Counter[int]]:
    splits = SCHEDULES[schedule].splits
    # Most is held of the longest group of micro-batches there is; by a schedule that splits, of 2 for each rank.
    orders = table(schedule, ranks, parts, 2 * ranks - (not splits))
    before, after = deferred(orders, rank) if splits else (Counter[int](), Counter[int]())
    return held(orders, rank), before, after


class _Run:
    """The micro-batches of a step, or of an evaluation, on their way through this rank's stages."""

    def __init__(self, stages: Stages, batches: Sequence[MicroBatch], plan: StepPlan) -> None:
        self._stages, self._engine, self._batches, self._plan = stages, stages._engine, batches, plan
        self._arriving: dict[Pass, tuple[Tensor, Pending[None]]] = {}
        self._leaving: dict[Pass, Tensor] = {}  # by the pass that needs it
        self._sends: deque[Pending[None]] = deque()
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._deferred: dict[tuple[int, int], deferral.Pending] = {}
        self.loss = torch.zeros((), dtype=torch.float64, device=self._engine.device)

    def run(self, steps: Sequence[Pass | Transfer]) -> None:
        for step in steps:
            if isinstance(step, Transfer):
                self._transfer(step)
            elif step.kind == FORWARD:
                self._forward(step)
            elif step.kind == BACKWARD:
                self._backward(step)
            else:
                self._weights(step)
        while self._sends:
            self._sends.popleft().wait()
        assert not (self._arriving or self._leaving or self._kept or self._deferred)

    def _transfer(self, transfer: Transfer) -> None:
        link, one = self._stages._links[transfer.needed_by.kind], transfer.needed_by
        if transfer.source == link.rank:
            self._sends.append(link.exchange({transfer.target: self._leaving.pop(one)}, {}))
            if len(self._sends) > _SENDS:
                self._sends.popleft().wait()
            return
        tokens = len(self._batches[one.micro_batch].tokens_T) // self._engine.grid.size("tp")
        size = tokens, self._engine.config.model.hidden_size
        x_TD = torch.empty(size, dtype=self._stages._dtype, device=self._engine.device)
        self._arriving[one] = x_TD, link.exchange({}, {transfer.source: x_TD})

    def _given(self, one: Pass) -> Tensor:
        """The input of a pass, from another rank, or another stage of this one."""
        if one in self._leaving:
            return self._leaving.pop(one)
        x_TD, pending = self._arriving.pop(one)
        pending.wait()
        return x_TD

    def _forward(self, one: Pass) -> None:
        engine, batch = self._engine, self._batches[one.micro_batch]
        part = self._stages._own.index(one.stage)
        layers, is_first, _ = self._stages._parts[part]
        x_TD = None if is_first else self._given(one)
        trains = torch.is_grad_enabled()
        if trains and x_TD is not None:
            x_TD.requires_grad_()
        engine.phases.tick()
        with engine.phases("forward") if trains else nullcontext(), self._split():
            out = engine._forward(batch, self._plan, part=part, x_TD=x_TD)
        if isinstance(out, StageOutput):
            self._leaving[one._replace(stage=one.stage + 1)] = out.x_TD.detach()
        if not trains:
            if isinstance(out, ModelLoss):
                self.loss += out.token_loss.double()
            return
        loss, aux_loss = engine._losses(out)
        engine._sums.add(batch, out, loss, aux_loss, layers)
        coefficient = engine.config.model.aux_loss_coefficient
        if isinstance(out, ModelLoss):
            kept = _Kept(x_TD, [loss + coefficient * aux_loss], [None])
        else:
            kept = _Kept(x_TD, [out.x_TD], [None])
            if aux_loss.requires_grad:
                kept.outputs.append(aux_loss)
                kept.gradients.append(torch.full_like(aux_loss, coefficient))
        self._kept[one.stage, one.micro_batch] = kept

    def _backward(self, one: Pass) -> None:
        part = self._stages._own.index(one.stage)
        x_TD, outputs, gradients = self._kept.pop((one.stage, one.micro_batch))
        if not self._stages._parts[part].is_last:
            gradients[0] = self._given(one)
        if self._is_last(one):
            self._stages._before_last(part)
        with self._engine.phases("backward"), self._split() as pending:
            torch.autograd.backward(outputs, gradients)
        if pending is not None:
            self._deferred[one.stage, one.micro_batch] = pending
        if x_TD is not None:
            assert x_TD.grad is not None
            self._leaving[one._replace(stage=one.stage - 1)] = x_TD.grad

    def _weights(self, one: Pass) -> None:
        """The gradients of weights that a backward pass left for later."""
        pending, is_last = self._deferred.pop((one.stage, one.micro_batch)), self._is_last(one)
        with self._engine.phases("backward"):
            deferral.run(pending, self._stages._layer_done if is_last else None)
            self._stages._after_weights(is_last and one.stage == self._stages._own[0])

    def _is_last(self, one: Pass) -> bool:
        """Of its kind and stage in the step."""
        return one.micro_batch == len(self._batches) - 1

    def _split(self) -> AbstractContextManager[deferral.Pending | None]:
        """Around a pass: where the schedule splits, without the gradients of weights, which the backward pass leaves in
        what this yields."""
        return deferral.deferred() if self._stages.splits else nullcontext()
