"""The folder of a run: what may be in it at the start, and what is put there before training."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minimax_train.cache import find_cache
from minimax_train.checkpoint.initial_weights import find_weights
from minimax_train.checkpoint.reading import METADATA
from minimax_train.checkpoint.remote import Folder, local_copy
from minimax_train.checkpoint.store import PROGRESS, CheckpointStore, folder_of
from minimax_train.config import Config, config_on, flatten, read_config, save_config
from minimax_train.data import Tokenizer, load_tokenizer, prepare_tokenizer
from minimax_train.errors import ConfigError, require
from minimax_train.files import (
    CHECKPOINTS,
    CONFIG,
    EVENTS,
    LOCK,
    METRICS,
    PICTURE,
    TENSORBOARD,
    TOKENIZER,
    TRACES,
    UNFINISHED,
    WANDB_ID,
)
from minimax_train.first_rank import on_first_rank
from minimax_train.metrics.console import note
from minimax_train.metrics.log import read_records
from minimax_train.recipe import Progress, Recipe
from minimax_train.run_lock import is_marked, take_lock

# What a resumed run may not change: the weights would not mean the same. The data loader itself refuses what its
# saved position would not survive. The RoPE base belongs to the step plan.
_FIXED, _PLANNED = ("model.", "data.tokenizer", "seed"), ("model.rope_base",)
# What a run writes, and how it is called while it is written.
_FILES = (LOCK, CONFIG, TOKENIZER, CHECKPOINTS, METRICS, EVENTS, PICTURE, WANDB_ID, TENSORBOARD, TRACES)
_DRAFTS = tuple(name + UNFINISHED for name in (CONFIG, TOKENIZER, METRICS, WANDB_ID))


def prepare_run_dir(config: Config, store: CheckpointStore) -> tuple[Tokenizer, Folder | None, Folder | None]:
    """Take the folder for this run alone, check it, write configuration and tokenizer; called by all ranks.

    Returns:
        The tokenizer; the checkpoint to resume from, which is the newest whole one; without one, that whose weights
        the run starts from.

    Raises:
        ConfigError: on all ranks, when the folder is in use, holds what no run wrote, another run, or a damaged one.
    """
    folder = Path(config.run_dir)
    on_first_rank(lambda: _take(config, folder, store))
    checkpoint, weights = store.newest_whole(), None
    if checkpoint is None and config.checkpoint.initial_weights is not None:
        weights = find_weights(config.checkpoint.initial_weights)
    on_first_rank(lambda: _prepare(config, folder, checkpoint, weights, store))
    return load_tokenizer(folder / TOKENIZER), checkpoint, weights


def on_grid_of_stage(config: Config, world_size: int) -> Config:
    """The configuration with the process grid of the stage in which the run begins, or goes on after its newest
    checkpoint.

    Raises:
        ConfigError: when the folder cannot be searched or the checkpoint is damaged, when it is not known whether the
            stage has ended, or that grid cannot be laid out on so many processes.
    """
    store = CheckpointStore(Path(config.run_dir), folder=config.checkpoint.folder)
    recipe, progress = Recipe(config), Progress()
    checkpoint = None
    if config.checkpoint.resume == "auto":
        with _usable(config):
            checkpoint = store.latest()
    if checkpoint is not None:
        checkpoint, progress = store.newest_checked()
        recipe.check_resumed(progress, str(checkpoint))
        stage = recipe.stage(progress.policy)
        accepted = (
            f"{checkpoint} does not say how many tokens an epoch is, so it is not known whether the stage has ended "
            f"and which grid comes next; give {stage.path}.tokens or {stage.path}.steps"
        )
        known = stage.epochs is None or "epoch_tokens" in progress.policy or stage is recipe.stages[-1]
        require(known, f"{stage.path}.epochs", stage.epochs, accepted)
    state = recipe.enter(progress, progress.policy)
    config = config_on(config, recipe.grid(state))
    try:
        config.check_world_size(world_size)
    except ConfigError as error:
        begun = f" (stage {state['stage']}, {config.parallel.shown})"
        raise ConfigError(f"{error}{begun}") from error
    return config


@contextmanager
def _usable(config: Config) -> Iterator[None]:
    """Errors of the operating system inside are about the run's folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir!r}: must be a folder this run can write: {error}") from error


