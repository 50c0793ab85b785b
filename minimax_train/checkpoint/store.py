"""Checkpoints on disk: PyTorch Distributed Checkpoint in model space, written whole or not at all.

run_dir/checkpoints/step-00000200/
    *.distcp .metadata      parameters and optimizer state by parameter name, loadable on any number of ranks
    progress.json           step, tokens, and the position of every data stream
    config.yaml tokenizer/  what is needed to use the checkpoint on its own
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from minimax_train.errors import ConfigError, require
from minimax_train.files import CONFIG, TOKENIZER, UNFINISHED

CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens trained on.
        data: state of the data loader, all ranks' streams together.
    """

    step: int = 0
    tokens: int = 0
    data: dict[str, Any] | None = None


class CheckpointStore:
    """The checkpoints of one run. Every method but :meth:`latest` is called by all ranks together."""

    def __init__(self, run_dir: Path, keep: int, *, is_first: bool) -> None:
        self.run_dir, self.keep, self.is_first = run_dir, keep, is_first
        self.folder = run_dir / CHECKPOINTS

    def latest(self) -> Path | None:
        """The newest finished checkpoint."""
        return (_finished(self.folder) or [None])[-1]

    def save(self, progress: Progress, model: nn.Module, optimizer_state: dict) -> Path:
        """Write a checkpoint, then remove those over the number kept."""
        path = self.folder / f"step-{progress.step:08d}"
        draft = path.with_name(path.name + UNFINISHED)
        if self.is_first:
            for left in self.folder.glob(f"*{UNFINISHED}"):  # by a run that was killed while writing or removing
                shutil.rmtree(left)
            draft.mkdir(parents=True)
        dist.barrier()
        dcp.save({"model": model.state_dict(), "optimizer": optimizer_state}, checkpoint_id=draft)
        if self.is_first:
            (draft / "progress.json").write_text(json.dumps(asdict(progress)))
            shutil.copy(self.run_dir / CONFIG, draft)
            shutil.copytree(self.run_dir / TOKENIZER, draft / TOKENIZER)
            _remove(path)
            draft.rename(path)
            for old in _finished(self.folder)[: -self.keep] if self.keep else []:
                _remove(old)
        dist.barrier()
        return path

    def load(self, path: Path, model: nn.Module, optimizer_state: dict) -> Progress:
        """Fill model and optimizer state in place, whatever number of ranks wrote them."""
        dcp.load({"model": model.state_dict(), "optimizer": optimizer_state}, checkpoint_id=path)
        return Progress(**json.loads((path / "progress.json").read_text()))


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill the parameters alone from a checkpoint.

    Raises:
        ConfigError: when it lacks a parameter, or holds it in another shape.
    """
    state = model.state_dict()
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, parameter in state.items():
        size = getattr(stored.get(f"model.{name}"), "size", None)
        held = "no such parameter" if size is None else f"one of {tuple(size)}"
        require(
            size == parameter.shape,
            "checkpoint.initial_weights",
            str(path),
            f"this model's {name} is {tuple(parameter.shape)}, the checkpoint holds {held}",
        )
    dcp.load({"model": state}, checkpoint_id=path)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at a path: itself, or the newest of the run there.

    Raises:
        ConfigError: when there is none.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        return path
    newest = (_finished(path / CHECKPOINTS) or [None])[-1]
    if newest is None:
        raise ConfigError(f"{path}: neither a checkpoint (a folder with .metadata) nor a run that holds one")
    return newest


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed in between, what is left does not look like one."""
    if path.exists():
        leaving = path.with_name(f"{path.name}.old{UNFINISHED}")
        path.rename(leaving)
        shutil.rmtree(leaving)


def _finished(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=lambda p: int(_NAME.fullmatch(p.name)[1]))
