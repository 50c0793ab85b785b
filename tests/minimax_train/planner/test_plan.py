"""Plans against engines that are really built, against published sizes, and what the command says."""

import json

import pytest
import torch

from minimax_train.config import load_config
from minimax_train.engines import ENGINES
from minimax_train.model.config import count_parameters
from minimax_train.parallel.cost import Machine
from minimax_train.parallel.grid import GridSizes
from minimax_train.parallelize import build_engine, whole_layouts
from minimax_train.phases import Phases
from minimax_train.planner.cli import main
from minimax_train.planner.dry_run import dry_run, held_bytes
from minimax_train.planner.machine import MACHINES
from minimax_train.planner.plan import Cluster, plan_run, propose
from support.distributed import run_ranks
from support.runs import DIVISIBLE, tiny_run

TEXT_01 = ["model=text-01", "data.sequence_length=8192", "recipe.global_batch_size=2560", "recipe.micro_batch_size=1"]
FOR_A_TIME = ("one parameter's gradient", "gathered weights", "whole gradients")


def _held(grid, config):
    return held_bytes(build_engine(config, grid, torch.device("cpu"), Phases()))


@pytest.mark.parametrize(
    ("world", "axes", "engine"),
    [
        (1, {}, ["engine=zero1"]),
        (4, {"tp": 2, "ep": 4}, ["engine=zero1", "engine.precision=bfloat16", "engine.moments=bfloat16"]),
        (4, {"cp": 2, "etp": 2}, ["engine=zero1", "engine.precision=bfloat16"]),
        (3, {}, ["engine=fsdp"]),
        (4, {"ep": 2}, ["engine=fsdp", "engine.shard_within=2"]),
    ],
    ids=str,
)
def test_states_take_what_is_planned(tmp_path, world, axes, engine):
    sizes = [f"parallel.{axis}={size}" for axis, size in axes.items()]
    config = tiny_run(tmp_path, *DIVISIBLE, "model.hidden_size=104", *engine, *sizes)
    planned = ENGINES[config.engine.name].memory(config, whole_layouts(config.model), GridSizes(world, **axes), "cpu")
    states = sum(size for what, size in planned.items() if what not in FOR_A_TIME)
    if config.engine.name == "fsdp":
        states -= planned["gradients"]  # which are there after a backward pass
    for held in run_ranks(_held, world, config, **axes):
        # An engine holds sums and flags besides; FSDP's shards are not the same everywhere.
        assert held == pytest.approx(states, rel=0.02 if config.engine.name == "fsdp" else 0.005)


def test_a_rank_is_built_without_memory(tmp_path):
    axes = ["parallel.tp=4", "parallel.ep=8", "data.num_streams=16", "recipe.global_batch_size=16"]
    config = tiny_run(tmp_path, *DIVISIBLE, "engine=zero1", *axes)
    plan = plan_run(config, Cluster(64, MACHINES["h100"], Machine()), document_tokens=50)
    states = sum(size for what, size in plan.memory.items() if not what.startswith(("activations", *FOR_A_TIME)))
    _, num_bytes = dry_run(config, 64)
    assert num_bytes == pytest.approx(states, rel=0.005)


def test_text_01():
    """Sizes of arXiv 2501.08313, section 2."""
    count = count_parameters(load_config(TEXT_01).model)
    assert count.total == pytest.approx(456e9, rel=1e-3) and count.active_in_layers == pytest.approx(45.9e9, rel=1e-3)


def test_proposals():
    config = load_config([*TEXT_01, "model.num_layers=8"])
    plans = propose(config, Cluster(40, MACHINES["h200"], Machine()), document_tokens=4000)
    assert len(plans) > 3 and plans == sorted(plans, key=lambda plan: plan.cost.seconds)
    best, count = plans[0], count_parameters(config.model)
    assert best.fits and 0.2 < best.mfu < 0.6
    # Six times the parameters that a token passes, and little else; a replica's states, at least, on its GPUs.
    flops = 6 * (count.active_in_layers + config.model.vocab_size * config.model.hidden_size)
    rate = best.mfu * 40 * MACHINES["h200"].peak_flops_per_s
    assert rate / best.tokens_per_s == pytest.approx(flops, rel=0.03)
    assert sum(best.memory.values()) * 40 > 18 * count.total


def test_expert_weights_are_cut_beyond_their_number():
    """Each of 2,048 ranks holds a 64th of what the ranks hold together that share an expert: nothing is padded."""
    config = load_config([*TEXT_01, "parallel.tp=8", "parallel.ep=32", "data.num_streams=256"])
    grid, layouts = GridSizes(2048, tp=8, ep=32), whole_layouts(config.model)
    for name in ("gate_up_proj", "down_proj"):
        layout = layouts[f"layers.0.experts.mlp.{name}"]
        assert len(layout.cut(grid)) > 1
    memory = ENGINES["zero1"].memory(config, layouts, grid, "cuda")
    total = count_parameters(config.model).total
    assert memory["moments"] == pytest.approx(8 * total / 2048, rel=0.01)


def test_the_command(capsys):
    tiny = ["model=tiny", "data.sequence_length=96", "recipe.global_batch_size=8", "recipe.micro_batch_size=1"]
    assert main([*tiny, "world_size=4", "--machine", "h200"]) == 0
    out = capsys.readouterr().out
    assert "grids that fit" in out and "4 x h200" in out and "MFU" in out and "rank 0 of 4" in out
    assert main(["model=tiny", "world_size=24", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["proposals"]) > 3 and told["compute_s"]["optimizer"] > 0
    assert main([*tiny, "world_size=4", "parallel.tp=2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parallel"]["tp"] == 2 and told["proposals"] == [] and told["traffic"]["tp"]["num_bytes"] > 0
    assert main([*tiny, "world_size=2", "parallel.ep=2", "engine=deepspeed"]) == 0
    assert "engine=deepspeed" in (out := capsys.readouterr().out) and "built" not in out
    assert main(["model=proxy", "recipe.micro_batch_size=1", "recipe.global_batch_size=1"]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["world_size=0"], "world_size='0': must be a whole number from 1"),
        (["world_size=3", "parallel.tp=2"], "parallel.tp=2: must divide the number of processes, 3"),
        (["model=text-01", "model.num_layers=8", "world_size=2"], "no grid fits"),
        (["--gpus-per-node", "x"], "--gpus-per-node='x': must be a whole number"),
        (["recipe.global_batch_size=3", "world_size=2", "parallel.tp=1"], "recipe.global_batch_size"),
    ],
)
def test_refusals(capsys, arguments, said):
    assert main(["model=tiny", *arguments]) == 2
    assert said in capsys.readouterr().err
