"""When checkpoints are written, how many are kept, and what a run starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from minimax_train.checkpoint.remote import MEMORY, at
from minimax_train.checkpoint.retention import Retention
from minimax_train.errors import ConfigError, require, require_choice
from minimax_train.fields import PATH, Range, check_fields


@dataclass
class CheckpointConfig:
    """Checkpoints of a run.

    Attributes:
        folder: where they are: null for ``run_dir/checkpoints``, else a path or an fsspec URL, ``s3://bucket/runs/a``,
            for this run alone. Credentials and endpoint are taken from the environment, as the library of that
            protocol has it. ``memory://`` is for one process that saves synchronously.
        interval: write one every so many steps, and at the end; 0 for only at the end.
        async_save: save beside training: the state is copied to host memory, from which a process beside each rank
            writes it. Training waits for saves where that memory does not suffice, and where a run or a stage ends.
        keep: how many of the newest are kept; 0 for all.
        keep_every: also kept are those whose step is a multiple of this number; 0 for none.
        keep_best: also kept are so many with the least held-out loss. An evaluation follows the save of its step, so
            that a checkpoint is compared at the saves after it, and only where an evaluation falls on its step.
        resume: ``auto`` continues from the newest checkpoint of the run, or starts if there is none; ``never``
            refuses a ``run_dir`` that already holds one.
        leave_within_s: seconds from a SIGTERM or SIGUSR1, at which the run saves and leaves, to the end of a process
            that has not come to it; torchrun kills 30 s after its signal.
        initial_weights: path or URL of a checkpoint, or of a run and so its newest whole one, whose weights (not
            optimizer or data position) a new run starts from.
        initial_weights_strict: refuse a checkpoint that does not hold just this model's parameters. Otherwise those
            that it holds by the same name in the same shape are loaded, and the others are told.
    """

    folder: Annotated[str | None, PATH] = None
    interval: Annotated[int, Range(0, 10**9)] = 500
    async_save: bool = True
    keep: Annotated[int, Range(0, 10**9)] = 2
    keep_every: Annotated[int, Range(0, 10**9)] = 0
    keep_best: Annotated[int, Range(0, 10**9)] = 0
    resume: str = "never"
    leave_within_s: Annotated[float, Range(1, 10**6)] = 25.0
    initial_weights: Annotated[str | None, PATH] = None
    initial_weights_strict: bool = True

    def __post_init__(self) -> None:
        check_fields("checkpoint", self)
        for name in ("folder", "initial_weights"):
            value = getattr(self, name)
            try:
                at(value or ".")
            except ConfigError as error:
                raise ConfigError(f"checkpoint.{name}={error}") from error
        in_memory, accepted = (
            (self.folder or "").startswith(MEMORY),
            f"must be false with checkpoint.folder={self.folder}",
        )
        require(not (in_memory and self.async_save), "checkpoint.async_save", self.async_save, accepted)
        require_choice("checkpoint.resume", self.resume, ("auto", "never"))
        for name in ("keep_every", "keep_best"):
            value, accepted = getattr(self, name), "must be 0 with checkpoint.keep=0, which keeps all"
            require(self.keep > 0 or value == 0, f"checkpoint.{name}", value, accepted)
        key, accepted = "checkpoint.initial_weights_strict", "must be true without checkpoint.initial_weights"
        given = self.initial_weights is not None
        require(given or self.initial_weights_strict, key, self.initial_weights_strict, accepted)

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        return Retention(self.keep, self.keep_every, self.keep_best)
