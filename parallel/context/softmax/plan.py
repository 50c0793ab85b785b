"""Who attends to whose keys, and what is sent for it: computed once per batch, on the host, alike on every rank.

Take the queries of a chunk and the keys of an earlier one. At most one document has tokens in both: in the first
segment of the later chunk and in the last segment of the earlier one. All those queries see all those keys: a dense
*rectangle* of scores. Between two ranks that hold several chunks, these rectangles make a single one, whose queries and
whose keys are each contiguous on their rank's token axis: a document that has tokens in two chunks of a rank covers the
end of the first and the start of the second, which are neighbours there.

A transfer goes from the rank that holds the keys directly to the rank that reads them, and only what is read is sent.
Transfers are ordered by distance: at distance d, rank r sends to rank r + d and receives from rank r - d (modulo their
number). Consecutive distances make one *round*, whose transfers travel together, as long as no rank receives more
tokens in it than it holds itself; distances at which no document is shared are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from minimax_train.documents import Documents
from minimax_train.parallel.context.layout import Chunk, SequenceShard


@dataclass(frozen=True)
class Rectangle:
    """Attention of all of one rank's queries in a range to all of another's keys in a range, each on its own axis."""

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
    """A rectangle that a rank computes with the keys of rank ``source``; its two sides as the kernels take them."""

    source: int
    rectangle: Rectangle
    queries: Documents
    keys: Documents


@dataclass(frozen=True)
class Round:
    """What one rank does in a round: the rectangles whose keys it receives, and the keys it sends to each rank."""

    reads: tuple[Read, ...]
    sends: Mapping[int, slice]


@dataclass(frozen=True, eq=False)
class RingPlan:
    """The rectangles and rounds of all ranks.

    Attributes:
        num_ranks: ranks that share the packed sequence.
        rectangles: by (rank of the queries, rank of the keys); pairs that share no document are absent.
        rounds: the distances that travel together, in the order of the rounds.
    """

    num_ranks: int
    rectangles: Mapping[tuple[int, int], Rectangle]
    rounds: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class RankPlan:
    """What one rank does.

    Attributes:
        local: its tokens as documents (:func:`local_lengths`); attention among them is causal.
        rounds: one per round of the ring, possibly without reads or sends.
        queries_merged: the queries of all its rectangles, as disjoint token ranges in order.
        keys_sent: the keys that other ranks read, likewise. Every range that is read or sent lies inside one of these.
    """

    local: Documents
    rounds: tuple[Round, ...]
    queries_merged: tuple[slice, ...]
    keys_sent: tuple[slice, ...]


def ring_plan(shard: SequenceShard) -> RingPlan:
    """The plan of all ranks, from any rank's shard; made once per shard."""
    return shard.derive("ring plan", _make_ring_plan)


def rank_plan(shard: SequenceShard) -> RankPlan:
    """The plan of the rank that holds a shard, on its device; made once per shard."""
    return shard.derive(("rank plan", shard.whole.device), _make_rank_plan)


def local_lengths(chunks: Sequence[Chunk]) -> list[int]:
    """Tokens of each segment of a rank's chunks; two neighbours that belong to one document count as one.

    In a zigzag, a document may leave a rank at the end of its first chunk and return at the start of its second. Order
    on the rank's axis is order in the document, so causal attention over the joined segment is right for both.
    """
    lengths: list[int] = []
    previous_end = 0
    for chunk in chunks:
        segments = [end - start for start, end in chunk.segments]
        if chunk.document_start < previous_end:
            lengths[-1] += segments.pop(0)
        lengths += segments
        previous_end = chunk.end
    return lengths


def _rectangles(shard: SequenceShard) -> dict[tuple[int, int], Rectangle]:
    """By (rank of the queries, rank of the keys): the smallest rectangle around those of their chunks."""
    keys = [shard.local(chunk.last_segment) for chunk in shard.chunks]
    rectangles: dict[tuple[int, int], Rectangle] = {}
    scores: dict[tuple[int, int], int] = {}
    for chunk in shard.chunks:
        queries = shard.local(chunk.first_segment)
        for earlier in shard.earlier_chunks(chunk):
            if earlier.rank == chunk.rank:
                continue
            pair, block = (chunk.rank, earlier.rank), Rectangle(queries, keys[earlier.index])
            known = rectangles.get(pair, block)
            rectangles[pair] = Rectangle(_around(known.queries, block.queries), _around(known.keys, block.keys))
            scores[pair] = scores.get(pair, 0) + block.num_scores
    assert all(rectangles[pair].num_scores == n for pair, n in scores.items()), "blocks must fill their rectangle"
    return rectangles


def _around(a: slice, b: slice) -> slice:
    return slice(min(a.start, b.start), max(a.stop, b.stop))


def _union(ranges: Iterable[slice]) -> tuple[slice, ...]:
    """Disjoint ranges that cover the same tokens, in order."""
    united: list[slice] = []
    for tokens in sorted(ranges, key=lambda tokens: tokens.start):
        if united and tokens.start <= united[-1].stop:
            united[-1] = _around(united[-1], tokens)
        else:
            united.append(tokens)
    return tuple(united)


def _make_ring_plan(shard: SequenceShard) -> RingPlan:
    num_ranks = shard.layout.num_ranks
    rectangles = _rectangles(shard)
    widest = [0] * num_ranks  # by distance: tokens of the longest transfer
    for (reader, source), rectangle in rectangles.items():
        distance = (reader - source) % num_ranks
        widest[distance] = max(widest[distance], rectangle.num_keys)
    rounds: list[list[int]] = []
    for distance in filter(widest.__getitem__, range(1, num_ranks)):
        together = [*rounds[-1], distance] if rounds else []
        if together and sum(widest[d] for d in together) <= shard.whole.num_tokens // num_ranks:
            rounds[-1] = together
        else:
            rounds.append([distance])
    return RingPlan(num_ranks, rectangles, tuple(map(tuple, rounds)))


def _make_rank_plan(shard: SequenceShard) -> RankPlan:
    ring, rank, device = ring_plan(shard), shard.rank, shard.whole.device
    rounds = []
    for distances in ring.rounds:
        reads, sends = [], {}
        for distance in distances:
            source, reader = (rank - distance) % ring.num_ranks, (rank + distance) % ring.num_ranks
            if rectangle := ring.rectangles.get((rank, source)):
                lengths = (rectangle.num_queries, rectangle.num_keys)
                reads.append(Read(source, rectangle, *(Documents.from_lengths([n], device) for n in lengths)))
            if rectangle := ring.rectangles.get((reader, rank)):
                sends[reader] = rectangle.keys
        rounds.append(Round(tuple(reads), sends))
    return RankPlan(
        Documents.from_lengths(local_lengths(shard.mine), device),
        tuple(rounds),
        _union(read.rectangle.queries for this in rounds for read in this.reads),
        _union(keys for this in rounds for keys in this.sends.values()),
    )
