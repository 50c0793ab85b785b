"""A run that was stopped and continued is, bit for bit, the run that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minimax_train.checkpoint.store import CheckpointStore
from minimax_train.errors import ConfigError
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import DIVISIBLE, overrides, tiny_run, weights_of

LOSSES = ("loss", "aux_loss", "grad_norm", "learning_rate", "tokens", "validation_loss")


def _train(grid, config, stop_after=None):
    trainer = Trainer(config, grid, torch.device("cpu"))
    if stop_after is None:
        trainer.train()
    else:
        for _ in range(stop_after - trainer.progress.step):
            trainer.train_step()
        trainer.evaluate(trainer.plan())
        trainer.save(trainer.plan())
    trainer.log.close()
    trainer.loader.close()
    return weights_of(trainer)


def _losses(folder):
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in ("step", *LOSSES) if key in record} for record in records]


@pytest.mark.parametrize("world_size", [1, 2])
def test_stopping_twice_changes_nothing(tmp_path, world_size):
    more = ("checkpoint.interval=100", "checkpoint.resume=auto", "recipe.eval_interval=1")
    right = run_ranks(_train, world_size, tiny_run(tmp_path / "whole", *more))[0]
    config = tiny_run(tmp_path / "parts", *more)
    for stop_after in (2, 3):
        run_ranks(_train, world_size, config, stop_after)
    weights = run_ranks(_train, world_size, config)[0]
    for name, weight in weights.items():
        assert torch.equal(weight, right[name]), name
    # The evaluation of step 3 was not recorded when the run stopped: it is made when the run goes on.
    expected = [r for r in _losses(tmp_path / "whole") if r["step"] > 3 or (r["step"] == 3 and "validation_loss" in r)]
    assert _losses(tmp_path / "parts") == expected


def _restored_step(grid, config):
    if not grid.is_first:
        CheckpointStore.latest = lambda store: None  # a network file system that shows this rank an older folder
    return Trainer(config, grid, torch.device("cpu")).progress.step


def test_one_rank_decides_what_to_resume_from(tmp_path):
    config = tiny_run(tmp_path, "checkpoint.resume=auto")
    run_ranks(_train, 2, config, 1)
    assert run_ranks(_restored_step, 2, config, timeout_s=60) == [1, 1]


def test_continuing_on_another_number_of_ranks(tmp_path):
    """With a vocabulary that no number of ranks divides."""
    more = ("checkpoint.interval=100", "checkpoint.resume=auto", "engine.precision=float64", "model.vocab_size=307")
    right = run_ranks(_train, 1, tiny_run(tmp_path / "whole", *more))[0]
    hybrid = "fsdp", "engine.shard_within=2"
    for ranks, engine, stop_after in (4, ["zero1"], 2), (2, ["fsdp"], 4), (4, hybrid, 5), (2, ["zero1"], None):
        config = tiny_run(tmp_path / "parts", *more, f"engine={engine[0]}", *engine[1:])
        weights = run_ranks(_train, ranks, config, stop_after)[0]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, right[name], rtol=1e-9, atol=1e-11)


def test_continuing_on_another_grid_and_engine(tmp_path):
    more = (*DIVISIBLE, "checkpoint.interval=100", "checkpoint.resume=auto", "engine.precision=float64")
    right = run_ranks(_train, 1, tiny_run(tmp_path / "whole", *more))[0]
    for world, engine, grid, stop_after in [
        (8, "zero1", {"tp": 2, "cp": 2, "ep": 4}, 2),
        (4, "fsdp", {"tp": 4, "etp": 2}, 3),
        (1, "fsdp", {}, 4),
        (4, "zero1", {"cp": 2, "ep": 2, "etp": 2}, None),
    ]:
        sizes = (f"engine={engine}", *(f"parallel.{axis}={size}" for axis, size in grid.items()))
        weights = run_ranks(_train, world, tiny_run(tmp_path / "parts", *more, *sizes), stop_after, **grid)[0]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, right[name], rtol=1e-9, atol=1e-11)


def test_a_killed_run_continues(tmp_path):
    command = [sys.executable, "-m", "minimax_train"]
    slow = ["recipe.steps=40", "checkpoint.interval=3", "recipe.eval_interval=5", "checkpoint.resume=auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*command, *overrides(tmp_path / "whole", *slow)]
    subprocess.run(whole, check=True, cwd=tmp_path, env=environment, capture_output=True)
    parts = [*command, *overrides(tmp_path / "parts", *slow)]
    process = subprocess.Popen(parts, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "parts/run/metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < 8):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = metrics.read_text()
    assert 8 <= before.count("\n") < 48, "killed in the middle"
    subprocess.run(parts, check=True, cwd=tmp_path, env=environment, capture_output=True)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "parts/run/checkpoints").iterdir()) == ["step-00000039", "step-00000040"]


def _train_until_killed(grid, config, owner, name, step):
    """The process dies at the store's first call of a function on the checkpoint of a step, half-way where it can."""
    call = getattr(owner, name)

    def killed(path, *arguments, **options):
        exists = Path(path).parent.exists() if name == "write_text" else Path(path).exists()
        if f"step-{step:08d}" not in f"{path} {arguments}" or not exists:
            return call(path, *arguments, **options)
        if name == "rmtree":
            (path / "progress.json").unlink()
        if name == "write_text":
            call(path, arguments[0][: len(arguments[0]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, killed)
    return _train(grid, config)


@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [(Path, "write_text", 2), (shutil, "copytree", 2), (Path, "rename", 2), (shutil, "rmtree", 1)],
)
def test_killed_while_a_checkpoint_is_written_or_removed(tmp_path, owner, name, step):
    more = ("checkpoint.interval=1", "checkpoint.keep=1", "checkpoint.resume=auto", "recipe.steps=4")
    more += ("checkpoint.async_save=false",)  # so that it is this process that saves
    config = tiny_run(tmp_path / "parts", *more)
    right = run_ranks(_train, 1, tiny_run(tmp_path / "whole", *more))[0]
    with pytest.raises(AssertionError, match=r"exit codes \[-9\]"):
        run_ranks(_train_until_killed, 1, config, owner, name, step)
    weights = run_ranks(_train, 1, config)[0]
    for parameter, weight in weights.items():
        assert torch.equal(weight, right[parameter]), parameter
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "parts/run/checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_killed_while_a_file_is_written_again(tmp_path, name, monkeypatch):
    config = tiny_run(tmp_path, "checkpoint.resume=auto")
    run_ranks(_train, 1, config)
    write_text = Path.write_text

    def killed(path, text, *arguments, **options):
        if not path.name.startswith(name):
            return write_text(path, text, *arguments, **options)
        write_text(path, text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    before = (tmp_path / "run" / name).read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(AssertionError, match=r"exit codes \[-9\]"):
            run_ranks(_train, 1, config)
    assert (tmp_path / "run" / name).read_text() == before
    run_ranks(_train, 1, config)
    assert (tmp_path / "run" / name).read_text() == before


def test_what_a_resumed_run_may_not_change(tmp_path):
    config = tiny_run(tmp_path, "checkpoint.resume=auto")
    run_ranks(_train, 1, config, 1)
    with pytest.raises(AssertionError, match=r"cannot change model.norm_eps=0.001 \(was 1e-05\), seed=7 \(was 0\)"):
        run_ranks(_train, 1, tiny_run(tmp_path, "checkpoint.resume=auto", "model.norm_eps=1e-3", "seed=7"))
    with pytest.raises(AssertionError, match="already holds step-00000001"):
        run_ranks(_train, 1, tiny_run(tmp_path))


@pytest.mark.parametrize("key", ["checkpoint.initial_weights", "data.tokenizer"])
def test_a_run_does_not_write_over_what_it_starts_from(tmp_path, key):
    run_ranks(_train, 1, tiny_run(tmp_path / "a"), 0)
    source = tmp_path / "a/run/checkpoints/step-00000000"
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    value = source / "tokenizer" if key == "data.tokenizer" else source
    config = tiny_run(tmp_path / "b", f"{key}={value}", f"run_dir={source}")
    with pytest.raises(AssertionError, match="must not lie in the checkpoint"):
        run_ranks(_train, 1, config, 0)
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_initial_weights(tmp_path):
    right = run_ranks(_train, 1, tiny_run(tmp_path / "a"))[0]
    config = tiny_run(tmp_path / "b", f"checkpoint.initial_weights={tmp_path}/a/run", "seed=5")
    weights = run_ranks(_train, 2, config, 0)[0]
    for name, weight in weights.items():
        assert torch.equal(weight, right[name]), name
    with pytest.raises(AssertionError, match=r"checkpoint.initial_weights='.*nowhere': .*neither a checkpoint"):
        run_ranks(_train, 1, tiny_run(tmp_path / "c", f"checkpoint.initial_weights={tmp_path}/nowhere"))
    with pytest.raises(AssertionError, match=r"data.tokenizer='train': gives other token ids than .*; pass data.token"):
        one = "data.tokenizer_documents=1"
        run_ranks(_train, 2, tiny_run(tmp_path / "c", f"checkpoint.initial_weights={tmp_path}/a/run", one))
    kept = f"data.tokenizer={tmp_path}/a/run/tokenizer"
    run_ranks(_train, 1, tiny_run(tmp_path / "e", f"checkpoint.initial_weights={tmp_path}/a/run", kept), 0)
    for change, message in [
        (
            "model.num_heads=8",
            r"of another shape there: .*\.0\.attention\.qkv_proj\.weight \(108, 20\) \(here \(144, 20\)\)",
        ),
        ("model.num_layers=8", "not in the checkpoint: layers.4.*, layers"),
    ]:
        with pytest.raises(AssertionError, match=f"{ConfigError.__name__}: checkpoint.initial_weights=.*{message}"):
            run_ranks(_train, 1, tiny_run(tmp_path / "d", f"checkpoint.initial_weights={tmp_path}/a/run", change))
