"""The tokenizer's files: as they are beside weights as they are, and as training used them beside trained ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimax_train.convert.json_file import read_json
from minimax_train.data.tokenizer import Tokenizer, load_tokenizer
from minimax_train.errors import ConfigError, one_line, require

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
# Letters, digits, scripts, blanks at either end and inside, line ends: whatever a tokenizer may treat by itself.
_PROBES = (
    "a",
    " A",
    "Hello, world!  Two blanks\n\nand\tlines \r\n",
    "naïve \ufb01 Ω 中文 👍🏽 e\u0301",
    "x_1 = 3.14159e-2;",
    "'s  ",
)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files between folders. Returns whether there were any."""
    files = [source / name for name in FILES if (source / name).is_file()]
    if files:
        target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, target)
    return bool(files)


def open_tokenizer(folder: Path, source: Path, vocab_size: int) -> Any:
    """The tokenizer of a folder as transformers opens it.

    Args:
        source: the folder that its files came from, to be named in errors.
        vocab_size: rows of the model's embedding.

    Raises:
        ConfigError: when transformers cannot open it, or it has ids that the embedding does not have.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values())
        tokenizer(_PROBES[0])
    except Exception as error:  # tokenizers raises bare Exception
        told = f"transformers cannot open the tokenizer: {one_line(error)}; mend its files or remove them"
        raise ConfigError(f"{source}: {told}") from error
    accepted = f"the tokenizer in {source} has ids up to {largest}; must be at least {largest + 1}"
    require(largest < vocab_size, "vocab_size", vocab_size, accepted)
    return tokenizer


def note_of_added_tokens(tokenizer: Any, report: Callable[[str], None]) -> None:
    """Say which tokens a tokenizer adds to a text by itself: training adds none but the end of text."""
    added = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    if added:
        report(
            f"note: in transformers this tokenizer adds {' '.join(added)} to every text; training does not, it ends "
            f"every document with {tokenizer.eos_token}"
        )


def write_trained_tokenizer(source: Path, target: Path, vocab_size: int) -> dict[str, int | None]:
    """Write the tokenizer of a run such that transformers gives the ids that training had.

    Training adds nothing to a text, and ends every document with the end of text. So what adds other tokens, such as
    one that begins a text, cuts texts short or pads them is left out, and with it the name of a token that begins
    texts, chat templates and the class that might bring them back.

    Returns:
        ``bos_token_id``, which is None, ``eos_token_id`` and ``pad_token_id``.

    Raises:
        ConfigError: when there is no tokenizer that training could have used, or transformers would give other ids.
    """
    trained = _load(source)
    backend, settings = read_json(source / TOKENIZER_FILE), read_json(source / CONFIG_FILE)
    backend |= {"truncation": None, "padding": None, "post_processor": _only_offsets(backend.get("post_processor"))}
    special = {name: settings[name] for name in ("eos_token", "pad_token", "unk_token") if settings.get(name)}
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
    for content, name in ((backend, TOKENIZER_FILE), (kept, CONFIG_FILE)):
        (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    exported = open_tokenizer(target, source, vocab_size)
    for text in _PROBES:
        had, given = trained.encode_document(text).tolist(), [*exported(text)["input_ids"], exported.eos_token_id]
        accepted = f"training had the ids {had}, end of text included; transformers would give {given}"
        require(had == given, f"{source}: text", text, accepted)
    return {"bos_token_id": None, "eos_token_id": trained.eos_id, "pad_token_id": exported.pad_token_id}


def _load(folder: Path) -> Tokenizer:
    try:
        return load_tokenizer(folder)
    except ConfigError:
        raise
    except Exception as error:  # of files that are JSON, but of no tokenizer
        raise ConfigError(f"no tokenizer in {str(folder)!r}: {one_line(error)}") from error


def _only_offsets(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """A post-processor of tokenizer.json without what adds tokens."""
    if processor is not None and processor["type"] == "Sequence":
        kept = [inner for inner in map(_only_offsets, processor["processors"]) if inner]
        return processor | {"processors": kept} if kept else None
    return processor if processor is not None and processor["type"] == "ByteLevel" else None
