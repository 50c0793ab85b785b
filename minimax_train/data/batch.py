"""A micro-batch: packed sequences on one token axis.

Shape legend: T tokens of the micro-batch; S tokens of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from minimax_train.capture import Latest, latest
from minimax_train.data.packing import PackedSequence
from minimax_train.documents import IGNORE_INDEX, Documents, to_device
from minimax_train.parallel.context.layout import SequenceLayout, SequenceShard


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        tokens_T: token ids, int64.
        labels_T: the token each position must predict, ``IGNORE_INDEX`` where there is none, int64.
        origins_T: of each token's document, its source and length: an index of :attr:`DataConfig.origins`, int32.
        documents: those of all sequences, of which each begins with a new one; or their segments in the shard.
        num_sequences: packed sequences, one after the other on the token axis.
        num_scores: pairs of tokens that a causal attention looks at in the whole sequences, also if these are shared.
        num_targets: labels that are not ``IGNORE_INDEX``, on the host: what a summed loss is divided by. May be 0.
        shard: which of their tokens these are, when context-parallel ranks share them; None when they are all. In a
            CUDA graph, that of the latest replay.
    """

    tokens_T: Tensor
    labels_T: Tensor
    origins_T: Tensor
    documents: Documents
    num_sequences: int
    num_targets: int
    num_scores: int
    shard: SequenceShard | Latest[SequenceShard] | None = None

    @classmethod
    def concatenate(cls, sequences: Sequence[PackedSequence]) -> MicroBatch:
        """Packed sequences of the same length, one after the other."""
        labels_T = np.concatenate([sequence.labels_S for sequence in sequences])
        lengths = list(chain.from_iterable(sequence.lengths for sequence in sequences))
        origins = np.fromiter(chain.from_iterable(sequence.origins for sequence in sequences), np.int32)
        return cls(
            tokens_T=torch.from_numpy(np.concatenate([sequence.tokens_S for sequence in sequences])),
            labels_T=torch.from_numpy(labels_T),
            origins_T=torch.from_numpy(origins.repeat(lengths)),
            documents=Documents.from_lengths(lengths),
            num_sequences=len(sequences),
            num_targets=int((labels_T != IGNORE_INDEX).sum()),
            num_scores=sum(length * (length + 1) // 2 for length in lengths),
        )

    def split(self, layout: SequenceLayout, rank: int) -> MicroBatch:
        """The part of the micro-batch that one of the context-parallel ranks holds; itself when there is one."""
        if layout.num_ranks == 1:
            return self
        shard = layout.shard(self.documents, rank)
        labels_T = shard.take(self.labels_T)
        return replace(
            self,
            tokens_T=shard.take(self.tokens_T),
            labels_T=labels_T,
            origins_T=shard.take(self.origins_T),
            documents=shard.documents,
            num_targets=int((labels_T != IGNORE_INDEX).sum()),
            shard=shard,
        )

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device; the copy to a GPU does not hold up the host."""
        shard = None if self.shard is None else latest(self.shard).to(device)
        return replace(
            self,
            tokens_T=to_device(self.tokens_T, device),
            labels_T=to_device(self.labels_T, device),
            origins_T=to_device(self.origins_T, device),
            documents=shard.documents if shard else self.documents.to(device),
            shard=shard,
        )
