"""Ring or all-gather: a rule from bytes, latency and arithmetic, evaluated on the host from the plan alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from minimax_train.parallel.layout import SequenceShard
from minimax_train.parallel.softmax.allgather import gather_plan
from minimax_train.parallel.softmax.plan import local_lengths, ring_plan

METHODS = ("ring", "allgather")


@dataclass(frozen=True)
class Rates:
    """What the rule believes of the machine. The defaults are one H200 and two over NVLink.

    Attributes:
        link_bytes_per_s, link_latency_s: from two measured send-receives, 64 MB in 0.26 ms and 1 GB in 2.98 ms.
        attention_flops_per_s: FlashAttention-4, head dim 128, causal, 8K to 131K tokens.
        copy_bytes_per_s: device memory, bytes read plus bytes written.
        gathered_bytes: most memory an all-gather may take for gathered keys, values and their float32 gradients.
    """

    link_bytes_per_s: float = 3.44e11
    link_latency_s: float = 7.4e-5
    attention_flops_per_s: float = 6.5e14
    copy_bytes_per_s: float = 4.25e12
    gathered_bytes: float = 8 * 2**30


H200 = Rates()
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
    rates: Rates = H200,
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
    scores, received, merged = [local], [], []
    for distances in ring.rounds:
        in_round = {key: [0.0] * ring.num_ranks for key in ("scores", "received", "merged")}
        for reader, source in ring.pairs(distances):
            rectangle = ring.rectangles[reader, source]
            in_round["scores"][reader] += rectangle.num_scores
            in_round["received"][reader] += rectangle.num_keys
            in_round["merged"][reader] += rectangle.num_scores / rectangle.num_keys
        scores.append(in_round["scores"])
        received.append(in_round["received"])
        merged.append(in_round["merged"])
    received.append([0.0] * ring.num_ranks)
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
    rates: Rates = H200,
) -> str:
    """``ring`` or ``allgather``, alike on every rank: the one with the lower estimate, if the gathered keys fit."""
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
