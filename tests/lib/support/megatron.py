"""Megatron-Core without a GPU: where it asks for CUDA by name, it gets the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

import minimax_train.engines.megatron_core  # noqa: F401  so that processes forked from this one need not, for seconds


class _OnCPU(TorchFunctionMode):
    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        found = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(found, str):  # it tells dtypes by such names
            return found.replace("torch.", "torch.cuda.")
        return found


@contextmanager
def on_cpu() -> Iterator[None]:
    device, stream = (mock.patch(f"torch.cuda.{name}", lambda: "cpu") for name in ("current_device", "current_stream"))
    with device, stream, _OnCPU():
        yield
