"""What every layer of one forward pass shares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from minimax_train.kernels.documents import Documents
from minimax_train.parallel.layout import SequenceLayout, SequenceShard


@dataclass(frozen=True, eq=False)
class RowPieces:
    """The pieces of rows that these tokens are: all of each row on one rank, parts of some where ranks share them.

    Attributes:
        piece_T: the piece each token lies in, int64, ascending.
        chunks_P, rows_P: the chunk (in global order) and the row of each piece, int64.
        num_chunks, num_rows, row_length: of the whole micro-batch.
    """

    piece_T: Tensor
    chunks_P: Tensor
    rows_P: Tensor
    num_chunks: int
    num_rows: int
    row_length: int


@dataclass(frozen=True, eq=False)
class TokenContext:
    """Where the tokens of a micro-batch stand.

    Attributes:
        documents: the packed documents.
        num_rows: rows concatenated on the token axis, all of one length.
        shard: which tokens of those rows these are, when several ranks share them; None when they are all.
        cos_TR, sin_TR: rotary tables of the tokens' positions within their documents, float32.
    """

    documents: Documents
    num_rows: int
    shard: SequenceShard | None
    cos_TR: Tensor
    sin_TR: Tensor

    @cached_property
    def pieces(self) -> RowPieces:
        """Made at the first use and shared by all layers."""
        shard = self.shard or SequenceLayout("contiguous", 1).shard(self.documents, 0)
        row_length = shard.whole.num_tokens // self.num_rows
        tokens_T = shard.global_tokens_T
        place_T = tokens_T // shard.chunk_size * self.num_rows + tokens_T // row_length
        place_P, piece_T = place_T.unique_consecutive(return_inverse=True)
        parts = (piece_T, place_P // self.num_rows, place_P % self.num_rows)
        device = self.documents.device
        return RowPieces(
            *(part.to(device, non_blocking=True) for part in parts), len(shard.chunks), self.num_rows, row_length
        )
