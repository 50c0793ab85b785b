"""What a trainer's process imports until its first step is taken: every start of every run waits for it."""

import gc
import subprocess
import sys

import pytest

from minimax_train.startup import no_collection

# What takes long to import, and why a run does without it until its first step is taken.
UNWANTED = {
    "datasets": "worker processes read the data",
    "pyarrow": "likewise",
    "pandas": "likewise; pyarrow and datasets import it where it is installed",
    "transformers": "only exports need it",
    "matplotlib": "the loss curve is drawn later",
    "wandb": "only runs that log there need it",
    "torch._inductor.compile_fx": "nothing is compiled",
}
COMPILER = {"torch._dynamo": "nothing is compiled; FSDP imports it", "triton": "likewise"}
FIRST_STEP = """
import sys
from minimax_train.__main__ import main
from minimax_train.trainer import Trainer

step = Trainer.train_step

def first_step(trainer):
    step(trainer)
    print("imported:", *sys.modules)
    raise KeyboardInterrupt

Trainer.train_step = first_step
sys.exit(main())
"""


def run(script, *arguments, **options):
    return subprocess.run([sys.executable, "-P", "-c", script, *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize(("engine", "unwanted"), [("zero1", UNWANTED | COMPILER), ("fsdp", UNWANTED)])
def test_a_trainer_imports_only_what_its_first_step_needs(tmp_path, engine, unwanted):
    tiny = ("model.hidden_size=64", "data.sequence_length=64", "recipe.global_batch_size=1")
    tiny += ("recipe.micro_batch_size=1", "recipe.eval_sequences=1", "device=cpu")
    done = run(FIRST_STEP, "experiment=demo", f"engine={engine}", f"run_dir={tmp_path}/run", *tiny)
    assert done.returncode == 130, done.stderr  # as interrupted after the step
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("imported: ")]
    imported = set(line.split())
    assert "minimax_train.engines.zero1" in imported
    assert {name: why for name, why in unwanted.items() if name in imported} == {}


def test_compilers_are_imported_without_what_torch_compile_imports(tmp_path):
    """As quack: a library that wraps a function in ``torch.compile`` when it is imported."""
    (tmp_path / "wraps.py").write_text("import torch\n\n\ndef f(x):\n    return x + 1\n\n\ng = torch.compile(f)\n")
    script = """
import os, sys
import torch
from minimax_train.kernels import compile_cache

compile_cache._MODULES = ("wraps", "not_installed")
compile_cache.import_compilers()
import wraps
print(wraps.g is wraps.f, "torch._inductor.compile_fx" in sys.modules)
print(torch.compile(wraps.f) is wraps.f, os.environ.get("TORCHDYNAMO_DISABLE"))
os.environ["TORCHDYNAMO_DISABLE"] = "0"
compile_cache.import_compilers()
print(os.environ["TORCHDYNAMO_DISABLE"])
"""
    told = run(script, cwd=tmp_path, env={"PATH": "", "PYTHONPATH": str(tmp_path)}, check=True)
    assert told.stdout.split("\n") == ["True False", "False None", "0", ""]


def test_garbage_is_collected_again_after_imports():
    assert gc.isenabled()
    with pytest.raises(ImportError), no_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
