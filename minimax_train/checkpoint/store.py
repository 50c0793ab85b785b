"""Checkpoints on disk: PyTorch Distributed Checkpoint in model space, written whole or not at all.

run_dir/checkpoints/step-00000200/
    *.distcp .metadata      parameters and optimizer state by parameter name, loadable on any number of ranks
    progress.json           step, tokens, the position of every data stream, what the recipe has learned
    config.yaml tokenizer/  what is needed to use the checkpoint on its own; sizes and RoPE base as of its step
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from minimax_train.errors import ConfigError, require
from minimax_train.files import CONFIG, TOKENIZER, UNFINISHED
from minimax_train.recipe import Progress

CHECKPOINTS = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """The checkpoints of one run. Every method but :meth:`latest` is called by all ranks together."""

    def __init__(self, run_dir: Path, keep: int, *, is_first: bool) -> None:
        self.run_dir, self.keep, self.is_first = run_dir, keep, is_first
        self.folder = run_dir / CHECKPOINTS

    def latest(self) -> Path | None:
        """The newest finished checkpoint."""
        return (_finished(self.folder) or [None])[-1]

    def save(self, progress: Progress, state: dict[str, Any], config: str) -> Path:
        """Write a checkpoint, then remove those over the number kept.

        Args:
            state: from :meth:`minimax_train.engines.Engine.snapshot`.
            config: YAML of the configuration at this step.
        """
        path = self.folder / f"step-{progress.step:08d}"
        draft = path.with_name(path.name + UNFINISHED)
        if self.is_first:
            for left in self.folder.glob(f"*{UNFINISHED}"):  # by a run that was killed while writing or removing
                shutil.rmtree(left)
            draft.mkdir(parents=True)
        dist.barrier()
        dcp.save(state, checkpoint_id=draft)
        if self.is_first:
            (draft / "progress.json").write_text(json.dumps(asdict(progress)))
            (draft / CONFIG).write_text(config)
            shutil.copytree(self.run_dir / TOKENIZER, draft / TOKENIZER)
            _remove(path)
            draft.rename(path)
            for old in _finished(self.folder)[: -self.keep] if self.keep else []:
                _remove(old)
        dist.barrier()
        return path

    def load(self, path: Path, state: dict[str, Any]) -> Progress:
        """Fill an engine's snapshot in place, whatever number of ranks wrote the checkpoint."""
        dcp.load(state, checkpoint_id=path)
        return Progress(**json.loads((path / "progress.json").read_text()))


def load_weights(path: Path, model: dict[str, Tensor]) -> None:
    """Fill parameters alone, by name, from a checkpoint.

    Raises:
        ConfigError: when it lacks a parameter, or holds it in another shape.
    """
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, parameter in model.items():
        size = getattr(stored.get(f"model.{name}"), "size", None)
        held = "no such parameter" if size is None else f"one of {tuple(size)}"
        accepted = f"this model's {name} is {tuple(parameter.shape)}, the checkpoint holds {held}"
        require(size == parameter.shape, "checkpoint.initial_weights", str(path), accepted)
    dcp.load({"model": model}, checkpoint_id=path)


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
    return sorted((p for p in found if _NAME.fullmatch(p.name)), key=lambda p: int(p.name.partition("-")[2]))
