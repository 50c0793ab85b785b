"""Pipeline stages on grids of up to 8 ranks against one rank: loss, every gradient and the norm, in float64.

    PYTHONPATH=tests/lib python tests/lib/support/pipelines.py [--cases 60] [--seed 1]

Each case draws a grid that mixes pp 2 and 4 with the other axes, a schedule, a split of the layers, a capacity, the
scopes of capacity and auxiliary loss, what is recomputed, and whether gathered weights are freed between passes. Two
steps are taken, the second with the weights that the first has updated, and the held-out loss before them.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minimax_train.config import Config
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.parallel.pipeline import SCHEDULES
from minimax_train.run_lock import release_lock
from minimax_train.trainer import Trainer
from support.compare import relative_error
from support.distributed import TIMEOUT, run_ranks
from support.runs import DIVISIBLE, gradients_of, gradients_of_a_step, tiny_run

TOLERANCE = 1e-10
SIZES = [*DIVISIBLE, "engine=fsdp", "engine.precision=float64", "model.aux_loss_coefficient=0.5"]
SIZES += ["recipe.global_batch_size=8", "data.num_streams=8", "data.sequence_length=32"]


class Case(NamedTuple):
    """One run.

    Attributes:
        ranks: how many.
        axes: sizes of the grid's.
        model: overrides that one rank's run has too.
        more: overrides of the pipeline alone.
    """

    ranks: int
    axes: dict[str, int]
    model: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        axes = [f"{axis}={size}" for axis, size in self.axes.items() if size > 1]
        return " ".join([str(self.ranks), *axes, *(text.rpartition(".")[2] for text in (*self.model, *self.more))])

    def config(self, folder: Path) -> Config:
        sizes = [f"parallel.{axis}={size}" for axis, size in self.axes.items()]
        config = tiny_run(folder, *SIZES, *self.model, *sizes, *self.more)
        config.check_world_size(self.ranks)
        return config


def sample(choose: random.Random) -> Case:
    while True:
        ranks = choose.choice([2, 4, 8, 8])
        axes = {"pp": choose.choice([2, 4])} | {axis: choose.choice([1, 1, 2, 4]) for axis in ("tp", "cp", "ep", "etp")}
        of_stage, left = divmod(ranks, axes["pp"])
        if left or of_stage == 0 or of_stage % (axes["tp"] * axes["cp"]) or of_stage % (axes["ep"] * axes["etp"]):
            continue
        dp = of_stage // (axes["tp"] * axes["cp"])
        if 8 // dp < axes["pp"]:
            continue
        layers = 8 if axes["pp"] == 4 else 4
        model = [f"model.num_layers={layers}", f"model.capacity_factor={choose.choice(['null', '0.8'])}"]
        # One pool of all ranks' tokens is that of one rank where no other rank has packed sequences of its own.
        scopes = ["sequence", "global"] if dp == 1 else ["sequence"]
        if "null" not in model[1]:
            model.append(f"model.capacity_scope={choose.choice(scopes)}")
        model.append(f"model.aux_loss_scope={choose.choice(scopes)}")
        fits = [name for name, each in SCHEDULES.items() if 8 // dp >= each.micro_batches * axes["pp"]]
        schedule = choose.choice(fits)
        more = [f"parallel.pp_schedule={schedule}"]
        stages = axes["pp"] * SCHEDULES[schedule].parts
        if choose.random() < 0.5:
            cuts = sorted(choose.sample(range(1, layers), stages - 1))
            sizes = [end - begin for begin, end in zip([0, *cuts], [*cuts, layers], strict=True)]
            more.append(f"parallel.pp_layers=[{','.join(map(str, sizes))}]")
        more.append(f"recipe.activation_checkpointing={choose.choice(['none', 'selective', 'full'])}")
        more.append(f"engine.reshard_after_forward={choose.choice(['null', 'true', 'false'])}")
        return Case(ranks, axes, tuple(model), tuple(more))


def _results(_: ProcessGrid, configs: Sequence[Config]) -> list[Any]:
    return [_two_steps(config) for config in configs]


def _two_steps(config: Config) -> Any:
    trainer = Trainer(config, ProcessGrid.create("cpu", TIMEOUT, **config.parallel.grid), torch.device("cpu"))
    found: list[Any] = [trainer.evaluate(trainer.plan())]
    for _ in range(2):
        sums, norm = gradients_of_a_step(trainer)
        gradients = gradients_of(trainer)
        found.append((sums | {"norm": norm}, gradients))
        found.append(({"norm": float(trainer.engine.step(1e-3).gradient_norm)}, {}))
    trainer.log.close()
    trainer.loader.close()
    release_lock(trainer.run_dir)
    return found


def _differences(found: Any, right: Any) -> list[str]:
    def numbers(which: str, a: dict[str, float], b: dict[str, float]) -> list[str]:
        far = [name for name in b if not abs(a[name] - b[name]) <= TOLERANCE * abs(b[name])]
        return [f"{which}{name}: {a[name]} against {b[name]}" for name in far]

    lines = numbers("", found[0], right[0])
    for i, ((sums, gradients), (right_sums, right_gradients)) in enumerate(zip(found[1:], right[1:], strict=True)):
        lines += numbers(f"report {i}: ", sums, right_sums)
        assert gradients.keys() == right_gradients.keys()
        for name, gradient in right_gradients.items():
            if not (error := relative_error(gradients[name], gradient)) < TOLERANCE:
                lines.append(f"report {i}: {name}: {error}")
    return lines


def check(folder: Path, cases: Sequence[Case]) -> list[str]:
    """How cases differ from one rank, a line each. Those of as many ranks share their processes."""
    models = list(dict.fromkeys(case.model for case in cases))
    alone = [Case(1, {}, model).config(folder / f"one-{i}") for i, model in enumerate(models)]
    right = dict(zip(models, run_ranks(_results, 1, alone, timeout_s=3600)[0], strict=True))
    assert all(results[1][0]["loss"] != results[3][0]["loss"] for results in right.values())
    found = []
    for ranks in sorted({case.ranks for case in cases}):
        started, these = time.monotonic(), [case for case in cases if case.ranks == ranks]
        configs = [case.config(folder / f"{ranks}-{i}") for i, case in enumerate(these)]
        for results in run_ranks(_results, ranks, configs, timeout_s=3600):
            for case, result in zip(these, results, strict=True):
                found += [f"{case}: {line}" for line in _differences(result, right[case.model])]
        print(f"{len(these)} runs of {ranks} ranks: {time.monotonic() - started:.0f} s", flush=True)
    return list(dict.fromkeys(found))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options, started = parser.parse_args(arguments), time.monotonic()
    torch.set_num_threads(1)
    choose = random.Random(options.seed)
    cases = [sample(choose) for _ in range(options.cases)]
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(0, len(cases), 6):
            found += check(Path(folder) / str(i), cases[i : i + 6])
    print(*found[:20], sep="\n")
    print(f"{len(cases)} cases: {len(found)} differences, {time.monotonic() - started:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
