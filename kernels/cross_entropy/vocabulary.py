"""A vocabulary of which every rank holds a part.

The softmax needs one number per token from the other ranks: the logarithm of their sums of exponentials. Who sends it
is the caller's business.

Shape legend: B tokens of a block, V vocabulary on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minimax_train.documents import IGNORE_INDEX


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's part of a vocabulary.

    Attributes:
        start: the first token id here.
        ranks: how many ranks hold a part; all of them call the loss on the same tokens.
        merge: from this rank's log-sum-exp of each token ``[B]`` to that of the whole vocabulary.
    """

    start: int
    ranks: int
    merge: Callable[[Tensor], Tensor]


def shared_losses(
    logits_BV: Tensor, labels_B: Tensor, log_sum_B: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """This rank's part of each token's loss, and the labels by their place here.

    Returns:
        ``log_sum / ranks``, less the logit of the label on the rank that has it, ``[B]`` in the dtype of ``log_sum``;
        and the label less ``start``, -1 where another rank has it, ``IGNORE_INDEX`` where there is none, int64 ``[B]``.
    """
    place_B = labels_B - shard.start
    is_here_B = (place_B >= 0) & (place_B < logits_BV.shape[1]) & (labels_B != IGNORE_INDEX)
    at_label_B = logits_BV.gather(1, place_B.where(is_here_B, 0)[:, None])[:, 0].to(log_sum_B.dtype)
    losses_B = log_sum_B / shard.ranks - at_label_B.where(is_here_B, 0)
    ignored_B = labels_B == IGNORE_INDEX
    local_B = place_B.where(is_here_B, -1).where(~ignored_B, IGNORE_INDEX)
    return torch.where(ignored_B, 0, losses_B), local_B
