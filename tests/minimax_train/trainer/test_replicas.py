"""A rank whose weights differ from its replicas' by a bit is named."""

import socket

import pytest
import torch

from minimax_train.errors import ConfigError, TrainingError
from minimax_train.replicas import check_replicas
from minimax_train.trainer import Trainer
from support.conformance import import_deepspeed
from support.distributed import run_ranks
from support.runs import DIVISIBLE, tiny_run

HOST = socket.gethostname()


def _flip(engine, name):
    """The last bit of a number in the middle."""
    weight = engine.parameters[name].data
    weight = (weight.to_local() if hasattr(weight, "to_local") else weight).view(-1)
    weight[weight.numel() // 2 :][:1].view(torch.int32).bitwise_xor_(1)


def _told(grid, config, flips):
    """What is said when some ranks have changed some weights; changed back afterwards."""
    trainer = Trainer(config, grid, torch.device("cpu"))
    trainer.train_step()
    lines = []
    for changes in flips:
        mine = [name for rank, name in changes if rank == torch.distributed.get_rank()]
        for name in mine:
            _flip(trainer.engine, name)
        try:
            check_replicas(trainer.engine.replicas(), grid, 1)
            lines.append("")
        except TrainingError as error:
            lines.append(str(error).partition("(parallel.check_replicas): ")[2])
        for name in mine:
            _flip(trainer.engine, name)
    replicas = trainer.engine.replicas().items()
    held = {name: torch.distributed.get_process_group_ranks(ranks) for name, (_, ranks) in replicas}
    trainer.loader.close()
    return lines, held


def test_who_differs_is_named(tmp_path):
    """Four ranks, of which tp splits embedding and attention: their parts have two replicas, a norm has four."""
    config = tiny_run(tmp_path, *DIVISIBLE, "parallel.tp=2")
    norm, router, split = "layers.1.expert_norm.weight", "layers.2.experts.router.weight", "embedding.weight"
    flips = [[], [(2, norm)], [(3, split)], [(1, norm), (1, router)], [(2, norm), (0, router)]]
    results = run_ranks(_told, 4, config, flips, tp=2)
    lines, held = results[0]
    assert all(found == lines for found, _ in results)
    assert held[norm] == held[router] == [0, 1, 2, 3] and held[split] == [0, 2]
    assert lines == [
        "",
        f"rank 2 (host {HOST}) against 3 others: {norm}",
        f"ranks 1 (host {HOST}), 3 (host {HOST}) differ from each other: {split}",
        f"rank 1 (host {HOST}) against 3 others: {norm}, {router}",
        f"rank 2 (host {HOST}) against 3 others: {norm}; rank 0 (host {HOST}) against 3 others: {router}",
    ]


ENGINES = {
    "zero 2": (["engine=deepspeed", "engine.stage=2", "parallel.ep=2"], [0, 2], [0, 1, 2, 3]),
    "hybrid": (["engine=fsdp", "engine.shard_within=2", "parallel.ep=2"], [0, 2], [0, 2]),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_copies_under_other_engines(tmp_path, kind):
    """Experts that two ranks hold; weights that are whole on all, or shards that another block has as well."""
    options, sharing_experts, sharing_others = ENGINES[kind]
    options = [*options, "model.num_layers=2", "model.layer_pattern=LS"]
    config = tiny_run(tmp_path, *DIVISIBLE, *options, "parallel.check_replicas=1", "engine.precision=float32")
    config.check_world_size(4)
    import_deepspeed()
    expert, router = "layers.1.experts.mlp.down_proj", "layers.0.experts.router.weight"
    lines, held = run_ranks(_told, 4, config, [[], [(2, expert)], [(0, router)]], ep=2)[0]
    assert held[expert] == sharing_experts and held[router] == sharing_others
    differ = f"ranks 0 (host {HOST}), 2 (host {HOST}) differ from each other"
    alone = differ if len(sharing_others) == 2 else f"rank 0 (host {HOST}) against 3 others"
    assert lines == ["", f"{differ}: {expert}", f"{alone}: {router}"]


def test_refused_where_nothing_is_held_twice(tmp_path):
    for engine in ("engine=fsdp", "engine.shard_within=2"):
        config = tiny_run(tmp_path, "engine=fsdp", engine, "parallel.check_replicas=10")
        with pytest.raises(
            ConfigError, match=r"check_replicas=10: must be 0 with engine=fsdp, which holds no weight t"
        ):
            config.check_world_size(2)
