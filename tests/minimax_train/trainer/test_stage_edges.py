"""Where a stage or a run ends: another grid, more steps, a length in epochs, a batch that follows the loss."""

import json
import os
import socket

import pytest
from transformers import AutoTokenizer

from support.commands import Command, minimax_train
from support.runs import DIVISIBLE, UNSTAGED, overrides

FAST = ["engine.precision=float64", "recipe.eval_interval=0", "recipe.warmup_steps=0", "checkpoint.resume=auto"]


def _losses(folder):
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {record["step"]: (record["loss"], record["tokens"], record["learning_rate"]) for record in records}


def _on_two_processes(folder, arguments):
    """As torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in "01":
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        started.append(Command(folder, arguments, lambda place=place: os.environ.update(place)))
    return [command.finish() for command in started]


def test_a_stage_with_a_grid_of_its_own(tmp_path):
    """The run ends with a status of its own, and the same command on other processes goes on."""
    stages = [*DIVISIBLE, *FAST, *UNSTAGED, "recipe.stages.short.steps=2", "recipe.stages.long.steps=3"]
    right = minimax_train(tmp_path, *overrides(tmp_path / "whole", *stages))
    assert right.status == 0, right.err
    given = overrides(tmp_path / "parts", *stages, "recipe.stages.long.parallel.cp=2")
    first = minimax_train(tmp_path, *given)
    assert first.status == 3 and first.err.count("\n") == 1
    assert "stopped: after step 2: stage long runs on another grid, parallel.cp=2; the run is saved in" in first.err
    refused = minimax_train(tmp_path, *given)
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert "error: parallel.cp=2: must divide the number of processes, 1" in refused.err
    assert "(stage long, parallel.cp=2)" in refused.err
    second = _on_two_processes(tmp_path, given)
    assert [finished.status for finished in second] == [0, 0], second
    found, expected = _losses(tmp_path / "parts"), _losses(tmp_path / "whole")
    assert list(found) == list(expected) == [1, 2, 3, 4, 5]
    for step, numbers in found.items():
        assert numbers == pytest.approx(expected[step], rel=1e-10)


def test_a_finished_run_is_extended(tmp_path):
    """By more steps, and by a stage; each step is that of the run that was planned so from the beginning."""
    stages = [*FAST, *UNSTAGED, "recipe.stages.stable.steps=4", "recipe.stages.decay.steps=2"]
    stages += ["recipe.stages.decay.min_learning_rate=1e-5"]
    assert minimax_train(tmp_path, *overrides(tmp_path / "whole", *stages)).status == 0
    held = [*FAST, "recipe.decay_steps=null", "recipe.min_learning_rate=null"]
    for more in (
        [*held, "recipe.steps=2"],
        [*held, "recipe.steps=3"],
        [text.replace(".stable", ".pretraining") for text in stages],
    ):
        finished = minimax_train(tmp_path, *overrides(tmp_path / "parts", *more))
        assert finished.status == 0, finished.err
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    again = minimax_train(tmp_path, *overrides(tmp_path / "parts", *more))
    assert again.status == 0 and "all 6 steps were taken before: nothing is left to train" in again.out
    renamed = minimax_train(tmp_path, *overrides(tmp_path / "parts", *stages, "recipe.stages.decay.steps=1"))
    assert renamed.status == 2 and "recipe.stages.decay.steps=1: " in renamed.err
    assert "has taken 2 steps already; must be at least 2" in renamed.err


def test_a_length_in_epochs(tmp_path):
    """Counted once: the checkpoint knows the tokens of one pass. The decay is at its end in the last step."""
    given = overrides(tmp_path, *FAST, "recipe.steps=null", "recipe.decay_steps=null", "recipe.decay_tokens=1000")
    first = minimax_train(tmp_path, *given, "recipe.epochs=0.5")
    assert first.status == 0, first.err
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/tokenizer")
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus-0.jsonl").read_text().splitlines()]
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert f"data: one epoch is {tokens:,} tokens, counted in " in first.out
    losses = _losses(tmp_path)
    last = max(losses)
    assert last == -(-tokens // 2 // (4 * 63)) or last == -(-tokens // (2 * 4 * 63))
    assert losses[last][2] == pytest.approx(2e-4) and losses[1][2] == 2e-3
    second = minimax_train(tmp_path, *given, "recipe.epochs=0.75")
    assert second.status == 0 and "one epoch is" not in second.out
    assert max(_losses(tmp_path)) == -(-tokens * 3 // (4 * 4 * 63))
    refused = minimax_train(tmp_path / "..", *overrides(tmp_path / "b", *given[-4:], *FAST, "recipe.epochs=0.001"))
    assert refused.status == 2 and "recipe.decay_tokens=1000: must fit in recipe.epochs=0.001" in refused.err


def test_a_batch_that_follows_the_loss(tmp_path):
    """Doubled where the critical batch of the smoothed loss allows it; the same when the run was stopped in between."""
    given = [*FAST, "recipe.decay_steps=0", "recipe.critical_batch=true", "recipe.steps=6", "logging.interval=2"]
    given += ["recipe.critical_batch_tokens=2e8", "recipe.critical_batch_exponent=7.35", "recipe.learning_rate=2e-2"]
    assert minimax_train(tmp_path, *overrides(tmp_path / "whole", *given)).status == 0
    for steps in (3, 6):
        assert minimax_train(tmp_path, *overrides(tmp_path / "parts", *given, f"recipe.steps={steps}")).status == 0
    whole, parts = _losses(tmp_path / "whole"), _losses(tmp_path / "parts")
    assert {step: parts[step] for step in whole} == whole
    smoothed, tokens, batch = None, 0, 4 * 63
    for step in range(1, 7):
        tokens += batch
        if step % 2 == 0:
            loss = whole[step][0]
            assert whole[step][1] == tokens
            smoothed = loss if smoothed is None else 0.9 * smoothed + 0.1 * loss
            batch *= 2 if 2e8 * smoothed**-7.35 >= 2 * batch else 1
    assert 4 * 63 < batch < 8 * 4 * 63, f"some doublings, and not one at every report: {smoothed}"
