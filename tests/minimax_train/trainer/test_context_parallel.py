"""The whole model on packed sequences that ranks share: loss and gradients equal those of one rank."""

import pytest
import torch

from minimax_train.errors import ConfigError
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import run_ranks
from support.runs import gradients_of, gradients_of_a_step, tiny_run


def _gradients(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    held_out = trainer.evaluate(trainer.plan())
    sums, norm = gradients_of_a_step(trainer)
    return sums, norm, held_out, gradients_of(trainer)


@pytest.mark.parametrize("capacity", ["null", "0.8"])
@pytest.mark.parametrize(
    ("ranks", "cp", "layout", "linear", "softmax"),
    [
        (2, 2, "zigzag", "lasp_plus", "ring"),
        (3, 3, "zigzag", "scan", "allgather"),
        (4, 2, "contiguous", "ring", "ring"),
        (4, 4, "contiguous", "auto", "auto"),
        (8, 4, "zigzag", "auto", "auto"),
    ],
)
def test_gradients_equal_one_rank(tmp_path, ranks, cp, layout, linear, softmax, capacity):
    shared = ["engine.precision=float64", "data.sequence_length=96", f"model.capacity_factor={capacity}"]
    shared += ["model.aux_loss_coefficient=0.5", "recipe.micro_batch_size=2"]
    config = tiny_run(tmp_path / "one", *shared)
    ((expected, expected_norm, expected_held_out, right),) = run_ranks(_gradients, 1, config)
    assert (expected["dropped"] > 0) == (capacity != "null")
    grid = [f"parallel.cp={cp}", f"parallel.layout={layout}"]
    methods = [f"parallel.linear_cp={linear}", f"parallel.softmax_cp={softmax}"]
    config = tiny_run(tmp_path / "many", *shared, *grid, *methods)
    for sums, norm, held_out, gradients in run_ranks(_gradients, ranks, config, cp=cp):
        assert sums == pytest.approx(expected, rel=1e-10)
        assert norm == pytest.approx(expected_norm, rel=1e-10)
        assert held_out == pytest.approx(expected_held_out, rel=1e-10)
        for name, gradient in gradients.items():
            assert relative_error(gradient, right[name]) < 1e-10, name


def test_rows_that_cannot_be_cut_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.sequence_length=63: must be a multiple of 4 .* nearest are 60 and 64"):
        tiny_run(tmp_path, "parallel.cp=2")
    config = tiny_run(tmp_path, "parallel.cp=3", "parallel.layout=contiguous")
    with pytest.raises(ConfigError, match=r"parallel.cp=3: must divide the number of processes, 4"):
        config.check_world_size(4)
    config.check_world_size(6)
