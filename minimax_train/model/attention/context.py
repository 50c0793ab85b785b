"""What every layer of one forward pass shares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minimax_train.kernels.documents import Documents


@dataclass(frozen=True, eq=False)
class TokenContext:
    """Where the tokens of a micro-batch stand.

    Attributes:
        documents: the packed documents.
        num_rows: rows concatenated on the token axis, all of one length.
        cos_TR, sin_TR: rotary tables of the tokens' positions within their documents, float32.
    """

    documents: Documents
    num_rows: int
    cos_TR: Tensor
    sin_TR: Tensor
