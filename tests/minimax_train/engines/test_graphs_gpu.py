"""Micro-batches as CUDA graphs against micro-batches launched kernel by kernel: the same steps, on packed documents of
any lengths, also where a stage changes what a graph was captured for."""

import pytest
import torch

from minimax_train.parallel.grid import ProcessGrid
from minimax_train.trainer import Trainer
from support.distributed import TIMEOUT, run_ranks
from support.runs import ON_GPU, UNSTAGED, tiny_run

SIZES = [*ON_GPU, "engine=zero1", "data.num_streams=8"]
# Two steps of one micro-batch, three of three (`_batches`), then longer sequences and another RoPE base.
STAGES = [
    *UNSTAGED,
    "recipe.stages.first.steps=2",
    "data.sequence_length=1056",
    "recipe.micro_batch_size=2",
    "recipe.stages.short.steps=3",
    "recipe.stages.long.steps=3",
    "recipe.stages.long.sequence_length=2112",
    "recipe.stages.long.global_batch_size=4",
    "recipe.stages.long.micro_batch_size=1",
    "recipe.stages.long.rope_base=5000",
    "recipe.learning_rate=3e-3",
]
GRIDS = [{}, {"tp": 2}, {"etp": 2}, {"ep": 2}, {"cp": 2}, {"tp": 2, "ep": 2}, {"cp": 2, "ep": 2}]


def _train(_, configs):
    """Loss and gradient norm of every step of each run, and how many graphs were recorded."""
    found = []
    for config in configs:
        device = torch.device("cuda", torch.cuda.current_device())
        trainer = Trainer(config, ProcessGrid.create("cuda", TIMEOUT, **config.parallel.grid), device)
        steps, recorded = [], 0
        while not trainer.is_over:
            taken = trainer.train_step()
            trainer.guard.check()
            steps.append((float(taken.totals.loss), float(taken.report.gradient_norm)))
            if graphs := trainer.engine._graphs:
                recorded = max(recorded, len(graphs._recordings))
        found.append((steps, recorded, trainer.engine.notes))
    return found


def _batches(dp):
    return [f"recipe.global_batch_size={2 * dp}", f"recipe.stages.short.global_batch_size={6 * dp}"]


def _check(folder, world, grids, device):
    # With graphs first: what they have compiled is then there for the other, not the other way round.
    cases = [(grid, graphs) for grid in grids for graphs in (True, False)]

    def run(grid, graphs):
        name = "-".join([*(f"{axis}{size}" for axis, size in grid.items()), str(graphs)])
        axes = [f"parallel.{axis}={size}" for axis, size in grid.items()]
        batches = _batches(world // (grid.get("cp", 1) * grid.get("tp", 1)))
        return tiny_run(folder / name, *SIZES, *STAGES, *batches, *axes, f"engine.cuda_graphs={graphs}")

    options = {"start": "spawn", "timeout_s": 300, "device": device}
    for results in run_ranks(_train, world, [run(*case) for case in cases], **options):
        by_case = dict(zip([(str(grid), graphs) for grid, graphs in cases], results, strict=True))
        for grid in map(str, grids):
            (expected, none, _), (steps, recorded, notes) = by_case[grid, False], by_case[grid, True]
            assert none == 0 and recorded >= 2, (grid, recorded)
            assert not [note for note in notes if "CUDA graphs" in note], grid
            assert len(steps) == len(expected) == 8
            # bfloat16: sums of gradients in another order, and AdamW's first steps take the sign of rounding errors.
            for own, right in zip(steps, expected, strict=True):
                assert own == pytest.approx(right, rel=2e-3), grid


@pytest.mark.gpu
def test_one_gpu(tmp_path):
    _check(tmp_path, 1, [{}], "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path):
    _check(tmp_path, 2, [grid for grid in GRIDS if len(grid) < 2], "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_four_gpus(tmp_path):
    _check(tmp_path, 4, GRIDS, "cuda")
