"""Loss on held-out text, beside what a model of token frequencies alone would reach.

Shape legend: N held-out sets, V vocabulary, T tokens of a micro-batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minimax_train.config import Config
from minimax_train.data import MicroBatch, Tokenizer, build_validation_sequences
from minimax_train.documents import IGNORE_INDEX
from minimax_train.engines import Engine
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.recipe import StepPlan

VALIDATION_LOSS = "validation_loss"


class Evaluation:
    """The held-out documents, packed as the step plan says; the first evaluation of a length packs them.

    Args:
        plan: of the step to come, whose sequences are packed at once, so that what cannot be read ends a run before it
            trains.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, grid: ProcessGrid, plan: StepPlan) -> None:
        self.config, self.tokenizer, self.grid = config, tokenizer, grid
        self._packed_for: tuple[int, int] | None = None
        self._micro_batches: dict[str, list[MicroBatch]] = {}
        self.notes: list[str] = []  # what the person watching should know about the held-out documents
        self.micro_batches(plan)

    def micro_batches(self, plan: StepPlan) -> dict[str, list[MicroBatch]]:
        """This rank's, on the host, by the source that holds them out."""
        wanted = plan.sequence_length, plan.micro_batch_size
        if self._packed_for != wanted:
            held_out = build_validation_sequences(
                self.config.data,
                self.tokenizer,
                num_sequences=self.config.recipe.eval_sequences,
                sequence_length=plan.sequence_length,
                dp_rank=self.grid.rank("dp"),
                dp_size=self.grid.size("dp"),
            )
            if skipped := sum(sequences.skipped for sequences in held_out.values()):
                self.notes = [f"held-out documents: {skipped} bad ones are passed over"]
            layout, rank = self.config.layout, self.grid.rank("cp")
            self._micro_batches = {
                name: [batch.split(layout, rank) for batch in sequences.micro_batches(plan.micro_batch_size)]
                for name, sequences in held_out.items()
            }
            self._packed_for = wanted
        return self._micro_batches

    def run(self, engine: Engine, plan: StepPlan) -> dict[str, float]:
        """Mean loss in nats per held-out token, over all ranks.

        Returns:
            ``validation_loss``; of several sources that hold documents out ``validation_loss/NAME`` as well; and
            ``unigram_loss``: the entropy of the held-out tokens' own frequencies, which is the least loss any unigram
            model can have on them.
        """
        held_out = self.micro_batches(plan)
        counts_NV = torch.zeros(len(held_out), self.config.model.vocab_size, dtype=torch.int64)
        for counts_V, batches in zip(counts_NV, held_out.values(), strict=True):
            for batch in batches:
                labels_T = batch.labels_T[batch.labels_T != IGNORE_INDEX]
                counts_V += labels_T.bincount(minlength=len(counts_V))
        dist.all_reduce(counts_NV, group=self.grid.group("dp_cp"))
        losses = [engine.evaluate(batches, plan) for batches in held_out.values()]
        targets = counts_NV.sum(1).tolist()
        metrics = {VALIDATION_LOSS: sum(losses) / sum(targets)}
        if len(held_out) > 1:
            by_source = zip(held_out, losses, targets, strict=True)
            metrics |= {f"{VALIDATION_LOSS}/{name}": loss / number for name, loss, number in by_source}
        return {**metrics, "unigram_loss": _entropy(counts_NV.sum(0))}


def _entropy(counts_V: Tensor) -> float:
    probabilities = counts_V[counts_V > 0].double() / counts_V.sum()
    return float(-(probabilities * probabilities.log()).sum())
