"""Where a run reports to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from minimax_train.errors import require, require_choice
from minimax_train.fields import Range, check_fields


@dataclass
class LoggingConfig:
    """Console, ``metrics.jsonl``, TensorBoard, Weights & Biases and profiler traces.

    Attributes:
        interval: write metrics every so many steps.
        norms: write norms of gradient and weights by group of parameters in one of so many records; 0: in none.
        per_layer: write the figures of each layer's router, four numbers a layer.
        expert_load: write every expert's share of its layer's assignments too: layers x experts numbers a step.
        profile_steps: steps of which profiler traces are written into ``traces`` of the run's folder.
        profile_ranks: the ranks that write them.
        tensorboard: write the same numbers for TensorBoard, into ``tensorboard`` of the run's folder.
        wandb: ``online``, ``offline`` or ``off``.
        wandb_project, wandb_name: where the run appears; the name is that of ``run_dir`` if null.
    """

    interval: Annotated[int, Range(1, 10**9)] = 1
    norms: Annotated[int, Range(0, 10**9)] = 10
    per_layer: bool = True
    expert_load: bool = False
    profile_steps: list[str] = field(default_factory=list)
    profile_ranks: list[str] = field(default_factory=lambda: ["0"])
    tensorboard: bool = False
    wandb: str = "off"
    wandb_project: str = "minimax-train"
    wandb_name: str | None = None

    def __post_init__(self) -> None:
        check_fields("logging", self)
        for name, least in (("profile_steps", 1), ("profile_ranks", 0)):
            for number in getattr(self, name):
                accepted = f"must be integers in digits, {least} or greater"
                require(re.fullmatch("0|[1-9][0-9]{0,9}", number) is not None, f"logging.{name}", number, accepted)
                require(int(number) >= least, f"logging.{name}", number, accepted)
        require_choice("logging.wandb", self.wandb, ("online", "offline", "off"))
