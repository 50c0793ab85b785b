"""What engines share whose optimizers are another library's: DeepSpeed's, Megatron-Core's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_train.engines.autograd import AutogradEngine
from minimax_train.engines.engine import StepReport
from minimax_train.model import HybridModel, fill, initializers
from minimax_train.model.sharding import local
from minimax_train.parallel.grid import WORLD, ProcessGrid
from minimax_train.phases import Phases

if TYPE_CHECKING:
    from minimax_train.config import Config

MOMENTS = ("exp_avg", "exp_avg_sq")


class ExternalEngine(AutogradEngine):
    """The library reduces gradients, and keeps and updates float32 master weights and AdamW's moments. The engine runs
    forward and backward passes, takes the norm of the whole model's gradient and decides whether an update is held; for
    that the host waits for the device once a step.

    The library lays states out as it likes. For checkpoints they are brought into the form that all engines save, one
    parameter at a time (:meth:`ParameterLayout.cut`). A *kind* is ``master``, ``exp_avg``, ``exp_avg_sq``, or
    ``gradient`` before the update.
    """

    on_meta = False
    _optimizers: Mapping[str, Any]
    """The library's, by the axis of the ranks that share their states. They have ``set_steps(steps)`` and
    ``largest()``: the absolute value of this rank's master weights, not finite if one is not."""

    def __init__(
        self, model: HybridModel, config: Config, grid: ProcessGrid, device: torch.device, phases: Phases
    ) -> None:
        super().__init__(model, config, grid, device, phases)
        self._initializers = initializers(model)
        self._step = torch.zeros((), dtype=torch.float32, device=device)  # updates made

    def _draw_weights(self) -> None:
        """Draw initial weights in float32, a parameter at a time, and round them for computing. For a subclass to call
        when its optimizers are there."""
        for name, layout in self.layouts.items():
            place = layout.place(self.grid)
            drawn = layout.shard_flat(self.grid, torch.zeros(place.stop - place.start, device=self.device))
            fill(drawn, self._initializers[name], self.config.seed, name)
            self._write(name, "master", drawn)
        self._round_masters()

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepReport:
        with self.phases("optimizer"):
            norm = self._gradient_norm(self._squares())
            held = self._held()
            self._step += 1 - held
            self._update(learning_rate, norm, bool(held))
            largest = torch.stack([x.largest().to(self.device) for x in self._optimizers.values()]).sum()
            dist.all_reduce(largest, group=self.grid.group(WORLD))
            self._freeze_unless(largest.isfinite())
            return StepReport(norm, self._frozen == 0, self._outlier)

    def gradients(self) -> dict[str, Tensor]:
        return self._pieces("gradient")

    def snapshot(self) -> dict[str, Any]:
        moments = {kind: self._pieces(kind) for kind in MOMENTS}
        states = {n: {"step": self._step, **{kind: moments[kind][n] for kind in MOMENTS}} for n in self.parameters}
        return {"model": self._pieces("master"), "optimizer": states}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for name, piece in state["model"].items():
            self._write(name, "master", piece)
        for name, moments in state.get("optimizer", {}).items():
            for kind in MOMENTS:
                self._write(name, kind, moments[kind])
        for optimizer in self._optimizers.values():
            optimizer.set_steps(int(self._step))
        self._round_masters()

    def _pieces(self, kind: str) -> dict[str, Tensor]:
        return {name: self._piece(name, kind) for name in self.parameters}

    def _cut(self, name: str, part: Tensor) -> Tensor:
        """What checkpoints have of a parameter from this rank, of its part: a copy where that is not all of it, which
        need not be kept then."""
        layout = self.layouts[name]
        flat = part.flatten()[layout.place(self.grid)]
        if self.grid.size(layout.replicas(self.grid)) > 1:
            flat = flat.clone()
        return layout.shard_flat(self.grid, flat)

    def _uncut(self, name: str, piece: Tensor) -> Tensor:
        """The inverse of :meth:`_cut`, laid flat; by all ranks together."""
        layout = self.layouts[name]
        return self._part(name, layout.replicas(self.grid), local(piece).flatten(), layout.place(self.grid))

    def _part(self, name: str, axis: str, piece: Tensor, place: slice) -> Tensor:
        """A rank's part of a parameter, laid flat, out of the pieces that an axis's ranks have of it; by all of them
        together. Of one rank it is the piece itself.

        Args:
            piece: this rank's, one axis, float32.
            place: where in the part it lies.
        """
        if self.grid.size(axis) == 1:
            return piece
        part = torch.zeros(prod(self.layouts[name].part(self.grid)), dtype=torch.float32, device=self.device)
        part[place] = piece
        dist.all_reduce(part, group=self.grid.group(axis))
        return part

    @abstractmethod
    def _squares(self) -> Iterable[Tensor]:
        """Of the gradient's elements, as of :meth:`_gradient_norm`."""

    @abstractmethod
    def _update(self, learning_rate: float, norm: Tensor, held: bool) -> None:
        """AdamW with gradients clipped, unless it is held, and the end of this step's gradients.

        Args:
            norm: of the whole model's gradient.
        """

    @abstractmethod
    def _piece(self, name: str, kind: str) -> Tensor:
        """What checkpoints have of a parameter from this rank; by all ranks together."""

    @abstractmethod
    def _write(self, name: str, kind: str, piece: Tensor) -> None:
        """The inverse of :meth:`_piece`, of all kinds but the gradient."""

    @abstractmethod
    def _round_masters(self) -> None:
        """Take over master weights that were written: the weights of compute, on all ranks."""
