"""The hybrid model: lightning and softmax attention, mixture of experts, DeepNorm."""

from minimax_train.model.config import ModelConfig, ParameterCount, count_parameters
from minimax_train.model.initialization import fill, initialize, initializers
from minimax_train.model.kernels import KernelConfig
from minimax_train.model.model import HybridModel, ModelLoss, ModelPart, StageOutput

__all__ = [
    "HybridModel",
    "KernelConfig",
    "ModelConfig",
    "ModelLoss",
    "ModelPart",
    "ParameterCount",
    "StageOutput",
    "count_parameters",
    "fill",
    "initialize",
    "initializers",
]
