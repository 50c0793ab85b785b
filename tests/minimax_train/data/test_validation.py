"""Held-out sequences: the same for any data-parallel size, however few there are."""

import pytest

from minimax_train.data import DataConfig, build_validation_sequences
from minimax_train.errors import ConfigError
from support.data import WordTokenizer, documents, random_documents, rows_of, write_shards


def make_config(folder, texts):
    pattern = write_shards(folder, "json", [texts])
    return DataConfig(
        source="files", format="json", train_files=[pattern], validation_files=[pattern], sequence_length=16
    )


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path, random_documents(40))


def held_out_sequences(config, number, dp_rank=0, dp_size=1):
    every = build_validation_sequences(
        config, WordTokenizer(), num_sequences=number, sequence_length=16, dp_rank=dp_rank, dp_size=dp_size
    )
    assert list(every) == ["files"]
    return every["files"]


def evaluation(config, rows, dp_size, rows_per_micro_batch):
    """Sequences with a target by global index, and every rank's micro-batch shapes."""
    parts, shapes = [], []
    for rank in range(dp_size):
        held_out = held_out_sequences(config, rows, rank, dp_size)
        batches = held_out.micro_batches(rows_per_micro_batch)
        shapes.append([tuple(batch.tokens_T.shape) for batch in batches])
        parts.append(rows_of(batches))
    together = [row for rows_of_ranks in zip(*parts, strict=True) for row in rows_of_ranks]
    return [row for row in together if any(label != -100 for label in row[1])], shapes


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("rows_per_micro_batch", [1, 2, 4])
def test_the_same_rows_for_every_data_parallel_size(config, dp_size, rows_per_micro_batch):
    expected, _ = evaluation(config, 10, 1, 1)
    assert len(expected) == 10
    rows, shapes = evaluation(config, 10, dp_size, rows_per_micro_batch)
    assert rows == expected
    assert len({tuple(shape) for shape in shapes}) == 1
    assert set(shapes[0]) == {(16 * rows_per_micro_batch,)}


def test_twice_the_same(config):
    held_out = held_out_sequences(config, 5)
    assert rows_of(held_out.micro_batches(2)) == rows_of(held_out.micro_batches(2))


def test_fewer_rows_than_asked_for(tmp_path):
    config = make_config(tmp_path, documents([20, 12]))  # 34 tokens: two sequences and two tokens
    rows, shapes = evaluation(config, 1000, 4, 1)
    assert len(rows) == 3 and shapes == [[(16,)]] * 4
    targets = [label for _, labels, _ in rows for label in labels if label != -100]
    assert targets == [*range(2, 21), 0, *range(22, 33), 0]


def test_a_rank_without_rows_gets_one_without_targets(tmp_path):
    config = make_config(tmp_path, ["1 2 3"])
    held_out = held_out_sequences(config, 8, 1, 2)
    (batch,) = held_out.micro_batches(1)
    assert held_out.num_sequences == 1 and batch.num_targets == 0 and batch.tokens_T.shape == (16,)


def test_rows_must_be_positive(config):
    with pytest.raises(ValueError, match="num_sequences=0"):
        held_out_sequences(config, 0)


def test_documents_of_a_single_token_are_refused(tmp_path):
    """They have no target: a mean loss over them is 0 / 0."""
    with pytest.raises(ConfigError, match=r"recipe.eval_sequences=3: the first 1 held-out sequences of 16 tokens hold"):
        held_out_sequences(make_config(tmp_path, [" "] * 5), 3)
