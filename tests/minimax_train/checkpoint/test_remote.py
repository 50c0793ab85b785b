"""Checkpoints in object stores: in the memory of a process, and on a local S3 server."""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

from minimax_train.checkpoint import remote
from minimax_train.checkpoint.cli import main
from minimax_train.checkpoint.initial_weights import find_weights, load_weights
from minimax_train.checkpoint.remote import RemotePath, at
from minimax_train.checkpoint.store import CheckpointStore, find_checkpoint
from minimax_train.config import save_config
from minimax_train.convert import to_hf
from minimax_train.errors import ConfigError, TrainingError
from minimax_train.run_dir import _refuse_moved
from minimax_train.run_lock import release_lock
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run, weights_of

QUIET = ("recipe.eval_interval=0", "recipe.warmup_steps=0", "recipe.decay_steps=0")


class _S3:
    """A server of moto's, asked without the code under test."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                self.ask("PUT", "bucket")
                return
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.05)

    def ask(self, method, path, data=None):
        # Objects are private, but signatures are not looked at.
        scope = "Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
        headers = {"Authorization": f"AWS4-HMAC-SHA256 {scope}", "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(f"{self.url}/{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def keys(self, prefix):
        found = self.ask("GET", f"bucket?list-type=2&prefix={prefix}/").decode()
        return [key.removeprefix(f"{prefix}/") for key in re.findall("<Key>([^<]*)</Key>", found)]

    def download(self, prefix, folder):
        for key in self.keys(prefix):
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(self.ask("GET", f"bucket/{prefix}/{key}"))
        return folder


@pytest.fixture(scope="module")
def s3():
    server = _S3()
    environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield server
    server.process.kill()
    server.process.wait()


def _command(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        return main(arguments), out.getvalue()


def _in_memory(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    trainer.train()
    right, url = weights_of(trainer), config.checkpoint.folder
    told = [_command("ls", url), _command("verify", url), _command("diff", url, f"{url}/step-00000006")]
    config.checkpoint.resume = "auto"
    again = weights_of(Trainer(config, grid, torch.device("cpu")))
    assert again.keys() == right.keys() and all(torch.equal(again[name], x) for name, x in right.items())
    loaded = {name: torch.zeros_like(x) for name, x in right.items()}
    load_weights(find_weights(f"{url}/step-00000006"), loaded)
    assert all(torch.equal(loaded[name], x) for name, x in right.items())
    release_lock(Path(config.run_dir))
    told += [_command("prune", url, "--keep", "1"), _command("ls", config.run_dir)]
    shard = at(f"{url}/step-00000006/__0_0.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    return [*told, _command("verify", url)]


def test_in_the_memory_of_a_process(tmp_path):
    """Saved, listed, verified, compared, resumed from, loaded from, pruned, damaged."""
    url = "memory://runs/a"
    options = ["checkpoint.interval=2", "checkpoint.keep=2", "checkpoint.async_save=false"]
    config = tiny_run(tmp_path, *QUIET, *options, f"checkpoint.folder={url}")
    (told,) = run_ranks(_in_memory, 1, config)
    listed, verified, compared, pruned, left, damaged = told
    assert listed[0] == 0 and [row.split()[0] for row in listed[1].splitlines()] == ["step", "4", "6"]
    assert all(row.endswith("whole") and "%" not in row and " - " in row for row in listed[1].splitlines()[1:])
    assert verified[0] == 0 and verified[1].count(": whole") == 2
    assert compared == (0, "no tensor differs\n")
    assert pruned[0] == 0 and f"{url}/step-00000004: removed" in pruned[1]
    assert left[0] == 0 and [row.split()[0] for row in left[1].splitlines()] == ["step", "6"]
    assert damaged[0] == 1 and f"{url}/step-00000006/__0_0.distcp: damaged: its SHA-256 is" in damaged[1]
    assert not (tmp_path / "run/checkpoints").exists()


def _train(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    first = trainer.first_step
    weights = {}

    def prepare(original=trainer._prepare_saves):
        original()
        while trainer.saver._memory is not None and not trainer.saver.is_ready:
            time.sleep(0.01)

    def save(plan, must_succeed=False, original=trainer.save):
        weights[trainer.progress.step] = weights_of(trainer)
        original(plan, must_succeed)
        assert trainer.saver.is_saving != must_succeed

    trainer._prepare_saves, trainer.save = prepare, save
    trainer.train()
    return first, weights


@pytest.fixture(scope="module")
def run(s3, tmp_path_factory):
    """Two ranks, saves beside training; what another run left half written is in their way."""
    folder = tmp_path_factory.mktemp("s3")
    for key in ("step-00000001/__0_0.distcp", "step-00000004/__7_0.distcp"):
        s3.ask("PUT", f"bucket/runs/a/{key}", b"left")
    options = ["checkpoint.interval=2", "checkpoint.keep=0", "checkpoint.folder=s3://bucket/runs/a"]
    config = tiny_run(folder, *QUIET, *options)
    ((first, right), _) = run_ranks(_train, 2, config)
    assert first == 0
    return config, right


def test_two_ranks_save_beside_training_to_s3(s3, run, tmp_path):
    """torch's own reader finds the weights of each step; nothing else is in the bucket."""
    config, right = run
    copy = s3.download("runs/a", tmp_path)
    assert sorted(path.name for path in copy.iterdir()) == ["run_dir.txt", *(f"step-0000000{n}" for n in (2, 4, 6))]
    for step in (2, 4, 6):
        checkpoint = copy / f"step-{step:08d}"
        state = {f"model.{name}": torch.zeros_like(x) for name, x in right[step].items()}
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
        assert all(torch.equal(state[f"model.{name}"], x) for name, x in right[step].items())
        assert {"__0_0.distcp", "__1_0.distcp", "manifest.json"} < {path.name for path in checkpoint.iterdir()}
        assert not (checkpoint / "__7_0.distcp").exists()
    told = _command("verify", "s3://bucket/runs/a")
    assert told[0] == 0 and told[1].count(": whole") == 3
    listed = [re.sub(r" +\d+ (s|min) +", " ", _command("ls", run)[1]) for run in (config.run_dir, "s3://bucket/runs/a")]
    assert listed[0] == listed[1] and listed[0].count("whole") == 3


