"""``engine=zero1`` against ``engine=fsdp``, and both against one rank: losses, gradient norms and updates."""

import pytest
import torch

from minimax_train.model.sharding import local
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import run_ranks
from support.runs import DIVISIBLE, tiny_run, weights_of, whole

SIZES = [*DIVISIBLE, "engine.precision=float64", "model.aux_loss_coefficient=0.5"]
STEP = ["recipe.global_batch_size=12", "recipe.micro_batch_size=1", "data.num_streams=12"]


def _two_steps(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    found = []
    for _ in range(2):
        taken = trainer.train_step()
        trainer.guard.check()
        found.append((float(taken.totals.loss), float(taken.report.gradient_norm)))
    state = trainer.engine.snapshot()
    held_out = trainer.evaluate(trainer.plan())["validation_loss"]
    moments = {name: whole(moments["exp_avg"]) for name, moments in state["optimizer"].items()}
    return found, held_out, weights_of(trainer), moments


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    (found,) = run_ranks(_two_steps, 1, tiny_run(tmp_path_factory.mktemp("one"), *SIZES, *STEP, "engine=fsdp"))
    return found


def _gradients_of_autograd(grid, config):
    """Of which parameters a hook of a step finds gradients, and those of which it finds none."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    found = {True: set(), False: set()}

    def hook(name):
        return lambda parameter: found[parameter.grad is not None].add(name)

    for name, parameter in trainer.engine.parameters.items():
        # Before the engine's own, which takes the gradient away.
        own = dict(parameter._post_accumulate_grad_hooks)
        parameter._post_accumulate_grad_hooks.clear()
        parameter.register_post_accumulate_grad_hook(hook(name))
        parameter._post_accumulate_grad_hooks.update(own)
    trainer.train_step()
    return found[True], found[False]


@pytest.mark.parametrize("axes", [{}, {"ep": 2}, {"etp": 2}], ids=str)
@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_zero1_has_the_experts_gemms_add_their_gradients(tmp_path, axes, recomputation):
    sizes = (f"parallel.{axis}={size}" for axis, size in axes.items())
    how = f"recipe.activation_checkpointing={recomputation}"
    config = tiny_run(tmp_path, *SIZES, *STEP, "engine=zero1", how, *sizes)
    for by_autograd, by_gemms in run_ranks(_gradients_of_autograd, 2 if axes else 1, config, **axes):
        assert by_gemms and not by_gemms & by_autograd
        assert by_gemms == {name for name in by_gemms | by_autograd if "experts.mlp" in name}


# Grids of zero1 against one rank: test_grids.py.
@pytest.mark.parametrize(
    ("engine", "world", "axes"),
    [
        (["engine=zero1"], 1, {}),
        (["engine=zero1"], 3, {}),
        (["engine=fsdp"], 3, {}),
        (["engine=fsdp"], 4, {"tp": 2, "ep": 2}),
        # Experts are whole in blocks of 2 ranks, and in two shards in blocks of 4.
        (["engine=fsdp", "engine.shard_within=2"], 4, {"ep": 2}),
        (["engine=fsdp", "engine.shard_within=4"], 8, {"tp": 2, "cp": 2, "ep": 2}),
    ],
    ids=str,
)
def test_updates_equal_those_of_fsdp_on_one_rank(expected, tmp_path, engine, world, axes):
    sizes = (f"parallel.{axis}={size}" for axis, size in axes.items())
    config = tiny_run(tmp_path, *SIZES, *STEP, *engine, *sizes)
    config.check_world_size(world)
    for found, held_out, weights, moments in run_ranks(_two_steps, world, config, **axes):
        assert found == [pytest.approx(step, rel=1e-10) for step in expected[0]]
        assert held_out == pytest.approx(expected[1], rel=1e-10)
        for right, own in ((expected[2], weights), (expected[3], moments)):
            for name, value in right.items():
                assert relative_error(own[name], value) < 1e-9, name


def _moments(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    trainer.train()
    return weights_of(trainer), {
        name: whole(state["exp_avg"]) for name, state in trainer.engine.snapshot()["optimizer"].items()
    }


def test_bfloat16_moments(tmp_path):
    """Two steps are those of float32 moments but for their rounding, and a run may go on with either."""
    shared = [*SIZES, *STEP, "recipe.eval_interval=0", "recipe.warmup_steps=0", "recipe.decay_steps=0"]
    shared += ["engine.precision=float32", "checkpoint.resume=auto"]
    rounded = tiny_run(tmp_path / "rounded", *shared, "recipe.steps=2", "engine.moments=bfloat16")
    right = run_ranks(_moments, 1, tiny_run(tmp_path / "right", *shared, "recipe.steps=2"))[0]
    weights, moments = run_ranks(_moments, 2, rounded)[0]
    assert {x.dtype for x in moments.values()} == {torch.bfloat16} and right[1].keys() == moments.keys()
    for name, value in right[1].items():
        assert 0 < relative_error(moments[name].float(), value) < 2**-8, name
        assert relative_error(weights[name], right[0][name]) < 1e-4, name
    more = tiny_run(tmp_path / "rounded", *shared, "recipe.steps=3")
    _, moments = run_ranks(_moments, 1, more)[0]
    assert {x.dtype for x in moments.values()} == {torch.float32}
    assert any(not torch.equal(x, x.bfloat16().float()) for x in moments.values())


# One expert, so that its matrices are cut over ranks along two or three dimensions, also beside etp's.
ONE_EXPERT = ["model.num_experts=1", "model.experts_per_token=1", "recipe.eval_interval=0", "checkpoint.resume=auto"]
ONE_EXPERT += ["recipe.warmup_steps=0", "recipe.decay_steps=0"]


def _trained(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    trainer.train()
    return weights_of(trainer), sum(x.numel() for x in map(local, trainer.engine.snapshot()["model"].values()))


@pytest.mark.parametrize("axes", [{}, {"etp": 2}], ids=str)
def test_fewer_experts_than_ranks(tmp_path, axes):
    """The shards are as small as they can be; two steps on four ranks go on as a third on one."""
    shared = [*SIZES, *STEP, *ONE_EXPERT]
    ((right, elements),) = run_ranks(_trained, 1, tiny_run(tmp_path / "right", *shared, "recipe.steps=3"))
    sizes = [f"parallel.{axis}={size}" for axis, size in axes.items()]
    ranks = run_ranks(_trained, 4, tiny_run(tmp_path / "run", *shared, *sizes, "recipe.steps=2"), **axes)
    assert sum(held for _, held in ranks) == elements
    ((weights, _),) = run_ranks(_trained, 1, tiny_run(tmp_path / "run", *shared, "recipe.steps=3"))
    for name, value in right.items():
        assert relative_error(weights[name], value) < 1e-9, name
