"""Loss on held-out text, beside what a model of token frequencies alone would reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimax_train.data import MicroBatch
from minimax_train.documents import IGNORE_INDEX
from minimax_train.model import ModelLoss
from minimax_train.parallel.grid import WORLD, ProcessGrid


def run_model(model: nn.Module, batch: MicroBatch) -> ModelLoss:
    """Loss of a micro-batch that is on the model's device."""
    return model(batch.tokens_T, batch.documents, batch.labels_T, num_rows=batch.num_rows, shard=batch.shard)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Sequence[MicroBatch], grid: ProcessGrid, device: torch.device
) -> dict[str, float]:
    """Mean loss in nats per held-out token, over all ranks.

    Returns:
        ``validation_loss``, and ``unigram_loss``: the entropy of the held-out tokens' own frequencies, which is the
        least loss any unigram model can have on them.
    """
    loss = torch.zeros((), dtype=torch.float64, device=device)
    counts_V = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    for batch in batches:
        labels_T = batch.labels_T[batch.labels_T != IGNORE_INDEX]
        counts_V += labels_T.bincount(minlength=len(counts_V))
        batch = batch.to(device)
        loss += run_model(model, batch).token_loss.double()
    counts_V = counts_V.to(device)
    dist.all_reduce(loss, group=grid.group(WORLD))
    dist.all_reduce(counts_V, group=grid.group("dp_cp"))
    return {"validation_loss": float(loss) / int(counts_V.sum()), "unigram_loss": _entropy(counts_V)}


def _entropy(counts_V: Tensor) -> float:
    probabilities = counts_V[counts_V > 0].double() / counts_V.sum()
    return float(-(probabilities * probabilities.log()).sum())
