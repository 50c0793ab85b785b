"""Byte-level BPE and named tokenizers."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_train.data import DataConfig, load_tokenizer, prepare_tokenizer
from minimax_train.data import tokenizer as tokenizer_module
from minimax_train.data.files import match_files
from minimax_train.data.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from support.data import write_shards

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "the quick brown fox jumps over the lazy dog\n" * 3,
    "naïve café ☃ 日本語",
]
CORPUS = [f"{text} {i} {i * i}" for i in range(40) for text in TEXTS]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    pattern = write_shards(tmp_path_factory.mktemp("corpus"), "json", [CORPUS[:60], CORPUS[60:]])
    return DataConfig(source="files", format="json", train_files=[pattern])


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "new"
    return prepare_tokenizer(corpus, 400, directory), directory


BPE = Tokenizer(train_bpe(CORPUS, 400), 0)


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    ids = BPE.encode_document(text)
    assert BPE.decode(ids) == text
    assert ids[-1] == BPE.eos_id and BPE.eos_id not in ids[:-1]
    assert ids.min() >= 0 and ids.max() < BPE.vocab_size


@given(st.lists(st.text(), max_size=9))
@settings(deadline=None)
def test_texts_together_as_one_by_one(texts):
    together = BPE.encode_documents(texts)
    assert [ids.tolist() for ids in together] == [BPE.encode_document(text).tolist() for text in texts]


def test_a_document_cannot_end_itself():
    text = f"before{END_OF_TEXT}after"
    ids = BPE.encode_document(text)
    assert list(ids).count(BPE.eos_id) == 1 and BPE.decode(ids) == text


def test_training_merges(trained):
    tokenizer, _ = trained
    assert tokenizer.vocab_size == 400
    assert len(tokenizer.encode_document(TEXTS[1])) < len(TEXTS[1]) / 2


def test_training_twice_gives_the_same_file(corpus, trained, tmp_path):
    """Also in another process, under another hash seed."""
    _, directory = trained
    script = f"""
        from minimax_train.data import DataConfig, prepare_tokenizer
        config = DataConfig(source="files", format="json", train_files={corpus.train_files!r})
        prepare_tokenizer(config, 400, {str(tmp_path)!r})
    """
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60, env=environment)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_tokenizer_documents_limits_what_is_read(corpus, tmp_path):
    few = DataConfig(**{**vars(corpus), "tokenizer_documents": 1})
    assert prepare_tokenizer(few, 400, tmp_path).vocab_size < 400


def test_transformers_opens_it_with_the_same_ids(trained):
    import transformers

    tokenizer, directory = trained
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_TEXT, tokenizer.eos_id)
    for text in (*TEXTS, "", "  two  spaces\t\r\n", "\U0001f600"):
        ids = tokenizer.encode_document(text)
        assert theirs(text)["input_ids"] == ids[:-1].tolist()
        assert theirs.decode(ids[:-1]) == text


def test_other_ranks_and_resumed_runs_load_the_same(trained, tmp_path):
    tokenizer, directory = trained
    again = load_tokenizer(directory)
    assert again.encode_document(TEXTS[0]).tolist() == tokenizer.encode_document(TEXTS[0]).tolist()
    # A resumed run reads no documents: these do not exist.
    gone = DataConfig(source="files", format="json", train_files=["/no/such.jsonl"])
    before = (directory / "tokenizer.json").stat().st_mtime_ns
    assert prepare_tokenizer(gone, 400, directory).vocab_size == 400
    assert (directory / "tokenizer.json").stat().st_mtime_ns == before


def test_a_named_tokenizer_is_loaded_and_saved(trained, tmp_path):
    tokenizer, directory = trained
    named = prepare_tokenizer(DataConfig(tokenizer=str(directory)), 400, tmp_path / "run")
    assert named.encode_document(TEXTS[0]).tolist() == tokenizer.encode_document(TEXTS[0]).tolist()
    assert load_tokenizer(tmp_path / "run").eos_id == tokenizer.eos_id
    assert not (tmp_path / "run" / ".draft").exists()


def test_a_vocabulary_that_does_not_fit(trained, tmp_path):
    _, directory = trained
    with pytest.raises(ValueError, match=r"model.vocab_size=399: data.tokenizer='.*' has 400 ids"):
        prepare_tokenizer(DataConfig(tokenizer=str(directory)), 399, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    with pytest.raises(ValueError, match=r"model.vocab_size=399: the tokenizer in '.*' has 400 ids"):
        prepare_tokenizer(DataConfig(), 399, directory)
    with pytest.raises(ValueError, match=r"model.vocab_size=256: a byte-level BPE needs at least 257"):
        prepare_tokenizer(DataConfig(tokenizer_documents=1), 256, tmp_path)


def test_a_tokenizer_without_end_of_text(trained, tmp_path):
    _, directory = trained
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"data.tokenizer='.*': has no end-of-text token"):
        prepare_tokenizer(DataConfig(tokenizer=str(tmp_path)), 400, tmp_path / "run")
    with pytest.raises(ValueError, match="has no end-of-text token"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_loaded(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data.tokenizer='.*empty': cannot be loaded") as caught:
        prepare_tokenizer(DataConfig(tokenizer=str(tmp_path / "empty")), 400, tmp_path / "run")
    assert caught.value.__cause__ is not None
    missing = str(tmp_path / "tokens/web-tokenzier")
    with pytest.raises(ValueError, match=r"web-tokenzier': no folder here, and .* hub it cannot be loaded"):
        prepare_tokenizer(DataConfig(tokenizer=missing), 400, tmp_path / "run")
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_tokenizer(tmp_path)


def test_truncation_saved_with_a_tokenizer_is_not_applied(trained, tmp_path):
    _, directory = trained
    content = json.loads((directory / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes((directory / "tokenizer_config.json").read_bytes())
    assert len(load_tokenizer(tmp_path).encode_document(TEXTS[1])) > 10


def files_of(directory):
    return {name: (directory / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


def test_a_tokenizer_trained_before_is_taken_from_the_cache(corpus, trained, tmp_path, capsys, monkeypatch):
    _, directory = trained
    prepare_tokenizer(corpus, 400, tmp_path / "first", tmp_path)
    assert capsys.readouterr().err == ""
    trains = []
    monkeypatch.setattr(tokenizer_module, "train_bpe", lambda *a: trains.append(a) or train_bpe(*a))
    prepare_tokenizer(corpus, 400, tmp_path / "second", tmp_path)
    assert not trains and "reusing the tokenizer" in capsys.readouterr().err
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second") == files_of(directory)
    (kept,) = (tmp_path / "tokenizers").glob("*.json")
    kept.write_bytes(kept.read_bytes()[:1000])
    prepare_tokenizer(corpus, 400, tmp_path / "third", tmp_path)
    assert len(trains) == 1 and files_of(tmp_path / "third") == files_of(directory)
    assert kept.read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_other_texts_or_another_vocabulary_are_trained_for(tmp_path, monkeypatch):
    """One letter in the middle of a long file counts, its size, ends and time of change being the same."""
    texts = [f"{text} {i}" for i in range(2000) for text in TEXTS]
    config = DataConfig(
        source="files",
        format="json",
        train_files=[write_shards(tmp_path, "json", [texts])],
        tokenizer_documents=6000,
    )
    trains = []
    monkeypatch.setattr(tokenizer_module, "train_bpe", lambda *a: trains.append(a) or train_bpe(*a))
    prepare_tokenizer(config, 300, tmp_path / "a", tmp_path)
    prepare_tokenizer(config, 301, tmp_path / "b", tmp_path)
    (file,) = match_files("data.train_files", config.train_files)
    before, content = os.stat(file), Path(file).read_bytes()
    assert len(content) > 200_000
    at = content.index(b"fox", len(content) // 2)
    Path(file).write_bytes(content[:at] + b"f" + content[at + 1 :].replace(b"ox", b"ax", 1))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    prepare_tokenizer(config, 300, tmp_path / "c", tmp_path)
    fewer = replace(config, tokenizer_documents=5999)
    prepare_tokenizer(fewer, 300, tmp_path / "d", tmp_path)
    assert len(trains) == 4
    prepare_tokenizer(fewer, 300, tmp_path / "e", tmp_path)
    assert len(trains) == 4


def test_a_cache_that_is_full_costs_only_the_cache(corpus, trained, tmp_path, capsys, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer_module, "replace_text", full)
    prepare_tokenizer(corpus, 400, tmp_path / "run", tmp_path)
    assert files_of(tmp_path / "run") == files_of(trained[1])
    assert "the tokenizer could not be kept for later runs: No space left on device" in capsys.readouterr().err
