"""Token files in Megatron-Core's layout, written here by hand, and what is wrong with them."""

import json
import random
import struct
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from minimax_train.data import DataConfig
from minimax_train.data.sources import TRAIN, open_sources
from minimax_train.data.token_files import TokenWriter, merge
from minimax_train.data.tokenizer import Tokenizer, train_bpe

EOS, VOCABULARY = 0, 400
CODES = {"<u2": 8, "<i4": 4, "<i8": 5}


class Ids:
    """What a source of tokens asks of a tokenizer."""

    eos_id, vocab_size, fingerprint = EOS, VOCABULARY, "mine"


def joined(sequences):
    return list(chain.from_iterable(sequences))


def layout(documents, dtype="<u2"):
    """Both files of documents, which are lists of sequences, which are lists of ids."""
    sequences = [sequence for document in documents for sequence in document]
    itemsize, at, first = np.dtype(dtype).itemsize, 0, 0
    sizes, pointers, indices = b"", b"", struct.pack("<q", 0)
    for sequence in sequences:
        sizes += struct.pack("<i", len(sequence))
        pointers += struct.pack("<q", at)
        at += len(sequence) * itemsize
    for document in documents:
        first += len(document)
        indices += struct.pack("<q", first)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(documents) + 1)
    return np.array(joined(sequences), dtype).tobytes(), header + sizes + pointers + indices


def write(folder, documents, dtype="<u2", name="a"):
    tokens, index = layout(documents, dtype)
    (folder / f"{name}.bin").write_bytes(tokens)
    (folder / f"{name}.idx").write_bytes(index)
    return folder / f"{name}.bin"


def random_documents(count, seed=0):
    rng = random.Random(seed)
    sizes = [[rng.choice([0, 1, 2, 50]) for _ in range(rng.choice([1, 1, 3]))] for _ in range(count)]
    return [[[rng.randrange(1, VOCABULARY) for _ in range(size)] for size in document] for document in sizes]


def opened(*files, tokenizer=Ids):
    config = DataConfig(source="files", format="megatron", train_files=[str(file) for file in files])
    return open_sources(config, TRAIN)["files"].with_tokenizer(tokenizer)


def read(source):
    return [
        (document.row, document.content.tolist())
        for shard in range(len(source.shards))
        for document in source.read(shard)
    ]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("together", [1, 70, 1 << 20])
def test_documents_come_back_with_their_end(tmp_path, monkeypatch, dtype, together):
    monkeypatch.setattr("minimax_train.data.token_files._TOGETHER", together)
    monkeypatch.setattr("minimax_train.data.token_files._DOCUMENTS_TOGETHER", 7)
    documents = random_documents(45)
    for document in documents[::2]:
        document[-1].append(EOS)  # others end without
    source = opened(write(tmp_path, documents, dtype))
    ended = [ids if ids and ids[-1] == EOS else [*ids, EOS] for ids in map(joined, documents)]
    assert source.is_tokens and read(source) == [(row, ids) for row, ids in enumerate(ended) if len(ids) > 1]
    assert all(document.content.dtype == np.int64 for document in source.read(0))
    for start in (1, 6, 7, 44, 45):
        assert [document.row for document in source.read(0, start)] == [
            row for row, ids in enumerate(ended) if len(ids) > 1 and row >= start
        ]


def test_streams_read_their_documents_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("minimax_train.data.sources._SMALLEST_ROWS", 1)
    files = [write(tmp_path, random_documents(23, seed), name=f"{seed}") for seed in range(2)]
    source = opened(*files)
    cut = source.split(5)
    assert len(cut.shards) == 10 and "1.bin (part 5 of 5)" in cut.shards[-1]
    assert [ids for _, ids in read(cut)] == [ids for _, ids in read(source)]
    assert opened(files[0]).split(24).shards == [str(files[0])], "fewer documents than streams"


@pytest.mark.parametrize("pattern", ["*.bin", "*.idx", "*.[bi]*"])
def test_either_file_names_the_pair(tmp_path, pattern):
    write(tmp_path, random_documents(3))
    assert opened(tmp_path / pattern).files == [str(tmp_path / "a.bin")]


def damaged(tmp_path, change):
    """The error of opening, or of reading, the pair after a change of its bytes."""
    tokens, index = (bytearray(content) for content in layout([[[1, 2, 3]], [[4, 5]], [[6]]]))
    tokens, index = change(tokens, index) or (tokens, index)
    for name, content in (("a.bin", tokens), ("a.idx", index)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"data.train_files.*a.(bin|idx)'") as caught:
        read(opened(tmp_path / ("a.bin" if tokens is not None else "a.idx")))
    return str(caught.value)


