"""How a model becomes the one a run trains: every step, in order, each one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.capture import uncaptured
from minimax_train.config import Config, ParallelConfig
from minimax_train.engines import ENGINES, Engine
from minimax_train.kernels.experts import expert_mlp
from minimax_train.model import HybridModel, ModelConfig, ModelPart
from minimax_train.model.attention import ATTENTIONS
from minimax_train.model.ranks import ModelRanks
from minimax_train.model.sharding import ParameterLayout, parameter_layouts, set_parameter
from minimax_train.parallel.communicator import GroupCommunicator
from minimax_train.parallel.experts import ExpertParallel
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.parallel.pipeline import split_layers, stages_of_rank
from minimax_train.parallel.tensor import TensorParallel
from minimax_train.phases import Phases
from minimax_train.planner.cost import stage_costs


def build_engine(config: Config, grid: ProcessGrid, device: torch.device, phases: Phases) -> Engine:
    """The run's model in the hands of its engine: built without memory, its parameters split, then sharded and filled.

    The weights depend on ``seed`` alone, not on the number of ranks.
    """
    ranks = ModelRanks(
        tp=TensorParallel(GroupCommunicator(grid.group("tp"))),
        cp=GroupCommunicator(grid.group("cp")),
        cp_methods=context_methods(config.parallel),
        dp_rank=grid.rank("dp"),
        dp_size=grid.size("dp"),
        sum_counts=count_sums(config.model, grid),
        experts=expert_layer(config, grid),
    )
    with torch.device("meta"):
        model = HybridModel(config.model, config.kernels, ranks, parts_of_rank(config, grid.rank("pp")))
    split_parameters(model, grid)
    return ENGINES[config.engine.name](model, config, grid, device, phases)


def whole_layouts(model: ModelConfig) -> dict[str, ParameterLayout]:
    """Of all parameters of a model, by name, whatever is on this rank; no memory is used."""
    with torch.device("meta"):
        return parameter_layouts(HybridModel(model))


def parts_of_rank(config: Config, rank: int) -> list[ModelPart]:
    """The pipeline stages of one rank of pp."""
    return parts_of_ranks(config)[rank]


def parts_of_ranks(config: Config) -> list[list[ModelPart]]:
    """The pipeline stages of each rank of pp."""
    parallel = config.parallel
    stages = parallel.pp * parallel.stages_of_rank
    if parallel.pp == 1:
        sizes = [config.model.num_layers]
    elif parallel.pp_layers:
        sizes = list(map(int, parallel.pp_layers))
    else:
        costs = stage_costs(config)
        sizes = split_layers(costs.layers, stages, costs.embedding, costs.head)
    ends = list(accumulate(sizes))
    every = [
        ModelPart(range(end - size, end), is_first=end == size, is_last=end == ends[-1])
        for size, end in zip(sizes, ends, strict=True)
    ]
    if parallel.pp == 1:
        return [every]
    sizes = parallel.pp, parallel.stages_of_rank
    own = (stages_of_rank(parallel.pp_schedule, *sizes, rank) for rank in range(parallel.pp))
    return [[every[stage] for stage in stages] for stages in own]


def context_methods(config: ParallelConfig) -> dict[str, str]:
    """How each kind of attention works on packed sequences that ranks share, by the keys that say so."""
    return {key: getattr(config, key) for kind in ATTENTIONS.values() for key in kind.cp or ()}


def count_sums(config: ModelConfig, grid: ProcessGrid) -> dict[str, Callable[[Tensor], Tensor]]:
    """Sums over all ranks that hold tokens of a packed sequence, or of the micro-batch."""
    groups = {}
    if grid.size("cp_tp") > 1:
        groups["sequence"] = grid.group("cp_tp")
    if grid.size("dp_cp_tp") > 1 and "global" in (config.capacity_scope, config.aux_loss_scope):
        groups["global"] = grid.group_apart("dp_cp_tp")  # over whose ranks weights are gathered in the meantime
    return {scope: partial(_all_reduce, group) for scope, group in groups.items()}


def expert_layer(config: Config, grid: ProcessGrid) -> Callable[..., Tensor]:
    """The experts of a layer, on whatever ranks they are; one object for all layers."""
    if grid.size("ep") * grid.size("etp") == 1:
        return expert_mlp
    ep, etp = GroupCommunicator(grid.group("ep")), GroupCommunicator(grid.group("etp"))
    experts = ExpertParallel(ep, etp, num_experts=config.model.num_experts, token_groups=config.parallel.token_groups)
    return experts if ep.size == 1 else uncaptured(experts)  # which learns split sizes from the device


def split_parameters(model: HybridModel, grid: ProcessGrid) -> None:
    """Every parameter that the model says some axis splits becomes a DTensor over those axes of the grid."""
    for name, layout in parameter_layouts(model).items():
        whole = model.get_parameter(name)
        set_parameter(model, name, nn.Parameter(layout.wrap(grid, whole.new_empty)))


def _all_reduce(group: dist.ProcessGroup, counts: Tensor) -> Tensor:
    dist.all_reduce(counts, group=group)
    return counts
