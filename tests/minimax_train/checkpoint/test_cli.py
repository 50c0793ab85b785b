"""``minimax-checkpoint`` as a user meets it, on what a run has saved."""

import json
import re

import torch
import torch.distributed.checkpoint as dcp

from minimax_train.checkpoint.cli import main
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import tiny_run


def _train(grid, config):
    Trainer(config, grid, torch.device("cpu")).train()


def test_what_a_run_has_saved(tmp_path, capfd):
    options = ["recipe.steps=4", "checkpoint.interval=2", "checkpoint.keep=0", "recipe.eval_interval=0"]
    options += ["recipe.warmup_steps=0", "recipe.decay_steps=0"]
    run_ranks(_train, 2, tiny_run(tmp_path, *options, "parallel.cp=2", "data.sequence_length=64"), cp=2)
    run = tmp_path / "run"
    capfd.readouterr()
    older, newer = (run / f"checkpoints/step-{step:08d}" for step in (2, 4))

    assert main(["ls", str(run)]) == 0
    header, *rows = capfd.readouterr().out.splitlines()
    assert header.split() == ["step", "tokens", "GB", "age", "loss", "held-out", "grid", "state"]
    records = {r["step"]: r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    for row, step in zip(rows, (2, 4), strict=True):
        assert re.search(rf" \d+ s +{records[step]['loss']:.4f} +- +cp=2 +whole$", row), row
    assert [row.split()[0] for row in rows] == ["2", "4"] and all(row.endswith("whole") for row in rows)
    assert [row.split()[1] for row in rows] == [f"{step * 4 * 64:,}" for step in (2, 4)]

    assert main(["verify", str(run)]) == 0
    assert capfd.readouterr().out.count(": whole") == 2
    assert main(["diff", str(newer), str(newer)]) == 0
    assert capfd.readouterr().out == "no tensor differs\n"

    assert main(["diff", str(older), str(newer)]) == 1
    *told, total = capfd.readouterr().out.splitlines()
    differences = dict(line.rsplit(": ", 1) for line in told)
    stored = [dcp.FileSystemReader(path).read_metadata().state_dict_metadata for path in (older, newer)]
    assert stored[0].keys() == stored[1].keys() and total == f"{len(told)} of {len(stored[0])} tensors differ"
    assert float(differences["optimizer.norm.weight.step"]) == 2
    name = "model.embedding.weight"
    tensors = [{name: torch.empty(data[name].size)} for data in stored]
    for path, tensor in zip((older, newer), tensors, strict=True):
        dcp.load(tensor, checkpoint_id=path, no_dist=True)
    largest = float((tensors[0][name] - tensors[1][name]).abs().max())
    assert differences[name] == f"{largest:.3g}" and largest > 0

    shard = next(newer.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["ls", str(run)]) == 0, "tensors are not read"
    capfd.readouterr()
    assert main(["verify", str(newer)]) == 1
    told = capfd.readouterr().out
    assert f"{shard}: damaged: its SHA-256 is " in told and told.rstrip().endswith(": 1 damaged")
    (newer / "progress.json").write_text("{}")
    assert main(["ls", str(run)]) == 1
    assert f"{newer / 'progress.json'}: damaged" in capfd.readouterr().out
    (newer / "progress.json").unlink()
    assert main(["verify", str(newer)]) == 1
    assert f"{newer / 'progress.json'}: missing" in capfd.readouterr().out
    (older / "manifest.json").write_text("{}")
    assert main(["verify", str(run)]) == 1
    told = capfd.readouterr().out
    assert f"{older / 'manifest.json'}: damaged: " in told and f"{newer}: 7 files" in told


def test_what_is_no_run(tmp_path, capfd):
    path = str(tmp_path)
    for command, told in (
        (["ls", path], "no run"),
        (["verify", path], "neither a "),
        (["diff", path, path], "neither a "),
    ):
        assert main(command) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: {tmp_path}: {told}") and error.count("\n") == 1
