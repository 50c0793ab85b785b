"""Documents packed in sequences of exactly the same length, without padding and without losing a target.

Shape legend: S tokens of a packed sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minimax_train.data.config import BEST_FIT, SPLIT, TRUNCATE
from minimax_train.data.mixture import Drawn, MixtureStream
from minimax_train.data.streams import NoEpochLeft, Position
from minimax_train.documents import IGNORE_INDEX
from minimax_train.errors import ConfigError

LOOK_AHEAD = 64  # documents among which best-fit packing picks
_LATE = 4 * LOOK_AHEAD  # documents drawn since the first of them: it is next where it fits, after twice as many anyway
_DONE = -1
# A document that was drawn: component, tokens taken or done, and where it is (None in states of earlier versions, which
# have one document at most).
_Again = tuple[str, int, list[int] | None]


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """Whole documents, but for those that were cut.

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


class _Waiting:
    """A document that was drawn, as far as it is packed."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn, self.component, self.origin = drawn, drawn.component, drawn.origin
        self.taken, self.is_done = 0, False
        self.rest = 0  # tokens that are not packed, as far as they were measured
        self._pieces: Iterator[np.ndarray] = drawn.document.pieces
        self._left = np.empty(0, dtype=np.int64)  # encoded and not packed

    def left(self, wanted: int) -> np.ndarray:
        """Its tokens that are not packed: at least as many as wanted, or all there are."""
        while len(self._left) < wanted and (piece := next(self._pieces, None)) is not None:
            self._left = np.concatenate([self._left, piece]) if len(self._left) else piece
        return self._left

    def measure(self, most: int) -> None:
        """Sets ``rest``, to ``most`` where there are more: no more than that is encoded."""
        self.rest = min(len(self.left(most)), most)

    def take(self, count: int) -> None:
        self._left = self._left[count:]
        self.taken += count
        self.is_done = not len(self.left(1))

    def go_to(self, taken: int) -> None:
        """After so many tokens, or at its end."""
        while self.taken < taken and len(left := self.left(1)):
            self.take(min(len(left), taken - self.taken))

    def drop(self) -> int:
        """Ends it; the number of its tokens that are not packed."""
        dropped = len(self._left) + sum(len(piece) for piece in self._pieces)
        self._left, self.is_done = self._left[:0], True
        return dropped


class SequencePacker:
    """Packs the documents of one stream.

    The label of a token before a cut is the token after it, so every packed token but a document's last has its target.

    With ``split`` and ``truncate`` documents are packed as they come. A document that does not fit is cut at the end of
    the sequence; it goes on in the next one, or its rest is dropped. With ``best_fit`` each sequence is filled with
    those of the next ``LOOK_AHEAD`` documents that add up to it exactly, the earlier the rather; only where no choice
    of them does is a document split. A document longer than a sequence is split when it is the next.

    Attributes:
        split, truncated: documents that were split (or lost their rest) and tokens that were dropped since the run
            began.

    Args:
        documents: the stream.
        policy: of ``DataConfig.packing``.
    """

    def __init__(self, documents: MixtureStream, policy: str = SPLIT) -> None:
        self.documents, self._policy = documents, policy
        self._look_ahead = LOOK_AHEAD if policy == BEST_FIT else 1
        self.split = self.truncated = 0
        self._drawn: deque[_Waiting] = deque()  # in their order, from the first that is not done
        self._waiting: list[_Waiting] = []  # those of them that are not done
        self._length = 0  # of the last sequence
        self._again: list[_Again] | None = None  # to be drawn again, after a state was loaded

    def next_sequence(self, length: int, weights: Mapping[str, float]) -> PackedSequence | None:
        """The next ``length`` tokens, by these shares of the components; None when the stream ended.

        Where it ends before: completed by :func:`filler`.

        Raises:
            ConfigError: when documents cannot be read, or are not those of the loaded position.
        """
        if self._again is not None:
            self._draw_again()
        self.documents.ask(weights, length)
        tokens_S, labels_S = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
        lengths, origins, start = [], [], 0
        if length != self._length:
            self._length = length
            for document in self._waiting:
                document.measure(length + 1)
        while start < length:
            self._draw()
            if not self._waiting:
                break
            for document in self._next(length - start):
                end = start + self._pack(document, tokens_S[start:], labels_S[start:])
                lengths.append(end - start)
                origins.append(document.origin)
                start = end
        if not start:
            return None
        if start < length:
            tokens_S[start:], labels_S[start:] = filler(length - start, int(tokens_S[start - 1]))
            lengths.append(length - start)
            origins.append(origins[-1])
        return PackedSequence(tokens_S, labels_S, lengths, origins)

    def state_dict(self) -> dict:
        """The position after the last sequence, JSON values: the components' positions before the first document that
        is not done, what was drawn since and how many tokens of it are packed, and counts since the run began."""
        state = self.documents.state_dict()
        if self._again is not None:
            again = self._again
        else:
            again = [(d.component, _DONE if d.is_done else d.taken, list(d.drawn.at)) for d in self._drawn]
            first: dict[str, Position] = {}
            for document in self._drawn:
                first.setdefault(document.component, document.drawn.before)
            state["positions"] |= {name: position.state_dict() for name, position in first.items()}
        drawn = [list(document) for document in again]
        return {**state, "drawn": drawn, "split": self.split, "truncated": self.truncated}

    def load_state_dict(self, state: Mapping) -> None:
        """Goes on from a state that ``state_dict`` gave."""
        self.documents.load_state_dict(state)
        self._again = [(component, taken, at) for component, taken, at in state["drawn"]]
        self.split, self.truncated = state["split"], state["truncated"]

    def _draw_again(self) -> None:
        again, self._again = self._again, None
        assert again is not None
        self._drawn.clear()
        self._length = 0
        for component, taken, at in again:
            document = _Waiting(self.documents.draw_again(component, None if at is None else (at[0], at[1], at[2])))
            if taken == _DONE:
                document.is_done = True
            else:
                document.go_to(taken)
                if document.is_done:
                    raise ConfigError(
                        f"{self.documents.document(component)}: the data changed: the saved position is {taken} tokens "
                        f"into it, and it has {document.taken}"
                    )
            self._drawn.append(document)
        self._waiting = [document for document in self._drawn if not document.is_done]

    def _draw(self) -> None:
        """Documents until there are as many as are looked at to pick the next."""
        while self._drawn and self._drawn[0].is_done:
            self._drawn.popleft()
        self._waiting = [document for document in self._waiting if not document.is_done]
        tokens: dict[str, int] = {}
        if len(self._waiting) < self._look_ahead:
            for document in self._waiting:
                tokens[document.component] = tokens.get(document.component, 0) + document.rest
        while len(self._waiting) < self._look_ahead and (drawn := self._draw_one(tokens)) is not None:
            document = _Waiting(drawn)
            document.measure(self._length + 1)
            tokens[document.component] = tokens.get(document.component, 0) + document.rest
            self._waiting.append(document)
            self._drawn.append(document)

    def _next(self, missing: int) -> list[_Waiting]:
        """Those to be packed next; the last may be too long for what is missing of the sequence."""
        waiting, drawn = self._waiting, len(self._drawn)
        rests = [document.rest for document in waiting]
        begun = next((document for document in waiting if document.taken), None)
        if begun is not None:
            return [begun]
        is_late = drawn > 2 * _LATE or (drawn > _LATE and rests[0] <= missing)
        if rests[0] > self._length or is_late or sum(rests) <= missing:
            return waiting[:1]
        picked = fitting(rests, missing)
        if sum(rests[i] for i in picked) < missing:
            picked.append(max(set(range(len(rests))) - set(picked), key=lambda i: (rests[i], -i)))
        return [waiting[i] for i in picked]

    def _draw_one(self, tokens: Mapping[str, int]) -> Drawn | None:
        try:
            return self.documents.draw(tokens)
        except NoEpochLeft:
            if not self._waiting:
                raise
            return None  # what waits is packed first

    def _pack(self, document: _Waiting, tokens: np.ndarray, labels: np.ndarray) -> int:
        """Puts as much of a document as fits at the start of both; how many tokens that is."""
        left = document.left(len(tokens) + 1)  # with the label of the last one
        count, is_begun = min(len(left), len(tokens)), document.taken > 0
        tokens[:count] = left[:count]
        labels[count - 1] = IGNORE_INDEX
        following = left[1 : count + 1]
        labels[: len(following)] = following
        document.take(count)
        self.documents.serve(document.component, count)
        if not document.is_done:
            self.split += not is_begun
            if self._policy == TRUNCATE:
                self.truncated += document.drop()
            else:
                document.measure(self._length + 1)
        return count


def fitting(lengths: Sequence[int], total: int) -> list[int]:
    """Which of some documents add up to as much of ``total`` as any choice of them does; the first ones the rather.

    Exact, as subset sums in bit sets: bit n of a number is whether some choice adds up to n.
    """
    mask = (1 << (total + 1)) - 1
    sums = [1]  # of the last 0, 1, 2, ... documents
    for length in reversed(lengths):
        sums.append(sums[-1] | ((sums[-1] << length) & mask if length <= total else 0))
    left, picked = sums.pop().bit_length() - 1, []
    for i, length in enumerate(lengths):
        without = sums.pop()
        if length <= left and without >> (left - length) & 1:
            picked.append(i)
            left -= length
    return picked


def filler(length: int, token: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels of a document without targets: evaluation completes its last sequence with it."""
    return np.full(length, token, dtype=np.int64), np.full(length, IGNORE_INDEX, dtype=np.int64)
