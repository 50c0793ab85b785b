"""Checkpoints on disk: PyTorch Distributed Checkpoint in model space, written whole or not at all.

run_dir/checkpoints/step-00000200/
    *.distcp .metadata      parameters and optimizer state by parameter name, loadable on any number of ranks
    progress.json           step, tokens, the position of every data stream, what the recipe has learned
    config.yaml tokenizer/  what is needed to use the checkpoint on its own; sizes and RoPE base as of its step
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from minimax_train.checkpoint.reading import METADATA, CheckpointFiles
from minimax_train.errors import ConfigError, TrainingError, require
from minimax_train.files import CHECKPOINTS, CONFIG, TOKENIZER, UNFINISHED
from minimax_train.first_rank import on_first_rank
from minimax_train.metrics.console import note
from minimax_train.recipe import Progress

PROGRESS = "progress.json"
_NAME = re.compile(r"step-(\d{8,})")
_LEFT = re.compile(rf"{_NAME.pattern}(\.old)?{re.escape(UNFINISHED)}")  # by a run that was killed


class CheckpointStore:
    """The checkpoints of one run. :meth:`save` and :meth:`load` are called by all ranks together."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir, self.keep = run_dir, keep
        self.folder = run_dir / CHECKPOINTS

    def latest(self) -> Path | None:
        """What is named like the newest finished checkpoint; :meth:`check` tells whether it is one."""
        return (_named(self.folder) or [None])[-1]

    def check(self, path: Path) -> Progress:
        """Look at a checkpoint's files, but not into its tensors.

        Raises:
            ConfigError: naming the file that is missing or damaged, or what stands where a checkpoint should.
        """
        if not path.is_dir() or not any(path.iterdir()):
            what = "an empty folder" if path.is_dir() else "a file"
            raise ConfigError(f"{path}: not a checkpoint but {what}, which no run has saved; move it away")
        CheckpointFiles(path).read_metadata()
        return _read_progress(path)

    def save(self, progress: Progress, state: dict[str, Any], config: str) -> Path:
        """Write a checkpoint, then remove those over the number kept.

        Args:
            state: from :meth:`minimax_train.engines.Engine.snapshot`.
            config: YAML of the configuration at this step.

        Raises:
            TrainingError: on all ranks, when it cannot be written. The checkpoints before it are as they were.
        """
        path = self.folder / f"step-{progress.step:08d}"
        draft = path.with_name(path.name + UNFINISHED)

        def begin() -> None:
            for left in self.folder.glob(f"*{UNFINISHED}"):
                if _LEFT.fullmatch(left.name):
                    shutil.rmtree(left)
            draft.mkdir(parents=True)

        def finish() -> None:
            (draft / PROGRESS).write_text(json.dumps(asdict(progress)))
            (draft / CONFIG).write_text(config, encoding="utf-8")
            shutil.copytree(self.run_dir / TOKENIZER, draft / TOKENIZER)
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "stands where it should go", str(path))
            draft.rename(path)

        try:
            on_first_rank(begin)
            dcp.save(state, storage_writer=_Writer(draft))
            on_first_rank(finish)
        except (OSError, CheckpointException, TrainingError) as error:
            raise self._not_saved(path, draft, state, error) from error
        on_first_rank(self._remove_old)
        return path

    def load(self, path: Path, state: dict[str, Any]) -> Progress:
        """Fill an engine's snapshot in place, whatever number of ranks wrote the checkpoint.

        Raises:
            ConfigError: naming what is damaged, or what it does not hold.
        """
        progress = on_first_rank(lambda: _read_progress(path))
        CheckpointFiles(path).load(state)
        return progress

    def _remove_old(self) -> None:
        for path in self._saved()[: -self.keep] if self.keep else []:
            try:
                # Killed in between, what is left does not look like a checkpoint.
                leaving = path.with_name(f"{path.name}.old{UNFINISHED}")
                path.rename(leaving)
                shutil.rmtree(leaving)
            except OSError as error:
                note(f"{path}: cannot be removed, though checkpoint.keep={self.keep}: {error}")

    def _not_saved(self, path: Path, draft: Path, state: dict[str, Any], error: BaseException) -> BaseException:
        if isinstance(error, CheckpointException):
            error, _ = error.failures[min(error.failures)]
            if isinstance(error, KeyboardInterrupt):
                return error
        if dist.get_rank() == 0:  # all ranks have stopped writing
            shutil.rmtree(draft, ignore_errors=True)
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        try:
            free = f"{shutil.disk_usage(self.run_dir).free / 1e6:,.1f} MB are free there"
        except OSError as unknown:
            free = f"what is free there is not known: {unknown}"
        return TrainingError(
            f"{path}: the checkpoint cannot be saved: {cause}; it takes about {_bytes(state) / 1e6:,.1f} MB, {free}; "
            + self.to_go_on()
        )

    def to_go_on(self) -> str:
        """What a user can do after the run has stopped."""
        saved = self._saved()
        if saved:
            return f"checkpoint.resume=auto continues from {saved[-1]}"
        return f"no checkpoint is in {self.folder} to continue from"

    def _saved(self) -> list[Path]:
        return [path for path in _named(self.folder) if (path / METADATA).is_file()]


class _Writer(dcp.FileSystemWriter):
    """torch's, with the system's error (no space left) instead of the serializer's that comes of it."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def load_weights(path: Path, model: dict[str, Tensor]) -> None:
    """Fill parameters alone, by name, from a checkpoint.

    Raises:
        ConfigError: when it is damaged, lacks a parameter, or holds it in another shape.
    """
    files = CheckpointFiles(path)
    on_first_rank(lambda: files.read_metadata() and None)
    stored = files.read_metadata().state_dict_metadata
    for name, parameter in model.items():
        size = getattr(stored.get(f"model.{name}"), "size", None)
        held = "no such parameter" if size is None else f"one of {tuple(size)}"
        accepted = f"this model's {name} is {tuple(parameter.shape)}, the checkpoint holds {held}"
        require(size == parameter.shape, "checkpoint.initial_weights", str(path), accepted)
    files.load({"model": model})


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at a path: itself, or the newest of the run there.

    Raises:
        ConfigError: when there is none.
    """
    path = Path(path)
    if (path / METADATA).is_file():
        return path
    if (path / PROGRESS).is_file():
        raise ConfigError(f"{path}: not a whole checkpoint: there is no {METADATA} in it")
    named = _named(path / CHECKPOINTS)
    if not named:
        raise ConfigError(f"{path}: neither a checkpoint (a folder with {METADATA}) nor a run that holds one")
    return named[-1]


def _named(folder: Path) -> list[Path]:
    """What is named like a finished checkpoint, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=lambda p: int(p.name.partition("-")[2]))


def _read_progress(path: Path) -> Progress:
    file = path / PROGRESS
    try:
        progress = Progress(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{file}: damaged: not the progress of a run: {error}") from error
    if progress.step != int(path.name.partition("-")[2]):
        raise ConfigError(f"{file}: damaged: it says step {progress.step!r}, its folder {path.name}")
    return progress


def _bytes(state: Any) -> int:
    """Of a snapshot's tensors, over all ranks."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(_bytes, state.values())) if isinstance(state, Mapping) else 0
