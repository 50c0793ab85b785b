"""The attentions a block can hold, by the letter that names them in ``model.layer_pattern``.

An attention is a module built as ``cls(config, layer, kernels)``, called as ``attention(x_tD, context) -> y_tD``, with
``initializers()`` for its parameters.
"""

from minimax_train.model.attention.lightning import LightningAttention
from minimax_train.model.attention.softmax import SoftmaxAttention
from minimax_train.model.config import LIGHTNING, SOFTMAX

__all__ = ["ATTENTIONS", "LightningAttention", "SoftmaxAttention"]

ATTENTIONS = {LIGHTNING: LightningAttention, SOFTMAX: SoftmaxAttention}
