"""JSON files of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minimax_train.errors import ConfigError


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ConfigError: when the file is no JSON, or another value than an object.
        OSError: when it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 and numbers of 5,000 digits among them
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds a JSON {type(content).__name__}, must hold an object, {{...}}")
    return content
