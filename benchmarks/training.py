"""Whole training steps: the trainer's own loop on live data, its rate, and where the time goes.

    python benchmarks/training.py [--models small medium slice] [--lengths 8192 32768] [--micro-batches 1 8]
        [--routing real balanced] [--longest 16384] [--steps 8] [--json FILE] [overrides]
    torchrun --nproc-per-node 2 benchmarks/training.py --models medium parallel.cp=2

Each case is a ``Trainer`` as ``minimax-train`` makes it, with its loader, clipping and metrics; without evaluation and
checkpoints. ``--rows`` packed sequences of 8,192 tokens make a micro-batch, or as many tokens of longer ones. ``slice``
is text-01 at full width: one lightning and one softmax layer, 8 experts, a vocabulary of 32,000. *Balanced* routing
gives every expert as many assignments as any other, whatever the router says. Documents are the standard library's
files, of some 4,000 tokens; the few of 100,000 and more make long sequences hard to compare, so ``--longest`` leaves
out those of so many tokens and more. After warm-up the steps are timed without a profiler, then three more are
profiled, which takes them longer where the host is in the way: "busy" is the share of their time in which a kernel
other than a collective's runs, "computes" that time in a step, to be compared with steps without a profiler; "exposed"
is the share in which only collectives run (by kind in the JSON), "launches" are kernels a step. FLOPs are the library's
own count (``metrics/flops.py``).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import closing, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from timing import Occupancy
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

import minimax_train.model.experts
from minimax_train.config import load_config
from minimax_train.guard import TakenStep
from minimax_train.parallel.environment import ProcessEnvironment
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.run_lock import release_lock
from minimax_train.trainer import Trainer

SLICE = [
    "model=text-01",
    "model.num_layers=2",
    "model.layer_pattern=LS",
    "model.num_experts=8",
    "model.vocab_size=32000",
]
MODELS = {name: [f"model={name}"] for name in ("tiny", "small", "medium", "proxy")} | {"slice": SLICE}
COLUMNS = (
    "tokens/s",
    "TFLOP/s",
    "MFU %",
    "ms",
    "longest ms",
    "computes ms",
    "busy %",
    "exposed %",
    "launches",
    "host ms",
    "data ms",
    "GiB",
    "loss",
)


def balanced(route: Any) -> Any:
    """Routing in which token t's k-th choice is expert t * K + k modulo their number, with nearly equal weights."""

    def routed(logits_TE: Tensor, experts_per_token: int, *arguments: Any, **options: Any) -> Any:
        (T, E), K = logits_TE.shape, experts_per_token
        choice_TK = torch.arange(T * K, device=logits_TE.device).remainder(E).view(T, K)
        preferred_TE = torch.zeros_like(logits_TE).scatter(1, choice_TK, 100.0)
        return route(logits_TE * 1e-3 + preferred_TE, K, *arguments, **options)

    return routed


def measure(
    steps: int, overrides: list[str], environment: ProcessEnvironment, device: torch.device
) -> dict[str, float]:
    """One case; figures of this rank, with the seconds until its trainer was there, until its first three steps were
    done, and until all was."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]  # the first rank's, which holds the run
        dist.broadcast_object_list(shared)
        config = load_config([*overrides, f"run_dir={shared[0]}/run"])
        config.check_world_size(environment.world_size)
        grid = ProcessGrid.create(device.type, timedelta(seconds=600), **config.parallel.grid)
        trainer = Trainer(config, grid, device)
        made_s = time.monotonic() - began
        try:
            with closing(trainer.loader):
                for _ in range(3):
                    trainer.metrics(trainer.train_step())
                warm_s = time.monotonic() - began
                found = timed(trainer, steps) | profiled(trainer)
                return found | {"made s": made_s, "warm s": warm_s, "whole s": time.monotonic() - began}
        finally:
            release_lock(Path(config.run_dir))
            dist.barrier()


def timed(trainer: Trainer, steps: int) -> dict[str, float]:
    """Rate of the median of some steps, memory, and the host's time to launch one."""
    launched, flops_per_token, seconds, waited_s = [], [], [], 0.0  # FLOPs depend on the documents of a step
    late: TakenStep | None = None

    def report(step: TakenStep) -> dict[str, float]:
        nonlocal waited_s
        metrics = trainer.metrics(step)
        seconds.append(metrics["seconds"])
        waited_s += metrics.get("seconds/data", 0.0)
        flops_per_token.append(metrics["tflops_per_rank"] / metrics["tokens_per_second"])
        return metrics

    for _ in range(steps):
        before = time.perf_counter()
        taken = trainer.train_step()
        launched.append(time.perf_counter() - before)
        if late is not None:  # a step late, as in training
            report(late)
        late = taken
    assert late is not None
    metrics = report(late)  # waits for the device
    step_s = statistics.median(seconds)
    tokens_per_s = late.plan.tokens / step_s
    tflops = statistics.mean(flops_per_token) * tokens_per_s
    return {
        "tokens/s": tokens_per_s,
        "TFLOP/s": tflops,
        "MFU %": 100e12 * tflops / (trainer.peak_flops_per_s or float("nan")),
        "ms": 1e3 * step_s,
        "longest ms": 1e3 * max(seconds),
        "host ms": 1e3 * statistics.median(launched),
        "data ms": 1e3 * waited_s / steps,
        "GiB": metrics.get("peak_memory_gib", float("nan")),
        "loss": metrics["loss"],
    }


