"""Mixes of document lengths that fill a packed axis."""

from __future__ import annotations

import random


def random_mix(tokens: int, chunks: int, seed: int) -> list[int]:
    """Lengths that add up to ``tokens``: the corner cases of chunk edges for the first seeds, random ones after."""
    size = tokens // chunks
    special = [
        [tokens],
        [1] * tokens,
        [size] * chunks,
        [1, tokens - 1],
        [tokens - 1, 1],
        [size - 1, 1, size + 1, *[size] * (chunks - 3), size - 1] if chunks > 3 else [size, tokens - size],
        [tokens - size, size],
    ]
    if seed < len(special):
        return [length for length in special[seed] if length]
    choose = random.Random(seed)
    starts = sorted(
        choose.sample(range(1, tokens), min(tokens - 1, choose.choice([1, 2, 3, chunks, 2 * chunks, tokens // 3])))
    )
    if choose.random() < 0.5:  # some starts exactly on chunk edges
        starts = sorted({*starts, *choose.sample(range(size, tokens, size), choose.randint(1, chunks - 1))})
    return [end - start for start, end in zip([0, *starts], [*starts, tokens], strict=True)]
