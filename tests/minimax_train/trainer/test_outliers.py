"""Steps whose loss or gradient norm lies far above the last ones: which they are, and that they are skipped."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from minimax_train.engines.outliers import Outliers
from minimax_train.errors import ConfigError, TrainingError
from minimax_train.trainer import Trainer
from support.commands import minimax_train
from support.distributed import run_ranks
from support.megatron import on_cpu
from support.runs import overrides, tiny_run, weights_of

WINDOW, SIGMAS = 5, 1.0
# So few sigmas that ordinary steps are outliers.
EAGER = ["recipe.outliers=skip", f"recipe.outlier_window={WINDOW}", f"recipe.outlier_sigmas={SIGMAS}"]
EAGER += ["recipe.outlier_limit=100"]


def _expected(values):
    """By NumPy. Values: (loss, gradient norm) of every step."""
    found = []
    for step, value in enumerate(values):
        known = np.array(values[max(0, step - WINDOW) : step])
        enough = len(known) >= WINDOW / 2
        found.append(enough and bool((value - known.mean(0) > SIGMAS * known.std(0, ddof=1)).any()))
    return found


def test_outliers_of_a_sequence():
    draw = np.random.default_rng(3)
    values = np.stack([draw.normal(5, 0.1, 60), draw.normal(1, 0.2, 60)], axis=1)
    values[17, 0], values[18, 1], values[40] = 9, 7, 0
    outliers = Outliers(WINDOW, SIGMAS, torch.device("cpu"))
    found = [bool(outliers.is_next(*torch.tensor(value))) for value in values]
    assert found == _expected(list(values))
    assert found[17] and found[18] and not found[40] and 5 < sum(found) < 50


def test_what_is_not_finite_is_no_outlier():
    outliers = Outliers(4, 1, torch.device("cpu"))
    for value in (1.0, 1.1, 0.9):
        outliers.is_next(torch.tensor(value), torch.tensor(value))
    assert not outliers.is_next(torch.tensor(torch.inf), torch.tensor(1.0))


def _train(grid, config):
    """Of every step: loss, gradient norm, whether it was found an outlier, and whether it changed any weight."""
    trainer, taken = Trainer(config, grid, torch.device("cpu")), []
    before = weights_of(trainer)
    for _ in range(10):
        step = trainer.train_step()
        after = weights_of(trainer)
        changed = {not torch.equal(after[name], before[name]) for name in after}
        taken.append((float(step.totals.loss), float(step.report.gradient_norm), bool(step.report.outlier), changed))
        before = after
    updates = {float(states["step"]) for states in trainer.engine.snapshot()["optimizer"].values()}
    trainer.guard.check()
    return taken, updates, trainer.guard.take_outliers(10)


@pytest.mark.parametrize(("engine", "ranks"), [("zero1", 2), ("fsdp", 2)])
def test_the_updates_of_outliers_are_skipped(tmp_path, engine, ranks):
    config = tiny_run(tmp_path, *EAGER, f"engine={engine}", "recipe.steps=10")
    results = run_ranks(_train, ranks, config, timeout_s=120)
    taken, updates, lines = results[0]
    assert all(result == results[0] for result in results)
    expected = _expected([step[:2] for step in taken])
    assert [step[2] for step in taken] == expected
    assert 0 < sum(expected) < 9
    for *_, outlier, changed in taken:
        assert changed == {not outlier}
    assert updates == {10 - sum(expected)}
    assert len(lines) == sum(expected)
    assert lines[0].startswith(f"step {expected.index(True) + 1}: loss ") and lines[0].endswith(
        "; its update was skipped"
    )


def _spoil(engine, step):
    """The loss that the first rank computes in one step is NaN."""
    losses, runs = engine._losses, iter(range(1, 1000))
    run, now = engine.run, [0]

    def counted(*given):
        now[0] = next(runs)
        return run(*given)

    def spoilt(out):
        loss, aux_loss = losses(out)
        return loss * (torch.nan if now[0] == step and engine.grid.is_first else 1.0), aux_loss

    engine.run, engine._losses = counted, spoilt


def _train_spoilt(grid, config):
    with on_cpu() if config.engine.name == "megatron" else nullcontext():
        return _take_spoilt(grid, config)


def _take_spoilt(grid, config):
    trainer, taken = Trainer(config, grid, torch.device("cpu")), []
    _spoil(trainer.engine, 3)
    before = weights_of(trainer)
    for _ in range(5):
        step = trainer.train_step()
        trainer.guard.check()
        after = weights_of(trainer)
        changed = any(not torch.equal(after[name], before[name]) for name in after)
        taken.append((bool(step.report.gradient_norm.isfinite()), bool(step.report.outlier), changed))
        before = after
    updates = {float(states["step"]) for states in trainer.engine.snapshot()["optimizer"].values()}
    return taken, updates, trainer.guard.take_outliers(5), all(x.isfinite().all() for x in before.values())


@pytest.mark.parametrize("engine", ["zero1", "fsdp", "deepspeed", "megatron"])
def test_the_update_of_a_step_that_is_not_finite_is_skipped(tmp_path, engine):
    """On all ranks, when one has a NaN; the steps after it go on."""
    precision = "engine.precision=float32"
    config = tiny_run(tmp_path, "recipe.outliers=skip", f"engine={engine}", precision, "recipe.steps=10")
    for taken, updates, lines, finite in run_ranks(_train_spoilt, 2, config, timeout_s=120):
        assert taken == [(True, False, True), (True, False, True), (False, True, False), *[(True, False, True)] * 2]
        assert updates == {4} and finite
        assert lines == ["step 3: loss nan, gradient norm nan: not finite; its update was skipped"]


def test_a_step_that_is_not_finite_leaves_the_window_as_it_was():
    outliers, values = Outliers(4, 3, torch.device("cpu")), (1.0, 1.2, 0.9, 1.1, torch.nan, 1.0, 9.0)
    assert [bool(outliers.is_next(torch.tensor(x), torch.tensor(x))) for x in values] == [*[False] * 6, True]


def _be_limited(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    return trainer.progress.step, str(caught.value)


def test_too_many_end_the_run(tmp_path):
    config = tiny_run(tmp_path, *EAGER, "recipe.steps=60", "recipe.outlier_limit=1", "recipe.outlier_window=20")
    for step, message in run_ranks(_be_limited, 2, config, timeout_s=120):
        assert message == (
            f"step {step}: 2 updates were skipped within 20 steps as outliers of loss or gradient norm, or not finite "
            "(recipe.outlier_limit=1)"
        )


def test_outliers_are_told(tmp_path):
    log = [argument for argument in EAGER if "limit" not in argument]
    result = minimax_train(tmp_path, *overrides(tmp_path, *log, "recipe.outliers=log", "recipe.steps=9"))
    assert result.status == 0, result.err
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "grad_norm" in record]
    assert [bool(record["outliers"]) for record in steps] == _expected([(r["loss"], r["grad_norm"]) for r in steps])
    assert result.out.count("standard deviations above the last 5 steps") == sum(r["outliers"] for r in steps) > 0
    assert "skipped" not in result.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["recipe.outliers=undo"], "recipe.outliers='undo': must be one of ignore, log, skip, rollback"),
        (["recipe.outlier_sigmas=3"], "recipe.outlier_sigmas=3.0: is read only with recipe.outliers=log, skip"),
        (["recipe.outliers=log", "recipe.outlier_limit=3"], "recipe.outlier_limit=3: is read only with recipe.outlier"),
    ],
)
def test_refused(tmp_path, given, message):
    with pytest.raises(ConfigError) as caught:
        tiny_run(tmp_path, *given)
    assert str(caught.value).startswith(message)
