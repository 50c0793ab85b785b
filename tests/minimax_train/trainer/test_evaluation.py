"""Held-out figures against ones counted from the text and the run's tokenizer."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch

from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run

ONE_STEP = ["recipe.steps=1", "recipe.warmup_steps=0", "recipe.decay_steps=0", "recipe.eval_interval=1"]
ROW = 61


def _train(grid, config):
    Trainer(config, grid, torch.device("cpu")).train()


def _targets(config):
    """Every held-out token in order, but None for a document's first, which nothing predicts."""
    tokenizer = tokenizers.Tokenizer.from_file(f"{config.run_dir}/tokenizer/tokenizer.json")
    end, targets = tokenizer.token_to_id("<|endoftext|>"), []
    for line in Path(config.data.validation_files[0]).read_text().splitlines():
        targets += [None, *tokenizer.encode(json.loads(line)["text"]).ids[1:], end]
    return targets


@pytest.mark.parametrize("rows", [5, 1000])
def test_unigram_loss(tmp_path, rows):
    for ranks in (1, 2):
        sizes = [f"data.sequence_length={ROW}", f"recipe.eval_sequences={rows}", "recipe.micro_batch_size=2"]
        config = tiny_run(tmp_path / str(ranks), *ONE_STEP, *sizes)
        run_ranks(_train, ranks, config)
        records = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
        (loss,) = (record["unigram_loss"] for record in records if "unigram_loss" in record)
        targets = _targets(config)
        # The target of a sequence's last token is the next one's first, of which these hold none but that one.
        held_out = Counter(token for token in targets[1 : rows * ROW + 1] if token is not None)
        total = held_out.total()
        assert -(-min(len(targets), rows * ROW) // ROW) % 4, "the last micro-batches must need stand-ins"
        assert len(held_out) > 15
        expected = -sum(count / total * math.log(count / total) for count in held_out.values())
        assert loss == pytest.approx(expected, rel=1e-12)


def _train_without_an_evaluation(grid, config):
    """As if the run was killed in its first evaluation."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    trainer.evaluate = lambda plan: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()


def _losses(config):
    records = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}


def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for(tmp_path):
    config = tiny_run(tmp_path / "whole", "checkpoint.interval=3", "checkpoint.resume=auto")
    run_ranks(_train, 1, config)
    expected = _losses(config)
    assert set(expected) == {3, 6}
    config.run_dir = str(tmp_path / "killed")
    run_ranks(_train_without_an_evaluation, 2, config)
    assert [path.name for path in Path(config.run_dir).glob("checkpoints/*")] == ["step-00000003"]
    run_ranks(_train, 2, config)
    assert _losses(config) == pytest.approx(expected, rel=1e-5)
