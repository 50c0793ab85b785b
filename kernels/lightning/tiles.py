"""Documents cut in tiles, which the blockwise implementations work on.

A tile is at most C consecutive tokens of one document: what flash-linear-attention and Mamba-2 call a chunk, a word
that means a context-parallel rank's share of a packed sequence here.

Shape legend: B tiles, C tokens per tile, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minimax_train.documents import Documents, to_device


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of some documents in token order, on their device.

    Attributes:
        size: C.
        starts_B, lengths_B: first token and token count of each tile, int64.
        documents_B: the document each tile lies in, int64.
    """

    size: int
    starts_B: Tensor
    lengths_B: Tensor
    documents_B: Tensor

    @classmethod
    def of(cls, documents: Documents, size: int) -> Tiles:
        """The documents cut in tiles of at most ``size`` tokens; computed once per size."""
        return documents.derive(("tiles", size), lambda documents: cls._cut(documents, size))

    @classmethod
    def _cut(cls, documents: Documents, size: int) -> Tiles:
        lengths_N, ends_N = documents.cu_seqlens_cpu.diff().long(), tile_ends(documents, size)
        documents_B = torch.arange(len(documents)).repeat_interleave(ends_N.diff(prepend=ends_N.new_zeros(1)))
        first_B = torch.cat([ends_N.new_zeros(1), ends_N])[documents_B]
        offset_B = (torch.arange(len(documents_B)) - first_B) * size
        starts_B = documents.cu_seqlens_cpu.long()[documents_B] + offset_B
        lengths_B = (lengths_N[documents_B] - offset_B).clamp(max=size)
        return cls(size, *(to_device(x, documents.device) for x in (starts_B, lengths_B, documents_B)))

    @cached_property
    def tokens_BC(self) -> Tensor:
        """Token index of each slot of a tile, int64; slots past the tile's length repeat its last token."""
        slots_C = torch.arange(self.size, device=self.starts_B.device)
        return self.starts_B[:, None] + torch.minimum(slots_C, self.lengths_B[:, None] - 1)

    @cached_property
    def valid_BC(self) -> Tensor:
        """Whether the slot holds a token, bool."""
        return torch.arange(self.size, device=self.starts_B.device) < self.lengths_B[:, None]


def tile_ends(documents: Documents, size: int) -> Tensor:
    """The tile after the last of each document, int64 ``[N]``, on the host."""
    return ((documents.cu_seqlens_cpu.diff().long() + size - 1) // size).cumsum(0)
