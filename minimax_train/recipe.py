"""The training recipe: what is trained on in each step, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from minimax_train.errors import require, require_choice
from minimax_train.fields import Range, check_fields

if TYPE_CHECKING:
    from minimax_train.config import Config

DECAY_SHAPES = ("exponential", "linear", "cosine")


@dataclass
class RecipeConfig:
    """How a run trains.

    Attributes:
        steps: optimizer steps of the whole run.
        global_batch_size: packed sequences per step over all ranks.
        micro_batch_size: packed sequences a rank runs forward and backward at a time; gradients accumulate over the
            rest.
        learning_rate: reached after ``warmup_steps`` of linear warm-up and kept until ``decay_steps`` before the end.
        min_learning_rate: reached at the last step, by a decay of ``decay_shape``.
        weight_decay: decoupled (AdamW), for matrices; norm weights are not decayed.
        gradient_clip: largest L2 norm of the whole model's gradient; null for no limit.
        activation_checkpointing: keep only each block's input and recompute the rest in the backward pass.
        eval_interval, eval_sequences: every how many steps, and on how many held-out packed sequences; interval 0 for
            never.
    """

    steps: Annotated[int, Range(1, 10**9)]
    global_batch_size: Annotated[int, Range(1, 2**24)]
    micro_batch_size: Annotated[int, Range(1, 2**24)]
    learning_rate: Annotated[float, Range(1e-12, 100)]
    min_learning_rate: Annotated[float, Range(0, 100)]
    warmup_steps: Annotated[int, Range(0, 10**9)]
    decay_steps: Annotated[int, Range(0, 10**9)]
    decay_shape: str = "exponential"
    adam_beta1: Annotated[float, Range(0, 0.999999)] = 0.9
    adam_beta2: Annotated[float, Range(0, 0.999999)] = 0.95
    adam_eps: Annotated[float, Range(1e-20, 1e-2)] = 1e-8
    weight_decay: Annotated[float, Range(0, 100)] = 0.1
    gradient_clip: Annotated[float | None, Range(1e-6, 1e6, null="no limit")] = 1.0
    activation_checkpointing: bool = False
    eval_interval: Annotated[int, Range(0, 10**9)] = 100
    eval_sequences: Annotated[int, Range(1, 10**9)] = 64

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, accepted: str) -> None:
            require(holds, f"recipe.{name}", getattr(self, name), accepted)

        check_fields("recipe", self)
        fits = self.global_batch_size % self.micro_batch_size == 0
        check("micro_batch_size", fits, f"must divide recipe.global_batch_size={self.global_batch_size}")
        require_choice("recipe.decay_shape", self.decay_shape, DECAY_SHAPES)
        fits = self.min_learning_rate > 0 or self.decay_shape != "exponential"
        accepted = (
            f"must be at most recipe.learning_rate={self.learning_rate}, and greater than 0 for exponential decay"
        )
        check("min_learning_rate", fits and self.min_learning_rate <= self.learning_rate, accepted)
        accepted = f"with recipe.warmup_steps={self.warmup_steps} must fit in recipe.steps={self.steps}"
        check("decay_steps", self.warmup_steps + self.decay_steps <= self.steps, accepted)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0: warm-up, constant, decay."""
        peak, floor = self.learning_rate, self.min_learning_rate
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        decayed = step - (self.steps - self.decay_steps)
        if decayed < 0 or self.decay_steps == 0:
            return peak
        progress = min(1.0, (decayed + 1) / self.decay_steps)
        if self.decay_shape == "exponential":
            return peak * (floor / peak) ** progress
        if self.decay_shape == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return peak + (floor - peak) * progress


@dataclass
class Progress:
    """What a checkpoint says of a run beside its tensors; JSON values.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens trained on.
        data: state of the data loader, all ranks' streams together.
        policy: what the recipe has learned on the way (:meth:`Recipe.at`).
    """

    step: int = 0
    tokens: int = 0
    data: dict[str, Any] | None = None
    policy: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step trains on, and how; the trainer, the loader, the model, evaluation and checkpoints read
    it.

    Attributes:
        learning_rate: of this step.
        global_batch_size: packed sequences over all data-parallel ranks.
        micro_batch_size: packed sequences a rank runs forward and backward at a time.
        sequence_length: tokens of a packed sequence.
        rope_base: base of the rotary frequencies.
        data_weights: share of the packed sequences by data source; they sum to 1.
        stage: name of the part of the recipe this step belongs to.
    """

    learning_rate: float
    global_batch_size: int
    micro_batch_size: int
    sequence_length: int
    rope_base: float
    data_weights: Mapping[str, float]
    stage: str

    @property
    def tokens(self) -> int:
        """Of the step, over all ranks."""
        return self.global_batch_size * self.sequence_length

    def micro_batches(self, dp_size: int) -> int:
        """How many of them each of ``dp_size`` data-parallel ranks runs.

        Raises:
            ValueError: when they do not make up the global batch.
        """
        together = self.micro_batch_size * dp_size
        if together < 1 or self.global_batch_size < 1 or self.global_batch_size % together:
            raise ValueError(
                f"global_batch_size={self.global_batch_size}: must be a positive multiple of {together}: "
                f"{dp_size} data-parallel ranks x micro_batch_size={self.micro_batch_size}"
            )
        return self.global_batch_size // together


class Recipe:
    """The plan of every step of a run: what its configuration begins with."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def at(self, progress: Progress, state: Mapping[str, Any]) -> StepPlan:
        """The plan of the step after ``progress``.

        Args:
            state: what a policy has learned on the way, such as a batch size doubled by the loss; ``progress.policy``
                in a checkpoint. The schedule of this recipe depends on the step alone.
        """
        config, recipe = self._config, self._config.recipe
        return StepPlan(
            learning_rate=recipe.learning_rate_at(progress.step),
            global_batch_size=recipe.global_batch_size,
            micro_batch_size=recipe.micro_batch_size,
            sequence_length=config.data.sequence_length,
            rope_base=config.model.rope_base,
            data_weights={config.data.source: 1.0},
            stage="pretraining",
        )
