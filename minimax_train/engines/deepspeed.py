"""DeepSpeed's ZeRO 0 to 2 (arXiv 1910.02054, 2101.06840), states on the device or in host memory.

One of DeepSpeed's ZeRO optimizers for each set of ranks that hold the same parameters
(:meth:`ParameterLayout.replicas`), so that the gradients of experts, and of what tp splits, are reduced over their own
ranks. The engine runs forward and backward passes, takes the norm of the whole model's gradient and decides whether an
update is held; DeepSpeed reduces gradients, keeps and updates float32 master weights and moments, and gathers weights.

    stage   a rank holds whole             sharded                             gradients are reduced
    0       weights, gradients, states                                         once a step
    1       weights, gradients             states                              once a step
    2       weights                        states, gradients                   in every micro-batch

DeepSpeed cuts the parameters of a group, laid end to end, in equal pieces. For checkpoints they are brought into the
form that all engines save, one parameter at a time (:meth:`ParameterLayout.cut`).

The host waits for the device once a step: DeepSpeed's optimizers are told by the host whether to update.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.data import MicroBatch
from minimax_train.engines.autograd import AutogradEngine
from minimax_train.engines.deepspeed_config import DeepSpeedConfig, choose_accelerator
from minimax_train.engines.engine import DataParallelism, StepReport, TransferSums
from minimax_train.model import initialize
from minimax_train.model.sharding import local, set_parameter
from minimax_train.parallel.grid import WORLD
from minimax_train.recipe import StepPlan

if TYPE_CHECKING:
    from minimax_train.engines.deepspeed_zero import ZeroOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(AutogradEngine):
    """DeepSpeed's ZeRO optimizers around AdamW."""

    config_type = DeepSpeedConfig
    on_meta = False

    def __init__(self, model, config, grid, device, phases) -> None:
        super().__init__(model, config, grid, device, phases)
        choose_accelerator(device.type)
        from minimax_train.engines.deepspeed_zero import ZeroOptimizer, join_process_groups

        join_process_groups()
        options, recipe = cast(DeepSpeedConfig, config.engine), config.recipe
        self._zero, compute = options.zero(), options.compute_dtype(device.type)
        # Initial weights are drawn in float32, and rounded for computing.
        drawn = {name: self._piece(name, torch.zeros(each.part(grid))) for name, each in self.layouts.items()}
        for name, piece in drawn.items():
            set_parameter(model, name, nn.Parameter(piece))
        initialize(model, config.seed)
        for name, layout in self.layouts.items():
            set_parameter(model, name, nn.Parameter(torch.zeros(layout.part(grid), dtype=compute, device=device)))
        self.parameters = dict(model.named_parameters())
        groups: dict[str, dict[float, dict[str, nn.Parameter]]] = {}
        for name, parameter in self.parameters.items():
            decay = recipe.weight_decay * (parameter.dim() >= 2)
            groups.setdefault(self.layouts[name].replicas(grid), {}).setdefault(decay, {})[name] = parameter
        self._optimizers = {
            axis: ZeroOptimizer(
                group,
                grid.group(axis),
                options=self._zero,
                clip=recipe.gradient_clip,
                betas=(recipe.adam_beta1, recipe.adam_beta2),
                eps=recipe.adam_eps,
            )
            for axis, group in groups.items()
        }
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        self.restore({"model": drawn})
        self._choose_recomputation(self.memory(config, self.layouts, grid, device.type)["gradients"])

    @classmethod
    def memory(cls, config, layouts, grid, device_type) -> dict[str, int]:
        options: DeepSpeedConfig = config.engine
        zero, compute = options.zero(), options.compute_dtype(device_type)
        whole = shards = 0
        for layout in layouts.values():
            elements = prod(layout.part(grid))
            whole += elements
            shards += -(-elements // cls._pieces(zero, grid.size(layout.replicas(grid))))
        on_device = 0 if zero["offload_optimizer"] else 4 * shards
        return {
            "weights": whole * compute.itemsize,
            "gradients": 4 * (shards if zero["stage"] == 2 else whole),
            "master weights": on_device,
            "moments": 2 * on_device,
            "gradients being reduced": 4 * min(zero.get("reduce_bucket_size", whole), whole),
        }

    @classmethod
    def data_parallelism(cls, config, layouts, grid, device_type, micro_batches) -> DataParallelism:
        options: DeepSpeedConfig = config.engine
        zero, compute = options.zero(), options.compute_dtype(device_type)
        updated, world, transfers = 0, grid.size("dp_cp_tp"), TransferSums()
        for layout in layouts.values():
            whole, ranks = prod(layout.part(grid)), grid.size(layout.replicas(grid))
            updated += -(-whole // cls._pieces(zero, ranks))
            # By all-reduce, of which each rank keeps its piece.
            times = micro_batches if zero["stage"] == 2 else 1
            transfers.add("gradients", world, times, 2 * 4 * whole * (ranks - 1) / ranks)
            if zero["stage"] > 0:
                transfers.add("weights", world, 1, compute.itemsize * whole * (ranks - 1) / ranks)
        return DataParallelism(updated, transfers.all())

    @staticmethod
    def _pieces(zero: dict[str, Any], ranks: int) -> int:
        return ranks if zero["stage"] > 0 else 1

    def _accumulate(self, batch: MicroBatch, plan: StepPlan, is_first: bool, is_last: bool) -> None:
        for optimizer in self._optimizers.values():
            optimizer.begin_micro_batch(is_last)
        self._forward_backward(batch, plan)
        for optimizer in self._optimizers.values():
            optimizer.end_micro_batch(is_last)

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepReport:
        with self.phases("optimizer"):
            squares = []
            for axis, optimizer in self._optimizers.items():
                copies = self.grid.size(axis) // self._pieces(self._zero, self.grid.size(axis))
                squares += [x.to(self.device) / copies for x in optimizer.squared_norms()]
            norm = self._gradient_norm(squares)
            self._freeze_unless(norm.isfinite())
            held = self._held()
            self._step += 1 - held
            for optimizer in self._optimizers.values():
                optimizer.update(learning_rate, norm, bool(held))
            largest = torch.stack([x.largest().to(self.device) for x in self._optimizers.values()]).sum()
            dist.all_reduce(largest, group=self.grid.group(WORLD))
            self._freeze_unless(largest.isfinite())
            return StepReport(norm, self._frozen == 0, self._outlier)

    def gradients(self) -> dict[str, Tensor]:
        return self._read("gradient")

    def _gradients_and_weights(self):
        return self.gradients(), {name: self._piece(name, p.detach()) for name, p in self.parameters.items()}

    def snapshot(self) -> dict[str, Any]:
        moments = {kind: self._read(kind) for kind in MOMENTS}
        states = {n: {"step": self._step, **{kind: moments[kind][n] for kind in MOMENTS}} for n in self.parameters}
        return {"model": self._read("master"), "optimizer": states}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        self._write("master", state["model"])
        if "optimizer" in state:
            for kind in MOMENTS:
                self._write(kind, {name: moments[kind] for name, moments in state["optimizer"].items()})
        for each in self._optimizers.values():
            each.set_steps(int(self._step))
            each.update_lp_params()

    def _read(self, kind: str) -> dict[str, Tensor]:
        """Of all parameters, as checkpoints have it."""
        return {name: self._piece(name, self._optimizer(name).read(p, kind)) for name, p in self.parameters.items()}

    def _write(self, kind: str, pieces: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            self._optimizer(name).write(parameter, kind, self._put_together(name, pieces[name]))

    def _optimizer(self, name: str) -> ZeroOptimizer:
        return self._optimizers[self.layouts[name].replicas(self.grid)]

    def _piece(self, name: str, whole: Tensor) -> Tensor:
        """What checkpoints have of a rank's part of a parameter from this rank."""
        layout = self.layouts[name]
        rows, *others = layout.piece_shape(self.grid)
        size, row = rows * prod(others), prod(others)
        flat = whole.flatten()[self.grid.rank(layout.replicas(self.grid)) * size :][:size]
        return layout.shard(self.grid, flat.reshape(flat.numel() // row, *others).clone())

    def _put_together(self, name: str, piece: Tensor) -> Tensor:
        """The inverse of :meth:`_piece`; by all ranks together."""
        layout, own = self.layouts[name], local(piece)
        axis, start = layout.replicas(self.grid), 0
        if self.grid.size(axis) == 1:
            return own
        whole = torch.zeros(layout.part(self.grid), dtype=torch.float32, device=self.device)
        start = self.grid.rank(axis) * prod(layout.piece_shape(self.grid))
        whole.flatten()[start : start + own.numel()] = own.flatten()
        dist.all_reduce(whole, group=self.grid.group(axis))
        return whole
