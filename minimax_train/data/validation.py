"""Held-out rows: the same for every evaluation and any data-parallel size."""

from __future__ import annotations

from minimax_train.data.batch import MicroBatch
from minimax_train.data.config import DataConfig
from minimax_train.data.packing import Row, RowPacker, filler
from minimax_train.data.sources import VALIDATION, open_source
from minimax_train.data.streams import DocumentStream
from minimax_train.data.tokenizer import Tokenizer


class ValidationRows:
    """This rank's share of the held-out rows.

    Every rank gets the same number of micro-batches of the same shape: where rows run out, rows without any target
    stand in. Summed losses divided by summed ``num_targets`` are so the same for any data-parallel size.

    Args:
        rows: all held-out rows, at least one.
        dp_rank, dp_size: row g belongs to rank g modulo the data-parallel size.
    """

    def __init__(self, rows: list[Row], *, dp_rank: int, dp_size: int) -> None:
        self.num_rows = len(rows)
        self._rows, self._dp_size = rows[dp_rank::dp_size], dp_size
        length = len(rows[0].tokens_S)
        tokens_S, labels_S = filler(length, int(rows[0].tokens_S[0]))
        self._stand_in = Row(tokens_S, labels_S, [length])

    def micro_batches(self, rows_per_micro_batch: int) -> list[MicroBatch]:
        """All of this rank's rows, on the host; as many micro-batches as on every other rank."""
        per_round = rows_per_micro_batch * self._dp_size
        num_micro_batches = -(-self.num_rows // per_round)
        missing = num_micro_batches * rows_per_micro_batch - len(self._rows)
        rows = self._rows + [self._stand_in] * missing
        return [
            MicroBatch.from_rows(rows[i : i + rows_per_micro_batch]) for i in range(0, len(rows), rows_per_micro_batch)
        ]


def build_validation_rows(
    config: DataConfig, tokenizer: Tokenizer, *, rows: int, dp_rank: int, dp_size: int
) -> ValidationRows:
    """The first ``rows`` rows of the held-out documents, or as many as these fill.

    Every rank packs the same single pass over the held-out documents, so all know how many rows there are without
    asking each other. A last row that the documents do not fill is completed by a segment without targets.

    Raises:
        ValueError: when no held-out documents are configured or found, or they cannot be read.
    """
    if rows < 1:
        raise ValueError(f"rows={rows}: evaluation needs a positive number of rows")
    stream = DocumentStream(
        open_source(config, VALIDATION), tokenizer, stream=0, num_streams=1, seed=0, shuffle_documents=1, repeat=False
    )
    packer = RowPacker(stream, config.sequence_length)
    packed: list[Row] = []
    while len(packed) < rows and (row := packer.next_row()) is not None:
        packed.append(row)
    return ValidationRows(packed, dp_rank=dp_rank, dp_size=dp_size)
