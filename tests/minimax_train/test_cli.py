"""`minimax-train` as a user meets it: overrides, refusals, exit status."""

import gc
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import yaml

from minimax_train.checkpoint import cli as checkpoint_cli
from minimax_train.cli import main
from minimax_train.config import flatten, load_config, read_config, save_config
from minimax_train.convert import cli as convert_cli
from minimax_train.data import cli as data_cli
from minimax_train.errors import ConfigError
from minimax_train.hints import OTHER_NAMES
from minimax_train.model import HybridModel
from support.commands import minimax_train
from support.runs import overrides


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "recipe.learning_rte=1",
            r"recipe.learning_rte=1: there is no key.*Did you mean recipe.learning_rate\? Accepted: steps, ",
        ),
        ("recipie.steps=1", r"there is no key 'recipie'.*Did you mean recipe.steps\?"),
        ("recipie.x=1", r"there is no key 'recipie'.*Did you mean recipe\?"),
        (
            "parallelism.tensor_parallel_degree=2",
            r"no key 'parallelism' in the configuration. Did you mean parallel.tp\?",
        ),
        ("+model.extra=1", r"there is no key 'extra' in model"),
        ("steps=1", r"steps=1: there is no key.*Did you mean recipe.steps\?"),
        ("interval=1", r"Did you mean checkpoint.interval or logging.interval\?"),
        ("recipe.sequence_length=64", r"there is no key.* in recipe. Did you mean data.sequence_length\?"),
        ("data.seq_length=64", r"Did you mean data.sequence_length\?"),
        ("seq_length=64", r"Did you mean data.sequence_length\?"),
        ("tensor_model_parallel_size=2", r"in the configuration. Did you mean parallel.tp\?"),
        ("parallel.expert_parallel_degree=2", r"in parallel. Did you mean parallel.ep\?"),
        ("training.seq_len=64", r"no key 'training' in the configuration. Did you mean data.sequence_length\?"),
        ("recipe.lr=1", r"in recipe. Did you mean recipe.learning_rate\?"),
        ("engine.stage=3", r"Did you mean engine.stage with engine=deepspeed\?"),
        ("engine=fsdp engine.cuda_graphs=true", r"Did you mean engine.cuda_graphs with engine=zero1\?"),
        ("parallel.tensor_parallel=2", r"in parallel. Did you mean parallel.tp\? Accepted: tp, "),
        ("recipe.steps=many", r"recipe.steps=many: .*accepted: int"),
        ("recipe.steps=1.5", r"recipe.steps=1.5: .*accepted: int"),
        ("model=tinny", r"(?s)model/tinny.*tiny"),
        ("model.layer_pattern=LLS", r"model.layer_pattern='LLS': .*length 3 must divide model.num_layers=8"),
        ("model.layer_pattern=LLLX", r"model.layer_pattern='LLLX': must be made of L \(lightning\) and S"),
        ("model.num_kv_heads=3", r"model.num_kv_heads=3: must divide model.num_heads=4"),
        ("model.rotary_dim=33", r"model.rotary_dim=33: must be even and between 0 and model.head_dim=32"),
        ("model.experts_per_token=9", r"model.experts_per_token=9: must be at most model.num_experts=8"),
        ("model.hidden_size=0", r"model.hidden_size=0: must be between 1 and 1048576$"),
        (
            "recipe.micro_batch_size=3",
            r"recipe.micro_batch_size=3: must divide recipe.global_batch_size=8; 2 or 4 would do",
        ),
        (
            "recipe.warmup_steps=250",
            r"recipe.decay_steps=100: with recipe.warmup_steps=250 must fit in recipe.steps=300; "
            r"recipe.decay_steps=50 would do$",
        ),
        (
            "recipe.steps=10",
            r"recipe.decay_steps=100: with recipe.warmup_steps=20 must fit in recipe.steps=10; "
            r"recipe.warmup_steps=2 recipe.decay_steps=8 would do$",
        ),
        ("data.sequence_length=0", r"data.sequence_length=0: must be between 1 and 2147483647$"),
        ("kernels.softmax=fast", r"kernels.softmax='fast': must be one of auto"),
        ("kernels.norm=plain", r"kernels.norm='plain': renamed: use 'torch'$"),
        ("engine.precision=fp8", r"engine.precision='fp8': must be one of auto, bfloat16"),
        ("engine.name=zero", r"engine.name='zero': must be one of deepspeed, fsdp, megatron, zero1"),
        ("checkpoint.resume=yes", r"checkpoint.resume='yes': must be one of auto, never"),
        ("model.capacity_factor=0.001", r"model.capacity_factor=0.001: must leave each expert at least 1 assignment"),
        (
            "model.capacity_scope=global",
            r"model.capacity_scope='global': must be sequence with model.capacity_factor=null",
        ),
        (
            "model.aux_loss_coefficient=0 model.aux_loss_scope=rank",
            r"model.aux_loss_scope='rank': must be sequence with model.aux_loss_coefficient=0",
        ),
        ("parallel.token_groups=2", r"parallel.token_groups=2: must be 1 with parallel.ep=1 and parallel.etp=1"),
        (
            "parallel.ep=2 parallel.tp=2 parallel.token_groups=257 data.sequence_length=512 recipe.micro_batch_size=1",
            r"parallel.token_groups=257: must be at most 256, the tokens of a rank's micro-batch",
        ),
        ("device=tpu", r"device='tpu': must be one of auto, cpu, cuda"),
        ("recipe.warmup_steps=null", r"recipe.warmup_steps=null: .*not Optional \(accepted: int\)"),
        ("data.train_files=[a,null]", r"data.train_files=\[a,null\]: .*accepted: list\[str\]"),
        ("recipe.learning_rate=inf", r"recipe.learning_rate=inf: must be between 1e-12 and 100$"),
        ("recipe.weight_decay=inf", r"recipe.weight_decay=inf: must be between 0 and 100$"),
        ("parallel.timeout_s=inf", r"parallel.timeout_s=inf: must be between 1 and 10000000$"),
        ("hydra.run.dir=/x", r"hydra.run.dir=/x: Hydra's own settings are not read here"),
        ("+hydra.extra=1", r"\+hydra.extra=1: Hydra's own settings are not read here"),
    ],
)
def test_refused_before_anything_starts(given, message):
    with pytest.raises(ConfigError, match=message):
        load_config(given.split())


