"""A loss, gradient or weight that is not a number ends the run, on every rank, with the step and the tensors."""

import pytest
import torch

from minimax_train.errors import TrainingError
from minimax_train.model.sharding import local
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run, weights_of


def _weights(trainer):
    return list(weights_of(trainer).values())


def _poisoned(grid, config, steps_after):
    """NaN in a weight of one rank's shard before step 2; reported after some more steps."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    trainer.metrics(trainer.train_step())
    state = trainer.engine.snapshot()
    if grid.rank("dp") == grid.size("dp") - 1:
        with torch.no_grad():
            local(state["model"]["layers.1.attention.o_proj.weight"])[0, 0] = float("nan")
    trainer.engine.restore(state)
    before = _weights(trainer)
    for _ in range(1 + steps_after):
        taken = trainer.train_step()
    messages = []
    for look in (trainer.metrics, lambda taken: trainer.save(taken.plan), lambda taken: trainer.evaluate(taken.plan)):
        with pytest.raises(TrainingError) as caught:
            look(taken)
        messages.append(str(caught.value))
    unchanged = all(
        torch.equal(after.nan_to_num(), weight.nan_to_num())
        for after, weight in zip(_weights(trainer), before, strict=True)
    )
    return messages, unchanged, trainer.store.latest()


@pytest.mark.parametrize(("world_size", "steps_after"), [(1, 0), (2, 0), (2, 2)])
def test_the_message_names_step_and_tensors(tmp_path, world_size, steps_after):
    for messages, unchanged, checkpoint in run_ranks(_poisoned, world_size, tiny_run(tmp_path), steps_after):
        assert messages[0].startswith("step 2: loss nan, gradient norm nan; not finite: ")
        for message in messages:
            assert "parameters: layers.1.attention.o_proj.weight;" in message
            assert "gradients: embedding.weight, layers.0." in message
            assert "computation: layers.1.attention.o_proj, layers.1.attention, layers.1" in message
        assert unchanged, "neither the step that failed nor a later one may touch the weights"
        assert checkpoint is None


def _divided_by_nothing(grid, config):
    """With an epsilon of 0, AdamW makes 0 / 0 of the embedding of a token that is in no document."""
    with pytest.raises(TrainingError) as caught:
        Trainer(config, grid, torch.device("cpu")).train()
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_weight_that_an_update_ruins_is_never_saved(tmp_path, world_size):
    config = tiny_run(tmp_path, "checkpoint.interval=1", "logging.interval=4")
    config.recipe.adam_eps = 0.0  # which a configuration may not say
    for message in run_ranks(_divided_by_nothing, world_size, config):
        assert message.startswith("step 1: loss 5.")
        assert message.endswith("embedding.weight; gradients: none; outputs, in order of computation: none")
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
