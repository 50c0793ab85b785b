"""Random corruptions of every kind of file of a checkpoint, and all that reads one: none is loaded in silence.

    PYTHONPATH=tests/lib python tests/lib/support/corrupt_checkpoints.py [--count 300] [--seed 1]

A run on two ranks saves twice. In a copy of it, one file of the newer checkpoint (two, where files are swapped) is
damaged: bits flipped, a stretch overwritten, cut, grown, removed, a folder in its place; exchanged with another of the
checkpoint, or with the file of that name in the checkpoint before or in another run's. Then

    minimax-checkpoint verify       must fail,
    minimax-convert to-hf           must fail, or never have read the file and export the right weights,
    checkpoint.initial_weights      must fail, and given the run take the older checkpoint,
    checkpoint.resume=auto          must set it aside and go on from the older one (one time in seven a trainer is made,
                                    whose step and weights are compared),

and each must name the file, in a line, without a traceback. A checkpoint without manifest.json, as whoever edits one by
hand leaves it, is read, and that nothing was compared is said.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from minimax_train.checkpoint import cli as checkpoint_cli
from minimax_train.checkpoint import shards
from minimax_train.checkpoint.initial_weights import find_weights
from minimax_train.checkpoint.store import CheckpointStore
from minimax_train.config import Config
from minimax_train.convert import cli as convert_cli
from minimax_train.errors import ConfigError
from minimax_train.parallel.environment import ProcessEnvironment
from minimax_train.parallel.grid import ProcessGrid
from minimax_train.run_lock import release_lock
from minimax_train.trainer import Trainer
from support.distributed import TIMEOUT, run_ranks
from support.runs import tiny_run, weights_of

NEWEST, BEFORE = "step-00000004", "step-00000002"
MANIFEST = "manifest.json"
_TRAINED = 7  # of so many corruptions, one is met by a whole trainer; no multiple of the number of files
KINDS = ("flip", "overwrite", "cut", "grow", "remove", "folder", "swap", "older", "foreign")
# What transformers' layout can express.
MODEL = ("model.head_dim=8", "model.vocab_size=310")
STEADY = ("recipe.eval_interval=0", "recipe.warmup_steps=0", "recipe.decay_steps=0", "checkpoint.interval=2")


def _train(grid: ProcessGrid, config: Config) -> None:
    shards._LEAST_BYTES = 100_000  # so that a rank writes several files
    Trainer(config, grid, torch.device("cpu")).train()


def corrupt(newest: Path, name: str, kind: str, sources: dict[str, Path], choose: random.Random) -> list[str]:
    """Damage a file.

    Args:
        sources: of files by ``kind``: other checkpoints.

    Returns:
        The files that are not as they were saved; none where the damage changed nothing that anything reads.
    """
    file, spoilt = newest / name, [name]
    content = file.read_bytes()
    if kind == "flip":
        place = choose.randrange(8 * len(content))
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
    elif kind == "overwrite":
        start, length = choose.randrange(len(content)), choose.choice((1, 16, 512, 4096))
        filling = choose.choice((bytes(length), choose.randbytes(length)))
        file.write_bytes((content[:start] + filling + content[start + length :])[: len(content)])
    elif kind == "cut":
        os.truncate(file, choose.choice((0, len(content) - 1, choose.randrange(len(content)))))
    elif kind == "grow":
        file.write_bytes(content + choose.choice((b"\n", b"\0", choose.randbytes(choose.randint(1, 5000)))))
    elif kind in ("remove", "folder"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
    elif kind == "swap":
        other = choose.choice(sorted({*files_of(newest)} - {name}))
        spoilt.append(other)
        file.write_bytes((newest / other).read_bytes())
        (newest / other).write_bytes(content)
    elif not (sources[kind] / name).is_file():
        return []
    else:
        file.write_bytes((sources[kind] / name).read_bytes())
    if kind not in ("remove", "folder") and file.read_bytes() == content:
        return []
    return [] if name == MANIFEST and kind not in ("remove", "folder") and _means_the_same(file, content) else spoilt


def _means_the_same(manifest: Path, content: bytes) -> bool:
    """Whether only a line's end was lost or added."""
    try:
        return json.loads(manifest.read_bytes()) == json.loads(content)
    except ValueError:
        return False


