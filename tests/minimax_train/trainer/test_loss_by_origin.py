"""Losses by source and length, against a model that is given one document at a time."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from minimax_train.data import MicroBatch
from minimax_train.documents import IGNORE_INDEX, Documents
from minimax_train.metrics.origins import origin_metrics
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import DIVISIBLE, tiny_run


def _origin(tokens):
    """Of a document, or a piece of one: anything but regular."""
    return int(tokens.sum()) % 7 % 3


def _with_origins(sequence):
    pieces = torch.from_numpy(sequence.tokens_S).split(sequence.lengths)
    return dataclasses.replace(sequence, origins=[_origin(piece) for piece in pieces])


def _sums(grid, config, compare):
    """Of a step: this project's, and with ``compare`` those of each document alone."""
    concatenate = MicroBatch.concatenate
    MicroBatch.concatenate = lambda sequences: concatenate([_with_origins(sequence) for sequence in sequences])
    trainer = Trainer(config, grid, torch.device("cpu"))
    plan = trainer.plan()
    batches = trainer.next_batches(plan)
    totals = trainer.engine.totals(trainer.engine.run(batches, plan))
    ours = totals.loss_by_origin_O.tolist(), totals.targets_by_origin_O.tolist(), float(totals.loss)
    losses, targets = [0.0] * 3, [0] * 3
    for batch in batches if compare else []:
        lengths = batch.documents.cu_seqlens.diff().tolist()
        for tokens, labels in zip(batch.tokens_T.split(lengths), batch.labels_T.split(lengths), strict=True):
            logits = trainer.engine.model(tokens, Documents.from_lengths([len(tokens)]))
            losses[_origin(tokens)] += float(F.cross_entropy(logits, labels, reduction="sum"))
            targets[_origin(tokens)] += int((labels != IGNORE_INDEX).sum())
    return ours, (losses, targets)


def test_sums_are_those_of_single_documents_on_any_grid(tmp_path):
    shared = [*DIVISIBLE, "engine.precision=float64", "recipe.micro_batch_size=2", "recipe.eval_interval=0"]
    grids = {
        "one": (1, {}),
        "zigzag": (2, {"cp": 2, "layout": "zigzag"}),
        "contiguous": (4, {"cp": 2, "tp": 2, "layout": "contiguous"}),
    }
    for name, (ranks, settings) in grids.items():
        config = tiny_run(tmp_path / name, *shared, *(f"parallel.{key}={value}" for key, value in settings.items()))
        sizes = {axis: settings[axis] for axis in ("cp", "tp") if axis in settings}
        found = run_ranks(_sums, ranks, config, name == "one", **sizes)
        if name == "one":
            losses, targets = found[0][1]
            assert min(targets) > 20
        for ours, _ in found:
            assert ours[0] == pytest.approx(losses, rel=1e-10) and ours[1] == targets
            assert ours[2] == pytest.approx(sum(losses) / sum(targets), rel=1e-10)


def test_metrics_name_what_there_is_to_tell_apart():
    origins = ["a/short", "a/medium", "a/long", "b/short", "b/medium", "b/long"]

    def metrics(loss, targets, names=origins):
        return origin_metrics(names, torch.tensor(loss).double(), torch.tensor(targets).double())

    assert metrics([6, 0, 4, 8, 0, 6], [2, 0, 4, 8, 0, 1]) == {
        "loss_by_source/a": 10 / 6,
        "loss_by_source/b": 14 / 9,
        "loss_by_length/short": 1.4,
        "loss_by_length/long": 2.0,
    }
    assert metrics([0, 0, 0, 8, 0, 0], [0, 0, 0, 2, 0, 0]) == {"loss_by_source/b": 4.0}
    assert metrics([6, 1, 0], [2, 1, 0], origins[:3]) == {"loss_by_length/short": 3.0, "loss_by_length/medium": 1.0}
    assert metrics([6, 0, 0], [2, 0, 0], origins[:3]) == {}
