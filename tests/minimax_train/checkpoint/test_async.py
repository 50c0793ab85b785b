"""Checkpoints saved beside training: the same as those that training waits for, and what becomes of those that fail."""

import json
import mmap
import os
import re
import resource
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from minimax_train.checkpoint import saving, shards
from minimax_train.checkpoint.staging import StagingMemory, available_memory, staged
from minimax_train.errors import TrainingError
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import ON_GPU, tiny_run, weights_of, whole

QUIET = ("recipe.eval_interval=0", "checkpoint.interval=2", "checkpoint.keep=0")


class _Watched(Trainer):
    """Its first save waits until it can be made beside training."""

    def save(self, plan, must_succeed=False):
        deadline = time.monotonic() + 60
        while not self.saver.is_ready and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.saver.is_ready
        super().save(plan, must_succeed)

    def signal_writer(self, number):
        os.kill(self.saver._writer.process.pid, number)


class _Stopped(_Watched):
    """Its writer stands still until the next step is taken. Keeps what every save is of, in a file."""

    def save(self, plan, must_succeed=False):
        state = self.engine.snapshot()
        right = {f"model.{name}": whole(x) for name, x in state["model"].items()}
        for name, states in state["optimizer"].items():
            right |= {f"optimizer.{name}.{kind}": whole(x) for kind, x in states.items()}
        super().save(plan, must_succeed)
        assert self.saver.is_saving != must_succeed
        if self.saver.is_saving:
            self.signal_writer(signal.SIGSTOP)
        if self.grid.is_first:
            torch.save((right, json.dumps(asdict(self.progress))), self.run_dir / f"right-{self.progress.step}")

    def train_step(self):
        taken = super().train_step()
        if self.saver.is_saving:
            self.signal_writer(signal.SIGCONT)
        return taken


def _train(grid, config, device="cpu"):
    _Stopped(config, grid, torch.device(device)).train()


def _assert_right(run):
    for step in (2, 4, 5):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        state = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in stored.items()}
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
        right, progress = torch.load(run / f"right-{step}")
        assert state.keys() == right.keys() and len(right) > 50
        for name, x in right.items():
            assert x.dtype == state[name].dtype and torch.equal(x, state[name]), (step, name)
        assert (checkpoint / "progress.json").read_text() == progress
    assert [path.name[-1] for path in sorted((run / "checkpoints").iterdir())] == ["2", "4", "5"]


def test_what_is_saved_beside_training_is_the_state_of_its_step(tmp_path):
    """Bit for bit, though steps went on while it was written; likewise the last, which training waits for."""
    run_ranks(_train, 2, tiny_run(tmp_path, *QUIET, "recipe.steps=5"), timeout_s=90)
    _assert_right(tmp_path / "run")
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        record = json.loads(line)  # of a step whose time is its own, without that of preparing saves
        assert record["seconds"] > record["seconds/forward"] + record["seconds/backward"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["zero1", "fsdp"])
def test_what_a_gpu_saves_beside_training(tmp_path, engine):
    config = tiny_run(tmp_path, *QUIET, "recipe.steps=5", *ON_GPU, f"engine={engine}")
    run_ranks(_train, 1, config, "cuda:0", start="spawn", device="cuda")
    _assert_right(tmp_path / "run")


class _Unlucky(_Watched):
    """What happens to its writer, by step."""

    def save(self, plan, must_succeed=False):
        step = self.progress.step
        if step >= 10:
            return Trainer.save(self, plan, must_succeed)
        writer = self.saver._writer.process.pid
        if step == 2:
            resource.prlimit(writer, resource.RLIMIT_FSIZE, (50_000, -1))
        if step == 4:
            self.saver.wait()
            resource.prlimit(writer, resource.RLIMIT_FSIZE, (-1, -1))
        if step == 8:
            threading.Timer(0.5, os.kill, (writer, signal.SIGCONT)).start()
        super().save(plan, must_succeed)
        if step == 6:
            self.signal_writer(signal.SIGSTOP)
        if step == 8:
            self.signal_writer(signal.SIGKILL)
        return None


def _be_unlucky(grid, config):
    _Unlucky(config, grid, torch.device("cpu")).train()


def test_saves_that_fail_stop_no_training(tmp_path, capfd):
    """A full disk, a next save that must wait, a writer process that is killed, after which saves are synchronous."""
    run_ranks(_be_unlucky, 1, tiny_run(tmp_path, *QUIET, "recipe.steps=12"), timeout_s=90)
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in (4, 6, 10, 12)]
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(("error", "note"))]
    assert len(lines) == 3, err
    begins = f"error: {folder}/step-00000002: the checkpoint cannot be saved: File too large; it takes about "
    assert lines[0].startswith(begins) and "MB are free there; training goes on" in lines[0]
    killed = r"checkpoint writer \d+ was ended by SIGKILL; out of memory\?"
    assert re.match(rf"error: {folder}/step-00000008: .* cannot be saved: {killed}; it takes", lines[1])
    assert re.fullmatch(rf"note: rank 0: {killed}: saves are synchronous from here on", lines[2])
    waited = re.search(r"checkpoint step-00000008: waited (\S+) s for that of step 6 to be written", out)
    assert waited and 0.3 < float(waited[1]) < 5, out
    assert len(re.findall(r"checkpoint step-000000(?:04|06|10|12): \S+ MB, blocked \S+ s, written in \S+ s", out)) == 4


