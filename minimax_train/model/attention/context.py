"""What every layer of one forward pass shares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minimax_train.documents import Documents, to_device
from minimax_train.parallel.context.layout import SequenceLayout, SequenceShard


@dataclass(frozen=True)
class TokenShare:
    """Which of the tokens of a micro-batch are this rank's between attention layers, beside its sequence shard.

    Attributes:
        rank, size: the share's number among equal shares of the shard's tokens, in their order (tensor parallelism).
        replica, replicas: this rank's rows among those that other ranks train on at the same time (data parallelism).
    """

    rank: int = 0
    size: int = 1
    replica: int = 0
    replicas: int = 1


@dataclass(frozen=True, eq=False)
class TokenPieces:
    """This rank's tokens cut where a row, a chunk of a sequence shard or a share of it ends.

    Attributes:
        piece_T: the piece each token lies in, int64, ascending.
        row_P: the row of the micro-batch each piece is part of, int64.
        place_P: place of each piece among those of its row on all ranks, in token order, int64.
        num_places: how many there can be in a row.
        num_rows, row_length: of the micro-batch.
    """

    piece_T: Tensor
    row_P: Tensor
    place_P: Tensor
    num_places: int
    num_rows: int
    row_length: int


@dataclass(frozen=True, eq=False)
class TokenPools:
    """Tokens whose expert choices are counted together: those of a row, of all ranks at once, or of this rank.

    Attributes:
        pool_P: the pool of each piece, int64.
        place_P: place of each piece among those of its pool on all ranks, in token order, int64.
        num_pools, num_places: how many there are.
        tokens: tokens of a pool.
    """

    pool_P: Tensor
    place_P: Tensor
    num_pools: int
    num_places: int
    tokens: int

    @classmethod
    def of(cls, scope: str, pieces: TokenPieces, share: TokenShare) -> TokenPools:
        """The pools of a scope: ``row``, ``global`` or ``rank``."""
        rows, places = pieces.num_rows, pieces.num_places
        if scope == "row":
            return cls(pieces.row_P, pieces.place_P, rows, places, pieces.row_length)
        first = torch.zeros_like(pieces.row_P)
        if scope == "rank":
            order_P = torch.arange(len(first), device=first.device)
            return cls(first, order_P, 1, len(first), len(pieces.piece_T))
        # As rows are dealt: row i of the whole batch to replica i modulo their number.
        order_P = (pieces.row_P * share.replicas + share.replica) * places + pieces.place_P
        total = share.replicas * rows * pieces.row_length
        return cls(first, order_P, 1, share.replicas * rows * places, total)

    def spread(self, load_PE: Tensor) -> Tensor:
        """Counts of this rank's pieces at their places: ``[places, pools, E]``, zero where other ranks' are."""
        load_JBE = load_PE.new_zeros(self.num_places, self.num_pools, load_PE.shape[1])
        load_JBE[self.place_P, self.pool_P] = load_PE
        return load_JBE


@dataclass(frozen=True, eq=False)
class TokenContext:
    """Where the tokens of a micro-batch stand.

    Attributes:
        documents: the packed documents.
        num_rows: rows concatenated on the token axis, all of one length.
        shard: which tokens of those rows these are, when several ranks share them; None when they are all.
        share: which of those are this rank's between attention layers.
        cos_TR, sin_TR: rotary tables of the tokens' positions within their documents, float32.
    """

    documents: Documents
    num_rows: int
    shard: SequenceShard | None
    share: TokenShare
    cos_TR: Tensor
    sin_TR: Tensor

    @cached_property
    def pieces(self) -> TokenPieces:
        """Made at the first use and shared by all layers."""
        shard, share = self.shard or SequenceLayout("contiguous", 1).shard(self.documents, 0), self.share
        row_length = shard.whole.num_tokens // self.num_rows
        tokens_T = shard.global_tokens_T.chunk(share.size)[share.rank]
        key_T = tokens_T // shard.chunk_size * self.num_rows + tokens_T // row_length
        key_P, piece_T = key_T.unique_consecutive(return_inverse=True)
        place_P = key_P // self.num_rows * share.size + share.rank
        on_device = (to_device(x, self.documents.device) for x in (piece_T, key_P % self.num_rows, place_P))
        return TokenPieces(*on_device, len(shard.chunks) * share.size, self.num_rows, row_length)

    def pools(self, scope: str) -> TokenPools:
        """Made at the first use of each scope and shared by all layers."""
        if scope not in self._pools:
            self._pools[scope] = TokenPools.of(scope, self.pieces, self.share)
        return self._pools[scope]

    @cached_property
    def _pools(self) -> dict[str, TokenPools]:
        return {}
