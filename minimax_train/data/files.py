"""Which local files a data set consists of."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from functools import cache
from glob import glob
from hashlib import blake2b
from pathlib import Path

from minimax_train.data.shuffle import stable_hash
from minimax_train.errors import ConfigError

# Third-party packages are not the standard library; test folders hold files that are broken on purpose.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_HELD_OUT_ONE_IN = 20
_DIGESTED_BYTES = 1 << 16


def match_files(field: str, patterns: Sequence[str]) -> list[str]:
    """The files the patterns name, each once, in the patterns' order and sorted within a pattern.

    Raises:
        ConfigError: naming ``field``, dotted, when a pattern matches no file or a file cannot be read.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        path = os.path.abspath(os.path.expanduser(pattern))
        matches = [path] if os.path.lexists(path) else sorted(glob(path, recursive=True))
        matches = [match for match in matches if not os.path.isdir(match)]
        if not matches:
            raise ConfigError(f"{field}=[{pattern!r}]: matches no file")
        files.update(dict.fromkeys(matches))
    for file in files:
        # What the library that opens files would take for a chain of file systems.
        if "::" in file:
            raise ConfigError(f"{field}: {file!r}: a path must not contain '::'")
        if file.endswith(".lz4"):
            raise ConfigError(f"{field}: {file!r}: must be compressed as gz, bz2, xz, zst or zip, or not at all")
        if not os.access(file, os.R_OK):
            raise ConfigError(f"{field}: cannot read {file!r}: it is missing or not readable by this user")
        if not os.path.isfile(file):
            raise ConfigError(f"{field}: {file!r} must be a file on disk: it is read more than once")
    return list(files)


def digest(file: str) -> str:
    """Of a file's size, its first and its last 64 KiB; of its name where it is not on this machine."""
    if not os.path.exists(file):
        return f"{stable_hash(os.path.basename(file)):016x}"
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        found = blake2b(str(size).encode(), digest_size=8)
        found.update(opened.read(_DIGESTED_BYTES))
        opened.seek(max(_DIGESTED_BYTES, size - _DIGESTED_BYTES))
        found.update(opened.read(_DIGESTED_BYTES))
    return found.hexdigest()


def stdlib_files(field: str, held_out: bool) -> list[str]:
    """The standard library's sources, sorted by path: about one in twenty is held out, chosen by its relative path.

    Raises:
        ConfigError: when this Python comes without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [str(root / path) for path in _sources_under(root) if is_held_out(path) == held_out]
    if not files:
        raise ConfigError(f"{field}='stdlib': no Python sources under {str(root)!r}; use {field}='files'")
    return files


@cache
def _sources_under(root: Path) -> list[str]:
    """Relative paths; once, for the folder may hold as many packages as the environment has."""
    relative = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [path for path in relative if not _SKIPPED_FOLDERS.intersection(path.split("/"))]


def is_held_out(relative_path: str) -> bool:
    """Whether a standard library file belongs to the held-out part."""
    return stable_hash("held-out", relative_path) % _HELD_OUT_ONE_IN == 0
