"""What users' files hold that they should not, and data that changed under a saved position: through the command."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import random
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimax_train.data import DataConfig, build_train_loader, streams, tokenizer
from minimax_train.data.readers import BadDocument
from minimax_train.data.sources import TRAIN, open_source
from minimax_train.data.tokenizer import Tokenizer, train_bpe
from support.data import WordTokenizer, next_micro_batches, rows_of
from support.runs import MODEL

SENTENCE = "the router sends every token to two experts and the gate weighs what comes back"
NOT_UTF8 = b'{"text": "caf\xe9 au lait"}'


def line(**columns):
    return json.dumps(columns).encode()


def write(path, *lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def train(folder, *more, timeout=120):
    """``minimax-train`` on ``folder/*.jsonl``; its exit status, output and error."""
    arguments = [
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        *("device=cpu", "cache_dir=null", "data=files", "data.format=json", f"data.train_files=[{folder}/*.jsonl]"),
        *("data.sequence_length=64", "data.num_streams=1", "data.num_workers=0"),
        *("recipe.global_batch_size=1", "recipe.micro_batch_size=1"),
        *("recipe.steps=2", "recipe.warmup_steps=0", "recipe.decay_steps=0", "recipe.eval_interval=0"),
        *(f"run_dir={folder}/run", *more),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minimax_train", *arguments]
    done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


def refused(folder, *more):
    """The one line of error of a run that must not begin; that a checkpoint has no manifest is told before it."""
    status, _, error = train(folder, *more)
    error = "".join(line for line in error.splitlines(keepends=True) if "has no manifest.json" not in line)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def config_of(*files, file_format="json", **options):
    files = [str(file) for file in files]
    return DataConfig(source="files", format=file_format, train_files=files, num_workers=0, **options)


def opened(config):
    return open_source(config, TRAIN, path="data", bad_documents=config.bad_documents)


def loader_of(config, **options):
    settings = {"dp_rank": 0, "dp_size": 1, "seed": 7}
    loader = build_train_loader(config, WordTokenizer(), **settings | options)
    loader.open()
    return loader


def take(loader, count, length):
    return rows_of(next_micro_batches(loader, 1, count, length=length))


def test_a_bad_line_ends_a_run_and_is_named(tmp_path):
    lines = [line(text=f"{SENTENCE} {i}") for i in range(40)]
    lines[6] = NOT_UTF8
    write(tmp_path / "a.jsonl", *lines)
    error = refused(tmp_path)
    assert f"data.train_files=['{tmp_path}/*.jsonl']: '{tmp_path}/a.jsonl', line 7: byte 14" in error
    assert "0xe9, is not UTF-8; data.bad_documents=skip" in error


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """A word of 500,000 letters, a line of 30 MB, other columns that change their type, texts that look like dates, bad
    lines: a run over all of them, and what it said."""
    folder = tmp_path_factory.mktemp("odd")
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=500_000)
    write(
        folder / "a.jsonl",
        NOT_UTF8,
        line(text=f"{SENTENCE} " * 50, id=0, pad="x" * 100_000),
        line(text="".join(letters), id=1),
        line(text=f"{SENTENCE} " * (30_000_000 // len(SENTENCE)), id="two"),
        *(line(text=f"2024-05-{day:02d}T10:00:00", id={"number": [day]}) for day in range(1, 29)),
        b'{"id": ' + b"9" * 5000 + b', "text": "a number of 5,000 digits"}',
    )
    started = time.monotonic()
    status, output, error = train(folder, "data.bad_documents=skip", "data.shuffle_documents=1")
    assert status == 0, error
    assert time.monotonic() - started < 90
    return folder, output


def test_a_run_over_odd_data_counts_what_it_passes_over(odd_run):
    folder, output = odd_run
    assert f"passed over: '{folder}/a.jsonl', line 1: byte 14" in output
    records = [json.loads(record) for record in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["skipped_documents"] for record in records] == [1, 1]


def test_data_that_changed_under_a_saved_position(odd_run):
    folder, _ = odd_run
    path, more = folder / "a.jsonl", ("recipe.steps=4", "checkpoint.resume=auto", "data.bad_documents=skip")
    more = (*more, "data.shuffle_documents=1")
    shorter = line(text=SENTENCE, id=0, pad="x" * (100_000 + 49 * (len(SENTENCE) + 1) + 1))
    lines = path.read_bytes().split(b"\n")
    assert len(shorter) == len(lines[1])
    path.write_bytes(b"\n".join([lines[0], shorter, *lines[2:]]))
    assert f"'{path}': not file number 1 of the saved data position" in refused(folder, *more)
    # What a version saved that knew names and sizes alone: it went round for ever behind the document's end.
    progress = next(folder.glob("run/checkpoints/*/progress.json"))
    progress.with_name("manifest.json").unlink()  # nor had it one
    saved = json.loads(progress.read_text())
    del saved["data"]["shards"]
    for name, stream in saved["data"]["streams"].items():
        assert [drawn[:2] for drawn in stream["drawn"]] == [["files", 128]]
        position = stream["positions"]["files"]
        old = {key: position[key] for key in ("epoch", "shard", "row", "index", "block", "taken")}
        saved["data"]["streams"][name] = {**old, "offset": 128}
    progress.write_text(json.dumps(saved))
    assert f"'{path}', row 2: the data changed: the saved position is 128 tokens into it" in refused(folder, *more)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (NOT_UTF8, "line 2: byte 14 of the line, 0xe9, is not UTF-8"),
        (b'{"text": "cut', "line 2: must be one JSON object: Unterminated string"),
        (b"7", "line 2: must be one JSON object, not a number"),
        (b"[" * 100_000, "line 2: must be one JSON object: nested too deeply"),
        (line(body="b"), "line 2: has no data.text_column='text'; columns are body"),
        (line(text=7), "line 2: data.text_column='text' holds a number, must hold text"),
        (line(text={"a": 1}), "line 2: data.text_column='text' holds an object, must hold text"),
        (line(text="\ud83d"), "line 2: holds half a surrogate pair"),
    ],
)
def test_bad_lines(tmp_path, bad, reason):
    path = write(tmp_path / "a.jsonl", line(text="a"), bad, b"", line(text="b"))
    with pytest.raises(ValueError, match=r"a.jsonl'") as caught:
        list(opened(config_of(path)).documents())
    assert reason in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "as a worker process would send it"
    source = pickle.loads(pickle.dumps(opened(config_of(path, bad_documents="skip"))))
    assert list(source.documents()) == ["a", "b"]
    rows = list(source.read(0))
    assert [document.row for document in rows] == [0, 1, 2] and isinstance(rows[1].content, BadDocument)


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\n \n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_good_lines(tmp_path, separator, start):
    lines = [json.dumps({"text": text}) for text in ("a", "b\n", "\U0001f600")]
    (tmp_path / "a.jsonl").write_bytes((start + separator.join(lines)).encode())
    assert list(opened(config_of(tmp_path / "a.jsonl")).documents()) == ["a", "b\n", "\U0001f600"]


