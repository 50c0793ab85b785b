"""What ``engine=deepspeed`` is told: its own fields, and the DeepSpeed JSON that a user has.

Of a JSON, ``zero_optimization`` is taken over. What the run itself decides (batch sizes, optimizer, clipping,
precision) may be there if it says the same, or ``"auto"``; everything else is refused by name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from minimax_train.engines.engine import EngineConfig
from minimax_train.errors import ConfigError, require, require_choice
from minimax_train.fields import PATH, Range

if TYPE_CHECKING:
    from minimax_train.config import Config
    from minimax_train.parallel.grid import AxisSizes

# Keys of zero_optimization that mean something, beside stage and those of OFFLOADS.
SHARED_KEYS = ("contiguous_gradients", "overlap_comm", "reduce_bucket_size", "reduce_scatter")
KEYS_TO_2 = (
    "allgather_bucket_size",
    "ignore_unused_parameters",
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
)
KEYS_OF_3 = (
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
# What is kept in host memory, and from which stage on it can be.
OFFLOADS = {"offload_optimizer": ("states", 1), "offload_param": ("weights", 3)}
OFFLOAD_KEYS = ("device", "pin_memory")
AUTO = "auto"


@dataclass
class DeepSpeedConfig(EngineConfig):
    """``engine=deepspeed``.

    Attributes:
        stage: of ZeRO, 0 to 3; null for that of ``engine.config``, or 1.
        offload_optimizer: keep master weights and moments in host memory and update them there, by DeepSpeedCPUAdam;
            null for what ``engine.config`` says, or false. Its first use compiles C++.
        offload_param: with stage 3, keep a rank's share of the weights in host memory too; null as above.
        config: a DeepSpeed JSON.
    """

    name: str = "deepspeed"
    stage: Annotated[int | None, Range(0, 3, null="that of engine.config, or 1")] = None
    offload_optimizer: bool | None = None
    offload_param: bool | None = None
    config: Annotated[str | None, PATH] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("engine.name", self.name, ("deepspeed",))
        require_choice("engine.precision", self.precision, ("auto", "bfloat16", "float32"))

    def check_run(self, config: Config, grid: AxisSizes) -> None:
        accepted = "needs DeepSpeed: pip install minimax-train[deepspeed]"
        require(importlib.util.find_spec("deepspeed") is not None, "engine.name", self.name, accepted)
        decided = _decided(config, grid)
        for key, value in self._json().items():
            if key not in ("zero_optimization", *decided):
                accepted = ", ".join(("zero_optimization", *decided))
                raise ConfigError(f"{self._place(key)}: is not read; accepted are {accepted}")
            if key != "zero_optimization":
                self._compare(key, value, decided[key])
        choose_accelerator("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
        zero = self.zero()
        self._validate(zero)
        if zero["stage"] == 3:
            accepted = (
                "must be 1 with engine=deepspeed engine.stage=3: parameters must be on every rank but for its shards"
            )
            for axis in ("tp", "ep", "etp"):
                require(grid.size(axis) == 1, f"parallel.{axis}", grid.size(axis), accepted)
            every = config.parallel.check_replicas
            accepted = "must be 0 with engine=deepspeed engine.stage=3, which holds no weight twice"
            require(every == 0, "parallel.check_replicas", every, accepted)
        if zero["offload_optimizer"]:
            compiler = os.environ.get("CXX", "c++")
            accepted = f"needs a C++ compiler for DeepSpeedCPUAdam, and there is no {compiler!r} (environment: CXX)"
            require(shutil.which(compiler) is not None, "engine.offload_optimizer", True, accepted)

    def zero(self) -> dict[str, Any]:
        """``zero_optimization``: what the JSON says, and what the fields say.

        Raises:
            ConfigError: where they disagree, or DeepSpeed refuses it.
        """
        found = self._object("zero_optimization", self._json().get("zero_optimization", {}))
        found = {key: value for key, value in found.items() if value != AUTO}
        stage, given = found.pop("stage", None), {key: found.pop(key, None) for key in OFFLOADS}
        if stage is not None:
            place = self._place("zero_optimization.stage")
            require(type(stage) is int and 0 <= stage <= 3, place, stage, "must be 0, 1, 2 or 3")
            agree = self.stage in (None, stage)
            require(agree, place, stage, f"must be as engine.stage={self.stage}, or left out")
        stage = next(value for value in (self.stage, stage, 1) if value is not None)
        keys = SHARED_KEYS + (KEYS_OF_3 if stage == 3 else KEYS_TO_2)
        for key in found:
            if key not in keys:
                accepted = f"at stage {stage}; accepted are {', '.join(('stage', *OFFLOADS, *keys))}"
                raise ConfigError(f"{self._place(f'zero_optimization.{key}')}: is not read {accepted}")
        return {**found, "stage": stage, **{key: self._offload(key, given[key], stage) for key in OFFLOADS}}

    def _offload(self, key: str, given: Any, stage: int) -> dict[str, Any] | None:
        """What is kept in host memory, of :data:`OFFLOADS`, and how; None if it is not."""
        field, place = getattr(self, key), f"zero_optimization.{key}"
        options = self._object(place, given or {})
        for name in options:
            if name not in OFFLOAD_KEYS:
                accepted = ", ".join(OFFLOAD_KEYS)
                raise ConfigError(f"{self._place(f'{place}.{name}')}: is not read; accepted are {accepted}")
        device = options.get("device")
        if options:
            place = self._place(f"{place}.device")
            require(device in ("cpu", "none"), place, device, "must be one of cpu, none")
            require(field in (None, device == "cpu"), place, device, f"must be as engine.{key}={field}")
        if device != "cpu" and not field:
            return None
        what, first = OFFLOADS[key]
        accepted = f"must be false at engine.stage={stage}, whose {what} are whole on every rank"
        require(stage >= first, f"engine.{key}", True, accepted)
        return {**options, "device": "cpu"}

    def _validate(self, zero: dict[str, Any]) -> None:
        """Have DeepSpeed look at the values."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError

        try:
            DeepSpeedZeroConfig(**zero)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{self._place('zero_optimization')}: {key}: {first['msg']}") from error

    def _json(self) -> dict[str, Any]:
        if self.config is None:
            return {}
        try:
            found = json.loads(Path(self.config).read_text())
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"engine.config={self.config!r}: cannot be read as JSON: {reason}") from error
        require(isinstance(found, dict), "engine.config", self.config, "must hold a JSON object")
        return found

    def _place(self, key: str) -> str:
        return f"engine.config={self.config}: {key}"

    def _object(self, key: str, value: Any) -> dict[str, Any]:
        require(isinstance(value, dict), self._place(key), value, "must be an object")
        return dict(value)

    def _compare(self, key: str, given: Any, decided: Decided) -> None:
        if given == AUTO:
            return
        if isinstance(decided.value, dict):
            for name, value in self._object(key, given).items():
                if name not in decided.value:
                    accepted = ", ".join(decided.value)
                    raise ConfigError(f"{self._place(f'{key}.{name}')}: is not read; accepted are {accepted}")
                self._compare(f"{key}.{name}", value, decided.value[name])
            return
        same = given in decided.value if isinstance(decided.value, tuple) else given == decided.value
        require(same, self._place(key), given, f"the run decides it: must be {decided}, or left out")


