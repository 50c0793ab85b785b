"""A rank whose weights differ from its replicas' by a bit is named."""

import socket

import pytest
import torch

from minimax_train.errors import ConfigError, TrainingError
from minimax_train.replicas import check_replicas
from minimax_train.trainer import Trainer
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
    held = {name: axis for name, (_, axis) in trainer.engine.replicas().items()}
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
    assert held[norm] == held[router] == "dp_cp_tp" and held[split] == "dp_cp"
    assert lines == [
        "",
        f"rank 2 (host {HOST}) against 3 others: {norm}",
        f"ranks 1 (host {HOST}), 3 (host {HOST}) differ from each other: {split}",
        f"rank 1 (host {HOST}) against 3 others: {norm}, {router}",
        f"rank 2 (host {HOST}) against 3 others: {norm}; rank 0 (host {HOST}) against 3 others: {router}",
    ]


def test_refused_where_nothing_is_held_twice(tmp_path):
    with pytest.raises(ConfigError) as caught:
        tiny_run(tmp_path, "engine=fsdp", "parallel.check_replicas=10")
    assert str(caught.value) == ("parallel.check_replicas=10: must be 0 with engine=fsdp, which holds no weight twice")
