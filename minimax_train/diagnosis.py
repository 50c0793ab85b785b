"""Where a loss or gradient that is not a number came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.data import MicroBatch
from minimax_train.evaluation import run_model
from minimax_train.model.sharding import local

_SHOWN = 5


def describe_non_finite(model: nn.Module, parameters: Mapping[str, Tensor], batches: Iterable[MicroBatch]) -> str:
    """Name the parameters, their gradients and the module outputs that hold NaN or infinity.

    Runs the forward pass of the batches once more; called by all ranks together, and the same on all of them.
    """
    found = {
        "parameters": [name for name, p in parameters.items() if not _is_finite(p)],
        "gradients": [name for name, p in parameters.items() if p.grad is not None and not _is_finite(p.grad)],
        "outputs, in order of computation": _outputs(model, batches),
    }
    everywhere: list[dict[str, list[str]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, found)
    parts = []
    for kind in found:
        names = list(dict.fromkeys(name for rank in everywhere for name in rank[kind]))
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        parts.append(f"{kind}: {', '.join(names[:_SHOWN]) or 'none'}{more}")
    return "not finite: " + "; ".join(parts)


def _is_finite(tensor: Tensor) -> bool:
    return bool(local(tensor).isfinite().all())


def _outputs(model: nn.Module, batches: Iterable[MicroBatch]) -> list[str]:
    names: dict[str, None] = {}

    def hook(name: str):
        def check(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(t, Tensor) and t.is_floating_point() and not _is_finite(t) for t in tensors):
                names[name or "loss"] = None

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            for batch in batches:
                run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(names)
