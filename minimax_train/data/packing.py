"""Documents packed in sequences of exactly the same length, without padding and without losing a target.

Shape legend: S tokens of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minimax_train.data.streams import DocumentStream
from minimax_train.documents import IGNORE_INDEX
from minimax_train.errors import ConfigError


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """Whole documents, but the first and the last, which may be cut.

    Attributes:
        tokens_S: token ids, int64.
        labels_S: the next token of the same document, ``IGNORE_INDEX`` for a document's last, int64.
        lengths: tokens of each document in here, which add up to S. A document cut at the end is in two sequences.
        origins: of each document in here, its source and its length: an index of :attr:`DataConfig.origins`.
    """

    tokens_S: np.ndarray
    labels_S: np.ndarray
    lengths: list[int]
    origins: list[int]


class SequencePacker:
    """Packs one stream: a document that does not fit is cut and goes on in the next sequence.

    The label of a token before the cut is the token after it, so every token but a document's last has its target.
    """

    def __init__(self, stream: DocumentStream) -> None:
        self._stream = stream
        self._before = stream.state_dict()  # the position that gives the current document again
        self._pieces: Iterator[np.ndarray] | None = None  # of the current document, those that were not encoded yet
        self._left = np.empty(0, dtype=np.int64)  # its tokens that are encoded and not packed
        self._offset = 0  # its tokens that are packed

    def next_sequence(self, length: int) -> PackedSequence | None:
        """The next ``length`` tokens; None when the stream ended. Where it ends before: completed by :func:`filler`."""
        pieces, missing = [], length
        while missing:
            left = self._current(missing + 1)  # with the label of the last one
            if left is None:
                if not pieces:
                    return None
                pieces.append(filler(missing, pieces[-1][0][-1]))
                break
            tokens = left[:missing]
            labels = np.append(left[1 : missing + 1], IGNORE_INDEX)[: len(tokens)]
            pieces.append((tokens, labels))
            missing -= len(tokens)
            self._left = left[len(tokens) :]
            self._offset += len(tokens)
            if not len(self._left):
                self._before, self._pieces, self._offset = self._stream.state_dict(), None, 0
        tokens_S, labels_S = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return PackedSequence(tokens_S, labels_S, [len(tokens) for tokens, _ in pieces], [0] * len(pieces))

    def state_dict(self) -> dict[str, int]:
        """The position after the last sequence: the stream's before the current document, and the offset in it."""
        return {**self._before, "offset": self._offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a position that ``state_dict`` gave."""
        self._before = {name: value for name, value in state.items() if name != "offset"}
        self._stream.load_state_dict(self._before)
        self._pieces, self._left, self._offset = None, self._left[:0], state["offset"]

    @property
    def stream(self) -> DocumentStream:
        """The documents it packs."""
        return self._stream

    def _current(self, wanted: int) -> np.ndarray | None:
        """What is left of the current document: as many tokens as wanted, or all that there are; at least one.

        Raises:
            ConfigError: when a loaded position is past the document's end.
        """
        if self._pieces is None:
            self._pieces = self._stream.next_document()
            if self._pieces is None:
                return None
            skipped = self._offset
            for piece in self._pieces:
                if skipped < len(piece):
                    self._left = piece[skipped:]
                    break
                skipped -= len(piece)
            else:
                raise ConfigError(
                    f"{self._stream.document}: the data changed: the saved position is {self._offset} tokens into it, "
                    f"and it has {self._offset - skipped}"
                )
        while len(self._left) < wanted and (piece := next(self._pieces, None)) is not None:
            self._left = np.concatenate([self._left, piece])
        return self._left


def filler(length: int, token: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of a document without targets: evaluation completes its last sequence with it."""
    return np.full(length, token, dtype=np.int64), np.full(length, IGNORE_INDEX, dtype=np.int64)
