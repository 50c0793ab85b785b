"""What a checkpoint costs the steps around it: ours beside training and at once, PyTorch's plain and asynchronous.

    python benchmarks/checkpoints.py [--model medium] [--micro-batches 8] [--steps 8] [--run-dir FOLDER]
        [--methods async sync dcp dcp-async] [--json FILE] [overrides]
    torchrun --nproc-per-node 2 benchmarks/checkpoints.py

The trainer's loop on live data: first ``--steps`` steps without saves, then for each method one save (two of
``dcp-async``, whose first starts a process and allocates memory) among steps that go on until it is complete, and four
more. Ours are hashed, reach the disk and are renamed; PyTorch's are ``dcp.save`` and ``dcp.async_save`` with a process,
cached plans, and staging memory that is pinned and shared. On a GPU steps are timed by its own events.

    extra s     of all steps from the save to one after it was complete, over as many median steps without saves
    longest     step / median
    during %    median of the steps while it was written, but the first, over the median without saves
    blocked s   that the call, and the wait for staging before the update, held the host
    written s   until it was seen, between steps, to be complete; GB/s is of that
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from minimax_train.config import load_config
from minimax_train.guard import TakenStep
from minimax_train.parallel.environment import ProcessEnvironment
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.run_lock import release_lock
from minimax_train.trainer import Trainer

METHODS = ("async", "sync", "dcp", "dcp-async")
COLUMNS = ("extra s", "longest", "during %", "blocked s", "written s", "GB", "GB/s", "steps")


class Steps:
    """Steps of a trainer, and how long each took."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._late: TakenStep | None = None
        self._marks = [self._mark()]

    def take(self) -> None:
        """One more; the host runs ahead of the device by one, as the trainer's does."""
        taken = self.trainer.train_step()
        if self._late is not None:
            self.trainer.metrics(self._late)
        self._late = taken
        self._marks.append(self._mark())

    def finish(self) -> list[float]:
        """Seconds of the steps so far."""
        self.trainer.guard.check()
        marks, self._marks, self._late = self._marks, [self._mark()], None
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
        return [b - a for a, b in itertools.pairwise(marks)]

    def _mark(self) -> Any:
        if self.trainer.device.type == "cuda":
            return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        return time.perf_counter()


def measure(steps: Steps, save: Callable[[], tuple[Callable[[], bool], Path]], normal_s: float) -> dict[str, float]:
    """One save among steps.

    Args:
        save: begins to; returns what tells, at any time, whether it is complete, and its folder.
    """
    steps.take()
    steps.finish()
    started = time.perf_counter()
    is_complete, folder = save()
    blocked = time.perf_counter() - started
    during, written = 0, time.perf_counter() - started
    while not all_ranks(is_complete()):
        steps.take()
        during += 1
        written = time.perf_counter() - started
    for _ in range(4):
        steps.take()
    taken = steps.finish()
    touched = taken[: during + 1]
    dist.barrier()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
    return {
        "extra s": sum(touched) - len(touched) * normal_s,  # the first begins with the save
        "longest": max(touched) / normal_s,
        "during %": 100 * (statistics.median(touched[1:during] or [float("nan")]) / normal_s - 1),
        "blocked s": blocked,
        "written s": written,
        "GB": size,
        "GB/s": size / written,
        "steps": during,
    }


def all_ranks(done: bool) -> bool:
    """Whether it is so on all ranks; they take the same steps."""
    told = torch.tensor(int(done))
    dist.all_reduce(told, op=dist.ReduceOp.MIN)
    return bool(told)


