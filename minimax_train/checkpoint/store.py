"""Checkpoints on disk: PyTorch Distributed Checkpoint in model space, written whole or not at all.

run_dir/checkpoints/step-00000200/
    *.distcp .metadata      parameters and optimizer state by parameter name, loadable on any number of ranks
    progress.json           step, tokens, the position of every data stream, what the recipe has learned
    config.yaml tokenizer/  what is needed to use the checkpoint on its own; sizes and RoPE base as of its step
    manifest.json           size and SHA-256 of each of these files

On disk a checkpoint is written under another name, and renamed when it is complete. An object store knows no renaming:
there it is written under its own name, ``manifest.json`` last, and without that it does not exist for any reader.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.metadata import Metadata

from minimax_train.checkpoint.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    check_shards,
    check_sizes,
    read_manifest,
    readable,
    sync_folder,
    write_manifest,
)
from minimax_train.checkpoint.reading import METADATA, CheckpointFiles, tell_unchecked
from minimax_train.checkpoint.remote import Folder, RemotePath, at, local_copy
from minimax_train.checkpoint.retention import KEEP_ALL, Retention, drafts, named, remove, step_of, superseded
from minimax_train.checkpoint.shards import Written, write_index
from minimax_train.config import read_config
from minimax_train.errors import ConfigError
from minimax_train.files import CHECKPOINTS, CONFIG, TOKENIZER, UNFINISHED
from minimax_train.first_rank import on_first_rank
from minimax_train.metrics.console import note
from minimax_train.recipe import Progress

PROGRESS = "progress.json"
OWNER = "run_dir.txt"
"""In a folder of checkpoints that is not in its run's: where that is."""


