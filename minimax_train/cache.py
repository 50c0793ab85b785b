"""The folder of what later runs need not make again: compiled kernels and trained tokenizers."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from minimax_train.kernels.compile_cache import keep_compiled, locked
from minimax_train.kernels.dispatch import AUTO
from minimax_train.metrics.console import note


def find_cache(cache_dir: str | None, *, says: bool = True) -> Path | None:
    """The folder that ``cache_dir`` names, ready to be written; None where there is none.

    Args:
        cache_dir: of the configuration: a folder, ``auto``, or null for none.
        says: whether to tell the person watching that it cannot be used; a run goes on without.
    """
    if cache_dir is None:
        return None
    folder = _default() if cache_dir == AUTO else Path(os.path.abspath(cache_dir))
    problem = _problem(folder)
    if problem and says:
        note(f"cache_dir={cache_dir!r}: {folder} cannot be used ({problem}): kernels are compiled anew in this run")
    return None if problem else folder


def use_kernel_cache(folder: Path | None, device: torch.device) -> Path | None:
    """Have compiled kernels kept under the folder; before what compiles them is imported. Returns where they are.

    Args:
        folder: from :func:`find_cache`.
        device: of this process. Kernels of each kind of GPU have a folder of their own. On a CPU nothing is done.
    """
    if device.type != "cuda":
        return None
    if folder is not None:
        major, minor = torch.cuda.get_device_capability(device)
        kept = folder / "kernels" / f"sm{major}{minor}"
        keep_compiled(kept)
        return kept
    if not os.access(os.path.expanduser("~"), os.W_OK):
        # Triton has no other way than through files.
        scratch = tempfile.mkdtemp(prefix="minimax-train-")
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        os.environ.setdefault("TRITON_CACHE_DIR", scratch)
    return None


def _default() -> Path:
    own = os.environ.get("XDG_CACHE_HOME", "")
    # The specification: a path that is not absolute is to be ignored.
    return (Path(own) if os.path.isabs(own) else Path(os.path.expanduser("~/.cache"))) / "minimax_train"


@cache
def _problem(folder: Path) -> str:
    """Why the folder cannot be used; empty if it can. Its files must take locks."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            return ""
    except OSError as error:
        return str(error.strerror or error)
