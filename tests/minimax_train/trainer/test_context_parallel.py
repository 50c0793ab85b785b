"""The whole model on packed sequences that ranks share: loss and gradients equal those of one rank."""

from dataclasses import replace

import pytest
import torch

from minimax_train import capture
from minimax_train.capture import Recording
from minimax_train.engines.zero1 import Zero1Engine
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


class _HostRecording(Recording):
    """Stands for a recording of CUDA graphs: what would be captured just runs; calls and transfers are those of one."""

    def pause(self):
        for wait in self._joins:
            wait()
        self._joins.clear()

    def resume(self):
        pass


def _recorded(grid, config):
    """As :func:`_gradients`, with micro-batches run as they are recorded."""
    run = Zero1Engine._sum_gradients
    capture._lent = lambda x: x  # a replay's memory

    def record(engine, batch, plan):
        if batch.shard is not None:
            shard = capture.Latest()
            shard.value, batch = batch.shard, replace(batch, shard=shard)
        Recording.current = recording = _HostRecording(None)
        run(engine, batch, plan)
        recording.pause()
        recording._make_waiting()
        Recording.current = None
        assert recording._steps and not engine._reducing._pending and not engine._gathering._pending

    Zero1Engine._sum_gradients = record
    return _gradients(grid, config)


@pytest.mark.parametrize(("ranks", "axes"), [(2, {"cp": 2}), (4, {"cp": 2}), (4, {"cp": 2, "ep": 2}), (2, {"ep": 2})])
def test_calls_between_graphs_compute_the_same(tmp_path, ranks, axes):
    shared = ["engine=zero1", "engine.precision=float64", "data.sequence_length=96", "model.aux_loss_coefficient=0.5"]
    shared += ["model.num_experts=6", "recipe.micro_batch_size=1", "recipe.activation_checkpointing=selective"]
    ((expected, expected_norm, expected_held_out, right),) = run_ranks(_gradients, 1, tiny_run(tmp_path / "1", *shared))
    config = tiny_run(tmp_path / "2", *shared, *(f"parallel.{axis}={size}" for axis, size in axes.items()))
    for sums, norm, held_out, gradients in run_ranks(_recorded, ranks, config, **axes):
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
