"""The same model, data and seed under each engine: rate, memory, exposed communication, loss.

    python benchmarks/engines.py [overrides] [--model medium] [--steps 8] [--json FILE] [--engines zero1 fsdp ...]
    torchrun --nproc-per-node 2 benchmarks/engines.py [...]

Each engine trains in processes of its own, one for every rank, started by those of this program. One that fails is a
row with its error, the last line that its first failing rank wrote; one that takes longer than ``--seconds`` is ended.

After three steps, ``--steps`` are timed: the rate is that of the median. "GiB" is the most that the fullest rank's GPU
ever held, "host" the most memory that a process had resident. "exposed" is the share of three more steps, under
``torch.profiler``, in which no kernel and no copy runs on a rank's GPU but NCCL's, mean of the ranks; there is none on
CPUs. "loss" is that of the last timed step, which is the same for all engines but for rounding.

A step is ``--micro-batches`` micro-batches of one packed sequence on every data-parallel rank. Engines with offload
compile DeepSpeedCPUAdam when they run for the first time on a machine, which takes a minute.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import json
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training import MODELS, occupancy

from minimax_train.config import load_config
from minimax_train.parallel.environment import ProcessEnvironment
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.trainer import Trainer

_OFFLOAD = "engine.offload_optimizer=true"
ENGINES = {
    "zero1": ["engine=zero1"],
    "fsdp": ["engine=fsdp"],
    "megatron": ["engine=megatron"],
    **{f"deepspeed-{stage}": ["engine=deepspeed", f"engine.stage={stage}"] for stage in range(4)},
    **{f"deepspeed-{stage}-offload": ["engine=deepspeed", f"engine.stage={stage}", _OFFLOAD] for stage in (1, 2, 3)},
    "deepspeed-3-offload-all": ["engine=deepspeed", "engine.stage=3", _OFFLOAD, "engine.offload_param=true"],
}
COLUMNS = {"tokens/s": ",.0f", "ms": ",.1f", "GiB": ".1f", "host": ".1f", "exposed %": ".1f", "loss": ".4f"}
WARM_UP = 3


def measure(overrides: list[str], steps: int) -> dict[str, float] | None:
    """In a process of an engine's own: its figures, on the first rank."""
    environment = ProcessEnvironment.detect()
    device = environment.init_process_group("cuda" if torch.cuda.is_available() else "cpu", timedelta(seconds=600))
    config = load_config(overrides)
    config.check_world_size(environment.world_size)
    grid = ProcessGrid.create(device.type, timedelta(seconds=600), **config.parallel.grid)
    own = of_rank(Trainer(config, grid, device), steps)
    gc.collect()  # communicators wait for the graphs that were captured with them
    ranks: list[dict[str, float]] = [{}] * environment.world_size
    dist.all_gather_object(ranks, own)
    dist.destroy_process_group()
    if environment.rank:
        return None
    most = {column: max(rank[column] for rank in ranks) for column in ("GiB", "host")}
    return own | most | {"exposed %": statistics.mean(rank["exposed %"] for rank in ranks)}


def of_rank(trainer: Trainer, steps: int) -> dict[str, float]:
    with closing(trainer.loader):
        seconds, taken = timed(trainer, steps)
        metrics, found = trainer.metrics(taken), occupancy(trainer, 3)
        return {
            "tokens/s": taken.plan.tokens / seconds,
            "ms": 1e3 * seconds,
            "GiB": metrics.get("peak_memory_gib", float("nan")),
            "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "loss": metrics["loss"],
            "exposed %": float("nan") if found is None else 100 * found.exposed,
        }


def timed(trainer: Trainer, steps: int) -> tuple[float, Any]:
    """Median of the seconds of a step, and the last step."""
    taken = [trainer.train_step() for _ in range(WARM_UP)][-1]
    trainer.metrics(taken)  # waits for the device
    if trainer.device.type != "cuda":
        at = [time.perf_counter()]
        for _ in range(steps):
            taken = trainer.train_step()
            at.append(time.perf_counter())
        return statistics.median(b - a for a, b in itertools.pairwise(at)), taken
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        taken = trainer.train_step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)), taken


