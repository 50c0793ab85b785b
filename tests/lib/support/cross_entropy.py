"""The loss one token at a time, from its formula: the reference.

Shape legend: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from minimax_train.documents import IGNORE_INDEX


def linear_cross_entropy_naive(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """``sum over t of log(sum over v of exp(w_v . x_t)) - w_label . x_t``, a scalar in the dtype of x."""
    loss = (0 * x_TD).sum() + (0 * weight_VD).sum()  # so that nothing but ignored tokens has a gradient too
    for x_D, label in zip(x_TD, labels_T.tolist(), strict=True):
        if label != IGNORE_INDEX:
            logits_V = (weight_VD * x_D).sum(1)
            top = logits_V.max().detach()
            loss = loss + top + (logits_V - top).exp().sum().log() - logits_V[label]
    return loss
