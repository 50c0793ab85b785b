"""ZeRO-1 (arXiv 1910.02054; Megatron-Core's distributed optimizer): every rank holds the weights it computes with and
their gradients whole; float32 master weights and AdamW's moments are sharded.

A parameter's elements lie in one stretch of memory, cut in n equal stretches for the n ranks that hold the same part
of it (:meth:`ParameterLayout.cut`). So a reduce-scatter of gradients and an all-gather of weights read and write them
where they are, and the optimizer goes over all parameters in one pass:

    micro-batches   gradients are added up in float32, on this rank
    reduce-scatter  of the step's gradients, each as soon as the last micro-batch has added to it
    AdamW           on this rank's shards, which also rounds the new weights to the dtype of compute
    all-gather      of the weights, beside the next forward pass: a block waits for its own

None of these tensors ever moves, which a CUDA graph of a micro-batch needs (``graphs.py``).

Bytes per parameter on this rank, in bfloat16: 2 (weight) + 4 (gradient) + 12 / n, and for n > 1 another 6 / n.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.capture import Recording
from minimax_train.data import MicroBatch
from minimax_train.engines.autograd import AutogradEngine
from minimax_train.engines.engine import PRECISIONS, DataParallelism, EngineConfig, StepReport, TransferSums
from minimax_train.engines.graphs import MicroBatchGraphs
from minimax_train.engines.parameter_shards import ParameterShards, aligned, shard_shape
from minimax_train.engines.transfers import Transfers
from minimax_train.errors import require_choice
from minimax_train.kernels.accumulation import set_accumulator
from minimax_train.kernels.adamw import adamw_, squared_norm
from minimax_train.model import initialize
from minimax_train.model.sharding import ParameterLayout, local, set_parameter
from minimax_train.parallel.communicator import GroupCommunicator, Pending
from minimax_train.parallel.grid import WORLD, AxisSizes, ProcessGrid
from minimax_train.recipe import StepPlan


@dataclass
class Zero1Config(EngineConfig):
    """``engine=zero1``.

    Attributes:
        moments: dtype of AdamW's moments: ``float32`` or ``bfloat16``, which takes 4 bytes a parameter less.
        cuda_graphs: on a GPU, capture a micro-batch's forward and backward pass in a CUDA graph and replay it: the host
            launches one graph instead of thousands of kernels; with expert or context parallelism some hundred, between
            which it calls what it must plan. What cannot be captured runs without, and the log says so: ``full``
            recomputation with either of these, and kernels that ask the host for lengths.
    """

    name: str = "zero1"
    moments: str = "float32"
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("engine.name", self.name, ("zero1",))
        require_choice("engine.moments", self.moments, ("float32", "bfloat16"))

    def captures(self, grid: AxisSizes, recomputation: Sequence[str]) -> bool:
        """Whether a micro-batch on such a grid of GPUs is captured, where its kernels can be.

        Args:
            recomputation: of the layers on the rank. Computed again, a call between two graphs would be made twice, and
                nothing of the first forgotten.
        """
        return self.cuda_graphs and not (_has_calls(grid) and "full" in recomputation)

    def calls_attention(self, grid: AxisSizes) -> bool:
        return self.cuda_graphs and grid.size("cp") > 1


def _has_calls(grid: AxisSizes) -> bool:
    """Whether the host makes calls between a micro-batch's graphs: of experts, or of attention."""
    return grid.size("ep") > 1 or grid.size("cp") > 1


class _Bucket(NamedTuple):
    """Parameters whose gradients, and whose weights, travel in one call: those of a block, or of another module that
    reads them, that the same ranks hold."""

    names: tuple[str, ...]
    ranks: GroupCommunicator


class _Accumulator:
    """Of one parameter (``kernels/accumulation.py``), whether a GEMM adds to it or autograd's hook. The parameter has a
    reference to it: one from here to the engine would keep all its memory."""

    def __init__(self, engine: Zero1Engine, name: str) -> None:
        self._engine, self._name = weakref.ref(engine), name

    def sum(self) -> tuple[Tensor, bool]:
        engine = self._alive()
        return engine._gradient_of[self._name], not engine._is_first or self._name in engine._summed

    def added(self) -> None:
        engine = self._alive()
        is_moved = engine._is_last and self._name in engine._bucket_of
        assert not (is_moved and self._name in engine._summed), f"{self._name}: used twice, and summed over ranks"
        engine._summed.add(self._name)
        engine._reduce(self._name)

    def add(self, parameter: nn.Parameter) -> None:
        """What autograd made; nothing where a GEMM has added it."""
        if parameter.grad is None:
            return
        total, adds = self.sum()
        total.add_(parameter.grad) if adds else total.copy_(parameter.grad)
        parameter.grad = None
        self.added()

    def _alive(self) -> Zero1Engine:
        engine = self._engine()
        assert engine is not None
        return engine


