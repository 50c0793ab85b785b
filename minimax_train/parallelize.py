"""How a model becomes the one a run trains: every step, in order, each one call."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.config import Config, ParallelConfig
from minimax_train.engines import ENGINES, Engine
from minimax_train.kernels.cross_entropy import VocabularyShard
from minimax_train.model import HybridModel
from minimax_train.model.attention import LightningAttention
from minimax_train.model.attention.context import TokenContext, TokenShare
from minimax_train.model.attention.tokens import TokenExchange
from minimax_train.model.sharding import Linear, local, parameter_layouts
from minimax_train.parallel.communicator import Communicator, GroupCommunicator
from minimax_train.parallel.context.lightning import lightning_attention_cp
from minimax_train.parallel.context.softmax import softmax_attention_cp
from minimax_train.parallel.experts import ExpertParallel
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.parallel.tensor import gather_project, gather_tokens, merge_log_sums, scatter_sum, sum_over
from minimax_train.phases import Phases


def build_engine(config: Config, grid: ProcessGrid, device: torch.device, phases: Phases) -> Engine:
    """The run's model in the hands of its engine: built without memory, parallelised, then sharded and filled.

    The weights depend on ``seed`` alone, not on the number of ranks.
    """
    with torch.device("meta"):
        model = HybridModel(config.model, config.kernels)
    split_parameters(model, grid)
    share_counts(model, grid)
    if grid.size("tp") > 1:
        parallelize_tensors(model, grid)
    if grid.size("cp") > 1:
        parallelize_context(model, grid, config.parallel)
    if grid.size("ep") * grid.size("etp") > 1:
        parallelize_experts(model, grid, config.parallel)
    for block in model.layers:
        block.recompute = config.recipe.activation_checkpointing
    return ENGINES[config.engine.name](model, config, grid, device, phases)


def split_parameters(model: HybridModel, grid: ProcessGrid) -> None:
    """Every parameter that the model says some axis splits becomes a DTensor over those axes of the grid."""
    for name, layout in parameter_layouts(model).items():
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        whole = getattr(owner, attribute)
        setattr(owner, attribute, nn.Parameter(layout.wrap(grid, whole.new_empty)))


def share_counts(model: HybridModel, grid: ProcessGrid) -> None:
    """Let the expert layers count choices over all ranks that hold tokens of a row, or of the micro-batch."""
    model.share = TokenShare(grid.rank("tp"), grid.size("tp"), grid.rank("dp"), grid.size("dp"))
    axes = {"row": "cp_tp", "global": "dp_cp_tp"}
    sums = {scope: partial(_all_reduce, grid.group(axis)) for scope, axis in axes.items() if grid.size(axis) > 1}
    for block in model.layers:
        block.experts.sum_over_ranks = sums


def parallelize_tensors(model: HybridModel, grid: ProcessGrid) -> None:
    """Heads of both attentions, embedding, head and loss over the tensor-parallel ranks; tokens between them too."""
    communicator = GroupCommunicator(grid.group("tp"))
    rank, size = communicator.rank, communicator.size
    model.tokens = exchange = _Exchange(communicator)
    vocabulary = model.config.vocab_size // size
    model.vocabulary = VocabularyShard(rank * vocabulary, size, partial(merge_log_sums, communicator=communicator))
    heads = model.config.num_heads // size
    for block in model.layers:
        attention = block.attention
        attention.tokens = exchange
        if isinstance(attention, LightningAttention):
            attention.heads = (rank * heads, (rank + 1) * heads)
            attention.norm.sum_over_ranks = partial(sum_over, communicator=communicator)


def parallelize_context(model: HybridModel, grid: ProcessGrid, config: ParallelConfig) -> None:
    """Let attention reach over the ranks that share a row."""
    communicator = GroupCommunicator(grid.group("cp"))
    for block in model.layers:
        attention = block.attention
        if isinstance(attention, LightningAttention):
            attention.attend = _lightning(communicator, config.linear_cp, attention.implementation)
        else:
            attention.attend = _softmax(communicator, config.softmax_cp, attention.scale, attention.implementation)


def parallelize_experts(model: HybridModel, grid: ProcessGrid, config: ParallelConfig) -> None:
    """Let every token reach its experts, on whatever ranks they are."""
    layer = ExpertParallel(
        GroupCommunicator(grid.group("ep")),
        GroupCommunicator(grid.group("etp")),
        num_experts=model.config.num_experts,
        token_groups=config.token_groups,
    )
    for block in model.layers:
        mlp = block.experts.mlp
        mlp.compute = partial(layer, implementation=mlp.implementation)


class _Exchange(TokenExchange):
    """Tokens between the ranks of a tensor-parallel group."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator

    def gather(self, x_tD: Tensor) -> Tensor:
        return gather_tokens(x_tD, self.communicator)

    def project(self, x_tD: Tensor, *projections: Linear) -> tuple[Tensor, ...]:
        return gather_project(x_tD, [local(projection.weight) for projection in projections], self.communicator)

    def scatter_sum(self, y_TD: Tensor) -> Tensor:
        return scatter_sum(y_TD, self.communicator)


def _all_reduce(group: dist.ProcessGroup, counts: Tensor) -> Tensor:
    dist.all_reduce(counts, group=group)
    return counts


def _lightning(communicator: Communicator, method: str, implementation: str):
    def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, context: TokenContext) -> Tensor:
        return lightning_attention_cp(
            q, k, v, slopes, context.shard, communicator, method=method, implementation=implementation
        )

    return attend


def _softmax(communicator: Communicator, method: str, scale: float, implementation: str):
    def attend(q: Tensor, k: Tensor, v: Tensor, context: TokenContext) -> Tensor:
        return softmax_attention_cp(
            q, k, v, context.shard, communicator, scale=scale, method=method, implementation=implementation
        )

    return attend
