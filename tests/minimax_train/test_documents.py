"""Packed documents, and those whose lengths only the device knows."""

import random

import numpy as np
import pytest
import torch

from minimax_train.documents import DeviceDocuments, Documents
from support.graphs import random_lengths

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_fill_gives_the_positions_of_its_documents():
    rng = random.Random(0)
    held = DeviceDocuments.of_shape(num_documents=9, num_tokens=77, max_length=30, device=DEVICE)
    memory = held.cu_seqlens.data_ptr()
    assert len(held) == 9 and held.num_tokens == 77 and held.max_length == 30
    for _ in range(20):
        lengths = random_lengths(rng, 77, 9, 30)
        held.fill(Documents.from_lengths(lengths, DEVICE))
        assert held.positions_T.tolist() == [p for length in lengths for p in range(length)]
        assert held.positions_T is held.positions_T
        assert held.cu_seqlens.tolist() == np.cumsum([0, *lengths, *[0] * (9 - len(lengths))]).tolist()
        assert held.cu_seqlens.data_ptr() == memory


def test_parts_of_documents_go_on_where_they_were_cut():
    held = DeviceDocuments.of_shape(num_documents=6, num_tokens=15, max_length=15, device=DEVICE)
    for lengths, firsts in [([7, 5, 3], [40, 0, 2]), ([2, 13], [0, 9]), ([15], [0]), ([1, 1, 4, 9], [3, 0, 0, 77])]:
        held.fill(Documents.from_lengths(lengths, DEVICE, first_positions=firsts))
        expected = [p for length, first in zip(lengths, firsts, strict=True) for p in range(first, first + length)]
        assert held.positions_T.tolist() == expected


def test_the_first_documents_fit_the_bounds():
    held = DeviceDocuments.of_shape(num_documents=5, num_tokens=20, max_length=9, device=DEVICE)
    assert held.cu_seqlens.tolist() == [0, 9, 18, 20, 20, 20]
    with pytest.raises(ValueError, match="2 documents of at most 9 tokens cannot hold 20"):
        DeviceDocuments.of_shape(num_documents=2, num_tokens=20, max_length=9, device=DEVICE)


@pytest.mark.parametrize(
    "documents",
    [
        Documents.from_lengths([5, 5, 5, 5]),
        Documents.from_lengths([11, 9]),
        Documents.from_lengths([10, 9]),
    ],
    ids=["too many", "too long", "other tokens"],
)
def test_documents_that_do_not_fit_are_refused(documents):
    held = DeviceDocuments.of_shape(num_documents=3, num_tokens=20, max_length=10, device=DEVICE)
    before = held.cu_seqlens.tolist()
    with pytest.raises(ValueError, match="at most 3 of 20 tokens, the longest of at most 10"):
        held.fill(documents)
    assert held.cu_seqlens.tolist() == before
