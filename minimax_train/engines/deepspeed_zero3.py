"""DeepSpeed's optimizer of ZeRO 3 (arXiv 1910.02054, 2104.07857). This module imports DeepSpeed, as ``deepspeed_zero``.

DeepSpeed gathers the weights of a module when its forward pass begins, and frees them when it ends; again for its
backward pass. Here these modules are the blocks, whose parts read each other's weights; beside them the final norm, and
the model itself, in which embedding and head are read.

The ops of a block keep views and detached copies of weights for their backward pass. DeepSpeed gathers into new memory
each time, which such a view would not see, and would keep the old one alive. :class:`_Gathering` therefore gathers a
parameter into the same storage each time, whose memory is freed in between, as FSDP2 does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus, register_external_parameter
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import set_z3_leaf_module, z3_leaf_module
from torch import Tensor, nn

from minimax_train.engines.deepspeed_zero import StatesByParameter, ZeroArguments
from minimax_train.model import HybridModel


def partition(module: nn.Module, ranks: dist.ProcessGroup, options: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Leave this rank its share of a module's parameters, on the device or in host memory.

    Args:
        options: ``zero_optimization`` of a DeepSpeed configuration.
    """
    offload = DeepSpeedZeroConfig(**options).offload_param
    Init(
        module=module,
        data_parallel_group=ranks,
        mem_efficient_linear=False,  # which would take the place of torch.nn.functional.linear
        dtype=dtype,
        remote_device=None if offload is None else offload.device,
        # Their final place, which they are copied to, is page-locked in any case.
        pin_memory=bool((options["offload_param"] or {}).get("pin_memory")),
    )


