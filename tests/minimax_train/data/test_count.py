"""Tokens of one epoch, as counted and as read."""

import numpy as np
import pytest

from minimax_train.config import load_config
from minimax_train.data import prepare_tokenizer
from minimax_train.data.count import count_tokens
from minimax_train.data.token_files import TokenWriter
from support.data import write_shards

TEXTS = ["a b c", "token by token", "b", "ring ring ring", "gate"] * 3


@pytest.fixture
def data(tmp_path):
    def configured(*overrides):
        return load_config(["data=files", "model.vocab_size=300", "data.sequence_length=1", *overrides]).data

    return configured


def test_of_text_without_what_is_held_out(tmp_path, data):
    files = write_shards(tmp_path, "json", [TEXTS, ["held out"]])
    given = ["data.format=json", f"data.train_files=[{files}]"]
    tokenizer = prepare_tokenizer(data(*given), 300, tmp_path / "tokenizer")
    every = [len(ids) for ids in tokenizer.encode_documents([*TEXTS, "held out"])]
    assert count_tokens(data(*given), tokenizer) == sum(every)
    (held_out := tmp_path / "held.jsonl").write_text('{"text": "held out"}\n')
    left = count_tokens(data(*given, f"data.validation_files=[{held_out}]"), tokenizer)
    assert left == sum(every[:-1])


def test_of_token_files_by_their_index(tmp_path, data):
    (tmp_path / "a.txt").write_text(" ".join(TEXTS))
    tokenizer = prepare_tokenizer(data(f"data.train_files=[{tmp_path}/a.txt]"), 300, tmp_path / "tokenizer")
    end = tokenizer.eos_id
    for name, documents in {"x": [[5, 6, end], [7, 8], [end], [], [9]], "y": [[10, 11, 12]]}.items():
        writer = TokenWriter(str(tmp_path / f"{name}.bin"), 300)
        for document in documents:
            writer.add([np.array(document, dtype=np.int64)])
        writer.finish()
    tokens = data("data.format=megatron", f"data.train_files=[{tmp_path}/*.bin]", "data.num_streams=1")
    assert count_tokens(tokens, tokenizer) == (3 + 3 + 2) + 4  # the end added where there is none, nothing of it alone
