"""Runs over pipeline stages: the same numbers as on one rank, in gradients, metrics, evaluations and checkpoints."""

import json
from collections import Counter

import pytest
import torch

from minimax_train.config import load_config
from minimax_train.errors import ConfigError, TrainingError
from minimax_train.model.sharding import local
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.parallelize import parts_of_rank
from minimax_train.planner.cost import stage_costs
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import TIMEOUT, run_ranks
from support.gathers import weight_gathers
from support.pipelines import Case, check
from support.runs import DIVISIBLE, gradients_of, gradients_of_a_step, tiny_run, weights_of

INTERLEAVED, ZERO_BUBBLE, DUALPIPE_V = (
    f"parallel.pp_schedule={name}" for name in ("interleaved_1f1b", "zero_bubble", "dualpipe_v")
)
POOLS = ("model.capacity_factor=0.8", "model.capacity_scope=global", "model.aux_loss_scope=global")
FULL, SELECTIVE = (f"recipe.activation_checkpointing={kind}" for kind in ("full", "selective"))
CASES = [
    Case(2, {"pp": 2}, POOLS, (INTERLEAVED, FULL)),
    Case(4, {"pp": 4}, (), (SELECTIVE,)),
    Case(4, {"pp": 2, "cp": 2, "etp": 2}, (), (INTERLEAVED, "engine.reshard_after_forward=true")),
    Case(4, {"pp": 2, "tp": 2, "ep": 2}, POOLS, (ZERO_BUBBLE, FULL)),
]


def test_gradients_equal_one_rank(tmp_path):
    """More of them: tests/lib/support/pipelines.py."""
    assert check(tmp_path, CASES) == []


def _gradients_of_each(_, configs):
    found = []
    for config in configs:
        trainer = Trainer(config, ProcessGrid.create("cpu", TIMEOUT, **config.parallel.grid), torch.device("cpu"))
        gradients_of_a_step(trainer)
        found.append(gradients_of(trainer))
        trainer.loader.close()
    return found


def test_gradients_have_the_same_bits_under_every_schedule(tmp_path):
    """In bfloat16, summed over six micro-batches in float32: passes of weights add as backward passes do."""
    shared = ["engine=fsdp", "engine.precision=bfloat16", "parallel.pp=3", "recipe.global_batch_size=6"]
    shared += ["model.num_layers=6", "model.layer_pattern=LLSLLS", "data.num_streams=6", "data.sequence_length=31"]
    schedules = ("parallel.pp_layers=[1,3,2]", ZERO_BUBBLE, f"{DUALPIPE_V} engine.reshard_after_forward=true")
    configs = [tiny_run(tmp_path / str(i), *shared, *text.split()) for i, text in enumerate(schedules)]
    for expected, *others in run_ranks(_gradients_of_each, 3, configs):
        for found in others:
            assert found.keys() == expected.keys()
            assert all(x.dtype == torch.float32 and torch.equal(x, expected[name]) for name, x in found.items())


def _train(grid, config, until):
    """Steps up to that one, an evaluation and a save, or to the end; and over stages with data parallelism how often
    each block's weights are gathered in the first step."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    if grid.size("pp") == 1 or grid.size("dp") == 1:
        taken, gathers = trainer.train_step(), Counter()
    else:
        taken, gathers = weight_gathers(trainer.train_step)
    if until is None:
        trainer.report(taken)
        trainer.train()
    else:
        trainer.report(taken)
        if trainer.evaluation is not None:
            trainer.log.report(trainer.progress.step, trainer.evaluate(taken.plan))
        trainer.save(trainer.plan(), must_succeed=True)
    trainer.log.close()
    trainer.loader.close()
    return weights_of(trainer), gathers


def _records(folder):
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    found = {}
    for record in map(json.loads, lines):
        found.setdefault(record["step"], {}).update(record)
    return found


def test_a_run_goes_on_over_other_stages(tmp_path):
    """One step on one rank each: over two stages, over four with data parallelism, and without any under zero1."""
    shared = [*DIVISIBLE, "engine.precision=float64", "recipe.steps=3", "recipe.eval_interval=1", "checkpoint.keep=0"]
    shared += ["checkpoint.resume=auto", "checkpoint.interval=100", "recipe.decay_steps=1", "recipe.warmup_steps=1"]
    ((right, _),) = run_ranks(_train, 1, tiny_run(tmp_path / "right", *shared, "engine=fsdp"), None)
    staged = [*shared, "engine=fsdp", "parallel.pp=2"]
    run_ranks(_train, 2, tiny_run(tmp_path / "run", *staged, INTERLEAVED), 1, pp=2)
    config = tiny_run(tmp_path / "run", *staged, ZERO_BUBBLE)
    config.check_world_size(4)
    for rank, (_, gathers) in enumerate(run_ranks(_train, 4, config, 2, pp=2)):
        # Once in a step of two micro-batches: kept from the first pass to the last.
        blocks = {name: times for name, times in gathers.items() if "layers." in name}
        assert set(blocks.values()) == {1} and len(blocks) == 2, gathers
        assert all(f"layers.{layer}" in " ".join(blocks) for layer in ((0, 3) if rank < 2 else (1, 2)))
    ((weights, _),) = run_ranks(_train, 1, tiny_run(tmp_path / "run", *shared, "engine=zero1"), None)
    for name, weight in right.items():
        assert relative_error(weights[name], weight) < 1e-9, name
    found, expected = _records(tmp_path / "run"), _records(tmp_path / "right")
    assert found.keys() == expected.keys() == {1, 2, 3}
    for step, ranks in ((1, 2), (2, 4), (3, 1)):
        record, other = found[step], expected[step]
        timed = ("seconds", "slowest_", "fullest_", "host_memory", "tokens_per_second", "tflops", "data_", "mixture")
        same = [name for name in other if not name.startswith(timed)]
        assert {"loss", "aux_loss", "grad_norm", "validation_loss", "router_entropy", "expert_load_max"} <= set(same)
        assert {name: record[name] for name in same} == pytest.approx({name: other[name] for name in same}, rel=1e-10)
        # FLOPs of the whole model, over all ranks.
        flops = record["tflops_per_rank"] * ranks * record["seconds"]
        assert flops == pytest.approx(other["tflops_per_rank"] * other["seconds"])


def _poisoned(grid, config):
    """NaN in a weight of the first stage; the message."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    start = weights_of(trainer)
    name = "layers.1.attention.o_proj.weight"
    with torch.no_grad():
        if name in trainer.engine.parameters:
            local(trainer.engine.parameters[name])[0, 0] = float("nan")
    with pytest.raises(TrainingError) as caught:
        trainer.metrics(trainer.train_step())
    trainer.loader.close()
    return start, str(caught.value)