def test_a_checkpoint_on_s3_is_exported_as_a_local_one_is(s3, run, tmp_path):
    to_hf("s3://bucket/runs/a", tmp_path / "remote", workers=2)
    to_hf(s3.download("runs/a/step-00000006", tmp_path / "step-00000006"), tmp_path / "local", workers=1)
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / side).iterdir()} for side in ("remote", "local")
    )
    assert b"loss over steps" in ours.pop("README.md") and ours.pop("loss.png"), "the curve of the run that is here"
    assert theirs.pop("README.md") and theirs == ours and "model.safetensors" in ours


def test_a_checkpoint_without_manifest_does_not_exist(s3, run):
    for key in s3.keys("runs/a/step-00000002"):
        if key != "manifest.json":
            s3.ask("PUT", f"bucket/runs/c/step-00000002/{key}", b"x")
    with pytest.raises(ConfigError, match=r"s3://bucket/runs/c: neither a checkpoint"):
        find_checkpoint("s3://bucket/runs/c")
    with pytest.raises(ConfigError, match=r"not a whole checkpoint: there is no manifest\.json in it"):
        find_checkpoint("s3://bucket/runs/c/step-00000002")


def test_an_upload_that_fails_midway_leaves_nothing(s3, monkeypatch):
    monkeypatch.setattr(remote, "_UPLOAD_PART", 5 * 2**20)
    data = os.urandom(2**20)
    whole, torn = at("s3://bucket/parts/whole"), at("s3://bucket/parts/torn")
    with whole.writing() as stream:
        for _ in range(12):
            stream.write(data)
    assert s3.ask("GET", "bucket/parts/whole") == data * 12
    assert whole.read_ranges([(2**20 - 3, 7), (5, 0)]) == [data[-3:] + data[:4], b""]
    with pytest.raises(OSError, match=r"s3://bucket/parts/torn: .*no more"), torn.writing() as stream:
        for _ in range(7):
            stream.write(data)
        raise RuntimeError("no more")
    assert s3.keys("parts") == ["whole"]
    assert b"<UploadId>" not in s3.ask("GET", "bucket?uploads")