def _take(config: Config, folder: Path, store: CheckpointStore) -> None:
    """Make sure that the folder is, or may become, that of this run alone."""
    with _usable(config):
        _refuse_place(config, folder.resolve())
        accepted = "must be a folder this run can write, not a file"
        require(folder.is_dir() or not folder.exists(), "run_dir", config.run_dir, accepted)
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(config, folder, store)
        take_lock(folder)
        store.claim()
        checkpoint = store.latest()
    if checkpoint is not None and config.checkpoint.resume == "never":
        where = f"run_dir={config.run_dir!r}"
        if config.checkpoint.folder is not None:
            where = f"checkpoint.folder={config.checkpoint.folder!r}"
        raise ConfigError(
            f"{where}: already holds {checkpoint.name}; pass checkpoint.resume=auto to continue it, or another run_dir"
        )
    if checkpoint is None:
        with _usable(config):
            _refuse_moved(folder, store)


def _refuse_moved(folder: Path, store: CheckpointStore) -> None:
    """Refuse to start over where the run's checkpoints were elsewhere before."""
    for before in (folder_of(folder), folder / CHECKPOINTS):
        left = None if before == store.folder else CheckpointStore(folder, folder=before).latest()
        if left is not None:
            accepted = f"holds no checkpoint, but {left} is of this run: pass checkpoint.folder={before}, or copy it"
            require(False, "checkpoint.folder", str(store.folder), accepted)


def _prepare(
    config: Config, folder: Path, checkpoint: Folder | None, weights: Folder | None, store: CheckpointStore
) -> None:
    try:
        if checkpoint is None:
            _start(config, folder, weights)
        else:
            _resume(config, folder, checkpoint, store)
        save_config(config, folder / CONFIG)
    except OSError as error:
        raise ConfigError(f"run_dir={config.run_dir!r}: cannot be made ready: {error}") from error


def _refuse_place(config: Config, folder: Path) -> None:
    """Refuse the root, other people's models, and what runs themselves remove or rewrite."""
    key, value = "run_dir", config.run_dir
    require(folder != folder.parent, key, value, "must be a folder of its own, not the root of the file system")
    model = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    require(not model, key, value, "must be a folder of its own, not a Hugging Face model")
    for place in (folder, *folder.parents):
        checkpoint = any(os.path.isfile(place / name) for name in (METADATA, PROGRESS))
        accepted = f"must not lie in the checkpoint {place}; pass checkpoint.initial_weights to start from its weights"
        require(not checkpoint, key, value, accepted)
        run = is_marked(place.parent) or os.path.isfile(place.parent / METRICS)
        of_a_run = place.name in (CHECKPOINTS, TOKENIZER) and run
        require(not of_a_run, key, value, f"must not lie in {place}, which belongs to the run {place.parent}")


def _refuse_foreign(config: Config, folder: Path, store: CheckpointStore) -> None:
    """A folder is a run's if a run has left its mark there, or a checkpoint; any other must not hold what a run writes.

    Runs of earlier versions left no mark.
    """
    newest = store.latest()
    if is_marked(folder) or (newest is not None and (newest / PROGRESS).is_file()):
        return
    taken = [name for name in (*_FILES, *_DRAFTS) if os.path.lexists(folder / name) and not _is_empty(folder / name)]
    if taken:
        raise ConfigError(
            f"run_dir={config.run_dir!r}: holds {', '.join(taken)}, which no run wrote there and this one would "
            "overwrite; pass another run_dir"
        )


def _is_empty(path: Path) -> bool:
    """Whether it is a folder that can be taken. Checkpoints may be a link to a larger disk."""
    return path.is_dir() and not any(path.iterdir()) and (path.name == CHECKPOINTS or not path.is_symlink())


def _start(config: Config, folder: Path, weights: Folder | None) -> None:
    """Make the tokenizer of a new run. What an earlier one left that has no checkpoint is kept under other names."""
    draft = folder / (TOKENIZER + UNFINISHED)
    shutil.rmtree(draft, ignore_errors=True)
    try:
        tokenizer = _prepare_tokenizer(config, draft)
        if weights is not None:
            _refuse_other_tokens(config, weights, tokenizer)
        _set_aside(folder, draft)
        if not _same_files(folder / TOKENIZER, draft):
            draft.rename(folder / TOKENIZER)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _prepare_tokenizer(config: Config, draft: Path) -> Tokenizer:
    try:
        return prepare_tokenizer(config.data, config.model.vocab_size, draft, find_cache(config.cache_dir))
    except Exception as error:
        if type(error) is Exception:  # tokenizers knows no other: a disk that is full
            raise OSError(str(error)) from error
        raise


