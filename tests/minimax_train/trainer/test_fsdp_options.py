"""Options of ``engine=fsdp`` as a run shows them: in its losses, its collectives and the checkpoints it writes."""

import json
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp

from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.gathers import weight_gathers
from support.runs import tiny_run


def _train(grid, config):
    Trainer(config, grid, torch.device("cpu")).train()


def _train_and_count(grid, config):
    """How often each block's weights were gathered."""
    _, gathers = weight_gathers(_train, grid, config)
    return {name: times for name, times in gathers.items() if "layers." in name}


def _losses(folder):
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records for key in ("loss", "grad_norm", "validation_loss") if key in record]


def _checkpoint(folder, step):
    """Every tensor of a checkpoint, by name, in the dtype it is stored in."""
    path = folder / f"run/checkpoints/step-{step:08d}"
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(data.size, dtype=data.properties.dtype) for name, data in stored.items()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return tensors


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_keeping_gathered_weights_changes_no_number(tmp_path, recompute):
    shared = [
        "engine=fsdp",
        "engine.precision=float64",
        f"recipe.activation_checkpointing={recompute}",
        "recipe.steps=2",
    ]
    shared += ["recipe.warmup_steps=1", "recipe.decay_steps=1", "recipe.eval_interval=1"]
    gathers, losses, tensors = {}, {}, {}
    for name, ranks, reshard in [("one", 1, True), ("gathered twice", 2, True), ("kept", 2, False)]:
        config = tiny_run(tmp_path / name, *shared, f"engine.reshard_after_forward={reshard}")
        gathers[name] = run_ranks(_train_and_count, ranks, config)[0]
        losses[name], tensors[name] = _losses(tmp_path / name), _checkpoint(tmp_path / name, 2)
    # Of every block, in two steps of two micro-batches, each step before an evaluation of three. Kept weights serve the
    # whole evaluation and the first micro-batch after it.
    assert set(gathers["gathered twice"].values()) == {2 * (2 * 2 + 3)}
    assert set(gathers["kept"].values()) == {(2 + 1) + (1 + 1)}
    assert len(losses["one"]) == 2 * 3 and losses["kept"] == losses["gathered twice"]
    assert losses["kept"] == pytest.approx(losses["one"], rel=1e-10)
    assert tensors["kept"].keys() == tensors["one"].keys()
    for name, tensor in tensors["kept"].items():
        assert torch.equal(tensor, tensors["gathered twice"][name]), name
        torch.testing.assert_close(tensor, tensors["one"][name], rtol=1e-9, atol=1e-11, msg=name)


def test_bfloat16_keeps_float32_weights(tmp_path):
    """Updates of a thousandth of a bfloat16 step add up as AdamW's formula says, from one checkpoint to the next."""
    rate, steps = 1e-6, 3
    recipe = [f"recipe.steps={steps}", f"recipe.learning_rate={rate}", "recipe.min_learning_rate=1e-7"]
    recipe += [
        "recipe.warmup_steps=0",
        "recipe.decay_steps=0",
        "recipe.gradient_clip=null",
        "recipe.weight_decay=0.3",
        "recipe.eval_interval=0",
    ]
    config = tiny_run(
        tmp_path, *recipe, "engine=fsdp", "engine.precision=bfloat16", "checkpoint.interval=1", "checkpoint.keep=0"
    )
    run_ranks(_train, 2, config)
    saved = [_checkpoint(tmp_path, step) for step in range(1, steps + 1)]
    assert {tensor.dtype for tensor in saved[0].values()} == {torch.float32}
    beta1, beta2, eps = config.recipe.adam_beta1, config.recipe.adam_beta2, config.recipe.adam_eps
    names = [name.removeprefix("model.") for name in saved[0] if name.startswith("model.")]
    moved = still = between = elements = 0
    for name in names:
        keys = f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"
        series = [[tensors[key].double() for key in keys] for tensors in saved]
        for t, ((weight, m, v), (new_weight, new_m, new_v)) in enumerate(pairwise(series), start=2):
            assert float(saved[t - 1][f"optimizer.{name}.step"]) == t
            gradient = (new_m - beta1 * m) / (1 - beta1)
            torch.testing.assert_close(new_v, beta2 * v + (1 - beta2) * gradient**2, rtol=1e-4, atol=1e-12, msg=name)
            update = (new_m / (1 - beta1**t)) / ((new_v / (1 - beta2**t)).sqrt() + eps)
            decay = 0.3 if weight.dim() > 1 else 0.0
            expected = weight * (1 - rate * decay) - rate * update
            torch.testing.assert_close(new_weight, expected, rtol=2**-22, atol=2e-10, msg=name)
        first, last = saved[0][keys[0]], saved[-1][keys[0]]
        has_gradient = series[-1][1] != 0
        moved += int((first != last)[has_gradient].sum())
        still += int((first.bfloat16() == last.bfloat16())[has_gradient].sum())
        # A sum of four bfloat16 gradients, rounded nowhere but in float32.
        gradient = saved[0][keys[1]].double() / (1 - beta1)
        between += int(((gradient - gradient.bfloat16().double()).abs() > 1e-5 * gradient.abs())[has_gradient].sum())
        elements += int(has_gradient.sum())
    assert moved > 0.99 * elements and still > 0.95 * elements and between > 0.5 * elements
