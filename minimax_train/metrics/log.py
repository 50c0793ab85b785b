"""One place to report to; it passes each record on to the console, ``metrics.jsonl``, Weights & Biases and
TensorBoard, and each event to the console and ``events.jsonl``."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minimax_train.errors import ConfigError, Saved, exit_status
from minimax_train.files import EVENTS, METRICS, PICTURE, TENSORBOARD, WANDB_ID, replace_text
from minimax_train.first_rank import is_of_communication, on_first_rank
from minimax_train.metrics.config import LoggingConfig
from minimax_train.metrics.console import ConsoleReporter, note
from minimax_train.metrics.plot import plot_loss

# What somebody should look at.
_ALERTS = ("outlier", "rollback", "stall", "stopped")
_STEP = re.compile(rb'\{"step": (\d+),')


class MetricLog:
    """The reports of one run, made by its first rank; on other ranks every call does nothing. As a context, it closes
    with the exit status of the error that ends it.

    Args:
        config: the ``logging`` group.
        run_dir: ``metrics.jsonl``, ``events.jsonl`` and ``loss.png`` go there.
        run_config: the whole configuration by dotted key, for Weights & Biases.
        first_step: steps already taken; records of later steps, left by a run that went on past its last
            checkpoint, are dropped, so that the file holds each step once.

    Raises:
        ConfigError: on all ranks, when ``metrics.jsonl`` is not that of a run or cannot be written, or Weights & Biases
            cannot be reached.
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        run_config: Mapping[str, Any],
        *,
        total_steps: int,
        first_step: int,
        enabled: bool,
    ) -> None:
        self.enabled, self.run_dir, self.step = enabled, run_dir, first_step

        def start() -> None:
            try:
                self.tokens = _drop_later(run_dir / METRICS, first_step)
                self.lines, self.events = _Lines(run_dir / METRICS), _Lines(run_dir / EVENTS)
                self.console = ConsoleReporter(total_steps, first_step)
                self.wandb = _start_wandb(config, run_dir, run_config) if config.wandb != "off" else None
                self.tensorboard = _start_tensorboard(run_dir, first_step) if config.tensorboard else None
            except OSError as error:
                raise ConfigError(f"run_dir={str(run_dir)!r}: metrics cannot be written: {error}") from error

        on_first_rank(start)

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step; steps count from 1."""
        self.step = step
        if not self.enabled:
            return
        self.lines.add({"step": step, **metrics})
        self.console.report(step, metrics)
        if self.wandb is not None:
            # W&B draws over tokens only what is logged with them. An evaluation lies where the record before it does.
            self.tokens = metrics.get("tokens", self.tokens)
            self.wandb.log({"step": step, "tokens": self.tokens, **metrics})
        if self.tensorboard is not None:
            try:
                for name, value in metrics.items():
                    self.tensorboard.add_scalar(name, value, step)
            except OSError as error:
                note(f"{self.run_dir / TENSORBOARD}: cannot be written: {error.strerror}; the run goes on without")
                self.tensorboard = None

    def event(self, kind: str, step: int, text: str, *, says: bool = True) -> None:
        """Record what has happened: with its time in ``events.jsonl``, and as an alert of Weights & Biases if somebody
        should look at it.

        Args:
            kind: ``start``, ``stage``, ``checkpoint``, ``outlier``, ``rollback``, ``stall``, ``saved``, ``stopped`` or
                ``done``.
            says: whether the person watching is told, who may know it otherwise.
        """
        if not self.enabled:
            return
        self.events.add({"step": step, "time": round(time.time(), 3), "event": kind, "text": text})
        if says:
            self.console.say(text)
        if self.wandb is not None and kind in _ALERTS:
            self.wandb.alert(title=f"{kind}: {self.run_dir.resolve().name}"[:63], text=text, level="WARN")

    def plan(self, total_steps: int, stage: str) -> None:
        """How many steps the run has as far as is known now, and what the console calls this part of it."""
        if self.enabled:
            self.console.total_steps, self.console.stage = total_steps, stage

    def go_back(self, step: int) -> None:
        """Drop the records of steps after this one, which are taken again."""
        if self.enabled:
            self.lines.close()
            self.tokens = _drop_later(self.lines.path, step)
            self.lines = _Lines(self.lines.path)

    def holds(self, step: int, name: str) -> bool:
        """Whether a metric of a step has been recorded; the same on all ranks."""
        return on_first_rank(
            lambda: any(name in record for record in read_records(self.lines.path) if record["step"] == step)
        )

    def say(self, text: str) -> None:
        """Tell the person watching."""
        if self.enabled:
            self.console.say(text)

    def stall(self, text: str) -> None:
        """Of the watchdog, from a thread of its own, before it ends this process."""
        self.event("stall", self.step, text, says=False)
        if self.wandb is not None:
            self.wandb.finish(exit_code=1)

    def finish(self) -> None:
        """Draw the loss curve."""
        if self.enabled:
            try:
                plot_loss(read_records(self.lines.path), self.run_dir / PICTURE)
            except Exception as error:  # of a run that is saved
                note(f"{self.run_dir / PICTURE} was not drawn: {type(error).__name__}: {error}")

    def close(self, status: int = 0) -> None:
        """The end of the run.

        Args:
            status: exit status of the process, for Weights & Biases.
        """
        if self.enabled:
            self.console.close()
            self.lines.close()
            self.events.close()
            if self.tensorboard is not None:
                self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish(exit_code=status)

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and is_of_communication(error):
            return  # to be told by the watchdog, which ends the process
        if error is not None and not isinstance(error, Saved):
            is_interrupted = isinstance(error, KeyboardInterrupt)
            text = "interrupted" if is_interrupted else str(error) or type(error).__name__
            self.event("stopped", self.step, text, says=False)
        self.close(0 if error is None else exit_status(error))


def _drop_later(path: Path, last_step: int) -> int:
    """Of a ``metrics.jsonl``, so that it holds each step once.

    Returns:
        The tokens trained on at the last record that is left.
    """
    records = read_records(path)
    kept = [record for record in records if record["step"] <= last_step]
    if len(kept) < len(records):
        note(f"{path}: dropped {len(records) - len(kept)} records of steps after {last_step}, which are taken again")
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return next((record["tokens"] for record in reversed(kept) if "tokens" in record), 0)


class _Lines:
    """A file of JSON lines, open for more. What a full disk does not take is kept, and written with a later line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting, self._failed = b"", False

    def add(self, record: Mapping[str, Any]) -> None:
        self._waiting += f"{json.dumps(record)}\n".encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._failed = False
        except OSError as error:
            if not self._failed:
                note(f"{self.path}: cannot be written: {error.strerror}; its lines wait until it can")
            self._failed = True

    def close(self) -> None:
        if self._waiting:
            note(f"{self.path}: its last {len(self._waiting.splitlines())} lines could not be written")
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, or of an ``events.jsonl``; a last line cut short by a kill is left out.

    Raises:
        ConfigError: naming the first line that is none.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n"):
            try:
                record = json.loads(line)
                records.append({"step": int(record["step"]), **record})
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(f"{path}:{number}: not a record of a run; move the file away") from error
    return records


