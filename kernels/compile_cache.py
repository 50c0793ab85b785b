"""Compiled kernels on disk: those of all libraries under one folder, each compiled once per machine.

* Triton and Gluon keep theirs by a hash of source, compiler, target and options. :class:`OncePerMachine
  <minimax_train.kernels.triton_cache.OncePerMachine>` adds a lock per kernel.
* quack-kernels keeps an object file per kernel, by its arguments and a hash of quack's own sources, and compiles under
  a lock per kernel.
* FlashAttention-4 does the same when it is told to, but locks only while it reads or writes: :func:`one_at_a_time`.
  Not all its keys name the architecture, so the folder should be of one kind of GPU.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

# What compiles the kernels of a GPU, the longest to import first.
_MODULES = (
    "minimax_train.kernels.experts.quack",
    "flash_attn.cute.interface",
    "minimax_train.kernels.lightning.hopper_kernels",
    "minimax_train.kernels.lightning.triton",
)
_FLASH4 = "FLASH_ATTENTION_CUTE_DSL_CACHE"
NO_COMPILE = "TORCHDYNAMO_DISABLE"
_used: set[tuple] = set()


def keep_compiled(folder: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have the libraries keep compiled kernels under ``folder`` and find them there; before any of them is imported.

    Variables by which a library has been told otherwise stay as they are.
    """
    for name, value in {
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "TRITON_CACHE_MANAGER": "minimax_train.kernels.triton_cache:OncePerMachine",
        "QUACK_CACHE_DIR": f"{folder}/quack",
        f"{_FLASH4}_ENABLED": "1",
        f"{_FLASH4}_DIR": f"{folder}/flash_attn",
    }.items():
        environ.setdefault(name, value)


def import_compilers() -> None:
    """Import what the first kernels would import, which takes seconds: while the process waits for its data anyway.

    Not in a thread: two threads that import what imports each other wait for each other for ever. What cannot be
    imported is nobody's concern yet: its kernel says why, if it is asked for.

    quack wraps quantizers, which nothing here calls, in ``torch.compile`` when it is imported. That alone imports
    Inductor, which takes nearly as long as torch itself; disabled, ``torch.compile`` returns the function as it is.
    """
    before = os.environ.get(NO_COMPILE)
    os.environ[NO_COMPILE] = "1"
    try:
        for name in _MODULES:
            with suppress(Exception):
                importlib.import_module(name)
    finally:
        if before is None:
            del os.environ[NO_COMPILE]
        else:
            os.environ[NO_COMPILE] = before


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process holds the file; it is made if it is not there."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # freed when the file is closed, however the process ends
        yield


@contextmanager
def one_at_a_time(*kernel: object) -> Iterator[None]:
    """Inside, a process calls a kernel of FlashAttention-4, and none beside it does so for the first time: the first
    compiles it and the others find it on disk.

    Args:
        kernel: what tells it from others.
    """
    if kernel in _used or os.environ.get(f"{_FLASH4}_ENABLED") != "1" or f"{_FLASH4}_DIR" not in os.environ:
        yield
        return
    folder = Path(os.environ[f"{_FLASH4}_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"{hashlib.sha256(repr(kernel).encode()).hexdigest()[:32]}.compiling"):
        yield
    _used.add(kernel)
