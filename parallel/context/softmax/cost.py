"""Ring or all-gather: what each takes, from the plans alone, on the host."""

from __future__ import annotations

from dataclasses import dataclass

from minimax_train.parallel.context.layout import SequenceShard
from minimax_train.parallel.context.softmax.allgather import gather_plan
from minimax_train.parallel.context.softmax.plan import local_lengths, ring_plan
from minimax_train.parallel.cost import H200, Machine

# Most memory that gathered keys and values and their float32 gradients may take.
MOST_GATHERED_BYTES = 8 * 2**30
# Merging one element in 16-bit arithmetic: cast (read 2, write 4 bytes), then lerp (read 4 + 4, write 4).
MERGE_BYTES = 18


@dataclass(frozen=True)
class Sizes:
    """One layer's attention on one rank: query heads, key-value heads, their dims, bytes of an element."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    element_bytes: int


@dataclass(frozen=True)
class Estimate:
    """Seconds of a forward pass on the slowest rank, and the bytes an all-gather would keep.

    The backward pass has 2.5 times the arithmetic and twice the transfers of either method, so it does not change
    which is faster.
    """

    ring_s: float
    allgather_s: float
    gathered_bytes: float

    @property
    def best(self) -> str:
        fits = self.gathered_bytes <= MOST_GATHERED_BYTES
        return "allgather" if fits and self.allgather_s < self.ring_s else "ring"


def estimate(shard: SequenceShard, sizes: Sizes, machine: Machine = H200) -> Estimate:
    """Forward times of both methods for one layer.

    Ring: the transfer of a round runs beside the arithmetic of the one before, so each costs the larger of the two,
    on the rank where it is largest; merging comes on top. All-gather: the transfer, then all the arithmetic.
    """
    ring, gather = ring_plan(shard), gather_plan(shard)
    link, ranks = machine.link(ring.num_ranks), range(ring.num_ranks)
    kv_dims = sizes.kv_heads * (sizes.key_dim + sizes.value_dim)
    kv_bytes = kv_dims * sizes.element_bytes

    def attention_s(scores: float) -> float:
        return scores * 2 * sizes.heads * (sizes.key_dim + sizes.value_dim) / machine.attention_flops_per_s

    # By step and rank. Step 0 is attention among local tokens, step i + 1 to the keys of round i; these arrive during
    # step i.
    scores, received, merged = ([[0.0] * ring.num_ranks for _ in range(len(ring.rounds) + 1)] for _ in range(3))
    for rank in ranks:
        lengths = local_lengths([chunk for chunk in shard.chunks if chunk.rank == rank])
        scores[0][rank] = sum(length * (length + 1) / 2 for length in lengths)
    round_of = {distance: index for index, distances in enumerate(ring.rounds) for distance in distances}
    for (reader, source), rectangle in ring.rectangles.items():
        index = round_of[(reader - source) % ring.num_ranks]
        received[index][reader] += rectangle.num_keys
        scores[index + 1][reader] += rectangle.num_scores
        merged[index + 1][reader] += rectangle.num_queries
    ring_s = sum(
        max(attention_s(max(computed)), link.send_receive_s(max(arriving) * kv_bytes))
        for computed, arriving in zip(scores, received, strict=True)
    )
    merged_elements = sum(map(max, merged)) * sizes.heads * sizes.value_dim
    ring_s += merged_elements * MERGE_BYTES / machine.copy_bytes_per_s

    gathered = gather.num_chunks * gather.width
    allgather_s = link.all_gather_s(gathered * kv_bytes, ring.num_ranks)
    allgather_s += attention_s(max(sum(step[rank] for step in scores) for rank in ranks))
    return Estimate(ring_s, allgather_s, ring.num_ranks * gathered * kv_dims * (2 * sizes.element_bytes + 4))


def choose_method(shard: SequenceShard, sizes: Sizes, machine: Machine = H200) -> str:
    """``ring`` or ``allgather``, alike on every rank: the one estimated to be faster, if the gathered keys fit."""
    return shard.derive(("softmax method", sizes, machine), lambda shard: estimate(shard, sizes, machine).best)