def files_of(folder: Path) -> list[str]:
    """Names of all files, relative."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def said_by(work: Callable[[], Any]) -> tuple[Any, str]:
    """What some work returns, or ConfigError's text as an error that a command would print, and what it printed. Any
    other exception is returned as it is."""
    out = io.StringIO()
    result: Any
    with redirect_stdout(out), redirect_stderr(out):
        try:
            result = work()
        except ConfigError as error:
            result = None
            print(f"error: {error}")
        except BaseException as error:
            result = error
            traceback.print_exc(file=out)
    return result, out.getvalue()


class Lab:
    """The undamaged run, and what its readers make of it.

    Args:
        folder: where runs are made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, more in (("run", ()), ("other", ("seed=7", "data.tokenizer_documents=20"))):
            run_ranks(_train, 2, tiny_run(folder / name, *MODEL, *STEADY, "recipe.steps=4", *more))
        self.run = folder / "run/run"
        self.sources = {
            "older": self.run / "checkpoints" / BEFORE,
            "foreign": folder / "other/run/checkpoints" / NEWEST,
        }
        self.exported = self._export(self.run / "checkpoints" / NEWEST)
        assert not isinstance(self.exported, str), self.exported
        ProcessEnvironment(0, 1, 0, f"file://{folder}/store").init_process_group("cpu", TIMEOUT)
        self.grid = ProcessGrid.create("cpu", TIMEOUT)
        shutil.copytree(self.run, folder / "right")
        shutil.rmtree(folder / "right/checkpoints" / NEWEST)
        step, self.weights = self._resume(folder / "right")
        assert step == 2

    def differences(self, kind: str, name: str, choose: random.Random, trains: bool) -> list[str] | None:
        """Corrupt a file of a copy, and read it in all ways, also into a trainer if one is to be made. What was not as
        it must be; None where nothing that anything reads was changed."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.run, copy)
        newest, older = (copy / "checkpoints" / each for each in (NEWEST, BEFORE))
        spoilt = corrupt(newest, name, kind, self.sources, choose)
        if not spoilt:
            return None
        edited = name == MANIFEST and kind == "remove"
        found: list[str] = []

        def judge(way: str, failed: bool, said: str, result: Any) -> None:
            named = any(f"{newest}/{each}" in said or f"{newest}: not a whole checkpoint" in said for each in spoilt)
            if edited:
                named, failed = f"{newest}: " in said and f"no {MANIFEST}" in said, True
            lines = [line for line in said.splitlines() if line.startswith("error")]
            for wrong, what in (
                (isinstance(result, BaseException) or "Traceback" in said, "a traceback"),
                (not failed, "loaded"),
                (not named, "not named"),
                (len(lines) > 1, "several errors"),
            ):
                if wrong:
                    found.append(f"{way}: {what}: {said.strip()[-2000:]}")

        status, said = said_by(lambda: checkpoint_cli.main(["verify", str(newest)]))
        judge("verify", status in (1, 2), said, status)
        exported, said = said_by(lambda: self._export(newest))
        unread = isinstance(exported, dict) and exported == self.exported and name.endswith(".distcp")
        if not unread:
            refusal = exported if isinstance(exported, str) else ""
            judge("to-hf", isinstance(exported, str), said + refusal, exported)
        result, said = said_by(lambda: find_weights(str(newest)))
        judge("initial_weights of it", result is None, said, result)
        result, said = said_by(lambda: find_weights(str(copy)))
        judge("initial_weights of the run", result == older, said, result)
        if trains:
            result, said = said_by(lambda: self._resume(copy))
        else:
            result, said = said_by(lambda: (2, {}) if CheckpointStore(copy).newest_whole() == older else None)
        if isinstance(result, tuple):
            step, weights = result
            same = step == 2 and all(torch.equal(x, self.weights[each]) for each, x in weights.items())
            aside = (copy / "checkpoints" / f"{NEWEST}.damaged").is_dir() and not newest.exists()
            judge("resume", same and aside, said, None)
        else:
            judge("resume", False, said, result)
        return found

    def _export(self, checkpoint: Path) -> dict[str, bytes] | str:
        """Files of the Hugging Face folder, or what was said instead."""
        target = self.folder / "hf"
        shutil.rmtree(target, ignore_errors=True)
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            status = convert_cli.main(["to-hf", str(checkpoint), str(target), "--workers", "1"])
        if status:
            return out.getvalue()
        weights = {name: (target / name).read_bytes() for name in files_of(target) if name != "README.md"}
        print(out.getvalue())
        return weights

    def _resume(self, run: Path) -> tuple[int, dict[str, torch.Tensor]]:
        """The step and the weights that a run goes on from."""
        more = ("recipe.steps=6", "checkpoint.resume=auto", f"run_dir={run}")
        try:
            trainer = Trainer(tiny_run(self.folder / "run", *MODEL, *STEADY, *more), self.grid, torch.device("cpu"))
            trainer.log.close()
            trainer.loader.close()
            return trainer.progress.step, weights_of(trainer)
        finally:
            release_lock(run)


def sweep(folder: Path, count: int, seed: int) -> int:
    """As many corruptions. Returns how many were not found, or not told as they must be."""
    lab, choose, done, bad = Lab(folder), random.Random(seed), Counter(), 0
    names = files_of(lab.run / "checkpoints" / NEWEST)
    while sum(done.values()) < count:
        number = sum(done.values())
        name, kind = names[number % len(names)], choose.choice(KINDS)
        found = lab.differences(kind, name, choose, trains=number % _TRAINED == 0)
        if found is None:
            continue
        done[kind] += 1
        if number % 50 == 49:
            print(f"{number + 1} corruptions, {bad} not as they must be", flush=True)
        if found:
            bad += 1
            print(f"{kind} {name}:", *found, sep="\n    ", flush=True)
    kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(done.items()))
    print(f"{count} corruptions of {len(names)} files ({kinds}): {bad} not as they must be")
    return bad


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options, started = parser.parse_args(arguments), time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bad = sweep(Path(folder), options.count, options.seed)
    print(f"{time.monotonic() - started:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
