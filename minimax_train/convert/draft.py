"""A folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minimax_train.errors import ConfigError
from minimax_train.files import UNFINISHED


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """A new folder beside the target, which takes its place at the end and is removed after an error.

    Raises:
        ConfigError: when the target is there already and not an empty folder.
    """
    target = target.absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"DST={str(target)!r}: exists already; must be a new or an empty folder")
    draft = target.with_name(target.name + UNFINISHED)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
