"""``--verify`` tells the same model from another, and the model card says what was trained."""

import json
import re

import pytest
import torch
import yaml

from minimax_train.convert import verify
from minimax_train.convert.cli import main
from minimax_train.convert.from_hf import Tensors


def _difference(told: str) -> float:
    return float(re.search(r"largest difference of logits to [^:]*: (\S+) \(128 tokens", told)[1])


@pytest.mark.parametrize("layout, to", [("minimax", "transformers' MiniMax"), ("text-01", "as from-hf reads it")])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_both_directions(lab, tmp_path, capsys, layout, to, dtype):
    config = lab.model_config(hidden_size=36, num_heads=4, head_dim=14, rotary_dim=6, num_experts=3)
    checkpoint = lab.save_checkpoint(lab.random_model(config), tmp_path / "ours")
    options = ["--layout", layout, "--dtype", dtype, "--verify"]
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf"), *options]) == 0
    told = capsys.readouterr().err
    assert to in told and _difference(told) < 1e-4
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back"), "--dtype", dtype, "--verify"]) == 0
    told = capsys.readouterr().err
    assert to in told and _difference(told) < 1e-4


def test_another_model_is_found_out(lab, tmp_path, capsys, monkeypatch):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config(num_heads=4)), tmp_path / "ours")
    chunk = Tensors.chunk

    def change(self, parameter, *more):
        return chunk(self, parameter, *more) * (1.01 if parameter.name == "layers.1.attention.q_proj.weight" else 1)

    monkeypatch.setattr(Tensors, "chunk", change)
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf"), "--layout", "text-01", "--verify"]) == 1
    assert "error: not the same model: largest difference" in capsys.readouterr().err
    assert main(["to-hf", str(checkpoint), str(tmp_path / "minimax")]) == 0
    assert main(["from-hf", str(tmp_path / "minimax"), str(tmp_path / "back"), "--verify"]) == 1


def test_what_cannot_be_loaded_is_refused_before(lab, tmp_path, capsys, monkeypatch):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config()), tmp_path / "ours")
    command = ["to-hf", str(checkpoint), str(tmp_path / "hf"), "--verify"]
    if not torch.cuda.is_available():
        assert main([*command, "--device", "cuda"]) == 2
        assert "--device='cuda': must be cpu, cuda or cuda:N, and there" in capsys.readouterr().err
    monkeypatch.setattr(verify, "available_memory", lambda: 10_000)
    assert main(command) == 2
    assert re.search(r"--verify takes 0\.000 GB for one side in float32; 0\.000 GB are free", capsys.readouterr().err)
    assert main([*command[:-1], "--device", "cpu"]) == 2
    assert "--device='cpu': is read only with --verify" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_model_card(lab, tmp_path):
    run = tmp_path / "run"
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config()), run / "checkpoints" / "step-00000020")
    (checkpoint / "progress.json").write_text(json.dumps({"step": 20, "tokens": 12345}))
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    config["data"] |= {"source": "files", "train_files": ["/home/someone/web.jsonl"], "subset": None}
    config["recipe"] = {"steps": 30, "global_batch_size": 7}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(config))
    losses = [{"step": 10, "loss": 3.5}, {"step": 20, "loss": 3.25, "validation_loss": 3.4}, {"step": 30, "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in losses) + '{"step": 4')
    assert main(["to-hf", str(run), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers" and "license" not in yaml.safe_load(front)
    assert "20 steps, 12,345 tokens" in text and "training loss at step 20: 3.2500" in text
    assert "held-out loss at step 20: 3.4000" in text and "| `hidden_size` | 40 |" in text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert settings["recipe"] == {"steps": 30, "global_batch_size": 7}
    assert settings["data"] == {"sequence_length": lab.SEQUENCE_LENGTH, "source": "files", "train_files": ["web.jsonl"]}
    assert (tmp_path / "hf" / "loss.png").read_bytes().startswith(b"\x89PNG") and "(loss.png)" in text
    assert "lightning attention (L) and softmax attention (S) in the pattern LS, a mixture" in text
    # A folder converted from elsewhere says so, and brings no card of its own.
    (tmp_path / "hf" / "README.md").write_text("theirs")
    assert main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert main(["to-hf", str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    card = (tmp_path / "again" / "README.md").read_text()
    assert "converted from a Hugging Face folder of MiniMaxForCausalLM and not trained here" in card
    assert "theirs" not in card


def test_a_model_card_tells_the_attentions_that_are_there(lab, tmp_path):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config(layer_pattern="S")), tmp_path / "ours")
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "softmax attention (S) in the pattern S, a mixture" in card and "lightning" not in card
