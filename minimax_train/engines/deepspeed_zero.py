"""DeepSpeed's optimizer of ZeRO 0 to 2 for the parameters that one set of ranks holds. This module imports DeepSpeed.

Written for 0.19, whose classes are used below ``deepspeed.initialize``: that knows one set of ranks, and one more for
experts of its own kind.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
# Newer names of what DeepSpeed calls.
warnings.filterwarnings("ignore", r"`torch.distributed.(all_gather_into|reduce_scatter)_tensor` is deprecated")


@dataclass(frozen=True)
class ZeroArguments:
    """What an optimizer of any stage is made of.

    Attributes:
        groups: parameters by name, in the dtype of compute, for each weight decay.
        ranks: that hold the same parameters.
        options: ``zero_optimization`` of a DeepSpeed configuration.
        clip: the norm from which on a gradient is scaled down; None for no limit.
        betas, eps: AdamW's.
    """

    groups: Mapping[float, Mapping[str, nn.Parameter]]
    ranks: dist.ProcessGroup
    options: Mapping[str, Any]
    clip: float | None
    betas: tuple[float, float]
    eps: float

    @property
    def names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for group in self.groups.values() for name, parameter in group.items()}

    def adamw(self, zero: DeepSpeedZeroConfig) -> torch.optim.Optimizer:
        """Of the parameters; DeepSpeed puts its master weights in their place."""
        params = [{"params": list(group.values()), "weight_decay": decay} for decay, group in self.groups.items()]
        if zero.offload_optimizer is not None:
            return DeepSpeedCPUAdam(params, lr=0.0, betas=self.betas, eps=self.eps)
        return torch.optim.AdamW(params, lr=0.0, betas=self.betas, eps=self.eps, fused=True)

    def of_any_stage(self, zero: DeepSpeedZeroConfig, elements: int) -> dict[str, Any]:
        """Of DeepSpeed's constructors, those that are alike.

        Args:
            elements: of all parameters.
        """
        return {
            "timers": NoopTimer(),
            "clip_grad": self.clip or 0.0,
            "contiguous_gradients": zero.contiguous_gradients,
            # The buffer holds a bucket, and the largest parameter goes without.
            "reduce_bucket_size": min(zero.reduce_bucket_size, elements),
            "reduce_scatter": zero.reduce_scatter,
            "overlap_comm": bool(zero.overlap_comm),
            "offload_optimizer_config": zero.offload_optimizer,
            "gradient_accumulation_dtype": torch.float32,
            "communication_data_type": torch.float32,
        }


class StatesByParameter:
    """What DeepSpeed's optimizers of all stages have in common: an update that is told the norm and whether it is held,
    and states by parameter."""

    optimizer: Any
    ranks: dist.ProcessGroup
    held: bool  # of the update that is made
    norm: Tensor

    @property
    def masters(self) -> Sequence[Tensor]:
        """This rank's master weights, float32: parameters laid end to end."""
        raise NotImplementedError

    def make_moments(self) -> None:
        """At once, rather than with the first update: a checkpoint may be loaded before."""
        counts = isinstance(self.optimizer, torch.optim.AdamW)  # in a tensor
        for master in self.masters:
            step = torch.zeros((), device=master.device) if counts else 0
            moments = {kind: torch.zeros_like(master, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[master] = {"step": step, **moments}

    def update(self, learning_rate: float, norm: Tensor, held: bool) -> None:
        """AdamW, unless it is held, and the end of this step's gradients.

        Args:
            norm: of the whole model's gradient, by which DeepSpeed clips.
        """
        self.norm, self.held = norm.to(self.masters[0].device), held
        optimizer = cast(Any, self)
        optimizer.set_lr(learning_rate)
        optimizer.step()

    def largest(self) -> Tensor:
        """Absolute value of this rank's master weights, float64; not finite if one is not."""
        return torch.stack([x.detach().abs().max().double() for x in self.masters if x.numel()]).sum()

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Put together from all ranks, float32, of any shape: ``master``, ``exp_avg``, ``exp_avg_sq``, or ``gradient``
        before the update. Of one rank, states where DeepSpeed keeps them."""
        if dist.get_world_size(self.ranks) == 1 and kind != "gradient":
            return self.share(parameter, kind)
        if kind == "gradient":
            return cast(Tensor, safe_get_full_grad(parameter))
        if kind == "master":
            return cast(Tensor, safe_get_full_fp32_param(parameter))
        return cast(Tensor, safe_get_full_optimizer_state(parameter, kind))

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """This rank's share of what :meth:`read` gives."""
        raise NotImplementedError

    def share(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """This rank's, flat, where DeepSpeed keeps it."""
        raise NotImplementedError

    def set_steps(self, steps: int) -> None:
        """How many updates AdamW has made."""
        for state in self.optimizer.state.values():
            state["step"] = steps if isinstance(state["step"], int) else torch.full_like(state["step"], steps)


class ZeroOptimizer(StatesByParameter, DeepSpeedZeroOptimizer):
    """Gradients of a step's micro-batches, summed over ranks; AdamW's update of float32 master weights."""

    def __init__(self, arguments: ZeroArguments) -> None:
        self.ranks, self.stage, names = arguments.ranks, arguments.options["stage"], arguments.names
        zero, shards = DeepSpeedZeroConfig(**arguments.options), self.ranks
        if self.stage == 0:  # every rank is a set of its own, and gradients are summed here
            shards = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        super().__init__(
            arguments.adamw(zero),
            names,
            **arguments.of_any_stage(zero, sum(p.numel() for p in names)),
            optimizer_params={},
            use_multi_rank_bucket_allreduce=zero.use_multi_rank_bucket_allreduce,
            allgather_bucket_size=zero.allgather_bucket_size,
            dp_process_group=shards,
            gradient_average=False,
            ignore_unused_parameters=zero.ignore_unused_parameters,
            partition_grads=self.stage == 2,
            round_robin_gradients=zero.round_robin_gradients,
        )
        self.make_moments()
        self._lazy_init_hp_params_optimizer_state()

    @property
    def masters(self) -> list[Tensor]:
        return self.single_partition_of_fp32_groups

    def begin_micro_batch(self, is_first: bool, is_last: bool) -> None:
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
                    dist.all_reduce(gradient, group=self.ranks)

    def squared_norms(self) -> Iterator[Tensor]:
        """Of this rank's pieces of the gradient, float64 scalars; their sum is of all parameters."""
        if self.cpu_offload:
            pieces = [x.grad for x in self.masters if x.grad is not None]
        else:
            pieces = [piece for group in self.averaged_gradients.values() for piece in group]
        return (norm.double().square() for norm in torch._foreach_norm(list(pieces)))

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        if kind == "master":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def share(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return cast(Any, parameter)._hp_mapping.get_hp_fragment(None if kind == "master" else kind).detach()

    def check_overflow(self, partition_gradients: bool = True) -> None:
        self.overflow = self.held

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        return self.norm


def join_process_groups(device: torch.device) -> None:
    """Have DeepSpeed use the process groups that are there, and this device."""
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # where stage 3 looks for it
    if not deepspeed.comm.is_initialized():
        # Of the ops that DeepSpeed would try to compile now; one of them, taking minutes, would take gloo's place.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
        deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
