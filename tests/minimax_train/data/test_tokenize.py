"""``minimax-data tokenize``: what it writes, what a kill leaves, what it refuses."""

import errno
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import tokenizers

from minimax_train.data import cli, sources, tokenize
from minimax_train.data.token_files import TokenWriter
from minimax_train.data.tokenizer import load_tokenizer
from support.commands import minimax_train
from support.runs import MODEL

SENTENCE = "the router sends every token to two experts and the gate weighs what comes back"


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two files, so small that they would not be cut, in more parts than files."""
    monkeypatch.setattr(sources, "_SMALLEST_BYTES", 1)
    texts = [f"{i} {SENTENCE[i % 60 :]} é" for i in range(300)]
    for file in range(2):
        lines = [json.dumps({"text": text}) for text in texts[file * 150 : (file + 1) * 150]]
        (tmp_path / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    return texts


def arguments(folder, *more, output="out/tok"):
    files = ("data=files", "data.format=json", f"data.train_files=[{folder}/*.jsonl]")
    return ["tokenize", *files, "model.vocab_size=300", "--num-workers", "1", f"output={folder}/{output}", *more]


def refused(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def tokens_of(path):
    """Documents of a pair of files, by the numbers that its index begins with."""
    index = path.with_suffix(".idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    sizes = np.frombuffer(index, "<i4", count, 34)
    return [ids.tolist() for ids in np.split(np.fromfile(path, "<u2"), np.cumsum(sizes)[:-1])]


def expected(tokenizer, texts):
    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eos = backend.token_to_id("<|endoftext|>")
    return [[*backend.encode(text, add_special_tokens=False).ids, eos] for text in texts]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".bin", ".idx", ".json")}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_documents_in_their_order_and_their_tokenizer(tmp_path, texts, capsys, num_workers):
    if num_workers > 1:
        texts.insert(0, "x")
        (tmp_path / "-.jsonl").write_text('{"text": "x"}')  # not cut: a file is a part at least
    (tmp_path / "held").mkdir()
    (tmp_path / "held/a.jsonl").write_text(json.dumps({"text": "held out"}))
    more = ("--num-workers", f"{num_workers}", f"data.validation_files=[{tmp_path}/held/*]")
    assert cli.main(arguments(tmp_path, *more)) == 0
    out = tmp_path / "out"
    assert tokens_of(out / "tok-train.bin") == expected(out / "tok-tokenizer", texts)
    assert tokens_of(out / "tok-validation.bin") == expected(out / "tok-tokenizer", ["held out"])
    about = json.loads((out / "tok-train.json").read_text())
    tokens = os.path.getsize(out / "tok-train.bin") // 2
    assert about["documents"] == len(texts) and about["tokens"] == tokens and about["skipped_documents"] == 0
    assert about["tokenizer"] == load_tokenizer(out / "tok-tokenizer").fingerprint
    assert len(list(out.iterdir())) == 7, "nothing else is left"
    assert f"{len(texts)} documents, {tokens:,} tokens" in capsys.readouterr().err
    before = contents(out)
    assert cli.main(arguments(tmp_path, *more)) == 0
    assert "made of these documents already" in capsys.readouterr().err and contents(out) == before


def test_several_sources(tmp_path, texts):
    (tmp_path / "b.txt").write_text("a document of its own")
    files = [
        *("data.sources.web.format=json", f"data.sources.web.train_files=[{tmp_path}/*.jsonl]"),
        *("data.sources.book.format=text", f"data.sources.book.train_files=[{tmp_path}/b.txt]"),
    ]
    out = tmp_path / "tok"
    assert cli.main(["tokenize", *files, "model.vocab_size=300", f"output={out}", "--num-workers", "1"]) == 0
    tokenizer = tmp_path / "tok-tokenizer"
    assert tokens_of(tmp_path / "tok-web-train.bin") == expected(tokenizer, texts)
    assert tokens_of(tmp_path / "tok-book-train.bin") == expected(tokenizer, ["a document of its own"])


def test_killed_anywhere_it_goes_on_with_what_is_finished(tmp_path, texts, monkeypatch, capsys):
    assert cli.main(arguments(tmp_path, output="whole/tok")) == 0
    written = []
    for kill_at in (0, 31, 120, 299, 300):  # documents that are written before; 300 are all, and the merge begins
        process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path, kill_at))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not list((tmp_path / "out").glob("*.json")), "not finished"
    with monkeypatch.context() as patch:
        encode = tokenize._Work.encode
        patch.setattr(tokenize._Work, "encode", lambda self, *part: written.append(part) or encode(self, *part))
        capsys.readouterr()
        assert cli.main(arguments(tmp_path)) == 0
    assert len(written) == 0 and "parts are there already" in capsys.readouterr().err
    whole, out = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert out.pop("tok-train.json") and whole.pop("tok-train.json") and out == whole
    assert not list((tmp_path / "out").glob("*parts*"))


def killed(folder, kill_at):
    """The command, which is killed by itself after that many of the documents that were not written before."""
    add, count = TokenWriter.add, 0

    def counted(self, pieces):
        nonlocal count
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        add(self, pieces)

    def merge(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    TokenWriter.add, tokenize.merge = counted, merge
    cli.main(arguments(folder))


def test_a_run_on_the_tokens_is_the_run_on_the_text(tmp_path, texts):
    assert cli.main(arguments(tmp_path)) == 0
    run = [*arguments(tmp_path)[1:4], f"data.tokenizer={tmp_path}/out/tok-tokenizer"]
    run += [f"model.{key}={value}" for key, value in {**MODEL, "vocab_size": 300}.items()]
    run += [
        "device=cpu",
        "cache_dir=null",
        "data.sequence_length=61",
        "data.num_streams=1",
        "data.num_workers=0",
        "recipe.steps=3",
    ]
    run += ["recipe.warmup_steps=0", "recipe.decay_steps=0", "recipe.eval_interval=0"]
    run += ["recipe.global_batch_size=2", "recipe.micro_batch_size=1"]
    tokens = (f"data.train_files=[{tmp_path}/out/tok-train.bin]", "data.format=megatron")
    # One file of text, for the order of several is drawn.
    joined = tmp_path / "all.json"
    joined.write_text((tmp_path / "0.jsonl").read_text() + (tmp_path / "1.jsonl").read_text())
    losses = []
    for name, more in (("text", (f"data.train_files=[{joined}]",)), ("tokens", tokens)):
        done = minimax_train(tmp_path, *run, f"run_dir={tmp_path}/{name}", *more)
        assert done.status == 0, done.err
        records = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(record)["loss"] for record in records])
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_what_is_refused(tmp_path, texts, capsys):
    assert "output='': must name where the files go" in refused(capsys, *arguments(tmp_path)[:-1])
    assert "ouput=x: there is no key" in refused(capsys, *arguments(tmp_path)[:-1], "ouput=x")
    assert "--num-workers='0': must be between 1" in refused(capsys, *arguments(tmp_path, "--num-workers", "0"))
    assert "data.train_files=['/no']: matches no file" in refused(
        capsys, *arguments(tmp_path, "data.train_files=[/no]")
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tok-train.idx").write_text("something")
    error = refused(capsys, *arguments(tmp_path))
    assert f"{tmp_path}/out/tok-train.idx' is there already, and was not made of this" in error
    assert (tmp_path / "out/tok-train.idx").read_text() == "something"
    assert cli.main(arguments(tmp_path, output="tok")) == 0
    error = refused(capsys, *arguments(tmp_path, "data.tokenizer_documents=9", output="tok"))
    assert f"{tmp_path}/tok-train.bin' is there already" in error
    made = (f"data.train_files=[{tmp_path}/tok-train.bin]", "data.format=megatron", "data.tokenizer=x")
    assert "tok-train.bin']=" in refused(capsys, *arguments(tmp_path, *made, output="again"))


def test_unfinished_work_on_other_documents_is_not_mixed_in(tmp_path, texts, capsys):
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path, 100))
    process.start()
    process.join(60)
    with open(tmp_path / "1.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    assert f"{tmp_path}/out/tok-parts' is unfinished work on other documents" in refused(capsys, *arguments(tmp_path))


def test_bad_documents_are_named_or_counted(tmp_path, texts, capsys):
    with open(tmp_path / "1.jsonl", "a") as file:
        file.write("{\n")
    assert "1.jsonl', line 151: must be one JSON object" in refused(capsys, *arguments(tmp_path))
    assert "is unfinished work" in refused(capsys, *arguments(tmp_path, "data.bad_documents=skip"))
    assert cli.main(arguments(tmp_path, "data.bad_documents=skip", output="tok")) == 0
    told = capsys.readouterr().err
    assert "300 documents" in told and "1 passed over" in told and "1.jsonl', line 151" in told


def test_no_documents(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n")
    assert "holds no document" in refused(capsys, *arguments(tmp_path))


def test_a_full_disk_is_told_with_the_output(tmp_path, texts, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenWriter, "finish", full)
    assert cli.main(arguments(tmp_path)) == 1
    assert f"error: output='{tmp_path}/out/tok': cannot be written: [Errno 28] No space" in capsys.readouterr().err
