"""How a model becomes the one a run trains: every step, in order, each one call."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_train import engines
from minimax_train.config import Config, ParallelConfig
from minimax_train.model import HybridModel, initialize
from minimax_train.model.attention import LightningAttention
from minimax_train.model.attention.context import TokenContext
from minimax_train.parallel.communicator import GroupCommunicator
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.parallel.linear import lightning_attention_cp
from minimax_train.parallel.softmax import softmax_attention_cp


def build_model(config: Config, grid: ProcessGrid, device: torch.device) -> HybridModel:
    """The run's model: built without memory, sharded, then given memory and initial weights.

    The weights depend on ``seed`` alone, not on the number of ranks.
    """
    with torch.device("meta"):
        model = HybridModel(config.model, config.kernels)
    if grid.cp_size > 1:
        parallelize_context(model, grid, config.parallel)
    for block in model.layers:
        block.recompute = config.recipe.activation_checkpointing
    engines.shard(model, config.engine, grid)
    model.to_empty(device=device)
    initialize(model, config.seed)
    return model


def parallelize_context(model: HybridModel, grid: ProcessGrid, config: ParallelConfig) -> None:
    """Let attention and expert statistics reach over the ranks that share a row."""
    communicator, group = GroupCommunicator(grid.cp_group), grid.cp_group

    def sum_over_ranks(load_JBE: Tensor) -> Tensor:
        dist.all_reduce(load_JBE, group=group)
        return load_JBE

    for block in model.layers:
        block.experts.sum_over_ranks = sum_over_ranks
        attention = block.attention
        if isinstance(attention, LightningAttention):
            attention.attend = _lightning(communicator, config.linear_cp, attention.implementation)
        else:
            attention.attend = _softmax(communicator, config.softmax_cp, attention.scale, attention.implementation)


def _lightning(communicator: GroupCommunicator, method: str, implementation: str):
    def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, context: TokenContext) -> Tensor:
        return lightning_attention_cp(
            q, k, v, slopes, context.shard, communicator, method=method, implementation=implementation
        )

    return attend


def _softmax(communicator: GroupCommunicator, method: str, scale: float, implementation: str):
    def attend(q: Tensor, k: Tensor, v: Tensor, context: TokenContext) -> Tensor:
        return softmax_attention_cp(
            q, k, v, context.shard, communicator, scale=scale, method=method, implementation=implementation
        )

    return attend
