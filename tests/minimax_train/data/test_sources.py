"""What is read from files and data sets, and what is said when it cannot be."""

import bz2
import gzip
import json
import lzma
import os
import random
import socket
import zipfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minimax_train.data import DataConfig, build_train_loader, build_validation_sequences, readers, sources, tables
from minimax_train.data.config import MixtureSourceConfig
from minimax_train.data.files import is_held_out, stdlib_files
from minimax_train.data.sources import TRAIN, VALIDATION, open_source
from support.data import WordTokenizer, next_micro_batches, write_shards


def files_config(*patterns, file_format="text", **options):
    files = [str(p) for p in patterns]
    return DataConfig(source="files", format=file_format, train_files=files, **{"num_workers": 0} | options)


def opened(config, split=TRAIN):
    return open_source(config, split, path="data", bad_documents=config.bad_documents)


def read(config, split=TRAIN):
    return list(opened(config, split).documents())


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
    monkeypatch.setattr(tables, "_ROWS_PER_READ", 4)
    texts = [f"document {i}" if i % 5 else "" for i in range(23)]
    source = opened(files_config(write_shards(tmp_path, file_format, [texts]), file_format=file_format))
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
        opened(DataConfig(source="hub", name="x"), VALIDATION)


def test_the_standard_library_is_split_by_file_and_the_split_is_stable():
    train, held_out = stdlib_files("data.source", held_out=False), stdlib_files("data.source", held_out=True)
    assert train == stdlib_files("data.source", held_out=False) == sorted(train)
    assert not set(train) & set(held_out)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.09
    assert not [path for path in train + held_out if "/site-packages/" in path or "/test/" in path]
    assert any(path.endswith("/asyncio/events.py") for path in train + held_out)
    # By the path alone: these never move between the parts, whichever Python or process asks.
    assert all(map(is_held_out, ("codecs.py", "gettext.py", "xml/etree/__init__.py")))
    assert not any(map(is_held_out, ("argparse.py", "asyncio/events.py", "os.py")))


def test_the_standard_library_is_read_as_one_document_per_file():
    source = opened(DataConfig(), VALIDATION)
    texts = dict(zip(source.shards, source.documents(), strict=True))
    for path in list(texts)[:5]:
        with open(path, encoding="utf-8", errors="replace") as file:
            assert texts[path] == file.read()


