"""DeepSpeed's ZeRO 0 to 3 (arXiv 1910.02054, 2101.06840), states and weights on the device or in host memory.

One of DeepSpeed's ZeRO optimizers for each set of ranks that hold the same parameters
(:meth:`ParameterLayout.replicas`), so that the gradients of experts, and of what tp splits, are reduced over their own
ranks.

    stage   a rank holds whole             sharded                             gradients are reduced
    0       weights, gradients, states                                         once a step
    1       weights, gradients             states                              once a step
    2       weights                        states, gradients                   in every micro-batch
    3       those of a block at a time     states, gradients, weights          in every micro-batch

DeepSpeed cuts the parameters of a group, laid end to end, in equal pieces; with stage 3 each parameter. With stage 3
the host waits for the device after every micro-batch, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.data import MicroBatch
from minimax_train.diagnosis import describe_non_finite, non_finite_outputs
from minimax_train.engines.deepspeed_config import DeepSpeedConfig, choose_accelerator
from minimax_train.engines.engine import DataParallelism, TransferSums
from minimax_train.engines.external import ExternalEngine
from minimax_train.model.sharding import local, set_parameter
from minimax_train.recipe import StepPlan

if TYPE_CHECKING:
    from minimax_train.engines.deepspeed_zero import ZeroOptimizer
    from minimax_train.engines.deepspeed_zero3 import Zero3Optimizer


class DeepSpeedEngine(ExternalEngine):
    """DeepSpeed's ZeRO optimizers around AdamW."""

    config_type = DeepSpeedConfig

    def __init__(self, model, config, grid, device, phases) -> None:
        super().__init__(model, config, grid, device, phases)
        choose_accelerator(device.type)
        from minimax_train.engines.deepspeed_zero import join_process_groups

        join_process_groups(device)
        options = cast(DeepSpeedConfig, config.engine)
        self._zero = options.zero()
        self._make_parameters(options.compute_dtype(device.type))
        self.parameters = dict(model.named_parameters())
        self._optimizers = self._make_optimizers()
        self._draw_weights()
        needed = self.memory(config, self.layouts, grid, device.type)
        still = "gathered weights" if self._zero["stage"] == 3 else "gradients"
        self._choose_recomputation(needed[still] + needed["gradients being reduced"])

    def _make_parameters(self, compute: torch.dtype) -> None:
        """On the device, in the dtype of compute; with stage 3 a block at a time, of which the rank keeps its share."""
        model = self.model
        for module in (*model.layers.children(), model):
            for name, parameter in module.named_parameters():
                if parameter.is_meta:
                    part = torch.zeros(local(parameter).shape, dtype=compute, device=self.device)
                    set_parameter(module, name, nn.Parameter(part))
            if self._zero["stage"] == 3:
                from minimax_train.engines.deepspeed_zero3 import partition

                partition(module, self.grid.group("dp_cp_tp"), self._zero, compute)

    def _make_optimizers(self) -> dict[str, ZeroOptimizer | Zero3Optimizer]:
        """By the axis of the ranks that hold the same parameters."""
        recipe = self.config.recipe
        groups: dict[str, dict[float, dict[str, nn.Parameter]]] = {}
        for name, parameter in self.parameters.items():
            layout = self.layouts[name]
            decay = recipe.weight_decay * (len(layout.shape) >= 2)
            groups.setdefault(layout.replicas(self.grid), {}).setdefault(decay, {})[name] = parameter
        from minimax_train.engines.deepspeed_zero import ZeroArguments, ZeroOptimizer

        arguments = {
            axis: ZeroArguments(
                group,
                self.grid.group(axis),
                self._zero,
                clip=recipe.gradient_clip,
                betas=(recipe.adam_beta1, recipe.adam_beta2),
                eps=recipe.adam_eps,
            )
            for axis, group in groups.items()
        }
        if self._zero["stage"] < 3:
            return {axis: ZeroOptimizer(each) for axis, each in arguments.items()}
        from minimax_train.engines.deepspeed_zero3 import Zero3Optimizer

        ((axis, each),) = arguments.items()
        return {axis: Zero3Optimizer(self.model, each)}

    @classmethod
    def memory(cls, config, layouts, grid, device_type) -> dict[str, int]:
        options: DeepSpeedConfig = config.engine
        zero, compute = options.zero(), options.compute_dtype(device_type)
        whole, shards = {name: prod(layout.part(grid)) for name, layout in layouts.items()}, 0
        for name, layout in layouts.items():
            shards += -(-whole[name] // cls._num_shards(zero, grid.size(layout.replicas(grid))))
        total, on_device = sum(whole.values()), 0 if zero["offload_optimizer"] else 4 * shards
        bucket = 4 * min(int(zero.get("reduce_bucket_size", 5e8)), total)
        states = {"master weights": on_device, "moments": 2 * on_device}
        if zero["stage"] < 3:
            on_host = zero["stage"] == 2 and zero["offload_optimizer"]
            gradients = 0 if on_host else 4 * (shards if zero["stage"] == 2 else total)
            weights = {"weights": total * compute.itemsize, "gradients": gradients}
            return {**weights, **states, "gradients being reduced": bucket}
        gathered, share = 0, 0 if zero["offload_param"] else shards
        if grid.size("dp_cp_tp") > 1 or zero["offload_param"]:  # else the share is all of it
            blocks: dict[str, int] = {}
            for name, elements in whole.items():
                block = name.split(".")[1] if name.startswith("layers.") else ""
                blocks[block] = blocks.get(block, 0) + elements
            early = int(zero.get("stage3_prefetch_bucket_size", 5e7))
            # Those of the last blocks, needed again before so many others, are not freed between their passes.
            late = int(zero.get("stage3_max_reuse_distance", 1e9)) // 2
            gathered = min(total, blocks.pop("", 0) + 2 * max(blocks.values(), default=0) + early + late)
        weights = {"weights": share * compute.itemsize, "gathered weights": gathered * compute.itemsize}
        # A bucket is laid out anew to be reduced.
        return {**weights, "gradients": on_device, **states, "gradients being reduced": 2 * bucket}

    @classmethod
    def data_parallelism(cls, config, layouts, grid, device_type, micro_batches) -> DataParallelism:
        options: DeepSpeedConfig = config.engine
        zero, compute = options.zero(), options.compute_dtype(device_type)
        updated, world, transfers = 0, grid.size("dp_cp_tp"), TransferSums()
        for layout in layouts.values():
            whole, ranks = prod(layout.part(grid)), grid.size(layout.replicas(grid))
            others = whole * (ranks - 1) / ranks
            updated += -(-whole // cls._num_shards(zero, ranks))
            if zero["stage"] == 3:
                transfers.add("gradients", world, micro_batches, 4 * others)
                transfers.add("weights", world, 2 * micro_batches, compute.itemsize * others)
                continue
            # By all-reduce, of which each rank keeps its piece.
            times = micro_batches if zero["stage"] == 2 else 1
            transfers.add("gradients", world, times, 2 * 4 * others)
            if zero["stage"] > 0:
                transfers.add("weights", world, 1, compute.itemsize * others)
        return DataParallelism(updated, transfers.all())

    @staticmethod
    def _num_shards(zero: dict[str, Any], ranks: int) -> int:
        return ranks if zero["stage"] > 0 else 1

    def _accumulate(self, batch: MicroBatch, plan: StepPlan, is_first: bool, is_last: bool) -> None:
        for optimizer in self._optimizers.values():
            optimizer.begin_micro_batch(is_first, is_last)
        self._forward_backward(batch, plan)
        for optimizer in self._optimizers.values():
            optimizer.end_micro_batch(is_last)

    def _squares(self) -> Iterator[Tensor]:
        for axis, optimizer in self._optimizers.items():
            ranks = self.grid.size(axis)
            copies = ranks // self._num_shards(self._zero, ranks)
            yield from (x.to(self.device) / copies for x in optimizer.squared_norms())

    def _update(self, learning_rate: float, norm: Tensor, held: bool) -> None:
        for optimizer in self._optimizers.values():
            optimizer.update(learning_rate, norm, held)

    def norms(self) -> Tensor:
        return super().norms().to(self.device)  # of what may be in host memory

    def _gradients_and_weights(self):
        if self._zero["stage"] < 3:
            # DeepSpeed gives copies of gradients, which are not all held at a time: the norm of each stands for it.
            norms = {name: local(self._piece(name, "gradient")).norm() for name in self.parameters}
            return norms, {name: self._cut(name, p.detach()) for name, p in self.parameters.items()}
        (optimizer,) = self._optimizers.values()
        shares = {k: {n: optimizer.share(p, k) for n, p in self.parameters.items()} for k in ("gradient", "master")}
        return shares["gradient"], shares["master"]

    def diagnose(self, micro_batches, plan) -> str:
        with non_finite_outputs(self.model) as outputs:
            self.run(micro_batches, plan)
        weights = self.parameters if self._zero["stage"] < 3 else self._pieces("master")
        return describe_non_finite(weights, self.gradients(), outputs)

    def replicas(self) -> dict[str, tuple[Tensor, dist.ProcessGroup]]:
        if self._zero["stage"] == 3:
            return {}
        axes = {name: self.layouts[name].replicas(self.grid) for name in self.parameters}
        shared = {name: self.grid.group(axis) for name, axis in axes.items() if self.grid.size(axis) > 1}
        return {name: (self.parameters[name].detach(), ranks) for name, ranks in shared.items()}

    def _round_masters(self) -> None:
        for optimizer in self._optimizers.values():
            optimizer.update_lp_params()

    def _piece(self, name: str, kind: str) -> Tensor:
        return self._cut(name, self._optimizer(name).read(self.parameters[name], kind))

    def _write(self, name: str, kind: str, piece: Tensor) -> None:
        part = self._uncut(name, piece).view(self.layouts[name].part(self.grid))
        self._optimizer(name).write(self.parameters[name], kind, part)

    def _optimizer(self, name: str) -> ZeroOptimizer | Zero3Optimizer:
        return self._optimizers[self.layouts[name].replicas(self.grid)]
