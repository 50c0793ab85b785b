"""The loader on files: independence of the ranks, exact resume, prefetching."""

import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from minimax_train.data import DataConfig, build_train_loader, merge_states, tables
from minimax_train.parallel.context.layout import SequenceLayout
from support.data import WordTokenizer, next_micro_batches, random_documents, rows_of, write_shards

NUM_STREAMS = 4
LENGTH = 16
TEXTS = random_documents(60)
TOTAL = 4 * sum(len(text.split()) + 1 for text in TEXTS) // LENGTH // 8 * 8  # sequences of about four epochs

LAYOUTS = {
    "text": ("text", 60),
    "json": ("json", 6),
    "json in few shards": ("json", 1),
    "parquet": ("parquet", 4),
    "parquet in few shards": ("parquet", 3),
}


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    monkeypatch.setattr(tables, "_ROWS_PER_READ", 3)  # so that reads end and resume inside of tables


@pytest.fixture(params=LAYOUTS)
def config(request, tmp_path):
    return make_config(tmp_path, *LAYOUTS[request.param])


@pytest.fixture
def json_config(tmp_path):
    return make_config(tmp_path, "json", 6)


def make_config(folder, file_format, num_shards):
    pattern = write_shards(folder, file_format, [TEXTS[i::num_shards] for i in range(num_shards)])
    return DataConfig(
        source="files",
        format=file_format,
        train_files=[pattern],
        sequence_length=LENGTH,
        num_streams=NUM_STREAMS,
        num_workers=0,
        shuffle_documents=4,
    )


def loader(config, dp_rank=0, dp_size=1, tokenizer=None, seed=7):
    return build_train_loader(config, tokenizer or WordTokenizer(), dp_rank=dp_rank, dp_size=dp_size, seed=seed)


def batches_of(rows, size, number, length=LENGTH):
    return next_micro_batches(rows, size, number, length=length, dp_size=rows._dp_size)


def take(rows, count, step=4, length=LENGTH):
    out = []
    for start in range(0, count, step):
        out += rows_of(batches_of(rows, 1, min(step, count - start), length))
    return out


def interleave(parts):
    return [row for together in zip(*parts, strict=True) for row in together]


def through_json(state):
    return json.loads(json.dumps(state))


def test_every_epoch_of_a_stream_holds_its_tokens_once(config):
    rows = take(loader(config), TOTAL)
    seen = Counter()
    for stream in range(NUM_STREAMS):
        ids = [token for tokens, _, _ in rows[stream::NUM_STREAMS] for token in tokens if token]
        size = next(i for i in range(1, len(ids)) if ids[i] in set(ids[:i]))
        seen.update(ids[:size])
        for start in range(size, len(ids) - size + 1, size):
            assert sorted(ids[start : start + size]) == sorted(ids[:size])
            assert ids[start : start + size] != ids[:size]
    assert seen == Counter(range(1, sum(len(text.split()) for text in TEXTS) + 1))


