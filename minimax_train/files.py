"""Files of a run by name, and files that are there whole or as they were before, whenever the process is killed."""

from __future__ import annotations

import os
from pathlib import Path

# In a run's folder and in each of its checkpoints.
CONFIG, TOKENIZER = "config.yaml", "tokenizer"
# In a run's folder alone.
LOCK, CHECKPOINTS, METRICS, EVENTS = "run.lock", "checkpoints", "metrics.jsonl", "events.jsonl"
PICTURE, WANDB_ID, TENSORBOARD, TRACES = "loss.png", "wandb_id", "tensorboard", "traces"
# Ends the name of what is being written, or removed, and must not be taken for the finished thing.
UNFINISHED = ".writing"


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: a reader, or a run that resumes, never sees part of it."""
    draft = path.with_name(path.name + UNFINISHED)
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