def occupancy(trainer: Trainer, steps: int) -> Occupancy | None:
    """Of the GPU in some steps more, under the profiler, after one in which that gets ready; None without a GPU."""
    if trainer.device.type != "cuda":
        return None
    windows = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with profile(activities=[ProfilerActivity.CUDA], schedule=windows) as recorded:
        for taken in range(1 + steps):
            trainer.train_step()
            if taken in (0, steps):
                torch.cuda.synchronize()
            recorded.step()
    trainer.guard.check()
    return Occupancy.of(recorded)


def profiled(trainer: Trainer, steps: int = 3) -> dict[str, float]:
    """Shares of the time in which the device computes, and in which it only communicates; what a step has of it, and of
    launches."""
    found = occupancy(trainer, steps)
    if found is None:
        return dict.fromkeys(("computes ms", "busy %", "exposed %", "launches"), float("nan"))
    kinds = defaultdict[str, float](float)
    for name, us in found.exposed_us.items():  # a kernel for each dtype and algorithm: ncclDevKernel_AllGather_RING_LL
        kinds[name.removeprefix("ncclDevKernel_").partition("_")[0]] += 1e-3 * us / steps
    return {
        "computes ms": 1e-3 * found.busy * found.whole_us / steps,
        "busy %": 100 * found.busy,
        "exposed %": 100 * found.exposed,
        "launches": found.launches / steps,
        **{f"ms exposed {kind}": ms for kind, ms in kinds.items()},
    }


def endless(model: str, tokens: int, sequences: int, batch: int, streams: int, longest: int | None) -> list[str]:
    """Overrides of a run that does not end, evaluate or save.

    Args:
        model: of :data:`MODELS`.
        tokens: of a packed sequence.
        sequences, batch: packed sequences of a micro-batch, and of a step.
        streams: ``data.num_streams``.
        longest: documents have fewer tokens than this; None for all.
    """
    if longest is None:
        length = [f"recipe.steps={10**6}", "recipe.min_learning_rate=1e-6"]
    else:
        length = [f"recipe.{key}=null" for key in ("steps", "min_learning_rate", "decay_steps")]
        length += [f"recipe.stages.all.steps={10**6}", "recipe.stages.all.lengths.short=1"]
        length += [f"data.medium_length={longest}", f"data.long_length={longest + 1}"]
    return [
        *MODELS[model],
        f"data.sequence_length={tokens}",
        f"recipe.micro_batch_size={sequences}",
        f"recipe.global_batch_size={batch}",
        f"data.num_streams={streams}",
        "recipe.learning_rate=1e-5",
        *length,
        "recipe.eval_interval=0",
        "checkpoint.interval=0",
    ]


def cases(options: argparse.Namespace) -> dict[tuple, list[str]]:
    """Name of each case and its overrides."""
    found, world_size = {}, ProcessEnvironment.detect().world_size
    for name, length, count, routing in itertools.product(
        options.models, options.lengths, options.micro_batches, options.routing
    ):
        rows = max(1, options.rows * 8192 // length)
        batch, streams = rows * count * world_size, max(8, rows * world_size)
        run = endless(name, length, rows, batch, streams, options.longest)
        found[name, length, count, routing] = [*run, *options.overrides]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["small", "medium", "slice"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--routing", nargs="+", choices=["real", "balanced"], default=["real"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--longest", type=int, help="documents have fewer tokens than this")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    environment = ProcessEnvironment.detect()
    device = environment.init_process_group("cuda" if torch.cuda.is_available() else "cpu", timedelta(seconds=600))
    first = environment.rank == 0
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if first:
        print(f"{environment.world_size} x {name}, torch {torch.__version__}")
        print(f"{'':32}" + "".join(f"{column:>11}" for column in COLUMNS), flush=True)
    results: dict[str, Any] = {}
    for case, overrides in cases(options).items():
        shown, why = f"{case[0]} {case[1]} x{case[2]} {case[3]}", ""
        route = minimax_train.model.experts.route
        forced = mock.patch.object(minimax_train.model.experts, "route", balanced(route))
        try:
            with forced if case[3] == "balanced" else nullcontext():
                found = measure(options.steps, overrides, environment, device)
        except torch.OutOfMemoryError as error:
            found, why = {}, str(error).partition(" If reserved")[0]  # what follows is advice
        results[shown] = found
        if first:
            row = "".join(f"{found.get(column, float('nan')):11,.1f}" for column in COLUMNS)
            print(f"{shown:32}{row if found else f'  {why}'}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if options.json and first:
        options.json.write_text(json.dumps({"machine": name, "results": results}))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
