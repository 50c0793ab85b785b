"""``manifest.json`` of a checkpoint: size and SHA-256 of every other file in it, and files compared with them.

{"files": {"__0_0.distcp": {"size": 5120, "sha256": "9f86d0..."}, ...}, "sha256": of "files" as JSON, keys sorted}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath

import torch.distributed as dist

from minimax_train.checkpoint.remote import Folder, RemotePath, sizes_of
from minimax_train.errors import ConfigError, one_line
from minimax_train.first_rank import on_every_rank, on_first_rank

MANIFEST, SHARD = "manifest.json", ".distcp"


class DamagedCheckpoint(ConfigError):
    """A file of a checkpoint that is not as it was saved: the message names it, what was expected and what is found."""


@dataclass(frozen=True)
class Entry:
    """A file as it was saved.

    Attributes:
        size: bytes.
        sha256: hexadecimal.
    """

    size: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.size) is not int or not isinstance(self.sha256, str):
            raise TypeError("size must be a whole number, sha256 a string")


def seal(file: Path) -> Entry:
    """Have a file that was written reach the disk (fsync), and hash it.

    Raises:
        OSError: when it cannot be written or read.
    """
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        return _entry(stream)


def write_manifest(folder: Path, sealed: Mapping[str, Entry] | None = None) -> None:
    """Seal the files of a checkpoint and write their manifest; all of it has then reached the disk.

    Args:
        sealed: files that are sealed already, by name.

    Raises:
        OSError: when a file cannot be written or read.
    """
    entries = dict(sealed or {})
    paths = [path for path in folder.rglob("*") if path != folder / MANIFEST]
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if name not in entries and path.is_file():
            entries[name] = seal(path)
    files = {name: asdict(entries[name]) for name in sorted(entries)}
    (folder / MANIFEST).write_text(json.dumps({"files": files, "sha256": _hash_of(files)}, indent=1) + "\n")
    seal(folder / MANIFEST)
    for path in (*paths, folder):
        if path.is_dir():
            sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk.

    Raises:
        OSError: when they cannot be written.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Folder) -> dict[str, Entry] | None:
    """What a checkpoint's files were when it was saved, by name; None where an earlier version saved it.

    Raises:
        DamagedCheckpoint: when the manifest itself is damaged.
        OSError: when it cannot be read.
    """
    file = folder / MANIFEST
    if not file.exists() and not (isinstance(file, Path) and file.is_symlink()):
        return None
    if not file.is_file():
        raise DamagedCheckpoint(f"{file}: damaged: not a file")
    try:
        content = json.loads(file.read_bytes())
        if content["sha256"] != _hash_of(content["files"]):
            raise ValueError("its own SHA-256 is another")
        entries = {name: Entry(**entry) for name, entry in content["files"].items()}
        for name in entries:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} does not lie in the checkpoint")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file}: damaged: not a checkpoint's manifest: {one_line(error)}") from error
    return entries


@contextmanager
def readable(folder: Folder) -> Iterator[None]:
    """Inside, what cannot be read of a folder is told as such.

    Raises:
        ConfigError: for an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error}") from error


def check_sizes(folder: Folder, manifest: Mapping[str, Entry]) -> None:
    """Compare the sizes of all files.

    Raises:
        DamagedCheckpoint: naming the first that is missing or has another size.
    """
    sizes = sizes_of(folder, manifest)
    for name, entry in manifest.items():
        file, size = folder / name, sizes.get(name)
        if size is None:
            raise DamagedCheckpoint(f"{file}: missing, though {folder / MANIFEST} names it")
        if size != entry.size:
            raise DamagedCheckpoint(f"{file}: damaged: it has {size} bytes, {folder / MANIFEST} says {entry.size}")


def check_hashes(folder: Folder, manifest: Mapping[str, Entry], names: Iterable[str]) -> None:
    """Read files whole and compare them.

    Raises:
        DamagedCheckpoint: naming the first that is missing or not as it was saved.
        ConfigError: when a file cannot be read.
    """
    names = list(names)
    with readable(folder):
        check_sizes(folder, {name: manifest[name] for name in names})
    for name in names:
        file, expected = folder / name, manifest[name].sha256
        with readable(file):
            found = _hash_of_file(file)
        if found != expected:
            raise DamagedCheckpoint(f"{file}: damaged: its SHA-256 is {found}, {folder / MANIFEST} says {expected}")


def check_shards(folder: Folder) -> None:
    """Read all shards and compare them, each rank its share; called by all ranks together.

    Nothing is compared where there is no manifest.

    Raises:
        DamagedCheckpoint, ConfigError: as :func:`check_hashes`, the same on all ranks.
    """
    # One rank looks: on a network file system the others may not see the same folder yet.
    with readable(folder):
        manifest = on_first_rank(lambda: read_manifest(folder))
    if manifest is None:
        return
    shards = [name for name in manifest if name.endswith(SHARD)]
    shards.sort(key=lambda name: (-manifest[name].size, name))
    if dist.is_initialized():
        on_every_rank(lambda: check_hashes(folder, manifest, shards[dist.get_rank() :: dist.get_world_size()]))
    else:
        check_hashes(folder, manifest, shards)


def _hash_of(files: object) -> str:
    """Of what a manifest says, so that it is not taken for a file's fault when the manifest is damaged."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _hash_of_file(file: Folder) -> str:
    if isinstance(file, RemotePath):
        hashed = hashlib.sha256()
        for block in file.blocks():
            hashed.update(block)
        return hashed.hexdigest()
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _entry(stream: BufferedReader) -> Entry:
    return Entry(os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest())
