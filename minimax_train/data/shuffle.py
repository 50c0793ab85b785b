"""Orders and choices that depend on nothing but their key: not on library versions, ranks or ``PYTHONHASHSEED``."""

from __future__ import annotations

from hashlib import blake2b


def stable_hash(*key: object) -> int:
    """A 64-bit hash of the key's text, the same in every process and release."""
    return int.from_bytes(blake2b("/".join(map(str, key)).encode(errors="surrogateescape"), digest_size=8).digest())


def permutation(size: int, *key: object) -> list[int]:
    """``range(size)`` in an order drawn by the key."""
    return sorted(range(size), key=lambda i: (stable_hash(*key, i), i))
