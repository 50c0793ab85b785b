"""Checkpoints as several ranks write and read them."""

import warnings

import torch
import torch.distributed.checkpoint as dcp

from minimax_train.checkpoint.initial_weights import load_weights
from minimax_train.convert import from_hf, to_hf
from minimax_train.engines.fsdp import FSDPConfig, shard
from support.distributed import run_ranks


def _save_on_rank(grid, lab, config, folder):
    model = lab.random_model(config)
    shard(model, FSDPConfig(), grid)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)


def _load_on_rank(grid, lab, config, folder):
    model = lab.HybridModel(config)
    shard(model, FSDPConfig(), grid)
    load_weights(folder, model.state_dict())
    return {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}


def test_two_ranks_write_and_read(lab, tmp_path):
    # Three experts do not divide by two: these are cut inside the expert, and what is imported lies by expert.
    config = lab.model_config(num_experts=3)
    ours = lab.random_model(config)
    lab.save_checkpoint(ours, tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_ranks(_save_on_rank, 2, lab, config, tmp_path / "ours")
    (tmp_path / "ours" / "config.yaml").write_bytes((tmp_path / "whole" / "config.yaml").read_bytes())
    to_hf(tmp_path / "ours", tmp_path / "hf")
    assert lab.largest_difference(ours, lab.load_theirs(tmp_path / "hf")) < 1e-5
    from_hf(tmp_path / "hf", tmp_path / "back")
    for loaded in run_ranks(_load_on_rank, 2, lab, config, tmp_path / "back"):
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in ours.state_dict().items())
