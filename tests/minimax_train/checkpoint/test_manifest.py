"""Checkpoints whose files are not what was saved: all of them are found, and named."""

import hashlib
import json
import os
import random
import shutil

import pytest
import torch

from minimax_train.checkpoint.initial_weights import find_weights, load_weights
from minimax_train.checkpoint.manifest import DamagedCheckpoint, Entry, write_manifest
from minimax_train.checkpoint.reading import CheckpointFiles
from minimax_train.checkpoint.store import CheckpointStore
from minimax_train.convert.checkpoint import CheckpointReader, read_model_config
from minimax_train.convert.names import correspondence
from minimax_train.errors import ConfigError
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run

FAST = ("recipe.eval_interval=0", "recipe.warmup_steps=0", "recipe.decay_steps=0", "checkpoint.interval=1")
NEWEST, BEFORE = "step-00000002", "step-00000001"


def _train(grid, config):
    Trainer(config, grid, torch.device("cpu")).train()


def _restore(grid, config):
    try:
        return Trainer(config, grid, torch.device("cpu")).progress.step
    except ConfigError as error:
        return str(error)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps on two ranks, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    run_ranks(_train, 2, tiny_run(folder, *FAST, "recipe.steps=2"))
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


def _config(finished, run):
    more = ("recipe.steps=3", "checkpoint.resume=auto", f"run_dir={run}")
    return tiny_run(finished.parent, *FAST, *more)


def _names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _flip(file, place, bit=0):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def test_a_manifest_is_of_all_files(finished):
    for folder in (finished / "checkpoints").iterdir():
        files = json.loads((folder / "manifest.json").read_text())["files"]
        assert sorted([*files, "manifest.json"]) == _names(folder)
        assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "progress.json", "tokenizer/tokenizer.json"} < set(files)
        for name, entry in files.items():
            content = (folder / name).read_bytes()
            assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_all_has_reached_the_disk(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_text(name)
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    write_manifest(tmp_path)
    assert {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))} == synced


def test_every_corruption_is_found_and_named(run):
    """Bits flipped, files cut, grown, missing and swapped, in every kind of file."""
    choose, newest = random.Random(0), run / "checkpoints" / NEWEST
    store, whole = CheckpointStore(run), {name: (newest / name).read_bytes() for name in _names(newest)}
    shutil.rmtree(run / "checkpoints" / BEFORE)
    assert store.newest_whole() == newest
    for turn in range(300):
        kind = choose.choice(("flip", "cut", "grow", "remove", "swap"))
        name, other = sorted(whole)[turn % len(whole)], choose.choice(sorted(whole))
        if name == "manifest.json" and kind in ("grow", "remove"):
            continue  # a line more means nothing, and earlier versions wrote none
        if kind == "swap" and whole[name] == whole[other]:
            continue
        file, spoilt = newest / name, {name}
        if kind == "flip":
            _flip(file, choose.randrange(len(whole[name])), choose.randrange(8))
        elif kind == "cut":
            os.truncate(file, choose.randrange(len(whole[name])))
        elif kind == "grow":
            file.write_bytes(whole[name] + b"\n")
        elif kind == "remove":
            file.unlink()
        else:
            file.write_bytes(whole[other])
            (newest / other).write_bytes(whole[name])
            spoilt.add(other)
        with pytest.raises(DamagedCheckpoint) as caught:
            store.newest_whole()
        starts = tuple(f"{newest}/{each}: " for each in spoilt)
        if (name, kind) == (".metadata", "remove"):
            starts = f"{newest}: not a whole checkpoint: there is no .metadata in it"
        assert str(caught.value).startswith(starts), (name, kind, caught.value)
        for each in spoilt:
            (newest / each).write_bytes(whole[each])
    assert store.newest_whole() == newest


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_kept_aside(finished, run, capfd, name):
    folder = run / "checkpoints"
    (folder / f"{NEWEST}.damaged").mkdir()  # one of before
    content = (folder / NEWEST / name).read_bytes()
    _flip(folder / NEWEST / name, len(content) // 2)
    damaged = (folder / NEWEST / name).read_bytes()
    assert run_ranks(_restore, 2, _config(finished, run), timeout_s=60) == [1, 1]
    assert (folder / f"{NEWEST}.damaged.1" / name).read_bytes() == damaged
    assert sorted(path.name for path in folder.iterdir()) == [BEFORE, f"{NEWEST}.damaged", f"{NEWEST}.damaged.1"]
    err = capfd.readouterr().err
    assert err.count(f"{NEWEST}/{name}: damaged: ") == 1, err
    assert f"kept as {NEWEST}.damaged.1, and the run goes on from {folder / BEFORE}" in err


def test_nothing_is_renamed_when_all_are_damaged(finished, run):
    folder = run / "checkpoints"
    for name in (NEWEST, BEFORE):
        _flip(folder / name / "__1_0.distcp", 1000)
    expected = hashlib.sha256((finished / "checkpoints" / NEWEST / "__1_0.distcp").read_bytes()).hexdigest()
    found = hashlib.sha256((folder / NEWEST / "__1_0.distcp").read_bytes()).hexdigest()
    manifest = folder / NEWEST / "manifest.json"
    message = f"{folder / NEWEST}/__1_0.distcp: damaged: its SHA-256 is {found}, {manifest} says {expected}"
    assert run_ranks(_restore, 2, _config(finished, run), timeout_s=60) == [message] * 2
    assert sorted(path.name for path in folder.iterdir()) == [BEFORE, NEWEST]


def test_a_checkpoint_of_an_earlier_version_is_loaded(run, capfd):
    newest = run / "checkpoints" / NEWEST
    (newest / "manifest.json").unlink()
    _flip(newest / "config.yaml", 0)  # which nothing tells
    told = f"note: {newest}: has no manifest.json, so its files are not compared with what was saved\n"
    assert CheckpointStore(run).newest_whole() == newest and capfd.readouterr().err == told
    assert find_weights(str(newest)) == newest and capfd.readouterr().err == told
    (newest / "manifest.json").mkdir()
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json: damaged: not a file"):
        find_weights(str(newest))


def test_weights_alone_and_one_by_one(run):
    newest = run / "checkpoints" / NEWEST
    stored = CheckpointFiles(newest).read_metadata().state_dict_metadata
    model = {name[6:]: torch.zeros(entry.size) for name, entry in stored.items() if name.startswith("model.")}
    load_weights(newest, model)
    assert all(bool(x.any()) for x in model.values())
    for rank in (0, 1):
        shard = newest / f"__{rank}_0.distcp"
        _flip(shard, shard.stat().st_size // 2)
        with pytest.raises(DamagedCheckpoint, match=rf"{shard}: damaged: its SHA-256 is"):
            find_weights(str(newest))
        _flip(shard, shard.stat().st_size // 2)
    parameters = correspondence(read_model_config(newest / "config.yaml"), permute_rotary=False)
    reader = CheckpointReader(newest).open(parameters)
    reader.check()
    _flip(newest / "__1_0.distcp", 1000)
    with pytest.raises(ConfigError, match=r"__1_0\.distcp: damaged: its SHA-256 is"):
        reader.check()


def test_a_manifest_names_files_of_its_folder(run):
    newest = run / "checkpoints" / NEWEST
    write_manifest(newest, {"../../config.yaml": Entry(1, "")})
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json: damaged: .* does not lie in the checkpoint"):
        CheckpointFiles(newest).read_metadata()
