"""Softmax attention over a shared sequence against the same attention on one rank; what the ring sends, counted."""

import random
import weakref
from dataclasses import replace

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.kernels.softmax import softmax_attention
from minimax_train.parallel.communicator import GroupCommunicator
from minimax_train.parallel.context.layout import SequenceLayout
from minimax_train.parallel.context.softmax import allgather, cost, plan, softmax_attention_cp
from minimax_train.parallel.context.softmax.allgather import gather_plan
from minimax_train.parallel.context.softmax.cost import Sizes, choose_method, estimate
from minimax_train.parallel.context.softmax.plan import local_lengths, rank_plan, ring_plan
from minimax_train.parallel.cost import Line, LinkRates, Machine
from support.distributed import GPU_LINKS, run_gpu_ranks, run_ranks
from support.mixes import random_mix

SCALE = 0.4
SIZES = Sizes(heads=64, kv_heads=8, key_dim=128, value_dim=128, element_bytes=2)


def _sequence(tokens, seed, dtype, heads):
    """Inputs and an output gradient for the whole sequence, the same on every rank."""
    H, G, K, V = heads
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, H, K), (tokens, G, K), (tokens, G, V), (tokens, H, V)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def _reference(sequence, lengths):
    """Output and gradients of q, k, v by autograd through the full masked softmax, in float64."""
    *inputs, grad = (x.double() for x in sequence)
    inputs = [x.requires_grad_() for x in inputs]
    out, _ = softmax_attention(*inputs, Documents.from_lengths(lengths), scale=SCALE, implementation="naive")
    return [out, *torch.autograd.grad(out, inputs, grad)]


def _shared(sequence, shard, communicator, device="cpu", **how):
    *inputs, grad = (shard.take(x).to(device) for x in sequence)
    inputs = [x.requires_grad_() for x in inputs]
    out = softmax_attention_cp(*inputs, shard, communicator, scale=SCALE, **how)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def _worst_error(actual, expected, shard):
    """Relative to the values, or to one where they are smaller: one-token documents have no gradients of q and k."""
    pairs = [(a.detach().cpu().double(), shard.take(e.detach())) for a, e in zip(actual, expected, strict=True)]
    return max(float((a - e).norm() / e.norm().clamp(min=1)) for a, e in pairs)


def _compare_many(grid, kind, size, seeds, dtype, heads, limit=1e-3):
    """The worst error of each method, over many mixes of documents."""
    communicator = GroupCommunicator(grid.group("dp"))
    layout = SequenceLayout(kind, communicator.size)
    tokens = size * len(layout.chunk_ranks)
    worst = {}
    for seed in seeds:
        lengths = random_mix(tokens, len(layout.chunk_ranks), seed)
        sequence = _sequence(tokens, seed, dtype, heads)
        shard = layout.shard(Documents.from_lengths(lengths), communicator.rank)
        expected = _reference(sequence, lengths)
        for method in ("ring", "allgather"):
            error = _worst_error(_shared(sequence, shard, communicator, method=method), expected, shard)
            assert error < limit, f"{method}, seed {seed}, documents of {lengths}"
            worst[method] = max(worst.get(method, 0), error)
    return worst


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("ranks", "size", "mixes"), [(2, 11, 40), (3, 7, 40), (4, 5, 40), (8, 3, 30)])
def test_equals_one_rank_in_float64(kind, ranks, size, mixes):
    for worst in run_ranks(_compare_many, ranks, kind, size, range(mixes), torch.float64, (6, 2, 5, 7)):
        assert max(worst.values()) < 1e-10, worst


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_equals_one_rank_in_float32(kind):
    for worst in run_ranks(_compare_many, 4, kind, 9, range(12), torch.float32, (4, 1, 8, 8)):
        assert max(worst.values()) < 1e-5, worst


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_sums_in_bfloat16_are_wide(kind):
    """The reference sees the same rounded inputs; eight roundings of a running sum would show."""
    for worst in run_ranks(_compare_many, 4, kind, 9, range(7, 15), torch.bfloat16, (4, 1, 8, 8), 0.1):
        assert max(worst.values()) < 5e-3, worst


def _compare_one(grid, kind, dtype, lengths, heads, device="cpu"):
    """The error of each method on one mix of documents, and the distances of each round."""
    communicator = GroupCommunicator(grid.group("dp"))
    whole = Documents.from_lengths(lengths)
    sequence = _sequence(whole.num_tokens, 1, dtype, heads)
    expected = _reference(sequence, lengths)
    shard = SequenceLayout(kind, communicator.size).shard(whole.to(device), communicator.rank)
    errors = {
        method: _worst_error(_shared(sequence, shard, communicator, device, method=method), expected, shard)
        for method in ("ring", "allgather")
    }
    return errors, ring_plan(shard).rounds


