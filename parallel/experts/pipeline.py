"""Groups one after the other: the next ones travel while one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from torch import Tensor

from minimax_train.parallel.experts.lanes import Arriving, Mark, wait

# Groups under way beside the one that is computed: one arrives, one is gathered.
AHEAD = 2

G = TypeVar("G")


@dataclass
class Returning:
    """Rows on their way home, and what must live until they are there."""

    home: Tensor
    kept: list[tuple[Tensor, ...]]
    done: list[Mark] = field(default_factory=list)

    def add(self, done: Mark, kept: tuple[Tensor, ...]) -> None:
        self.done.append(done)
        self.kept.append(kept)

    def wait(self) -> Tensor:
        for each in self.done:
            wait(each)
        self.kept.clear()
        return self.home


class Pipeline(Generic[G]):
    """Starts bringing the first groups at once; :meth:`run` works on all of them."""

    def __init__(self, groups: Iterable[G], bring: Callable[[G], Arriving]) -> None:
        self._groups: Iterator[G] = iter(groups)
        self._bring = bring
        self._under_way: deque[tuple[G, Arriving]] = deque()
        self._bring_next(AHEAD)

    def _bring_next(self, count: int) -> None:
        self._under_way.extend((group, self._bring(group)) for group in islice(self._groups, count))

    def run(
        self, work: Callable[[int, G, Arriving], tuple[Mark, tuple[Tensor, ...]]], returning: Returning
    ) -> Returning:
        """Work on each group when it has arrived, and start it on its way home.

        Args:
            work: the index of a group, itself, and its rows, to when they will be home and what must live until then.
        """
        index = 0
        while self._under_way:
            # Started before this group's products take the processors.
            self._bring_next(1)
            group, arriving = self._under_way.popleft()
            wait(arriving.done)
            returning.add(*work(index, group, arriving))
            index += 1
        return returning
