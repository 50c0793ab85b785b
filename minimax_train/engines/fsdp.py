"""PyTorch FSDP2 shards parameters, gradients and AdamW's state.

Each parameter is sharded over the ranks that hold the same part of it (:meth:`ParameterLayout.replicas`): what no axis
splits over dp x cp x tp, what tp splits over dp x cp, experts over edp. Hybrid sharding (``engine.shard_within=N``)
shards it over those of them that are in one block of N consecutive ranks, such as a node, and replicates it between
blocks. With 16 ranks, ep=4, N=8, rank 5 is one of these:

    dense     shards over ranks 0 .. 7, copies of this rank's shard on 5 and 13
    experts   shards over ranks 1 and 5, copies on 5 and 13

Gradients are reduced and scattered within a block after every micro-batch, and summed over blocks after a step's last.
A sum over a gradient's elements is that of all ranks' shards, each divided by its copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw

from minimax_train.data import MicroBatch
from minimax_train.engines.autograd import AutogradEngine
from minimax_train.engines.engine import DataParallelism, EngineConfig, StepReport, StepSums, TransferSums
from minimax_train.engines.stages import Stages
from minimax_train.errors import require, require_choice
from minimax_train.fields import Range
from minimax_train.model import HybridModel, initialize
from minimax_train.model.sharding import local, parameter_layouts
from minimax_train.parallel.grid import WORLD, AxisSizes, ProcessGrid, nearest_divisors
from minimax_train.recipe import StepPlan

if TYPE_CHECKING:
    from minimax_train.config import Config


@dataclass
class FSDPConfig(EngineConfig):
    """``engine=fsdp``.

    Attributes:
        reshard_after_forward: free each block's gathered weights after its forward pass and gather them again for its
            backward pass (ZeRO-3); false keeps them in between (ZeRO-2), with pipeline stages from a step's first
            micro-batch to its last. null is true without pipeline stages and false with them.
        shard_within: shard parameters over so many consecutive ranks, such as a node's, and replicate them between
            these blocks (hybrid sharding, HSDP); null shards over all ranks.
    """

    reshard_after_forward: bool | None = None
    shard_within: Annotated[int | None, Range(1, 10**6)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("engine.name", self.name, ("fsdp",))

    def reshards(self, grid: AxisSizes) -> bool:
        """Whether gathered weights are freed between a forward pass and its backward pass."""
        return grid.size("pp") == 1 if self.reshard_after_forward is None else self.reshard_after_forward

    def check_run(self, config: Config, grid: AxisSizes) -> None:
        block, ranks = self.shard_within, grid.size("dp_cp_tp")
        every, holds_copies = config.parallel.check_replicas, block is not None and block < ranks
        accepted = "must be 0 with engine=fsdp, which holds no weight twice without engine.shard_within below all ranks"
        require(holds_copies or every == 0, "parallel.check_replicas", every, accepted)
        if block is None:
            return
        nearest = nearest_divisors(ranks, block)
        accepted = f"must divide the {ranks} ranks that share parameters; the nearest that do are {nearest}"
        require(ranks % block == 0, "engine.shard_within", block, accepted)
        for axes in (("tp",), ("ep", "etp")):
            apart = prod(map(grid.size, axes))
            names = " x ".join(f"parallel.{axis}={grid.size(axis)}" for axis in axes)
            accepted = f"must be a multiple of {names}, or divide it"
            require(block % apart == 0 or apart % block == 0, "engine.shard_within", block, accepted)

    def shards(self, axis: str, grid: AxisSizes) -> int:
        """Over how many of the ranks of an axis parameters are sharded: those in one block. The others hold copies."""
        every = grid.size(axis)
        if self.shard_within is None:
            return every
        apart = {"dp_cp": grid.size("tp"), "edp": grid.size("ep") * grid.size("etp")}.get(axis, 1)
        # minimax-plan asks of grids with fewer ranks than a block too, before check_run refuses them.
        return min(every, max(1, self.shard_within // apart))


def shard(model: HybridModel, config: FSDPConfig, grid: ProcessGrid) -> None:
    """Shard a model in place, block by block; parameters become DTensors over every axis that splits them.

    Master weights are float32, or float64 when computing in float64.
    """
    compute = config.compute_dtype(grid.device_type)
    master = torch.promote_types(compute, torch.float32)
    model.to(master)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master, cast_forward_inputs=False)
    replicas = {name: layout.replicas(grid) for name, layout in parameter_layouts(model).items()}

    meshes: dict[str, DeviceMesh] = {}
    for axis in dict.fromkeys(replicas.values()):
        shards = config.shards(axis, grid)
        meshes[axis] = grid.mesh(axis) if shards == grid.size(axis) else grid.blocks(axis, shards)

    def apply(prefix: str, axis: str, *, reshard: bool) -> None:
        part, place = model.get_submodule(prefix), partial(_placement, ranks=config.shards(axis, grid))
        module = fully_shard(
            part, mesh=meshes[axis], reshard_after_forward=reshard, mp_policy=policy, shard_placement_fn=place
        )
        # Losses are divided by the whole batch: gradients are sums.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no factors

    def axis_of(prefix: str, *but: str) -> str:
        """The ranks that hold the same part of a module's parameters, those of some of its parts left aside."""
        (axis,) = {axis for name, axis in replicas.items() if name.startswith(prefix) and not name.startswith(but)}
        return axis

    reshard = config.reshards(grid)
    for layer, _ in model.layers.named_children():
        block, parts = f"layers.{layer}", (f"layers.{layer}.attention.", f"layers.{layer}.experts.mlp.")
        whole = axis_of(f"{block}.", *parts)
        for part in parts:
            if (axis := axis_of(part)) != whole:
                apply(part.rstrip("."), axis, reshard=reshard)
        apply(block, whole, reshard=reshard)
    # Embedding and head alike; a pipeline stage may have neither.
    outside = [axis for name, axis in replicas.items() if name in ("embedding.weight", "head.weight")]
    vocabulary = outside[0] if outside else "dp_cp_tp"
    if replicas.get("norm.weight", vocabulary) != vocabulary:
        apply("norm", axis_of("norm."), reshard=False)
    apply("", vocabulary, reshard=False)