def run(engine: str, options: argparse.Namespace, environment: ProcessEnvironment) -> dict[str, Any]:
    """Start this rank's process of an engine; its figures, or the error, on all ranks."""
    shared: list[Any] = [None]
    if environment.rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            shared = [(tempfile.mkdtemp(prefix="engines-"), free.getsockname()[1])]
    dist.broadcast_object_list(shared)
    folder, port = Path(shared[0][0]), shared[0][1]
    folder.mkdir(exist_ok=True)  # on another host
    result, log = folder / "result.json", folder / f"log-{environment.rank}"
    overrides = [*options.overrides, *shape(options, environment.world_size), *ENGINES[engine], f"run_dir={folder}/run"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    if environment.world_size > 1:
        environ["MASTER_PORT"] = str(port)
    command = [sys.executable, __file__, "--only", str(result), "--steps", str(options.steps)]
    command += ["--seconds", str(options.seconds), *overrides]
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        code = _wait(process, options.seconds, result)
    if code == 0:
        found = json.loads(result.read_text()) if environment.rank == 0 else {}
    else:
        text = re.sub(r"^\[rank\d+\]: ?", "", log.read_text(), flags=re.MULTILINE)
        if code is None:
            stood = re.findall(r"most recent call first\):\n +(.*)", text)  # the main thread comes last
            said = f"ended after {options.seconds:.0f} s; it stood in {stood[-1] if stood else 'its start'}"
        else:  # without what libraries warn of as they end
            lines = [line for line in text.splitlines() if line.strip() and not re.match(r"\[W\d", line)]
            said = lines[-1] if lines else f"exit status {code}"
        found = {"error": said}
    every: list[tuple[bool, dict[str, Any]]] = [(False, {})] * environment.world_size
    dist.all_gather_object(every, (process.returncode < 0, found))
    shutil.rmtree(folder, ignore_errors=True)
    # Of ranks that failed the first that was not ended because another had.
    failed = sorted((ended, rank) for rank, (ended, each) in enumerate(every) if "error" in each)
    return every[failed[0][1]][1] if failed else every[0][1]


def _wait(process: subprocess.Popen, limit_s: float, result: Path, grace_s: float = 10.0) -> int | None:
    """For all ranks' processes, which are ended soon where one has failed, or the result is there. Their exit status, 0
    with a result; None if they took too long."""
    started, over_at = time.monotonic(), None
    while True:
        code, late = process.poll(), time.monotonic() - started > limit_s
        state = torch.tensor([code is None, bool(code), late, result.exists()], dtype=torch.int32)
        dist.all_reduce(state, dist.ReduceOp.MAX)
        is_running, has_failed, is_late, is_there = state.tolist()
        if not is_running:
            return code
        if (has_failed or is_there) and over_at is None:
            over_at = time.monotonic()
        is_over = over_at is not None and time.monotonic() - over_at > grace_s
        if is_late or is_over:
            process.kill()  # nothing happens to one that has ended
            process.wait()
            if is_there and not has_failed:
                return 0
            return process.returncode if is_over else None
        time.sleep(0.2)


def shape(options: argparse.Namespace, world_size: int) -> list[str]:
    """Overrides of the model and the batch, whose ranks are all data-parallel unless the overrides say otherwise."""
    given = dict(each.partition("=")[::2] for each in options.overrides)
    apart = 1
    for axis in ("cp", "tp", "pp"):
        apart *= int(given.get(f"parallel.{axis}", 1))
    sequences = options.micro_batches * world_size // apart
    chosen = {
        "data.sequence_length": 8192,
        "recipe.micro_batch_size": 1,
        "recipe.global_batch_size": sequences,
        "data.num_streams": max(8, sequences),
        "recipe.steps": 10**6,
        "recipe.learning_rate": 1e-4,
        "recipe.min_learning_rate": 1e-5,
        "recipe.warmup_steps": 1,
        "recipe.eval_interval": 0,
        "checkpoint.interval": 0,
    }
    return MODELS[options.model] + [f"{key}={value}" for key, value in chosen.items() if key not in given]


def shown(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{name:26}{found['error']}"
    cells = ("-" if found[c] != found[c] else format(found[c], form) for c, form in COLUMNS.items())
    return f"{name:26}" + "".join(f"{cell:>12}" for cell in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="medium")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600, help="that an engine may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    if options.only:
        faulthandler.dump_traceback_later(0.8 * options.seconds)
        found = measure(options.overrides, options.steps)
        if found is not None:
            options.only.write_text(json.dumps(found))
        return 0
    environment = ProcessEnvironment.detect()
    environment.init_process_group("cpu", timedelta(seconds=600))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if environment.rank == 0:
        print(f"{environment.world_size} x {name}, torch {torch.__version__}, {options.model}")
        print(f"{'':26}" + "".join(f"{column:>12}" for column in COLUMNS), flush=True)
    results = {}
    for engine in options.engines:
        results[engine] = run(engine, options, environment)
        if environment.rank == 0:
            print(shown(engine, results[engine]), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"machine": name, "results": results}))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
