"""The attentions a block can hold, by the letter that names them in ``model.layer_pattern``.

Each is told in a module of its own, which ends with its :class:`AttentionKind`; registering that here is all it takes.
"""

from minimax_train.model.attention.kind import AttentionKind
from minimax_train.model.attention.lightning import LIGHTNING
from minimax_train.model.attention.softmax import SOFTMAX

__all__ = ["ATTENTIONS", "AttentionKind"]

ATTENTIONS: dict[str, AttentionKind] = {kind.letter: kind for kind in (LIGHTNING, SOFTMAX)}