@contextmanager
def methods(trainer: Trainer, names: list[str], folder: Path) -> Iterator[dict[str, Callable[[], tuple]]]:
    """The ways to save, by name."""
    store = trainer.store

    def ours(must_succeed: bool) -> tuple[Callable[[], bool], Path]:
        trainer.save(trainer.plan(), must_succeed)
        step = trainer.progress.step
        return lambda: not trainer.saver.is_saving, Path(str(store.path(step)))

    def plain() -> tuple[Callable[[], bool], Path]:
        dcp.save(trainer.engine.snapshot(), checkpoint_id=folder / "dcp")
        return lambda: True, folder / "dcp"

    on_gpu = trainer.device.type == "cuda"
    stager = None
    count = 0

    def beside() -> tuple[Callable[[], bool], Path]:
        nonlocal stager, count
        count += 1
        target = folder / f"dcp-async-{count}"
        if stager is None:
            stager = DefaultStager(StagingOptions(on_gpu, True, on_gpu, on_gpu))
        response: Any = dcp.async_save(
            trainer.engine.snapshot(),
            checkpoint_id=target,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=stager,
            planner=dcp.DefaultSavePlanner(enable_plan_caching=True),
        )
        staged = getattr(response, "staging_completion", None)
        if staged is not None:
            patched = mock.patch.object(trainer.saver, "before_update", lambda: staged.result())
            patched.start()
            response = response.upload_completion

        def is_complete() -> bool:
            if not response.done():
                return False
            response.result()
            mock.patch.stopall()
            return True

        return is_complete, target

    found = dict(zip(METHODS, (lambda: ours(False), lambda: ours(True), plain, beside), strict=True))
    try:
        yield {name: found[name] for name in names}
    finally:
        if stager is not None:
            stager.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="medium", choices=["tiny", "small", "medium"])
    parser.add_argument("--micro-batches", type=int, default=8, help="a step and rank, of 4 sequences of 8,192 tokens")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--run-dir", type=Path, help="a new folder on the disk that is measured")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    environment = ProcessEnvironment.detect()
    device = environment.init_process_group("cuda" if torch.cuda.is_available() else "cpu", timedelta(seconds=600))
    shared = [options.run_dir or Path(tempfile.mkdtemp())]  # the first rank's, which holds the run
    dist.broadcast_object_list(shared)
    run_dir = shared[0] / "run"
    config = load_config(
        [
            f"model={options.model}",
            "data.sequence_length=8192",
            "recipe.micro_batch_size=4",
            f"recipe.global_batch_size={4 * options.micro_batches * environment.world_size}",
            f"data.num_streams={max(8, 4 * environment.world_size)}",
            f"recipe.steps={10**6}",
            "recipe.learning_rate=1e-5",
            "recipe.min_learning_rate=1e-6",
            "recipe.eval_interval=0",
            "checkpoint.keep=0",
            *options.overrides,
            f"run_dir={run_dir}",
        ]
    )
    config.check_world_size(environment.world_size)
    grid = ProcessGrid.create(device.type, timedelta(seconds=600), **config.parallel.grid)
    trainer = Trainer(config, grid, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    with closing(trainer.loader), closing(trainer.saver):
        run(trainer, options, f"{environment.world_size} x {name}, torch {torch.__version__}", run_dir)
    release_lock(run_dir)
    dist.barrier()
    if grid.is_first:
        shutil.rmtree(run_dir)
    del trainer, grid
    gc.collect()  # communicators wait for the graphs that were captured with them
    dist.destroy_process_group()
    return 0


def run(trainer: Trainer, options: argparse.Namespace, machine: str, folder: Path) -> None:
    """Measure and print all rows."""
    first = trainer.grid.is_first
    steps = Steps(trainer)
    if "async" in options.methods:
        trainer.saver.prepare(trainer.engine.snapshot())
        began = time.perf_counter()
        while not all_ranks(trainer.saver.is_ready):
            steps.take()
        if first:
            print(f"ready to save beside training after {time.perf_counter() - began:.1f} s of steps", flush=True)
    for _ in range(3):
        steps.take()
    steps.finish()
    for _ in range(options.steps):
        steps.take()
    normal = steps.finish()
    normal_s = statistics.median(normal)
    if first:
        print(f"{machine}; median step {normal_s:.3f} s, from {min(normal):.3f} to {max(normal):.3f} s")
        print(f"{'':12}" + "".join(f"{column:>11}" for column in COLUMNS), flush=True)
    results = []
    with methods(trainer, options.methods, folder) as saves:
        for name, save in saves.items():
            if name.startswith("dcp"):
                trainer.saver.close()  # its memory is not PyTorch's fault
            for _ in range(2 if name == "dcp-async" else 1):
                try:
                    found = measure(steps, save, normal_s)
                except Exception as error:  # a method that this machine does not allow, as for want of shared memory
                    if first:
                        print(f"{name:12}  failed: {' '.join(str(error).split())[:300]}", flush=True)
                    break
                results.append({"method": name, **found})
                if first:
                    print(f"{name:12}" + "".join(f"{found[column]:11.2f}" for column in COLUMNS), flush=True)
                    for saved in [*map(str, trainer.store.all()), *folder.glob("dcp*")]:
                        shutil.rmtree(saved)
                dist.barrier()
    if options.json and first:
        options.json.write_text(json.dumps({"machine": machine, "step_s": normal_s, "results": results}))


if __name__ == "__main__":
    sys.exit(main())
