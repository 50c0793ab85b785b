"""A run that is told to end saves, leaves with a status of its own, and goes on as if it had not been stopped."""

import json
import os
import signal
import socket
import time
from functools import partial

import pytest
import torch.distributed as dist

import minimax_train.trainer
from minimax_train.trainer import Trainer
from support.commands import Command
from support.commands import minimax_train as finish
from support.runs import overrides

LONG = ("recipe.steps=18", "recipe.eval_interval=7", "checkpoint.interval=1000", "checkpoint.resume=auto")
LONG += ("engine.precision=float64",)
LOSSES = ("loss", "grad_norm", "validation_loss", "unigram_loss")


def _records(folder):
    """Losses by step, of steps and of evaluations."""
    found = {}
    for line in (folder / "run/metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in LOSSES:
            if name in record:
                assert (record["step"], name) not in found, "reported twice"
                found[record["step"], name] = record[name]
    return found


def _same(folder, whole):
    assert folder.keys() == whole.keys()
    for place, value in whole.items():
        assert folder[place] == pytest.approx(value, rel=1e-10, abs=1e-10), place


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    result = finish(folder, *overrides(folder, *LONG))
    assert result.status == 0, result.err
    return _records(folder)


def _lines(folder):
    return folder / "run/metrics.jsonl"


def _check_left(folder, err, name):
    """The step that it says was the last is saved, and nothing else."""
    (saved,) = (folder / "run/checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert err == f"stopped: {name} after step {step}: checkpoint.resume=auto continues from {saved}\n"
    assert 5 <= step < 18 and max(place[0] for place in _records(folder)) == step


def test_a_signal_to_all_processes_of_a_run(tmp_path, whole):
    command = Command(tmp_path, overrides(tmp_path, *LONG, "data.num_workers=1"), prepare=os.setsid)
    command.wait_for_lines(_lines(tmp_path), 6)
    os.killpg(command.process.pid, signal.SIGUSR1)
    os.killpg(command.process.pid, signal.SIGUSR1)  # another changes nothing
    result = command.finish(timeout_s=20)
    assert result.status == 3, result
    _check_left(tmp_path, result.err, "SIGUSR1")
    records = _records(tmp_path)
    _same(records, {place: whole[place] for place in records})


def _start(folder, arguments, ranks=2):
    """Ranks that meet as under torchrun."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def prepare(rank):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="localhost")

    return [Command(folder, arguments, prepare=partial(prepare, rank)) for rank in range(ranks)]


@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_rank_alone(tmp_path, whole, told):
    arguments = overrides(tmp_path, *LONG)
    commands = _start(tmp_path, arguments)
    commands[0].wait_for_lines(_lines(tmp_path), 6)
    os.kill(commands[told].process.pid, signal.SIGTERM)
    first, second = (command.finish(timeout_s=20) for command in commands)
    assert (first.status, second.status, second.err) == (3, 3, ""), (first, second)
    _check_left(tmp_path, first.err, "SIGTERM")
    if told:
        assert finish(tmp_path, *arguments).status == 0
        _same(_records(tmp_path), whole)


def test_the_time_is_over(tmp_path):
    """Of the rank that is told, in a save that does not end; and of the one that waits for it."""

    def hang(trainer, *arguments, **options):
        if trainer.store.latest() is not None and dist.get_rank() == 1:
            (tmp_path / "hangs").write_text("\n")
            time.sleep(100)
        return save(trainer, *arguments, **options)

    more = ("recipe.steps=10000", "checkpoint.interval=4", "checkpoint.leave_within_s=2", "recipe.eval_interval=0")
    save = Trainer.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", hang)
        commands = _start(tmp_path, overrides(tmp_path, *more))
    commands[1].wait_for_lines(tmp_path / "hangs", 1)
    newest = max((tmp_path / "run/checkpoints").glob("step-????????"))
    for command in commands:
        os.kill(command.process.pid, signal.SIGUSR1)
    for rank, command in enumerate(commands):
        result = command.finish(timeout_s=20)
        assert (result.status, result.err) == (
            143,
            f"{'rank 1: ' if rank else ''}error: SIGUSR1; what ran did not end within 2 s and was left; "
            f"checkpoint.resume=auto continues from {newest}\n",
        )


def test_before_the_first_step(tmp_path):
    def wait(*arguments):
        (tmp_path / "waits").write_text("\n")
        time.sleep(100)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimax_train.trainer, "build_engine", wait)
        command = Command(tmp_path, overrides(tmp_path))
    command.wait_for_lines(tmp_path / "waits", 1)
    os.kill(command.process.pid, signal.SIGTERM)
    result = command.finish(timeout_s=20)
    assert (result.status, result.err) == (143, "error: SIGTERM before the first step\n")
