"""A loss that is not a number ends the run, on every rank, with the step and the tensors."""

import pytest
import torch

from minimax_train.errors import TrainingError
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run


def _poisoned(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    trainer.metrics(trainer.train_step())
    if grid.rank("dp") == grid.size("dp") - 1:  # in one rank's shard alone
        with torch.no_grad():
            trainer.engine.model.layers[1].attention.o_proj.weight.to_local()[0, 0] = float("nan")
    weights = [p.full_tensor().clone() for p in trainer.engine.parameters.values()]
    with pytest.raises(TrainingError) as caught:
        trainer.metrics(trainer.train_step())
    unchanged = all(
        torch.equal(p.full_tensor().nan_to_num(), w.nan_to_num())
        for p, w in zip(trainer.engine.parameters.values(), weights, strict=True)
    )
    return str(caught.value), unchanged


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_message_names_step_and_tensors(tmp_path, world_size):
    for message, unchanged in run_ranks(_poisoned, world_size, tiny_run(tmp_path)):
        assert message.startswith("step 2: loss nan, gradient norm nan; not finite: ")
        assert "parameters: layers.1.attention.o_proj.weight;" in message
        assert "outputs, in order of computation: layers.1.attention.o_proj, layers.1.attention, layers.1" in message
        assert unchanged, "the step that failed must not touch the weights"