def read_steps(path: Path, steps: Collection[int]) -> dict[int, dict[str, Any]]:
    """All metrics of some steps, those of an evaluation included, from a ``metrics.jsonl``; lines that are no records
    are passed over.

    Raises:
        OSError: when the file is there and cannot be read.
    """
    found: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return found
    with path.open("rb") as lines:
        for line in lines:
            begin = _STEP.match(line)  # of a million lines, few are parsed
            if begin is None or int(begin[1]) not in steps:
                continue
            with suppress(ValueError):
                found.setdefault(int(begin[1]), {}).update(json.loads(line))
    return found


def _start_wandb(config: LoggingConfig, run_dir: Path, run_config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"logging.wandb={config.wandb!r}: wandb is not installed (pip install wandb)") from error

    logging.raiseExceptions = (
        False  # wandb logs into run_dir: a full disk would print a traceback for each of its lines
    )
    # The id lives with the run, so that a resumed run goes on in the same place.
    id_file = run_dir / WANDB_ID
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or run_dir.resolve().name,
            id=id_file.read_text() if id_file.is_file() else None,
            resume="allow",
            mode="online" if config.wandb == "online" else "offline",
            dir=run_dir,
            config=dict(run_config),
        )
    except wandb.Error as error:
        raise ConfigError(f"logging.wandb={config.wandb!r}: {error}; or pass offline, or off") from error
    run.define_metric("*", step_metric="step")  # a resumed run logs the steps after its checkpoint again
    replace_text(id_file, run.id)
    return run


def _start_tensorboard(run_dir: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        told = "logging.tensorboard=True: tensorboard is not installed (pip install minimax_train[tensorboard])"
        raise ConfigError(told) from error
    return SummaryWriter(str(run_dir / TENSORBOARD), purge_step=first_step + 1)  # later steps are taken again
