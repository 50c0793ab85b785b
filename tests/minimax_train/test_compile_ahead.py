"""Kernels compiled ahead: for what a step asks for; by processes that are waited for, and cannot stop a run."""

import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch
from torch import Tensor

from minimax_train import compile_ahead
from minimax_train.compile_ahead import Sizes, compiled_ahead
from minimax_train.config import load_config
from minimax_train.model.sharding import local
from minimax_train.parallel.grid import GridSizes
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import DIVISIBLE, overrides, tiny_run

# Where a model calls what compiles kernels.
SEAMS = {
    "minimax_train.model.attention.lightning": ("lightning_attention", "silu_qkv"),
    "minimax_train.model.attention.softmax": ("softmax_attention", "rotate_heads"),
    "minimax_train.model.experts": ("route", "router_logits"),
    "minimax_train.model.model": ("linear_cross_entropy",),
    "minimax_train.model.norm": ("rms_norm", "rms_norm_twice", "add_rms_norm", "gated_rms_norm"),
    "minimax_train.kernels.experts.mlp": ("grouped_experts",),
}
SIZES = ["engine.precision=float32", "recipe.micro_batch_size=2", "recipe.global_batch_size=8"]
GPU = torch.device("cuda", 0)


def calls_of(run):
    """Name of each call and shapes and dtypes of its tensors, backward passes included, and of its sums."""
    found = set()

    def spy(name, function):
        def call(*arguments, **options):
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
            found.add((name, *((tuple(x.shape), x.dtype) for x in tensors)))
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for path, names in SEAMS.items():
            for name in names:
                patch.setattr(f"{path}.{name}", spy(name, getattr(import_module(path), name)))
        run()
    return found


def _calls_of_a_step(grid, config):
    trainer = Trainer(config, grid, torch.device("cpu"))
    found = calls_of(trainer.train_step)
    trainer.loader.close()
    columns = {local(block.experts.mlp.down_proj).shape[2] for block in trainer.engine.model.layers}
    return found, columns


def calls_ahead(sizes):
    def run():
        for part in sizes.parts:
            compile_ahead.run(sizes, part, torch.device("cpu"))

    return calls_of(run)


def test_what_is_called_ahead_is_what_a_step_calls(tmp_path):
    config = tiny_run(tmp_path, *SIZES)
    ((step, _),) = run_ranks(_calls_of_a_step, 1, config)
    assert {name for name, *_ in step} == {name for names in SEAMS.values() for name in names}
    assert calls_ahead(Sizes.of(config, GridSizes(1))) == step


def test_of_a_rank_that_shares_heads_and_experts_columns(tmp_path):
    config = tiny_run(tmp_path, *DIVISIBLE, *SIZES, "parallel.tp=2", "parallel.etp=2")
    sizes = Sizes.of(config, GridSizes(2, tp=2, etp=2))
    wanted = "lightning_attention", "softmax_attention", "silu_qkv", "rotate_heads", "linear_cross_entropy"

    def chosen(calls):
        return {call for call in calls if call[0] in wanted}

    step, columns = run_ranks(_calls_of_a_step, 2, config, tp=2, etp=2)[0]
    assert chosen(calls_ahead(sizes)) == chosen(step)
    assert columns == {sizes.model.expert_hidden_size}


def test_gradients_are_added_up_where_a_step_does(tmp_path, monkeypatch):
    adds = []
    total = compile_ahead._Sum.sum
    monkeypatch.setattr(compile_ahead._Sum, "sum", lambda self: adds.append(self.adds) or total(self))
    config = tiny_run(tmp_path, *SIZES)
    for batch, found in ((2, {False}), (8, {False, True})):
        config.recipe.global_batch_size = batch
        adds.clear()
        calls_ahead(Sizes.of(config, GridSizes(1)))
        assert set(adds) == found
    config = tiny_run(tmp_path, *SIZES, "engine=fsdp")
    adds.clear()
    calls_ahead(Sizes.of(config, GridSizes(1)))
    assert not adds


