"""Mixtures: the documents of one stream, taken from several sources by shares of the tokens.

A *component* of a mixture is a source by name (``web``), or those of its documents that have one length (``web/long``).
A stream reads each component with a cursor of its own. The next document is of the component of which the most tokens
were asked for and are not served yet; so shares are exact over tokens, whatever the documents' lengths, and may change
with every packed sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from minimax_train.data.config import LENGTHS, OF_LENGTH
from minimax_train.data.streams import DocumentStream, Position, TokenDocument
from minimax_train.errors import ConfigError

OpenCursor = Callable[[str, int | None], DocumentStream]
"""Opens a stream's cursor over a source, by name, and over its documents of one length (None for all)."""


class Drawn(NamedTuple):
    """The next document of a mixture.

    Attributes:
        before: where the cursor of its component stood.
        at: epoch, block, and number in the block after which it stands.
        origin: index of :attr:`DataConfig.origins`.
    """

    component: str
    before: Position
    at: tuple[int, int, int]
    document: TokenDocument
    origin: int


class MixtureStream:
    """One stream's documents out of all sources.

    Attributes:
        asked, served: tokens by component since the run began.
        is_of_earlier_version: whether an earlier version saved the state that was loaded.

    Args:
        sources: names of all sources, in the order of the configuration.
        open_cursor: opens the stream's cursors, each when it is first needed.
    """

    def __init__(self, sources: list[str], open_cursor: OpenCursor) -> None:
        self._sources, self._open = sources, open_cursor
        self._notes: list[str] = []
        self._weights: Mapping[str, float] = {}
        self._wanted: list[str] = []  # components of a weight above 0, in an order of their own
        self.load_state_dict({"positions": {}, "asked": {}, "served": {}, "epoch_began": {}})

    def ask(self, weights: Mapping[str, float], tokens: int) -> None:
        """So many tokens more are to be served, by these shares, which add up to 1."""
        if weights is not self._weights:
            self._weights, self._wanted = weights, sorted(name for name, weight in weights.items() if weight > 0)
        for name in self._wanted:
            self.asked[name] = self.asked.get(name, 0.0) + weights[name] * tokens

    def serve(self, component: str, tokens: int) -> None:
        self.served[component] = self.served.get(component, 0) + tokens

    def draw(self, waiting: Mapping[str, int]) -> Drawn | None:
        """The next document; None where epochs do not repeat and there is none.

        Args:
            waiting: tokens by component that were drawn and not served yet.

        Raises:
            ConfigError: what :meth:`DocumentStream.next_document` raises.
        """
        component = self._wanted[0]
        if len(self._wanted) > 1:
            ahead = sum(waiting.values())

            def missing(name: str) -> float:
                missing = self.asked[name] - self.served.get(name, 0)
                return missing + self._weights[name] * ahead - waiting.get(name, 0)

            component = max(self._wanted, key=missing)
        cursor = self._cursor(component)
        epoch = cursor.epoch
        drawn = self._drawn(component, cursor)
        if cursor.epoch != epoch:
            served, began = self.served.get(component, 0), self.epoch_began.get(component)
            self.epoch_began[component] = served
            if cursor.is_last_epoch:
                packed = "" if began is None else f"; {served - began:,} tokens were packed of the one before"
                self._notes.append(f"{cursor.part} is in its last epoch ({cursor.limit}){packed}")
        return drawn

    def draw_again(self, component: str, at: tuple[int, int, int] | None) -> Drawn:
        """A document that was drawn before the state that was loaded; it may be held out now.

        Args:
            at: of the document; None for the next one.

        Raises:
            ConfigError: when there is no such document any more.
        """
        cursor = self._cursor(component)
        while (drawn := self._drawn(component, cursor, keep_all=True)) is not None:
            if at is None or drawn.at == at:
                return drawn
            if drawn.at > at:
                break
        raise ConfigError(f"{cursor.part}: the data changed: no document is where the saved position has one")

    def document(self, component: str) -> str:
        """Names the document of a component that was drawn last, for messages."""
        return self._cursors[component].document

    def position(self, component: str) -> Position | None:
        """Where a component's cursor stands; None if it was never read."""
        if component in self._cursors:
            return self._cursors[component].position
        return self._positions.get(component)

    def positions(self) -> dict[str, Position]:
        return {**self._positions, **{name: cursor.position for name, cursor in self._cursors.items()}}

    @property
    def skipped(self) -> int:
        """Bad documents that the cursors passed over since the beginning of the run."""
        saved = sum(position.place.skipped for position in self._positions.values())
        return saved + sum(cursor.skipped for cursor in self._cursors.values())

    def take_notes(self) -> list[str]:
        """What there is to say since the last call."""
        notes, self._notes = self._notes, []
        return notes + [note for cursor in self._cursors.values() for note in cursor.take_notes()]

    def state_dict(self) -> dict:
        """JSON values; what was drawn and not served is the packer's to add."""
        return {
            "positions": {name: position.state_dict() for name, position in self.positions().items()},
            "asked": dict(self.asked),
            "served": dict(self.served),
            "epoch_began": dict(self.epoch_began),
        }

    def load_state_dict(self, state: Mapping) -> None:
        # Those passed over no held-out documents and cut no files.
        self.is_of_earlier_version = state.get("of_earlier_version", False)
        self._cursors: dict[str, DocumentStream] = {}
        self._positions = {name: Position.of(position) for name, position in state["positions"].items()}
        self.asked: dict[str, float] = dict(state["asked"])
        self.served: dict[str, int] = dict(state["served"])
        # Tokens served when the cursor's epoch began; of a cursor that began in the middle of one it is not known.
        self.epoch_began: dict[str, int] = dict(state["epoch_began"])

    def _drawn(self, component: str, cursor: DocumentStream, keep_all: bool = False) -> Drawn | None:
        before = cursor.position
        document = cursor.next_document(keep_all=keep_all)
        if document is None:
            return None
        source = component.partition(OF_LENGTH)[0]
        origin = self._sources.index(source) * len(LENGTHS) + document.length
        place, block, taken, _ = cursor.position
        return Drawn(component, before, (place.epoch, block, taken), document, origin)

    def _cursor(self, component: str) -> DocumentStream:
        """A component that is met first begins where the cursor over all documents of its source stands."""
        if component not in self._cursors:
            source, _, length = component.partition(OF_LENGTH)
            cursor = self._open(source, LENGTHS.index(length) if length else None)
            start = self._positions.pop(component, None)
            if start is None and length and (whole := self.position(source)) is not None:
                start = whole._replace(place=whole.place._replace(skipped=0))  # those are counted there
            if start is not None:
                if self.is_of_earlier_version:
                    cursor.refuse_cut(start)
                cursor.go_to(start)
            else:
                self.epoch_began[component] = 0
                if cursor.is_last_epoch:
                    self._notes.append(f"{cursor.part} is in its last epoch ({cursor.limit})")
            self._cursors[component] = cursor
        return self._cursors[component]
