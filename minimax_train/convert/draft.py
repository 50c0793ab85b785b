"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minimax_train.errors import require
from minimax_train.files import UNFINISHED


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which takes its place at the end and is removed after an error.

    Raises:
        ConfigError: when the target is there already and not an empty folder, or something has the new folder's name.
        OSError: naming the target, when no folder can be made there.
    """
    # Where links lead: a folder can take the place of an empty folder, not of a link to one.
    target = Path(os.path.realpath(target))
    if os.path.lexists(target):
        empty = target.is_dir() and not any(target.iterdir())
        require(empty, "DST", str(target), "exists already; must be a new or an empty folder")
        replaceable = not target.is_mount() and not target.samefile(".")
        require(replaceable, "DST", str(target), "must be a new folder: this one is in use and cannot be replaced")
    draft = target.with_name(target.name + UNFINISHED)
    accepted = "is in the way: left by a conversion that was killed, or one is running; remove it if none is"
    require(not os.path.lexists(draft), "DST", str(target), f"{draft} {accepted}")
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"DST={str(target)!r}: cannot be made: {error.strerror}") from error
    try:
        yield draft
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def require_space(folder: Path, num_bytes: int) -> None:
    """Raises:
    OSError: when the file system of a folder has less than this free.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        wanted, left = f"{num_bytes / 1e6:,.1f} MB to be written", f"{free / 1e6:,.1f} MB free"
        raise OSError(f"{folder}: no space left on the device: {wanted}, {left}")
