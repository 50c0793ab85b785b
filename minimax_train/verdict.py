"""What is wrong with a run whose ranks have told where they are, or have not: the line that the watchdog ends it with.

A heartbeat has a rank's ``rank``, ``host``, ``pid``, ``step`` (0 before the first) and ``phase``. So has an answer, and
beside these ``at``, the place in the code, whether it ``waits`` for others there, ``idle_s``, since when, and which
``collective`` it was in, if any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHOWN = 8
"""Of ranks, or of places where they are, at most."""


def verdict(
    alarm: dict[str, Any], answers: Sequence[dict[str, Any]], silent: Sequence[dict[str, Any]], timeout_s: float
) -> str:
    """What is wrong with a run, in a line.

    Args:
        alarm: who gave it (``judge``), ``why``, and if a collective failed, which (``failed``).
        answers: where the ranks are that have answered.
        silent: the last heartbeats of those that have not, with ``seen`` where somebody could look.
    """
    late, gone = alarm["why"] == "timeout", alarm["why"] == "gone"
    # A host that cannot launch any more, for the device waits, is in none of the calls that wait.
    waiting = [answer for answer in answers if answer["waits"] or (late and silent and answer["idle_s"] > timeout_s)]
    busy = [answer for answer in answers if not answer["waits"]]
    parts = []
    if silent:
        parts = [f"{shown_rank(beat)} {_seen(beat)}, last heartbeat in {shown_phase(beat)}" for beat in silent]
    elif late and waiting and busy:
        least = min(answer["step"] for answer in busy)
        behind = [answer for answer in busy if answer["step"] == least]
        parts = [
            f"{shown_rank(one)} is in {shown_phase(one)}, in {one['at']}, for {one['idle_s']:.0f} s" for one in behind
        ]
    elif late:
        waiting, parts = list(answers), ["no rank goes on"]
    elif gone:
        parts = ["a rank's process has gone"]
    told = [*parts[:SHOWN], *([f"and {len(parts) - SHOWN} more ranks"] if len(parts) > SHOWN else [])]
    if not late and not gone:
        told.append(f"on rank {alarm['judge']} {alarm['failed']} failed: {alarm['why']}")
    # Ranks that wait in the same place are told together.
    places: dict[str, list[int]] = {}
    for answer in waiting:
        place = f"{shown_phase(answer)} in {answer['collective'] or answer['at']}"
        places.setdefault(place, []).append(answer["rank"])
    if places:
        where = [f"{_ranks(ranks)} in {place}" for place, ranks in list(places.items())[:SHOWN]]
        limit = f" for {timeout_s:g} s (parallel.timeout_s)" if late else ""
        told.append(f"waiting{limit}: {', '.join(where)}")
    return "; ".join(told)


def shown_rank(beat: dict[str, Any]) -> str:
    return f"rank {beat['rank']} (host {beat['host']}, process {beat['pid']})"


def shown_phase(beat: dict[str, Any]) -> str:
    return f"step {beat['step']} ({beat['phase']})" if beat["step"] else beat["phase"]


def _seen(beat: dict[str, Any]) -> str:
    return beat.get("seen") or beat.get("ended") or "does not answer"


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:SHOWN]))}{more}"
