"""The default engine: PyTorch FSDP2 shards parameters, gradients and AdamW's state over the data- and
context-parallel ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from minimax_train.errors import require_choice
from minimax_train.parallel.grid import ProcessGrid
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


def shard(model: nn.Module, config: FSDPConfig, grid: ProcessGrid) -> None:
    """Shard a model in place, block by block; parameters become DTensors over the ``dp_cp`` axis.

    Master weights are float32, or float64 when computing in float64.
    """
    compute = config.compute_dtype(grid.device_type)
    master = torch.promote_types(compute, torch.float32)
    model.to(master)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)
    size = grid.dp_cp_mesh.size()

    def placement(parameter: nn.Parameter) -> Shard:
        # Fewer experts than ranks: cut inside the experts, or most ranks would hold nothing.
        dim = 1 if parameter.dim() == 3 and parameter.shape[0] % size and parameter.shape[1] % size == 0 else 0
        return Shard(dim)

    shared = {"mesh": grid.dp_cp_mesh, "mp_policy": policy, "shard_placement_fn": placement}
    for block in model.layers:
        fully_shard(block, reshard_after_forward=config.reshard_after_forward, **shared)
    fully_shard(model, reshard_after_forward=False, **shared)


class FSDPEngine:
    """Backward passes, gradient norm, AdamW step and optimizer state of a sharded model."""

    def __init__(self, model: FSDPModule, recipe: RecipeConfig, grid: ProcessGrid) -> None:
        self.grid = grid
        # Kept from the start: after a forward pass without backward the model shows its gathered weights instead.
        self.parameters = dict(model.named_parameters())
        parameters = self.parameters.values()
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_eps,
            fused=True,
        )
        self.gradient_clip = recipe.gradient_clip

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; the whole batch's loss is the sum over micro-batches and ranks."""
        # FSDP averages over ranks; the loss is already divided by the whole batch.
        (loss * self.grid.dp_cp_mesh.size()).backward()

    def gradient_norm(self) -> float:
        """L2 norm of the whole model's gradient, over all ranks."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """Clip, update the weights, forget the gradients."""
        assert math.isfinite(gradient_norm)
        if self.gradient_clip is not None:
            norm = torch.tensor(gradient_norm, dtype=torch.float64, device=self.grid.device_type)
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.gradient_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()

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
