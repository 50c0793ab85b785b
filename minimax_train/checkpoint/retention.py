"""Which checkpoints of a run are kept, and removing the others."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from minimax_train.checkpoint.manifest import MANIFEST
from minimax_train.checkpoint.remote import Folder, RemotePath
from minimax_train.fields import Range
from minimax_train.files import METRICS, UNFINISHED
from minimax_train.metrics.log import read_steps

_NAME = re.compile(r"step-(\d{8,})")
_DRAFT = re.compile(rf"{_NAME.pattern}(\.old)?{re.escape(UNFINISHED)}")  # of a run that was killed
_DAMAGED = re.compile(rf"{_NAME.pattern}\.damaged(\.\d+)?")


@dataclass(frozen=True)
class Retention:
    """A checkpoint is kept for any of these reasons.

    Attributes:
        keep: it is among so many of the newest; 0 for all.
        keep_every: its step is a multiple of this number; 0 for none.
        keep_best: it is among so many with the least held-out loss.
    """

    keep: Annotated[int, Range(0, 10**9)] = 0
    keep_every: Annotated[int, Range(0, 10**9)] = 0
    keep_best: Annotated[int, Range(0, 10**9)] = 0

    def removes(self, steps: list[int], held_out: Mapping[int, float]) -> list[int]:
        """Those of the steps, oldest first, whose checkpoints are not kept.

        Args:
            steps: of all checkpoints.
            held_out: loss by step, finite, as far as it is known; of equal ones the later step's is the better.
        """
        if self.keep == 0:
            return []
        kept = set(sorted(steps)[-self.keep :])
        if self.keep_every:
            kept.update(step for step in steps if step % self.keep_every == 0)
        known = sorted(held_out.keys() & set(steps), key=lambda step: (held_out[step], -step))
        kept.update(known[: self.keep_best])
        return sorted(set(steps) - kept)


KEEP_ALL = Retention()


def step_of(checkpoint: Folder) -> int:
    """Which step a checkpoint is called after."""
    return int(checkpoint.name.partition("-")[2])


def named(folder: Folder) -> list[Folder]:
    """What is named like a finished checkpoint, oldest first; in an object store, what also has a manifest."""
    return sorted((path for path in _matching(folder, _NAME) if _is_finished(path)), key=step_of)


def drafts(folder: Folder) -> list[Folder]:
    """What runs that were killed were writing or removing."""
    if isinstance(folder, RemotePath):
        return [path for path in _matching(folder, _NAME) if not _is_finished(path)]
    return _matching(folder, _DRAFT)


def aside(folder: Folder) -> list[Folder]:
    """Damaged checkpoints that runs passed over and kept aside."""
    return _matching(folder, _DAMAGED)


def held_out_losses(run_dir: Path, checkpoints: Sequence[Folder]) -> dict[int, float]:
    """Loss at the steps of checkpoints, where it was evaluated and is finite.

    Raises:
        OSError: when ``metrics.jsonl`` cannot be read.
    """
    records = read_steps(run_dir / METRICS, {step_of(path) for path in checkpoints})
    losses = {step: float(record.get("validation_loss", math.nan)) for step, record in records.items()}
    return {step: loss for step, loss in losses.items() if math.isfinite(loss)}


def superseded(run_dir: Path, checkpoints: Sequence[Folder], retention: Retention) -> list[Folder]:
    """The checkpoints of a run that are not kept.

    An evaluation follows the save of its step, so that the newest checkpoint has no held-out loss yet.

    Raises:
        OSError: when the losses are needed and cannot be read.
    """
    losses = held_out_losses(run_dir, checkpoints) if retention.keep and retention.keep_best else {}
    removed = set(retention.removes([step_of(path) for path in checkpoints], losses))
    return [path for path in checkpoints if step_of(path) in removed]


def remove(checkpoint: Folder) -> None:
    """Remove a checkpoint. Killed in between, what is left does not look like one.

    Raises:
        OSError: when it cannot be removed.
    """
    if isinstance(checkpoint, RemotePath):
        if (checkpoint / MANIFEST).is_file():
            (checkpoint / MANIFEST).unlink()
        checkpoint.rmtree()
        return
    leaving = checkpoint
    if _NAME.fullmatch(checkpoint.name):
        leaving = checkpoint.with_name(f"{checkpoint.name}.old{UNFINISHED}")
        checkpoint.rename(leaving)
    shutil.rmtree(leaving)


def _is_finished(path: Folder) -> bool:
    return not isinstance(path, RemotePath) or (path / MANIFEST).is_file()


def _matching(folder: Folder, name: re.Pattern[str]) -> list[Folder]:
    paths = folder.iterdir() if isinstance(folder, RemotePath) or folder.is_dir() else ()
    return sorted((path for path in paths if name.fullmatch(path.name)), key=lambda path: path.name)
