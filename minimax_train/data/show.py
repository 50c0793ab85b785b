"""What a recipe takes out of its sources, and what packing does to it, without a model.

The recipe's schedule is walked from its beginning to its end, with as many tokens for each stage. Where a stage is
longer, every stretch of it is read in proportion, so that shares that move do so.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from minimax_train.config import Config
from minimax_train.data.config import BEST_FIT, LENGTHS, OF_LENGTH, SPLIT, TRUNCATE, DataConfig
from minimax_train.data.in_process import Cursors
from minimax_train.data.mixture import Drawn, MixtureStream, OpenCursor
from minimax_train.data.packing import SequencePacker
from minimax_train.data.sources import Source
from minimax_train.data.streams import Lengths
from minimax_train.data.survey import Survey, survey
from minimax_train.data.tokenizer import Tokenizer
from minimax_train.data.validation import held_out_documents
from minimax_train.data.windows import SharedWindows
from minimax_train.errors import ConfigError
from minimax_train.recipe import Recipe, StepPlan

_SPANS = 400  # stretches of the schedule
_POINTS = 10  # of the picture of realised shares, in each stage

Shares = Mapping[str, float]


@dataclass(frozen=True)
class Span:
    """A stretch of the schedule.

    Attributes:
        begin, end: tokens of the run.
        weights: mean share of each component in it.
    """

    stage: str
    begin: int
    end: int
    sequence_length: int
    weights: Shares


@dataclass
class StageReport:
    """A stage of the recipe.

    Attributes:
        begin, end: tokens of the run.
        sequence_length: where the stage ends.
        tokens: asked of each component.
        epochs: of each component that these are; None where it is not known how much there is.
        asked, read: tokens of each component that were asked of the sequences that were packed for it, and that are in
            them.
    """

    name: str
    begin: int
    end: int
    sequence_length: int
    tokens: dict[str, float] = field(default_factory=dict)
    epochs: dict[str, float | None] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceReport:
    """What there is of a source.

    Attributes:
        documents, tokens: that were read to see how long documents are.
        part: how much of the source these are; None where it cannot be told.
        epoch_tokens: of all of it, exact where ``part`` is 1.
        lengths: share of the documents, and of the tokens, in each length bucket.
        histogram: documents of at least 1, 2, 4, 8, ... tokens, and of fewer than twice as many.
    """

    files: int
    documents: int
    tokens: int
    part: float | None
    epoch_tokens: float | None
    lengths: dict[str, tuple[float, float]]
    histogram: list[int]


class RunsOut(NamedTuple):
    """A component of whose source the recipe asks more than ``max_epochs``: where, in tokens of the run."""

    component: str
    max_epochs: int
    stage: str
    tokens: float


@dataclass(frozen=True)
class PackingReport:
    """What one packing policy does to the documents that were read."""

    documents: int
    split: int
    tokens: int
    truncated: int


@dataclass
class HeldOutReport:
    """A set of held-out documents, as far as an evaluation uses it, against what was read for training.

    Attributes:
        found: documents of it that are in training.
        windows, windows_found: its windows of 64 tokens, and those of them that are in training at any position.
    """

    documents: int
    tokens: int
    found: int
    windows: int
    windows_found: int


@dataclass(frozen=True)
class Point:
    """Share of each component in what was read of a stage up to so many tokens of the run since the point before."""

    stage: str
    tokens: int
    shares: Shares


@dataclass(frozen=True)
class Report:
    """What :func:`show` found; JSON values.

    Attributes:
        tokens, seconds: read as the recipe asks, by one process.
        packing: by policy.
        held_out: by source.
    """

    tokens: int
    seconds: float
    sources: dict[str, SourceReport]
    stages: list[StageReport]
    runs_out: list[RunsOut]
    packing: dict[str, PackingReport]
    held_out: dict[str, HeldOutReport]
    schedule: list[Span]
    realised: list[Point]


def show(config: Config, tokenizer: Tokenizer, tokens: int) -> Report:
    """Read so many tokens as the recipe asks for them, or as many as there are, and as many again to see what the
    sources hold.

    Raises:
        ConfigError: when the data cannot be read, or the recipe contradicts itself.
    """
    data = config.data
    cursors = Cursors.of(data, tokenizer, config.seed)
    each = -(-tokens // len(cursors.sources))
    surveys = {name: survey(source, tokenizer, cursors.keeps[name], each) for name, source in cursors.sources.items()}
    if all(found.part == 1 for found in surveys.values()):
        tokens = min(tokens, sum(sum(found.lengths) for found in surveys.values()))
    schedule = list(spans(Recipe(config), surveys))
    stages = _stages(schedule)
    held_out = {
        name: _HeldOut(held_out_documents(data, name, tokenizer), name, config.recipe.eval_sequences, schedule[0])
        for name, source in data.named_sources.items()
        if source.is_held_out
    }
    reading = _Reading(cursors, list(held_out.values()))
    realised = [point for stage in stages for point in reading.read(stage, schedule, -(-tokens // len(stages)))]
    runs_out = list(_epochs(data, surveys, schedule, stages))
    return Report(
        tokens=reading.tokens,
        seconds=reading.seconds,
        sources={name: _source_report(data, cursors.sources[name], found) for name, found in surveys.items()},
        stages=stages,
        runs_out=runs_out,
        packing={policy: reading.packed(policy) for policy in (SPLIT, TRUNCATE, BEST_FIT)},
        held_out={name: found.report() for name, found in held_out.items()},
        schedule=schedule,
        realised=realised,
    )


def spans(recipe: Recipe, surveys: Mapping[str, Survey]) -> Iterator[Span]:
    """The schedule, in about ``_SPANS`` stretches.

    Raises:
        ConfigError: when it is in epochs, and it is not known how long these are.
    """
    state = {}
    if recipe.needs_epoch:
        epochs = [found.epoch_tokens for found in surveys.values()]
        if None in epochs:
            stage = next(stage for stage in recipe.stages if stage.epochs is not None)
            raise ConfigError(
                f"{stage.path}.epochs: how many tokens an epoch is cannot be told from a part of these files; read "
                f"more of them (--tokens), or give {stage.path}.tokens"
            )
        state["epoch_tokens"] = round(sum(tokens for tokens in epochs if tokens is not None))
        recipe.check(state)
    points: list[tuple[int, StepPlan]] = list(recipe.samples(_SPANS, state))
    last, plan = points[-1]
    for (begin, now), (end, then) in pairwise([*points, (last + plan.tokens, plan)]):
        weights = dict(now.data_weights)
        if then.stage == now.stage:
            names = now.data_weights.keys() | then.data_weights.keys()
            weights = {n: (now.data_weights.get(n, 0) + then.data_weights.get(n, 0)) / 2 for n in sorted(names)}
        if end > begin:
            yield Span(now.stage, begin, end, now.sequence_length, weights)


def _stages(schedule: Sequence[Span]) -> list[StageReport]:
    stages: dict[str, StageReport] = {}
    for span in schedule:
        stage = stages.setdefault(span.stage, StageReport(span.stage, span.begin, span.end, span.sequence_length))
        stage.end, stage.sequence_length = span.end, span.sequence_length
        for component, weight in span.weights.items():
            stage.tokens[component] = stage.tokens.get(component, 0.0) + weight * (span.end - span.begin)
    return list(stages.values())


def _source_report(data: DataConfig, source: Source, found: Survey) -> SourceReport:
    lengths = np.array(found.lengths, dtype=np.int64)
    buckets = np.array([Lengths(data.medium_length, data.long_length).of(int(length)) for length in lengths])
    shares = {}
    for i, name in enumerate(LENGTHS):
        inside = lengths[buckets == i]
        shares[name] = (len(inside) / len(lengths), float(inside.sum() / lengths.sum())) if len(lengths) else (0.0, 0.0)
    powers = np.log2(lengths).astype(np.int64) if len(lengths) else lengths
    return SourceReport(
        files=len(source.files),
        documents=len(lengths),
        tokens=int(lengths.sum()),
        part=found.part,
        epoch_tokens=found.epoch_tokens,
        lengths=shares,
        histogram=np.bincount(powers).tolist(),
    )


def _epochs(
    data: DataConfig, surveys: Mapping[str, Survey], schedule: Sequence[Span], stages: Sequence[StageReport]
) -> Iterator[RunsOut]:
    """Fills in the stages' epochs, and finds what runs out."""
    supply: dict[str, float | None] = {}
    for stage in stages:
        for component, tokens in stage.tokens.items():
            supply[component] = _supply(data, surveys, component)
            there = supply[component]
            stage.epochs[component] = None if not there else tokens / there
    used: dict[str, float] = {}
    out: set[str] = set()
    for span in schedule:
        for component, weight in span.weights.items():
            source, _, _ = component.partition(OF_LENGTH)
            there, limit = supply[component], data.named_sources[source].max_epochs
            if not there or limit is None or not weight:
                continue
            # A length bucket begins where the whole source's cursor stands.
            before = used.get(component, used.get(source, 0.0))
            used[component] = before + weight * (span.end - span.begin) / there
            if used[component] > limit and not out & {component, source}:
                out.add(component)
                part = max(0.0, limit - before) / (used[component] - before)
                yield RunsOut(component, limit, span.stage, span.begin + part * (span.end - span.begin))