def _placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """Dimension 0, unless another one divides evenly and that does not, or is split by another axis already."""
    placements = parameter.placements if isinstance(parameter, DTensor) else ()
    taken = {p.dim for p in placements if isinstance(p, Shard)}
    shape = local(parameter).shape
    free = [dim for dim in range(parameter.dim()) if dim not in taken and shape[dim] % ranks == 0]
    return Shard(free[0] if free else 0)


class FSDPEngine(AutogradEngine):
    """FSDP2 and AdamW (fused)."""

    config_type = FSDPConfig
    runs_stages = True

    def __init__(self, model, config, grid, device, phases) -> None:
        super().__init__(model, config, grid, device, phases)
        options: FSDPConfig = config.engine
        self._reshards = options.reshards(grid)
        axes = {name: layout.replicas(grid) for name, layout in self.layouts.items()}
        self._copies = {name: grid.size(axis) // options.shards(axis, grid) for name, axis in axes.items()}
        shard(model, config.engine, grid)
        model.to_empty(device=device)
        initialize(model, config.seed)
        # Kept from the start: after a forward pass without backward the model shows its gathered weights instead.
        self.parameters = dict(model.named_parameters())
        self.optimizer_state = {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for name, parameter in self.parameters.items()
        }
        if grid.size("pp") > 1:
            self._stages = Stages(self, self._before_last, self._layer_done, self._after_weights)
        needed = self.memory(config, self.layouts, grid, device.type)
        self._choose_recomputation(sum(needed[what] for what in ("gradients", "gathered weights", "whole gradients")))

    @classmethod
    def memory(cls, config, layouts, grid, device_type) -> dict[str, int]:
        options: FSDPConfig = config.engine
        compute = options.compute_dtype(device_type)
        master = torch.promote_types(compute, torch.float32)
        shards, whole = 0, dict.fromkeys(("", *(f"layers.{i}." for i in range(config.model.num_layers))), 0)
        for name, layout in layouts.items():
            elements = prod(layout.part(grid))
            shards += -(-elements // options.shards(layout.replicas(grid), grid))
            block = ".".join(name.split(".")[:2]) + "." if name.startswith("layers.") else ""
            whole[block] += elements
        root, largest = whole.pop(""), max(whole.values())
        # Of two blocks, or where they are kept of all, and of embedding and head.
        gathered = root + (2 * largest if options.reshards(grid) else sum(whole.values()))
        # With pipeline stages gradients are summed over the micro-batches before they are over ranks.
        summed = root + sum(whole.values()) if grid.size("pp") > 1 else 0
        return {
            "master weights": shards * master.itemsize,
            "gradients": shards * master.itemsize,
            "moments": 2 * shards * master.itemsize,
            "gathered weights": gathered * compute.itemsize,
            # In the dtype of compute, and a copy in that of the reduction.
            "whole gradients": max(root, largest) * (compute.itemsize + master.itemsize) + summed * master.itemsize,
        }

    def run(self, micro_batches: Sequence[MicroBatch], plan: StepPlan) -> StepSums:
        if self._stages is not None:
            # Several micro-batches are under way at a time: a block sums its gradients over ranks, and frees the
            # weights that are kept, after its last backward pass of the step.
            self._keep(self.model, reshards=self._reshards, sums=False)
            self._root.set_is_last_backward(False)
        return super().run(micro_batches, plan)

    def _before_last(self, part: int) -> None:
        """Have the blocks of a pipeline stage free their weights after the next backward pass, and sum their gradients
        over ranks, unless passes of weights are still to come."""
        assert self._stages is not None
        sums = not self._stages.splits
        for layer in self.model.parts[part].layers:
            self._keep(self.model.layers.get_submodule(str(layer)), reshards=True, sums=sums)
        if part == 0:
            self._keep(self.model, reshards=True, sums=sums)
            self._root.set_is_last_backward(sums)

    def _layer_done(self, layer: int) -> None:
        """Sum a block's gradients over ranks, beside what is computed next."""
        self._keep(self.model.layers.get_submodule(str(layer)), reshards=True, sums=True)
        self._end_backward()

    def _after_weights(self, is_last: bool) -> None:
        if is_last:
            self._keep(self.model, reshards=True, sums=True)
            self._root.set_is_last_backward(True)
        self._end_backward()

    def _end_backward(self) -> None:
        """What FSDP does at the end of a backward pass, for it knows of no pass of weights: it adds gradients to those
        of the micro-batches before, in the dtype of the reduction, or sums them over ranks."""
        self._root._get_fsdp_state()._root_post_backward_final_callback()

    @property
    def _root(self) -> FSDPModule:
        return cast(FSDPModule, self.model)

    def _keep(self, module: nn.Module, *, reshards: bool, sums: bool) -> None:
        """What FSDP does after each backward pass of a module and all within."""
        sharded = cast(FSDPModule, module)
        sharded.set_reshard_after_backward(reshards)
        sharded.set_requires_gradient_sync(sums)

    def _accumulate(self, batch: MicroBatch, plan: StepPlan, is_first: bool, is_last: bool) -> None:
        if cast(FSDPConfig, self.config.engine).shard_within is not None:
            self._root.set_requires_all_reduce(is_last)  # between blocks
        super()._accumulate(batch, plan, is_first, is_last)

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepReport:
        with self.phases("optimizer"):
            gradients = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
            norms = zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True)
            norm = self._gradient_norm(x.double().square() / self._copies[name] for name, x in norms)
            if self.config.recipe.gradient_clip is not None:
                scale = self._clip_factor(norm).to(next(iter(gradients.values())).dtype)
                torch._foreach_mul_(list(gradients.values()), scale)
            self._update(gradients, learning_rate)
            for parameter in self.parameters.values():
                parameter.grad = None
            weights = [local(p) for p in self.parameters.values()]
            largest = torch.stack(torch._foreach_norm([w for w in weights if w.numel()], math.inf)).double().sum()
            dist.all_reduce(largest, group=self.grid.group(WORLD))
            self._freeze_unless(largest.isfinite())
            return StepReport(norm, self._frozen == 0, self._outlier)

    def _update(self, gradients: dict[str, Tensor], learning_rate: float) -> None:
        """AdamW on this rank's shards; nothing where the update is held. Norms and biases do not decay."""
        recipe, held = self.config.recipe, self._held()
        for decays in (True, False):
            names = [name for name in gradients if (self.parameters[name].dim() >= 2) == decays]
            states = [self.optimizer_state[name] for name in names]
            adamw(
                [local(self.parameters[name]) for name in names],
                [gradients[name] for name in names],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=held,
                amsgrad=False,
                beta1=recipe.adam_beta1,
                beta2=recipe.adam_beta2,
                lr=learning_rate,
                weight_decay=recipe.weight_decay * decays,
                eps=recipe.adam_eps,
                maximize=False,
            )

    def replicas(self) -> dict[str, tuple[Tensor, dist.ProcessGroup]]:
        found = {}
        for name, parameter in self.parameters.items():
            if self._copies[name] > 1:
                mesh = cast(DTensor, parameter).device_mesh
                found[name] = local(parameter), mesh.get_group(f"{self.layouts[name].replicas(self.grid)}_blocks")
        return found

    def snapshot(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer_state}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is left to do: a snapshot holds the tensors that training uses."""

    @classmethod
    def data_parallelism(cls, config, layouts, grid, device_type, micro_batches) -> DataParallelism:
        options: FSDPConfig = config.engine
        compute = options.compute_dtype(device_type)
        master = torch.promote_types(compute, torch.float32).itemsize
        updated, world, transfers = 0, grid.size("dp_cp_tp"), TransferSums()
        once = micro_batches if grid.size("pp") == 1 else 1  # with pipeline stages once for all micro-batches
        for name, layout in layouts.items():
            axis, elements = layout.replicas(grid), prod(layout.part(grid))
            shards, size = options.shards(axis, grid), grid.size(axis)
            part, span = -(-elements // shards), options.shard_within or world
            gathers = 2 * micro_batches if options.reshards(grid) and name.startswith("layers.") else once
            updated += part
            transfers.add("weights", span, gathers, (shards - 1) * part * compute.itemsize)
            transfers.add("gradients", span, once, (shards - 1) * part * master)
            # An all-reduce between blocks: a reduce-scatter and an all-gather.
            blocks = size // shards
            transfers.add("gradients", world, 2, (blocks - 1) * part * master / blocks)
        return DataParallelism(updated, transfers.all())
