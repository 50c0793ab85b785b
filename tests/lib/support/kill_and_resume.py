"""Runs that are killed at random moments and resumed, against one that was not.

    PYTHONPATH=tests/lib python tests/lib/support/kill_and_resume.py [--kills 20] [--seed 1] [--ranks 1 2 1,2,4]

Each run is ``minimax-train`` under torchrun, on the CPU. SIGKILL goes to all its processes, to torchrun or to one rank,
while it starts, trains, evaluates or saves. It is resumed on the numbers of data-parallel ranks in turn. Every step
that was ever taken, also one that a kill made the run take again, must have consumed the token ids of the uninterrupted
run, and its metrics must be equal: bit for bit on one number of ranks, to 1e-10 in float64 on several.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.runs import MODEL, write_corpus

TOLERANCE = 1e-10
PACKING = ("split", "truncate", "best_fit")
_SOURCES = {"web": 240, "code": 160, "questions": 120}
# Metrics that are no times or sizes begin so.
_SAME = ("loss", "validation_loss", "unigram_loss", "grad_norm", "learning_rate", "data_share", "data_epoch")
_SAME += ("split_documents", "truncated_tokens")
_TIMEOUT_S = 300.0


def recipe(folder: Path, steps: int, packing: str) -> list[str]:
    """Overrides of a run of ``steps`` steps: three sources, and stages between which weights, lengths of documents, and
    the length and number of packed sequences change, in part step by step."""
    files = {name: write_corpus(folder, documents, seed) for seed, (name, documents) in enumerate(_SOURCES.items())}
    edges = [steps * i // 4 for i in range(5)]
    begin, moving, lengths, late = (f"recipe.stages.{name}" for name in ("begin", "moving", "lengths", "late"))
    return [
        *(f"model.{key}={value}" for key, value in MODEL.items()),
        *(f"data.sources.{name}.format=json" for name in files),
        *(f"data.sources.{name}.train_files=[{file}]" for name, file in files.items()),
        "data.sources.web.held_out=0.05",
        "data.medium_length=30",
        "data.long_length=70",
        "data.sequence_length=63",
        "data.num_streams=4",
        "data.shuffle_documents=8",
        f"data.packing={packing}",
        "recipe.global_batch_size=8",
        "recipe.micro_batch_size=2",
        "recipe.steps=null",
        "recipe.decay_steps=null",
        "recipe.min_learning_rate=null",
        "recipe.warmup_steps=2",
        "recipe.late_source=questions",
        "recipe.eval_interval=7",
        "recipe.eval_sequences=5",
        f"{begin}.steps={edges[1]}",
        f"{begin}.mixture.web=3",
        f"{begin}.mixture.code=1",
        f"{moving}.steps={edges[2] - edges[1]}",
        f"{moving}.mixture.code=1",
        f"{moving}.mixture.questions=1",
        f"{moving}.transition_tokens={8 * 63 * (edges[2] - edges[1]) // 2}",
        f"{lengths}.steps={edges[3] - edges[2]}",
        f"{lengths}.sequence_length=98",
        f"{lengths}.rope_base=5000",
        f"{lengths}.mixture.web=1",
        f"{lengths}.mixture.code=1",
        f"{lengths}.lengths.short=1",
        f"{lengths}.lengths.medium=2",
        f"{lengths}.lengths.long=1",
        f"{late}.steps={edges[4] - edges[3]}",
        f"{late}.global_batch_size=16",
        f"{late}.min_learning_rate=1e-5",
        f"{late}.late_weight=0.3",
        f"{late}.late_part=0.5",
        "checkpoint.interval=3",
        "checkpoint.keep=2",
        "checkpoint.resume=auto",
        "engine.precision=float64",
        "parallel.timeout_s=60",
        "device=cpu",
        "cache_dir=null",
        f"run_dir={folder}/run",
    ]


def train(consumed: Path, arguments: Sequence[str]) -> int:
    """One process of a run, which writes a digest of every packed sequence that it trains on to a file of its own."""
    from minimax_train import trainer
    from minimax_train.cli import main

    next_batches = trainer.Trainer.next_batches

    def watched(self: Any, plan: Any) -> Any:
        batches = next_batches(self, plan)
        rows = [row for batch in batches for row in batch.tokens_T.split(plan.sequence_length)]
        digests = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in rows]
        line = {
            "step": self.progress.step + 1,
            "rank": self.grid.rank("dp"),
            "of": self.grid.size("dp"),
            "rows": digests,
        }
        with (consumed / str(os.getpid())).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return batches

    trainer.Trainer.next_batches = watched  # type: ignore[method-assign]
    return main(list(arguments))


class Run:
    """A run's folder, and the processes that train in it.

    Args:
        steps: of the whole run.
        packing: of ``data.packing``.
    """

    def __init__(self, folder: Path, steps: int, packing: str) -> None:
        self.arguments = recipe(folder, steps, packing)
        self.folder, self.consumed, self.starts = folder, folder / "consumed", 0
        self.consumed.mkdir()

    def finish(self, ranks: int) -> None:
        """Train to the end."""
        process = self._start(ranks)
        try:
            status = process.wait(_TIMEOUT_S)
        finally:
            _kill(_descendants(process.pid))
        assert status == 0, f"status {status}:\n{self._said()}"

    def be_killed(self, ranks: int, step: int, choose: random.Random) -> str:
        """Train, and be killed some time after ``step``, or at any time after the start. What was killed when."""
        process = self._start(ranks)
        try:
            deadline = time.monotonic() + (choose.uniform(0, 15) if choose.random() < 0.2 else _TIMEOUT_S)
            while time.monotonic() < deadline and self._step() < step:
                assert process.poll() is None, f"ended before it was killed:\n{self._said()}"
                time.sleep(0.005)
            time.sleep(choose.uniform(0, 0.4))
            every = _descendants(process.pid)
            victims = choose.choice([every, every[:1], every[1:2] or every])
            _kill(victims)
            process.wait(_TIMEOUT_S)
            what = "all processes" if victims == every else "torchrun" if victims == every[:1] else "one rank"
            return f"{what} of {ranks} ranks after step {self._step()}"
        finally:
            _kill(every if process.poll() is not None else _descendants(process.pid))

    def metrics(self) -> list[dict[str, Any]]:
        """The records of steps and evaluations, without what differs from time to time."""
        records = _lines(self.folder / "run/metrics.jsonl")
        return [
            {n: x for n, x in record.items() if n in ("step", "tokens") or n.startswith(_SAME)} for record in records
        ]

    def rows(self) -> dict[tuple[int, int], set[str]]:
        """Digests of what was trained on, by step and packed sequence of the step."""
        found: dict[tuple[int, int], set[str]] = defaultdict(set)
        for file in self.consumed.iterdir():
            for line in _lines(file):
                for i, digest in enumerate(line["rows"]):
                    found[line["step"], i * line["of"] + line["rank"]].add(digest)
        return found

    def _step(self) -> int:
        return max((record["step"] for record in self.metrics()), default=0)

    def _said(self) -> str:
        """What the run said, without torchrun's traceback."""
        return (self.folder / f"output-{self.starts}").read_text().partition("Traceback (most recent call last)")[0]

    def _start(self, ranks: int) -> subprocess.Popen:
        self.starts += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        watched = ["--no-python", sys.executable, "-P", __file__, "--consumed", str(self.consumed)]
        with (self.folder / f"output-{self.starts}").open("w") as output:
            return subprocess.Popen(
                [*torchrun, *watched, *self.arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
            )


def _lines(file: Path) -> list[dict[str, Any]]:
    """Of a file that may be being written, or was when its writer was killed."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _descendants(process: int) -> list[int]:
    """A process, its children, their children."""
    found, children = [process], defaultdict(list)
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, _, rest = status.read_text().partition(" ")
            children[int(rest.rpartition(")")[2].split()[1])].append(int(pid))
    for parent in found:
        found += children[parent]
    return found


def _kill(processes: Sequence[int]) -> None:
    """SIGKILL, and wait until they are gone."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(_is_running(process) for process in processes):
        time.sleep(0.01)


def _is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def compare(run: Run, right: Run, tolerance: float) -> list[str]:
    """How a run differs from the uninterrupted one, a line each."""
    expected, found = right.rows(), []
    for place, digests in sorted(run.rows().items()):
        if digests != expected[place]:
            found.append(f"step {place[0]}: row {place[1]} holds other token ids")
    records = {(record["step"], "validation_loss" in record): record for record in right.metrics()}
    for record in run.metrics():
        same = records[record["step"], "validation_loss" in record]
        for name in same.keys() | record.keys():
            a, b = record.get(name, math.nan), same.get(name, math.nan)
            if not abs(a - b) <= tolerance * abs(b):
                found.append(f"step {record['step']}: {name} {a!r} against {b!r}")
    return found


def sweep(folder: Path, ranks: Sequence[int], packing: str, *, kills: int, steps: int, seed: int) -> list[str]:
    """One run that is killed so often, spread over its steps. Returns how it differs from one that is not killed."""
    choose, tolerance = random.Random(seed), TOLERANCE if len(set(ranks)) > 1 else 0.0
    folders = [folder / name for name in ("whole", "parts")]
    for each in folders:
        each.mkdir(parents=True)
    right, run = (Run(each, steps, packing) for each in folders)
    right.finish(ranks[0])
    found = []
    for kill in range(kills):
        what = run.be_killed(ranks[kill % len(ranks)], int((kill + choose.random()) * steps / (kills + 1)), choose)
        differences = compare(run, right, tolerance)
        print(f"ranks {','.join(map(str, ranks))}: killed {what}: {len(differences)} differences", flush=True)
        found += differences
    run.finish(ranks[kills % len(ranks)])
    found += compare(run, right, tolerance)
    if len(run.metrics()) != len(right.metrics()) or run.rows().keys() != right.rows().keys():
        found.append("not the same steps were taken")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    ranks = "numbers of ranks that a run is resumed on in turn, one list per run"
    parser.add_argument("--ranks", nargs="+", default=["1", "2", "1,2,4"], help=ranks)
    options, status = parser.parse_args(), 0
    for i, text in enumerate(options.ranks):
        numbers, started, packing = list(map(int, text.split(","))), time.monotonic(), PACKING[i % len(PACKING)]
        with tempfile.TemporaryDirectory() as folder:
            found = sweep(Path(folder), numbers, packing, kills=options.kills, steps=options.steps, seed=options.seed)
        took = f"{time.monotonic() - started:.0f} s"
        print(f"ranks {text}, {packing}: {len(found)} differences, {took}", *found[:20], sep="\n  ", flush=True)
        status |= bool(found)
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["--consumed"]:
        sys.exit(train(Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
