"""Checkpoints on disk: PyTorch Distributed Checkpoint in model space, written whole or not at all.

run_dir/checkpoints/step-00000200/
    *.distcp .metadata      parameters and optimizer state by parameter name, loadable on any number of ranks
    progress.json           step, tokens, the position of every data stream, what the recipe has learned
    config.yaml tokenizer/  what is needed to use the checkpoint on its own; sizes and RoPE base as of its step
    manifest.json           size and SHA-256 of each of these files
"""

from __future__ import annotations

import errno
import json
import os
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

from minimax_train.checkpoint.manifest import DamagedCheckpoint, Entry, check_shards, seal, sync_folder, write_manifest
from minimax_train.checkpoint.reading import METADATA, CheckpointFiles
from minimax_train.checkpoint.retention import KEEP_ALL, Retention, drafts, named, remove, step_of, superseded
from minimax_train.errors import ConfigError, TrainingError
from minimax_train.files import CHECKPOINTS, CONFIG, TOKENIZER, UNFINISHED
from minimax_train.first_rank import on_every_rank, on_first_rank
from minimax_train.metrics.console import note
from minimax_train.recipe import Progress

PROGRESS = "progress.json"


class CheckpointStore:
    """The checkpoints of one run. :meth:`save` and :meth:`load` are called by all ranks together."""

    def __init__(self, run_dir: Path, retention: Retention = KEEP_ALL) -> None:
        self.run_dir, self.retention = run_dir, retention
        self.folder = run_dir / CHECKPOINTS

    def all(self) -> list[Path]:
        """What is named like finished checkpoints, oldest first."""
        return named(self.folder)

    def latest(self) -> Path | None:
        """What is named like the newest finished checkpoint; :meth:`check` tells whether it is one."""
        return (named(self.folder) or [None])[-1]

    def newest_checked(self) -> tuple[Path, Progress]:
        """The newest checkpoint that :meth:`check` does not find damaged, and its progress.

        Raises:
            DamagedCheckpoint: of the newest, when all are.
            ConfigError: as :meth:`check`.
        """
        damage: list[DamagedCheckpoint] = []
        for path in reversed(named(self.folder)):
            try:
                return path, self.check(path)
            except DamagedCheckpoint as error:
                damage.append(error)
        raise damage[0]

    def newest_whole(self) -> Path | None:
        """The newest checkpoint whose files are all as they were saved. Damaged ones that are newer are renamed, which
        is told. Called by all ranks together; each reads its share of the shards.

        Raises:
            DamagedCheckpoint: of the newest, when all are damaged; none is renamed then.
            ConfigError: as :meth:`check`, or when files cannot be read or renamed.
        """
        damaged: dict[Path, DamagedCheckpoint] = {}
        for path in reversed(on_first_rank(lambda: named(self.folder))):
            try:
                on_first_rank(lambda path=path: self.check(path))
                check_shards(path)
            except DamagedCheckpoint as error:
                damaged[path] = error
                continue
            on_first_rank(lambda path=path: self._set_aside(damaged, path))
            return path
        if damaged:
            raise next(iter(damaged.values()))
        return None

    def check(self, path: Path) -> Progress:
        """Look at a checkpoint's files, but not into its shards.

        Raises:
            DamagedCheckpoint: naming the file that is missing or not as it was saved.
            ConfigError: naming what stands where a checkpoint should, or a file that cannot be read.
        """
        if not path.is_dir() or not any(path.iterdir()):
            what = "an empty folder" if path.is_dir() else "a file"
            raise ConfigError(f"{path}: not a checkpoint but {what}, which no run has saved; move it away")
        try:
            CheckpointFiles(path).read_metadata()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
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
            for left in drafts(self.folder):
                shutil.rmtree(left)
            draft.mkdir(parents=True)

        def finish(sealed: dict[str, Entry]) -> None:
            (draft / PROGRESS).write_text(json.dumps(asdict(progress)))
            (draft / CONFIG).write_text(config, encoding="utf-8")
            shutil.copytree(self.run_dir / TOKENIZER, draft / TOKENIZER)
            write_manifest(draft, sealed)
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "stands where it should go", str(path))
            draft.rename(path)
            sync_folder(self.folder)

        try:
            on_first_rank(begin)
            writer = _Writer(draft)
            dcp.save(state, storage_writer=writer)
            # Each rank reads its own files back, from the page cache.
            sealed = on_every_rank(lambda: {name: seal(draft / name) for name in writer.written})
            on_first_rank(lambda: finish({name: entry for part in sealed for name, entry in part.items()}))
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

    def _set_aside(self, damaged: Mapping[Path, DamagedCheckpoint], instead: Path) -> None:
        for path, error in damaged.items():
            number, kept = 0, path.with_name(f"{path.name}.damaged")
            while os.path.lexists(kept):
                number += 1
                kept = path.with_name(f"{path.name}.damaged.{number}")
            try:
                path.rename(kept)
            except OSError as refused:
                raise ConfigError(f"{error}; {path.name} cannot be renamed {kept.name}: {refused}") from error
            note(f"{error}; it is kept as {kept.name}, and the run goes on from {instead}")

    def _remove_old(self) -> None:
        try:
            old = superseded(self.run_dir, self._saved(), self.retention)
        except OSError as error:
            note(f"{self.folder}: no checkpoint is removed: {error}")
            return
        for path in old:
            try:
                remove(path)
            except OSError as error:
                note(f"{path}: cannot be removed, though checkpoint.keep={self.retention.keep}: {error}")

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
        return [path for path in named(self.folder) if (path / METADATA).is_file()]


class _Writer(dcp.FileSystemWriter):
    """torch's, with the system's error (no space left) instead of the serializer's that comes of it.

    Attributes:
        written: names of the files that this rank has written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.written: list[str] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        try:
            done = super().write_data(plan, planner)
            self.written = sorted({result.storage_data.relative_path for result in done.wait()})
            return done
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


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
    found = named(path / CHECKPOINTS)
    if not found:
        raise ConfigError(f"{path}: neither a checkpoint (a folder with {METADATA}) nor a run that holds one")
    return found[-1]


def _read_progress(path: Path) -> Progress:
    file = path / PROGRESS
    try:
        progress = Progress(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedCheckpoint(f"{file}: damaged: not the progress of a run: {error}") from error
    if progress.step != step_of(path):
        raise DamagedCheckpoint(f"{file}: damaged: it says step {progress.step!r}, its folder {path.name}")
    return progress


def _bytes(state: Any) -> int:
    """Of a snapshot's tensors, over all ranks."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(_bytes, state.values())) if isinstance(state, Mapping) else 0
