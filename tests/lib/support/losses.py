"""Runs of twenty steps in float64, what is recorded of them, and how two recordings are compared.

A recording holds, of every step, loss, gradient norm and a digest of the tokens consumed, in the order of the run's
packed sequences, which is the same on every grid; of every evaluation its losses; and of ``STEPS_WITH_ROWS`` the token
ids themselves.

Shape legend: T tokens that a rank is given, G packed sequences of a step, S tokens of each.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure  # noqa: F401  this and torch._dynamo so that processes forked from this one need not
import numpy as np
import torch
import torch._dynamo

from minimax_train.config import Config, load_config
from minimax_train.model import HybridModel
from minimax_train.trainer import Trainer
from support.distributed import run_ranks
from support.runs import overrides

RECORDINGS = Path(__file__).parents[2] / "losses"
STEPS = 20
STEPS_WITH_ROWS = (1, STEPS // 2 + 1)
# Relative. Between grids, and between instruction sets of a processor, the numbers agree to 5e-16; a weight matrix that
# is off by 1e-9 at the start moves them by some 1e-12.
TOLERANCE = 1e-13
NUMBERS = ("loss", "grad_norm", "validation_loss", "unigram_loss")

# Every size that a grid splits can be split in two.
SHARED = [
    "engine.precision=float64",
    "model.num_experts=6",
    "model.num_layers=3",
    "model.layer_pattern=LSL",
    "model.aux_loss_coefficient=0.1",
    "data.sequence_length=60",
    f"recipe.steps={STEPS}",
    "recipe.warmup_steps=4",
    "recipe.decay_steps=6",
    "recipe.eval_interval=0",
    "checkpoint.interval=0",
]
CAPACITY = ("model.capacity_factor=0.8",)
GLOBAL = (*CAPACITY, "model.capacity_scope=global", "model.aux_loss_scope=global", "recipe.micro_batch_size=2")
EVALUATED = (
    "data.sequence_length=63",
    "data.num_streams=2",
    "seed=3",
    "recipe.eval_interval=5",
    "recipe.eval_sequences=5",
)
FULL, SELECTIVE = (f"recipe.activation_checkpointing={kind}" for kind in ("full", "selective"))
TWO_ROWS = "recipe.micro_batch_size=2"


@dataclass(frozen=True)
class Stage:
    """Some ranks that train until ``steps``.

    Attributes:
        ranks: how many.
        how: overrides that change no loss but by rounding: grid, micro-batches, what is recomputed.
    """

    ranks: int
    how: Sequence[str] = ()
    steps: int = STEPS


@dataclass(frozen=True)
class Run:
    """Stages one after the other in one folder. ``what``: overrides of all of them, which the losses depend on."""

    stages: Sequence[Stage]
    what: Sequence[str] = ()


def _run(ranks: int, *how: str, what: Sequence[str] = ()) -> Run:
    return Run([Stage(ranks, how)], what)


ZIGZAG = ("parallel.cp=2", "parallel.layout=zigzag", "parallel.linear_cp=lasp_plus", "parallel.softmax_cp=ring")
CONTIGUOUS = ("parallel.cp=2", "parallel.layout=contiguous", "parallel.linear_cp=scan", "parallel.softmax_cp=allgather")
RUNS = {
    "one": _run(1),
    "dp": _run(2),
    "cp-zigzag": _run(2, *ZIGZAG, TWO_ROWS, what=CAPACITY),
    "cp-contiguous": _run(2, *CONTIGUOUS, SELECTIVE, TWO_ROWS),
    "tp": _run(2, "parallel.tp=2", TWO_ROWS, SELECTIVE, what=CAPACITY),
    "ep": _run(2, "parallel.ep=2", what=CAPACITY),
    "etp": _run(2, "parallel.etp=2", "parallel.token_groups=3", FULL),
    "tp-cp-global": _run(4, "parallel.tp=2", "parallel.cp=2", what=GLOBAL),
    "evaluated": _run(2, what=EVALUATED),
    "resumed": Run(
        [
            # Without decay, or the end of the schedule would come early.
            Stage(2, ("parallel.cp=2", "recipe.decay_steps=0", TWO_ROWS), steps=STEPS // 2),
            Stage(2, ("parallel.tp=2", "checkpoint.resume=auto", TWO_ROWS)),
        ]
    ),
}


class Consumed(NamedTuple):
    """A rank's part of a micro-batch: how many packed sequences, its token ids, and their places on the whole axis."""

    num_sequences: int
    tokens_T: np.ndarray
    places_T: np.ndarray


def watch_model() -> list[Consumed]:
    """What the model is trained on from here on in this process, filled as it goes.

    The only place that knows how the model is called.
    """
    consumed, forward = [], HybridModel.forward

    @functools.wraps(forward)
    def watched(model, tokens_T, documents, labels_T=None, *, num_sequences=1, shard=None, **more):
        if torch.is_grad_enabled():
            places_T = torch.arange(len(tokens_T)) if shard is None else shard.global_tokens_T
            consumed.append(Consumed(num_sequences, tokens_T.numpy().copy(), places_T.numpy().copy()))
        return forward(model, tokens_T, documents, labels_T, num_sequences=num_sequences, shard=shard, **more)

    HybridModel.forward = watched
    return consumed