def test_a_capacity_that_drops_everything_is_refused():
    """Each expert gets ``factor * 2 * tokens / 8`` of 64 tokens a sequence, two sequences on 4 ranks, 8 times."""
    sizes = ["data.sequence_length=64", "recipe.micro_batch_size=2", "recipe.global_batch_size=16"]
    sizes += ["parallel.cp=2", "parallel.tp=2", "data.num_streams=8"]
    for scope, tokens, where in [
        ("sequence", 64, "a packed sequence"),
        ("rank", 32, "a rank's micro-batch"),
        ("global", 1024, "all ranks' micro-batches"),
    ]:
        factor = 8 / (2 * tokens)
        scoped = [*sizes, f"model.capacity_scope={scope}"]
        load_config([*scoped, f"model.capacity_factor={factor}"]).check_world_size(32)
        message = (
            rf"model.capacity_factor=.*: must leave each expert at least 1 assignment of the {tokens} tokens of {where}"
        )
        with pytest.raises(ConfigError, match=rf"{message} \(model.capacity_scope={scope}\); it leaves 0"):
            load_config([*scoped, f"model.capacity_factor={factor * 0.99}"]).check_world_size(32)


def test_what_is_saved_is_what_is_read(tmp_path):
    lists = ["data=files", "data.format=json", "data.train_files=['a b,c',/d/*.jsonl]"]
    for more in (["model=text-01"], lists, ["recipe.gradient_clip=null", "model.capacity_factor=1.25"]):
        config = load_config(more)
        save_config(config, tmp_path / "config.yaml")
        assert read_config(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text("a: 1")
    message = r"config.yaml: not a configuration of this version of minimax_train: a: there is no key 'a' in"
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match=r"config.yaml: not a configuration"):
        read_config(tmp_path / "config.yaml")


