"""Losses by source and by length of the document, as metrics.

Shape legend: O origins of a document, as :attr:`DataConfig.origins` names them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minimax_train.data.config import OF_LENGTH


def origin_metrics(origins: Sequence[str], loss_O: Tensor, targets_O: Tensor) -> dict[str, float]:
    """Mean losses of the targets in documents of one source, and of one length bucket.

    Args:
        origins: ``source/length``.
        loss_O: cross-entropy in nats, summed over the targets of the whole batch in documents of each origin.
        targets_O: how many these are.

    Returns:
        ``loss_by_source/SOURCE``, where there are several sources, and ``loss_by_length/LENGTH``, where the batch has
        documents of several buckets, in nats per target: of those that the batch has targets of.
    """
    sources, lengths = zip(*(origin.rsplit(OF_LENGTH, 1) for origin in origins), strict=True)

    def means(names: Sequence[str]) -> dict[str, float]:
        sums = {name: [0.0, 0.0] for name in names}
        for name, loss, targets in zip(names, loss_O.tolist(), targets_O.tolist(), strict=True):
            sums[name][0] += loss
            sums[name][1] += targets
        return {name: loss / targets for name, (loss, targets) in sums.items() if targets}

    metrics = {}
    if len(set(sources)) > 1:
        metrics |= {f"loss_by_source/{name}": loss for name, loss in means(sources).items()}
    if len(by_length := means(lengths)) > 1:
        metrics |= {f"loss_by_length/{name}": loss for name, loss in by_length.items()}
    return metrics
