"""Learning-rate schedule, decay groups and the optimizer step against formulas written out here."""

import math

import pytest
import torch

from minimax_train.config import load_config
from minimax_train.recipe import Progress, Recipe
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import gradients_of, tiny_run, weights_of


def test_schedule():
    shape = ["recipe.warmup_steps=4", "recipe.decay_steps=5", "recipe.steps=20", "recipe.learning_rate=0.8"]

    def rate(step, *more):
        return Recipe(load_config([*shape, *more])).at(Progress(step), {}).learning_rate

    rates = [rate(step, "recipe.min_learning_rate=0.1") for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:15] == [0.8] * 11
    assert rates[15:] == pytest.approx([0.8 * 8 ** (-k / 5) for k in range(1, 6)])
    linear = ["recipe.min_learning_rate=0", "recipe.decay_shape=linear"]
    assert [rate(step, *linear) for step in range(15, 20)] == pytest.approx([0.64, 0.48, 0.32, 0.16, 0.0])
    cosine = ["recipe.min_learning_rate=0", "recipe.decay_shape=cosine"]
    assert rate(16, *cosine) == pytest.approx(0.4 * (1 + math.cos(0.4 * math.pi)))


def _steps(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    start = weights_of(trainer)
    gradients, step = [], trainer.engine.step

    def spy(learning_rate):
        gradients.append(gradients_of(trainer))
        return step(learning_rate)

    trainer.engine.step = spy
    for _ in range(2):
        trainer.train_step()
    return start, gradients, weights_of(trainer)


@pytest.mark.parametrize("clip", ["null", "0.01"])
def test_two_steps_of_adamw(tmp_path, clip):
    config = tiny_run(tmp_path, "engine.precision=float64", f"recipe.gradient_clip={clip}", "recipe.weight_decay=0.3")
    start, gradients, end = run_ranks(_steps, 2, config)[0]
    r = config.recipe
    scales = []
    for step in gradients:
        norm = math.sqrt(sum(float(g.square().sum()) for g in step.values()))
        scales.append(1.0 if clip == "null" else min(1.0, float(clip) / (norm + 1e-6)))
    assert clip == "null" or max(scales) < 1
    for name, weight in start.items():
        m = v = torch.zeros_like(weight)
        for t, step in enumerate(gradients, start=1):
            gradient = step[name] * scales[t - 1]
            rate = r.learning_rate * t / 2  # warm-up over two steps
            m = r.adam_beta1 * m + (1 - r.adam_beta1) * gradient
            v = r.adam_beta2 * v + (1 - r.adam_beta2) * gradient**2
            decay = 0.0 if weight.dim() == 1 else 0.3
            update = (m / (1 - r.adam_beta1**t)) / ((v / (1 - r.adam_beta2**t)).sqrt() + r.adam_eps)
            weight = weight * (1 - rate * decay) - rate * update
        torch.testing.assert_close(end[name], weight, rtol=1e-9, atol=1e-11, msg=name)
