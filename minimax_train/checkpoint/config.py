"""When checkpoints are written, how many are kept, and what a run starts from."""

from __future__ import annotations

from dataclasses import dataclass

from minimax_train.errors import require, require_choice


@dataclass
class CheckpointConfig:
    """Checkpoints under ``run_dir/checkpoints``.

    Attributes:
        interval: write one every so many steps, and at the end; 0 for only at the end.
        keep: how many of the newest are kept; 0 for all.
        resume: ``auto`` continues from the newest checkpoint in ``run_dir``, or starts if there is none; ``never``
            refuses a ``run_dir`` that already holds one.
        initial_weights: a checkpoint, or a run, whose weights (not optimizer or data position) a new run starts from.
    """

    interval: int = 500
    keep: int = 2
    resume: str = "never"
    initial_weights: str | None = None

    def __post_init__(self) -> None:
        require(self.interval >= 0, "checkpoint.interval", self.interval, "must be 0 or greater")
        require(self.keep >= 0, "checkpoint.keep", self.keep, "must be 0 (keep all) or greater")
        require_choice("checkpoint.resume", self.resume, ("auto", "never"))
