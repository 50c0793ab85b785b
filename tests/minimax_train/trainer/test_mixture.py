"""A run over several sources as its user meets it: metrics, held-out sets, restarts, and what stops it."""

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from minimax_train.config import load_config
from minimax_train.data import load_tokenizer
from minimax_train.errors import TrainingError
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import overrides, write_corpus

SINGLE = ("data=", "data.format", "data.train_files", "data.validation_files")


def mixed_run(folder, *more):
    """Two sources, of which the first holds out a file and the second a share of its documents."""
    base = [item for item in overrides(folder) if not item.startswith(SINGLE)]
    web, held_out, code = (write_corpus(folder, n, seed=seed) for n, seed in ((60, 0), (10, 1), (50, 2)))
    return load_config(
        [
            *base,
            "data.sources.web.format=json",
            f"data.sources.web.train_files=[{web}]",
            f"data.sources.web.validation_files=[{held_out}]",
            "data.sources.web.weight=3",
            "data.sources.code.format=json",
            f"data.sources.code.train_files=[{code}]",
            "data.sources.code.held_out=0.3",
            "data.packing=best_fit",
            "checkpoint.interval=1",
            "checkpoint.resume=auto",
            *more,
        ]
    )


def _train(grid, config, stop=None):
    trainer = Trainer(config, grid, torch.device("cpu"))
    steps = []

    def step():
        if len(steps) == stop:
            raise KeyboardInterrupt  # between a step and the next
        steps.append(original())
        return steps[-1]

    original, trainer.train_step = trainer.train_step, step
    with suppress(KeyboardInterrupt):
        trainer.train()


def records_of(config):
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def targets_of(config):
    """Of the two held-out sets, as far as they are evaluated on: at most all their tokens but each document's first."""
    tokenizer = load_tokenizer(Path(config.run_dir) / "tokenizer")
    lines = Path(config.data.sources["web"].validation_files[0]).read_text().splitlines()
    return sum(len(tokenizer.encode_document(json.loads(line)["text"])) - 1 for line in lines)


def test_metrics_and_restarts_of_a_mixture(tmp_path):
    config = mixed_run(tmp_path / "whole", "engine.precision=float64", "recipe.eval_sequences=1000")
    run_ranks(_train, 1, config)
    expected = records_of(config)
    last = expected[-2] | expected[-1]
    assert last["data_share_asked/web"] == pytest.approx(0.75)
    assert last["data_share/web"] == pytest.approx(1 - last["data_share/code"]) == pytest.approx(0.75, abs=0.3)
    assert {"data_epoch/web", "data_epoch/code", "split_documents"} <= last.keys()
    parts = [last["validation_loss/web"], last["validation_loss/code"]]
    assert min(parts) < last["validation_loss"] < max(parts)
    # The loss over all targets is the mean of the parts', by their targets; those of one part are counted here.
    share = (last["validation_loss"] - parts[1]) / (parts[0] - parts[1])
    of_code = targets_of(config) * (1 - share) / share
    assert of_code == pytest.approx(round(of_code), rel=1e-6) and of_code > 50
    config.run_dir = str(tmp_path / "killed")
    for ranks, stop in ((2, 2), (1, 1), (2, None)):
        run_ranks(_train, ranks, config, stop)
    names = [name for name in last if name.startswith(("loss", "data_share", "data_epoch", "validation_", "split"))]
    for got, record in zip(records_of(config), expected, strict=True):
        assert {n: v for n, v in got.items() if n in names} == pytest.approx(
            {n: v for n, v in record.items() if n in names}, rel=1e-10
        )


def _stops(grid, config):
    with pytest.raises(TrainingError) as stopped:
        Trainer(config, grid, torch.device("cpu")).train()
    return str(stopped.value)


def test_a_source_that_has_had_its_last_epoch_stops_the_run(tmp_path):
    more = ("data.sources.code.max_epochs=1", "data.packing=split", "recipe.steps=200", "checkpoint.interval=0")
    (message,) = run_ranks(_stops, 1, mixed_run(tmp_path, *more))
    assert re.match(r"after step \d+: data.sources.code.max_epochs=1: stream \d of data.sources.code.train_f", message)
