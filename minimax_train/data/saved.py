"""Saved positions in the training data: what they say, and whether they mean the same here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from minimax_train.data.config import LENGTHS, OF_LENGTH
from minimax_train.data.in_process import OpenedSource
from minimax_train.data.streams import Place, Position
from minimax_train.errors import ConfigError

Setting = int | float | str | None
EXCLUDES = "data.exclude_held_out"
# In states of earlier versions, which had one source: of the list of its files.
_FINGERPRINT = "fingerprint of the training data's files"


def source_of(component: str) -> str:
    """The source of a component of the mixture, ``web`` of ``web/long``."""
    return component.partition(OF_LENGTH)[0]


def compare_identity(now: Mapping[str, Setting], saved: Mapping[str, Setting]) -> list[str]:
    """Refuse settings under which a saved position would mean other documents; sources may have been added.

    Returns:
        What there is to say of it.

    Raises:
        ConfigError: naming the field.
    """
    gone = [name for name in saved if name.endswith(".source") and name not in now]
    if gone:
        raise ConfigError(f"{gone[0]}: the saved data position reads {saved[gone[0]]!r}, which must be there to go on")
    for name, value in now.items():
        if saved.get(name, value) != value and name != EXCLUDES:
            raise ConfigError(
                f"{name}={value!r}: the saved data position is for {saved[name]!r}, and means nothing here"
            )
    added = [name for name in now if name.endswith(".source") and name not in saved]
    notes = [
        f"data: {name.removesuffix('.source')} is not in the saved position: it begins at its start" for name in added
    ]
    if now[EXCLUDES] != saved.get(EXCLUDES, False):
        passed = "passed over in training" if now[EXCLUDES] else "trained on as well"
        notes.append(f"data: from here on, held-out documents are {passed} ({EXCLUDES}, and what is held out)")
    return notes


def compare_files(sources: Mapping[str, OpenedSource], state: Mapping[str, Any]) -> list[str]:
    """Refuse other content than a saved position's; files may have been added at the end. What there is to say of it.

    Raises:
        ConfigError: naming the file that differs.
    """
    saved = state.get("shards")
    if all(source.digests is None for source in sources.values()):  # another rank compares
        return []
    if saved is None:
        only = next(iter(sources.values()))
        if state["identity"].get(_FINGERPRINT) not in (None, only.fingerprint):
            raise ConfigError(
                f"{_FINGERPRINT}: the saved data position is for files of other names or sizes, or in another order"
            )
        return ["data: the saved position does not say what the files held; only names and sizes were compared"]
    if isinstance(saved, list):  # earlier versions had one source
        saved = {name: saved for name in sources}
    notes = []
    for name, digests in saved.items():
        notes += _compare_digests(sources[name], digests)
    return notes


def _compare_digests(source: OpenedSource, saved: Sequence[str]) -> list[str]:
    assert source.digests is not None
    for i, digest in enumerate(saved):
        if i == len(source.digests):
            raise ConfigError(
                f"the training data's files: the saved data position is for {len(saved)}, and here are {i}"
            )
        if digest != source.digests[i]:
            raise ConfigError(
                f"{source.files[i]!r}: not file number {i + 1} of the saved data position: its size, head or tail "
                "differs; files may be added, but only after the others"
            )
    added = source.files[len(saved) :]
    if not added:
        return []
    return [
        f"data: {len(added)} added after the {len(saved)} files of the saved position, the first {added[0]!r}; "
        "each stream reads what was added from its next epoch on"
    ]


def read_state(state: Any, stream: int, sources: Mapping[str, OpenedSource]) -> dict:
    """A stream's saved state, or what it means if an earlier version saved it.

    Raises:
        ConfigError: when it cannot be, or is for other sources or more files.
    """
    damaged = ConfigError(f"damaged: no position in the training data: stream {stream}: {state}")
    try:
        read = state if "positions" in state else _of_one_source(state, sources)
        if not _is_state(read):
            raise damaged
    except (AttributeError, KeyError, TypeError, ValueError):
        raise damaged from None
    for component, position in read["positions"].items():
        source = sources.get(source_of(component))
        if source is None:
            raise damaged
        if position["num_files"] > len(source.files):
            raise ConfigError(
                f"the training data's files: the saved data position is for {position['num_files']}, and here are "
                f"{len(source.files)}"
            )
    return read


def read_again(states: Iterable[Mapping[str, Any]], sources: Mapping[str, OpenedSource]) -> list[str]:
    """What there is to say of positions that are found only by reading their file from its start."""
    within = {
        source_of(component)
        for state in states
        for component, position in state["positions"].items()
        if position["row"] and not position["following"] and sources[source_of(component)].format == "json"
    }
    return [
        f"data: of source {name} the saved position is in a file that is read again from its start: it is compressed, "
        "one JSON list, or the position is of an earlier version"
        for name in sorted(within)
    ]


def _is_state(state: Mapping[str, Any]) -> bool:
    """Whether it is made as :meth:`SequencePacker.state_dict` makes it."""

    def is_count(value: object, least: int = 0) -> bool:
        return type(value) is int and value >= least

    expected = {"positions", "asked", "served", "epoch_began", "drawn", "split", "truncated"}
    positions = state["positions"]
    fits = set(state) - {"of_earlier_version"} == expected
    fits &= all(set(p) == set(Position(Place(1)).state_dict()) for p in positions.values())
    fits &= all(is_count(value) for position in positions.values() for value in position.values())
    fits &= all(c.partition(OF_LENGTH)[2] in ("", *LENGTHS) for c in positions)
    fits &= all(type(v) in (int, float) and isfinite(v) and v >= 0 for v in state["asked"].values())
    fits &= all(is_count(n) for kind in ("served", "epoch_began") for n in state[kind].values())
    fits &= all(component in positions and is_count(taken, -1) for component, taken, _ in state["drawn"])
    places = [at for _, _, at in state["drawn"] if at is not None]
    fits &= all(len(at) == 3 and all(map(is_count, at)) for at in places)
    return fits and is_count(state["split"]) and is_count(state["truncated"])


def _of_one_source(state: Mapping[str, int], sources: Mapping[str, OpenedSource]) -> dict:
    """What a state means that a version saved which had one source: a position and the offset in its next document.

    Still earlier ones saved neither the number of files, what was skipped, nor a hash of the block.
    """
    ((name, source),) = sources.items()
    known = {"num_shards": len(source.files), "skipped": 0, "content": 0, "following": 0, **state}
    offset, known["num_files"] = known.pop("offset"), known.pop("num_shards")
    return {
        "positions": {name: known},
        "asked": {},
        "served": {},
        "epoch_began": {},
        "drawn": [[name, offset, None]] if offset else [],
        "split": 0,
        "truncated": 0,
        "of_earlier_version": True,
    }