def choose_accelerator(device_type: str) -> None:
    """Before DeepSpeed is imported, which would look for one by itself, and warn where it finds none."""
    os.environ["DS_ACCELERATOR"] = device_type


@dataclass(frozen=True)
class Decided:
    """What the run has decided of a key of DeepSpeed's.

    Attributes:
        value: what the JSON may say: the value, a tuple of those that mean the same, or a dict of what lies below.
        by: the key of the run's configuration.
    """

    value: Any
    by: str = ""

    def __str__(self) -> str:
        shown = " or ".join(map(repr, self.value)) if isinstance(self.value, tuple) else repr(self.value)
        return f"{shown} ({self.by})" if self.by else shown


def _decided(config: Config, grid: AxisSizes) -> dict[str, Decided]:
    """By key of a DeepSpeed JSON. A batch is counted in packed sequences, a micro-batch by data-parallel rank."""
    recipe, dp = config.recipe, grid.size("dp")
    bfloat16 = config.engine.precision == "bfloat16" or (config.engine.precision == "auto" and config.device != "cpu")
    batch, micro = recipe.global_batch_size, recipe.micro_batch_size
    params = {
        "lr": Decided(recipe.learning_rate, "recipe.learning_rate"),
        "betas": Decided([recipe.adam_beta1, recipe.adam_beta2], "recipe.adam_beta1, recipe.adam_beta2"),
        "eps": Decided(recipe.adam_eps, "recipe.adam_eps"),
        "weight_decay": Decided(recipe.weight_decay, "recipe.weight_decay"),
    }
    return {
        "train_batch_size": Decided(batch, "recipe.global_batch_size"),
        "train_micro_batch_size_per_gpu": Decided(micro, "recipe.micro_batch_size"),
        "gradient_accumulation_steps": Decided(batch // (micro * dp) if batch else None, "recipe.global_batch_size"),
        "gradient_clipping": Decided(recipe.gradient_clip or (0, 0.0, None), "recipe.gradient_clip"),
        "optimizer": Decided({"type": Decided(("AdamW", "Adam")), "params": Decided(params)}),
        "bf16": Decided({"enabled": Decided(bfloat16, "engine.precision")}),
        "fp16": Decided({"enabled": Decided(False, "engine.precision")}),
        "data_types": Decided({"grad_accum_dtype": Decided("fp32")}),
        "communication_data_type": Decided("fp32"),
    }
