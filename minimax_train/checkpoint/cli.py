"""``minimax-checkpoint ls|verify|diff``: what a run has saved, whether it is as it was saved, what two have apart."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minimax_train.checkpoint.manifest import MANIFEST, check_hashes, read_manifest
from minimax_train.checkpoint.reading import CheckpointFiles
from minimax_train.checkpoint.store import PROGRESS, CheckpointStore, find_checkpoint
from minimax_train.errors import ConfigError
from minimax_train.files import CHECKPOINTS
from minimax_train.metrics.console import to_stderr


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status 0; 1 where something is damaged or apart, or cannot be read; 2 for what is not a run
    or a checkpoint."""
    parser = argparse.ArgumentParser("minimax-checkpoint", description="Look at what a run has saved.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, paths) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        for path in paths:
            command.add_argument(path.lower(), metavar=path, type=Path, help="a run or a checkpoint")
    options = vars(parser.parse_args(arguments))
    run, paths = COMMANDS[options["command"]]
    try:
        return run(*(options[path.lower()] for path in paths))
    except ConfigError as error:
        to_stderr(f"error: {' '.join(str(error).split())}")
        return 2
    except OSError as error:
        to_stderr(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _list(path: Path) -> int:
    """list the checkpoints of a run: step, tokens, size, and what is damaged, without reading tensors"""
    print(f"{'step':>12}{'tokens':>18}{'GB':>10}  state")
    damaged = 0
    for checkpoint in _checkpoints(path):
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e9
        try:
            progress = CheckpointStore(path, keep=0).check(checkpoint)
        except ConfigError as error:
            damaged += 1
            print(f"{checkpoint.name:>12}{'':18}{size:10.2f}  {error}")
            continue
        state = "whole" if (checkpoint / MANIFEST).is_file() else f"no {MANIFEST}: saved by an earlier version"
        print(f"{progress.step:12,}{progress.tokens:18,}{size:10.2f}  {state}")
    return int(damaged > 0)


def _verify(path: Path) -> int:
    """read every file of a checkpoint, or of all of a run, and compare it with its size and hash"""
    damaged = 0
    for checkpoint in _checkpoints(path):
        manifest = read_manifest(checkpoint)
        if manifest is None:
            print(f"{checkpoint}: no {MANIFEST}: nothing to compare with")
            continue
        wrong = 0
        for name in manifest:
            try:
                check_hashes(checkpoint, manifest, [name])
            except ConfigError as error:
                wrong += 1
                print(error)
        size = sum(entry.size for entry in manifest.values()) / 1e9
        print(f"{checkpoint}: {len(manifest)} files, {size:.2f} GB: {f'{wrong} damaged' if wrong else 'whole'}")
        damaged += wrong
    return int(damaged > 0)


def _diff(first: Path, second: Path) -> int:
    """compare two checkpoints tensor by tensor: names in one alone, and the largest difference of any element"""
    files = [CheckpointFiles(find_checkpoint(path)) for path in (first, second)]
    held = [set(reader.read_metadata().state_dict_metadata) for reader in files]
    apart = len(held[0] ^ held[1])
    for path, names in ((first, held[0] - held[1]), (second, held[1] - held[0])):
        for name in sorted(names):
            print(f"{name}: only in {path}")
    for name in sorted(held[0] & held[1]):
        a, b = (_tensor(reader, name) for reader in files)
        if a.shape != b.shape:
            told = f"{tuple(a.shape)} and {tuple(b.shape)}"
        else:
            # Equal infinities and NaNs in the same places are no difference.
            same = (a == b) | (a.isnan() & b.isnan())
            if bool(same.all()):
                continue
            told = f"{float((a.double() - b.double()).where(~same, 0).abs().max()):.3g}"
        apart += 1
        print(f"{name}: {told}")
    print(f"{apart} of {len(held[0] | held[1])} tensors differ" if apart else "no tensor differs")
    return int(apart > 0)


def _tensor(files: CheckpointFiles, name: str) -> Tensor:
    stored = files.read_metadata().state_dict_metadata[name]
    if not isinstance(stored, TensorStorageMetadata):
        raise ConfigError(f"{files.path}: {name} is no tensor")
    tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
    files.load({name: tensor}, no_dist=True)
    return tensor


def _checkpoints(path: Path) -> list[Path]:
    """A checkpoint itself, or all of a run, oldest first.

    Raises:
        ConfigError: when it is neither.
    """
    if (path / PROGRESS).is_file():
        return [path]
    found = CheckpointStore(path, keep=0).all()
    if not found:
        raise ConfigError(f"{path}: neither a run with {CHECKPOINTS} in it nor a checkpoint")
    return found


COMMANDS: dict[str, tuple[Callable[..., int], tuple[str, ...]]] = {
    "ls": (_list, ("RUN",)),
    "verify": (_verify, ("PATH",)),
    "diff": (_diff, ("A", "B")),
}


if __name__ == "__main__":
    sys.exit(main())