class Zero3Optimizer(StatesByParameter, DeepSpeedZeroOptimizer_Stage3):
    """As :class:`~minimax_train.engines.deepspeed_zero.ZeroOptimizer`, for parameters that
    :func:`partition` has cut.

    Args:
        model: all of whose parameters these are.
    """

    def __init__(self, model: HybridModel, arguments: ZeroArguments) -> None:
        self.ranks, names = arguments.ranks, arguments.names
        # PyTorch page-locks memory in powers of two: gradients of a sub-group should be just below one.
        largest = max(cast(Any, p).partition_numel() for p in names)
        zero = DeepSpeedZeroConfig(**{"sub_group_size": max(1, 2**30 - largest), **arguments.options})
        for block in model.layers.children():
            set_z3_leaf_module(block, True)
        for parameter in (model.embedding.weight, model.head.weight):
            register_external_parameter(model, parameter)
        super().__init__(
            model,
            arguments.adamw(zero),
            names,
            **arguments.of_any_stage(zero, sum(cast(Any, p).ds_numel for p in names)),
            ds_config=None,
            prefetch_bucket_size=zero.prefetch_bucket_size,
            max_reuse_distance=zero.max_reuse_distance,
            max_live_parameters=zero.max_live_parameters,
            param_persistence_threshold=zero.param_persistence_threshold,
            dp_process_group=self.ranks,
            offload_param_config=zero.offload_param,
            sub_group_size=zero.sub_group_size,
            offload_ratio=1.0,
        )
        for master in self.masters:  # of which padding is not written to
            master.detach().zero_()
        self.make_moments()

    def _setup_for_real_optimizer(self) -> None:
        """With states in host memory the micro-batches' gradients are summed where the update reads them. DeepSpeed has
        another 4 bytes a parameter for that, and copies."""
        if not self.offload_optimizer:
            super()._setup_for_real_optimizer()
            return
        self._create_fp32_partitions()
        self._create_next_swappable_fp32_groups()
        self.initialize_optimizer_states()
        if self.contiguous_gradients:
            device = get_accelerator().current_device_name()
            for dtype, bucket in self.ipg_buckets.items():
                bucket.buffer = torch.empty(self.reduce_bucket_size, dtype=dtype, device=device)
        self.grad_partitions_flat_buffer, sums = torch.empty(0), {}
        for master, group in zip(self.masters, self.fp16_groups, strict=True):
            pieces = cast(Tensor, master.grad).split([p.partition_numel() for p in group])
            sums |= {p.ds_id: piece for p, piece in zip(group, pieces, strict=True)}
        self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = sums

    @property
    def masters(self) -> list[Tensor]:
        return self.fp32_partitioned_groups_flat

    def initialize_ds_offload(self, module: nn.Module, **arguments: Any) -> DeepSpeedZeRoOffload:
        return _Gathering(module=module, **arguments)

    def begin_micro_batch(self, is_first: bool, is_last: bool) -> None:
        self.clear_backward_seen_flag()
        if is_first:
            self.micro_step_id = 0
        self.set_gradient_accumulation_boundary(is_last)
        self.enter_backward()

    def end_micro_batch(self, is_last: bool) -> None:
        self.overlapping_partition_gradients_reduce_epilogue()
        self.backward_epilogue()
        self.exit_backward()

    def squared_norms(self) -> Iterator[Tensor]:
        """Of this rank's pieces of the gradient, float64 scalars; their sum is of all parameters."""
        if self.offload_optimizer:
            pieces = [cast(Tensor, x.grad) for x in self.masters]
        else:
            pieces = [piece for group in self.averaged_gradients.values() for piece in group]
        return (norm.double().square() for norm in torch._foreach_norm(list(pieces)))

    def write(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        share = self.share(parameter, kind)
        own = value.flatten()[dist.get_rank(self.ranks) * share.numel() :][: share.numel()]
        share[: own.numel()] = own

    def share(self, parameter: nn.Parameter, kind: str) -> Tensor:
        if kind == "gradient":
            return self._get_fp32_grad_state_partition(parameter, False)[0]
        return self._get_fp32_opt_state_partition(parameter, False, None if kind == "master" else kind)[0].detach()

    def update_lp_params(self) -> None:
        """Take over master weights that were written."""
        self._partition_all_parameters()
        for group in range(len(self.fp16_groups)):
            self._reassign_or_swap_out_partitioned_parameters(group)

    def _gradient_averaging_world_size(self, params: Any, partition_world_size: int) -> int:
        return 1  # gradients are summed

    def _overflow_check_and_loss_scale_update(self, update_scale: bool = True) -> bool:
        self.overflow = self.held
        return self._loss_scale_update_and_overflow_cleanup() if update_scale else self.overflow

    def _get_norm_groups(self) -> list[Tensor]:
        return [self.norm]


class _Gathering(DeepSpeedZeRoOffload):
    """Gathers a parameter into the same storage each time."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._places: dict[Any, Tensor] = {}  # by parameter
        super().__init__(*arguments, **named)

    def pre_sub_module_forward_function(self, sub_module: nn.Module) -> None:
        super().pre_sub_module_forward_function(sub_module)
        self._put_in_place(sub_module)

    def pre_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        super().pre_sub_module_backward_function(sub_module)
        self._put_in_place(sub_module)

    def post_sub_module_forward_function(self, sub_module: nn.Module) -> None:
        super().post_sub_module_forward_function(sub_module)
        self._free(_used_by(sub_module))

    def post_sub_module_backward_function(self, sub_module: nn.Module) -> None:
        super().post_sub_module_backward_function(sub_module)
        self._free(_used_by(sub_module))

    def release_backward_leftovers(self) -> None:
        super().release_backward_leftovers()
        self._free(self._places)

    def partition_all_parameters(self) -> None:
        super().partition_all_parameters()
        self._free(self._places)

    @torch.no_grad()
    def _put_in_place(self, module: nn.Module) -> None:
        for parameter in _used_by(module):
            gathered, share = (x.data_ptr() for x in (parameter.data, parameter.ds_tensor))
            if gathered == share:
                continue  # of one rank, whose share is all of it
            if parameter not in self._places:
                self._places[parameter] = torch.empty_like(parameter.data)
            place = self._places[parameter]
            if gathered == place.data_ptr():
                continue
            place.untyped_storage().resize_(place.nbytes)
            place.copy_(parameter.data)
            if not get_accelerator().is_synchronized_device():
                parameter.data.record_stream(get_accelerator().current_stream())
            parameter.data = place

    def _free(self, parameters: Iterable[Any]) -> None:
        for parameter in parameters:
            if parameter in self._places and parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                self._places[parameter].untyped_storage().resize_(0)


def _used_by(module: nn.Module) -> Iterable[Any]:
    """Those that DeepSpeed gathers for a module."""
    return iter_params(module, recurse=z3_leaf_module(module))
