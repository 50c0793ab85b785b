"""The whole model on grids that mix every axis: loss and gradients equal those of one rank."""

import random

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from minimax_train.errors import ConfigError
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import run_ranks
from support.gathers import weight_gathers
from support.runs import DIVISIBLE, gradients_of, gradients_of_a_step, tiny_run, weights_of

SIZES = [*DIVISIBLE, "engine.precision=float64", "model.aux_loss_coefficient=0.5"]


def _results(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    held_out = trainer.evaluate(trainer.plan())
    sums, norm = gradients_of_a_step(trainer)
    # On one rank that is the gradient itself, which a step may clip.
    gradients = gradients_of(trainer)
    assert float(trainer.engine.step(1e-3).gradient_norm) == pytest.approx(norm, rel=1e-10)
    weights = weights_of(trainer)
    return sums, norm, held_out, gradients, weights


def _sampled_grids(number):
    """Grids of up to 8 ranks whose axes are of sizes 1, 2 and 4, no two alike."""
    choose, found = random.Random(0), {}
    while len(found) < number:
        world = choose.choice([2, 4, 8])
        grid = {axis: choose.choice([1, 2, 4]) for axis in ("tp", "cp", "ep", "etp")}
        if world % (grid["tp"] * grid["cp"]) or world % (grid["ep"] * grid["etp"]) or max(grid.values()) == 1:
            continue
        found[world, tuple(grid.items())] = None
    return [pytest.param(world, dict(grid), id=f"{world}-{dict(grid)}") for world, grid in found]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Results of one rank by overrides, computed once."""
    done = {}

    def results(*overrides):
        if overrides not in done:
            config = tiny_run(tmp_path_factory.mktemp("one"), *SIZES, *overrides)
            (done[overrides],) = run_ranks(_results, 1, config)
        return done[overrides]

    return results


def _check(one_rank, tmp_path, world, grid, shared, more=()):
    expected, expected_norm, expected_held_out, right, right_weights = one_rank(*shared)
    config = tiny_run(tmp_path, *SIZES, *shared, *(f"parallel.{axis}={size}" for axis, size in grid.items()), *more)
    config.check_world_size(world)
    for sums, norm, held_out, gradients, weights in run_ranks(_results, world, config, **grid):
        assert sums == pytest.approx(expected, rel=1e-10)
        assert norm == pytest.approx(expected_norm, rel=1e-10)
        assert held_out == pytest.approx(expected_held_out, rel=1e-10)
        for name, gradient in gradients.items():
            assert relative_error(gradient, right[name]) < 1e-10, name
            assert relative_error(weights[name], right_weights[name]) < 1e-10, name
    return expected


@pytest.mark.parametrize(("world", "grid"), _sampled_grids(12))
def test_gradients_equal_one_rank(one_rank, tmp_path, world, grid):
    choose = random.Random(str(grid))
    shared = [f"model.capacity_factor={choose.choice(['null', '0.8'])}"]
    groups = [f"parallel.token_groups={choose.choice([1, 2, 3])}"] if grid["ep"] * grid["etp"] > 1 else []
    expected = _check(one_rank, tmp_path, world, grid, shared, groups)
    assert (expected["dropped"] > 0) == ("null" not in shared[0])


@pytest.mark.parametrize(
    ("kind", "grid"), [("selective", {"tp": 2, "ep": 2, "etp": 2}), ("full", {"tp": 2, "cp": 2, "etp": 4})], ids=str
)
def test_activation_checkpointing(one_rank, tmp_path, kind, grid):
    _check(one_rank, tmp_path, 4, grid, [], [f"recipe.activation_checkpointing={kind}"])


def _weight_gathers(grid, config):
    """How often each module's weights are gathered in one micro-batch."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    return weight_gathers(trainer.engine.run, trainer.next_batches(trainer.plan())[:1], trainer.plan())[1]


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_weights_are_gathered_once_per_pass(tmp_path, recompute):
    """Recomputing a block takes the weights that its backward pass gathers anyway, nested ones too."""
    axes = ["engine=fsdp", "parallel.tp=2", "parallel.ep=2", f"recipe.activation_checkpointing={recompute}"]
    config = tiny_run(tmp_path, *SIZES, *axes)
    for gathers in run_ranks(_weight_gathers, 4, config, tp=2, ep=2):
        blocks = {name: times for name, times in gathers.items() if "layers." in name}
        assert len(blocks) == 3 * config.model.num_layers, gathers  # a block, its attention, its experts
        assert set(blocks.values()) == {2}, gathers


def test_capacity_and_balance_over_all_ranks(one_rank, tmp_path):
    """One pool of all tokens of a micro-batch: the same when four ranks take one sequence each as when one has four."""
    shared = ["model.capacity_factor=0.8", "model.capacity_scope=global", "model.aux_loss_scope=global"]
    whole = one_rank(*shared, "recipe.micro_batch_size=4")
    done = {tuple(shared): whole}
    for world, grid in [(4, {"ep": 4}), (4, {"tp": 2, "ep": 2, "etp": 2}), (4, {"cp": 2, "ep": 2})]:
        rows = 4 * grid.get("tp", 1) * grid.get("cp", 1) // world
        more = [f"recipe.micro_batch_size={rows}"]
        _check(lambda *key: done[key], tmp_path / "-".join(grid), world, grid, shared, more)


def _kept_by_attention(grid, config):
    """Shapes of what each attention of a step keeps for backward, and of its input."""
    trainer, shapes = Trainer(config, grid, torch.device("cpu")), []

    def watched(forward):
        def run(x_tD, context):
            kept = []
            with saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
                y_tD = forward(x_tD, context)
            shapes.append((kept, tuple(x_tD.shape)))
            return y_tD

        return run

    for block in trainer.engine.model.layers:
        block.attention.forward = watched(block.attention.forward)
    trainer.engine.run(trainer.next_batches(trainer.plan())[:1], trainer.plan())
    return shapes


def test_attention_keeps_only_its_own_ranks_tokens(tmp_path):
    """Where heads are split, the input of q, k, v and gate is gathered again in backward."""
    config = tiny_run(tmp_path, *SIZES, "parallel.tp=4")
    for shapes in run_ranks(_kept_by_attention, 4, config, tp=4):
        assert len(shapes) == config.model.num_layers
        for kept, (tokens, hidden) in shapes:
            assert tokens == config.data.sequence_length // 4
            assert (tokens, hidden) in kept
            assert (config.data.sequence_length, hidden) not in kept


def test_impossible_grids_are_refused(tmp_path):
    for override, message in [
        ("parallel.tp=4", r"parallel.tp=4: must divide model.num_heads=6; the nearest that do are 3 or 6"),
        ("parallel.tp=3", r"parallel.tp=3: must divide model.num_kv_heads=2; .* 2"),
        ("parallel.ep=2", r"parallel.ep=2: must divide model.num_experts=5; the nearest that do are 1 or 5"),
        ("parallel.etp=5", r"parallel.etp=5: must divide model.expert_hidden_size=12; the nearest that do are 4 or 6"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tiny_run(tmp_path, override)
    config = tiny_run(tmp_path, *SIZES, "parallel.tp=2", "parallel.cp=2", "parallel.etp=4")
    with pytest.raises(ConfigError, match=r"parallel.cp=2, parallel.tp=2: together 4, must divide .* 6; .*cp = 1 or 3"):
        config.check_world_size(6)
    config = tiny_run(tmp_path, *SIZES, "parallel.etp=4")
    with pytest.raises(ConfigError, match=r"parallel.etp=4: must divide the number of processes, 6; .*etp = 3 or 6"):
        config.check_world_size(6)
    tiny_run(tmp_path, *SIZES, "parallel.tp=2", "parallel.etp=4").check_world_size(8)
