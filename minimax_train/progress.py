"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """What a checkpoint says of a run beside its tensors; JSON values.

    Attributes:
        step: optimizer steps taken.
        tokens: tokens trained on.
        data: state of the data loader, all ranks' streams together.
        policy: what the recipe has learned on the way (:meth:`minimax_train.recipe.Recipe.at`).
    """

    step: int = 0
    tokens: int = 0
    data: dict[str, Any] | None = None
    policy: dict[str, Any] = field(default_factory=dict)
