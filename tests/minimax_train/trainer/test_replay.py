"""A step that is not finite is run again: is it so by its numbers, or by a machine that computed wrongly once?"""

import socket

import pytest
import torch
from torch import distributed as dist

from minimax_train.errors import TrainingError
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run

HOST = socket.gethostname()


class _Glitch:
    """An engine's micro-batch on rank 1 goes wrong, the first time only."""

    def __init__(self, engine, kind):
        self.forward_backward, self.engine, self.kind, self.left = engine._forward_backward, engine, kind, 1

    def __call__(self, batch, plan):
        self.forward_backward(batch, plan)
        if self.left and dist.get_rank() == 1:
            self.left = 0
            if self.kind == "loss":
                self.engine._sums.losses_2[0] = torch.nan
            else:
                self.engine._gradient_of["norm.weight"][3] = torch.inf


def _told(grid, config, kinds):
    messages = {}
    for kind in kinds:
        trainer = Trainer(config, grid, torch.device("cpu"))
        trainer.train_step()
        if kind == "weights":
            trainer.engine.snapshot()["model"]["norm.weight"].to_local().fill_(torch.nan)
        elif kind == "huge":  # an update that makes infinity of finite gradients
            config_of = trainer.engine.config.recipe
            config_of.weight_decay, before = 1e300, config_of.weight_decay
        else:
            trainer.engine._forward_backward = _Glitch(trainer.engine, kind)
        trainer.train_step()
        with pytest.raises(TrainingError) as caught:
            trainer.guard.check()
        messages[kind] = str(caught.value)
        if kind == "huge":
            config_of.weight_decay = before
        trainer.loader.close()
    return messages


def test_who_is_suspected(tmp_path):
    config = tiny_run(tmp_path)
    results = run_ranks(_told, 2, config, ["weights", "loss", "gradient", "huge"])
    assert results[0] == results[1]
    messages = results[0]
    assert messages["weights"].endswith("; run again, it is the same on all ranks: suspect the data or the numerics")
    assert f"; run again, rank 1 (host {HOST}) has loss " in messages["loss"]
    assert messages["loss"].endswith(", not nan: suspect its hardware")
    told = "; run again, all is finite, with the same losses: suspect the hardware, of no known rank"
    assert messages["gradient"].endswith(told)
    assert "run again" not in messages["huge"] and "not finite: parameters: " in messages["huge"]
