"""How a model becomes the one a run trains: every step, in order, each one call."""

from __future__ import annotations

import torch

from minimax_train import engines
from minimax_train.config import Config
from minimax_train.model import HybridModel, initialize
from minimax_train.parallel.grid import ProcessGrid


def build_model(config: Config, grid: ProcessGrid, device: torch.device) -> HybridModel:
    """The run's model: built without memory, sharded, then given memory and initial weights.

    The weights depend on ``seed`` alone, not on the number of ranks.
    """
    with torch.device("meta"):
        model = HybridModel(config.model, config.kernels)
    for block in model.layers:
        block.recompute = config.recipe.activation_checkpointing
    engines.shard(model, config.engine, grid)
    model.to_empty(device=device)
    initialize(model, config.seed)
    return model