def _train_short_of_memory(grid, config):
    if grid.rank("world") == 1:
        saving.available_memory = lambda: 500_000
    shards._LEAST_BYTES = 100_000
    trainer = Trainer(config, grid, torch.device("cpu"))
    if grid.is_first:
        trainer.store.folder.mkdir(parents=True)
        trainer.store.path(2).write_text("mine")
    trainer.train()
    assert trainer.saver._writer is None and trainer.saver._memory is None
    return weights_of(trainer)


def test_memory_that_does_not_suffice_and_a_file_in_the_way(tmp_path, capfd):
    config = tiny_run(tmp_path, *QUIET, "recipe.steps=5")
    right = run_ranks(_train_short_of_memory, 2, config)[0]
    out, err = capfd.readouterr()
    pattern = r"checkpoint.async_save=true: staging takes (\S+) MB on \S+, where 0.5 MB of memory are available"
    (takes,) = re.findall(pattern, out)
    folder = tmp_path / "run/checkpoints"
    files = {path.name: path.stat().st_size for path in (folder / "step-00000005").glob("*.distcp")}
    written = sum(files.values()) / 1e6
    assert 0.3 * written < float(takes) < 1.1 * written  # a record of each small tensor has a header
    # Several files of each rank.
    assert {"__0_0.distcp", "__0_1.distcp", "__1_0.distcp", "__1_1.distcp"} <= files.keys()
    state = {f"model.{name}": torch.empty_like(x) for name, x in right.items()}
    dcp.load(state, checkpoint_id=folder / "step-00000005", no_dist=True)
    assert all(torch.equal(state[f"model.{name}"], x) for name, x in right.items())
    assert sorted(path.name[-1] for path in folder.iterdir()) == ["2", "4", "5"]
    assert (folder / "step-00000002").read_text() == "mine"
    assert err.count("step-00000002: the checkpoint cannot be saved: stands where it should go; it takes") == 1, err


def _await_a_rank(grid, config):
    trainer = _Watched(config, grid, torch.device("cpu"))
    trainer.train_step()
    trainer.saver.prepare(trainer.engine.snapshot())
    trainer.save(trainer.plan())
    if not grid.is_first:
        trainer.signal_writer(signal.SIGSTOP)
    trainer.saver._timeout_s = 1.5 if grid.is_first else 3
    try:
        trainer.saver.wait()
    except TrainingError as error:
        return str(error)
    finally:
        trainer.saver.close()
        trainer.loader.close()


def test_a_rank_that_does_not_write(tmp_path):
    first, _ = run_ranks(_await_a_rank, 2, tiny_run(tmp_path, *QUIET), timeout_s=90)
    assert "step-00000001: the checkpoint is not saved after 1.5 s (parallel.timeout_s): ranks 1 have not" in first
    assert "no checkpoint is in" in first


def test_staging_keeps_every_view():
    """Views that lie beside each other, overlap, are empty, are no stretch of memory; of several dtypes."""
    base, other = torch.randn(7, 33, 5), torch.arange(1000, dtype=torch.bfloat16)
    tensors = [base[2:5], base[0], base[:, 3], base.transpose(0, 2), base[6:, :, 1::2], base[:0], base.sum()]
    tensors += [other[3:70].view(1, 67), other[900:], torch.tensor(3), other[3:70]]
    memory = StagingMemory(50_000, torch.device("cpu"))
    while not memory.is_ready:
        time.sleep(0.01)
    places, copied = memory.copy(tensors)
    right = [x.clone() for x in tensors]
    base.zero_()
    other.zero_()
    assert copied is None
    with mmap.mmap(memory.descriptor, memory.size) as shared:
        found = [staged(shared, place).clone() for place in places]
    for x, expected in zip(found, right, strict=True):
        assert x.dtype == expected.dtype and torch.equal(x, expected)
    assert max(place.offset for place in places) <= 5 * 4096  # each element once, in pages
    with pytest.raises(ValueError, match="to be staged, more than the"):
        memory.copy([torch.zeros(100_000)])
    memory.close()


def test_memory_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr("minimax_train.checkpoint.staging._CGROUP", tmp_path)
    free = available_memory()
    assert (
        0
        < free
        <= next(
            1024 * int(line.split()[1])
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("MemTotal")
        )
    )
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 3\nactive_file 100000\ninactive_file 200000\n")
    assert available_memory() == 1_300_000
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(available_memory() - free) < free / 2
