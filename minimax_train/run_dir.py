"""The folder of a run: what may be in it at the start, and what is put there before training."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch.distributed as dist

from minimax_train.checkpoint.store import CheckpointStore, find_checkpoint
from minimax_train.config import Config, flatten, read_config, save_config
from minimax_train.data import Tokenizer, load_tokenizer, prepare_tokenizer
from minimax_train.errors import ConfigError, require
from minimax_train.files import CONFIG, TOKENIZER
from minimax_train.parallel.grid import ProcessGrid

# What a resumed run may not change: the weights would not mean the same. The data loader itself refuses what its
# saved position would not survive. The RoPE base belongs to the step plan.
_FIXED, _PLANNED = ("model.", "data.tokenizer", "seed"), ("model.rope_base",)


def prepare_run_dir(config: Config, grid: ProcessGrid, store: CheckpointStore) -> Tokenizer:
    """Check the folder against ``checkpoint.resume``, write configuration and tokenizer, return the tokenizer.

    The first rank does the work; an error there is raised on every rank.

    Raises:
        ConfigError: when the folder holds another run.
    """
    folder = Path(config.run_dir)
    problem: Exception | None = None
    try:
        if grid.is_first:
            _prepare(config, folder, store)
    except Exception as error:  # raised below, once the ranks that wait have been told
        problem = error
    told = [None if problem is None else str(problem)]
    dist.broadcast_object_list(told, src=0)
    if problem is None and told[0] is not None:
        problem = ConfigError(told[0])
    if isinstance(problem, ConfigError):
        problem.on_all_ranks = True
    if problem is not None:
        raise problem
    return load_tokenizer(folder / TOKENIZER)


def _prepare(config: Config, folder: Path, store: CheckpointStore) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir!r}: must be a folder this run can write: {error}") from error
    require(os.access(folder, os.W_OK), "run_dir", config.run_dir, "must be a folder this run can write")
    saved = folder / CONFIG
    latest, weights = store.latest(), config.checkpoint.initial_weights
    if latest is not None:
        if config.checkpoint.resume == "never":
            raise ConfigError(
                f"run_dir={config.run_dir!r}: already holds {latest.name}; "
                "pass checkpoint.resume=auto to continue it, or another run_dir"
            )
        _refuse_changes(read_config(saved), config)
    else:
        # What the run is told to start from must not be what it writes over.
        apart = weights is None or Path(weights).resolve() != folder.resolve()
        apart &= Path(config.data.tokenizer).resolve() != (folder / TOKENIZER).resolve()
        require(apart, "run_dir", config.run_dir, "must be another folder than the weights' and the tokenizer's")
        # A run that never reached its first checkpoint starts over, with a tokenizer of its own.
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    tokenizer = prepare_tokenizer(config.data, config.model.vocab_size, folder / TOKENIZER)
    if latest is None and weights is not None:
        _refuse_other_tokens(config, weights, tokenizer)
    save_config(config, saved)


def _refuse_other_tokens(config: Config, weights: str, tokenizer: Tokenizer) -> None:
    """Embedding rows of initial weights mean the tokens they were trained with."""
    theirs = find_checkpoint(weights) / TOKENIZER
    if theirs.is_dir() and not tokenizer.has_ids_of(load_tokenizer(theirs)):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r}: gives other token ids than "
            f"checkpoint.initial_weights={weights!r} was trained with; pass data.tokenizer={theirs}"
        )


def _refuse_changes(before: Config, now: Config) -> None:
    old, new = flatten(before), flatten(now)
    fixed = [key for key in new if key.startswith(_FIXED) and key not in _PLANNED]
    changed = [key for key in fixed if old.get(key) != new[key]]
    if changed:
        changes = ", ".join(f"{key}={new[key]!r} (was {old.get(key)!r})" for key in changed)
        raise ConfigError(f"run_dir={now.run_dir!r}: a resumed run cannot change {changes}")
