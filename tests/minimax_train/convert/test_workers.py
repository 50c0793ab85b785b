"""Several processes write what one writes, end together, and read a checkpoint that a run is removing."""

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time

import pytest
import torch

from minimax_train.checkpoint.store import CheckpointStore
from minimax_train.convert import from_hf, names, to_hf
from minimax_train.convert.checkpoint import CheckpointReader
from minimax_train.convert.cli import main
from minimax_train.convert.jobs import run_jobs
from support.commands import Command
from support.runs import overrides

ODD = {"hidden_size": 36, "num_heads": 3, "num_kv_heads": 1, "head_dim": 14, "rotary_dim": 6, "num_experts": 3}


def _contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("layout", ["minimax", "text-01"])
def test_files_are_those_of_one_process(lab, tmp_path, monkeypatch, layout):
    """Also where tensors are cut into pieces of a few rows."""
    config = lab.model_config(**(ODD | {"num_heads": 4}))
    checkpoint = lab.save_checkpoint(lab.random_model(config), tmp_path / "ours")
    options = {"layout": layout, "max_shard_bytes": 50_000}
    to_hf(checkpoint, tmp_path / "one", workers=1, **options)
    monkeypatch.setattr(names, "CHUNK_ELEMENTS", 200)
    to_hf(checkpoint, tmp_path / "three", workers=3, **options)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "three")
    from_hf(tmp_path / "one", tmp_path / "back", workers=3)
    for name, tensor in lab.load_ours(checkpoint).state_dict().items():
        assert torch.equal(tensor, lab.load_ours(tmp_path / "back").state_dict()[name]), name
    assert main(["to-hf", str(tmp_path / "back"), str(tmp_path / "again"), "--layout", layout, "--workers", "2"]) == 0
    assert lab.tensors(tmp_path / "again").keys() == lab.tensors(tmp_path / "one").keys()


def _fails(job):
    if job == 3:
        raise OSError(28, "No space left on device", "file")
    time.sleep(0.01)
    return job * job


def _dies(job):
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_results_errors_and_deaths():
    assert run_jobs(_fails, [5, 2, 7], 2) == [25, 4, 49]
    with pytest.raises(OSError, match="No space left on device: 'file'"):
        run_jobs(_fails, range(9), 2)
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"a process that converts ended \(SIGKILL\): out of memory\?"):
        run_jobs(_dies, [1, 3, 1], 2)
    assert time.monotonic() - begun < 30
    assert not multiprocessing.active_children()


def _interrupted(job):
    time.sleep(60)


def test_an_interruption_ends_all():
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(_interrupted, [1, 2, 3], 2)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_leaves_nothing(lab, tmp_path, monkeypatch, capsys):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config()), tmp_path / "ours")
    parent = os.getpid()
    read = CheckpointReader.read

    def die(self, parameter, chunk, part=None):
        if os.getpid() != parent and "norm" in parameter.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, parameter, chunk, part)

    monkeypatch.setattr(CheckpointReader, "read", die)
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf"), "--workers", "2"]) == 1
    assert re.search(r"^error: a process that converts ended \(SIGKILL\)", capsys.readouterr().err, re.MULTILINE)
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf"), "--workers", "0"]) == 2
    assert "--workers=0: must be between 1 and 1024" in capsys.readouterr().err


def test_removed_while_it_is_read(lab, tmp_path, monkeypatch, capsys):
    """Once its shards are open a checkpoint can go; before that, the next newest is taken."""
    run = tmp_path / "run" / "checkpoints"
    expected = lab.random_model(lab.model_config())
    old = lab.save_checkpoint(expected, run / "step-00000010")
    check = CheckpointReader.check

    def remove(self, workers=1):
        shutil.rmtree(self.folder)
        check(self, workers)

    monkeypatch.setattr(CheckpointReader, "check", remove)
    assert main(["to-hf", str(tmp_path / "run"), str(tmp_path / "held")]) == 0
    monkeypatch.undo()
    assert not old.exists()
    assert torch.equal(lab.tensors(tmp_path / "held")["lm_head.weight"], expected.head.weight)

    lab.save_checkpoint(expected, run / "step-00000020")
    begin = CheckpointReader.__init__

    def remove_first(self, folder):
        if folder.name == "step-00000020":
            lab.save_checkpoint(expected, run / "step-00000030")
            shutil.rmtree(folder)
        begin(self, folder)

    monkeypatch.setattr(CheckpointReader, "__init__", remove_first)
    assert main(["to-hf", str(tmp_path / "run"), str(tmp_path / "next")]) == 0
    assert "step-00000020 was removed before it could be opened" in capsys.readouterr().err
    assert lab.tensors(tmp_path / "next").keys() == lab.tensors(tmp_path / "held").keys()


def test_a_run_that_goes_on_saving(lab, tmp_path, capsys):
    """Every step is saved and the one before it removed, meanwhile whatever is newest is converted."""
    more = ["checkpoint.interval=1", "checkpoint.keep=1", "recipe.steps=2000", "recipe.eval_interval=2000"]
    arguments = overrides(tmp_path, *more, "recipe.decay_steps=1")
    trainer = Command(tmp_path, arguments)
    try:
        seen, attempts = set(), itertools.count()
        until = time.monotonic() + 120
        while len(seen) < 2 and time.monotonic() < until:
            if not CheckpointStore(tmp_path / "run").all():
                assert trainer.process.is_alive()
                time.sleep(0.2)
                continue
            target = tmp_path / f"hf-{next(attempts)}"
            status = main(["to-hf", str(tmp_path / "run"), str(target), "--workers", "2"])
            error = capsys.readouterr().err
            assert status == 0, error
            tensors = lab.tensors(target)
            assert all(tensor.isfinite().all() for tensor in tensors.values()) and len(tensors) > 50
            seen.add(re.findall(r"converting \S*(step-\d+)", error)[-1])
            assert "loss.png" in {file.name for file in target.iterdir()}
        assert len(seen) == 2 and trainer.process.is_alive()
    finally:
        trainer.process.kill()
        trainer.process.join()
