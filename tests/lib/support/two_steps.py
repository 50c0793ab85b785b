"""Two steps of a run under an engine, against those of ``engine=zero1`` on one rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from minimax_train.config import Config
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import TIMEOUT
from support.runs import DIVISIBLE, all_whole

SIZES = [*DIVISIBLE, "model.num_layers=2", "model.layer_pattern=LS", "model.aux_loss_coefficient=0.5"]
SIZES += ["recipe.global_batch_size=8", "recipe.micro_batch_size=1", "data.num_streams=4", "recipe.gradient_clip=0.5"]
SIZES += ["logging.norms=1"]
MOMENTS = ("exp_avg", "exp_avg_sq")


class TwoSteps(NamedTuple):
    """What came of them.

    Attributes:
        numbers: loss and gradient norm of each.
        states: ``master``, ``exp_avg`` and ``exp_avg_sq`` after them, whole, by parameter name.
        metrics: of the second.
    """

    numbers: list[float]
    states: dict[str, dict[str, Tensor]]
    metrics: dict[str, float]

    def check(self, right: TwoSteps, tolerance: float = 1e-4, of_norms: float = 1e-4) -> None:
        """Assert that they are those of another engine.

        Args:
            tolerance: of states, relative to each tensor's norm; a tenth of it of losses and gradient norms.
            of_norms: of the norms of groups of parameters.
        """
        assert self.numbers == pytest.approx(right.numbers, rel=tolerance / 10)
        norms = {name: value for name, value in right.metrics.items() if "_norm/" in name}
        assert len(norms) == 14 and {name: self.metrics[name] for name in norms} == pytest.approx(norms, rel=of_norms)
        for kind, of_kind in right.states.items():
            for name, x in of_kind.items():
                assert relative_error(self.states[kind][name], x) < tolerance, (kind, name)


class NaiveAdamW(torch.optim.Optimizer):
    """In place of the fused ones of libraries that are not here. A subclass counts steps where they do."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    def update(self, p: Tensor, group: dict[str, Any], step: int) -> None:
        """Of one tensor.

        Args:
            step: counted from 1.
        """
        state, (beta1, beta2), rate = self.state[p], group["betas"], group["lr"]
        assert p.grad is not None
        p.mul_(1 - rate * group["weight_decay"])
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
        m, v = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
        p.sub_(rate * m / (v.sqrt() + group["eps"]))


def build_trainer(config: Config, device: str) -> Trainer:
    grid = ProcessGrid.create(device, TIMEOUT, **config.parallel.grid)
    return Trainer(config, grid, torch.device(device, torch.cuda.current_device() if device == "cuda" else None))


def take_two_steps(trainer: Trainer) -> TwoSteps:
    taken = [trainer.metrics(trainer.train_step()) for _ in range(2)]
    numbers = [step[key] for step in taken for key in ("loss", "grad_norm")]
    return TwoSteps(numbers, whole_states(trainer.engine.snapshot()), taken[-1])


def whole_states(snapshot: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Put together from all ranks, as :attr:`TwoSteps.states`."""
    found = {"master": all_whole(snapshot["model"])}
    for kind in MOMENTS:
        found[kind] = all_whole({name: moments[kind] for name, moments in snapshot["optimizer"].items()})
    return found


def two_steps_of_zero1(_: ProcessGrid, config: Config, device: str = "cpu") -> TwoSteps:
    trainer = build_trainer(config, device)
    found = take_two_steps(trainer)
    trainer.loader.close()
    return found
