"""NVIDIA's apex, of which CUDA extensions are used. PyPI's package of this name is another, without them."""

from __future__ import annotations

import importlib

NEEDS_APEX = "needs NVIDIA's apex with its CUDA extensions, built from source (docs/engines.md); PyPI's apex is another"


def has_apex(extension: str) -> bool:
    """Whether apex can be imported with one of its CUDA extensions."""
    try:
        for module in ("apex.normalization", "apex.optimizers", extension):
            importlib.import_module(module)
    except (ImportError, OSError):
        return False
    return True
