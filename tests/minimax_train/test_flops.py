"""FLOPs of a training step against counts of the model's own parameters and of its documents' pairs of tokens."""

import sys
from pathlib import Path

import pytest
import torch

from minimax_train.data import build_train_loader, load_tokenizer
from minimax_train.metrics.flops import training_flops
from minimax_train.model import HybridModel
from minimax_train.recipe import Progress, Recipe
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import gradients_of_a_step, model_config, tiny_run


def test_six_per_parameter_and_what_attentions_add():
    config, tokens, scores = model_config(), 77, 1003
    with torch.device("meta"):
        model = HybridModel(config)
    passed = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("embedding"):
            of_experts = "experts.mlp" in name
            share = config.experts_per_token / config.num_experts if of_experts else 1
            passed += parameter.numel() * share
    width = config.num_heads * config.head_dim
    lightning, softmax = 3 * 4 * width * config.head_dim * tokens, 3 * 4 * width * scores
    layers = config.layer_pattern * (config.num_layers // len(config.layer_pattern))
    expected = 6 * tokens * passed + layers.count("L") * lightning + layers.count("S") * softmax
    assert abs(training_flops(config, tokens, scores) / expected - 1) < 1e-12


GRIDS = {"one": {}, "dp": {"tp": 1}, "cp": {"cp": 2}}


def _scores(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    return gradients_of_a_step(trainer)[0]["scores"]


def test_scores_are_pairs_of_tokens_of_a_document_on_any_grid(tmp_path):
    config = tiny_run(tmp_path, "data.sequence_length=64", "checkpoint.resume=auto", "recipe.micro_batch_size=2")
    plan = Recipe(config).at(Progress(), {})
    measured = {name: run_ranks(_scores, 2 if grid else 1, config, **grid) for name, grid in GRIDS.items()}
    tokenizer = load_tokenizer(f"{config.run_dir}/tokenizer")
    loader = build_train_loader(config.data, tokenizer, dp_rank=0, dp_size=1, seed=config.seed)
    pairs = 0
    for batch in loader.next_micro_batches(plan):
        starts_T = torch.zeros(batch.documents.num_tokens, dtype=torch.int64)
        starts_T[batch.documents.cu_seqlens_cpu[:-1].long()] = 1
        document_T = starts_T.cumsum(0)
        pairs += int((document_T[:, None] == document_T[None, :]).tril().sum())
    assert measured == {name: [pairs] * (2 if grid else 1) for name, grid in GRIDS.items()}


def _benchmark(grid, config):
    """A rank's FLOPs of three steps, by benchmarks/training.py and by the metrics of the same steps."""
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    from training import timed

    trainer, told = Trainer(config, grid, torch.device("cpu")), []
    trainer.metrics(trainer.train_step())
    metrics = trainer.metrics
    trainer.metrics = lambda step: told.append(metrics(step)) or told[-1]
    found = timed(trainer, 3)
    trainer.loader.close()
    # Rates times seconds, by the clock of each.
    return 3 * found["TFLOP/s"] * found["ms"] / 1e3, sum(each["tflops_per_rank"] * each["seconds"] for each in told)


def test_the_benchmark_and_the_metrics_say_the_same(tmp_path):
    config = tiny_run(tmp_path, "data.sequence_length=64", "parallel.cp=2")
    for found, expected in run_ranks(_benchmark, 2, config, cp=2):
        assert found == pytest.approx(expected, rel=1e-9) and found > 0