def _train(grid: Any, config: Config) -> tuple[int, list[Consumed]]:
    """The rank's place among those that take different sequences, and what it consumed."""
    consumed = watch_model()
    Trainer(config, grid, torch.device("cpu")).train()
    return grid.rank("dp"), consumed


def record(run: Run, folder: Path) -> dict[str, Any]:
    """Train in processes of one thread each. Returns the recording, JSON values."""
    rows: list[np.ndarray] = []
    for stage in run.stages:
        config = load_config(overrides(folder, *SHARED, *run.what, f"recipe.steps={stage.steps}", *stage.how))
        config.check_world_size(stage.ranks)
        ranks = run_ranks(_train, stage.ranks, config, **config.parallel.grid)
        rows += _rows_of_steps(ranks, stage.steps - len(rows))
    steps: dict[str, dict[str, Any]] = {str(step): {} for step in range(1, STEPS + 1)}
    for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        steps[str(metrics["step"])] |= {name: metrics[name] for name in NUMBERS if name in metrics}
    for step, rows_GS in zip(steps.values(), rows, strict=True):
        step["tokens"] = hashlib.sha256(rows_GS.astype("<i8").tobytes()).hexdigest()
    return {"steps": steps, "rows": {str(step): rows[step - 1].tolist() for step in STEPS_WITH_ROWS}}


def _rows_of_steps(ranks: Sequence[tuple[int, list[Consumed]]], steps: int) -> list[np.ndarray]:
    """Token ids of every step, by packed sequence of the run, int64 ``[G, S]``, put together from all ranks' parts."""
    dp_size = 1 + max(dp_rank for dp_rank, _ in ranks)
    parts = [[consumed for dp_rank, consumed in ranks if dp_rank == rank] for rank in range(dp_size)]
    found = []
    for rank in range(dp_size):
        batches = [_join(same) for same in zip(*parts[rank], strict=True)]
        assert len(batches) % steps == 0, f"{len(batches)} micro-batches in {steps} steps"
        found.append(np.split(np.concatenate(batches), steps))
    # Row g of a step belongs to rank g modulo the data-parallel size.
    return [np.stack(of_ranks, axis=1).reshape(-1, of_ranks[0].shape[1]) for of_ranks in zip(*found, strict=True)]


def _join(parts: Sequence[Consumed]) -> np.ndarray:
    """A micro-batch's sequences, of the parts of ranks that share them; where parts overlap they must be the same."""
    tokens = np.full(1 + max(int(part.places_T.max()) for part in parts), -1)
    for part in parts:
        before = tokens[part.places_T]
        assert ((before == -1) | (before == part.tokens_T)).all(), "ranks hold different tokens at the same place"
        tokens[part.places_T] = part.tokens_T
    assert (tokens != -1).all(), "no rank holds some of the tokens"
    return tokens.reshape(parts[0].num_sequences, -1)


def differences(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> list[str]:
    """Where two recordings differ, a line each: numbers by more than a relative ``tolerance``, tokens at all."""
    found = []
    for step in sorted(actual["steps"].keys() | expected["steps"].keys(), key=int):
        a, b = actual["steps"].get(step, {}), expected["steps"].get(step, {})
        for name in sorted(a.keys() | b.keys()):
            x, y = a.get(name), b.get(name)
            if isinstance(x, float) and isinstance(y, float):
                if not abs(x - y) <= tolerance * abs(y):
                    found.append(f"step {step}: {name} {x!r} against {y!r}, by {abs(x - y) / (abs(y) or 1):.1e}")
            elif x != y:
                found.append(f"step {step}: {name} {x} against {y}")
    for step in sorted(actual["rows"].keys() | expected["rows"].keys(), key=int):
        a, b = actual["rows"].get(step, []), expected["rows"].get(step, [])
        found += [f"step {step}: {len(a)} rows against {len(b)}"] if len(a) != len(b) else []
        pairs = enumerate(zip(a, b, strict=False))
        found += [f"step {step}, row {g}: {x} against {y}" for g, (x, y) in pairs if x != y]
    return found


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write(path: Path, recording: dict[str, Any]) -> None:
    """A step, or a packed sequence, to a line."""
    steps = ",\n".join(f"{json.dumps(step)}: {json.dumps(values)}" for step, values in recording["steps"].items())
    rows = ",\n".join(
        f"{json.dumps(step)}: [\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in values) + "\n]"
        for step, values in recording["rows"].items()
    )
    path.write_text(f'{{\n"steps": {{\n{steps}\n}},\n"rows": {{\n{rows}\n}}\n}}\n')