def test_one_json_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, "b", {"text": None}, {"text": "c", "other": 1}], indent=2))
    source = opened(config_of(path))
    assert [(row, text) for row, _, text in source.read(0)] == [(0, "a"), (1, "b"), (3, "c")]
    assert [(row, text) for row, _, text in source.read(0, 2)] == [(3, "c")]
    path.write_bytes(b'[{"text": "a"},\n{"text": "\xff"}]')
    with pytest.raises(ValueError, match=r"a.json'.*line 2: byte 0xff is not UTF-8"):
        list(opened(config_of(path)).documents())


def test_a_hub_data_sets_other_columns_do_not_matter(tmp_path):
    write(tmp_path / "train-0.jsonl", line(text="2024-05-01", meta=1))
    write(tmp_path / "train-1.jsonl", line(text="2024-05-02", meta={"a": []}), NOT_UTF8)
    source = opened(DataConfig(source="hub", name=str(tmp_path), bad_documents="skip"))
    assert list(source.documents()) == ["2024-05-01", "2024-05-02"]


def test_a_row_of_parquet_that_is_not_utf8(tmp_path):
    texts = pa.array([b"a", b"caf\xe9", b"b"]).view(pa.string())
    pq.write_table(pa.table({"text": texts.dictionary_encode()}), tmp_path / "a.parquet")
    config = config_of(tmp_path / "a.parquet", file_format="parquet")
    with pytest.raises(ValueError, match=r"a.parquet', row 2: not UTF-8"):
        list(opened(config).documents())
    config.bad_documents = "skip"
    assert list(opened(config).documents()) == ["a", "b"]


