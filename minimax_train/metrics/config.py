"""Where a run reports to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from minimax_train.errors import require_choice
from minimax_train.fields import Range, check_fields


@dataclass
class LoggingConfig:
    """Console, ``metrics.jsonl`` and Weights & Biases.

    Attributes:
        interval: write metrics every so many steps.
        expert_load: write every expert's share of its layer's assignments too: layers x experts numbers a step.
        wandb: ``online``, ``offline`` or ``off``.
        wandb_project, wandb_name: where the run appears; the name is that of ``run_dir`` if null.
    """

    interval: Annotated[int, Range(1, 10**9)] = 1
    expert_load: bool = False
    wandb: str = "off"
    wandb_project: str = "minimax-train"
    wandb_name: str | None = None

    def __post_init__(self) -> None:
        check_fields("logging", self)
        require_choice("logging.wandb", self.wandb, ("online", "offline", "off"))
