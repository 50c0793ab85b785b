"""When checkpoints are written, how many are kept, and what a run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from minimax_train.errors import require_choice
from minimax_train.fields import PATH, Range, check_fields


@dataclass
class CheckpointConfig:
    """Checkpoints under ``run_dir/checkpoints``.

    Attributes:
        interval: write one every so many steps, and at the end; 0 for only at the end.
        keep: how many of the newest are kept; 0 for all.
        resume: ``auto`` continues from the newest checkpoint in ``run_dir``, or starts if there is none; ``never``
            refuses a ``run_dir`` that already holds one.
        leave_within_s: seconds from a SIGTERM or SIGUSR1, at which the run saves and leaves, to the end of a process
            that has not come to it; torchrun kills 30 s after its signal.
        initial_weights: a checkpoint, or a run, whose weights (not optimizer or data position) a new run starts from.
    """

    interval: Annotated[int, Range(0, 10**9)] = 500
    keep: Annotated[int, Range(0, 10**9)] = 2
    resume: str = "never"
    leave_within_s: Annotated[float, Range(1, 10**6)] = 25.0
    initial_weights: Annotated[str | None, PATH] = None

    def __post_init__(self) -> None:
        check_fields("checkpoint", self)
        require_choice("checkpoint.resume", self.resume, ("auto", "never"))
