"""The whole model on grids, with the GPU kernels: four processes on one GPU."""

import pytest
import torch

from minimax_train.parallel.grid import ProcessGrid
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import TIMEOUT, run_ranks
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
# Loss; gradients, of which a wrong one is off by 1 or so. Sums in another order let some tokens choose other experts.
TOLERANCES = {"float32": (1e-4, 0.05), "bfloat16": (5e-3, 0.3)}


GRIDS = [{"tp": 4, "etp": 2}, {"tp": 2, "cp": 2, "ep": 4}, {"cp": 2, "ep": 2, "etp": 2}, {"tp": 2, "ep": 2}]


def _results(_, runs):
    """Loss before and after a step, and the gradients of the second, of each run on its own grid."""
    results = []
    for sizes, config in runs:
        trainer = Trainer(config, ProcessGrid.create("cuda", TIMEOUT, **sizes), torch.device("cuda", 0))
        before = trainer.accumulate_gradients(trainer.next_batches())["loss"]
        trainer.engine.step(1e-3, trainer.engine.gradient_norm())
        after = trainer.accumulate_gradients(trainer.next_batches())["loss"]
        gradients = {name: p.grad.full_tensor().cpu() for name, p in trainer.engine.parameters.items()}
        results.append((before, after, gradients))
    return results


@pytest.mark.gpu
def test_four_processes_on_one_gpu(tmp_path):
    def run(folder, precision, sizes):
        axes = [f"parallel.{axis}={size}" for axis, size in sizes.items()]
        groups = ["parallel.token_groups=2"] if sizes else []
        return sizes, tiny_run(tmp_path / folder, *SIZES, f"engine.precision={precision}", *axes, *groups)

    # One rank first: it compiles the kernels.
    gpu = {"start": "spawn", "timeout_s": 400}
    (references,) = run_ranks(_results, 1, [run(precision, precision, {}) for precision in TOLERANCES], **gpu)
    cases = [(precision, i) for precision in TOLERANCES for i in range(len(GRIDS))]
    runs = [run(f"{precision}-{i}", precision, GRIDS[i]) for precision, i in cases]
    of_precision = dict(zip(TOLERANCES, references, strict=True))
    for results in run_ranks(_results, 4, runs, **gpu):
        for (precision, i), (before, after, gradients) in zip(cases, results, strict=True):
            right_before, right_after, right = of_precision[precision]
            loss_bound, gradient_bound = TOLERANCES[precision]
            errors = {name: float(relative_error(gradient, right[name])) for name, gradient in gradients.items()}
            assert before == pytest.approx(right_before, rel=loss_bound), (precision, GRIDS[i])
            assert after == pytest.approx(right_after, rel=10 * loss_bound), (precision, GRIDS[i])
            assert max(errors.values()) < gradient_bound, (precision, GRIDS[i], errors)
