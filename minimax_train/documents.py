"""Where packed documents start and end on the token axis: what data, kernels and ranks all describe a batch by.

Shape legend: T tokens, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

# The label of a token that has no next token in its document: it adds nothing to the loss.
IGNORE_INDEX = -100


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """The same tensor on another device. The host goes on: of memory that is not pinned it would wait for the copy."""
    device = torch.device(device)
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Derived:
    """Something that keeps what is computed from it: made at the first request, shared by all layers, gone with it."""

    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False, kw_only=True)

    def derive(self, key: Hashable, make: Callable[[Self], Any]) -> Any:
        """``make(self)``, computed once per key. A result that refers to ``self`` would keep both from being freed."""
        if key not in self._derived:
            self._derived[key] = make(self)
        return self._derived[key]


@dataclass(frozen=True, eq=False)
class Documents(Derived):
    """The documents packed on one token axis: document n is tokens ``cu_seqlens[n]`` up to ``cu_seqlens[n + 1]``.

    Held on the host as well as on the compute device, so that nothing waits for the device to learn a length.
    Every derived tensor is made once and reused by all layers.

    Attributes:
        cu_seqlens: int32 ``[N + 1]`` on the compute device, the form varlen kernels take.
        cu_seqlens_cpu: the same on the host.
        first_positions: position of each document's first token, host integers: 0 unless these are parts of documents
            that began elsewhere.
    """

    cu_seqlens: Tensor
    cu_seqlens_cpu: Tensor
    first_positions: tuple[int, ...]

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", *, first_positions: Sequence[int] | None = None
    ) -> Documents:
        """Documents of the given lengths in tokens, one after the other.

        Raises:
            ValueError: when there is no document, or one holds no token.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"document lengths must be at least one positive integer, got {list(lengths)}")
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        first_positions = tuple(first_positions) if first_positions is not None else (0,) * len(lengths)
        assert len(first_positions) == len(lengths)
        return cls(to_device(cu_seqlens, device), cu_seqlens, first_positions)

    def to(self, device: torch.device | str) -> Documents:
        """The same documents for kernels on another device."""
        return Documents(to_device(self.cu_seqlens_cpu, device), self.cu_seqlens_cpu, self.first_positions)

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def __len__(self) -> int:
        return len(self.cu_seqlens_cpu) - 1

    @cached_property
    def bounds(self) -> list[int]:
        """``cu_seqlens`` as host integers."""
        return self.cu_seqlens_cpu.tolist()

    @property
    def num_tokens(self) -> int:
        return self.bounds[-1]

    @cached_property
    def max_length(self) -> int:
        """Length of the longest document in tokens."""
        return int(self.cu_seqlens_cpu.diff().max())

    @cached_property
    def positions_T(self) -> Tensor:
        """Position of each token within its document, int64, on the compute device."""
        shift_N = to_device(torch.tensor(self.first_positions), self.device) - self.cu_seqlens[:-1]
        shift_T = shift_N.repeat_interleave(self.cu_seqlens.diff(), output_size=self.num_tokens)
        return torch.arange(self.num_tokens, device=self.device) + shift_T


@dataclass(frozen=True, eq=False)
class DeviceDocuments(Documents):
    """Documents whose lengths only the device knows, in static memory: those of a CUDA graph, filled before a replay.

    There are always N; the last may be empty. Where they are parts of documents, only the device knows their first
    positions too. What is derived from the lengths is computed on the device, and kept
    until the next :meth:`fill` or :meth:`forget`. Call one of them before a capture, and ``forget`` after it: what a
    graph does not compute itself its replays would read as it was for an earlier fill, and what it does compute is in
    memory that other graphs may share.

    Attributes:
        cu_seqlens_cpu: has no values: reading one is an error.
        tokens: tokens of all documents together.
        longest: tokens of the longest document there may be.
        first_positions_N: position of each document's first token, int32.
    """

    tokens: int
    longest: int
    first_positions_N: Tensor

    @classmethod
    def of_shape(
        cls, *, num_documents: int, num_tokens: int, max_length: int, device: torch.device | str
    ) -> DeviceDocuments:
        """At most that many documents, of at most ``max_length`` tokens each; until the first fill some such ones.

        Raises:
            ValueError: when so many documents of that length do not hold the tokens.
        """
        if num_documents < 1 or num_documents * max_length < num_tokens:
            raise ValueError(f"{num_documents} documents of at most {max_length} tokens cannot hold {num_tokens}")
        cu_seqlens = torch.arange(num_documents + 1).mul_(max_length).clamp_(max=num_tokens).int()
        on_device, first_positions_N = (to_device(x, device) for x in (cu_seqlens, torch.zeros_like(cu_seqlens[1:])))
        return cls(on_device, cu_seqlens.to("meta"), (), num_tokens, max_length, first_positions_N)

    def fill(self, documents: Documents) -> None:
        """Take over another batch's documents, in the order of the device's work; the host does not wait.

        Args:
            documents: those that the host knows.

        Raises:
            ValueError: for too many documents, a longer one, or other tokens.
        """
        count, tokens, longest = len(documents), documents.num_tokens, documents.max_length
        if count > len(self) or longest > self.longest or tokens != self.tokens:
            raise ValueError(
                f"{count} documents of {tokens} tokens, the longest of {longest}: must be at most {len(self)} of "
                f"{self.tokens} tokens, the longest of at most {self.longest}"
            )
        padded = torch.full((len(self) + 1,), tokens, dtype=torch.int32)
        padded[: count + 1] = documents.cu_seqlens_cpu
        self.cu_seqlens.copy_(to_device(padded, self.device))
        first_positions = torch.zeros(len(self), dtype=torch.int32)
        first_positions[:count] = torch.tensor(documents.first_positions)
        self.first_positions_N.copy_(to_device(first_positions, self.device))
        self.forget()

    def forget(self) -> None:
        """Compute whatever was derived again at its next use."""
        self._derived.clear()

    @cached_property
    def bounds(self) -> NoReturn:
        raise RuntimeError("only the device knows where these documents begin: an op that asks cannot be captured")

    @property
    def num_tokens(self) -> int:
        return self.tokens

    @property
    def max_length(self) -> int:
        """A bound, not the length of the longest document that is there."""
        return self.longest

    @property
    def positions_T(self) -> Tensor:
        return self.derive("positions", DeviceDocuments._positions)

    def _positions(self) -> Tensor:
        tokens_T = torch.arange(self.tokens, dtype=torch.int32, device=self.device)
        document_T = torch.searchsorted(self.cu_seqlens[1:], tokens_T, right=True)
        return (tokens_T + (self.first_positions_N - self.cu_seqlens[:-1])[document_T]).long()
