"""A vocabulary of which every rank holds a part.

The softmax needs one number per token from the other ranks: the logarithm of their sums of exponentials. Who sends it
is the caller's business.

Shape legend: C tokens of a chunk, V vocabulary on this rank.
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
        merge: from this rank's log-sum-exp of each token ``[C]`` to that of the whole vocabulary.
    """

    start: int
    ranks: int
    merge: Callable[[Tensor], Tensor]


def shared_losses(
    logits_CV: Tensor, labels_C: Tensor, log_sum_C: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """This rank's part of each token's loss, and the labels by their place here.

    Returns:
        ``log_sum / ranks``, less the logit of the label on the rank that has it, ``[C]`` in the dtype of ``log_sum``;
        and the label less ``start``, -1 where another rank has it, ``IGNORE_INDEX`` where there is none, int64 ``[C]``.
    """
    place_C = labels_C - shard.start
    is_here_C = (place_C >= 0) & (place_C < logits_CV.shape[1]) & (labels_C != IGNORE_INDEX)
    at_label_C = logits_CV.gather(1, place_C.where(is_here_C, 0)[:, None])[:, 0].to(log_sum_C.dtype)
    losses_C = log_sum_C / shard.ranks - at_label_C.where(is_here_C, 0)
    ignored_C = labels_C == IGNORE_INDEX
    local_C = place_C.where(is_here_C, -1).where(~ignored_C, IGNORE_INDEX)
    return torch.where(ignored_C, 0, losses_C), local_C
