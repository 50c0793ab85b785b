"""Every engine trains the same: curve, clipping, accumulation, evaluation, checkpoints in and out, a NaN.

    PYTHONPATH=tests/lib python tests/lib/support/conformance.py [--steps 50]

Two ranks train each engine from the same seed in float32, two micro-batches to a rank, gradients clipped, and save half
way. Each engine goes on from the checkpoint of every other. Losses, gradient norms, FLOPs of a step by its metrics and
held-out losses must be those of one rank to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure  # noqa: F401  this and torch._dynamo so that processes forked from this one need not
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor

from minimax_train.config import Config
from minimax_train.engines.deepspeed_config import choose_accelerator
from minimax_train.errors import TrainingError
from minimax_train.model.sharding import local
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.run_lock import release_lock
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.megatron import on_cpu
from support.runs import tiny_run, weights_of

TOLERANCE = 1e-4
CLIP = 0.5
# By what is chosen with engine=.
KINDS = {
    "deepspeed 2": ["engine=deepspeed", "engine.stage=2"],
    "zero1": ["engine=zero1"],
    "megatron": ["engine=megatron", "engine.bucket_size=2000"],
    "deepspeed 1": ["engine=deepspeed", "engine.stage=1"],
    "fsdp": ["engine=fsdp"],
    "deepspeed 0": ["engine=deepspeed", "engine.stage=0"],
    "deepspeed 3": ["engine=deepspeed", "engine.stage=3"],
    "hybrid fsdp": ["engine=fsdp", "engine.shard_within=1"],
}
POISONED = "layers.1.attention.o_proj.weight"


class Run(NamedTuple):
    """Some steps of a run.

    Attributes:
        source: folder of a run whose checkpoint is copied first, if any.
    """

    config: Config
    steps: int
    source: str | None = None


class Trained(NamedTuple):
    """What came of them.

    Attributes:
        steps: of each its number, loss, gradient norm, and FLOPs of all ranks.
        held_out: loss at their end.
        weights: whole, at their end.
        message: of the run with a NaN in a weight.
        kept: whether no step changed a weight then.
    """

    steps: list[tuple[int, float, float, float]]
    held_out: float
    weights: dict[str, Tensor]
    message: str
    kept: bool

    def differences(self, right: Sequence[Trained]) -> list[str]:
        """From what one rank made of the same steps, a line each."""
        numbers = {step: values for each in right for step, *values in each.steps}
        held_out = {each.steps[-1][0]: each.held_out for each in right}
        own = [(f"step {step}", x) for step, *values in self.steps for x in values]
        expected = [x for step, *_ in self.steps for x in numbers[step]] + [held_out[self.steps[-1][0]]]
        pairs = zip([*own, ("held out", self.held_out)], expected, strict=True)
        return [f"{what}: {a} for {b}" for (what, a), b in pairs if not abs(a - b) <= TOLERANCE * abs(b)]


def configure(folder: Path, kind: str, steps: int) -> Config:
    """A run whose ranks, at most two, have two micro-batches or more, and whose gradients are clipped."""
    options = ["model.num_layers=2", "model.layer_pattern=LS", f"recipe.gradient_clip={CLIP}", f"recipe.steps={steps}"]
    options += ["engine.precision=float32", "model.aux_loss_coefficient=0.1", "checkpoint.resume=auto"]
    if kind == "deepspeed 3":
        options.append(freeing(folder))
    return tiny_run(folder, *options, *KINDS[kind])


def import_deepspeed() -> None:
    """On CPUs, before ranks are forked, each of which would take seconds for it."""
    choose_accelerator("cpu")
    import minimax_train.engines.deepspeed_zero3  # noqa: F401


def freeing(folder: Path) -> str:
    """An override with which DeepSpeed frees the smallest weights too, as it does the larger ones of real models."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "freeing.json"
    least = ("param_persistence_threshold", "max_reuse_distance")
    options = {f"stage3_{key}": 0 for key in least} | {"stage3_prefetch_bucket_size": 1000, "reduce_bucket_size": 1000}
    path.write_text(json.dumps({"zero_optimization": options}))
    return f"engine.config={path}"


def train(grid: ProcessGrid, runs: Sequence[Run]) -> list[Trained]:
    """Runs one after the other, each from the newest checkpoint in its folder; saved at their ends."""
    with on_cpu():
        return [_train(grid, run) for run in runs]


def _train(grid: ProcessGrid, run: Run) -> Trained:
    if run.source is not None:
        if grid.is_first:
            shutil.copytree(run.source, run.config.run_dir, ignore=shutil.ignore_patterns("*.lock"))
        dist.barrier()
    trainer, steps = Trainer(run.config, grid, torch.device("cpu")), []
    for _ in range(run.steps):
        taken = trainer.train_step()
        metrics = trainer.metrics(taken)
        flops = 1e12 * metrics["tflops_per_rank"] * metrics["seconds"] * dist.get_world_size()
        steps.append((taken.number, metrics["loss"], metrics["grad_norm"], flops))
    trainer.save(taken.plan)
    held_out, weights = trainer.evaluate(taken.plan)["validation_loss"], weights_of(trainer)
    trained = Trained(steps, held_out, weights, *_poison(grid, trainer))
    trainer.log.close()
    trainer.loader.close()
    release_lock(trainer.run_dir)
    return trained


def _poison(grid: ProcessGrid, trainer: Trainer) -> tuple[str, bool]:
    """A NaN in the first rank's part of a weight: what the run says two steps later, and whether the weights stayed."""
    state = trainer.engine.snapshot()
    if grid.is_first:
        with torch.no_grad():
            local(state["model"][POISONED])[0, 0] = float("nan")
    trainer.engine.restore(state)
    before, message = weights_of(trainer), "nothing"
    taken = [trainer.train_step(), trainer.train_step()]
    try:
        trainer.metrics(taken[-1])
    except TrainingError as error:
        message = str(error)
    kept = all(torch.equal(x.nan_to_num(), before[name].nan_to_num()) for name, x in weights_of(trainer).items())
    return message, kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    half, failures = parser.parse_args().steps // 2, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configs = {kind: configure(folder / kind, kind, 2 * half + 2) for kind in KINDS}
        right = configure(folder / "right", "fsdp", 2 * half + 2)
        expected = run_ranks(train, 1, [Run(right, half), Run(right, half)], timeout_s=3600)[0]
        import_deepspeed()
        runs = {(kind, "from the start"): Run(config, half) for kind, config in configs.items()}
        for source, config in configs.items():
            for kind in KINDS:
                config_on = configure(folder / f"{source} to {kind}", kind, 2 * half + 2)
                runs[kind, f"from {source}"] = Run(config_on, half, config.run_dir)
        found = run_ranks(train, 2, list(runs.values()), timeout_s=3600)[0]
        for what, trained in zip(runs, found, strict=True):
            differences = trained.differences(expected)
            failures += bool(differences)
            print(*what, "; ".join(differences) or "as one rank")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
