"""How the whole step scales over the GPUs of a machine, in one command.

    python benchmarks/cluster.py [--ranks 1 2 4 8] [--parts weak ...] [--seconds 600] [--json FILE] [--picture FILE]

Takes as many GPUs as it finds. Every case is ``benchmarks/training.py``'s: the trainer's own steps on live text.

    weak      data parallelism, 4 sequences of 8,192 tokens on every GPU
    apart     the same on all GPUs at once, each by itself: the slowest, as if all went at its rate. Transfers have no
              part in what lies between it and one GPU: GPUs that differ, or their host
    strong    data parallelism, 32 such sequences on all GPUs together
    axes      4 sequences per GPU: shared by all of them (tp, cp), or the experts divided (ep, etp)
    cp        one packed sequence of 131,072 tokens per GPU, shared by all of them, documents of fewer than 16,384
    linear    the same on all GPUs, by each way for lightning attention to cross ranks
    experts   a slice of text-01 at full width, each split of the experts, with 1, 2 and 4 token groups
    pp        pipeline stages, 8 micro-batches
    best      the grid that minimax-plan finds fastest, proxy and medium, 8 micro-batches, for each pipeline stage
    layers    benchmarks/context_parallel.py and benchmarks/experts.py over NCCL, and over the emulated link beside it

"ratio" is tokens/s per GPU over those of one GPU in the same part (of ``apart`` in ``weak``, of ``linear`` in ``cp``);
the picture shows it. "planned" is what minimax-plan expects. "ms" is the median of the timed steps, beside the longest
of them; "data ms" what the host waits in a step for the loader. "made s", "warm s" and "whole s" are the seconds until
a case's trainer was there, until three steps were done, and until all was.
A case that cannot run says why. What is not reached within ``--seconds`` is left out, and said so.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from drawing import save, subplots
from training import MODELS, endless, measure

from minimax_train.config import load_config
from minimax_train.errors import ConfigError
from minimax_train.parallel.cost import Machine
from minimax_train.parallel.environment import ProcessEnvironment
from minimax_train.parallel.grid import divisors
from minimax_train.planner.machine import MACHINES
from minimax_train.planner.plan import Cluster, plan_run
from minimax_train.planner.search import engines_with_stages, overrides_of, propose

HERE = Path(__file__).parent
PARTS = ("weak", "apart", "strong", "axes", "cp", "linear", "experts", "pp", "best", "layers")
DOCUMENT_TOKENS = 4000  # mean length of documents that minimax-plan assumes
LONGEST = 16384  # tokens of a document in long sequences, which would else be hard to compare
LOADERS = 4  # processes that read and encode them, of each data-parallel rank
SEQUENCES, MICRO_BATCHES = 4, 8


@dataclass(frozen=True)
class Case:
    """A run to time.

    Attributes:
        part: of :data:`PARTS`.
        model: of ``training.MODELS``.
        ranks: GPUs.
        tokens: of a packed sequence.
        sequences: in a micro-batch.
        micro_batches: on a data-parallel rank.
        dp: data-parallel ranks.
        overrides: of the grid and the engine.
        longest: documents have fewer tokens than this.
    """

    part: str
    model: str
    ranks: int
    tokens: int
    sequences: int
    micro_batches: int
    dp: int
    overrides: tuple[str, ...] = ()
    longest: int | None = None

    @property
    def shown(self) -> str:
        how = " ".join(override.removeprefix("parallel.") for override in self.overrides) or f"dp={self.dp}"
        return f"{self.part:8}{self.model:8}{how}"

    @property
    def all_overrides(self) -> list[str]:
        batch = self.sequences * self.micro_batches * self.dp
        # Longer documents are read and left out: of each token that is trained on, more are encoded.
        loaders = 1 if self.longest is None else LOADERS
        overrides = endless(self.model, self.tokens, self.sequences, batch, max(batch, loaders * self.dp), self.longest)
        return [*overrides, f"data.num_workers={loaders}", *self.overrides]


def cases(part: str, ranks: int, most: int, options: argparse.Namespace) -> Iterator[Case]:
    """Of a part, on so many GPUs of the most there are."""
    n, model, tokens = ranks, options.model, options.tokens
    dense = Case(part, model, n, tokens, SEQUENCES, 1, n)
    shared = replace(dense, dp=1)
    long = replace(shared, tokens=options.long_tokens * n, sequences=1, longest=LONGEST)
    if part == "weak":
        yield dense
    elif part == "strong":
        yield replace(dense, micro_batches=MICRO_BATCHES // n)
    elif part == "cp":
        yield replace(long, overrides=() if n == 1 else (f"parallel.cp={n}",))
    elif part == "linear" and n == most > 1:
        for method in ("lasp_plus", "scan", "ring"):
            yield replace(long, overrides=(f"parallel.cp={n}", f"parallel.linear_cp={method}"))
    elif part == "axes" and n == 1:
        yield dense
    elif part == "axes":
        for axis in ("tp", "cp"):
            yield replace(shared, sequences=SEQUENCES * n, overrides=(f"parallel.{axis}={n}",))
        for how in ("ep={}", "etp={}", "etp={} token_groups=2"):
            yield replace(dense, overrides=tuple(f"parallel.{one}" for one in how.format(n).split()))
    elif part == "experts":
        sliced = replace(dense, model=options.slice)
        if n == 1:
            yield sliced
        for etp in divisors(n) if n > 1 else ():
            for groups in (1, 2, 4):
                axes = (f"parallel.ep={n // etp}", f"parallel.etp={etp}", f"parallel.token_groups={groups}")
                yield replace(sliced, overrides=axes)
    elif part == "pp":
        staged = replace(dense, micro_batches=MICRO_BATCHES, dp=1, overrides=("engine=fsdp",))
        if n == 1:
            yield staged
        elif "pp" in load_config(["model=tiny"]).parallel.sizes:
            yield replace(staged, overrides=(*staged.overrides, f"parallel.pp={n}"))
    elif part == "best" and n == most and (machine := machine_name()):
        for name in dict.fromkeys(("proxy", model)):
            case = replace(dense, model=name, micro_batches=MICRO_BATCHES)
            config, cluster = load_config(case.all_overrides), Cluster(n, MACHINES[machine], Machine())
            best = propose(config, cluster, DOCUMENT_TOKENS, MICRO_BATCHES, engines_with_stages(config))[0]
            split = [o for o in overrides_of(best, config).split() if o.startswith(("engine=", "parallel."))]
            dp = best.grid.size("dp")
            yield replace(case, dp=dp, micro_batches=best.step.micro_batches(dp), overrides=tuple(split))


def machine_name() -> str | None:
    """Of the table of the planner, of this machine's GPUs."""
    if not torch.cuda.is_available():
        return None
    return next((name for name in MACHINES if name in torch.cuda.get_device_name().lower()), None)


