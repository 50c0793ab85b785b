"""What one step trains on, and how far a run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """What a checkpoint says of a run beside its tensors; JSON values.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens trained on.
        data: state of the data loader, all ranks' streams together.
        policy: in which stage the run is, where that began, and what the recipe has learned on the way
            (:class:`minimax_train.recipe.Recipe`); empty at the start of the first stage.
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
        data_weights: share of the tokens by component of the mixture: a source's name, or with a length bucket,
            ``web/long``; they sum to 1.
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
