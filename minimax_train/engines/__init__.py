"""Engines: who owns data parallelism and the optimizer. ``engine=`` chooses one from this table."""

from minimax_train.engines.deepspeed import DeepSpeedEngine
from minimax_train.engines.engine import Engine, EngineConfig, StepReport, StepSums
from minimax_train.engines.fsdp import FSDPEngine
from minimax_train.engines.megatron import MegatronEngine
from minimax_train.engines.zero1 import Zero1Engine

__all__ = ["ENGINES", "Engine", "EngineConfig", "StepReport", "StepSums"]

ENGINES: dict[str, type[Engine]] = {
    "deepspeed": DeepSpeedEngine,
    "fsdp": FSDPEngine,
    "megatron": MegatronEngine,
    "zero1": Zero1Engine,
}