def _set_aside(folder: Path, tokenizer: Path) -> None:
    """Rename what a run without a checkpoint left, as far as it trained or is not what this one writes again."""
    left = []
    trained = _size(folder / METRICS) > 0
    if trained or not _is_config(folder / CONFIG):
        left.append(CONFIG)
    if trained:
        left += [METRICS, EVENTS, PICTURE, WANDB_ID, TENSORBOARD, TRACES]
    if not _same_files(folder / TOKENIZER, tokenizer):
        left.append(TOKENIZER)
    left = [name for name in left if os.path.lexists(folder / name) and not _is_empty(folder / name)]
    number = 1
    while any(os.path.lexists(folder / f"{name}.{number}") for name in left):
        number += 1
    for name in left:
        (folder / name).rename(folder / f"{name}.{number}")
    if left:
        kept = ", ".join(f"{name}.{number}" for name in left)
        note(f"{folder}: holds no checkpoint, so the run starts over; what an earlier one left is kept as {kept}")


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _is_config(file: Path) -> bool:
    try:
        read_config(file)
    except ConfigError:
        return False
    return True


def _same_files(a: Path, b: Path) -> bool:
    if not a.is_dir() or sorted(os.listdir(a)) != (names := sorted(os.listdir(b))):
        return False
    _, differing, unread = filecmp.cmpfiles(a, b, names, shallow=False)
    return not differing and not unread


def _resume(config: Config, folder: Path, checkpoint: Folder, store: CheckpointStore) -> None:
    """Compare a run with its newest checkpoint, before anything is written."""
    Recipe(config).check_resumed(store.check(checkpoint), str(checkpoint))
    _refuse_changes(read_config(local_copy(checkpoint / CONFIG)), config)
    if os.path.lexists(folder / CONFIG):
        read_config(folder / CONFIG)  # which is written anew: not if it is something else
    read_records(folder / METRICS)  # likewise
    own, theirs = folder / TOKENIZER, local_copy(checkpoint / TOKENIZER)
    if not own.exists():
        draft = own.with_name(own.name + UNFINISHED)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(theirs, draft)
        draft.rename(own)
    same_ids = load_tokenizer(own).has_ids_of(load_tokenizer(theirs))
    if not same_ids or _tokenizer_json(own) != _tokenizer_json(theirs):
        how = "splits text otherwise" if same_ids else "gives other token ids"
        raise ConfigError(
            f"{own}: not the tokenizer that {checkpoint} was trained with: it {how}; "
            f"move it away to continue with {checkpoint / TOKENIZER}"
        )


def _tokenizer_json(folder: Path) -> object:
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def _refuse_other_tokens(config: Config, weights: Folder, tokenizer: Tokenizer) -> None:
    """Embedding rows of initial weights mean the tokens they were trained with. Of another number, they are not
    loaded."""
    theirs, given = weights / TOKENIZER, config.checkpoint
    saved = local_copy(weights / CONFIG)
    partial = not given.initial_weights_strict and saved.is_file()
    if partial and read_config(saved).model.vocab_size != config.model.vocab_size:
        return
    if theirs.is_dir() and not tokenizer.has_ids_of(load_tokenizer(local_copy(theirs))):
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r}: gives other token ids than "
            f"checkpoint.initial_weights={given.initial_weights!r} was trained with; pass data.tokenizer={theirs}"
        )


def _refuse_changes(before: Config, now: Config) -> None:
    old, new = flatten(before), flatten(now)
    fixed = [key for key in new if key.startswith(_FIXED) and key not in _PLANNED]
    changed = [key for key in fixed if old.get(key) != new[key]]
    if changed:
        changes = ", ".join(f"{key}={new[key]!r} (was {old.get(key)!r})" for key in changed)
        raise ConfigError(f"run_dir={now.run_dir!r}: a resumed run cannot change {changes}")
