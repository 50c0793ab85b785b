"""Which documents are held out for evaluation, by a hash of their content, so that no other file leaks them."""

from __future__ import annotations

from collections.abc import Callable, Set
from hashlib import blake2b
from itertools import chain

import numpy as np

from minimax_train.data.config import DataConfig
from minimax_train.data.readers import BadDocument
from minimax_train.data.sources import VALIDATION, open_sources
from minimax_train.data.tokenizer import Tokenizer

Content = str | np.ndarray
Keeps = Callable[[Content], bool]
"""Whether a stream keeps a document; it passes over the others."""

_HASHES = 2**64


def document_hash(content: Content) -> int:
    """64 bits of a text's UTF-8, or of the bytes of a document's tokens (int64, its end included)."""
    data = content.encode() if isinstance(content, str) else content.tobytes()
    return int.from_bytes(blake2b(data, digest_size=8).digest())


def is_in_share(content: Content, share: float) -> bool:
    """Whether a document is among the ``share`` of all documents that is held out."""
    return document_hash(content) < share * _HASHES


def kept_in_training(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Keeps | None]:
    """What each source's training streams keep, by the source's name; None for everything.

    With ``exclude_held_out`` no stream keeps a document that is held out by any source: all held-out files and splits
    are read for it, and a share that one source holds out is held out of the others too.

    Raises:
        ConfigError: when held-out documents cannot be read.
    """
    shares = {name: source.held_out for name, source in config.named_sources.items()}
    hashes: frozenset[int] = frozenset()
    if config.exclude_held_out:
        sources = [source.with_tokenizer(tokenizer) for source in open_sources(config, VALIDATION).values()]
        found = chain.from_iterable(source.read(shard) for source in sources for shard in range(len(source.shards)))
        contents = (document.content for document in found)
        hashes = frozenset(document_hash(content) for content in contents if not isinstance(content, BadDocument))
        shares = dict.fromkeys(shares, max(shares.values()))
    return {name: _keeps(share, hashes) for name, share in shares.items()}


def _keeps(share: float, hashes: Set[int]) -> Keeps | None:
    if not share and not hashes:
        return None
    least = share * _HASHES

    def keeps(content: Content) -> bool:
        found = document_hash(content)
        return found >= least and found not in hashes

    return keeps
