"""One run at a time in a run's folder: a lock that the system holds for the process, and frees when it ends.

The lock is a POSIX record lock (``fcntl.lockf``) on ``run_dir/run.lock``, held by the first rank of the job:

* The system frees it however the process ends, SIGKILL included. The file stays, and means nothing by itself.
* Child processes do not inherit it, unlike a ``flock``, which lives until the last process that inherited the open file
  has ended: a saver or a data worker that outlives its run does not keep the folder.
* NFS takes it to the server, so that it holds between machines.

Two surprises of POSIX locks: a process that already holds one is given it again, and closing *any* descriptor of the
file frees it. So a process opens the file once, and :data:`_held` knows of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from minimax_train.errors import ConfigError
from minimax_train.files import LOCK
from minimax_train.metrics.console import note

_HEADER = "minimax-train"
# A run that was just killed may still be on its way out.
_PATIENCE_S = 3.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# Descriptors by process, for a fork holds nothing, and file.
_held: dict[tuple[int, Path], int] = {}


def is_marked(folder: Path) -> bool:
    """Whether a run has been in the folder: it writes the file that it locks before anything else."""
    path = _path(folder)
    if (os.getpid(), path) in _held:
        return True
    # Empty: of a run that was killed as soon as it had made the file.
    return path.is_file() and path.read_bytes()[: len(_HEADER)] in (_HEADER.encode(), b"")


def take_lock(folder: Path, key: str = "run_dir") -> None:
    """Hold the folder until :func:`release_lock` or the end of the process.

    Where the file system knows no locks, the run goes on without, and says so.

    Args:
        key: what names the folder, for messages.

    Raises:
        ConfigError: when another process holds it, naming that process.
        OSError: when the file cannot be written.
    """
    holding = (os.getpid(), _path(folder))
    if holding in _held:
        return
    descriptor = os.open(holding[1], os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _locked(descriptor):
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            said = ", ".join(holder.split("\n")[1:]).strip(", ") or "holder unknown"
            raise ConfigError(
                f"{key}={str(folder)!r}: another run is at work in it ({said}); "
                f"wait for it or end it, or pass another {key}"
            )
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.ftruncate(descriptor, 0)
        os.pwrite(
            descriptor, f"{_HEADER}\nhost {socket.gethostname()}\nprocess {os.getpid()}\nsince {since}\n".encode(), 0
        )
    except BaseException:
        os.close(descriptor)
        raise
    _held[holding] = descriptor


def release_lock(folder: Path) -> None:
    """Let the folder go, if this process holds it."""
    descriptor = _held.pop((os.getpid(), _path(folder)), None)
    if descriptor is not None:
        os.close(descriptor)


def _path(folder: Path) -> Path:
    return folder.resolve() / LOCK


def _locked(descriptor: int) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                note(f"run_dir is on a file system without locks ({error}): nothing keeps a second run out of it")
                return True
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