def test_rows_do_not_depend_on_the_data_parallel_size(config):
    expected = take(loader(config), 48)
    for dp_size in (2, 4):
        parts = [take(loader(config, rank, dp_size), 48 // dp_size, step=3) for rank in range(dp_size)]
        assert interleave(parts) == expected


# In sequences of all streams: inside the first block, across the first epoch's edge, and both resumes in later epochs.
@pytest.mark.parametrize(("first", "second"), [(1, 2), (5, 23), (0, TOTAL // 4 + 3), (TOTAL // 3, TOTAL - 9)])
def test_resumed_twice_the_rows_are_the_same(config, first, second):
    expected = take(loader(config), TOTAL)
    rows = loader(config)
    got = take(rows, first)
    for stop in (second, TOTAL):
        state = through_json(rows.state_dict())
        rows = loader(config)
        rows.load_state_dict(state)
        assert rows.state_dict() == state
        got += take(rows, stop - len(got))
    assert got == expected


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_that_is_read_again_from_its_start_is_said(json_config, tmp_path, compressed):
    if compressed:
        for path in tmp_path.glob("*.jsonl"):
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        json_config = replace(json_config, train_files=[f"{tmp_path}/*.jsonl.gz"])
    first = loader(json_config)
    take(first, 40)
    second = loader(json_config)
    second.load_state_dict(through_json(first.state_dict()))
    said = [note for note in second.take_notes() if "read again from its start" in note]
    assert len(said) == compressed


def test_resume_with_other_data_parallel_sizes(json_config):
    expected = take(loader(json_config), 48)
    got, state = [], None
    for dp_size in (2, 4, 1):
        ranks = [loader(json_config, rank, dp_size) for rank in range(dp_size)]
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        got += interleave([take(rank, 16 // dp_size) for rank in ranks])
        state = through_json(merge_states([rank.state_dict() for rank in ranks]))
        assert set(state["streams"]) == {str(s) for s in range(NUM_STREAMS)}
    assert got == expected


def test_resume_at_a_row_that_the_new_size_does_not_divide(json_config):
    expected = take(loader(json_config), 22)
    first = loader(json_config)
    take(first, 6)
    got = dict(enumerate(expected[:6]))
    ranks = [loader(json_config, rank, 4) for rank in range(4)]
    for rank, rows in enumerate(ranks):
        rows.load_state_dict(first.state_dict())
        mine = [row for row in range(6, 22) if row % 4 == rank]
        got |= zip(mine, take(rows, 4), strict=True)
    assert [got[row] for row in range(22)] == expected
    assert merge_states([rows.state_dict() for rows in ranks])["next_row"] == 22


def test_the_state_is_of_what_was_handed_out(json_config):
    rows = loader(json_config)
    batches_of(rows, 2, 4)
    state = rows.state_dict()
    assert state["next_row"] == 8
    for stream in range(NUM_STREAMS):
        alone = loader(json_config, stream, NUM_STREAMS)
        take(alone, 2, step=1)
        assert state["streams"][str(stream)] == alone.state_dict()["streams"][str(stream)]


def test_the_state_is_not_changed_by_going_on(json_config):
    rows = loader(json_config)
    take(rows, 12)
    state = rows.state_dict()
    copy = through_json(state)
    following = take(rows, 12)
    assert state == copy
    rows.load_state_dict(state)  # back in time, on the same loader
    assert take(rows, 12) == following


def test_step_sizes_may_change(json_config):
    expected = take(loader(json_config), 24)
    rows = loader(json_config)
    got = []
    for per_micro_batch, num_micro_batches in [(1, 1), (2, 3), (1, 2), (5, 1), (2, 5)]:
        batches = batches_of(rows, per_micro_batch, num_micro_batches)
        assert [batch.num_sequences for batch in batches] == [per_micro_batch] * num_micro_batches
        got += rows_of(batches)
    assert got == expected
    with pytest.raises(ValueError, match="global_batch_size=0: must be a positive multiple of 1"):
        batches_of(rows, 1, 0)


def test_micro_batch_fields(json_config):
    (batch,) = batches_of(loader(json_config), 3, 1)
    assert batch.tokens_T.dtype == batch.labels_T.dtype == torch.int64
    assert batch.tokens_T.shape == batch.labels_T.shape == (3 * LENGTH,)
    assert batch.documents.num_tokens == 3 * LENGTH
    assert batch.num_targets == sum(label != -100 for label in batch.labels_T.tolist())
    moved = batch.to("cpu")
    assert moved.num_targets == batch.num_targets and torch.equal(moved.tokens_T, batch.tokens_T)
    shared = batch.split(SequenceLayout("zigzag", 2), 1).to("meta")
    assert shared.documents.device.type == shared.shard.documents.device.type == "meta"
    assert batch.to("meta").tokens_T.device.type == batch.to("meta").documents.device.type == "meta"


def test_another_sequence_length_goes_on_at_the_same_token(json_config):
    """In the same run, which has asked for sequences of the old length, and in one that resumes."""
    rows = loader(json_config)
    take(rows, 8)
    state = rows.state_dict()
    expected = take(rows, 8)
    rows.load_state_dict(state)
    take(rows, 4)
    again = loader(json_config)
    again.load_state_dict(rows.state_dict())
    shorter = take(rows, 8, length=LENGTH // 2)
    assert shorter == take(again, 8, length=LENGTH // 2)
    for stream in range(4):
        assert shorter[stream][0] + shorter[stream + NUM_STREAMS][0] == expected[4 + stream][0]
    longer = loader(json_config)
    longer.load_state_dict(state)
    for stream, (tokens, _, _) in enumerate(take(longer, 4, length=2 * LENGTH)):
        assert tokens == expected[stream][0] + expected[stream + NUM_STREAMS][0]


def test_a_plan_for_other_data_is_refused(json_config):
    with pytest.raises(ValueError, match=r"data_weights=.*web.*: the sources are files"):
        next_micro_batches(loader(json_config), 1, 1, length=LENGTH, source="web")


class FailingTokenizer(WordTokenizer):
    def __init__(self, after):
        self.left = after

    def encode_document(self, text):
        if self.left == 0:
            raise ValueError("data.train_files: broken")
        self.left -= 1
        return super().encode_document(text)


def test_an_error_stays_until_a_state_is_loaded(json_config):
    tokenizer = FailingTokenizer(after=30)
    rows = loader(json_config, tokenizer=tokenizer)
    got = []
    with pytest.raises(ValueError, match="broken"):
        while True:
            state = rows.state_dict()
            got += take(rows, 4)
    assert 0 < len(got) < 60
    with pytest.raises(ValueError, match="broken"):
        batches_of(rows, 1, 1)
    tokenizer.left = -1
    rows.load_state_dict(state)
    assert got + take(rows, 8) == take(loader(json_config), len(got) + 8)


def test_streams_must_divide(json_config):
    with pytest.raises(ValueError, match=r"data.num_streams=4: must be a multiple of the data-parallel size 3: 3, 6"):
        loader(json_config, 0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_streams": 2}, "data.num_streams=2.*is for 4"),
        ({"shuffle_documents": 5}, "data.shuffle_documents=5.*is for 4"),
        ({"seed": 8}, "seed=8.*is for 7"),
        ({"train_files": None}, "0000.jsonl': not file number 1 of the saved data position"),
    ],
)
def test_a_state_of_another_order_is_refused(json_config, tmp_path, change, message):
    state = loader(json_config).state_dict()
    seed = change.get("seed", 7)
    for name, value in change.items():
        setattr(json_config, name, value)
    if "train_files" in change:
        json_config.train_files = [write_shards(tmp_path / "other", "json", [TEXTS[:10]] * 6)]
    with pytest.raises(ValueError, match=message):
        loader(json_config, seed=seed).load_state_dict(state)


def test_a_state_must_cover_the_ranks_streams(json_config):
    state = loader(json_config, 0, 2).state_dict()
    with pytest.raises(ValueError, match=r"lacks streams \[1, 3\]"):
        loader(json_config, 1, 2).load_state_dict(state)
    later = loader(json_config, 1, 2)
    batches_of(later, 1, 1)
    with pytest.raises(ValueError, match="different steps"):
        merge_states([state, later.state_dict()])
