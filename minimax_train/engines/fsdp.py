"""The default engine: PyTorch FSDP2 shards parameters, gradients and AdamW's state.

Each parameter over all ranks that hold the same part of it: what no axis of the grid splits over all ranks, what tp
splits over dp x cp, experts over edp. So no rank holds anything twice, and every sum over a gradient's elements is the
sum of all ranks' shards.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from minimax_train.errors import require_choice
from minimax_train.model import HybridModel
from minimax_train.model.sharding import local
from minimax_train.parallel.grid import WORLD, ProcessGrid
from minimax_train.recipe import RecipeConfig

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass
class FSDPConfig:
    """``engine=fsdp``.

    Attributes:
        name: ``fsdp``.
        precision: dtype of compute. ``bfloat16`` keeps float32 master weights and reduces gradients in float32;
            ``auto`` is bfloat16 on GPU and float32 on CPU.
        reshard_after_forward: free each block's gathered weights after its forward pass and gather them again for
            its backward pass (ZeRO-3); false keeps them in between (ZeRO-2).
    """

    name: str = "fsdp"
    precision: str = "auto"
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        require_choice("engine.name", self.name, ("fsdp",))
        require_choice("engine.precision", self.precision, ("auto", *PRECISIONS))

    def compute_dtype(self, device_type: str) -> torch.dtype:
        if self.precision == "auto":
            return torch.bfloat16 if device_type == "cuda" else torch.float32
        return PRECISIONS[self.precision]


def shard(model: HybridModel, config: FSDPConfig, grid: ProcessGrid) -> None:
    """Shard a model in place, block by block; parameters become DTensors over every axis that splits them.

    Master weights are float32, or float64 when computing in float64.
    """
    compute = config.compute_dtype(grid.device_type)
    master = torch.promote_types(compute, torch.float32)
    model.to(master)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)

    def apply(module: nn.Module, axis: str, *, reshard: bool) -> None:
        place = partial(_placement, ranks=grid.size(axis))
        fully_shard(
            module, mesh=grid.mesh(axis), reshard_after_forward=reshard, mp_policy=policy, shard_placement_fn=place
        )
        # Losses are divided by the whole batch: gradients are sums.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no factors

    reshard = config.reshard_after_forward
    for block in model.layers:
        if grid.size("tp") > 1:
            apply(block.attention, "dp_cp", reshard=reshard)
        if grid.size("ep") * grid.size("etp") > 1:
            apply(block.experts.mlp, "edp", reshard=reshard)
        apply(block, WORLD, reshard=reshard)
    if grid.size("tp") > 1:
        apply(model.norm, WORLD, reshard=False)
    apply(model, "dp_cp" if grid.size("tp") > 1 else WORLD, reshard=False)  # embedding and head


def _placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """Dimension 0, unless another one divides evenly and that does not, or is split by another axis already."""
    taken = {p.dim for p in parameter.placements} if isinstance(parameter, DTensor) else set()
    shape = local(parameter).shape
    free = [dim for dim in range(parameter.dim()) if dim not in taken and shape[dim] % ranks == 0]
    return Shard(free[0] if free else 0)


class FSDPEngine:
    """Backward passes, gradient norm, AdamW step and optimizer state of a sharded model."""

    def __init__(self, model: FSDPModule, recipe: RecipeConfig, grid: ProcessGrid) -> None:
        self.grid = grid
        # Kept from the start: after a forward pass without backward the model shows its gathered weights instead.
        self.parameters = dict(model.named_parameters())
        groups = defaultdict(list)  # one fused update cannot mix meshes
        for parameter in self.parameters.values():
            groups[parameter.dim() >= 2, parameter.device_mesh].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": p, "weight_decay": recipe.weight_decay * decays} for (decays, _), p in groups.items()],
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_eps,
            fused=True,
        )
        self.gradient_clip = recipe.gradient_clip

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; the whole batch's loss is the sum over micro-batches and ranks."""
        loss.backward()

    def gradient_norm(self) -> float:
        """L2 norm of the whole model's gradient, over all ranks."""
        norms = torch._foreach_norm(self._gradients())
        total = torch.stack(norms).double().square().sum()
        dist.all_reduce(total, group=self.grid.group(WORLD))
        return math.sqrt(float(total))

    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """Clip, update the weights, forget the gradients."""
        assert math.isfinite(gradient_norm)
        if self.gradient_clip is not None:
            torch._foreach_mul_(self._gradients(), min(1.0, self.gradient_clip / (gradient_norm + 1e-6)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _gradients(self) -> list[Tensor]:
        """This rank's shards."""
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state by parameter name: the live tensors, so that loading a checkpoint into them is enough."""
        for parameter in self.parameters.values():
            if not self.optimizer.state[parameter]:
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        return {name: self.optimizer.state[parameter] for name, parameter in self.parameters.items()}
