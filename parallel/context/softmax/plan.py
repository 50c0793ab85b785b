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

from minimax_train.documents import Documents
from minimax_train.parallel.context.layout import Chunk, SequenceShard


@dataclass(frozen=True)
class Rectangle:
    """Dense attention of one rank's queries to another's keys: token ranges, each on its own rank's token axis."""

    queries: slice
    keys: slice

    @property
    def num_queries(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        return self.keys.stop - self.keys.start

    @property
    def num_scores(self) -> int:
        return self.num_queries * self.num_keys


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

    @property
    def share_of_plain_ring(self) -> float:
        """Bytes sent in a training step, over those of a ring that passes every rank's whole share around.

        Either sends keys and values in the forward pass, again in the backward pass, and their gradients once. In the
        plain ring the gradients travel along with what they belong to and one hop further, home; it is counted as if
        they did so in 16 bits, though sums that travel should be in 32.
        """
        plain = 2 * self.plain_tokens_sent + self.num_ranks * self.num_ranks * self.tokens
        return 3 * self.total_tokens_sent / plain


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


def first_shared_chunk(shard: SequenceShard, chunk: Chunk) -> int:
    """The chunk where the first document of a chunk starts. It and all between share that document's last segment."""
    return _document_start(shard, chunk) // shard.chunk_size


def _union(ranges: Iterable[slice]) -> tuple[slice, ...]:
    """Disjoint ranges that cover the same tokens, in order."""
    united: list[slice] = []
    for tokens in sorted(ranges, key=lambda tokens: tokens.start):
        if united and tokens.start <= united[-1].stop:
            united[-1] = slice(united[-1].start, max(united[-1].stop, tokens.stop))
        else:
            united.append(tokens)
    return tuple(united)


def _rectangles(shard: SequenceShard) -> dict[tuple[int, int], Rectangle]:
    """By (rank of the queries, rank of the keys): the smallest rectangle around their blocks, which fill it."""
    size, held = shard.chunk_size, defaultdict(int)
    first_segments, last_segments = [], []
    for chunk in shard.chunks:  # in global order, as the chunks of a rank lie on its axis
        shift = held[chunk.rank] * size - chunk.start
        held[chunk.rank] += 1
        first_segments.append(tuple(t + shift for t in chunk.first_segment))
        last_segments.append((chunk.rank, *(t + shift for t in chunk.last_segment)))

    boxes: dict[tuple[int, int], list[int]] = {}
    for chunk, (first_query, last_query) in zip(shard.chunks, first_segments, strict=True):
        reader, queries = chunk.rank, last_query - first_query
        for source, first_key, last_key in last_segments[first_shared_chunk(shard, chunk) : chunk.index]:
            if source == reader:
                continue
            scores = queries * (last_key - first_key)
            box = boxes.setdefault((reader, source), [first_query, last_query, first_key, last_key, 0])
            box[0], box[1] = min(box[0], first_query), max(box[1], last_query)
            box[2], box[3] = min(box[2], first_key), max(box[3], last_key)
            box[4] += scores
    rectangles = {}
    for pair, (first_query, last_query, first_key, last_key, scores) in boxes.items():
        rectangles[pair] = Rectangle(slice(first_query, last_query), slice(first_key, last_key))
        assert rectangles[pair].num_scores == scores, "blocks of two ranks must fill a rectangle"
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
                lengths = (rectangle.num_queries, rectangle.num_keys)
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
