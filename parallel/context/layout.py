"""Which tokens of a packed row each context-parallel rank holds; nothing else knows.

The token axis is cut in equal chunks, in *global chunk order* 0, 1, 2, ...; a layout deals them to ranks:

    contiguous, 4 ranks      chunk  0 1 2 3            zigzag, 4 ranks      chunk  0 1 2 3 4 5 6 7
                             rank   0 1 2 3                                 rank   0 1 2 3 3 2 1 0

Contiguous suits attention whose cost per token is constant; zigzag gives every rank the same share of causal work.
Documents may start and end anywhere. A chunk cuts the documents that cross its edges into *segments*; the metadata
below, the same on every rank, says which segments belong together. It is computed once per batch, on the host.

Shape legend: T tokens on this rank, S tokens on the whole axis.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from minimax_train.documents import Documents

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Chunk:
    """One equal piece of the token axis and the segments in it.

    Attributes:
        index: place in global chunk order.
        rank: the rank that holds it.
        start, end: global token range.
        edges: global token positions where segments start or end: ``start``, every document start inside, ``end``.
        continues_before: whether its first segment's document has tokens before the chunk.
        continues_after: whether its last segment's document has tokens after the chunk.
    """

    index: int
    rank: int
    start: int
    end: int
    edges: tuple[int, ...]
    continues_before: bool
    continues_after: bool

    @property
    def first_segment(self) -> tuple[int, int]:
        """Global token range of the first segment."""
        return self.edges[0], self.edges[1]

    @property
    def last_segment(self) -> tuple[int, int]:
        """Global token range of the last segment."""
        return self.edges[-2], self.edges[-1]

    @property
    def is_inside_one_document(self) -> bool:
        """Whether one document covers the chunk and goes on at both ends."""
        return len(self.edges) == 2 and self.continues_before and self.continues_after


@dataclass(frozen=True)
class SequenceLayout:
    """A way of dealing chunks to ranks.

    Attributes:
        kind: ``contiguous`` or ``zigzag``.
        num_ranks: ranks that share a row.

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
        """Holder of each chunk, in global chunk order."""
        ranks = tuple(range(self.num_ranks))
        return ranks if self.kind == "contiguous" or self.num_ranks == 1 else ranks + ranks[::-1]

    def check_length(self, tokens: int) -> None:
        """Refuse a row that cannot be cut in equal chunks.

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
        size = documents.num_tokens // len(self.chunk_ranks)
        bounds = documents.bounds
        chunks = []
        for index, holder in enumerate(self.chunk_ranks):
            start, end = index * size, (index + 1) * size
            inside = bounds[bisect_right(bounds, start) : bisect_right(bounds, end - 1)]
            first_document = bisect_right(bounds, start) - 1
            last_document = bisect_right(bounds, end - 1) - 1
            chunks.append(
                Chunk(
                    index=index,
                    rank=holder,
                    start=start,
                    end=end,
                    edges=(start, *inside, end),
                    continues_before=bounds[first_document] < start,
                    continues_after=bounds[last_document + 1] > end,
                )
            )
        return SequenceShard(self, rank, tuple(chunks), documents)


@dataclass(frozen=True, eq=False)
class SequenceShard:
    """The part of a packed token axis that one rank holds: its chunks, one after the other.

    Attributes:
        layout: how the axis was cut.
        rank: this rank among those that share the axis.
        chunks: all chunks, in global chunk order; the same on every rank.
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
        return self.chunks[0].end - self.chunks[0].start

    @cached_property
    def documents(self) -> Documents:
        """This rank's segments as documents of its own token axis, with their true positions."""
        lengths, positions = [], []
        starts = self.whole.bounds
        for chunk in self.mine:
            for start, end in zip(chunk.edges, chunk.edges[1:], strict=False):
                lengths.append(end - start)
                positions.append(start - starts[bisect_right(starts, start) - 1])
        return Documents.from_lengths(lengths, self.whole.device, first_positions=positions)

    def to(self, device: torch.device | str) -> SequenceShard:
        """The same shard, its documents' tensors on another device."""
        return replace(self, whole=self.whole.to(device))

    def offset(self, chunk: Chunk) -> int:
        """Where a chunk of this rank begins on its token axis."""
        return self.mine.index(chunk) * self.chunk_size

    def local(self, segment: tuple[int, int]) -> slice:
        """A global token range inside one of this rank's chunks, as a slice of its token axis."""
        chunk = self.chunks[segment[0] // self.chunk_size]
        begin = self.offset(chunk) + segment[0] - chunk.start
        return slice(begin, begin + segment[1] - segment[0])

    def take(self, x_S: Tensor) -> Tensor:
        """This rank's tokens of a tensor over the whole axis: ``[S, ...] -> [T, ...]``."""
        return torch.cat([x_S[chunk.start : chunk.end] for chunk in self.mine])

    @cached_property
    def global_tokens_T(self) -> Tensor:
        """Place of each of this rank's tokens on the whole axis, int64, on the host."""
        return self.take(torch.arange(self.whole.num_tokens))