def test_a_number_of_layers_has_the_kernels_of_any_other(tmp_path):
    def key(*more):
        return Sizes.of(tiny_run(tmp_path, *SIZES, *more), GridSizes(1)).key()

    assert key() == key("model.num_layers=8") == key("recipe.warmup_steps=1")
    assert key() != key("model.head_dim=8")
    assert key() != key("kernels.softmax=naive")
    assert key() != key("recipe.micro_batch_size=1")


@pytest.fixture
def config(tmp_path):
    return load_config(overrides(tmp_path, "parallel.timeout_s=120"))


@pytest.fixture
def started(monkeypatch):
    """What is started in the place of a part's process, by its script."""
    scripts, processes = {}, []

    def start(sizes, part, device, told):
        process = subprocess.Popen([sys.executable, "-c", scripts.get(part, "")], stderr=told)
        processes.append(process)
        return process

    monkeypatch.setattr(compile_ahead, "_start", start)
    monkeypatch.setattr(compile_ahead.os, "sched_getaffinity", lambda _: set(range(4)))
    return scripts, processes


def test_once_for_all_runs_of_the_same_sizes(config, started, tmp_path, capsys):
    _, processes = started
    for _ in range(2):
        with compiled_ahead(config, GridSizes(1), tmp_path / "kernels", GPU):
            inside = len(processes)
        assert inside == len(processes) == 4  # two attentions, the experts and the rest
    assert [process.returncode for process in processes] == [0] * 4
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("why", ["no folder", "CPU", "another GPU", "few cores"])
def test_none_where_there_is_nothing_to_gain(config, started, tmp_path, monkeypatch, why):
    folder, device = tmp_path / "kernels", GPU
    if why == "no folder":
        folder = None
    elif why == "CPU":
        device = torch.device("cpu")
    elif why == "another GPU":
        device = torch.device("cuda", 1)
    else:
        monkeypatch.setattr(compile_ahead.os, "sched_getaffinity", lambda _: set(range(3)))
    with compiled_ahead(config, GridSizes(1), folder, device):
        pass
    assert started[1] == []
    assert not (tmp_path / "kernels").exists()


def test_a_process_that_fails_is_told_and_the_run_goes_on(config, started, tmp_path, capsys):
    scripts, _ = started
    scripts["experts"] = "raise RuntimeError('no such tile')"
    with compiled_ahead(config, GridSizes(1), tmp_path, GPU):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "note: the process that compiles kernels ahead (experts) ended with status 1: RuntimeError: no such tile; "
        "the run compiles them"
    )


def test_a_process_that_hangs_is_ended(config, started, tmp_path, capsys):
    scripts, processes = started
    scripts["1"] = "import time; time.sleep(600)"
    config.parallel.timeout_s = 4.0
    began = time.monotonic()
    with compiled_ahead(config, GridSizes(1), tmp_path, GPU):
        pass
    assert time.monotonic() - began < 60
    assert "(attention 1) took longer than 2 s; the run compiles them" in capsys.readouterr().err
    assert all(process.returncode is not None for process in processes)


def test_none_outlives_what_is_raised_inside(config, started, tmp_path):
    scripts, processes = started
    scripts.update(dict.fromkeys(("0", "1", "experts", "rest"), "import time; time.sleep(600)"))
    with pytest.raises(KeyboardInterrupt), compiled_ahead(config, GridSizes(1), tmp_path / "kernels", GPU):
        raise KeyboardInterrupt
    assert [process.returncode for process in processes] == [-9] * 4
    assert not (tmp_path / "kernels").exists()  # the next run tries again


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it succeeds")
def test_the_process_itself_says_what_it_lacks(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compile_ahead.os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(Sizes, "parts", ["rest"])
    with compiled_ahead(config, GridSizes(1), tmp_path, GPU):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the process that compiles kernels ahead (rest) ended with status 1: ")
    assert "cuda" in line.lower() or "NVIDIA" in line
