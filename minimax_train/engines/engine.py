"""What an engine is: it owns the model's parts on this rank, data parallelism and the optimizer.

The trainer asks for steps and knows nothing of how they are made: a pipeline schedule, or the backward pass of
DeepSpeed or Megatron-Core, fits behind :meth:`Engine.run`. Every method is called by all ranks together. Only
:meth:`Engine.evaluate` and :meth:`Engine.diagnose` make the host wait for the device; a step need not, though those of
DeepSpeed and Megatron-Core do.

Shape legend: L layers, E experts, O origins of a document (:attr:`DataConfig.origins`), G groups of
parameters (``metrics/norms.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_train.errors import require_choice
from minimax_train.fields import check_fields

if TYPE_CHECKING:
    from minimax_train.config import Config
    from minimax_train.data import MicroBatch
    from minimax_train.model import HybridModel
    from minimax_train.model.sharding import ParameterLayout
    from minimax_train.parallel.grid import AxisSizes, ProcessGrid
    from minimax_train.phases import Phases
    from minimax_train.recipe import StepPlan

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass
class EngineConfig:
    """What every engine is told; each engine's own configuration adds its fields.

    Attributes:
        name: which engine.
        precision: dtype of compute. ``bfloat16`` keeps float32 master weights and reduces gradients in float32;
            ``auto`` is bfloat16 on GPU and float32 on CPU.
    """

    name: str = "fsdp"
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_fields("engine", self)
        require_choice("engine.precision", self.precision, ("auto", *PRECISIONS))

    def check_run(self, config: Config, grid: AxisSizes) -> None:
        """Refuse a run that the engine cannot make, before anything starts.

        Raises:
            ConfigError: naming the key to change.
        """

    def check_device(self, device_type: str) -> None:
        """Refuse a device that the engine cannot run on, before anything starts.

        Raises:
            ConfigError: naming the key to change.
        """

    def calls_attention(self, grid: AxisSizes) -> bool:
        """Whether on GPUs the host calls the attention between CUDA graphs, which keeps what it reads."""
        return False

    def compute_dtype(self, device_type: str) -> torch.dtype:
        if self.precision == "auto":
            return torch.bfloat16 if device_type == "cuda" else torch.float32
        return PRECISIONS[self.precision]


class StepSums(NamedTuple):
    """Sums over a step's tokens: of this rank, or of all ranks; on the device until it is copied to the host.

    Attributes:
        loss: mean cross-entropy in nats per target of the global batch; this rank's part of it.
        aux_loss: load-balancing loss before its coefficient, mean over packed sequences; this rank's part of it.
        entropy_L: of each layer's router's probabilities in nats, float64.
        dropped_L: assignments over an expert's capacity in each layer, float64.
        scores: pairs of tokens that a causal attention looks at; this rank's part of them.
        loss_by_origin_O: cross-entropy in nats, summed over the targets in documents of each origin, float64.
        targets_by_origin_O: how many these are, float64; this rank's part of them.
        tokens_per_expert_LE: assignments to each expert before any were dropped, int64.
    """

    loss: Tensor
    aux_loss: Tensor
    entropy_L: Tensor
    dropped_L: Tensor
    scores: Tensor
    loss_by_origin_O: Tensor
    targets_by_origin_O: Tensor
    tokens_per_expert_LE: Tensor


class StepReport(NamedTuple):
    """What became of an optimizer step; all on the device and the same on all ranks.

    Attributes:
        gradient_norm: L2 norm of the whole model's gradient before clipping, float64 scalar.
        applied: whether the weights were updated and are finite, bool scalar. Once false it stays false, and no later
            update changes the weights. Nor does this one, if the loss or a gradient was not finite. True as well of an
            update that was skipped because the step is an outlier.
        outlier: whether the loss or the gradient norm is one (``recipe.outliers``), bool scalar; with ``skip`` also
            whether it is not finite.
    """

    gradient_norm: Tensor
    applied: Tensor
    outlier: Tensor


class Transfer(NamedTuple):
    """What a rank receives for data parallelism, and from whom.

    Attributes:
        span: among how many consecutive ranks those are that take part.
        times: how often in a step.
        num_bytes: each time.
    """

    span: int
    times: int
    num_bytes: float


class TransferSums:
    """Transfers that belong together, summed over parameters."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[int, int, str], float] = {}

    def add(self, what: str, span: int, times: int, num_bytes: float) -> None:
        key = span, times, what
        self._bytes[key] = self._bytes.get(key, 0.0) + num_bytes

    def all(self) -> list[Transfer]:
        return [Transfer(span, times, size) for (span, times, _), size in self._bytes.items() if size]


