"""Ring or all-gather: a rule from bytes, latency and arithmetic, evaluated on the host from the plan alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from minimax_train.parallel.context.layout import SequenceShard
from minimax_train.parallel.context.softmax.allgather import gather_plan
from minimax_train.parallel.context.softmax.plan import local_lengths, ring_plan

METHODS = ("ring", "allgather", "auto")


@dataclass(frozen=True)
class Rates:
    """What the rule believes of the machine.

    Attributes:
        link_bytes_per_s, link_latency_s: into one GPU. Within a node, two H200 over NVLink: a send-receive of 64 MB in
            0.26 ms and of 1 GB in 2.98 ms. Between nodes a 400 Gb/s network card per GPU.
        attention_flops_per_s: one H200, FlashAttention-4, head dim 128, causal, 8K to 131K tokens: 650 measured.
        copy_bytes_per_s: one H200, bytes read plus bytes written, measured.
        gathered_bytes: most memory an all-gather may take for gathered keys, values and their float32 gradients.
    """

    link_bytes_per_s: float
    link_latency_s: float = 7.4e-5
    attention_flops_per_s: float = 650e12
    copy_bytes_per_s: float = 4.25e12
    gathered_bytes: float = 8 * 2**30


IN_NODE, BETWEEN_NODES = Rates(link_bytes_per_s=344e9), Rates(link_bytes_per_s=50e9)
RANKS_PER_NODE = 8
# Merging one element in 16-bit arithmetic: cast (read 2, write 4 bytes), then lerp (read 4 + 4, write 4).
MERGE_BYTES = 18


@dataclass(frozen=True)
class Estimate:
    """Seconds of a forward pass on the slowest rank, and what the all-gather would keep in memory.

    The backward pass has 2.5 times the arithmetic and twice the transfers of either method, so it does not change
    which is faster.
    """

    ring_s: float
    allgather_s: float
    gathered_bytes: float

    def best(self, rates: Rates) -> str:
        return "allgather" if self.allgather_s < self.ring_s and self.gathered_bytes <= rates.gathered_bytes else "ring"


def estimate(
    shard: SequenceShard,
    *,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    element_bytes: int,
    rates: Rates,
) -> Estimate:
    """Forward times of both methods for one layer.

    Ring: the transfer of a round runs beside the arithmetic of the one before, so each costs the larger of the two,
    on the rank where it is largest; merging comes on top. All-gather: the transfer, then all the arithmetic.
    """
    ring, gather = ring_plan(shard), gather_plan(shard)
    kv_bytes = kv_heads * (key_dim + value_dim) * element_bytes

    def transfer_s(tokens: int) -> float:
        return rates.link_latency_s + tokens * kv_bytes / rates.link_bytes_per_s if tokens else 0.0

    def attention_s(scores: float) -> float:
        return scores * 2 * heads * (key_dim + value_dim) / rates.attention_flops_per_s

    ranks = range(ring.num_ranks)
    local = []
    for rank in ranks:
        lengths = local_lengths(SequenceShard(shard.layout, rank, shard.chunks, shard.whole))
        local.append(sum(length * (length + 1) / 2 for length in lengths))
    # By round and rank; the arithmetic of a round runs beside the transfer of the next, the local one beside the first.
    steps = range(len(ring.rounds) + 1)
    scores, received, merged = ([[0.0] * ring.num_ranks for _ in steps] for _ in range(3))
    scores[0] = local
    rounds = {distance: index for index, distances in enumerate(ring.rounds) for distance in distances}
    for (reader, source), rectangle in ring.rectangles.items():
        index = rounds[(reader - source) % ring.num_ranks]
        scores[index + 1][reader] += rectangle.num_scores
        received[index][reader] += rectangle.num_keys
        merged[index + 1][reader] += rectangle.num_queries
    ring_s = sum(
        max(attention_s(max(computed)), transfer_s(max(arriving)))
        for computed, arriving in zip(scores, received, strict=True)
    )
    ring_s += sum(max(tokens) for tokens in merged) * heads * value_dim * MERGE_BYTES / rates.copy_bytes_per_s

    total = [sum(column[rank] for column in scores) for rank in ranks]
    allgather_s = transfer_s(gather.tokens_sent) + attention_s(max(total))
    kept = ring.num_ranks * gather.num_chunks * gather.width * kv_heads * (key_dim + value_dim)
    return Estimate(ring_s, allgather_s, kept * (2 * element_bytes + 4))


@lru_cache(maxsize=8)
def choose_method(
    shard: SequenceShard,
    *,
    heads: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    element_bytes: int,
    rates: Rates | None = None,
) -> str:
    """``ring`` or ``allgather``, alike on every rank: the one with the lower estimate, if the gathered keys fit.

    Unless given, the rates are those of a link within a node for up to eight ranks, of one between nodes for more.
    """
    if rates is None:
        rates = IN_NODE if shard.layout.num_ranks <= RANKS_PER_NODE else BETWEEN_NODES
    costs = estimate(
        shard,
        heads=heads,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        element_bytes=element_bytes,
        rates=rates,
    )
    return costs.best(rates)
