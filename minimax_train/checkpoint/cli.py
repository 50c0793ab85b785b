"""``minimax-checkpoint ls|verify|diff|prune``: what a run has saved, whether it is as it was saved, what two have
apart; and what is not to be kept removed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minimax_train.checkpoint.manifest import MANIFEST, DamagedCheckpoint, check_hashes, read_manifest, readable
from minimax_train.checkpoint.reading import METADATA, CheckpointFiles
from minimax_train.checkpoint.remote import Folder, RemotePath, at, local_copy, sizes_of
from minimax_train.checkpoint.retention import (
    Retention,
    aside,
    drafts,
    held_out_losses,
    named,
    remove,
    step_of,
    superseded,
)
from minimax_train.checkpoint.store import PROGRESS, CheckpointStore, find_checkpoint, folder_of, owner_of
from minimax_train.config import read_config
from minimax_train.errors import ConfigError, OneLineParser, require
from minimax_train.fields import Field, fields_of
from minimax_train.files import CHECKPOINTS, CONFIG, METRICS
from minimax_train.metrics.console import note, to_stderr
from minimax_train.metrics.log import read_steps
from minimax_train.run_lock import release_lock, take_lock

LOSSES = "loss", "validation_loss"
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Console script. Exit status 0; 1 where something is damaged or apart, or cannot be read; 2 for what is not a run
    or a checkpoint."""
    parser = OneLineParser("minimax-checkpoint", description="Look at what a run has saved.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, paths) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        for path in paths:
            command.add_argument(path.lower(), metavar=path, help="a run or a checkpoint, or a URL where some are")
        if run is _prune:
            for key, what in fields_of(Retention).items():
                told = f"number; by default the run's checkpoint.{key}"
                command.add_argument(f"--{key.replace('_', '-')}", type=_number(what), help=told)
            command.add_argument("--damaged", action="store_true", help="remove damaged ones that were kept aside, too")
            command.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    options = vars(parser.parse_args(arguments))
    run, paths = COMMANDS[options.pop("command")]
    given = [options.pop(path.lower()) for path in paths]
    try:
        return run(*map(at, given), **options)
    except ConfigError as error:
        to_stderr(f"error: {' '.join(str(error).split())}")
        return 2
    except OSError as error:
        to_stderr(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _list(path: Folder) -> int:
    """list the checkpoints of a run: step, tokens, size, age, losses, process grid, and what is damaged, without
    reading tensors"""
    with readable(path):
        checkpoints = named(folder_of(path))
    if not checkpoints:
        raise ConfigError(f"{path}: no run with {CHECKPOINTS} in it")
    run = _run_of(checkpoints[0].parent)
    records = read_steps(run / METRICS, {step_of(checkpoint) for checkpoint in checkpoints})
    print(f"{'step':>12}{'tokens':>18}{'GB':>10}{'age':>8}{'loss':>10}{'held-out':>10}  {'grid':<16}  state")
    damaged = 0
    for checkpoint in checkpoints:
        record, tokens = records.get(step_of(checkpoint), {}), ""
        losses = "".join(f"{record[name]:10.4f}" if name in record else f"{'-':>10}" for name in LOSSES)
        grid, state = "?", f"no {MANIFEST}: saved by an earlier version"
        try:
            tokens = f"{CheckpointStore(run).check(checkpoint).tokens:,}"
            state = "whole" if (checkpoint / MANIFEST).is_file() else state
            grid = _grid(checkpoint)
        except ConfigError as error:
            damaged, state = damaged + 1, str(error)
        told = f"{step_of(checkpoint):12,}{tokens:>18}{_size(checkpoint) / 1e9:10.2f}{_age(checkpoint):>8}"
        print(f"{told}{losses}  {grid:<16}  {state}")
    return int(damaged > 0)


def _prune(path: Folder, *, damaged: bool, dry_run: bool, **given: int | None) -> int:
    """remove checkpoints of a run that is not being trained: all but the newest, every n-th and best ones; and what was
    left half written; the newest whole one stays"""
    folder = folder_of(path)
    run = path if isinstance(path, Path) and path != folder else _run_of(folder)
    store = CheckpointStore(run, folder=folder)
    checkpoints = store.all()
    if not checkpoints:
        raise ConfigError(f"{path}: no run with {CHECKPOINTS} in it")
    if not dry_run and run.is_dir():
        take_lock(run, "RUN")
    elif not dry_run:
        note(f"{run}: not on this machine, so that nothing here keeps the run from going on meanwhile")
    try:
        saved = run / CONFIG if run.is_dir() else local_copy(checkpoints[-1] / CONFIG)
        retention = replace(
            read_config(saved).checkpoint.retention,
            **{key: value for key, value in given.items() if value is not None},
        )
        accepted = "has no effect with checkpoint.keep=0; give --keep"
        for key in ("keep_every", "keep_best"):
            value = getattr(retention, key)
            require(retention.keep > 0 or value == 0, f"--{key.replace('_', '-')}", value, accepted)
        known = not retention.keep_best or bool(held_out_losses(run, checkpoints))
        accepted = f"{run / METRICS} has no held-out loss at the step of any checkpoint"
        require(known, "--keep-best", retention.keep_best, accepted)
        print(f"keeps {_told(retention)}")
        newest, _ = store.newest_checked()
        old = [path for path in superseded(run, checkpoints, retention) if path != newest]
        freed = 0
        for path in [*drafts(folder), *old, *(aside(folder) if damaged else [])]:
            size = _size(path)
            if not dry_run:
                remove(path)
            freed += size
            print(f"{path}: {'would be removed' if dry_run else 'removed'}, {size / 1e9:.2f} GB")
        print(f"{freed / 1e9:.2f} GB {'would be' if dry_run else 'are'} free again; the newest whole one is {newest}")
    finally:
        release_lock(run)
    return 0


def _told(retention: Retention) -> str:
    if retention.keep == 0:
        return "all checkpoints (keep=0)"
    reasons = [
        f"the {retention.keep} newest",
        f"those of every {retention.keep_every} steps" if retention.keep_every else "",
        f"the {retention.keep_best} of the least held-out loss" if retention.keep_best else "",
    ]
    return ", ".join(filter(None, reasons))


def _number(what: Field) -> Callable[[str], int]:
    """Reads an option for a field."""

    def number(text: str) -> int:
        assert what.range is not None
        if not text.isdecimal() or int(text) > what.range.greatest:
            raise argparse.ArgumentTypeError(f"{text!r}: {what.range}")
        return int(text)

    return number


def _run_of(folder: Folder) -> Path:
    """The ``run_dir`` of a folder of checkpoints; it may be on another machine."""
    return Path(owner_of(folder) or "unknown run")


def _size(folder: Folder) -> int:
    """Bytes of a checkpoint's files."""
    return sum(sizes_of(folder).values())


def _age(checkpoint: Folder) -> str:
    """Since it was saved, in the largest unit of which it is two or more."""
    if isinstance(checkpoint, RemotePath):
        saved = (checkpoint / MANIFEST).modified()
    else:
        saved = max(file.stat().st_mtime for file in (checkpoint, *checkpoint.glob(PROGRESS)))
    seconds = time.time() - saved
    unit, name = next(((unit, name) for unit, name in _UNITS if seconds >= 2 * unit), _UNITS[-1])
    return f"{max(0, seconds) / unit:.0f} {name}"


def _grid(checkpoint: Folder) -> str:
    """Sizes of the grid's axes that are not 1."""
    sizes = read_config(local_copy(checkpoint / CONFIG)).parallel.sizes
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "-"


def _verify(path: Folder) -> int:
    """read every file of a checkpoint, or of all of a run, and compare it with its size and hash"""
    damaged = 0
    for checkpoint in _checkpoints(path):
        try:
            manifest = read_manifest(checkpoint)
        except DamagedCheckpoint as error:
            print(error)
            damaged += 1
            continue
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


def _diff(first: Folder, second: Folder) -> int:
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


def _checkpoints(path: Folder) -> list[Folder]:
    """A checkpoint itself, or all of a run, oldest first.

    Raises:
        ConfigError: when it is neither.
    """
    with readable(path):
        if any((path / name).exists() for name in (MANIFEST, METADATA, PROGRESS)):
            return [path]
        found = named(folder_of(path))
    if not found:
        raise ConfigError(f"{path}: neither a run with {CHECKPOINTS} in it nor a checkpoint")
    return found


COMMANDS: dict[str, tuple[Callable[..., int], tuple[str, ...]]] = {
    "ls": (_list, ("RUN",)),
    "verify": (_verify, ("PATH",)),
    "diff": (_diff, ("A", "B")),
    "prune": (_prune, ("RUN",)),
}


if __name__ == "__main__":
    sys.exit(main())