def _lose_the_store(grid, config, server):
    trainer = Trainer(config, grid, torch.device("cpu"))
    assert trainer.first_step == 4

    def save(plan, must_succeed=False, original=trainer.save):
        if trainer.progress.step == 5 and grid.is_first:
            os.kill(server, signal.SIGKILL)
        original(plan, must_succeed)

    trainer.save = save
    try:
        trainer.train()
    except TrainingError as error:
        return str(error)


def test_a_damaged_object_and_a_store_that_goes_away(s3, run, capfd):
    """The last test of this server."""
    config, _ = run
    shard = "bucket/runs/a/step-00000006/__1_0.distcp"
    content = bytearray(s3.ask("GET", shard))
    content[len(content) // 2] ^= 1
    s3.ask("PUT", shard, bytes(content))
    config.checkpoint.resume, config.checkpoint.interval = "auto", 1
    told, _ = run_ranks(_lose_the_store, 2, config, s3.process.pid)
    err = capfd.readouterr().err
    aside = "it is kept as step-00000006.damaged, and the run goes on from s3://bucket/runs/a/step-00000004"
    assert re.search(rf"note: s3://{shard}: damaged: its SHA-256 is .*; {aside}", err)
    begins = "s3://bucket/runs/a/step-0000000{}: the checkpoint cannot be saved: s3://bucket/"
    assert f"error: {begins.format(5)}" in err and "training goes on, and tries again" in err
    assert told.startswith(begins.format(6)) and "Could not connect" in told and "\n" not in told
    with pytest.raises(OSError, match="Could not connect"):
        RemotePath("s3", at("s3://bucket/runs/a").path).is_file()
    assert main(["ls", "s3://bucket/runs/a"]) in (1, 2)
    error = capfd.readouterr().err
    assert error.startswith("error: s3://bucket/runs/a") and error.count("\n") == 1


def test_what_is_refused(tmp_path, s3, monkeypatch):
    def refused(*options):
        with pytest.raises(ConfigError) as caught:
            config = tiny_run(tmp_path, *options)
            config.check_world_size(2)
            Trainer(config, None, torch.device("cpu"))
        return str(caught.value)

    memory = "checkpoint.folder=memory://runs/a"
    assert refused(memory) == "checkpoint.async_save=True: must be false with checkpoint.folder=memory://runs/a"
    told = refused(memory, "checkpoint.async_save=false")
    assert told == "checkpoint.folder='memory://runs/a': is in the memory of one process; this run has 2"
    told = refused("checkpoint.folder=gopher://runs/a")
    assert told == "checkpoint.folder=gopher://runs/a: gopher:// is no protocol that fsspec knows"
    assert refused("checkpoint.initial_weights=s3://").endswith(
        "must name a place in a store, as s3://bucket/runs/a does"
    )
    CheckpointStore(tmp_path / "one", folder="memory://owned").claim()
    CheckpointStore(tmp_path / "one", folder="memory://owned").claim()
    with pytest.raises(ConfigError, match=rf"holds the checkpoints of another run, run_dir='{tmp_path}/one' \(this"):
        CheckpointStore(tmp_path / "two", folder="memory://owned").claim()
    at("memory://left/step-00000002/manifest.json").write_bytes(b"")
    told = f"checkpoint.folder='{tmp_path}/run/checkpoints': holds no checkpoint, but memory://left/step-00000002 is of"
    (tmp_path / "run").mkdir()
    before = tiny_run(tmp_path, "checkpoint.folder=memory://left", "checkpoint.async_save=false")
    save_config(before, tmp_path / "run/config.yaml")
    with pytest.raises(ConfigError, match=told):
        _refuse_moved(tmp_path / "run", CheckpointStore(tmp_path / "run"))

    def missing(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    told = refused("checkpoint.folder=s3://bucket/a")
    assert told == "checkpoint.folder=s3://bucket/a: s3:// needs a library that is not installed: pip install s3fs"
