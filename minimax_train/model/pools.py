"""Whose assignments to experts are counted together, for capacity and for the load-balancing loss.

A *pool* is the tokens that share an expert's capacity. By the scopes of ``model.capacity_scope`` and
``model.aux_loss_scope`` that is each packed sequence (``sequence``), the micro-batches of all ranks (``global``), or
the micro-batch of this rank (``rank``). Earlier tokens of a pool are served first, so a rank must know what was
assigned before each of its tokens on other ranks. It counts by *span*: tokens of its own that follow each other in one
packed sequence. Each span's counts go to its place in the token order of the pool, and a sum over ranks fills in the
others'.

Shape legend: T tokens on this rank, P spans on this rank, B pools, J places of spans in a pool, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minimax_train.capture import Latest, latest
from minimax_train.documents import Documents
from minimax_train.model.ranks import ModelRanks
from minimax_train.parallel.context.layout import SequenceShard


@dataclass(frozen=True, eq=False)
class TokenPools:
    """The pools of one scope.

    Attributes:
        pool_P: the pool of each span, int64.
        place_P: place of each span in its pool, in token order over all ranks, int64.
        num_pools, num_places: B and J. Where there is one place, span p is all of pool p.
        num_tokens: tokens of a pool.
    """

    pool_P: Tensor
    place_P: Tensor
    num_pools: int
    num_places: int
    num_tokens: int

    def spread(self, count_PE: Tensor) -> Tensor:
        """This rank's counts at the places of its spans: ``[J, B, E]``, zero where other ranks' are."""
        if self.num_places == 1:
            return count_PE[None]
        count_JBE = count_PE.new_zeros(self.num_places, self.num_pools, count_PE.shape[1])
        count_JBE[self.place_P, self.pool_P] = count_PE
        return count_JBE

    def total(self, count_JBE: Tensor) -> Tensor:
        """Of each span's whole pool: ``[P, E]``."""
        return count_JBE[0] if self.num_places == 1 else count_JBE.sum(0)[self.pool_P]

    def before(self, count_JBE: Tensor) -> Tensor:
        """Of each span's pool, what comes before the span: ``[P, E]``."""
        return (count_JBE.cumsum(0) - count_JBE)[self.place_P, self.pool_P]


@dataclass(frozen=True, eq=False)
class TokenSpans:
    """The tokens of this rank between attention layers, cut where a packed sequence or a chunk of the layout ends.

    Attributes:
        ranks: who holds the others.
        span_T: the span each token lies in, int64, ascending.
        sequence_P: the packed sequence of the micro-batch each span is part of, int64.
        place_P: place of each span in its packed sequence, in token order over all ranks, int64.
        num_places: how many there can be in a packed sequence.
        num_sequences, sequence_length: of the micro-batch.
    """

    ranks: ModelRanks
    span_T: Tensor
    sequence_P: Tensor
    place_P: Tensor
    num_places: int
    num_sequences: int
    sequence_length: int
    _pools: dict[str, TokenPools] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        documents: Documents,
        shard: SequenceShard | Latest[SequenceShard] | None,
        num_sequences: int,
        ranks: ModelRanks,
    ) -> TokenSpans:
        """Those of a micro-batch; arguments as of :meth:`minimax_train.model.model.HybridModel.forward`.

        All is made on the device, and depends on no document: a CUDA graph may compute it.
        """
        if shard is None:
            return cls._of_whole(documents.num_tokens, documents.device, num_sequences, ranks)
        shard = latest(shard)
        sequence_length, tp, size = shard.whole.num_tokens // num_sequences, ranks.tp, shard.chunk_size
        here = tp.local_range(len(shard.mine) * size)
        pieces = []  # of chunks, on the whole axis
        for chunk in shard.mine:
            place = chunk.place * size
            start, end = max(here.start, place), min(here.stop, place + size)
            if start < end:
                pieces.append((chunk.start + start - place, chunk.start + end - place))
        num_spans = sum((end - 1) // sequence_length - start // sequence_length + 1 for start, end in pieces)
        tokens_T = torch.cat([torch.arange(*piece, device=documents.device) for piece in pieces])
        key_T = tokens_T // size * num_sequences + tokens_T // sequence_length
        span_T = F.pad((key_T[1:] != key_T[:-1]).cumsum(0), (1, 0))
        key_P = key_T.new_empty(num_spans).scatter_(0, span_T, key_T)
        place_P = key_P // num_sequences * tp.size + tp.rank
        num_places = len(shard.chunks) * tp.size
        return cls(ranks, span_T, key_P % num_sequences, place_P, num_places, num_sequences, sequence_length)

    @classmethod
    def _of_whole(
        cls, num_tokens: int, device: torch.device | str, num_sequences: int, ranks: ModelRanks
    ) -> TokenSpans:
        """Those of a rank whose tensor-parallel group has all tokens: of each packed sequence at most one."""
        sequence_length, tp = num_tokens // num_sequences, ranks.tp
        tokens = tp.local_range(num_tokens)
        first, last = tokens[0] // sequence_length, tokens[-1] // sequence_length
        span_T = torch.arange(tokens.start, tokens.stop, device=device) // sequence_length - first
        sequence_P = torch.arange(first, last + 1, device=device)
        place_P = torch.full_like(sequence_P, tp.rank)
        return cls(ranks, span_T, sequence_P, place_P, tp.size, num_sequences, sequence_length)

    def pools(self, scope: str) -> TokenPools:
        """Made at the first use of a scope (``sequence``, ``global`` or ``rank``) and shared by all layers."""
        if scope not in self._pools:
            self._pools[scope] = self._make_pools(scope)
        return self._pools[scope]

    def _make_pools(self, scope: str) -> TokenPools:
        sequences, places = self.num_sequences, self.num_places
        if scope == "sequence":
            return TokenPools(self.sequence_P, self.place_P, sequences, places, self.sequence_length)
        only_P = torch.zeros_like(self.sequence_P)
        if scope == "rank":
            order_P = torch.arange(len(only_P), device=only_P.device)
            return TokenPools(only_P, order_P, 1, len(only_P), len(self.span_T))
        assert scope == "global", scope
        # Sequence i of a step's micro-batches is on data-parallel rank i modulo their number.
        rank, size = self.ranks.dp_rank, self.ranks.dp_size
        order_P = (self.sequence_P * size + rank) * places + self.place_P
        return TokenPools(only_P, order_P, 1, size * sequences * places, size * sequences * self.sequence_length)
