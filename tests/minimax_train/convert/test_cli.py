"""``minimax-convert``: exit status, messages, and nothing left behind by a conversion that failed."""

import pytest
import torch

from minimax_train.convert import to_hf as to_hf_module
from minimax_train.convert.cli import main
from minimax_train.convert.shards import parse_size
from minimax_train.errors import ConfigError


def test_there_and_back(lab, tmp_path, capsys):
    ours = lab.random_model(lab.model_config())
    checkpoint = lab.save_checkpoint(ours, tmp_path / "ours")
    hf, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert main(["to-hf", str(checkpoint), hf, "--dtype", "bfloat16", "--max-shard-size", "50KB"]) == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    assert main(["from-hf", hf, back, "--dtype", "float32"]) == 0
    assert f"checkpoint.initial_weights={back}" in capsys.readouterr().out
    stored = lab.dcp.FileSystemReader(tmp_path / "back").read_metadata().state_dict_metadata
    assert {tensor.properties.dtype for tensor in stored.values()} == {torch.float32}
    assert torch.equal(lab.load_ours(tmp_path / "back").head.weight, ours.head.weight.bfloat16().float())


def test_target_that_holds_something_is_refused(lab, tmp_path, capsys):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config()), tmp_path / "ours")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").touch()
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: DST=") and "must be a new or an empty folder" in error
    (tmp_path / "hf" / "notes.txt").unlink()
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf")]) == 0


def test_errors_name_what_is_wrong(tmp_path, capsys):
    assert main(["to-hf", str(tmp_path / "nothing"), str(tmp_path / "hf")]) == 2
    assert "neither a checkpoint" in capsys.readouterr().err
    assert main(["from-hf", str(tmp_path / "nothing"), str(tmp_path / "ours")]) == 2
    assert "there is no config.json" in capsys.readouterr().err
    assert main(["to-hf", str(tmp_path), str(tmp_path / "hf"), "--max-shard-size", "big"]) == 2
    assert "--max-shard-size='big': must be a size such as 5GB" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_made(lab, tmp_path, capsys):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config()), tmp_path / "ours")
    (tmp_path / "file").touch()
    assert main(["to-hf", str(checkpoint), f"{tmp_path}/file/hf"]) == 1
    assert f"error: DST='{tmp_path}/file/hf': cannot be made: Not a directory\n" in capsys.readouterr().err


def test_failure_midway_leaves_nothing(lab, tmp_path, monkeypatch, capsys):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config()), tmp_path / "ours")

    def full_disk(outputs, folder, *_):
        (folder / "model-00001-of-00002.safetensors").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(to_hf_module.__globals__, "write_shards", full_disk)
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["ours"]


def test_damaged_files(lab, tmp_path, capsys):
    checkpoint = lab.save_checkpoint(lab.random_model(lab.model_config()), tmp_path / "ours", tokenizer=True)
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("{")
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf")]) == 2
    assert "no tokenizer in" in capsys.readouterr().err
    lab.save_tokenizer(checkpoint / "tokenizer")
    (shard,) = checkpoint.glob("*.distcp")
    shard.unlink()
    assert main(["to-hf", str(checkpoint), str(tmp_path / "hf")]) == 2
    assert f"error: {shard}: missing" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{")
    assert main(["from-hf", str(tmp_path / "other"), str(tmp_path / "back")]) == 2
    assert "config.json: not JSON" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "ours"]


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("300", 300), ("7B", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5GiB", "GB"])
def test_sizes_refused(text):
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)
