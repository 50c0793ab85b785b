"""A stage may change length, batch and RoPE base: everyone follows the plan of the step."""

import dataclasses
import json
import warnings

import matplotlib.figure  # noqa: F401  this and torch._dynamo so that processes forked from this one need not
import pytest
import torch
import torch._dynamo
import torch.distributed.checkpoint as dcp
from transformers import MiniMaxForCausalLM

from minimax_train.config import read_config
from minimax_train.convert.cli import main as convert
from minimax_train.documents import Documents
from minimax_train.model import HybridModel
from minimax_train.recipe import Recipe
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import DIVISIBLE, tiny_run

STAGES = ["recipe.steps=null", "recipe.decay_steps=null", "recipe.min_learning_rate=null"]
STAGES += ["recipe.stages.short.steps=3", "recipe.stages.short.min_learning_rate=1e-3"]
# 2.5 steps of 8 x 48 tokens: three.
LATER = ["tokens=960", "sequence_length=48", "rope_base=5000", "global_batch_size=8", "micro_batch_size=2"]
STAGES += [f"recipe.stages.long.{setting}" for setting in LATER]
BY_HAND = ["data.sequence_length=48", "model.rope_base=5000", "recipe.global_batch_size=8"]
BY_HAND += ["recipe.micro_batch_size=2", "recipe.learning_rate=1e-3", "recipe.warmup_steps=0", "recipe.decay_steps=0"]
SHARED = [*DIVISIBLE, "engine.precision=float64", "recipe.eval_interval=2"]
NUMBERS = ("step", "loss", "grad_norm", "tokens", "learning_rate", "validation_loss", "unigram_loss")


def _train(grid, config, stop_after=None):
    trainer = Trainer(config, grid, torch.device("cpu"))
    if stop_after is None:
        trainer.train()
    while stop_after is not None and trainer.progress.step < stop_after:
        taken = trainer.train_step()
        trainer.report(taken)
        if trainer.progress.step == stop_after:
            trainer.save(taken.plan)
    trainer.log.close()
    trainer.loader.close()
    return trainer.progress.policy


def _records(folder):
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name in NUMBERS} for line in lines]


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    run_ranks(_train, 2, tiny_run(folder, *SHARED, *STAGES, "parallel.cp=2", "checkpoint.keep=0"), cp=2)
    return folder


def test_a_change_of_stage_is_a_restart_with_other_settings(tmp_path, staged):
    """The same run by hand: stopped before the change, continued with a configuration that begins there."""
    until = ["recipe.steps=3", "recipe.decay_steps=null", "recipe.min_learning_rate=1e-3"]
    run_ranks(_train, 1, tiny_run(tmp_path, *SHARED, *until))
    run_ranks(_train, 1, tiny_run(tmp_path, *SHARED, "recipe.steps=6", *BY_HAND, "checkpoint.resume=auto"))
    expected, found = _records(tmp_path), _records(staged)
    # Of every step; of the evaluations after 2 and 4, and at the ends after 3 and 6.
    assert [record["step"] for record in found] == [1, 2, 2, 3, 3, 4, 4, 5, 6, 6]
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-10)
    assert found[-2]["tokens"] == 3 * 4 * 96 + 3 * 8 * 48
    assert [record["learning_rate"] for record in found[-3:-1]] == [pytest.approx(1e-3)] * 2


def test_a_staged_run_resumes_across_the_edge_and_after_it(tmp_path, staged):
    config = tiny_run(tmp_path, *SHARED, *STAGES, "parallel.cp=2", "checkpoint.resume=auto")
    assert run_ranks(_train, 2, config, 3, cp=2)[0] == {"stage": "short", "began": [0, 0]}
    assert run_ranks(_train, 2, config, 4, cp=2)[0] == {"stage": "long", "began": [3, 1152]}
    run_ranks(_train, 2, config, cp=2)
    found = [record for record in _records(tmp_path) if "loss" in record]
    assert found == [record for record in _records(staged) if "loss" in record]


def test_a_checkpoint_is_of_the_stage_it_was_written_in(tmp_path, staged):
    """Its configuration is what an export needs; transformers computes the same logits with it, and no others."""
    tokens = torch.randint(308, (40,), generator=torch.Generator().manual_seed(0))
    for step, (base, length) in {3: (100.0, 96), 6: (5000.0, 48)}.items():
        checkpoint, exported = staged / f"run/checkpoints/step-{step:08d}", tmp_path / str(step)
        saved = read_config(checkpoint / "config.yaml")
        assert (saved.model.rope_base, saved.data.sequence_length) == (base, length)
        stages = [(s.rope_base, s.sequence_length, s.batches) for s in Recipe(saved).stages]
        assert stages == [(100.0, 96, ((0, 384),)), (5000.0, 48, ((0, 384),))], "the whole run's, as they were"
        assert convert(["to-hf", str(checkpoint), str(exported)]) == 0
        assert json.loads((exported / "config.json").read_text())["max_position_embeddings"] == length
        theirs = MiniMaxForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = theirs(tokens[None]).logits[0]
            for other, fits in [(base, True), (base * 10, False)]:
                ours = HybridModel(dataclasses.replace(saved.model, rope_base=other)).to(torch.float64)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    dcp.load({"model": ours.state_dict()}, checkpoint_id=checkpoint, no_dist=True)
                difference = (ours.eval().float()(tokens, Documents.from_lengths([40])) - logits).abs().max()
                assert (difference < 1e-5) == fits, difference
