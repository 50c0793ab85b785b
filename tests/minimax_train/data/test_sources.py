"""What is read from files and data sets, and what is said when it cannot be."""

import json
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimax_train.data import DataConfig, build_train_loader, build_validation_sequences, readers
from minimax_train.data.files import is_held_out, stdlib_files
from minimax_train.data.sources import TRAIN, VALIDATION, open_source
from support.data import WordTokenizer, next_micro_batches, write_shards


def files_config(*patterns, file_format="text", **options):
    files = [str(p) for p in patterns]
    return DataConfig(source="files", format=file_format, train_files=files, **{"num_workers": 0} | options)


def read(config, split=TRAIN):
    return list(open_source(config, split).documents())


def first_rows(config):
    loader = build_train_loader(config, WordTokenizer(), dp_rank=0, dp_size=1, seed=0)
    return next_micro_batches(loader, 1, 1, length=config.sequence_length, source=config.source)


@pytest.mark.parametrize("file_format", ["text", "json", "parquet"])
def test_documents_come_back_in_order(tmp_path, file_format):
    shards = [["one\ntwo\n", "dréi"], ["fünf"] * 7]
    pattern = write_shards(tmp_path, file_format, shards)
    assert read(files_config(pattern, file_format=file_format)) == [text for shard in shards for text in shard]


@pytest.mark.parametrize("file_format", ["json", "parquet"])
def test_reading_from_any_row(tmp_path, file_format, monkeypatch):
    monkeypatch.setattr(readers, "_ROWS_PER_READ", 4)
    texts = [f"document {i}" if i % 5 else "" for i in range(23)]
    source = open_source(files_config(write_shards(tmp_path, file_format, [texts]), file_format=file_format), TRAIN)
    for start in range(24):
        read = [(row, text) for row, _, text in source.read(0, start)]
        assert read == [(i, t) for i, t in enumerate(texts) if t and i >= start]


@pytest.mark.parametrize("file_format", ["text", "json", "parquet"])
def test_local_files_need_no_network(tmp_path, file_format, monkeypatch):
    attempts = []

    def connect(*address, **options):
        attempts.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr("datasets.load.get_session", connect)
    assert read(files_config(write_shards(tmp_path, file_format, [["a"]]), file_format=file_format)) == ["a"]
    assert attempts == []


