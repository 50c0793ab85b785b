"""A recipe may change length, batch and RoPE base from step to step: everyone follows the plan of the step."""

import dataclasses
import json

import pytest
import torch

from minimax_train.config import read_config
from minimax_train.recipe import Recipe
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import DIVISIBLE, tiny_run

CHANGED_AT = 3
LATER = {"sequence_length": 48, "rope_base": 5000.0, "global_batch_size": 8, "micro_batch_size": 2}
BY_HAND = [
    "data.sequence_length=48",
    "model.rope_base=5000",
    "recipe.global_batch_size=8",
    "recipe.micro_batch_size=2",
    "checkpoint.resume=auto",
]
SHARED = [*DIVISIBLE, "engine.precision=float64", "recipe.eval_interval=2"]


class Staged(Recipe):
    """Another plan from a step on; what it says there depends on what has been learned, which a checkpoint keeps."""

    def at(self, progress, state):
        plan = super().at(progress, state)
        if progress.step < state.get("changes_at", CHANGED_AT):
            return plan
        return dataclasses.replace(plan, **LATER, stage="long")


def _train(grid, config, recipe, stop_after=None):
    trainer = Trainer(config, grid, torch.device("cpu"))
    if recipe is not None:
        trainer.recipe = recipe(config)
    if stop_after is None:
        trainer.train()
    while stop_after is not None and trainer.progress.step < stop_after:
        taken = trainer.train_step()
        trainer.log.report(trainer.progress.step, trainer.metrics(taken))
        if trainer.progress.step == stop_after:
            trainer.save(taken.plan)
    trainer.log.close()
    trainer.loader.close()


def _records(folder):
    names = ("step", "loss", "grad_norm", "tokens", "validation_loss", "unigram_loss")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name in names} for line in lines]


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    run_ranks(_train, 2, tiny_run(folder, *SHARED, "parallel.cp=2"), Staged, cp=2)
    return folder


def test_a_change_of_plan_is_a_restart_with_other_settings(tmp_path, staged):
    """The same run by hand: stopped before the change, continued with a configuration that begins there."""
    run_ranks(_train, 1, tiny_run(tmp_path, *SHARED), None, CHANGED_AT)
    run_ranks(_train, 1, tiny_run(tmp_path, *SHARED, *BY_HAND), None)
    expected = [record for record in _records(tmp_path) if record["step"] > CHANGED_AT]
    found = [record for record in _records(staged) if record["step"] > CHANGED_AT]
    assert len(expected) == 5  # steps 4, 5, 6 and the evaluations after 4 and 6
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-10)
    assert expected[-2]["tokens"] == 3 * 4 * 96 + 3 * 8 * 48


def test_a_staged_run_resumes_after_the_change(tmp_path, staged):
    run_ranks(_train, 2, tiny_run(tmp_path, *SHARED, "parallel.cp=2"), Staged, CHANGED_AT + 1, cp=2)
    run_ranks(_train, 2, tiny_run(tmp_path, *SHARED, "parallel.cp=2", "checkpoint.resume=auto"), Staged, cp=2)
    found = [record for record in _records(tmp_path) if "loss" in record]
    assert found == [record for record in _records(staged) if "loss" in record]


def test_the_checkpoint_is_of_the_step_it_was_written_after(staged):
    """Its configuration is what an export or a new run needs; the run's own folder keeps what the run began with."""
    saved = read_config(staged / "run/checkpoints/step-00000006/config.yaml")
    assert (saved.model.rope_base, saved.data.sequence_length) == (5000.0, 48)
    assert (saved.recipe.global_batch_size, saved.recipe.micro_batch_size) == (8, 2)
    begun = read_config(staged / "run/config.yaml")
    assert (begun.model.rope_base, begun.data.sequence_length, begun.recipe.global_batch_size) == (100.0, 96, 4)


def _with_learned_state(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    trainer.recipe = Staged(config)
    trainer.progress.policy["changes_at"] = 1
    trainer.save(trainer.train_step().plan)
    again = Trainer(dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, resume="auto")), grid,
                    torch.device("cpu"))  # fmt: skip
    again.recipe = Staged(config)
    trainer.loader.close(), again.loader.close()
    return again.progress.policy, again.plan().stage


def test_what_a_policy_learned_is_in_the_checkpoint(tmp_path):
    assert run_ranks(_with_learned_state, 1, tiny_run(tmp_path, *SHARED)) == [({"changes_at": 1}, "long")]
