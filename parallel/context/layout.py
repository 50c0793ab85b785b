"""Which tokens of a packed sequence each context-parallel rank holds; nothing else knows.

The token axis is cut in equal *chunks*, numbered in token order 0, 1, 2, ...; a layout deals them to ranks:

    contiguous, 4 ranks      chunk  0 1 2 3            zigzag, 4 ranks      chunk  0 1 2 3 4 5 6 7
                             rank   0 1 2 3                                 rank   0 1 2 3 3 2 1 0

Contiguous suits attention whose cost per token is constant; zigzag gives every rank the same share of causal work.
Documents may start and end anywhere. A *segment* is the part of a document inside a chunk. Chunks and their segments
are computed once per batch, on the host, and are the same on every rank.

Shape legend: T tokens on this rank, S tokens on the whole axis.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from minimax_train.documents import Derived, Documents

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Chunk:
    """An equal piece of the token axis. All positions are tokens of the whole axis.

    Attributes:
        index: number in token order.
        rank: the rank that holds it.
        place: how many chunks come before it on the token axis of that rank.
        edges: its start, every document start inside, its end: where its segments meet.
        document_start: where the document of its first token starts, maybe in an earlier chunk.
        document_end: where the document of its last token ends, maybe in a later chunk.
    """

    index: int
    rank: int
    place: int
    edges: tuple[int, ...]
    document_start: int
    document_end: int

    @property
    def start(self) -> int:
        return self.edges[0]

    @property
    def end(self) -> int:
        return self.edges[-1]

    @property
    def segments(self) -> list[tuple[int, int]]:
        """Token range of each segment, in order."""
        return list(pairwise(self.edges))

    @property
    def first_segment(self) -> tuple[int, int]:
        return self.edges[0], self.edges[1]

    @property
    def last_segment(self) -> tuple[int, int]:
        return self.edges[-2], self.edges[-1]

    @property
    def continues_before(self) -> bool:
        """Whether the document of its first token has tokens before the chunk."""
        return self.document_start < self.start

    @property
    def continues_after(self) -> bool:
        """Whether the document of its last token has tokens after the chunk."""
        return self.document_end > self.end

    @property
    def is_inside_one_document(self) -> bool:
        """Whether one document covers the chunk and goes on at both ends."""
        return len(self.edges) == 2 and self.continues_before and self.continues_after


@dataclass(frozen=True)
class SequenceLayout:
    """A way of dealing chunks to ranks.

    Attributes:
        kind: ``contiguous`` or ``zigzag``.
        num_ranks: ranks that share a packed sequence.

    Raises:
        ValueError: for an unknown kind.
    """

    kind: str
    num_ranks: int

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise ValueError(f"parallel.layout={self.kind!r}: must be one of {', '.join(LAYOUTS)}")

    @property
    def chunk_ranks(self) -> tuple[int, ...]:
        """The rank that holds each chunk, in token order."""
        ranks = tuple(range(self.num_ranks))
        return ranks if self.kind == "contiguous" or self.num_ranks == 1 else ranks + ranks[::-1]

    def check_length(self, tokens: int) -> None:
        """Refuse a packed sequence that cannot be cut in equal chunks.

        Raises:
            ValueError: naming the nearest lengths that can.
        """
        chunks = len(self.chunk_ranks)
        if tokens % chunks:
            below, above = tokens // chunks * chunks, -(-tokens // chunks) * chunks
            raise ValueError(
                f"data.sequence_length={tokens}: must be a multiple of {chunks} for parallel.cp={self.num_ranks} "
                f"with parallel.layout={self.kind}; the nearest are {below} and {above}"
            )

    def shard(self, documents: Documents, rank: int) -> SequenceShard:
        """What a rank holds of the documents packed on the whole axis."""
        self.check_length(documents.num_tokens)
        ranks, bounds, chunks = self.chunk_ranks, documents.bounds, []
        size = documents.num_tokens // len(ranks)
        for index, holder in enumerate(ranks):
            start, end = index * size, (index + 1) * size
            first, last = bisect_right(bounds, start) - 1, bisect_left(bounds, end)
            edges = (start, *bounds[first + 1 : last], end)
            chunks.append(Chunk(index, holder, ranks[:index].count(holder), edges, bounds[first], bounds[last]))
        return SequenceShard(self, rank, tuple(chunks), documents)


@dataclass(frozen=True, eq=False)
class SequenceShard(Derived):
    """The part of a packed sequence that one rank holds: its chunks, one after the other.

    What is derived from a shard stays with its copies on other devices: keys of what holds tensors name the device.

    Attributes:
        layout: how the axis was cut.
        rank: this rank among those that share the axis.
        chunks: all chunks, in token order; the same on every rank.
        whole: the documents of the whole axis.
    """

    layout: SequenceLayout
    rank: int
    chunks: tuple[Chunk, ...]
    whole: Documents

    @cached_property
    def mine(self) -> tuple[Chunk, ...]:
        """The chunks this rank holds, in the order they lie on its token axis."""
        return tuple(chunk for chunk in self.chunks if chunk.rank == self.rank)

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk."""
        return self.whole.num_tokens // len(self.chunks)

    @cached_property
    def documents(self) -> Documents:
        """This rank's segments as documents of its own token axis, with their true positions."""
        lengths, positions = [], []
        for chunk in self.mine:
            lengths += [end - start for start, end in chunk.segments]
            positions += [chunk.start - chunk.document_start, *[0] * (len(chunk.segments) - 1)]
        return Documents.from_lengths(lengths, self.whole.device, first_positions=positions)

    def to(self, device: torch.device | str) -> SequenceShard:
        """The same shard, its documents' tensors on another device."""
        return replace(self, whole=self.whole.to(device))

    def earlier_chunks(self, chunk: Chunk) -> tuple[Chunk, ...]:
        """The chunks before this one that hold tokens of its first token's document: each in its last segment."""
        return self.chunks[chunk.document_start // self.chunk_size : chunk.index]

    def local(self, segment: tuple[int, int]) -> slice:
        """A token range inside one chunk, as a slice of the token axis of the rank that holds the chunk."""
        chunk = self.chunks[segment[0] // self.chunk_size]
        shift = chunk.place * self.chunk_size - chunk.start
        return slice(segment[0] + shift, segment[1] + shift)

    def take(self, x_S: Tensor) -> Tensor:
        """This rank's tokens of a tensor over the whole axis: ``[S, ...] -> [T, ...]``."""
        return torch.cat([x_S[chunk.start : chunk.end] for chunk in self.mine])

    @cached_property
    def global_tokens_T(self) -> Tensor:
        """Place of each of this rank's tokens on the whole axis, int64, on the host."""
        return self.take(torch.arange(self.whole.num_tokens))