@pytest.mark.parametrize(
    ("kind", "ranks", "lengths", "rounds"),
    [
        ("contiguous", 7, [7 * 13], ((1,), (2,), (3,), (4,), (5,), (6,))),
        ("contiguous", 8, [17, 1, 100, 2], ((1,), (2,), (3,), (4,), (5,), (6,))),
        ("zigzag", 6, [12 * 11], ((1,), (2,), (3,), (4,), (5,))),
        ("zigzag", 6, [5, 44, 35], ((1, 2), (3, 4), (5,))),
        ("zigzag", 8, [2, 30, 16], ((1, 2), (3, 4), (5,), (6,), (7,))),
    ],
)
def test_rings_of_several_rounds(kind, ranks, lengths, rounds):
    for errors, found in run_ranks(_compare_one, ranks, kind, torch.float64, lengths, (6, 2, 5, 7)):
        assert found == rounds
        assert max(errors.values()) < 1e-10, errors


def test_one_rank_needs_no_one():
    lengths = [5, 1, 6]
    sequence = _sequence(12, 0, torch.float64, (4, 2, 3, 3))

    class Alone:
        rank, size = 0, 1

    for kind in ("contiguous", "zigzag"):
        shard = SequenceLayout(kind, 1).shard(Documents.from_lengths(lengths), 0)
        for method in ("ring", "allgather", "auto"):
            actual = _shared(sequence, shard, Alone(), method=method)
            assert _worst_error(actual, _reference(sequence, lengths), shard) < 1e-12


# ---------------------------------------------------------------------------------------------- the plan, counted


def _tokens_sent(ring):
    return sum(rectangle.num_keys for rectangle in ring.rectangles.values())


def _layouts():
    return [SequenceLayout(kind, ranks) for kind in ("contiguous", "zigzag") for ranks in (2, 3, 4, 8)]


@pytest.mark.parametrize("layout", _layouts(), ids=lambda x: f"{x.kind}-{x.num_ranks}")
@pytest.mark.parametrize("seed", range(20))
def test_every_pair_is_computed_once_where_its_query_lives(layout, seed):
    """Painted token by token: local segments and rectangles cover the causal pairs of each document, each once."""
    chunks = len(layout.chunk_ranks)
    tokens = 4 * chunks
    lengths = random_mix(tokens, chunks, seed)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    expected = ((document[:, None] == document) & torch.ones(tokens, tokens).tril().bool()).int()
    whole = Documents.from_lengths(lengths)
    shards = [layout.shard(whole, rank) for rank in range(layout.num_ranks)]
    painted = torch.zeros_like(expected)
    for shard in shards:
        mine = shard.global_tokens_T
        start = 0
        for length in local_lengths(shard.mine):
            segment = mine[start : start + length]
            painted[segment[:, None], segment] += torch.ones(length, length).tril().int()
            start += length
        for this in rank_plan(shard).rounds:
            for read in this.reads:
                keys = shards[read.source].global_tokens_T[read.rectangle.keys]
                painted[mine[read.rectangle.queries][:, None], keys] += 1
    assert torch.equal(painted, expected)


@pytest.mark.parametrize("layout", _layouts(), ids=lambda x: f"{x.kind}-{x.num_ranks}")
@pytest.mark.parametrize("seed", range(20))
def test_transfers_agree_and_never_exceed_the_full_ring(layout, seed):
    chunks = len(layout.chunk_ranks)
    lengths = random_mix(6 * chunks, chunks, seed)
    whole = Documents.from_lengths(lengths)
    shards = [layout.shard(whole, rank) for rank in range(layout.num_ranks)]
    plans, ring, tokens = [rank_plan(shard) for shard in shards], ring_plan(shards[0]), 6 * chunks // layout.num_ranks
    sent = 0
    for index in range(len(ring.rounds)):
        for rank, mine in enumerate(plans):
            received = {read.source: read.rectangle.keys for read in mine.rounds[index].reads}
            assert received == {
                source: other.rounds[index].sends[rank]
                for source, other in enumerate(plans)
                if rank in other.rounds[index].sends
            }
            sent += sum(keys.stop - keys.start for keys in mine.rounds[index].sends.values())
            # Two rounds are held at a time: never more than two ranks' shares.
            assert sum(read.rectangle.num_keys for read in mine.rounds[index].reads) <= tokens
    assert sent == _tokens_sent(ring) <= layout.num_ranks * (layout.num_ranks - 1) * tokens


