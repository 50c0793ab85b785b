"""Engines: who owns data parallelism and the optimizer state."""

from minimax_train.engines.fsdp import FSDPConfig, FSDPEngine, shard

__all__ = ["FSDPConfig", "FSDPEngine", "shard"]
