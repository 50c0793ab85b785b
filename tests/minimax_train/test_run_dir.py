"""The folder of a run as a user meets it: what is in the way, who else is there, what is damaged or cannot be saved."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from minimax_train import cli, run_lock
from minimax_train.errors import ConfigError
from minimax_train.metrics.config import LoggingConfig
from minimax_train.metrics.log import MetricLog
from minimax_train.trainer import Trainer
from support.commands import Command, minimax_train
from support.distributed import run_ranks
from support.runs import overrides, tiny_run

FAST = ("recipe.eval_interval=0", "recipe.warmup_steps=0", "recipe.decay_steps=0")
ENDLESS = (*FAST, "recipe.steps=100000", "checkpoint.interval=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    result = minimax_train(folder, *overrides(folder, *FAST, "recipe.steps=2"))
    assert result.status == 0, result.err
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def go_on(finished, run, tmp_path):
    """Resume the copy."""

    def go_on(*more, **options):
        given = overrides(finished.parent, *FAST, "recipe.steps=4", "checkpoint.resume=auto", f"run_dir={run}", *more)
        return minimax_train(tmp_path, *given, **options)

    return go_on


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "std" not in path.name}


def _one_line(result, status, *words):
    assert result.status == status, result
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err, result.err


@pytest.mark.parametrize(
    ("files", "run_dir", "words"),
    [
        (["tokenizer/notes.txt", "config.yaml"], ".", ["config.yaml, tokenizer", "no run wrote"]),
        (["metrics.jsonl"], "mine", ["metrics.jsonl"]),
        (["checkpoints/notes.txt"], "mine", ["checkpoints"]),
        (["run.lock"], "mine", ["run.lock"]),
        (["config.json", "model.safetensors"], "mine", ["Hugging Face"]),
        ([".metadata", "config.yaml"], "mine", ["initial_weights"]),
        ([".metadata"], "mine/new", ["initial_weights"]),
        ([], "/", ["root of the file system"]),
    ],
)
def test_what_no_run_wrote_is_in_the_way_and_stays(tmp_path, files, run_dir, words):
    given = overrides(tmp_path / "data", *FAST, f"run_dir={run_dir}", "checkpoint.resume=auto")
    mine = tmp_path / "mine"
    for name in files:
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("a: 1\n")
    before = _files(tmp_path)
    folder = mine if run_dir == "." else tmp_path
    result = minimax_train(folder, *given)
    _one_line(result, 2, f"run_dir='{run_dir}'", *words)
    assert _files(tmp_path) == before


def test_other_files_may_lie_beside_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("slurm-1.out", "notes.txt"):
        (tmp_path / "run" / name).write_text("mine")
    assert minimax_train(tmp_path, *overrides(tmp_path, *FAST, "recipe.steps=1")).status == 0
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_a_run_inside_a_checkpoint_is_refused(finished, run, tmp_path):
    before = _files(run)
    for inside in ("checkpoints/step-00000002", "checkpoints/new"):
        given = overrides(finished.parent, "checkpoint.resume=auto", f"run_dir={run}/{inside}")
        _one_line(minimax_train(tmp_path, *given), 2, "run_dir=", "must not lie in")
    assert _files(run) == before


def test_what_a_run_without_checkpoints_left_is_kept(run, go_on):
    (run / "checkpoints").rename(run.parent / "elsewhere")
    (run / "tokenizer/notes.txt").write_text("mine")
    metrics = (run / "metrics.jsonl").read_text()
    result = go_on()
    assert result.status == 0, result.err
    assert "metrics.jsonl.1" in result.err
    assert (run / "metrics.jsonl.1").read_text() == metrics
    assert (run / "tokenizer.1/notes.txt").read_text() == "mine"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_run_of_an_earlier_version_goes_on(run, go_on):
    (run / "run.lock").unlink()
    result = go_on()
    assert (result.status, result.err) == (0, "")
    assert "step 3/4" in result.out and "step 1/4" not in result.out


def _impatient():
    run_lock._PATIENCE_S = 0.1


def test_one_run_at_a_time_and_none_after_a_kill(tmp_path):
    given = overrides(tmp_path, *ENDLESS)
    run = tmp_path / "run"
    first = Command(tmp_path, given)
    first.wait_for_lines(run / "metrics.jsonl", 3)
    config = (run / "config.yaml").read_text()
    for resume in ("never", "auto"):
        second = minimax_train(tmp_path, *given, "seed=5", f"checkpoint.resume={resume}", prepare=_impatient)
        _one_line(second, 2, "run_dir=", "another run is at work", f"process {first.process.pid}")
    assert (run / "config.yaml").read_text() == config
    os.kill(first.process.pid, signal.SIGKILL)
    assert first.finish().status == -signal.SIGKILL
    done = int((run / "metrics.jsonl").read_text().splitlines()[-1].partition(",")[0].split(":")[1])
    result = minimax_train(tmp_path, *given, "checkpoint.resume=auto", f"recipe.steps={done + 1}")
    assert result.status == 0, result.err


def test_children_do_not_inherit_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_PATIENCE_S", 0.1)
    ready, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        run_lock.take_lock(tmp_path)
        if os.fork() == 0:  # outlives the holder
            os.write(tell, b"x")
            time.sleep(20)
            os._exit(0)
        time.sleep(20)
        os._exit(0)
    assert os.read(ready, 1)
    with pytest.raises(ConfigError, match=f"process {holder}"):
        run_lock.take_lock(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    run_lock.take_lock(tmp_path)
    run_lock.release_lock(tmp_path)


def test_a_rank_ends_with_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    alive, held = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            cli._end_with_torchrun()
            os.write(held, b"x")
            time.sleep(20)
            os._exit(0)
        os.close(held)
        time.sleep(20)
        os._exit(0)
    os.close(held)
    assert os.read(alive, 1) == b"x"
    started = time.monotonic()
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(alive, 1) == b"" and time.monotonic() - started < 10


def _refusal(grid, config):
    try:
        Trainer(config, grid, torch.device("cpu"))
    except ConfigError as error:
        return error.on_all_ranks, str(error)


def test_all_ranks_learn_of_a_refusal(tmp_path):
    config = tiny_run(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("a: 1")
    for on_all_ranks, message in run_ranks(_refusal, 2, config, timeout_s=60):
        assert on_all_ranks and "holds config.yaml" in message


def _swap_two_ids(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = (token for token, index in vocabulary.items() if index in (100, 101))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))


def _split_otherwise(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].reverse()
    file.write_text(json.dumps(content))


def _shorten(path):
    os.truncate(path, path.stat().st_size - 10)


def _say_another_step(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": 1000000}))
    path.with_name("manifest.json").unlink()  # as of an earlier version


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("tokenizer", _swap_two_ids, ["gives other token ids", "step-00000002/tokenizer"]),
        ("tokenizer", _split_otherwise, ["splits text otherwise"]),
        ("metrics.jsonl", lambda path: path.write_text("mine\n"), [":1: "]),
        ("config.yaml", lambda path: path.write_text("a: 1\n"), ["not a configuration"]),
        ("checkpoints/step-00000099", Path.mkdir, ["an empty folder"]),
        ("checkpoints/step-00000099", Path.touch, ["a file"]),
        ("checkpoints/step-00000002/progress.json", lambda path: path.write_text(""), ["progress.json"]),
        ("checkpoints/step-00000002/progress.json", _say_another_step, ["1000000"]),
        ("checkpoints/step-00000002/.metadata", Path.unlink, [".metadata"]),
        ("checkpoints/step-00000002/.metadata", lambda path: path.write_bytes(b""), [".metadata"]),
        ("checkpoints/step-00000002/__0_0.distcp", _shorten, [".distcp"]),
    ],
)
def test_what_a_resumed_run_finds_damaged_is_named(run, go_on, name, spoil, words):
    spoil(run / name)
    before = _files(run)
    _one_line(go_on(), 2, f"{run}", *words)
    assert {path: text for path, text in _files(run).items() if path.name != "run.lock"} == {
        path: text for path, text in before.items() if path.name != "run.lock"
    }


def test_a_missing_tokenizer_is_the_checkpoints(run, go_on):
    tokenizer = (run / "tokenizer/tokenizer.json").read_text()
    shutil.rmtree(run / "tokenizer")
    assert go_on().status == 0
    assert (run / "tokenizer/tokenizer.json").read_text() == tokenizer


def test_steps_that_are_taken_already(go_on):
    _one_line(go_on("recipe.steps=1"), 2, "recipe.steps=1: ", "has taken 2 steps already")
    result = go_on("recipe.steps=2")
    assert result.status == 0 and "all 2 steps were taken before" in result.out


def test_a_checkpoint_that_cannot_be_written(run, go_on):
    before = _files(run / "checkpoints")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = go_on(prepare=limit)
    words = ["step-00000004: the checkpoint cannot be saved: File too large", "MB are free", "continues from", "0002"]
    _one_line(result, 1, *words)
    assert _files(run / "checkpoints") == before
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert go_on().status == 0


def test_metrics_wait_for_a_disk_that_is_full(tmp_path, capsys):
    log = MetricLog(LoggingConfig(), tmp_path, {}, total_steps=4, first_step=0, enabled=True)
    disk, room = log.lines._file, iter([7, 0, 0, 0])

    def write(data):
        size = next(room, None)
        if size == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return disk.write(data[:size])

    log.lines._file = types.SimpleNamespace(write=write, close=disk.close)
    for step in range(1, 5):
        log.report(step, {"loss": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "metrics.jsonl: cannot be written: No space left on device" in err


def test_nobody_reads_the_output(tmp_path):
    def leave():
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)

    result = minimax_train(tmp_path, *overrides(tmp_path, *FAST, "recipe.steps=2"), prepare=leave)
    assert result.status == 0, result.err
    assert result.err.startswith("note: standard output is closed") and result.err.count("\n") == 1
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    assert (tmp_path / "run/metrics.jsonl").read_text().count("\n") == 2


def test_an_interrupt_is_one_line(tmp_path):
    command = Command(tmp_path, overrides(tmp_path, *ENDLESS))
    command.wait_for_lines(tmp_path / "run/metrics.jsonl", 4)
    os.kill(command.process.pid, signal.SIGINT)
    _one_line(command.finish(timeout_s=15), 130, "interrupted after step", "checkpoint.resume=auto continues from")
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["text"] for event in events if event["event"] == "stopped"] == ["interrupted"]


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ([], 0),
        (["recipe.learning_rate=100", "recipe.weight_decay=100", "recipe.warmup_steps=0"], 1),
        (["data.shuffle_documents=7"], 1),
        (["checkpoint.interval=1"], 1),
    ],
)
def test_weights_and_biases_is_told_how_the_run_ended(tmp_path, more, status):
    """The four ends: done, not a number, data that cannot be read, a checkpoint that cannot be saved."""

    def prepare():
        ended = types.SimpleNamespace(
            id="1",
            define_metric=lambda *a, **k: None,
            log=lambda values: None,
            alert=lambda **k: (tmp_path / "alert").write_text(k["title"]),
            finish=lambda exit_code: (tmp_path / "told").write_text(str(exit_code)),
        )
        sys.modules["wandb"] = types.SimpleNamespace(init=lambda **k: ended, Error=OSError)
        if more == ["data.shuffle_documents=7"]:
            read = Trainer.next_batches
            Trainer.next_batches = lambda *a: _raise(ConfigError("unreadable")) if a[0].progress.step else read(*a)
        if more == ["checkpoint.interval=1"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    given = overrides(tmp_path, *FAST, "recipe.steps=3", "logging.wandb=offline", *more)
    result = minimax_train(tmp_path, *given, prepare=prepare)
    assert result.status == status, result
    assert (tmp_path / "told").read_text() == str(status)
    assert (tmp_path / "alert").exists() == (status != 0)