def test_initial_weights_and_a_stop_that_names_the_tensor(tmp_path):
    """Weights come from a checkpoint of one rank; a NaN of the first stage ends the run on both."""
    shared = ["engine=fsdp", "recipe.eval_interval=0"]
    ((right, _),) = run_ranks(_train, 1, tiny_run(tmp_path / "one", *shared, "checkpoint.resume=auto"), 1)
    config = tiny_run(
        tmp_path / "two", *shared, "parallel.pp=2", f"checkpoint.initial_weights={tmp_path}/one/run", "seed=3"
    )
    for start, message in run_ranks(_poisoned, 2, config, pp=2):
        assert start.keys() == right.keys()
        assert all(torch.equal(start[name], weight) for name, weight in right.items())
        assert message.startswith("step 1: loss nan, gradient norm nan; not finite: parameters: layers.1.attention.o_p")
        assert "computation: layers.1.attention.o_proj, layers.1.attention, layers.1" in message


def test_costly_parts_get_fewer_layers():
    """Of MiniMax-Text-01: 80 layers, each eighth softmax attention, and a vocabulary of 200,064."""
    config = load_config(["model=text-01", "engine=fsdp", "parallel.pp=8", "parallel.tp=8", "parallel.ep=32"])
    costs = stage_costs(config)
    assert costs.layers[7] != costs.layers[0] == costs.layers[8] and costs.head > costs.embedding > 0
    parts = [part for rank in range(8) for part in parts_of_rank(config, rank)]
    assert [layer for part in parts for layer in part.layers] == list(range(80))
    assert [part.is_first for part in parts] == [True] + [False] * 7
    assert [part.is_last for part in parts] == [False] * 7 + [True]
    every = [sum(costs.layers[layer] for layer in part.layers) for part in parts]
    every[0], every[-1] = every[0] + costs.embedding, every[-1] + costs.head
    assert max(every) < 1.1 * sum(every) / 8
    assert len(parts[-1].layers) < 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine=zero1"], r"parallel.pp=2: must be 1 with engine=zero1: pipeline stages run with engine=fsdp"),
        (["parallel.pp=5"], r"parallel.pp=5: must be at most 4: each stage, 1 on every rank .*model.num_layers=4"),
        (
            ["parallel.pp=3", INTERLEAVED],
            r"parallel.pp=3: must be at most 2: each stage, 2 on every rank .*interleaved",
        ),
        (["parallel.pp_layers=[4,0]"], r"parallel.pp_layers=.*at least 1 of each stage"),
        (["parallel.pp_layers=[2,1]"], r"parallel.pp_layers=.*must add up to model.num_layers=4, not 3"),
        (["parallel.pp_layers=[1,2,1]"], r"parallel.pp_layers=.*must be the layers of 2 stages"),
        (["parallel.pp_layers=[2,2]", INTERLEAVED], r"parallel.pp_layers=.*a multiple of parallel.pp=2 .* at least 4"),
        (["parallel.pp=1", "parallel.pp_layers=[4]"], r"parallel.pp_layers=\['4'\]: must be \[\] with parallel.pp=1"),
        (["parallel.pp_schedule=gpipe"], r"parallel.pp_schedule='gpipe': must be one of 1f1b, interleaved_1f1b, zero_"),
        (["parallel.pp=3", ZERO_BUBBLE], r"parallel.pp=3: must be at most 2: each stage, 2 on every .*zero_bubble"),
        (["parallel.pp_layers=[1,3]", DUALPIPE_V], r"parallel.pp_layers=.*must be the layers of 4 stages: 2 on every"),
    ],
)
def test_impossible_stages_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny_run(tmp_path, "engine=fsdp", "parallel.pp=2", *overrides)


def test_ranks_that_do_not_fit_are_refused(tmp_path):
    config = tiny_run(tmp_path, "engine=fsdp", "parallel.pp=4")
    with pytest.raises(
        ConfigError, match=r"parallel.pp=4: must be at most 2, the micro-batches of a step on each of 2"
    ):
        config.check_world_size(8)
    with pytest.raises(ConfigError, match=r"parallel.pp=4: must divide the number of processes, 6"):
        config.check_world_size(6)
    config = tiny_run(tmp_path, "engine=fsdp", "parallel.pp=2", DUALPIPE_V)
    config.check_world_size(2)
    with pytest.raises(ConfigError, match=r"parallel.pp=2: must be at most 1 with .*=dualpipe_v, which takes 2 m"):
        config.check_world_size(4)