def test_old_names_are_refused_and_what_was_saved_under_them_is_read(tmp_path):
    for override, message in [
        ("recipe.eval_rows=5", r"recipe.eval_rows=5: renamed: use recipe.eval_sequences"),
        ("model.capacity_scope=row", r"model.capacity_scope='row': renamed: use 'sequence'"),
        ("model.aux_loss_scope=row", r"model.aux_loss_scope='row': renamed: use 'sequence'"),
        ("kernels.norm=plain", r"kernels.norm='plain': renamed: use 'torch'"),
        ("kernels.experts=loop", r"kernels.experts='loop': renamed: use 'torch'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config([override])
    new_kernels = ["kernels.norm=torch", "kernels.experts=torch"]
    config = load_config(["recipe.eval_sequences=5", "recipe.activation_checkpointing=full", *new_kernels])
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    old = [("eval_sequences:", "eval_rows:"), ("scope: sequence", "scope: row"), ("norm: torch", "norm: plain")]
    old += [("activation_checkpointing: full", "activation_checkpointing: true"), ("experts: torch", "experts: loop")]
    for new, before in old:
        assert new in text
        text = text.replace(new, before)
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(tmp_path / "config.yaml") == config


def test_world_size_that_does_not_divide():
    config = load_config(["recipe.global_batch_size=12", "recipe.micro_batch_size=3"])
    config.check_world_size(4)
    with pytest.raises(
        ConfigError, match=r"recipe.global_batch_size=12: must be a multiple of 24: 8 data-parallel ranks x"
    ):
        config.check_world_size(8)
    with pytest.raises(
        ConfigError, match=r"data.num_streams=8: must be a multiple of the 3 data-parallel ranks; .*\[1, 2, 4, 8\]"
    ):
        load_config(["recipe.global_batch_size=12", "recipe.micro_batch_size=4"]).check_world_size(3)


def test_names_of_other_frameworks_lead_to_keys_that_are_there():
    keys = flatten(load_config())
    for key, others in OTHER_NAMES.items():
        assert key in keys and not {f"{key.partition('.')[0]}.{name}" for name in others.split()} & keys.keys()


def test_every_preset_composes():
    for name in ("tiny", "small", "medium", "proxy", "text-01"):
        load_config([f"model={name}"])
    for name in ("short", "minimax-01", "wsd", "cosine"):
        load_config([f"recipe={name}"])
    load_config(["experiment=demo"])


def test_configuration_is_printed_and_own_folder_searched(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nrecipe:\n  steps: 123\n")
    assert main(["--cfg", "--config-dir", str(tmp_path), "experiment=mine", "seed=9"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["recipe"]["steps"], printed["seed"]) == (123, 9)
    assert main(["--cfg", "--config-dir", str(tmp_path / "none")]) == 2
    assert "--config-dir" in capsys.readouterr().err


def test_help_names_the_files_of_each_group(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "engine=deepspeed|fsdp|megatron|zero1; " in told and "model=medium|proxy|small|text-01|tiny; " in told


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (main, ["--multirun", "seed=1,2"]),
        (checkpoint_cli.main, ["prune", "runs/a", "--keep=-1"]),
        (checkpoint_cli.main, ["diff", "runs/a"]),
        (convert_cli.main, ["to-hf", "runs/a", "hf", "--dtype=float16"]),
        (data_cli.main, ["shwo"]),
        (data_cli.main, ["show", "--token=5"]),
        (data_cli.main, ["tokenize", "--workers=5"]),
    ],
)
def test_options_are_refused_in_one_line(capsys, command, arguments):
    try:
        status = command(arguments)
    except SystemExit as end:
        status = end.code
    told = capsys.readouterr().err
    assert status == 2 and told.startswith("error: ") and told.endswith("; --help says what there is\n")
    assert told.count("\n") == 1


def test_settings_are_no_options(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--train-iters=100", "--tensor-model-parallel-size", "2", "--unheard-of"])
    told = capsys.readouterr().err
    assert "--unheard-of; settings are written without dashes, as recipe.steps=1000" in told
    assert "; here recipe.steps and parallel.tp; --help" in told


def test_options_may_stand_among_overrides(tmp_path, capsys):
    assert main(["seed=9", "--cfg", "recipe.steps=200", "--config-dir", str(tmp_path), "model=tiny"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["recipe"]["steps"], printed["seed"]) == (200, 9)


def test_a_launcher_that_sets_half_its_variables(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert main(["seed=9"]) == 2
    assert "MASTER_PORT not set" in capsys.readouterr().err


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("WORLD_SIZE", "0", "WORLD_SIZE='0': must be an integer between 1 and"),
        ("WORLD_SIZE", "9" * 30, "WORLD_SIZE='9.*9': must be an integer between 1 and"),
        ("RANK", "1", "RANK='1': must be an integer between 0 and 0, for WORLD_SIZE=1"),
        ("RANK", "x", "RANK='x': must be an integer"),
        ("LOCAL_RANK", "-1", "LOCAL_RANK='-1': must be an integer"),
        ("MASTER_PORT", "99999", "MASTER_PORT='99999': must be an integer between 1 and 65535"),
        ("MASTER_ADDR", "http://node", "MASTER_ADDR='http://node': must be the name or address of a host"),
        ("MASTER_ADDR", "no.such.host", "'no.such.host', where the processes are to meet .* has no address: unknown"),
    ],
)
def test_surroundings_that_cannot_be(tmp_path, monkeypatch, capsys, name, value, message):
    def unknown(*_):
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for key, setting in {**TORCHRUN, name: value}.items():
        monkeypatch.setenv(key, setting)
    assert main(["device=cpu", f"run_dir={tmp_path}/run"]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"error: {message}.*\n", said), said


def test_the_picture_needs_no_display(tmp_path):
    """Jupyter's MPLBACKEND names a module that a run may not have."""
    program = "import os, pathlib; from minimax_train.metrics.plot import plot_loss; "
    program += "plot_loss([{'step': 1, 'loss': 2.0}], pathlib.Path('loss.png')); print(os.environ['MPLBACKEND'])"
    environment = {**os.environ, "MPLBACKEND": "module://no_such_inline.backend"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == environment["MPLBACKEND"]
    assert (tmp_path / "loss.png").stat().st_size > 1000


def _run(folder, *more):
    command = [sys.executable, "-m", "minimax_train", *overrides(folder, *more)]
    # No key of this machine's user: runs that report must fail before they reach the network.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(folder), "WANDB_API_KEY": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_a_whole_run(tmp_path):
    result = _run(tmp_path, "logging.wandb=offline")
    assert result.returncode == 0, result.stderr
    assert "step 6/6  held-out loss" in result.stdout
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "validation_loss" in r] == [3, 6]
    assert records[-1]["validation_loss"] < records[0]["loss"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "wandb").glob("offline-run-*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["layer_pattern"] == "LLSL"
    assert (run / "checkpoints/step-00000006/.metadata").is_file()


def test_an_essay_of_a_library_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    from minimax_train import cli

    def run(*_):
        raise ConfigError("data.tokenizer='x': cannot be loaded: OSError: We cannot connect.\n  See the manual.\n")

    monkeypatch.setattr(cli, "run", run)
    assert main(overrides(tmp_path)) == 2
    assert capsys.readouterr().err == (
        "error: data.tokenizer='x': cannot be loaded: OSError: We cannot connect. See the manual.\n"
    )


@pytest.mark.parametrize(
    ("case", "status", "message"),
    [
        (["data.train_files=[/nowhere/*.jsonl]"], 2, "data.train_files"),
        (
            ["recipe.learning_rate=100", "recipe.weight_decay=100", "recipe.warmup_steps=0"],
            1,
            "step 3: .*gradient norm nan; not finite: .*gradients: embedding.weight",
        ),
        (
            ["model.vocab_size=16777216", "model.hidden_size=1048576"],
            1,
            "^error: out of memory: .*allocate.*take less$",
        ),
        (["data.text_column=body"], 2, "data.text_column='body'"),
        (["logging.wandb=online"], 2, "logging.wandb='online': .*API key.*; or pass offline, or off"),
        (["run_dir=/dev/null"], 2, "run_dir='/dev/null': must be a folder this run can write, not a file"),
        (["model.vocab_size=200"], 2, "model.vocab_size"),
        (
            ["kernels.softmax=flash"],
            2,
            "kernels.softmax='flash': needs a GPU; on cpu it must be one of auto, naive, block",
        ),
        (["device=cuda"], 2, "device='cuda': this machine has no GPU"),
    ],
)
def test_runs_that_cannot_go_on_say_why(tmp_path, case, status, message):
    import torch

    if case == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = _run(tmp_path, *case)
    assert result.returncode == status, result.stderr
    assert re.search(message, result.stderr, re.DOTALL), result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "data.train_files"), ('{"text": "fine"}\nnot json\n', "data.train_files")],
)
def test_empty_and_corrupt_data(tmp_path, content, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(content)
    result = _run(tmp_path, f"data.train_files=[{bad}]")
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "bad.jsonl" in result.stderr


def test_no_model_is_left_when_process_groups_are_taken_down(tmp_path):
    """NCCL's communicators would wait for its CUDA graphs."""

    def count():
        (tmp_path / "models").write_text(str(sum(isinstance(x, HybridModel) for x in gc.get_objects())))

    def prepare():
        torch.distributed.destroy_process_group = count

    arguments = overrides(tmp_path, "recipe.steps=2", "recipe.warmup_steps=1", "recipe.decay_steps=1")
    finished = minimax_train(tmp_path, *arguments, prepare=prepare)
    assert finished.status == 0, finished.err
    assert (tmp_path / "models").read_text() == "0"
