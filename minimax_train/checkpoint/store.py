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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from minimax_train.checkpoint.manifest import DamagedCheckpoint, check_shards, sync_folder, write_manifest
from minimax_train.checkpoint.reading import METADATA, CheckpointFiles
from minimax_train.checkpoint.retention import KEEP_ALL, Retention, drafts, named, remove, step_of, superseded
from minimax_train.checkpoint.shards import Written, write_index
from minimax_train.errors import ConfigError
from minimax_train.files import CHECKPOINTS, CONFIG, TOKENIZER, UNFINISHED
from minimax_train.first_rank import on_first_rank
from minimax_train.metrics.console import note
from minimax_train.recipe import Progress

PROGRESS = "progress.json"


class CheckpointStore:
    """The checkpoints of one run, as they lie on disk (``saving.py`` has all ranks save one)."""

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

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step goes."""
        return self.folder / f"step-{step:08d}"

    def draft(self, step: int) -> Path:
        """Where it is written."""
        return self.folder / f"step-{step:08d}{UNFINISHED}"

    def begin(self, step: int) -> None:
        """Make the folder that a checkpoint is written in, and remove what killed or failed saves left.

        Raises:
            OSError: when that fails.
        """
        for left in drafts(self.folder):
            shutil.rmtree(left)
        self.draft(step).mkdir(parents=True)

    def finish(self, step: int, metadata: Metadata, written: Sequence[Written], progress: str, config: str) -> float:
        """Complete a checkpoint whose shards are written, then remove those over the number kept.

        Args:
            metadata: from the plan.
            written: by all ranks, in their order.
            progress, config: JSON of the progress, YAML of the configuration.

        Returns:
            When it was complete: seconds since the epoch.

        Raises:
            OSError: when it cannot be written.
        """
        path, draft = self.path(step), self.draft(step)
        write_index(draft, metadata, [part.results for part in written])
        (draft / PROGRESS).write_text(progress)
        (draft / CONFIG).write_text(config, encoding="utf-8")
        shutil.copytree(self.run_dir / TOKENIZER, draft / TOKENIZER)
        write_manifest(draft, {name: entry for part in written for name, entry in part.sealed.items()})
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "stands where it should go", str(path))
        draft.rename(path)
        sync_folder(self.folder)
        complete = time.time()
        self._remove_old()
        return complete

    def not_saved(self, step: int, total_bytes: int, cause: str) -> str:
        """A save that failed, told in a line. What it wrote is removed; nothing may be writing there any more."""
        shutil.rmtree(self.draft(step), ignore_errors=True)
        try:
            free = f"{shutil.disk_usage(self.run_dir).free / 1e6:,.1f} MB are free there"
        except OSError as unknown:
            free = f"what is free there is not known: {unknown}"
        takes = f"it takes about {total_bytes / 1e6:,.1f} MB"
        return f"{self.path(step)}: the checkpoint cannot be saved: {cause}; {takes}, {free}"

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

    def to_go_on(self) -> str:
        """What a user can do after the run has stopped."""
        saved = self._saved()
        if saved:
            return f"checkpoint.resume=auto continues from {saved[-1]}"
        return f"no checkpoint is in {self.folder} to continue from"

    def _saved(self) -> list[Path]:
        return [path for path in named(self.folder) if (path / METADATA).is_file()]


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
