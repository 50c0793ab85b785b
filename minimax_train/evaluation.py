"""Loss on held-out text, beside what a model of token frequencies alone would reach."""

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
        self._micro_batches: list[MicroBatch] = []
        self.notes: list[str] = []  # what the person watching should know about the held-out documents
        self.micro_batches(plan)

    def micro_batches(self, plan: StepPlan) -> list[MicroBatch]:
        """This rank's, on the host."""
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
            if held_out.skipped:
                self.notes = [f"held-out documents: {held_out.skipped} bad ones are passed over"]
            batches = held_out.micro_batches(plan.micro_batch_size)
            self._micro_batches = [batch.split(self.config.layout, self.grid.rank("cp")) for batch in batches]
            self._packed_for = wanted
        return self._micro_batches

    def run(self, engine: Engine, plan: StepPlan) -> dict[str, float]:
        """Mean loss in nats per held-out token, over all ranks.

        Returns:
            ``validation_loss``, and ``unigram_loss``: the entropy of the held-out tokens' own frequencies, which is the
            least loss any unigram model can have on them.
        """
        batches = self.micro_batches(plan)
        counts_V = torch.zeros(self.config.model.vocab_size, dtype=torch.int64)
        for batch in batches:
            labels_T = batch.labels_T[batch.labels_T != IGNORE_INDEX]
            counts_V += labels_T.bincount(minlength=len(counts_V))
        dist.all_reduce(counts_V, group=self.grid.group("dp_cp"))
        loss = engine.evaluate(batches, plan)
        return {VALIDATION_LOSS: loss / int(counts_V.sum()), "unigram_loss": _entropy(counts_V)}


def _entropy(counts_V: Tensor) -> float:
    probabilities = counts_V[counts_V > 0].double() / counts_V.sum()
    return float(-(probabilities * probabilities.log()).sum())