@pytest.mark.parametrize("length", [0, 1, 5000, -1])
@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_that_is_cut_short(tmp_path, kind, length):
    content = b"\n".join(line(text=random.Random(i).random().hex()) for i in range(1000))
    functions = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    compress = functions.get(kind) or (lambda content: pa.Codec("zstd").compress(content, asbytes=True))
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(compress(content)[:length])
    with pytest.raises(ValueError, match=rf"data.train_files=.*: cannot read '.*a.jsonl.{kind}'.*: \w+: ."):
        list(opened(config_of(path, bad_documents="skip")).documents())


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("damage", ["truncated", "garbled", "empty"])
def test_an_arrow_file_that_is_corrupt(tmp_path, kind, damage):
    table = pa.table({"text": [f"{i}" for i in range(3000)]})
    path = tmp_path / "a.arrow"
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    content = path.read_bytes()
    garbled = content[:30] + b"\x07" * 300 + content[330:]
    path.write_bytes({"truncated": content[:5000], "garbled": garbled, "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"data.train_files=.*a.arrow'"):
        list(opened(config_of(path, file_format="arrow")).documents())


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a.jsonl' must be a file on disk"):
        opened(config_of(tmp_path / "a.jsonl"))


def test_a_wrong_column_is_not_a_million_bad_documents(tmp_path):
    path = write(tmp_path / "a.jsonl", *[line(body="a")] * 1500)
    with pytest.raises(ValueError, match=r"the first 1000 documents are bad.*columns are body"):
        list(opened(config_of(path, bad_documents="skip")).documents())


@pytest.mark.parametrize("num_files", [1, 4])
def test_each_bad_document_counts_once_and_again_in_the_next_epoch(tmp_path, num_files):
    for i in range(num_files):
        good = [line(text=f"{10 * i + 100 * j} 1") for j in range(12)]
        write(tmp_path / f"{i}.jsonl", *good[:5], b"bad", *good[5:])
    config = config_of(tmp_path / "*.jsonl", bad_documents="skip", num_streams=4, shuffle_documents=4)
    ranks = [loader_of(config, dp_rank=rank, dp_size=2) for rank in range(2)]
    sequences = 12 * num_files // 4 * 3  # of each stream, as long as a document: three epochs
    for rank in ranks:
        next_micro_batches(rank, 1, 2 * sequences, length=3, dp_size=2)
    assert sum(rank.skipped for rank in ranks) == 3 * num_files
    again = loader_of(config)
    notes = [note for rank in ranks for note in rank.take_notes()]
    assert len(notes) == 3 * num_files and all("passed over: " in note and "line 6: must be" in note for note in notes)
    again.load_state_dict(
        {**ranks[0].state_dict(), "streams": {k: v for r in ranks for k, v in r.state_dict()["streams"].items()}}
    )
    take(again, 4, 3)
    assert again.skipped in (3 * num_files, 4 * num_files)


def test_one_token_documents_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", *[line(text="7")] * 50)
    with pytest.raises(ValueError, match=r"data.train_files=.*no document .* longer than one token"):
        loader_of(config_of(tmp_path / "a.jsonl", num_streams=1))


@pytest.mark.parametrize(("num_files", "told"), [(1, "at most 9 streams"), (12, "its files hold none")])
def test_too_many_streams_are_noticed_before_anything_is_packed(tmp_path, num_files, told):
    for i in range(num_files):
        write(tmp_path / f"{i:02d}.jsonl", *[line(text="1 2 3")] * (9 if num_files == 1 else i != 11))
    with pytest.raises(ValueError, match=rf"data.num_streams=12: stream 11 got none of the \d+ documents.*{told}"):
        loader_of(config_of(tmp_path / "*.jsonl", num_streams=12))


@pytest.mark.parametrize("num_streams", [2, 5])
def test_files_added_at_the_end_are_read_from_the_next_epoch_on(tmp_path, num_streams):
    """Also where there were fewer files than streams before, and are not any more."""
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", *(line(text=f"{100 * i + j} 1") for j in range(20)))
    config = config_of(tmp_path / "*.jsonl", num_streams=num_streams, shuffle_documents=4)
    loader, epoch = loader_of(config), 60 // num_streams * num_streams
    before = take(loader, 2 * num_streams, 3)
    state = json.loads(json.dumps(loader.state_dict()))
    first_epoch = take(loader, epoch - 2 * num_streams, 3)
    for i in range(3, 9):
        write(tmp_path / f"{i}.jsonl", *(line(text=f"{100 * i + j} 1") for j in range(20)))
    resumed = loader_of(config)
    resumed.load_state_dict(state)
    (note,) = resumed.take_notes()
    assert "6 added after the 3 files" in note and "3.jsonl" in note
    if num_streams == 5:  # every stream holds 12 documents of the first epoch
        assert take(resumed, len(first_epoch), 3) == first_epoch
    rest = take(resumed, 18 * 20 * 2 // num_streams * num_streams, 3)
    assert {tokens[0] // 100 for tokens, _, _ in before + first_epoch} == {0, 1, 2}
    assert {tokens[0] // 100 for tokens, _, _ in rest} == set(range(9))


def changed(tmp_path, change):
    """Two files of which a position was saved in the first; then one is changed. Sizes, heads and tails stay."""
    paths = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    for path in paths:
        write(path, *(line(text=f"{1000 + i} 2", pad="x" * 500) for i in range(1000)))
    config = config_of(tmp_path / "*.jsonl", num_streams=2, shuffle_documents=4)
    loader = loader_of(config)
    take(loader, 600, 3)
    state = loader.state_dict()
    change(paths)
    resumed = loader_of(config)
    resumed.load_state_dict(state)
    return resumed


def test_a_change_at_the_saved_position_alone(tmp_path):
    def change(paths):
        paths[0].write_bytes(paths[0].read_bytes().replace(b"1298 2", b"1298 3"))

    resumed = changed(tmp_path, change)
    with pytest.raises(ValueError, match=r"the data changed: .* follow row 296 of '.*0.jsonl'"):
        take(resumed, 2, 3)


@pytest.mark.parametrize("place", [10, -9])
def test_a_change_of_size_head_or_tail_names_the_file(tmp_path, place):
    def change(paths):
        content = bytearray(paths[1].read_bytes())
        content[place] += 1
        paths[1].write_bytes(content)

    with pytest.raises(ValueError, match=r"1.jsonl': not file number 2 of the saved data position"):
        changed(tmp_path, change)


def test_fewer_files_and_other_settings_than_the_saved_positions(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", line(text="1 2 3", body="4 5 6"))
    state = loader_of(config_of(tmp_path / "*.jsonl", num_streams=1)).state_dict()
    with pytest.raises(ValueError, match="the saved data position is for 3, and here are 2"):
        loader_of(config_of(tmp_path / "[01].jsonl", num_streams=1)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data.text_column='body': the saved data position is for 'text'"):
        loader_of(config_of(tmp_path / "*.jsonl", num_streams=1, text_column="body")).load_state_dict(state)
    with pytest.raises(ValueError, match="data position lacks identity, next_row, streams"):
        loader_of(config_of(tmp_path / "*.jsonl", num_streams=1)).load_state_dict({})


def test_long_documents_in_pieces_have_the_same_tokens(monkeypatch):
    for name, value in {"LONG_DOCUMENT": 20_000, "_PIECE": 5000, "_SEARCHED": 100, "_PIECES_TOGETHER": 3}.items():
        monkeypatch.setattr(tokenizer, name, value)
    corpus = [f"{SENTENCE}, {i}.\n\n  if x == {i}:\n\tprint('é☃')  # {i}\n" for i in range(300)]
    bpe = Tokenizer(train_bpe(corpus, 500), 0)
    text = "".join(corpus) * 5
    pieces = list(bpe.encode_in_pieces(text))
    assert len(pieces) > 5
    assert [token for piece in pieces for token in piece.tolist()] == bpe.encode_document(text).tolist()
    word = "ab" * 20_000
    assert bpe.decode([token for piece in bpe.encode_in_pieces(word) for token in piece.tolist()]) == word


def test_blocks_of_long_documents_are_read_as_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_BLOCK_CHARACTERS", 100)
    write(tmp_path / "a.jsonl", *(line(text=f"{i} " * 30) for i in range(1, 21)))
    config = config_of(tmp_path / "a.jsonl", num_streams=1)
    loader = loader_of(config)
    rows = take(loader, 20, 31)
    assert sorted(tokens[0] for tokens, _, _ in rows) == list(range(1, 21))
    again = loader_of(config)
    take(again, 7, 31)
    state = again.state_dict()
    assert state["streams"]["0"]["positions"]["files"]["block"] > 0
    again.load_state_dict(state)
    assert take(again, 13, 31) == rows[7:]


def test_the_cost_of_a_file_does_not_grow_with_their_number(tmp_path):
    def seconds_per_file(count):
        folder = tmp_path / str(count)
        folder.mkdir(exist_ok=True)
        for i in range(count):
            write(folder / f"{i:05d}.jsonl", line(text=SENTENCE))
        started = time.process_time()
        source = opened(config_of(folder / "*.jsonl"))
        assert sum(1 for _ in source.documents()) == count
        source.digests()
        return (time.process_time() - started) / count

    seconds_per_file(100)  # imports and caches
    assert seconds_per_file(2000) < 4 * seconds_per_file(100)