class DataParallelism(NamedTuple):
    """What data parallelism and the optimizer's update take in a step, on a rank.

    Attributes:
        updated: elements that the rank's optimizer updates.
        transfers: of weights and gradients.
    """

    updated: int
    transfers: list[Transfer]


class Engine(ABC):
    """A model in training.

    Args:
        model: on the meta device, tensor and expert parallelism applied. The engine shards it, gives it memory and
            fills it with initial weights, which depend on ``config.seed`` alone.
        config: of the run; the engine reads ``config.engine``, and of ``config.recipe`` the optimizer's settings.
        grid: the ranks.
        device: of this rank.
        phases: marks ``forward``, ``backward`` (together ``graph``, where they are a CUDA graph) and ``optimizer``.
    """

    config_type: ClassVar[type[EngineConfig]]
    runs_stages: ClassVar[bool] = False
    """Whether it can run a model whose layers lie on several ranks (``parallel.pp``)."""
    adds_in_gemms: ClassVar[bool] = False
    """Whether the experts' GEMMs may add the gradients of weights to its sums (``kernels/accumulation.py``)."""
    on_meta: ClassVar[bool] = True
    """Whether it can be built on the meta device, to see what a rank would hold."""
    notes: list[str]
    """What the person watching should know of how it runs, until someone takes it out."""

    @abstractmethod
    def __init__(
        self, model: HybridModel, config: Config, grid: ProcessGrid, device: torch.device, phases: Phases
    ) -> None: ...

    @classmethod
    @abstractmethod
    def memory(
        cls, config: Config, layouts: Mapping[str, ParameterLayout], grid: AxisSizes, device_type: str
    ) -> dict[str, int]:
        """Bytes on a rank beside activations, by what they are for: parameters, gradients, optimizer's states, and
        what is needed for a time only.

        Args:
            layouts: of all parameters, by name.
        """

    @classmethod
    @abstractmethod
    def data_parallelism(
        cls,
        config: Config,
        layouts: Mapping[str, ParameterLayout],
        grid: AxisSizes,
        device_type: str,
        micro_batches: int,
    ) -> DataParallelism:
        """What a step of so many micro-batches takes on a rank, for it and for the planner. Arguments as of
        :meth:`memory`."""

    @abstractmethod
    def run(self, micro_batches: Sequence[MicroBatch], plan: StepPlan) -> StepSums:
        """Forward and backward passes of all micro-batches of a step: this rank's sums; gradients are kept for
        ``step``.

        Losses are divided by the targets and packed sequences of the whole global batch, so that neither they nor the
        gradient depend on how it is split over ranks and micro-batches.
        """

    @abstractmethod
    def step(self, learning_rate: float) -> StepReport:
        """Clip, update the weights, forget the gradients."""

    @abstractmethod
    def norms(self) -> Tensor:
        """L2 norms of the last :meth:`run`'s gradient, before clipping, and of the weights, by group of parameters of
        the whole model: float64 ``[2, G]`` on the device, the same on all ranks."""

    @abstractmethod
    def totals(self, sums: StepSums) -> StepSums:
        """The sums of all ranks, on the device."""

    @abstractmethod
    def evaluate(self, micro_batches: Sequence[MicroBatch], plan: StepPlan) -> float:
        """Cross-entropy in nats, summed over the targets of all ranks' micro-batches."""

    @abstractmethod
    def diagnose(self, micro_batches: Sequence[MicroBatch], plan: StepPlan) -> str:
        """Run a step's micro-batches again and name the parameters, gradients and outputs that are not finite."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Those of the last :meth:`run`, summed over ranks, by parameter name, as weights are in :meth:`snapshot`."""

    @abstractmethod
    def snapshot(self) -> dict[str, Any]:
        """``{"model": ..., "optimizer": ...}`` by parameter name, in model space: what a checkpoint holds, loadable
        on any grid. A checkpoint is loaded into the same tensors, and then handed to :meth:`restore`.

        These are the tensors that training uses where the engine has them in this form, else copies on its device."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state that :meth:`snapshot` gave and a checkpoint filled, or its ``"model"`` alone."""

    @abstractmethod
    def go_back(self, state: dict[str, Any], steps: int) -> None:
        """:meth:`restore` of the state of so many steps before: these did not happen, whatever they froze."""

    def replicas(self) -> Mapping[str, tuple[Tensor, dist.ProcessGroup]]:
        """What other ranks hold as well, as the last step computed with it: by name, this rank's, and these ranks. An
        engine that holds nothing twice leaves it out."""
        return {}

    @abstractmethod
    def figures(self, plan: StepPlan) -> dict[str, float]:
        """On a GPU ``memory_gib`` allocated on this rank, ``reserved_memory_gib`` that PyTorch holds for it, and
        ``peak_memory_gib``, the most ever allocated; ``data_parallel_gib``: what this rank receives per step for
        data parallelism, weights and gradients together."""
