"""Which checkpoints stay: the newest, every n-th, the best; of a run that trains and of one that is pruned."""

import itertools
import json
import shutil

import pytest
import torch

from minimax_train.checkpoint.cli import main
from minimax_train.checkpoint.config import CheckpointConfig
from minimax_train.checkpoint.retention import Retention
from minimax_train.errors import ConfigError
from minimax_train.metrics.log import read_steps
from minimax_train.run_lock import release_lock, take_lock
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run

STEPS = [3, 6, 7, 9, 12, 15]
LOSSES = {3: 2.0, 6: 1.0, 9: 1.5, 12: 1.0, 18: 0.5}  # of 15 it is not known yet, 18 is there no longer


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        ((0, 0, 0), STEPS),
        ((1, 0, 0), [15]),
        ((2, 0, 0), [12, 15]),
        ((9, 0, 0), STEPS),
        ((1, 6, 0), [6, 12, 15]),
        ((1, 7, 0), [7, 15]),
        ((1, 0, 1), [12, 15]),  # of equal ones the later
        ((1, 0, 2), [6, 12, 15]),
        ((1, 0, 3), [6, 9, 12, 15]),
        ((1, 0, 9), [3, 6, 9, 12, 15]),
        ((2, 7, 1), [7, 12, 15]),
    ],
)
def test_which_steps_stay(retention, kept):
    assert Retention(*retention).removes(STEPS, LOSSES) == [step for step in STEPS if step not in kept]


def test_what_cannot_be_meant(tmp_path):
    for field in ("keep_every", "keep_best"):
        with pytest.raises(ConfigError, match=f"^checkpoint.{field}=3: must be 0 with checkpoint.keep=0"):
            CheckpointConfig(keep=0, **{field: 3})
    for more in ("recipe.eval_interval=0", "data.validation_files=[]"):
        with pytest.raises(ConfigError, match=r"^checkpoint.keep_best=1: must be 0 in a run without evaluation"):
            tiny_run(tmp_path, "checkpoint.keep_best=1", more)


def _train(grid, config):
    Trainer(config, grid, torch.device("cpu")).train()


def _steps(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of eleven steps on the way of which the loss on held-out text falls and rises."""
    folder = tmp_path_factory.mktemp("trained")
    more = ["recipe.steps=11", "recipe.eval_interval=2", "recipe.learning_rate=0.05", "checkpoint.interval=1"]
    more += ["checkpoint.keep_every=5", "checkpoint.keep_best=2", "checkpoint.keep=2", "recipe.decay_steps=1"]
    run_ranks(_train, 1, tiny_run(folder, *more))
    return folder / "run"


def _held_out(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}


def test_a_run_keeps_every_fifth_and_the_best(trained):
    losses = _held_out(trained)
    assert sorted(losses) == [2, 4, 6, 8, 10, 11]
    kept = {1}
    for step in range(2, 12):
        known = sorted((loss, -other) for other, loss in losses.items() if other in kept and other < step)
        best = [-other for _, other in known[:2]]
        kept = {other for other in {*kept, step} if other > step - 2 or other % 5 == 0 or other in best}
    assert _steps(trained) == sorted(kept)
    assert read_steps(trained / "metrics.jsonl", {3, 11})[11]["validation_loss"] == losses[11]


def test_prune(trained, tmp_path, capfd):
    run = shutil.copytree(trained, tmp_path / "run")
    folder, before = run / "checkpoints", _steps(trained)
    shutil.copytree(folder / "step-00000011", folder / "step-00000012.writing")
    shutil.copytree(folder / "step-00000011", folder / "step-00000009.damaged.1")
    size = sum(file.stat().st_size for file in (folder / "step-00000012.writing").rglob("*") if file.is_file())
    capfd.readouterr()

    command = ["prune", str(run), "--keep", "1", "--keep-every", "0", "--keep-best", "1", "--damaged"]
    assert main([*command, "--dry-run"]) == 0
    planned = capfd.readouterr().out
    assert len(list(folder.iterdir())) == len(before) + 2, "nothing is removed"
    take_lock(run)
    # In this process the lock would be given again.
    assert run_ranks(_prune_elsewhere, 1, command)[0] == 2
    release_lock(run)
    capfd.readouterr()
    assert main(command) == 0
    assert capfd.readouterr().out == planned.replace("would be removed", "removed").replace("would be", "are")
    losses = {step: loss for step, loss in _held_out(run).items() if step in before}
    assert _steps(run) == sorted({11, min(losses, key=lambda step: (losses[step], -step))})
    assert f"step-00000012.writing: would be removed, {size / 1e9:.2f} GB\n" in planned
    assert "step-00000009.damaged.1: would be removed" in planned and "step-00000011:" not in planned


def _prune_elsewhere(grid, command):
    return main(command)


def test_prune_keeps_the_newest_whole_one(trained, tmp_path, capfd):
    run = shutil.copytree(trained, tmp_path / "run")
    older, newest = _steps(run)[-2:]
    (run / f"checkpoints/step-{newest:08d}/progress.json").write_text("{}")
    capfd.readouterr()
    assert main(["prune", str(run), "--keep", "1", "--keep-every", "0", "--keep-best", "0"]) == 0
    assert f"the newest whole one is {run}/checkpoints/step-{older:08d}\n" in capfd.readouterr().out
    assert _steps(run) == [older, newest]


def test_prune_refuses(trained, tmp_path, capfd):
    run, before = shutil.copytree(trained, tmp_path / "run"), _steps(trained)
    for options in (["--keep", "0"], ["--keep", "0", "--keep-every", "0"]):
        assert main(["prune", str(run), *options]) == 2
        assert "has no effect with checkpoint.keep=0; give --keep\n" in capfd.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 11, "validation_loss": NaN}\n{"step": 9, "loss": 1}\nno record')
    assert main(["prune", str(run)]) == 2
    told = f"error: --keep-best=2: {run}/metrics.jsonl has no held-out loss at the step of any checkpoint\n"
    assert capfd.readouterr().err == told and _steps(run) == before
    tmp_path /= "other"
    assert main(["prune", str(tmp_path)]) == 2
    assert capfd.readouterr().err == f"error: {tmp_path}: no run with checkpoints in it\n"
    for bad, option in itertools.product(("-1", "1.5", "many"), ("--keep", "--keep-best")):
        with pytest.raises(SystemExit) as stopped:
            main(["prune", str(tmp_path), option, bad])
        assert stopped.value.code == 2 and option in capfd.readouterr().err
