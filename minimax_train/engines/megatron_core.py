"""What ``engine=megatron`` takes from Megatron-Core, which this module imports. Written for 0.16 to 0.19."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.engines.fused_adam import FUSED_ADAMS, find_fused_adam
from minimax_train.parallel.grid import ProcessGrid

# It calls collectives by names that torch 2.13 warns of.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+_tensor` is deprecated")
with warnings.catch_warnings():
    # Of Transformer Engine and apex, where they are not installed, and of a value that it has set itself.
    warnings.simplefilter("ignore")
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    # Of a model's configuration it reads that gradients are summed over ranks, not averaged.
    SUMMED = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1, calculate_per_token_loss=True)

if TYPE_CHECKING:
    from minimax_train.engines.megatron import MegatronConfig

logging.getLogger("megatron").setLevel(logging.ERROR)


def distribute(model: nn.Module, grid: ProcessGrid, options: MegatronConfig) -> DistributedDataParallel:
    """Move a model's weights into buffers, and have its backward pass add gradients up in float32 and reduce them.

    Args:
        model: whose parameters that experts have are marked ``allreduce = False``.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        bucket_size=options.bucket_size,
    )
    axes = {"dp": "dp", "dp_cp": "dp_cp", "expt_dp": "edp", "tp": "tp", "pp": "pp", "ep": "ep"}
    groups = ProcessGroupCollection(**{key: grid.group(axis) for key, axis in axes.items()})
    return DistributedDataParallel(SUMMED, ddp_config, model, pg_collection=groups)


class ShardedAdamW(DistributedOptimizer):
    """AdamW of float32 master weights, each rank its pieces of the buckets.

    Args:
        ddp: the model.
        buffers: of its dense parameters, or of its experts.
        parameters: these.
        ranks: these ranks.
        fused_adam: one of ``FUSED_ADAMS``, or ``auto``.
        weight_decay: of matrices; norms and biases do not decay.
    """

    def __init__(
        self, ddp: DistributedDataParallel, buffers: list[Any], parameters: Sequence[nn.Parameter],
        ranks: dist.ProcessGroup, *, fused_adam: str, betas: tuple[float, float], eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        compute = parameters[0].dtype
        config = OptimizerConfig(bf16=compute == torch.bfloat16, params_dtype=compute, use_distributed_optimizer=True)
        with torch.no_grad():  # else its views of float32 weights would not be leaves
            super().__init__(
                torch.optim.AdamW([group for group in groups if group["params"]]),
                config,
                grad_scaler=cast(Any, None),
                init_state_fn=None,
                model_chunks=[ddp],
                per_model_buffers={0: buffers},
                data_parallel_group=ranks,
                data_parallel_group_gloo=None,
                data_parallel_group_idx=0,
                distributed_optimizer_instance_id=0,
            )
        # It takes torch's AdamW, or the FusedAdam that it finds first; now that the shards are there, any will do.
        found = [find_fused_adam(name) for name in (FUSED_ADAMS if fused_adam == "auto" else [fused_adam])]
        make = next(each for each in found if each is not None)
        groups = self.optimizer.param_groups
        self._shards = {p: groups[i]["params"][j] for p, (i, j) in self.model_param_group_index_map.items()}
        self._nothing = torch.zeros(0, device=parameters[0].device)
        # An apex of some age does not take a group without tensors.
        held = [{key: group[key] for key in ("params", "weight_decay")} for group in groups if group["params"]]
        self.optimizer = make(held or [{"params": []}], lr=0.0, betas=betas, eps=eps)
        # At once, rather than with the first update: a checkpoint may be loaded before.
        for shard in self._shards.values():
            state = self.optimizer.state[shard]
            state |= {kind: torch.zeros_like(shard) for kind in ("exp_avg", "exp_avg_sq")}
            if isinstance(self.optimizer, torch.optim.AdamW):
                state["step"] = torch.zeros((), device=shard.device)

    def owned(self, parameter: nn.Parameter) -> slice:
        """Which elements of a parameter, laid flat, this rank has."""
        if parameter not in self._shards:
            return slice(0, 0)
        found = self._get_model_param_range_map(parameter)["param"]
        return slice(found.start, found.end)

    def own(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Of these elements ``gradient``, ``master``, ``exp_avg`` or ``exp_avg_sq``, in place."""
        if kind == "gradient":
            return cast(Any, parameter).main_grad.view(-1)[self.owned(parameter)]
        if parameter not in self._shards:
            return self._nothing
        shard = self._shards[parameter]
        return shard.detach() if kind == "master" else self.optimizer.state[shard][kind]

    def update(self, learning_rate: float, scale: Tensor) -> None:
        """AdamW, and the new weights into the buffers, from where they are gathered.

        Args:
            scale: of gradients, a scalar: clipping.
        """
        if not self._shards:  # a rank with nothing but padding
            return
        self.prepare_grads()
        torch._foreach_mul_([shard.grad for shard in self._shards.values()], scale.float())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.round_master()

    def round_master(self) -> None:
        """The weights of compute, from the master weights."""
        self._copy_main_params_to_model_params()

    def largest(self) -> Tensor:
        """Absolute value of this rank's master weights, float64; not finite if one is not."""
        largest = torch._foreach_norm(list(self._shards.values()), float("inf")) if self._shards else ()
        return torch.stack([self._nothing.sum(), *largest]).sum().double()

    def set_steps(self, steps: int) -> None:
        """How many updates AdamW has made."""
        for group in self.optimizer.param_groups:
            if not isinstance(self.optimizer, torch.optim.AdamW):
                group["step"] = steps
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(steps)
