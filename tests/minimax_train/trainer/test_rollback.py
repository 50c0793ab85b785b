"""Going back to a checkpoint after a suspicious step, against a run that never saw the data since."""

import json

import pytest
import torch

from minimax_train.errors import TrainingError
from minimax_train.model.sharding import local
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run, weights_of

ROLLBACK = ["recipe.outliers=rollback", "checkpoint.interval=4", "recipe.eval_interval=0"]
ROLLBACK += ["checkpoint.async_save=false"]
STEPS = 10


class _Poisoned(Trainer):
    """Its weights become NaN before the given steps' forward passes, on the last rank; each time once."""

    poison = ()

    def train_step(self):
        if self.progress.step + 1 in self.poison:
            self.poison = [step for step in self.poison if step != self.progress.step + 1]
            if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                for weight in self.engine.snapshot()["model"].values():
                    local(weight).detach().fill_(torch.nan)
        return super().train_step()


def _run_both(grid, config, reference, poison):
    trainer = _Poisoned(config, grid, torch.device("cpu"))
    trainer.poison = poison
    trainer.train()
    weights, state = weights_of(trainer), trainer.loader.state_dict()
    # Four steps, the data of three (or as many as were taken) drawn for nothing, six steps.
    never = Trainer(reference, grid, torch.device("cpu"))
    losses = [float(never.train_step().totals.loss) for _ in range(4)]
    for _ in range(trainer.passed_over):
        never.next_batches(never.plan())
    losses += [float(never.train_step().totals.loss) for _ in range(STEPS - 4)]
    expected = weights_of(never)
    alike = {name: torch.equal(weights[name], expected[name]) for name in expected}
    positions = [json.dumps(state["streams"]), json.dumps(never.loader.state_dict()["streams"])]
    never.loader.close()
    return losses, alike, positions, trainer.progress.tokens


@pytest.mark.parametrize(("engine", "every"), [("zero1", 1), ("fsdp", 3)])
def test_a_run_goes_back_and_passes_over_the_data(tmp_path, engine, every):
    """Step 6 is not finite. It is seen when it, or step 6 of every third, is reported."""
    more = [f"engine={engine}", f"recipe.steps={STEPS}", f"logging.interval={every}"]
    config = tiny_run(tmp_path, *more, *ROLLBACK)
    reference = tiny_run(tmp_path / "reference", *more, "checkpoint.interval=0", "recipe.eval_interval=0")
    _Poisoned.passed_over = 2
    results = run_ranks(_run_both, 2, config, reference, [6])
    losses, alike, _, tokens = results[0]
    assert set(alike.values()) == {True}
    assert all(left == right for _, _, (left, right), _ in results), "the data that follow are the same"
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = {record["step"]: record["loss"] for record in records}
    assert told == {step: losses[step - 1] for step in range(1, STEPS + 1) if step % every == 0 or step == STEPS}
    assert len(records) == len(told), "no step is there twice"
    assert tokens == records[-1]["tokens"] == STEPS * config.recipe.global_batch_size * config.data.sequence_length
    assert records[-1]["rollbacks"] == 1


def _train(grid, cases):
    """Of each configuration: what ended it early, the steps taken, and which checkpoints it went back to."""
    ends = []
    for config, poison in cases:
        trainer, message = _Poisoned(config, grid, torch.device("cpu")), ""
        trainer.poison = poison
        try:
            trainer.train()
        except TrainingError as error:
            message = str(error)
        ends.append((message, trainer.progress.step, trainer.gone_back_to))
    return ends


def _first_outlier(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    found = [bool(trainer.train_step().report.outlier) for _ in range(6)]
    trainer.loader.close()
    return found.index(True) + 1


def _all(grid, told, *cases):
    return _first_outlier(grid, told), *_train(grid, cases)


def test_where_it_goes_back_and_where_it_ends(tmp_path):
    limited = tiny_run(tmp_path / "limited", "recipe.steps=30", *ROLLBACK, "recipe.outlier_limit=2")
    never_saved = tiny_run(tmp_path / "none", *ROLLBACK)
    # So few sigmas that an ordinary step is an outlier, the first of which a run finds that only tells.
    eager = ["recipe.outlier_sigmas=1", "recipe.outlier_window=8", "recipe.steps=6"]
    told = tiny_run(tmp_path / "log", *eager, "recipe.outliers=log")
    many = tiny_run(tmp_path / "many", *ROLLBACK, *eager, "recipe.outlier_limit=1000")
    cases = [(limited, [5, 6, 7]), (never_saved, [2]), (many, [])]
    ((first, *ends),) = run_ranks(_all, 1, told, *cases)
    message, step, gone = ends[0]
    assert message.startswith("step 7: loss nan, gradient norm nan; not finite: parameters: ") and step == 7
    assert message.endswith(
        f"gone back to {tmp_path}/limited/run/checkpoints/step-00000004 2 times (recipe.outlier_limit=2)"
    )
    assert gone == [4, 4]
    assert ends[1][0].endswith("; recipe.outliers=rollback: there is no checkpoint to go back to")
    assert first > 4 and ends[2] == ("", 6, [4] * len(ends[2][2])) and ends[2][2]
