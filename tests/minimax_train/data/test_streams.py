"""How documents are dealt into streams and shuffled."""

import pytest

from minimax_train.data import streams
from minimax_train.data.shuffle import permutation, stable_hash
from minimax_train.data.streams import DocumentStream, Lengths
from minimax_train.errors import ConfigError
from support.data import ListSource, WordTokenizer, documents


def stream(source, index, num_streams, **options):
    settings = {"seed": 0, "shuffle_documents": 4, "lengths": Lengths(8, 16)} | options
    return DocumentStream(source, WordTokenizer(), stream=index, num_streams=num_streams, **settings)


def one_epoch(documents_of):
    ids = []
    while (document := documents_of.next_document()) is not None:
        ids.append(first_of(document))
    return ids


def first_of(document):
    return int(next(document.pieces)[0])


def sharded(num_shards, lengths):
    texts = documents(lengths)
    return ListSource([texts[i::num_shards] for i in range(num_shards)])


@pytest.mark.parametrize("num_shards", [1, 3, 4, 9])
@pytest.mark.parametrize("shuffle_documents", [1, 4, 100])
def test_the_streams_of_an_epoch_hold_every_document_once(num_shards, shuffle_documents):
    source = sharded(num_shards, [2] * 37)
    parts = [one_epoch(stream(source, s, 4, repeat=False, shuffle_documents=shuffle_documents)) for s in range(4)]
    assert sorted(first for part in parts for first in part) == list(range(1, 74, 2))


def test_with_enough_shards_a_stream_reads_only_its_own():
    source = sharded(8, [1] * 32)
    read = set()
    original = source.read
    source.read = lambda shard, *start: read.add(shard) or original(shard, *start)
    one_epoch(stream(source, 1, 4, repeat=False))
    assert read == {1, 5}


def test_with_few_shards_documents_are_dealt_in_turn():
    source = sharded(1, [1] * 10)
    assert one_epoch(stream(source, 2, 3, repeat=False, shuffle_documents=1)) == [3, 6, 9]


def test_empty_texts_are_not_counted_as_documents():
    source = ListSource([["1", "", "2", None, "3", "4"]])
    assert one_epoch(stream(source, 1, 2, repeat=False, shuffle_documents=1)) == [2, 4]


def test_the_order_depends_on_seed_stream_epoch_and_block():
    source = sharded(1, [1] * 64)

    def first(count, **options):
        documents_of = stream(source, 0, 1, shuffle_documents=32, **options)
        return [first_of(documents_of.next_document()) for _ in range(count)]

    order = first(128)
    assert order == first(128)
    assert order[:64] != first(64, seed=1)
    assert order[:32] != list(range(1, 33)) and sorted(order[:32]) == list(range(1, 33))
    assert [i - 32 for i in order[32:64]] != order[:32]
    assert order[64:] != order[:64] and sorted(order[64:]) == sorted(order[:64])


def test_the_order_of_shards_changes_from_epoch_to_epoch():
    source = sharded(16, [1] * 16)
    documents_of = stream(source, 0, 1, shuffle_documents=1)
    order = [first_of(documents_of.next_document()) for _ in range(32)]
    assert sorted(order[:16]) == sorted(order[16:]) == list(range(1, 17))
    assert order[:16] != order[16:] and order[:16] != sorted(order[:16])


def test_a_stream_without_documents_says_how_many_there_are():
    with pytest.raises(ValueError, match=r"data.num_streams=5: stream 3 got none of the 3 documents.*at most 3"):
        stream(sharded(1, [1] * 3), 3, 5).next_document()
    with pytest.raises(ValueError, match=r"data.num_streams=2: stream 1 got none of the 2 documents.*shard 1"):
        stream(ListSource([["1", "2"], [""]]), 1, 2).next_document()
    with pytest.raises(ValueError, match=r"data.train_files=\['listed'\]: holds no document"):
        stream(ListSource([["", None]]), 0, 1).next_document()


@pytest.mark.parametrize("shuffle_documents", [1, 7, 100])
def test_resumed_anywhere_in_what_is_encoded_together(monkeypatch, shuffle_documents):
    monkeypatch.setattr(streams, "ENCODED_TOGETHER", 3)
    source = sharded(2, [1] * 20)
    whole = stream(source, 0, 1, shuffle_documents=shuffle_documents)
    states, order = [whole.position], []
    for _ in range(45):  # more than two epochs
        order.append(first_of(whole.next_document()))
        states.append(whole.position)
    resumed = stream(source, 0, 1, shuffle_documents=shuffle_documents)
    for at in reversed(range(45)):  # on one object, whose own documents encoded ahead must not come back
        resumed.go_to(states[at])
        assert [first_of(resumed.next_document()) for _ in range(min(5, 45 - at))] == order[at : at + 5]


def test_data_that_shrank_since_the_position_was_saved():
    documents_of = stream(sharded(1, [1] * 8), 0, 1)
    for _ in range(4):
        documents_of.next_document()
    shrunk = stream(sharded(1, [1] * 3), 0, 1)
    shrunk.go_to(documents_of.position)
    with pytest.raises(ConfigError, match=r"data.train_files=.*the data changed"):
        shrunk.next_document()


def test_hash_and_permutation_never_change():
    """A saved position is worth nothing if these move."""
    assert stable_hash("documents", 0, 1) == 16366681205118106904
    assert permutation(8, "documents", 0, 1) == [3, 0, 7, 2, 4, 5, 1, 6]