def at(place, value):
    def change(tokens, index):
        index[place : place + len(value)] = value

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tokens, index: (tokens, None), "has no 'a.idx' beside it"),
        (lambda tokens, index: (None, index), "has no 'a.bin' beside it"),
        (lambda tokens, index: (tokens[:-1], index), "has 11 bytes, and 'a.idx' is for 12"),
        (lambda tokens, index: (tokens + b"\0\0", index), "has 14 bytes, and 'a.idx' is for 12"),
        (lambda tokens, index: (tokens, index[:-8]), "'a.idx' has 94 bytes, must have 102 for 3 sequences and 3 doc"),
        (lambda tokens, index: (tokens, index[:20]), "'a.idx' is no index of Megatron-Core's"),
        (at(0, b"TNTIDX"), "'a.idx' is no index of Megatron-Core's: it must begin with MMIDIDX"),
        (at(9, b"\2"), "'a.idx' has version 2, must have 1"),
        (at(17, b"\7"), "'a.idx' holds numbers of type 7, must be integers"),
        (at(34 + 12 + 8, b"\4"), "the index is damaged: documents 1 to 3 are not one after the other"),
        (at(34, b"\2"), "the index is damaged"),
        (at(34 + 36 + 8, b"\xff"), "the index is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, change, told):
    assert told in damaged(tmp_path, change)


@pytest.mark.parametrize(("dtype", "wrong"), [("<u2", 400), ("<i4", 70_000), ("<i4", -1)])
def test_ids_outside_of_the_vocabulary(tmp_path, dtype, wrong):
    path = write(tmp_path, [[[1, 2]], [[]], [[3], [4, wrong, 5]], [[6]]], dtype)
    with pytest.raises(ValueError, match=rf"a.bin'.*document 3 holds the id {wrong}, the tokenizer's go up to 399"):
        read(opened(path))


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"data.train_files: '.*a.jsonl': must end in .bin or .idx"):
        opened(tmp_path / "a.jsonl")


def test_the_tokenizer_must_be_the_one_that_made_the_file(tmp_path):
    texts = ["one two three", "four five six"] * 20
    mine, other = (Tokenizer(train_bpe(documents, 280), 0) for documents in (texts, ["zzz yyy"] * 9))
    path = write(tmp_path, [[[1, 2]]])
    assert read(opened(path, tokenizer=mine)) == [(0, [1, 2, 0])], "nobody says which tokenizer made it"
    (tmp_path / "a.json").write_text(json.dumps({"tokenizer": mine.fingerprint, "vocab_size": mine.vocab_size}))
    assert read(opened(path, tokenizer=mine)) == [(0, [1, 2, 0])]
    with pytest.raises(ValueError, match=r"a.bin' was made with another tokenizer, of \d+ ids .*; data.tokenizer has"):
        opened(path, tokenizer=other)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read '.*a.bin': 'a.json' is damaged"):
        opened(path, tokenizer=mine)


@pytest.mark.parametrize("vocab_size", [VOCABULARY, 70_000])
def test_what_is_written_and_merged_has_the_layout(tmp_path, vocab_size):
    documents = [document for document in map(joined, random_documents(50)) if document]
    parts = []
    for i, part in enumerate((documents[:7], [], documents[7:])):
        writer = TokenWriter(str(tmp_path / f"part{i}.bin"), vocab_size)
        for ids in part:
            writer.add([np.array(ids[:3], dtype=np.int64), np.array(ids[3:], dtype=np.int64)])
        assert writer.finish() == sum(map(len, part))
        parts.append(str(tmp_path / f"part{i}.bin"))
    assert merge(parts, str(tmp_path / "all.bin")) == (len(documents), sum(map(len, documents)))
    tokens, index = layout([[ids] for ids in documents], "<u2" if vocab_size == VOCABULARY else "<i4")
    assert (tmp_path / "all.bin").read_bytes() == tokens
    assert (tmp_path / "all.idx").read_bytes() == index
    assert not list(tmp_path.glob("*.writing"))


def test_a_tokenizer_cannot_be_trained_on_tokens(tmp_path):
    from minimax_train.data import prepare_tokenizer

    path = write(tmp_path, [[[1, 2]]])
    config = DataConfig(source="files", format="megatron", train_files=[str(path)])
    with pytest.raises(ValueError, match=r"data.tokenizer='train': data.train_files=\['.*a.bin'\] holds tokens"):
        prepare_tokenizer(config, 300, tmp_path / "tokenizer")


def test_digests_tell_either_file_from_another(tmp_path):
    source = opened(write(tmp_path, [[[1, 2]], [[3, 4]]]))
    before = source.digests()
    write(tmp_path, [[[1, 2, 3]], [[4]]])
    assert replace(source).digests() != before, "the same tokens in other documents"