class Zero1Engine(AutogradEngine):
    """ZeRO-1 and AdamW, micro-batches as CUDA graphs where they can be."""

    config_type = Zero1Config
    adds_in_gemms = True

    def __init__(self, model, config, grid, device, phases) -> None:
        super().__init__(model, config, grid, device, phases)
        self._options: Zero1Config = config.engine
        options = self._options
        self._groups = _make_groups(model, self.layouts, options, grid, device)
        self._group_of = {name: group for group in self._groups.values() for name in group.shapes}
        self._is_sharded = any(group.ranks.size > 1 for group in self._groups.values())
        self._master = self._sharded("master")
        # Initial weights are drawn into the shards, then rounded.
        for name, shard in self._master.items():
            set_parameter(model, name, nn.Parameter(shard))
        initialize(model, config.seed)
        self._gradient_of: dict[str, Tensor] = {}
        for group in self._groups.values():
            for name, weight in group.whole(group.weights).items():
                # With a version counter of its own: the others of the group may still be gathered while it is used.
                set_parameter(model, name, nn.Parameter(weight.data))
            self._gradient_of |= group.whole(group.gradients)
            group.round_master()
        self.parameters = dict(model.named_parameters())  # in the order of the forward pass
        self._summed, self._is_told = set[str](), False
        self._left = dict[int, int]()  # of the step's buckets: parameters whose gradients are not complete
        self._called = Counter[int]()  # and those that were completed by calls between graphs
        self._is_first = self._is_last = self._is_stale = True  # stale: ranks have not taken over each other's weights
        for name, parameter in self.parameters.items():
            accumulator = _Accumulator(self, name)
            set_accumulator(parameter, accumulator)
            parameter.register_post_accumulate_grad_hook(accumulator.add)
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        self._not_finite = torch.zeros((), dtype=torch.float32, device=device)
        # The whole gradient of one parameter at a time, until it is added to the others.
        largest = self.memory(config, self.layouts, grid, device.type)["one parameter's gradient"]
        self._choose_recomputation(largest, apart=options.cuda_graphs)
        self._graphs = None
        if options.cuda_graphs and device.type == "cuda":
            if dist.get_world_size() > 1 and "cuda:nccl" not in dist.get_backend_config():
                self.notes.append("no CUDA graphs: transfers over gloo pass through the host")
            else:
                self._graphs = MicroBatchGraphs(self._sum_gradients, device, phases, self.notes.append)
        self._make_transfers()

    @classmethod
    def memory(cls, config, layouts, grid, device_type) -> dict[str, int]:
        options: Zero1Config = config.engine
        compute = options.compute_dtype(device_type)
        master = torch.promote_types(compute, torch.float32)
        moments = master.itemsize if options.moments == "float32" else 2
        bytes_of = dict.fromkeys(("weights", "gradients", "master weights", "moments", "shards sent and received"), 0)
        largest = 0
        for layout in layouts.values():
            shape, n = layout.part(grid), grid.size(layout.replicas(grid))
            shard = prod(shard_shape(shape, layout.cut(grid)))
            part, whole = aligned(shard), aligned(n * shard)
            bytes_of["weights"] += whole * compute.itemsize
            bytes_of["gradients"] += whole * master.itemsize
            bytes_of["moments"] += 2 * part * moments
            if n > 1:
                bytes_of["shards sent and received"] += part * (compute.itemsize + master.itemsize)
            if compute != master:  # else the shards of the weights are the master weights
                bytes_of["master weights"] += part * master.itemsize
            largest = max(largest, prod(shape) * compute.itemsize)
        return bytes_of | {"one parameter's gradient": largest}

    @classmethod
    def data_parallelism(cls, config, layouts, grid, device_type, micro_batches) -> DataParallelism:
        options: Zero1Config = config.engine
        compute = options.compute_dtype(device_type)
        master = torch.promote_types(compute, torch.float32)
        updated, world, transfers = 0, grid.size("dp_cp_tp"), TransferSums()
        for layout in layouts.values():
            part = aligned(prod(shard_shape(layout.part(grid), layout.cut(grid))))
            others = grid.size(layout.replicas(grid)) - 1
            updated += part
            transfers.add("gradients", world, 1, others * part * master.itemsize)
            transfers.add("weights", world, 1, others * part * compute.itemsize)
        return DataParallelism(updated, transfers.all())

    def _make_transfers(self) -> None:
        """Buckets, in the order in which the forward pass needs them; modules wait for theirs when they are called."""
        order = {name: index for index, name in enumerate(self.parameters)}
        readers, buckets, of_module = self._weights_by_reader(), list[_Bucket](), dict[nn.Module, list[int]]()
        for module, names in sorted(readers.items(), key=lambda item: min(map(order.__getitem__, item[1]))):
            alike: dict[str, list[str]] = {}
            for name in names:
                if self._group_of[name].ranks.size > 1:
                    alike.setdefault(self.layouts[name].replicas(self.grid), []).append(name)
            of_module[module] = list(range(len(buckets), len(buckets) + len(alike)))
            buckets += [_Bucket(tuple(same), self._group_of[same[0]].ranks) for same in alike.values()]
        self._buckets = buckets
        self._bucket_of = {name: index for index, bucket in enumerate(buckets) for name in bucket.names}
        replayed = self._graphs is not None and self._is_sharded
        calls = _has_calls(self.grid)  # which end a graph every few milliseconds
        gathers, reductions = map(list, zip(*map(self._begins_of, buckets), strict=True)) if buckets else ([], [])
        self._gathering = gathering = Transfers(gathers, replayed=replayed)
        self._reducing = Transfers(reductions, replayed=replayed and calls, in_graph=not calls)
        self._read_first = of_module.pop(self.model)
        for module, own in of_module.items():
            module.register_forward_pre_hook(lambda *_, own=own: gathering.wait(own))

    def _begins_of(self, bucket: _Bucket) -> tuple[Callable[[], Pending], Callable[[], Pending]]:
        """What starts to gather its weights, and to sum its gradients."""
        weights, shards = zip(*(self._group_of[name].weight(name) for name in bucket.names), strict=True)
        gradients, sums = zip(*(self._group_of[name].gradient(name) for name in bucket.names), strict=True)
        ranks = bucket.ranks
        return lambda: ranks.all_gather_each(shards, weights), lambda: ranks.reduce_scatter_each(gradients, sums)

    def _gather_weights(self) -> None:
        """Start to take over the other ranks' new weights, in the order in which the forward pass needs them, and wait
        for the first."""
        for index in range(len(self._buckets)):
            self._gathering.start(index)
        self._gathering.wait(self._read_first)

    def _sharded(self, kind: str) -> dict[str, Tensor]:
        """Every parameter's shard of a kind of tensor, in its global shape."""
        shards: dict[str, Tensor] = {}
        for group in self._groups.values():
            shards |= group.shards(getattr(group, kind))
        return {name: layout.shard(self.grid, shards[name]) for name, layout in self.layouts.items()}

    def _reduce(self, name: str) -> None:
        """A gradient of the step is complete: start to sum those of its bucket over the ranks, once all are."""
        index = self._bucket_of.get(name)
        if not self._is_last or index is None:
            return
        is_called = Recording.current is not None and Recording.current.is_calling
        self._left[index] -= 1
        self._called[index] += is_called
        if self._left[index] == 0:
            # In replays only calls come here: where graphs complete some of a bucket, one must complete the last.
            assert not is_called or self._called[index] == len(self._buckets[index].names), self._buckets[index].names
            self._reducing.start(index)

    def _accumulate(self, batch: MicroBatch, plan: StepPlan, is_first: bool, is_last: bool) -> None:
        self._is_first, self._is_last = is_first, is_last and self._is_sharded
        self._begin_sums()
        graphs = self._graphs if self._captures(plan) else None
        if is_first and self._is_sharded:
            self._gather_weights()
        if graphs is None:
            self._sum_gradients(batch, plan)
        else:
            graphs.run(batch, plan, self._is_first, self._is_last)
        self._gathering.wait_all()
        self._is_stale = False

    def _captures(self, plan: StepPlan) -> bool:
        captures = self._options.captures(self.grid, self._recomputation.kinds(plan))
        if self._graphs is not None and not captures:
            self._graphs.forget()  # those of an earlier stage, which hold the memory of its activations
            if not self._is_told:
                self._is_told = True
                self.notes.append("no CUDA graphs where blocks that hold calls of the host are computed again (full)")
        return captures

    def _begin_sums(self) -> None:
        self._summed.clear()
        self._left = {index: len(bucket.names) for index, bucket in enumerate(self._buckets)}
        self._called = Counter[int]()
        self._reducing.drop()

    def _sum_gradients(self, batch: MicroBatch, plan: StepPlan) -> None:
        self._begin_sums()  # again where this could not be captured, and is run without
        self._forward_backward(batch, plan)
        for name in self.parameters:
            if name not in self._summed:
                if self._is_first:
                    self._gradient_of[name].zero_()
                self._reduce(name)
        self._reducing.wait_all()

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepReport:
        with self.phases("optimizer"):
            norm = self._gradient_norm(squared_norm(group.gradient_shards) for group in self._groups.values())
            held = self._held()
            self._step += 1 - held
            recipe, scale = self.config.recipe, self._clip_factor(norm)
            rate = torch.full_like(norm, learning_rate)
            for (_, decays), group in self._groups.items():
                adamw_(
                    group.master, group.gradient_shards, group.exp_avg, group.exp_avg_sq,
                    None if group.master is group.weight_shards else group.weight_shards,
                    step=self._step, learning_rate=rate, beta1=recipe.adam_beta1, beta2=recipe.adam_beta2,
                    eps=recipe.adam_eps, weight_decay=recipe.weight_decay * decays, grad_scale=scale,
                    frozen=held, not_finite=self._not_finite,
                )  # fmt: skip
            dist.all_reduce(self._not_finite, op=dist.ReduceOp.MAX, group=self.grid.group(WORLD))
            self._freeze_unless(self._not_finite == 0)
            self._is_stale = True
            return StepReport(norm, self._frozen == 0, self._outlier)

    def evaluate(self, micro_batches, plan) -> float:
        if self._is_stale and self._is_sharded:
            self._gather_weights()
        loss = super().evaluate(micro_batches, plan)
        self._gathering.wait_all()
        self._is_stale = False
        return loss

    def diagnose(self, micro_batches, plan) -> str:
        graphs, self._graphs = self._graphs, None
        if graphs is not None:
            graphs.forget()
        try:
            return super().diagnose(micro_batches, plan)
        finally:
            self._graphs = graphs

    def gradients(self) -> dict[str, Tensor]:
        return self._sharded("gradient_shards")

    def _gradients_and_weights(self):
        # Views, not the DTensors of :meth:`gradients`: these take a millisecond each to make.
        groups = self._groups.values()
        gradients = {name: x for group in groups for name, x in group.shards(group.gradient_shards).items()}
        return gradients, {name: x for group in groups for name, x in group.shards(group.master).items()}

    def snapshot(self) -> dict[str, Any]:
        moments = {kind: self._sharded(kind) for kind in ("exp_avg", "exp_avg_sq")}
        states = {name: {"step": self._step, **{k: m[name] for k, m in moments.items()}} for name in self._master}
        return {"model": self._master, "optimizer": states}

    def restore(self, state: dict[str, Any]) -> None:
        for group in self._groups.values():
            group.round_master()
        self._is_stale = True

    def go_back(self, state, steps) -> None:
        self._not_finite.zero_()
        super().go_back(state, steps)

    def replicas(self) -> dict[str, tuple[Tensor, dist.ProcessGroup]]:
        shared = [(self.grid.group(axis), group) for (axis, _), group in self._groups.items() if group.ranks.size > 1]
        return {name: (x, ranks) for ranks, group in shared for name, x in group.whole(group.weights).items()}


def _make_groups(
    model: nn.Module, layouts: dict[str, ParameterLayout], options: Zero1Config, grid: ProcessGrid, device: torch.device
) -> dict[tuple[str, bool], ParameterShards]:
    """By the ranks that hold the same part, and whether they decay: norms and biases do not."""
    shapes: dict[tuple[str, bool], dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        key = layouts[name].replicas(grid), parameter.dim() >= 2
        shapes.setdefault(key, {})[name] = local(parameter).shape
    compute, moments = options.compute_dtype(device.type), PRECISIONS[options.moments]
    groups = {}
    for (axis, decays), found in shapes.items():
        cuts, ranks = {name: layouts[name].cut(grid) for name in found}, GroupCommunicator(grid.group(axis))
        groups[axis, decays] = ParameterShards(found, cuts, ranks, device, compute, moments)
    return groups