def planned(case: Case) -> dict[str, float]:
    """What the planner expects of a case."""
    machine = machine_name()
    if machine is None:
        return {}
    plan = plan_run(load_config(case.all_overrides), Cluster(case.ranks, MACHINES[machine], Machine()), DOCUMENT_TOKENS)
    return {"planned ms": 1e3 * plan.cost.seconds, "planned GiB": plan.memory_bytes / 2**30}


def run_worker(options: argparse.Namespace) -> None:
    """One rank of a torchrun: every case on so many GPUs, a JSON line each as soon as it is done."""
    environment = ProcessEnvironment.detect()
    device = environment.init_process_group("cuda" if torch.cuda.is_available() else "cpu", timedelta(seconds=120))
    for part in options.parts:
        for case in cases(part, environment.world_size, options.most, options):
            try:
                found = measure(options.steps, case.all_overrides, environment, device) | planned(case)
            except (ConfigError, torch.OutOfMemoryError) as error:  # alike on all ranks
                found = {"error": str(error).splitlines()[0][:120]}
            if environment.rank == 0:
                with options.json.open("a") as file:
                    file.write(json.dumps({**asdict(case), "shown": case.shown, **found}) + "\n")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
    dist.destroy_process_group()


def torchrun(ranks: int, *arguments: str) -> list[str]:
    how = ["--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *how, *arguments]


def finish(command: list[str], seconds: float, **environment: str) -> str | None:
    """Run a command; why it did not end well."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        _, error = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.terminate()  # not kill: torchrun ends its ranks, which would keep their GPUs
        process.communicate()
        return "no time was left"
    if process.returncode:
        # A rank's own error, before what torchrun says of it.
        lines = [line for line in error.splitlines() if "ChildFailedError" not in line]
        errors = [line for line in lines if re.match(r"(\[rank\d+\]: *)?[\w.]+Error\b", line)] or lines
        return f"status {process.returncode}: {errors[-1] if errors else 'it says nothing'}"
    return None


def one_gpu(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By part, the case of one GPU with which its others are compared."""
    alone = {r["part"]: r for r in reversed(results) if r["ranks"] == 1 and "tokens/s" in r}
    for part, other in {"apart": "weak", "linear": "cp"}.items():
        if other in alone:
            alone[part] = alone[other]
    return alone


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    alone = one_gpu(results)
    columns = (
        "ms",
        "longest ms",
        "planned ms",
        "tokens/s",
        "MFU %",
        "computes ms",
        "busy %",
        "exposed %",
        "data ms",
        "GiB",
        "planned GiB",
        "made s",
        "warm s",
        "whole s",
    )
    yield f"{'GPUs':5}{'':44}" + "".join(f"{column:>12}" for column in columns) + f"{'ratio':>8}"
    for r in results:
        name = f"{r['ranks']:<5}{r['shown']:44.43}"
        if "error" in r:
            yield f"{name}  {r['error']}"
            continue
        figures = "".join(f"{r.get(column, float('nan')):12,.1f}" for column in columns)
        one = alone.get(r["part"], {"tokens/s": float("nan")})
        ratio = r["tokens/s"] / r["ranks"] / one["tokens/s"]
        yield f"{name}{figures}{ratio:8.3f}"


def draw(results: list[dict[str, Any]], picture: Path) -> None:
    """A bar for every case on several GPUs: tokens/s per GPU over one GPU's. A line across it is what was planned."""
    alone, bars = one_gpu(results), []
    for r in results:
        if r["ranks"] > 1 and "error" not in r and r["part"] in alone:
            one = alone[r["part"]]
            share, planned = r["tokens/s"] / r["ranks"] / one["tokens/s"], None
            if "planned ms" in one:  # both steps at their planned time
                planned = share * r["ms"] / r["planned ms"] / (one["ms"] / one["planned ms"])
            bars.append((f"{r['ranks']} GPUs  {r['shown']}", share, planned))
    if not bars:
        return
    figure, (axis,) = subplots(1, 1, (7.5, 1.2 + 0.24 * len(bars)))
    names, measured, planned = zip(*reversed(bars), strict=True)
    places = range(len(bars))
    axis.barh(places, measured, color="C0", label="measured")
    known = [(place, share) for place, share in zip(places, planned, strict=True) if share is not None]
    axis.plot([share for _, share in known], [place for place, _ in known], "k|", markersize=11, label="planned")
    axis.set_yticks(places, names, family="monospace", fontsize=7)
    axis.set(xlabel="tokens/s per GPU over one GPU's", xlim=(0, None))
    save(figure, axis, picture)


def measure_parts(
    n: int, parts: list[str], most: int, options: argparse.Namespace, seconds: float, **environment: str
) -> tuple[list[dict[str, Any]], str | None]:
    """The cases of some parts on n GPUs: those that were done, and why not all of them."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl"
        own = ["--worker", "--most", str(most), "--json", str(lines), "--steps", str(options.steps), "--parts", *parts]
        own += ["--model", options.model, "--slice", options.slice]
        own += ["--tokens", str(options.tokens), "--long-tokens", str(options.long_tokens)]
        why = finish(torchrun(n, str(HERE / "cluster.py"), *own), seconds, **environment)
        return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else [], why


def measure_apart(n: int, options: argparse.Namespace, seconds: float) -> tuple[list[dict[str, Any]], str | None]:
    """The part weak on each of n GPUs at the same time, as one case, or none and why."""

    def on(gpu: int) -> tuple[list[dict[str, Any]], str | None]:
        return measure_parts(1, ["weak"], n, options, seconds, CUDA_VISIBLE_DEVICES=str(gpu))

    with ThreadPoolExecutor(n) as pool:
        found = list(pool.map(on, range(n)))
    for cases_of_gpu, why in found:
        if why is not None or "tokens/s" not in cases_of_gpu[0]:
            return [], why or cases_of_gpu[0]["error"]
    rates = [cases_of_gpu[0]["tokens/s"] for cases_of_gpu, _ in found]
    slowest = found[rates.index(min(rates))][0][0]
    shown = f"{'apart':8}{options.model:8}slowest of {n}"
    return [slowest | {"part": "apart", "ranks": n, "shown": shown, "tokens/s": n * min(rates), "each": rates}], None


def measure_layers(most: int, left: Callable[[], float]) -> None:
    """Single layers, measured and emulated; their scripts print their own tables."""
    axes = ["ep", "etp", *(["both"] if most > 2 else [])]
    for script, arguments in {
        "context_parallel.py": ["--repeats", "3"],
        "experts.py": ["--repeats", "3", "--routing", "balanced", "--axes", *axes],
    }.items():
        for link in ("nccl", "emulated"):
            print(f"\n{script}, {link}", flush=True)
            command = [str(HERE / script), "--link", link, *arguments]
            if link == "nccl":
                why = finish(torchrun(most, *command), left())
            else:
                why = finish([sys.executable, *command, "--ranks", str(most)], left())
            if why is not None:
                print(f"left out: {why}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of GPUs (default: 1, 2, 4 and 8 if there are)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", choices=MODELS, default="medium")
    parser.add_argument("--slice", choices=MODELS, default="slice", help="model of the part experts")
    parser.add_argument("--tokens", type=int, default=8192, help="of a packed sequence")
    parser.add_argument(
        "--long-tokens", type=int, default=131072, help="of a packed sequence on a GPU, in cp and linear"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600, help="after which no case begins")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_worker(options)
        return 0
    end = time.monotonic() + options.seconds
    found = torch.cuda.device_count() or 2
    ranks = sorted(options.ranks or [n for n in (1, 2, 4, 8) if n <= found])
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{found} x {name}, torch {torch.__version__}", flush=True)
    results: list[dict[str, Any]] = []

    def left() -> float:
        return end - time.monotonic()

    whole = [part for part in options.parts if part not in ("apart", "layers")]
    for n in ranks if whole else ():
        done, why = measure_parts(n, whole, ranks[-1], options, left())
        results += done
        print(f"{n} GPUs: {len(done)} cases" + (f"; {why}" if why else ""), flush=True)
    if "apart" in options.parts and ranks[-1] > 1:
        done, why = measure_apart(ranks[-1], options, left())
        results += done
        print(f"{ranks[-1]} GPUs apart" + (f": {why}" if why else ""), flush=True)
    print(*table(results), sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": f"{found} x {name}", "results": results}))
    if options.picture:
        draw(results, options.picture)
    if "layers" in options.parts and ranks[-1] > 1:
        measure_layers(ranks[-1], left)
    return 0


if __name__ == "__main__":
    sys.exit(main())
