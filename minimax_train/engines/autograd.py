"""What engines share that differentiate a :class:`HybridModel` with PyTorch's autograd, whoever shards its parameters.

Shape legend: T tokens, L layers, E experts, O origins of a document, G groups of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.data import MicroBatch
from minimax_train.diagnosis import describe_non_finite, non_finite_outputs
from minimax_train.documents import IGNORE_INDEX
from minimax_train.engines.engine import Engine, StepSums
from minimax_train.engines.outliers import Outliers
from minimax_train.engines.recomputation import Recomputation
from minimax_train.engines.stages import Stages
from minimax_train.metrics.norms import squares_by_group
from minimax_train.model import HybridModel, ModelLoss, StageOutput
from minimax_train.model.sharding import parameter_layouts
from minimax_train.parallel.grid import SAME_SEQUENCES, WORLD, ProcessGrid
from minimax_train.phases import Phases
from minimax_train.recipe import StepPlan

if TYPE_CHECKING:
    from minimax_train.config import Config


class Accumulators:
    """This rank's sums over the micro-batches of a step: tensors that stay where they are from step to step."""

    def __init__(self, config: Config, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Of all ranks, what losses are divided by.
        self.targets, self.sequences = zeros(dtype=torch.int64), zeros(dtype=torch.int64)
        self.losses_2 = zeros(2)  # loss, auxiliary loss
        self.routing_2L = zeros(2, config.model.num_layers)  # entropy, dropped
        self.by_origin_2O = zeros(2, len(config.data.origins))  # loss, targets
        self.tokens_per_expert_LE = zeros(config.model.num_layers, config.model.num_experts, dtype=torch.int64)

    def clear(self) -> None:
        torch._foreach_zero_([self.losses_2, self.routing_2L, self.by_origin_2O])
        self.tokens_per_expert_LE.zero_()

    def add(
        self, batch: MicroBatch, out: ModelLoss | StageOutput, loss: Tensor, aux_loss: Tensor, layers: range
    ) -> None:
        """Of a micro-batch, in the layers that ran."""
        own = slice(layers.start, layers.stop)
        self.losses_2 += torch.stack([x.detach().double() for x in (loss, aux_loss)])
        self.routing_2L[:, own] += torch.stack([out.entropy_L.double(), out.dropped_L.double()])
        self.tokens_per_expert_LE[own] += out.tokens_per_expert_LE
        if isinstance(out, StageOutput):
            return
        by_token_2T = torch.stack([out.token_losses_T.double(), (batch.labels_T != IGNORE_INDEX).double()])
        self.by_origin_2O.index_add_(1, batch.origins_T, by_token_2T)


class AutogradEngine(Engine):
    """Runs micro-batches one after the other. A subclass shards the parameters, and sums and applies the gradients."""

    def __init__(
        self, model: HybridModel, config: Config, grid: ProcessGrid, device: torch.device, phases: Phases
    ) -> None:
        self.model, self.config, self.grid, self.device, self.phases = model, config, grid, device, phases
        self.layouts = parameter_layouts(model)
        self.parameters: dict[str, nn.Parameter] = {}
        self.notes: list[str] = []
        self._received_gib: dict[int, float] = {}  # for data parallelism, by micro-batches of a step
        self._copies: dict[str, int] = {}  # of a subclass whose ranks have the same shard of a parameter: how many
        self._stages: Stages | None = None  # of a subclass that can run them, where there are several
        self._sums = Accumulators(config, device)
        self._frozen = torch.zeros((), dtype=torch.float32, device=device)  # 1 from the first step that is not finite
        self._loss = torch.zeros((), dtype=torch.float64, device=device)  # this rank's part in the last step
        recipe = config.recipe
        self._outliers = None
        if recipe.outliers != "ignore":
            self._outliers = Outliers(recipe.outlier_window, recipe.outlier_sigmas, device)
        self._outlier = torch.zeros((), dtype=torch.bool, device=device)  # whether the last step was one

    def _weights_by_reader(self) -> dict[nn.Module, list[str]]:
        """The modules to wait in until weights have arrived, and the names of these: each block, the final norm and the
        model itself, which read them when they are called."""
        # Those of embedding and head are read without a call of these modules.
        readers = {"embedding.": self.model, "norm.": self.model.norm, "head.": self.model.norm}
        readers |= {f"layers.{index}.": block for index, block in enumerate(self.model.layers)}
        found: dict[nn.Module, list[str]] = {}
        for prefix, module in readers.items():
            found.setdefault(module, []).extend(name for name in self.parameters if name.startswith(prefix))
        return found

    def _choose_recomputation(self, still_needed: int, *, apart: bool = False) -> None:
        """For a subclass to call when its states have their memory; arguments as of :class:`Recomputation`."""
        held, deferred = (None, ()) if self._stages is None else self._stages.held_layers()
        self._recomputation = Recomputation(
            self.config, self.grid, self.device, still_needed=still_needed, apart=apart, held=held, deferred=deferred
        )
        self.notes += self._recomputation.notes

    def run(self, micro_batches: Sequence[MicroBatch], plan: StepPlan) -> StepSums:
        self.model.set_recomputation(self._recomputation.kinds(plan))
        sums = self._sums
        # Counted on the device: the host waits neither for it nor for other ranks.
        sums.targets.fill_(sum(batch.num_targets for batch in micro_batches))
        dist.all_reduce(sums.targets, group=self.grid.group("dp_cp"))
        sums.targets.clamp_(min=1)
        sums.sequences.fill_(plan.global_batch_size)
        sums.clear()
        if self._stages is not None:
            self._stages.run(micro_batches, plan)
        else:
            for index, batch in enumerate(micro_batches):
                self._accumulate(batch, plan, index == 0, index == len(micro_batches) - 1)
        self._loss = sums.losses_2.sum()
        loss, aux_loss = sums.losses_2.clone()
        entropy_L, dropped_L = sums.routing_2L.clone()
        scores = loss.new_full((), sum(batch.num_scores for batch in micro_batches) / self.grid.size(SAME_SEQUENCES))
        loss_by_origin_O, targets_by_origin_O = sums.by_origin_2O.clone()
        return StepSums(
            loss=loss,
            aux_loss=aux_loss,
            entropy_L=entropy_L,
            dropped_L=dropped_L,
            scores=scores,
            loss_by_origin_O=loss_by_origin_O,
            targets_by_origin_O=targets_by_origin_O / self.grid.size("tp"),
            tokens_per_expert_LE=sums.tokens_per_expert_LE.clone(),
        )

    def _accumulate(self, batch: MicroBatch, plan: StepPlan, is_first: bool, is_last: bool) -> None:
        """Forward and backward pass of one micro-batch, maybe the step's first or last; its gradient is added to those
        before."""
        self._forward_backward(batch, plan)

    def _forward_backward(self, batch: MicroBatch, plan: StepPlan) -> None:
        with self.phases("forward"):
            out = self._forward(batch, plan)
            loss, aux_loss = self._losses(out)
        with self.phases("backward"):
            (loss + self.config.model.aux_loss_coefficient * aux_loss).backward()
        self._sums.add(batch, out, loss, aux_loss, self.model.parts[0].layers)

    def _losses(self, out: ModelLoss | StageOutput) -> tuple[Tensor, Tensor]:
        """Cross-entropy, 0 of a stage that is not the last, and auxiliary loss: their parts of the global batch's."""
        aux_loss = out.aux_loss / self._sums.sequences
        if isinstance(out, StageOutput):
            return aux_loss.new_zeros(()), aux_loss
        return out.token_loss / self._sums.targets, aux_loss

    def _forward(
        self, batch: MicroBatch, plan: StepPlan, part: int = 0, x_TD: Tensor | None = None
    ) -> ModelLoss | StageOutput:
        return self.model(
            batch.tokens_T,
            batch.documents,
            batch.labels_T,
            num_sequences=batch.num_sequences,
            shard=batch.shard,
            rope_base=plan.rope_base,
            part=part,
            x_TD=x_TD,
        )

    def _gradient_norm(self, squares: Iterable[Tensor]) -> Tensor:
        """L2 norm of the whole model's gradient; NaN where any rank's loss is not finite. Sees whether the step is an
        outlier, and one that is not finite holds its update with ``recipe.outliers=skip``, else all from it on.

        Args:
            squares: of the elements of this rank's shards, summed, float64 scalars.
        """
        total = torch.stack(list(squares)).sum()
        total = total.where(self._loss.isfinite(), torch.nan)
        if self._outliers is None:
            dist.all_reduce(total, group=self.grid.group(WORLD))
            norm = total.sqrt()
        else:
            summed_2 = torch.stack([total, self._sums.losses_2[0]])
            dist.all_reduce(summed_2, group=self.grid.group(WORLD))
            norm = summed_2[0].sqrt()
            self._outlier = self._outliers.is_next(summed_2[1], norm)
        if self.config.recipe.outliers == "skip":
            self._outlier |= ~norm.isfinite()
        else:
            self._freeze_unless(norm.isfinite())
        return norm

    def _held(self) -> Tensor:
        """1 where this step's update must change nothing: for good, or as an outlier."""
        if self.config.recipe.outliers != "skip":
            return self._frozen
        return torch.maximum(self._frozen, self._outlier.float())

    def _clip_factor(self, norm: Tensor) -> Tensor:
        clip = self.config.recipe.gradient_clip
        return torch.ones_like(norm) if clip is None else (clip / (norm + 1e-6)).clamp(max=1.0)

    def _freeze_unless(self, finite: Tensor) -> None:
        self._frozen.masked_fill_(~finite, 1.0)

    @torch.no_grad()
    def norms(self) -> Tensor:
        with self.phases("norms"):
            both, model = self._gradients_and_weights(), self.config.model
            squares_2G = torch.stack([squares_by_group(tensors, model, self._copies) for tensors in both])
            dist.all_reduce(squares_2G, group=self.grid.group(WORLD))
            return squares_2G.sqrt()

    def _gradients_and_weights(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """By parameter name, shards of this rank, or the norms of these: every element is on one rank, or as many as
        ``_copies`` says."""
        return self.gradients(), self.parameters

    def totals(self, sums: StepSums) -> StepSums:
        *real, tokens_per_expert_LE = sums
        total, tokens_per_expert_LE = torch.cat([x.flatten() for x in real]), tokens_per_expert_LE.clone()
        for x in (total, tokens_per_expert_LE):
            dist.all_reduce(x, group=self.grid.group(WORLD))
        parts = total.split([x.numel() for x in real])
        return StepSums(
            *(part.view_as(x) for part, x in zip(parts, real, strict=True)), tokens_per_expert_LE=tokens_per_expert_LE
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], plan: StepPlan) -> float:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if self._stages is not None:
            loss = self._stages.evaluate(micro_batches, plan)
        else:
            for batch in micro_batches:
                self.phases.tick()
                out = self._forward(batch.to(self.device), plan)
                assert isinstance(out, ModelLoss)
                loss += out.token_loss.double()
        dist.all_reduce(loss, group=self.grid.group(WORLD))
        return float(loss)

    def diagnose(self, micro_batches: Sequence[MicroBatch], plan: StepPlan) -> str:
        with non_finite_outputs(self.model) as outputs:
            self.run(micro_batches, plan)
        return describe_non_finite(self.parameters, self.gradients(), outputs)

    def go_back(self, state: dict[str, Any], steps: int) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None  # of a diagnosis
        self._frozen.zero_()
        if self._outliers is not None:
            self._outliers.forget(steps)
        self.restore(state)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def figures(self, plan: StepPlan) -> dict[str, float]:
        micro_batches = plan.micro_batches(self.grid.size("dp"))
        if micro_batches not in self._received_gib:  # of all parameters: milliseconds, which no report should take
            step = self.data_parallelism(self.config, self.layouts, self.grid, self.device.type, micro_batches)
            received = sum(each.times * each.num_bytes for each in step.transfers)
            self._received_gib[micro_batches] = received / 2**30
        found = {"data_parallel_gib": self._received_gib[micro_batches]}
        if self.device.type != "cuda":
            return found
        return {
            **found,
            "memory_gib": torch.cuda.memory_allocated() / 2**30,
            "reserved_memory_gib": torch.cuda.memory_reserved() / 2**30,
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
