"""Layouts against a token-by-token account of who holds what."""

import pytest
import torch

from minimax_train.documents import Documents
from minimax_train.parallel.context.layout import SequenceLayout
from support.mixes import random_mix


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(25))
def test_every_token_lies_where_the_layout_says(kind, ranks, seed):
    layout = SequenceLayout(kind, ranks)
    chunks = len(layout.chunk_ranks)
    tokens = 5 * chunks
    lengths = random_mix(tokens, max(chunks, 2), seed) if tokens > 5 else [2, 3]
    document_of = [n for n, length in enumerate(lengths) for _ in range(length)]
    position_of = [p for length in lengths for p in range(length)]
    whole = Documents.from_lengths(lengths)
    held = []
    for rank in range(ranks):
        shard = layout.shard(whole, rank)
        mine = shard.take(torch.arange(tokens)).tolist()
        assert mine == shard.global_tokens_T.tolist()
        held += mine
        assert shard.documents.num_tokens == len(mine) == tokens // ranks
        assert shard.documents.positions_T.tolist() == [position_of[t] for t in mine]
        # Two neighbours on a rank's axis are in one segment exactly if they are neighbours in one document and chunk.
        inner = set(range(1, len(mine))) - set(shard.documents.bounds)
        size = tokens // chunks
        for i in range(1, len(mine)):
            before, t = mine[i - 1], mine[i]
            together = t == before + 1 and document_of[t] == document_of[before] and t // size == before // size
            assert (i in inner) == together
        for chunk in shard.mine:
            assert mine[shard.local(chunk.first_segment).start] == chunk.start
            assert mine[shard.local(chunk.last_segment)] == list(range(*chunk.last_segment))
    assert sorted(held) == list(range(tokens))
    for chunk in shard.chunks:
        sharing = [c.index for c in shard.chunks[: chunk.index] if document_of[c.end - 1] == document_of[chunk.start]]
        assert [c.index for c in shard.earlier_chunks(chunk)] == sharing
        before, after = chunk.start - 1, chunk.end
        assert chunk.continues_before == (before >= 0 and document_of[before] == document_of[chunk.start])
        assert chunk.continues_after == (after < tokens and document_of[after] == document_of[after - 1])
        assert len({document_of[t] for t in range(*chunk.first_segment)}) == 1
        assert len({document_of[t] for t in range(*chunk.last_segment)}) == 1
        whole_chunk = set(document_of[max(0, before) : after + 1]) == {document_of[chunk.start]}
        assert chunk.is_inside_one_document == (whole_chunk and before >= 0 and after < tokens)


def test_zigzag_balances_causal_work():
    shards = [SequenceLayout("zigzag", 4).shard(Documents.from_lengths([64]), rank) for rank in range(4)]
    work = [int((shard.global_tokens_T + 1).sum()) for shard in shards]
    assert len(set(work)) == 1


def test_refusals():
    with pytest.raises(ValueError, match=r"parallel.layout='spiral': must be one of contiguous, zigzag"):
        SequenceLayout("spiral", 2)
    with pytest.raises(
        ValueError, match=r"data.sequence_length=100: must be a multiple of 8 .* nearest are 96 and 104"
    ):
        SequenceLayout("zigzag", 4).check_length(100)
    SequenceLayout("contiguous", 4).check_length(100)
