"""The whole model on grids, with the GPU kernels: four processes on one GPU, and two GPUs over NCCL."""

import pytest
import torch

from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import run_ranks
from support.runs import tiny_run

SIZES = [
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.head_dim=64",
    "model.rotary_dim=32",
    "model.vocab_size=308",
]
SIZES += ["model.hidden_size=96", "model.num_experts=8", "model.expert_hidden_size=192", "data.sequence_length=1056"]
SIZES += ["device=cuda", "recipe.global_batch_size=4", "recipe.micro_batch_size=2"]
# Loss; gradients. In bfloat16 some tokens choose other experts, and every sum is rounded.
TOLERANCES = {"float32": (1e-5, 2e-3), "bfloat16": (2e-3, 0.2)}


def _gradients(grid, config):
    trainer = Trainer(config, grid, torch.device("cuda", 0))
    sums = trainer.accumulate_gradients(trainer.next_batches())
    trainer.engine.step(1e-3, trainer.engine.gradient_norm())
    after = trainer.accumulate_gradients(trainer.next_batches())
    gradients = {name: p.grad.full_tensor().cpu() for name, p in trainer.engine.parameters.items()}
    return sums["loss"], after["loss"], gradients


@pytest.mark.gpu
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(
    "grid", [{"tp": 4, "etp": 2}, {"tp": 2, "cp": 2, "ep": 4}, {"cp": 2, "ep": 2, "etp": 2}, {"tp": 2, "ep": 2}]
)
def test_four_processes_on_one_gpu(tmp_path, grid, precision):
    shared = [*SIZES, f"engine.precision={precision}"]
    gpu = {"start": "spawn", "device_type": "cuda", "timeout_s": 240}
    ((loss, after, right),) = run_ranks(_gradients, 1, tiny_run(tmp_path / "one", *shared), **gpu)
    more = [f"parallel.{axis}={size}" for axis, size in grid.items()] + ["parallel.token_groups=2"]
    config = tiny_run(tmp_path / "many", *shared, *more)
    for ours, ours_after, gradients in run_ranks(_gradients, 4, config, **gpu, **grid):
        assert ours == pytest.approx(loss, rel=TOLERANCES[precision][0])
        assert ours_after == pytest.approx(after, rel=10 * TOLERANCES[precision][0])
        for name, gradient in gradients.items():
            assert relative_error(gradient, right[name]) < TOLERANCES[precision][1], name
