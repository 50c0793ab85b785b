"""What a run has written about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minimax_train.compose import read_yaml
from minimax_train.errors import ConfigError
from minimax_train.fields import show
from minimax_train.files import CONFIG, EVENTS, METRICS
from minimax_train.metrics.log import read_records

Points = list[tuple[float, float]]
# Hours are of training, without evaluations and checkpoints.
AXES = ("step", "tokens", "hours")


@dataclass
class Run:
    """A run as its folder has it.

    Attributes:
        name: by which the page calls it.
        config: by dotted key, values as they would be typed.
        records, events: the lines of ``metrics.jsonl`` and ``events.jsonl``.
    """

    name: str
    config: Mapping[str, str]
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, name: str) -> Run:
        """
        Raises:
            ConfigError: naming what is missing or damaged.
        """
        if not (folder / METRICS).is_file():
            raise ConfigError(f"{folder}: no run: it has no {METRICS}")
        _, tree = read_yaml(folder / CONFIG)
        try:
            records, events = read_records(folder / METRICS), read_records(folder / EVENTS)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be read: {error}") from error
        if not any("loss" in record for record in records):
            raise ConfigError(f"{folder / METRICS}: no step was recorded yet")
        return cls(name, _flat(tree), records, events)

    @cached_property
    def _places(self) -> dict[str, dict[int, float]]:
        """By axis, where each recorded step lies."""
        places: dict[str, dict[int, float]] = {axis: {0: 0.0} for axis in AXES}
        hours, before = 0.0, 0
        for record in self.records:
            if "loss" in record:
                hours += record["seconds"] * (record["step"] - before) / 3600
                before = record["step"]
                for axis, place in zip(AXES, (before, record["tokens"], hours), strict=True):
                    places[axis][before] = place
        return places

    def place(self, step: int, axis: str) -> float:
        """Where a step lies on an axis; one between two records lies where the one before does."""
        places = self._places[axis]
        if step not in places:
            step = max(known for known in places if known <= step)
        return places[step]

    def points(self, metric: str, axis: str) -> Points:
        """Of a metric over an axis, in order; values that are no numbers left out."""
        found = [
            (self.place(record["step"], axis), float(record[metric])) for record in self.records if metric in record
        ]
        return [(x, y) for x, y in found if abs(y) < math.inf]

    def last(self, metric: str) -> float | None:
        """The latest value of a metric; None if there is none."""
        return next((record[metric] for record in reversed(self.records) if metric in record), None)

    def names(self, prefix: str) -> list[str]:
        """Of the metrics that begin so, as they first appear."""
        return list(dict.fromkeys(name for record in self.records for name in record if name.startswith(prefix)))


def _flat(tree: Any, path: str = "") -> dict[str, str]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, node in tree.items() for k, v in _flat(node, f"{path}.{name}".lstrip(".")).items()}
    return {path: show(tree)}


def differences(runs: list[Run]) -> dict[str, list[str]]:
    """The keys whose values are not the same in all configurations, with the value of each run; ``-`` for none."""
    keys = sorted({key for run in runs for key in run.config})
    values = {key: [run.config.get(key, "-") for run in runs] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}
