"""Kernels compiled ahead: for what a step asks for; by processes that are waited for, and cannot stop a run."""

import socket
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
CHOSEN = ["kernels.norm=torch", "kernels.softmax=naive", "kernels.rope=torch"]
GPU = torch.device("cuda", 0)


def calls_of(run):
    """Of each call its name, what says how it is done, and shapes and dtypes of its tensors."""
    found = set()

    def spy(name, function):
        def call(*arguments, **options):
            tensors = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
            how = options.get("implementation")
            found.add((name, how, *((tuple(x.shape), x.dtype) for x in tensors)))
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


@pytest.mark.parametrize("more", [[], ["engine.precision=bfloat16"], CHOSEN], ids=["float32", "bfloat16", "chosen"])
def test_what_is_called_ahead_is_what_a_step_calls(tmp_path, more):
    config = tiny_run(tmp_path, *SIZES, *more)
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


def test_of_a_rank_that_has_some_of_the_experts(tmp_path):
    config = tiny_run(tmp_path, *DIVISIBLE, *SIZES, "parallel.ep=2")
    sizes = Sizes.of(config, GridSizes(2, ep=2))
    (experts,) = (call for call in calls_ahead(sizes) if call[0] == "grouped_experts")
    assert experts[4][0] == (4, 24, 20)  # of 8: gate over up, of 12 columns each
    assert {call[2][0][1] for call in calls_ahead(sizes) if call[0] == "route"} == {8}


def test_sizes_that_no_layer_reads_need_not_divide(tmp_path):
    more = ["model.layer_pattern=LL", "model.num_heads=12", "model.vocab_size=308", "parallel.tp=4"]
    for kv_heads in (1, 3, 6):
        config = tiny_run(tmp_path, *SIZES, *more, f"model.num_kv_heads={kv_heads}", "data.sequence_length=96")
        config.check_world_size(4)
        assert Sizes.of(config, GridSizes(4, tp=4)).model.num_heads == 3


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


def test_processes_that_fail_are_told_and_the_run_goes_on(config, started, tmp_path, capsys):
    scripts, _ = started
    scripts["experts"] = "raise RuntimeError('no such tile')"
    scripts["rest"] = "raise SystemExit(3)"
    with compiled_ahead(config, GridSizes(1), tmp_path, GPU):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"note: kernels are not all compiled ahead on {socket.gethostname()} (experts: status 1, RuntimeError: no such "
        "tile; rest: status 3, without a word): the run compiles them"
    )


def test_a_process_that_hangs_is_ended(config, started, tmp_path, capsys):
    scripts, processes = started
    scripts["1"] = "import time; time.sleep(600)"
    config.parallel.timeout_s = 8.0
    began = time.monotonic()
    with compiled_ahead(config, GridSizes(1), tmp_path, GPU):
        pass
    assert time.monotonic() - began < 60
    (line,) = capsys.readouterr().err.splitlines()
    assert "(1: took longer than 4 s): the run" in line
    assert processes[1].returncode == -9


@pytest.mark.parametrize("what", ["folder", "processes"])
def test_what_cannot_be_written_or_started_is_told_and_the_run_goes_on(config, started, tmp_path, monkeypatch, what):
    notes = []
    monkeypatch.setattr(compile_ahead, "note", notes.append)
    (tmp_path / "kernels").write_text("a file")

    def start(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    if what == "processes":
        monkeypatch.setattr(compile_ahead, "_start", start)
    with compiled_ahead(config, GridSizes(1), tmp_path / ("kernels" if what == "folder" else "other"), GPU):
        pass
    (line,) = notes
    assert f"({what}: " in line


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
    assert "(rest: status 1, " in line
    assert "cuda" in line.lower() or "NVIDIA" in line