class CheckpointStore:
    """The checkpoints of one run, as they lie on disk or in an object store (``saving.py`` has all ranks save one).

    Args:
        folder: where they are; in ``run_dir`` by default.
    """

    def __init__(self, run_dir: Path, retention: Retention = KEEP_ALL, folder: str | Folder | None = None) -> None:
        self.run_dir, self.retention = run_dir, retention
        self.folder = run_dir / CHECKPOINTS if folder is None else at(folder)

    @property
    def _is_in_run(self) -> bool:
        return self.folder == self.run_dir / CHECKPOINTS

    def claim(self) -> None:
        """Mark a folder that is not in ``run_dir`` as this run's.

        Raises:
            ConfigError: when it is another run's, or cannot be read or written.
        """
        if self._is_in_run:
            return
        key, run = f"checkpoint.folder={str(self.folder)!r}", str(self.run_dir.resolve())
        try:
            owner, marker = owner_of(self.folder), self.folder / OWNER
            saved = [] if owner is not None else named(self.folder)
            if saved:  # copied there by hand
                owner = str(Path(read_config(local_copy(saved[-1] / CONFIG)).run_dir).resolve())
            elif owner is None:
                if isinstance(self.folder, Path):
                    self.folder.mkdir(parents=True, exist_ok=True)
                marker.write_bytes(run.encode())
        except OSError as error:
            raise ConfigError(f"{key}: cannot be used: {error}") from error
        if owner not in (None, run):
            raise ConfigError(
                f"{key}: holds the checkpoints of another run, run_dir={owner!r} (this is {run!r}): pass another "
                f"folder, or, if that run is to go on here, write {run} to {marker}"
            )

    def all(self) -> list[Folder]:
        """What is named like finished checkpoints, oldest first.

        Raises:
            ConfigError: when ``checkpoint.folder`` cannot be read.
            OSError: when the run's own cannot.
        """
        try:
            return named(self.folder)
        except OSError as error:
            if self._is_in_run:
                raise
            raise ConfigError(f"checkpoint.folder={str(self.folder)!r}: cannot be read: {error}") from error

    def latest(self) -> Folder | None:
        """What is named like the newest finished checkpoint; :meth:`check` tells whether it is one."""
        return (self.all() or [None])[-1]

    def newest_checked(self) -> tuple[Folder, Progress]:
        """The newest checkpoint that :meth:`check` does not find damaged, and its progress.

        Raises:
            DamagedCheckpoint: of the newest, when all are.
            ConfigError: as :meth:`check`.
        """
        damage: list[DamagedCheckpoint] = []
        for path in reversed(self.all()):
            try:
                return path, self.check(path)
            except DamagedCheckpoint as error:
                damage.append(error)
        raise damage[0]

    def newest_whole(self) -> Folder | None:
        """The newest checkpoint whose files are all as they were saved. Damaged ones that are newer are renamed, which
        is told. Called by all ranks together; each reads its share of the shards.

        Raises:
            DamagedCheckpoint: of the newest, when all are damaged; none is renamed then.
            ConfigError: as :meth:`check`, or when files cannot be read or renamed.
        """
        damaged: dict[Folder, DamagedCheckpoint] = {}
        for path in reversed(on_first_rank(self.all)):
            try:
                on_first_rank(lambda path=path: self.check(path))
                check_shards(path)
            except DamagedCheckpoint as error:
                damaged[path] = error
                continue
            on_first_rank(lambda path=path: self._take(path, damaged))
            return path
        if damaged:
            raise next(iter(damaged.values()))
        return None

    def check(self, path: Folder) -> Progress:
        """Look at a checkpoint's files, but not into its shards.

        Raises:
            DamagedCheckpoint: naming the file that is missing or not as it was saved.
            ConfigError: naming what stands where a checkpoint should, or a file that cannot be read.
        """
        with readable(path):
            if not path.is_dir() or not any(path.iterdir()):
                what = "an empty folder" if path.is_dir() else "a file"
                raise ConfigError(f"{path}: not a checkpoint but {what}, which no run has saved; move it away")
            CheckpointFiles(path).read_metadata()
        return _read_progress(path)

    def path(self, step: int) -> Folder:
        """Where the checkpoint of a step goes."""
        return self.folder / f"step-{step:08d}"

    def draft(self, step: int) -> Folder:
        """Where its shards are written."""
        if isinstance(self.folder, RemotePath):
            return self.path(step)
        return self.folder / f"step-{step:08d}{UNFINISHED}"

    def begin(self, step: int) -> None:
        """Make the folder that a checkpoint is written in, and remove what killed or failed saves left. An object store
        is not asked, for which training would wait: there :meth:`finish` removes it.

        Raises:
            OSError: when that fails.
        """
        draft = self.draft(step)
        if isinstance(draft, Path):
            for left in drafts(self.folder):
                remove(left)
            draft.mkdir(parents=True)

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
        if isinstance(path, RemotePath):
            with tempfile.TemporaryDirectory(prefix="minimax-") as beside:
                self._write_rest(Path(beside), metadata, written, progress, config)
                _upload(Path(beside), path)
        else:
            assert isinstance(draft, Path)
            self._write_rest(draft, metadata, written, progress, config)
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, "stands where it should go", str(path))
            draft.rename(path)
            sync_folder(path.parent)
        complete = time.time()
        self._remove_old()
        return complete

    def _write_rest(
        self, folder: Path, metadata: Metadata, written: Sequence[Written], progress: str, config: str
    ) -> None:
        """All but the shards."""
        write_index(folder, metadata, [part.results for part in written])
        (folder / PROGRESS).write_text(progress)
        (folder / CONFIG).write_text(config, encoding="utf-8")
        shutil.copytree(self.run_dir / TOKENIZER, folder / TOKENIZER)
        write_manifest(folder, {name: entry for part in written for name, entry in part.sealed.items()})

    def not_saved(self, step: int, total_bytes: int, cause: str) -> str:
        """A save that failed, told in a line. What it wrote is removed; nothing may be writing there any more. In an
        object store, for which training would wait, the next save removes it."""
        draft, takes = self.draft(step), f"it takes about {total_bytes / 1e6:,.1f} MB"
        if not isinstance(draft, Path):
            return f"{self.path(step)}: the checkpoint cannot be saved: {cause}; {takes}"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            free = f"{shutil.disk_usage(draft.parent).free / 1e6:,.1f} MB are free there"
        except OSError as unknown:
            free = f"what is free there is not known: {unknown}"
        return f"{self.path(step)}: the checkpoint cannot be saved: {cause}; {takes}, {free}"

    def load(self, path: Folder, state: dict[str, Any]) -> Progress:
        """Fill an engine's snapshot in place, whatever number of ranks wrote the checkpoint.

        Raises:
            ConfigError: naming what is damaged, or what it does not hold.
        """
        progress = on_first_rank(lambda: _read_progress(path))
        CheckpointFiles(path).load(state)
        return progress

    def _take(self, whole: Folder, damaged: Mapping[Folder, DamagedCheckpoint]) -> None:
        """Set aside the damaged ones that are newer."""
        tell_unchecked(whole)
        for path, error in damaged.items():
            number, kept = 0, path.with_name(f"{path.name}.damaged")
            try:
                while kept.exists() or (isinstance(kept, Path) and kept.is_symlink()):
                    number += 1
                    kept = path.with_name(f"{path.name}.damaged.{number}")
                cast(Any, path).rename(kept)
            except OSError as refused:
                raise ConfigError(f"{error}; {path.name} cannot be renamed {kept.name}: {refused}") from error
            note(f"{error}; it is kept as {kept.name}, and the run goes on from {whole}")

    def _remove_old(self) -> None:
        try:
            old = superseded(self.run_dir, self._saved(), self.retention)
            if isinstance(self.folder, RemotePath):
                old += drafts(self.folder)
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
        try:
            saved = self._saved()
        except OSError as error:
            return (
                f"checkpoint.resume=auto continues from the newest in {self.folder}, which cannot be read now: {error}"
            )
        if saved:
            return f"checkpoint.resume=auto continues from {saved[-1]}"
        return f"no checkpoint is in {self.folder} to continue from"

    def _saved(self) -> list[Folder]:
        return [path for path in named(self.folder) if (path / METADATA).is_file()]


