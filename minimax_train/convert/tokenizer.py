"""The tokenizer's files, which travel with the weights as they are, and its special tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

from minimax_train.errors import ConfigError

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files between folders. Returns whether there were any."""
    files = [source / name for name in FILES if (source / name).is_file()]
    if files:
        target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, target)
    return bool(files)


def special_token_ids(folder: Path) -> dict[str, int | None]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` of the tokenizer in a folder, None where it has none.

    Raises:
        ConfigError: when there is no tokenizer that transformers opens.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{folder}: transformers cannot open the tokenizer: {error}") from error
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
