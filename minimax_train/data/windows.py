"""Windows of tokens that two sets of documents share, found by 64-bit hashes.

Shape legend: T tokens of a document, W windows.
"""

from __future__ import annotations

import numpy as np

WINDOW = 64  # tokens

# An odd number has an inverse modulo 2^64, in which unsigned integers of numpy compute.
_BASE, _INVERSE = np.uint64(0x9E3779B97F4A7C15), np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))


def window_hashes(tokens_T: np.ndarray) -> np.ndarray:
    """A hash of the window at every position, uint64 ``[max(0, T - 63)]``; equal windows have equal ones.

    A polynomial in powers of ``_BASE`` over scrambled ids, as differences of its running sum; so the time per position
    does not depend on the window's length.
    """
    T = len(tokens_T)
    if T < WINDOW:
        return np.empty(0, np.uint64)
    powers_T = np.cumprod(np.concatenate([[np.uint64(1)], np.full(T - 1, _BASE)]), dtype=np.uint64)
    inverses_W = np.cumprod(np.concatenate([[np.uint64(1)], np.full(T - WINDOW, _INVERSE)]), dtype=np.uint64)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(_scrambled(tokens_T) * powers_T, dtype=np.uint64)])
    return _scrambled((sums[WINDOW:] - sums[:-WINDOW]) * inverses_W)


def _scrambled(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the number."""
    x = x.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SharedWindows:
    """Counts which windows of some documents are met in others.

    Args:
        documents: token ids; of each, the windows that follow one another without overlap are looked for.
    """

    def __init__(self, documents: list[np.ndarray]) -> None:
        hashes = [window_hashes(tokens_T)[::WINDOW] for tokens_T in documents]
        self._hashes, self._counts = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True)
        self._met = np.zeros(len(self._hashes), dtype=bool)

    def look_in(self, tokens_T: np.ndarray) -> None:
        """Look for them at every position of another document."""
        hashes = window_hashes(tokens_T)
        if len(self._hashes) and len(hashes):
            places = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
            self._met[places[self._hashes[places] == hashes]] = True

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    @property
    def met(self) -> int:
        """How many were found so far; equal ones count each."""
        return int(self._counts[self._met].sum())