def test_null_and_empty_texts_are_passed_over(tmp_path):
    lines = [{"text": "a"}, {"text": None}, {"text": ""}, {"text": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(files_config(tmp_path / "a.jsonl", file_format="json")) == ["a", "b"]


def test_paths_may_hold_any_character_and_hidden_folders(tmp_path):
    for folder in ("a[1]", ".hidden"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x*?.txt").write_text(folder)
    assert read(files_config(tmp_path / "a[1]" / "x*?.txt", tmp_path / ".hidden/*.txt")) == ["a[1]", ".hidden"]


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert read(files_config(tmp_path / "a.txt", tmp_path / "*.txt")) == ["a"]


def test_bytes_that_are_not_utf8_do_not_stop_a_run(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert read(files_config(tmp_path / "a.txt")) == ["caf\ufffd"]


def test_a_glob_that_matches_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"data.train_files=\['.*nothing.*'\]: matches no file"):
        read(files_config(tmp_path / "nothing*.txt"))
    with pytest.raises(ValueError, match=r"data.validation_files=\['/no/file'\]: matches no file"):
        read(files_config(tmp_path / "x", validation_files=["/no/file"]), VALIDATION)


def test_an_unreadable_file(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"data.train_files: cannot read '.*a.txt'"):
        read(files_config(tmp_path / "*.txt"))


def test_a_missing_column(tmp_path):
    for file_format in ("json", "parquet"):
        pattern = write_shards(tmp_path / file_format, file_format, [["a"]])
        config = files_config(pattern, file_format=file_format, text_column="txt")
        with pytest.raises(ValueError, match=r"data.text_column='txt'.*; columns are text, number"):
            read(config)
        config = files_config(pattern, file_format=file_format, text_column="number")
        with pytest.raises(ValueError, match=r"data.text_column='number'.* holds .*, must hold text"):
            first_rows(config)


def test_a_corrupt_second_json_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "1"}\n{"text": "2\n')
    config = files_config(tmp_path / "*.jsonl", file_format="json", num_streams=1)
    with pytest.raises(ValueError, match=r"data.train_files=\[.*\]: '.*b.jsonl', line 2: must be one JSON object"):
        first_rows(config)


@pytest.mark.parametrize("damage", ["truncated", "garbled"])
@pytest.mark.parametrize("position", [0, 1])
def test_a_corrupt_parquet_file_is_named(tmp_path, damage, position):
    for i in range(2):
        pq.write_table(pa.table({"text": [str(j) for j in range(3000)]}), tmp_path / f"{i}.parquet")
    path = tmp_path / f"{position}.parquet"
    content = bytearray(path.read_bytes())
    content[60:1500] = b"\x07" * 1440
    path.write_bytes(content[:2000] if damage == "truncated" else content)
    with pytest.raises(ValueError, match=rf"data.train_files=\[.*{position}.parquet'"):
        read(files_config(tmp_path / "*.parquet", file_format="parquet"))


@pytest.mark.parametrize("file_format", ["text", "json", "parquet"])
def test_an_empty_data_set(tmp_path, file_format):
    pattern = write_shards(tmp_path, file_format, [[""]])
    if file_format == "json":
        (tmp_path / "0000.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"data.train_files=\[.*\].*: holds no document"):
        first_rows(files_config(pattern, file_format=file_format, num_streams=1))


def test_too_many_streams_for_the_documents(tmp_path):
    pattern = write_shards(tmp_path, "json", [["1", "2", "3"]])
    with pytest.raises(ValueError, match=r"data.num_streams=4: stream 3 got none of the 3 documents"):
        config = files_config(pattern, file_format="json", num_streams=4, sequence_length=2)
        loader = build_train_loader(config, WordTokenizer(), dp_rank=0, dp_size=1, seed=0)
        next_micro_batches(loader, 1, 4, length=config.sequence_length)


def test_a_data_set_by_name(tmp_path):
    """A folder stands for a hub data set: the loader is the same."""
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        for i in range(2):
            name = f"{split}-{i:05d}-of-00002.parquet"
            pq.write_table(pa.table({"body": [f"{split} {i}"], "n": [1]}), tmp_path / "data" / name)
    config = DataConfig(source="hub", name=str(tmp_path), text_column="body", validation_split="test")
    assert read(config) == ["train 0", "train 1"]
    assert read(config, VALIDATION) == ["test 0", "test 1"]
    config.train_split = "nope"
    with pytest.raises(ValueError, match=r"data.name='.*' .*split 'nope'.*: cannot be opened.*nope"):
        read(config)
    config.train_split, config.text_column = "train", "text"
    with pytest.raises(ValueError, match=r"data.text_column='text': not in .*; columns are body, n"):
        read(config)


def test_a_data_set_that_does_not_exist(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"data.name='no/such'.*cannot be opened"):
        read(DataConfig(source="hub", name="no/such"))


def test_evaluation_needs_held_out_documents(tmp_path):
    (tmp_path / "a.txt").write_text("1")
    with pytest.raises(ValueError, match=r"data.validation_files=\[\]: evaluation needs"):
        build_validation_sequences(
            files_config(tmp_path / "a.txt"), WordTokenizer(), num_sequences=1, sequence_length=8, dp_rank=0, dp_size=1
        )
    with pytest.raises(ValueError, match=r"data.validation_split=None"):
        open_source(DataConfig(source="hub", name="x"), VALIDATION)


def test_the_standard_library_is_split_by_file_and_the_split_is_stable():
    train, held_out = stdlib_files(held_out=False), stdlib_files(held_out=True)
    assert train == stdlib_files(held_out=False) == sorted(train)
    assert not set(train) & set(held_out)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.09
    assert not [path for path in train + held_out if "/site-packages/" in path or "/test/" in path]
    assert any(path.endswith("/asyncio/events.py") for path in train + held_out)
    # By the path alone: these never move between the parts, whichever Python or process asks.
    assert all(map(is_held_out, ("codecs.py", "gettext.py", "xml/etree/__init__.py")))
    assert not any(map(is_held_out, ("argparse.py", "asyncio/events.py", "os.py")))


def test_the_standard_library_is_read_as_one_document_per_file():
    source = open_source(DataConfig(), VALIDATION)
    texts = dict(zip(source.shards, source.documents(), strict=True))
    for path in list(texts)[:5]:
        with open(path, encoding="utf-8", errors="replace") as file:
            assert texts[path] == file.read()
