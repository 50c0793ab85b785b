"""Where a loss or gradient that is not a number came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.model import StageOutput
from minimax_train.model.sharding import local

_SHOWN = 5


def describe_non_finite(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], outputs: Iterable[str]
) -> str:
    """Name what holds NaN or infinity on any rank; called by all ranks together, and the same on all of them.

    Args:
        parameters, gradients: this rank's, by parameter name.
        outputs: names of this rank's modules whose outputs do (:func:`non_finite_outputs`).
    """
    found = {
        "parameters": [name for name, p in parameters.items() if not _is_finite(p)],
        "gradients": [name for name, gradient in gradients.items() if not _is_finite(gradient)],
        "outputs, in order of computation": list(outputs),
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


@contextmanager
def non_finite_outputs(model: nn.Module) -> Iterator[dict[str, None]]:
    """Inside, every forward pass adds the modules whose outputs hold NaN or infinity, in order of computation."""
    names: dict[str, None] = {}

    def hook(name: str):
        def check(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not name and isinstance(output, StageOutput):  # of its last block, which is named
                return
            if any(isinstance(t, Tensor) and t.is_floating_point() and not _is_finite(t) for t in tensors):
                names[name or "loss"] = None

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()
