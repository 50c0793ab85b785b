"""What the FSDP engine says of itself, and that a step of it never makes the host wait for a GPU."""

from math import prod

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from minimax_train.engines import ENGINES
from minimax_train.errors import ConfigError
from minimax_train.parallel.cost import Machine
from minimax_train.parallel.grid import GridSizes
from minimax_train.parallelize import whole_layouts
from minimax_train.planner.machine import MACHINES
from minimax_train.planner.plan import Cluster, plan_run
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import DIVISIBLE, tiny_run

SIZES = [*DIVISIBLE, "engine=fsdp", "engine.precision=float32", "data.sequence_length=96"]


def _ranks_that_share_each_parameter(grid, config):
    """By parameter, the ranks over which FSDP sums its gradient; and this rank's figures."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    found = {}
    for module in trainer.engine.model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    found[parameter.sharded_param] = sorted(
                        dist.get_process_group_ranks(group._all_gather_process_group)
                    )
    trainer.loader.close()
    names = {parameter: name for name, parameter in trainer.engine.parameters.items()}
    figures = trainer.engine.figures(trainer.plan())
    return {names[p]: ranks for p, ranks in found.items()}, figures


def test_gradients_are_summed_over_the_ranks_that_hold_the_same_part(tmp_path):
    """Eight ranks as dp 2 x cp 2 x tp 2 and edp 2 x ep 2 x etp 2, rank numbers written out."""
    axes = {"cp": 2, "tp": 2, "ep": 2, "etp": 2}
    config = tiny_run(tmp_path, *SIZES, *(f"parallel.{axis}={size}" for axis, size in axes.items()))
    for rank, (shared, figures) in enumerate(run_ranks(_ranks_that_share_each_parameter, 8, config, **axes)):
        for name, ranks in shared.items():
            if "experts.mlp" in name:
                expected = [rank % 4, rank % 4 + 4]
            elif ".attention." in name or name in ("embedding.weight", "head.weight"):
                expected = [r for r in range(8) if r % 2 == rank % 2]
            else:
                expected = list(range(8))
            assert ranks == expected, (rank, name)
        assert figures.keys() == {"data_parallel_gib"}


@pytest.mark.parametrize(("reshard", "gathers"), [("true", 2), ("false", 1)])
def test_bytes_of_data_parallelism(tmp_path, reshard, gathers):
    """Two ranks: each receives half of every gathered weight and half of every gradient, once per micro-batch."""
    config = tiny_run(tmp_path, *SIZES, f"engine.reshard_after_forward={reshard}")
    for _, figures in run_ranks(_ranks_that_share_each_parameter, 2, config):
        model = config.model
        D, width, V = model.hidden_size, model.num_heads * model.head_dim, model.vocab_size
        kv = model.num_kv_heads * model.head_dim
        outside = 2 * V * D + D
        lightning, softmax = 5 * D * width + width, 2 * D * width + 2 * D * kv
        rest = 2 * D + model.num_experts * D + 3 * model.num_experts * D * model.expert_hidden_size
        inside = 3 * lightning + softmax + 4 * rest  # LLSL
        received = (outside * (4 + 4) + inside * (4 * gathers + 4)) / 2 * 2  # two micro-batches of one sequence
        assert figures["data_parallel_gib"] == pytest.approx(received / 2**30)


def test_hybrid_sharding_sends_little_between_blocks(tmp_path):
    """16 ranks, ep=4, blocks of 8: dense parameters in 8 shards, a rank's experts in 2, two copies of each."""
    options = ["engine.shard_within=8", "engine.reshard_after_forward=false", "parallel.ep=4", "data.num_streams=16"]
    options.append("recipe.global_batch_size=48")
    config = tiny_run(tmp_path, *SIZES, *options)
    config.check_world_size(16)
    layouts, grid, engine = whole_layouts(config.model), GridSizes(16, ep=4), ENGINES["fsdp"]
    experts = sum(prod(layout.shape) for name, layout in layouts.items() if "experts.mlp" in name)
    dense = sum(prod(layout.shape) for layout in layouts.values()) - experts
    step = engine.data_parallelism(config, layouts, grid, "cpu", 3)
    received = {8: 0.0, 16: 0.0}
    for each in step.transfers:
        received[each.span] += each.times * each.num_bytes
    assert received[8] == pytest.approx(3 * 2 * 4 * (dense * 7 / 8 + experts / 4 / 2), rel=0.01)
    assert received[16] == pytest.approx(4 * (dense / 8 + experts / 8), rel=0.01)
    assert step.updated == pytest.approx(dense / 8 + experts / 8, rel=0.01)
    assert engine.memory(config, layouts, grid, "cpu")["moments"] == 2 * 4 * step.updated
    network, large = (
        Cluster(16, MACHINES["h100"], Machine(gpus_per_node=8)),
        [*SIZES, *options, "model.hidden_size=2000"],
    )
    hybrid, whole = (
        plan_run(tiny_run(tmp_path, *large, f"engine.shard_within={block}"), network, 50).cost.traffic["dp"]
        for block in (8, "null")
    )
    assert hybrid.seconds < 0.5 * whole.seconds


def test_blocks_that_cannot_be(tmp_path):
    for options, said in [
        (["engine.shard_within=3"], "engine.shard_within=3: must divide the 8 ranks .* are 2 or 4"),
        (["engine.shard_within=16"], "engine.shard_within=16: must divide the 8 ranks"),
    ]:
        with pytest.raises(ConfigError, match=said):
            tiny_run(tmp_path, *SIZES, *options, "data.num_streams=8").check_world_size(8)
    config = tiny_run(tmp_path, *SIZES, "engine.shard_within=4", "parallel.etp=6", "data.num_streams=12")
    with pytest.raises(ConfigError, match=r"must be a multiple of parallel\.ep=1 x parallel\.etp=6, or divide it"):
        config.check_world_size(12)


def _steps_without_waiting(grid, config):
    trainer = Trainer(config, grid, torch.device("cuda", torch.cuda.current_device()))
    batches = trainer.next_batches(trainer.plan())
    for _ in range(3):  # kernels compile, buffers are made, graphs are captured
        trainer.engine.run(batches, trainer.plan())
        trainer.engine.norms()
        trainer.engine.step(1e-3)
    torch.cuda.set_sync_debug_mode("error")
    trainer.engine.run(batches, trainer.plan())
    trainer.engine.norms()
    trainer.engine.step(1e-3)
    torch.cuda.set_sync_debug_mode("default")
    trainer.loader.close()
    return True


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["fsdp", "zero1"])
def test_a_step_does_not_wait_for_the_gpu(tmp_path, engine):
    config = tiny_run(
        tmp_path,
        *DIVISIBLE,
        f"engine={engine}",
        "device=cuda",
        "model.hidden_size=64",
        "model.head_dim=16",
        "model.expert_hidden_size=32",
    )
    assert run_ranks(_steps_without_waiting, 1, config, device="cuda", start="spawn") == [True]
