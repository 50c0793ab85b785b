"""Pipeline stages: which share of a step ranks wait, by simulation and measured.

    python benchmarks/pipeline.py [--ranks 2 4 8 16] [--micro-batches 8 32] [--weights 0.3] [--json FILE] [overrides]
    torchrun --nproc-per-node 2 benchmarks/pipeline.py --measure [--steps 5] [--json FILE] [overrides]

*theory* is ``(p - 1) / (v m + p - 1)`` of p ranks with v stages each and m micro-batches; ``(p - 1) / (6 m + p - 1)``
where the backward pass is split and its two halves each take as long as the forward pass. *simulated* runs the
schedule's table (``parallel/pipeline.py``) with the time of every stage: without ``--measure`` by the planner's rates,
the backward pass two thirds of it, of which the gradients of weights take what ``--weights`` says, as a share of the
whole; else as measured in the same step. *measured* is the time in which the compute
streams of all ranks wait for another stage, from the beginning of a step's passes to the end of the last rank's, over
all of that time; the median of the steps. Transfers take no time in the simulation.

Overrides are those of ``minimax-train``. A measured run is the trainer's own, with live data; the layers' own costs
decide how even the stages are, so give ``model.num_layers`` that the stages divide, or ``parallel.pp_layers``.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from minimax_train.config import Config, load_config
from minimax_train.engines.stages import Stages, _Run
from minimax_train.parallel.environment import ProcessEnvironment
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.parallel.pipeline import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    WEIGHTS,
    Pass,
    bubble,
    table,
    timeline,
)
from minimax_train.parallelize import parts_of_ranks
from minimax_train.planner.cost import stage_costs
from minimax_train.trainer import Trainer

Seconds = Callable[[Pass], float]


def theory(schedule: str, ranks: int, parts: int, micro_batches: int) -> float:
    passes = 6 if SCHEDULES[schedule].splits else parts
    return (ranks - 1) / (passes * micro_batches + ranks - 1)


def simulated(schedule: str, ranks: int, parts: int, micro_batches: int, seconds: Seconds) -> float:
    return bubble(timeline(table(schedule, ranks, parts, micro_batches), seconds))


def planned(config: Config, weights: float) -> Seconds:
    """Of each stage by the planner's rates, its gradients of weights that share of it."""
    costs, parts = stage_costs(config), [part for parts in parts_of_ranks(config) for part in parts]
    of_stage = [costs.of(part) for part in sorted(parts, key=lambda part: part.layers.start)]
    share = {FORWARD: 1 / 3, BACKWARD: 2 / 3, WEIGHTS: weights}
    if SCHEDULES[config.parallel.pp_schedule].splits:
        share[BACKWARD] -= weights
    return lambda one: of_stage[one.stage] * share[one.kind]


class Clock:
    """When the work was done that a device had been given; on CPUs now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        return end - begin if self._device.type == "cpu" else begin.elapsed_time(end) / 1e3


def one_step(trainer: Trainer, clock: Clock) -> dict[str, Any]:
    """Seconds of a step's passes on this rank, those in which it waits, and the mean of its passes by kind."""
    spans, waits, passes = list[tuple](), list[tuple](), defaultdict(list)

    def timed(method: Callable, into: Callable[..., list]) -> Callable:
        """Adds when a call began and ended, and the waits in between."""

        def run(self: Any, *arguments: Any) -> Any:
            begin, before = clock.now(), len(waits)
            result = method(self, *arguments)
            into(*arguments).append((begin, clock.now(), waits[before:]))
            return result

        return run

    def of_pass(one: Pass) -> list:
        return passes[one.kind, one.stage]

    with (
        mock.patch.object(Stages, "run", timed(Stages.run, lambda *_: spans)),
        mock.patch.object(_Run, "_given", timed(_Run._given, lambda *_: waits)),
        mock.patch.object(_Run, "_forward", timed(_Run._forward, of_pass)),
        mock.patch.object(_Run, "_backward", timed(_Run._backward, of_pass)),
        mock.patch.object(_Run, "_weights", timed(_Run._weights, of_pass)),
    ):
        plan = trainer.plan()
        batches = trainer.next_batches(plan)
        dist.barrier()
        trainer.engine.run(batches, plan)
        trainer.engine.step(plan.learning_rate)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()

    def waited(those: list[tuple]) -> float:
        return sum(clock.between(begin, end) for begin, end, _ in those)

    means = {
        f"{kind} {stage}": statistics.fmean(clock.between(begin, end) - waited(inside) for begin, end, inside in found)
        for (kind, stage), found in passes.items()
    }
    return {"seconds": waited(spans), "waited": waited(waits), "passes": means}


