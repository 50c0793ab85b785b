"""Who attends to whose keys and what is sent for it: computed once per batch, on the host, alike on every rank.

For a query chunk i and an earlier key chunk j, only one document can span both: the last segment of j and the first
segment of i make one dense rectangle if they belong to it, and nothing otherwise. Over all chunks of two *ranks* it is
still one rectangle at most, whose queries and keys are each contiguous on their rank's token axis: between two chunks
of a rank that both take part, the document covers everything, so the pieces adjoin.

Transfers are ordered as in a ring: at distance d, each rank sends to the rank d places on and receives from the one d
places back. Each goes straight to its reader, so nothing is sent that its receiver does not use, and a distance at
which no document is shared costs nothing. Distances whose transfers fit in one rank's share together make one *round*.

Shape legend: T tokens on each rank, S tokens on the whole axis.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from minimax_train.kernels.documents import Documents
from minimax_train.parallel.layout import Chunk, SequenceShard


@dataclass(frozen=True)
class Rectangle:
    """Dense attention of one rank's queries to another's keys: token ranges, each on its own rank's token axis."""

    queries: slice
    keys: slice

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start

    @property
    def num_scores(self) -> int:
        return (self.queries.stop - self.queries.start) * self.num_keys


@dataclass(frozen=True)
class Read:
    """One rectangle a rank computes: keys from ``source``, with its edges as documents on the compute device."""

    source: int
    rectangle: Rectangle
    queries: Documents
    keys: Documents


@dataclass(frozen=True)
class Round:
    """What one rank does with one exchange: the rectangles whose keys it receives, the key ranges it sends, by rank."""

    reads: tuple[Read, ...]
    sends: Mapping[int, slice]


@dataclass(frozen=True, eq=False)
class RingPlan:
    """The exchanges and rectangles of all ranks.

    Attributes:
        num_ranks: ranks that share the row.
        tokens: tokens on each rank.
        rectangles: by (rank of the queries, rank of the keys); pairs that share no document are absent.
        rounds: the distances whose transfers travel together, in order.
    """

    num_ranks: int
    tokens: int
    rectangles: Mapping[tuple[int, int], Rectangle]
    rounds: tuple[tuple[int, ...], ...]

    def pairs(self, distances: Iterable[int]) -> list[tuple[int, int]]:
        """(reader, source) of every rectangle at some distances."""
        wanted = set(distances)
        return [pair for pair in self.rectangles if (pair[0] - pair[1]) % self.num_ranks in wanted]

    def tokens_sent(self, rank: int) -> int:
        """Tokens whose keys and values a rank sends in a forward pass."""
        return sum(r.num_keys for (_, source), r in self.rectangles.items() if source == rank)

    @cached_property
    def total_tokens_sent(self) -> int:
        return sum(r.num_keys for r in self.rectangles.values())

    @property
    def plain_tokens_sent(self) -> int:
        """Tokens sent by all ranks in a ring that passes every rank's whole share to every other rank."""
        return self.num_ranks * (self.num_ranks - 1) * self.tokens


@dataclass(frozen=True, eq=False)
class RankPlan:
    """One rank's part of the plan.

    Attributes:
        ring: the whole plan.
        local: this rank's segments, those of one document that lie next to each other joined: attention among the
            rank's own tokens is causal over these, and nothing else.
        rounds: one per round of the plan, possibly empty.
        queries_merged, keys_sent: disjoint token ranges of this rank, in order: queries of any rectangle, keys that
            any other rank reads. Each rectangle's lie inside one of them.
    """

    ring: RingPlan
    local: Documents
    rounds: tuple[Round, ...]
    queries_merged: tuple[slice, ...]
    keys_sent: tuple[slice, ...]


def _document_start(shard: SequenceShard, chunk: Chunk) -> int:
    """Global position where the document of a chunk's first token starts."""
    bounds = shard.whole.bounds
    return bounds[bisect_right(bounds, chunk.start) - 1]


def earlier_pieces(shard: SequenceShard, chunk: Chunk) -> list[tuple[Chunk, tuple[int, int]]]:
    """Where the first document of a chunk lies before it: earlier chunks and the global range in each, in order."""
    first = _document_start(shard, chunk) // shard.chunk_size
    return [(earlier, earlier.last_segment) for earlier in shard.chunks[first : chunk.index]]


