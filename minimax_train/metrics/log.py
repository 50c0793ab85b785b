"""One place to report to; it passes each record on to the console, ``metrics.jsonl`` and Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimax_train.errors import ConfigError
from minimax_train.files import replace_text
from minimax_train.metrics.config import LoggingConfig
from minimax_train.metrics.console import ConsoleReporter
from minimax_train.metrics.plot import plot_loss


class MetricLog:
    """The reports of one run, made by its first rank; on other ranks every call does nothing.

    Args:
        config: the ``logging`` group.
        run_dir: ``metrics.jsonl`` and ``loss.png`` go there.
        run_config: the whole configuration by dotted key, for Weights & Biases.
        first_step: steps already taken; records of later steps, left by a run that went on past its last
            checkpoint, are dropped, so that the file holds each step once.
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
        self.enabled = enabled
        if not enabled:
            return
        self.run_dir, self.path = run_dir, run_dir / "metrics.jsonl"
        if not first_step:
            (run_dir / "wandb_id").unlink(missing_ok=True)  # of a run that never reached a checkpoint
        kept = [record for record in self.records() if record["step"] <= first_step] if first_step else []
        replace_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = self.path.open("a", buffering=1)
        self.console = ConsoleReporter(total_steps, first_step)
        self.wandb = _start_wandb(config, run_dir, run_config) if config.wandb != "off" else None

    def report(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step; steps count from 1."""
        if not self.enabled:
            return
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.console.report(step, metrics)
        if self.wandb is not None:
            self.wandb.log({"step": step, **metrics})

    def say(self, text: str) -> None:
        """Tell the person watching."""
        if self.enabled:
            self.console.say(text)

    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line cut short by a kill is left out."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def finish(self) -> None:
        """Draw the loss curve."""
        if self.enabled:
            plot_loss(self.records(), self.run_dir / "loss.png")

    def close(self) -> None:
        if self.enabled:
            self.console.close()
            self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


def _start_wandb(config: LoggingConfig, run_dir: Path, run_config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(f"logging.wandb={config.wandb!r}: wandb is not installed (pip install wandb)") from error

    # The id lives with the run, so that a resumed run goes on in the same place.
    id_file = run_dir / "wandb_id"
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
