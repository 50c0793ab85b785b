"""What the attentions of one forward pass share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minimax_train.capture import Latest
from minimax_train.documents import Documents
from minimax_train.parallel.context.layout import SequenceShard


@dataclass(frozen=True, eq=False)
class TokenContext:
    """Which tokens an attention works on: those of all ranks that share its heads, not this rank's alone.

    Attributes:
        documents: the packed documents, or the segments of them in the shard.
        shard: which tokens of the micro-batch these are, where context-parallel ranks share it; None when all. For
            functions that :func:`minimax_train.capture.uncaptured` wraps.
        cos_TR, sin_TR: rotary tables of the tokens' positions within their documents, float32.
    """

    documents: Documents
    shard: SequenceShard | Latest[SequenceShard] | None
    cos_TR: Tensor
    sin_TR: Tensor
