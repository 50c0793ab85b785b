"""Plans against engines that are really built, against published sizes, and what the command says."""

import json
import re
import warnings

import pytest
import torch

from minimax_train.config import ParallelConfig, load_config
from minimax_train.engines import ENGINES
from minimax_train.model.config import count_parameters
from minimax_train.model.sharding import local
from minimax_train.parallel.cost import Machine
from minimax_train.parallel.grid import GridSizes
from minimax_train.parallel.pipeline import table, timeline
from minimax_train.parallelize import build_engine, whole_layouts
from minimax_train.phases import Phases
from minimax_train.planner.cli import main
from minimax_train.planner.cost import equal_stages_seconds, passes_seconds
from minimax_train.planner.dry_run import dry_run, held_bytes
from minimax_train.planner.machine import MACHINES
from minimax_train.planner.plan import Cluster, plan_run
from minimax_train.planner.search import engines_with_stages, other_micro_batch, overrides_of, propose
from minimax_train.trainer import Trainer
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


def test_proposals_for_text_01(capsys):
    assert main(["model=text-01", "recipe=minimax-01", "world_size=2048"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.partition("\n\n")[0].splitlines() if "parallel." in line]
    assert len(rows) == 10 + 2 and any("parallel.pp=" in row for row in rows)
    rates = [float(row.split()[2].replace(",", "")) for row in rows[:10]]
    assert rates == sorted(rates, reverse=True)
    assert "456.1 B parameters, 45.9 B active" in out and "rank 2,047 of 2,048 on the meta device" in out


def _nbytes(grid, config):
    """Bytes of a rank's weights, gradients and moments, when the passes of a step are done."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    plan = trainer.plan()
    trainer.engine.run(trainer.next_batches(plan), plan)
    trainer.loader.close()
    trainer.log.close()
    weights = trainer.engine.parameters.values()
    states = trainer.engine.optimizer_state.values()
    return {
        "master weights": sum(local(weight).nbytes for weight in weights),
        "gradients": sum(local(weight.grad).nbytes for weight in weights),
        "moments": sum(local(state[kind]).nbytes for state in states for kind in ("exp_avg", "exp_avg_sq")),
    }


@pytest.mark.parametrize(
    ("world", "axes", "schedule", "cut"),
    [(2, {"pp": 2}, "interleaved_1f1b", "[1,1,1,1]"), (4, {"pp": 2, "ep": 2}, "1f1b", "[3,1]")],
)
def test_each_stage_takes_what_is_planned(tmp_path, world, axes, schedule, cut):
    """Sizes are even: every rank of a stage has as many elements."""
    sizes = [f"parallel.{axis}={size}" for axis, size in axes.items()]
    sizes += [f"parallel.pp_schedule={schedule}", f"parallel.pp_layers={cut}", "engine.precision=float32"]
    config = tiny_run(tmp_path, *DIVISIBLE, "engine=fsdp", "recipe.eval_interval=0", *sizes)
    plan = plan_run(config, Cluster(world, MACHINES["h100"], Machine()), document_tokens=50)
    of_stage = world // 2
    for rank, held in enumerate(run_ranks(_nbytes, world, config, **axes)):
        assert held == {what: plan.ranks[rank // of_stage].memory[what] for what in held}
        if rank % of_stage == 0:
            _, built = dry_run(config, world, rank)
            # All but gradients, which are there after a backward pass; and flags and sums.
            assert built == pytest.approx(held["master weights"] + held["moments"], rel=0.01)
    assert plan.memory_bytes == max(sum(rank.memory.values()) for rank in plan.ranks)


def _staged(*more, world=8, pp=4):
    shared = [
        "model.num_layers=16",
        "model.layer_pattern=LLLS",
        "data.sequence_length=8192",
        "recipe.micro_batch_size=1",
        "engine=fsdp",
    ]
    config = load_config(["model=medium", *shared, "data.num_streams=8", f"parallel.pp={pp}", *more])
    return plan_run(config, Cluster(world, MACHINES["h100"], Machine()), document_tokens=4000)


def test_activations_of_stages():
    """The first of four stages holds those of four micro-batches, the last of one; together they have all layers."""
    plan = _staged("parallel.pp_layers=[4,4,4,4]", "recipe.global_batch_size=32")
    held = [set(rank.activations.held_layers.values()) for rank in plan.ranks]
    assert held == [{4}, {3}, {2}, {1}]
    assert [layer for rank in plan.ranks for layer in rank.activations.held_layers] == list(range(16))
    none = _staged(
        "parallel.pp_layers=[4,4,4,4]", "recipe.global_batch_size=32", "recipe.activation_checkpointing=none"
    )
    one = _staged("recipe.global_batch_size=32", "recipe.activation_checkpointing=none", "data.num_streams=8", pp=1)
    tokens = 8192
    kept = [rank.activations.kept(tokens, none.recomputation) for rank in none.ranks]
    assert kept[0] == one.ranks[0].activations.kept(tokens, one.recomputation)
    assert kept == [kept[3] * number for number in (4, 3, 2, 1)]


@pytest.mark.parametrize(
    ("ranks", "parts", "micro_batches"), [(2, 1, 6), (3, 1, 21), (4, 2, 12), (6, 2, 60), (5, 3, 10)]
)
def test_bubble_of_equal_stages(ranks, parts, micro_batches):
    """Narayanan et al., arXiv 2104.04473, section 2.2."""
    layers = [] if parts < 3 else ["1"] * (ranks * parts)
    schedule = "1f1b" if parts == 1 else "interleaved_1f1b"
    parallel = ParallelConfig(pp=ranks, pp_schedule=schedule, pp_layers=layers)
    seconds = equal_stages_seconds(parallel, micro_batches, 7.0)
    share = 1 - 7.0 * micro_batches / ranks / seconds
    assert share == pytest.approx((ranks - 1) / (parts * micro_batches + ranks - 1))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bubble_of_a_split_backward_pass(ranks):
    """ZBV of Qi et al., arXiv 2401.10241, with passes that all take as long: idle at the beginning alone."""
    parallel, number = ParallelConfig(pp=ranks, pp_schedule="zero_bubble"), 4 * ranks
    seconds = equal_stages_seconds(parallel, number, 7.0)
    assert 1 - 7.0 * number / ranks / seconds == pytest.approx((ranks - 1) / (6 * number + ranks - 1))


def test_time_of_many_micro_batches():
    """That of some is extended to all as the whole simulation has it."""
    parallel = ParallelConfig(pp=4, pp_schedule="interleaved_1f1b")
    for number in (40, 43):

        def seconds(one):
            return (1 + one.stage % 3 / 4 + 0.5 * (one.stage == 7)) * (1 if one.kind == "F" else 2)

        every = timeline(table("interleaved_1f1b", 4, 2, number), seconds)
        whole = max(one.end for rank in every for one in rank)
        assert passes_seconds(parallel, number, seconds) == pytest.approx(whole, rel=0.03)


def test_time_and_traffic_of_stages():
    """Two ranks of half the layers each: what one of them computes, the bubble, and x and its gradients."""
    # So many tokens that no GPU waits for its host.
    shared = ["recipe.micro_batch_size=32", "recipe.global_batch_size=768", "recipe.activation_checkpointing=full"]
    one = _staged(*shared, world=1, pp=1)
    two = _staged("parallel.pp_layers=[8,8]", *shared, world=2, pp=2)
    for what in ("experts", "projections", "recomputation"):
        assert two.cost.compute_s[what] == pytest.approx(one.cost.compute_s[what] / 2)
    handed_on = 768 * 8192 * one.config.model.hidden_size * 2
    assert two.cost.traffic["pp"].num_bytes == handed_on
    four = _staged("parallel.pp_layers=[4,4,4,4]", "parallel.pp_schedule=interleaved_1f1b", *shared, world=2, pp=2)
    assert four.cost.traffic["pp"].num_bytes == 3 * handed_on  # each rank is given all but the first stage's x, or loss
    # The last rank has the head besides and computes longest: it waits for the first's first and last pass alone.
    compute = one.cost.compute_s
    layers = sum(compute.values()) - compute["head and loss"] - compute["optimizer"]
    assert two.cost.bubble_s == pytest.approx(layers / 2 / 24, rel=0.1)
    assert four.cost.bubble_s == pytest.approx(layers / 4 / 24, rel=0.2)
    assert 0.5 < two.cost.seconds / one.cost.seconds < 0.75


def test_time_of_the_host():
    """A micro-batch takes at least as long as the host's launches: more where weights are gathered or blocks computed
    again, none where a graph is replayed."""

    def waits(*overrides, world=1, pp=1):
        compute = _staged(
            "recipe.micro_batch_size=1", "recipe.global_batch_size=8", *overrides, world=world, pp=pp
        ).cost.compute_s
        return compute["waiting for the host"]

    plain, full = (waits(f"recipe.activation_checkpointing={kind}") for kind in ("none", "full"))
    assert 0 < plain < full
    stages = waits("recipe.activation_checkpointing=none", "parallel.pp_layers=[8,8]", world=2, pp=2)
    assert 0 < stages < plain / 2  # half the layers, and no gathers
    assert waits("recipe.activation_checkpointing=none", "engine.reshard_after_forward=true", world=2, pp=2) > stages
    assert waits("engine=zero1") == 0 < waits("engine=zero1", "engine.cuda_graphs=false")
    assert waits("engine=zero1", "parallel.cp=2", world=2) == 0
    assert waits("engine=zero1", "parallel.cp=2", "recipe.activation_checkpointing=full", world=2) > 0


def test_proposals_for_a_recipe_of_stages():
    """Every stage can run on them: those of more ranks than a later stage has micro-batches are left out."""
    config = load_config(["model=text-01", "model.num_layers=8", "recipe=minimax-01"])
    plans = propose(config, Cluster(2048, MACHINES["h100"], Machine()), 4000, engines=engines_with_stages(config))
    assert len(plans) >= 10 and any(plan.grid.pp > 1 for plan in plans)
    # Batches grow from 16.8 M tokens; the last stages have 1 M tokens in a sequence, and 128 of these in a batch.
    for plan in plans:
        assert 128 % plan.grid.size("dp") == 0 and 128 // plan.grid.size("dp") >= plan.grid.pp


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


def test_proposals_with_stages():
    """With the engine that runs them, where another is configured; both kinds are there to compare."""
    shared = [*TEXT_01, "model.num_layers=8", "recipe.global_batch_size=512"]
    config, cluster = load_config(shared), Cluster(32, MACHINES["h100"], Machine())
    plans = propose(config, cluster, 4000, engines=engines_with_stages(config))
    assert {plan.grid.pp > 1 for plan in plans} == {False, True}
    assert all(plan.fits and plan.step.global_batch_size == 512 for plan in plans)
    best, staged = plans[0], next(plan for plan in plans if plan.grid.pp > 1)
    assert best.tokens_per_s == max(plan.tokens_per_s for plan in plans)
    # A configuration of these overrides is planned alike.
    own = overrides_of(staged, config).split()
    assert {"engine=fsdp", f"parallel.pp={staged.grid.pp}"} <= set(own)
    assert plan_run(load_config([*shared, *own]), cluster, 4000).cost == staged.cost
    # Nor is one faster that the search passed over.
    for axes in ({"pp": 2, "tp": 8}, {"pp": 4, "ep": 8}, {"tp": 4, "ep": 16}, {"pp": 8, "tp": 2}, {"ep": 8}):
        sizes = [f"parallel.{axis}={size}" for axis, size in axes.items()]
        other = plan_run(load_config([*shared, "engine=fsdp", "data.num_streams=32", *sizes]), cluster, 4000)
        assert not other.fits or other.tokens_per_s <= best.tokens_per_s


@pytest.mark.parametrize("engine", [["deepspeed", "engine.stage=2"], ["deepspeed", "engine.stage=3"], ["megatron"]])
def test_proposals_with_other_engines(engine):
    batch = ["data.sequence_length=8192", "recipe.micro_batch_size=1", "recipe.global_batch_size=16"]
    config = load_config(["model=medium", *batch, "data.num_streams=16", f"engine={engine[0]}", *engine[1:]])
    plans = propose(config, Cluster(8, MACHINES["h100"], Machine()), document_tokens=4000)
    assert all(plan.fits for plan in plans)
    assert any(plan.grid.ep > 1 for plan in plans) == (engine[1:] != ["engine.stage=3"]), "which refuses it"
    states = 18 * count_parameters(config.model).total  # bfloat16 weights, float32 gradients, master weights, moments
    assert all(8 * sum(plan.memory.values()) > states for plan in plans)


def test_proposals_with_hybrid_sharding():
    """Grids are passed over on which fewer ranks share parameters than make a block."""
    batch = ["data.sequence_length=8192", "recipe.micro_batch_size=1", "recipe.global_batch_size=64"]
    config = load_config(["model=medium", *batch, "data.num_streams=16", "engine=fsdp", "engine.shard_within=4"])
    plans = propose(config, Cluster(8, MACHINES["h100"], Machine()), document_tokens=4000)
    assert len(plans) >= 10 and all(plan.grid.size("dp_cp_tp") in (4, 8) for plan in plans)
    with warnings.catch_warnings(action="error"):  # as of the fake groups' blocks, which the user would see
        dry_run(next(plan.config for plan in plans if plan.grid.size("dp_cp_tp") == 8), 8)


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


@pytest.mark.parametrize(
    ("size", "batch", "dp", "pp", "more"),
    [
        (16, 64, 1, 1, []),  # blocks are computed again
        (1, 96, 2, 1, ["parallel.ep=2"]),
        (16, 64, 1, 4, ["engine=fsdp"]),  # a pipeline that is hardly filled
        (32, 64, 1, 1, ["recipe.activation_checkpointing=none"]),  # does not fit
    ],
)
def test_another_micro_batch(size, batch, dp, pp, more):
    """The fastest of all into which the step can be cut, each planned as a run that is given it."""
    whole = [
        "model=medium",
        "data.sequence_length=8192",
        f"recipe.global_batch_size={batch}",
        f"parallel.pp={pp}",
        *more,
    ]
    sizes = [n for n in range(1, batch + 1) if batch // dp % n == 0 and batch // n >= dp * pp]
    able = {
        n: plan_run(
            load_config([*whole, f"recipe.micro_batch_size={n}"]), Cluster(dp * pp, MACHINES["h100"], Machine()), 4000
        )
        for n in sizes
    }
    best = max((n for n in able if able[n].fits), key=lambda n: able[n].tokens_per_s)
    other = other_micro_batch(able[size])
    assert other.fits and other.step.micro_batch_size == best != size
    assert other.step.tokens == able[size].step.tokens and other.tokens_per_s == able[best].tokens_per_s
    assert other_micro_batch(able[best]) is None


def test_stages_that_do_not_fit():
    """Of a recipe with ever longer sequences, against plans of runs of that length alone."""
    cluster, axes = Cluster(8, MACHINES["h100"], Machine()), ["model=small", "parallel.cp=4", "data.num_streams=8"]
    lengths = {"lower": 8192, "context-128k": 131072, "context-512k": 524288, "context-1m": 1048576}
    for size in (1, 4, 64):
        micro_batch = f"recipe.micro_batch_size={size}"
        plan = plan_run(load_config([*axes, "recipe=minimax-01", micro_batch]), cluster, 4000)
        tight = {stage.name for stage in plan.tight_stages}
        for name, length in lengths.items():
            sizes = [f"data.sequence_length={length}", micro_batch, f"recipe.global_batch_size={2 * size}"]
            alone = plan_run(load_config([*axes, *sizes]), cluster, 4000)
            assert (name in tight) != alone.fits, (size, name)
        if size == 1:
            other = other_micro_batch(plan)  # a larger one, but none for which a later stage would not fit
            assert not tight and not other.tight_stages and 1 < other.step.micro_batch_size < 64
    assert "context-1m" in tight and "lower" not in tight


def test_the_command(capsys):
    tiny = ["model=tiny", "data.sequence_length=96", "recipe.global_batch_size=8", "recipe.micro_batch_size=1"]
    assert main([*tiny, "world_size=4", "--machine", "h200"]) == 0
    out = capsys.readouterr().out
    assert "the fastest first" in out and "4 x h200" in out and "MFU" in out and "rank 0 of 4" in out
    # Six times the parameters, of which the attentions add little; not 0.0 of a larger unit.
    rate = re.search(r"(\S+) M active in layers, (\S+) MFLOP a token", out)
    assert 6 < float(rate[2]) / float(rate[1]) < 9.5
    assert re.search(r"^recipe +[\d,]+ tokens, \d+ s at this rate$", out, re.MULTILINE)
    assert main(["model=tiny", "world_size=24", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["proposals"]) > 3 and told["compute_s"]["optimizer"] > 0
    # A micro-batch that makes up no step of the recipe's own batch, which none of the proposals has.
    assert main(["model=tiny", "world_size=2", "recipe.micro_batch_size=3"]) == 0
    assert "recipe.global_batch_size=48" in capsys.readouterr().out
    assert main([*tiny, "world_size=4", "parallel.tp=2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parallel"]["tp"] == 2 and told["proposals"] == [] and told["traffic"]["tp"]["num_bytes"] > 0
    staged = [*tiny, "world_size=6", "engine=fsdp", "parallel.pp=3", "data.num_streams=2"]
    assert main([*staged, "model.num_layers=9", "model.layer_pattern=LLS"]) == 0
    out = capsys.readouterr().out
    assert "pp 3, dp 2" in out and "pipeline 2" in out and "waiting for other pipeline stages" in out
    assert "traffic pp" in out and all(f"rank {rank} of 6" in out for rank in (0, 2, 5))
    assert main([*tiny, "world_size=2", "parallel.ep=2", "engine=deepspeed"]) == 0
    out = capsys.readouterr().out
    assert "engine=deepspeed" in out and "built" not in out
    assert main(["model=proxy", "recipe.micro_batch_size=1", "recipe.global_batch_size=1"]) == 1
    assert "does not fit" in capsys.readouterr().out
    # By hand the other is found again, and as fast.
    medium = ["model=medium", "data.sequence_length=8192", "recipe.global_batch_size=8"]
    assert main([*medium, "recipe.micro_batch_size=1"]) == 0
    named = re.search(r"with (recipe.micro_batch_size=\d+): .* ms, (\S+ tokens/s)", capsys.readouterr().out)
    assert main([*medium, named[1], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"{told['tokens_per_s']:,.0f} tokens/s" == named[2] and told["other_micro_batch"] is None
    # Where every grid had a batch of its own, the other's step is told whole.
    assert main(["model=medium", "world_size=8"]) == 0
    named = re.search(r"with (recipe.micro_batch_size=\d+) (recipe.global_\S+): (\S+ ms)", capsys.readouterr().out)
    assert main(["model=medium", "world_size=8", "parallel.tp=1", *named.groups()[:2], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"{1e3 * told['seconds']:,.1f} ms" == named[3] and told["sequence_length"] == 2048


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["worldsize=8"], "worldsize='8': there is no such key. Did you mean world_size?"),
        (["world_size=0"], "world_size='0': must be a whole number from 1"),
        (["world_size=3", "parallel.tp=2"], "parallel.tp=2: must divide the number of processes, 3"),
        (["model=text-01", "model.num_layers=8", "world_size=2"], "no grid fits"),
        (
            ["model=text-01", "model.num_layers=8", "world_size=2"],
            "a micro-batch smaller than recipe.micro_batch_size=4",
        ),
        (["--gpus-per-node", "x"], "--gpus-per-node='x': must be a whole number"),
        (["recipe.global_batch_size=3", "world_size=2", "parallel.tp=1"], "recipe.global_batch_size"),
        (["world_size=2", "parallel.pp=2"], "parallel.pp=2: must be 1 with engine=zero1"),
        (["world_size=3", "parallel.pp=2", "engine=fsdp"], "parallel.pp=2: must divide the number of processes, 3"),
        (
            ["world_size=4", "parallel.pp=4", "engine=fsdp", "recipe.global_batch_size=8"],
            "parallel.pp=4: must be at most",
        ),
    ],
)
def test_refusals(capsys, arguments, said):
    assert main(["model=tiny", *arguments]) == 2
    assert said in capsys.readouterr().err
