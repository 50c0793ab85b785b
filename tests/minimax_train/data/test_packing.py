"""Packed sequences against a packer that works on one flat list."""

import itertools
import json
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_train.data.mixture import MixtureStream
from minimax_train.data.packing import SequencePacker, fitting
from minimax_train.data.streams import DocumentStream, Lengths
from minimax_train.documents import IGNORE_INDEX
from support.data import EOS, ListSource, WordTokenizer, documents

ONE = {"web": 1.0}


def packer(texts, policy="split", tokenizer=None, **options):
    settings = {"stream": 0, "num_streams": 1, "seed": 0, "shuffle_documents": 1, "repeat": False} | options
    settings["lengths"] = Lengths(8, 16)

    def open_cursor(name, only):
        return DocumentStream(ListSource([texts]), tokenizer or WordTokenizer(), only=only, **settings)

    return SequencePacker(MixtureStream(["web"], open_cursor), policy)


def drain(rows, sequence_length):
    out = []
    while (row := rows.next_sequence(sequence_length, ONE)) is not None:
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


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 17))
def test_truncated_documents_lose_their_rest_and_no_target_before_it(lengths, sequence_length):
    """Every row begins with the start of a document, and what is missing was counted."""
    texts = documents(lengths)
    rows = packer(texts, "truncate")
    first, packed = {}, 0
    for ids in ([*map(int, text.split()), 0] for text in texts):
        first[ids[0]] = ids
    for tokens, labels, segments in drain(rows, sequence_length):
        start, real = 0, sum(segments)
        for n in segments:
            if tokens[start] in first:
                ids = first.pop(tokens[start])
                assert tokens[start : start + n] == ids[:n]
                assert labels[start : start + n] == [*ids[1:], IGNORE_INDEX][:n]
                assert n == len(ids) or start + n == sequence_length
                packed += n
            else:  # what completes the last row
                real = start
            start += n
        assert real == sequence_length or not first
    assert not first
    assert packed + rows.truncated == sum(lengths) + len(lengths)


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 40))
def test_the_fitting_documents_are_the_best_of_all_choices(lengths, total):
    picked = fitting(lengths, total)
    choices = itertools.product([1, 0], repeat=len(lengths))  # the first ones the rather
    sums = [(sum(itertools.compress(lengths, choice)), choice) for choice in choices]
    best = max(found for found, _ in sums if found <= total)
    expected = next(choice for found, choice in sums if found == best)
    assert picked == [i for i, is_in in enumerate(expected) if is_in]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(2, 47))
def test_best_fit_keeps_every_target_and_splits_only_what_it_must(lengths, sequence_length):
    texts = documents(lengths)
    rows = packer(texts, "best_fit")
    packed = drain(rows, sequence_length)
    targets = [label for _, labels, _ in packed for label in labels if label != IGNORE_INDEX]
    expected = [label for text in texts for label in [*map(int, text.split()), 0][1:]]
    assert Counter(targets) == Counter(expected)
    total = sum(lengths) + len(lengths)
    assert sum(token != 0 for tokens, _, _ in packed for token in tokens) >= sum(lengths)
    assert len(packed) == -(-total // sequence_length)
    longer = sum(length + 1 > sequence_length for length in lengths)
    assert longer <= rows.split <= min(len(packed), len(lengths))
    by_first = {int(text.split()[0]): i for i, text in enumerate(texts)}
    order = [by_first[tokens[start]] for tokens, start in starts(packed) if tokens[start] in by_first]
    for place, i in enumerate(order):  # nobody waits for ever
        assert place - i <= 9 * 64 and i - place <= 64


def starts(rows):
    for tokens, _, segments in rows:
        for start in itertools.accumulate([0, *segments[:-1]]):
            yield tokens, start


def test_best_fit_splits_few_of_many():
    rng = random.Random(1)
    lengths = [min(1500, max(2, int(rng.lognormvariate(5.2, 0.9)))) for _ in range(1500)]
    splits = {}
    for policy in ("split", "best_fit"):
        rows = packer(documents(lengths), policy, repeat=True)
        for _ in range(250):
            rows.next_sequence(1531, ONE)
        splits[policy] = rows.split
    assert splits["best_fit"] <= 12 < 200 < splits["split"]


class OneTokenTokenizer(WordTokenizer):
    def encode_document(self, text):
        return super().encode_document("")


def test_documents_of_one_token_have_no_target():
    row = packer(["a", "b", "c"], tokenizer=OneTokenTokenizer(), repeat=True).next_sequence(5, ONE)
    assert row.tokens_S.tolist() == [EOS] * 5
    assert row.labels_S.tolist() == [IGNORE_INDEX] * 5
    assert row.lengths == [1] * 5


def test_a_document_longer_than_several_rows_keeps_every_target():
    rows = drain(packer(documents([3, 25, 2])), 8)
    targets = [label for _, labels, _ in rows for label in labels if label != IGNORE_INDEX]
    assert targets == [2, 3, 0, *range(5, 29), 0, 30, 0]  # each document's tokens but its first, then its end
    assert rows[1][2] == [8] and rows[1][1][-1] == rows[2][0][0]


@pytest.mark.parametrize("policy", ["split", "truncate", "best_fit"])
@pytest.mark.parametrize("sequence_length", [1, 7, 64])
def test_resume_twice_at_any_row(sequence_length, policy):
    rng = random.Random(sequence_length)
    texts = documents([rng.randint(1, 25) for _ in range(23)])

    def fresh():
        return packer(texts, policy, shuffle_documents=5, repeat=True)

    def take(rows, count):
        return [
            (row.tokens_S.tolist(), row.labels_S.tolist(), row.lengths) for row in map(next_row(rows), range(count))
        ]

    def next_row(rows):
        return lambda _: rows.next_sequence(sequence_length, ONE)

    total = 3 * sum(len(text.split()) + 1 for text in texts) // sequence_length  # across two epoch edges
    expected = take(fresh(), total)
    for _ in range(25):
        first, second = sorted(rng.sample(range(total + 1), 2))
        rows = fresh()
        got = take(rows, first)
        for stop in (second, total):
            state = json.loads(json.dumps(rows.state_dict()))
            rows = fresh()
            rows.load_state_dict(state)
            assert rows.state_dict() == state
            got += take(rows, stop - len(got))
        assert got == expected, (first, second)
