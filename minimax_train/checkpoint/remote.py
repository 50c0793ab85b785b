"""Checkpoints in object stores, through fsspec: as much of pathlib as they need, for files that are written once.

Every call asks the store, with no cache of listings, and what it cannot answer is an error: universal_pathlib's
``is_file`` says no while there is no network, and a run that asks for its newest checkpoint would start over.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, cast

from minimax_train.errors import ConfigError, one_line

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)")
MEMORY = "memory://"
_PART = 16 * 2**20
"""Bytes of a request, of which several are under way at once."""
_AT_ONCE = 8 * _PART
_UPLOAD_PART = 32 * 2**20  # S3 takes 10,000 of them


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder of an object store, with the methods of :class:`pathlib.Path` that have the same name here.

    Their errors are FileNotFoundError, and OSError for all else that a store or its library has to say.

    Attributes:
        protocol: ``s3`` of ``s3://bucket/key``.
        path: the rest.
    """

    protocol: str
    path: PurePosixPath

    def __str__(self) -> str:
        return f"{self.protocol}://{self.path}"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.protocol, self.path / name)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.protocol, self.path.parent)

    def with_name(self, name: str) -> RemotePath:
        return RemotePath(self.protocol, self.path.with_name(name))

    def exists(self) -> bool:
        return bool(self._info())

    def is_file(self) -> bool:
        return self._info().get("type") == "file"

    def is_dir(self) -> bool:
        return self._info().get("type") == "directory"

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in self._entries())

    def sizes(self) -> dict[str, int]:
        """Bytes of every file in the folder, by its path there."""
        found = {}
        for name, entry in self._entries().items():
            if entry["type"] == "directory":
                found |= {f"{name}/{inner}": size for inner, size in (self / name).sizes().items()}
            else:
                found[name] = entry["size"]
        return found

    def modified(self) -> float:
        """When a file was written, in seconds since the epoch."""
        return self._ask("modified").timestamp()

    def read_bytes(self) -> bytes:
        return self._ask("cat_file")

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of a file, several requests at once.

        Args:
            ranges: start and length of each, in bytes.
        """
        cuts = [
            [(low, min(low + _PART, start + length)) for low in range(start, start + length, _PART)]
            for start, length in ranges
        ]
        lows, highs = [low for cut in cuts for low, _ in cut], [high for cut in cuts for _, high in cut]
        read = iter(self._ask("cat_ranges", lows, highs, paths=len(lows), on_error="raise"))
        parts = [[next(read) for _ in cut] for cut in cuts]
        return [part[0] if len(part) == 1 else b"".join(part) for part in parts]

    def blocks(self) -> Iterator[bytes]:
        """A file from its beginning to its end."""
        info = self._info()
        if not info:
            raise FileNotFoundError(f"{self}: there is no such file")
        for start in range(0, info["size"], _AT_ONCE):
            yield self.read_ranges([(start, min(_AT_ONCE, info["size"] - start))])[0]

    def write_bytes(self, data: bytes) -> None:
        self._ask("pipe_file", data)

    def upload(self, file: Path) -> None:
        """Make it a copy of a local file."""
        self._ask("put_file", before=str(file))

    @contextmanager
    def writing(self) -> Iterator[HashedStream]:
        """A stream whose parts are uploaded as they are written. The file is there, whole, when all are."""
        stream = self._ask("open", "wb", block_size=_UPLOAD_PART)
        try:
            yield HashedStream(stream)
            stream.close()
        except BaseException as error:
            with suppress(Exception):
                stream.closed = True  # or it would be completed, at the latest when it is collected
            with suppress(Exception):
                stream.discard()
            raise self._error(error) if isinstance(error, Exception) else error from error

    def rename(self, target: RemotePath) -> None:
        """Of a folder: the store copies its files, within itself, and removes them."""
        for name in self.sizes():
            (self / name)._ask("cp_file", str(target / name))
        self.rmtree()

    def unlink(self) -> None:
        self._ask("rm_file")

    def rmtree(self) -> None:
        """Remove what is there, if anything is."""
        with suppress(FileNotFoundError):
            self._ask("rm", recursive=True)

    def _info(self) -> dict[str, Any]:
        try:
            return self._ask("info")
        except FileNotFoundError:
            return {}

    def _entries(self) -> dict[str, dict[str, Any]]:
        """What is in a folder, by name; nothing where there is none."""
        try:
            listed = self._ask("ls", detail=True)
        except FileNotFoundError:
            return {}
        entries = {entry["name"].strip("/"): entry for entry in listed}
        # Some stores keep an empty object for a folder.
        return {PurePosixPath(name).name: entries[name] for name in sorted(entries) if name != str(self.path)}

    def _ask(self, what: str, *arguments: Any, paths: int | None = None, before: str = "", **options: Any) -> Any:
        """Call a method of fsspec's file system with this path."""
        first: list[Any] = [before] if before else []
        path: Any = str(self) if paths is None else [str(self)] * paths
        try:
            return getattr(_file_system(self.protocol, os.getpid()), what)(*first, path, *arguments, **options)
        except Exception as error:  # each store's library has its own
            raise self._error(error) from error

    def _error(self, error: Exception) -> OSError:
        """Of a store: its kind of OSError, which names the file and tells the cause in a line."""
        cause = " ".join(str(error.strerror or error).split()) if isinstance(error, OSError) else one_line(error)
        told = cause if str(self) in cause else f"{self}: {cause or type(error).__name__}"
        made = FileNotFoundError(told) if isinstance(error, FileNotFoundError) else OSError(told)
        made.strerror = told
        return made