def _upload(beside: Path, path: RemotePath) -> None:
    """Complete a checkpoint whose shards are in the store: ``manifest.json`` comes last."""
    files = [file for file in beside.rglob("*") if file.is_file() and file != beside / MANIFEST]
    for file in files:
        (path / file.relative_to(beside).as_posix()).upload(file)
    manifest = read_manifest(beside)
    assert manifest is not None
    stored = path.sizes()
    check_sizes(path, manifest)  # another rank may have written to another store
    for name in stored.keys() - manifest.keys():  # of a run that was killed
        (path / name).unlink()
    (path / MANIFEST).upload(beside / MANIFEST)


def folder_of(run: Folder) -> Folder:
    """Where the checkpoints of a run are.

    Args:
        run: its folder, or where the checkpoints are.

    Raises:
        OSError: when that cannot be found out.
    """
    if isinstance(run, Path) and (run / CONFIG).is_file():
        with suppress(ConfigError):
            configured = read_config(run / CONFIG).checkpoint.folder
            if configured is not None:
                return at(configured)
    return run if named(run) else run / CHECKPOINTS


def owner_of(folder: Folder) -> str | None:
    """The ``run_dir`` whose checkpoints are in a folder; None where nothing says so.

    Raises:
        OSError: when it cannot be read.
    """
    if isinstance(folder, Path) and folder.name == CHECKPOINTS:
        return str(folder.parent)
    marker = folder / OWNER
    return marker.read_bytes().decode(errors="replace").strip() if marker.is_file() else None


def find_checkpoint(path: str | Folder) -> Folder:
    """The checkpoint at a path or URL: itself, or the newest of the run there.

    Raises:
        ConfigError: when there is none.
    """
    path = at(path)
    whole = METADATA if isinstance(path, Path) else MANIFEST
    with readable(path):
        if (path / whole).is_file():
            return path
        if (path / PROGRESS).is_file():
            raise ConfigError(f"{path}: not a whole checkpoint: there is no {whole} in it")
        found = named(folder_of(path))
    if not found:
        raise ConfigError(f"{path}: neither a checkpoint (a folder with {whole}) nor a run that holds one")
    return found[-1]


def _read_progress(path: Folder) -> Progress:
    file = path / PROGRESS
    try:
        progress = Progress(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedCheckpoint(f"{file}: damaged: not the progress of a run: {error}") from error
    if progress.step != step_of(path):
        raise DamagedCheckpoint(f"{file}: damaged: it says step {progress.step!r}, its folder {path.name}")
    return progress
