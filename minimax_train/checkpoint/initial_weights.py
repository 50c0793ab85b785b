"""Weights alone, from a checkpoint of another run: found, compared with the model, loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from minimax_train.checkpoint.manifest import DamagedCheckpoint, check_shards, readable
from minimax_train.checkpoint.reading import CheckpointFiles, tell_unchecked
from minimax_train.checkpoint.remote import Folder, at
from minimax_train.checkpoint.retention import named
from minimax_train.checkpoint.store import find_checkpoint, folder_of
from minimax_train.errors import ConfigError
from minimax_train.first_rank import on_first_rank
from minimax_train.metrics.console import note

_SHOWN = 12  # names in a message
_KEY = "checkpoint.initial_weights"


def find_weights(path: str) -> Folder:
    """The checkpoint at a path or URL, or the newest whole one of the run there; damaged ones that are passed over are
    told, and left as they are. Called by all ranks together; each reads its share of the shards.

    Raises:
        DamagedCheckpoint: of the newest, when all are damaged.
        ConfigError: when there is none, or it cannot be read; as DamagedCheckpoint on all ranks.
    """
    passed: list[DamagedCheckpoint] = []
    for checkpoint in on_first_rank(lambda: _candidates(path)):
        try:
            with readable(checkpoint):
                on_first_rank(lambda checkpoint=checkpoint: CheckpointFiles(checkpoint).read_metadata() and None)
            check_shards(checkpoint)
        except DamagedCheckpoint as error:
            passed.append(error)
            continue
        if _is_first():
            tell_unchecked(checkpoint)
            for error in passed:
                note(f"{_KEY}={path!r}: {error}; {checkpoint} is taken instead")
        return checkpoint
    raise _on_all_ranks(DamagedCheckpoint(f"{_KEY}={path!r}: {passed[0]}"))


def load_weights(
    path: Folder,
    model: dict[str, Tensor],
    *,
    strict: bool = True,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Fill parameters by name from a checkpoint; called by all ranks together.

    Args:
        strict: refuse a checkpoint that does not hold just these parameters. Otherwise those that it holds in the same
            shape are filled, the others keep their values, and both these and what is not used are told.
        shapes: of all parameters of the model, where some are on other ranks alone.

    Raises:
        ConfigError: naming the parameters that do not fit; without ``strict``, when none does.
    """
    shapes = {name: tuple(x.shape) for name, x in model.items()} if shapes is None else shapes
    files = CheckpointFiles(path)
    on_first_rank(lambda: files.read_metadata() and None)
    stored = {
        name.removeprefix("model."): tuple(getattr(entry, "size", ()))
        for name, entry in files.read_metadata().state_dict_metadata.items()
        if name.startswith("model.")
    }
    missing = [name for name in shapes if name not in stored]
    others = [name for name, shape in shapes.items() if name in stored and stored[name] != shape]
    unused = [name for name in stored if name not in shapes]
    apart = {
        "not in the checkpoint": missing,
        "of another shape there": [f"{name} {stored[name]} (here {shapes[name]})" for name in others],
        "only in the checkpoint": unused,
    }
    told = "; ".join(f"{len(names)} {what}: {_list(names)}" for what, names in apart.items() if names)
    fitting = [name for name in shapes if name not in {*missing, *others}]
    if told and (strict or not fitting):
        remedy = "checkpoint.initial_weights_strict=false loads those that fit" if fitting else "none fits"
        raise _on_all_ranks(ConfigError(f"{_KEY}={str(path)!r}: not this model's parameters: {told}; {remedy}"))
    files.load({"model": {name: model[name] for name in fitting if name in model}})
    if told and _is_first():
        note(f"{_KEY}={str(path)!r}: {len(fitting)} of {len(shapes)} parameters are loaded; {told}")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _candidates(path: str) -> list[Folder]:
    """Newest first."""
    try:
        found = find_checkpoint(path)
    except ConfigError as error:
        raise type(error)(f"{_KEY}={path!r}: {error}") from error
    with readable(at(path)):
        in_run = named(folder_of(at(path)))
    return in_run[::-1] if found in in_run else [found]


def _on_all_ranks(error: ConfigError) -> ConfigError:
    error.on_all_ranks = True
    return error


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
