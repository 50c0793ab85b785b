"""Process grids of up to 8 ranks, with several engines: any goes on from the checkpoint of any other.

    PYTHONPATH=tests/lib python tests/lib/support/any_grid.py [--pairs 20] [--steps 10] [--seed 1]

Each grid trains some steps from the start and saves. For each pair, the second grid goes on from the first's
checkpoint, optimizer state and data position included. Losses and gradient norms of its next steps must equal, to 1e-10
in float64, those of one rank that never stopped. Each grid is as often the first of a pair as the second; there are 132
pairs. The vocabulary's 308 rows do not divide by 8, nor do most other dimensions.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure  # noqa: F401  this and torch._dynamo so that processes forked from this one need not
import torch
import torch._dynamo

from minimax_train.config import Config
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.run_lock import release_lock
from minimax_train.trainer import Trainer
from support.distributed import TIMEOUT, run_ranks
from support.runs import DIVISIBLE, tiny_run

TOLERANCE = 1e-10
BEFORE = 3  # steps before the save
Numbers = list[tuple[float, float]]  # loss and gradient norm by step


class Grid(NamedTuple):
    """How many ranks, which engine and its options, and sizes of the axes."""

    ranks: int
    engine: str
    sizes: dict[str, int]

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}={size}" for axis, size in self.sizes.items())
        return f"{self.ranks} {self.engine} {sizes}".strip()


GRIDS = (
    Grid(1, "zero1", {}),
    Grid(8, "fsdp", {"tp": 4, "ep": 2, "etp": 2}),
    Grid(2, "fsdp", {}),
    Grid(8, "zero1", {"tp": 2, "cp": 2, "ep": 4}),
    Grid(4, "fsdp engine.shard_within=2", {"cp": 2, "ep": 2, "etp": 2}),
    Grid(4, "zero1", {"ep": 4}),
    Grid(8, "zero1", {"cp": 4, "etp": 4}),
    Grid(4, "zero1", {"tp": 2, "cp": 2, "etp": 2}),
    Grid(8, "fsdp", {"cp": 2, "ep": 8}),
    Grid(4, "fsdp", {"tp": 2}),
    Grid(2, "fsdp", {"pp": 2}),
    Grid(8, "fsdp", {"pp": 2, "tp": 2, "ep": 2, "etp": 2}),
)


class Work(NamedTuple):
    """A run to be continued for some steps on one of the grids of so many ranks, and saved or not."""

    config: Config
    steps: int
    saves: bool


def _train(_: ProcessGrid, work: Sequence[Work]) -> list[Numbers]:
    return [_continue(each) for each in work]


def _continue(work: Work) -> Numbers:
    trainer = Trainer(work.config, ProcessGrid.create("cpu", TIMEOUT, **work.config.parallel.grid), torch.device("cpu"))
    numbers = []
    for _ in range(work.steps):
        metrics = trainer.metrics(trainer.train_step())
        numbers.append((metrics["loss"], metrics["grad_norm"]))
    if work.saves:
        trainer.save(trainer.plan())
    trainer.log.close()
    trainer.loader.close()
    release_lock(trainer.run_dir)
    return numbers


def _config(folder: Path, run: Path, grid: Grid, steps: int) -> Config:
    more = [*DIVISIBLE, "model.num_layers=2", "model.layer_pattern=LS", "model.aux_loss_coefficient=0.1"]
    more += [
        "engine.precision=float64",
        "checkpoint.interval=1000",
        "checkpoint.resume=auto",
        *f"engine={grid.engine}".split(),
    ]
    more += ["recipe.eval_interval=0", f"recipe.steps={BEFORE + steps + 2}"]
    sizes = [f"parallel.{axis}={size}" for axis, size in grid.sizes.items()]
    config = tiny_run(folder, *more, *sizes, f"run_dir={run}")
    config.check_world_size(grid.ranks)
    return config


def pairs_of(number: int, choose: random.Random) -> list[tuple[int, int]]:
    """Ordered pairs of grids, no two alike, each grid as often first as second where their number allows it."""
    apart = list(range(1, len(GRIDS)))
    choose.shuffle(apart)
    return [(i, (i + by) % len(GRIDS)) for by in apart for i in range(len(GRIDS))][:number]


def sweep(folder: Path, pairs: Sequence[tuple[int, int]], steps: int) -> list[str]:
    """How pairs differ from the run that never stopped, a line each."""
    (right,) = run_ranks(_train, 1, [Work(_config(folder, folder / "right", GRIDS[0], steps), BEFORE + steps, False)])[
        0
    ]
    assert right[0][0] != right[-1][0]

    def run_all(todo: dict[int, list[Work]], expected: Numbers) -> dict[int, list[str]]:
        """Differences by number of ranks."""
        found = defaultdict(list)
        for ranks, work in todo.items():
            started = time.monotonic()
            every = run_ranks(_train, ranks, work, timeout_s=3600)
            for of_rank in every:
                for each, numbers in zip(work, of_rank, strict=True):
                    for step, (a, b) in enumerate(zip(numbers, expected, strict=True)):
                        if not all(abs(x - y) <= TOLERANCE * abs(y) for x, y in zip(a, b, strict=True)):
                            found[ranks].append(f"{each.config.run_dir}: step {step} of {steps}: {a} against {b}")
            print(f"{len(work)} runs of {ranks} ranks: {time.monotonic() - started:.0f} s", flush=True)
        return found

    todo = defaultdict(list)
    for i, grid in enumerate(GRIDS):
        todo[grid.ranks].append(Work(_config(folder, folder / f"source-{i}", grid, steps), BEFORE, True))
    before = run_all(todo, right[:BEFORE])
    todo = defaultdict(list)
    for i, j in pairs:
        run = folder / f"{i}-to-{j} ({GRIDS[i]} to {GRIDS[j]})".replace("=", "").replace(" ", "_")
        shutil.copytree(folder / f"source-{i}", run)
        todo[GRIDS[j].ranks].append(Work(_config(folder, run, GRIDS[j], steps), steps, False))
    after = run_all(todo, right[BEFORE:])
    return [line for found in (before, after) for lines in found.values() for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="after the checkpoint")
    parser.add_argument("--seed", type=int, default=1)
    options, started = parser.parse_args(arguments), time.monotonic()
    torch.set_num_threads(1)
    pairs = pairs_of(options.pairs, random.Random(options.seed))
    with tempfile.TemporaryDirectory() as folder:
        found = sweep(Path(folder), pairs, options.steps)
    print(*found[:20], sep="\n")
    print(f"{len(pairs)} pairs of {len(GRIDS)} grids: {len(found)} differences, {time.monotonic() - started:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