def _supply(data: DataConfig, surveys: Mapping[str, Survey], component: str) -> float | None:
    """Tokens of an epoch of a component."""
    source, _, length = component.partition(OF_LENGTH)
    found = surveys[source]
    if not length or found.epoch_tokens is None:
        return found.epoch_tokens
    lengths = Lengths(data.medium_length, data.long_length)
    inside = sum(tokens for tokens in found.lengths if LENGTHS[lengths.of(tokens)] == length)
    return found.epoch_tokens * inside / max(1, sum(found.lengths))


class _HeldOut:
    """A set of held-out documents, and which of them are met in training."""

    def __init__(self, documents: MixtureStream, name: str, sequences: int, first: Span) -> None:
        documents.ask({name: 1.0}, 1)
        found, self._tokens = [], 0
        while self._tokens < sequences * first.sequence_length and (drawn := documents.draw({})) is not None:
            found.append(np.concatenate(list(drawn.document.pieces)))
            self._tokens += len(found[-1])
        self._counts = Counter(map(_digest, found))
        self._met: set[bytes] = set()
        self._windows = SharedWindows(found)

    def look_in(self, tokens_T: np.ndarray, digest: bytes) -> None:
        if digest in self._counts:
            self._met.add(digest)
        self._windows.look_in(tokens_T)

    def report(self) -> HeldOutReport:
        return HeldOutReport(
            documents=self._counts.total(),
            tokens=self._tokens,
            found=sum(self._counts[digest] for digest in self._met),
            windows=self._windows.total,
            windows_found=self._windows.met,
        )


