"""Held-out packed sequences: the same for every evaluation and any data-parallel size."""

from __future__ import annotations

from minimax_train.data.batch import MicroBatch
from minimax_train.data.config import DataConfig
from minimax_train.data.packing import PackedSequence, SequencePacker, filler
from minimax_train.data.sources import VALIDATION, open_source
from minimax_train.data.streams import DocumentStream
from minimax_train.data.tokenizer import Tokenizer
from minimax_train.documents import IGNORE_INDEX
from minimax_train.errors import ConfigError


class ValidationSequences:
    """This rank's share of the held-out sequences.

    Every rank gets the same number of micro-batches of the same shape: where sequences run out, some without any
    target stand in. Summed losses divided by summed ``num_targets`` are so the same for any data-parallel size.

    Args:
        sequences: all held-out ones, at least one.
        dp_rank, dp_size: sequence g belongs to rank g modulo the data-parallel size.
        skipped: bad documents that were passed over to pack them.
    """

    def __init__(self, sequences: list[PackedSequence], *, dp_rank: int, dp_size: int, skipped: int = 0) -> None:
        self.skipped = skipped
        self.num_sequences = len(sequences)
        self._sequences, self._dp_size = sequences[dp_rank::dp_size], dp_size
        length = len(sequences[0].tokens_S)
        tokens_S, labels_S = filler(length, int(sequences[0].tokens_S[0]))
        self._stand_in = PackedSequence(tokens_S, labels_S, [length], [0])

    def micro_batches(self, size: int) -> list[MicroBatch]:
        """This rank's sequences, ``size`` at a time, on the host; as many micro-batches as on every other rank."""
        num_micro_batches = -(-self.num_sequences // (size * self._dp_size))
        missing = num_micro_batches * size - len(self._sequences)
        sequences = self._sequences + [self._stand_in] * missing
        return [MicroBatch.concatenate(sequences[i : i + size]) for i in range(0, len(sequences), size)]


def build_validation_sequences(
    config: DataConfig, tokenizer: Tokenizer, *, num_sequences: int, sequence_length: int, dp_rank: int, dp_size: int
) -> ValidationSequences:
    """The first packed sequences of the held-out documents, or as many as these fill.

    Every rank packs the same single pass over the held-out documents, so all know how many there are without asking
    each other. A last one that the documents do not fill is completed by a document without targets.

    Raises:
        ValueError: when no held-out documents are configured or found, they cannot be read, or hold no target.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences={num_sequences}: evaluation needs a positive number")
    stream = DocumentStream(
        open_source(config, VALIDATION), tokenizer, stream=0, num_streams=1, seed=0, shuffle_documents=1, repeat=False
    )
    packer = SequencePacker(stream)
    packed: list[PackedSequence] = []
    while len(packed) < num_sequences and (sequence := packer.next_sequence(sequence_length)) is not None:
        packed.append(sequence)
    if not any((sequence.labels_S != IGNORE_INDEX).any() for sequence in packed):
        raise ConfigError(
            f"recipe.eval_sequences={num_sequences}: the first {len(packed)} held-out sequences of {sequence_length} "
            "tokens hold no target, since each of their documents is a single token; hold out other documents, or pass "
            "recipe.eval_interval=0"
        )
    return ValidationSequences(packed, dp_rank=dp_rank, dp_size=dp_size, skipped=stream.skipped)