class HashedStream:
    """A stream that knows what was written to it.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._hash, self.size = stream, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """In parts, of which an upload keeps one at a time."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _UPLOAD_PART):
            part = view[start : start + _UPLOAD_PART]
            self._hash.update(part)
            self._stream.write(part)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """What is not a whole part waits for the next write."""

    @property
    def sha256(self) -> str:
        """Hexadecimal, of what was written so far."""
        return self._hash.hexdigest()


Folder = Path | RemotePath


def at(place: str | Folder) -> Folder:
    """A local path, or a place in an object store, whose protocol's library is loaded.

    Raises:
        ConfigError: for a URL that names no place, a protocol that fsspec does not know, or one whose library is not
            installed.
    """
    url = _URL.fullmatch(place) if isinstance(place, str) else None
    if url is None:
        return cast(Folder, Path(place) if isinstance(place, str) else place)
    import fsspec

    protocol, rest = url.groups()
    parts = PurePosixPath(rest.strip("/"))
    if not parts.parts or ".." in parts.parts:
        raise ConfigError(f"{place}: must name a place in a store, as s3://bucket/runs/a does")
    if protocol in ("file", "local"):
        return Path("/", parts)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        library = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
        told = f"pip install {library[protocol]}" if protocol in library else one_line(error)
        raise ConfigError(f"{place}: {protocol}:// needs a library that is not installed: {told}") from error
    except ValueError as error:
        raise ConfigError(f"{place}: {protocol}:// is no protocol that fsspec knows") from error
    return RemotePath(protocol, parts)


def sizes_of(folder: Folder, names: Iterable[str] | None = None) -> dict[str, int]:
    """Bytes of the files in a folder by name, of those that are there.

    Args:
        names: those that are looked for; all by default. A store lists them all in any case.
    """
    if isinstance(folder, RemotePath):
        return folder.sizes()
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def cannot_be_read(file: Folder, error: Exception) -> str:
    """What it means that reading a shard raised an error: it is damaged, unless its store does not answer."""
    damaged = not (isinstance(file, RemotePath) and isinstance(error, OSError))
    return f"{'damaged: ' if damaged else ''}it cannot be read: {one_line(error)}"


def local_copy(place: Folder, without: str | None = None) -> Path:
    """The place, or of one in an object store a copy as it is now, which goes with this process.

    Args:
        without: ends the names of files of a folder that are not copied.
    """
    if isinstance(place, Path):
        return place
    target = Path(_scratch().name, place.protocol, place.path)
    shutil.rmtree(target, ignore_errors=True)
    copies = {place: target} if place.is_file() else {place / name: target / name for name in place.sizes()}
    for source, copy in copies.items():
        if without is None or not source.name.endswith(without):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    return target


@lru_cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="minimax-")


@lru_cache
def _file_system(protocol: str, process: int) -> Any:
    """One for all threads of a process; a process that was forked needs its own."""
    import fsspec

    return fsspec.filesystem(protocol, use_listings_cache=False)