def _union(ranges: Iterable[slice]) -> tuple[slice, ...]:
    """Disjoint ranges that cover the same tokens, in order."""
    united: list[slice] = []
    for tokens in sorted(ranges, key=lambda tokens: tokens.start):
        if united and tokens.start <= united[-1].stop:
            united[-1] = slice(united[-1].start, max(united[-1].stop, tokens.stop))
        else:
            united.append(tokens)
    return tuple(united)


def _hull(pieces: set[tuple[int, int]]) -> slice:
    """The range that adjoining pieces make."""
    ordered = sorted(pieces)
    assert all(before[1] == after[0] for before, after in pairwise(ordered)), ordered
    return slice(ordered[0][0], ordered[-1][1])


def _rectangles(shard: SequenceShard) -> dict[tuple[int, int], Rectangle]:
    size, offsets, held = shard.chunk_size, {}, defaultdict(int)
    for chunk in shard.chunks:  # in global order, as the chunks of a rank lie on its axis
        offsets[chunk.index] = held[chunk.rank] * size - chunk.start
        held[chunk.rank] += 1
    blocks = defaultdict(set)
    for chunk in shard.chunks:
        queries = tuple(t + offsets[chunk.index] for t in chunk.first_segment)
        for earlier, segment in earlier_pieces(shard, chunk):
            if earlier.rank != chunk.rank:
                keys = tuple(t + offsets[earlier.index] for t in segment)
                blocks[chunk.rank, earlier.rank].add((queries, keys))
    rectangles = {}
    for pair, members in blocks.items():
        queries, keys = ({member[side] for member in members} for side in (0, 1))
        assert len(members) == len(queries) * len(keys), "blocks of two ranks must fill a rectangle"
        rectangles[pair] = Rectangle(_hull(queries), _hull(keys))
    return rectangles


@lru_cache(maxsize=8)
def ring_plan(shard: SequenceShard) -> RingPlan:
    """The plan of all ranks, from any rank's shard; kept for the last few shards, since all layers share it."""
    num_ranks = shard.layout.num_ranks
    rectangles = _rectangles(shard)
    tokens = shard.whole.num_tokens // num_ranks
    widths = [0] * num_ranks
    for (reader, source), rectangle in rectangles.items():
        distance = (reader - source) % num_ranks
        widths[distance] = max(widths[distance], rectangle.num_keys)
    rounds, width = [], 0
    for distance in range(1, num_ranks):
        if not widths[distance]:
            continue
        if rounds and width + widths[distance] <= tokens:
            rounds[-1].append(distance)
            width += widths[distance]
        else:
            rounds.append([distance])
            width = widths[distance]
    return RingPlan(num_ranks, tokens, rectangles, tuple(map(tuple, rounds)))


def local_lengths(shard: SequenceShard) -> list[int]:
    """Lengths of this rank's segments, in tokens; two that adjoin on its axis and belong to one document are one.

    In a zigzag, a document may leave a rank at the end of its first chunk and return at the start of its second. Order
    on the rank's axis is order in the document, so causal attention over the joined segment is right for both.
    """
    lengths: list[int] = []
    for index, chunk in enumerate(shard.mine):
        joins = index > 0 and chunk.continues_before and _document_start(shard, chunk) < shard.mine[index - 1].end
        segments = [end - start for start, end in pairwise(chunk.edges)]
        if joins:
            lengths[-1] += segments.pop(0)
        lengths += segments
    return lengths


@lru_cache(maxsize=8)
def rank_plan(shard: SequenceShard) -> RankPlan:
    """The plan of the rank that holds a shard; kept likewise."""
    ring = ring_plan(shard)
    rank, device = shard.rank, shard.whole.device
    rounds = []
    for distances in ring.rounds:
        reads, sends = [], {}
        for distance in distances:
            source, reader = (rank - distance) % ring.num_ranks, (rank + distance) % ring.num_ranks
            if rectangle := ring.rectangles.get((rank, source)):
                lengths = (rectangle.queries.stop - rectangle.queries.start, rectangle.num_keys)
                edges = (Documents.from_lengths([length], device) for length in lengths)
                reads.append(Read(source, rectangle, *edges))
            if rectangle := ring.rectangles.get((reader, rank)):
                sends[reader] = rectangle.keys
        rounds.append(Round(tuple(reads), sends))
    return RankPlan(
        ring,
        Documents.from_lengths(local_lengths(shard), device),
        tuple(rounds),
        _union(read.rectangle.queries for this in rounds for read in this.reads),
        _union(keys for this in rounds for keys in this.sends.values()),
    )
