"""DeepSpeed's optimizer of ZeRO 0 to 2 for the parameters that one set of ranks holds. This module imports DeepSpeed.

Written for 0.19, whose classes are used below ``deepspeed.initialize``: that knows one set of ranks, and one more for
experts of its own kind.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

import deepspeed.comm
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class ZeroOptimizer(DeepSpeedZeroOptimizer):
    """Gradients of a step's micro-batches, summed over ranks; AdamW's update of float32 master weights.

    Args:
        groups: parameters by name, in the dtype of compute, for each weight decay.
        ranks: that hold the same parameters.
        options: ``zero_optimization`` of a DeepSpeed configuration.
        clip: the norm from which on a gradient is scaled down; None for no limit.
        betas, eps: AdamW's.
    """

    def __init__(
        self, groups: Mapping[float, Mapping[str, nn.Parameter]], ranks: dist.ProcessGroup, *,
        options: Mapping[str, Any], clip: float | None, betas: tuple[float, float], eps: float,
    ) -> None:  # fmt: skip
        self.held, self.norm, self._ranks = False, torch.zeros(()), ranks
        self.stage, names = options["stage"], {p: name for group in groups.values() for name, p in group.items()}
        numel = sum(p.numel() for p in names)
        zero = DeepSpeedZeroConfig(**{"reduce_bucket_size": numel, **options})
        params = [{"params": list(group.values()), "weight_decay": decay} for decay, group in groups.items()]
        offloads = zero.offload_optimizer is not None
        if offloads:
            optimizer = DeepSpeedCPUAdam(params, lr=0.0, betas=betas, eps=eps)
        else:
            optimizer = torch.optim.AdamW(params, lr=0.0, betas=betas, eps=eps, fused=True)
        shares = ranks
        if self.stage == 0:  # every rank is a set of its own, and gradients are summed here
            shares = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        super().__init__(
            optimizer,
            names,
            timers=NoopTimer(),
            optimizer_params={},
            clip_grad=clip or 0.0,
            contiguous_gradients=zero.contiguous_gradients,
            # The buffer holds a bucket, and the largest parameter goes without.
            reduce_bucket_size=min(zero.reduce_bucket_size, numel),
            use_multi_rank_bucket_allreduce=zero.use_multi_rank_bucket_allreduce,
            allgather_bucket_size=zero.allgather_bucket_size,
            dp_process_group=shares,
            reduce_scatter=zero.reduce_scatter,
            overlap_comm=bool(zero.overlap_comm),
            offload_optimizer_config=zero.offload_optimizer,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            gradient_average=False,
            ignore_unused_parameters=zero.ignore_unused_parameters,
            partition_grads=self.stage == 2,
            round_robin_gradients=zero.round_robin_gradients,
        )
        # At once, rather than with the first update: a checkpoint may be loaded before.
        for master in self.single_partition_of_fp32_groups:
            moments = {kind: torch.zeros_like(master, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[master] = {"step": 0 if offloads else torch.zeros((), device=master.device), **moments}
        self._lazy_init_hp_params_optimizer_state()

    def begin_micro_batch(self, is_last: bool) -> None:
        self.clear_backward_seen_flag()
        self.set_gradient_accumulation_boundary(is_last)
        self.enter_backward()

    def end_micro_batch(self, is_last: bool) -> None:
        if self.partition_gradients:
            self.overlapping_partition_gradients_reduce_epilogue()
        elif is_last:
            self.reduce_gradients()
        self.exit_backward()
        if is_last and self.stage == 0:
            for group in self.averaged_gradients.values():
                for gradient in group:
                    dist.all_reduce(gradient, group=self._ranks)

    def squared_norms(self) -> Iterator[Tensor]:
        """Of this rank's pieces of the gradient, float64 scalars; their sum is of all parameters."""
        if self.cpu_offload:
            pieces = [x.grad for x in self.single_partition_of_fp32_groups if x.grad is not None]
        else:
            pieces = [piece for group in self.averaged_gradients.values() for piece in group]
        return (norm.double().square() for norm in torch._foreach_norm(list(pieces)))

    def update(self, learning_rate: float, norm: Tensor, held: bool) -> None:
        """AdamW, unless it is held, and the end of this step's gradients.

        Args:
            norm: of the whole model's gradient, by which DeepSpeed clips.
        """
        self.set_lr(learning_rate)
        self.norm, self.held = norm.to(self.device), held
        self.step()

    def check_overflow(self, partition_gradients: bool = True) -> None:
        self.overflow = self.held

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        return self.norm

    def largest(self) -> Tensor:
        """Absolute value of this rank's master weights, float64; not finite if one is not."""
        return torch.stack(
            [x.detach().abs().max().double() for x in self.single_partition_of_fp32_groups if x.numel()]
        ).sum()

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Put together from all ranks, float32: ``master``, ``exp_avg``, ``exp_avg_sq``, or ``gradient`` before the
        update."""
        if kind == "gradient":
            return cast(Tensor, safe_get_full_grad(parameter))
        if kind == "master":
            return cast(Tensor, safe_get_full_fp32_param(parameter))
        return cast(Tensor, safe_get_full_optimizer_state(parameter, kind))

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """This rank's share of what :meth:`read` gives."""
        if kind == "master":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def set_steps(self, steps: int) -> None:
        """How many updates AdamW has made."""
        for state in self.optimizer.state.values():
            state["step"] = steps if isinstance(state["step"], int) else torch.full_like(state["step"], steps)


def join_process_groups() -> None:
    """Have DeepSpeed use the process groups that are there."""
    if not deepspeed.comm.is_initialized():
        # Of the ops that DeepSpeed would try to compile now; one of them, taking minutes, would take gloo's place.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
