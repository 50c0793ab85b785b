"""Megatron-Core's DistributedDataParallel and DistributedOptimizer (ZeRO-1, arXiv 1910.02054).

One DistributedDataParallel lays weights and float32 gradients in buffers, those of dense parameters and of experts
apart, each cut in buckets. A DistributedOptimizer for either keeps and updates float32 master weights and AdamW's
moments of this rank's piece of every bucket:

    parameters    gradients are reduced over           states are sharded over
    dense         dp_cp, then tp where tp does not     dp_cp
                  split the parameter
    experts       edp                                  edp

A rank's piece of a bucket begins and ends anywhere in a parameter: what a snapshot has of it is a copy, but where one
rank has all of a parameter's states.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.data import MicroBatch
from minimax_train.engines.engine import DataParallelism, EngineConfig, TransferSums
from minimax_train.engines.external import ExternalEngine
from minimax_train.engines.fused_adam import FUSED_ADAMS, find_fused_adam
from minimax_train.errors import require, require_choice
from minimax_train.fields import Range
from minimax_train.model.sharding import ParameterLayout, set_parameter
from minimax_train.parallel.grid import EXPERT, AxisSizes
from minimax_train.recipe import StepPlan

if TYPE_CHECKING:
    from minimax_train.config import Config


@dataclass
class MegatronConfig(EngineConfig):
    """``engine=megatron``. Names are Megatron-Core's.

    Attributes:
        overlap_grad_reduce: reduce-scatter a bucket's gradients as soon as the last backward pass of a step has them
            all; false for all of them after it.
        overlap_param_gather: all-gather a bucket's weights beside the next forward pass; false for all of them at the
            end of a step.
        bucket_size: elements from which on a bucket is full; null for the larger of 40 million and a million for each
            data-parallel rank.
        fused_adam: whose AdamW: ``torch``'s fused one, FusedAdam of ``transformer_engine`` or of NVIDIA's ``apex``;
            ``auto`` takes the first that can be imported of Transformer Engine's, apex's and torch's.
    """

    name: str = "megatron"
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    bucket_size: Annotated[int | None, Range(1, 10**12, null="Megatron-Core's choice")] = None
    fused_adam: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("engine.name", self.name, ("megatron",))
        require_choice("engine.precision", self.precision, ("auto", "bfloat16", "float32"))
        require_choice("engine.fused_adam", self.fused_adam, ("auto", *FUSED_ADAMS))
        if not self.overlap_grad_reduce:  # all gradients are one bucket
            accepted = "must be false with engine.overlap_grad_reduce=false, which leaves one bucket"
            require(not self.overlap_param_gather, "engine.overlap_param_gather", True, accepted)
            accepted = "must be null with engine.overlap_grad_reduce=false, which leaves one bucket"
            require(self.bucket_size is None, "engine.bucket_size", self.bucket_size, accepted)

    def check_run(self, config: Config, grid: AxisSizes) -> None:
        accepted = "needs Megatron-Core: pip install 'minimax-train[megatron]'"
        found = all(importlib.util.find_spec(module) for module in ("megatron", "megatron.core"))
        require(found, "engine.name", self.name, accepted)
        if self.fused_adam != "auto":
            found = find_fused_adam(self.fused_adam) is not None
            require(found, "engine.fused_adam", self.fused_adam, FUSED_ADAMS[self.fused_adam])

    def check_device(self, device_type: str) -> None:
        accepted = f"needs a GPU, where Megatron-Core has its buffers; here device={device_type}"
        require(device_type == "cuda", "engine.name", self.name, accepted)


class MegatronEngine(ExternalEngine):
    """Megatron-Core's data parallelism and distributed optimizer."""

    config_type = MegatronConfig

    def __init__(self, model, config, grid, device, phases) -> None:
        super().__init__(model, config, grid, device, phases)
        from minimax_train.engines.megatron_core import ShardedAdamW, distribute

        options, recipe = cast(MegatronConfig, config.engine), config.recipe
        compute = options.compute_dtype(device.type)
        self._overlaps_gather = options.overlap_param_gather
        for name, layout in self.layouts.items():
            parameter = nn.Parameter(torch.zeros(layout.part(grid), dtype=compute, device=device))
            cast(Any, parameter).allreduce = not _is_expert(layout)  # what Megatron-Core tells experts by
            set_parameter(model, name, parameter)
        self.parameters = dict(model.named_parameters())
        summed = [name for name, layout in self.layouts.items() if _is_summed_over_tp(layout, grid)]
        self._copies = dict.fromkeys(summed, grid.size("tp"))
        self._ddp = distribute(model, grid, options)
        # The nodes of autograd that it keeps have hooks that refer to it, which the garbage collector does not see.
        weakref.finalize(self, self._ddp.grad_accs.clear)
        self._optimizers = {
            axis: ShardedAdamW(
                self._ddp,
                buffers,
                [p for name, p in self.parameters.items() if _owners(self.layouts[name]) == axis],
                grid.group(axis),
                fused_adam=options.fused_adam,
                betas=(recipe.adam_beta1, recipe.adam_beta2),
                eps=recipe.adam_eps,
                weight_decay=recipe.weight_decay,
            )
            for axis, buffers in (("dp_cp", self._ddp.buffers), ("edp", self._ddp.expert_parallel_buffers))
        }
        self._draw_weights()
        if self._overlaps_gather:
            self._wait_for_weights()
        largest = max(prod(layout.part(grid)) for layout in self.layouts.values())
        self._choose_recomputation(largest * compute.itemsize)  # one parameter's gradient, until it is added to others

    @classmethod
    def memory(cls, config, layouts, grid, device_type) -> dict[str, int]:
        compute = config.engine.compute_dtype(device_type)
        whole = shards = largest = 0
        for layout in layouts.values():
            elements = prod(layout.part(grid))
            whole += elements
            shards += -(-elements // grid.size(_owners(layout)))
            largest = max(largest, elements)
        return {
            "weights": whole * compute.itemsize,
            "gradients": 4 * whole,
            "master weights": 0 if compute == torch.float32 else 4 * shards,
            "moments": 8 * shards,
            "one parameter's gradient": largest * compute.itemsize,
        }

    @classmethod
    def data_parallelism(cls, config, layouts, grid, device_type, micro_batches) -> DataParallelism:
        compute = config.engine.compute_dtype(device_type)
        updated, world, tp, transfers = 0, grid.size("dp_cp_tp"), grid.size("tp"), TransferSums()
        for layout in layouts.values():
            ranks = grid.size(_owners(layout))
            shard = -(-prod(layout.part(grid)) // ranks)
            updated += shard
            transfers.add("gradients", world, 1, 4 * shard * (ranks - 1))
            transfers.add("weights", world, 1, compute.itemsize * shard * (ranks - 1))
            if _is_summed_over_tp(layout, grid):  # by all-reduce
                transfers.add("gradients over tp", tp, 1, 2 * 4 * shard * (tp - 1) / tp)
        return DataParallelism(updated, transfers.all())

    def _wait_for_weights(self) -> None:
        """Wait for a block's weights before it is called. Megatron-Core's own hooks wait for those of a module that is
        called itself, and blocks read weights of modules that are not."""
        self._ddp.disable_forward_pre_hook(param_sync=False)
        for module, names in self._weights_by_reader().items():
            groups = list(dict.fromkeys(self._ddp.param_to_bucket_group[self.parameters[name]] for name in names))

            def wait(*_: Any, groups: list[Any] = groups) -> None:
                for group in groups:
                    group.finish_param_sync()

            module.register_forward_pre_hook(wait)

    def _accumulate(self, batch: MicroBatch, plan: StepPlan, is_first: bool, is_last: bool) -> None:
        if is_first:
            self._ddp.zero_grad_buffer()
        with nullcontext() if is_last else self._ddp.no_sync():
            self._forward_backward(batch, plan)
        if is_last:
            self._finish_gradients()

    @torch.no_grad()
    def _finish_gradients(self) -> None:
        if self._ddp.ddp_config.overlap_grad_reduce:
            for parameter, group in self._ddp.param_to_bucket_group.items():
                if parameter not in group.per_param_grad_ready_counts:  # it had no gradient
                    group.register_grad_ready(parameter)
        self._ddp.finish_grad_sync()
        if summed := [g for name in self._copies if (g := self._own(name, "gradient")).numel()]:
            flat = torch.cat(summed)
            dist.all_reduce(flat, group=self.grid.group("tp"))
            torch._foreach_copy_(summed, list(flat.split([g.numel() for g in summed])))

    def _squares(self) -> Iterator[Tensor]:
        norms = torch._foreach_norm([self._own(name, "gradient") for name in self.parameters])
        copies = (self._copies.get(name, 1) for name in self.parameters)
        return (norm.double().square() / n for norm, n in zip(norms, copies, strict=True))

    def _update(self, learning_rate: float, norm: Tensor, held: bool) -> None:
        if held:
            return
        for optimizer in self._optimizers.values():
            optimizer.update(learning_rate, self._clip_factor(norm))
        if not self._overlaps_gather:
            self._ddp.start_param_sync()

    def evaluate(self, micro_batches, plan) -> float:
        if self._overlaps_gather:  # now, for a rank may have no micro-batch
            self._ddp.start_param_sync(force_sync=True)
        return super().evaluate(micro_batches, plan)

    def _gradients_and_weights(self):
        return tuple({name: self._own(name, kind) for name in self.parameters} for kind in ("gradient", "master"))

    @torch.no_grad()
    def _round_masters(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.round_master()
        self._ddp.start_param_sync(force_sync=True)

    def _own(self, name: str, kind: str) -> Tensor:
        """What this rank's optimizer has of a parameter, one axis, in place; empty where another rank has it."""
        return self._optimizers[_owners(self.layouts[name])].own(self.parameters[name], kind)

    def _piece(self, name: str, kind: str) -> Tensor:
        axis = _owners(self.layouts[name])
        return self._cut(name, self._part(name, axis, self._own(name, kind), self._owned(name)))

    @torch.no_grad()
    def _write(self, name: str, kind: str, piece: Tensor) -> None:
        self._own(name, kind).copy_(self._uncut(name, piece)[self._owned(name)])

    def _owned(self, name: str) -> slice:
        """Where in a rank's part of a parameter, laid flat, the piece lies that this rank's optimizer has."""
        return self._optimizers[_owners(self.layouts[name])].owned(self.parameters[name])


def _is_expert(layout: ParameterLayout) -> bool:
    return bool(set(layout.splits) & set(EXPERT))


def _is_summed_over_tp(layout: ParameterLayout, grid: AxisSizes) -> bool:
    """Whether a parameter is not split by tp, whose ranks have gradients of different tokens."""
    return not _is_expert(layout) and grid.size("tp") > 1 and layout.replicas(grid) == "dp_cp_tp"


def _owners(layout: ParameterLayout) -> str:
    """The axis of the ranks over which a parameter's states are sharded."""
    return "edp" if _is_expert(layout) else "dp_cp"
