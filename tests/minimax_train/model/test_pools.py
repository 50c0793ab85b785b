"""The spans of a rank's tokens, made on the device, against a count of them one by one."""

from types import SimpleNamespace

import pytest
import torch

from minimax_train.documents import DeviceDocuments
from minimax_train.model.pools import TokenSpans
from minimax_train.model.ranks import ModelRanks
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
