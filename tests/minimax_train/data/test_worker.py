"""Worker processes: the same sequences as without them, shared by ranks, and gone with the run whatever ends it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from minimax_train.data import DataConfig, build_train_loader
from minimax_train.data.config import MixtureSourceConfig
from minimax_train.data.tokenizer import Tokenizer, train_bpe
from minimax_train.errors import ConfigError, TrainingError
from support.data import Troubled, WordTokenizer, next_micro_batches, random_documents, rows_of, write_shards
from support.distributed import run_ranks

LENGTH = 13


@pytest.fixture
def config(tmp_path):
    texts = random_documents(50)
    pattern = write_shards(tmp_path, "json", [texts[i::7] for i in range(7)])
    return DataConfig(
        source="files", format="json", train_files=[pattern], sequence_length=LENGTH, num_streams=6, shuffle_documents=4
    )


def loader(config, workers, dp_rank=0, dp_size=1, tokenizer=None, **how):
    config.num_workers = workers
    tokenizer = tokenizer or WordTokenizer()
    return build_train_loader(config, tokenizer, dp_rank=dp_rank, dp_size=dp_size, seed=5, **how)


def steps(rows, *sizes, length=LENGTH):
    """Sequences of steps with these numbers of micro-batches of one sequence, and the state after each."""
    taken = []
    for size in sizes:
        batches = next_micro_batches(rows, 1, size, length=length, dp_size=rows._dp_size)
        taken.append((rows_of(batches), json.loads(json.dumps(rows.state_dict()))))
    return taken


@pytest.mark.parametrize(("workers", "dp_size"), [(1, 1), (2, 2)])
def test_the_same_sequences_and_states_as_without(config, workers, dp_size):
    last = dp_size - 1
    expected, got = loader(config, 0, last, dp_size), loader(config, workers, last, dp_size)
    assert steps(got, 3, 3) == steps(expected, 3, 3)
    changed = steps(expected, 4, length=2 * LENGTH) + steps(expected, 1, 5)
    assert steps(got, 4, length=2 * LENGTH) + steps(got, 1, 5) == changed
    state = expected.state_dict()
    following = steps(expected, 7, 2)
    got.load_state_dict(state)
    assert steps(got, 7, 2) == following
    got.close()


def test_weights_that_change_reach_the_worker(config, tmp_path):
    how = MixtureSourceConfig(format="json", train_files=config.train_files)
    other = write_shards(tmp_path / "other", "json", [random_documents(40, seed=1)] * 7)
    sources = {"a": how, "b": MixtureSourceConfig(format="json", train_files=[other])}
    mixture = DataConfig(sources=sources, num_streams=6, shuffle_documents=4)
    taken = []
    for workers in (0, 1):
        rows = loader(mixture, workers)
        for weights in ({"a": 1.0}, {"a": 0.25, "b": 0.75}, {"a": 0.25, "b": 0.75}, {"a/short": 1.0}):
            batches = next_micro_batches(rows, 1, 5, length=LENGTH, weights=weights)
            taken.append((rows_of(batches), rows.state_dict(), rows.figures()))
        rows.close()
    assert taken[:4] == taken[4:]


def _of_a_rank(grid, config):
    rows = loader(config, 1, dp_size=1, peers=grid.group("cp_tp"))
    taken = []
    for size in (2, 2, 5, 2):
        if dist.get_rank() == 1:
            time.sleep(0.2)  # the other asks for the next step before this one reads its own
        taken += steps(rows, size)
        dist.barrier()
    started = [worker._process is not None for worker in rows._workers]
    rows.close()
    return taken, started


def test_context_parallel_ranks_share_a_process(config):
    expected = steps(loader(config, 0), 2, 2, 5, 2)
    results = run_ranks(_of_a_rank, 2, config, cp=2)
    assert [started for _, started in results] == [[True], [False]]
    assert all(taken == expected for taken, _ in results)


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("refused", ConfigError, "^data.train_files: line 3 is broken$"),
        ("failed", TrainingError, "(?s)^data worker [0-9]+ failed:\nTraceback .*KeyError: 'a mistake in the code'$"),
        ("killed", TrainingError, "^data worker [0-9]+ was ended by SIGKILL; out of memory\\?$"),
        ("hangs", TrainingError, r"^data worker [0-9]+ gave no answer for 2 s \(parallel.timeout_s\)"),
    ],
)
def test_trouble_is_told(config, capfd, trouble, kind, message):
    config.shuffle_documents = 1
    rows = loader(config, 1, tokenizer=Troubled(trouble, after=12))
    steps(rows, 1)
    rows._workers[0]._timeout_s = 2
    with pytest.raises(kind, match=message) as first:
        for _ in range(30):
            steps(rows, 1)
    with pytest.raises(kind) as second:  # it stays
        steps(rows, 1)
    assert str(second.value) == str(first.value)
    rows.close()
    if trouble == "hangs":
        assert "in encode_document" in capfd.readouterr().err


def test_a_data_set_that_cannot_be_opened(config):
    config.train_files = ["/nowhere/*.jsonl"]
    rows = loader(config, 1)
    with pytest.raises(ConfigError, match="/nowhere"):
        steps(rows, 1)
    rows.close()


def test_special_tokens_in_a_text_are_ordinary_text_in_a_worker_too(tmp_path, config):
    (tmp_path / "special.jsonl").write_text(json.dumps({"text": "end <|endoftext|> " * 5}) + "\n")
    config.train_files, config.num_streams = [str(tmp_path / "special.jsonl")], 1
    tokenizer = Tokenizer(train_bpe(["end of text"], 300), 0)
    assert steps(loader(config, 1, tokenizer=tokenizer), 3) == steps(loader(config, 0, tokenizer=tokenizer), 3)


SCRIPT = """
    import sys, time
    from minimax_train.data import DataConfig, build_train_loader
    from minimax_train.recipe import StepPlan
    from support.data import WordTokenizer
    config = DataConfig(source="files", format="json", train_files=[sys.argv[1]], sequence_length=4, num_streams=1)
    loader = build_train_loader(config, WordTokenizer(), dp_rank=0, dp_size=1, seed=0)
    loader.next_micro_batches(StepPlan(1.0, 1, 1, 4, 1e4, {"files": 1.0}, "test"))
    print(loader._workers[0]._pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_worker_ends_with_the_trainer(config, number):
    """Also when the signal goes to all processes, as Ctrl-C does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), config.train_files[0]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )
    pid = int(trainer.stdout.readline())
    os.kill(trainer.pid, number) if number == signal.SIGKILL else os.killpg(trainer.pid, number)
    _, err = trainer.communicate(timeout=30)
    assert err.count("Traceback") == (number == signal.SIGINT), err  # the trainer's own
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the worker outlived the trainer")
