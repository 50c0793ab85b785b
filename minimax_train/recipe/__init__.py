"""The training recipe: what is trained on in each step, and how."""

from minimax_train.recipe.config import DECAY_SHAPES, RecipeConfig, StageConfig
from minimax_train.recipe.plan import Progress, StepPlan
from minimax_train.recipe.schedule import Piece, Recipe
from minimax_train.recipe.stages import Stage, naming, resolve_stages, stages_on_grid

__all__ = [
    "DECAY_SHAPES",
    "Piece",
    "Progress",
    "Recipe",
    "RecipeConfig",
    "Stage",
    "StageConfig",
    "StepPlan",
    "naming",
    "resolve_stages",
    "stages_on_grid",
]
