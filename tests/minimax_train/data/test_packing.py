"""Packed sequences against a packer that works on one flat list."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_train.data.packing import SequencePacker
from minimax_train.data.streams import DocumentStream
from minimax_train.documents import IGNORE_INDEX
from support.data import EOS, ListSource, WordTokenizer, documents


def packer(texts, **options):
    settings = {"stream": 0, "num_streams": 1, "seed": 0, "shuffle_documents": 1, "repeat": False} | options
    return SequencePacker(DocumentStream(ListSource([texts]), WordTokenizer(), **settings))


def drain(rows, sequence_length):
    out = []
    while (row := rows.next_sequence(sequence_length)) is not None:
        out.append((row.tokens_S.tolist(), row.labels_S.tolist(), row.lengths))
    return out


def reference_rows(texts, sequence_length):
    """All tokens in one list; a label is the next entry unless a document ends here; sequences are slices."""
    tokens, labels, ends = [], [], set()
    for text in texts:
        ids = [int(word) for word in text.split()] + [0]
        tokens += ids
        labels += [*ids[1:], -100]
        ends.add(len(tokens))
    rows = []
    for start in range(0, len(tokens) - len(tokens) % sequence_length, sequence_length):
        cuts = [start, *sorted(e for e in ends if start < e < start + sequence_length), start + sequence_length]
        lengths = [b - a for a, b in pairwise(cuts)]
        rows.append((tokens[start : start + sequence_length], labels[start : start + sequence_length], lengths))
    return rows, tokens[len(rows) * sequence_length :]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 17))
def test_rows_equal_the_flat_reference(lengths, sequence_length):
    texts = documents(lengths)
    expected, rest = reference_rows(texts, sequence_length)
    rows = drain(packer(texts), sequence_length)
    assert rows[: len(expected)] == expected
    assert len(rows) == len(expected) + bool(rest)
    if rest:  # the last sequence of a single pass is completed without targets
        tokens, labels, segments = rows[-1]
        assert tokens[: len(rest)] == rest
        assert labels[len(rest) :] == [IGNORE_INDEX] * (sequence_length - len(rest))
        assert sum(segments[:-1]) == len(rest) and sum(segments) == sequence_length


class OneTokenTokenizer(WordTokenizer):
    def encode_document(self, text):
        return super().encode_document("")


def test_documents_of_one_token_have_no_target():
    stream = DocumentStream(
        ListSource([["a", "b", "c"]]), OneTokenTokenizer(), stream=0, num_streams=1, seed=0, shuffle_documents=1
    )
    row = SequencePacker(stream).next_sequence(5)
    assert row.tokens_S.tolist() == [EOS] * 5
    assert row.labels_S.tolist() == [IGNORE_INDEX] * 5
    assert row.lengths == [1] * 5


def test_a_document_longer_than_several_rows_keeps_every_target():
    rows = drain(packer(documents([3, 25, 2])), 8)
    targets = [label for _, labels, _ in rows for label in labels if label != IGNORE_INDEX]
    assert targets == [2, 3, 0, *range(5, 29), 0, 30, 0]  # each document's tokens but its first, then its end
    assert rows[1][2] == [8] and rows[1][1][-1] == rows[2][0][0]


@pytest.mark.parametrize("sequence_length", [1, 7, 64])
def test_resume_twice_at_any_row(sequence_length):
    rng = random.Random(sequence_length)
    texts = documents([rng.randint(1, 25) for _ in range(23)])

    def fresh():
        return packer(texts, shuffle_documents=5, repeat=True)

    def take(rows, count):
        return [
            (row.tokens_S.tolist(), row.labels_S.tolist(), row.lengths) for row in map(next_row(rows), range(count))
        ]

    def next_row(rows):
        return lambda _: rows.next_sequence(sequence_length)

    total = 3 * sum(len(text.split()) + 1 for text in texts) // sequence_length  # across two epoch edges
    expected = take(fresh(), total)
    for _ in range(25):
        first, second = sorted(rng.sample(range(total + 1), 2))
        rows = fresh()
        got = take(rows, first)
        for stop in (second, total):
            state = rows.state_dict()
            rows = fresh()
            rows.load_state_dict(state)
            assert rows.state_dict() == state
            got += take(rows, stop - len(got))
        assert got == expected, (first, second)
