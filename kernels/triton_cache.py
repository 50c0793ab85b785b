"""Triton's cache on disk, with a lock per entry. Named to Triton by an environment variable (``compile_cache.py``)."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from typing import IO, TypeVar

from triton.runtime.cache import FileCacheManager

Found = TypeVar("Found")


class OncePerMachine(FileCacheManager):
    """Of the processes that miss the same kernel, or the same launcher in C, one makes it and the others wait for it.

    Triton has a manager per entry: it asks for a file or a group of files, and puts that of the same name if there was
    none. A manager that finds none holds the entry's lock until then; one that is dropped, as when the compiler raises,
    closes the file and so frees it.
    """

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        super().__init__(key, override, dump)
        self._lock: IO | None = None
        self._awaited = ""

    def get_file(self, filename: str) -> str | None:
        return self._found_or_locked(filename, lambda: super(OncePerMachine, self).get_file(filename))

    def get_group(self, filename: str) -> dict[str, str] | None:
        return self._found_or_locked(f"__grp__{filename}", lambda: super(OncePerMachine, self).get_group(filename))

    def put(self, data: bytes | str, filename: str, binary: bool = True) -> str:
        path = super().put(data, filename, binary)
        if filename == self._awaited:
            self._unlock()
        return path

    def _found_or_locked(self, filename: str, find: Callable[[], Found]) -> Found:
        found = find()
        if found or self.lock_path is None or self._lock is not None:
            return found
        self._lock, self._awaited = open(self.lock_path, "a"), filename  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        found = find()
        if found:
            self._unlock()
        return found

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
        self._lock, self._awaited = None, ""