@pytest.mark.parametrize("layout", _layouts(), ids=lambda x: f"{x.kind}-{x.num_ranks}")
def test_documents_that_end_on_chunk_edges_send_nothing(layout):
    size, chunks = 64, len(layout.chunk_ranks)
    for lengths in ([size] * chunks, [size // 4] * (4 * chunks), [1] * (size * chunks)):
        shard = layout.shard(Documents.from_lengths(lengths), 0)
        ring = ring_plan(shard)
        assert not ring.rectangles and ring.rounds == () and gather_plan(shard).width == 0


def test_one_document_zigzag():
    """Every rank reads half of each earlier-or-equal rank's share, or all of a later one's: the same work for all."""
    ring = ring_plan(SequenceLayout("zigzag", 4).shard(Documents.from_lengths([800]), 0))
    assert ring.rounds == ((1,), (2,), (3,))
    assert {pair: r.num_keys for pair, r in ring.rectangles.items()} == {
        (reader, source): 100 if source < reader else 200
        for reader in range(4)
        for source in range(4)
        if source != reader
    }
    assert {r.num_scores for r in ring.rectangles.values()} == {100 * 200}


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_documents_of_4k_send_under_5_percent_of_the_full_ring(kind, ranks):
    """64K tokens a rank; documents of 4096 tokens at any phase, and of random lengths around 4096.

    Bytes of a training step: keys and values forward, again backward, and their gradients. In a full ring every rank's
    tokens pass every other rank, and the gradients make one hop more, back to where they began.
    """
    tokens = 65536 * ranks
    full = 2 * (ranks - 1) * tokens + ranks * tokens

    def share(lengths):
        ring = ring_plan(SequenceLayout(kind, ranks).shard(Documents.from_lengths(lengths), 0))
        assert len(ring.rounds) == 1  # all of it in one exchange, beside the local work
        return 3 * _tokens_sent(ring) / full

    phases = [1, 4095, *range(73, 4096, 211)]
    assert max(share([phase, *[4096] * (tokens // 4096 - 1), 4096 - phase]) for phase in phases) < 0.05
    choose, shares = random.Random(0), []
    for _ in range(20):
        lengths = []
        while sum(lengths) < tokens:
            lengths.append(min(choose.randint(2048, 6144), tokens - sum(lengths)))
        shares.append(share(lengths))
    assert sum(shares) / len(shares) < 0.03 and max(shares) < 0.07


def test_plans_are_made_once_per_shard_and_die_with_it(monkeypatch):
    """With twenty micro-batches in flight, as in a pipeline, and two layers that take turns on them."""
    made = []

    def counted(make):
        return lambda shard, *rest: (made.append(make.__name__), make(shard, *rest))[1]

    makers = (plan._make_ring_plan, plan._make_rank_plan, allgather._make_gather_plan, cost.estimate)
    for module, make in zip((plan, plan, allgather, cost), makers, strict=True):
        monkeypatch.setattr(module, make.__name__, counted(make))
    documents = [Documents.from_lengths([40 + n, 56 - n]) for n in range(20)]
    shards = [SequenceLayout("zigzag", 4).shard(d, 1) for d in documents]
    other_sizes = replace(SIZES, heads=32)
    for _ in range(2):
        for shard in shards:
            assert rank_plan(shard) is rank_plan(shard) and gather_plan(shard) is gather_plan(shard)
            assert ring_plan(shard) is ring_plan(shard.to("cpu"))
            choose_method(shard, SIZES), choose_method(shard, other_sizes)
    assert {name: made.count(name) for name in made} == {
        "_make_ring_plan": 20,
        "_make_rank_plan": 20,
        "_make_gather_plan": 20,
        "estimate": 40,
    }
    alive = [weakref.ref(x) for shard in shards for x in (shard, ring_plan(shard), rank_plan(shard))]
    del shard, shards
    assert not any(x() for x in alive)


# ---------------------------------------------------------------------------------------------- choosing


def _machine(bytes_per_s, latency_s=1e-4):
    line = Line(latency_s, bytes_per_s)
    return Machine(node=LinkRates(send_receive=line, all_gather=line))


def test_choice_follows_the_link():
    """Behind a slow link the ring hides what an all-gather would wait for; on a fast one merging costs more."""
    shard = SequenceLayout("zigzag", 8).shard(Documents.from_lengths([65536 * 8]), 0)
    assert choose_method(shard, SIZES, _machine(2e10)) == "ring"
    assert choose_method(shard, SIZES, _machine(1e13, 0)) == "allgather"
    # Twice the keys take more memory than an all-gather may.
    shard = SequenceLayout("zigzag", 8).shard(Documents.from_lengths([131072 * 8]), 0)
    assert choose_method(shard, SIZES, _machine(1e13, 0)) == "ring"


def test_more_ranks_than_a_node_has_use_the_network():
    slow = Machine(node=_machine(1e13, 0).node, network=_machine(2e10).node, gpus_per_node=4)
    lengths = Documents.from_lengths([65536 * 8])
    assert choose_method(SequenceLayout("zigzag", 8).shard(lengths, 0), SIZES, slow) == "ring"
    assert choose_method(SequenceLayout("zigzag", 8).shard(lengths, 0), SIZES, replace(slow, gpus_per_node=8)) != "ring"


def test_estimates_are_the_arithmetic_where_nothing_is_sent():
    shard = SequenceLayout("zigzag", 4).shard(Documents.from_lengths([1024] * 8), 0)
    costs = estimate(shard, SIZES)
    flops = 2 * (1024 * 1025 / 2) * 4 * 64 * 128
    assert costs.ring_s == costs.allgather_s == pytest.approx(flops / 6.5e14)
    assert costs.gathered_bytes == 0


def test_estimates_of_one_document_on_two_ranks():
    """Rank 0 of a zigzag sends its first half to rank 1 and reads rank 1's whole share; so much by hand."""
    tokens, machine = 1000, Machine(_machine(1e9, 1e-3).node, attention_flops_per_s=1e12, copy_bytes_per_s=1e11)
    costs = estimate(SequenceLayout("zigzag", 2).shard(Documents.from_lengths([2 * tokens]), 0), SIZES, machine)
    flops_per_score, kv_bytes = 4 * 64 * 128, 8 * 256 * 2
    local, rectangle = tokens * (tokens + 1) / 2 * flops_per_score, tokens * tokens / 2 * flops_per_score
    merge_s = tokens * 64 * 128 * 18 / 1e11
    assert costs.ring_s == pytest.approx(max(local / 1e12, 1e-3 + tokens * kv_bytes / 1e9) + rectangle / 1e12 + merge_s)
    assert costs.allgather_s == pytest.approx(1e-3 + tokens * kv_bytes / 1e9 + (local + rectangle) / 1e12)
    assert costs.gathered_bytes == 2 * tokens * 8 * 256 * (2 * 2 + 4)


def test_every_rank_chooses_alike():
    for seed in range(10):
        for layout in _layouts():
            whole = Documents.from_lengths(random_mix(96 * layout.num_ranks, 2 * layout.num_ranks, seed))
            choices = {choose_method(layout.shard(whole, rank), SIZES) for rank in range(layout.num_ranks)}
            assert len(choices) == 1


def test_refusals():
    class Alone:
        rank, size = 0, 1

    q, k, v, _ = _sequence(4, 0, torch.float64, (2, 1, 3, 3))
    shard = SequenceLayout("contiguous", 1).shard(Documents.from_lengths([4]), 0)
    with pytest.raises(ValueError, match=r"parallel.softmax_cp='tree': must be one of auto, ring, allgather"):
        softmax_attention_cp(q, k, v, shard, Alone(), scale=1.0, method="tree")
    two = SequenceLayout("contiguous", 2).shard(Documents.from_lengths([8]), 1)
    with pytest.raises(ValueError, match=r"shard is of rank 1 of 2.*communicator of rank 0 of 1"):
        softmax_attention_cp(q, k, v, two, Alone(), scale=1.0)


# ---------------------------------------------------------------------------------------------- on a GPU


def _compare_on_gpu(grid, kind, dtype):
    mixes = [[1, 130, 1500, 7, 410], [2048], [512] * 4]  # of the last, documents end on chunk edges: nothing is sent
    return [_compare_one(grid, kind, dtype, lengths, (8, 2, 64, 64), "cuda")[0] for lengths in mixes]


@pytest.mark.gpu
@pytest.mark.parametrize("link", GPU_LINKS)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_one_rank_on_gpus(link, kind, dtype, tolerance):
    """The kernels are those a real run would choose."""
    for errors in run_gpu_ranks(_compare_on_gpu, link, kind, dtype):
        assert max(max(of_mix.values()) for of_mix in errors) < tolerance, errors