def compress(path, content, kind):
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            half = content.index(b"\n", len(content) // 2) + 1
            archive.writestr("a/c.jsonl", content[half:])
            archive.writestr("b.jsonl", content[:half])
            archive.writestr("__MACOSX/b.jsonl", b"no JSON")
        return
    functions = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    with open(path, "wb") as file:
        file.write(functions[kind](content) if kind in functions else pa.Codec("zstd").compress(content, asbytes=True))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst", "zip"])
def test_compressed_files(tmp_path, kind, named):
    """Told by the file's name, or by how it begins."""
    texts = [f"{i} é" for i in range(100)]
    path = tmp_path / ("a.jsonl." + kind if named else "a.jsonl")
    compress(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(), kind)
    source = opened(files_config(path, file_format="json"))
    assert list(source.documents()) == texts
    assert [(d.row, d.following) for d in source.read(0, 97)] == [(97, 0), (98, 0), (99, 0)]


def write_arrow(path, table, kind):
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files(tmp_path, kind):
    texts = [f"{i}" if i % 5 else None for i in range(45)]
    write_arrow(tmp_path / "a.arrow", pa.table({"n": range(45), "text": texts}), kind)
    source = opened(files_config(tmp_path / "a.arrow", file_format="arrow"))
    for start in (0, 6, 7, 8, 44, 45):
        assert [(d.row, d.content) for d in source.read(0, start)] == [
            (i, text) for i, text in enumerate(texts) if text and i >= start
        ]


NESTED = [
    {"meta.title": "exact", "meta": {"title": "nested", "body": {"text": "one"}}},
    {"meta.title": None, "meta": {"title": "nested", "body": {"text": None}}},
    {"meta.title": "", "meta": {"title": None, "body": {"text": "three"}}},
    {"meta.title": "exact", "meta": {"title": None, "body": None}},
    {"meta.title": None, "meta": None},
]


@pytest.mark.parametrize("file_format", ["json", "parquet", "arrow"])
def test_nested_columns_and_templates(tmp_path, file_format):
    path = tmp_path / f"a.{file_format}"
    if file_format == "json":
        path.write_text("".join(json.dumps(row) + "\n" for row in NESTED))
    elif file_format == "parquet":
        pq.write_table(pa.Table.from_pylist(NESTED), path, row_group_size=2)
    else:
        write_arrow(path, pa.Table.from_pylist(NESTED), "file")

    def texts(**options):
        return read(files_config(path, file_format=file_format, **options))

    assert texts(text_column="meta.body.text") == ["one", "three"]
    assert texts(text_column="meta.title") == ["exact", "exact"], "a column of exactly that name comes first"
    filled = ["# exact\none{}", "# \nthree{}", "# exact\n{}"]
    assert texts(template="# {meta.title}\\n{meta.body.text}{{}}") == filled
    with pytest.raises(ValueError, match=r"data.template='.*': 'meta.body.txt'.*columns are meta.title, meta"):
        texts(template="{meta.title} {meta.body.txt}")
    with pytest.raises(ValueError, match=r"data.text_column='meta.body'.* holds .*, must hold text"):
        texts(text_column="meta.body")


@pytest.mark.parametrize("template", ["no column", "{}", "{a", "{a:3}", "{a!r}"])
def test_templates_that_cannot_be_filled(template):
    with pytest.raises(ValueError, match=r"data.template='.*: .*; must be text with columns in braces"):
        files_config("x", file_format="json", template=template)


def json_lines(rng, count):
    """Rows of JSON lines in the ways they are found."""
    start, end = rng.choice([b"", b"\xef\xbb\xbf"]), rng.choice([b"\n", b"\r\n", b"\n \n\n"])
    lines = [json.dumps({"text": "é" * rng.choice([1, 3, 50]) + str(i)}).encode() for i in range(count)]
    return start + end.join(lines) + rng.choice([b"", end])


@pytest.mark.parametrize("seed", range(4))
def test_slices_of_json_lines_hold_every_line_once(tmp_path, seed):
    """Cut at any byte, also in a line's end or several times in a line; and read on from any document."""
    rng = random.Random(seed)
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(rng, 23))
    whole = opened(files_config(path, file_format="json"))
    texts, size = list(whole.documents()), path.stat().st_size
    assert len(texts) == 23
    for slices in (2, 5, 11, size):
        edges = [0, *sorted(rng.choices(range(size + 1), k=slices - 1)), size] if slices < size else range(size + 1)
        cut = replace(whole, edges=[edges])
        assert len(cut.shards) == len(edges) - 1
        assert list(cut.documents()) == texts
    cut = replace(whole, edges=[[0, size // 3, size]])
    for shard in range(2):
        documents = list(cut.read(shard))
        assert [document.row for document in documents] == list(range(len(documents)))
        for document in documents:
            assert list(cut.read(shard, document.row + 1, document.following)) == documents[document.row + 1 :]


@pytest.mark.parametrize("file_format", ["json", "parquet", "arrow"])
@pytest.mark.parametrize(("num_files", "num_streams"), [(1, 3), (3, 5), (20, 24)])
def test_streams_that_outnumber_the_files_read_parts_of_them(
    tmp_path, monkeypatch, file_format, num_files, num_streams
):
    monkeypatch.setattr(sources, "_SMALLEST_BYTES", 1)
    monkeypatch.setattr(sources, "_SMALLEST_ROWS", 1)
    shards = [[f"{file}.{i}" for i in range(67)] for file in range(num_files)]
    if file_format == "arrow":
        for i, shard in enumerate(shards):
            write_arrow(tmp_path / f"{i:02d}.arrow", pa.table({"text": shard}), "stream")
        pattern = tmp_path / "*.arrow"
    else:
        pattern = write_shards(tmp_path, file_format, shards)
    source = opened(files_config(pattern, file_format=file_format))
    cut = source.split(num_streams)
    assert list(cut.documents()) == list(source.documents())
    assert num_streams <= len(cut.shards) <= num_streams * num_files and len(cut.shards) % num_files == 0
    of_streams = [
        sum(1 for shard in range(stream, len(cut.shards), num_streams) for _ in cut.read(shard))
        for stream in range(num_streams)
    ]
    assert max(of_streams) < 1.5 * min(of_streams)
    fewer = source.split(num_streams, num_files=1)
    assert fewer.files == source.files[:1] and len(fewer.shards) == num_streams
    assert source.split(num_files).shards == source.files


def test_files_that_are_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_BYTES", 1)
    lines = "".join(json.dumps({"text": f"{i}"}) + "\n" for i in range(50)).encode()
    contents = {
        "a.jsonl.gz": gzip.compress(lines),
        "list.json": b"\xef\xbb\xbf\n " + json.dumps([f"{i}" for i in range(50)]).encode(),
        "long_line.jsonl": lines + json.dumps({"text": "x" * 5000}).encode(),
        "empty.jsonl": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        source = opened(files_config(tmp_path / name, file_format="json"))
        assert source.split(4).shards == source.files, name
    monkeypatch.setattr(sources, "_SMALLEST_BYTES", 1 << 16)
    (tmp_path / "small.jsonl").write_bytes(lines)
    source = opened(files_config(tmp_path / "small.jsonl", file_format="json"))
    assert source.split(4).shards == source.files


def test_a_bad_line_of_a_slice_is_named_by_its_number_in_the_file(tmp_path):
    lines = [json.dumps({"text": f"{i}"}) for i in range(60)]
    lines[40] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    whole = opened(files_config(tmp_path / "a.jsonl", file_format="json"))
    size = (tmp_path / "a.jsonl").stat().st_size
    for edge in range(size // 3, size // 3 + 20):
        with pytest.raises(ValueError, match=r"a.jsonl', line 41: must be one JSON object"):
            list(replace(whole, edges=[[0, edge, size]]).read(1))
    before = next(document for document in whole.read(0) if document.row == 39)
    with pytest.raises(ValueError, match=r"a.jsonl', line 41: must be one JSON object"):
        list(whole.read(0, 40, before.following))


class Failing:
    """A file that cannot be read from ``good`` bytes on, as long as there are failures."""

    def __init__(self, file, failures, good):
        self.file, self.failures, self.good = file, failures, good

    def read(self, size=-1):
        if self.failures and self.file.tell() >= self.good:
            raise self.failures.pop()
        return self.file.read(min(size, 4096) if size >= 0 else size)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


@pytest.fixture
def failing(monkeypatch):
    """Failures to come, and the seconds that were waited for."""
    failures, waited = [], []
    opening = readers.open_raw
    monkeypatch.setattr(readers, "open_raw", lambda *path: Failing(opening(*path), failures, 10_000))
    monkeypatch.setattr("minimax_train.data.sources.time.sleep", waited.append)
    return failures, waited


@pytest.mark.parametrize("compressed", [False, True])
def test_a_source_that_fails_for_a_while_is_read_on(tmp_path, failing, capsys, compressed):
    failures, waited = failing
    texts = [f"{i} {random.Random(i).random()}" for i in range(3000)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    failures += [TimeoutError("the server is slow"), OSError(5, "Input/output error"), ConnectionResetError("gone")]
    assert read(files_config(path, file_format="json")) == texts
    assert len(waited) == 3 and not failures
    told = capsys.readouterr().err
    assert told.count("note: ") == 3 and f"{path}'" in told and "ConnectionResetError: gone" in told


def test_a_source_that_goes_on_failing_is_named(tmp_path, failing):
    failures, waited = failing
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}" * 50}) + "\n" for i in range(1000)))
    failures += [OSError(5, "Input/output error")] * 100
    with pytest.raises(ValueError, match=r"cannot read '.*a.jsonl'.*, tried 6 times: OSError: \[Errno 5\]"):
        read(files_config(tmp_path / "a.jsonl", file_format="json"))
    assert waited == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("error", [PermissionError(13, "no"), UnicodeDecodeError("utf-8", b"", 0, 1, "no")])
def test_what_waiting_does_not_mend_is_not_tried_again(tmp_path, failing, error):
    failures, waited = failing
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i}" * 50}) + "\n" for i in range(1000)))
    failures.append(error)
    with pytest.raises(ValueError, match=r"cannot read '.*a.jsonl'"):
        read(files_config(tmp_path / "a.jsonl", file_format="json"))
    assert waited == []


def test_a_remote_file_is_read_on_from_a_byte(tmp_path):
    import fsspec

    lines = [json.dumps({"text": f"{i}"}) + "\n" for i in range(50)]
    with fsspec.open("memory://folder/a.jsonl", "w") as file:
        file.writelines(lines)
    (tmp_path / "a.jsonl").write_text("")
    source = replace(opened(files_config(tmp_path / "a.jsonl", file_format="json")), files=["memory://folder/a.jsonl"])
    documents = list(source.read(0))
    assert [document.content for document in documents] == [f"{i}" for i in range(50)]
    assert list(source.read(0, 40, documents[39].following)) == documents[40:]
    assert source.split(4).shards == source.files


def test_several_sources_are_named_by_their_group(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "a"}) + "\n")
    web = {"format": "json", "train_files": [str(tmp_path / "a.jsonl")]}
    code = {"format": "text", "train_files": ["/no/file"]}
    config = DataConfig(sources={name: MixtureSourceConfig(**x) for name, x in (("web", web), ("code", code))})
    with pytest.raises(ValueError, match=r"data.sources.code.train_files=\['/no/file'\]: matches no file"):
        sources.open_sources(config, TRAIN)
    del config.sources["code"]
    assert sources.open_sources(config, VALIDATION) == {}
    with pytest.raises(ValueError, match=r"data.sources.web.train_files=.*has no data.sources.web.text_column='text'"):
        list(sources.open_sources(config, TRAIN)["web"].documents())
