"""Loss and gradients do not depend on how many ranks share the batch."""

import pytest
import torch

from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import run_ranks
from support.runs import gradients_of, gradients_of_a_step, tiny_run


def _gradients(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    sums, norm = gradients_of_a_step(trainer)
    gradients = gradients_of(trainer)
    assert float(trainer.engine.step(1e-3).gradient_norm) == pytest.approx(norm, rel=1e-6)
    return sums, norm, gradients


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("capacity", ["null", "0.8"])
@pytest.mark.parametrize("aux", ["0.0", "0.5"])
def test_gradients_on_1_2_and_4_ranks(tmp_path, precision, tolerance, capacity, aux):
    results = []
    for world_size, micro_batch in [(1, 4), (1, 1), (2, 2), (4, 1)]:
        config = tiny_run(
            tmp_path / f"{world_size}-{micro_batch}",
            f"engine.precision={precision}",
            f"model.capacity_factor={capacity}",
            f"model.aux_loss_coefficient={aux}",
            f"recipe.micro_batch_size={micro_batch}",
        )
        results.append(run_ranks(_gradients, world_size, config))
    expected, expected_norm, right = results[0][0]
    assert (expected["dropped"] > 0) == (capacity != "null")
    assert (expected["aux_loss"] > 0) == (aux != "0.0")
    for ranks in results[1:]:
        for sums, norm, gradients in ranks:
            assert sums == pytest.approx(expected, rel=tolerance)
            assert norm == pytest.approx(expected_norm, rel=tolerance)
            for name, gradient in gradients.items():
                assert relative_error(gradient, right[name]) < tolerance, name


def _gradient_of_the_mean_loss(grid, config):
    """The same batch through a plain model: one backward pass of the mean over targets."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    batches = trainer.next_batches(trainer.plan())
    targets = sum(int((batch.labels_T != -100).sum()) for batch in batches)
    losses = []
    for batch in batches:
        logits = trainer.engine.model(batch.tokens_T, batch.documents, num_sequences=batch.num_sequences)
        losses.append(torch.nn.functional.cross_entropy(logits, batch.labels_T, reduction="sum"))
    (torch.stack(losses).sum() / targets).backward()
    return gradients_of(trainer)


def test_gradient_is_that_of_the_mean_over_targets(tmp_path):
    config = tiny_run(tmp_path, "engine.precision=float64", "model.aux_loss_coefficient=0")
    (right,) = run_ranks(_gradient_of_the_mean_loss, 1, config)
    for _, _, gradients in run_ranks(_gradients, 2, config):
        for name, gradient in gradients.items():
            assert relative_error(gradient, right[name]) < 1e-10, name