def _digest(tokens_T: np.ndarray) -> bytes:
    return blake2b(tokens_T.tobytes(), digest_size=16).digest()


class _Watched(MixtureStream):
    """A stream whose documents somebody else sees as well.

    Args:
        see: is given each document and its tokens.
    """

    def __init__(self, sources: list[str], open_cursor: OpenCursor, see: Callable[[Drawn, np.ndarray], None]) -> None:
        super().__init__(sources, open_cursor)
        self._see = see

    def draw(self, waiting: Mapping[str, int]) -> Drawn | None:
        drawn = super().draw(waiting)
        if drawn is None:
            return None
        tokens_T = np.concatenate(list(drawn.document.pieces))
        self._see(drawn, tokens_T)
        return drawn._replace(document=drawn.document._replace(pieces=iter((tokens_T,))))


class _Replayed(MixtureStream):
    """Documents of these lengths, whatever their tokens, as they were drawn."""

    def __init__(self, drawn: Sequence[tuple[Drawn, int]]) -> None:
        super().__init__([], lambda *_: None)  # type: ignore[arg-type, return-value]
        self._again = iter(drawn)

    def ask(self, weights: Shares, tokens: int) -> None:
        pass

    def draw(self, waiting: Mapping[str, int]) -> Drawn | None:
        drawn, length = next(self._again, (None, 0))
        if drawn is None:
            return None
        pieces = iter((np.zeros(length, dtype=np.int64),))
        return drawn._replace(document=drawn.document._replace(pieces=pieces))


