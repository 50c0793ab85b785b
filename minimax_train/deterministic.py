"""The same bits from the same run: what is switched on a GPU for ``deterministic=true``.

Triton kernels of ``kernels/`` add integers atomically and nothing else. What is left are libraries: cuBLAS, whose
workspaces decide on the order of sums; PyTorch's atomic operations; FlashAttention's backward pass, for which
``kernels/softmax/dispatch.py`` takes the one that PyTorch makes deterministic; and sums in NVLink switches, which
Megatron-LM's ``--deterministic-mode`` leaves out too.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from minimax_train.errors import ConfigError

_VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "NCCL_NVLS_ENABLE": ("0",)}


def use_deterministic_algorithms(environ: MutableMapping[str, str] = os.environ) -> None:
    """For this process, before it uses a GPU. An operation that PyTorch has no deterministic implementation of raises
    RuntimeError and names it.

    Raises:
        ConfigError: when a variable of the environment asks for something else.
    """
    for name, accepted in _VARIABLES.items():
        value = environ.setdefault(name, accepted[0])
        if value not in accepted:
            raise ConfigError(f"{name}={value!r}: must be {' or '.join(accepted)}, or not set, with deterministic=true")
    torch.use_deterministic_algorithms(True)
    # Which would write NaN into all memory before it is used.
    torch._C._set_deterministic_fill_uninitialized_memory(False)
