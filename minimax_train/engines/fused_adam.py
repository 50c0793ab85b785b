"""AdamW over many tensors at once: torch's, Transformer Engine's or apex's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch

from minimax_train.apex import NEEDS_APEX, has_apex

# By where it comes from: what is said where it cannot be imported.
FUSED_ADAMS = {
    "transformer_engine": "needs Transformer Engine: pip install transformer-engine[pytorch]",
    "apex": NEEDS_APEX,
    "torch": "",
}


def find_fused_adam(name: str) -> Callable[..., torch.optim.Optimizer] | None:
    """The optimizer class, to be called with ``params, lr, betas, eps``; None where it cannot be imported."""
    if name == "torch":
        return partial(torch.optim.AdamW, fused=True)
    if name == "apex":
        return _fused_adam("apex.optimizers") if has_apex("amp_C") else None
    try:
        return _fused_adam("transformer_engine.pytorch.optimizers")
    except (ImportError, OSError):  # or a library of its own is missing
        return None


def _fused_adam(module: str) -> Callable[..., torch.optim.Optimizer]:
    return partial(importlib.import_module(module).FusedAdam, adam_w_mode=True)
