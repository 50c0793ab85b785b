"""Documents of random lengths, and CUDA graphs replayed on one batch of them after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minimax_train.documents import DeviceDocuments, Documents
from support.compare import relative_error


def random_lengths(rng: random.Random, tokens: int, most: int, longest: int) -> list[int]:
    """Lengths that sum to ``tokens``, single tokens among them."""
    lengths = []
    while tokens:
        room = most - len(lengths) - 1
        least = max(1, tokens - room * longest)
        length = rng.choice([least, rng.randint(least, max(least, min(longest, tokens)))])
        lengths.append(length)
        tokens -= length
    rng.shuffle(lengths)
    return lengths


def assert_replays_equal_eager(
    run: Callable[[Documents], list[Tensor]],
    lengths_of_fills: Sequence[list[int]],
    num_documents: int,
    max_length: int,
    tolerance: float,
) -> None:
    """``run(documents)`` captured once and replayed after each fill, against a call on plain documents."""
    held = DeviceDocuments.of_shape(
        num_documents=num_documents, num_tokens=sum(lengths_of_fills[0]), max_length=max_length, device="cuda"
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(held)
    torch.cuda.current_stream().wait_stream(stream)
    held.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(held)
    for lengths in lengths_of_fills:
        documents = Documents.from_lengths(lengths, "cuda")
        held.fill(documents)
        for result in results:  # what a replay does not write shows
            result.fill_(float("nan"))
        graph.replay()
        for result, expected in zip(results, run(documents), strict=True):
            assert relative_error(result, expected) <= tolerance