def measure(overrides: Sequence[str], steps: int) -> dict[str, Any]:
    """One schedule; the same on all ranks."""
    environment = ProcessEnvironment.detect()
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    long = ["recipe.steps=1000000", "recipe.eval_interval=0", "checkpoint.interval=0"]
    config = load_config([*long, *overrides, "engine=fsdp", f"run_dir={shared[0]}/run"])
    config.check_world_size(environment.world_size)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    grid = ProcessGrid.create(device.type, timedelta(seconds=600), **config.parallel.grid)
    trainer = Trainer(config, grid, device)
    shares, simulations, passes = list[float](), list[float](), dict[str, float]()
    with closing(trainer.loader):
        schedule, ranks, parts = config.parallel.pp_schedule, config.parallel.pp, config.parallel.stages_of_rank
        micro_batches = trainer.plan().micro_batches(grid.size("dp"))
        for step in range(steps + 2):  # two to warm up
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, one_step(trainer, Clock(device)))
            if step < 2:
                continue
            longest = max(rank["seconds"] for rank in every)
            idle = sum(longest - rank["seconds"] + rank["waited"] for rank in every)
            shares.append(idle / (len(every) * longest))
            passes = {name: mean for rank in every for name, mean in rank["passes"].items()}
            found = dict(passes)
            sizes = (schedule, ranks, parts, micro_batches)
            simulations.append(simulated(*sizes, lambda one, found=found: found[f"{one.kind} {one.stage}"]))
    trainer.log.close()
    return {
        "schedule": schedule,
        "ranks": ranks,
        "micro_batches": micro_batches,
        "theory": theory(schedule, ranks, parts, micro_batches),
        "simulated": statistics.median(simulations),
        "measured": statistics.median(shares),
        "passes_ms": {name: 1e3 * mean for name, mean in sorted(passes.items())},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--weights", type=float, default=1 / 3, help="share of gradients of weights in a stage's time")
    parser.add_argument("--measure", action="store_true", help="train on the processes that torchrun started")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args(arguments)
    rows: list[dict[str, Any]] = []
    first = True
    if options.measure:
        environment = ProcessEnvironment.detect()
        environment.init_process_group("cuda" if torch.cuda.is_available() else "cpu", timedelta(seconds=600))
        first = environment.rank == 0
        sizes = [] if any("parallel.pp=" in text for text in options.overrides) else ["parallel.pp=2"]
        for schedule in SCHEDULES:
            found = measure([*options.overrides, *sizes, f"parallel.pp_schedule={schedule}"], options.steps)
            gc.collect()
            rows.append(found)
    else:
        for schedule, each in SCHEDULES.items():
            for ranks in options.ranks:
                sizes = [f"parallel.pp={ranks}", f"parallel.pp_schedule={schedule}", "engine=fsdp"]
                seconds = planned(load_config(["model=text-01", *options.overrides, *sizes]), options.weights)
                rows += [
                    {
                        "schedule": schedule,
                        "ranks": ranks,
                        "micro_batches": number,
                        "theory": theory(schedule, ranks, each.parts, number),
                        "simulated": simulated(schedule, ranks, each.parts, number, seconds),
                    }
                    for number in options.micro_batches
                    if number >= each.micro_batches * ranks
                ]
    if first:
        show(rows, options)
    if options.measure:
        dist.destroy_process_group()
    return 0


def show(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    columns = ("theory", "simulated", *(["measured"] if options.measure else []))
    print(f"{'schedule':18}{'ranks':>6}{'micro-batches':>15}" + "".join(f"{name + ' %':>14}" for name in columns))
    for row in rows:
        shares = "".join(f"{100 * row[name]:14.1f}" for name in columns)
        print(f"{row['schedule']:18}{row['ranks']:6}{row['micro_batches']:15}{shares}")
        if "passes_ms" in row:
            print("  ms of a pass:", ", ".join(f"{name} {ms:.1f}" for name, ms in row["passes_ms"].items()))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
