"""The spans of a rank's tokens, made on the device, against a count of them one by one."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from minimax_train.capture import Latest
from minimax_train.documents import DeviceDocuments, Documents
from minimax_train.model.pools import TokenSpans
from minimax_train.model.ranks import ModelRanks
from minimax_train.parallel.context.layout import SequenceLayout
from minimax_train.parallel.tensor import TensorParallel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("num_tokens", "num_sequences", "tp"), [(21, 3, 1), (24, 1, 3), (30, 5, 3), (30, 2, 6)])
def test_spans_without_context_parallelism(num_tokens, num_sequences, tp):
    documents = DeviceDocuments.of_shape(
        num_documents=num_tokens, num_tokens=num_tokens, max_length=num_tokens // num_sequences, device=DEVICE
    )
    length, seen = num_tokens // num_sequences, 0
    for rank in range(tp):
        ranks = ModelRanks(tp=TensorParallel(SimpleNamespace(rank=rank, size=tp)), dp_rank=1, dp_size=2)
        spans = TokenSpans.of(documents, None, num_sequences, ranks)
        mine = [t // length for t in range(num_tokens) if t * tp // num_tokens == rank]
        present = sorted(set(mine))
        assert spans.sequence_P.tolist() == present
        assert spans.span_T.tolist() == [present.index(sequence) for sequence in mine]
        assert spans.place_P.tolist() == [rank] * len(present) and spans.num_places == tp
        assert (spans.num_sequences, spans.sequence_length) == (num_sequences, length)
        seen += len(mine)
    assert seen == num_tokens


@pytest.mark.parametrize(
    ("kind", "cp", "tp", "num_sequences", "length"),
    [("zigzag", 2, 1, 3, 28), ("zigzag", 3, 2, 2, 60), ("contiguous", 4, 3, 1, 36), ("contiguous", 2, 1, 5, 6)],
)
@pytest.mark.parametrize("in_graph", [False, True])
def test_spans_with_context_parallelism(kind, cp, tp, num_sequences, length, in_graph):
    total, layout = num_sequences * length, SequenceLayout(kind, cp)
    whole = Documents.from_lengths([total // 3, total - total // 3], DEVICE)
    size = total // len(layout.chunk_ranks)
    placed = {}
    for rank, part in itertools.product(range(cp), range(tp)):
        shard = layout.shard(whole, rank)
        ranks = ModelRanks(tp=TensorParallel(SimpleNamespace(rank=part, size=tp)))
        given = Latest() if in_graph else shard
        if in_graph:
            given.value = shard
        spans = TokenSpans.of(shard.documents, given, num_sequences, ranks)
        chunks = [index for index, holder in enumerate(layout.chunk_ranks) if holder == rank]
        tokens = [t for index in chunks for t in range(index * size, (index + 1) * size)]
        tokens = tokens[part * len(tokens) // tp : (part + 1) * len(tokens) // tp]
        runs = [key for key, _ in itertools.groupby((t // size, t // length) for t in tokens)]
        assert spans.sequence_P.tolist() == [sequence for _, sequence in runs]
        assert spans.span_T.tolist() == [runs.index((t // size, t // length)) for t in tokens]
        assert (spans.num_sequences, spans.sequence_length) == (num_sequences, length)
        for place, sequence, run in zip(spans.place_P.tolist(), spans.sequence_P.tolist(), runs, strict=True):
            assert 0 <= place < spans.num_places
            first = next(t for t in tokens if (t // size, t // length) == run)
            assert placed.setdefault((sequence, place), first) == first, "a place has one span"
    for sequence in range(num_sequences):  # places are in token order
        firsts = [first for (of, _), first in sorted(placed.items()) if of == sequence]
        assert firsts == sorted(firsts)


@pytest.mark.parametrize(("tp", "num_sequences", "length"), [(1, 1, 5), (1, 3, 7), (3, 2, 9), (2, 5, 6)])
@pytest.mark.parametrize("scope", ["sequence", "global", "rank"])
def test_counts_of_whole_pools_and_before_each_span(scope, tp, num_sequences, length):
    """Of ranks one after the other, each with an expert that tells a token's place in the micro-batch."""
    num_tokens = num_sequences * length
    documents = DeviceDocuments.of_shape(
        num_documents=num_tokens, num_tokens=num_tokens, max_length=length, device=DEVICE
    )
    found, counts = [], []
    for rank in range(tp):
        spans = TokenSpans.of(
            documents, None, num_sequences, ModelRanks(tp=TensorParallel(SimpleNamespace(rank=rank, size=tp)))
        )
        mine = torch.arange(rank * num_tokens // tp, (rank + 1) * num_tokens // tp, device=DEVICE)
        count_PE = torch.zeros(len(spans.sequence_P), num_tokens, dtype=torch.int64, device=DEVICE)
        count_PE[spans.span_T, mine] = 1
        counts.append(spans.pools(scope).spread(count_PE))
        found.append((spans, mine.tolist()))
    for rank, (spans, mine) in enumerate(found):
        pools = spans.pools(scope)
        count_JBE = counts[rank] if scope == "rank" else torch.stack(counts).sum(0)
        total, before = pools.total(count_JBE), pools.before(count_JBE)
        for span, sequence in enumerate(spans.sequence_P.tolist()):
            pool = {
                "sequence": range(sequence * length, (sequence + 1) * length),
                "global": range(num_tokens),
                "rank": mine,
            }[scope]
            first = max(sequence * length, mine[0])
            assert total[span].nonzero().flatten().tolist() == list(pool)
            assert before[span].nonzero().flatten().tolist() == [token for token in pool if token < first]
