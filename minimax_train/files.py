"""Files that are there whole or as they were before, whenever the process is killed."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader, or a run that resumes, never sees part of it."""
    draft = path.with_name(path.name + ".writing")
    draft.write_text(text)
    os.replace(draft, path)
