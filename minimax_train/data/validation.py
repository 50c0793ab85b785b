"""Held-out packed sequences: the same for every evaluation and any data-parallel size."""

from __future__ import annotations

from minimax_train.data.batch import MicroBatch
from minimax_train.data.config import DataConfig
from minimax_train.data.held_out import Content, is_in_share
from minimax_train.data.mixture import MixtureStream
from minimax_train.data.packing import PackedSequence, SequencePacker, filler
from minimax_train.data.sources import TRAIN, VALIDATION, open_source
from minimax_train.data.streams import DocumentStream, Lengths
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
        self._stand_in = PackedSequence(tokens_S, labels_S, [length], [sequences[0].origins[0]])

    def micro_batches(self, size: int) -> list[MicroBatch]:
        """This rank's sequences, ``size`` at a time, on the host; as many micro-batches as on every other rank."""
        num_micro_batches = -(-self.num_sequences // (size * self._dp_size))
        missing = num_micro_batches * size - len(self._sequences)
        sequences = self._sequences + [self._stand_in] * missing
        return [MicroBatch.concatenate(sequences[i : i + size]) for i in range(0, len(sequences), size)]


def build_validation_sequences(
    config: DataConfig, tokenizer: Tokenizer, *, num_sequences: int, sequence_length: int, dp_rank: int, dp_size: int
) -> dict[str, ValidationSequences]:
    """By source, of those that hold documents out: the first packed sequences of these, or as many as they fill.

    Every rank packs the same single pass over the held-out documents, so all know how many there are without asking
    each other. Documents are split where they do not fit, whatever ``packing`` says. A last sequence that the documents
    do not fill is completed by a document without targets.

    Raises:
        ValueError: when no held-out documents are configured or found, they cannot be read, or hold no target.
    """
    if num_sequences < 1:
        raise ValueError(f"num_sequences={num_sequences}: evaluation needs a positive number")
    every = config.named_sources
    names = [name for name in every if every[name].is_held_out]
    if not names:
        kind = next(iter(every.values())).source
        field = "validation_files=[]" if kind == "files" else "validation_split=None"
        raise ConfigError(f"data.{field}: evaluation needs held-out documents; name some or switch evaluation off")
    held_out = {}
    for name in names:
        documents = held_out_documents(config, name, tokenizer)
        packer, packed = SequencePacker(documents), []
        while len(packed) < num_sequences:
            sequence = packer.next_sequence(sequence_length, {name: 1.0})
            if sequence is None:
                break
            packed.append(sequence)
        path = config.path_of(name)
        if not packed:
            raise ConfigError(
                f"{path}.held_out={every[name].held_out}: no document is held out; hold out a larger share"
            )
        if not any((sequence.labels_S != IGNORE_INDEX).any() for sequence in packed):
            of = f" of {path}" if config.sources else ""
            raise ConfigError(
                f"recipe.eval_sequences={num_sequences}: the first {len(packed)} held-out sequences{of} of "
                f"{sequence_length} tokens hold no target, since each of their documents is a single token; hold out "
                "other documents, or pass recipe.eval_interval=0"
            )
        held_out[name] = ValidationSequences(packed, dp_rank=dp_rank, dp_size=dp_size, skipped=documents.skipped)
    return held_out


def held_out_documents(config: DataConfig, name: str, tokenizer: Tokenizer) -> MixtureStream:
    """A source's held-out documents, once: its own files or split of them, or those of its training documents."""
    how, path = config.named_sources[name], config.path_of(name)
    split = VALIDATION if how.has_validation_files else TRAIN
    source = open_source(how, split, path=path, bad_documents=config.bad_documents).with_tokenizer(tokenizer)

    def keeps(content: Content) -> bool:
        return is_in_share(content, how.held_out)

    def open_cursor(_: str, only: int | None) -> DocumentStream:
        lengths, kept = Lengths(config.medium_length, config.long_length), None if how.has_validation_files else keeps
        return DocumentStream.once(source, tokenizer, lengths=lengths, path=path, only=only, keeps=kept)

    return MixtureStream(list(config.named_sources), open_cursor)
