"""Engines: who owns data parallelism and the optimizer. ``engine=`` chooses one from this table."""

from minimax_train.engines.engine import Engine, EngineConfig, StepReport, StepSums
from minimax_train.engines.fsdp import FSDPEngine

__all__ = ["ENGINES", "Engine", "EngineConfig", "StepReport", "StepSums"]

ENGINES: dict[str, type[Engine]] = {"fsdp": FSDPEngine}