class _Reading:
    """Packs a schedule's sequences of all streams.

    Attributes:
        tokens, seconds: packed, and what reading, tokenising and packing them took.
    """

    def __init__(self, cursors: Cursors, held_out: Sequence[_HeldOut]) -> None:
        data = cursors.config
        endless = {name: dataclasses.replace(source, max_epochs=None) for name, source in data.sources.items()}
        cursors = dataclasses.replace(cursors, config=dataclasses.replace(data, sources=endless, max_epochs=None))
        names = list(cursors.sources)
        self.tokens, self.seconds = 0, 0.0
        self._held_out, self._seen_in, self._next = held_out, 0.0, 0
        self._drawn: list[list[tuple[Drawn, int]]] = [[] for _ in range(data.num_streams)]
        self._lengths: list[list[int]] = [[] for _ in range(data.num_streams)]
        self._packers = [
            SequencePacker(_Watched(names, partial(cursors.open, stream), self._see_of(stream)), data.packing)
            for stream in range(data.num_streams)
        ]

    def read(self, stage: StageReport, schedule: Sequence[Span], tokens: int) -> list[Point]:
        """Read about ``tokens`` all over a stage, one sequence at least, and fill in what was asked and read."""
        scale = min(1.0, tokens / (stage.end - stage.begin))
        began, others, first = time.perf_counter(), self._seen_in, self.tokens
        before = last = self._served()
        points: list[Point] = []
        for span in (span for span in schedule if span.stage == stage.name):
            while self.tokens - first < (span.end - stage.begin) * scale:
                stream = self._next % len(self._packers)
                self._packers[stream].next_sequence(span.sequence_length, span.weights)
                self._lengths[stream].append(span.sequence_length)
                self._next += 1
                self.tokens += span.sequence_length
                for component, weight in span.weights.items():
                    stage.asked[component] = stage.asked.get(component, 0.0) + weight * span.sequence_length
            if span.end - stage.begin >= (stage.end - stage.begin) * (len(points) + 1) / _POINTS:
                served = self._served()
                if read := served - last:
                    shares = {component: count / read.total() for component, count in read.items()}
                    points.append(Point(stage.name, span.end, shares))
                    last = served
        stage.read = dict(self._served() - before)
        self.seconds += time.perf_counter() - began - (self._seen_in - others)
        return points

    def packed(self, policy: str) -> PackingReport:
        """All documents that were drawn, packed once more."""
        documents = split = truncated = tokens = 0
        for drawn, lengths in zip(self._drawn, self._lengths, strict=True):
            packer = SequencePacker(_Replayed(drawn), policy)
            last = lengths[-1] if lengths else 1
            every = iter(lengths)
            while packer.next_sequence(next(every, last), {}) is not None:
                pass
            documents, tokens = documents + len(drawn), tokens + sum(length for _, length in drawn)
            split, truncated = split + packer.split, truncated + packer.truncated
        return PackingReport(documents, split, tokens, truncated)

    def _see_of(self, stream: int) -> Callable[[Drawn, np.ndarray], None]:
        def see(drawn: Drawn, tokens_T: np.ndarray) -> None:
            began = time.perf_counter()
            self._drawn[stream].append((drawn, len(tokens_T)))
            digest = _digest(tokens_T)
            for held_out in self._held_out:
                held_out.look_in(tokens_T, digest)
            self._seen_in += time.perf_counter() - began

        return see

    def _served(self) -> Counter[str]:
        return sum((Counter(packer.documents.served) for packer in self._packers), Counter())
